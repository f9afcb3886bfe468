"""Filters on literals, with which Delta skips files by their statistics.

A join tells Spark which rows are wanted, but not Delta which files it can skip. Literals do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from datetime import date, datetime, timedelta, timezone

from pyspark.sql import Column
from pyspark.sql import functions as F

_MOST_RANGES = 64  # each is checked against every file's statistics


def id_ranges(ranges: Iterable[tuple[str, str]], most: int = _MOST_RANGES) -> list[tuple[str, str]]:
    """At most `most` ranges (first, last; inclusive) that hold all of `ranges` and do not overlap: those that overlap
    become one, then neighbours, if there are still too many."""
    apart: list[tuple[str, str]] = []
    for first, last in sorted(ranges):
        if apart and first <= apart[-1][1]:
            apart[-1] = (apart[-1][0], max(last, apart[-1][1]))
        else:
            apart.append((first, last))
    together = -(-len(apart) // most) or 1
    neighbours = [apart[place : place + together] for place in range(0, len(apart), together)]
    return [(some[0][0], some[-1][1]) for some in neighbours]


def day_ranges(days: Iterable[date], most: int = _MOST_RANGES) -> list[tuple[date, date]]:
    """The days as at most `most` ranges (first, last): if there are more, the shortest gaps are filled."""
    ordered = sorted(set(days))
    if not ordered:
        return []
    gaps = [(after - before, place) for place, (before, after) in enumerate(itertools.pairwise(ordered), 1)]
    widest = sorted((gap for gap in gaps if gap[0] > timedelta(days=1)), reverse=True)[: most - 1]
    edges = [0, *sorted(place for _, place in widest), len(ordered)]
    return [(ordered[start], ordered[stop - 1]) for start, stop in itertools.pairwise(edges)]


def meeting_days(start: Column, end: Column, days: Iterable[date]) -> Column:
    """True where [start, end] overlaps one of the days (UTC) or, if they are many, a filled gap between two of them."""
    meeting = F.lit(False)
    for first, last in day_ranges(days):
        meeting |= (start < _midnight(last + timedelta(days=1))) & (end >= _midnight(first))
    return meeting


def within_days(time: Column, days: Iterable[date]) -> Column:
    """As `meeting_days`, for a single time."""
    return meeting_days(time, time, days)


def _midnight(day: date) -> Column:
    return F.lit(datetime(day.year, day.month, day.day, tzinfo=timezone.utc))
