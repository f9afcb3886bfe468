"""Airflow's DAGs describe the road that Databricks' jobs do. Airflow itself is no dependency: the file is read, not run
(how it was run: docs/decisions/0021)."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli import _parser
from jobs.pipeline import ASIDE, STAGES

ROOT = Path(__file__).parents[2]
FILE = ROOT / "conf/airflow/trailvec.py"


def dags() -> dict[str, tuple[str, int, dict[str, int]]]:
    tree = ast.parse(FILE.read_text())
    (jobs,) = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "JOBS"
    ]
    found: dict[str, tuple[str, int, dict[str, int]]] = ast.literal_eval(jobs)
    return found


def databricks(job: str) -> dict[str, Any]:
    (found,) = yaml.safe_load((ROOT / f"conf/databricks/{job}.job.yml").read_text())["resources"]["jobs"].values()
    return dict(found)


def unix_cron(quartz: str) -> str:
    second, minute, hour, day, month, weekday = quartz.split()
    assert second == "0"
    return " ".join("*" if part == "?" else part for part in (minute, hour, day, month, weekday))


def test_the_jobs_are_those_of_databricks() -> None:
    assert sorted(dags()) == sorted(file.name.removesuffix(".job.yml") for file in ROOT.glob("conf/databricks/*.yml"))


@pytest.mark.parametrize("job", sorted(dags()))
def test_a_job_is_task_by_task_that_of_databricks(job: str) -> None:
    schedule, seconds, stages = dags()[job]
    theirs = databricks(job)
    assert schedule == unix_cron(theirs["schedule"]["quartz_cron_expression"])
    assert seconds == theirs["timeout_seconds"]
    assert stages == {task["task_key"]: task["max_retries"] for task in theirs["tasks"]}
    # In a row, each after the one before it.
    follows = [(task["task_key"], [t["task_key"] for t in task.get("depends_on", [])]) for task in theirs["tasks"]]
    names = list(stages)
    assert follows == [(name, names[place - 1 : place] if place else []) for place, name in enumerate(names)]


def test_every_task_is_a_command_of_trailvec() -> None:
    for _, _, stages in dags().values():
        for stage in stages:
            arguments = _parser(STAGES, ASIDE).parse_args([stage, "--conf", "conf/mine.toml"])
            assert arguments.command == stage
