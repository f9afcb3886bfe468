"""What exporting many segments costs: python scripts/bench/segments.py [--quick] [--users 1000000] [--segments 100]

Users with vectors of width 64 in a few hundred clusters, in a Delta table; segments in files: four fifths are
lookalikes of 200 seeds, one fifth affinities to 10 items; each takes one user in a hundred, requires a consent that
four in five gave, leaves out a suppression list of one in a hundred, holds back a control group, and writes hashed ids.
In turns, medians; the first round is not counted:

  segments  `trailvec export_segments`, all of it: lists, seeds, scores, rules, files, reports, log
  read      one pass: Spark reads everybody's user_id and vector and hands them to Python, which drops them
  write     the same output files, with hashed ids and checksums, written by the same code from memory, and one commit
            of the log's rows
  one       one segment alone

The last line is one JSON object. ratio_to_read_write: segments / (read + write); ratio_to_one_by_one: segments / (their
number · one). seconds: the medians. peak_mb: of the JVM and of the Python workers while segments runs (the driver
itself is this process). A chart goes to build/bench/segments.svg.

What grows with the users: the pass (read, products; --users shows it) and one join of ids with the lists. What grows
with the members alone: the sort, the files, the log. 10 million users are 2.6 GB of vectors: --users 10000000 needs
7 GB of disk.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable
from measure import CONF, Watch, bars, in_turns, last_line, log, options, put, session
from pyspark.sql import SparkSession

from jobs.config import load_config
from jobs.export_segments import STAGE
from jobs.runtime import Runtime
from jobs.segment_files import KEY, write_parts
from jobs.segments import read_segments
from jobs.tables import CURRENT_MODEL, EXPORTS, ITEM_EMBEDDINGS, ITEMS, USER_EMBEDDINGS
from spark_udfs.arrow import as_lists
from spark_udfs.likeness import DEFAULT_METHOD, Method

WIDTH, CLUSTERS, SEEDS, ITEMS_OF_ONE = 64, 300, 200, 10
AS_OF = datetime(2024, 1, 1, tzinfo=timezone.utc)
ROWS = 250_000  # per file


def make_vectors(random: np.random.Generator, count: int) -> pa.ListArray:
    centres = np.random.default_rng(1).normal(size=(CLUSTERS, WIDTH))
    vectors = centres[random.integers(CLUSTERS, size=count)] + random.normal(size=(count, WIDTH))
    return as_lists(vectors.astype(np.float32))


def user_ids(first: int, count: int) -> pa.Array:
    return pc.binary_join_element_wise("user-", pa.array(np.arange(first, first + count)).cast(pa.string()), "")


def prepare(runtime: Runtime, data: Path, users: int) -> None:
    """Writes the tables, the consent list and the suppression list."""
    shutil.rmtree(data, ignore_errors=True)
    (data / "users").mkdir(parents=True)
    for number, first in enumerate(range(0, users, ROWS)):
        count = min(ROWS, users - first)
        columns = {
            "user_id": user_ids(first, count),
            "model_version": pa.array(["m"] * count),
            "as_of": pa.array([AS_OF] * count, pa.timestamp("us", "UTC")),
            "history_length": pa.array(np.ones(count, np.int32)),
            "is_cold": pa.array(np.zeros(count, np.bool_)),
            "vector": make_vectors(np.random.default_rng(100 + number), count),
        }
        pq.write_table(pa.table(columns), data / "users" / f"{number:04d}.parquet")
    everyone = np.arange(users)
    consent = {"user_id": user_ids(0, users), "email": pa.array(everyone % 5 > 0)}
    pq.write_table(pa.table(consent), data / "consent.parquet")
    pq.write_table(
        pa.table({"user_id": user_ids(0, users).take(pa.array(everyone[::100]))}), data / "suppressed.parquet"
    )
    now, items = datetime(2024, 1, 1), ITEMS_OF_ONE * 50
    spark = runtime.spark
    vectors = make_vectors(np.random.default_rng(2), items).to_pylist()
    rows = [(f"item-{n}", n, "m", now, False, vector) for n, vector in enumerate(vectors)]
    kinds = [(n, f"item-{n}", None, None, "v", 1.0, now, 1, 1, 1, (None,) * 4) for n in range(items)]
    put(runtime, USER_EMBEDDINGS, spark.read.parquet(str(data / "users")))
    put(runtime, CURRENT_MODEL, spark.createDataFrame([("m",)], CURRENT_MODEL.schema()))
    put(runtime, ITEM_EMBEDDINGS, spark.createDataFrame(rows, ITEM_EMBEDDINGS.schema()))
    put(runtime, ITEMS, spark.createDataFrame(kinds, ITEMS.schema()))


def write_segments(data: Path, users: int, count: int, method: Method, group: str) -> list[str]:
    """Writes the segments' files and their seed lists (users of two clusters each). Another control group makes
    them different exports, with their own rows in the log."""
    first = pq.read_table(data / "users" / "0000.parquet", columns=["vector"])["vector"].combine_chunks()
    vectors = first.flatten().to_numpy().reshape(-1, WIDTH)
    centres = np.random.default_rng(1).normal(size=(CLUSTERS, WIDTH)).astype(np.float32)
    cluster = np.argmax(vectors @ centres.T - 0.5 * (centres**2).sum(axis=1), axis=1)
    paths = []
    for number in range(count):
        random = np.random.default_rng(number)
        audience = (
            f"affinity = {{ items = {json.dumps([f'item-{n}' for n in random.integers(0, 500, ITEMS_OF_ONE)])} }}"
        )
        if number % 5:
            alike = np.flatnonzero(np.isin(cluster, random.choice(CLUSTERS, 2, replace=False)))
            seeds = random.choice(alike, min(SEEDS, len(alike)), replace=False)
            (data / f"seeds-{number}.txt").write_text("\n".join(f"user-{n}" for n in seeds))
            audience = f'seeds = {{ file = "seeds-{number}.txt", method = "{method}" }}'
        text = f"""name = "segment-{number:03d}"
