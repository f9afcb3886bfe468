"""Compares trailvec with RePlay on what both do in Spark: python scripts/bench/against_replay.py [--quick]

On a superapp's log, from Parquet to Parquet, on 2 cores: gap sessions, integer encoding of items, verticals and event
types, and a split by time. RePlay (`replay-rec`) runs in its own environment, which the first run creates in the folder
(minutes; its pinned packages conflict with trailvec's). The two take turns, each in a Spark session that stays up; the
first round of both is not counted. trailvec's rows hold more: hours, weekdays, price buckets.

The last line is one JSON object: speedup_vs_replay (trailvec's rows/s over RePlay's), the medians, the rows/s of both,
and the number of sessions that each found. These are reported, not compared: RePlay orders equal times arbitrarily and
ends a session at a pause of exactly 30 minutes. A chart goes to build/bench/replay.svg.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from measure import CONF, CORES, bars, environment, last_line, log, options, session
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from superapp import START, World, events

from jobs.build_sequences import number_actions
from jobs.build_vocabulary import describe_items, number_context_values, number_items
from jobs.config import SequencesSettings, SessionizeSettings
from jobs.sessionize import sessionize
from jobs.splits import Cuts, before_cut
from jobs.tables import CONTEXT_VALUES, ITEMS
from training.batches import FIRST_INDEX

PEER = ("replay-rec[spark]==0.18.0", "pyspark==3.5.9")


def prepare(rows: DataFrame, cuts: Cuts, out: Path) -> None:
    """Runs the stages' own functions; the encodings are written first, as the stages do."""
    settings, spark = SequencesSettings(), rows.sparkSession
    tables = {
        "values": number_context_values(rows, spark.createDataFrame([], CONTEXT_VALUES.schema())),
        "items": number_items(
            describe_items(rows, cuts, settings), spark.createDataFrame([], ITEMS.schema()), 1, FIRST_INDEX
        ),
    }
    for name, table in tables.items():
        table.write.mode("overwrite").parquet(str(out / name))
    sessions = sessionize(rows, SessionizeSettings(gap_minutes=30))
    actions = number_actions(sessions, *(spark.read.parquet(str(out / name)) for name in ("items", "values")))
    split = F.when(before_cut("train", cuts, settings), "train").otherwise("test")
    actions.withColumn("split", split).write.mode("overwrite").partitionBy("split").parquet(str(out / "actions"))


def sessions_of(spark: SparkSession, out: Path) -> dict[str, int]:
    ours = spark.read.parquet(str(out / "ours/actions")).where("session_end = 2").count()
    theirs = spark.read.parquet(str(out / "theirs/train"), str(out / "theirs/test"))
    return {"trailvec": ours, "replay": theirs.select("session_id").distinct().count()}


def main() -> None:
    parser = options(__doc__, quick="100,000 events, 1 counted round", folder="the log and the output")
    parser.add_argument("--events", type=float, help="approximate number of events (default: 5e6)")
    parser.add_argument("--rounds", type=int, help="rounds, of which the medians are reported (default: 5)")
    arguments = parser.parse_args()
    count = int(arguments.events or (1e5 if arguments.quick else 5e6))
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)

    python = environment(folder, "replay", *PEER)
    spark = session(quick=False)
    world, path, out = World.of_events(count), folder / f"replay-{count}", folder / "replay-out"
    shutil.rmtree(out, ignore_errors=True)
    events(spark, world).write.mode("overwrite").parquet(str(path))
    rows = spark.read.parquet(str(path))
    count = rows.count()
    end = (START + timedelta(days=world.days)).replace(tzinfo=None)
    cuts = Cuts(end - timedelta(days=14), end - timedelta(days=7), end)

    command = [python, Path(__file__).with_name("replay_peer.py"), path, out / "theirs", f"{cuts.valid_from}", CORES]
    conf = [f"{key}={value}" for key, value in CONF.items() if "delta" not in key]
    command += [*conf, "spark.sql.session.timeZone=UTC", "spark.ui.showConsoleProgress=false"]
    times: dict[str, list[float]] = {"trailvec": [], "replay": []}
    # Unbuffered, so that a dead peer raises at the write, not when the block closes its pipe.
    with subprocess.Popen([*map(str, command)], bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as peer:
        assert peer.stdin is not None
        assert peer.stdout is not None
        for number in range((arguments.rounds or (1 if arguments.quick else 5)) + 1):
            started = time.monotonic()
            prepare(rows, cuts, out / "ours")
            ours = time.monotonic() - started
            with contextlib.suppress(BrokenPipeError):
                peer.stdin.write(b"\n")
            answer = peer.stdout.readline()
            if not answer:
                raise SystemExit("RePlay's process has ended: what it said stands above")
            log(f"round {number}: trailvec {ours:.2f} s, RePlay {float(answer):.2f} s")
            if number:
                times["trailvec"].append(ours)
                times["replay"].append(float(answer))
        peer.stdin.close()
    bars(folder / "replay.svg", times)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    result: dict[str, Any] = {"speedup_vs_replay": median["replay"] / median["trailvec"], "events": count}
    result |= {f"{name}_s": seconds for name, seconds in median.items()}
    result |= {f"{name}_rows_per_s": round(count / seconds) for name, seconds in median.items()}
    result["sessions"] = sessions_of(spark, out)
    spark.stop()
    last_line(result)


if __name__ == "__main__":
    main()
