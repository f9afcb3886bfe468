"""The jobs on Databricks, as far as they can be checked without a workspace: the YAML against the bundles' own classes,
and all that it names against a wheel built from this tree, whose entry points are called as Databricks calls them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
import zoneinfo
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import yaml
from databricks.bundles.jobs import Job, JobPermission, JobRunAs
from packaging.requirements import Requirement

from jobs.cli import _parser
from jobs.config import Config, load_config
from jobs.pipeline import ASIDE, STAGES
from jobs.segments import read_segments
from jobs.sources import load_source
from jobs.spark_session import shuffle_tasks

ROOT = Path(__file__).parents[2]
BUNDLE: dict[str, Any] = yaml.safe_load((ROOT / "databricks.yml").read_text())
JOB_FILES = sorted(ROOT.glob("conf/databricks/*.job.yml"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = sorted(BUNDLE["targets"])
# What may stand at the top of a bundle and in a target: bundle/schema/jsonschema.json of Databricks' CLI.
TOP = {"artifacts", "bundle", "experimental", "include", "permissions", "presets", "python", "resources", "run_as"}
TOP |= {"scripts", "sync", "targets", "variables", "workspace"}
METADATA = f"{PROJECT['name']}-{PROJECT['version']}.dist-info"
REFERENCE = re.compile(r"\$\{([\w.]+)\}")


class Task(NamedTuple):
    """A task of a target's job; `file` is where it stands."""

    job: dict[str, Any]
    task: dict[str, Any]
    file: Path

    @property
    def cluster(self) -> dict[str, Any]:
        of_job = {cluster["job_cluster_key"]: cluster["new_cluster"] for cluster in self.job["job_clusters"]}
        return of_job[self.task["job_cluster_key"]]

    @property
    def entry_point(self) -> str:
        return self.task["python_wheel_task"]["entry_point"]

    @property
    def parameters(self) -> list[str]:
        return self.task["python_wheel_task"]["parameters"]


def variables(target: str) -> dict[str, Any]:
    """The bundle's variables as they are in a target."""
    defaults = {name: about["default"] for name, about in BUNDLE["variables"].items() if "default" in about}
    return defaults | BUNDLE["targets"][target]["variables"]


def resolved(value: Any, target: str) -> Any:
    """The value with all references replaced, as the CLI does it; a KeyError where one is to nothing."""
    if isinstance(value, dict):
        return {key: resolved(inner, target) for key, inner in value.items()}
    if isinstance(value, list):
        return [resolved(inner, target) for inner in value]
    if not isinstance(value, str):
        return value
    known = {f"var.{name}": given for name, given in variables(target).items()}
    known |= {"bundle.name": BUNDLE["bundle"]["name"], "bundle.target": target}
    if whole := REFERENCE.fullmatch(value):
        return resolved(known[whole[1]], target)
    return REFERENCE.sub(lambda found: str(resolved(known[found[1]], target)), value)


def jobs(target: str | None) -> dict[str, tuple[dict[str, Any], Path]]:
    """The jobs of a target by name, with their files; None: as they are written."""
    found = {}
    for file in JOB_FILES:
        for name, job in yaml.safe_load(file.read_text())["resources"]["jobs"].items():
            found[name] = (job if target is None else resolved(job, target), file)
    return found


def tasks(target: str) -> Iterator[Task]:
    for job, file in jobs(target).values():
        for task in job["tasks"]:
            yield Task(job, task, file)


def config_of(task: Task) -> Config:
    """The configuration that the task's command line gives."""
    words = dict(zip(task.parameters[::2], task.parameters[1::2], strict=True))
    sets = [value for flag, value in zip(task.parameters[::2], task.parameters[1::2], strict=True) if flag == "--set"]
    return load_config(ROOT / words["--conf"], sets)


# ---- the YAML alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [None, *TARGETS])
def test_the_jobs_are_such_as_bundles_know(target: str | None) -> None:
    """An unknown key, a wrong type or an unknown choice is an error of Job.from_dict."""
    assert len(jobs(target)) == len(JOB_FILES) == 4
    for name, (job, _) in jobs(target).items():
        assert Job.from_dict(job).as_dict()["tasks"], name


