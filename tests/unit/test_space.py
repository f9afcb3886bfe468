"""Figures about a space: by hand, and against scipy, pandas and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist

from jobs import space

RANDOM = np.random.default_rng(5)
VECTORS = (RANDOM.normal(size=(700, 8)) * [5, 3, 2, 1, 1, 1, 0.5, 0.001] + 1).astype(np.float32)


def test_uniformity_by_hand() -> None:
    # Pairs at right angles: ‖x - y‖² = 2; opposite ones: 4. Lengths do not matter, a zero vector does not count.
    cross = np.array([[3, 0], [0, 1], [-2, 0], [0, -1], [0, 0]], np.float32)
    assert space.uniformity(cross) == pytest.approx(math.log((4 * math.exp(-4) + 2 * math.exp(-8)) / 6))
    assert space.uniformity(np.array([[1, 1], [2, 2]], np.float32)) == pytest.approx(0, abs=1e-6)
    assert math.isnan(space.uniformity(cross[:1]))


def test_uniformity_equals_a_loop_over_pairs() -> None:
    some = VECTORS[:60].astype(float)
    unit = some / np.linalg.norm(some, axis=1, keepdims=True)
    pairs = [math.exp(-2 * ((unit[i] - unit[j]) ** 2).sum()) for i in range(60) for j in range(i)]
    assert space.uniformity(VECTORS[:60]) == pytest.approx(math.log(np.mean(pairs)), abs=1e-4)


def test_alignment_by_hand() -> None:
    one = np.array([[2, 0], [0, 1], [1, 0], [1, 1], [0, 0]], np.float32)
    other = np.array([[5, 0], [3, 0], [-1, 0], [-2, -2], [1, 0]], np.float32)
    assert space.alignment(one, other) == pytest.approx((0 + 2 + 4 + 4) / 4)
    assert math.isnan(space.alignment(one[:0], one[:0]))


def singular(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Principal components by another road than the covariance's: the centred matrix' singular values."""
    centred = vectors.astype(float) - vectors.astype(float).mean(axis=0)
    left, values, axes = np.linalg.svd(centred, full_matrices=False)
    return left * values, values, axes


def test_spread_is_that_of_principal_components() -> None:
    spreads = space.spread(VECTORS)
    expected = singular(VECTORS)[1] ** 2 / len(VECTORS)
    np.testing.assert_allclose(spreads, np.sqrt(expected), rtol=1e-5)
    assert space.dead_dimensions(spreads) == space.dead_dimensions(spreads / 1000) == 1
    shares = expected / expected.sum()
    assert space.effective_dimensions(spreads) == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)))
    turned = VECTORS @ np.linalg.qr(RANDOM.normal(size=(8, 8)))[0]
    assert space.dead_dimensions(space.spread(turned.astype(np.float32))) == 1  # no axis holds nothing any more
    assert space.effective_dimensions(np.array([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)


def test_norm_and_popularity_by_ranks() -> None:
    counts = RANDOM.integers(0, 20, 700)  # with ties
    norms = np.linalg.norm(VECTORS.astype(float), axis=1)
    expected = pd.Series(norms).rank().corr(pd.Series(counts).rank())
    assert space.norm_popularity(VECTORS, counts) == pytest.approx(expected)
    assert math.isnan(space.norm_popularity(VECTORS, np.ones(700, int)))


def test_neighbours_are_the_nearest_by_scipys_distance() -> None:
    found = space.neighbours(VECTORS, 5)
    distances = cdist(VECTORS, VECTORS, "cosine")
    np.fill_diagonal(distances, np.inf)
    expected = distances.argsort(axis=1)[:, :5]
    assert (found == expected).mean() > 0.999  # float32 may turn a near tie
    assert space.neighbours(VECTORS[:3], 5).shape == (3, 2)


def test_hubness_is_the_skewness_of_being_a_neighbour() -> None:
    found = np.array([[1], [0], [1], [1]])  # how often: 1, 3, 0, 0
    times = np.array([1, 3, 0, 0])
    expected = np.mean((times - 1) ** 3) / np.mean((times - 1) ** 2) ** 1.5
    assert space.hubness(found) == pytest.approx(expected)
    assert math.isnan(space.hubness(np.array([[1], [0]])))


def test_share_of_neighbours_of_the_same_class_by_hand() -> None:
    found = np.array([[1, 2], [0, 3], [0, 1], [0, 1], [0, 1]])
    classes = np.array([0, 0, 1, -1, 0])
    # Rows 0, 1, 2 and 4 are asked: 1 of 2, 1 of 2, 0 of 2, 2 of 2.
    same, chance = space.share_same(found, classes)
    assert same == pytest.approx(4 / 8)
    assert chance == pytest.approx((2 / 4 + 2 / 4 + 0 + 2 / 4) / 4)
    assert math.isnan(space.share_same(found, np.full(5, -1))[0])


def test_the_map_shows_the_first_two_principal_components() -> None:
    points, shares = space.flat_map(VECTORS)
    projected, values, _ = singular(space.unit(VECTORS))
    np.testing.assert_allclose(np.abs(points), np.abs(projected[:, :2]), atol=1e-5)
    np.testing.assert_allclose(shares, (values**2 / (values**2).sum())[:2], rtol=1e-5)
