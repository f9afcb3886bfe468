"""Real processes killed, run twice and on a full disk: a small `scripts/faults.py`, whose own runs are longer."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession

from jobs.config import load_config
from jobs.runtime import Runtime
from scripts import faults
from scripts.faults import Job, differences, first_day, full_disk, kills, two_ingests, undisturbed_run


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two smallest of the four days: each of these tests starts a process half a dozen times."""
    folder = tmp_path_factory.mktemp("days")
    for day in ("2010-12-22.csv", "2011-02-06.csv"):
        shutil.copy(Path("tests/data/online_retail") / day, folder)
    return folder


@pytest.fixture(scope="module")
def run_here(spark: SparkSession) -> Callable[[Job], float]:
    """Runs a job in this process' Spark, which is up already. Not one whose tables are removed and made anew: Delta
    keeps what it has read of a table's log by its path."""

    def run(job: Job) -> float:
        runtime = Runtime(load_config(job.conf), spark)
        return sum(runtime.execute(stage).seconds for stage in job.stages)

    return run


@pytest.fixture(scope="module")
def compared(
    tmp_path_factory: pytest.TempPathFactory, days: Path, run_here: Callable[[Job], float]
) -> tuple[Job, float]:
    return undisturbed_run(tmp_path_factory.mktemp("undisturbed"), days, run_here)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, days: Path, run_here: Callable[[Job], float]) -> Job:
    return first_day(tmp_path_factory.mktemp("first"), days, run_here)


def test_differences_are_seen(tmp_path: Path) -> None:
    """The other tests rely on this."""
    for name, values in (("one", ["a", "b", "b"]), ("other", ["b", "a", "c"])):
        table = pa.table({"id": values, "events": [[{"at": 1}]] * 3})
        write_deltalake(tmp_path / name / "tables/sessions", table)
    # One missing "b", one extra "c".
    assert differences(tmp_path / "one", tmp_path / "other", ["sessions"]) == {"sessions": 2}
    assert differences(tmp_path / "one", tmp_path / "one", ["sessions"]) == {}


def test_kills_at_random_moments_leave_no_trace(
    tmp_path: Path, compared: tuple[Job, float], first: Job, run_here: Callable[[Job], float]
) -> None:
    found = kills(tmp_path, compared, first, times=2, seed=os.getpid(), run=run_here)
    # In either order: a stage that ends before its moment is started again, and killed after the other.
    assert sorted((kill["stage"], kill["done"]) for kill in found["kills"]) == [
        ("ingest", []),
        ("sessionize", ["ingest", "flag_users"]),
    ], found
    assert found["wrong"] == {}, found


