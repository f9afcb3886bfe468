"""Exact nearest neighbours: blocks of vectors against blocks of vectors, one matrix product per pair of blocks.

`nearest` is the DataFrame function; `Nearest` is its numpy core. Scores are bit for bit those of the SQL functions
vector_inner_product and vector_cosine_similarity, and ties go to the smaller id: the result depends on the vectors
alone, not on blocks or partitions. That takes two steps, because a float32 matrix product rounds differently for
different block shapes: the product selects every candidate that may be among the k best, within its rounding-error
bound, and only those are scored exactly. Once a query has k candidates, few later ones pass its k-th score: the rest
cost the product and one comparison. If many pass, they are ties: of a block's candidates with identical vectors, only
the first k by id are scored.

With `cells` the search uses an inverted file (IVF): candidates are assigned to cells, and a query probes only a few
cells. Candidates in them are compared as above; those elsewhere are missed (recall: scripts/bench/neighbours.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from spark_udfs.arrow import matrix_of
from spark_udfs.vectors import inner_product, norm
from training.arrays import Bool, Float32, Float64, Int64

Metric = Literal["dot", "cosine"]
Ids = npt.NDArray[np.str_]  # [n]
# (row of the query, neighbour, score), by row, nearest first; all [at most rows * k]
Best = tuple[Int64, npt.NDArray[Any], Float32]
Pairs = tuple[Int64, Int64]  # (row of the query, row of the candidate); both [n]

_PAIRS_AT_ONCE = 1 << 11  # scored exactly at once: 1 MB of float64 per side, at width 64, stays in the CPU cache
_COLUMNS = 1024  # candidates per product, so that its result stays in the CPU cache
_SORTED_AT_ONCE = 256  # vectors assigned to cells in one product: 10 MB of float32 at 10,000 cells
_NO_PAIRS = np.empty(0, np.int64), np.empty(0, np.int64)
# The Spark settings that `nearest` needs.
BLOCK_CONF = {
    "spark.sql.execution.arrow.maxRecordsPerBatch": "4",  # a row holds two blocks, some megabytes
    # Few partitions of candidates: in each, a block of queries starts over, with no k-th score to prune by.
    "spark.sql.adaptive.coalescePartitions.parallelismFirst": "false",
    # A partition of candidates is held while the queries meet it: in memory that Spark can spill.
    "spark.sql.cartesianProductExec.buffer.in.memory.threshold": "1",
}

# ---- numpy: queries, candidates and other vectors are [n, width] -------------------------------------------------


class Nearest:
    """The k best candidates so far, for each query of a block."""

    def __init__(self, queries: Float32, k: int, metric: Metric) -> None:
        """Under "cosine" no vector may be zero, here and in `add`."""
        self._queries, self._lengths, self._unit = polar(queries)
        self._k, self._metric = k, metric
        self._scores = np.full((len(queries), k), -np.inf, np.float32)  # the k best, the lowest first
        self._parts: list[Best] = []

    def add(self, names: npt.NDArray[Any], candidates: Float32, left_out: Pairs = _NO_PAIRS) -> None:
        """Compares more candidates.

        Args:
            names: the candidates' names in the result; ties go to the smaller. Of one type in all calls.
            left_out: pairs to exclude.
        """
        exact, lengths, unit = polar(candidates)
        if self._metric == "cosine":
            short, scale = unit, np.ones(len(self._queries))
        else:
            # Scaled by the largest norm: the products keep their order, and none overflows.
            longest = lengths.max(initial=0.0) or 1.0
            short, scale = np.asarray(candidates / longest, np.float32), self._lengths * longest
        order = np.argsort(left_out[1])
        out_rows, out_columns = left_out[0][order], left_out[1][order]
        early = None
        for start in range(0, len(candidates), _COLUMNS):
            approximate = self._unit @ short[start : start + _COLUMNS].T
            first, last = np.searchsorted(out_columns, (start, start + _COLUMNS))
            approximate[out_rows[first:last], out_columns[first:last] - start] = -np.inf
            near = approximate >= self._floor(approximate, scale)
            if np.count_nonzero(near) > 2 * self._scores.size:  # ties, such as new items with the same attributes
                if early is None:
                    early = _first_twins(names, candidates, self._k + int(np.bincount(out_rows).max(initial=0)))
                near &= early[start : start + _COLUMNS]
            # Not np.nonzero(near), which takes as long as the product.
            rows, columns = np.divmod(np.flatnonzero(near), near.shape[1])
            if len(rows):
                columns += start
                both = (self._lengths, lengths) if self._metric == "cosine" else None
                self._take(rows, names[columns], pair_scores(self._queries, exact, (rows, columns), both))

    def best(self) -> Best:
        if not self._parts:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        rows, names, scores = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        # Most were among the best only when they came, and sorting is slow.
        return keep_best(*self._still_best(rows, names, scores), self._k)

    def _still_best(self, rows: Int64, names: npt.NDArray[Any], scores: Float32) -> Best:
        """Those that reach their query's k-th best score so far."""
        reaches = scores >= self._scores[rows, 0]
        return rows[reaches], names[reaches], scores[reaches]

    def _floor(self, approximate: Float32, scale: Float64) -> Float32:
        """The approximate score that a candidate must reach to possibly be among the k best so far: [queries, 1]."""
        # A product of vectors of norm at most 1 is off by at most (width + 2) roundings. Two products are compared, the
        # candidate's and the k-th best's; the rest of the margin covers rounding of scores and of the subtraction.
        margin = 2 * (self._queries.shape[1] + 8) * np.finfo(np.float32).eps
        lowest = np.finfo(np.float32).min  # passes everything but -inf, the excluded pairs
        kth = self._scores[:, 0].astype(np.float64)
        floor = np.divide(kth, scale, out=np.zeros(len(kth)), where=scale > 0)
        floor[np.isneginf(kth)] = -np.inf
        if (few := np.isneginf(floor)).any() and (count := approximate.shape[1]) > self._k:
            # Queries with fewer than k so far: the k-th best of this product is a lower bound.
            floor[few] = np.partition(approximate[few], count - self._k, axis=1)[:, count - self._k]
        return np.asarray(np.maximum(floor - margin, lowest), np.float32)[:, None]

    def _take(self, rows: Int64, names: npt.NDArray[Any], scores: Float32) -> None:
        rows, names, scores = self._still_best(rows, names, scores)
        self._parts.append((rows, names, scores))
        query_rows = np.unique(rows)
        order = np.lexsort((scores, rows))
        rows, scores = rows[order], scores[order]
        # Merge each query's k highest new scores into those that it had.
        starts, ends = np.searchsorted(rows, query_rows), np.searchsorted(rows, query_rows, side="right")
        width = min(self._k, int((ends - starts).max(initial=0)))
        places = ends[:, None] - 1 - np.arange(width)
        inside = places >= starts[:, None]
        new = np.where(inside, scores[np.where(inside, places, 0)], -np.inf).astype(np.float32)
        both = np.sort(np.concatenate([self._scores[query_rows], new], axis=1), axis=1)
        self._scores[query_rows] = both[:, -self._k :]
        if sum(len(part[0]) for part in self._parts) > 16 * self._scores.size:
            self._parts = [self.best()]


