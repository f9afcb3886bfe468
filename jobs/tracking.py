"""Tracks training runs in MLflow: parameters, metrics as they come, the model card; later the evaluation page. The
only module that imports mlflow.

Training does not depend on it: at the first failure it warns once, and the rest of the run is untracked.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jobs.errors import first_line
from jobs.files import Place
from training.config import RunSpec
from training.stores import folder_of

# MLflow's own environment variable; on Databricks the experiment is a workspace path (/Shared/…).
EXPERIMENT = os.environ.get("MLFLOW_EXPERIMENT_NAME", "trailvec")
DATABASE = "mlflow.db"


class Tracker:
    """An MLflow run; after a failure, or with the URI "none", all calls do nothing."""

    def __init__(self, uri: str, root: Place, warn: Callable[[str], None]) -> None:
        self._uri, self._root, self._warn = uri, root, warn
        self._client: Any = None
        self._entities: Any = None  # the module mlflow.entities, there once the client is
        self._run = ""

    def begin(self, spec: RunSpec) -> None:
        """Starts a run, or resumes that of a killed training with the same checkpoints."""
        if self._uri == "none":
            return
        try:
            self._client = _client(self._uri, self._root)
            self._entities = importlib.import_module("mlflow.entities")
            id_file = folder_of(spec.checkpoints or "") / "mlflow_run_id"
            if spec.checkpoints and id_file.exists():
                self._run = id_file.read_text()
                self._client.update_run(self._run, status="RUNNING")
                return
            tags = {"mlflow.runName": spec.about["model_version"], "model_version": spec.about["model_version"]}
            self._run = self._client.create_run(self._experiment(), tags=tags).info.run_id
            if spec.checkpoints:
                folder_of(spec.checkpoints).mkdir(parents=True, exist_ok=True)
                id_file.write_text(self._run)
            provenance = spec.about.get("provenance", {})
            versions = {f"version_of_{table}": number for table, number in provenance.get("reads", {}).items()}
            model = spec.model.model_dump(exclude={"context_sizes"})
            parameters = {**spec.settings.model_dump(), **model, **versions, "train_rows": spec.train_rows}
            # In one request: one by one they took seconds of a server.
            self._client.log_batch(self._run, params=[self._entities.Param(n, str(v)) for n, v in parameters.items()])
        except Exception as error:
            self._give_up(error)

    def metrics(self, step: int, figures: dict[str, float]) -> None:
        """`step`: training rows processed so far."""

        def log() -> None:
            now = round(time.time() * 1000)
            metrics = [self._entities.Metric(_name(name), value, now, step) for name, value in figures.items()]
            self._client.log_batch(self._run, metrics=metrics)

        self._try(log)

    def files(self, *paths: Path) -> None:
        def log() -> None:
            for path in paths:
                self._client.log_artifact(self._run, str(path))

        self._try(log)

    def end(self, status: str) -> None:
        self._try(lambda: self._client.set_terminated(self._run, status))

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found:
            return str(found.experiment_id)
        place = f"file://{self._root / 'mlruns'}" if self._uri == "local" else None
        return str(self._client.create_experiment(EXPERIMENT, artifact_location=place))

    def _try(self, action: Callable[[], Any]) -> None:
        if self._client is None:
            return
        try:
            action()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._client = None
        self._warn(f"MLflow ({self._uri}) failed; the run continues untracked: {_why(error)}")


@contextlib.contextmanager
def tracked(uri: str, root: Place, spec: RunSpec, warn: Callable[[str], None]) -> Iterator[Tracker]:
    """A run that ends as FINISHED, or as FAILED if the block raises."""
    tracker = Tracker(uri, root, warn)
    tracker.begin(spec)
    try:
        yield tracker
    except BaseException:
        tracker.end("FAILED")
        raise
    tracker.end("FINISHED")


def attach(uri: str, root: Place, model_version: str, page: tuple[str, str], warn: Callable[[str], None]) -> None:
    """Attaches `page` (file name, text) to the run that trained the model; does nothing if MLflow has no such run."""
    if uri == "none" or (uri == "local" and not (isinstance(root, Path) and (root / DATABASE).exists())):
        return
    try:
        client = _client(uri, root)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return
        tag_filter = f"tags.model_version = '{model_version}'"
        for run in client.search_runs([experiment.experiment_id], tag_filter, max_results=1):
            client.log_text(run.info.run_id, page[1], page[0])
    except Exception as error:
        warn(f"MLflow ({uri}) failed; {page[0]} is not attached: {_why(error)}")


def _why(error: Exception) -> str:
    return first_line(error) or type(error).__name__


def _client(uri: str, root: Place) -> Any:
    if uri == "local" and not isinstance(root, Path):
        raise ValueError(f"its database can't be under {root}: set train.tracking_uri to none or a server's address")
    # Set before the import: an unreachable server must not delay training by minutes; and no telemetry.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is the stage's
    from mlflow.tracking import MlflowClient  # noqa: PLC0415 - takes seconds, and only training needs it

    for name in ("mlflow", "alembic"):  # they log each step of creating the database
        logging.getLogger(name).setLevel(logging.ERROR)
    if isinstance(root, Path):
        root.mkdir(parents=True, exist_ok=True)
    return MlflowClient(f"sqlite:///{root / DATABASE}" if uri == "local" else uri)


def _name(name: str) -> str:
    return name.replace("@", "_at_")  # MLflow allows no @ in names
