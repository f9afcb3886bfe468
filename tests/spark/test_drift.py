"""What is counted on both sides of a cut, by a log that one can count by hand."""

from __future__ import annotations

from datetime import datetime, timedelta

from pyspark.sql import SparkSession

from jobs.drift import event_counts, reaches_back

CUT, END = datetime(2024, 1, 11), datetime(2024, 1, 21)


def at(days: float) -> datetime:
    return CUT + timedelta(days=days)


def test_events_are_counted_by_vertical_on_both_sides_of_the_cut(spark: SparkSession) -> None:
    events = [
        [(at(-11), "old", "food")],  # before both times
        [(at(-10), "old", "food"), (at(-1), "early", "food"), (at(0), "early", "food")],  # a session over the cut
        [(at(9), "late", "food"), (at(2), "old", "rides")],
        [(at(-3), "nameless", "rides")],  # an item that the vocabulary does not hold
    ]
    times = [[time for time, _, _ in of] for of in events]
    sessions = spark.createDataFrame(
        [("u", min(of), max(of), session) for of, session in zip(times, events, strict=True)],
        "user_id string, start_ts timestamp, end_ts timestamp, "
        "events array<struct<event_ts: timestamp, item_id: string, vertical: string>>",
    )
    items = [("old", at(-11)), ("early", at(-1)), ("late", at(9))]
    found = event_counts(
        sessions,
        spark.createDataFrame(items, "item_id string, first_ts timestamp"),
        CUT,
        END,
    )
    # Each item's events are counted before they meet the items.
    assert found._jdf.queryExecution().optimizedPlan().toString().count("Aggregate [") == 2
    assert sorted(map(tuple, found.select("vertical", "after", "before", "new_after", "new_before").collect())) == [
        ("food", 2, 2, 1, 1),
        ("rides", 1, 1, 0, 0),
    ]
    # Its first event is 11 days before the cut.
    assert [reaches_back(sessions, CUT, at(days)) for days in (11, 11.001)] == [True, False]
