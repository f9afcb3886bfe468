"""tune: searches for better training settings, by the ranking metric of the validation users.

Each trial is a training as by `trailvec train`. The first has the configured settings; the others differ from it in a
few values, which Optuna proposes, and are pruned if they do worse than the median at the same epoch. Trials are stored
in `tune.db` under storage.root: the same command resumes the search, and other data or another value in [train] starts
a new one. No model is kept: put the printed settings into the configuration and train.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna

from jobs.errors import TrailvecError
from jobs.launch_training import launch
from jobs.runtime import Runtime, Stage
from jobs.train import STAGE as TRAIN
from jobs.train import progress_line, run_spec
from training.config import RunSpec

METRIC = "ndcg@10"
LOCK = "lock"
CONFIGURED = "configured"  # an attribute of the trial of the configured settings
State = optuna.trial.TrialState
ENDED = (State.COMPLETE, State.PRUNED)
WIDTHS = (32, 64, 128)
BLOCKS = {"clm": "gpt2", "mlm": "bert"}  # which leads depends on the log: docs/decisions/0022


def propose(trial: optuna.Trial, spec: RunSpec) -> dict[str, Any]:
    """Values of [train] for one trial: the settings that matter most for ranking in a run like `spec`."""
    heads = spec.settings.heads  # which the width must be a multiple of
    trial.suggest_float("learning_rate", 3e-4, 5e-3, log=True)
    trial.suggest_float("dropout", 0.0, 0.5, step=0.1)
    trial.suggest_categorical("width", [width for width in WIDTHS if width % heads == 0])
    trial.suggest_int("layers", 1, 3)
    trial.suggest_float("weight_decay", 1e-3, 1.0, log=True)
    trial.suggest_categorical("negatives", [256, 1024, 4096])
    objective: str = spec.model.objective
    if BLOCKS.get(objective) == spec.model.architecture:  # another pair was chosen on purpose
        objective = trial.suggest_categorical("objective", list(BLOCKS))
    if objective == "clm":  # other objectives have no such targets
        trial.suggest_float("later_share", 0.0, 1.0, step=0.25)
    return values_of(trial.params)


def values_of(params: dict[str, Any]) -> dict[str, Any]:
    """Values of [train] for a trial's parameters: an objective brings its block."""
    values = {name: _written(value) for name, value in params.items()}
    return values | {"architecture": BLOCKS[params["objective"]]} if "objective" in params else values


def _written(value: float) -> float:
    """The value as a person would write it. (Optuna's third step of 0.1 is 0.30000000000000004.)"""
    return float(f"{value:.3g}") if isinstance(value, float) else value


def with_values(spec: RunSpec, values: dict[str, Any], output: Path) -> RunSpec:
    """The run with other settings, also in the model spec, where they occur there."""
    settings = spec.settings.model_copy(update=values)
    of_model = {name: value for name, value in values.items() if name in type(spec.model).model_fields}
    of_model["sparse"] = settings.row_wise(spec.model.items)
    model = spec.model.model_copy(update=of_model)
    return spec.model_copy(update={"settings": settings, "model": model, "output": str(output), "checkpoints": None})


def search(spec: RunSpec, study: optuna.Study, trials: int, folder: Path, on_progress: Any) -> None:
    """Runs trials until `trials` of the study have completed or been pruned; killed ones don't count.

    The first has the spec's own settings, some of which are never proposed, such as no negatives."""
    untried = configured_trial(study) is None

    def objective(trial: optuna.Trial) -> float:
        nonlocal untried
        output = folder / f"trial-{trial.number}"
        output.mkdir()
        if untried:
            trial.set_user_attr(CONFIGURED, True)
        run = with_values(spec, {} if untried else propose(trial, spec), output)
        untried = False  # tried once a run, even if it fails
        (output / "run.json").write_text(run.model_dump_json(), "utf-8")
        scores: list[float] = []

        def on_event(event: dict[str, Any]) -> None:
            on_progress(f"trial {trial.number}  {progress_line(event)}")
            if event["event"] == "epoch" and METRIC in event:
                scores.append(event[METRIC])
                trial.report(event[METRIC], event["epoch"])
                if trial.should_prune():
                    raise optuna.TrialPruned

        try:
            launch(output / "run.json", run, on_event)
        except TrailvecError as error:  # e.g. diverged: a learning rate too high for the width
            on_progress(f"trial {trial.number}  {error}")
            trial.set_user_attr("error", str(error))
            return math.nan  # Optuna counts NaN as a failed trial
        finally:
            shutil.rmtree(output, ignore_errors=True)
        if not scores:
            raise TrailvecError(
                "no user in the valid split has a next item that the model knows, so no trial can be judged: "
                "set sequences.valid_from earlier or lower vocabulary.min_count"
            )
        return max(scores)

    failed = len(_in(study, State.FAIL))  # in earlier runs
    while len(_in(study, *ENDED)) < trials:
        study.optimize(objective, n_trials=1)
        last = study.trials[-1]
        if last.state == State.FAIL and len(_in(study, State.FAIL)) - failed > trials:
            raise TrailvecError(
                f"more than {trials} trials failed; the last one: {last.user_attrs.get('error', 'stopped')}"
            )