owner = "bench"
purpose = "to be timed"
size = {max(users // 100, 1)}
consent = "email"
suppress = [{{ file = "suppressed.parquet" }}]
control_share = 0.05
control_group = "{group}"
{audience}
"""
        paths.append(str(data / f"segment-{number:03d}.toml"))
        Path(paths[-1]).write_text(text)
    return paths


def members_of(runtime: Runtime) -> dict[str, pa.Array]:
    """The exported users by segment, in log order."""
    rows = DeltaTable(runtime.path(EXPORTS)).to_pyarrow_table(columns=["segment", "user_id", "is_control"])
    rows = rows.filter(pc.invert(rows["is_control"]))
    names = rows["segment"].unique().to_pylist()
    return {name: rows.filter(pc.equal(rows["segment"], name))["user_id"].combine_chunks() for name in names}


def dropped(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    rows = 0
    for batch in batches:
        rows += len(batch.column(1).flatten().to_numpy().reshape(batch.num_rows, -1))
    yield pa.RecordBatch.from_arrays([pa.array([rows])], ["rows"])


def main() -> None:
    parser = options(
        __doc__,
        quick="50,000 users, 20 segments, 1 counted round: mostly fixed costs",
        folder="the tables, the files and the chart",
    )
    parser.add_argument("--users", type=float, help="number of users (default: 1,000,000)")
    parser.add_argument("--segments", type=int, help="number of segments (default: 100)")
    parser.add_argument("--method", choices=get_args(Method), default=DEFAULT_METHOD, help="method of the lookalikes")
    parser.add_argument("--rounds", type=int, help="rounds, of which the medians are reported (default: 5)")
    arguments = parser.parse_args()
    users = int(arguments.users or (50_000 if arguments.quick else 1_000_000))
    count = arguments.segments or (20 if arguments.quick else 100)
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    folder = arguments.folder.absolute()
    root, data = folder / "segments-warehouse", folder / "segments-data"
    shutil.rmtree(root, ignore_errors=True)
    os.environ[KEY] = "the benchmark's, of no use elsewhere"

    spark = session(arguments.quick)
    prepare(runtime_over(spark, root, data, []), data, users)
    paths = write_segments(data, users, count, arguments.method, "round 0")
    every, alone = runtime_over(spark, root, data, paths), runtime_over(spark, root, data, paths[1:2])
    log(f"{users:,} users, {count} segments of {max(users // 100, 1):,}, {arguments.method}")
    peak: dict[str, float] = {}

    def segments() -> None:
        with Watch(spark) as watch:
            every.execute(STAGE, force=True)
        peak.update({kind: max(peak.get(kind, 0), used) for kind, used in watch.peak_mb.items()})

    segments()
    # A checkpoint, not persist(): Spark refreshes a table's cached data, and each round appends to the log.
    logged, members = every.latest(EXPORTS).localCheckpoint(), members_of(every)

    def write() -> None:
        out = folder / "segments-out"
        shutil.rmtree(out, ignore_errors=True)
        for segment, _ in read_segments(paths):
            (out / segment.name).mkdir(parents=True)
            ids = members.get(segment.name, pa.array([], pa.string()))
            write_parts(out / segment.name, segment, ids, np.linspace(1, 0, len(ids), dtype=np.float32))
        logged.write.format("delta").mode("overwrite").save(str(out / "log"))

    vectors = every.latest(USER_EMBEDDINGS).where("model_version = 'm'").select("user_id", "vector")
    acts: dict[str, Callable[[], Any]] = {
        "segments": segments,
        "read": lambda: vectors.mapInArrow(dropped, "rows long").collect(),
        "write": write,
        "one": lambda: alone.execute(STAGE, force=True),
    }
    # Different exports in each round; round 0 was the run above.
    seconds, _ = in_turns(
        acts,
        rounds,
        before=lambda number: write_segments(data, users, count, arguments.method, f"round {number + 1}"),
    )
    spark.stop()
    bars(folder / "segments.svg", seconds)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    last_line(
        {
            "ratio_to_read_write": middle["segments"] / (middle["read"] + middle["write"]),
            "ratio_to_one_by_one": middle["segments"] / (count * middle["one"]),
            "seconds": {name: round(value, 2) for name, value in middle.items()},
            "users": users,
            "segments": count,
            "method": arguments.method,
            "members": sum(map(len, members.values())),
            "peak_mb": {kind: round(used) for kind, used in peak.items()},
        }
    )


def runtime_over(spark: SparkSession, root: Path, data: Path, paths: list[str]) -> Runtime:
    sets = [f'storage.root="{root}"', f"export.segments={json.dumps(paths)}"]
    config = load_config(None, [*sets, f'export.consent={{ file = "{data / "consent.parquet"}" }}'])
    return Runtime(config.model_copy(update={"spark": config.spark.model_copy(update={"conf": CONF})}), spark)


if __name__ == "__main__":
    main()
