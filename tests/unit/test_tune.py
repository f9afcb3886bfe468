"""The search for settings, with real trainings of a tiny model."""

from __future__ import annotations

import argparse
import io
import tomllib
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from rich.console import Console

from jobs import cli, tune
from jobs.cli import main
from jobs.errors import TrailvecError
from jobs.launch_training import launch
from jobs.runtime import Runtime
from tests.conftest import make_config
from tests.sequence_files import make_rows, make_run, next_items, train_here
from training.config import RunSpec, TrainSettings

TOLD: dict[str, Any] = {"event": "epoch", "epoch": 1, "epochs": 1, "share": 1.0, "loss": 1.0, "rows_per_second": 1.0}
TOLD |= {"padding": 0.0, "data_wait": 0.0, "seconds_left": 0.0}


def a_study(folder: Path, pruner: optuna.pruners.BasePruner | None = None) -> optuna.Study:
    return optuna.create_study(
        storage=f"sqlite:///{folder / 'tune.db'}",
        study_name="s",
        load_if_exists=True,
        direction="maximize",
        pruner=pruner,
    )


def test_a_search_goes_on_from_the_trials_that_have_ended(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    rows = make_rows(30, seed=3)
    own = {"epochs": 2, "batch_size": 20, "learning_rate": 0.03}
    spec = make_run(tmp_path / "run", [make_rows(120)], (rows, next_items(rows)), **own)
    # The first one, of the spec's own, learns all that there is; one fails, one learns nothing.
    rates = {2: 1e30, 3: 1e-9}
    monkeypatch.setattr(tune, "propose", lambda trial, heads: {"learning_rate": rates[trial.number], "width": 8})

    def learn(run_file: Path, run: RunSpec, hear: Any) -> None:
        if run.settings.learning_rate == rates[3]:  # nothing needs to run to learn nothing
            hear({**TOLD, tune.METRIC: 0.0})
        else:
            (launch if run.settings.learning_rate == rates[2] else train_here)(run_file, run, hear)

    monkeypatch.setattr(tune, "launch", learn)
    said: list[str] = []
    tune.search(spec, a_study(tmp_path), 1, tmp_path, said.append)
    a_study(tmp_path).ask()  # what a kill leaves: a trial that is said to be running
    tune.search(spec, a_study(tmp_path), 2, tmp_path, said.append)
    study = a_study(tmp_path)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "RUNNING", "FAIL", "COMPLETE"]
    assert study.best_trial.number == 0
    assert study.best_value > 0.3
    assert said[0].startswith("trial 0  epoch 1/2")
    assert next(line for line in said if "training stopped: the loss is nan" in line).startswith("trial 2  ")
    assert "Traceback" not in capfd.readouterr().err
    assert not list(tmp_path.glob("trial-*"))


def test_a_trial_that_falls_behind_is_ended_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(30, seed=3)
    spec = make_run(tmp_path / "run", [make_rows(120)], (rows, next_items(rows)), epochs=200, batch_size=20)
    monkeypatch.setattr(tune, "propose", lambda trial, heads: {}[trial.number])  # there is no other
    said: list[str] = []
    tune.search(spec, a_study(tmp_path, optuna.pruners.ThresholdPruner(lower=2)), 1, tmp_path, said.append)
    assert [trial.state.name for trial in a_study(tmp_path).trials] == ["PRUNED"]
    assert {line.split()[3] for line in said} == {"1/200"}
    running = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in running if str(tmp_path) in " ".join(line)]
    assert not list(tmp_path.glob("trial-*"))


def test_a_search_that_finds_nothing_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_run(tmp_path / "run", [make_rows(3)])

    def fail(*arguments: Any) -> None:
        raise TrailvecError("training stopped: no space left on device")

    monkeypatch.setattr(tune, "launch", fail)
    with pytest.raises(TrailvecError, match="more than 2 trials failed; the last one: training stopped: no space"):
        tune.search(spec, a_study(tmp_path), 2, tmp_path, lambda text: None)
    # Rank 0 says nothing of the ranking where no user can be judged by.
    monkeypatch.setattr(tune, "launch", lambda run_file, run, hear: hear(TOLD))
    with pytest.raises(TrailvecError, match="no user in the valid split has a next item that the model knows"):
        tune.search(spec, a_study(tmp_path), 2, tmp_path, lambda text: None)
    # The same command again, when the disk has room: what failed before is not counted.
    failures = iter([True, False, False])

    def fail_once(run_file: Path, run: RunSpec, hear: Any) -> None:
        if next(failures):
            fail()
        hear({**TOLD, tune.METRIC: 0.5})

    monkeypatch.setattr(tune, "launch", fail_once)
    tune.search(spec, a_study(tmp_path), 2, tmp_path, lambda text: None)
    last = a_study(tmp_path).trials[-3:]
    assert [trial.state.name for trial in last] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert [tune.CONFIGURED in trial.user_attrs for trial in last] == [True, False, False]


def test_what_is_no_trial_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for setting, sentence in (
        ("warm_start=true", "found train.warm_start = true"),
        ('launcher="spark"', "only on this machine"),
        ("heads=3", "32, 64, 128, none of which is a multiple of train.heads = 3: set it"),
    ):
        with pytest.raises(TrailvecError, match=sentence):
            tune.run_tune(Runtime(make_config(tmp_path, "train.width=96", f"train.{setting}")), 1)
    with pytest.raises(SystemExit) as stopped:
        main(["tune", "--trials", "0"])
    assert stopped.value.code == 2
    assert "argument --trials: expected a whole number of at least 1, found 0" in capsys.readouterr().err


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """For the command without the tables that it reads."""
    spec = make_run(tmp_path / "run", [make_rows(3)], (make_rows(3), next_items(make_rows(3))))
    monkeypatch.setattr(tune, "run_spec", lambda *arguments: spec)
    monkeypatch.setattr(Runtime, "execute", lambda runtime, stage: stage.run(runtime))
    runtime = Runtime(make_config(tmp_path))
    runtime.fingerprint = "feed"
    return runtime


