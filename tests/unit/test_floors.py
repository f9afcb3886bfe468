"""The floors against plain Python, and the ranking's small parts by hand."""

from __future__ import annotations

import math
import tracemalloc
from random import Random
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from jobs.evaluate import following, histories, relevant_items
from jobs.ranking import flatten, measures, top_items
from training.batches import SAME_MOMENT
from training.floors import ItemKnn, own_frequency, popularity

ITEMS = 6
numbers = st.integers(0, ITEMS - 1)
users_items = st.lists(st.lists(numbers, max_size=8), min_size=1, max_size=5)
users_baskets = st.lists(st.lists(st.lists(numbers, min_size=1, max_size=3), max_size=4), min_size=1, max_size=5)


def counts_of(lists: list[list[int]]) -> sp.csr_matrix:
    rows = [[items.count(item) for item in range(ITEMS)] for items in lists]
    return sp.csr_matrix(np.array(rows, np.int64).reshape(len(lists), ITEMS))


def scores_of(training: list[list[int]], history: list[list[list[int]]]) -> np.ndarray:
    """ItemKnn's scores for users with these baskets."""
    items = [np.array([item for basket in baskets for item in basket]) for baskets in history]
    moments = [np.array([n for n, basket in enumerate(baskets) for _ in basket]) for baskets in history]
    return ItemKnn(counts_of(training)).scores(flatten(items)[0], *flatten(moments))


@given(training=users_items, history=users_baskets)
def test_item_knn_equals_plain_python(training: list[list[int]], history: list[list[list[int]]]) -> None:
    users_of = [{u for u, items in enumerate(training) if item in items} for item in range(ITEMS)]

    def cosine(a: int, b: int) -> float:
        both = len(users_of[a] & users_of[b])
        return both / math.sqrt(len(users_of[a]) * len(users_of[b])) if both else 0.0

    found = scores_of(training, history)
    for user, baskets in enumerate(history):
        back = [(step, item) for step, basket in enumerate(reversed(baskets)) for item in basket]
        for candidate in range(ITEMS):
            expected = sum(0.7**step * cosine(item, candidate) for step, item in back)
            assert found[user, candidate] == pytest.approx(expected, rel=1e-5, abs=1e-6)


@given(training=users_items, history=users_baskets, random=st.randoms(use_true_random=False))
def test_the_order_within_a_basket_changes_no_score(
    training: list[list[int]], history: list[list[list[int]]], random: Random
) -> None:
    shuffled = [[random.sample(basket, len(basket)) for basket in baskets] for baskets in history]
    assert scores_of(training, shuffled) == pytest.approx(scores_of(training, history), rel=1e-5, abs=1e-6)


def test_a_step_back_is_a_moment_unless_actions_are_ordered() -> None:
    """By hand: each item is like itself alone (cosine 1), so a score is the weight of the item's step."""
    same = SAME_MOMENT
    rows = pd.DataFrame(
        # The row begins within a moment; item 9 is unknown, and 5 alone at its moment can't be ranked.
        {"item_index": [[0, 1, 2, 9, 3, 5, 4], [9], [2]], "gap_bucket": [[same, same, 8, same, same, 8, 8], [1], [1]]}
    )
    rankable, knn = np.arange(ITEMS) < 5, ItemKnn(sp.csr_matrix(np.eye(ITEMS)))

    def scores(*, ordered: bool) -> np.ndarray:
        items, moments = histories(rows, rankable, ordered=ordered)
        return knn.scores(flatten(items)[0], *flatten(moments))

    nobody, other = np.zeros(ITEMS), np.eye(ITEMS)[2]
    assert scores(ordered=False) == pytest.approx(np.array([[0.49, 0.49, 0.7, 0.7, 1, 0], nobody, other]))
    by_action = [0.7**4, 0.7**3, 0.7**2, 0.7, 1, 0]
    assert scores(ordered=True) == pytest.approx(np.array([by_action, nobody, other]))


def test_own_frequency_goes_by_the_users_count_and_then_by_popularity() -> None:
    scores = own_frequency(counts_of([[1, 1, 2], []]), np.array([0, 1, 5, 9, 0, 0]))
    assert top_items(scores, 4).tolist() == [[1, 2, 3, 0], [3, 2, 1, 0]]


def test_own_frequency_takes_the_memory_of_its_scores_and_no_matrix_of_doubles() -> None:
    random = np.random.default_rng(1)
    counts = random.integers(0, 1_000, 50_000)
    own = sp.csr_matrix(sp.random(20, len(counts), 0.001, random_state=1) * 100).astype(np.int64)
    tracemalloc.start()
    try:
        scores = own_frequency(own, counts)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert scores.dtype == np.float32
    assert peak < 2 * scores.nbytes
    assert np.array_equal(scores, (own.toarray() + counts / (counts.max() + 1)).astype(np.float32))


def test_popularity_is_the_same_for_everybody() -> None:
    assert popularity(np.array([3, 1, 2]), 2).tolist() == [[3, 1, 2], [3, 1, 2]]


def test_top_items_breaks_ties_by_number_and_fills_up_with_no_item() -> None:
    scores = np.array([[1, 3, 3, 2], [-np.inf, 5, -np.inf, -np.inf]], np.float32)
    assert top_items(scores, 3).tolist() == [[1, 2, 3], [1, -1, -1]]


@given(st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=4), st.integers(1, 9))
def test_top_items_are_the_first_of_all_sorted_by_score_and_number(rows: list[list[int]], k: int) -> None:
    expected = [sorted(range(9), key=lambda item: (-row[item], item))[:k] for row in rows]
    assert top_items(np.array(rows, np.float32), k).tolist() == expected


def test_what_comes_next_is_everything_at_the_first_moment() -> None:
    morning, noon, night = 8.0, 12.0, 22.0  # hours after the cut
    row = SimpleNamespace(
        target_item_index=[5, 6, 7, 1, 8],
        target_hours=[morning, morning, noon, noon, night],
        seen_item_index=[1, 5, 6, 8],
    )
    assert relevant_items(row, "next") == ([5, 6], morning)
    assert relevant_items(row, "new") == ([7, 1], noon)  # the unknown item is nobody's old one
    assert relevant_items(row, "repeat") == ([5, 6], morning)
    nothing_new = SimpleNamespace(target_item_index=[5], target_hours=[noon], seen_item_index=[5])
    items, hours = relevant_items(nothing_new, "new")
    assert items == []
    assert math.isnan(hours)


def test_each_unknown_item_is_one_of_its_own() -> None:
    hours = {"target_hours": [8.0, 8.0, 12.0], "seen_item_index": [1, 5]}
    rows = pd.DataFrame([{"target_item_index": [1, 1, 7]} | hours, {"target_item_index": [5, 1, 7]} | hours])
    assert following(rows, "next").items.tolist() == [2**31, 2**31 + 1, 5, 2**31 + 2]
    assert following(rows, "new").items.tolist() == [2**31, 2**31 + 1, 2**31 + 2]
    recall = measures(np.array([[5], [5]]), following(rows, "next"), np.full(8, 9))["recall@10"]
    assert recall.tolist() == [0, 0.5]
