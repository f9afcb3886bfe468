"""train: sequences, items, context_values → a model.

Writes no table, but the folder `models/<model_version>` (its content: training/checkpoint.py) and then
`models/current.json`, which names the newest trained model. Later stages use that one, unless `model.version` names
another. (The table current_model names the model for which all users have vectors.) A model's version is the
fingerprint of its inputs, so running the same command again finds the model and trains nothing.

The training processes (training/loop.py, started by jobs/launch_training.py) read the data files of the pinned
snapshot, never the table's folder, which also has files of older versions; HDFS is read over WebHDFS
(training/stores.py). `models/<model_version>_<tables>.checkpoints` (of a forced training: `….forced.checkpoints`)
exists while they run. After a kill it stays until the same command has resumed from it, over the tables as they were
when the training began, or finds that they can't be read at those versions any more.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from deltalake import DeltaTable
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs import pictures
from jobs.build_sequences import SHARED_SETTINGS, in_vocabulary, other_setting, refuse_other_counts
from jobs.cli import stage_main
from jobs.config import Config
from jobs.errors import TrailvecError
from jobs.files import HadoopPath, Place, published, remove_replaced, shared_url, write_json
from jobs.item_facts import attribute_matrix, item_attributes, item_counts, item_verticals
from jobs.launch_training import FORCED, launch, launch_in_spark
from jobs.model_card import card
from jobs.model_folders import all_models, check_numbers, description, has_model, model_folder, other_numbers
from jobs.runtime import Runtime, Stage
from jobs.splits import noted_cuts, time_at
from jobs.tables import CONTEXT_VALUES, ITEMS, SEQUENCES
from jobs.tracking import Tracker, tracked
from training.batches import BUCKET_SIZES, FEATURES, FIRST_INDEX
from training.checkpoint import PROGRESS, WEIGHTS, read_about, read_description
from training.config import ModelSpec, RunSpec, TrainSettings
from training.stores import remove_tree, row_groups
from training.urls import file_of_table, file_url, local_path

SECONDS_BETWEEN_LINES = 10.0
FROM_SCRATCH = "set train.warm_start = false to train from scratch"
BEGUN = "begun.json"  # among the checkpoints: the provenance of their training
TRACKED = ("loss", "learning_rate", "rows_per_second", "padding", "data_wait", "recall@10", "ndcg@10")


def model_spec(config: Config, items: int, context_values: DataFrame) -> ModelSpec:
    """The model's sizes, from the configuration and the vocabularies."""
    found = context_values.groupBy("kind").agg((F.max("value_index") + 1).alias("size")).collect()
    sizes = dict.fromkeys(("category", "vertical", "event_type"), FIRST_INDEX)  # of vocabularies without values
    sizes |= {row["kind"]: row["size"] for row in found}
    settings = config.train.model_dump(include=set(ModelSpec.model_fields))
    attribute_sizes = {
        "category": sizes["category"],
        "vertical": sizes["vertical"],
        "price": BUCKET_SIZES["price_bucket"],
    }
    context_sizes = {
        "event_type_index": sizes["event_type"],
        "vertical_index": sizes["vertical"],
        **BUCKET_SIZES,
    }
    return ModelSpec(
        **settings,
        max_length=config.sequences.max_length,
        items=items,
        sparse=config.train.row_wise(items),
        context_sizes={name: context_sizes[name] for name in config.train.inputs},
        attribute_sizes={name: attribute_sizes[name] for name in config.train.item_attributes},
    )


def event_types_to_predict(config: Config, items: DataFrame, context_values: DataFrame) -> list[int] | None:
    """The numbers of `sequences.target_event_types`; None: all types.

    Raises:
        TrailvecError: no item that a model would know has an event of these types in training.
    """
    types = config.sequences.target_event_types
    if not types:
        return None
    if in_vocabulary(items, config.vocabulary.min_count).where("target_count > 0").isEmpty():
        raise TrailvecError(
            f"there is nothing to predict: no item that a model would know has an event of "
            f"sequences.target_event_types = {json.dumps(types)} in the training window: correct this setting"
        )
    of_types = context_values.where((F.col("kind") == "event_type") & F.col("value").isin(types))
    return sorted(row["value_index"] for row in of_types.collect())


