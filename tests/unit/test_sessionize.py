"""Sessions over Arrow, without Spark: against a plain-Python oracle, whatever the batch borders."""

from __future__ import annotations

import itertools
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.config import load_config
from jobs.errors import TrailvecError
from jobs.sessionize import events_of_a_part
from spark_udfs.sessionize import Key, Rules, sessionize, split_points
from tests import oracles
from tests.events import START, Row, logs, make_event

FIELDS = ["event_ts", "event_id", "item_id", "event_type", "vertical", "amount", "quantity", "time_zone"]
SCHEMA = pa.schema(
    [("user_id", pa.string())]
    + [
        (
            name,
            {"event_ts": pa.timestamp("us", "UTC"), "amount": pa.float64(), "quantity": pa.float64()}.get(
                name, pa.string()
            ),
        )
        for name in FIELDS
    ]
)
MINUTE = 60_000_000


def batched(events: list[Row], borders: list[int]) -> list[pa.RecordBatch]:
    ordered = oracles.in_order(events)
    cuts = sorted({0, len(ordered), *[b % (len(ordered) + 1) for b in borders]})
    return [
        pa.RecordBatch.from_pylist([{n: e[n] for n in SCHEMA.names} for e in ordered[a:b]], SCHEMA)
        for a, b in itertools.pairwise(cuts)
    ]


def run(events: list[Row], borders: list[int], rules: Rules, splits: dict[Key, int] | None = None) -> list[Row]:
    made = sessionize(batched(events, borders), rules, FIELDS, splits)
    return [row for batch in made for row in batch.to_pylist()]


def key(event: Row) -> Key:
    return event["user_id"], (event["event_ts"] - datetime(1970, 1, 1)) // timedelta(microseconds=1), event["event_id"]


def splits_of(events: list[Row], borders: list[int], rules: Rules, every: int) -> dict[Key, int]:
    rows = [row for batch in split_points(batched(events, borders), rules, every) for row in batch.to_pylist()]
    return {(row["user_id"], row["event_us"], row["event_id"]): row["run_us"] for row in rows}


def ids(sessions: list[Row]) -> list[str]:
    """Each session's event ids, written as one word."""
    return ["".join(e["event_id"] for e in s["events"]) for s in sessions]


def at(event_id: str, minutes: float, vertical: str = "food", start: datetime = START) -> Row:
    return make_event(
        event_id=event_id, user_id="u", item_id="i", vertical=vertical, event_ts=start + timedelta(minutes=minutes)
    )


# London's clocks change in the log's first night: forward in March, back 217 days later.
zones = st.sampled_from([None, "Europe/London", "America/New_York", "Asia/Kolkata"])


@given(
    events=logs(),
    days_later=st.sampled_from([0, 217]),
    borders=st.lists(st.integers(0, 60), max_size=12),
    max_minutes=st.sampled_from([None, 0.5, 30, 60, 61]),
    max_events=st.sampled_from([1, 2, 3, 10_000]),
    midnight_of=zones,
    cut_on_vertical=st.booleans(),
)
def test_equals_the_plain_python_sessions_whatever_the_batches(
    events: list[Row],
    days_later: int,
    borders: list[int],
    max_minutes: float | None,
    max_events: int,
    midnight_of: str | None,
    cut_on_vertical: bool,
) -> None:
    events = [e | {"event_ts": e["event_ts"] + timedelta(days=days_later)} for e in events]
    gap, gap_by_vertical = timedelta(minutes=30), {"rides": timedelta(hours=1)}
    expected = oracles.sessions(
        events,
        gap,
        gap_by_vertical,
        max_length=timedelta.max if max_minutes is None else timedelta(minutes=max_minutes),
        max_events=max_events,
        midnight_of=midnight_of,
        cut_on_vertical=cut_on_vertical,
    )
    max_us = None if max_minutes is None else round(max_minutes * MINUTE)
    rules = Rules(30 * MINUTE, {"rides": 60 * MINUTE}, max_us, max_events, midnight_of, cut_on_vertical)
    found = run(events, borders, rules)

    run_start = {e["event_id"]: r[0]["event_ts"] for r in oracles.runs(events, gap, gap_by_vertical) for e in r}
    assert [[e["event_id"] for e in s["events"]] for s in found] == [[e["event_id"] for e in s] for s in expected]
    for session, events_of in zip(found, expected, strict=True):
        amounts = [e["amount"] for e in events_of if e["amount"] is not None]
        assert session["user_id"] == events_of[0]["user_id"]
        assert session["start_ts"].replace(tzinfo=None) == events_of[0]["event_ts"]
        assert session["end_ts"].replace(tzinfo=None) == events_of[-1]["event_ts"]
        assert session["run_start_ts"].replace(tzinfo=None) == run_start[events_of[0]["event_id"]]
        assert session["event_count"] == len(events_of)
        assert session["verticals"] == sorted({e["vertical"] for e in events_of})
        assert session["amount"] == (sum(amounts) if amounts else None)
        assert session["events"][0]["item_id"] == events_of[0]["item_id"]