def top_k(
    queries: Float32,
    candidates: Float32,
    k: int,
    metric: Metric,
    *,
    query_ids: Ids | None = None,
    candidate_ids: Ids | None = None,
) -> Best:
    """The k best candidates of each query, or all if there are fewer; ties go to the smaller row number.

    Neighbours are row numbers in `candidates`: sort those by id to break ties by id. If both ids are given, a
    candidate with the query's own id is excluded. Under "cosine" no vector may be zero.
    """
    search = Nearest(queries, min(k, len(candidates)), metric)  # capped, because memory grows with k
    own = _NO_PAIRS if query_ids is None or candidate_ids is None else _same(query_ids, candidate_ids)
    search.add(np.arange(len(candidates)), candidates, own)
    return search.best()


def keep_best(rows: Int64, ids: npt.NDArray[Any], scores: Float32, k: int) -> Best:
    """The k highest scores of each row, ties to the smaller id."""
    order = np.lexsort((ids, -scores, rows))
    rows, ids, scores = rows[order], ids[order], scores[order]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    return rows[rank < k], ids[rank < k], scores[rank < k]


def _first_twins(names: npt.NDArray[Any], vectors: Float32, count: int) -> Bool:
    """Whether each vector's name is among the `count` smallest of all identical vectors, [n]."""
    whole = np.ascontiguousarray(vectors).view(f"V{vectors.shape[1] * vectors.itemsize}")[:, 0]
    twins = np.unique(whole, return_inverse=True)[1]
    order = np.lexsort((names, twins))
    first = np.empty(len(twins), np.bool_)
    first[order] = np.arange(len(twins)) - np.searchsorted(twins[order], twins[order]) < count
    return first


