"""What MLflow keeps, read with sqlite3 from the file that it writes."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from jobs.tracking import attach, tracked
from tests.sequence_files import make_rows, make_run


def rows(root: Path, query: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(root / "mlflow.db")
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def test_a_killed_run_and_its_second_half_are_one_run(tmp_path: Path) -> None:
    spec = make_run(tmp_path, [make_rows(5)], learning_rate=0.125)
    said: list[str] = []
    with contextlib.suppress(KeyboardInterrupt), tracked("local", tmp_path, spec, said.append) as tracker:
        tracker.metrics(100, {"loss": 4.5, "ndcg@10": 0.25})
        raise KeyboardInterrupt
    assert [status for (status,) in rows(tmp_path, "SELECT status FROM runs")] == ["FAILED"]
    with tracked("local", tmp_path, spec, said.append) as tracker:
        tracker.metrics(200, {"loss": 4.25})
        (tmp_path / "card.md").write_text("a card")
        tracker.files(tmp_path / "card.md")

    assert rows(tmp_path, "SELECT name, status FROM runs") == [("test", "FINISHED")]
    parameters = dict(rows(tmp_path, "SELECT key, value FROM params"))
    assert (parameters["learning_rate"], parameters["width"], parameters["train_rows"]) == ("0.125", "16", "5")
    assert rows(tmp_path, "SELECT key, value, step FROM metrics ORDER BY step, key") == [
        ("loss", 4.5, 100),
        ("ndcg_at_10", 0.25, 100),
        ("loss", 4.25, 200),
    ]
    assert [path.read_text() for path in tmp_path.glob("mlruns/*/artifacts/card.md")] == ["a card"]
    assert said == []


def test_a_server_that_is_away_costs_one_warning(tmp_path: Path) -> None:
    spec = make_run(tmp_path, [make_rows(5)])
    said: list[str] = []
    with tracked("http://127.0.0.1:9", tmp_path, spec, said.append) as tracker:  # the discard port: nobody listens
        tracker.metrics(100, {"loss": 4.5})
        tracker.files(tmp_path / "no-such-file")
    assert len(said) == 1
    assert said[0].startswith("MLflow (http://127.0.0.1:9) failed; the run continues untracked: ")


def test_a_later_page_goes_to_the_run_of_its_model(tmp_path: Path) -> None:
    said: list[str] = []
    attach("local", tmp_path, "test", ("evaluation.html", "a page"), said.append)  # no run yet
    assert not list(tmp_path.iterdir())
    spec = make_run(tmp_path, [make_rows(5)])
    for version in ("test", "other"):
        named = spec.model_copy(update={"about": {"model_version": version}})
        with tracked("local", tmp_path, named, said.append):
            pass
    attach("local", tmp_path, "test", ("evaluation.html", "a page"), said.append)
    attach("local", tmp_path, "unknown", ("evaluation.html", "a page"), said.append)
    ((run,),) = rows(tmp_path, "SELECT run_uuid FROM runs WHERE name = 'test'")
    assert {path: path.read_text() for path in tmp_path.glob("mlruns/*/artifacts/*")} == {
        tmp_path / "mlruns" / run / "artifacts" / "evaluation.html": "a page"
    }
    assert said == []


def test_none_keeps_nothing(tmp_path: Path) -> None:
    spec = make_run(tmp_path, [make_rows(5)])
    with tracked("none", tmp_path / "root", spec, pytest.fail) as tracker:
        tracker.metrics(100, {"loss": 4.5})
    assert not (tmp_path / "root").exists()