def test_the_rest_of_the_bundle_is_such_as_bundles_know() -> None:
    assert set(BUNDLE) <= TOP
    assert [set(yaml.safe_load(file.read_text())) for file in JOB_FILES] == [{"resources"}] * len(JOB_FILES)
    assert sorted(path for pattern in BUNDLE["include"] for path in ROOT.glob(pattern)) == JOB_FILES
    for target in TARGETS:
        principal = JobRunAs.from_dict(resolved(BUNDLE["run_as"], target)).service_principal_name
        levels = {}
        for permission in resolved(BUNDLE["permissions"], target):
            given = JobPermission.from_dict(permission)
            assert bool(given.group_name) != bool(given.service_principal_name)
            levels[given.group_name or given.service_principal_name] = permission["level"]
        assert set(levels.values()) <= {"CAN_MANAGE", "CAN_VIEW", "CAN_RUN"}  # those of a whole bundle
        assert levels[principal] == "CAN_MANAGE"  # it reads the wheel, and deploys
        # The same whoever deploys: a second place would be a second set of jobs over the same tables.
        assert resolved(BUNDLE["workspace"], target) == {
            "root_path": f"/Workspace/Users/{principal}/.bundle/trailvec/{target}"
        }
    for name, about in BUNDLE["variables"].items():
        assert set(about) <= {"description", "default", "type"}, name
        assert isinstance(about.get("default", ""), list) == (about.get("type") == "complex"), name


def test_the_targets_differ_in_variables_alone() -> None:
    given = {name: dict(target) for name, target in BUNDLE["targets"].items()}
    assert [name for name, target in given.items() if target.pop("default", False)] == ["dev"]
    assert {name: set(target) for name, target in given.items()} == {name: {"variables"} for name in ("dev", "prod")}
    without_default = {name for name, about in BUNDLE["variables"].items() if "default" not in about}
    for target in given.values():
        assert set(target["variables"]) == without_default


def test_every_variable_is_declared_and_used() -> None:
    text = "".join(file.read_text() for file in (ROOT / "databricks.yml", *JOB_FILES))
    assert {name for name in re.findall(r"\$\{var\.(\w+)\}", text)} == set(BUNDLE["variables"])


def test_no_secret_stands_in_the_yaml() -> None:
    found = set()
    for task in tasks("prod"):
        variables = dict(task.cluster["spark_env_vars"])
        assert variables.pop("LC_ALL") == "C.UTF-8"  # as start_spark wants it
        for name, value in variables.items():
            if name != "MLFLOW_EXPERIMENT_NAME":
                assert re.fullmatch(r"\{\{secrets/trailvec-prod/[a-z-]+\}\}", value), name
                found.add(name)
    code = "".join(file.read_text() for file in (ROOT / "jobs").glob("*.py"))
    assert found == set(re.findall(r'"(TRAILVEC_\w+_KEY)"', code))


@pytest.mark.parametrize("target", TARGETS)
def test_somebody_hears_of_every_job_and_none_runs_for_ever(target: str) -> None:
    for name, (job, _) in jobs(target).items():
        assert job["email_notifications"]["on_failure"] == [variables(target)["alerts_to"]], name
        (rule,) = job["health"]["rules"]
        assert 0 < rule["value"] < job["timeout_seconds"], name
        second, minute, hour, day, month, weekday = job["schedule"]["quartz_cron_expression"].split()
        assert (day == "?") != (weekday == "?"), name  # Quartz wants exactly one of them
        assert all(re.fullmatch(r"\d+", field) for field in (second, minute, hour)), name
        assert month == "*", name
        assert job["schedule"]["timezone_id"] in zoneinfo.available_timezones(), name
        assert job["tags"] == {"project": "trailvec", "environment": target, "part": name}


# ---- against the code -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_the_jobs_run_the_stages_of_the_road_in_its_order(target: str) -> None:
    road = []
    for name in ("data", "training", "scoring"):
        before: list[dict[str, str]] = []
        for task in jobs(target)[name][0]["tasks"]:
            assert task.get("depends_on", []) == before  # one after the other, as they are written
            before = [{"task_key": task["task_key"]}]
            road.append(task["task_key"])
    assert road == [stage.name for stage in STAGES]


