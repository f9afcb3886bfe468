"""find_neighbours: user_embeddings, item_embeddings → neighbours.

Of the current model: for each user the items with the highest dot product (the model's own score, over its whole
vocabulary), for each user and each item the users and the items with the highest cosine. Exact, in blocks
(spark_udfs/topk.py). A zero vector has no direction: it has no cosine neighbours and is nobody's.

trailvec find_neighbours --conf conf/local.toml --set neighbours.k=20
"""

from __future__ import annotations

from functools import reduce

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.cli import stage_main
from jobs.errors import TrailvecError
from jobs.runtime import Runtime, Stage
from jobs.tables import CURRENT_MODEL, ITEM_EMBEDDINGS, NEIGHBOURS, USER_EMBEDDINGS, Table
from spark_udfs.topk import Metric, nearest, small_batches


def find_neighbours(
    users: DataFrame, items: DataFrame, *, k: int, block_rows: int, user_count: int, item_count: int
) -> DataFrame:
    """The k nearest of each user and item, as NEIGHBOURS without model_version.

    Args:
        users, items: id string, vector array<float>, all of one model; the counts say about how many rows.
    """
    of: dict[str, tuple[DataFrame, int]] = {"user": (users, user_count), "item": (items, item_count)}
    kinds: tuple[tuple[str, str, Metric], ...] = (
        ("user", "item", "dot"),
        ("user", "user", "cosine"),
        ("item", "item", "cosine"),
    )
    parts = []
    for source, target, metric in kinds:
        (sources, source_count), (targets, target_count) = of[source], of[target]
        found = nearest(sources, targets, k, metric, block_rows=block_rows, counts=(source_count, target_count))
        parts.append(found.withColumn("kind", F.lit(f"{source}_{target}")))
    return reduce(DataFrame.unionByName, parts)


def run(runtime: Runtime) -> None:
    version = runtime.current_model()
    settings = runtime.config.neighbours
    users, user_count = _vectors(runtime, USER_EMBEDDINGS, "user_id", version)
    items, item_count = _vectors(runtime, ITEM_EMBEDDINGS, "item_id", version)
    found = find_neighbours(
        users,
        items,
        k=settings.k,
        block_rows=settings.block_rows,
        user_count=user_count,
        item_count=item_count,
    )
    with small_batches(runtime.spark):
        runtime.write(NEIGHBOURS, found.withColumn("model_version", F.lit(version)))


def _vectors(runtime: Runtime, table: Table, key: str, version: str) -> tuple[DataFrame, int]:
    of_model = runtime.read(table).where(F.col("model_version") == version)
    count = of_model.count()
    if not count:
        raise TrailvecError(f"table {table.name} has no vector of model {version}: run `trailvec {table.stage}` first")
    return of_model.select(F.col(key).alias("id"), "vector"), count


STAGE = Stage(
    "find_neighbours",
    "the nearest items and users of each user, and the nearest items of each item",
    run,
    reads=(CURRENT_MODEL, USER_EMBEDDINGS, ITEM_EMBEDDINGS),  # in this order: what is current is whole
    writes=(NEIGHBOURS,),
    settings=("neighbours",),
    inputs=lambda runtime: {"model_version": runtime.current_model()},
)


def main() -> None:
    stage_main("find_neighbours")


if __name__ == "__main__":
    main()
