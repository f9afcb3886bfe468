"""sessionize: events + flagged_users → sessions.

One shuffle by user, one sort by (user_id, event_ts, event_id), then Arrow (`spark_udfs/sessionize.py`). After the first
time, only the runs that changed events can affect are recomputed (docs/decisions/0006), in one merge.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from jobs.cli import stage_main
from jobs.config import SessionizeSettings
from jobs.flag_users import flagged_now
from jobs.pruning import meeting_days, within_days
from jobs.runtime import Runtime, Stage
from jobs.spark_session import broadcast_if_few, shuffle_tasks
from jobs.tables import CONTEXT_VALUES, EVENT_IN_SESSION, EVENTS, FLAGGED_USERS, SESSIONS, conform, differences
from spark_udfs.sessionize import Rules, split_points
from spark_udfs.sessionize import sessionize as sessionize_arrow

_PART_EVENTS = 50_000  # never split below this: it is at least a second of work for a task
# A user's parts are spread over the tasks at random, so two may meet in one task: the smaller they are, the less that
# costs. Simulated, one user with a tenth of all events, the largest task over the median one, with parts of a task's
# share and of a quarter of it: 2.1 and 1.6 for 16 tasks, 3.2 and 1.8 for 200.
_PARTS_OF_A_TASK = 4


@dataclass(frozen=True)
class Split:
    """A session's first event at which a user with too many events for one task is split; times in microseconds."""

    user_id: str
    event_us: int
    event_id: str
    run_us: int  # start of its run


def sessionize(events: DataFrame, settings: SessionizeSettings, splits: Sequence[Split] = ()) -> DataFrame:
    """The sessions of `events`, which may have any order and partitioning.

    Args:
        splits: `find_splits` of the same events and settings: the stretches between them may go to different tasks.
    """
    in_partition = partial(
        sessionize_arrow,
        rules=_rules(settings),
        event_fields=list(EVENT_IN_SESSION),
        run_us_of_split={(split.user_id, split.event_us, split.event_id): split.run_us for split in splits},
    )
    sessions = (
        events.select("user_id", *EVENT_IN_SESSION)
        .repartition("user_id", *([_part(splits)] if splits else []))
        .sortWithinPartitions("user_id", "event_ts", "event_id")
        .mapInArrow(in_partition, SESSIONS.schema())
    )
    return conform(sessions, SESSIONS)