@pytest.mark.parametrize("target", TARGETS)
def test_every_entry_point_is_the_projects_own(target: str) -> None:
    for task in tasks(target):
        assert task.task["python_wheel_task"]["package_name"] == PROJECT["name"]
        assert task.entry_point == f"trailvec-{task.task['task_key'].replace('_', '-')}"
        assert PROJECT["scripts"][task.entry_point] == f"jobs.{task.task['task_key']}:main"
    for stage in ASIDE:  # in no task
        assert PROJECT["scripts"][f"trailvec-{stage.name.replace('_', '-')}"] == f"jobs.{stage.name}:main"


@pytest.mark.parametrize("target", TARGETS)
def test_all_tasks_see_one_configuration(target: str) -> None:
    first, *others = [config_of(task) for task in tasks(target)]
    assert all(config == first for config in others)
    assert first.storage.root == f"/Volumes/{target}/trailvec/warehouse/trailvec"
    assert first.ingest.data_dir == f"/Volumes/{target}/trailvec/landing"
    for mapping in first.ingest.sources:
        assert load_source(mapping).input
    read_segments(first.export.segments)


@pytest.mark.parametrize("target", TARGETS)
def test_training_fits_its_cluster_and_the_upkeep_of_the_tables(target: str) -> None:
    task = next(task for task in tasks(target) if task.entry_point == "trailvec-train")
    config, cluster = config_of(task), task.cluster
    assert "-gpu-ml-" in cluster["spark_version"]
    assert config.train.launcher == "spark"
    assert 1 <= cluster["num_workers"] <= config.train.processes
    # Its files must be there until it ends, after each of the retries too.
    assert task.job["timeout_seconds"] < config.maintain.retention_hours * 3600


@pytest.mark.parametrize(("said", "cores", "tasks"), [("auto", 16, 200), ("auto", 320, 320), ("7", 320, 7)])
def test_a_cluster_that_has_just_begun_to_grow_gets_more_tasks_than_cores(said: str, cores: int, tasks: int) -> None:
    """With as many tasks as cores it would not grow."""
    context = SimpleNamespace(defaultParallelism=cores)
    session: Any = SimpleNamespace(conf={"spark.sql.shuffle.partitions": said}, sparkContext=context)
    assert shuffle_tasks(session) == tasks


def test_what_a_session_may_not_change_is_the_clusters() -> None:
    key = "spark.driver.maxResultSize"
    for task in tasks("prod"):
        if "autoscale" in task.cluster:
            assert task.cluster["spark_conf"]["spark.databricks.aggressiveWindowDownS"] == "600"
    unbounded = {task.entry_point for task in tasks("prod") if task.cluster.get("spark_conf", {}).get(key) == "0"}
    assert unbounded >= {"trailvec-train", "trailvec-evaluate"}


@pytest.mark.parametrize("target", TARGETS)
def test_every_cluster_is_of_the_runtime_that_the_pins_are_for(target: str) -> None:
    for task in tasks(target):
        assert re.fullmatch(r"15\.4\.x-((cpu|gpu)-ml-)?scala2\.12", task.cluster["spark_version"])
        assert task.cluster["data_security_mode"] == "SINGLE_USER"
        ml = {"requirements-ml.txt"} if "-ml-" in task.cluster["spark_version"] else set()
        files = {Path(library["requirements"]).name for library in task.task["libraries"] if "requirements" in library}
        assert files == {"requirements.txt"} | ml


def test_the_operations_page_names_commands_jobs_and_files_that_exist() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    commands = re.findall(r"`trailvec ([^`]+)`", page)
    assert len(commands) >= 6
    for command in commands:
        _parser().parse_args(shlex.split(command))
    assert set(re.findall(r"databricks bundle run (\w+)", page)) <= set(jobs("dev"))
    (task,) = re.findall(r'"only": \["(\w+)"\]', page)
    assert task in {task.task["task_key"] for task in tasks("dev")}
    for name, (job, _) in jobs("prod").items():
        assert re.search(rf"^\| {name} \| .* \| {job['description']} \|$", page, re.MULTILINE), name


