"""sessionize: events → sessions.

One shuffle by user, one sort by (user_id, event_ts, event_id), then Arrow (`spark_udfs/sessionize.py`).
"""

from __future__ import annotations

from functools import partial

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, StructType

from jobs.cli import stage_main
from jobs.config import SessionizeSettings
from jobs.runtime import Runtime, Stage
from jobs.tables import EVENTS, SESSIONS, conform
from spark_udfs.sessionize import sessionize as sessionize_arrow


def sessionize(events: DataFrame, settings: SessionizeSettings) -> DataFrame:
    """The sessions of `events`, whatever their order and partitioning."""
    made = StructType([f for f in SESSIONS.schema() if f.name != "session_id"])
    event_list = made["events"].dataType
    assert isinstance(event_list, ArrayType)
    event_fields = event_list.elementType.fieldNames()  # type: ignore[attr-defined]
    in_partition = partial(
        sessionize_arrow,
        gap_us=_microseconds(settings.gap_minutes),
        gap_us_by_vertical={v: _microseconds(minutes) for v, minutes in settings.gap_minutes_by_vertical.items()},
        event_fields=event_fields,
    )

    sessions = (
        events.select("user_id", *event_fields)
        .repartition("user_id")
        .sortWithinPartitions("user_id", "event_ts", "event_id")
        .mapInArrow(in_partition, made)
        .withColumn("session_id", _stable_id(F.col("user_id"), F.col("events")[0]["event_id"]))
    )
    return conform(sessions, SESSIONS)


def _stable_id(*parts: Column) -> Column:
    """128 bits of SHA-256; the separator can't stand in an id."""
    return F.substring(F.sha2(F.concat_ws("\x1f", *parts), 256), 1, 32)


def _microseconds(minutes: float) -> int:
    return round(minutes * 60_000_000)


def run(runtime: Runtime) -> None:
    runtime.write(SESSIONS, sessionize(runtime.read(EVENTS), runtime.config.sessionize))


STAGE = Stage(
    "sessionize",
    "cut each user's events into sessions at long pauses",
    run,
    reads=(EVENTS,),
    writes=(SESSIONS,),
    settings=("sessionize",),
)


def main() -> None:
    stage_main("sessionize")


if __name__ == "__main__":
    main()
