"""Vector functions for SQL, with the names and the rules of Spark 4.2's own.

    vector_cosine_similarity(a, b)   vector_inner_product(a, b)   vector_l2_distance(a, b)
    vector_norm(v [, degree])        vector_normalize(v [, degree])
    vector_avg(v), vector_sum(v)     aggregates
    vector_top_k(id, v, query, k)    an aggregate of our own: the ids (STRING) of the group's k vectors with the highest
                                     inner product of vector and query, highest first, ties to the smaller id

Vectors are ARRAY<FLOAT>; sums are computed in float64, results are FLOAT or ARRAY<FLOAT>, ARRAY<STRING> of
vector_top_k. The rules:

* A NULL vector, or a NULL element in one, gives NULL; aggregates skip such rows and give NULL if no row is left.
  (Arrow passes a NULL element as NaN, so NaN counts as NULL; our own vectors are always finite.)
* A zero vector has no direction: its cosine is NULL, and so is its normalised form. An empty vector's norm,
  distance and inner product are 0.
* `degree` is 1, 2 (the default) or float('inf').
* Unequal lengths, elements that are not FLOAT, ids that are not STRING, and any other degree are errors.

Limits of Spark 3.5's pandas UDFs: these aggregates can't be combined with a built-in one in the same SELECT; a whole
group must fit in the memory of one Python worker; without GROUP BY, an aggregate over no rows gives no row, where a
built-in one gives a row with NULL; and CASE or IF guards no function, which gets all rows: vectors of unequal lengths
have to be left out by a WHERE.

Source of the rules: https://apache.github.io/spark/api/sql/vector-functions and the pages of the same functions at
https://docs.databricks.com/aws/en/sql/language-manual/functions/vector_norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pyspark.sql import SparkSession
from pyspark.sql.pandas.functions import pandas_udf

from jobs.errors import TrailvecError
from training.arrays import Bool, Float64, Int64

if TYPE_CHECKING:
    Series = pd.Series[Any]
else:  # Spark evaluates the annotations of a pandas UDF, and pandas 1.5's class takes no parameter
    Series = pd.Series


# ---- numpy: vectors of equal length, one per row, [n, length], to numbers, [n] -----------------------------------


def inner_product(a: Float64, b: Float64) -> Float64:
    products: Float64 = a * b
    return np.asarray(products.sum(axis=1))


def l2_distance(a: Float64, b: Float64) -> Float64:
    return norm(a - b)


def cosine_similarity(a: Float64, b: Float64) -> Float64:
    """The cosine of each pair of rows; NaN if either is a zero vector."""
    lengths = norm(a) * norm(b)
    return np.divide(inner_product(a, b), lengths, out=np.full(len(a), np.nan), where=lengths > 0)


def norm(vectors: Float64, degree: float = 2.0) -> Float64:
    """The norm of each row: the sum of absolute values (1), the Euclidean norm (2), the largest absolute value (inf).

    Raises:
        TrailvecError: another degree.
    """
    if degree == 1:
        return np.asarray(np.abs(vectors).sum(axis=1))
    if degree == 2:
        return np.asarray(np.sqrt(inner_product(vectors, vectors)))
    if degree == np.inf:
        return np.asarray(np.abs(vectors).max(axis=1, initial=0.0))
    raise TrailvecError(f"the degree of a vector's norm is {degree:g}: write 1, 2 or float('inf')")


def normalize(vectors: Float64, degree: float = 2.0) -> Float64:
    """Each row divided by its norm; a row of NaN for a zero vector."""
    lengths = norm(vectors, degree)[:, None]
    return np.divide(vectors, lengths, out=np.full_like(vectors, np.nan), where=lengths > 0)


# ---- columns: vectors of any length, with NULLs ------------------------------------------------------------------


def pairwise(name: str, function: Callable[[Float64, Float64], Float64], a: Series, b: Series) -> Series:
    """`function` of each pair of vectors of two columns, as float32; NaN (which Spark reads as NULL) by the rules.

    Raises:
        TrailvecError: a pair is of unequal lengths, or a value is not an ARRAY<FLOAT>.
    """
    rows = np.flatnonzero(_has_vector(name, a) & _has_vector(name, b))
    left, right = _lengths(name, a, rows), _lengths(name, b, rows)
    if (unequal := left != right).any():
        shown = f"{left[unequal][0]} and {right[unequal][0]}"
        raise TrailvecError(f"{name}: two vectors have the lengths {shown}: compare vectors of one model_version")
    out = np.full(len(a), np.nan, np.float32)
    for some in _by_value(rows, left):
        with np.errstate(over="ignore"):  # FLOAT overflow gives infinity, as in Spark
            out[some] = function(_stack(a, some), _stack(b, some))
    return Series(out)


def with_degree(
    name: str, function: Callable[[Float64, float], Float64], vectors: Series, degrees: Series
) -> list[Any]:
    """`function` of each vector and its degree, as float32 numbers or arrays; None by the rules.

    `degrees` is as long as `vectors`, or a single value for all.

    Raises:
        TrailvecError: an unknown degree, or a value is not an ARRAY<FLOAT>.
    """
    if not _are_numbers(degrees):
        raise TrailvecError(f"{name}: the degree is {_first_value(degrees)}: write 1, 2 or float('inf')")
    degree = np.broadcast_to(degrees.to_numpy(np.float64, na_value=np.nan), len(vectors))
    rows = np.flatnonzero(_has_vector(name, vectors) & ~np.isnan(degree))
    out: list[Any] = [None] * len(vectors)
    for same_degree in _by_value(rows, degree[rows]):
        for some in _by_value(same_degree, _lengths(name, vectors, same_degree)):
            with np.errstate(over="ignore"):
                results = function(_stack(vectors, some), degree[some[0]]).astype(np.float32)
            valid = ~np.isnan(results).reshape(len(some), -1).any(axis=1)
            for row, result in zip(some[valid], results[valid], strict=True):
                out[row] = result
    return out


def total(name: str, function: Callable[[Float64], Float64], vectors: Series) -> list[float] | None:
    """`function` of all valid vectors of a group at once; None if there are none.

    Raises:
        TrailvecError: the vectors are of unequal lengths, or a value is not an ARRAY<FLOAT>.
    """
    rows = np.flatnonzero(_has_vector(name, vectors))
    lengths = np.unique(_lengths(name, vectors, rows))
    if len(lengths) > 1:
        shown = " and ".join(str(length) for length in lengths[:2])
        raise TrailvecError(f"{name}: vectors of a group have the lengths {shown}: group by model_version too")
    stacked = _stack(vectors, rows)
    stacked = stacked[~np.isnan(stacked).any(axis=1)]
    return function(stacked).tolist() if len(stacked) else None


def top_k(ids: Series, vectors: Series, queries: Series, ks: Series) -> list[str] | None:
    """The ids of a group's k highest inner products of a vector and its query; None if there are none.

    Raises:
        TrailvecError: k is not a whole number from 1 up, or not the same throughout the group; the ids are not
            strings; or as in `pairwise`.
    """
    # Other types would come as pandas converts them: with a NULL in the column, a BIGINT 7 is 7.0.
    if (kind := pd.api.types.infer_dtype(ids, skipna=True)) not in ("string", "empty"):
        raise TrailvecError(f"vector_top_k takes STRING ids, found {kind}: write CAST(id AS STRING)")
    if not _are_numbers(ks):
        raise TrailvecError(f"vector_top_k: k is {_first_value(ks)}: write one whole number of at least 1")
    unique_ks = ks.unique()
    if len(unique_ks) != 1 or unique_ks[0] is None or not (unique_ks[0] >= 1 and unique_ks[0] % 1 == 0):
        raise TrailvecError(
            f"vector_top_k: found k = {', '.join(map(str, unique_ks))}: write one whole number of at least 1"
        )
    scores = pairwise("vector_top_k", inner_product, vectors, queries).to_numpy()
    valid = ids.notna().to_numpy() & ~np.isnan(scores)
    names = ids.to_numpy()[valid].astype(str)
    order = np.lexsort((names, -scores[valid]))[: int(unique_ks[0])]
    return names[order].tolist() if len(order) else None


def _has_vector(name: str, vectors: Series) -> Bool:
    """Which rows hold a vector, not NULL. Raises TrailvecError: a value is not an array."""
    if isinstance(vectors, pd.DataFrame):  # how Spark passes a struct
        raise TrailvecError(f"{name} takes ARRAY<FLOAT>, found a struct: pass a vector")
    has_vector = vectors.notna().to_numpy()
    for kind in {type(value).__name__ for value in vectors.to_numpy()[has_vector]} - {"ndarray"}:
        raise TrailvecError(f"{name} takes ARRAY<FLOAT>, found {kind}: pass a vector")
    return has_vector


def _are_numbers(values: Series) -> bool:
    """Whether a column holds only numbers and NULLs. (pandas would convert dates, booleans and some strings, too.)"""
    kinds = {"integer", "floating", "mixed-integer-float", "decimal", "empty"}
    return not isinstance(values, pd.DataFrame) and pd.api.types.infer_dtype(values, skipna=True) in kinds


def _first_value(values: Series) -> str:
    """A column's first value that is not NULL, for an error message."""
    if isinstance(values, pd.DataFrame):
        return "a struct"
    first = values.dropna().iloc[0]
    return repr(first) if isinstance(first, str) else str(first)


