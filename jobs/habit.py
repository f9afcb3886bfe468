"""Habit: a user's repeated actions on an item, as a score added to the model's.

A vector of some sixty numbers can't hold the hundreds of items that a household buys again and again; the log can:

    score(user, item) = user · item + weight · ln(1 + Σ max(1, weeks since)^-decay)

The sum is over the user's actions on the item: one in the last week counts 1, one sixteen weeks ago a quarter (with a
decay of 1/2). It is ACT-R's base-level activation (Anderson and Schooler, 1991), which also predicts which music tracks
are listened to again (Reiter-Haas et al., 2021). An item that the user never acted on has no habit: its score is the
model's own.
"""

from __future__ import annotations

from pyspark.sql import Column
from pyspark.sql import functions as F

from jobs.config import HabitSettings

_WEEK_US = 7 * 86_400_000_000
_PARTS = 1_000_000


def habit(settings: HabitSettings, cut_us: Column) -> Column:
    """The habit (double, at least 0): an aggregate over one user's actions on one item; reads their column event_ts.

    Args:
        cut_us: microseconds since 1970; all the actions are before it.
    """
    weeks = F.greatest((cut_us - F.unix_micros("event_ts")) / F.lit(_WEEK_US), F.lit(1.0))
    # In whole millionths: an integer sum has the same bits in whatever order a shuffle delivers the rows.
    activation = F.sum(F.round(F.pow(weeks, F.lit(-settings.decay)) * _PARTS).cast("bigint")) / _PARTS
    return F.lit(settings.weight) * F.log1p(activation)