def snapshot_files(table: str, version: int, split: str) -> list[str]:
    """URLs (training.urls.file_url) of the split's active data files in that version of the table, sorted."""
    uris = DeltaTable(local_path(table) or table, version).file_uris([("split", "=", split)])
    return sorted(file_url(file_of_table(uri)) for uri in uris)


def split_files(runtime: Runtime, split: str) -> list[str]:
    """As `snapshot_files`, for the pinned snapshot of SEQUENCES, as URLs that the training processes can read."""
    table = runtime.path(SEQUENCES)
    if isinstance(runtime.place, Path):
        return snapshot_files(table, runtime.version(SEQUENCES), split)
    # delta-rs doesn't support hdfs://. Spark's list may include files of other splits.
    files = map(file_of_table, runtime.read(SEQUENCES).where(F.col("split") == split).inputFiles())
    home = shared_url(HadoopPath(table))
    return sorted(home + file.removeprefix(table) for file in files if file.startswith(f"{table}/split={split}/"))


def training_files(runtime: Runtime) -> dict[str, list[str]]:
    """URLs of the data files that hold exactly the rows of the train and valid splits.

    Petastorm ignores deletion vectors, so files with deleted rows are rewritten first: once per training, rather than
    in every increment of build_sequences.

    Raises:
        TrailvecError: another run changes the table meanwhile.
    """
    if not runtime.went_back:  # that version has already been purged
        runtime.purge(SEQUENCES, "split IN ('train', 'valid')")
        runtime.read_after_upkeep(SEQUENCES)
    return {split: split_files(runtime, split) for split in ("train", "valid")}


def base_of(runtime: Runtime) -> str | None:
    """The version of the model for a warm start; None: train from scratch.

    `model.version`, if set; else the current model, rather than a newer one that `align` or the gate refused; else, if
    no model is current yet, the newest. If the model in use was made by this same command, the result is that model's
    own base, not the model: so repeating the command finds its model and trains nothing.

    Raises:
        TrailvecError: the model in use is gone, or the base model uses numbers from tables that have been removed
            since.
    """
    if not runtime.config.train.warm_start or not (runtime.models / "current.json").exists():
        return None
    missing = f"{FROM_SCRATCH}, or name one of them to continue from, for this command alone: --set model.version=..."
    about = read_about(model_folder(runtime, instead=missing))
    provenance = about["provenance"]
    same = (
        same_command(runtime, provenance)
        and runtime.read_these(provenance)
        # No row has changed since, though maintenance may have run.
        and all(runtime.changed_version(t) <= provenance["reads"][t.name] <= runtime.version(t) for t in STAGE.reads)
    )
    if same:
        base: str | None = about["grown_from"]
        return base
    current = None if runtime.config.model.version else runtime.newest_current_model()
    if current and current != about["model_version"] and has_model(runtime, current):
        about = read_about(model_folder(runtime, current))
    check_numbers(runtime, about, instead=FROM_SCRATCH)
    return str(about["model_version"])


def _has_learnt_all(runtime: Runtime) -> str | None:
    """If the model to grow from was trained up to the present cut already, or to the last action before it, a sentence
    that says so. (Until there are newer ones a nightly `trailvec run` has to go on with that model.)"""
    if (base := runtime.inputs.get("grown_from")) is None:
        return None
    trained_to = datetime.fromisoformat(read_description(model_folder(runtime, base))["as_of"])
    newest = (F.unix_micros(F.max(name)) for name in ("as_of", "last_ts"))
    cut_us, last_us = runtime.read(SEQUENCES).where("split = 'train'").agg(*newest).collect()[0]
    if cut_us is None or (time_at(cut_us) > trained_to and time_at(last_us) >= trained_to):
        return None
    ends = "still ends" if time_at(cut_us) <= trained_to else "ends later, but without an action since"
    return f"nothing is new to model {base}: it was trained up to {trained_to}, where training {ends}"


