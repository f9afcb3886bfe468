"""Ragged rows as flat arrays: the concatenated values, and the offsets where each row starts."""

from __future__ import annotations

import numpy as np

from training.arrays import Int64


def distinct(rows: Int64, values: Int64, count: int) -> tuple[Int64, Int64]:
    """The distinct values of each row, sorted.

    Args:
        rows, values: each value and the number of its row, below `count`, in any order; values are not negative.

    Returns:
        offsets [count + 1] and the values.
    """
    base = int(values.max(initial=0)) + 1
    pairs = np.unique(rows * base + values)
    return np.searchsorted(pairs, np.arange(count + 1) * base), pairs % base


def ranges(start: Int64, stop: Int64) -> tuple[Int64, Int64]:
    """The offsets of the concatenated ranges, [rows + 1], and the positions that they cover."""
    offsets: Int64 = np.concatenate(([0], np.cumsum(stop - start)))
    return offsets, np.repeat(start - offsets[:-1], stop - start) + np.arange(int(offsets[-1]))
