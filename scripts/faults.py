"""Checks what faults leave behind, with real processes on real days: python scripts/faults.py CHECK [--data FOLDER]

  kills        kills the process and its JVM (SIGKILL) at a random moment of ingest, then of sessionize, then runs to
               the end; repeats until the given number of kills. The stages add days to tables of the first day and,
               every other time, make the tables of all days; the seed decides which comes first
  two_ingests  two identical ingests at once
  full_disk    a disk (tmpfs, in its own mount namespace) that fills up midway, then has room again
  soak         the days in shuffled order, in the given number of batches, some of their files twice

After each check, the tables must equal those of one undisturbed run, row by row, as read by DuckDB; otherwise it exits
with 1. FOLDER holds daily CSVs of Online Retail (default: the four used by the tests). Output goes to
build/faults/CHECK, which is recreated (--folder OTHER: OTHER/CHECK). Each check prints one JSON object as its last
line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import duckdb
import duckdb_extension_delta

from jobs.config import load_config
from jobs.pipeline import STAGES
from jobs.runtime import Runtime

REPOSITORY = Path(__file__).parents[1]
TABLES = ("events", "rejected_events", "flagged_users", "sessions")
_OF_THE_RUN = MappingProxyType({"rejected_events": "refused_on"})  # midnight may fall between two runs
# A rejected record names its file, whose path differs where days are copied into a folder that grows.
_OF_THE_FOLDER = MappingProxyType({"rejected_events": "file, refused_on"})
# Rules strict enough to cut sessions and flag users on these days, so that every stage has something to write.
CONF = """
[spark]
master = "local[2]"
[spark.conf]
"spark.driver.memory" = "1g"
"spark.driver.host" = "127.0.0.1"
"spark.driver.bindAddress" = "127.0.0.1"
"spark.ui.enabled" = "false"
"spark.sql.shuffle.partitions" = "2"
"spark.databricks.delta.snapshotPartitions" = "1"
"spark.sql.codegen.wholeStage" = "false"      # small data, many plans: compiling them costs more than it saves
"spark.sql.codegen.factoryMode" = "NO_CODEGEN"
"spark.driver.extraJavaOptions" = "-XX:+UseSerialGC -XX:TieredStopAtLevel=1"
[storage]
root = "{root}"
[ingest]
sources = ["{source}"]
data_dir = "{data}"
max_rejected_share = 1.0
max_files_per_batch = {files}
[flag_users]
events_per_minute = 40
[sessionize]
max_events = 50
"""


class Job:
    """One command over days of Online Retail, writing tables under `root`: ingest, flag_users and sessionize (or up to
    another stage, `to`)."""

    def __init__(self, folder: Path, data: Path, root: Path, files_per_batch: int = 1, to: str = "sessionize") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.stages = STAGES[: [stage.name for stage in STAGES].index(to) + 1]
        self.data = data
        self.root, self.log, self.conf = root, folder / f"{root.name}.log", folder / f"{root.name}.toml"
        source = REPOSITORY / "conf/sources/online_retail.toml"
        self.conf.write_text(CONF.format(source=source, root=root, data=data, files=files_per_batch))

    def start(self) -> subprocess.Popen[bytes]:
        """In a process group of its own, so that one signal reaches Python, the JVM and its workers."""
        command = [sys.executable, "-m", "jobs.cli", "run", "--to", self.stages[-1].name, "--conf", str(self.conf)]
        with self.log.open("wb") as file:
            return subprocess.Popen(command, stdout=file, stderr=file, cwd=REPOSITORY, start_new_session=True)

    def run(self) -> float:
        """Runs to the end and returns the seconds it took.

        Raises:
            RuntimeError: it failed.
        """
        started = time.monotonic()
        if self.start().wait():
            raise RuntimeError(f"the job failed: {self.log.read_text()}")
        return time.monotonic() - started

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage that the latest run finished."""
        finished = re.findall(r"^[✓=] (\w+) +([\d.]+) s", self.log.read_text(), re.MULTILINE)
        return {stage: float(seconds) for stage, seconds in finished}

    def last_line(self) -> str:
        return (self.log.read_text().strip().splitlines() or ["-"])[-1]


def delta_reader() -> duckdb.DuckDBPyConnection:
    """DuckDB with delta_scan: an independent reader that supports deletion vectors; nothing is downloaded."""
    connection = duckdb.connect()
    extension = next(Path(duckdb_extension_delta.__file__).parent.rglob("delta.duckdb_extension"))
    connection.load_extension(extension.as_posix())
    return connection


def differences(
    one: Path, other: Path, tables: Sequence[str] = TABLES, without: Mapping[str, str] = _OF_THE_RUN
) -> dict[str, int]:
    """Counts, by table, the rows found in only one of the two warehouses, duplicates included; equal tables are left
    out. `without` names columns to ignore, by table."""
    differing = {}
    for table in tables:
        columns = f"* EXCLUDE ({without[table]})" if table in without else "*"
        a, b = (f"SELECT {columns} FROM delta_scan('{root}/tables/{table}')" for root in (one, other))
        counts = [f"SELECT count(*) FROM ({x} EXCEPT ALL {y})" for x, y in ((a, b), (b, a))]
        if rows := sum(delta_reader().execute(count).fetchall()[0][0] for count in counts):
            differing[table] = rows
    return differing


