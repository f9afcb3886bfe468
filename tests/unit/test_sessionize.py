"""Sessions over Arrow, without Spark: against a plain-Python oracle, whatever the batch borders."""

from __future__ import annotations

import itertools
from datetime import timedelta

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from spark_udfs.sessionize import sessionize
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


def run(events: list[Row], borders: list[int], gaps: dict[str, int] | None = None) -> list[Row]:
    ordered = oracles.in_order(events)
    cuts = sorted({0, len(ordered), *[b % (len(ordered) + 1) for b in borders]})
    batches = [
        pa.RecordBatch.from_pylist([{n: e[n] for n in SCHEMA.names} for e in ordered[a:b]], SCHEMA)
        for a, b in itertools.pairwise(cuts)
    ]
    made = sessionize(iter(batches), 30 * MINUTE, gaps or {}, FIELDS)
    return [row for batch in made for row in batch.to_pylist()]


@given(events=logs(), borders=st.lists(st.integers(0, 60), max_size=12))
def test_equals_the_plain_python_sessions_whatever_the_batches(events: list[Row], borders: list[int]) -> None:
    expected = oracles.sessions(events, timedelta(minutes=30), {"rides": timedelta(hours=1)})
    found = run(events, borders, {"rides": 60 * MINUTE})

    assert [[e["event_id"] for e in s["events"]] for s in found] == [[e["event_id"] for e in s] for s in expected]
    for session, events_of in zip(found, expected, strict=True):
        amounts = [e["amount"] for e in events_of if e["amount"] is not None]
        assert session["user_id"] == events_of[0]["user_id"]
        assert session["start_ts"].replace(tzinfo=None) == events_of[0]["event_ts"]
        assert session["end_ts"].replace(tzinfo=None) == events_of[-1]["event_ts"]
        assert session["event_count"] == len(events_of)
        assert session["verticals"] == sorted({e["vertical"] for e in events_of})
        assert session["amount"] == (sum(amounts) if amounts else None)
        assert session["events"][0]["item_id"] == events_of[0]["item_id"]


def test_a_pause_of_exactly_the_gap_stays_and_a_microsecond_more_ends_the_session() -> None:
    start = make_event(event_id="a", user_id="u", item_id="i", event_ts=timedelta(0))
    at = [timedelta(0), timedelta(minutes=30), timedelta(minutes=60, microseconds=1)]
    events = [start | {"event_id": name, "event_ts": START + t} for name, t in zip("abc", at, strict=True)]
    assert [[e["event_id"] for e in s["events"]] for s in run(events, [])] == [["a", "b"], ["c"]]


def test_the_vertical_before_the_pause_says_how_long_it_may_be() -> None:
    def at(name: str, minutes: int, vertical: str) -> Row:
        return make_event(
            event_id=name, user_id="u", item_id="i", vertical=vertical, event_ts=START + timedelta(minutes=minutes)
        )

    # 45 minutes after a ride are one session (its gap is 60); 45 minutes after food are not (30).
    events = [at("a", 0, "rides"), at("b", 45, "food"), at("c", 90, "food")]
    assert [[e["event_id"] for e in s["events"]] for s in run(events, [], {"rides": 60 * MINUTE})] == [
        ["a", "b"],
        ["c"],
    ]


def test_no_events_make_no_sessions() -> None:
    assert list(sessionize(iter([]), 1, {}, FIELDS)) == []
    empty = pa.RecordBatch.from_pylist([], SCHEMA)
    assert list(sessionize(iter([empty]), 1, {}, FIELDS)) == []
