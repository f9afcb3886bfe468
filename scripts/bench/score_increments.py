"""What users who changed cost beside all of them: python scripts/bench/score_increments.py [--quick] [--users 1e6]

`score_users` itself, from Delta to Delta in one Spark session on 2 cores: a model of the default size with random
weights scores the users of score.py (once; fewer before it warm the session), then a thousandth of them whose rows in
`sequences` a MERGE has changed, other ones in each round.

The last line is one JSON object: share_of_full (the median round's seconds over those of all users); of both, the users
encoded, the seconds, and the CPU seconds of Spark and its workers; the files that hold the vectors at the end. A chart
goes to build/bench/score_increments.svg.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Watch, bars, last_line, runtime, said, session
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from score import ITEMS, SPEC, write_users

from jobs import score_users
from jobs.files import write_json
from jobs.maintain_tables import active_files
from jobs.runtime import Runtime, Stage
from jobs.tables import SEQUENCES, USER_EMBEDDINGS
from training.checkpoint import save_model
from training.model import build_model

PARTS = 1_000  # one of them changes


def make_model(lake: Runtime) -> None:
    folder = lake.models / "bench"
    folder.mkdir(parents=True)
    attributes = torch.stack([torch.arange(ITEMS) % size for size in SPEC.attribute_sizes.values()])
    save_model(folder, build_model(SPEC, torch.ones(ITEMS, dtype=torch.int64), attributes), {"model_version": "bench"})
    write_json(lake.models / "current.json", {"model_version": "bench"})


def change(lake: Runtime, write: Callable[[Runtime], None]) -> None:
    lake.execute(Stage("change", "", write, reads=(), writes=(SEQUENCES,), settings=()), force=True)


def score(lake: Runtime) -> dict[str, float]:
    with Watch(lake.spark) as watch:
        report = lake.execute(score_users.STAGE)
    found = {"users": report.rows_out["users_encoded"], "s": round(report.seconds, 2), "cpu_s": round(watch.cpu_s, 1)}
    said("{users:,} users encoded: {s} s, {cpu_s} CPU s".format(**found))
    return found


def measure(spark: SparkSession, folder: Path, users: int, rounds: int) -> dict[str, Any]:
    root = folder / "score-increments"
    shutil.rmtree(root, ignore_errors=True)
    lake = runtime(spark, root / str(users), folder)
    make_model(lake)
    # Rows of split score, of the columns that a model reads.
    more = {"split": F.lit("score"), "part": F.lit(0), "last_ts": F.col("as_of")}
    nothing = {name: F.lit(None) for name in ("target_item_index", "target_ts", "seen_item_index")}
    rows = spark.read.parquet(write_users(folder, users)).withColumns(more | nothing)
    change(lake, lambda r: r.write(SEQUENCES, rows))
    full = score(lake)
    parts = []
    for number in range(rounds):
        # Another hash than the one by which the stage parts its users: they lie in all files.
        some = rows.where(F.pmod(F.hash("user_id"), F.lit(PARTS)) == number)
        later = some.withColumn("as_of", F.col("as_of") + F.expr("INTERVAL 1 DAY"))
        change(lake, lambda r, new=later: r.merge(SEQUENCES, new, few=True))  # type: ignore[misc]
        parts.append(score(lake))
    files = active_files(lake, USER_EMBEDDINGS, lake.latest_version(USER_EMBEDDINGS))
    shutil.rmtree(root)
    chart = {"all users": [full["s"]], "a thousandth": [part["s"] for part in parts]}
    bars(folder / "score_increments.svg", chart)
    increment = {name: statistics.median(part[name] for part in parts) for name in full}
    share = increment["s"] / full["s"]
    return {"share_of_full": share, "full": full, "increment": increment, "rounds": rounds, "files": len(files)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10,000 users, one round, all cold")
    parser.add_argument("--users", type=float, help="of all (default: 1e6)")
    parser.add_argument("--rounds", type=int, help="medians of so many (default: 5; quick: 1)")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="for users, tables and the chart")
    arguments = parser.parse_args()
    users = int(arguments.users or (1e4 if arguments.quick else 1e6))
    rounds = arguments.rounds or (1 if arguments.quick else 5)

    spark = session(arguments.quick)
    if not arguments.quick:
        measure(spark, arguments.folder.absolute(), 20_000, 2)  # compiles and warms
    result = measure(spark, arguments.folder.absolute(), users, rounds)
    spark.stop()
    last_line(result)


if __name__ == "__main__":
    main()
