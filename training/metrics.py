"""Ranking metrics over flat arrays: no loop over users."""

from __future__ import annotations

import numpy as np

from training.arrays import Float64, Int64

HISTORY_FROM = (1, 5, 20, 100)  # lower bounds, in actions, of the history-length classes that metrics are split by
HISTORY_NAMES = ("1-4", "5-19", "20-99", "100+")


def metrics_by_class(
    ranked: Int64, relevant: Int64, offsets: Int64, classes: Int64, count: int
) -> tuple[Int64, Int64, dict[str, Float64]]:
    """`rank_metrics` per class of relevant items: within a class, relevant items of other classes do not count.

    Args:
        ranked, relevant, offsets: as in `rank_metrics`.
        classes: each relevant item's class, below `count`; negative for none.

    Returns:
        (users, classes, metrics): one entry per (user, class) pair with a relevant item, ordered by user.
    """
    owners, some = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)), classes >= 0
    # Treat each (user, class) pair as a user of its own.
    pairs = owners[some] * max(1, count) + classes[some]
    order = np.argsort(pairs, kind="stable")
    unique_pairs, first = np.unique(pairs[order], return_index=True)
    users, of = np.divmod(unique_pairs, max(1, count))
    return users, of, rank_metrics(ranked[users], relevant[some][order], np.append(first, len(order)))


def rank_metrics(ranked: Int64, relevant: Int64, offsets: Int64) -> dict[str, Float64]:
    """Recall, NDCG and MRR at k of every user, with binary gains.

    Args:
        ranked: items, best first, each at most once per user, [users, k]; padded with negative numbers
            (for a user with fewer than k candidates).
        relevant: the relevant items (numbers from 0 up) of all users, concatenated; repeats count once.
        offsets: user u's relevant items are `relevant[offsets[u]:offsets[u + 1]]`, [users + 1].

    Returns:
        `recall` (hits / relevant items), `ndcg` (discount 1 / log2(rank + 1); the ideal ranking has
        min(k, relevant items) hits) and `mrr` (1 / rank of the first hit, 0 without one), each float64 [users].
        NaN for a user without relevant items.
    """
    users, k = ranked.shape
    # Encoding each (user, item) pair as one number tests relevance for all users in a single lookup.
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
