"""evaluate: sequences (valid or test rows) + item_embeddings + the model → evaluation.

What a user did *next* is everything at the first moment after the cut at which they acted: the order within one moment
(a basket) carries no information. There are three ranking tasks: `next` (any item), `new` (items of which the user had
no event to predict (`sequences.target_event_types`) in the last `sequences.seen_days`; the others are left out of the
ranking) and `repeat` (the others). An item that a user viewed and did not buy is new, where purchases are predicted.
Every method ranks the same items: all that the model knows and that have an event to predict in the training window.
Any other item is a miss; each unknown item is a miss of its own, as nobody can say whether two are the same.
The baselines (floors) know what the model knows: counts of the training window, and each user's history up to the cut.
For item-kNN too the order within one moment carries no information, except in leave-one-out, which asks for the last
action by id.
`model_and_habit` ranks by the model's score plus what the user does repeatedly (jobs/habit.py).

Each metric is also given for slices of the users (jobs/ranking.py), with a confidence interval from a bootstrap over
users. A fourth task, `space`, measures the vectors without a downstream task (jobs/space.py), on samples drawn by hash.
It does not use the table neighbours, which is built later: the same input gives the same rows, in whatever order stages
run. A fifth, `drift`, says how far events and vectors moved since the cut (jobs/drift.py), and which limits they broke.

trailvec evaluate --conf conf/local.toml
trailvec evaluate --conf conf/local.toml --compare MODEL_A MODEL_B
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs import space
from jobs.build_sequences import in_vocabulary, refuse_other_rows
from jobs.build_vocabulary import category_value
from jobs.cli import stage_main
from jobs.config import GateSettings
from jobs.drift import Alarm, Drift, alarms, drift_of, event_counts, reaches_back
from jobs.errors import TrailvecError
from jobs.habit import habit
from jobs.item_facts import item_verticals
from jobs.model_folders import check_items, is_stale, model_folder, model_inputs
from jobs.models import encode_sequences, stacked
from jobs.ranking import (
    FLOORS,
    MODELS,
    Cell,
    Following,
    Known,
    bootstrap,
    coverage,
    flagged,
    flatten,
    measures,
    sliced,
    top_items,
)
from jobs.runtime import Runtime, Stage
from jobs.spark_session import collect_sorted, drawn_by_hash
from jobs.splits import Cuts, before_cut, cut_of, cut_times, is_target, log_end, noted_cuts, refuse_leak, time_at
from jobs.tables import CONTEXT_VALUES, EVALUATION, ITEM_EMBEDDINGS, ITEMS, SEQUENCES, SESSIONS, events_of, of_model
from training.arrays import Bool, Float32, Float64, Int64
from training.batches import SAME_MOMENT, UNKNOWN
from training.checkpoint import read_description
from training.floors import ItemKnn, own_frequency, popularity

TASKS = ("next", "new", "repeat")
SPACE_SAMPLE, SPACE_NEIGHBOURS = 10_000, 10  # vectors sampled for `space`, at most; neighbours of each
DRIFT_SAMPLE = 2_000  # users encoded a second time, at most
KNN_USERS = 100_000  # about so many users' items train item-kNN; not a setting, like _DECAY in training/floors.py
_BLOCK_USERS, _BLOCK_SCORES = 256, 2**24  # 64 MB of scores at most, or one user's
_DEEPEST = 20
_BEYOND = 2**31  # the first number that no item can have
_LEADING = "ndcg@10"  # the metric of a model's lead over each floor

ScoreBlock = Callable[[slice], Float32]  # scores of all items, [users of the block, items]; callers may overwrite them


@dataclass(frozen=True)
class Catalogue:
    """The items that may be ranked. Arrays are [items]; position i is item number i."""

    vectors: Float32  # [items, width]
    target_counts: Int64

    @cached_property
    def rankable(self) -> Bool:
        """Whether the item had an event of a type that is to be predicted in the training window."""
        return self.target_counts > 0


@dataclass(frozen=True)
class Own:
    """The actions of each row's user before the cut, float [users, items] each."""

    counts: sp.csr_matrix
    habits: sp.csr_matrix


