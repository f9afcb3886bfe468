from math import log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.metrics import rank_metrics


def test_worked_by_hand() -> None:
    # User 0: 2 of 3 relevant items, on ranks 1 and 3. User 1: only hit on rank 2, no third candidate. User 2: no hit.
    # User 3: nothing relevant. User 4: fewer candidates than k, all relevant.
    ranked = np.array([[7, 1, 9], [4, 5, -1], [1, 2, 3], [1, 2, 3], [8, -1, -1]])
    relevant, offsets = np.array([9, 7, 2, 5, 5, 8, 8]), np.array([0, 3, 5, 6, 6, 7])
    metrics = rank_metrics(ranked, relevant, offsets)
    third, all_three = 1 / log2(4), 1 + 1 / log2(3) + 1 / log2(4)
    np.testing.assert_allclose(metrics["recall"], [2 / 3, 1, 0, np.nan, 1])
    np.testing.assert_allclose(metrics["ndcg"], [(1 + third) / all_three, 1 / log2(3), 0, np.nan, 1])
    np.testing.assert_allclose(metrics["mrr"], [1, 1 / 2, 0, np.nan, 1])


def test_no_users() -> None:
    metrics = rank_metrics(np.empty((0, 10), int), np.empty(0, int), np.array([0]))
    assert [len(values) for values in metrics.values()] == [0, 0, 0]


user = st.tuples(st.permutations(range(8)).map(lambda items: items[:5]), st.sets(st.integers(0, 9), min_size=1))


@given(st.lists(user, min_size=1, max_size=6))
def test_equals_plain_python(users: list[tuple[list[int], set[int]]]) -> None:
    relevant = np.concatenate([sorted(items) for _, items in users])
    offsets = np.cumsum([0, *(len(items) for _, items in users)])
    metrics = rank_metrics(np.array([ranked for ranked, _ in users]), relevant, offsets)
    for row, (ranked, items) in enumerate(users):
        hits = [rank for rank, item in enumerate(ranked, start=1) if item in items]
        ideal = sum(1 / log2(rank + 1) for rank in range(1, min(len(items), 5) + 1))
        assert metrics["recall"][row] == pytest.approx(len(hits) / len(items))
        assert metrics["ndcg"][row] == pytest.approx(sum(1 / log2(rank + 1) for rank in hits) / ideal)
        assert metrics["mrr"][row] == pytest.approx(1 / hits[0] if hits else 0)
