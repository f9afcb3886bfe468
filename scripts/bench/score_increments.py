"""What scoring changed users costs compared with all: python scripts/bench/score_increments.py [--quick] [--users 1e6]

`score_users` itself, from Delta to Delta in one Spark session on 2 cores: a model of the default size with random
weights scores the users of score.py (once; fewer users warm up the session before), then a thousandth of them whose
rows in `sequences` a MERGE has changed, different users in each round.

The last line is one JSON object: share_of_full (the median round's seconds over those of all users); for both, the
users encoded, the seconds, and the CPU seconds of Spark and its workers; the number of files that hold the vectors at
the end. A chart goes to build/bench/score_increments.svg.
"""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

from measure import Watch, bars, last_line, log, options, put, runtime, session
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from score import write_model, write_users

from jobs import score_users
from jobs.files import write_json
from jobs.maintain_tables import active_files
from jobs.runtime import Runtime, Stage
from jobs.tables import SEQUENCES, USER_EMBEDDINGS

PARTS = 1_000  # one of them changes per round


def change(lake: Runtime, rows: DataFrame) -> None:
    """Merges the rows into sequences, as build_sequences does."""
    lake.execute(Stage("change", "", lambda r: r.merge(SEQUENCES, rows, few=True), (), (SEQUENCES,), ()), force=True)


def score(lake: Runtime) -> dict[str, float]:
    with Watch(lake.spark) as watch:
        report = lake.execute(score_users.STAGE)
    cost = {"users": report.rows_out["users_encoded"], "s": round(report.seconds, 2), "cpu_s": round(watch.cpu_s, 1)}
    log("{users:,} users encoded: {s} s, {cpu_s} CPU s".format(**cost))
    return cost


def measure(spark: SparkSession, folder: Path, users: int, rounds: int) -> dict[str, Any]:
    root = folder / "score-increments"
    shutil.rmtree(root, ignore_errors=True)
    lake = runtime(spark, root / str(users), folder)  # a path per size: Delta caches the logs of tables by path
    assert isinstance(lake.models, Path)  # a local folder
    write_model(lake.models / "bench")
    write_json(lake.models / "current.json", {"model_version": "bench"})
    # Rows of split `score`, with the columns that a model reads.
    more = {"split": F.lit("score"), "part": F.lit(0), "last_ts": F.col("as_of")}
    nothing = {name: F.lit(None) for name in ("target_item_index", "target_ts", "seen_item_index")}
    rows = spark.read.parquet(write_users(folder, users)).withColumns(more | nothing)
    put(lake, SEQUENCES, rows)
    full = score(lake)
    parts = []
    for number in range(rounds):
        # Not the hash by which the stage partitions its users, so that the changed ones are spread over all files.
        some = rows.where(F.pmod(F.hash("user_id"), F.lit(PARTS)) == number)
        change(lake, some.withColumn("as_of", F.col("as_of") + F.expr("INTERVAL 1 DAY")))
        parts.append(score(lake))
    files = active_files(lake, USER_EMBEDDINGS, lake.latest_version(USER_EMBEDDINGS))
    shutil.rmtree(root)
    bars(folder / "score_increments.svg", {"all users": [full["s"]], "a thousandth": [part["s"] for part in parts]})
    increment = {name: statistics.median(part[name] for part in parts) for name in full}
    share = increment["s"] / full["s"]
    return {"share_of_full": share, "full": full, "increment": increment, "rounds": rounds, "files": len(files)}


def main() -> None:
    parser = options(__doc__, quick="10,000 users, one round, no warm-up", folder="the users, the tables and the chart")
    parser.add_argument("--users", type=float, help="total number of users (default: 1e6)")
    parser.add_argument("--rounds", type=int, help="rounds, of which the medians are reported (default: 5; quick: 1)")
    arguments = parser.parse_args()
    users = int(arguments.users or (1e4 if arguments.quick else 1e6))
    rounds = arguments.rounds or (1 if arguments.quick else 5)

    spark = session(arguments.quick, tiny=arguments.quick)
    if not arguments.quick:
        measure(spark, arguments.folder.absolute(), 20_000, 2)  # JVM warm-up
    result = measure(spark, arguments.folder.absolute(), users, rounds)
    spark.stop()
    last_line(result)


if __name__ == "__main__":
    main()
