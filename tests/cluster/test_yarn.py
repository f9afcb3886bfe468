"""On a real YARN and HDFS, in cluster mode, through scripts/submit_yarn.sh: the data stages with a shipped Python;
training, scoring and an export with this machine's (with PyTorch the archive takes gigabytes).

The nodes' environment holds nothing but Java and a PATH (scripts/yarn_cluster.py); only Spark's jars are taken from
where they are installed here, as on a cluster that has Spark.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pyspark
import pytest
from pyspark.sql import SparkSession

from jobs.config import MaintainSettings
from jobs.files import HadoopPath
from jobs.maintain_tables import maintain
from jobs.runtime import Runtime
from scripts.faults import delta_reader
from scripts.yarn_cluster import Cluster
from tests.cluster.road import (
    DATA,
    REPOSITORY,
    ROAD,
    SETTINGS,
    is_kept_up,
    same_tables,
    some_users,
    train_here,
)
from tests.conftest import make_config

pytestmark = pytest.mark.timeout(1800)  # two drivers in sequence, on a machine that may be busy
SPARK_JARS = str(Path(pyspark.__file__).parent / "jars")
CONF = """
extends = "yarn.toml"
[spark.conf]
"spark.driver.memory" = "640m"
"spark.driver.memoryOverhead" = "512m"
"spark.executor.instances" = "2"
"spark.executor.cores" = "1"
"spark.executor.memory" = "512m"
"spark.executor.memoryOverhead" = "384m"
"spark.yarn.jars" = "local:{jars}/*"
"spark.yarn.appMasterEnv.SPARK_LOCAL_IP" = "127.0.0.1"
"spark.executorEnv.SPARK_LOCAL_IP" = "127.0.0.1"
"spark.driver.extraJavaOptions" = "-XX:+UseSerialGC -XX:TieredStopAtLevel=1"
"spark.executor.extraJavaOptions" = "-XX:+UseSerialGC -XX:TieredStopAtLevel=1"
"spark.yarn.am.waitTime" = "600s"             # a busy machine takes its time
"spark.network.timeout" = "600s"
"spark.ui.enabled" = "false"
"spark.sql.shuffle.partitions" = "2"
"spark.databricks.delta.snapshotPartitions" = "1"
"spark.sql.codegen.wholeStage" = "false"      # small data, many plans: compiling them costs more than it saves
"spark.sql.codegen.factoryMode" = "NO_CODEGEN"
"""


# A training process and its executor's JVM share a container, and PyTorch alone takes 400 MB of it.
LEARN = """
extends = "test.toml"
[storage]
root = "hdfs:///lake"
[vocabulary]
min_count = 2
[sequences]
max_length = 64
[train]
launcher = "spark"
tracking_uri = "none"
processes = 2
threads = 1    # with more, sums are taken in another order
batch_size = 4
epochs = 5
width = 16
checkpoint_minutes = 0
[export]
segments = ["conf/segments/like_the_first.toml"]
[spark.conf]
"spark.driver.memoryOverhead" = "1536m"
"spark.executor.memoryOverhead" = "1536m"
"""
SEEDS = 8
SEGMENT = f"""
name = "like_the_first"
owner = "tests"
purpose = "to be found again"
size = 12
suppress = [{{ file = "never.csv" }}]
[seeds]
sql = "SELECT user_id FROM sequences WHERE split = 'score' ORDER BY user_id LIMIT {SEEDS}"
method = "nearest_seed"
"""
EXPORT_KEY = 'the key $$ of "the" `tests`'


@dataclass(frozen=True)
class Submit:
    """scripts/submit_yarn.sh for one cluster, one environment and one configuration."""

    cluster: Cluster
    environment: str
    conf: Path

    @contextmanager
    def start(self, job: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Runs the script; whatever is left of it when the block ends is killed, Spark's client too."""
        command = [str(REPOSITORY / "scripts/submit_yarn.sh"), job, "--conf", str(self.conf), *arguments]
        variables = {"HADOOP_CONF_DIR": str(self.cluster.conf), "TRAILVEC_ENVIRONMENT": str(self.environment)}
        variables["TRAILVEC_EXPORT_KEY"] = EXPORT_KEY
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **variables}, start_new_session=True
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def run(self, job: str, *arguments: str) -> tuple[int, list[str], list[str]]:
        """The exit code, and the lines of stdout and stderr."""
        with self.start(job, *arguments) as process:
            stdout, stderr = process.communicate()
        return process.returncode, stdout.splitlines(), stderr.splitlines()

    def fetch(self, folder: str, to: Path) -> Path:
        """Copies a folder from HDFS."""
        (HadoopPath(self.cluster.root) / folder).get(to / folder)
        return to / folder


