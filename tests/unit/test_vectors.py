"""The vector functions on columns of mixed lengths, NULLs and zeros, against plain Python with math.fsum."""

from __future__ import annotations

import math
import warnings
from datetime import date, datetime
from decimal import Decimal
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import TrailvecError
from spark_udfs import vectors

Vector = list[float]
numbers = st.floats(-1e6, 1e6, width=32).map(lambda x: 0.0 if abs(x) < 1e-6 else x)


def column(rows: list[Vector | None]) -> pd.Series:
    """As Arrow hands it to a pandas UDF: one float32 array per row, NaN for a NULL element, None for NULL."""
    return pd.Series([None if row is None else np.array(row, np.float32) for row in rows], dtype=object)


def length(v: Vector) -> float:
    return math.sqrt(math.fsum(x * x for x in v))


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def pairs() -> st.SearchStrategy[list[tuple[Vector | None, Vector | None]]]:
    def of_length(n: int) -> st.SearchStrategy[tuple[Vector | None, Vector | None]]:
        one = st.none() | st.lists(numbers, min_size=n, max_size=n)
        return st.tuples(one, one)

    return st.lists(st.integers(0, 3).flatmap(of_length), max_size=8)


def check(found: pd.Series, expected: list[float | None], scales: list[float]) -> None:
    assert str(found.dtype) == "float32"
    for value, wanted, scale in zip(found, expected, scales, strict=True):
        if wanted is None:
            assert np.isnan(value)
        else:
            assert value == pytest.approx(wanted, rel=1e-6, abs=1e-7 * scale)


@given(pairs())
def test_pairs_of_any_length_against_plain_python(rows: list[tuple[Vector | None, Vector | None]]) -> None:
    left, right = column([a for a, _ in rows]), column([b for _, b in rows])
    scales = [0.0 if a is None or b is None else length(a) * length(b) for a, b in rows]

    products = [None if a is None or b is None else dot(a, b) for a, b in rows]
    check(vectors.pairwise("f", vectors.inner_product, left, right), products, scales)

    distances = [
        None if a is None or b is None else length([x - y for x, y in zip(a, b, strict=True)]) for a, b in rows
    ]
    check(vectors.pairwise("f", vectors.l2_distance, left, right), distances, scales)

    cosines = [None if not scale else product / scale for product, scale in zip(products, scales, strict=True)]
    check(vectors.pairwise("f", vectors.cosine_similarity, left, right), cosines, [1.0] * len(rows))


@given(st.lists(st.none() | st.lists(numbers, max_size=3), max_size=8), st.sampled_from([1.0, 2.0, math.inf]))
def test_norms_and_unit_vectors_against_plain_python(rows: list[Vector | None], degree: float) -> None:
    def norm(v: Vector) -> float:
        if degree == 1.0:
            return math.fsum(abs(x) for x in v)
        return length(v) if degree == 2.0 else max((abs(x) for x in v), default=0.0)

    norms = vectors.with_degree("f", vectors.norm, column(rows), pd.Series([degree]))
    units = vectors.with_degree("f", vectors.normalize, column(rows), pd.Series([degree]))
    for row, found, unit in zip(rows, norms, units, strict=True):
        if row is None:
            assert found is None
            assert unit is None
            continue
        assert found == pytest.approx(norm(row), rel=1e-6)
        if row and not any(row):
            assert unit is None
        else:
            assert unit.dtype == np.float32
            assert list(unit) == pytest.approx([x / norm(row) for x in row], rel=1e-6)


@given(st.lists(st.none() | st.lists(numbers, min_size=2, max_size=2), max_size=8))
def test_sum_and_mean_leave_null_vectors_out(rows: list[Vector | None]) -> None:
    valid = [row for row in rows if row is not None]
    sums = [math.fsum(row[n] for row in valid) for n in range(2)]
    scale = math.fsum(abs(x) for row in valid for x in row)
    found = vectors.total("f", lambda stacked: stacked.sum(axis=0), column(rows))
    assert found == (pytest.approx(sums, rel=1e-9, abs=1e-9 * scale) if valid else None)


