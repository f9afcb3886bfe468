"""Exact nearest neighbours: blocks of vectors against blocks of vectors, a matrix product for each pair.

`nearest` is the whole of it as a DataFrame function; `top_k` is its numpy core. A score is what the SQL functions
vector_inner_product and vector_cosine_similarity give for the two vectors, to the bit, and ties go to the smaller
id: the result depends on nothing but the vectors, neither on the blocks nor on the partitions. That takes two steps,
since a float32 matrix product rounds differently from one block shape to the next: the product picks every
candidate that may be among the k best, within the bound of its rounding error, and those alone are scored one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from spark_udfs.vectors import cosine_similarity, inner_product

Metric = Literal["dot", "cosine"]
Vectors = npt.NDArray[np.float32]  # [n, length]
Ids = npt.NDArray[np.str_]  # [n]
# (row of the query, neighbour, score), by row and from the nearest on; all [at most rows * k]
Best = tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[np.float32]]

_SCORERS = {"dot": inner_product, "cosine": cosine_similarity}
_PAIRS_AT_ONCE = 1 << 16  # candidates scored in one go: 64 MiB for vectors of 64

# ---- numpy -------------------------------------------------------------------------------------------------------


def top_k(
    queries: Vectors,
    candidates: Vectors,
    k: int,
    metric: Metric,
    *,
    query_ids: Ids | None = None,
    candidate_ids: Ids | None = None,
) -> Best:
    """The k best candidates of each query, or all where there are fewer; ties go to the smaller row number.

    Neighbours are row numbers in `candidates`: sort those by id to break ties by id. Where ids are given, a
    candidate with the query's own id is left out. Under "cosine" no vector may be zero.
    """
    approximate = _unit(queries) @ (_unit(candidates) if metric == "cosine" else _shrunk(candidates)).T
    if query_ids is not None and candidate_ids is not None:
        _, own_query, own_candidate = np.intersect1d(query_ids, candidate_ids, return_indices=True)
        approximate[own_query, own_candidate] = -np.inf
    rows, columns = np.nonzero(approximate >= _floor(approximate, k, queries.shape[1]))
    scores = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _PAIRS_AT_ONCE):
        some = slice(start, start + _PAIRS_AT_ONCE)
        pair = queries[rows[some]].astype(np.float64), candidates[columns[some]].astype(np.float64)
        scores[some] = _SCORERS[metric](*pair)
    return keep_best(rows, columns, scores, k)


def keep_best(rows: npt.NDArray[np.int64], ids: npt.NDArray[Any], scores: npt.NDArray[np.float32], k: int) -> Best:
    """The k highest scores of each row, ties to the smaller id."""
    order = np.lexsort((ids, -scores, rows))
    rows, ids, scores = rows[order], ids[order], scores[order]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    return rows[rank < k], ids[rank < k], scores[rank < k]


def _unit(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1), np.float32)


def _shrunk(vectors: Vectors) -> Vectors:
    """All vectors divided by the longest one's length: the order of dot products is the same, none overflows."""
    longest = np.linalg.norm(vectors.astype(np.float64), axis=1).max(initial=0.0)
    return np.asarray(vectors / (longest or 1.0), np.float32)


def _floor(approximate: npt.NDArray[np.float32], k: int, length: int) -> npt.NDArray[np.float32]:
    """What a candidate's approximate score must reach to be one of the k best: [queries, 1]."""
    count = approximate.shape[1]
    if count <= k:
        return np.full((len(approximate), 1), np.finfo(np.float32).min, np.float32)  # all but -inf, the query itself
    kth = np.partition(approximate, count - k, axis=1)[:, count - k, None]
    # A product of vectors no longer than 1 is off by at most (length + 2) roundings, here and at the k-th best; the
    # score's own rounding to float32 and that of the subtraction below are covered by the rest.
    return np.asarray(np.maximum(kth - 2 * (length + 8) * np.finfo(np.float32).eps, np.finfo(np.float32).min))


# ---- Spark -------------------------------------------------------------------------------------------------------


