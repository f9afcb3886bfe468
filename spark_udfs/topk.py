"""Exact nearest neighbours: blocks of vectors against blocks of vectors, a matrix product for each pair.

`nearest` is the whole of it as a DataFrame function; `Nearest` is its numpy core. A score is what the SQL functions
vector_inner_product and vector_cosine_similarity give for the two vectors, to the bit, and ties go to the smaller
id: the result depends on nothing but the vectors, neither on the blocks nor on the partitions. That takes two steps,
since a float32 matrix product rounds differently from one block shape to the next: the product picks every
candidate that may be among the k best, within the bound of its rounding error, and those alone are scored one by one.
Once a query has k, few candidates of a later block pass its k-th score: the rest costs the product and one comparison.
Where many pass, they are ties: of the block's candidates of the very same vector the first k by id are scored alone.

With `cells` the search is an inverted file: candidates are sorted into cells, and a query meets those of a few cells
alone. What it meets is compared as above; what it does not meet it cannot find (recall: scripts/bench/neighbours.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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

Metric = Literal["dot", "cosine"]
Vectors = npt.NDArray[np.float32]  # [n, length]
Numbers = npt.NDArray[np.float64]
Ids = npt.NDArray[np.str_]  # [n]
Integers = npt.NDArray[np.int64]
# (row of the query, neighbour, score), by row and from the nearest on; all [at most rows * k]
Best = tuple[Integers, npt.NDArray[Any], npt.NDArray[np.float32]]
Pairs = tuple[Integers, Integers]  # (row of the query, row of the candidate); both [n]

_PAIRS_AT_ONCE = 1 << 11  # scored to the bit in one go: 1 MB of float64 a side at 64 numbers stays in the cache
_COLUMNS = 1024  # candidates of one product: its result stays in the processor's cache
_SORTED_AT_ONCE = 256  # vectors that are put into cells in one product: at 10,000 cells 20 MB of float64
_NO_PAIRS = np.empty(0, np.int64), np.empty(0, np.int64)
# What `nearest` wants of Spark.
BLOCK_CONF = {
    "spark.sql.execution.arrow.maxRecordsPerBatch": "4",  # a row holds two blocks, some megabytes
    # Candidates in few partitions: in each a block of queries begins anew, without scores that the next must pass.
    "spark.sql.adaptive.coalescePartitions.parallelismFirst": "false",
}

# ---- numpy -------------------------------------------------------------------------------------------------------


class Nearest:
    """The k best candidates so far of each query of a block."""

    def __init__(self, queries: Vectors, k: int, metric: Metric) -> None:
        """Under "cosine" no vector may be zero, here and in `add`."""
        self._queries, self._lengths, self._unit = polar(queries)
        self._k, self._metric = k, metric
        self._scores = np.full((len(queries), k), -np.inf, np.float32)  # the k best, the lowest first
        self._found: list[Best] = []

    def add(self, names: npt.NDArray[Any], candidates: Vectors, left_out: Pairs = _NO_PAIRS) -> None:
        """Looks at more candidates.

        Args:
            names: what they are called in the result; ties go to the smaller. Of one type in all calls.
            left_out: pairs that are not to be found.
        """
        exact, lengths, unit = polar(candidates)
        if self._metric == "cosine":
            short, scale = unit, np.ones(len(self._queries))
        else:
            # Divided by the longest one's length: the order of products is the same, none overflows.
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
            if np.count_nonzero(near) > 2 * self._scores.size:  # ties: new items that are described alike, say
                if early is None:
                    early = _first_twins(names, candidates, self._k + int(np.bincount(out_rows).max(initial=0)))
                near &= early[start : start + _COLUMNS]
            rows, columns = np.nonzero(near)
            if len(rows):
                columns += start
                both = (self._lengths, lengths) if self._metric == "cosine" else None
                self._take(rows, names[columns], pair_scores(self._queries, exact, (rows, columns), both))

    def best(self) -> Best:
        if not self._found:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        rows, names, scores = (np.concatenate(parts) for parts in zip(*self._found, strict=True))
        return keep_best(rows, names, scores, self._k)

    def _floor(self, approximate: npt.NDArray[np.float32], scale: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """What an approximate score must reach to be one of the k best so far: [queries, 1]."""
        # A product of vectors no longer than 1 is off by at most (length + 2) roundings. There are two, this and the
        # k-th best's; the rest of the margin is for the rounding of scores and of the subtraction below.
        margin = 2 * (self._queries.shape[1] + 8) * np.finfo(np.float32).eps
        lowest = np.finfo(np.float32).min  # all but -inf, what is left out
        kth = self._scores[:, 0].astype(np.float64)
        floor = np.divide(kth, scale, out=np.zeros(len(kth)), where=scale > 0)
        floor[np.isneginf(kth)] = -np.inf
        if (few := np.isneginf(floor)).any() and (count := approximate.shape[1]) > self._k:
            # Queries with fewer than k so far: at least the k best of this product will be taken.
            floor[few] = np.partition(approximate[few], count - self._k, axis=1)[:, count - self._k]
        return np.asarray(np.maximum(floor - margin, lowest), np.float32)[:, None]

    def _take(self, rows: Integers, names: npt.NDArray[Any], scores: npt.NDArray[np.float32]) -> None:
        there = scores >= self._scores[rows, 0]
        rows, names, scores = rows[there], names[there], scores[there]
        self._found.append((rows, names, scores))
        asked = np.unique(rows)
        order = np.lexsort((scores, rows))
        rows, scores = rows[order], scores[order]
        # Each one's new scores, the lowest k of them at most, beside those that it had.
        starts, ends = np.searchsorted(rows, asked), np.searchsorted(rows, asked, side="right")
        width = min(self._k, int((ends - starts).max(initial=0)))
        places = ends[:, None] - 1 - np.arange(width)
        inside = places >= starts[:, None]
        new = np.where(inside, scores[np.where(inside, places, 0)], -np.inf).astype(np.float32)
        both = np.sort(np.concatenate([self._scores[asked], new], axis=1), axis=1)
        self._scores[asked] = both[:, -self._k :]
        if sum(len(part[0]) for part in self._found) > 16 * self._scores.size:
            self._found = [self.best()]


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
    found = Nearest(queries, min(k, len(candidates)), metric)  # whatever k is asked for: it takes memory
    own = _NO_PAIRS if query_ids is None or candidate_ids is None else _same(query_ids, candidate_ids)
    found.add(np.arange(len(candidates)), candidates, own)
    return found.best()


def keep_best(rows: Integers, ids: npt.NDArray[Any], scores: npt.NDArray[np.float32], k: int) -> Best:
    """The k highest scores of each row, ties to the smaller id."""
    order = np.lexsort((ids, -scores, rows))
    rows, ids, scores = rows[order], ids[order], scores[order]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    return rows[rank < k], ids[rank < k], scores[rank < k]


def _first_twins(names: npt.NDArray[Any], vectors: Vectors, count: int) -> npt.NDArray[np.bool_]:
    """Whether each is one of the `count` smallest names of its very vector, [n]."""
    whole = np.ascontiguousarray(vectors).view(f"V{vectors.shape[1] * vectors.itemsize}")[:, 0]
    twins = np.unique(whole, return_inverse=True)[1]
    order = np.lexsort((names, twins))
    first = np.empty(len(twins), np.bool_)
    first[order] = np.arange(len(twins)) - np.searchsorted(twins[order], twins[order]) < count
    return first


def _same(ids: Ids, others: Ids) -> Pairs:
    """Where the same id stands in both, each once."""
    _, place, other = np.intersect1d(ids, others, assume_unique=True, return_indices=True)
    return place.astype(np.int64), other.astype(np.int64)


def polar(vectors: Vectors) -> tuple[Numbers, Numbers, Vectors]:
    """The vectors in float64, their lengths, and float32 vectors of length 1 (of a zero vector a zero one)."""
    exact = vectors.astype(np.float64)
    lengths = norm(exact)
    return exact, lengths, np.asarray(exact / np.where(lengths > 0, lengths, 1)[:, None], np.float32)


def unit_vectors(vectors: Vectors) -> Vectors:
    return polar(vectors)[2]


def pair_scores(
    left: Numbers, right: Numbers, pairs: Pairs, lengths: tuple[Numbers, Numbers] | None
) -> npt.NDArray[np.float32]:
    """The score of each pair of a row of `left` and one of `right`: what vector_inner_product gives for the two, to the
    bit; with the `lengths` of both, none zero, what vector_cosine_similarity gives. No length is worked out for each
    pair anew."""
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
    """An inverted file's coarse quantizer (Jégou, Douze, Schmid 2011): where vectors lie, by the nearest centre.

    Attributes:
        centres: float32 [cells, length], of length 1 under "cosine".
        metric: what they were found for.
        probes: cells that a query looks into: those whose centres score highest with it.
    """

    centres: Vectors
    metric: Metric
    probes: int

    def of_candidates(self, vectors: Vectors) -> Integers:
        """The cell of each, [n]."""
        # |x - c|² but for |x|², which all centres have in common.
        return np.asarray(np.argmin(self._squares - 2 * (self._prepared(vectors) @ self.centres.T), axis=1))

    def of_queries(self, vectors: Vectors) -> Integers:
        """The cells that each looks into, [n, probes]."""
        scores = self._prepared(vectors) @ self.centres.T
        return np.argpartition(-scores, self.probes - 1, axis=1)[:, : self.probes]

    @cached_property
    def _squares(self) -> Numbers:
        return np.asarray((self.centres.astype(np.float64) ** 2).sum(axis=1))

    def _prepared(self, vectors: Vectors) -> Vectors:
        return unit_vectors(vectors) if self.metric == "cosine" else vectors


def find_cells(sample: Vectors, metric: Metric, cells: int, probes: int) -> Cells:
    """Cells by k-means over a sample of the candidates; fewer where the sample is small.

    Raises:
        ImportError: faiss is not installed.
    """
    import faiss  # noqa: PLC0415 - optional, and only the driver needs it

    vectors = unit_vectors(sample) if metric == "cosine" else sample
    count = max(1, min(cells, len(vectors)))
    means = faiss.Kmeans(
        vectors.shape[1], count, niter=20, seed=1, spherical=metric == "cosine", min_points_per_centroid=1
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
    """The k nearest candidates of each query; zero vectors have no cosine and are left out of it.

    Args:
        queries: id string, vector array<float>, and, if it is there, left_out array<string>: candidates that are not
            to be found for it.
        candidates: id string, vector array<float>; all vectors of one length, no id twice.
        same_kind: both are of one kind (users, say): of one's own id is oneself, who is not to be found. An item and a
            user may have the same id and are two.
        block_rows: about how many vectors stand on each side of a matrix product; within cells at most so many.
        counts: about how many rows `queries` and `candidates` have.
        tasks: at most so many compare, each its blocks of queries. Spark, left to itself, makes tasks by bytes: few, of
            blocks that are small to read and long to compare.
        cells: of `candidates`, by `find_cells` for the same metric; None: exact.

    Returns:
        source_id string, rank int from 1 on, neighbour_id string, score float. Run it under BLOCK_CONF.
    """
    if metric == "cosine":
        not_zero = F.exists("vector", lambda x: x != 0)
        queries, candidates = queries.where(not_zero), candidates.where(not_zero)
    if "left_out" not in queries.columns:
        queries = queries.withColumn("left_out", F.array().cast("array<string>"))
    candidates = candidates.withColumn("left_out", F.array().cast("array<string>"))
    if cells is None:
        of_queries = _blocks(_numbered(queries, counts[0], block_rows, tasks), "query")
        of_candidates = _blocks(_numbered(candidates, counts[1], block_rows), "candidate")
        pairs = of_queries.drop("cell").crossJoin(of_candidates.drop("cell"))
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
    """With a column cell; a row for each cell that an asking vector looks into."""
    shared = vectors.sparkSession.sparkContext.broadcast(cells)

    def sort_in(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in _gathered(batches):
            rows = matrix_of(batch.column("vector"))
            found = shared.value.of_queries(rows) if asking else shared.value.of_candidates(rows)[:, None]
            columns = [
                batch.column(name).take(pa.array(np.repeat(np.arange(len(rows)), found.shape[1])))
                for name in ("id", "vector", "left_out")
            ]
            cell = pa.array(found.reshape(-1), pa.int32())
            yield pa.RecordBatch.from_arrays([*columns, cell], ["id", "vector", "left_out", "cell"])

    schema = "id string, vector array<float>, left_out array<string>, cell int"
    return vectors.select("id", "vector", "left_out").mapInArrow(sort_in, schema)


def _gathered(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in larger batches: BLOCK_CONF's are of a few, and the centres are read from memory for each."""
    some: list[pa.RecordBatch] = []
    for batch in batches:
        some.append(batch)
        if sum(of.num_rows for of in some) >= _SORTED_AT_ONCE:
            yield from pa.Table.from_batches(some).combine_chunks().to_batches()
            some = []
    if some:
        yield from pa.Table.from_batches(some).combine_chunks().to_batches()


