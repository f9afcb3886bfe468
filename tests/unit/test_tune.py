"""The search for settings, with real trainings of a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna

from jobs import tune
from tests.sequence_files import make_rows, make_run, next_items


def a_study(folder: Path) -> optuna.Study:
    return optuna.create_study(
        storage=f"sqlite:///{folder / 'tune.db'}", study_name="s", load_if_exists=True, direction="maximize"
    )


def test_a_search_goes_on_from_the_trials_that_have_ended(tmp_path: Path, monkeypatch: Any) -> None:
    rows = make_rows(30, seed=3)
    spec = make_run(tmp_path / "run", [make_rows(120)], (rows, next_items(rows)), epochs=2, batch_size=20)
    rates = {0: 0.03, 2: 1e30, 3: 1e-9}  # one learns all that there is, one fails, one learns nothing
    monkeypatch.setattr(tune, "propose", lambda trial: {"learning_rate": rates[trial.number], "width": 8})
    said: list[str] = []
    tune.search(spec, a_study(tmp_path), 1, tmp_path, said.append)
    a_study(tmp_path).ask()  # what a kill leaves: a trial that is said to be running
    tune.search(spec, a_study(tmp_path), 2, tmp_path, said.append)
    study = a_study(tmp_path)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "RUNNING", "FAIL", "COMPLETE"]
    assert study.best_trial.number == 0
    assert study.best_value > 0.3
    assert said[0].startswith("trial 0  epoch 1/2")
    assert not list(tmp_path.glob("trial-*"))


def test_searched_settings_reach_the_run_and_the_model(tmp_path: Path) -> None:
    spec = make_run(tmp_path, [make_rows(3)])
    trial = optuna.trial.FixedTrial(
        {"learning_rate": 0.001, "dropout": 0.3, "width": 32, "layers": 2, "weight_decay": 0.1, "negatives": 256}
        | {"later_share": 0.5}
    )
    values = tune.propose(trial)
    run = tune.with_values(spec, values, tmp_path / "out")
    assert {name: getattr(run.settings, name) for name in values} == values
    assert (run.model.width, run.model.layers, run.model.negatives, run.model.dropout) == (32, 2, 256, 0.3)
    assert (run.model.heads, run.output) == (spec.model.heads, str(tmp_path / "out"))