def find_splits(events: DataFrame, settings: SessionizeSettings, every: int) -> list[Split]:
    """Where to split users with more than `every` events: about that many lie between two splits.

    These users are found by sampling every n-th row. Their session starts are then found in one task per user, from the
    few columns that the rules read, so splits are exact whichever users are sampled.
    """
    step = max(1, every // 100)  # samples about a hundred events of a user with `every` events
    # Make it a column first: Delta applies a filter without columns to its list of files, and skips most of them.
    some = events.select("user_id", F.monotonically_increasing_id().alias("place")).where(F.col("place") % step == 0)
    heavy = [row["user_id"] for row in some.groupBy("user_id").count().where(F.col("count") > every / step).collect()]
    if not heavy:
        return []
    found = (
        events.where(F.col("user_id").isin(heavy))
        .select("user_id", "event_ts", "event_id", "vertical")
        .repartition("user_id")
        .sortWithinPartitions("user_id", "event_ts", "event_id")
        .mapInArrow(
            partial(split_points, rules=_rules(settings), every=every),
            "user_id string, event_us long, event_id string, run_us long",
        )
    )
    return [Split(*row) for row in found.orderBy("user_id", "event_us", "event_id").collect()]


def _part(splits: Sequence[Split]) -> Column:
    """The event's part: its position in the sorted list of all users' splits; 0 for users who aren't split. All that
    matters is that the parts of one user differ."""

    def within(low: int, high: int) -> Column:
        """The part by binary search, if it is known to be between `low` and `high`, inclusive."""
        if low == high:
            return F.lit(low)
        middle = splits[(low + high) // 2]
        time = F.unix_micros("event_ts")
        earlier = (time < middle.event_us) | ((time == middle.event_us) & (F.col("event_id") < middle.event_id))
        return F.when(earlier, within(low, (low + high) // 2)).otherwise(within((low + high) // 2 + 1, high))

    def of(users: Sequence[tuple[str, int, int]]) -> Column:
        """The part for these users, given as (user_id, first split, end of splits). A tree too, because Spark walks
        expressions recursively and a chain of a thousand users would overflow its stack."""
        if len(users) == 1:
            user_id, low, high = users[0]
            return F.when(F.col("user_id") == user_id, within(low, high)).otherwise(0)
        middle = len(users) // 2
        return F.when(F.col("user_id") < users[middle][0], of(users[:middle])).otherwise(of(users[middle:]))

    users, low = [], 0
    for user_id, of_user in itertools.groupby(splits, lambda split: split.user_id):
        high = low + len(list(of_user))
        users.append((user_id, low, high))
        low = high
    return of(users)


def _rules(settings: SessionizeSettings) -> Rules:
    return Rules(
        gap_us=_microseconds(settings.gap_minutes),
        gap_us_by_vertical={v: _microseconds(minutes) for v, minutes in settings.gap_minutes_by_vertical.items()},
        max_us=None if settings.max_minutes is None else _microseconds(settings.max_minutes),
        max_events=settings.max_events,
        midnight_of=settings.midnight_of,
        cut_on_vertical=settings.cut_on_vertical,
    )


def _microseconds(minutes: float) -> int:
    return round(minutes * 60_000_000)


# ---- what changed events can affect ----------------------------------------------------------------------


def spans(changed: DataFrame, gap_us: int) -> DataFrame:
    """user_id, from_ts, to_ts: times within `gap_us` of a changed event; events at most `gap_us` apart share a span.

    A session [start_ts, end_ts] overlaps a span exactly if a changed event lies within `gap_us` of it. A user with
    a million changes in an hour gets one row, which keeps the join with their sessions small.
    """
    in_order = Window.partitionBy("user_id").orderBy("event_ts")
    times = changed.select("user_id", "event_ts")
    pause = F.unix_micros("event_ts") - F.unix_micros(F.lag("event_ts").over(in_order))
    numbered = times.withColumn("first", (pause.isNull() | (pause > gap_us)).cast("int"))
    return (
        numbered.withColumn("span", F.sum("first").over(in_order))
        .groupBy("user_id", "span")
        .agg(
            F.timestamp_micros(F.unix_micros(F.min("event_ts")) - gap_us).alias("from_ts"),
            F.timestamp_micros(F.unix_micros(F.max("event_ts")) + gap_us).alias("to_ts"),
        )
        .drop("span")
    )


def affected(sessions: DataFrame, touched: DataFrame, gap_us: int) -> DataFrame:
    """The rows of `sessions` whose run has a session that overlaps a span of `touched`.

    Reads only the days of the spans, and further days of runs that extend beyond them.
    """
    days = _days(touched, F.col("from_ts"), F.col("to_ts"))
    meets = (
        (F.col("old.user_id") == F.col("span.user_id"))
        & (F.col("start_ts") <= F.col("to_ts"))
        & (F.col("end_ts") >= F.col("from_ts"))
    )
    touched, reach = broadcast_if_few(touched), 1
    while True:
        near = sessions.where(meeting_days(F.col("start_ts"), F.col("end_ts"), days))
        runs = near.alias("old").join(touched.alias("span"), meets, "left_semi").select("user_id", "run_start_ts")
        runs = runs.localCheckpoint(eager=False)  # `broadcast_if_few` counts them
        found = near.join(broadcast_if_few(runs), ["user_id", "run_start_ts"], "left_semi")
        # The next session of a run begins at most a gap after this one's end.
        until = F.timestamp_micros(F.unix_micros("end_ts") + gap_us)
        beyond = _days(found, F.col("run_start_ts"), until) - days
        if not beyond:
            return found
        # Double the reach each time: a year-long run is found in nine steps.
        days |= beyond | {day + timedelta(days=more) for day in beyond for more in range(reach)}
        reach *= 2


def _days(rows: DataFrame, first: Column, last: Column) -> set[date]:
    """Every day (UTC) from `first` to `last` of any row."""
    # All sessions of a long run start at its first day here: keep only the longest range per first day.
    longest = rows.groupBy(F.to_date(first).alias("first")).agg(F.max(F.to_date(last)).alias("last")).collect()
    return {row["first"] + timedelta(days) for row in longest for days in range((row["last"] - row["first"]).days + 1)}


def with_changes(sessions: DataFrame, changed: DataFrame) -> DataFrame:
    """user_id and the fields of the events in `sessions` with the changes applied, including added events.

    Args:
        changed: Delta's change data feed of events: the same columns, _change_type and _commit_version.
    """
    # The same id can occur on two days (ingest.duplicates = "same_day").
    changed = changed.withColumn("day", F.to_date("event_ts"))
    is_there = F.col("_change_type").isin("insert", "update_postimage")
    newest = F.max_by(
        F.struct("user_id", *EVENT_IN_SESSION, is_there.alias("there")), F.struct("_commit_version", is_there)
    )
    last = changed.groupBy("event_id", "day").agg(newest.alias("event")).select("event.*")
    old_events = sessions.select("user_id", F.explode("events").alias("event")).select("user_id", "event.*")
    changed_ids = changed.select("event_id", "day").distinct()
    same = (old_events.event_id == changed_ids.event_id) & (F.to_date(old_events.event_ts) == changed_ids.day)
    return old_events.join(changed_ids, same, "left_anti").unionByName(last.where("there").drop("there"))


# ---- the stage ------------------------------------------------------------------------------------------


def run(runtime: Runtime) -> None:
    runtime.report.notes += _gaps_of_no_vertical(runtime)
    runtime.create(SESSIONS)
    made_from = runtime.stage_version(SESSIONS)  # read before deciding whether to go on incrementally
    changed = runtime.incremental(SESSIONS, EVENTS)
    flags = runtime.incremental(SESSIONS, FLAGGED_USERS)
    if changed is None or flags is None:
        flagged = flagged_now(runtime)
        events = runtime.read(EVENTS).join(flagged, "user_id", "left_anti")
        settings = runtime.config.sessionize
        count = runtime.row_count(EVENTS)
        every = events_of_a_part(count, shuffle_tasks(runtime.spark))
        splits = find_splits(events, settings, every) if count > every else []
        runtime.write(SESSIONS, sessionize(events, settings, splits))
    else:
        _update(runtime, changed, flags, made_from)


def _gaps_of_no_vertical(runtime: Runtime) -> list[str]:
    """A note for each vertical with its own gap that build_vocabulary has not seen yet."""
    named = runtime.config.sessionize.gap_minutes_by_vertical
    if not named or not runtime.exists(CONTEXT_VALUES):
        return []
    found = sorted(row["value"] for row in runtime.latest(CONTEXT_VALUES).where("kind = 'vertical'").collect())
    return [
        f"sessionize.gap_minutes_by_vertical has a gap for {name}, a vertical that build_vocabulary has not seen yet "
        f"(found {', '.join(found)}): check the name"
        for name in named
        if name not in found
    ]


def events_of_a_part(events: int, tasks: int) -> int:
    """The number of events between two splits of a user, for a log of `events` in `tasks` tasks."""
    return max(_PART_EVENTS, events // (_PARTS_OF_A_TASK * tasks))


def _update(runtime: Runtime, changed: DataFrame, flags: DataFrame, made_from: int) -> None:
    """Recomputes the affected sessions from their own events and the changes."""
    settings = runtime.config.sessionize
    gap_us = _rules(settings).longest_gap_us
    sessions = runtime.latest(SESSIONS)
    flagged = flagged_now(runtime)
    # Users whose flags changed: all their sessions are deleted; users without flags now are recomputed from events.
    turned = flags.select("user_id").distinct().localCheckpoint()

    changed = changed.select("user_id", *EVENT_IN_SESSION, "_change_type", "_commit_version")
    # Checkpoint, not persist, what is used twice: a commit to a table invalidates everything persisted from it.
    changed = changed.join(flagged.union(turned), "user_id", "left_anti").localCheckpoint()
    touched = spans(changed, gap_us).localCheckpoint(eager=False)
    old = affected(sessions, touched, gap_us).localCheckpoint()

    events, before = with_changes(old, changed), old
    if not turned.isEmpty():
        back = turned.join(flagged, "user_id", "left_anti").localCheckpoint()
        if not back.isEmpty():  # avoids reading all events in vain
            again = runtime.read(EVENTS).join(broadcast_if_few(back), "user_id", "left_semi")
            events = events.unionByName(again.select("user_id", *EVENT_IN_SESSION))
        # To delete these rows, their keys are enough.
        gone = sessions.select("session_id", "user_id", "start_ts").join(
            broadcast_if_few(turned), "user_id", "left_semi"
        )
        before = old.unionByName(gone, allowMissingColumns=True)

    differing = differences(sessionize(events, settings), before, SESSIONS).localCheckpoint(eager=False)
    rewritten = differing.groupBy(F.to_date("old.start_ts").alias("day")).count().collect()
    if rewritten:
        days = {row["day"] for row in rewritten if row["day"] is not None}
        within = within_days(F.col("old.start_ts"), days)
        count = sum(row["count"] for row in rewritten)
        runtime.merge_differences(SESSIONS, differing, count, where=within, made_from=made_from)
    else:
        runtime.touch(SESSIONS, made_from=made_from)


STAGE = Stage(
    "sessionize",
    "cut each user's events into sessions at long pauses",
    run,
    reads=(EVENTS, FLAGGED_USERS),
    writes=(SESSIONS,),
    settings=("sessionize",),
    also="If verticals have gaps of their own, it also reads context_values.",
)


def main() -> None:
    stage_main("sessionize")


if __name__ == "__main__":
    main()