def test_the_best_of_all_trials_is_said_as_toml(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an earlier run's too; one that failed is made up for."""
    outcomes: list[float | None] = [0.2, 0.4, None, 0.3]
    run_specs: list[RunSpec] = []

    def launch(run_file: Path, run: RunSpec, hear: Any) -> None:
        run_specs.append(run)
        score = outcomes[len(run_specs) - 1]
        if score is None:
            raise TrailvecError("training stopped: the loss is nan")
        hear({**TOLD, tune.METRIC: score})

    monkeypatch.setattr(tune, "launch", launch)
    said: list[str] = []
    runtime.on_progress = said.append
    for trials, of in ((2, 2), (3, 4)):
        head, of_configured, *lines = tune.run_tune(runtime, trials)
        assert head == f"# ndcg@10 0.4000 on the validation users, trial 1 of {of}"
        assert of_configured == "# ndcg@10 0.2000 with the configured settings, trial 0"
        best = run_specs[1].settings.model_dump()
        found = tomllib.loads("\n".join(lines))["train"]
        assert found == {name: best[name] for name in found}
        assert all(len(line) <= len("learning_rate = 0.000315") for line in lines)
        assert len(found) == 9
    assert [run.settings == TrainSettings(dropout=0.0) for run in run_specs] == [True, False, False, False]
    assert "resumes the search after 2 trials" in said
    assert "trial 2  training stopped: the loss is nan" in said
    said.clear()
    outcomes.append(0.1)
    monkeypatch.setattr(runtime, "_table_ids", {"sequences": "made anew"})
    found = tune.run_tune(runtime, 1)  # as many commits, other rows
    assert found[0].endswith("trial 0 of 1")
    assert found[1:] == ["# with the configured settings: there is nothing to change"]


def test_the_settings_go_to_stdout_also_while_a_terminal_shows_the_status(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `trailvec tune > best.toml` does: on a terminal, the status line redirects stdout to its own console."""
    terminal = io.StringIO()
    monkeypatch.setattr(cli, "_out", Console(file=terminal, force_terminal=True))
    monkeypatch.setattr(tune, "search", lambda spec, study, *_: study.add_trial(optuna.trial.create_trial(value=0.5)))
    cli._tune(runtime.config, argparse.Namespace(trials=1))
    assert capsys.readouterr().out == "# ndcg@10 0.5000 on the validation users, trial 0 of 1\n[train]\n"
    assert "tune" in terminal.getvalue()  # the status line


def test_two_searches_under_one_root_leave_each_others_folder_alone(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    killed = tmp_path / "tune-killed"
    (killed / "trial-7").mkdir(parents=True)
    (killed / tune.LOCK).touch()

    def search(spec: Any, study: optuna.Study, trials: int, folder: Path, say: Any) -> None:
        folders.append(folder)
        assert not killed.exists()
        (folder / "trial-0").mkdir()
        if trials > 1:
            tune.run_tune(runtime, trials - 1)
        assert (folder / "trial-0").is_dir()
        study.add_trial(optuna.trial.create_trial(value=0.5))

    monkeypatch.setattr(tune, "search", search)
    tune.run_tune(runtime, 2)
    assert len(set(folders)) == 2
    assert not any(folder.exists() for folder in folders)


def test_searched_settings_reach_the_run_and_the_model(tmp_path: Path) -> None:
    spec = make_run(tmp_path, [make_rows(3)])
    trial = optuna.trial.FixedTrial(
        {"learning_rate": 0.001, "dropout": 3 * 0.1, "width": 32, "layers": 2, "weight_decay": 0.1, "negatives": 256}
        | {"objective": "clm", "later_share": 0.5}
    )
    values = tune.propose(trial, spec)
    run = tune.with_values(spec, values, tmp_path / "out")
    assert {name: getattr(run.settings, name) for name in values} == values
    assert (run.model.width, run.model.layers, run.model.negatives, run.model.dropout) == (32, 2, 256, 0.3)
    assert (run.model.heads, run.output) == (spec.model.heads, str(tmp_path / "out"))
    for heads, widths in ((2, (32, 64, 128)), (64, (64, 128))):  # a head has its share of the width
        drawn = optuna.create_study().ask()
        of_heads = spec.settings.model_copy(update={"heads": heads})
        tune.propose(drawn, spec.model_copy(update={"settings": of_heads}))
        assert drawn.distributions["width"] == optuna.distributions.CategoricalDistribution(widths)
    # An objective brings its block, unless the spec's own pair is another one; only clm has later targets.
    both = trial.params | {"objective": "mlm"}
    values = tune.propose(optuna.trial.FixedTrial(both), spec)
    masked = tune.with_values(spec, values, tmp_path / "out")
    assert (masked.model.objective, masked.model.architecture, "later_share" in values) == ("mlm", "bert", False)
    TrainSettings.model_validate(masked.settings.model_dump())
    other = spec.model.model_copy(update={"objective": "mlm", "architecture": "xlnet"})
    assert not {"later_share", "objective", "architecture"} & set(
        tune.propose(optuna.create_study().ask(), spec.model_copy(update={"model": other}))
    )
    # A trial's optimizer is that of a training with its values: rowwise from 50,000 items on, but for 0 negatives.
    many = spec.model_copy(update={"model": spec.model.model_copy(update={"items": 50_000})})
    for negatives, row_wise in ((256, True), (0, False)):
        assert tune.with_values(many, {"negatives": negatives}, tmp_path).model.sparse == row_wise
