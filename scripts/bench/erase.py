"""What erasing people costs, with deletion vectors or by rewriting: python scripts/bench/erase.py [--quick]

A table of events for the given number of users (three events each, files by time, so that a user's events are spread
over several), 2 cores. The given number of users is erased, each time from the original table (linked, not copied), in
turns, medians:

  vectors   MERGE that marks the rows in deletion vectors, then REORG (PURGE), which rewrites the files that have one:
            what erase_users does
  rewrite   MERGE that rewrites the files without the rows, then the same REORG, since any file may hide an older change
            to these users; it rewrites the same files again, because MERGE leaves the change feed's column in them

Both must leave no row of these users in any file of the current version, as read by DuckDB, or the run stops.
And user_embeddings of as many users (`--width` numbers each), which has no deletion vectors: rewritten.

The last line is one JSON object: for each way <way>_s (to the end), <way>_gone_s (until no reader sees the users),
<way>_cpu_s (of all processes including the JVM: least affected by other work on the machine), <way>_mb (bytes
written), <way>_peak_java_mb and <way>_peak_python_mb; vectors_to_rewrite (CPU seconds); and the same for `embeddings`.
A chart goes to build/bench/erase.svg.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from typing import Any

import duckdb
import pandas as pd
from deltalake import DeltaTable
from measure import Watch, bars, last_line, log, options, put, runtime, session
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.maintain_tables import disk_files
from jobs.runtime import Runtime, Stage
from jobs.spark_session import spark_conf
from jobs.tables import EVENTS, USER_EMBEDDINGS, Table
from training.urls import file_of_table

WAYS = {"vectors": True, "rewrite": False}
FILE_ROWS = 2_000_000
EVENTS_EACH = 3


def user(number: Column) -> Column:
    return F.concat(F.lit("user-"), F.lpad(number.cast("string"), 10, "0"))


def make_events(spark: SparkSession, users: int) -> DataFrame:
    """A user's events are a third of the log apart, so in different files."""
    rows = users * EVENTS_EACH
    number = F.col("id")
    return spark.range(0, rows, 1, max(2, rows // FILE_ROWS)).select(
        F.concat(F.lit("e"), number.cast("string")).alias("event_id"),
        user(number % users).alias("user_id"),
        F.concat(F.lit("i"), (F.abs(F.xxhash64(number)) % 50_000).cast("string")).alias("item_id"),
        F.lit("purchase").alias("event_type"),
        F.timestamp_seconds(F.lit(1_672_531_200) + number).alias("event_ts"),
        F.lit("food").alias("vertical"),
        (F.abs(F.xxhash64(number)) % 10_000 / 100).alias("amount"),
        F.lit(1.0).alias("quantity"),
        F.lit("UTC").alias("time_zone"),
        F.lit(None).cast("string").alias("item_name"),
        F.lit(None).cast("string").alias("category"),
        F.lit(None).cast("string").alias("basket_id"),
        F.lit(None).cast("map<string,string>").alias("attributes"),
        F.lit("bench").alias("source"),
    )


def make_vectors(spark: SparkSession, users: int, width: int) -> DataFrame:
    number = F.col("id")
    return spark.range(0, users, 1, max(2, users // 500_000)).select(
        user(number).alias("user_id"),
        F.lit("m1").alias("model_version"),
        F.timestamp_seconds(F.lit(1_672_531_200)).alias("as_of"),
        F.lit(EVENTS_EACH).alias("history_length"),
        F.lit(False).alias("is_cold"),
        F.array(*[F.randn(n).cast("float") for n in range(width)]).alias("vector"),
    )


def erase(stages: Runtime, table: Table, users: DataFrame, vectors: bool) -> tuple[float, float]:
    """Seconds until no reader sees the users, and until no file of the current version holds them."""
    moments = [time.monotonic()]

    def run(r: Runtime) -> None:
        with spark_conf(r.spark, {"spark.databricks.delta.merge.deletionVectors.persistent": str(vectors).lower()}):
            r.erase(table, users, F.col("old.user_id") == F.col("gone.user_id"), "bench")
        moments.append(time.monotonic())
        r.purge(table)
        moments.append(time.monotonic())

    stages.execute(Stage("erase_users", "", run, (), (), ()), force=True)
    return moments[1] - moments[0], moments[2] - moments[0]


def rows_left(stages: Runtime, table: Table, ids: pd.DataFrame) -> int:
    """The users' rows in the files of the current version, including rows hidden by deletion vectors."""
    files = [file_of_table(uri) for uri in DeltaTable(stages.path(table)).file_uris()]
    connection = duckdb.connect()
    connection.register("ids", ids)
    rows = connection.execute("SELECT count(*) FROM read_parquet(?) SEMI JOIN ids USING (user_id)", [files])
    return int(rows.fetchall()[0][0])


def one_round(whole: Runtime, copy: Runtime, table: Table, ids: pd.DataFrame, vectors: bool) -> dict[str, float]:
    spark = copy.spark
    shutil.rmtree(copy.root, ignore_errors=True)
    shutil.copytree(whole.path(table), copy.path(table), copy_function=os.link)
    before = disk_files(copy, table)
    users = spark.createDataFrame(ids, "user_id string")
    with Watch(spark) as watch:
        gone, total = erase(copy, table, users, vectors)
    if rows := rows_left(copy, table, ids):
        raise RuntimeError(f"{rows} rows of the erased users are left in the files of {table.name}")
    written_mb = sum(size for file, size in disk_files(copy, table).items() if file not in before) / 1e6
    peaks = {f"peak_{kind}_mb": megabytes for kind, megabytes in watch.peak_mb.items()}
    shutil.rmtree(copy.root)
    return {"s": total, "gone_s": gone, "cpu_s": watch.cpu_s, "mb": written_mb, **peaks}


def measure(spark: SparkSession, arguments: argparse.Namespace, users: int, erased: int) -> dict[str, Any]:
    folder = arguments.folder.absolute() / f"erase-{users}"
    shutil.rmtree(folder, ignore_errors=True)
    whole, copy = (runtime(spark, folder / name, folder) for name in ("whole", "copy"))
    for table, rows in (
        (EVENTS, make_events(spark, users)),
        (USER_EMBEDDINGS, make_vectors(spark, users, arguments.width)),
    ):
        started = time.monotonic()
        put(whole, table, rows)
        size = sum(disk_files(whole, table).values()) / 1e6
        log(f"{table.name}: {size:,.0f} MB in {time.monotonic() - started:.1f} s")
    step = users // erased
    ids = pd.DataFrame({"user_id": [f"user-{n * step:010}" for n in range(erased)]})

    by_way: dict[str, list[dict[str, float]]] = {}
    for number in range(-1, arguments.rounds):  # the first is a warm-up
        turns = [(name, EVENTS, vectors) for name, vectors in WAYS.items()]
        turns = turns[:: 1 if number % 2 else -1]
        for name, table, vectors in [*turns, ("embeddings", USER_EMBEDDINGS, False)]:
            result = one_round(whole, copy, table, ids, vectors)
            log(f"round {number} {name:10} " + ", ".join(f"{key} {value:,.1f}" for key, value in result.items()))
            if number >= 0:
                by_way.setdefault(name, []).append(result)
    events_mb = sum(disk_files(whole, EVENTS).values()) / 1e6
    shutil.rmtree(folder)
    medians = {
        f"{name}_{key}": statistics.median(result[key] for result in results)
        for name, results in by_way.items()
        for key in results[0]
    }
    bars(
        arguments.folder.absolute() / "erase.svg",
        {name: [result["cpu_s"] for result in results] for name, results in by_way.items()},
        "CPU s",
    )
    return {
        "users": users,
        "erased": erased,
        "rows": users * EVENTS_EACH,
        "events_mb": events_mb,
        "rounds": arguments.rounds,
        "vectors_to_rewrite": medians["vectors_cpu_s"] / medians["rewrite_cpu_s"],
        **medians,
    }


def main() -> None:
    parser = options(__doc__, quick="100,000 users, 100 of them erased, one round", folder="the tables and the chart")
    parser.add_argument("--users", type=float, help="number of users (default: 1e7)")
    parser.add_argument("--erase", type=float, help="number of users to erase (default: 1 in 1,000)")
    parser.add_argument("--width", type=int, default=64, help="length of a vector (default: 64)")
    parser.add_argument(
        "--rounds", type=int, help="rounds, after one warm-up, of which the medians are reported (default: 3)"
    )
    arguments = parser.parse_args()
    users = int(arguments.users or (1e5 if arguments.quick else 1e7))
    erased = int(arguments.erase or max(1, users // 1000))
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)

    spark = session(arguments.quick)
    result = measure(spark, arguments, users, erased)
    spark.stop()
    last_line(result)


if __name__ == "__main__":
    main()