def _lengths(name: str, vectors: Series, rows: npt.NDArray[np.intp]) -> Int64:
    values = vectors.to_numpy()[rows]
    for kind in {type(value[0]).__name__ for value in values if len(value)} - {"float32"}:
        raise TrailvecError(f"{name} takes ARRAY<FLOAT>, found {kind} elements: write CAST(... AS ARRAY<FLOAT>)")
    return np.fromiter((len(value) for value in values), np.int64, len(values))


def _by_value(rows: npt.NDArray[np.intp], values: npt.NDArray[Any]) -> Iterator[npt.NDArray[np.intp]]:
    """The rows, grouped by value; usually a single group."""
    for value in np.unique(values):
        yield rows[values == value]


def _stack(vectors: Series, rows: npt.NDArray[np.intp]) -> Float64:
    values = vectors.to_numpy()[rows]
    if not len(values):
        return np.empty((0, 0))
    stacked: Float64 = np.concatenate(values).astype(np.float64).reshape(len(values), -1)
    return stacked


# ---- SQL ---------------------------------------------------------------------------------------------------------

_EUCLIDEAN = Series([2.0])


def _of_pairs(name: str, function: Callable[[Float64, Float64], Float64]) -> Callable[[Series, Series], Series]:
    def of_columns(a: Series, b: Series) -> Series:
        return pairwise(name, function, a, b)

    return of_columns


