"""Ranking metrics of a method: overall, by slice, what it recommends, and confidence intervals. Plain numpy.

A ranking is int64 [users, k], best first, padded with -1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from spark_udfs.topk import keep_best
from training.arrays import Bool, Float32, Float64, Int64
from training.metrics import HISTORY_FROM, HISTORY_NAMES, metrics_by_class, rank_metrics

MODELS = ("model", "model_and_habit")  # methods compared with the floors
FLOORS = ("popularity", "own_frequency", "item_knn")
HOURS_FROM = (0, 1, 6, 24, 72, 168, 336)  # lower bounds of the classes of "hours between the cut and the next action"
HOURS_NAMES = ("0-1", "1-6", "6-24", "24-72", "72-168", "168-336", "336+")  # 6-24: 6 ≤ hours < 24
VERTICALS = 20  # at most: those in which the most users act next
CONFIDENCE = 0.95
SLICED = ("recall@10", "ndcg@10")
_GROUP = 128  # columns per group in `top_items`
_SEED = 7
_WEIGHTS_AT_ONCE = 1 << 21  # bootstrap weights held in memory: 16 MiB


class Cell(NamedTuple):
    """What a row of EVALUATION measures, within a model, a split and a task."""

    method: str
    metric: str
    slice: str = "all"
    slice_value: str = "all"

    @classmethod
    def of(cls, row: Any) -> Cell:
        """The cell of a row of EVALUATION, a Spark Row or a dictionary."""
        return cls(*(row[name] for name in cls._fields))


@dataclass(frozen=True)
class Following:
    """What users did next. User u's items are `items[offsets[u]:offsets[u + 1]]`, possibly none.

    Attributes:
        hours: between the cut and the user's next action, [users]; NaN for users without one.
    """

    items: Int64
    offsets: Int64
    hours: Float64

    @property
    def owners(self) -> Int64:
        """The user of each item, [items]."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


@dataclass(frozen=True)
class Known:
    """What slices and popularity are computed from.

    Attributes:
        counts: target actions in training, [items]; 0: the item can't be ranked.
        vertical: each item's index into `verticals`, [items], including items newer than the model; -1 for none.
        lengths: number of a user's actions that the model reads, [users].
    """

    counts: Int64
    vertical: Int64
    verticals: list[str]
    lengths: Int64


def flatten(lists: list[npt.NDArray[Any]]) -> tuple[Int64, Int64]:
    """The lists concatenated, and the offsets [lists + 1] at which each begins and the last ends."""
    offsets = np.concatenate([[0], np.cumsum([len(items) for items in lists])]).astype(np.int64)
    return np.concatenate([*lists, np.empty(0, np.int64)]).astype(np.int64), offsets


def flagged(items: Int64, flags: Bool) -> Bool:
    """Whether each item is within `flags` and flagged there."""
    within = items < len(flags)
    within[within] = flags[items[within]]
    return within


def top_items(scores: Float32, k: int) -> Int64:
    """The k best columns of each row, best first, ties by column; -1 where a row has fewer finite scores.

    The k-th highest of the column groups' maxima is a lower bound of the k-th best score, so lower scores are dropped
    early. (np.partition over all columns takes seven times as long.)
    """
    rows, columns = scores.shape
    k, groups = min(k, columns), columns // _GROUP
    floor = np.full(rows, -np.inf, scores.dtype)
    if groups >= k:
        highest = scores[:, : groups * _GROUP].reshape(rows, _GROUP, groups).max(axis=1)
        floor = np.partition(highest, groups - k, axis=1)[:, groups - k]
    row, column = np.divmod(np.flatnonzero(scores > floor[:, None]), columns)
    # Any number of columns may tie exactly at the floor: the first k are enough.
    most = np.where(np.isfinite(floor), k, 0)
    level = [np.flatnonzero(of == least)[:n] for of, least, n in zip(scores, floor, most, strict=True)]
    row = np.concatenate([row, np.repeat(np.arange(rows), [len(found) for found in level])])
    column = np.concatenate([column, *level])
    row, column, _ = keep_best(row, column, scores[row, column], k)
    ranked = np.full((rows, k), -1, np.int64)
    ranked[row, np.arange(len(row)) - np.searchsorted(row, row)] = column
    return ranked


# ---- per-user values ---------------------------------------------------------------------------------------------


