"""The neighbours table, read by DuckDB, against all pairs in plain numpy; the blocks are of three vectors."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone

import deltalake
import duckdb
import numpy as np
import pytest
from pyspark.sql import SparkSession

from jobs.errors import TrailvecError
from jobs.find_neighbours import STAGE
from jobs.runtime import Runtime, write_json
from jobs.tables import CURRENT_MODEL, ITEM_EMBEDDINGS, USER_EMBEDDINGS
from spark_udfs.topk import nearest, small_batches
from tests.conftest import put

K = 4
Vectors = dict[str, list[float]]


def embed(runtime: Runtime, spark: SparkSession, users: Vectors, items: Vectors, version: str = "m1") -> None:
    """A model's folder and its two tables; it is made the current one."""
    (runtime.models / version).mkdir(parents=True, exist_ok=True)
    write_json(runtime.models / version / "model.json", {})
    write_json(runtime.models / "current.json", {"model_version": version})
    as_of = datetime(2017, 12, 1, tzinfo=timezone.utc)
    user_rows = [(user, version, as_of, 1, False, vector) for user, vector in users.items()]
    item_rows = [(item, n, version, as_of, False, vector) for n, (item, vector) in enumerate(items.items(), 2)]
    put(runtime, USER_EMBEDDINGS, spark.createDataFrame(user_rows, USER_EMBEDDINGS.schema()))
    put(runtime, CURRENT_MODEL, spark.createDataFrame([(version,)], CURRENT_MODEL.schema()))
    put(runtime, ITEM_EMBEDDINGS, spark.createDataFrame(item_rows, ITEM_EMBEDDINGS.schema()))


def some(prefix: str, count: int, seed: int) -> Vectors:
    """Vectors of small whole numbers: many ties, some zero vectors."""
    values = np.random.default_rng(seed).integers(-1, 2, size=(count, 3))
    return {f"{prefix}{n}": row.astype(float).tolist() for n, row in enumerate(values)}


def brute_force(sources: Vectors, targets: Vectors, cosine: bool) -> dict[tuple[str, int], tuple[str, float]]:
    found = {}
    for source, a in sources.items():
        scored = []
        for target, b in targets.items():
            score = np.dot(a, b)
            if cosine:
                lengths = np.linalg.norm(a) * np.linalg.norm(b)
                if not lengths:
                    continue
                score /= lengths
            if source != target:
                scored.append((-np.float32(score), target))
        for rank, (score, target) in enumerate(sorted(scored)[:K], 1):
            found[source, rank] = target, -float(score)
    return found


def test_all_three_kinds_against_brute_force(make_runtime: Callable[..., Runtime], spark: SparkSession) -> None:
    runtime = make_runtime(f"neighbours.k={K}", "neighbours.block_rows=3")
    users, items = some("u", 20, 1), some("i", 11, 2)
    assert [0.0, 0.0, 0.0] in users.values()
    embed(runtime, spark, {"u0": [9.0, 9.0, 9.0]}, {"i0": [9.0, 9.0, 9.0]}, "old")  # another model's: never met
    embed(runtime, spark, users, items)
    runtime.execute(STAGE)

    path = str(runtime.root / "tables" / "neighbours")
    files = deltalake.DeltaTable(path).file_uris()
    rows = duckdb.sql(
        "SELECT kind, source_id, rank, neighbour_id, score, model_version "
        "FROM read_parquet($files, hive_partitioning=true)",
        params={"files": files},
    ).fetchall()
    assert {row[5] for row in rows} == {"m1"}
    for kind, sources, targets, cosine in [
        ("user_item", users, items, False),
        ("user_user", users, users, True),
        ("item_item", items, items, True),
    ]:
        found = {(source, rank): (target, score) for k, source, rank, target, score, _ in rows if k == kind}
        assert found == brute_force(sources, targets, cosine)
    assert len(rows) == sum(
        len(brute_force(*pair)) for pair in [(users, items, False), (users, users, True), (items, items, True)]
    )

    assert runtime.execute(STAGE).skipped


def test_partitions_and_blocks_do_not_matter(spark: SparkSession) -> None:
    """Vectors of awkward numbers, nine of them twins: a float32 matrix product alone would part them by place."""
    rng = np.random.default_rng(5)
    values = {f"u{n:02d}": rng.normal(size=33).tolist() for n in range(40)}
    values |= {f"twin{n}": values["u07"] for n in range(9)}
    frame = spark.createDataFrame(list(values.items()), "id string, vector array<float>")
    found = []
    for block_rows, partitions in ((7, 3), (4096, 1)):
        with small_batches(spark):
            users = frame.repartition(partitions)
            answer = nearest(users, users, 5, "cosine", block_rows=block_rows, counts=(49, 49))
            found.append(sorted(answer.collect()))
    assert found[0] == found[1]
    assert len(found[0]) == 5 * 49
    assert [row["neighbour_id"] for row in found[0] if row["source_id"] == "u07"] == [f"twin{n}" for n in range(5)]


def test_a_model_without_vectors(make_runtime: Callable[..., Runtime], spark: SparkSession) -> None:
    runtime = make_runtime()
    embed(runtime, spark, some("u", 3, 1), some("i", 3, 1), "old")
    put(runtime, CURRENT_MODEL, spark.createDataFrame([("new",)], CURRENT_MODEL.schema()))
    with pytest.raises(TrailvecError, match="user_embeddings has no vector of model new: run `trailvec score_users`"):
        runtime.execute(STAGE)
    put(runtime, CURRENT_MODEL, spark.createDataFrame([], CURRENT_MODEL.schema()))
    with pytest.raises(TrailvecError, match="no model has a vector of every user yet: run `trailvec score_users`"):
        runtime.execute(STAGE)