def same_command(runtime: Runtime, provenance: dict[str, Any]) -> bool:
    """Whether this provenance is of the same code and settings, on whatever rows."""
    now = runtime.provenance()
    return bool(provenance.get("code_version") == now["code_version"]) and all(
        provenance["config"][section] == now["config"][section] for section in STAGE.settings
    )


def rows_since(runtime: Runtime, about: dict[str, Any], folder: Place) -> list[str]:
    """Writes to `folder` the train rows of users who acted after the model `about` was trained; returns file URLs.

    Each row keeps its newest `train.warm_length` actions; a note says how many are left out. Rows, files and order are
    the same each time.

    Raises:
        TrailvecError: there are no such rows.
    """
    rows = runtime.read(SEQUENCES).where((F.col("split") == "train") & (F.col("last_ts") >= F.lit(about["as_of"])))
    most = runtime.config.train.warm_length
    length = F.least("length", F.lit(most)).alias("length")
    count, actions, kept = rows.agg(F.count("*"), F.sum("length"), F.sum(length)).collect()[0]
    if not count:
        base, again = about.get("grown_from"), ""
        if base and has_model(runtime, base):  # perhaps the model itself is to be trained again, with --force
            again = f", or continue {base} again, as that model did (--set model.version={base})"
        raise TrailvecError(
            f"no row of the train split has an action from {about['as_of']} on, up to which model "
            f"{about['model_version']} was trained: run the data stages on newer events, up to a later "
            f"sequences.valid_from, or set train.warm_start = false{again}"
        )
    if left_out := actions - kept:
        runtime.report.notes.append(
            f"leaves out {left_out:,} of {actions:,} actions: it reads the newest train.warm_length = {most} of each "
            f"row, also of users with more since {about['as_of']}"
        )
    order = F.xxhash64("user_id", "part")  # an order unrelated to the users
    # A resumed training needs the same files again: a global sort would set file boundaries from a sample of the rows.
    files = math.ceil(count / runtime.config.sequences.rows_per_file)
    mixed = rows.repartition(files, order).sortWithinPartitions(order)
    newest = [
        F.slice(name, F.greatest(F.col("length") - length, F.lit(0)) + 1, length).alias(name) for name in FEATURES
    ]
    name = "parquet.block.size"  # the table's row group size, which suits training
    writer = mixed.select(length, *newest).write.mode("overwrite").option(name, SEQUENCES.properties[name])
    writer.parquet(str(folder))
    home = shared_url(folder) if isinstance(folder, HadoopPath) else f"file://{folder}"
    return sorted(f"{home}/{file.name}" for file in folder.glob("*.parquet"))


def count_rows(files: list[str]) -> int:
    """The number of rows in the Parquet files at these URLs."""
    return sum(rows for groups in row_groups(files) for rows, _ in groups)


def _resume_killed_training(runtime: Runtime) -> None:
    """If this very command was killed during training, pins the stage's tables to the versions of that run.

    Does nothing if forced, or if this command has since trained a model on these rows or newer ones. Removes its old
    checkpoints whose tables can't be read at those versions any more.
    """
    now = runtime.fingerprint
    if runtime.forced or has_model(runtime, now[:12]):
        return
    for place in runtime.models.glob("*.checkpoints"):
        provenance = json.loads((place / BEGUN).read_text()) if (place / BEGUN).exists() else {}
        if not same_command(runtime, provenance):
            continue
        if not runtime.can_go_back(provenance):
            # With equal fingerprints only maintenance ran: same rows in other files, so some checkpoints still fit.
            if provenance["fingerprint"] != now:
                remove_tree(place)
            continue
        if place.name != f"{_name(runtime, provenance['fingerprint'])}.checkpoints":  # a forced training's, or a copy
            continue
        if not any(place.glob(f"[0-9]*/{PROGRESS}")):  # a half-written one's name starts with a dot
            continue
        if _has_newer_model(runtime, provenance) or not runtime.go_back(provenance):
            continue
        if provenance["fingerprint"] != now:
            versions = ", ".join(f"{table} version {version}" for table, version in provenance["reads"].items())
            sentence = (
                f"resumes the training that was stopped, on the tables as they were then ({versions}): run "
                f"`trailvec train` again to train on what came since"
            )
            runtime.on_progress(sentence)
            runtime.report.notes.append(sentence)
        return


