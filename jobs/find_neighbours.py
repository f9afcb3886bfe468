"""find_neighbours: user_embeddings, item_embeddings → neighbours.

For the current model: for each user, the items with the highest dot product (the model's own score, over its whole
vocabulary) and the users with the highest cosine; for each item, the items with the highest cosine. All three kinds, or
those in `neighbours.kinds`; by the other metric if `neighbours.metrics` says so. The search is exact, in blocks
(spark_udfs/topk.py). A zero vector has no direction: it neither has cosine neighbours nor is one.

With `neighbours.habit`, also user_item_habit: a user's items ranked by the model's score plus the user's habit
(jobs/habit.py), as exact as user_item.

Candidate items can be restricted (`neighbours.*`): to some verticals, to items in stock, and for each user to items
that they have had no event of given types with (not bought yet, say).

For very many candidates, `neighbours.cells` turns the search into an inverted file (IVF), which scans only a part of
them and finds most neighbours. The run reports its recall, measured by an exact search for a sample.

trailvec find_neighbours --conf conf/local.toml --set neighbours.k=20 --set 'neighbours.without=["purchase"]'
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from jobs.build_vocabulary import absent_event_types
from jobs.cli import stage_main
from jobs.config import NeighboursSettings
from jobs.errors import TrailvecError
from jobs.files import Place
from jobs.habit import habit
from jobs.models import stacked
from jobs.runtime import Runtime, Stage
from jobs.spark_session import drawn_by_hash, shuffle_tasks, spark_conf
from jobs.splits import is_target, log_end, microseconds
from jobs.tables import (
    CONTEXT_VALUES,
    CURRENT_MODEL,
    ITEM_EMBEDDINGS,
    ITEMS,
    NEIGHBOURS,
    SESSIONS,
    USER_EMBEDDINGS,
    Table,
    events_of,
    of_model,
)
from jobs.user_lists import copies, file_digest, read_items
from spark_udfs.arrow import matrix_of
from spark_udfs.topk import BLOCK_CONF, Cells, Metric, find_cells, nearest
from spark_udfs.vectors import inner_product

KINDS: dict[str, tuple[str, str, Metric]] = {
    "user_item": ("user", "item", "dot"),
    "user_user": ("user", "user", "cosine"),
    "item_item": ("item", "item", "cosine"),
}

WITH_HABIT = "user_item_habit"

SAMPLE_OF_CELL = 64  # candidates per cell, on average, that the centroids are trained on
SAMPLED = 1_000_000  # at most so many in all: each takes 2 KB of the driver's memory at width 64 (docs/sizing.md)
ASKED = 500  # queries also searched exactly, to measure the recall of the inverted file


class Search(NamedTuple):
    """The search of one kind. Both sides: id string, vector array<float>; queries may have left_out array<string>."""

    kind: str
    queries: DataFrame
    candidates: DataFrame
    metric: Metric
    counts: tuple[int, int]


def searches(
    users: DataFrame,
    items: DataFrame,
    kinds: Iterable[str],
    metrics: Mapping[Any, Metric],
    *,
    offered: DataFrame | None,
    without: DataFrame | None,
) -> list[Search]:
    """The searches to run, one per kind.

    Args:
        users, items: id string, vector array<float>, all of one model.
        kinds: a subset of KINDS.
        metrics: kind → its metric, instead of that of KINDS.
        offered: the rows of `items` that may be neighbours; None: all.
        without: id string, left_out array<string>: the items to exclude for a user (user_item only).
    """
    sources = {"user": users, "item": items}
    targets = {"user": users, "item": items if offered is None else offered}
    query_counts = {name: frame.count() for name, frame in sources.items()}
    target_counts = query_counts if offered is None else query_counts | {"item": offered.count()}
    every = []
    for kind in dict.fromkeys(kinds):
        source, target, metric = KINDS[kind]
        queries = sources[source]
        if kind == "user_item" and without is not None:
            queries = queries.join(without, "id", "left")
            queries = queries.withColumn("left_out", F.coalesce("left_out", F.array().cast("array<string>")))
        counts = query_counts[source], target_counts[target]
        every.append(Search(kind, queries, targets[target], metrics.get(kind, metric), counts))
    return every


def find_neighbours(every: list[Search], settings: NeighboursSettings) -> DataFrame:
    """The k nearest neighbours of each user and item: NEIGHBOURS without model_version.

    Raises:
        TrailvecError: settings.cells needs faiss, which is not installed.
    """
    parts = []
    for kind, queries, candidates, metric, counts in every:
        source, target, _ = KINDS[kind]
        cells = _cells(candidates, counts[1], metric, settings) if settings.cells else None
        found = nearest(
            queries,
            candidates,
            min(settings.k, max(1, counts[1])),  # memory is allocated for k
            metric,
            same_kind=source == target,
            block_rows=settings.block_rows,
            counts=counts,
            tasks=shuffle_tasks(queries.sparkSession),
            cells=cells,
        )
        parts.append(found.withColumn("kind", F.lit(kind)))
    return reduce(DataFrame.unionByName, parts)


def score_habits(habits: DataFrame, search: Search) -> DataFrame:
    """Scores the items that users have a habit of, by dot product plus habit: source_id, neighbour_id, score.

    Args:
        habits: user_id, item_id, habit (double, at least 0).
        search: the one of kind "user_item".
    """
    users = search.queries.withColumnRenamed("vector", "user_vector")
    items = search.candidates.select(F.col("id").alias("item_id"), F.col("vector").alias("item_vector"))
    pairs = habits.join(users, F.col("id") == F.col("user_id")).join(items, "item_id")
    if "left_out" in pairs.columns:
        pairs = pairs.where(~F.array_contains("left_out", F.col("item_id")))
    pairs = pairs.select("user_id", "item_id", "user_vector", "item_vector", "habit")
    return pairs.mapInArrow(_scored, "source_id string, neighbour_id string, score double")


def _scored(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        users, items, *sides, habits = batch.columns
        a, b = (matrix_of(side).astype(np.float64) for side in sides)
        # Rounded to float32, as the search's and SQL's scores are.
        scores = inner_product(a, b).astype(np.float32) + habits.to_numpy()
        yield pa.RecordBatch.from_arrays(
            [users, items, pa.array(scores, pa.float64())], ["source_id", "neighbour_id", "score"]
        )


def with_habit(found: DataFrame, own: DataFrame, k: int) -> DataFrame:
    """Each user's k best by dot product plus habit: source_id, rank, neighbour_id, score.

    An item without a habit keeps its score, so it can be among the k best only if it already was in `found`. An item
    with a habit may be in both frames; a habit is never negative, so the greater score is the one that includes it.

    Args:
        found: the k best by dot product alone.
        own: the result of `score_habits`.
    """
    # One shuffle by user serves both the grouping and the ranking.
    both = own.unionByName(found.select(*own.columns)).repartition("source_id")
    scored = both.groupBy("source_id", "neighbour_id").agg(F.max("score").alias("score"))
    in_order = Window.partitionBy("source_id").orderBy(F.desc("score"), "neighbour_id")
    return scored.withColumn("rank", F.row_number().over(in_order)).where(F.col("rank") <= k)


def recall(every: list[Search], found: DataFrame, settings: NeighboursSettings) -> dict[str, float]:
    """kind → recall of `found`: the share of the exact neighbours of about ASKED queries that it contains."""
    exact = settings.model_copy(update={"cells": 0})
    samples = [drawn_by_hash(ASKED / max(1, s.counts[0]), "id", F.lit("neighbours")) for s in every]
    some = [
        s._replace(queries=s.queries.where(drawn), counts=(min(ASKED, s.counts[0]), s.counts[1]))
        for s, drawn in zip(every, samples, strict=True)
    ]
    true = find_neighbours(some, exact).select("kind", "source_id", "neighbour_id")
    hits = true.join(found.select(*true.columns, F.lit(1).alias("hit")), true.columns, "left")
    rows = hits.groupBy("kind").agg((F.count("hit") / F.count(F.lit(1))).alias("recall")).collect()
    return {row["kind"]: row["recall"] for row in rows}


def _cells(candidates: DataFrame, count: int, metric: Metric, settings: NeighboursSettings) -> Cells | None:
    share = min(SAMPLE_OF_CELL * settings.cells, SAMPLED) / max(1, count)
    sample = candidates.where(drawn_by_hash(share, "id", F.lit("neighbours")))
    rows = sample.where(F.exists("vector", lambda x: x != 0)).orderBy("id").select("vector").toPandas()
    if rows.empty:
        return None  # all sampled vectors are zero: none is nearer than another
    try:
        return find_cells(stacked(rows["vector"]), metric, settings.cells, settings.probes)
    except ImportError:
        raise TrailvecError(
            "neighbours.cells needs faiss: run `pip install 'trailvec[faiss]'`, or set it to 0 for the exact search"
        ) from None


def run(runtime: Runtime) -> None:
    staging = runtime.staging("neighbours")
    with copies(staging) if runtime.config.neighbours.in_stock is not None else nullcontext(staging) as folder:
        _run(runtime, folder)


def _run(runtime: Runtime, folder: Place) -> None:
    version = runtime.current_model()
    settings = runtime.config.neighbours
    users, items = (
        _vectors(runtime, table, key, version)
        for table, key in ((USER_EMBEDDINGS, "user_id"), (ITEM_EMBEDDINGS, "item_id"))
    )
    if settings.without:
        absent, types = absent_event_types(runtime.read(CONTEXT_VALUES), settings.without)
        runtime.report.notes += [
            f"neighbours.without leaves nothing out for {name}: no event has that type (found {types})"
            for name in absent
        ]
    every = searches(
        users,
        items,
        settings.kinds,
        settings.metrics,
        offered=_offered(runtime, items, folder),
        without=_done_before(runtime.read(SESSIONS), settings.without) if settings.without else None,
    )
    gone = [kind for kind in KINDS if kind not in settings.kinds]
    if gone and runtime.exists(NEIGHBOURS):
        old = of_model(runtime.latest(NEIGHBOURS), version).where(F.col("kind").isin(gone))
        runtime.report.notes += [
            f"the rows of kind {kind} from an earlier run are removed, as neighbours.kinds does not name it"
            for kind in sorted(row["kind"] for row in old.select("kind").distinct().collect())
        ]
    # A run replaces the rows of every kind, including kinds that it finds nothing for or that are not configured.
    replaced = tuple(KINDS) if settings.habit else (*KINDS, WITH_HABIT)
    with spark_conf(runtime.spark, BLOCK_CONF):
        found = find_neighbours(every, settings).withColumn("model_version", F.lit(version))
        runtime.write(NEIGHBOURS, found, done=not settings.habit, of={"model_version": version, "kind": replaced})
        if settings.cells:
            shares = recall(every, of_model(runtime.latest(NEIGHBOURS), version), settings)
            text = ", ".join(f"{kind} {share:.3f}" for kind, share in sorted(shares.items()))
            runtime.report.notes.append(f"share of the exact neighbours found, for a sample of queries: {text}")
    if settings.habit:
        runtime.on_progress("habits")
        (search,) = (search for search in every if search.kind == "user_item")
        found = of_model(runtime.latest(NEIGHBOURS), version).where(F.col("kind") == search.kind)
        rows = with_habit(found, score_habits(_habits(runtime), search), settings.k)
        of = {"model_version": version, "kind": WITH_HABIT}
        runtime.write(NEIGHBOURS, rows.withColumns({name: F.lit(value) for name, value in of.items()}), of=of)


def _vectors(runtime: Runtime, table: Table, key: str, version: str) -> DataFrame:
    rows = of_model(runtime.read(table), version)
    if rows.isEmpty():
        raise TrailvecError(f"table {table.name} has no vector of model {version}: run `trailvec {table.stage}` first")
    return rows.select(F.col(key).alias("id"), "vector")


def _offered(runtime: Runtime, items: DataFrame, folder: Place) -> DataFrame | None:
    """The items that may be neighbours; None: all. `folder` as in `read_items`."""
    settings = runtime.config.neighbours
    if not settings.verticals and settings.in_stock is None:
        return None
    if settings.verticals:
        verticals = runtime.read(ITEMS).where("vertical IS NOT NULL").select("vertical").distinct().collect()
        known = sorted(row["vertical"] for row in verticals)
        runtime.report.notes += [
            f"neighbours.verticals offers no item for {name}: no item is in that vertical (found {', '.join(known)})"
            for name in settings.verticals
            if name not in known
        ]
        of_verticals = runtime.read(ITEMS).where(F.col("vertical").isin(settings.verticals))
        items = items.join(of_verticals.select(F.col("item_id").alias("id")), "id", "left_semi")
    if settings.in_stock is not None:
        stock = read_items(runtime, _stock_list(settings.in_stock), folder)
        items = items.join(stock.select(F.col("item_id").alias("id")), "id", "left_semi")
    if items.isEmpty():
        raise TrailvecError(
            "no item is left as a neighbour: correct neighbours.verticals or neighbours.in_stock "
            f"(found {settings.verticals or 'all verticals'}, {settings.in_stock or 'no stock list'})"
        )
    return items


def _stock_list(file: str) -> Path:
    path = Path(file)
    if not path.exists():
        raise TrailvecError(f"neighbours.in_stock: {path} does not exist: correct the path")
    return path


def _done_before(sessions: DataFrame, event_types: list[str]) -> DataFrame:
    """id, left_out: for each user, the items of their events of these types."""
    events = _events(sessions, event_types)
    return events.groupBy(F.col("user_id").alias("id")).agg(F.collect_set("item_id").alias("left_out"))


def _events(sessions: DataFrame, event_types: list[str]) -> DataFrame:
    """The needed columns of the events of these types; an empty list means all types."""
    return events_of(sessions, "item_id", "event_ts", "event_type").where(is_target(event_types))


def _habits(runtime: Runtime) -> DataFrame:
    """user_id, item_id, habit at the log's end, over the events of the predicted types."""
    settings, sessions = runtime.config.sequences, runtime.read(SESSIONS)
    end = log_end(sessions, "end_ts")
    of_pair = habit(runtime.config.habit, F.lit(microseconds(end)))
    events = _events(sessions, settings.target_event_types)
    return events.groupBy("user_id", "item_id").agg(of_pair.alias("habit"))


def _inputs(runtime: Runtime) -> dict[str, Any]:
    settings, file = runtime.config, runtime.config.neighbours.in_stock
    stock = None if file is None else file_digest(_stock_list(file))
    facts: dict[str, Any] = {"model_version": runtime.current_model(), "in_stock": stock}
    if settings.neighbours.habit:  # what only `_habits` reads
        facts |= {"habit": settings.habit.model_dump(), "of_types": settings.sequences.target_event_types}
    return facts


STAGE = Stage(
    "find_neighbours",
    "find the nearest items and users of each user, and the nearest items of each item",
    run,
    # CURRENT_MODEL first: a model that is current by then has all its vectors.
    reads=(CURRENT_MODEL, USER_EMBEDDINGS, ITEM_EMBEDDINGS, ITEMS, CONTEXT_VALUES, SESSIONS),
    writes=(NEIGHBOURS,),
    settings=("neighbours",),
    also="It also reads the list neighbours.in_stock, if there is one. With neighbours.habit, [habit] and "
    "sequences.target_event_types change its result, too.",
    inputs=_inputs,
)


def main() -> None:
    stage_main("find_neighbours")


if __name__ == "__main__":
    main()