def undisturbed_run(folder: Path, data: Path, run: Callable[[Job], float] = Job.run) -> tuple[Job, float]:
    """The run that the others are compared with, and its seconds."""
    job = Job(folder, data, folder / "undisturbed")
    return job, run(job)


def first_day(folder: Path, data: Path, run: Callable[[Job], float] = Job.run) -> Job:
    """A job that has made the tables of the first day, and whose folder of days has since grown to all of them."""
    growing = folder / "growing"
    growing.mkdir(parents=True)
    first, *later = sorted(data.glob("*.csv"))
    shutil.copy(first, growing)
    job = Job(folder, growing, folder / "first_day")
    run(job)
    for day in later:
        shutil.copy(day, growing)
    return job


def kills(
    folder: Path,
    compared: tuple[Job, float],
    first: Job,
    *,
    times: int,
    seed: int,
    run: Callable[[Job], float] = Job.run,
) -> dict[str, Any]:
    """Kills ingest and sessionize in turn, while they add the other days to tables of the first and, every other time,
    while they make the tables of all days; then the same command runs to its end, over a copy of what was left."""
    chance = random.Random(seed)
    (undisturbed, whole), killed = compared, Job(folder, first.data, folder / "killed")
    shutil.copytree(first.root, killed.root)
    before = _books(killed)
    killed.run()  # to time the two stages
    # Timed from the start of the stage: how long Python, Java and Spark take to start varies too much.
    written = [path.stat().st_mtime for path in _books(killed) - before]
    stages: dict[str, tuple[float, Callable[[], bool]]] = {
        "ingest": (max(written) - min(written), lambda: bool(_books(killed) - before)),
        "sessionize": (killed.seconds()["sessionize"], lambda: "flag_users" in killed.seconds()),
    }
    remaining = {"ingest": times - times // 2, "sessionize": times // 2}
    records: list[dict[str, Any]] = []
    wrong: dict[str, int] = {}
    from_nothing = chance.random() < 0.5
    rounds = itertools.count()  # some may end before they are killed
    while any(remaining.values()):
        shutil.rmtree(killed.root)
        from_nothing = not from_nothing
        if not from_nothing:
            shutil.copytree(first.root, killed.root)
        before = _books(killed)
        for stage in [stage for stage in stages if remaining[stage]]:
            length, has_begun = stages[stage]
            process = killed.start()
            while not has_begun() and process.poll() is None:
                time.sleep(0.05)
            moment = chance.uniform(0, 0.9) * length
            try:
                process.wait(moment)  # ends only if it is faster than the timed run
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            if code not in (0, -signal.SIGKILL):
                raise RuntimeError(f"a run ended by itself with code {code}: {killed.log.read_text()}")
            finished = list(killed.seconds())
            if code and stage not in finished:
                remaining[stage] -= 1
                records.append(
                    {"stage": stage, "after_s": round(moment, 1), "of_s": round(length, 1), "done": finished}
                )
                records[-1]["from_nothing"] = from_nothing
                print(f"killed in {stage}, after {moment:.1f} of {length:.1f} s", flush=True)
        ended = Job(folder, first.data, folder / f"ended-{next(rounds)}")
        shutil.copytree(killed.root, ended.root)
        run(ended)
        wrong |= differences(undisturbed.root, ended.root, without=_OF_THE_FOLDER)
    return {"undisturbed_s": round(whole, 1), "kills": records, "wrong": wrong}


def _books(job: Job) -> set[Path]:
    """The files of the ingest streams' checkpoints in which batches are begun and ended."""
    return {path for kind in ("offsets", "commits") for path in job.root.glob(f"checkpoints/ingest/*/{kind}/[0-9]*")}


def two_ingests(folder: Path, compared: tuple[Job, float], run: Callable[[Job], float] = Job.run) -> dict[str, Any]:
    undisturbed = compared[0]
    twice = Job(folder, undisturbed.data, folder / "twice", to="ingest")
    other = Job(folder / "other", undisturbed.data, twice.root, to="ingest")
    processes = [twice.start(), other.start()]
    codes = [process.wait() for process in processes]
    last_lines = [job.last_line() for job in (twice, other)]
    run(twice)
    return {"codes": codes, "said": last_lines, "wrong": differences(undisturbed.root, twice.root, TABLES[:2])}


def full_disk(
    folder: Path, compared: tuple[Job, float], first: Job, run: Callable[[Job], float] = Job.run
) -> dict[str, Any]:
    """Restarts this script in a mount namespace, where it may mount a private disk; then the same command runs to its
    end, over a copy of what was left."""
    command = ["unshare", "--map-root-user", "--mount", sys.executable, __file__, "full_disk"]
    command += ["--data", str(first.data), "--folder", str(folder), "--first-day", str(first.root)]
    process = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if not process.stdout.strip():
        raise RuntimeError("the check ended without a result in its mount namespace: see its output above")
    result: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    ended = Job(folder, first.data, folder / "ended")
    run(ended)
    return result | {"wrong": differences(compared[0].root, ended.root, without=_OF_THE_FOLDER)}


def full_disk_mounted(folder: Path, data: Path, first: Path) -> dict[str, Any]:
    disk = folder / "disk"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", disk], check=True)
    job = Job(folder, data, disk / "warehouse")
    shutil.copytree(first, job.root)
    before = _counts(job.root)
    filler = disk / "filler"
    free = shutil.disk_usage(disk).free
    attempts = []
    # A little more room each time, so that it fills up at another moment.
    for room in (0, 120_000):
        filler.write_bytes(b"\0" * max(0, free - room))
        code = job.start().wait()
        attempts.append({"room": room, "code": code, "said": job.last_line(), "lines": job.log.read_text().count("\n")})
        job.log.rename(folder / f"full-{room}.log")
        filler.unlink()
    kept = {table: count >= before[table] for table, count in _counts(job.root).items()}
    shutil.copytree(job.root, folder / "ended")  # the disk goes with this process
    return {"full": attempts, "kept": kept}


def _counts(root: Path) -> dict[str, int]:
    return {
        table: delta_reader().execute(f"SELECT count(*) FROM delta_scan('{root}/tables/{table}')").fetchall()[0][0]
        for table in TABLES
    }


def soak(folder: Path, data: Path, batches: int, seed: int) -> dict[str, Any]:
    """Runs in one Spark session."""
    chance, growing = random.Random(seed), folder / "growing"
    growing.mkdir(parents=True)
    in_batches, at_once = (Job(folder, growing, folder / name, files_per_batch=1000) for name in ("batches", "once"))
    runtime = Runtime(load_config(in_batches.conf))
    days = sorted(data.glob("*.csv"))
    chance.shuffle(days)
    edges = [0, *sorted(chance.sample(range(1, len(days)), min(batches, len(days)) - 1)), len(days)]
    seconds = []
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        for day in days[start:stop]:
            shutil.copy(day, growing / day.name)
        if start and chance.random() < 0.3:
            again = chance.choice(days[:start])
            shutil.copy(again, growing / f"again-{number}-{again.name}")
        seconds.append(round(sum(runtime.execute(stage).seconds for stage in in_batches.stages), 1))
        print(f"batch {number + 1}: {stop - start} days, {seconds[-1]} s", flush=True)
    once = Runtime(load_config(at_once.conf), runtime.spark)
    whole = round(sum(once.execute(stage).seconds for stage in at_once.stages), 1)
    # A record rejected twice is recorded twice, each time with its file, even within one batch.
    return {
        "batches": len(seconds),
        "median_s": statistics.median(seconds),
        "last_s": seconds[-1],
        "once_s": whole,
        "rows": _counts(once.root),
        "wrong": differences(once.root, runtime.root),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    checks: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "kills": lambda a: kills(
            a.folder,
            undisturbed_run(a.folder, a.data),
            first_day(a.folder, a.data),
            times=a.times,
            seed=a.seed,
        ),
        "two_ingests": lambda a: two_ingests(a.folder, undisturbed_run(a.folder, a.data)),
        "full_disk": lambda a: full_disk(a.folder, undisturbed_run(a.folder, a.data), first_day(a.folder, a.data)),
        "soak": lambda a: soak(a.folder, a.data, a.batches, a.seed),
    }
    parser.add_argument("check", choices=checks)
    parser.add_argument(
        "--data",
        type=Path,
        default=REPOSITORY / "tests/data/online_retail",
        help="folder of daily CSVs (default: the four used by the tests)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("build/faults"),
        help="output folder, whose subfolder CHECK is recreated (default: build/faults)",
    )
    parser.add_argument("--times", type=int, default=10, help="kills: number of kills (default: 10)")
    parser.add_argument("--batches", type=int, default=50, help="soak: number of batches (default: 50)")
    parser.add_argument("--seed", type=int, default=0)
    # full_disk passes it when it restarts itself.
    parser.add_argument("--first-day", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.folder, arguments.data = arguments.folder.absolute(), arguments.data.absolute()
    if not any(arguments.data.glob("*.csv")):
        parser.error(f"--data {arguments.data} holds no *.csv: name a folder of daily CSVs of Online Retail")
    if arguments.first_day:
        result = full_disk_mounted(arguments.folder, arguments.data, arguments.first_day)
    else:
        arguments.folder /= arguments.check
        shutil.rmtree(arguments.folder, ignore_errors=True)
        result = checks[arguments.check](arguments)
    print(json.dumps(result))
    sys.exit(1 if result.get("wrong") else 0)


if __name__ == "__main__":
    main()
