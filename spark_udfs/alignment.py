"""Alignment of two models' spaces: the rotation from one to the other, and how far apart they are. Plain numpy, except
for one sum over Spark's workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame

from spark_udfs.arrow import matrix_of
from spark_udfs.topk import Metric, top_k
from spark_udfs.vectors import cosine_similarity
from training.arrays import Float32, Float64, Int64

_QUERIES_AT_ONCE = 256


def cross_products(pairs: DataFrame, width: int) -> tuple[Float64, int]:
    """newᵀ old over all rows, float64 [width, width], and the number of rows.

    Args:
        pairs: new, old array<float>, of that width; a task holds one batch in memory.
    """

    def add_up(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        total, count = np.zeros((width, width)), 0
        for batch in batches:
            new, old = (matrix_of(batch.column(name)).astype(np.float64) for name in ("new", "old"))
            total += new.T @ old
            count += len(new)
        yield pa.RecordBatch.from_arrays(
            [pa.array([total.reshape(-1)], pa.list_(pa.float64())), pa.array([count])], ["products", "rows"]
        )

    parts = pairs.select("new", "old").mapInArrow(add_up, "products array<double>, rows long").collect()
    total = sum((np.array(part["products"]) for part in parts), np.zeros(width * width))
    return total.reshape(width, width), sum(part["rows"] for part in parts)


def rotation_of(products: Float64) -> Float64:
    """The orthogonal R (a rotation, possibly with a reflection) that minimises ‖new R - old‖, from newᵀ old.

    Orthogonal Procrustes (Schönemann, 1966): if newᵀ old = U S Vᵀ, R is U Vᵀ.
    """
    left, _, right = np.linalg.svd(products)
    return np.asarray(left @ right)


def row_cosines(one: Float32, other: Float32) -> Float64:
    """The cosine of each pair of rows, float64 [rows]; NaN if either is zero, which has no direction."""
    return cosine_similarity(one.astype(np.float64), other.astype(np.float64))


def mean_cosine(one: Float32, other: Float32) -> float:
    """The mean of `row_cosines`, ignoring NaN; NaN if nothing is left."""
    cosines = row_cosines(one, other)
    valid = ~np.isnan(cosines)
    return float(cosines[valid].mean()) if valid.any() else float("nan")


def overlap(
    queries: tuple[Float32, Float32], candidates: tuple[Float32, Float32], k: int, metric: Metric, ids: bool
) -> float:
    """The mean share of a query's k nearest candidates in one space that are among its k nearest in the other.

    Args:
        queries, candidates: the same rows in both spaces.
        ids: the queries are the candidates' first rows, and none counts as its own neighbour.
    """
    names = np.array([f"{number:09d}" for number in range(len(candidates[0]))])
    shared = total = 0
    for start in range(0, len(queries[0]), _QUERIES_AT_ONCE):
        block = slice(start, start + _QUERIES_AT_ONCE)
        pairs: list[Int64] = []
        for space in (0, 1):
            own = {"query_ids": names[: len(queries[0])][block], "candidate_ids": names} if ids else {}
            rows, columns, _ = top_k(queries[space][block], candidates[space], k, metric, **own)
            pairs.append(rows * len(names) + columns)
        shared += len(np.intersect1d(pairs[0], pairs[1]))
        total += len(pairs[0])
    return shared / total if total else float("nan")
