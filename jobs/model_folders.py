"""Model storage: models/<version>/ below the root, on a local disk or elsewhere; models/current.json names the newest
trained model."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from pyspark import SparkFiles

from jobs.commits import newer_than
from jobs.errors import TrailvecError
from jobs.files import HadoopPath, fetch
from jobs.runtime import Runtime
from jobs.tables import CONTEXT_VALUES, ITEM_EMBEDDINGS, ITEMS, USER_EMBEDDINGS, Table
from training.checkpoint import ABOUT, WEIGHTS, read_about, read_description, rotation_sha256


def model_folder(
    runtime: Runtime,
    version: str | None = None,
    instead: str = "set model.version to one of them or run `trailvec train`",
) -> Path:
    """The folder of a model; None: of the model in use (`model.version` in the configuration, else the newest trained).

    If it is not on a local disk, this is the process's local copy, also named after the version; `add_to_model` copies
    new files back.

    Raises:
        TrailvecError: there is no such model, or current.json or the fetched copy is damaged.
    """
    version = version or runtime.config.model.version
    if version is None:
        current = runtime.models / "current.json"
        if not current.exists():
            raise TrailvecError(f"no model under {runtime.models}: run `trailvec train` first")
        try:
            version = str(json.loads(current.read_text())["model_version"])
        except (ValueError, LookupError, TypeError, RecursionError):
            raise TrailvecError(
                f"{current} does not say which model is in use: write "
                f'{{"model_version": "..."}} to it or set model.version'
            ) from None
    folder = runtime.models / version
    if not has_model(runtime, version):
        found = ", ".join(sorted(all_models(runtime))) or "none"
        raise TrailvecError(f"model {version} does not exist under {runtime.models} (found: {found}): {instead}")
    return folder if isinstance(folder, Path) else _fetched(folder)


def description(runtime: Runtime, version: str) -> dict[str, Any]:
    """A model's model.json, without fetching or checking its other files; {} if it is gone or damaged."""
    if not has_model(runtime, version):
        return {}
    try:
        about = json.loads((runtime.models / version / ABOUT).read_text())
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def model_inputs(runtime: Runtime) -> dict[str, str | None]:
    """What the vectors of the model in use depend on, for `Stage.inputs`: its version, its weights (on GPUs, a
    repeated training gives different ones), and the rotation of its space (`trailvec align`)."""
    folder = model_folder(runtime)
    return {
        "model_version": folder.name,
        "weights": read_description(folder)["weights_sha256"],
        "rotation": rotation_sha256(folder),
    }


def check_numbers(
    runtime: Runtime, about: dict[str, Any], instead: str = "run `trailvec train` with model.version unset"
) -> None:
    """Raises TrailvecError if the numbers by which the model of `about` knows items and context values are stale: their
    tables were removed, or changed by something else (a RESTORE, say), so a number may have been assigned twice."""
    if what := other_numbers(runtime, about.get("provenance", {})):
        raise TrailvecError(f"model {about['model_version']} uses the numbers of {what}: {instead}")


def other_numbers(runtime: Runtime, provenance: dict[str, Any]) -> str | None:
    """What happened to the tables whose numbers a run of that provenance used; None: the numbers are still valid."""
    table_ids = provenance.get("table_ids", {})  # missing in older versions
    numbered = [table for table in (ITEMS, CONTEXT_VALUES) if table_ids.get(table.name)]
    if any(table_ids[table.name] != runtime.table_id(table) for table in numbered):
        what = "were removed"
    elif any(  # as far back as the log goes
        commit.foreign
        for table in numbered
        for commit in newer_than(runtime.commits(table), provenance["reads"][table.name])
    ):
        what = "something other than trailvec has changed (RESTORE, SQL)"
    else:
        return None
    return f"tables items and context_values that {what} since"


def check_items(runtime: Runtime, version: str) -> None:
    """Raises TrailvecError if the stored item vectors are in an old space of the model: users would get the new one."""
    if is_stale(runtime, ITEM_EMBEDDINGS):
        raise TrailvecError(
            f"model {version} was trained or aligned again after its item vectors were written: "
            f"run `trailvec embed_items` first"
        )


def is_stale(runtime: Runtime, table: Table, **of: str) -> bool:
    """Whether the model's rows in the table are stale: it was trained or aligned again after they were written. False
    if the log no longer says.

    Args:
        of: only commits whose note has these values count.
    """
    now = model_inputs(runtime) | of
    keys = ("model_version", *of)
    notes = (provenance["note"] for provenance in runtime.noted(table))
    return next((note != now for note in notes if all(note.get(key) == now[key] for key in keys)), False)


def trained_again(runtime: Runtime, folder: Path) -> bool:
    """Whether the model was retrained to other weights than its users' newest vectors come from; False if no
    commit's note says."""
    models = (provenance["note"]["model"] for provenance in runtime.noted(USER_EMBEDDINGS))
    newest = next((model for model in models if model["version"] == folder.name and "weights" in model), None)
    return newest is not None and newest["weights"] != read_description(folder)["weights_sha256"]


def all_models(runtime: Runtime) -> list[str]:
    """The versions of all models."""
    # A hidden folder is one that `published` fills or replaces, or that a kill has left.
    return [file.parent.name for file in runtime.models.glob(f"[!.]*/{ABOUT}")]


def has_model(runtime: Runtime, version: str) -> bool:
    """Whether the model exists (it may have been deleted)."""
    return (runtime.models / version / ABOUT).exists()


def add_to_model(runtime: Runtime, folder: Path, *names: str) -> None:
    """Copies files written into `model_folder` to the model's storage, each atomically, in this order, skipping missing
    ones; on a local disk there is nothing to do. Of several files the last describes the others, so its old version is
    deleted first."""
    home = runtime.models / folder.name
    if isinstance(home, HadoopPath):
        if len(names) > 1:
            (home / names[-1]).unlink(missing_ok=True)
        for name in names:
            if (folder / name).exists():
                (home / name).put_whole(folder / name)


def _fetched(folder: HadoopPath) -> Path:
    """An up-to-date local copy of a model's folder; unchanged weights are not fetched again."""
    # Spark deletes its own folder when the application ends.
    store = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    copy = Path(SparkFiles.getRootDirectory()) / "trailvec" / store / folder.name
    if WEIGHTS in fetch(folder, copy):
        try:
            read_about(copy)
        except TrailvecError as error:
            shutil.rmtree(copy)
            raise TrailvecError(str(error).replace(str(copy), str(folder))) from None
    return copy
