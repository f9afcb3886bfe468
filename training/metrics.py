"""Ranking metrics over flat arrays: no loop over users."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer[Any]]

HISTORY_FROM = (1, 5, 20, 100)  # actions: the lower bounds of the classes that metrics are also given for
HISTORY_NAMES = ("1-4", "5-19", "20-99", "100+")


def metrics_by_class(
    ranked: Integers, relevant: Integers, offsets: Integers, classes: Integers, count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], dict[str, npt.NDArray[np.float64]]]:
    """`rank_metrics` within each class of relevant items: what is relevant of other classes does not count there.

    Args:
        ranked, relevant, offsets: as in `rank_metrics`.
        classes: of each relevant item, under `count`; negative for none.

    Returns:
        (users, classes, metrics): of each pair of a user and a class that the user has a relevant item of, by users.
    """
    owners, some = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)), classes >= 0
    # A pair of a user and a class is ranked as a user of its own.
    pairs = owners[some] * max(1, count) + classes[some]
    order = np.argsort(pairs, kind="stable")
    found, first = np.unique(pairs[order], return_index=True)
    users, of = np.divmod(found, max(1, count))
    return users, of, rank_metrics(ranked[users], relevant[some][order], np.append(first, len(order)))


def rank_metrics(ranked: Integers, relevant: Integers, offsets: Integers) -> dict[str, npt.NDArray[np.float64]]:
    """Recall, NDCG and MRR at k of every user, with binary gains.

    Args:
        ranked: items from the best on, each at most once per user, [users, k]; a negative number is no item
            (for a user with fewer than k candidates).
        relevant: the relevant items (0 or more) of all users, one user after the other; repeats count once.
        offsets: user u's relevant items are `relevant[offsets[u]:offsets[u + 1]]`, [users + 1].

    Returns:
        `recall` (hits / relevant items), `ndcg` (discount 1 / log2(rank + 1); the ideal ranking has
        min(k, relevant items) hits) and `mrr` (1 / rank of the first hit, 0 without one), each float64 [users].
        NaN for a user without relevant items.
    """
    users, k = ranked.shape
    # One number for each (user, item) pair makes "is it relevant for this user" one lookup for all of them.
    stride = int(max(ranked.max(initial=0), relevant.max(initial=0))) + 1
    owners = np.repeat(np.arange(users), np.diff(offsets))
    pairs = np.unique(owners * stride + relevant)
    hits = np.isin(np.arange(users)[:, None] * stride + ranked, pairs) & (ranked >= 0)
    relevant_count = np.bincount(pairs // stride, minlength=users)

    discounts = 1 / np.log2(np.arange(2, k + 2))
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])[np.minimum(relevant_count, k)]
    first_hit = np.where(hits.any(axis=1), 1 / (hits.argmax(axis=1) + 1), 0.0)
    with np.errstate(invalid="ignore"):
        return {
            "recall": hits.sum(axis=1) / relevant_count,
            "ndcg": (hits @ discounts) / ideal,
            "mrr": np.where(relevant_count > 0, first_hit, np.nan),
        }
