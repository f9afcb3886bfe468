"""Anchors and scores of segments, without Spark: against plain numpy, pair by pair, and against Newton's method."""

from __future__ import annotations

import numpy as np
import pytest

from spark_udfs import likeness, topk
from spark_udfs.likeness import Anchors, Scorer, anchors_of, direction_of
from spark_udfs.topk import Metric


def one_by_one(user: np.ndarray, anchors: Anchors) -> float:
    a, b = user.astype(np.float64), anchors.vectors.astype(np.float64)
    products = [float(np.sum(a * row)) for row in b]
    if anchors.metric == "cosine":
        products = [
            p / (np.sqrt(np.sum(a * a)) * np.sqrt(np.sum(row * row))) for p, row in zip(products, b, strict=True)
        ]
    return float(np.float32(max(products)))


@pytest.mark.parametrize("at_once", [64, 1 << 20])
def test_who_reaches_a_floor(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likeness, "_PRODUCTS_AT_ONCE", at_once)
    monkeypatch.setattr(likeness, "_ANCHORS_AT_ONCE", 6)
    monkeypatch.setattr(topk, "_PAIRS_AT_ONCE", 7)
    rng = np.random.default_rng(3)
    users = (rng.normal(size=(200, 5)) * 10.0 ** rng.integers(-3, 4, size=(200, 1))).astype(np.float32)
    users[150:] = users[:50]  # twins score alike
    segments = [
        Anchors(rng.normal(size=(count, 5)).astype(np.float32) * scale, metric)
        for count, scale, metric in [
            (1, 1, "cosine"),
            (9, 50, "cosine"),
            (3, 1e4, "dot"),
            (2, 1e-3, "dot"),
            (1, 1, "dot"),
        ]
    ]
    true = np.array([[one_by_one(user, anchors) for user in users] for anchors in segments])
    # Floors that are somebody's very score: equality is in.
    floors = np.array([scores[7] for scores in true[:4]] + [-np.inf])
    scorer = Scorer(segments)
    found = np.full(true.shape, np.nan)
    for segment, rows, scores in scorer.reaching(users, floors):
        assert np.isnan(found[segment, rows]).all()  # a row comes once
        found[segment, rows] = scores
    expected = np.where(true >= floors[:, None], true, np.nan)
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.isfinite(found).sum(axis=1).tolist()[4] == 200
    assert np.allclose(scorer.approximate(users), true, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_anchors_that_float32_takes_for_one(metric: Metric) -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(size=48)
    anchors = Anchors((base + 1e-6 * rng.normal(size=(60, 48))).astype(np.float32), metric)
    users = rng.normal(size=(64, 48)).astype(np.float32)
    ((_, rows, scores),) = Scorer([anchors]).reaching(users, np.array([-np.inf]))
    assert scores[np.argsort(rows)].tolist() == [one_by_one(user, anchors) for user in users]


def test_tastes_are_the_middles_of_far_clusters() -> None:
    rng = np.random.default_rng(1)
    corners = np.eye(4)[:3]
    seeds = np.concatenate(
        [corner * rng.uniform(1, 9, (20, 1)) + rng.normal(scale=0.01, size=(20, 4)) for corner in corners]
    )
    found = anchors_of("tastes", seeds.astype(np.float32), np.empty((0, 4), np.float32), 3)
    unit = seeds / np.linalg.norm(seeds, axis=1, keepdims=True)
    middles = np.array([unit[n : n + 20].mean(axis=0) for n in (0, 20, 40)])
    order = np.argsort(-found.vectors[:, :3] @ np.arange(3, 0, -1))
    assert np.allclose(found.vectors[order], middles, atol=1e-5)
    assert found.metric == "cosine"
    few = anchors_of("tastes", np.array([[2, 0], [4, 0], [0, 1]], np.float32), np.empty((0, 2), np.float32), 3)
    assert few.vectors.tolist() == [[0, 1], [1, 0]]  # no more centres than directions
    (opposite,) = anchors_of("tastes", np.array([[2, 0], [-4, 0]], np.float32), np.empty((0, 2), np.float32), 1).vectors
    assert opposite.any()  # their middle is no direction


def test_the_classifier_is_a_logistic_regression() -> None:
    """By Newton's method and a penalty for each coordinate here; the code asks scipy's L-BFGS, and scales them."""
    rng = np.random.default_rng(2)
    seeds = rng.normal(loc=[0.6, 0, 0.2], size=(40, 3)).astype(np.float32)
    others = rng.normal(size=(300, 3)).astype(np.float32)
    found = anchors_of("classifier", seeds, others, 8)

    rows = np.concatenate(
        [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (seeds.astype(float), others.astype(float))]
    )
    spread = rows.std(axis=0)
    x = np.column_stack([np.ones(340), (rows - rows.mean(axis=0)) / spread])
    beyond = [max(0, (x[:40, n].mean() - x[40:, n].mean()) ** 2 - 1 / 40 - 1 / 300) for n in (1, 2, 3)]
    assert min(beyond) == 0 < max(beyond)  # one of the three tells nothing
    y, weight = np.repeat([1.0, 0.0], [40, 300]), np.repeat([0.5 / 40, 0.5 / 300], [40, 300])
    ridge = np.diag([0, *[1 / 3 * 3 / 40 / (1 + of / np.mean(beyond)) for of in beyond]])
    w = np.zeros(4)
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = x.T @ (x * (weight * p * (1 - p))[:, None]) + ridge
        w -= np.linalg.solve(hessian, x.T @ (weight * (p - y)) + ridge @ w)
    direction, expected = found.vectors[0], w[1:] / spread
    assert direction / np.linalg.norm(direction) == pytest.approx(expected / np.linalg.norm(expected), abs=1e-4)
    alone = anchors_of("classifier", seeds, np.empty((0, 3), np.float32), 8)
    assert alone.vectors[0] == pytest.approx(rows[:40].mean(axis=0), abs=1e-6)


def test_one_number_that_tells_seeds_apart_counts_among_hundreds_that_do_not() -> None:
    """40 seeds whose first of 400 numbers is higher by one and a half deviations. That number alone ranks
    1 - Phi(-1.5 / sqrt 2) = 86 % of pairs right; one penalty for all numbers, 69 %."""
    rng = np.random.default_rng(5)
    seeds, others, new = (rng.normal(size=(count, 400)) for count in (40, 2_000, 2_000))
    seeds[:, 0] += 1.5
    new[:1000, 0] += 1.5
    scores = new @ direction_of(seeds, others)
    assert (scores[:1000, None] > scores[1000:]).mean() > 0.75