def test_a_pause_of_exactly_the_gap_stays_and_a_microsecond_more_ends_the_session() -> None:
    events = [at("a", 0), at("b", 30), at("c", 60 + 1 / MINUTE)]
    assert ids(run(events, [], Rules(30 * MINUTE))) == ["ab", "c"]


def test_the_vertical_before_the_pause_says_how_long_it_may_be() -> None:
    # 45 minutes after a ride are one session (its gap is 60); 45 minutes after food are not (30).
    events = [at("a", 0, "rides"), at("b", 45), at("c", 90)]
    assert ids(run(events, [], Rules(30 * MINUTE, {"rides": 60 * MINUTE}))) == ["ab", "c"]


def test_an_event_later_than_the_longest_session_starts_a_new_one_which_counts_anew() -> None:
    # Every 20 minutes, 40 at most: c is 40 after a and stays; d is 60 after a, f is 40 after d.
    events = [at(name, 20 * n) for n, name in enumerate("abcdefg")]
    rules = Rules(30 * MINUTE, max_us=40 * MINUTE)
    for borders in ([], [1], [2, 3], [1, 2, 3, 4, 5, 6]):
        found = run(events, borders, rules)
        assert ids(found) == ["abc", "def", "g"]
        assert {s["run_start_ts"].replace(tzinfo=None) for s in found} == {START}


def test_a_session_holds_so_many_events_at_most() -> None:
    events = [at(name, n) for n, name in enumerate("abcdefg")]
    for borders in ([], [3], [1, 2, 3, 4, 5, 6]):
        assert ids(run(events, borders, Rules(30 * MINUTE, max_events=3))) == ["abc", "def", "g"]


def test_after_a_cut_by_length_the_count_of_events_begins_anew() -> None:
    # a, b end by length (c is 25 after a); c, d, e are three; f would be the fourth.
    events = [at("a", 0), at("b", 10), at("c", 25), at("d", 26), at("e", 27), at("f", 28)]
    assert ids(run(events, [], Rules(30 * MINUTE, max_us=20 * MINUTE, max_events=3))) == ["ab", "cde", "f"]


def test_midnight_is_that_of_the_zone() -> None:
    # Paris is one hour ahead of UTC on 25 March 2023 and two on the 26th: midnights at 23:00 and 22:00 UTC.
    first = datetime(2023, 3, 25, 22, 50)
    events = [at("a", 0, start=first), at("b", 10, start=first), at("c", 75, start=first)]
    assert ids(run(events, [], Rules(120 * MINUTE, midnight_of="Europe/Paris"))) == ["a", "bc"]
    assert ids(run(events, [], Rules(120 * MINUTE, midnight_of="UTC"))) == ["ab", "c"]
    assert ids(run(events, [1, 2], Rules(120 * MINUTE, midnight_of="UTC"))) == ["ab", "c"]
    second = datetime(2023, 3, 26, 21, 59)
    events = [at("a", 0, start=second), at("b", 1, start=second), at("c", 75, start=second)]
    assert ids(run(events, [], Rules(120 * MINUTE, midnight_of="Europe/Paris"))) == ["a", "bc"]


def test_a_zone_that_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(TrailvecError, match=r"sessionize\.midnight_of: found 'Mars', which is not an IANA time zone"):
        load_config(sets=["sessionize.midnight_of=Mars"])


