"""Rows out of actions in order, against the plain-Python oracle: whatever the batches' borders."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.splits import microseconds
from spark_udfs.sequences import GIVEN, CutRules, cut_sequences
from tests import oracles
from tests.events import START, Row, logs, make_event

VALID_FROM, TEST_FROM = START + timedelta(days=1), START + timedelta(days=2)
TIME = pa.timestamp("us", "UTC")


def batches(by_user: dict[str, list[Row]], size: int) -> list[pa.RecordBatch]:
    rows = [{"user_id": user} | action for user in sorted(by_user) for action in by_user[user]]
    types = {"user_id": pa.string(), "event_ts": TIME, "predicted": pa.bool_()}
    schema = pa.schema(types | dict.fromkeys(GIVEN, pa.int32()))
    table = pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in rows], schema)
    empty = pa.RecordBatch.from_pylist([], schema)  # Spark sends these too
    return [empty, *table.to_batches(size), empty]


def rows_of(made: Iterator[pa.RecordBatch]) -> dict[tuple[str, str, int], Row]:
    rows = [row for batch in made for row in batch.to_pylist()]
    found = {(row.pop("user_id"), row.pop("split"), row.pop("part")): row for row in rows}
    assert len(found) == len(rows)
    return found


def naive(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(naive, value))
    return value.replace(tzinfo=None) if isinstance(value, datetime) else value


@given(
    events=logs(max_events=60),
    size=st.integers(1, 20),
    max_length=st.integers(2, 4),
    max_parts=st.integers(1, 2),
    seen_days=st.integers(0, 1),
    leave_one_out=st.booleans(),
)
def test_equals_the_plain_python_sequences(
    events: list[Row], size: int, max_length: int, max_parts: int, seen_days: int, leave_one_out: bool
) -> None:
    numbers = {item: 2 + n for n, item in enumerate(sorted({e["item_id"] for e in events})) if n % 3}
    verticals, types = (
        {v: 2 + n for n, v in enumerate(sorted({e[kind] for e in events}))} for kind in ("vertical", "event_type")
    )
    by_user = oracles.actions(events, numbers, verticals, types, ["purchase"])
    rules = CutRules(
        max_length=max_length,
        max_parts=max_parts,
        valid_us=microseconds(VALID_FROM),
        test_us=microseconds(TEST_FROM),
        leave_one_out=leave_one_out,
        seen_us=seen_days * 86_400_000_000 or None,
    )
    found = rows_of(cut_sequences(batches(by_user, size), rules))
    expected = oracles.sequences(
        by_user,
        valid_from=VALID_FROM,
        test_from=TEST_FROM,
        max_length=max_length,
        max_parts=max_parts,
        seen_days=seen_days,
        leave_one_out=leave_one_out,
    )
    empty = dict.fromkeys(("target_item_index", "target_ts", "seen_item_index"))
    assert {key: {n: naive(v) for n, v in row.items()} for key, row in found.items()} == {
        key: empty | row for key, row in expected.items()
    }
    few = rows_of(cut_sequences(batches(by_user, size), CutRules(**vars(rules) | {"splits": ("score", "valid")})))
    assert few == {key: row for key, row in found.items() if key[1] in ("score", "valid")}


def hourly(hours: dict[str, range]) -> dict[str, list[Row]]:
    """Each user's actions, one in each of these hours, each with another item: numbers from 2 on, in that order."""
    events = [
        make_event(event_id=f"{user}{n:03}", user_id=user, item_id=f"{user}{n}", event_ts=START + timedelta(hours=n))
        for user, of_user in hours.items()
        for n in of_user
    ]
    numbers = {event["item_id"]: 2 + n for n, event in enumerate(events)}
    return oracles.actions(events, numbers, {events[0]["vertical"]: 2}, {events[0]["event_type"]: 2}, [])


