"""How fast users are scored: python scripts/bench/score.py [--quick] [--users 100000] [--sizes 1e4,1e5,1e6]

Users with skewed histories (2 to 64 actions, mean 17) in Parquet, a model of the default size with random weights,
2 cores; in turns, medians. All but the loops go from Parquet to Parquet in Spark:

  trailvec    spark_udfs.encode.encode_users, what score_users runs
  forward     one process, one thread: `SequenceModel.encode` over the padded batches that trailvec makes, in memory
  last_state  the same loop with training.scoring.fast_encoder, which computes no unused states
  unbucketed  the forward loop over batches of users as they come
  row_udf     a Python UDF that encodes one user at a time, with fast_encoder (a sample)
  ptls        the pattern of pytorch-lifestream's own Spark inference (ptls/pl_inference_spark.py, not installed here):
              all users sorted by length, gathered into batches by collect_list and written; a row UDF that pads
              a batch with pad_sequence, runs the broadcast model (fast_encoder here too) and returns Python lists;
              exploded into one column per coordinate. 8 partitions; its 100 would be mostly empty.

Workers are warm: the first round is not counted. trailvec's vectors are checked against both loops' (500 users).

The last line is one JSON object. ratio_to_forward_loop, speedup_vs_unbucketed, speedup_vs_row_udf and speedup_vs_ptls
are ratios of users per CPU second (of all processes including the JVM: least affected by other work on the machine);
ratio_to_last_state_loop is the hardest comparison; *_wall are the same by wall clock, per core. us_per_user: CPU
microseconds. parts_us_per_user: where trailvec's go (forward, making batches, and Spark: reading, Arrow, writing).
padding_share. users_per_s: trailvec's by size, by wall clock; growth: the exponent of its CPU seconds in users. A chart
goes to build/bench/score.svg.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
from feed import make_rows
from measure import CORES, bars, exponent, in_turns, last_line, log, options, session, timed
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.config import ScoreSettings, load_config
from jobs.models import encode_sequences
from jobs.runtime import Runtime
from jobs.score_users import SPLIT
from jobs.spark_session import spark_conf
from spark_udfs.encode import LoadedModel, by_length, encode_rows
from training.batches import BUCKET_SIZES, FEATURES
from training.checkpoint import WEIGHTS, describe_weights, load_model, save_weights
from training.config import ModelSpec
from training.model import build_model
from training.scoring import fast_encoder

ITEMS, BATCH = 50_002, ScoreSettings().batch_size
ARROW = int(SPLIT["spark.sql.execution.arrow.maxRecordsPerBatch"])  # rows per Arrow batch from Spark to Python
SPEC = ModelSpec(
    architecture="gpt2",
    width=64,
    layers=1,
    heads=2,
    dropout=0.0,
    negatives=0,
    max_length=65,
    items=ITEMS,
    context_sizes={"event_type_index": 6, "vertical_index": 7, **BUCKET_SIZES},
    attribute_sizes={"category": 200, "vertical": 7, "price": BUCKET_SIZES["price_bucket"]},
)
Batches = list[dict[str, torch.Tensor]]


def write_users(folder: Path, users: int) -> str:
    """Rows like those that score_users reads, in files of 262,144."""
    target = folder / f"score-{users}"
    target.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for start in range(0, users, 262_144):
        count = min(262_144, users - start)
        rows = make_rows(random, count, start)
        as_of = pa.array([datetime(2024, 1, 1)] * count, pa.timestamp("us", "UTC"))
        path = target / f"part-{start:010}.parquet"
        if not path.exists():
            pq.write_table(rows.append_column("as_of", as_of), path, row_group_size=16_384, compression="snappy")
    return str(target)


def write_model(folder: Path) -> None:
    """A model of SPEC with random weights."""
    folder.mkdir(parents=True)
    attributes = torch.stack([torch.arange(ITEMS) % size for size in SPEC.attribute_sizes.values()])
    save_weights(folder, build_model(SPEC, torch.ones(ITEMS, dtype=torch.int64), attributes).tensors())
    describe_weights(folder, SPEC, {"model_version": "bench"})


def columns_of(rows: pa.Table) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.int32]]]:
    values = [rows.column(name).combine_chunks().flatten().to_numpy() for name in FEATURES]
    return rows.column("length").to_numpy().astype(np.int64), values


def padded(rows: pa.Table, bucketed: bool) -> Batches:
    """The batches that trailvec's workers form from the rows, or (not bucketed) batches of users as they come."""
    batches: Batches = []
    step = ARROW if bucketed else BATCH
    for start in range(0, len(rows), step):
        for _, batch in by_length(*columns_of(rows.slice(start, step)), SPEC.history_length, BATCH):
            batches.append({name: torch.from_numpy(matrix).long() for name, matrix in batch.items()})
    return batches