def _numbered(vectors: DataFrame, count: int, block_rows: int, tasks: int | None = None) -> DataFrame:
    """With a column cell, the same for all, and a column block, by hash. `count`: about how many vectors there are;
    `tasks`: in so many partitions, None: in as many as Spark likes."""
    blocks = -(-count // block_rows) or 1
    numbered = vectors.withColumns({"cell": F.lit(0), "block": F.pmod(F.xxhash64("id"), F.lit(blocks))})
    return numbered if tasks is None else numbered.repartition(min(tasks, blocks), "block")


def _numbered_in_cells(vectors: DataFrame, block_rows: int) -> DataFrame:
    """With a column block, of one cell and at most block_rows vectors: some cells have many times the mean."""
    place = F.row_number().over(Window.partitionBy("cell").orderBy("id")) - 1
    # No number stands in two cells: `_compare` tells blocks of queries apart by it.
    return vectors.withColumn("block", F.shiftleft(F.col("cell").cast("long"), 32) + F.floor(place / block_rows))


def _blocks(numbered: DataFrame, name: str) -> DataFrame:
    """One row per block, of one cell: cell int, <name>_block long, <name> struct of ids, vectors (float32, one after
    the other, as bytes: a block goes to Python once for each it is compared with), left_out and their counts; in order
    of id."""
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
    """Pairs of blocks → the k best of each query, over all the candidate blocks that follow one another."""
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
    """A block of queries that meets block after block of candidates."""

    def __init__(self, number: int, block: pa.StructArray, k: int, metric: Metric, same_kind: bool) -> None:
        self.number = number
        self._same_kind = same_kind
        self._ids, vectors = _unpack(block)
        self._nearest = Nearest(vectors, k, metric)
        # Each once: numpy takes four bytes of a text for each letter of the longest.
        names = block.field("left_out").flatten().dictionary_encode()
        counts = block.field("left_out_counts").flatten().to_numpy()
        once = names.dictionary.to_numpy(zero_copy_only=False).astype(np.str_)
        self._left_out, self._which = once, names.indices.to_numpy()
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


def _unpack(block: pa.StructArray) -> tuple[Ids, Vectors]:
    ids = block.field("ids").flatten().to_numpy(zero_copy_only=False).astype(np.str_)
    vectors = np.frombuffer(block.field("vectors")[0].as_py(), np.float32)
    return ids, vectors.reshape(len(ids), -1)
