"""Slices, popularity and intervals of rankings, against plain Python."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.evaluate import rank_users
from jobs.ranking import HOURS_FROM, Following, Known, bootstrap, coverage, flatten, measures, sliced, top_items

ITEMS = 9
VERTICALS = ["food", "rides", "shop"]
COUNTS = np.array([0, 0, 5, 3, 0, 1, 8, 2, 4])  # 0, 1 and 4 can't be ranked
VERTICAL = np.array([-1, -1, 0, 0, 1, 1, 1, 2, -1])


def ndcg(ranked: list[int], relevant: set[int]) -> float:
    hits = [rank for rank, item in enumerate(ranked, start=1) if item in relevant]
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(relevant), len(ranked)) + 1))
    return sum(1 / math.log2(rank + 1) for rank in hits) / ideal


user = st.tuples(
    st.permutations([2, 3, 5, 6, 7, 8]).map(lambda items: items[:3]),
    st.lists(st.integers(1, ITEMS + 1), max_size=5),  # unknown items and later ones too
    st.integers(1, 120),
    st.one_of(st.floats(0, 700), st.just(-1 / 3.6e9)),
)
users = st.lists(user, min_size=1, max_size=6)


def of(rows: list[tuple[list[int], list[int], int, float]]) -> tuple[np.ndarray, Following, Known]:
    ranked = np.array([row[0] for row in rows])
    hours = np.array([row[3] if row[1] else math.nan for row in rows])
    following = Following(*flatten([np.array(row[1], np.int64) for row in rows]), hours)
    return ranked, following, Known(COUNTS, VERTICAL, VERTICALS, np.array([row[2] for row in rows]))


@given(users)
def test_slices_equal_plain_python(rows: list[tuple[list[int], list[int], int, float]]) -> None:
    ranked, following, known = of(rows)
    of_users = measures(ranked, following, COUNTS)
    found = {
        (kind, value, number): float(each)
        for metric, kind, value, values in sliced(ranked, following, known, of_users)
        for number, each in enumerate(values)
        if metric == "ndcg@10" and not math.isnan(each)
    }
    expected = {}
    for number, (best, relevant, length, hours) in enumerate(rows):
        if not relevant:
            continue
        value = ndcg(best, set(relevant))
        history = "1-4" if length < 5 else "5-19" if length < 20 else "20-99" if length < 100 else "100+"
        expected["history", history, number] = value
        hours = max(0.0, hours)  # noqa: PLW2901 - the same moment
        if hours >= 336:
            expected["hours", "336+", number] = value
        else:
            low, high = next((a, b) for a, b in itertools.pairwise(HOURS_FROM) if a <= hours < b)
            expected["hours", f"{low}-{high}", number] = value
        for place, vertical in enumerate(VERTICALS):
            there = {item for item in relevant if item < ITEMS and VERTICAL[item] == place}
            if there:
                expected["vertical", vertical, number] = ndcg(best, there)
    assert found == pytest.approx(expected)


@given(users)
def test_popularity_bias_equals_plain_python(rows: list[tuple[list[int], list[int], int, float]]) -> None:
    ranked, following, _ = of(rows)
    found = measures(ranked, following, COUNTS)["popularity_bias@10"]
    for each, (best, relevant, _, _) in zip(found, rows, strict=True):
        done = [math.log(COUNTS[item]) for item in set(relevant) if item < ITEMS and COUNTS[item]]
        if not done:
            assert math.isnan(each)
            continue
        recommended = [math.log(COUNTS[item]) for item in best]
        assert each == pytest.approx(sum(recommended) / len(recommended) - sum(done) / len(done))


def test_only_the_verticals_that_most_users_did_next_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.ranking.VERTICALS", 1)
    ranked, following, known = of([([2, 3, 5], [item], 1, 1.0) for item in (2, 5, 6)])
    found = sliced(ranked, following, known, measures(ranked, following, COUNTS))
    assert {value for _, kind, value, _ in found if kind == "vertical"} == {"rides"}


def test_the_intervals_are_the_same_however_few_draws_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=(50, 1))
    whole = bootstrap(values, 500)
    monkeypatch.setattr("jobs.ranking._WEIGHTS_AT_ONCE", 50 * 7)
    np.testing.assert_allclose(bootstrap(values, 500), whole, rtol=1e-12)


def test_a_user_with_no_candidate_recommends_nothing_popular() -> None:
    following = Following(np.array([2]), np.array([0, 1]), np.array([1.0]))
    assert math.isnan(measures(np.array([[-1, -1]]), following, COUNTS)["popularity_bias@10"][0])


def test_coverage_is_of_the_catalogue() -> None:
    assert coverage(np.array([[2, 3, -1], [3, 5, -1]]), 12) == 3 / 12


def test_the_bootstrap_draws_users_with_replacement() -> None:
    """Against a plain loop over the same law, and the normal approximation of a mean."""
    values = np.random.default_rng(1).gamma(2.0, size=400)
    low, high = bootstrap(values[:, None], 4_000)
    draws = np.random.default_rng(2)
    means = sorted(float(draws.choice(values, len(values)).mean()) for _ in range(4_000))
    error = values.std() / math.sqrt(len(values))
    assert low[0] == pytest.approx(means[100], abs=error / 8)
    assert high[0] == pytest.approx(means[3_899], abs=error / 8)
    assert high[0] - low[0] == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_an_interval_only_looks_at_the_users_that_have_a_value() -> None:
    values = np.random.default_rng(1).normal(size=(300, 1))
    some = values.copy()
    some[100:] = math.nan
    low, high = bootstrap(np.hstack([values, some]), 2_000)
    alone = bootstrap(values[:100], 2_000)
    assert low[1] == pytest.approx(alone[0][0], abs=0.02)
    assert high[1] == pytest.approx(alone[1][0], abs=0.02)
    assert high[0] - low[0] < high[1] - low[1]


def test_the_same_draws_for_all_columns_each_time() -> None:
    values = np.random.default_rng(1).normal(size=(50, 1))
    low, high = bootstrap(np.hstack([values, values + 1, 0 * values + 3]), 500)
    np.testing.assert_allclose([low[1], high[1]], [low[0] + 1, high[0] + 1])
    assert (low[2], high[2]) == (3, 3)
    # The same draws: a product of another shape may round the last bit otherwise.
    np.testing.assert_allclose(bootstrap(values, 500), [low[:1], high[:1]], rtol=1e-12)


def test_the_ranks_are_the_same_however_few_scores_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    scores = random.integers(0, 5, (7, ITEMS)).astype(np.float32)  # many ties
    seen = [random.integers(0, ITEMS + 2, 3).tolist() for _ in scores]
    rows = pd.DataFrame({"seen_item_index": seen})
    blocks: list[int] = []

    def scorer(block: slice) -> np.ndarray:
        blocks.append(len(scores[block]))
        return scores[block].copy()

    whole = rank_users(rows, {"model": scorer}, COUNTS > 0)
    for limit, users in ((2 * ITEMS + 1, [2, 2, 2, 1]), (1, [1] * 7)):
        blocks.clear()
        monkeypatch.setattr("jobs.evaluate._BLOCK_SCORES", limit)
        found = rank_users(rows, {"model": scorer}, COUNTS > 0)
        assert blocks == users
        assert found.keys() == whole.keys()
        assert all(np.array_equal(found[key], whole[key]) for key in whole)


@pytest.mark.parametrize("values", [1, 3, 100_000])
@pytest.mark.parametrize("columns", [1, 5, 128, 300, 900])
def test_the_best_items_are_those_of_a_sort(columns: int, values: int) -> None:
    """Many share a score, or hardly any; many have none."""
    random = np.random.default_rng(columns)
    for k in (1, 2, 5):
        scores = random.integers(0, values, (40, columns)).astype(np.float32)
        scores[random.random(scores.shape) < random.random((40, 1))] = -np.inf
        for row, found in zip(scores, top_items(scores, k), strict=True):
            finite = [column for column in range(columns) if np.isfinite(row[column])]
            best = sorted(finite, key=lambda column: (-row[column], column))[:k]
            assert found.tolist() == best + [-1] * (min(k, columns) - len(best))