class Result(NamedTuple):
    """A row of EVALUATION, within a model and a split. low, high: None if the value is not a mean over users."""

    task: str
    cell: Cell
    value: float
    low: float | None
    high: float | None
    counted: int


# ---- rankings ----------------------------------------------------------------------------------------------------


def relevant_items(row: Any, task: str) -> tuple[list[int], float]:
    """(items, hours): the task's items that the row's user acted on at the first moment after the cut that has any, and
    how many hours after the cut that was; ([], NaN) if there is none."""
    seen = set(row.seen_item_index) - {UNKNOWN}
    pairs = list(zip(row.target_hours, row.target_item_index, strict=True))
    if task != "next":
        pairs = [(hours, item) for hours, item in pairs if (item in seen) == (task == "repeat")]
    return [item for hours, item in pairs if hours == pairs[0][0]], pairs[0][0] if pairs else math.nan


def following(rows: pd.DataFrame, task: str) -> Following:
    """What the users of the rows did next. Unknown items share a number in the rows; here each gets its own, beyond any
    catalogue's."""
    each = [relevant_items(row, task) for row in rows.itertuples()]
    items, offsets = flatten([np.asarray(found, np.int64) for found, _ in each])
    unknown = items == UNKNOWN
    items[unknown] = _BEYOND + np.arange(unknown.sum())
    return Following(items, offsets, np.array([hours for _, hours in each], np.float64))


