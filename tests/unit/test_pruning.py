"""The days of a condition as few ranges."""

from __future__ import annotations

import itertools
from datetime import date, timedelta

from hypothesis import given
from hypothesis import strategies as st

from jobs.pruning import day_ranges


@given(days=st.sets(st.integers(-5, 60)), most=st.integers(1, 8))
def test_ranges_hold_all_the_days_and_fill_the_shortest_holes_only(days: set[int], most: int) -> None:
    epoch = date(1970, 1, 1)
    ranges = day_ranges([epoch + timedelta(days=day) for day in days], most)
    found = [((first - epoch).days, (last - epoch).days) for first, last in ranges]
    held = {day for first, last in found for day in range(first, last + 1)}
    holes = sorted(b - a - 1 for a, b in itertools.pairwise(sorted(days)) if b - a > 1)
    assert len(found) == (min(most, len(holes) + 1) if days else 0)
    assert days <= held
    assert len(held - days) == sum(holes[: len(holes) + 1 - len(found)]) if days else not held


@given(
    days=st.sets(st.dates(date(2023, 1, 1), date(2023, 3, 1)), max_size=30),
    most=st.integers(1, 5),
)
def test_few_ranges_hold_all_days_and_no_more_than_they_must(days: set[date], most: int) -> None:
    ranges = day_ranges(list(days), most)
    held = [first + timedelta(days=n) for first, last in ranges for n in range((last - first).days + 1)]
    assert len(held) == len(set(held))
    assert days <= set(held)
    assert len(ranges) <= most
    if len(ranges) < most:
        assert days == set(held)