def measures(ranked: Int64, following: Following, counts: Int64) -> dict[str, Float64]:
    """Per-user values of each metric, float64 [users]; NaN where the user has no action of the task.

    popularity_bias@10: mean log popularity of the ten recommended items minus that of the user's next items (rankable
    ones only; NaN without any). Above 0: recommendations are more popular than what people take. exp() of it is a
    factor.
    """
    at = {k: rank_metrics(ranked[:, :k], following.items, following.offsets) for k in (10, 20)}
    return {
        "recall@10": at[10]["recall"],
        "ndcg@10": at[10]["ndcg"],
        "recall@20": at[20]["recall"],
        "ndcg@20": at[20]["ndcg"],
        "mrr@20": at[20]["mrr"],
        "popularity_bias@10": _popularity_bias(ranked[:, :10], following, counts),
    }


def _popularity_bias(ranked: Int64, following: Following, counts: Int64) -> Float64:
    logs = np.log(np.maximum(counts, 1))
    users = len(ranked)
    known = flagged(following.items, counts > 0)
    # Repeated items count once.
    pairs = np.unique(following.owners[known] * len(counts) + following.items[known])
    owners, items = pairs // len(counts), pairs % len(counts)
    is_item = ranked >= 0
    with np.errstate(invalid="ignore"):
        recommended = np.where(is_item, logs[ranked], 0.0).sum(axis=1) / is_item.sum(axis=1)
        done = np.bincount(owners, logs[items], minlength=users) / np.bincount(owners, minlength=users)
    return np.asarray(recommended - done)


def sliced(
    ranked: Int64, following: Following, known: Known, of_users: dict[str, Float64]
) -> Iterator[tuple[str, str, str, Float64]]:
    """Yields (metric, slice, value, per-user values) for the metrics of SLICED; NaN where a user is not in the slice.

    By vertical: only what users did next in that vertical counts. An item that has a number but is not ranked is a miss
    in its vertical; an item without a number has no vertical. By history and hours: users are binned into classes.

    Args:
        of_users: `measures` of the same ranking.
    """
    for name, classes, names in (
        ("history", np.searchsorted(HISTORY_FROM, known.lengths, side="right") - 1, HISTORY_NAMES),
        # Leave-one-out cuts right after the last action: one at the same time lies a microsecond before the cut.
        ("hours", np.searchsorted(HOURS_FROM, np.maximum(following.hours, 0), side="right") - 1, HOURS_NAMES),
    ):
        for number, value in enumerate(names):
            for metric in SLICED:
                yield metric, name, value, np.where(classes == number, of_users[metric], np.nan)
    for vertical, users, found in _by_vertical(ranked[:, :10], following, known):
        for metric in SLICED:
            values = np.full(len(ranked), np.nan)
            values[users] = found[metric.removesuffix("@10")]
            yield metric, "vertical", known.verticals[vertical], values


def _by_vertical(ranked: Int64, following: Following, known: Known) -> Iterator[tuple[int, Int64, dict[str, Float64]]]:
    """Yields (vertical, users who acted in it next, their metrics) for the VERTICALS with the most such users."""
    inside = following.items < len(known.vertical)
    vertical = np.where(inside, known.vertical[np.where(inside, following.items, 0)], -1)
    count = len(known.verticals)
    users, verticals, metrics = metrics_by_class(ranked, following.items, following.offsets, vertical, count)
    sizes = np.bincount(verticals, minlength=count)
    for number in sorted(np.argsort(-sizes, kind="stable")[:VERTICALS].tolist()):
        chosen = verticals == number
        if chosen.any():
            yield number, users[chosen], {name: values[chosen] for name, values in metrics.items()}


def coverage(ranked: Int64, catalogue: int) -> float:
    """The share of the catalogue that is recommended to at least one user. It grows with the number of users."""
    return len(np.unique(ranked[ranked >= 0])) / catalogue


# ---- confidence --------------------------------------------------------------------------------------------------


def bootstrap(values: Float64, resamples: int) -> tuple[Float64, Float64]:
    """Lower and upper ends of the CONFIDENCE interval of each column's mean, [columns] each: percentile bootstrap over
    users (Efron, 1979).

    All columns, and all calls with the same number of users, share the same draws, so differences are paired.

    Args:
        values: [users, columns]; NaN where a user has no value: they don't count in that column.
    """
    users, columns = values.shape
    has_value = ~np.isnan(values)
    # One matrix product gives both the sums and the user counts.
    both = np.concatenate([np.where(has_value, values, 0.0), has_value], axis=1)
    chance = np.random.default_rng(_SEED)
    means = np.empty((resamples, columns))
    at_once = max(1, _WEIGHTS_AT_ONCE // max(1, users))
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        drawn = chance.integers(0, users, (count, users)) + users * np.arange(count)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=count * users).reshape(count, users)
        sums = weights.astype(np.float64) @ both
        with np.errstate(invalid="ignore"):
            means[start : start + count] = sums[:, :columns] / sums[:, columns:]
    # NaN: a resample without any of a column's users. Most resamples have at least one.
    low, high = np.nanquantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high
