"""How cost grows with the log: python scripts/bench/scale.py [--quick] [--sizes 1e6 1e7 1e8]

For each size, in one Spark session on 2 cores: a superapp's log is written, then ingest, flag_users and sessionize run
over all of it, into new tables. Sizes ascend, after a warm-up run; the median of `rounds`. With --without-ingest the
generator's events become the events table as they are.

The last line is one JSON object: exponent (of sessionize's time against events, a log-log fit) and exponent_last
(between the two largest sizes, where fixed costs flatter it least), the same for the other stages (all of them only
with two sizes or more), and for each size the events, seconds, CPU seconds, peak memory (MB) and spill (MB). The chart
goes to build/bench/scale.svg.
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from measure import Watch, chart, exponent, last_line, log, options, runtime, session
from pyspark.sql import SparkSession
from superapp import World, write
from superapp import events as superapp_events

from jobs import flag_users, ingest, sessionize
from jobs.runtime import Stage
from jobs.tables import EVENTS


def generate_stage(world: World) -> Stage:
    """Replaces ingest: writes the events as ingest would, straight from the generator."""
    return Stage("generate", "", lambda r: r.write(EVENTS, superapp_events(r.spark, world)), (), (EVENTS,), ())


def measure(spark: SparkSession, events: int, rounds: int, folder: Path, without_ingest: bool) -> dict[str, Any]:
    """One size: medians of the stages' seconds, and the maximum memory and spill over all rounds."""
    data, world = folder / f"scale-{events}", World.of_events(events)
    result: dict[str, Any] = {}
    if not without_ingest:
        started = time.monotonic()
        rows, users = write(spark, world, data / "superapp")
        result = {"rows": rows, "users": users, "generate_s": round(time.monotonic() - started, 1)}
        log(f"{events:,} events: {rows:,} rows of {users:,} users in {result['generate_s']} s")
    to_run = (generate_stage(world) if without_ingest else ingest.STAGE, flag_users.STAGE, sessionize.STAGE)
    seconds: dict[str, list[float]] = {stage.name: [] for stage in to_run}
    for _ in range(rounds):
        root = data / "warehouse"
        shutil.rmtree(root, ignore_errors=True)
        stages = runtime(spark, root, data)
        for stage in to_run:
            with Watch(spark) as watch:
                report = stages.execute(stage)
            seconds[stage.name].append(report.seconds)
            most = {f"java_mb_{stage.name}": watch.peak_mb["java"], f"python_mb_{stage.name}": watch.peak_mb["python"]}
            most |= {f"spilled_mb_{stage.name}": watch.spilled_mb, f"shuffled_mb_{stage.name}": watch.shuffled_mb}
            most[f"cpu_s_{stage.name}"] = watch.cpu_s
            result |= {key: max(round(value), result.get(key, 0)) for key, value in most.items()}
            log(
                f"  {stage.name:12}{report.seconds:8.1f} s  "
                + "  ".join(f"{key} {value:.0f}" for key, value in most.items())
            )
        result["events"] = stages.count_rows().rows_in[EVENTS.name]
    shutil.rmtree(data)
    return result | {f"{name}_s": round(statistics.median(times), 2) for name, times in seconds.items()}


def growth(points: list[tuple[float, float]], suffix: str) -> dict[str, float]:
    """Exponents of points in ascending order; none if all have the same number of events."""
    parts = {f"exponent{suffix}": points, f"exponent_last{suffix}": points[-2:]}
    return {name: exponent(part) for name, part in parts.items() if len(dict(part)) > 1}


def main() -> None:
    parser = options(
        __doc__,
        quick="10,000 and 30,000 events, once and cold: a minute, mostly fixed costs; says nothing about growth",
        folder="the logs, the tables and the chart",
    )
    parser.add_argument("--sizes", type=float, nargs="+", help="numbers of events (default: 1e6 1e7 1e8)")
    parser.add_argument(
        "--rounds",
        type=int,
        help="runs of each size (default: 1 from ten million events on and with --quick, otherwise 5)",
    )
    parser.add_argument("--without-ingest", action="store_true", help="take the events straight from the generator")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes or ([1e4, 3e4] if arguments.quick else [1e6, 1e7, 1e8])]
    folder = arguments.folder.absolute()

    spark, direct = session(arguments.quick, tiny=arguments.quick), arguments.without_ingest
    if not arguments.quick:
        measure(spark, min(sizes), 1, folder, direct)  # JVM warm-up
    few = 1 if arguments.quick else 5
    results = [
        measure(spark, n, arguments.rounds or (1 if n >= 1e7 else few), folder, direct) for n in sorted(set(sizes))
    ]
    spark.stop()

    result: dict[str, Any] = {}
    lines = {}
    for name in ("sessionize", "flag_users", "generate" if direct else "ingest"):
        points = [(float(one["events"]), float(one[f"{name}_s"])) for one in results]
        suffix = "" if name == "sessionize" else f"_{name}"
        result |= growth(points, suffix)
        lines[name] = points
    chart(folder / "scale.svg", "Time against events", lines)
    last_line(result | {"sizes": results})


if __name__ == "__main__":
    main()
