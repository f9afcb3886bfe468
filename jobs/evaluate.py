"""evaluate: sequences (valid or test rows) + item_embeddings + the model → evaluation.

What a user did *next* after the cut is everything at the first moment of it: the order inside one moment (a basket) is
no information. Three tasks: `next` (any item), `new` (items not acted on in the last `sequences.seen_days`; those are
taken out of the ranking), `repeat` (the others). Every method ranks the whole catalogue of the training window: all its
items that were acted on by a type of event that is to be predicted. An item outside of it counts as a miss.
The floors know what the model knows: counts of the training window, and each user's own history up to the cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.build_sequences import UNKNOWN, in_vocabulary, number_actions
from jobs.cli import stage_main
from jobs.models import encode_sequences
from jobs.runtime import Runtime, Stage
from jobs.splits import before_cut, cut_times
from jobs.tables import CONTEXT_VALUES, EVALUATION, ITEM_EMBEDDINGS, ITEMS, SEQUENCES, SESSIONS
from training.floors import ItemKnn, own_frequency, popularity
from training.metrics import rank_metrics

TASKS = ("next", "new", "repeat")
METHODS = ("model", "popularity", "own_frequency", "item_knn")
_BLOCK_USERS = 256
_DEEPEST = 20

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Catalogue:
    """The items that may be ranked. Arrays are [items]; position i is the item with the number i."""

    vectors: Floats  # [items, width]
    target_counts: Integers
    rankable: npt.NDArray[np.bool_]


def relevant_items(row: Any, task: str) -> list[int]:
    """What the user of a sequences row did next, by task; the items at the first moment at which there are any."""
    seen = set(row.seen_item_index) - {UNKNOWN}
    pairs = list(zip(row.target_ts, row.target_item_index, strict=True))
    if task != "next":
        pairs = [(ts, item) for ts, item in pairs if (item in seen) == (task == "repeat")]
    return [item for ts, item in pairs if ts == pairs[0][0]]


def top_items(scores: Floats, k: int) -> Integers:
    """The k best columns of each row, best first, ties by column; -1 where a row has fewer finite scores."""
    k = min(k, scores.shape[1])
    best = np.sort(np.argpartition(-scores, k - 1, axis=1)[:, :k], axis=1)
    values = np.take_along_axis(scores, best, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    ranked = np.take_along_axis(best, order, axis=1)
    return np.where(np.isfinite(np.take_along_axis(values, order, axis=1)), ranked, -1)


def rank_blocks(
    rows: pd.DataFrame, own_counts: sp.csr_matrix, knn: ItemKnn, catalogue: Catalogue
) -> Iterator[tuple[str, str, dict[str, npt.NDArray[np.float64]]]]:
    """(task, method, metric → value per user) for blocks of users.

    Args:
        rows: valid or test rows of SEQUENCES with a `vector` column.
        own_counts: the users' own target actions before the cut, [len(rows), items].
    """
    relevant = {task: [relevant_items(row, task) for row in rows.itertuples()] for task in TASKS}
    history = [items[catalogue.rankable[items]] for items in (np.asarray(h) for h in rows["item_index"])]
    for start in range(0, len(rows), _BLOCK_USERS):
        block = slice(start, start + _BLOCK_USERS)
        users = rows.iloc[block]
        scores = {
            "model": np.stack(list(users["vector"])) @ catalogue.vectors.T,
            "popularity": popularity(catalogue.target_counts, len(users)),
            "own_frequency": own_frequency(own_counts[block], catalogue.target_counts),
            "item_knn": knn.scores(*flatten(history[block])),
        }
        seen_items, seen_offsets = flatten([np.asarray(items) for items in users["seen_item_index"]])
        seen_users = np.repeat(np.arange(len(users)), np.diff(seen_offsets))
        for method, found in scores.items():
            found[:, ~catalogue.rankable] = -np.inf
            unmasked = top_items(found, _DEEPEST)
            found[seen_users, seen_items] = -np.inf
            ranked = {"next": unmasked, "repeat": unmasked, "new": top_items(found, _DEEPEST)}
            for task in TASKS:
                items, offsets = flatten([np.asarray(r, np.int64) for r in relevant[task][block]])
                at = {k: rank_metrics(ranked[task][:, :k], items, offsets) for k in (10, 20)}
                yield (
                    task,
                    method,
                    {
                        "recall@10": at[10]["recall"],
                        "ndcg@10": at[10]["ndcg"],
                        "recall@20": at[20]["recall"],
                        "ndcg@20": at[20]["ndcg"],
                        "mrr@20": at[20]["mrr"],
                    },
                )


def flatten(lists: list[npt.NDArray[Any]]) -> tuple[Integers, Integers]:
    """The lists laid end to end, and the offset at which each begins (and the last ends)."""
    offsets = np.concatenate([[0], np.cumsum([len(items) for items in lists])]).astype(np.int64)
    return np.concatenate([*lists, np.empty(0, np.int64)]).astype(np.int64), offsets


def run(runtime: Runtime) -> None:
    settings = runtime.config.evaluate
    model_dir = runtime.model_dir()
    sequences = runtime.read(SEQUENCES).where(F.col("split") == settings.split)
    sample = _sample(sequences, settings.max_users)
    encoded = encode_sequences(
        sample, sample.columns, model_dir=model_dir, batch_size=runtime.config.score.batch_size
    ).drop("history_length", "is_cold")
    rows = encoded.orderBy("user_id").toPandas()
    catalogue = _catalogue(runtime, model_dir.name)
    own_counts, interactions = _interactions(runtime, rows["user_id"], len(catalogue.target_counts))
    knn = ItemKnn(interactions, settings.knn_decay)

    values: dict[tuple[str, str, str], list[npt.NDArray[np.float64]]] = {}
    for task, method, metrics in rank_blocks(rows, own_counts, knn, catalogue):
        for metric, per_user in metrics.items():
            values.setdefault((task, method, metric), []).append(per_user)
    results = []
    for (task, method, metric), blocks in values.items():
        per_user = np.concatenate(blocks)
        counted = per_user[~np.isnan(per_user)]  # a user without a relevant item has no value
        if len(counted):
            row = (model_dir.name, settings.split, task, method, metric, float(counted.mean()), len(counted))
            results.append(row)
    runtime.write(EVALUATION, runtime.spark.createDataFrame(results, EVALUATION.schema()).coalesce(1))
    for task in TASKS:
        found = {r[3]: r[5] for r in results if r[2] == task and r[4] == "ndcg@10"}
        runtime.report.notes.append(
            f"ndcg@10, {task}: " + ", ".join(f"{m} {found[m]:.4f}" for m in METHODS if m in found)
        )


def _sample(rows: DataFrame, max_users: int) -> DataFrame:
    """At most about `max_users` rows, chosen by a hash of the user: the same users whatever the partitioning."""
    total = rows.count()
    if total <= max_users:
        return rows
    buckets = 1_000_000
    return rows.where(F.pmod(F.xxhash64("user_id"), F.lit(buckets)) < round(max_users / total * buckets))


def _catalogue(runtime: Runtime, model_version: str) -> Catalogue:
    # An item that the model never saw is none that it can be asked to rank: the floors do not know it either.
    vectors = runtime.read(ITEM_EMBEDDINGS).where((F.col("model_version") == model_version) & ~F.col("is_cold"))
    counted = vectors.join(runtime.read(ITEMS), ["item_id", "item_index"]).select(
        "item_index", "vector", "target_count"
    )
    items = counted.toPandas()
    index = items["item_index"].to_numpy()
    size, width = int(index.max()) + 1, len(items["vector"].iloc[0])
    matrix, counts = np.zeros((size, width), np.float32), np.zeros(size, np.int64)
    matrix[index] = np.stack(list(items["vector"]))
    counts[index] = items["target_count"]
    return Catalogue(matrix, counts, counts > 0)


def _interactions(runtime: Runtime, users: pd.Series[str], items: int) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """(the users' own counts before the split's cut [users, items], a sample's counts in training [sample, items])."""
    settings, split = runtime.config.sequences, runtime.config.evaluate.split
    sessions = runtime.read(SESSIONS)
    cuts = cut_times(sessions.select(F.col("end_ts").alias("event_ts")), settings)
    vocabulary = in_vocabulary(runtime.read(ITEMS), runtime.config.vocabulary.min_count)
    actions = number_actions(sessions, vocabulary, runtime.read(CONTEXT_VALUES))
    split_of = {name: before_cut(name, cuts, settings) for name in ("train", split)}
    for name, condition in split_of.items():
        actions = actions.withColumn(f"in_{name}", condition)
    if settings.target_event_types:
        actions = actions.where(F.col("event_type").isin(settings.target_event_types))
    actions = actions.where((F.col("item_index") > UNKNOWN) & (F.col("item_index") < items))

    def matrix(rows: DataFrame, columns: dict[str, int]) -> sp.csr_matrix:
        found = rows.groupBy("user_id", "item_index").count().toPandas()
        row = found["user_id"].map(columns).to_numpy()
        return sp.csr_matrix((found["count"], (row, found["item_index"])), shape=(len(columns), items))

    evaluated = runtime.spark.createDataFrame(pd.DataFrame({"user_id": users}))
    own = matrix(actions.where(f"in_{split}").join(evaluated, "user_id"), {u: n for n, u in enumerate(users)})
    trained = actions.where("in_train")
    known = _sample(trained.select("user_id").distinct(), runtime.config.evaluate.knn_max_users)
    names = sorted(row.user_id for row in known.collect())
    return own, matrix(trained.join(known, "user_id"), {u: n for n, u in enumerate(names)})


STAGE = Stage(
    "evaluate",
    "rank the catalogue for every test user; the model beside the floors",
    run,
    reads=(SEQUENCES, SESSIONS, ITEMS, CONTEXT_VALUES, ITEM_EMBEDDINGS),
    writes=(EVALUATION,),
    settings=("evaluate", "sequences", "vocabulary", "model"),
    inputs=lambda runtime: {"model_version": runtime.model_dir().name},
)


def main() -> None:
    stage_main("evaluate")


if __name__ == "__main__":
    main()
