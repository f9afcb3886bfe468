"""Intrinsic metrics of a vector space: how evenly it is filled, and what lies near what. Plain numpy.

Vectors are float32 [n, width]. A zero vector has no direction, so comparisons of directions leave it out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import skew, spearmanr

from jobs.ranking import top_items
from spark_udfs.alignment import mean_cosine
from spark_udfs.topk import unit_vectors
from training.arrays import Float32, Float64, Int64

DEAD = 0.01  # a direction is dead if its spread is at most this fraction of the widest one's
_ROWS_AT_ONCE = 512


def unit(vectors: Float32) -> Float32:
    """The non-zero vectors, normalised to length 1."""
    return unit_vectors(vectors[vectors.any(axis=1)])


def uniformity(vectors: Float32) -> float:
    """log of the mean of exp(-2 ‖x - y‖²) over pairs of directions (Wang & Isola 2020); 0: all equal; the lower, the
    more uniform on the sphere. NaN for fewer than two."""
    directions = unit(vectors)
    n, total = len(directions), 0.0
    for start in range(0, n, _ROWS_AT_ONCE):
        cosines = directions[start : start + _ROWS_AT_ONCE] @ directions.T
        total += float(np.exp(4 * (np.minimum(cosines, 1) - 1), dtype=np.float64).sum())  # ‖x - y‖² = 2 - 2 cosine
    return float(np.log((total - n) / (n * (n - 1)))) if n > 1 else float("nan")


def alignment(one: Float32, other: Float32) -> float:
    """The mean of ‖x - y‖² over matching rows' directions (Wang & Isola 2020); 0 to 4, 2 for unrelated pairs. Pairs
    with a zero vector are left out; NaN without a pair."""
    return 2 - 2 * mean_cosine(one, other)  # ‖x - y‖² of unit vectors


def spread(vectors: Float32) -> Float64:
    """Standard deviations along the principal directions, descending, [width]."""
    covariance = np.atleast_2d(np.cov(vectors.astype(np.float64), rowvar=False, bias=True))
    values = np.linalg.eigvalsh(covariance)
    return np.asarray(np.sqrt(np.maximum(values[::-1], 0)))


def dead_dimensions(spreads: Float64) -> int:
    """How many principal directions hold next to nothing (not axes, because `align` rotates them)."""
    return int((spreads <= DEAD * spreads.max(initial=0)).sum())


def effective_dimensions(spreads: Float64) -> float:
    """exp of the entropy of the directions' variance shares (effective rank: Roy & Vetterli 2007); NaN if there is no
    variance."""
    if not spreads.any():
        return float("nan")
    shares = spreads[spreads > 0] ** 2 / (spreads**2).sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def norm_popularity(vectors: Float32, counts: Int64) -> float:
    """Spearman correlation between vector norms and how often the items were acted on. NaN if either is constant."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    if len(norms) < 2 or np.ptp(norms) == 0 or np.ptp(counts) == 0:
        return float("nan")
    return float(spearmanr(norms, counts).statistic)


def neighbours(vectors: Float32, k: int) -> Int64:
    """Each row's k nearest other rows by cosine, [n, at most k], nearest first, ties by row number.

    No vector may be zero.
    """
    directions = unit(vectors)
    k = min(k, len(directions) - 1)
    found = [np.empty((0, k), np.int64)]
    for start in range(0, len(directions), _ROWS_AT_ONCE):
        cosines = directions[start : start + _ROWS_AT_ONCE] @ directions.T
        rows = np.arange(len(cosines))
        cosines[rows, start + rows] = -np.inf
        found.append(top_items(cosines, k) if k else np.empty((len(rows), 0), np.int64))
    return np.concatenate(found)


def hubness(nearest: Int64) -> float:
    """Skewness of how often rows are neighbours of others (Radovanović et al. 2010); 0: no hubs. NaN if all counts are
    equal."""
    times = np.bincount(nearest.ravel(), minlength=len(nearest))
    return float(skew(times)) if np.ptp(times) else float("nan")


def share_same(nearest: Int64, classes: Int64) -> tuple[float, float]:
    """(the share of neighbours in their row's class, its expectation for random neighbours).

    Args:
        classes: of each row, [n]; -1 for none: such rows are not queried, and as neighbours count as another class.
    """
    has_class = classes >= 0
    if not has_class.any() or not nearest.shape[1]:
        return float("nan"), float("nan")
    same = classes[nearest[has_class]] == classes[has_class][:, None]
    others = np.bincount(classes[has_class])[classes[has_class]] - 1
    return float(same.mean()), float(others.mean() / (len(classes) - 1))


def flat_map(vectors: Float32) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The directions projected onto their first two principal components, [n, 2], and each component's share of the
    variance. No vector may be zero."""
    directions = unit(vectors).astype(np.float64)
    centred = directions - directions.mean(axis=0)
    values, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, ::-1][:, :2]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), [0, 1]] < 0, -1, 1)  # fixes the arbitrary sign
    return centred @ axes, values[::-1][:2] / max(values.sum(), 1e-12)
