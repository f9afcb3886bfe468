"""probe: labels + sessions + items + the model → probes.

Measures how well the frozen vectors predict what the model never saw: light heads are trained on them and, for
comparison, on baseline features. Labels come from the configured table and from the log itself (inactivity, a new
vertical, an event type within the last `probe.days`).

Each labelled user has a cut: the label's time, the start of the prediction window of a task from the log, or else the
log's end. All features use only events strictly before the cut. So does the vector: it is re-encoded from the actions
before the cut, laid out as `build_sequences` would. (The test rows of `sequences` won't do: users who did nothing after
the cut have none.) The profile is computed by the functions of `profile_users`, with a basis fitted on data from before
the cuts.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from jobs.cli import stage_main
from jobs.config import ProbeSettings
from jobs.errors import TrailvecError
from jobs.files import Place
from jobs.model_folders import model_folder, model_inputs
from jobs.profile_users import (
    OF_EVENTS,
    before,
    fit,
    item_numbers,
    numbered,
    profile_rows,
    rfm,
    states,
    statistics,
)
from jobs.runtime import Runtime, Stage
from jobs.spark_session import persisted
from jobs.splits import is_target, log_end, refuse_leak, time_at, utc
from jobs.sql import UNSEEN, ask, names_the_time, sources_of
from jobs.tables import CONTEXT_VALUES, ITEMS, PROBES, SESSIONS, TABLES, events_of
from jobs.user_lists import as_ids, copies, file_digest, read_rows
from spark_udfs.profile import profiles
from training.arrays import Int64
from training.checkpoint import read_description

if TYPE_CHECKING:
    from training.probes import Labels, Matrix

_QUERY = "the query of probe.labels"
FEATURES = ("vector", "profile", "majority", "rfm", "tfidf_svd", "aggregates")
_TOP = 10  # the aggregates count the most frequent values of each column, per event type
_WINDOWS = {"1": 1.0, "7": 7.0, "30": 30.0, "ever": math.inf}  # days before the cut, by name
_COLUMNS = ("vertical", "category", "item_id")


# ---- labels --------------------------------------------------------------------------------------------------------


def activity_labels(events: DataFrame, cut: datetime, targets: list[str], settings: ProbeSettings) -> DataFrame:
    """user_id, task, label for the tasks labelled from the log, for users with a target action before the cut.

    Args:
        targets: event types that count as activity; empty: all.
    """
    early, predicted = F.col("event_ts") < utc(cut), is_target(targets)
    per_user = events.groupBy("user_id").agg(
        F.count_if(early & predicted).alias("before"),
        F.count_if(~early & predicted).alias("after"),
        F.collect_set(F.when(early & predicted, F.col("vertical"))).alias("verticals_before"),
        F.collect_set(F.when(~early & predicted, F.col("vertical"))).alias("verticals_after"),
        F.collect_set(F.when(~early, F.col("event_type"))).alias("types_after"),
    )
    answers: dict[str, Column] = {
        "inactive": F.col("after") == 0,
        "new_vertical": F.size(F.array_except("verticals_after", "verticals_before")) > 0,
    }
    tasks: dict[str, Column] = {name: answers[name] for name in settings.activity}
    tasks |= {name: F.array_contains("types_after", name) for name in settings.event_types}
    rows = F.array(*[F.struct(F.lit(n).alias("task"), a.cast("int").alias("label")) for n, a in tasks.items()])
    return per_user.where("before > 0").select("user_id", F.explode(rows).alias("row")).select("user_id", "row.*")


def read_labels(runtime: Runtime, folder: Place) -> DataFrame:
    """user_id, task, label (int), label_ts (timestamp, NULL if not given), read as probe.labels says.

    Args:
        folder: as for `read_rows`.

    Raises:
        TrailvecError: a column is missing, a user_id or a task is blank, a label is neither 0 nor 1, a label_ts is not
            a time before the year 9999, a user has two labels for one task, only some labels of a task have a time, or
            a task has the name of one labelled from the log.
    """
    settings = runtime.config.probe
    labels = settings.labels
    assert labels is not None
    if labels.sql is not None:
        where, found = _QUERY, ask(runtime, labels.sql, _QUERY)
    else:
        where, found = f"probe.labels, {labels.file},", read_rows(runtime, Path(str(labels.file)), folder)
    if missing := {"user_id", "task", "label"} - set(found.columns):
        raise TrailvecError(
            f"{where} has no column {', '.join(sorted(missing))} (found {', '.join(found.columns)}): add it"
        )
    label_time = F.col("label_ts") if "label_ts" in found.columns else F.lit(None)
    rows = found.select(
        as_ids(found, where),
        F.col("task").cast("string"),
        F.col("label").cast("double").alias("label"),
        label_time.cast("timestamp").alias("label_ts"),
        label_time.isNotNull().alias("has_time"),
    )
    label, time = F.col("label"), F.col("label_ts")
    beyond = time >= utc(datetime(9999, 1, 1))  # e.g. milliseconds: numbers are read as seconds
    checked = rows.groupBy("user_id", "task").agg(
        F.count_if(label.isNull() | ~label.isin(0, 1)).alias("bad"),
        F.count_if(F.col("has_time") & (time.isNull() | beyond)).alias("no_time"),
        F.count("*").alias("rows"),
    )
    for condition, what in (
        ("coalesce(trim(user_id), '') = '' OR coalesce(trim(task), '') = ''", "with a blank user_id or task"),
        ("bad > 0", "that is neither 0 nor 1"),
        ("no_time > 0", "whose label_ts is not a time (such as 2017-01-31 08:00:00, or a whole number of seconds)"),
        ("rows > 1", "that is given more than once"),
    ):
        # Not who: an error ends in logs that others keep.
        if wrong := checked.where(condition).groupBy("task").agg(F.count("*").alias("users")).orderBy("task").take(1):
            raise TrailvecError(
                f"{where} has a label {what} (task {wrong[0]['task']}, users: {wrong[0]['users']:,}): correct it"
            )
    per_task = rows.groupBy("task").agg(F.count("label_ts").alias("timed"), F.count("*").alias("labels"))
    for row in per_task.orderBy("task").collect():
        if row["task"] in (*settings.activity, *settings.event_types):
            raise TrailvecError(
                f"{where} has labels of task {row['task']}, which probe.activity or probe.event_types takes from "
                f"the log: rename the task of the labels"
            )
        if 0 < row["timed"] < row["labels"]:
            raise TrailvecError(
                f"{where} has a label_ts for {row['timed']:,} of the {row['labels']:,} labels of task {row['task']}: "
                f"give one for all of them or for none"
            )
    return rows.select("user_id", "task", label.cast("int").alias("label"), "label_ts")


# ---- features: the driver collects one row per labelled user, or one count per user and value ----------------------


def aggregates(visible: DataFrame, items: DataFrame) -> DataFrame:
    """user_id, name, value: typical hand-crafted features, in long form.

    For each event type, log counts of all events and of its ten most frequent verticals, categories and items, within
    1, 7 and 30 days before the cut and at any time before it.
    """
    named = visible.join(items.select("item_id", "category"), "item_id", "left")
    values = F.array(
        F.struct(F.lit("all").alias("column"), F.lit("").alias("value")),
        *[F.struct(F.lit(name).alias("column"), F.col(name).alias("value")) for name in _COLUMNS],
    )
    long = named.select("user_id", "event_type", "days", F.explode(values).alias("is")).select(
        "user_id", "event_type", "days", "is.*"
    )
    what = ["event_type", "column", "value"]
    order = Window.partitionBy("event_type", "column").orderBy(F.desc("count"), "value")
    counted = long.where("value IS NOT NULL").groupBy(*what).count()
    top = counted.withColumn("place", F.row_number().over(order)).where(F.col("place") <= _TOP).select(*what)
    counts = (
        long.join(F.broadcast(top), what)
        .groupBy("user_id", *what)
        .agg(
            F.array(
                *[
                    F.struct(F.lit(name).alias("within"), F.log1p(F.count_if(F.col("days") <= days)).alias("count"))
                    for name, days in _WINDOWS.items()
                ]
            ).alias("counts")
        )
    )
    each = counts.select("user_id", *what, F.explode("counts").alias("of")).select("user_id", *what, "of.*")
    return each.select("user_id", F.concat_ws("|", *what, "within").alias("name"), F.col("count").alias("value"))


def matrix(rows: pd.DataFrame, users: list[str], name: str, value: str) -> sp.csr_matrix:
    """Long-form rows (user_id, `name`, `value`) as a sparse float64 matrix [users, names], the names sorted."""
    places = pd.Series(np.arange(len(users)), index=users)
    columns, names = pd.factorize(rows[name], sort=True)
    shape = (len(users), max(1, len(names)))
    return sp.csr_matrix((rows[value].astype(float).fillna(0), (places[rows["user_id"]], columns)), shape=shape)


# ---- the stage -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """Tasks whose users share their cuts.

    Attributes:
        labels: user_id, task, label, cut (microseconds), on the driver.
        cuts: user_id, cut: the labelled users, and others from whose items the item baseline learns.
    """

    labels: pd.DataFrame
    cuts: DataFrame


def questions(runtime: Runtime, sessions: DataFrame, end: datetime) -> list[Question]:
    """One question for the tasks from the log, one for the labels without a time, one per task with timed labels."""
    settings, found = runtime.config.probe, []

    def add(labels: DataFrame, cut: Column, others: datetime) -> None:
        bucket = F.pmod(F.xxhash64("user_id"), F.lit(1_000_000))  # puts users in the same order in every sample
        with persisted(labels.select("user_id", "task", "label", cut.alias("cut"))) as of_tasks:
            # One query per task: a window by task would send all users of a task to one Spark task to be sorted.
            drawn = [
                of_tasks.where(F.col("task") == row["task"])
                .orderBy(bucket, "user_id")
                .limit(settings.max_users)
                .select("user_id", "task", "label", F.unix_micros("cut").alias("cut"))
                .toPandas()
                for row in of_tasks.select("task").distinct().orderBy("task").collect()
            ]
        if not drawn:
            return
        frame = pd.concat(drawn, ignore_index=True)
        labelled = frame[["user_id", "cut"]].drop_duplicates()
        labelled_cuts = runtime.spark.createDataFrame(labelled).select(
            "user_id", F.timestamp_micros("cut").alias("cut")
        )
        more = max(0, settings.max_users - len(labelled))
        rest = sessions.where(F.col("start_ts") < utc(others)).select("user_id").distinct()
        rest = rest.join(labelled_cuts, "user_id", "left_anti").orderBy(bucket, "user_id").limit(more)
        found.append(Question(frame, F.broadcast(labelled_cuts.union(rest.select("user_id", utc(others))))))

    if settings.activity or settings.event_types:
        cut = end - timedelta(days=settings.days)
        targets = runtime.config.sequences.target_event_types
        events = events_of(sessions, "event_ts", "event_type", "vertical")
        add(activity_labels(events, cut, targets, settings), utc(cut), cut)
        if not found:
            runtime.report.notes += [
                f"{task} is not probed: no user has an event of sequences.target_event_types before the log's "
                f"last {settings.days:g} days (probe.days)"
                for task in (*settings.activity, *settings.event_types)
            ]
    if settings.labels is not None:
        with copies(runtime.staging("labels")) as folder:
            labels = read_labels(runtime, folder).localCheckpoint()
        add(labels.where("label_ts IS NULL"), utc(end), end)
        timed = labels.where("label_ts IS NOT NULL")
        first = timed.groupBy("task").agg(F.unix_micros(F.min("label_ts")).alias("first")).orderBy("task").collect()
        for row in first:
            add(timed.where(F.col("task") == row["task"]), F.col("label_ts"), time_at(row["first"]))
    return found


def features_of(
    runtime: Runtime, sessions: DataFrame, question: Question, model_dir: Path, end: datetime
) -> tuple[list[str], dict[str, Matrix]]:
    """The labelled users, sorted, and their FEATURES, float64 [users, width] each, from events before the cuts."""
    from training import probes  # noqa: PLC0415 - only this stage needs scikit-learn

    targets = runtime.config.sequences.target_event_types
    labelled = sorted(set(question.labels["user_id"]))
    labelled_ids = F.broadcast(runtime.spark.createDataFrame(pd.DataFrame({"user_id": labelled})))

    def of_labelled(rows: DataFrame) -> Matrix:
        """Zeros for users without events before their cut (`unknown_notes`)."""
        found = rows.toPandas()
        of_user = dict(zip(found["user_id"], found["vector"], strict=True))
        width = len(next(iter(of_user.values()))) if of_user else 1
        return np.stack([np.asarray(of_user.get(user, np.zeros(width)), np.float64) for user in labelled])

    with (
        persisted(question.cuts) as cuts,
        persisted(before(events_of(sessions, *OF_EVENTS), cuts)) as visible,
        persisted(states(runtime, sessions, cuts, model_dir, end)) as encoded,
        persisted(statistics(visible, targets)) as stats,
    ):
        counts = visible.groupBy("user_id", "item_id").count().toPandas()
        known = set(counts["user_id"])
        runtime.report.notes += unknown_notes(question.labels, known)
        everybody = labelled + sorted(known - set(labelled))
        items = probes.tfidf_svd(matrix(counts, everybody, "item_id", "count"))[: len(labelled)]
        visible_labelled = visible.join(labelled_ids, "user_id")
        numbers = item_numbers(runtime)
        basis = fit(runtime, visible, encoded, numbers=numbers, stats=stats)
        encoded_labelled = encoded.join(labelled_ids, "user_id")
        stats_labelled = numbered(stats.join(labelled_ids, "user_id"), basis.names)
        profile = of_labelled(
            profiles(profile_rows(visible_labelled, encoded_labelled, numbers, stats_labelled), basis)
        )
        vector = of_labelled(encoded_labelled.select("user_id", "vector"))
        by_hand = matrix(
            aggregates(visible_labelled, runtime.read(ITEMS)).toPandas(), labelled, "name", "value"
        ).toarray()
        five = rfm(visible_labelled, targets).toPandas().set_index("user_id").reindex(labelled)
        numbers_of = five.fillna({"recency": five["recency"].max()}).fillna(0.0).to_numpy(np.float64)
    return labelled, {
        "vector": vector,
        "profile": profile,
        "majority": np.zeros((len(labelled), 1)),
        "rfm": probes.standardised(numbers_of),
        "tfidf_svd": items,
        "aggregates": probes.standardised(np.asarray(by_hand, np.float64)),
    }


def unknown_notes(labels: pd.DataFrame, known: set[str]) -> Iterator[str]:
    """Notes on the question's tasks with users who are not among the `known`, those with an event before their cut."""
    for task, rows in labels.groupby("task"):
        if unknown := int((~rows["user_id"].isin(known)).sum()):
            yield (
                f"{unknown:,} of {len(rows):,} labelled users of {task} have no event before their label: their "
                f"features are all the same, so each AUC also says how well having no event predicts the label; are "
                f"their ids written as in the events? If so, leave them out"
            )


