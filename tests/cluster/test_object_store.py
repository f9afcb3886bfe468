"""Tables, logs and exports on a real S3 server (scripts/s3_server.py), with conf/s3.toml unchanged.

Each job is a separate process with its keys in the environment, as a user would start it. Its output is read without
Spark: by pyarrow, DuckDB and delta-rs.
"""

from __future__ import annotations

import hmac
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from deltalake import DeltaTable, write_deltalake
from pyarrow import fs
from pyspark.sql import SparkSession

from jobs import export_segments, segment_files
from jobs.errors import TrailvecError
from jobs.files import HadoopPath
from jobs.runtime import Runtime
from jobs.segment_files import KEY, MANIFEST, ArrowFolder, delivered, open_destination
from jobs.segments import Segment
from jobs.tombstones import ERASE_KEY
from scripts.s3_server import S3Server
from tests.cluster.road import (
    DATA,
    REPOSITORY,
    ROAD,
    SETTINGS,
    is_forgotten,
    same_tables,
    some_users,
    train_here,
)
from tests.conftest import make_config
from tests.spark.test_neighbours import embed
from training.checkpoint import STATE, Progress, newest_checkpoint, read_about, read_checkpoint, write_checkpoint
from training.stores import StorePath

BUCKET = "lake"
CONF = """
extends = "{repository}/conf/s3.toml"
[storage]
root = "s3a://{bucket}/trailvec"
[ingest]
data_dir = "s3a://{bucket}/logs"
[spark]
master = "local[2]"
[spark.conf]
"spark.hadoop.fs.s3a.endpoint" = "{endpoint}"
"spark.hadoop.fs.s3a.path.style.access" = "true"
"spark.driver.memory" = "1g"
"spark.driver.host" = "127.0.0.1"
"spark.driver.bindAddress" = "127.0.0.1"
"spark.driver.extraJavaOptions" = "-XX:+UseSerialGC -XX:TieredStopAtLevel=1"
"spark.ui.enabled" = "false"
"spark.sql.shuffle.partitions" = "2"
"spark.databricks.delta.snapshotPartitions" = "1"
"spark.sql.codegen.wholeStage" = "false"      # small data, many plans: compiling them costs more than it saves
"spark.sql.codegen.factoryMode" = "NO_CODEGEN"
"""


class Store:
    """The server with the log's days in its bucket, and a configuration for it."""

    def __init__(self, server: S3Server, folder: Path) -> None:
        self.server, self.system, self.conf = server, server.filesystem, folder / "test.toml"
        text = CONF.format(repository=REPOSITORY, bucket=BUCKET, endpoint=server.endpoint)
        self.conf.write_text(text)
        self.system.create_dir(BUCKET)
        # A single thread: uploading more files at once than Arrow has threads deadlocks.
        fs.copy_files(str(DATA), f"{BUCKET}/logs", destination_filesystem=self.system, use_threads=False)
        self.options = {
            **{name: value for name, value in server.environment.items() if "METADATA" not in name},
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_ALLOW_HTTP": "true",
        }

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Starts a process group, so that one signal reaches Python, the JVM and its workers."""
        job_environment = {**os.environ, **self.server.environment, **environment}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, *command],
            stdout=pipe,
            stderr=pipe,
            text=True,
            cwd=REPOSITORY,
            env=job_environment,
            start_new_session=True,
        )

    def trailvec(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return self.start("-m", "jobs.cli", *arguments, "--conf", str(self.conf), **environment)

    def road(self) -> subprocess.Popen[str]:
        sets = [f"--set={key}={json.dumps(value)}" for key, value in SETTINGS.items()]
        return self.trailvec("run", "--to", "build_sequences", *sets)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield Store(server, tmp_path_factory.mktemp("conf"))


def finished_stages(output: str) -> list[tuple[str, str]]:
    """(✓ or =, name) of each stage that the job's output reports as finished."""
    return [(line.split()[0], line.split()[1]) for line in output.splitlines() if line.startswith(("✓", "="))]