def nearest(
    queries: DataFrame, candidates: DataFrame, k: int, metric: Metric, *, block_rows: int, counts: tuple[int, int]
) -> DataFrame:
    """The k nearest candidates of each query, never itself; zero vectors have no cosine and are left out of it.

    Args:
        queries, candidates: id string, vector array<float>; all vectors of one length, no id twice.
        block_rows: about how many vectors stand on each side of a matrix product.
        counts: about how many rows `queries` and `candidates` have.

    Returns:
        source_id string, rank int from 1 on, neighbour_id string, score float. Run it inside `small_batches`.
    """
    if metric == "cosine":
        not_zero = F.exists("vector", lambda x: x != 0)
        queries, candidates = queries.where(not_zero), candidates.where(not_zero)
    pairs = _blocks(queries, counts[0], block_rows, "query").crossJoin(
        _blocks(candidates, counts[1], block_rows, "candidate")
    )

    def compare(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return _compare(batches, k, metric)

    partial = pairs.mapInArrow(compare, "source_id string, neighbour_id string, score float")
    by_score = Window.partitionBy("source_id").orderBy(F.desc("score"), "neighbour_id")
    ranked = partial.withColumn("rank", F.row_number().over(by_score)).where(F.col("rank") <= k)
    return ranked.select("source_id", "rank", "neighbour_id", "score")


@contextmanager
def small_batches(spark: SparkSession) -> Iterator[None]:
    """Hands Python a few rows at once while the block runs: a row of `nearest` holds two blocks, some megabytes."""
    key = "spark.sql.execution.arrow.maxRecordsPerBatch"
    before = spark.conf.get(key)
    spark.conf.set(key, "4")
    try:
        yield
    finally:
        spark.conf.set(key, str(before))


def _blocks(vectors: DataFrame, count: int, block_rows: int, name: str) -> DataFrame:
    """One row per block: <name>_block int, <name> array of (id, vector), sorted by id."""
    number = F.pmod(F.xxhash64("id"), F.lit(-(-count // block_rows) or 1)).cast("int").alias(f"{name}_block")
    return vectors.groupBy(number).agg(F.sort_array(F.collect_list(F.struct("id", "vector"))).alias(name))


def _compare(batches: Iterable[pa.RecordBatch], k: int, metric: Metric) -> Iterator[pa.RecordBatch]:
    """Pairs of blocks → the k best of each query, over all the candidate blocks that follow one another."""
    current, ids, best = None, np.empty(0, np.str_), None
    for batch in batches:
        for row in range(batch.num_rows):
            pair = batch.slice(row, 1)
            block = pair.column("query_block")[0].as_py()
            if block != current:
                if best is not None:
                    yield _batch(ids, best)
                current, best = block, None
                ids, queries = _unpack(pair.column("query"))
            candidate_ids, candidates = _unpack(pair.column("candidate"))
            rows, columns, scores = top_k(queries, candidates, k, metric, query_ids=ids, candidate_ids=candidate_ids)
            found = rows, candidate_ids[columns], scores
            best = found if best is None else _merge(best, found, k)
    if best is not None:
        yield _batch(ids, best)


def _merge(best: Best, found: Best, k: int) -> Best:
    rows = np.concatenate([best[0], found[0]])
    ids = np.concatenate([best[1], found[1]])
    scores = np.concatenate([best[2], found[2]])
    return keep_best(rows, ids, scores, k)


def _unpack(block: pa.ListArray) -> tuple[Ids, Vectors]:
    items = block.flatten()
    ids = items.field("id").to_numpy(zero_copy_only=False).astype(np.str_)
    return ids, items.field("vector").flatten().to_numpy().reshape(len(ids), -1)


def _batch(ids: Ids, best: Best) -> pa.RecordBatch:
    rows, neighbours, scores = best
    columns = [pa.array(ids[rows], pa.string()), pa.array(neighbours, pa.string()), pa.array(scores)]
    return pa.RecordBatch.from_arrays(columns, ["source_id", "neighbour_id", "score"])
