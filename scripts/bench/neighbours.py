"""Compares find_neighbours' exact search with faiss's: python scripts/bench/neighbours.py [--quick]

The 10 items with the highest dot product for each user, over synthetic vectors of width 64 in which both sides have
popular directions and varying lengths, Parquet to Parquet on 2 cores, in turns, medians:

  trailvec    spark_udfs.topk.nearest, what find_neighbours runs, in one Spark session that stays up
  faiss       faiss.knn on 2 threads, plus pyarrow reading the files and writing the result
  in_numpy    topk.Nearest alone, one thread, a subset of the users: what a core does without Spark
  cells       trailvec with an inverted file of 4 √items cells, 16 of them probed (neighbours.cells)

Both exact searches find the same: neighbours may differ only where faiss's float32 scores cannot tell them apart.
The last line is one JSON object: ratio_to_faiss (users/s over faiss's), the same per core without Spark, the medians,
same_neighbours (the share that agree), recall_of_cells (the share of faiss's that cells found). A chart goes to
build/bench/neighbours.svg.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from measure import CORES, bars, in_turns, last_line, options, session
from pyspark.sql import SparkSession

from jobs.config import NeighboursSettings
from jobs.find_neighbours import Search, find_neighbours
from jobs.spark_session import spark_conf
from spark_udfs.arrow import as_lists
from spark_udfs.topk import BLOCK_CONF, Nearest

K, WIDTH = 10, 64
SETTINGS = NeighboursSettings()


def make(folder: Path, name: str, count: int, seed: int) -> None:
    """Vectors around 100 directions, with lengths that vary as between popular and rare items."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(100, WIDTH))
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).mkdir(parents=True)
    for number, start in enumerate(range(0, count, 50_000)):
        rows = min(50_000, count - start)
        vectors = centres[random.integers(0, 100, rows)] + random.normal(size=(rows, WIDTH))
        vectors *= random.lognormal(0, 0.3, size=(rows, 1))
        ids = pa.array([f"{name}{n:08d}" for n in range(start, start + rows)])
        table = pa.table({"id": ids, "vector": as_lists(vectors.astype(np.float32))})
        pq.write_table(table, folder / name / f"part-{number:05d}.parquet")


def read(path: Path) -> tuple[Any, Any]:
    table = ds.dataset(path, format="parquet").to_table().combine_chunks()
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    return table["id"].to_numpy(), np.ascontiguousarray(vectors)


def by_faiss(folder: Path, out: Path) -> None:
    (user_ids, users), (item_ids, items) = read(folder / "users"), read(folder / "items")
    scores, places = faiss.knn(users, items, K, metric=faiss.METRIC_INNER_PRODUCT)
    columns = {
        "source_id": np.repeat(user_ids, K),
        "rank": np.tile(np.arange(1, K + 1, dtype=np.int32), len(users)),
        "neighbour_id": item_ids[places.reshape(-1)],
        "score": scores.reshape(-1),
    }
    out.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), out / "part-0.parquet")


def by_trailvec(spark: SparkSession, folder: Path, out: Path, counts: tuple[int, int], cells: int = 0) -> None:
    users, items = (spark.read.parquet(str(folder / name)) for name in ("users", "items"))
    settings = SETTINGS.model_copy(update={"cells": cells, "k": K})
    with spark_conf(spark, BLOCK_CONF):
        ranked = find_neighbours([Search("user_item", users, items, "dot", counts)], settings).drop("kind")
        ranked.write.mode("overwrite").parquet(str(out))


def in_numpy(folder: Path, count: int) -> Callable[[], None]:
    users, (ids, items) = read(folder / "users")[1][:count], read(folder / "items")

    def run() -> None:
        for start in range(0, count, SETTINGS.block_rows):
            nearest = Nearest(users[start : start + SETTINGS.block_rows], K, "dot")
            for first in range(0, len(items), SETTINGS.block_rows):
                some = slice(first, first + SETTINGS.block_rows)
                nearest.add(ids[some].astype(np.str_), items[some])
            nearest.best()

    return run


def same(ours: Path, theirs: Path) -> float:
    """The share of faiss's (user, neighbour) pairs that trailvec has too."""
    pairs = [
        set(zip(*(ds.dataset(path).to_table()[c].to_pylist() for c in ("source_id", "neighbour_id")), strict=True))
        for path in (ours, theirs)
    ]
    return len(pairs[0] & pairs[1]) / len(pairs[1])


def main() -> None:
    parser = options(
        __doc__,
        quick="20,000 users and items, 2 rounds, the first of them cold",
        folder="the vectors, the results and the chart",
    )
    parser.add_argument("--users", type=float, help="number of users (default: 5e4)")
    parser.add_argument("--items", type=float, help="number of items (default: 1e5)")
    parser.add_argument("--rounds", type=int, help="rounds, of which the medians are reported (default: 5)")
    arguments = parser.parse_args()
    default = (20_000, 20_000) if arguments.quick else (50_000, 100_000)
    counts = int(arguments.users or default[0]), int(arguments.items or default[1])
    rounds = arguments.rounds or (2 if arguments.quick else 5)
    folder = arguments.folder.absolute() / "neighbours"
    make(folder, "users", counts[0], 1)
    make(folder, "items", counts[1], 2)
    faiss.omp_set_num_threads(CORES)

    spark = session(arguments.quick)
    part = min(counts[0], SETTINGS.block_rows)
    contestants: dict[str, Callable[[], object]] = {
        "trailvec": lambda: by_trailvec(spark, folder, folder / "ours", counts),
        "faiss": lambda: by_faiss(folder, folder / "theirs"),
        "in_numpy": in_numpy(folder, part),
        "cells": lambda: by_trailvec(spark, folder, folder / "by_cells", counts, round(4 * counts[1] ** 0.5)),
    }
    times, _ = in_turns(contestants, rounds, warm=0 if arguments.quick else 1)
    spark.stop()
    bars(folder.parent / "neighbours.svg", times)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    last_line(
        {
            "users": counts[0],
            "items": counts[1],
            "rounds": rounds,
            "ratio_to_faiss": median["faiss"] / median["trailvec"],
            "ratio_to_faiss_of_a_core": median["faiss"] * CORES / (median["in_numpy"] * counts[0] / part),
            "same_neighbours": same(folder / "ours", folder / "theirs"),
            "recall_of_cells": same(folder / "by_cells", folder / "theirs"),
            "users_per_s": round(counts[0] / median["trailvec"]),
            **{f"{name}_s": seconds for name, seconds in median.items()},
        }
    )


if __name__ == "__main__":
    main()
