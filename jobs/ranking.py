"""What rankings say of a method: how well it ranks, for whom, what it recommends, and how sure that is. Plain numpy.

A ranking is int64 [users, k], best first, -1 where there is no further item.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from spark_udfs.topk import keep_best
from training.metrics import HISTORY_FROM, HISTORY_NAMES, metrics_by_class, rank_metrics

MODELS = ("model", "model_and_habit")  # methods that are told beside the floors
FLOORS = ("popularity", "own_frequency", "item_knn")
HOURS_FROM = (0, 1, 6, 24, 72, 168, 336)  # lower bounds of the classes of "hours between the cut and the next action"
HOURS_NAMES = ("0-1", "1-6", "6-24", "24-72", "72-168", "168-336", "336+")  # 6-24 is from 6 hours on and under 24
VERTICALS = 20  # at most: the ones that most users act in next
CONFIDENCE = 0.95
SLICED = ("recall@10", "ndcg@10")
_GROUP = 128  # columns
_SEED = 7
_WEIGHTS_AT_ONCE = 1 << 21  # of the bootstrap: 16 MiB

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class Cell(NamedTuple):
    """What a row of EVALUATION is about, within a model, a split and a task."""

    method: str
    metric: str
    slice: str = "all"
    slice_value: str = "all"

    @classmethod
    def of(cls, row: Any) -> Cell:
        """That of a row of EVALUATION, Spark's or a dictionary."""
        return cls(*(row[name] for name in cls._fields))


@dataclass(frozen=True)
class Following:
    """What users did next. User u's items are `items[offsets[u]:offsets[u + 1]]`, none for a user without any.

    Attributes:
        hours: between the cut and that, [users]; NaN without any.
    """

    items: Integers
    offsets: Integers
    hours: Floats

    @property
    def owners(self) -> Integers:
        """The user of each item, [items]."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


@dataclass(frozen=True)
class Known:
    """What slices and popularity are read from.

    Attributes:
        counts: of target actions in training, [items]; 0: the item can't be ranked.
        vertical: each item's place in `verticals`, [items], also of those that came after the model; -1 for none.
        lengths: actions that the model reads of a user, [users].
    """

    counts: Integers
    vertical: Integers
    verticals: list[str]
    lengths: Integers


def flatten(lists: list[npt.NDArray[Any]]) -> tuple[Integers, Integers]:
    """The lists laid end to end, and the offset at which each begins (and the last ends)."""
    offsets = np.concatenate([[0], np.cumsum([len(items) for items in lists])]).astype(np.int64)
    return np.concatenate([*lists, np.empty(0, np.int64)]).astype(np.int64), offsets


def flagged(items: Integers, flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Whether each item has a place in `flags`, and is flagged there."""
    there = items < len(flags)
    there[there] = flags[items[there]]
    return there


def top_items(scores: npt.NDArray[np.float32], k: int) -> Integers:
    """The k best columns of each row, best first, ties by column; -1 where a row has fewer finite scores.

    Of k groups of columns each has a score that reaches the k-th highest of the groups' maxima: what lies below that is
    not looked at again. (A partition of all columns takes seven times as long.)
    """
    rows, columns = scores.shape
    k, groups = min(k, columns), columns // _GROUP
    floor = np.full(rows, -np.inf, scores.dtype)
    if groups >= k:
        highest = scores[:, : groups * _GROUP].reshape(rows, _GROUP, groups).max(axis=1)
        floor = np.partition(highest, groups - k, axis=1)[:, groups - k]
    row, column = np.divmod(np.flatnonzero(scores > floor[:, None]), columns)
    # Just the floor any number of columns may reach: the first k are enough.
    most = np.where(np.isfinite(floor), k, 0)
    level = [np.flatnonzero(of == least)[:n] for of, least, n in zip(scores, floor, most, strict=True)]
    row = np.concatenate([row, np.repeat(np.arange(rows), [len(found) for found in level])])
    column = np.concatenate([column, *level])
    row, column, _ = keep_best(row, column, scores[row, column], k)
    ranked = np.full((rows, k), -1, np.int64)
    ranked[row, np.arange(len(row)) - np.searchsorted(row, row)] = column
    return ranked