def _norm(vector: Series, degree: Series = _EUCLIDEAN) -> Series:
    norms: Series = Series(with_degree("vector_norm", norm, vector, degree), dtype="float32")
    return norms


def _normalize(vector: Series, degree: Series = _EUCLIDEAN) -> Series:
    units: Series = Series(with_degree("vector_normalize", normalize, vector, degree), dtype=object)
    return units


def _avg(vectors: Series) -> Any:
    return total("vector_avg", lambda stacked: stacked.mean(axis=0), vectors)


def _sum(vectors: Series) -> Any:
    return total("vector_sum", lambda stacked: stacked.sum(axis=0), vectors)


FUNCTIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "vector_cosine_similarity": (_of_pairs("vector_cosine_similarity", cosine_similarity), "float"),
    "vector_inner_product": (_of_pairs("vector_inner_product", inner_product), "float"),
    "vector_l2_distance": (_of_pairs("vector_l2_distance", l2_distance), "float"),
    "vector_norm": (_norm, "float"),
    "vector_normalize": (_normalize, "array<float>"),
    "vector_avg": (_avg, "array<float>"),
    "vector_sum": (_sum, "array<float>"),
    "vector_top_k": (top_k, "array<string>"),
}


def register(spark: SparkSession) -> None:
    """Registers the functions for SQL in this session."""
    for name, (function, returns) in FUNCTIONS.items():
        spark.udf.register(name, pandas_udf(function, returns))  # type: ignore[call-overload]
