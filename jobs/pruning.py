"""Conditions in literals, by which Delta's file statistics spare the files that hold nothing of interest.

A join tells Spark which rows are wanted; it does not tell Delta which files to leave unread. Literals do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from datetime import date, timedelta

from pyspark.sql import Column
from pyspark.sql import functions as F

_MOST_RANGES = 64  # more literals than this cost more than they spare


def day_ranges(days: Iterable[date], most: int = _MOST_RANGES) -> list[tuple[date, date]]:
    """The days as (first, last) of at most `most` ranges, which hold other days too where they must."""
    ordered = sorted(set(days))
    if not ordered:
        return []
    gaps = [(after - before, place) for place, (before, after) in enumerate(itertools.pairwise(ordered), 1)]
    widest = sorted((gap for gap in gaps if gap[0] > timedelta(days=1)), reverse=True)[: most - 1]
    edges = [0, *sorted(place for _, place in widest), len(ordered)]
    return [(ordered[start], ordered[stop - 1]) for start, stop in itertools.pairwise(edges)]


def within_days(time: Column, days: Iterable[date]) -> Column:
    """True where `time` lies on one of the days (UTC), or on a day between two of them where they are many."""
    within = F.lit(False)
    for first, last in day_ranges(days):
        within |= (time >= F.lit(first)) & (time < F.lit(last + timedelta(days=1)))
    return within