def test_a_null_element_makes_the_vector_null() -> None:
    rows = column([[1.0, math.nan], [3.0, 4.0]])
    ones = column([[1.0, 1.0], [1.0, 1.0]])
    for function in (vectors.inner_product, vectors.l2_distance, vectors.cosine_similarity):
        assert vectors.pairwise("f", function, rows, ones).isna().tolist() == [True, False]
    assert vectors.with_degree("f", vectors.norm, rows, pd.Series([2.0])) == [None, 5.0]
    large = column([[3e38, 3e38]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vectors.with_degree("f", vectors.norm, large, pd.Series([2.0])) == [np.inf]
        assert vectors.pairwise("f", vectors.inner_product, large, large).tolist() == [np.inf]
    assert vectors.with_degree("f", vectors.normalize, rows, pd.Series([2.0]))[0] is None
    assert vectors.total("f", lambda stacked: stacked.sum(axis=0), rows) == [3.0, 4.0]


def test_each_row_has_its_own_degree() -> None:
    same = column([[3.0, -4.0]] * 4)
    degrees = pd.Series([1, 2, math.inf, None])
    assert vectors.with_degree("f", vectors.norm, same, degrees) == [7.0, 5.0, 4.0, None]
    decimals = pd.Series([Decimal("1.0"), Decimal(2), None, None])
    assert vectors.with_degree("f", vectors.norm, same, decimals) == [7.0, 5.0, None, None]


def test_sums_are_taken_in_float64() -> None:
    # In float32, 1e8 + 1 is 1e8: the ones would be lost.
    rows = column([[1e8, 1.0, -1e8]])
    assert vectors.pairwise("f", vectors.inner_product, rows, column([[1.0, 1.0, 1.0]])).tolist() == [1.0]


NO_NUMBERS = (
    (pd.Series(["abc"]), "'abc'"),
    (pd.Series(["2"]), "'2'"),
    (pd.Series([True]), "True"),
    (pd.Series([date(2020, 1, 1)]), "2020-01-01"),
    (pd.Series([datetime(2020, 1, 1)]), "2020-01-01 00:00:00"),  # Spark's TIMESTAMP_NTZ
    (pd.DataFrame({"a": [2]}), "a struct"),
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: vectors.pairwise(
                "vector_f", vectors.inner_product, column([[1.0], [1.0]]), column([None, [1.0, 2.0]])
            ),
            "vector_f: two vectors have the lengths 1 and 2",
        ),
        (lambda: vectors.total("vector_f", np.sum, column([[1.0], [1.0, 2.0]])), "have the lengths 1 and 2"),
        (
            lambda: vectors.with_degree("f", vectors.norm, column([[1.0]]), pd.Series([3])),
            "the degree of a vector's norm is 3",
        ),
        (
            lambda: vectors.with_degree("vector_f", vectors.norm, pd.Series([np.array([1.0])]), pd.Series([2])),
            "vector_f takes ARRAY<FLOAT>, found float64 elements",
        ),
        *(
            (
                partial(vectors.with_degree, "vector_f", vectors.norm, of, pd.Series([2])),
                f"FLOAT>, found {found}: pass a",
            )
            for of, found in (
                (pd.DataFrame({"a": [1.0]}), "a struct"),
                (pd.Series([{"a": 1.0}]), "dict"),
                (pd.Series([1.5]), "float64"),
                (pd.Series(["abc"]), "str"),
            )
        ),
        (lambda: vectors.pairwise("f", vectors.inner_product, column([[1.0]]), pd.Series([1])), "FLOAT>, found int"),
        (lambda: vectors.total("f", np.sum, pd.Series([date(2020, 1, 1)])), "FLOAT>, found date: pass a vector"),
        *(
            (
                partial(vectors.with_degree, "vector_f", vectors.norm, column([[1.0]]), of),
                f"^vector_f: the degree is {found}",
            )
            for of, found in NO_NUMBERS
        ),
        *(
            (
                partial(vectors.top_k, pd.Series(["a"]), column([[1.0]]), column([[1.0]]), of),
                f"vector_top_k: k is {found}: ",
            )
            for of, found in NO_NUMBERS
        ),
    ],
)
def test_what_is_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TrailvecError, match=message):
        call()