def test_a_run_that_fails_by_itself_is_no_kill(tmp_path: Path, days: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    books = "checkpoints/ingest/retail/offsets"
    (tmp_path / "first_day" / books).mkdir(parents=True)
    # The run that is timed, and the one to be killed.
    endings = iter([f"touch {tmp_path}/killed/{books}/1; echo '✓ sessionize 1.0 s'", "echo it is broken; exit 1"])

    def start(job: Job) -> subprocess.Popen[bytes]:
        with job.log.open("wb") as file:
            return subprocess.Popen(["sh", "-c", next(endings)], stdout=file)

    monkeypatch.setattr(Job, "start", start)
    undisturbed, first = (Job(tmp_path, days, tmp_path / name) for name in ("undisturbed", "first_day"))
    with pytest.raises(RuntimeError, match="a run ended by itself with code 1: it is broken"):
        kills(tmp_path, (undisturbed, 3.0), first, times=2, seed=0)


def test_data_without_days_is_told_and_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["faults.py", "soak", "--folder", str(tmp_path), "--data", str(tmp_path / "nowhere")]
    (tmp_path / "soak").mkdir()
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        faults.main()
    assert f"--data {tmp_path / 'nowhere'} holds no *.csv" in capsys.readouterr().err
    assert (tmp_path / "soak").exists()


def test_what_lies_beside_the_check_stays(tmp_path: Path, days: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").touch()
    monkeypatch.setattr(faults, "undisturbed_run", lambda folder, _: folder.mkdir(parents=True))
    monkeypatch.setattr(faults, "first_day", lambda *_: None)
    monkeypatch.setattr(faults, "full_disk", lambda *_: {"wrong": {}})
    monkeypatch.setattr(sys, "argv", ["faults.py", "full_disk", "--folder", str(tmp_path), "--data", str(days)])
    with pytest.raises(SystemExit):
        faults.main()
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "full_disk"}


def test_a_soak_ends_in_the_tables_of_all_days_at_once(
    spark: SparkSession,
    tmp_path: Path,
    days: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(faults, "Runtime", lambda config, _=None: Runtime(config, spark))
    command = ["faults.py", "soak", "--batches", "2", "--data", str(days), "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        faults.main()
    assert stopped.value.code == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["batches"], found["wrong"]) == (2, {})
    assert min(found["rows"][table] for table in ("events", "rejected_events", "sessions")) > 0
    assert len(list(tmp_path.glob("soak/growing/again-*"))) == 1  # a file came a second time


def test_of_several_writers_of_a_version_one_has_it(spark: SparkSession, tmp_path: Path) -> None:
    """Each with a store of its own, as in processes of their own: Delta's default locks within one."""
    jvm, hadoop = spark._jvm, spark._jsc.hadoopConfiguration()
    assert spark.conf.get("spark.delta.logStore.file.impl") == "trailvec.LinkLogStore"
    together = Barrier(4)
    masked = jvm.org.apache.hadoop.conf.Configuration(hadoop)
    masked.set("fs.permissions.umask-mode", "027")  # not this process's

    def write(writer: int) -> list[int]:
        store, had = jvm.trailvec.LinkLogStore(hadoop), []
        for version in range(100):
            lines = jvm.java.util.ArrayList()
            lines.add(str(writer))
            together.wait(60)
            try:
                store.write(
                    jvm.org.apache.hadoop.fs.Path(f"file:{tmp_path}/{version}"), lines.iterator(), False, masked
                )
                had.append(version)
            except Py4JJavaError as error:
                assert str(error.java_exception).startswith("java.nio.file.FileAlreadyExistsException: ")  # noqa: PT017
        return had

    with ThreadPoolExecutor(4) as pool:
        had = list(pool.map(write, range(4)))
    found = {int(file.name): int(file.read_text()) for file in tmp_path.iterdir()}
    assert found == {version: writer for writer, versions in enumerate(had) for version in versions}
    assert sum(map(len, had)) == len(found) == 100
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o640}


def test_of_two_ingests_at_once_none_loses_or_doubles_a_row(
    tmp_path: Path, compared: tuple[Job, float], run_here: Callable[[Job], float]
) -> None:
    found = two_ingests(tmp_path, compared, run_here)
    assert found["wrong"] == {}, found
    # Rarely each of the two stops the other (a test of test_ingest_increments.py has them do so).
    for code, said in zip(found["codes"], found["said"], strict=True):
        by_the_other = re.match("trailvec: .*another (ingest is reading the same input|job wrote)", said)
        assert code == 0 or by_the_other, said


def test_a_full_disk_is_one_sentence_and_loses_nothing(
    tmp_path: Path, compared: tuple[Job, float], first: Job, run_here: Callable[[Job], float]
) -> None:
    if subprocess.run(["unshare", "--map-root-user", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system lets nobody but root make a mount namespace")
    found = full_disk(tmp_path, compared, first, run_here)
    assert found["wrong"] == {}, found
    assert all(found["kept"].values()), found
    assert any(one["code"] for one in found["full"]), found
    for one in found["full"]:
        assert one["code"] == 0 or "the disk is full: free some space" in one["said"], one
        assert one["code"] == 0 or one["lines"] <= 12, one  # what was finished before, and one sentence: no stack trace