def test_a_change_of_vertical_cuts_the_session_but_not_the_run() -> None:
    events = [at("a", 0, "food"), at("b", 1, "rides"), at("c", 2, "rides"), at("d", 3, "food")]
    for borders in ([], [1], [2], [1, 2, 3]):
        found = run(events, borders, Rules(30 * MINUTE, cut_on_vertical=True))
        assert ids(found) == ["a", "bc", "d"]
        assert {s["run_start_ts"].replace(tzinfo=None) for s in found} == {START}


@given(
    events=logs(),
    borders=st.lists(st.integers(0, 60), max_size=12),
    every=st.integers(1, 12),
    max_us=st.sampled_from([None, 30 * MINUTE]),
    max_events=st.sampled_from([1, 3, 10_000]),
)
def test_the_log_may_be_parted_at_its_splits(
    events: list[Row], borders: list[int], every: int, max_us: int | None, max_events: int
) -> None:
    rules = Rules(30 * MINUTE, {"rides": 60 * MINUTE}, max_us, max_events)
    splits = splits_of(events, borders, rules, every)
    ordered = oracles.in_order(events)
    at_splits = [n for n, e in enumerate(ordered) if key(e) in splits]
    cuts = [0, *at_splits, len(ordered)]

    whole = run(events, [], rules)
    assert [s for a, b in itertools.pairwise(cuts) for s in run(ordered[a:b], borders, rules, splits)] == whole
    # What lies between two of them: `every` events, and what the session that these end in holds beside them.
    assert all(b - a >= every for a, b in itertools.pairwise([0, *at_splits]))
    longest = max(s["event_count"] for s in whole)
    assert all(b - a < every + longest for a, b in itertools.pairwise(cuts))


def test_an_event_with_the_id_of_a_split_is_none_itself() -> None:
    # "c" is a split of u's first day; it stands on u's next day too, and with v at the very same time.
    first = [at(name, 10 * n) for n, name in enumerate("abcd")]
    next_day = [at(name, 24 * 60 + 10 * n) for n, name in enumerate("abcd")]
    events = [*first, *next_day, *[event | {"user_id": "v"} for event in first]]
    rules = Rules(30 * MINUTE, max_events=2)
    splits = {key(first[2]): key(first[0])[1]}
    assert splits.items() <= splits_of(events, [], rules, 2).items()
    # Rules that alone would cut nowhere show which events are taken for splits.
    for borders in ([], [2], [3, 6, 9]):
        found = run(events, borders, Rules(30 * MINUTE), splits)
        assert ids(found) == ["ab", "cd", "abcd", "abcd"]
        days = [0, 0, 1, 0]
        assert [s["run_start_ts"].replace(tzinfo=None) for s in found] == [START + timedelta(days=d) for d in days]


def test_one_endless_run_is_never_held_as_a_whole() -> None:
    """Whatever the length of the run, what waits for its session's end is less than a session and a batch."""
    size, held, most = 1_000, 0, 0

    def batches() -> Any:
        nonlocal held, most
        batch = pa.RecordBatch.from_pylist([{n: at("e", 0)[n] for n in SCHEMA.names}] * size, SCHEMA)
        for _ in range(200):
            held += size
            most = max(most, held)
            yield batch

    for made in sessionize(batches(), Rules(1, max_events=1_500), FIELDS):
        held -= sum(made["event_count"].to_pylist())
    assert held == 0
    assert most <= 1_500 + size


def test_no_events_make_no_sessions() -> None:
    assert list(sessionize(iter([]), Rules(1), FIELDS)) == []
    empty = pa.RecordBatch.from_pylist([], SCHEMA)
    assert list(sessionize(iter([empty]), Rules(1), FIELDS)) == []


@pytest.mark.parametrize("tasks", [16, 200])
def test_the_parts_of_a_user_with_a_tenth_of_all_events_spread_over_the_tasks(tasks: int) -> None:
    """Each part goes to some task, whatever the others do, beside that task's share of all other users' events."""
    events, chance = 10**9, np.random.default_rng(1)
    part = events_of_a_part(events, tasks)
    parts = chance.multinomial(events // 10 // part, [1 / tasks] * tasks, size=1000)
    load = 0.9 * events / tasks + parts * part
    assert 1 < (load.max(axis=1) / np.median(load, axis=1)).mean() < 2
    assert events_of_a_part(100_000, tasks) == 50_000  # a log so small that splits gain nothing
