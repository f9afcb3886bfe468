"""What a small batch costs compared with the whole log: python scripts/bench/incremental.py [--quick] [--events 1e7]

A superapp's log, cut at the end of its last day; the last rows to arrive are held back as batches of 0.1 % each. In one
Spark session on 2 cores, ingest, flag_users, sessionize, build_vocabulary and build_sequences run once over the rest,
as a first run would (only once, since it takes minutes; a smaller log warms up the JVM before it); maintain_tables
clusters their output, as it does each week; then the stages run again after each batch.
The last line is one JSON object: share_of_full (seconds of all stages for the median batch over those for the whole
log), the seconds of each stage for both, and those of maintain_tables, which count in neither. The chart goes to
build/bench/incremental.svg.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from measure import chart, last_line, log, options, runtime, session
from pyspark.sql import SparkSession
from superapp import START, World, write

from jobs import build_sequences, build_vocabulary, flag_users, ingest, sessionize
from jobs.maintain_tables import maintain
from jobs.runtime import Runtime, Stage

STAGES = (ingest.STAGE, flag_users.STAGE, sessionize.STAGE, build_vocabulary.STAGE, build_sequences.STAGE)
FIRST = STAGES[:3]  # with --quick, which must finish in a minute
SHARE = 0.001


def keep_back(log_folder: Path, aside: Path, batches: int) -> tuple[int, list[int]]:
    """Moves the last rows to arrive out of the log; returns how many rows stay, and the size of each batch."""
    folders = sorted(log_folder.glob("arrived=*"))
    counts = {folder: sum(pq.read_metadata(file).num_rows for file in folder.glob("*.parquet")) for folder in folders}
    size = max(1, round(sum(counts.values()) * SHARE))
    tail: list[Path] = []
    while sum(counts[folder] for folder in tail) < size * batches:
        tail.append(folders.pop())
    rows = pa.concat_tables([pq.read_table(file) for folder in tail for file in sorted(folder.glob("*.parquet"))])
    rows = rows.take(pc.sort_indices(rows, [("arrived_at", "ascending"), ("event_id", "ascending")]))
    first = len(rows) - size * batches
    for folder in tail:
        shutil.rmtree(folder)
    _save(rows.slice(0, first), log_folder, "rest.parquet")
    for number in range(batches):
        _save(rows.slice(first + number * size, size), aside / str(number), "batch.parquet")
    return sum(counts.values()) - size * batches, [size] * batches


def _save(rows: pa.Table, folder: Path, name: str) -> None:
    """Writes the rows into one folder per day of arrival."""
    days = pc.cast(rows["arrived_at"], pa.date32())
    for day in pc.unique(days):
        target = folder / f"arrived={day}"
        target.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows.filter(pc.equal(days, day)), target / name)


def run_all(lake: Runtime, stages: Sequence[Stage], what: str) -> dict[str, float]:
    reports = {stage.name: lake.execute(stage) for stage in stages}
    seconds = {name: report.seconds for name, report in reports.items()}
    log(f"{what}: {sum(seconds.values()):.1f} s; " + ", ".join(f"{name} {s:.1f}" for name, s in seconds.items()))
    return seconds


def measure(
    spark: SparkSession, events: int, batches: int, folder: Path, *, quick: bool, ids_by_time: bool
) -> dict[str, Any]:
    stages = FIRST if quick else STAGES
    world = World.of_events(events, ids_by_time=ids_by_time)
    data = folder / f"incremental-{events}"
    shutil.rmtree(data, ignore_errors=True)
    log_folder = data / "superapp"
    write(spark, world, log_folder)
    end = START + timedelta(days=world.days)
    for late in [f for f in log_folder.glob("arrived=*") if f.name >= f"arrived={end:%Y-%m-%d}"]:
        shutil.rmtree(late)  # only a week of late events: untypical last batches
    rows, sizes = keep_back(log_folder, data / "aside", batches)
    # Fixed, as between two trainings: if they followed the log's end, all windows would move.
    valid, test = (f"{end - timedelta(days=days):%Y-%m-%dT%H:%M:%SZ}" for days in (14, 7))
    lake = runtime(spark, data / "warehouse", data, f"sequences.valid_from={valid}", f"sequences.test_from={test}")
    full = run_all(lake, stages, f"{rows:,} rows")
    upkeep = None
    if not quick:
        started = time.monotonic()
        maintain(lake)
        upkeep = round(time.monotonic() - started, 2)
        log(f"maintain_tables: {upkeep} s")
    parts = []
    for number, size in enumerate(sizes):
        for file in (data / "aside" / str(number)).rglob("*.parquet"):
            target = log_folder / file.parent.name / f"batch-{number}.parquet"
            target.parent.mkdir(exist_ok=True)
            file.rename(target)
        parts.append(run_all(lake, stages, f"batch {number + 1}, {size:,} rows"))
    shutil.rmtree(data)

    batch = {name: statistics.median(part[name] for part in parts) for name in full}
    chart(
        folder / "incremental.svg",
        "A batch of 0.1 % beside the whole log",
        {name: [(sizes[0], batch[name]), (rows, full[name])] for name in full},
    )
    return {
        "ids_by_time": ids_by_time,
        "rows": rows,
        "batch_rows": sizes[0],
        "batches": len(sizes),
        "share_of_full": statistics.median(sum(part.values()) for part in parts) / sum(full.values()),
        "full_s": {name: round(seconds, 2) for name, seconds in full.items()},
        "batch_s": {name: round(seconds, 2) for name, seconds in batch.items()},
        "maintain_s": upkeep,
    }


def main() -> None:
    parser = options(
        __doc__,
        quick="10,000 events, one batch, ingest to sessionize, no maintain_tables, no warm-up",
        folder="the log, the tables and the chart",
    )
    parser.add_argument("--events", type=float, help="approximate number of events (default: 1e7)")
    parser.add_argument("--batches", type=int, help="batches, of which the median is reported (default: 5; quick: 1)")
    parser.add_argument(
        "--ids-by-time", action="store_true", help="event_ids that grow with time (default: in no order)"
    )
    arguments = parser.parse_args()
    events = int(arguments.events or (1e4 if arguments.quick else 1e7))
    batches, folder = arguments.batches or (1 if arguments.quick else 5), arguments.folder.absolute()

    spark = session(arguments.quick, tiny=arguments.quick)
    if not arguments.quick:
        measure(spark, 100_000, 2, folder, quick=False, ids_by_time=arguments.ids_by_time)  # JVM warm-up
    result = measure(spark, events, batches, folder, quick=arguments.quick, ids_by_time=arguments.ids_by_time)
    spark.stop()
    last_line(result)


if __name__ == "__main__":
    main()