def configured_trial(study: optuna.Study) -> optuna.trial.FrozenTrial | None:
    """The trial of the configured settings; None: none has ended."""
    return next((trial for trial in _in(study, *ENDED) if CONFIGURED in trial.user_attrs), None)


def _in(study: optuna.Study, *states: optuna.trial.TrialState) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=states)


@contextlib.contextmanager
def _folder(root: Path) -> Iterator[Path]:
    """A temporary folder for one search, removed when the block ends. First removes those that killed searches left:
    the folder of a running search has a file that its process keeps locked."""
    for lock in root.glob(f"tune-*/{LOCK}"):
        with contextlib.suppress(OSError), lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="tune-", dir=root))
    try:
        with (folder / f".{LOCK}").open("w") as file:
            with contextlib.suppress(OSError):  # without file locks, nobody can remove the folder
                fcntl.flock(file, fcntl.LOCK_EX)
            (folder / f".{LOCK}").rename(folder / LOCK)  # others only ever see it locked
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_tune(runtime: Runtime, trials: int) -> list[str]:
    """Runs the search, reports each trial's progress, and returns the best settings as lines of TOML.

    Raises:
        TrailvecError: the configured training is not suitable for trials, or a trial can't be judged.
    """
    settings = runtime.config.train
    if settings.warm_start:
        raise TrailvecError(
            "tune trains models of different sizes, each from scratch, found train.warm_start = true: "
            "set it to false for the search"
        )
    if settings.launcher != "local":
        raise TrailvecError(
            f'tune trains only on this machine, found train.launcher = "{settings.launcher}": '
            f'set it to "local" for the search, and run it on a machine that has the data'
        )
    if all(width % settings.heads for width in WIDTHS):
        raise TrailvecError(
            f"tune tries the widths {', '.join(map(str, WIDTHS))}, none of which is a multiple of train.heads = "
            f"{settings.heads}: set it to a number that divides one of them, such as 2, for the search"
        )

    found: list[str] = []

    def run(runtime: Runtime) -> None:
        # Covers all inputs of a model, also the [train] values of the searched settings, which the first trial uses.
        name = runtime.fingerprint_here(runtime.fingerprint)[:12]
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(
            storage=f"sqlite:///{runtime.root / 'tune.db'}",
            study_name=name,
            load_if_exists=True,
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
        )
        # With the same seed, a resumed search would propose its first trials again.
        study.sampler = optuna.samplers.TPESampler(seed=settings.seed + len(study.trials))
        if done := len(_in(study, *ENDED)):
            runtime.on_progress(f"resumes the search after {done} trials")
        with _folder(runtime.root) as folder:
            spec = run_spec(runtime, name, folder, None)
            if not spec.valid_files:
                raise TrailvecError(
                    "the valid split of table sequences has no rows: set sequences.valid_from before the log's end"
                )
            search(spec, study, trials, folder, runtime.on_progress)
        best, configured = study.best_trial, configured_trial(study)
        found.append(f"# {METRIC} {best.value:.4f} on the validation users, trial {best.number} of {len(study.trials)}")
        if configured == best:
            found.append("# with the configured settings: there is nothing to change")
            return
        if configured:
            found.append(f"# {METRIC} {configured.value:.4f} with the configured settings, trial {configured.number}")
        found.append("[train]")
        found.extend(f"{key} = {json.dumps(value)}" for key, value in sorted(values_of(best.params).items()))

    stage = Stage("tune", "search for better training settings", run, TRAIN.reads, (), TRAIN.settings, TRAIN.inputs)
    runtime.execute(stage)
    return found
