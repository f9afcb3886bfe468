"""Airflow's DAGs run what Databricks' jobs run. Airflow itself is no dependency: the file is read, not run
(how it was run: docs/decisions/0021)."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from jobs.cli import _parser

ROOT = Path(__file__).parents[2]
FILE = ROOT / "conf/airflow/trailvec.py"


def constant(name: str) -> Any:
    """What the file sets `name` to."""
    (value,) = [
        node.value
        for node in ast.parse(FILE.read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    ]
    return ast.literal_eval(value)


def dags() -> dict[str, tuple[str, int, dict[str, int]]]:
    found: dict[str, tuple[str, int, dict[str, int]]] = constant("JOBS")
    return found


def variables() -> set[str]:
    """Airflow's variables that a task's command asks for."""
    return set(re.findall(r"var\.value\.(\w+)", constant("COMMAND")))


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
            arguments = _parser().parse_args([stage, "--conf", "conf/mine.toml"])
            assert arguments.command == stage


def run_task(folder: Path, **values: object) -> subprocess.CompletedProcess[str]:
    """A task's command, as BashOperator runs it in a folder of its own; the stage's command is told, not run."""
    command = jinja2.Template(constant("COMMAND").replace("STAGE", "ingest"), undefined=jinja2.StrictUndefined)
    text = command.render(var={"value": values})
    return subprocess.run(["bash", "-c", text], cwd=folder, capture_output=True, text=True, check=False)


def test_a_task_starts_its_stage_in_the_folder_that_relative_paths_start_from(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "a home", tmp_path / "deleted afterwards"
    home.mkdir()
    elsewhere.mkdir()
    (home / "told").write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\n')
    (home / "told").chmod(0o755)
    done = run_task(elsewhere, trailvec_home=home, trailvec_run="./told", trailvec_conf="/etc/my conf/mine.toml")
    assert done.stdout.splitlines() == [str(home), "ingest", "--conf", "/etc/my conf/mine.toml"]
    # Where that folder is missing, nothing is started in the one that goes.
    done = run_task(elsewhere, trailvec_home=home / "not there", trailvec_run="echo", trailvec_conf="mine.toml")
    assert (done.returncode, done.stdout) == (1, "")


def test_the_file_names_every_variable_and_the_operations_page_every_dag_too() -> None:
    asked = variables()
    assert asked == {"trailvec_home", "trailvec_run", "trailvec_conf"}
    said = ast.get_docstring(ast.parse(FILE.read_text())) or ""
    assert set(re.findall(r"^  (trailvec_\w+) ", said, re.MULTILINE)) == asked
    names = asked | {f"trailvec_{job}" for job in dags()}  # Airflow starts a DAG only once somebody has unpaused it
    assert names <= set(re.findall(r"`(trailvec_\w+)`", (ROOT / "docs/operations.md").read_text()))


def test_the_file_names_every_variable_that_submit_yarn_reads() -> None:
    script = (ROOT / "scripts/submit_yarn.sh").read_text()
    reads = set(re.findall(r"[A-Z]+_[A-Z_]+", script.partition("# Environment variables:\n")[2].partition("\nset ")[0]))
    assert {"HADOOP_CONF_DIR", "TRAILVEC_ENVIRONMENT"} < reads
    assert reads <= set(re.findall(r"\w+", ast.get_docstring(ast.parse(FILE.read_text())) or ""))
