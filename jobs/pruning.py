"""Conditions in literals, by which Delta's file statistics spare the files that hold nothing of interest.

A join tells Spark which rows are wanted; it does not tell Delta which files to leave unread. Literals do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from datetime import date, datetime, timedelta, timezone

from pyspark.sql import Column
from pyspark.sql import functions as F

_MOST_RANGES = 64  # each is weighed against every file's statistics


def day_ranges(days: Iterable[date], most: int = _MOST_RANGES) -> list[tuple[date, date]]:
    """The days as (first, last) of at most `most` ranges: where there are more, the shortest holes are filled."""
    ordered = sorted(set(days))
    if not ordered:
        return []
    gaps = [(after - before, place) for place, (before, after) in enumerate(itertools.pairwise(ordered), 1)]
    widest = sorted((gap for gap in gaps if gap[0] > timedelta(days=1)), reverse=True)[: most - 1]
    edges = [0, *sorted(place for _, place in widest), len(ordered)]
    return [(ordered[start], ordered[stop - 1]) for start, stop in itertools.pairwise(edges)]


def meeting_days(start: Column, end: Column, days: Iterable[date]) -> Column:
    """True where [start, end] meets one of the days (UTC), or a day between two of them where they are many."""
    meeting = F.lit(False)
    for first, last in day_ranges(days):
        meeting |= (start < _midnight(last + timedelta(days=1))) & (end >= _midnight(first))
    return meeting


def within_days(time: Column, days: Iterable[date]) -> Column:
    """As `meeting_days`, of a moment."""
    return meeting_days(time, time, days)


def _midnight(day: date) -> Column:
    return F.lit(datetime(day.year, day.month, day.day, tzinfo=timezone.utc))
