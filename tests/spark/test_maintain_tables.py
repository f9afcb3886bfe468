"""Upkeep: files compacted, old ones removed, no row changed; alongside writers and readers; no stage becomes out of
date.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from delta.exceptions import ConcurrentDeleteReadException
from delta.tables import DeltaTable
from py4j.protocol import Py4JJavaError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs import cli, sessionize
from jobs import lake as lake_module
from jobs import maintain_tables as module
from jobs.audit import audit
from jobs.errors import TrailvecError, explain
from jobs.files import HadoopPath
from jobs.maintain_tables import active_files, disk_files, maintain, measure, run_maintain
from jobs.runtime import Runtime, Stage, code_version
from jobs.tables import CONTEXT_VALUES, EVENTS, FLAGGED_USERS, REJECTED_EVENTS, SEQUENCES, SESSIONS, Table
from tests.conftest import expired, make_config, put, read_delta
from tests.events import START, Row, make_event, to_frame


def events(first: int, last: int) -> list[Row]:
    """Events e<first> … e<last - 1>, an hour apart."""
    return [
        make_event(event_id=f"e{n}", user_id=f"u{n % 3}", item_id="i", event_ts=START + timedelta(hours=n))
        for n in range(first, last)
    ]


def add(runtime: Runtime, rows: DataFrame, deletes: DataFrame | None = None, table: Table = EVENTS) -> None:
    stage = Stage("add", "", lambda r: r.merge(table, rows, deletes), reads=(), writes=(table,), settings=())
    runtime.execute(stage, force=True)


InPieces = Callable[..., Path]


@pytest.fixture(scope="module")
def in_pieces(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> InPieces:
    """Fills a runtime's events in many small commits, by a copy that keeps the file times."""
    root = tmp_path_factory.mktemp("pieces")
    runtime = Runtime(make_config(root / "now"), spark)
    put(runtime, EVENTS, to_frame(spark, events(0, 10), partitions=2))
    for number in (1, 2):
        add(runtime, to_frame(spark, events(10 * number, 10 * (number + 1))))
        shutil.copytree(runtime.root, root / f"{number + 1}")
    return lambda runtime, pieces=3: shutil.copytree(root / f"{pieces}", runtime.root)


def event_ids(runtime: Runtime) -> list[str]:
    """The event ids, as read by DuckDB."""
    return sorted(row["event_id"] for row in read_delta(runtime.path(EVENTS)))


def actions(runtime: Runtime, table: Table, kind: str) -> list[dict[str, Any]]:
    """The table log's actions of one kind, as written in its files."""
    log = sorted(Path(runtime.path(table), "_delta_log").glob("*.json"))
    lines = [json.loads(line) for file in log for line in file.read_text().splitlines()]
    return [line[kind] for line in lines if kind in line]


def operations(runtime: Runtime, table: Table = EVENTS) -> list[str]:
    return [commit["operation"] for commit in actions(runtime, table, "commitInfo")]


def clustering(runtime: Runtime, table: Table) -> list[list[str]]:
    (*_, last) = [a for a in actions(runtime, table, "domainMetadata") if a["domain"] == "delta.clustering"]
    return json.loads(last["configuration"])["clusteringColumns"]  # type: ignore[no-any-return]


def test_small_files_become_one_and_the_report_says_so(
    make_runtime: Callable[..., Runtime], in_pieces: InPieces, spark: SparkSession
) -> None:
    runtime = make_runtime()
    in_pieces(runtime)
    add(runtime, to_frame(spark, []), deletes=to_frame(spark, events(0, 4)))  # deletion vectors
    files = [p for p in Path(runtime.path(EVENTS)).rglob("*.parquet") if "_delta_log" not in p.parts]
    assert maintain(runtime, ["sessions"]) == []  # it does not exist

    (plan,) = maintain(runtime, dry_run=True)
    assert "OPTIMIZE" not in operations(runtime)
    (done,) = maintain(runtime)
    (again,) = maintain(runtime)
    assert operations(runtime).count("OPTIMIZE") == 1  # nothing to do the second time

    assert (plan["table"], plan["rows"], plan["rows_hidden"], plan["bytes_freed"]) == ("events", 26, 4, 0)
    assert plan["files"] == plan["small_files"] == done["files_before"] == done["small_files_before"] == 4
    assert (done["rows"], done["rows_hidden"], done["files"], done["small_files"]) == (26, 0, 1, 1)
    assert done["bytes_freed"] == 0  # within the retention
    assert plan["bytes_on_disk"] == done["bytes_on_disk_before"] > sum(f.stat().st_size for f in files)  # and vectors
    assert done["bytes_on_disk"] == plan["bytes_on_disk"] + done["bytes"] == again["bytes_on_disk"]
    assert done["bytes"] > 0
    assert event_ids(runtime) == sorted(e["event_id"] for e in events(4, 30))


