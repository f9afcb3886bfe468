"""flag_users: events → flagged_users.

Rules over each user's day (UTC) flag bots and test accounts: one row for every (user, day, rule) caught, with the
measured value. Their events stay in events; sessionize leaves the users out. A row depends only on one day of one user,
so when events change, only the days affected are measured again, and the result equals a full build.

A full build shuffles two columns of the log once, by (user, day), counts each day's events, and measures only the days
with at least as many events as the lowest limit, and those of test accounts.
"""

from __future__ import annotations

import operator
from functools import reduce

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from jobs.cli import stage_main
from jobs.config import FlagUsersSettings
from jobs.pruning import within_days
from jobs.runtime import Runtime, Stage
from jobs.spark_session import FEW, broadcast_if_few, persisted
from jobs.tables import EVENTS, FLAGGED_USERS, conform, differences

USER_DAY = ["user_id", "day"]


def flag_users(events: DataFrame, settings: FlagUsersSettings) -> DataFrame:
    """FLAGGED_USERS rows for `events` (user_id, event_ts), which must hold complete days of a user."""
    # rule: (measured column, smallest value that is caught)
    limits = {
        "events_per_minute": ("busiest_minute", settings.events_per_minute + 1),
        "events_per_day": ("events", settings.events_per_day + 1),
        "constant_interval": ("in_step", settings.constant_interval_events),
    }
    is_test = reduce(operator.or_, (F.col("user_id").like(pattern) for pattern in settings.test_accounts), F.lit(False))

    spread = events.select("user_id", F.to_date("event_ts").alias("day"), "event_ts").repartition(*USER_DAY)
    # No rule but test_account catches a day with fewer events than the lowest limit, so most days are neither sorted
    # nor counted by the minute. (Using event_ts here makes both uses of `spread` read the same columns, so that Spark
    # shuffles once.)
    busy = (
        spread.groupBy(*USER_DAY)
        .agg(F.count("*").alias("events"), F.max("event_ts").alias("last_ts"))
        .where("last_ts IS NOT NULL")
        .where(is_test | (F.col("events") >= min(least for _, least in limits.values())))
        .drop("last_ts")
    )
    caught = [_caught("test_account", "events", is_test)]
    caught += [_caught(rule, measured, F.col(measured) >= least) for rule, (measured, least) in limits.items()]
    rows = (
        measure(spread.join(busy.hint("shuffle_hash"), USER_DAY))
        .select(*USER_DAY, F.explode(F.array(*caught)).alias("caught"))
        .where("caught IS NOT NULL")
    )
    return conform(rows.select(*USER_DAY, "caught.*"), FLAGGED_USERS)


def measure(events: DataFrame) -> DataFrame:
    """One row per (user, day, events) of `events`, with `busiest_minute`, the most events in one clock minute, and
    `in_step`, the length in events of the longest run with equal intervals (1 if no interval is above 0).

    Two intervals are equal if they round to the same number of milliseconds. So a timer that fires every 5,000 ms is
    caught despite up to half a millisecond of jitter, and so is any timer whose jitter is hidden by a log of whole
    milliseconds or seconds. A wider tolerance would need a reference: the previous interval (which lets the run drift
    without bound) or the first one (whose choice then decides). An interval that rounds to 0 belongs to no run: a
    basket is not a bot.
    """
    in_order = Window.partitionBy(*USER_DAY).orderBy("event_ts")
    so_far = in_order.rowsBetween(Window.unboundedPreceding, Window.currentRow)
    micros = F.unix_micros("event_ts")
    # The order of events at the same moment does not matter: only their times are used.
    interval = F.round((micros - F.lag(micros).over(in_order)) / 1000)
    intervals = events.withColumns({"interval": interval, "place": F.row_number().over(in_order)})
    # A run begins where an interval differs from the previous one; its first event is one place earlier.
    begins = ~F.col("interval").eqNullSafe(F.lag("interval").over(in_order))
    series = intervals.withColumn("begin", F.when(begins, F.col("place")))
    length = F.when(F.col("interval") > 0, F.col("place") - F.max("begin").over(so_far) + 2).otherwise(1)
    return (
        series.withColumn("length", length)
        .groupBy(*USER_DAY, "events", F.date_trunc("minute", "event_ts").alias("minute"))
        .agg(F.count("*").alias("in_minute"), F.max("length").alias("length"))
        .groupBy(*USER_DAY, "events")
        .agg(F.max("in_minute").alias("busiest_minute"), F.max("length").alias("in_step"))
    )


def _caught(rule: str, measured: str, holds: Column) -> Column:
    row = F.struct(F.lit(rule).alias("rule"), F.col(measured).cast("double").alias("value"))
    return F.when(holds, row)


def flagged_now(runtime: Runtime) -> DataFrame:
    """The distinct user_id of all flagged users, for the right side of a join with events: as in `broadcast_if_few`.
    Reads the stage's FLAGGED_USERS."""
    users = runtime.read(FLAGGED_USERS).select("user_id").distinct()
    if runtime.row_count(FLAGGED_USERS) <= FEW:  # from Delta's log
        return F.broadcast(users)
    # A bot caught each day of a year has 365 rows: by these, Spark would shuffle all events instead of few users.
    return broadcast_if_few(users.localCheckpoint(eager=False))


def run(runtime: Runtime) -> None:
    settings = runtime.config.flag_users
    events = runtime.read(EVENTS)
    runtime.create(FLAGGED_USERS)
    made_from = runtime.stage_version(FLAGGED_USERS)  # before the starting point of the increment is decided
    changes = runtime.incremental(FLAGGED_USERS, EVENTS)
    if changes is None:
        runtime.write(FLAGGED_USERS, flag_users(events, settings))
        return
    # `changes` holds an updated row twice, before and after: both days are affected.
    with persisted(changes.select("user_id", F.to_date("event_ts").alias("day")).distinct()) as touched:
        days = [row["day"] for row in touched.select("day").distinct().collect()]
        again = (
            events.where(within_days(F.col("event_ts"), days))
            .withColumn("day", F.to_date("event_ts"))
            .join(touched, USER_DAY, "left_semi")
            .select("user_id", "event_ts")
            .localCheckpoint()  # else both uses in flag_users would read the table
        )
        old = runtime.latest(FLAGGED_USERS).join(touched, USER_DAY, "left_semi")
        differing = differences(flag_users(again, settings), old, FLAGGED_USERS).localCheckpoint(eager=False)
        count = differing.count()
        if count == 0:
            runtime.touch(FLAGGED_USERS, made_from=made_from)
            return
        within = F.col("old.day").between(F.lit(min(days)), F.lit(max(days)))
        runtime.merge_differences(FLAGGED_USERS, differing, count, where=within, made_from=made_from)


STAGE = Stage(
    "flag_users",
    "flag bots and test accounts by rules on each user's day",
    run,
    reads=(EVENTS,),
    writes=(FLAGGED_USERS,),
    settings=("flag_users",),
)


def main() -> None:
    stage_main("flag_users")


if __name__ == "__main__":
    main()
