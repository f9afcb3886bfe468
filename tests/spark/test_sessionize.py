"""The sessions table through Spark: law 1 for reordered and re-partitioned input, and its stable ids."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import DataFrame, SparkSession

from jobs import sessionize
from jobs.config import SessionizeSettings
from jobs.runtime import Runtime
from jobs.tables import EVENTS, SESSIONS
from tests import oracles
from tests.conftest import put
from tests.events import START, Row, logs, make_event, to_frame


def rows(frame: DataFrame) -> list[dict[str, Any]]:
    return sorted((r.asDict(recursive=True) for r in frame.collect()), key=lambda r: r["session_id"])


@settings(max_examples=6)
@given(events=logs(max_events=80), seed=st.randoms())
def test_order_and_partitioning_of_the_events_do_not_matter(spark: SparkSession, events: list[Row], seed: Any) -> None:
    rules = SessionizeSettings(gap_minutes=30, gap_minutes_by_vertical={"rides": 60})
    shuffled = list(events)
    seed.shuffle(shuffled)
    first = rows(sessionize.sessionize(to_frame(spark, events, 1), rules))
    second = rows(sessionize.sessionize(to_frame(spark, shuffled, 3), rules))
    assert first == second

    expected = oracles.sessions(events, timedelta(minutes=30), {"rides": timedelta(hours=1)})
    assert sorted([e["event_id"] for e in s["events"]] for s in first) == sorted(
        [e["event_id"] for e in s] for s in expected
    )


def test_a_session_keeps_its_id_when_the_other_users_change(spark: SparkSession) -> None:
    mine = [
        make_event(event_id=f"m{n}", user_id="me", item_id="i", event_ts=START + timedelta(minutes=n)) for n in range(3)
    ]
    other = [make_event(event_id="o", user_id="aa", item_id="i", event_ts=START)]
    alone = rows(sessionize.sessionize(to_frame(spark, mine), SessionizeSettings()))
    together = rows(sessionize.sessionize(to_frame(spark, other + mine), SessionizeSettings()))
    assert alone == [s for s in together if s["user_id"] == "me"]
    assert len({s["session_id"] for s in together}) == 2


def test_the_stage_writes_once_and_then_is_up_to_date(
    make_runtime: Callable[..., Runtime], spark: SparkSession
) -> None:
    runtime = make_runtime()
    events = [
        make_event(event_id=f"e{n}", user_id="u", item_id="i", event_ts=START + timedelta(hours=n)) for n in range(3)
    ]
    put(runtime, EVENTS, to_frame(spark, events))

    first = runtime.execute(sessionize.STAGE)
    second = runtime.execute(sessionize.STAGE)
    assert (first.skipped, first.rows_in, first.rows_out) == (False, {"events": 3}, {"sessions": 3})
    assert (second.skipped, second.rows_in, second.rows_out) == (True, {"events": 3}, {"sessions": 3})
    changed = make_runtime("sessionize.gap_minutes=61").execute(sessionize.STAGE)
    assert (changed.skipped, changed.rows_out) == (False, {"sessions": 1})

    written = runtime.last_writer(SESSIONS)
    assert written is not None
    assert written["stage"] == "sessionize"
    assert written["reads"] == {"events": 1}
    assert written["config"]["sessionize"]["gap_minutes"] == 61