def _has_newer_model(runtime: Runtime, provenance: dict[str, Any]) -> bool:
    """Whether this command has trained a model on the table versions that `provenance` reads, or newer ones."""
    models = [description(runtime, version) for version in all_models(runtime)]
    trained = [of for model in models if same_command(runtime, of := model.get("provenance", {}))]
    return any(
        all(version <= of["reads"][table] for table, version in provenance["reads"].items())
        for of in trained
        if runtime.read_these(of)
    )


def _name(runtime: Runtime, fingerprint: str) -> str:
    """The name of the checkpoints' folder of a training with this fingerprint over the present tables."""
    return f"{fingerprint[:12]}_{runtime.fingerprint_here(fingerprint)[:8]}"


def run(runtime: Runtime) -> None:
    _resume_killed_training(runtime)
    version = runtime.fingerprint[:12]
    folder, name = runtime.models / version, _name(runtime, runtime.fingerprint)
    existing = read_about(model_folder(runtime, version)) if has_model(runtime, version) else None
    if existing is not None and runtime.read_these(existing["provenance"]) and not runtime.forced:
        runtime.report.skipped = True
        # Left by a run killed right after publishing the model.
        remove_tree(runtime.models / f"{name}.checkpoints")
        remove_replaced(folder)
    elif not runtime.forced and (learnt := _has_learnt_all(runtime)):
        runtime.report.skipped = True
        runtime.report.notes.append(learnt)
        return
    else:
        # Next to the model's folder, which only appears when training is done. After a kill, the same command finds
        # them, unless the tables were recreated. A forced training doesn't resume from another one's checkpoints.
        checkpoints = runtime.models / f"{name}{FORCED if runtime.forced else '.checkpoints'}"
        with published(folder) as staging:
            _train(runtime, version, staging, checkpoints)
            if existing is not None and read_description(staging)["weights_sha256"] == existing["weights_sha256"]:
                _keep_what_was_added(model_folder(runtime, version), staging)
        for own in runtime.models.glob(f"{name}*.checkpoints"):
            remove_tree(own)
    write_json(runtime.models / "current.json", {"model_version": version})
    about = read_description(model_folder(runtime, version))
    training = about["training"]
    best = training["epochs"][training["best_epoch"] - 1]
    scores = ", ".join(f"{name} {best[name]:.4f}" for name in ("recall@10", "ndcg@10") if name in best)
    runtime.report.rows_out["models"] = 1
    runtime.report.notes.append(
        f"model {version}: {training['processes']} processes, loss {training['epochs'][0]['loss']:.3f} → "
        f"{training['epochs'][-1]['loss']:.3f}, best epoch {training['best_epoch']}"
        + (f" ({scores} on {training['held_users']:,} held-out users)" if scores else "")
    )


def _keep_what_was_added(old: Path, new: Path) -> None:
    """Copies files that other stages have added to the model (alignment, profile basis, page): the weights are the
    same, so they remain valid."""
    for file in old.iterdir():
        if not (new / file.name).exists():
            shutil.copyfile(file, new / file.name)