@pytest.mark.parametrize("days", [0, 1])
def test_what_a_long_history_no_longer_holds_is_still_seen(days: int) -> None:
    """Items an hour apart, of which the rows show two: what was seen is told of each cut, back to its own day."""
    by_user = hourly({"u": range(100)})
    valid, test = (microseconds(START + timedelta(hours=hours)) for hours in (80, 90))
    rules = CutRules(max_length=2, max_parts=1, valid_us=valid, test_us=test, seen_us=days * 86_400_000_000 or None)
    rows = rows_of(cut_sequences(batches(by_user, 3), rules))
    for split, first in (("valid", 82), ("test", 92)):
        row = rows["u", split, 0]
        assert row["item_index"] == [first - 2, first - 1]
        assert row["target_item_index"] == list(range(first, 92 if split == "valid" else 102))
        assert row["seen_item_index"] == list(range(first - 24 if days else 2, first))


def test_what_was_put_into_a_cart_but_not_bought_is_new() -> None:
    done = [("purchase", "bread"), ("cart", "wine"), ("purchase", "wine"), ("purchase", "bread")]
    events = [
        make_event(event_id=str(n), user_id="u", item_id=item, event_type=kind, event_ts=START + timedelta(hours=n))
        for n, (kind, item) in enumerate(done)
    ]
    numbers, types = {"bread": 2, "wine": 3}, {"cart": 2, "purchase": 3}
    cut = microseconds(START + timedelta(hours=2))
    rules = CutRules(max_length=4, max_parts=1, valid_us=cut, test_us=cut)
    for targets, seen in ((["purchase"], [2]), ([], [2, 3])):
        by_user = oracles.actions(events, numbers, {events[0]["vertical"]: 2}, types, targets)
        row = rows_of(cut_sequences(batches(by_user, 9), rules))["u", "test", 0]
        assert (row["target_item_index"], row["seen_item_index"]) == ([3, 2], seen)


def test_what_is_no_longer_held_was_seen_by_its_own_user_alone() -> None:
    by_user = hourly({"u": range(40), "v": range(36, 40), "w": range(1)})
    cut = microseconds(START + timedelta(hours=38))
    rules = CutRules(max_length=2, max_parts=1, valid_us=cut, test_us=cut)
    assert rows_of(cut_sequences(batches(by_user, 9), rules))["v", "test", 0]["seen_item_index"] == [42, 43]


@pytest.mark.parametrize(("seconds", "bucket"), [(0.5, 3), (1, 3), (2, 4), (7.9, 5), (8, 6), (2**29, 31)])
def test_gaps_are_octaves_of_seconds(seconds: float, bucket: int) -> None:
    events = [
        make_event(event_id=name, user_id="u", item_id="i", event_ts=time)
        for name, time in (("a", START), ("b", START + timedelta(seconds=seconds)))
    ]
    rules = CutRules(max_length=2, max_parts=1, valid_us=0, test_us=0)
    by_user = oracles.actions(events, {}, {events[0]["vertical"]: 2}, {events[0]["event_type"]: 2}, [])
    assert rows_of(cut_sequences(batches(by_user, 2), rules))["u", "score", 0]["gap_bucket"] == [1, bucket]


def test_memory_does_not_grow_with_a_users_history() -> None:
    """A million actions of one user, of which the rows show eight."""
    size, count = 10_000, 100
    end = microseconds(START) + size * count
    held = []

    def history() -> Iterator[pa.RecordBatch]:
        for number in range(count):
            held.append(tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes())
            times = pa.array(np.arange(size) + end - size * (count - number)).cast(TIME)
            numbers = [pa.array(np.arange(size, dtype=np.int32))] * len(GIVEN)
            columns = [pa.array(["u"] * size), times, pa.array([True] * size), *numbers]
            yield pa.RecordBatch.from_arrays(columns, ["user_id", "event_ts", "predicted", *GIVEN])

    tracemalloc.start()
    rows = rows_of(cut_sequences(history(), CutRules(max_length=4, max_parts=2, valid_us=end, test_us=end)))
    tracemalloc.stop()
    assert [row["item_index"][-1] for row in rows.values()] == [size - 1, size - 5, size - 1]
    assert max(held[1:]) - held[0] < 5e6  # a batch is 0.9 MB