def loop(encode: Callable[[dict[str, torch.Tensor]], torch.Tensor], batches: Batches) -> None:
    with torch.inference_mode():
        for batch in batches:
            encode(batch)


def encoded(model: LoadedModel, rows: pa.Table) -> float:
    """Encodes all batches; returns their padding share."""
    places = sum(encode_rows(model, *columns_of(rows.slice(n, ARROW)), BATCH)[2] for n in range(0, len(rows), ARROW))
    return 1 - float(np.minimum(rows.column("length").to_numpy(), SPEC.history_length).sum()) / places


# ---- in Spark -----------------------------------------------------------------------------------------


def save(rows: DataFrame, out: Path) -> None:
    rows.write.mode("overwrite").parquet(str(out))


def row_udf(rows: DataFrame, model: Any) -> DataFrame:
    def encode(*features: list[int]) -> list[float]:
        torch.set_num_threads(1)
        batch = {name: torch.tensor([row]) for name, row in zip(FEATURES, features, strict=True)}
        with torch.inference_mode():
            vector: list[float] = fast_encoder(model.value)(batch)[0].tolist()
        return vector

    return rows.select("user_id", F.udf(encode, "array<float>")(*FEATURES).alias("vector"))


def ptls(rows: DataFrame, model: Any, out: Path) -> None:
    lists = [F.collect_list(name).alias(name) for name in ("user_id", *FEATURES)]
    numbered = rows.orderBy("length").withColumn("number", F.monotonically_increasing_id())
    save(numbered.groupBy(F.floor(F.col("number") / BATCH).alias("batch")).agg(*lists), out / "batches")

    def encode(*features: list[list[int]]) -> list[list[float]]:
        torch.set_num_threads(1)
        batch = {
            name: torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in feature], batch_first=True)
            for name, feature in zip(FEATURES, features, strict=True)
        }
        with torch.no_grad():
            vectors: list[list[float]] = fast_encoder(model.value)(batch).tolist()
        return vectors

    batches = rows.sparkSession.read.parquet(str(out / "batches")).repartition(4 * CORES)
    encoded = batches.select("user_id", F.udf(encode, "array<array<float>>")(*FEATURES).alias("vector"))
    save(encoded, out / "encoded")
    pairs = rows.sparkSession.read.parquet(str(out / "encoded")).select(
        F.explode(F.arrays_zip("user_id", "vector")).alias("p")
    )
    save(pairs.select("p.user_id", *[F.col("p.vector")[n].alias(f"v{n}") for n in range(SPEC.width)]), out / "vectors")


# ---- measuring ----------------------------------------------------------------------------------------


def trailvec(spark: SparkSession, path: str, model_dir: Path, out: Path) -> None:
    rows, runtime = spark.read.parquet(path), Runtime(load_config(), spark)
    with spark_conf(spark, SPLIT):
        save(encode_sequences(runtime, rows, ["user_id", "as_of"], model_dir=model_dir), out)