def rarer(labels: Any) -> int:
    """The count of the rarer label, 0 or 1."""
    return int(min(np.bincount(labels, minlength=2)))


def labels_and_times(rows: pd.DataFrame) -> tuple[Labels, Int64 | None]:
    """A task's labels and their times in microseconds; None if all times are equal: then there is no split by time."""
    times = rows["cut"].to_numpy(np.int64) if rows["cut"].nunique() > 1 else None
    return rows["label"].to_numpy(np.int64), times


def fold_notes(labels: pd.DataFrame, settings: ProbeSettings) -> Iterator[str]:
    """Notes on the question's tasks for which some folds don't count."""
    from training import probes  # noqa: PLC0415

    for task, rows in labels.groupby("task"):
        answers, times = labels_and_times(rows)
        if rarer(answers) < settings.folds:
            continue
        counted = len(list(probes.folds_of(answers, times, settings.folds, 0)))
        if not counted:
            yield f"{task} is not probed: no fold by label_ts has both labels in its training and its test part"
        elif counted < settings.folds:
            yield (
                f"{task}: {counted} of {settings.folds} folds by label_ts counted: the others lack one of the labels "
                f"in their training or test part"
            )


class Result(NamedTuple):
    """A row of PROBES without its model."""

    task: str
    features: str
    head: str
    metric: str
    value: float
    std: float
    users: int
    positives: int