def run_spec(runtime: Runtime, version: str, staging: Path, checkpoints: Place | None) -> RunSpec:
    """The spec for the training processes; writes the arrays that it refers to into `staging`, a local folder.

    Raises:
        TrailvecError: there is nothing to train on; the rows or the items are of a smaller vocabulary; the rows are of
            another cut than the vocabulary, were made before items came into it or use another one's numbers; or the
            base model can't be grown.
    """
    settings, min_count = runtime.config.train, runtime.config.vocabulary.min_count
    _refuse_rows_of_another_vocabulary(runtime)
    files = training_files(runtime)
    counts = item_counts(runtime.read(ITEMS), min_count)
    model = model_spec(runtime.config, len(counts), runtime.read(CONTEXT_VALUES))
    base: str | None = runtime.inputs.get("grown_from")
    if base:
        old = read_about(model_folder(runtime, base, instead=FROM_SCRATCH))
        check_growth(base, old, model)
        files["train"] = rows_since(runtime, old, _rows_folder(runtime, version, staging))
        settings = warm_settings(settings, model.max_length)
    rows = count_rows(files["train"])
    if not rows:
        by_time = runtime.config.sequences.split_by == "time"
        later = "set sequences.valid_from and test_from later, or"
        where = f"in the training window: {later}" if by_time else "before the two newest:"
        raise TrailvecError(
            f"the train split of table sequences has no rows, since no user has two events {where} ingest more events"
        )
    if not counts.any():
        raise TrailvecError(f"no item has vocabulary.min_count = {min_count} events in the training window: lower it")
    if not base:
        settings = settings.model_copy(update={"epochs": epochs(settings, rows)})
    places, verticals = item_verticals(runtime.read(ITEMS))
    newest = F.date_format(F.max("as_of"), "yyyy-MM-dd'T'HH:mm:ss.SSSSSS")
    cuts = runtime.read(SEQUENCES).where("split IN ('train', 'test')").groupBy("split").agg(newest).collect()
    times = {row[0]: row[1] for row in cuts}
    about = {"model_version": version, "as_of": times["train"], "test_from": times.get("test")}
    spec = RunSpec(
        settings=settings,
        model=model,
        train_files=files["train"],
        train_rows=rows,
        target_event_types=event_types_to_predict(runtime.config, runtime.read(ITEMS), runtime.read(CONTEXT_VALUES)),
        valid_files=files["valid"],
        new_only=runtime.config.sequences.seen_days == 0,
        item_counts=str(staging / "item_counts.npy"),
        item_attributes=str(staging / "item_attributes.npy"),
        item_verticals=str(staging / "item_verticals.npy"),
        verticals=verticals,
        start_from=shared_url(runtime.models / base / WEIGHTS) if base else None,
        output=str(staging),
        checkpoints=shared_url(checkpoints) if checkpoints else None,
        about=about | {"provenance": runtime.provenance(), "grown_from": base},
    )
    attributes = item_attributes(runtime.read(ITEMS), runtime.read(CONTEXT_VALUES))
    np.save(staging / "item_counts.npy", counts)
    np.save(staging / "item_verticals.npy", places)
    matrix = attribute_matrix(attributes, settings.item_attributes, len(counts))
    np.save(staging / "item_attributes.npy", matrix)
    return spec


def _refuse_rows_of_another_vocabulary(runtime: Runtime) -> None:
    """Raises TrailvecError if sequences was made with a smaller or another vocabulary, or with another cut than it, or
    with other settings than those that the model's provenance will say."""
    provenance, min_count = runtime.last_writer(SEQUENCES), runtime.config.vocabulary.min_count
    if not provenance or runtime.went_back:  # the rows of that version were checked when its training began
        return
    rows = provenance["config"]["sequences"]
    names = *SHARED_SETTINGS, "max_length", "max_parts", "seen_days"
    if other := other_setting(rows, runtime.config.sequences.model_dump(mode="json"), *names):
        raise TrailvecError(
            f"table sequences was made with {other} as configured: run `trailvec build_vocabulary` and "
            f"`trailvec build_sequences` first, or set it back"
        )
    # A min_count raised since does no harm: training treats items that the model must not know as unknown.
    if (was := provenance["config"]["vocabulary"]["min_count"]) > min_count:
        raise TrailvecError(
            f"table sequences was made with vocabulary.min_count = {was}, not {min_count} as configured, so a model "
            f"would know items that are in no row: run `trailvec build_vocabulary` and `trailvec build_sequences` first"
        )
    if what := other_numbers(runtime, provenance):
        raise TrailvecError(f"table sequences uses the numbers of {what}: run `trailvec build_sequences` first")
    cuts = noted_cuts(provenance)
    refuse_other_counts(runtime, rows, min_count, cuts.valid_from if cuts else None)
    _refuse_items_unknown_to_the_rows(runtime, provenance)