def contestants(
    spark: SparkSession, folder: Path, path: str, users: int, sample: int
) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Name, number of users and function to time of each contestant."""
    model_dir, out = folder / "score-model", folder / "score-out"
    loaded = load_model(model_dir / WEIGHTS, SPEC)
    worker = LoadedModel(loaded)
    fast = fast_encoder(loaded)
    table = pq.read_table(path, columns=["length", *FEATURES])
    part = table.slice(0, min(users, 50_000))
    batches, as_they_come = padded(part, bucketed=True), padded(part, bucketed=False)
    shared = spark.sparkContext.broadcast(loaded)
    rows = spark.read.parquet(path)
    few = spark.createDataFrame(rows.limit(sample).toPandas(), rows.schema).repartition(CORES).persist()
    few.count()
    yield "trailvec", users, lambda: trailvec(spark, path, model_dir, out / "ours")
    yield "forward", len(part), lambda: loop(loaded.encode, batches)
    yield "last_state", len(part), lambda: loop(fast, batches)
    yield "unbucketed", len(part), lambda: loop(loaded.encode, as_they_come)
    yield "batches", len(part), lambda: encoded(worker, part)
    yield "row_udf", sample, lambda: save(row_udf(few, shared), out / "rows")
    yield "ptls", users, lambda: ptls(rows, shared, out / "ptls")


def compare(model_dir: Path, path: str, out: Path) -> None:
    """Compares the vectors that trailvec wrote with those of the loops, for some users."""
    rows = pq.read_table(path, columns=["user_id", "length", *FEATURES]).slice(0, 500)
    users = rows["user_id"].to_pylist()
    table = ds.dataset(out).to_table(["user_id", "vector"], filter=ds.field("user_id").isin(users))
    written = dict(zip(table["user_id"].to_pylist(), table["vector"].to_pylist(), strict=True))
    vectors = np.array([written[user] for user in users])
    model = load_model(model_dir / WEIGHTS, SPEC)
    for name, encode in (("forward", model.encode), ("last_state", fast_encoder(model))):
        for places, batch in by_length(*columns_of(rows), SPEC.history_length, BATCH):
            with torch.inference_mode():
                states = encode({feature: torch.from_numpy(matrix).long() for feature, matrix in batch.items()})
            assert np.allclose(states.numpy(), vectors[places], atol=1e-5), f"{name} gives other vectors than trailvec"


def main() -> None:
    parser = options(
        __doc__,
        quick="10,000 users, 1 counted round: mostly fixed costs",
        folder="the users, the vectors and the chart",
    )
    parser.add_argument("--users", type=float, help="users scored in each round (default: 100,000)")
    parser.add_argument("--rounds", type=int, help="rounds, of which the medians are reported (default: 5)")
    parser.add_argument(
        "--sizes", help="numbers of users for the runs that measure growth (default: 1e4,1e5,1e6; quick: none)"
    )
    arguments = parser.parse_args()
    users = int(arguments.users or (10_000 if arguments.quick else 100_000))
    sizes = [int(float(n)) for n in (arguments.sizes or ("" if arguments.quick else "1e4,1e5,1e6")).split(",") if n]
    folder = arguments.folder.absolute()

    torch.set_num_threads(1)
    model_dir = folder / "score-model"
    shutil.rmtree(model_dir, ignore_errors=True)
    write_model(model_dir)
    path = write_users(folder, users)
    spark = session(quick=False)

    acts = list(contestants(spark, folder, path, users, sample=500 if arguments.quick else 5_000))
    measured = in_turns({name: act for name, _, act in acts}, arguments.rounds or (1 if arguments.quick else 5))
    counts = {name: count for name, count, _ in acts}
    compare(model_dir, path, folder / "score-out/ours")
    clock, cpu = (
        {name: statistics.median(seconds) / counts[name] for name, seconds in times.items()} for times in measured
    )
    table = pq.read_table(path, columns=["length", *FEATURES]).slice(0, 50_000)
    padding = encoded(LoadedModel(load_model(model_dir / WEIGHTS, SPEC)), table)
    growth, speeds = [], {}
    for size in sizes:
        run = partial(trailvec, spark, write_users(folder, size), model_dir, folder / "score-out/ours")
        seconds, work = timed(run)
        growth.append((float(size), work))
        speeds[str(size)] = round(size / seconds)
        log(f"{size:,} users: {seconds:.1f} s, {work:.1f} CPU s")
    spark.stop()
    shutil.rmtree(folder / "score-out")
    bars(
        folder / "score.svg",
        {name: [1e6 * t / counts[name] for t in times] for name, times in measured[1].items()},
        unit="us",
    )

    peers = {
        "ratio_to_forward_loop": "forward",
        "ratio_to_last_state_loop": "last_state",
        "speedup_vs_unbucketed": "unbucketed",
        "speedup_vs_row_udf": "row_udf",
        "speedup_vs_ptls": "ptls",
    }
    result: dict[str, Any] = {key: cpu[name] / cpu["trailvec"] for key, name in peers.items()}
    for key, name in peers.items():
        # A loop uses one core, a Spark job all of them.
        result[f"{key}_wall"] = clock[name] * (1 if name in ("row_udf", "ptls") else 1 / CORES) / clock["trailvec"]
    result["us_per_user"] = {name: round(1e6 * seconds, 1) for name, seconds in cpu.items()}
    parts = {
        "forward": cpu["last_state"],
        "batches": cpu["batches"] - cpu["last_state"],
        "spark": cpu["trailvec"] - cpu["batches"],
    }
    result["parts_us_per_user"] = {name: round(1e6 * seconds, 1) for name, seconds in parts.items()}
    result |= {"padding_share": padding, "users": users, "users_per_s": speeds}
    result["users_per_core_s"] = round(1 / cpu["trailvec"])
    if len(growth) > 1:
        result["growth"] = exponent(growth)
    last_line(result)


if __name__ == "__main__":
    main()