def results_of(
    labels: pd.DataFrame, users: list[str], features: dict[str, Matrix], settings: ProbeSettings
) -> Iterator[Result]:
    """The results of one question.

    Args:
        labels: user_id, task, label, cut (microseconds).
    """
    from training import probes  # noqa: PLC0415

    place = {user: number for number, user in enumerate(users)}
    for task, rows in labels.groupby("task"):
        chosen = rows["user_id"].map(place).to_numpy()
        answers, times = labels_and_times(rows)
        if rarer(answers) < settings.folds:
            continue  # too few for every fold to have both labels
        for name, of in features.items():
            for head in ("majority",) if name == "majority" else settings.heads:
                found = probes.probe(of[chosen], answers, head, folds=settings.folds, seeds=settings.seeds, times=times)
                for metric, values in found.items():
                    if values:
                        value, std = float(np.mean(values)), float(np.std(values))
                        yield Result(str(task), name, head, metric, value, std, len(rows), int(answers.sum()))


def run(runtime: Runtime) -> None:
    settings, model_dir = runtime.config.probe, model_folder(runtime)
    if settings.labels is None and not settings.activity and not settings.event_types:
        raise TrailvecError(
            "there is nothing to probe: set probe.labels to a source of labels, or probe.activity or probe.event_types "
            "to tasks labelled from the log itself"
        )
    sessions = runtime.read(SESSIONS)
    end = log_end(sessions, "end_ts")
    trained_to = datetime.fromisoformat(read_description(model_dir)["as_of"])
    labels_from = end - timedelta(days=settings.days)
    if settings.activity or settings.event_types:
        evaluator = f"probe.days = {settings.days:g}"
        refuse_leak(model_dir.name, trained_to, labels_from, evaluator=evaluator, instead="lower probe.days")
    # Check all questions before any of the slow work starts.
    probed: list[Question] = []
    for question in questions(runtime, sessions, end):
        rarer_counts = question.labels.groupby("task")["label"].agg(rarer)
        runtime.report.notes += [
            f"{task} is not probed: users with its rarer label: {count:,}, fewer than probe.folds = {settings.folds}"
            for task, count in rarer_counts[rarer_counts < settings.folds].items()
        ]
        if (rarer_counts < settings.folds).all():  # the features would be computed for nothing
            continue
        tasks = sorted(set(question.labels["task"]))
        evaluator, earliest = f"a label of {', '.join(tasks)}", time_at(int(question.labels["cut"].min()))
        refuse_leak(model_dir.name, trained_to, earliest, evaluator=evaluator, instead="leave out such labels")
        probed.append(question)
    results: list[Result] = []
    for question in probed:
        names = ", ".join(sorted(set(question.labels["task"])))
        runtime.on_progress(f"features for {names}")
        users, features = features_of(runtime, sessions, question, model_dir, end)
        runtime.on_progress(f"heads for {names}")
        results += results_of(question.labels, users, features, settings)
        runtime.report.notes += fold_notes(question.labels, settings)
    rows = [(model_dir.name, *result) for result in results]
    frame = runtime.spark.createDataFrame(rows, PROBES.schema()).coalesce(1)
    runtime.write(PROBES, frame, of={"model_version": model_dir.name})
    for task in dict.fromkeys(result.task for result in results):
        best: dict[str, tuple[float, float]] = {}
        for name in FEATURES:
            of_heads = (r for r in results if (r.task, r.features, r.metric) == (task, name, "auc"))
            scores = [(result.value, result.std) for result in of_heads]
            best |= {name: max(scores)} if scores else {}
        runtime.report.notes.append(f"auc, {task}: " + ", ".join(f"{n} {v:.3f}±{s:.3f}" for n, (v, s) in best.items()))