# ---- values of users ---------------------------------------------------------------------------------------------


def measures(ranked: Integers, following: Following, counts: Integers) -> dict[str, Floats]:
    """Each metric's value of each user, float64 [users]; NaN where the user did nothing of the task.

    popularity_bias@10: mean log popularity of the ten recommended items less that of what the user did (of the items
    that can be ranked; NaN without one). Above 0: more popular things than people take. Its exponential is a factor.
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


def _popularity_bias(ranked: Integers, following: Following, counts: Integers) -> Floats:
    logs = np.log(np.maximum(counts, 1))
    users = len(ranked)
    known = flagged(following.items, counts > 0)
    # An item that is done twice counts once.
    pairs = np.unique(following.owners[known] * len(counts) + following.items[known])
    owners, items = pairs // len(counts), pairs % len(counts)
    there = ranked >= 0
    with np.errstate(invalid="ignore"):
        recommended = np.where(there, logs[ranked], 0.0).sum(axis=1) / there.sum(axis=1)
        done = np.bincount(owners, logs[items], minlength=users) / np.bincount(owners, minlength=users)
    return np.asarray(recommended - done)


def sliced(
    ranked: Integers, following: Following, known: Known, of_users: dict[str, Floats]
) -> Iterator[tuple[str, str, str, Floats]]:
    """(metric, slice, value, each user's value), the metrics of SLICED; NaN where a user is not in the slice.

    By vertical: what a user did next in other verticals does not count there. An item that has a number and is not
    ranked is a miss in its vertical; an unknown one has none. By history and hours: users by classes.

    Args:
        of_users: what `measures` says of the same ranking.
    """
    for name, classes, names in (
        ("history", np.searchsorted(HISTORY_FROM, known.lengths, side="right") - 1, HISTORY_NAMES),
        # Leave-one-out cuts right after the last action: what was done in the same moment lies a microsecond before.
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


def _by_vertical(
    ranked: Integers, following: Following, known: Known
) -> Iterator[tuple[int, Integers, dict[str, Floats]]]:
    """(vertical, users who did something of it next, their metrics) of the VERTICALS that most users did."""
    inside = following.items < len(known.vertical)
    vertical = np.where(inside, known.vertical[np.where(inside, following.items, 0)], -1)
    count = len(known.verticals)
    users, verticals, metrics = metrics_by_class(ranked, following.items, following.offsets, vertical, count)
    sizes = np.bincount(verticals, minlength=count)
    for number in sorted(np.argsort(-sizes, kind="stable")[:VERTICALS].tolist()):
        chosen = verticals == number
        if chosen.any():
            yield number, users[chosen], {name: values[chosen] for name, values in metrics.items()}


def coverage(ranked: Integers, catalogue: int) -> float:
    """The share of the catalogue's items that are recommended to somebody. It grows with the number of users."""
    return len(np.unique(ranked[ranked >= 0])) / catalogue


# ---- how sure ----------------------------------------------------------------------------------------------------


def bootstrap(values: Floats, resamples: int) -> tuple[Floats, Floats]:
    """The interval of CONFIDENCE of each column's mean, [columns] each: users drawn with replacement (Efron, 1979),
    percentiles of the means.

    All columns see the same draws, and another call with as many users does too: differences are paired.

    Args:
        values: [users, columns]; NaN where a user has no value in a column, and does not count there.
    """
    users, columns = values.shape
    there = ~np.isnan(values)
    # One product makes sums and numbers of users.
    both = np.concatenate([np.where(there, values, 0.0), there], axis=1)
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
    # NaN: a resample that holds none of the users of a column. One user at least is in most.
    low, high = np.nanquantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high
