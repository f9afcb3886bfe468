"""What a batch is: for each feature a matrix of numbers [rows, length], actions left-aligned, zero-padded."""

from __future__ import annotations

import numpy as np

from training.arrays import Int32, Int64

# The columns of `sequences` that a model reads; the first is the item, the rest is its context.
FEATURES = (
    "item_index",
    "event_type_index",
    "vertical_index",
    "gap_bucket",
    "session_end",
    "hour",
    "weekday",
    "price_bucket",
)
# Those that say something of the action's place: where training shuffles a basket, they stay and the others move.
OF_PLACE = ("gap_bucket", "session_end")

# In every vocabulary: the numbers of no action, of any value that it lacks, and of its first value.
PADDING, UNKNOWN, FIRST_INDEX = 0, 1, 2

TARGET = "target"  # one more column in training: the item that each action is to predict

# The largest number of each context feature that has no vocabulary (jobs/tables.py says what the numbers mean).
SAME_MOMENT = 2  # the gap_bucket of an action at the same event_ts as the one before it
MAX_GAP_BUCKET = 31
SESSION_END = 2
MAX_PRICE_BUCKET = 40
# Embedding rows of these features.
BUCKET_SIZES = {
    "gap_bucket": MAX_GAP_BUCKET + 1,
    "session_end": SESSION_END + 1,
    "hour": 25,
    "weekday": 8,
    "price_bucket": MAX_PRICE_BUCKET + 1,
}


def pad(values: Int32, lengths: Int64, width: int) -> Int32:
    """Ragged rows as one zero-padded matrix.

    Args:
        values: the rows' values, concatenated, [sum(lengths)].
        lengths: how many values each row has, [rows].
        width: columns of the result; a longer row keeps its last (newest) `width` values.

    Returns:
        int32 [rows, width]; 0 after a row's end.
    """
    kept = np.minimum(lengths, width)
    columns = np.arange(width)
    inside = columns < kept[:, None]
    first = np.cumsum(lengths) - kept  # where each row's kept part starts in `values`
    padded = np.zeros((len(lengths), width), np.int32)
    padded[inside] = values[(first[:, None] + columns)[inside]]
    return padded