def _inputs(runtime: Runtime) -> dict[str, Any]:
    labels = runtime.config.probe.labels
    facts: dict[str, Any] = {**model_inputs(runtime)}
    if labels is not None and labels.file is not None:
        facts["labels"] = file_digest(Path(labels.file))
    if labels is not None and labels.sql is not None:
        answer = ask(runtime, labels.sql, _QUERY)
        read = sources_of(runtime, answer)
        names = UNSEEN | read.tables - {PROBES.name}  # which this stage writes itself
        facts["tables"] = {t.name: runtime.state(t) for t in TABLES if t.name in names and runtime.exists(t)}
        if read.files is not None or read.others or names_the_time(labels.sql, answer):
            facts["run"] = uuid.uuid4().hex  # nothing tells whether the answer is still the same, so ask each time
    return facts


STAGE = Stage(
    "probe",
    "measure how well the vectors predict what the model never saw, compared with baselines",
    run,
    reads=(SESSIONS, ITEMS, CONTEXT_VALUES),
    writes=(PROBES,),
    settings=("probe", "profile", "sequences", "vocabulary"),
    also="It also reads the model and the labels. With labels by a query that reads files, tables that are not "
    "trailvec's or the current time, it is never skipped.",
    inputs=_inputs,
)


def main() -> None:
    stage_main("probe")


if __name__ == "__main__":
    main()