@pytest.fixture(scope="module")
def tables(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the warehouse after a job that was killed midway and the same command again."""
    with store.road() as job:
        assert job.stderr is not None
        stderr = ""
        while "flag_users" not in stderr:
            line = job.stderr.readline()
            assert line, stderr
            stderr += line
        os.killpg(job.pid, signal.SIGKILL)
    with store.road() as job:
        _, stderr = job.communicate()
    assert job.returncode == 0, stderr
    names = [stage.name for stage in ROAD]
    assert finished_stages(stderr) == [("=", "ingest"), ("=", "flag_users"), *[("✓", name) for name in names[2:]]]
    copy = tmp_path_factory.mktemp("copy")
    fs.copy_files(f"{BUCKET}/trailvec/tables", str(copy / "tables"), source_filesystem=store.system)
    return copy


def test_after_a_kill_the_rows_are_those_of_a_local_run(tables: Path, expected: Path) -> None:
    same_tables(expected, tables)


def test_no_commit_shows_the_keys(store: Store, tables: Path) -> None:
    logs = [file.read_text() for file in tables.glob("tables/*/_delta_log/*.json")]
    assert any(store.server.endpoint in log for log in logs)
    for secret in (store.server.environment["AWS_ACCESS_KEY_ID"], store.server.environment["AWS_SECRET_ACCESS_KEY"]):
        assert not any(secret in log for log in logs)


def test_no_commit_of_three_writers_at_once_is_lost(store: Store, tmp_path: Path) -> None:
    """Two Spark sessions, and delta-rs, which uses the same conditional writes."""
    table, each = f"{BUCKET}/together", 5
    script = str(Path(__file__).with_name("commit.py"))
    bounds = [(0, each), (100, 100 + each)]
    jobs = [
        store.start(script, str(store.conf), f"s3a://{table}", str(first), str(last), str(tmp_path))
        for first, last in bounds
    ]
    while len(list(tmp_path.glob("ready-*"))) < len(jobs):
        assert all(job.poll() is None for job in jobs), [job.communicate() for job in jobs]
        time.sleep(0.05)
    (tmp_path / "go").touch()
    ours = 200
    while any(job.poll() is None for job in jobs):
        row = pa.table({"id": pa.array([ours], pa.int64())})
        write_deltalake(f"s3://{table}", row, mode="append", storage_options=store.options)
        ours += 1
        time.sleep(0.2)
    for job in jobs:
        _, stderr = job.communicate()
        assert job.returncode == 0, stderr
    read = DeltaTable(f"s3://{table}", storage_options=store.options).to_pyarrow_table()
    assert sorted(read["id"].to_pylist()) == [*range(each), *range(100, 100 + each), *range(200, ours)]


def is_one_sentence(sentence: str, job: subprocess.Popen[str]) -> str:
    """Checks a failed job's exit code and stderr; returns its stdout."""
    stdout, stderr = job.communicate()
    assert job.returncode == 1, stderr
    assert re.match(f"trailvec: .*{sentence}", stderr), stderr
    assert stderr.count("\n") == 1, stderr
    return stdout


def test_wrong_keys_and_no_keys_are_one_sentence(store: Store) -> None:
    nothing = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    jobs = {
        "lake/trailvec.*the store refuses the keys in AWS_": store.trailvec("tables", AWS_SECRET_ACCESS_KEY="x" * 32),
        "the environment has no AWS_ACCESS_KEY_ID": store.trailvec("tables", **nothing),
    }
    for sentence, job in jobs.items():
        assert is_one_sentence(sentence, job) == ""


def test_people_are_erased_files_kept_up_and_a_missing_bucket_is_one_sentence(
    store: Store, tables: Path, tmp_path: Path
) -> None:
    system = store.system
    fs.copy_files(f"{BUCKET}/trailvec/tables", f"{BUCKET}/erased/tables", system, system, use_threads=False)
    conf = store.conf.with_name("erased.toml")
    conf.write_text(store.conf.read_text().replace(f"{BUCKET}/trailvec", f"{BUCKET}/erased"))
    users = some_users(tables)
    (tmp_path / "ids.txt").write_text("\n".join(users))
    script = str(Path(__file__).with_name("forget.py"))
    environment = {ERASE_KEY: "a key of the tests", "PYTHONPATH": str(REPOSITORY)}
    with store.start(script, str(conf), str(tmp_path / "ids.txt"), **environment) as job:
        stdout = is_one_sentence("s3a://nowhere is not a bucket of this store: create it", job)
    fs.copy_files(f"{BUCKET}/erased/tables", str(tmp_path / "tables"), source_filesystem=store.system)
    is_forgotten(json.loads(stdout.splitlines()[-1]), tables, tmp_path, users)


TRAIN = {
    "vocabulary.min_count": 2,
    "sequences.max_length": 64,
    "train.tracking_uri": "none",
    "train.threads": 1,  # with more, sums would be taken in another order
    "train.batch_size": 16,
    "train.epochs": 1,
    "train.width": 16,
    "train.checkpoint_minutes": 0,
}


def test_training_reads_and_writes_on_the_store(
    store: Store, tables: Path, spark: SparkSession, tmp_path: Path
) -> None:
    """Bit-identical to a training from local files. Resuming after a kill: test_yarn.py, and the next test."""
    command = ["train", *[f"--set={key}={json.dumps(value)}" for key, value in TRAIN.items()]]

    def stored(pattern: str) -> list[str]:
        chosen = fs.FileSelector(f"{BUCKET}/trailvec/models", allow_not_found=True, recursive=True)
        names = [info.path.partition("/models/")[2] for info in store.system.get_file_info(chosen)]
        return [name for name in names if re.fullmatch(pattern, name)]

    with store.trailvec(*command) as job:
        while not stored(r"\w+\.checkpoints/\d+-\d+/checkpoint\.json"):
            assert job.poll() is None, job.communicate()
            time.sleep(0.1)
        _, stderr = job.communicate()
    assert job.returncode == 0, stderr
    (version,) = {name.partition("/")[0] for name in stored(r"\w+/model\.json")}
    assert stored(r".*\.checkpoints/.*|\..*") == []

    fs.copy_files(f"{BUCKET}/trailvec/models", str(tmp_path / "models"), source_filesystem=store.system)
    assert json.loads((tmp_path / "models/current.json").read_text()) == {"model_version": version}
    about = read_about(tmp_path / "models" / version)  # checks that the weights match the digest that it names
    expected = train_here(tables, tmp_path / "here", spark, TRAIN)
    assert about["training"]["parameters_sha256_by_rank"] == expected["training"]["parameters_sha256_by_rank"]


@pytest.fixture
def host(store: Store, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's host and port, with the keys in the environment."""
    for name, value in store.server.environment.items():
        monkeypatch.setenv(name, value)
    return store.server.endpoint.removeprefix("http://")


def test_of_the_checkpoints_on_the_store_the_newest_whole_one_is_read_back(host: str) -> None:
    folder = StorePath(f"s3+http://us-east-1@{host}/{BUCKET}/m1.checkpoints")
    assert newest_checkpoint(folder) is None
    for step in (1, 2):
        write_checkpoint(folder, Progress(ranks=1, step=step), {"model.x": torch.full((3,), float(step))}, keep=1)
    (folder / "00009-0000000009" / STATE).write_text("what a kill left")
    newest = newest_checkpoint(folder)
    assert newest is not None
    progress, tensors = read_checkpoint(newest)
    assert (progress.step, tensors["model.x"].tolist()) == (2, [2.0, 2.0, 2.0])
    assert [path.name for path in folder.glob("*")] == ["00001-0000000002", "00009-0000000009"]


@pytest.fixture
def place(host: str) -> Callable[[str], ArrowFolder]:
    """Resolves a segment's destination."""
    quoted = host.replace(":", "%3A")

    def at(folder: str) -> ArrowFolder:
        where = f"s3://{folder}?endpoint_override={quoted}&scheme=http&region=us-east-1"
        segment = Segment.model_construct(name="x", owner="", purpose="", destination=where)
        return open_destination(Runtime(make_config(Path("unused"))), segment)

    return at


def test_an_export_is_whole_or_has_no_manifest(
    store: Store, place: Callable[[str], ArrowFolder], tmp_path: Path
) -> None:
    to = place(f"{BUCKET}/exports/x")
    parts = ("part-00000.parquet", "part-00001.csv.gz", MANIFEST)

    def export(text: str, failing: bool = False) -> None:
        with delivered(to, tmp_path) as folder:
            for name in parts:
                (folder / name).write_text(text)
            if failing:
                raise RuntimeError("stopped")

    def contents() -> dict[str, str]:
        infos = store.system.get_file_info(fs.FileSelector(f"{BUCKET}/exports/x"))
        return {info.base_name: store.system.open_input_file(info.path).read().decode() for info in infos}

    export("one")
    assert contents() == dict.fromkeys(parts, "one")
    with pytest.raises(RuntimeError, match="stopped"):
        export("two", failing=True)
    assert contents() == dict.fromkeys(parts, "one")
    export("three")
    assert contents() == dict.fromkeys(parts, "three")


SEGMENT = """
name = "likes"
owner = "tests"
purpose = "to be found again"
size = 6
consent = "push"
suppress = [{ file = "never.csv" }]
seeds = { file = "seeds.txt", method = "nearest_seed" }
"""


def test_an_export_by_lists_where_nothing_can_be_renamed_is_the_one_by_cosines(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lists are on this machine alone, and none of their content stays on the store. Hadoop's local file system
    stands in for S3's; training and erasures write to it in the same way."""
    angles = {f"u{number:02}": random.Random(number).uniform(0, 2 * math.pi) for number in range(24)}
    (tmp_path / "likes.toml").write_text(SEGMENT)
    (tmp_path / "seeds.txt").write_text("u03\nu11\nnobody\n")
    (tmp_path / "never.csv").write_text("user_id\nu04\nu12\n")
    consent = {"user_id": list(angles), "push": [number % 5 > 0 for number in range(24)]}
    pq.write_table(pa.table(consent), tmp_path / "consent.parquet")
    sets = [f'export.segments=["{tmp_path}/likes.toml"]', f'export.consent={{ file = "{tmp_path}/consent.parquet" }}']
    monkeypatch.setenv(KEY, "the key of the tests")
    here = Runtime(make_config(tmp_path / "here", *sets, 'storage.database="exported"'), spark)
    embed(here, spark, {user: [math.cos(angle), math.sin(angle)] for user, angle in angles.items()}, {"i1": [1.0, 0.0]})
    shutil.copytree(here.root, tmp_path / "there")

    monkeypatch.setattr(HadoopPath, "renames", False)
    monkeypatch.setattr(HadoopPath, "replace", None)
    monkeypatch.setattr(segment_files, "local_path", lambda _: None)
    monkeypatch.setattr(Runtime, "place", HadoopPath(f"file://{tmp_path}/there").qualified(spark))
    Runtime(here.config, spark).execute(export_segments.STAGE)
    written = {path for path in (tmp_path / "there").rglob("*") if path.is_file() and path.suffix != ".crc"}
    outside = {path for path in written if not {"tables", "models"} & {*path.parts}}
    names = {"manifest.json", "part-00000.parquet", "report.html"}
    assert outside == {tmp_path / "there/exports/likes" / name for name in names}
    part = pq.read_table(tmp_path / "there/exports/likes/part-00000.parquet")
    out = {"u03", "u11", "u04", "u12", *list(angles)[::5]}
    cosines = {user: max(math.cos(angle - angles[seed]) for seed in ("u03", "u11")) for user, angle in angles.items()}
    best = sorted(cosines.keys() - out, key=lambda user: -cosines[user])
    expected = [hmac.new(b"the key of the tests", user.encode(), "sha256").hexdigest() for user in best[:6]]
    assert part["user_id"].to_pylist() == expected
    assert part["score"].to_pylist() == pytest.approx([cosines[user] for user in best[:6]], abs=1e-5)
    assert part["rank"].to_pylist() == [*range(1, 7)]
    assert part.column_names == ["user_id", "score", "rank"]


def test_an_export_to_a_missing_bucket_is_one_sentence(place: Callable[[str], ArrowFolder], tmp_path: Path) -> None:
    with pytest.raises(TrailvecError, match="x can't be read or written"), delivered(place("nowhere/x"), tmp_path):
        pass
