"""How close sessionize is to the minimum work: python scripts/bench/sessionize.py [--quick]

On a superapp's log, in one Spark session on 2 cores, in turns, medians; each writes its output:

  floor           shuffle by user, sort, write of the same columns, event by event: what any such job has to do
  sessionize      the stage's own functions
  windows         lag/sum windows, then collect_list
  session_window  Spark's own session windows, then collect_list
  duckdb          the same as windows in DuckDB on 2 threads, to Parquet

Then the task times of a log in which one user has a tenth of all events, with and without the stage's splits; and of
one in which one item has a tenth: grouped for the vocabulary, and joined with its indices by a shuffle, as when the
vocabulary is too large to broadcast.

The last line is one JSON object: ratio_to_floor, speedup_vs_windows, speedup_vs_session_window, time_vs_duckdb; the
same in CPU seconds, which a busy machine barely affects (cpu_...); skew_max_to_median of the task times, with and
without splits, hot_item_max_to_median; and the medians. A chart goes to build/bench/sessionize.svg.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
from measure import CORES, bars, in_turns, last_line, log, of_scala, options, session, stages
from pyspark.sql import DataFrame, GroupedData, SparkSession, Window
from pyspark.sql import functions as F
from superapp import World, events

from jobs.build_sequences import number_actions
from jobs.build_vocabulary import describe_items
from jobs.config import SequencesSettings, SessionizeSettings
from jobs.sessionize import events_of_a_part, find_splits, sessionize
from jobs.spark_session import shuffle_tasks, spark_conf
from jobs.splits import cut_times, log_end
from jobs.tables import EVENT_IN_SESSION

GAP = 30
TASKS = 16  # shuffle partitions, when task times are measured
WAYS = ("floor", "sessionize", "windows", "session_window", "duckdb")
SETTINGS = SessionizeSettings(gap_minutes=GAP)


def events_table(spark: SparkSession, count: int, folder: Path) -> Path:
    """A Delta table of about `count` events, created if missing."""
    path = folder / f"events-{count}"
    if not (path / "_delta_log").exists():
        events(spark, World.of_events(count)).write.format("delta").save(str(path))
    return path


def floor(rows: DataFrame) -> DataFrame:
    distributed = rows.select("user_id", *EVENT_IN_SESSION).repartition("user_id")
    return distributed.sortWithinPartitions("user_id", "event_ts", "event_id")


def ours(every: int) -> Callable[[DataFrame], DataFrame]:
    return lambda rows: sessionize(rows, SETTINGS, find_splits(rows, SETTINGS, every))


def _sessions(grouped: GroupedData) -> DataFrame:
    sessions = grouped.agg(
        F.min("event_ts").alias("start_ts"),
        F.max("event_ts").alias("end_ts"),
        F.count("*").cast("int").alias("event_count"),
        F.array_sort(F.collect_set("vertical")).alias("verticals"),
        F.sum("amount").alias("amount"),
        F.array_sort(F.collect_list(F.struct(*EVENT_IN_SESSION))).alias("events"),
        F.min("event_ts").alias("run_start_ts"),
    )
    return sessions.withColumn("session_id", F.col("events")[0]["event_id"])


def windows(rows: DataFrame) -> DataFrame:
    in_order = Window.partitionBy("user_id").orderBy("event_ts", "event_id")
    pause = F.unix_micros("event_ts") - F.unix_micros(F.lag("event_ts").over(in_order))
    new = F.coalesce((pause > GAP * 60_000_000).cast("int"), F.lit(1))
    numbered = rows.select("user_id", *EVENT_IN_SESSION, new.alias("new"))
    numbered = numbered.withColumn("number", F.sum("new").over(in_order))
    return _sessions(numbered.groupBy("user_id", "number")).drop("number")


def session_window(rows: DataFrame) -> DataFrame:
    session = F.session_window("event_ts", f"{GAP} minutes").alias("session")
    return _sessions(rows.select("user_id", *EVENT_IN_SESSION).groupBy("user_id", session)).drop("session")


def in_duckdb(path: Path, out: Path, scratch: Path) -> None:
    struct = ", ".join(f"{name} := {name}" for name in EVENT_IN_SESSION)
    limits: dict[str, str | bool | int | float | list[str]] = {
        "threads": CORES,
        "temp_directory": str(scratch),
        "memory_limit": "12GB",
        "preserve_insertion_order": False,
    }
    connection = duckdb.connect(config=limits)
    connection.execute(
        f"""COPY (
            WITH marked AS (
                SELECT user_id, {", ".join(EVENT_IN_SESSION)}, coalesce(event_ts - lag(event_ts) OVER w
                       > INTERVAL {GAP} MINUTES, true) AS new
                FROM read_parquet('{path}/*.parquet') WINDOW w AS (PARTITION BY user_id ORDER BY event_ts, event_id)),
            numbered AS (
                SELECT *, sum(new::int) OVER (PARTITION BY user_id ORDER BY event_ts, event_id) AS number FROM marked),
            grouped AS (
                -- Ordered aggregates (list(... ORDER BY ...)) hold every group's rows apart: 12 GB were not enough.
                SELECT user_id, min(event_ts) AS start_ts, max(event_ts) AS end_ts, count(*)::int AS event_count,
                       sum(amount) AS amount, list_sort(list(struct_pack({struct}))) AS events
                FROM numbered GROUP BY user_id, number)
            SELECT events[1].event_id AS session_id, user_id, start_ts, end_ts, event_count,
                   list_sort(list_distinct(list_transform(events, e -> e.vertical))) AS verticals, amount, events,
                   start_ts AS run_start_ts
            FROM grouped
        ) TO '{out}' (FORMAT parquet, COMPRESSION snappy)"""
    )
    connection.close()


def task_seconds(spark: SparkSession, since: int, tasks: int = 0) -> list[float]:
    """Sorted task seconds of the longest stage started after stage number `since` that has `tasks` tasks (0: any
    number)."""
    newer = [s for s in stages(spark) if s.stageId() > since and tasks in (0, s.numCompleteTasks())]
    longest = max(newer, key=lambda s: s.executorRunTime())
    store = spark.sparkContext._jsc.sc().statusStore()
    of_stage = of_scala(store.taskList(longest.stageId(), longest.attemptId(), 10_000))
    return sorted(t.taskMetrics().get().executorRunTime() / 1000 for t in of_stage)


def skew(spark: SparkSession, path: Path, count: int, out: Path) -> dict[str, Any]:
    """One user has a tenth of all events, spread evenly over all days: one unbroken run."""
    heavy = F.xxhash64("event_id") % 10 == 0
    rows = spark.read.format("delta").load(str(path))
    rows = rows.withColumn("user_id", F.when(heavy, "heavy").otherwise(F.col("user_id")))
    ratios = {}
    for name, every in (("", events_of_a_part(count, TASKS)), ("_without_splits", count)):
        splits = find_splits(rows, SETTINGS, every)
        before = max(s.stageId() for s in stages(spark))
        sessionize(rows, SETTINGS, splits).write.format("delta").mode("overwrite").save(str(out / "skew"))
        seconds = task_seconds(spark, before)
        ratios[f"skew_max_to_median{name}"] = round(seconds[-1] / statistics.median(seconds), 2)
        log(f"tasks{name}, {len(splits)} splits, seconds: {' '.join(f'{s:.1f}' for s in seconds)}")
    return ratios


def hot_item(spark: SparkSession, path: Path) -> dict[str, Any]:
    """One item has a tenth of all events."""
    rows = spark.read.format("delta").load(str(path))
    hot = F.xxhash64("event_id") % 10 == 0
    rows = rows.withColumn("item_id", F.when(hot, "hot").otherwise(F.col("item_id"))).localCheckpoint()
    settings = SequencesSettings()
    described = describe_items(rows, cut_times(log_end(rows), settings), settings)
    by_id = Window.orderBy("item_id")
    vocabulary = described.select("item_id", F.row_number().over(by_id).alias("item_index")).localCheckpoint()
    values = spark.createDataFrame([], "kind string, value string, value_index int")
    sessions = sessionize(rows, SETTINGS).localCheckpoint()
    acts = {"grouped": described, "joined": number_actions(sessions, vocabulary, values)}
    ratios: dict[str, float] = {}
    with spark_conf(spark, {"spark.sql.autoBroadcastJoinThreshold": "-1"}):
        for name, frame in acts.items():
            before = max(s.stageId() for s in stages(spark))
            frame.write.format("noop").mode("overwrite").save()
            seconds = task_seconds(spark, before, TASKS)
            ratios[name] = round(seconds[-1] / statistics.median(seconds), 2)
            log(f"a hot item, {name}, tasks' seconds: {' '.join(f'{s:.2f}' for s in seconds)}")
    return {"hot_item_max_to_median": ratios}


def main() -> None:
    parser = options(
        __doc__,
        quick="100,000 events, one cold round, no log with a hot item",
        folder="the log and the output",
    )
    parser.add_argument("--events", type=float, help="approximate number of events (default: 5e6)")
    parser.add_argument("--rounds", type=int, help="rounds, of which the medians are reported (default: 5)")
    parser.add_argument("--only", nargs="+", choices=WAYS, help="only these contestants, without ratios")
    arguments = parser.parse_args()
    count = int(arguments.events or (100_000 if arguments.quick else 5_000_000))
    rounds = arguments.rounds or (1 if arguments.quick else 5)

    spark = session(quick=False)
    folder = arguments.folder.absolute()
    path, out = events_table(spark, count, folder), folder / "out"
    rows = spark.read.format("delta").load(str(path))
    count = rows.count()

    def by_spark(make: Callable[[DataFrame], DataFrame], name: str) -> Callable[[], None]:
        return lambda: make(rows).write.format("delta").mode("overwrite").save(str(out / name))

    every = events_of_a_part(count, shuffle_tasks(spark))
    spark_ones = {"floor": floor, "sessionize": ours(every), "windows": windows, "session_window": session_window}
    contestants = {name: by_spark(make, name) for name, make in spark_ones.items()}
    contestants["duckdb"] = lambda: in_duckdb(path, out / "duckdb.parquet", folder / "duckdb")
    contestants = {name: run for name, run in contestants.items() if name in (arguments.only or contestants)}

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    times, cpu = in_turns(contestants, rounds, warm=0 if arguments.quick else 1)
    bars(folder / "sessionize.svg", times)
    result: dict[str, Any] = {"events": count, "rounds": rounds}
    if not arguments.only:
        same = {name: _shape(spark, out / name) for name in ("sessionize", "windows")}
        same["duckdb"] = _shape(spark, out / "duckdb.parquet", "parquet")
        assert len(set(same.values())) == 1, f"count and hash of the sessions differ: {same}"
        spark.conf.set("spark.sql.shuffle.partitions", TASKS)
        spark.conf.set("spark.sql.adaptive.coalescePartitions.enabled", "false")
        result |= skew(spark, path, count, out)
        if not arguments.quick:
            result |= hot_item(spark, path)
        for prefix, measured in (("", times), ("cpu_", cpu)):
            median = {name: statistics.median(seconds) for name, seconds in measured.items()}
            result |= {
                f"{prefix}ratio_to_floor": median["sessionize"] / median["floor"],
                f"{prefix}speedup_vs_windows": median["windows"] / median["sessionize"],
                f"{prefix}speedup_vs_session_window": median["session_window"] / median["sessionize"],
                f"{prefix}time_vs_duckdb": median["sessionize"] / median["duckdb"],
            }
    result |= {f"{name}_s": statistics.median(seconds) for name, seconds in times.items()}
    result |= {f"{name}_cpu_s": statistics.median(seconds) for name, seconds in cpu.items()}
    spark.stop()
    last_line(result)


def _shape(spark: SparkSession, path: Path, form: str = "delta") -> tuple[Any, ...]:
    rows = spark.read.format(form).load(str(path))
    return tuple(rows.agg(F.count("*"), F.sum(F.xxhash64("session_id", "start_ts", "end_ts", "events"))).collect()[0])


if __name__ == "__main__":
    main()