def _refuse_items_unknown_to_the_rows(runtime: Runtime, provenance: dict[str, Any]) -> None:
    """Raises TrailvecError if `items` has items that the model would know and that sequences was made without: late
    events bring some, even if the cut stays. The model would only ever see them as negatives, and no longer treat them
    as cold.

    Args:
        provenance: of sequences.
    """
    since = provenance["reads"].get(ITEMS.name)
    if since is None or since >= runtime.changed_version(ITEMS):
        return
    since = runtime.past_upkeep(ITEMS, since)
    if not runtime.kept(ITEMS, since):
        raise TrailvecError(
            f"table sequences was made from version {since} of table items, which has changed and can no longer be "
            f"compared with today's: run `trailvec build_sequences` first"
        )
    now = in_vocabulary(runtime.read(ITEMS), runtime.config.vocabulary.min_count)
    then = in_vocabulary(runtime.at(ITEMS, since), provenance["config"]["vocabulary"]["min_count"])
    added = now.join(then, "item_id", "left_anti").agg(F.count("*").alias("items"), F.min("item_id").alias("one"))
    found = added.collect()[0]
    if found["items"]:
        raise TrailvecError(
            f"table items has {found['items']:,} items that are unknown in the rows of table sequences, such as "
            f"{found['one']}, since they came into the vocabulary later: run `trailvec build_sequences` first"
        )


