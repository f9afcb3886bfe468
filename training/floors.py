"""Baselines that a model must beat: scores of every item for a block of users, without learning.

All scores are float32 [users, items]; column i is item number i. The caller decides which items may be ranked.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from training.arrays import Float32, Int64

_DECAY = 0.7  # of a history item's weight per step back; not a setting: lowering a baseline would let a gate pass


def popularity(counts: Int64, users: int) -> Float32:
    """The same for all users: how often an item was acted on in the training window (`counts`, [items])."""
    return np.broadcast_to(counts.astype(np.float32), (users, len(counts))).copy()


def own_frequency(own_counts: sp.csr_matrix, counts: Int64) -> Float32:
    """How often the user acted on the item before the cut (`own_counts`, [users, items]); ties by popularity."""
    tie_break = counts.astype(np.float64) / (counts.max(initial=0) + 1)
    scores = np.broadcast_to(tie_break.astype(np.float32), own_counts.shape).copy()
    own = own_counts.tocoo()  # few entries: adding the matrix would make all float64
    scores[own.row, own.col] = own.data + tie_break[own.col]
    return scores


class ItemKnn:
    """Item-kNN: the cosine of two items over the users who acted on them; a history item's weight decays per step back.

    score(u, j) = sum over the items i of u's history of 0.7^steps(i) * cosine(i, j), where steps(i) is the number of
    later moments in the history; an item is its own nearest neighbour.
    """

    def __init__(self, interactions: sp.csr_matrix) -> None:
        """`interactions`: users of the training window by items, non-zero where the user acted on the item."""
        binary = (interactions > 0).astype(np.float32)
        norms = np.sqrt(np.asarray(binary.sum(axis=0)).ravel())
        self._unit = binary @ sp.diags(np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0))
        self._unit = self._unit.tocsr()
        self._users_of = self._unit.T.tocsr()  # or each product would convert it

    def scores(self, history: Int64, moments: Int64, offsets: Int64) -> Float32:
        """Scores for the users whose items, oldest first, are history[offsets[u]:offsets[u + 1]].

        Args:
            moments: a number for each item of `history`, the same for a user's items of one moment (a basket), whose
                order says nothing.
        """
        lengths = np.diff(offsets)
        users = np.repeat(np.arange(len(lengths)), lengths)
        steps = np.cumsum(np.diff(moments, prepend=0) != 0)
        steps_back = np.repeat(steps[offsets[1:] - 1], lengths) - steps if len(steps) else steps
        shape = (len(lengths), self._unit.shape[1])
        # Duplicate (user, item) entries add up, which is the sum over s.
        weights = sp.csr_matrix((np.power(_DECAY, steps_back, dtype=np.float32), (users, history)), shape=shape)
        # (H Uᵀ) U: through the users, with no items-by-items matrix.
        return np.asarray(((weights @ self._users_of) @ self._unit).toarray(), dtype=np.float32)
