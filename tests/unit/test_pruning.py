"""The days and ids of a condition as few ranges."""

from __future__ import annotations

import itertools
from datetime import date, timedelta

from hypothesis import given
from hypothesis import strategies as st

from jobs.pruning import day_ranges, id_ranges

_IDS = st.text("abé\U0001d537", min_size=1)


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


@given(
    ranges=st.lists(st.tuples(_IDS, _IDS).map(lambda ends: (min(ends), max(ends))), max_size=20),
    most=st.integers(1, 5),
)
def test_few_ranges_hold_all_ids_and_do_not_overlap(ranges: list[tuple[str, str]], most: int) -> None:
    found = id_ranges(ranges, most)
    assert all(any(first <= low and high <= last for first, last in found) for low, high in ranges)
    assert len(found) <= most
    assert all(before[1] < after[0] for before, after in itertools.pairwise(found))
    assert {first for first, _ in found} <= {low for low, _ in ranges}
    assert {last for _, last in found} <= {high for _, high in ranges}
    ends = sorted({end for some in ranges for end in some})
    holes = [pair for pair in itertools.pairwise(ends) if not any(a <= pair[0] and pair[1] <= b for a, b in ranges)]
    if len(holes) < most:
        assert len(found) == (len(holes) + 1 if ranges else 0)