def warm_settings(settings: TrainSettings, max_length: int) -> TrainSettings:
    """The settings of a warm start. Its rows are shorter, so a batch has more of them, to keep steps as large."""
    changed = {
        "epochs": settings.warm_epochs,
        "learning_rate": settings.learning_rate * settings.warm_rate,
        "batch_size": settings.batch_size * max(1, max_length // settings.warm_length),
    }
    return settings.model_copy(update=changed)


def epochs(settings: TrainSettings, rows: int) -> int:
    """The epochs of a model trained from scratch: `epochs`, or more if `min_steps` steps need them."""
    rows_in_a_step = settings.batch_size * settings.local_steps * settings.processes
    return max(settings.epochs, math.ceil(settings.min_steps / math.ceil(rows / rows_in_a_step)))


def _rows_folder(runtime: Runtime, version: str, staging: Path) -> Place:
    """The folder for a warm start's rows during training: Spark can write it and all processes can read it."""
    return staging / "rows" if isinstance(runtime.models, Path) else runtime.models / f".{version}.rows"


def _train(runtime: Runtime, version: str, staging: Path, checkpoints: Place) -> None:
    settings = runtime.config.train
    spec = run_spec(runtime, version, staging, checkpoints)
    (staging / "run.json").write_text(spec.model_dump_json(indent=2), "utf-8")
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_json(checkpoints / BEGUN, runtime.provenance())  # which versions to read on resuming
    with tracked(settings.tracking_uri, runtime.place, spec, runtime.report.notes.append) as tracker:
        listener = Listener(runtime.on_progress, tracker)
        if settings.launcher == "spark":
            _ = runtime.spark  # starts the application whose tasks train
            launch_in_spark(spec, listener)
        else:
            launch(staging / "run.json", spec, listener)
        for path in staging.glob("*.npy"):
            path.unlink()  # the model contains what it needs of them
        remove_tree(_rows_folder(runtime, version, staging))
        about = read_about(staging)
        (staging / "card.md").write_text(card(about), encoding="utf-8")
        (staging / "training.svg").write_text(pictures.training(about), encoding="utf-8")
        tracker.files(staging / "card.md", staging / "training.svg", staging / "model.json")


def check_growth(base: str, about: dict[str, Any], new: ModelSpec) -> None:
    """Raises TrailvecError if a model of spec `new`, over rows cut by time, can't be warm-started from `base`.

    Args:
        about: the base's description (model.json).
    """
    if about["provenance"]["config"]["sequences"]["split_by"] == "leave_one_out":
        raise TrailvecError(
            f"model {base} was trained with sequences.split_by = leave_one_out, and may have learnt what the new one "
            f"will be asked: {FROM_SCRATCH}"
        )
    old = ModelSpec.model_validate(about["spec"])
    free = {"items", "context_sizes", "attribute_sizes", "dropout", "item_dropout", "negatives", "negative_power"}
    free |= {"loss", "gbce_t", "sparse"}  # they determine no tensor's shape
    free |= {"item_precision"}  # precision is converted
    was, is_now = old.model_dump(exclude=free), new.model_dump(exclude=free)
    was |= {"inputs": list(old.context_sizes), "item_attributes": list(old.attribute_sizes)}
    is_now |= {"inputs": list(new.context_sizes), "item_attributes": list(new.attribute_sizes)}
    if differing := [name for name, value in was.items() if is_now[name] != value]:
        name = differing[0]
        raise TrailvecError(
            f"model {base} was trained with {name} = {was[name]}, not {is_now[name]} as configured: "
            f"set it back, or {FROM_SCRATCH}"
        )


class Listener:
    """Forwards rank 0's events: a progress line now and then, all metrics to the tracker. A line shows the mean loss
    since the line before it: the last step's alone would hide a spike."""

    def __init__(self, on_progress: Callable[[str], None], tracker: Tracker) -> None:
        self._on_progress = on_progress
        self._tracker = tracker
        self._shown = -math.inf
        self._losses: list[float] = []  # of the steps since

    def __call__(self, event: dict[str, Any]) -> None:
        now, is_step = time.monotonic(), event["event"] == "step"
        if is_step:
            self._losses.append(event["loss"])
        if not is_step or now - self._shown > SECONDS_BETWEEN_LINES:
            self._on_progress(progress_line(event | {"loss": fmean(self._losses)} if is_step else event))
            self._shown, self._losses = now, []
        if event["event"] in ("step", "epoch"):
            prefix = "" if event["event"] == "step" else "epoch_"
            figures = {prefix + name: event[name] for name in TRACKED if name in event}
            self._tracker.metrics(event["rows_done"], figures)


def progress_line(event: dict[str, Any]) -> str:
    """An event of training.loop as text."""
    if event["event"] == "without_gpus" and event["ranks"]:
        return f"trains on the CPU: some processes ({', '.join(map(str, event['ranks']))}) see no GPU, others do"
    if event["event"] == "without_gpus":
        return "trains on the CPU: Horovod was built without NCCL, which its exchange between GPUs needs"
    if event["event"] == "left":
        step = f"epoch {event['epoch']}, after {event['step']:,} steps"
        return f"discards the checkpoint of {step}: its rows are in other files now, and would come in another order"
    if event["event"] == "resumed":
        return f"resumes from a checkpoint: epoch {event['epoch']}, after {event['step']:,} steps"
    seconds_left = round(event["seconds_left"])
    scores = "".join(f"  {name} {event[name]:.4f}" for name in ("recall@10", "ndcg@10") if name in event)
    return (
        f"epoch {event['epoch']}/{event['epochs']}  {event['share']:.0%}  loss {event['loss']:.4f}{scores}  "
        f"{event['rows_per_second']:,.0f} rows/s  padding {event['padding']:.0%}  "
        f"data wait {event['data_wait']:.0%}  {seconds_left // 60}:{seconds_left % 60:02} left"
    )


STAGE = Stage(
    "train",
    "train the next-action model (Horovod, Petastorm, Transformers4Rec)",
    run,
    reads=(SEQUENCES, ITEMS, CONTEXT_VALUES),
    writes=(),
    settings=("train", "vocabulary", "sequences"),
    also="It also writes a folder under models/, rewrites the files of sequences that have deletion vectors and, with "
    "train.warm_start, reads current_model and the model that it continues.",
    inputs=lambda runtime: {"grown_from": base_of(runtime)},
)


def main() -> None:
    stage_main("train")


if __name__ == "__main__":
    main()