def test_a_cube_that_is_full_is_packed_no_more(
    make_runtime: Callable[..., Runtime], in_pieces: InPieces, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packed_once = make_runtime(root=tmp_path / "once")
    in_pieces(packed_once, 2)
    maintain(packed_once, ["events"])
    for first in (20, 25):
        add(packed_once, to_frame(packed_once.spark, events(first, first + 5)))
    for of_a_cube, written in ((16, [20, 30]), (0, [20, 10])):
        monkeypatch.setattr(module, "_CUBE_FILES", of_a_cube)
        runtime = make_runtime(root=tmp_path / f"cubes-of-{of_a_cube}")
        shutil.copytree(packed_once.root, runtime.root)
        maintain(runtime, ["events"])
        packed = [a for a in actions(runtime, EVENTS, "add") if a.get("clusteringProvider")]
        assert [json.loads(a["stats"])["numRecords"] for a in packed] == written


def test_well_sized_files_are_left_alone(make_runtime: Callable[..., Runtime], spark: SparkSession) -> None:
    runtime = make_runtime("maintain.target_file_mb=1")
    noise = F.concat_ws("", *[F.sha2(F.concat("value", F.lit(str(n))), 256) for n in range(24)])  # 1.5 kB, random
    numbers = spark.range(0, 801).selectExpr(
        "'vertical' AS kind", "CAST(id AS string) AS value", "CAST(id AS int) AS value_index"
    )
    # Two files of some 0.6 MB, more than half of the target, and a tiny one that would fit with either.
    for first, last in ((0, 400), (400, 800), (800, 801)):
        rows = numbers.where(F.col("value_index").between(first, last - 1)).withColumn("value", noise)
        stage = Stage("add", "", lambda r, rows=rows: r.append(CONTEXT_VALUES, rows.coalesce(1)), (), (), ())
        runtime.execute(stage, force=True)
    (done,) = maintain(runtime)
    assert (done["files_before"], done["files"], done["small_files"]) == (3, 3, 1)
    assert "OPTIMIZE" not in operations(runtime, CONTEXT_VALUES)


def test_elsewhere_than_on_a_local_disk_files_are_the_same(
    make_runtime: Callable[..., Runtime], in_pieces: InPieces, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hadoop's local file system stands in for HDFS and S3, which are tested in tests/cluster."""
    runtime = make_runtime()
    in_pieces(runtime)
    add(runtime, to_frame(spark, []), deletes=to_frame(spark, events(0, 4)))
    version = runtime.latest_version(EVENTS)
    active, disk, sizes = active_files(runtime, EVENTS, version), disk_files(runtime, EVENTS), measure(runtime, EVENTS)
    old = active_files(runtime, EVENTS, version - 2)
    assert sizes["rows_hidden"] == 4
    monkeypatch.setattr(runtime, "place", HadoopPath(f"file:{runtime.root}"))
    assert measure(runtime, EVENTS) == sizes
    assert disk_files(runtime, EVENTS) == {f"file:{path}": size for path, size in disk.items()}

    def by_path(files: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(files, key=lambda file: file["path"])

    assert by_path(active_files(runtime, EVENTS, version)) == by_path(active)
    assert by_path(active_files(runtime, EVENTS, version - 2)) == by_path(old) != by_path(active)


# ---- retention --------------------------------------------------------------------------------------------


def test_vacuum_takes_what_is_older_than_the_retention_and_nothing_else(
    make_runtime: Callable[..., Runtime], in_pieces: InPieces, spark: SparkSession
) -> None:
    """Each table has its own retention, and only rows that age can be too old."""
    runtime = make_runtime("maintain.retention_hours=24", "maintain.retention_hours_of={ events = 100 }")
    in_pieces(runtime)
    put(runtime, CONTEXT_VALUES, spark.createDataFrame([("vertical", "food", 2)], CONTEXT_VALUES.schema()))
    folder = Path(runtime.path(EVENTS))
    of_values = Path(runtime.path(CONTEXT_VALUES)) / "part-25.snappy.parquet"
    of_values.write_bytes(b"x")
    os.utime(of_values, (time.time() - 25 * 3600,) * 2)
    strays = {}
    for hours in (99, 101):  # left behind by a killed write
        strays[hours] = folder / f"part-{hours}.snappy.parquet"
        strays[hours].write_bytes(b"x" * 1000)
        os.utime(strays[hours], (time.time() - hours * 3600,) * 2)
    old_version = runtime.latest_version(EVENTS)
    pinned = spark.read.format("delta").option("versionAsOf", old_version).load(str(folder))

    of_table = {entry["table"]: entry for entry in maintain(runtime)}
    done = of_table["events"]
    assert (strays[99].exists(), strays[101].exists(), done["bytes_freed"]) == (True, False, 1000)
    assert (of_values.exists(), of_table["context_values"]["bytes_freed"]) == (False, 1)
    properties = DeltaTable.forPath(spark, str(folder)).detail().collect()[0].properties
    assert properties["delta.deletedFileRetentionDuration"] == "interval 6000 minutes"
    assert pinned.count() == 30
    assert sorted(r.event_id for r in pinned.collect()) == sorted(e["event_id"] for e in events(0, 30))

    (later,) = maintain(expired(runtime), ["events"])
    assert later["bytes_freed"] == done["bytes_on_disk"] - done["bytes"] > 0
    left = {p for p in folder.rglob("*") if p.is_file() and "_delta_log" not in p.parts and p.suffix == ".parquet"}
    assert len(left) == 1
    assert event_ids(runtime) == sorted(e["event_id"] for e in events(0, 30))

    # After the retention was raised, a stage assumes that files are kept which are already gone.
    feed = spark.read.format("delta").option("readChangeFeed", "true").option("startingVersion", 1)
    with pytest.raises(Py4JJavaError) as error:
        feed.load(str(folder)).collect()
    told = explain(error.value) or ""
    assert re.match(r"part-\S+ of table events is gone: a VACUUM deleted .*: run the stage once with --force; ", told)


@pytest.fixture
def midnight(monkeypatch: pytest.MonkeyPatch) -> datetime:
    """Today's midnight, with upkeep's clock stopped at noon, so that no test sees the day change."""
    noon = datetime.now(timezone.utc).replace(hour=12, minute=0, second=0, microsecond=0)
    monkeypatch.setattr(module, "datetime", SimpleNamespace(now=lambda zone: noon))
    return noon.replace(hour=0)


def test_rows_go_when_they_are_too_old_and_what_is_made_of_them_follows(
    make_runtime: Callable[..., Runtime], spark: SparkSession, midnight: datetime
) -> None:
    runtime, today = make_runtime("maintain.keep_days={ events = 3 }"), midnight
    first_kept = today - timedelta(days=3)
    # One session of five events, ten minutes apart, spans the boundary: three before it, two from it on.
    times = [first_kept + timedelta(minutes=minutes) for minutes in (-30, -20, -10, 0, 10)]
    times += [today - timedelta(days=30), today]
    rows = [
        make_event(event_id=f"e{n}", user_id=f"u{n // 5}", item_id="i", event_ts=time.replace(tzinfo=None))
        for n, time in enumerate(times)
    ]
    put(runtime, EVENTS, to_frame(spark, rows))
    put_by = runtime.last_writer(EVENTS)
    runtime.create(FLAGGED_USERS)
    runtime.execute(sessionize.STAGE)
    (plan,) = maintain(runtime, ["events"], dry_run=True)
    assert (plan["rows"], plan["rows_too_old"]) == (7, 4)

    (done,) = maintain(runtime, ["events"])
    assert (done["rows"], done["rows_too_old"], done["rows_hidden"]) == (3, 4, 0)
    assert event_ids(runtime) == ["e3", "e4", "e6"]
    (again,) = maintain(runtime, ["events"])
    assert again["rows_too_old"] == 0
    assert operations(runtime).count("DELETE") == 1
    (deleted,) = [entry for entry in audit(runtime, "events") if entry["operation"] == "DELETE"]
    assert (deleted["stage"], deleted["user"]) == ("maintain_tables", getpass.getuser())
    assert (deleted["application"], deleted["code_version"]) == (spark.sparkContext.applicationId, code_version())
    # For later stages, the rows are still those that their own stage wrote.
    assert runtime.last_writer(EVENTS) == put_by
    assert not runtime.execute(sessionize.STAGE).skipped
    sessions = {row["session_id"]: row["event_count"] for row in read_delta(runtime.path(SESSIONS))}
    assert sessions == {"e3": 2, "e6": 1}


def test_rows_that_a_killed_upkeep_only_hid_are_purged_by_the_next(
    make_runtime: Callable[..., Runtime], spark: SparkSession, midnight: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, today = make_runtime("maintain.keep_days={ events = 3 }"), midnight.replace(tzinfo=None)
    times = [today - timedelta(days=30), today]
    rows = [make_event(event_id=f"e{n}", user_id="u", item_id="i", event_ts=time) for n, time in enumerate(times)]
    put(runtime, EVENTS, to_frame(spark, rows).coalesce(1))
    monkeypatch.setattr(module, "compact", lambda *_: None)  # which leaves the files of a full cube alone

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as kill:
        kill.setattr(Runtime, "purge", killed)
        with pytest.raises(KeyboardInterrupt):
            maintain(runtime)
    for hidden in (1, 0):
        (done,) = maintain(runtime, dry_run=bool(hidden))
        assert (done["rows"], done["rows_too_old"], done["rows_hidden"]) == (1, 0, hidden)


def test_refused_records_go_by_the_day_they_were_refused(
    make_runtime: Callable[..., Runtime], spark: SparkSession, midnight: datetime
) -> None:
    runtime, today = make_runtime("maintain.keep_days={ rejected_events = 3 }"), midnight.date()
    rows = [("log", f"file-{n}", None, "broken_row", "x", today - timedelta(days=n)) for n in (0, 3, 4)]
    put(runtime, REJECTED_EVENTS, spark.createDataFrame(rows, REJECTED_EVENTS.schema()))
    (done,) = maintain(runtime)
    assert (done["table"], done["rows_too_old"], done["rows"]) == ("rejected_events", 1, 2)
    assert {row["file"] for row in read_delta(runtime.path(REJECTED_EVENTS))} == {"file-0", "file-3"}


# ---- other jobs -------------------------------------------------------------------------------------------


def test_upkeep_clusters_anew_makes_no_stage_out_of_date_and_feeds_no_change(
    make_runtime: Callable[..., Runtime], in_pieces: InPieces, spark: SparkSession
) -> None:
    runtime = make_runtime()
    in_pieces(runtime)
    runtime.create(FLAGGED_USERS)
    runtime.execute(sessionize.STAGE)
    assert clustering(runtime, SESSIONS) == []  # sessionize overwrote it, after which Delta has no clustering columns
    before = [(table, runtime.latest_version(table)) for table in (EVENTS, SESSIONS)]
    maintain(runtime, ["events", "sessions"])
    assert {"OPTIMIZE", "SET TBLPROPERTIES"} <= set(operations(runtime))
    assert clustering(runtime, SESSIONS) == [["start_ts"]]
    assert actions(runtime, SESSIONS, "add")[-1]["clusteringProvider"] == "liquid"
    clustered = runtime.latest_version(SESSIONS)
    maintain(runtime, ["sessions"])
    assert runtime.latest_version(SESSIONS) == clustered
    assert runtime.execute(sessionize.STAGE).skipped
    reader = spark.read.format("delta").option("readChangeFeed", "true")
    for table, version in before:
        assert runtime.latest_version(table) > version
        assert reader.option("startingVersion", version + 1).load(runtime.path(table)).count() == 0

    # An increment after upkeep starts from its commit, reads none of its changes, and sees only the new event.
    seen: list[tuple[list[str], str]] = []

    def look(runtime: Runtime) -> None:
        changes = runtime.incremental(SESSIONS, EVENTS)
        plan = changes._jdf.queryExecution().optimizedPlan().toString()
        seen.append(([c.event_id for c in changes.collect()], plan))

    stage = Stage("sessionize", "", look, reads=(EVENTS,), writes=(SESSIONS,), settings=sessionize.STAGE.settings)
    runtime.execute(stage)
    add(runtime, to_frame(spark, events(30, 31)))
    runtime.execute(stage)
    (nothing, plan), (event, _) = seen
    assert (nothing, event) == ([], ["e30"])
    assert plan.startswith("LocalRelation <empty>")


def test_a_writer_beside_it_loses_nothing(
    make_runtime: Callable[..., Runtime], in_pieces: InPieces, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lake_module, "time", SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 20)))
    runtime = make_runtime()
    in_pieces(runtime)
    other = Runtime(runtime.config, spark.newSession())  # with its own settings, like another process
    errors: list[BaseException] = []
    done = threading.Event()

    def write() -> None:
        try:
            for number in (3, 4):  # each updates old rows, adds new ones and deletes one
                rows = [e | {"amount": float(number)} for e in events(0, 2)] + events(10 * number, 10 * number + 10)
                add(other, to_frame(other.spark, rows), deletes=to_frame(other.spark, events(number, number + 1)))
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    writer = threading.Thread(target=write)
    writer.start()
    rounds = 0
    while rounds == 0 or not done.is_set():
        entries = maintain(runtime)
        rounds += 1
        assert [entry["conflict"] for entry in entries] == [False]
    writer.join()
    assert errors == []
    assert event_ids(runtime) == sorted(e["event_id"] for e in events(0, 50) if e["event_id"] not in ("e3", "e4"))
    assert {r["amount"] for r in read_delta(runtime.path(EVENTS)) if r["event_id"] in ("e0", "e1")} == {4.0}
    history = operations(runtime)
    assert history.count("MERGE") == 2 + 2
    assert "OPTIMIZE" in history


def test_a_conflict_is_tried_again_and_told_when_it_does_not_end(
    make_runtime: Callable[..., Runtime],
    in_pieces: InPieces,
    spark: SparkSession,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runtime = make_runtime()
    in_pieces(runtime, pieces=2)
    put(runtime, CONTEXT_VALUES, spark.createDataFrame([("vertical", "food", 2)], CONTEXT_VALUES.schema()))
    waited: list[float] = []
    monkeypatch.setattr(lake_module, "time", SimpleNamespace(sleep=waited.append))
    real, left = Runtime.commit, [2]

    def meets_others(self: Runtime, table: Table, write: Callable[[], Any]) -> None:
        def once() -> None:
            if left[0] > 0:
                left[0] -= 1
                raise ConcurrentDeleteReadException("another job deleted a file that this one read", stackTrace="")
            write()

        real(self, table, once)

    monkeypatch.setattr(Runtime, "commit", meets_others)
    run_maintain(runtime, ["events"], dry_run=False, as_json=True)
    (entry,) = json.loads(capsys.readouterr().out)  # by name: only this table
    assert (entry["table"], entry["files"]) == ("events", 1)
    assert len(waited) == 2

    add(runtime, to_frame(spark, events(50, 51)))
    waited.clear()
    left[0] = 5
    with pytest.raises(TrailvecError, match=r"other jobs committed to events each time .* the other tables are done"):
        run_maintain(runtime, [], dry_run=False, as_json=True)
    assert len(waited) == 4
    assert max(waited) <= 16
    entries = {e["table"]: e["conflict"] for e in json.loads(capsys.readouterr().out)}
    assert entries == {"events": True, "context_values": False}


def sequences(spark: SparkSession, first: int, last: int) -> DataFrame:
    """Rows of users <first> … <last - 1>, one of the train split and one to score."""
    lists = {c.name: [2, 3] for c in SEQUENCES.columns if c.type == "array<int>"}
    rows = [
        {
            "user_id": f"u{n}",
            "split": split,
            "part": 0,
            "as_of": START,
            "last_ts": START,
            "length": 2,
            "target_ts": None,
        }
        | lists
        for n in range(first, last)
        for split in ("train", "score")
    ]
    return spark.createDataFrame([tuple(row[c.name] for c in SEQUENCES.columns) for row in rows], SEQUENCES.schema())


def test_a_purge_rewrites_each_file_for_itself(make_runtime: Callable[..., Runtime], spark: SparkSession) -> None:
    runtime = make_runtime()

    def train_files() -> int:
        paths = [f["path"] for f in active_files(runtime, SEQUENCES, runtime.latest_version(SEQUENCES))]
        return sum(path.startswith("split=train/") for path in paths)

    put(runtime, SEQUENCES, sequences(spark, 0, 40).repartition(4))
    add(runtime, sequences(spark, 0, 0), deletes=sequences(spark, 0, 16), table=SEQUENCES)
    assert (train_files(), measure(runtime, SEQUENCES)["rows_hidden"]) == (4, 32)
    runtime.purge(SEQUENCES, "split = 'train'")
    assert (train_files(), measure(runtime, SEQUENCES)["rows_hidden"]) == (4, 16)
    (done,) = maintain(runtime)
    assert (train_files(), done["rows"]) == (1, 2 * 24)
    keys = {(r["user_id"], r["split"]) for r in read_delta(runtime.path(SEQUENCES))}
    assert keys == {(f"u{n}", s) for n in range(16, 40) for s in ("train", "score")}


def test_a_purge_leaves_no_hidden_row_in_a_clustered_table(
    make_runtime: Callable[..., Runtime], in_pieces: InPieces, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Delta alone skips a table whose files are all in one cube. Upkeep runs just before the purge."""
    runtime = make_runtime()
    in_pieces(runtime)
    maintain(runtime, ["events"])
    assert actions(runtime, EVENTS, "add")[-1]["clusteringProvider"] == "liquid"
    add(runtime, to_frame(spark, []), deletes=to_frame(spark, events(0, 4)))
    assert measure(runtime, EVENTS)["rows_hidden"] == 4
    real, upkeep = Runtime.cluster, [EVENTS.cluster_by]

    def overtaken(self: Runtime, table: Table, by: Sequence[str]) -> None:
        real(self, table, by)
        if upkeep:
            real(self, table, upkeep.pop())

    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "cluster", overtaken)
        runtime.purge(EVENTS)
    assert (measure(runtime, EVENTS)["rows"], measure(runtime, EVENTS)["rows_hidden"]) == (26, 0)
    maintain(runtime, ["events"])
    assert clustering(runtime, EVENTS) == [["event_ts"]]
    assert event_ids(runtime) == sorted(e["event_id"] for e in events(4, 30))


# ---- the command ------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_or_json(
    make_runtime: Callable[..., Runtime],
    in_pieces: InPieces,
    spark: SparkSession,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runtime = make_runtime()
    in_pieces(runtime, pieces=2)
    monkeypatch.setattr(cli, "Runtime", lambda config: Runtime(config, spark))
    sets = ["--set", f'storage.root="{runtime.root}"', "--set", "maintain.usd_per_gb_month=1e6"]
    command = ["maintain_tables", *sets, "--table", "events"]
    cli.main([*command, "--dry-run", "--json"])
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["table"], entry["rows"], entry["files"]) == ("events", 20, 3)
    assert "files_before" not in entry
    files = [f for f in Path(runtime.path(EVENTS)).rglob("*") if f.is_file() and f.name[0] != "."]
    on_disk = sum(f.stat().st_size for f in files if f.parent.name != "_delta_log")
    assert entry["usd_per_month"] == pytest.approx(on_disk / 1024**3 * 1e6)
    with module.jvm_console(spark) as printed:
        cli.main(command)
    printed_grid = capsys.readouterr().out
    assert "3 → 1" in printed_grid
    assert re.search(r"on disk: [1-9]\d\.\d\d USD a month in all, at 1e\+06 a GB", " ".join(printed_grid.split()))
    assert printed.toString() == ""  # nothing from VACUUM between the lines
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--table", "evnts"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_table_of_a_usual_warehouse_fits_into_100_columns_and_breaks_no_number(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"table": "rejected_events", "rows": 1_477_998, "rows_too_old": 0, "rows_hidden": 0, "bytes": 41_800_000}
    entry |= {"files_before": 12, "files": 1, "small_files": 1, "bytes_on_disk": 886, "bytes_freed": 0}
    monkeypatch.setattr(
        module, "maintain", lambda *_: [entry | {"usd_per_month": 1234.5, "seconds": 64.6, "conflict": False}]
    )
    monkeypatch.setattr(module, "table_console", lambda: cli.table_console(piped_width=width))
    run_maintain(Runtime(make_config(tmp_path)), [], dry_run=False, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    cells = "rejected_events 1,477,998 0 0 41.8 MB 12 → 1 100% 886 bytes 0 bytes 1,234.50"
    assert " ".join(lines[3].split()) == cells