# ---- against the wheel ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree; built from a copy, since setuptools leaves folders behind."""
    tree, out = tmp_path_factory.mktemp("tree") / "trailvec", tmp_path_factory.mktemp("wheel")
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("jobs", "spark_udfs", "training", "conf"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, tree]
    subprocess.run(command, check=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_that_the_code_reads(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("conf/**/*.toml")} <= held
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("jobs/templates/*")} <= held
    assert "jobs/log4j2.properties" in held
    assert {name.split("/")[0] for name in held} == {*("conf", "jobs", "spark_udfs", "training"), METADATA}


def test_the_wheel_lets_a_cluster_keep_its_own_spark(wheel: Path) -> None:
    """What it requires without an extra, a cluster installs; a second Spark would stand in front of the cluster's."""
    with zipfile.ZipFile(wheel) as packed:
        metadata = HeaderParser().parsestr(packed.read(f"{METADATA}/METADATA").decode())
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    plain = {requirement.name: requirement for requirement in required if requirement.marker is None}
    assert set(plain) == {
        *("deltalake", "jinja2", "numpy", "pandas", "pyarrow", "pydantic", "rich", "safetensors", "scipy")
    }
    # Of the runtime's own release notes: versions that it must be able to keep.
    for name, version in {"numpy": "1.23.5", "pandas": "1.5.3", "pyarrow": "14.0.1", "scipy": "1.11.1"}.items():
        assert version in plain[name].specifier, name
    asked = {r.name: r for r in required if r.marker is not None and "training" in str(r.marker)} | plain
    for file in (ROOT / "conf/databricks").glob("requirements*.txt"):
        for line in file.read_text().splitlines():
            if not line.startswith("#"):
                pin = Requirement(line)
                (exact,) = pin.specifier
                assert exact.operator == "=="
                assert exact.version in asked[pin.name].specifier, line


def test_the_libraries_that_tasks_name_are_built_or_stand_here(wheel: Path) -> None:
    (artifact,) = BUNDLE["artifacts"].values()
    assert artifact["build"].endswith("pip wheel --no-deps --wheel-dir dist .")
    assert "/dist/" in (ROOT / ".gitignore").read_text().splitlines()
    for task in tasks("prod"):
        for library in task.task["libraries"]:
            ((kind, path),) = library.items()
            place = Path(os.path.normpath(task.file.parent / path))
            if kind == "whl":
                assert place.parent == ROOT / "dist"
                assert Path(wheel.name).match(place.name)
            else:
                assert place.is_file()
                assert place.is_relative_to(ROOT / BUNDLE["sync"]["paths"][0])


CALL = """
import contextlib, importlib.metadata, io, json, sys
said = []
for entry_point, arguments in json.load(sys.stdin):
    entry_points = importlib.metadata.distribution("trailvec").entry_points
    (found,) = entry_points.select(name=entry_point, group="console_scripts")
    sys.argv = [entry_point, *arguments, "--show-config"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        found.load()()
    said.append([entry_point, sys.modules[found.module].__file__, json.loads(printed.getvalue())])
json.dump(said, sys.stdout)
"""


def test_the_wheels_entry_points_take_the_command_lines_of_the_tasks(wheel: Path, tmp_path: Path) -> None:
    """As Databricks calls them: the wheel's function, in a process of its own that an exit would end, in a folder
    that holds none of our files."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    calls = [(task.entry_point, task.parameters) for target in TARGETS for task in tasks(target)]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    environment.pop("TRAILVEC_CONF", None)
    done = subprocess.run(
        [sys.executable, "-c", CALL],
        cwd=elsewhere,
        env=environment,
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [entry_point for entry_point, _, _ in said] == [entry_point for entry_point, _ in calls]
    expected = [config_of(task).model_dump(mode="json") for target in TARGETS for task in tasks(target)]
    for (entry_point, file, shown), config in zip(said, expected, strict=True):
        assert Path(file).is_relative_to(site), entry_point
        assert shown == config, entry_point
