"""RePlay's half of scripts/bench/against_replay.py, in its own environment.

Each line on stdin runs a round; each line on stdout is its seconds. Arguments: the log (Parquet), a folder to write to,
the cut between train and test (ISO), cores, then Spark settings.
"""

import sys
import time
from datetime import datetime

import pyspark.sql.functions as F
from pyspark.sql import DataFrame, SparkSession
from replay.preprocessing import LabelEncoder, LabelEncodingRule, Sessionizer
from replay.splitters import TimeSplitter

COLUMNS = ("user_id", "item_id", "event_type", "event_ts", "event_id", "vertical", "amount", "quantity", "time_zone")


def prepare(events: DataFrame, cut: datetime, out: str) -> None:
    """Sessions split at pauses of 30 minutes, encoded items, verticals and event types, and a split in two by time."""
    log = events.select(*COLUMNS).withColumn("timestamp", F.unix_micros("event_ts"))
    log = Sessionizer(user_column="user_id", time_column="timestamp", session_gap=30 * 60_000_000).transform(log)
    log.persist()  # else its windows would be recomputed by each action below; trailvec too writes what it reads again
    encoder = LabelEncoder([LabelEncodingRule(name) for name in ("item_id", "vertical", "event_type")])
    encoded = encoder.fit_transform(log).persist()
    splitter = TimeSplitter(time_threshold=cut, query_column="user_id", timestamp_column="event_ts")
    for name, part in zip(("train", "test"), splitter.split(encoded), strict=True):
        part.write.mode("overwrite").parquet(f"{out}/{name}")
    encoded.unpersist()
    log.unpersist()


def main() -> None:
    path, out, cut, cores, *conf = sys.argv[1:]
    builder = SparkSession.builder.master(f"local[{cores}]")
    for setting in conf:
        builder = builder.config(*setting.split("=", 1))
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    for _ in sys.stdin:
        started = time.monotonic()
        prepare(spark.read.parquet(path), datetime.fromisoformat(cut), out)
        print(time.monotonic() - started, flush=True)


if __name__ == "__main__":
    main()
