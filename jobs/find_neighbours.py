"""find_neighbours: user_embeddings, item_embeddings → neighbours.

Of the current model: for each user the items with the highest dot product (the model's own score, over its whole
vocabulary), for each user and each item the users and the items with the highest cosine. Exact, in blocks
(spark_udfs/topk.py). A zero vector has no direction: it has no cosine neighbours and is nobody's.

Items as neighbours can be narrowed down: to some verticals, to those in stock, and for a user without what they have
already bought (`neighbours.*`).

trailvec find_neighbours --conf conf/local.toml --set neighbours.k=20 --set 'neighbours.without=["purchase"]'
"""

from __future__ import annotations

import hashlib
from functools import reduce
from pathlib import Path
from typing import Any

import pandas as pd
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.cli import stage_main
from jobs.errors import TrailvecError
from jobs.runtime import Runtime, Stage
from jobs.tables import CURRENT_MODEL, ITEM_EMBEDDINGS, ITEMS, NEIGHBOURS, SESSIONS, USER_EMBEDDINGS, Table
from spark_udfs.topk import Metric, nearest, small_batches

KINDS: dict[str, tuple[str, str, Metric]] = {
    "user_item": ("user", "item", "dot"),
    "user_user": ("user", "user", "cosine"),
    "item_item": ("item", "item", "cosine"),
}


def find_neighbours(
    users: DataFrame,
    items: DataFrame,
    *,
    k: int,
    block_rows: int,
    offered: DataFrame | None = None,
    without: DataFrame | None = None,
) -> DataFrame:
    """The k nearest of each user and item, as NEIGHBOURS without model_version.

    Args:
        users, items: id string, vector array<float>, all of one model.
        offered: the rows of `items` that may be neighbours; None: all.
        without: id string, left_out array<string>: of a user, the items that are not to be found for them.
    """
    offered = items if offered is None else offered
    sources = {"user": users, "item": items}
    targets = {"user": users, "item": offered}
    counts = {"user": users.count(), "item": items.count(), "offered": offered.count()}
    parts = []
    for kind, (source, target, metric) in KINDS.items():
        queries = sources[source]
        if kind == "user_item" and without is not None:
            queries = queries.join(without, "id", "left")
            queries = queries.withColumn("left_out", F.coalesce("left_out", F.array().cast("array<string>")))
        both = counts[source], counts["user" if target == "user" else "offered"]
        found = nearest(queries, targets[target], k, metric, block_rows=block_rows, counts=both)
        parts.append(found.withColumn("kind", F.lit(kind)))
    return reduce(DataFrame.unionByName, parts)


def run(runtime: Runtime) -> None:
    version = runtime.current_model()
    settings = runtime.config.neighbours
    users, items = (
        _vectors(runtime, table, key, version)
        for table, key in ((USER_EMBEDDINGS, "user_id"), (ITEM_EMBEDDINGS, "item_id"))
    )
    found = find_neighbours(
        users,
        items,
        k=settings.k,
        block_rows=settings.block_rows,
        offered=_offered(runtime, items),
        without=_done_before(runtime.read(SESSIONS), settings.without) if settings.without else None,
    )
    with small_batches(runtime.spark):
        runtime.write(NEIGHBOURS, found.withColumn("model_version", F.lit(version)))


def _vectors(runtime: Runtime, table: Table, key: str, version: str) -> DataFrame:
    of_model = runtime.read(table).where(F.col("model_version") == version)
    if of_model.isEmpty():
        raise TrailvecError(f"table {table.name} has no vector of model {version}: run `trailvec {table.stage}` first")
    return of_model.select(F.col(key).alias("id"), "vector")


def _offered(runtime: Runtime, items: DataFrame) -> DataFrame:
    """The items that may be neighbours."""
    settings = runtime.config.neighbours
    if settings.verticals:
        of_verticals = runtime.read(ITEMS).where(F.col("vertical").isin(settings.verticals))
        items = items.join(of_verticals.select(F.col("item_id").alias("id")), "id", "left_semi")
    if settings.in_stock is not None:
        lines = _stock_list(settings.in_stock).read_text(encoding="utf-8-sig").splitlines()
        ids = pd.DataFrame({"id": sorted({line.strip() for line in lines} - {""})}, dtype="str")
        items = items.join(runtime.spark.createDataFrame(ids, "id string"), "id", "left_semi")
    if items.isEmpty():
        raise TrailvecError(
            "no item is left as a neighbour: correct neighbours.verticals or neighbours.in_stock "
            f"(found {settings.verticals or 'all verticals'}, {settings.in_stock or 'no stock list'})"
        )
    return items


def _stock_list(file: str) -> Path:
    path = Path(file)
    if not path.is_file():
        raise TrailvecError(f"neighbours.in_stock: {path} does not exist: correct the path")
    return path


def _done_before(sessions: DataFrame, event_types: list[str]) -> DataFrame:
    """id, left_out: of each user the items of their events of these types."""
    events = sessions.select("user_id", F.explode("events").alias("event")).where(
        F.col("event.event_type").isin(event_types)
    )
    return events.groupBy(F.col("user_id").alias("id")).agg(F.collect_set("event.item_id").alias("left_out"))


def _inputs(runtime: Runtime) -> dict[str, Any]:
    file = runtime.config.neighbours.in_stock
    stock = None if file is None else hashlib.sha256(_stock_list(file).read_bytes()).hexdigest()
    return {"model_version": runtime.current_model(), "in_stock": stock}


STAGE = Stage(
    "find_neighbours",
    "the nearest items and users of each user, and the nearest items of each item",
    run,
    reads=(CURRENT_MODEL, USER_EMBEDDINGS, ITEM_EMBEDDINGS, ITEMS, SESSIONS),  # in this order: what is current is whole
    writes=(NEIGHBOURS,),
    settings=("neighbours",),
    inputs=_inputs,
)


def main() -> None:
    stage_main("find_neighbours")


if __name__ == "__main__":
    main()