def _same(ids: Ids, others: Ids) -> Pairs:
    """The positions in both of each id that they share; ids are unique within each."""
    _, place, other = np.intersect1d(ids, others, assume_unique=True, return_indices=True)
    return place.astype(np.int64), other.astype(np.int64)


def polar(vectors: Float32) -> tuple[Float64, Float64, Float32]:
    """The vectors in float64, their norms, and float32 unit vectors (zero for a zero vector)."""
    exact = vectors.astype(np.float64)
    lengths = norm(exact)
    return exact, lengths, np.asarray(exact / np.where(lengths > 0, lengths, 1)[:, None], np.float32)


def unit_vectors(vectors: Float32) -> Float32:
    return polar(vectors)[2]


def pair_scores(left: Float64, right: Float64, pairs: Pairs, lengths: tuple[Float64, Float64] | None) -> Float32:
    """The score of each pair of a row of `left` and a row of `right`: bit for bit vector_inner_product; given both
    sides' `lengths` (norms, none zero, so that they are not recomputed per pair), vector_cosine_similarity."""
    scores = np.empty(len(pairs[0]), np.float32)
    for start in range(0, len(scores), _PAIRS_AT_ONCE):
        row, column = (of[start : start + _PAIRS_AT_ONCE] for of in pairs)
        products = inner_product(left[row], right[column])
        if lengths is not None:
            products /= lengths[0][row] * lengths[1][column]
        scores[start : start + len(row)] = products
    return scores


# ---- cells -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """An inverted file's coarse quantizer (Jégou, Douze, Schmid 2011): assigns vectors to their nearest centre.

    Attributes:
        centres: float32 [cells, width], of norm 1 under "cosine".
        metric: the one that they were trained for.
        probes: number of cells that a query probes: those whose centres score highest with it.
    """

    centres: Float32
    metric: Metric
    probes: int

    def of_candidates(self, vectors: Float32) -> Int64:
        """Each candidate's cell, [n]."""
        # |x - c|² without |x|², which is the same for all centres, halved and negated: one pass over the products less.
        return np.asarray(np.argmax(self._prepared(vectors) @ self.centres.T - self._half_squares, axis=1))

    def of_queries(self, vectors: Float32) -> Int64:
        """The cells that each query probes, [n, probes]."""
        scores = self._prepared(vectors) @ self.centres.T
        return np.argpartition(-scores, self.probes - 1, axis=1)[:, : self.probes]

    @cached_property
    def _half_squares(self) -> Float32:
        return np.asarray((self.centres.astype(np.float64) ** 2).sum(axis=1) / 2, np.float32)

    def _prepared(self, vectors: Float32) -> Float32:
        return unit_vectors(vectors) if self.metric == "cosine" else vectors


def find_cells(sample: Float32, metric: Metric, cells: int, probes: int) -> Cells:
    """Cells by k-means over a sample of the candidates; fewer if the sample is small.

    Raises:
        ImportError: faiss is not installed.
    """
    import faiss  # noqa: PLC0415 - optional, and only the driver needs it

    vectors = unit_vectors(sample) if metric == "cosine" else sample
    count = max(1, min(cells, len(vectors)))
    means = faiss.Kmeans(  # with as many rounds as faiss's own inverted files
        vectors.shape[1], count, niter=10, seed=1, spherical=metric == "cosine", min_points_per_centroid=1
    )
    means.train(np.ascontiguousarray(vectors))
    return Cells(np.asarray(means.centroids), metric, min(probes, count))


# ---- Spark -------------------------------------------------------------------------------------------------------