def road(root: str) -> list[str]:
    sets = {"storage.root": root, **SETTINGS}
    return ["--to", "build_sequences", *[f"--set={key}={json.dumps(value)}" for key, value in sets.items()]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("yarn"), memory_mb=4608) as running:
        yield running


@pytest.fixture(scope="module")
def environment() -> Path:
    script = REPOSITORY / "scripts/package_environment.sh"
    done = subprocess.run([script, "data"], stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def submit(
    cluster: Cluster, environment: Path, spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> Submit:
    """With the log on HDFS, which this JVM reads and writes too, and the Python, which the nodes keep from job to job
    (unpacking it takes each half a minute)."""
    for day in DATA.glob("*.csv"):
        (HadoopPath(cluster.root) / "logs" / day.name).put(day)
    shipped = HadoopPath(cluster.root) / "environments" / environment.name
    shipped.put(environment)
    folder = tmp_path_factory.mktemp("conf")
    shutil.copytree(REPOSITORY / "conf", folder, dirs_exist_ok=True)
    text = CONF.format(jars=SPARK_JARS)
    (folder / "test.toml").write_text(text)
    return Submit(cluster, str(shipped), folder / "test.toml")


@pytest.fixture(scope="module")
def lake(submit: Submit) -> tuple[list[str], list[str]]:
    """The output of a run of the data stages during which an executor was lost, and then the driver's node, which came
    back at once."""
    cluster = submit.cluster
    with submit.start("run", *road("hdfs:///lake")) as process:
        for after, before, strike in (
            ("✓ flag_users", "sessionize", lambda: kill_one("YarnCoarseGrainedExecutorBackend", cluster)),
            ("✓ sessionize", "build_sequences", lambda: restart_node(cluster)),
        ):
            while after not in driver_output(cluster):
                assert process.poll() is None, process.communicate()
                time.sleep(0.1)
            strike()
            assert before not in driver_output(cluster)
        stdout, stderr = process.communicate()
    assert process.returncode == 0, (stdout, stderr)
    return stdout.splitlines(), stderr.splitlines()


def restart_node(cluster: Cluster) -> None:
    """Restarts the newest driver's node."""
    log = driver_log(cluster)
    assert log is not None
    node = log.relative_to(cluster.data).parts[0]
    cluster.kill(node)
    cluster.restart(node)


def test_after_a_lost_driver_executor_and_node_the_rows_are_those_of_a_local_run(
    submit: Submit, lake: tuple[list[str], list[str]], expected: Path, tmp_path: Path
) -> None:
    stdout, stderr = lake
    # The output is the second driver's: what the first had finished is not redone.
    stages = [line.split()[:2] for line in stdout if line.startswith(("✓", "="))]
    assert stages[:3] == [["=", stage.name] for stage in ROAD[:3]]
    assert [name for _, name in stages] == [stage.name for stage in ROAD]
    assert stages[-1][0] == "✓"
    assert [line.split()[-1] for line in stderr] == ["submitted", "succeeded"]
    same_tables(expected, submit.fetch("lake", tmp_path))


def test_training_scoring_and_an_export_end_right_after_killed_executors(
    submit: Submit,
    lake: tuple[list[str], list[str]],
    expected: Path,
    spark: SparkSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The results are read from HDFS without Spark; training again here from local files gives the same bits."""
    conf = submit.conf.with_name("learn.toml")
    conf.write_text(LEARN)
    (conf.parent / "segments/like_the_first.toml").write_text(SEGMENT)
    never = some_users(expected, 2 * SEEDS)
    (conf.parent / "segments/never.csv").write_text("\n".join(["user_id", *never]))
    learn = replace(submit, environment=f"local:{sys.prefix}", conf=conf)
    with learn.start(str(Path(__file__).with_name("learn.py"))) as process:
        for far_enough in (lambda: checkpoints(submit.cluster), lambda: "✓ align" in driver_output(submit.cluster)):
            while not far_enough():
                assert process.poll() is None, process.communicate()
                time.sleep(0.2)
            kill_one("YarnCoarseGrainedExecutorBackend", submit.cluster)
        assert "score_users" not in driver_output(submit.cluster)
        stdout, stderr = process.communicate()
    assert process.returncode == 0, (stdout, stderr)
    lines = stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("✓")] == [
        "train",
        "align",
        "score_users",
        "export_segments",
    ]
    assert any("resumes from a checkpoint" in line for line in lines)

    copy = submit.fetch("lake", tmp_path)
    (folder,) = (path for path in (copy / "models").iterdir() if path.is_dir())
    assert json.loads((copy / "models/current.json").read_text()) == {"model_version": folder.name}
    assert sorted(path.name for path in folder.iterdir()) == sorted(MODEL)
    about = json.loads((folder / "model.json").read_text())
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == about["weights_sha256"]
    settings = {f"train.{key}": value for key, value in tomllib.loads(LEARN)["train"].items()}
    settings |= {name: SETTINGS[name] for name in ("vocabulary.min_count", "sequences.max_length")}
    for name in [name for name in os.environ if name.startswith("OPENBLAS_")]:
        monkeypatch.delenv(name)  # the nodes have none; another kernel would round the first vectors differently
    again = train_here(copy, tmp_path / "here", spark, settings)
    assert about["training"]["processes"] == again["training"]["processes"] == 2
    assert about["training"]["parameters_sha256_by_rank"] == again["training"]["parameters_sha256_by_rank"]

    tables = [f"delta_scan('{copy}/tables/{name}')" for name in ("sequences", "user_embeddings")]
    rows = f"{tables[0]} s LEFT JOIN {tables[1]} e USING (user_id)"
    query = f"SELECT user_id, vector, is_cold FROM {rows} WHERE s.split = 'score' ORDER BY user_id"
    users = delta_reader().execute(query).fetchall()
    assert len({user for user, *_ in users}) == len(users) > 50
    scores = likeness(users, set(never))
    export = copy / "exports/like_the_first"
    assert sorted(path.name for path in export.iterdir()) == ["manifest.json", "part-00000.parquet", "report.html"]
    part = pq.read_table(export / "part-00000.parquet").to_pydict()
    assert part["rank"] == [*range(1, 13)]
    assert part["score"] == pytest.approx([scores[user] for user in part["user_id"]], abs=1e-5)
    assert part["score"] == pytest.approx(sorted(scores.values(), reverse=True)[:12], abs=1e-5)
    assert [path.name for path in [*copy.iterdir(), *(copy / "models").iterdir()] if path.name.startswith(".")] == []


MODEL = ("alignment.json", "card.md", "model.json", "model.safetensors", "run.json", "training.svg")


def checkpoints(cluster: Cluster) -> list[str]:
    """The names of a training's complete checkpoints, as listed by the NameNode."""
    (models,) = listed(cluster, "/lake/models", r".*\.checkpoints") or [None]
    return [] if models is None else listed(cluster, f"/lake/models/{models}", r"\d+-\d+")


def listed(cluster: Cluster, folder: str, pattern: str) -> list[str]:
    try:
        with urllib.request.urlopen(f"{cluster.webhdfs}{folder}?op=LISTSTATUS", timeout=30) as answer:
            statuses = json.load(answer)["FileStatuses"]["FileStatus"]
    except urllib.error.HTTPError:  # not there yet
        return []
    return [name for name in (status["pathSuffix"] for status in statuses) if re.fullmatch(pattern, name)]


def likeness(users: list[tuple[str, list[float], bool]], never: set[str]) -> dict[str, float]:
    """By hashed id, the highest cosine to any seed (the first SEEDS users) that is not cold, for all other users with a
    non-zero vector that are not in `never`."""
    unit = {}
    for user, vector, _ in users:
        values = np.array(vector, np.float64)
        assert np.isfinite(values).all()
        if values.any():
            unit[user] = values / np.linalg.norm(values)
    first = [unit[user] for user, _, is_cold in users[:SEEDS] if not is_cold]
    return {
        hmac.new(EXPORT_KEY.encode(), user.encode(), "sha256").hexdigest(): max(
            float(unit[user] @ seed) for seed in first
        )
        for user, *_ in users[SEEDS:]
        if user in unit and user not in never
    }


def test_old_events_go_and_files_are_kept_up_on_hdfs(
    submit: Submit, expected: Path, spark: SparkSession, tmp_path: Path
) -> None:
    """For an erasure on a store other than a local disk: test_object_store.py."""
    last_kept = datetime(2011, 3, 1, tzinfo=timezone.utc)  # the log has days before and after it
    root = HadoopPath(submit.cluster.root) / "kept"
    (root / "tables" / "events").put(expected / "tables/events")
    config = make_config(Path("unused"), f'storage.root="{root}"', conf=REPOSITORY / "conf/base.toml")
    days = (datetime.now(timezone.utc) - last_kept).days
    upkeep = MaintainSettings.model_construct(retention_hours=0, keep_days={"events": days})
    (report,) = maintain(Runtime(config.model_copy(update={"maintain": upkeep}), spark), ["events"])
    assert report["rows_too_old"] > 0
    assert report["bytes_freed"] > 0
    folder = submit.fetch("kept", tmp_path) / "tables/events"
    is_kept_up(report, folder)
    # Gone from the files of every version.
    files = [str(file) for file in folder.rglob("*.parquet") if "_delta_log" not in file.parts]
    count = f"SELECT count(*), count(*) FILTER (event_ts < '{last_kept:%F}T00:00:00Z') FROM read_parquet(?)"
    assert delta_reader().execute(count, [files]).fetchall() == [(report["rows"], 0)]
    assert report["rows"] > 0


def kill_one(main: str, cluster: Cluster) -> None:
    """Kills (SIGKILL) one JVM that runs `main` in the newest attempt's containers."""
    log = driver_log(cluster)
    assert log is not None
    attempt = log.parent.name.rpartition("_")[0]
    for process in psutil.process_iter(["name", "cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if process.info["name"] == "java" and main in command and attempt in command and str(cluster.data) in command:
            process.kill()
            return
    raise AssertionError(f"no {main} of {attempt} runs")


def driver_log(cluster: Cluster) -> Path | None:
    """The stdout of the newest driver (the first container of an attempt)."""
    logs = cluster.data.glob("node*/logs/application_*/container_*_000001/stdout")
    return max(logs, key=lambda log: log.parent.name, default=None)


def driver_output(cluster: Cluster) -> str:
    log = driver_log(cluster)
    return "" if log is None else log.read_text()


ONCE = """
"spark.yarn.maxAppAttempts" = "1"
"spark.eventLog.enabled" = "true"
"spark.eventLog.dir" = "hdfs:///tmp"
"""


def test_nothing_of_this_machine_is_seen_nor_a_key_in_logs_and_a_failure_is_one_line(
    submit: Submit, tmp_path: Path
) -> None:
    once = submit.conf.with_name("once.toml")
    one = submit.conf.read_text().replace('"spark.executor.instances" = "2"', '"spark.executor.instances" = "1"')
    once.write_text(one + ONCE)
    code, stdout, stderr = replace(submit, conf=once).run(str(Path(__file__).with_name("look.py")))
    report = json.loads(next(line for line in stdout if line.startswith("{")))
    containers = re.compile(f"{submit.cluster.data}/node[12]/local/usercache/")
    assert report["key"] == hashlib.sha256(EXPORT_KEY.encode()).hexdigest()
    # The containers' logs, including their launch scripts, and Spark's event log.
    logs = b"".join(file.read_bytes() for file in submit.fetch("tmp", tmp_path).rglob("*") if file.is_file())
    for text, is_there in ((b"launch_container.sh", True), (b"EnvironmentUpdate", True), (b"the key $$", False)):
        assert (text in logs) == is_there, text
    for place in ("driver", "worker"):
        assert report[place]["temporary"] == f"{report[place]['folder']}/tmp"
        assert [
            path
            for path in [report[place]["folder"], report[place]["prefix"], *report[place]["modules"]]
            if not containers.match(path)
        ] == []
        # Debian's Python is installed among the system's own libraries.
        base = sysconfig.get_path("stdlib") if sys.base_prefix == "/usr" else sys.base_prefix
        local_folders = tuple(f"{folder}/" for folder in (sys.prefix, base, REPOSITORY))
        files = [*report[place]["path"], *report[place]["files"]]
        assert [path for path in files if path.startswith(local_folders) and not path.startswith(SPARK_JARS)] == []
    assert code == 1
    assert stdout[-1].startswith("trailvec: table sequences does not exist under hdfs://")
    assert stderr[-1].startswith("submit_yarn: application_")
    assert stderr[-1].endswith(f" failed: {stdout[-1]}")


def test_an_environment_whose_interpreter_stays_here_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(os.path.realpath(sys.executable))
    (tmp_path / "bin/python3.11").symlink_to("python")
    with tarfile.open(tmp_path / "linked.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "bin", "bin")
    command = [REPOSITORY / "scripts/package_environment.sh", "check", tmp_path / "linked.tar.gz"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout, process.stderr.count("\n")) == (1, "", 1)
    assert f"is a link to {os.path.realpath(sys.executable)}, which no node has" in process.stderr