def rank_users(rows: pd.DataFrame, scorers: dict[str, ScoreBlock], rankable: Bool) -> dict[tuple[str, bool], Int64]:
    """The best items of each row, int64 [rows, at most 20], by (method, whether the user's seen items are left out)."""
    found: dict[tuple[str, bool], list[Int64]] = {}
    at_once = max(1, min(_BLOCK_USERS, _BLOCK_SCORES // len(rankable)))
    for start in range(0, len(rows), at_once):
        block = slice(start, start + at_once)
        seen = [np.asarray(items, np.int64) for items in rows["seen_item_index"].iloc[block]]
        items, offsets = flatten(seen)
        users = np.repeat(np.arange(len(seen)), np.diff(offsets))
        within = items < len(rankable)
        for method, scorer in scorers.items():
            scores = scorer(block)
            scores[:, ~rankable] = -np.inf
            found.setdefault((method, False), []).append(top_items(scores, _DEEPEST))
            scores[users[within], items[within]] = -np.inf
            found.setdefault((method, True), []).append(top_items(scores, _DEEPEST))
    return {key: np.concatenate(blocks) for key, blocks in found.items()}


def model_scorer(rows: pd.DataFrame, catalogue: Catalogue) -> ScoreBlock:
    """The model's own score: the dot product of a row's `vector` and an item's."""
    vectors = stacked(rows["vector"])
    return lambda block: np.asarray(vectors[block] @ catalogue.vectors.T)


def histories(rows: pd.DataFrame, rankable: Bool, *, ordered: bool) -> tuple[list[Int64], list[Int64]]:
    """Each row's rankable items, oldest first, and a number for each item that is the same within a moment.

    Args:
        ordered: whether the order within a moment counts, so that each action has a number of its own.
    """
    items, moments = [], []
    for row in rows.itertuples():
        rankable_here = flagged(np.asarray(row.item_index), rankable)
        begins = np.asarray(row.gap_bucket) != SAME_MOMENT
        items.append(np.asarray(row.item_index)[rankable_here])
        moments.append(np.cumsum(begins | ordered)[rankable_here])
    return items, moments


def _scorers(rows: pd.DataFrame, own: Own, knn: ItemKnn, catalogue: Catalogue, split_by: str) -> dict[str, ScoreBlock]:
    counts = catalogue.target_counts
    # Leave-one-out asks for the last action by id, so there the order within a moment is part of the question.
    history, moments = histories(rows, catalogue.rankable, ordered=split_by == "leave_one_out")
    model = model_scorer(rows, catalogue)

    def model_and_habit(block: slice) -> Float32:
        scores, habits = model(block), own.habits[block].tocoo()
        scores[habits.row, habits.col] += habits.data  # few entries: adding the matrix would make all float64
        return scores

    return {
        "model": model,
        "model_and_habit": model_and_habit,
        "popularity": lambda block: popularity(counts, len(history[block])),
        "own_frequency": lambda block: own_frequency(own.counts[block], counts),
        "item_knn": lambda block: knn.scores(flatten(history[block])[0], *flatten(moments[block])),
    }


def ranking_results(
    rows: pd.DataFrame, ranked: dict[tuple[str, bool], Int64], known: Known, resamples: int
) -> Iterator[Result]:
    """The metrics of the rankings from `rank_users`, overall and by slice, with confidence intervals."""
    for task in TASKS:
        done = following(rows, task)
        has_targets = np.diff(done.offsets) > 0
        if not has_targets.any():
            continue
        values: dict[Cell, Float64] = {}
        for method in dict.fromkeys(method for method, _ in ranked):
            best = ranked[method, task == "new"]
            of_users = measures(best, done, known.counts)
            values |= {Cell(method, metric): each[has_targets] for metric, each in of_users.items()}
            for metric, kind, value, each in sliced(best, done, known, of_users):
                values[Cell(method, metric, kind, value)] = each[has_targets]
            share = coverage(best[has_targets][:, :10], int((known.counts > 0).sum()))
            yield Result(task, Cell(method, "coverage@10"), share, None, None, int(has_targets.sum()))
        for floor, model in itertools.product(FLOORS, MODELS):
            of_floor, of_model = (values.get(Cell(method, _LEADING)) for method in (floor, model))
            if of_floor is not None and of_model is not None:
                # Paired differences over the same users: more precise than comparing two intervals.
                values[Cell(floor, f"{model}_lead_{_LEADING}")] = of_model - of_floor
        values = {cell: each for cell, each in values.items() if not np.isnan(each).all()}
        low, high = bootstrap(np.column_stack(list(values.values())), resamples)
        for number, (cell, each) in enumerate(values.items()):
            counted = int((~np.isnan(each)).sum())
            yield Result(task, cell, float(np.nanmean(each)), float(low[number]), float(high[number]), counted)


# ---- the space ---------------------------------------------------------------------------------------------------


def space_results(users: Float32, items: Float32, counts: Int64, classes: Int64) -> Iterator[Result]:
    """Metrics of the vectors of a sample of users and of items, float32 [n, width] each.

    Args:
        counts, classes: how often each item was acted on, and the number of its category (-1: none), [n].
    """
    for name, vectors in (("items", items), ("users", users)):
        nonzero = vectors.any(axis=1)
        vectors = vectors[nonzero]  # noqa: PLW2901 - a zero vector has no direction
        if len(vectors) < 2:
            continue
        spreads = space.spread(vectors)
        near = space.neighbours(vectors, SPACE_NEIGHBOURS)
        figures = {
            "uniformity": space.uniformity(vectors),
            "dead_dimensions": space.dead_dimensions(spreads),
            "effective_dimensions": space.effective_dimensions(spreads),
            f"hubness@{SPACE_NEIGHBOURS}": space.hubness(near),
        }
        if name == "items":
            same, chance = space.share_same(near, classes[nonzero])
            figures |= {
                "norm_popularity": space.norm_popularity(vectors, counts[nonzero]),
                f"same_category@{SPACE_NEIGHBOURS}": same,
                "same_category_by_chance": chance,
            }
        for metric, value in figures.items():
            if not math.isnan(value):
                yield Result("space", Cell(name, metric), float(value), None, None, len(vectors))


def space_alignment(rows: pd.DataFrame, catalogue: Catalogue) -> Iterator[Result]:
    """How close users' vectors are to those of what they did next."""
    done = following(rows, "next")
    rankable = flagged(done.items, catalogue.rankable)
    users = stacked(rows["vector"])[done.owners[rankable]]
    value = space.alignment(users, catalogue.vectors[done.items[rankable]])
    if not math.isnan(value):
        yield Result("space", Cell("users_items", "alignment"), value, None, None, int(rankable.sum()))


# ---- drift -------------------------------------------------------------------------------------------------------


def drift_results(drift: Drift, raised: list[Alarm], resamples: int) -> Iterator[Result]:
    """Rows of the task `drift`; an alarm's metric is the limit that was broken."""

    def figure(method: str, metric: str, value: float, counted: int, vertical: str | None = None) -> Iterator[Result]:
        if not math.isnan(value):
            of = ("all", "all") if vertical is None else ("vertical", vertical)
            yield Result("drift", Cell(method, metric, *of), value, None, None, counted)

    yield from figure("events", "stability_index", drift.stability, drift.events)
    yield from figure("events", "new_items", drift.new_items, drift.events)
    for vertical, rate in drift.rates.items():
        yield from figure("events", "rate", rate, drift.counts[vertical], vertical)
    users = len(drift.cosines)
    yield from figure("users", "centroid_cosine", drift.centroid, users)
    if users:
        low, high = bootstrap(drift.cosines[:, None], resamples)
        yield Result("drift", Cell("users", "cosine"), drift.cosine, float(low[0]), float(high[0]), users)
    for alarm in raised:
        yield from figure("alarm", alarm.limit, alarm.value, drift.events, alarm.vertical)


def measure_drift(runtime: Runtime, rows: pd.DataFrame, cuts: Cuts, model_dir: Path) -> Drift:
    """The drift of the evaluated users' vectors from the cut to the log's end, and of events before and after the cut.

    Args:
        rows: what `evaluated_rows` returns.
    """
    sessions, cut = runtime.read(SESSIONS), cut_of(runtime.config.evaluate.split, cuts)
    counts = event_counts(sessions, runtime.read(ITEMS), cut, cuts.end).toPandas()
    if not (comparable := reaches_back(sessions, cut, cuts.end)):
        runtime.report.notes.append(
            f"no event rates of verticals are given: the log covers less time before the cut, {cut}, than after it"
        )
    sample = _by_hash(rows, DRIFT_SAMPLE)[["user_id", "vector"]]
    sampled_users = runtime.spark.createDataFrame(sample[["user_id"]], "user_id string")
    newest = runtime.read(SEQUENCES).where("split = 'score'").join(F.broadcast(sampled_users), "user_id", "left_semi")
    encoded = encode_sequences(runtime, newest, ["user_id"], model_dir=model_dir).toPandas()
    both = sample.merge(encoded[["user_id", "vector"]], on="user_id", suffixes=("_cut", "_end"))
    return drift_of(counts, stacked(both["vector_cut"]), stacked(both["vector_end"]), comparable=comparable)


# ---- the stage ---------------------------------------------------------------------------------------------------


def run(runtime: Runtime) -> None:
    settings = runtime.config.evaluate
    facts = model_inputs(runtime)  # before the model is read: if it changes meanwhile, the figures count as stale
    model_dir = model_folder(runtime)
    version = model_dir.name
    check_items(runtime, version)
    # Items that the model never saw in training are not ranked: the floors do not know them either.
    vectors = of_model(runtime.read(ITEM_EMBEDDINGS), version).where("NOT is_cold")
    rows = evaluated_rows(runtime, model_dir)
    catalogue = read_catalogue(runtime, vectors, version)
    noted = noted_cuts(runtime.last_writer(SEQUENCES))
    end = log_end(runtime.read(SESSIONS), "end_ts", since=noted)
    cuts = replace(noted, end=end) if noted else cut_times(end, runtime.config.sequences)
    results: list[Result] = []
    if len(rows):
        size = len(catalogue.target_counts)
        own, interactions = _interactions(runtime, rows[["user_id", "cut_us"]], size, cuts)
        scorers = _scorers(rows, own, ItemKnn(interactions), catalogue, runtime.config.sequences.split_by)
        ranked = rank_users(rows, scorers, catalogue.rankable)
        verticals = item_verticals(runtime.read(ITEMS))
        known = Known(catalogue.target_counts, *verticals, rows["history_length"].to_numpy())
        results += ranking_results(rows, ranked, known, settings.resamples)
        results += space_alignment(rows, catalogue)
    else:
        runtime.report.notes.append(f"table sequences has no row of split {settings.split}: nothing is ranked")
    drift = measure_drift(runtime, rows, cuts, model_dir)
    raised = alarms(drift, settings.drift)
    results += drift_results(drift, raised, settings.resamples)
    results += space_results(*_space_sample(runtime, rows, vectors))
    table = [(version, settings.split, r.task, *r.cell, r.value, r.low, r.high, r.counted) for r in results]
    frame = runtime.spark.createDataFrame(table, EVALUATION.schema()).coalesce(1)
    of_run = {"model_version": version, "split": settings.split}
    runtime.write(EVALUATION, frame, of=of_run, note={**facts, "split": settings.split})
    for task in TASKS:
        of = {r.cell.method: r for r in results if r.task == task and r.cell[1:] == ("ndcg@10", "all", "all")}
        runtime.report.notes.append(f"ndcg@10, {task}: " + ", ".join(f"{m} {r.value:.4f}" for m, r in of.items()))
    runtime.report.notes += [f"alarm: {alarm.message}" for alarm in raised]


def evaluated_rows(runtime: Runtime, model_dir: Path) -> pd.DataFrame:
    """The rows that a model is evaluated on, sorted by user_id: user_id, cut_us (microseconds since 1970), item_index,
    gap_bucket, seen_item_index, target_item_index, target_hours (since the cut), history_length (actions that the model
    reads), vector. Reads the stage's SEQUENCES.

    Raises:
        TrailvecError: the model in that folder is damaged, has learnt from what these rows ask about, or knows items by
            numbers other than today's; the rows were made with other settings; or evaluate.max_users drew nobody.
    """
    settings = runtime.config.evaluate
    refuse_other_rows(runtime, settings.split)
    hours = "transform(target_ts, t -> (unix_micros(t) - unix_micros(as_of)) / 3.6e9D)"
    rows = runtime.read(SEQUENCES).where(F.col("split") == settings.split)
    rows = rows.withColumn("target_hours", F.expr(hours)).withColumn("cut_us", F.unix_micros("as_of"))
    total, cut_us = rows.agg(F.count("*"), F.min("cut_us")).collect()[0]
    _refuse_leak(runtime, cut_us, model_dir)
    keep = ["user_id", "cut_us", "item_index", "gap_bucket", "seen_item_index", "target_item_index", "target_hours"]
    encoded = encode_sequences(runtime, _sample(rows, total, settings.max_users), keep, model_dir=model_dir)
    found = collect_sorted(encoded.drop("is_cold"), "user_id")
    if found.empty and total:
        raise TrailvecError(
            f"evaluate.max_users = {settings.max_users} drew none of the users of split {settings.split}: raise it"
        )
    return found


def _refuse_leak(runtime: Runtime, cut_us: int | None, model_dir: Path) -> None:
    """Raises TrailvecError if the model was trained past `cut_us`, the earliest cut of the rows (None: there are none),
    so that it knows what they ask about."""
    about, split = read_description(model_dir), runtime.config.evaluate.split
    if runtime.config.sequences.split_by == "leave_one_out":  # each user has their own cut, so as_of tells nothing
        settings = about.get("provenance", {}).get("config", {}).get("sequences", {})
        if settings.get("split_by") == "time":
            raise TrailvecError(
                f"model {model_dir.name} was trained with sequences.split_by = time, and has learnt the last action "
                f"of users who have not acted since: train one with leave_one_out, or set split_by back to time"
            )
        return
    if cut_us is not None:
        trained_to = datetime.fromisoformat(about["as_of"])
        later = f"set sequences.{split}_from to a later time"
        refuse_leak(model_dir.name, trained_to, time_at(cut_us), evaluator=f"split {split}", instead=later)


def _sample(rows: DataFrame, total: int, most: int, *salt: Column) -> DataFrame:
    """About `most` of the `total` rows at most, drawn by a hash of the user (and of `salt`)."""
    return rows if total <= most else rows.where(drawn_by_hash(most / total, "user_id", *salt))


def read_catalogue(runtime: Runtime, vectors: DataFrame, version: str) -> Catalogue:
    """The catalogue of a model's `vectors` (item_id, item_index, vector). Reads the stage's ITEMS.

    Raises:
        TrailvecError: `vectors` has none of today's items, or none that can be ranked.
    """
    counted = vectors.join(runtime.read(ITEMS), ["item_id", "item_index"])
    items = counted.select("item_index", "vector", "target_count").toPandas()
    if items.empty:
        raise TrailvecError(
            f"table item_embeddings has no vector of an item that model {version} knows: "
            f"run `trailvec embed_items` first"
        )
    index = items["item_index"].to_numpy()
    size, width = int(index.max()) + 1, len(items["vector"].iloc[0])
    matrix, counts = np.zeros((size, width), np.float32), np.zeros(size, np.int64)
    matrix[index] = stacked(items["vector"])
    counts[index] = items["target_count"]
    if not counts.any():
        types = runtime.config.sequences.target_event_types
        raise TrailvecError(
            f"no item that the model knows can be ranked: in training none has an event of "
            f"sequences.target_event_types = {json.dumps(types)}: correct this setting"
        )
    return Catalogue(matrix, counts)


def _space_sample(runtime: Runtime, rows: pd.DataFrame, vectors: DataFrame) -> tuple[Float32, Float32, Int64, Int64]:
    """The arguments of `space_results`, from at most SPACE_SAMPLE users and items each, drawn by a hash of the id."""
    users = _by_hash(rows, SPACE_SAMPLE)["vector"]
    sample = item_sample(runtime, vectors, "vector", "target_count", category_value().alias("category"))
    counts, classes = sample["target_count"].to_numpy(np.int64), pd.factorize(sample["category"])[0]
    return stacked(users), stacked(sample["vector"]), counts, classes


def item_sample(runtime: Runtime, vectors: DataFrame, *columns: str | Column) -> pd.DataFrame:
    """Those columns of ITEMS and of a model's `vectors`, for items that can be ranked: at most SPACE_SAMPLE, ordered by
    a hash of the id."""
    items = vectors.join(runtime.read(ITEMS).where("target_count > 0"), ["item_id", "item_index"])
    return items.orderBy(F.xxhash64("item_id"), "item_id").limit(SPACE_SAMPLE).select(*columns).toPandas()


def _by_hash(rows: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most `most` of the rows, ordered by a hash of their users."""
    hashes = pd.util.hash_pandas_object(rows["user_id"], index=False).to_numpy()
    return rows.iloc[np.argsort(hashes, kind="stable")[:most]]


def _interactions(runtime: Runtime, users: pd.DataFrame, items: int, cuts: Cuts) -> tuple[Own, sp.csr_matrix]:
    """What the users (user_id, cut_us) did before their cuts; and how often each user of a sample of all users acted on
    each item in the training window, [sample, items]."""
    settings, split = runtime.config.sequences, runtime.config.evaluate.split
    sessions = runtime.read(SESSIONS)
    vocabulary = in_vocabulary(runtime.read(ITEMS), runtime.config.vocabulary.min_count).select("item_id", "item_index")
    evaluated_users = F.broadcast(runtime.spark.createDataFrame(users))

    def actions(sessions: DataFrame) -> DataFrame:
        # Only leave-one-out needs the id, to order a user's last two events.
        ordered = ("event_id",) if settings.split_by == "leave_one_out" else ()
        events = events_of(sessions, "item_id", "event_ts", "event_type", *ordered)
        events = events.withColumns({f"in_{name}": before_cut(name, cuts, settings) for name in ("train", split)})
        numbered = events.where(is_target(settings.target_event_types)).join(vocabulary, "item_id")
        numbered = numbered.where(F.col("item_index") < items)
        # Sessions may be newer than the rows: leave out what a row asks about.
        numbered = numbered.join(evaluated_users, "user_id", "left")
        return numbered.where(F.col("cut_us").isNull() | (F.unix_micros("event_ts") < F.col("cut_us")))

    def of(some: DataFrame) -> DataFrame:
        """The sessions of some users, so that no others' events are processed."""
        return sessions.join(F.broadcast(some.select("user_id")), "user_id", "left_semi")

    def matrices(rows: DataFrame, names: list[str], **values: Column) -> list[sp.csr_matrix]:
        """A matrix for each aggregate of `values`, over a user's rows of an item: [users in `names`, items]."""
        found = rows.groupBy("user_id", "item_index").agg(*[v.alias(name) for name, v in values.items()]).toPandas()
        places = found["user_id"].map({name: n for n, name in enumerate(names)}), found["item_index"]
        return [sp.csr_matrix((found[name], places), shape=(len(names), items)) for name in values]

    visible = actions(of(evaluated_users)).where(f"in_{split}")
    of_habit = habit(runtime.config.habit, F.col("cut_us"))
    own = Own(*matrices(visible, users["user_id"].tolist(), counts=F.count("*"), habits=of_habit))
    # Counted and then sampled: without the checkpoint, the log would be read for each.
    everybody = actions(sessions).where("in_train").select("user_id").distinct().localCheckpoint()
    total = everybody.count()
    # Salted: by the hash that draws the evaluated users, all of them would be in this sample too.
    sampled_users = _sample(everybody, total, KNN_USERS, F.lit("item_knn"))
    names = sorted(row.user_id for row in sampled_users.collect())
    if len(names) < total:
        runtime.report.notes.append(f"item_knn learnt from {len(names):,} of {total:,} users, a sample")
    return own, *matrices(actions(of(sampled_users)).where("in_train"), names, counts=F.count("*"))


# ---- the gate ----------------------------------------------------------------------------------------------------


def refusal(runtime: Runtime, version: str) -> str | None:
    """Why the model must not become current, in one sentence; None if it passes every row named by `evaluate.gate`."""
    settings = runtime.config.evaluate
    if not settings.gate:
        return None
    runtime.create(EVALUATION)
    if is_stale(runtime, EVALUATION, split=settings.split):
        return (
            f"model {version} must not become current (evaluate.gate): it was trained or aligned again after it was "
            f"evaluated: run `trailvec evaluate` first"
        )
    rows = of_model(runtime.latest(EVALUATION), version).where(F.col("split") == settings.split)
    found = {(r["task"], Cell.of(r)): r for r in rows.collect()}
    reasons = []
    for criterion in settings.gate:
        cell = Cell(criterion.method, criterion.metric, criterion.slice, criterion.slice_value)
        row = found.get((criterion.task, cell))
        name = " ".join((criterion.task, *(word for word in cell if word != "all")))
        if row is None:
            reasons.append(f"table evaluation has no row for its {name} in split {settings.split}")
            continue
        reasons += [f"{name} {why}" for why in shortfalls(row.asDict(), criterion)]
    if not reasons:
        return None
    return (
        f"model {version} must not become current (evaluate.gate): {'; '.join(reasons)}: run `trailvec evaluate` if "
        f"it has not run, else see its page (from `trailvec write_report`) and train another model or change the gate"
    )


def shortfalls(row: dict[str, Any], criterion: GateSettings) -> Iterator[str]:
    """How a row of EVALUATION falls short of a gate. An interval that ends exactly at a limit is level with it and does
    not pass; the page calls it level too."""
    value, low, high = row["value"], row["low"], row["high"]
    if low is None:
        if criterion.at_least is not None and not value >= criterion.at_least:
            yield f"is {value:.4f}, not at least {criterion.at_least:g}"
        if criterion.at_most is not None and not value <= criterion.at_most:
            yield f"is {value:.4f}, not at most {criterion.at_most:g}"
        return
    if row["counted"] < criterion.min_users:
        yield f"covers {row['counted']:,} users, fewer than min_users = {criterion.min_users:,}"
        return
    text = f"is {value:.4f} ({low:.4f} to {high:.4f}), not significantly"
    if criterion.at_least is not None and not low > criterion.at_least:
        yield f"{text} above {criterion.at_least:g}"
    if criterion.at_most is not None and not high < criterion.at_most:
        yield f"{text} below {criterion.at_most:g}"


def _inputs(runtime: Runtime) -> dict[str, Any]:
    # No row depends on the gate: score_users checks it against the rows whenever it runs.
    settings = runtime.config.evaluate.model_dump(mode="json", exclude={"gate"})
    return {**model_inputs(runtime), "evaluate": settings}


STAGE = Stage(
    "evaluate",
    "rank the catalogue for the test users, by the model and by baselines",
    run,
    reads=(SEQUENCES, SESSIONS, ITEMS, CONTEXT_VALUES, ITEM_EMBEDDINGS),
    writes=(EVALUATION,),
    settings=("habit", "sequences", "vocabulary"),
    also="It also reads the model. Of [evaluate], all but the gate changes its result.",
    inputs=_inputs,
)


def main() -> None:
    stage_main("evaluate")


if __name__ == "__main__":
    main()