def nearest(
    queries: DataFrame,
    candidates: DataFrame,
    k: int,
    metric: Metric,
    *,
    same_kind: bool,
    block_rows: int,
    counts: tuple[int, int],
    tasks: int,
    cells: Cells | None = None,
) -> DataFrame:
    """The k nearest candidates of each query. Run it under BLOCK_CONF. Zero vectors have no cosine: under "cosine" they
    are skipped.

    Args:
        queries: id string, vector array<float>, and optionally left_out array<string>: candidates to exclude for the
            query.
        candidates: id string, vector array<float>; all vectors of one length, ids unique.
        same_kind: both sides are of one kind (users, say), so a candidate with the query's id is the query itself and
            is excluded. An item and a user may share an id and are distinct.
        block_rows: about how many vectors are on each side of a matrix product; with cells, at most so many.
        counts: approximate row counts of `queries` and `candidates`.
        tasks: the query blocks are spread over at most so many partitions. Spark itself would size partitions by bytes:
            too few, since blocks are small to read but slow to compare.
        cells: of `candidates`, by `find_cells` for the same metric; None: exact.

    Returns:
        source_id string, rank int from 1 up, neighbour_id string, score float.
    """
    if metric == "cosine":
        not_zero = F.exists("vector", lambda x: x != 0)
        queries, candidates = queries.where(not_zero), candidates.where(not_zero)
    if "left_out" not in queries.columns:
        queries = queries.withColumn("left_out", F.array().cast("array<string>"))
    candidates = candidates.withColumn("left_out", F.array().cast("array<string>"))
    if cells is None:
        pairs = _all_pairs(queries, candidates, [-(-count // block_rows) or 1 for count in counts], tasks)
    else:
        of_queries, of_candidates = (
            _blocks(_numbered_in_cells(_in_cells(side, cells, asking=asking), block_rows), name)
            for side, asking, name in ((queries, True, "query"), (candidates, False, "candidate"))
        )
        of_queries, of_candidates = (side.repartition(tasks, "cell") for side in (of_queries, of_candidates))
        pairs = of_queries.join(of_candidates, "cell").drop("cell")

    def compare(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return _compare(batches, k, metric, same_kind)

    partial = pairs.mapInArrow(compare, "source_id string, neighbour_id string, score float")
    by_score = Window.partitionBy("source_id").orderBy(F.desc("score"), "neighbour_id")
    ranked = partial.withColumn("rank", F.row_number().over(by_score)).where(F.col("rank") <= k)
    return ranked.select("source_id", "rank", "neighbour_id", "score")


def _in_cells(vectors: DataFrame, cells: Cells, *, asking: bool) -> DataFrame:
    """Adds a column cell. Queries (`asking`) get a row for each cell that they probe."""
    shared = vectors.sparkSession.sparkContext.broadcast(cells)

    def sort_in(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in _gathered(batches):
            rows = matrix_of(batch.column("vector"))
            cell_numbers = shared.value.of_queries(rows) if asking else shared.value.of_candidates(rows)[:, None]
            columns = [
                batch.column(name).take(pa.array(np.repeat(np.arange(len(rows)), cell_numbers.shape[1])))
                for name in ("id", "vector", "left_out")
            ]
            cell = pa.array(cell_numbers.reshape(-1), pa.int32())
            yield pa.RecordBatch.from_arrays([*columns, cell], ["id", "vector", "left_out", "cell"])

    schema = "id string, vector array<float>, left_out array<string>, cell int"
    return vectors.select("id", "vector", "left_out").mapInArrow(sort_in, schema)


def _gathered(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in larger batches: BLOCK_CONF's have a few rows, and each batch has to read all centres."""
    some: list[pa.RecordBatch] = []
    for batch in batches:
        some.append(batch)
        if sum(of.num_rows for of in some) >= _SORTED_AT_ONCE:
            yield from pa.Table.from_batches(some).combine_chunks().to_batches()
            some = []
    if some:
        yield from pa.Table.from_batches(some).combine_chunks().to_batches()


def _all_pairs(queries: DataFrame, candidates: DataFrame, blocks: Sequence[int], tasks: int) -> DataFrame:
    """Each block of queries with each block of candidates. `blocks`: how many there are of each."""
    # The blocks are shuffled as such: Spark computes each partition of a product once per partition of the other side.
    of_queries = _blocks(_numbered(queries, blocks[0]), "query").repartition(min(tasks, blocks[0]), "query_block")
    of_candidates = _blocks(_numbered(candidates, blocks[1]), "candidate").repartition("candidate_block")
    # By the hint a block of queries meets all candidates of a task before the next block does. Spark would otherwise
    # broadcast a small side of queries, each candidate would meet them one by one, and every meeting would start over.
    return of_queries.drop("cell").crossJoin(of_candidates.drop("cell").hint("shuffle_replicate_nl"))


def _numbered(vectors: DataFrame, blocks: int) -> DataFrame:
    """Adds a constant column cell, and a column block, by hash."""
    return vectors.withColumns({"cell": F.lit(0), "block": F.pmod(F.xxhash64("id"), F.lit(blocks))})


def _numbered_in_cells(vectors: DataFrame, block_rows: int) -> DataFrame:
    """Adds a column block: at most block_rows vectors of one cell, since some cells are many times the mean size."""
    place = F.row_number().over(Window.partitionBy("cell").orderBy("id")) - 1
    # Unique across cells: `_compare` tells blocks of queries apart by it.
    return vectors.withColumn("block", F.shiftleft(F.col("cell").cast("long"), 32) + F.floor(place / block_rows))


def _blocks(numbered: DataFrame, name: str) -> DataFrame:
    """One row per block, each of one cell: cell int, <name>_block long, <name> struct of ids, vectors (concatenated
    float32 as bytes, because a block is sent to Python once per block that it is compared with), left_out and their
    counts; sorted by id."""
    rows = F.sort_array(F.collect_list(F.struct("id", "vector", "left_out"))).alias("rows")
    packed = (
        "cell int, block long, ids array<string>, vectors binary, left_out array<string>, left_out_counts array<int>"
    )
    blocks = numbered.groupBy("cell", "block").agg(rows).mapInArrow(_pack, packed)
    columns = [F.col(column) for column in ("ids", "vectors", "left_out", "left_out_counts")]
    return blocks.select("cell", F.col("block").alias(f"{name}_block"), F.struct(*columns).alias(name))


def _pack(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        for row in range(batch.num_rows):
            block = batch.slice(row, 1)
            rows = block.column("rows").flatten()
            left_out = rows.field("left_out")
            vectors = rows.field("vector").flatten().to_numpy()
            columns = [
                block.column("cell"),
                block.column("block"),
                _one_list(rows.field("id")),
                pa.array([vectors.tobytes()], pa.binary()),
                _one_list(left_out.flatten()),
                _one_list(left_out.value_lengths()),
            ]
            names = ["cell", "block", "ids", "vectors", "left_out", "left_out_counts"]
            yield pa.RecordBatch.from_arrays(columns, names)


def _one_list(values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def _compare(batches: Iterable[pa.RecordBatch], k: int, metric: Metric, same_kind: bool) -> Iterator[pa.RecordBatch]:
    """Pairs of blocks → the k best of each query, over each run of pairs with the same query block."""
    current = None
    for batch in batches:
        for row in range(batch.num_rows):
            number = batch.column("query_block")[row].as_py()
            if current is None or number != current.number:
                if current is not None:
                    yield current.batch()
                current = _Queries(number, batch.column("query").slice(row, 1), k, metric, same_kind)
            current.meet(batch.column("candidate").slice(row, 1))
    if current is not None:
        yield current.batch()


class _Queries:
    """A block of queries, compared with one block of candidates after the other."""

    def __init__(self, number: int, block: pa.StructArray, k: int, metric: Metric, same_kind: bool) -> None:
        self.number = number
        self._same_kind = same_kind
        self._ids, vectors = _unpack(block)
        self._nearest = Nearest(vectors, k, metric)
        # Deduplicated: a numpy string array takes four bytes per character of its longest string, for every entry.
        names = block.field("left_out").flatten().dictionary_encode()
        counts = block.field("left_out_counts").flatten().to_numpy()
        once = names.dictionary.to_numpy(zero_copy_only=False).astype(np.str_)
        # In order: `_same` sorts them at every meeting, which takes little time then.
        order = np.argsort(once)
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        self._left_out, self._which = once[order], place[names.indices.to_numpy()]
        self._rows = np.repeat(np.arange(len(counts)), counts)

    def meet(self, block: pa.StructArray) -> None:
        ids, vectors = _unpack(block)
        rows, columns = _same(self._ids, ids) if self._same_kind else _NO_PAIRS
        if len(self._left_out):
            known, column = _same(self._left_out, ids)
            place_of = np.full(len(self._left_out), -1, np.int64)
            place_of[known] = column
            place = place_of[self._which]
            rows = np.concatenate([rows, self._rows[place >= 0]])
            columns = np.concatenate([columns, place[place >= 0]])
        self._nearest.add(ids, vectors, (rows, columns))

    def batch(self) -> pa.RecordBatch:
        rows, neighbours, scores = self._nearest.best()
        columns = [pa.array(self._ids[rows], pa.string()), pa.array(neighbours.astype(np.str_), pa.string())]
        return pa.RecordBatch.from_arrays([*columns, pa.array(scores)], ["source_id", "neighbour_id", "score"])


def _unpack(block: pa.StructArray) -> tuple[Ids, Float32]:
    ids = block.field("ids").flatten().to_numpy(zero_copy_only=False).astype(np.str_)
    vectors = np.frombuffer(block.field("vectors")[0].as_py(), np.float32)
    return ids, vectors.reshape(len(ids), -1)
