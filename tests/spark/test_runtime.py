"""The runtime's guarantees for every table: its contract, its comments, what wrote it, one commit at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any
from zipimport import zipimporter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from delta.tables import DeltaMergeBuilder, DeltaTable
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.catalog import Catalog

from jobs import spark_session
from jobs.commits import History
from jobs.config import load_config
from jobs.errors import TrailvecError
from jobs.files import HadoopPath
from jobs.runtime import Runtime, Stage
from jobs.spark_session import drawn_by_hash, persisted, spark_conf
from jobs.sql import query
from jobs.sql_names import register_tables
from jobs.tables import (
    CONTEXT_VALUES,
    CURRENT_MODEL,
    EVALUATION,
    EVENTS,
    FLAGGED_USERS,
    ITEM_EMBEDDINGS,
    ITEMS,
    Column,
    conform,
)
from scripts.bench.measure import Watch
from tests.conftest import put, read_delta
from tests.events import START, make_event, to_frame

VALUES = "kind string, value string, value_index int"


@pytest.mark.parametrize(("most", "join"), [(3, "BroadcastHashJoin"), (2, "SortMergeJoin")])
def test_few_rows_go_to_each_task(spark: SparkSession, monkeypatch: pytest.MonkeyPatch, most: int, join: str) -> None:
    monkeypatch.setattr(spark_session, "FEW", most)
    few = spark.range(3).localCheckpoint()
    with spark_conf(spark, {"spark.sql.autoBroadcastJoinThreshold": "-1"}):  # as when Spark knows no size
        joined = spark.range(9).join(spark_session.broadcast_if_few(few), "id", "left_semi")
        assert join in joined._jdf.queryExecution().executedPlan().toString()  # type: ignore[operator]


def test_persisted_rows_are_released_after_an_error_too(spark: SparkSession) -> None:
    rows = spark.range(3)
    with contextlib.suppress(ZeroDivisionError), persisted(rows):
        assert rows.storageLevel.useMemory
        raise ZeroDivisionError
    assert not rows.storageLevel.useMemory


def test_of_very_many_rows_some_are_drawn_however_small_the_share(spark: SparkSession) -> None:
    assert 0 < spark.range(4_000_000).where(drawn_by_hash(1e-7, "id")).count() < 20


def test_a_missing_column_is_named(spark: SparkSession) -> None:
    with pytest.raises(TrailvecError, match="context_values needs the columns value_index; found kind, value:"):
        conform(spark.createDataFrame([("a", "b")], "kind string, value string"), CONTEXT_VALUES)


def test_a_null_where_the_contract_has_none_is_not_committed(
    make_runtime: Callable[..., Runtime], spark: SparkSession
) -> None:
    runtime = make_runtime()
    put(runtime, CONTEXT_VALUES, spark.createDataFrame([("vertical", "food", 2)], VALUES))
    with pytest.raises(Exception, match="NOT NULL constraint violated"):
        put(runtime, CONTEXT_VALUES, spark.createDataFrame([("vertical", None, 3)], VALUES))
    assert [r.value for r in runtime.latest(CONTEXT_VALUES).collect()] == ["food"]


def test_a_table_is_made_though_another_job_takes_the_half_written_commit(make_runtime: Callable[..., Runtime]) -> None:
    """A job that creates the same table at that moment takes the file for the leftover of a kill."""
    runtime = make_runtime()
    log, taken, ended = Path(runtime.path(CONTEXT_VALUES)) / "_delta_log", list[str](), threading.Event()

    def take() -> None:
        while not taken and not ended.is_set():
            for part in log.glob(".*.tmp"):
                with contextlib.suppress(FileNotFoundError):
                    part.unlink()
                    taken.append(part.name)

    other = threading.Thread(target=take)
    other.start()
    try:
        runtime.create(CONTEXT_VALUES)
    finally:
        ended.set()
        other.join()
    assert taken
    assert runtime.latest(CONTEXT_VALUES).schema.names == [column.name for column in CONTEXT_VALUES.columns]


def test_comments_reach_sql(make_runtime: Callable[..., Runtime], spark: SparkSession) -> None:
    runtime = make_runtime('storage.database="comments"')
    put(runtime, CONTEXT_VALUES, spark.createDataFrame([("vertical", "food", 2)], VALUES))
    register_tables(runtime)
    described = {r.col_name: r for r in spark.sql("DESCRIBE EXTENDED context_values").collect()}
    assert described["value"].comment == "The value; for a category, vertical/category."
    assert described["Comment"].data_type == CONTEXT_VALUES.comment


def test_a_name_in_sql_follows_the_root(
    make_runtime: Callable[..., Runtime],
    spark: SparkSession,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    create = Catalog.createTable
    alone: list[bool] = []

    def noted(catalog: Catalog, name: str, **options: Any) -> Any:
        alone.append(not catalog.tableExists("items") and not catalog.tableExists("context_values"))
        return create(catalog, name, **options)

    monkeypatch.setattr(Catalog, "createTable", noted)
    of_root = {}
    for value in ("one", "two"):
        runtime = of_root[value] = make_runtime('storage.database="roots"', root=tmp_path_factory.mktemp(value))
        put(runtime, CONTEXT_VALUES, spark.createDataFrame([("vertical", value, 2)], VALUES))
        runtime.create(ITEMS)
        if value == "one":
            put(runtime, CURRENT_MODEL, spark.createDataFrame([("of one",)], CURRENT_MODEL.schema()))
        register_tables(runtime)
        assert spark.sql("SELECT value FROM context_values").collect()[0].value == value
    assert alone.count(True) == 1  # the first; the second root's took their places one by one
    assert not spark.catalog.tableExists("current_model")  # the second root has none yet
    put(of_root["two"], CURRENT_MODEL, spark.createDataFrame([("of two",)], CURRENT_MODEL.schema()))
    register_tables(of_root["two"])
    assert spark.sql("SELECT model_version FROM current_model").collect()[0].model_version == "of two"


def test_in_a_volume_the_names_are_views_of_the_session(
    make_runtime: Callable[..., Runtime],
    spark: SparkSession,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jobs.sql_names._VOLUMES", str(tmp_path))
    runtime = Runtime(make_runtime('storage.database="volumes"').config, spark.newSession())
    put(runtime, CURRENT_MODEL, runtime.spark.createDataFrame([("new",)], CURRENT_MODEL.schema()))
    vector = [("apple", 2, model, datetime(2026, 1, 1), False, [1.0]) for model in ("old", "new")]
    # As a workspace may have it: what reads plain files (nearest_items, delta-rs, training) refuses such tables, or
    # finds neither their columns nor their files.
    defaults = {"enableDeletionVectors": "true", "columnMapping.mode": "name", "randomizeFilePrefixes": "true"}
    names = {f"spark.databricks.delta.properties.defaults.{name}": value for name, value in defaults.items()}
    with spark_conf(runtime.spark, names):
        put(runtime, ITEM_EMBEDDINGS, runtime.spark.createDataFrame(vector, ITEM_EMBEDDINGS.schema()))
    features = DeltaTable.forPath(runtime.spark, runtime.path(ITEM_EMBEDDINGS)).detail().collect()[0].tableFeatures
    assert not {"deletionVectors", "columnMapping"} & set(features)
    files = list(Path(runtime.path(ITEM_EMBEDDINGS)).glob("model_version=*/part-*.parquet"))
    columns = [name for name in ITEM_EMBEDDINGS.schema().names if name != "model_version"]
    assert [pq.read_schema(file).names for file in files] == [columns] * 2
    answer = query(runtime, "SELECT model_version FROM current_item_embeddings")
    assert [row.model_version for row in answer.collect()] == ["new"]
    put(runtime, CURRENT_MODEL, runtime.spark.createDataFrame([("old",)], CURRENT_MODEL.schema()))
    assert [row.model_version for row in query(runtime, "SELECT * FROM current_item_embeddings").collect()] == ["old"]
    assert not spark.catalog.databaseExists("volumes")
    with pytest.raises(AnalysisException, match="current_item_embeddings"):
        spark.newSession().sql("SELECT * FROM current_item_embeddings")
    for root in (tmp_path / "other", tmp_path_factory.mktemp("outside")):  # in a volume; elsewhere
        other = Runtime(make_runtime('storage.database="volumes"', root=root).config, runtime.spark)
        other.create(CURRENT_MODEL)
        assert query(other, "SELECT * FROM current_model").count() == 0
        for name in ("item_embeddings", "current_item_embeddings"):
            with pytest.raises(TrailvecError, match=f"`{name}` cannot be found"):
                query(other, f"SELECT * FROM {name}")
        register_tables(runtime)


def test_other_models_rows_stay_when_one_models_are_replaced(
    make_runtime: Callable[..., Runtime], spark: SparkSession
) -> None:
    runtime = make_runtime()

    def write(model: str, value: float) -> None:
        row = (model, "test", "next", "model", "ndcg@10", "all", "all", value, None, None, 5)
        put(runtime, EVALUATION, spark.createDataFrame([row], EVALUATION.schema()))

    for model, value in (("a", 0.1), ("b", 0.2), ("a", 0.3)):
        write(model, value)
    assert {r.model_version: r.value for r in runtime.latest(EVALUATION).collect()} == {"a": 0.3, "b": 0.2}


def test_a_table_of_another_version_is_refused_and_kept(
    make_runtime: Callable[..., Runtime], spark: SparkSession
) -> None:
    runtime = make_runtime()
    put(runtime, CONTEXT_VALUES, spark.createDataFrame([("vertical", "food", 2)], VALUES))
    wider = dataclasses.replace(CONTEXT_VALUES, columns=(*CONTEXT_VALUES.columns, Column("more", "int", "New.")))
    for reads, writes in (((wider,), ()), ((), (wider,))):  # refused before the stage runs
        with pytest.raises(TrailvecError, match="has the columns of another version"):
            runtime.execute(Stage("none", "", lambda _: pytest.fail("it ran"), reads, writes), force=True)
    with pytest.raises(TrailvecError, match="has the columns of another version"):
        put(runtime, wider, spark.createDataFrame([("vertical", "rides", 3, 7)], f"{VALUES}, more int"))
    assert [r.value for r in runtime.latest(CONTEXT_VALUES).collect()] == ["food"]
    for table, advice in (
        (CONTEXT_VALUES, "by ALTER TABLE .ADD COLUMN, .* never move that folder away"),
        (EVENTS, "rebuild the events as in Backfill"),
        (FLAGGED_USERS, "move that folder away and run `trailvec flag_users` again"),
    ):
        runtime.create(table)
        with pytest.raises(TrailvecError, match=f"version of trailvec .*: .*{advice}"):
            runtime.create(dataclasses.replace(table, columns=(*table.columns, Column("more", "int", "New."))))
    for table in (CONTEXT_VALUES, EVENTS):  # of a later version
        with pytest.raises(TrailvecError, match=r"\): deploy the version that wrote it, or a later .*never move"):
            runtime.create(dataclasses.replace(table, columns=table.columns[:-1]))
    other_type = (*CONTEXT_VALUES.columns[:2], Column("value_index", "bigint", "Longer."))
    for columns in (other_type, (*CONTEXT_VALUES.columns[:2], Column("more", "int", "New."))):
        with pytest.raises(TrailvecError, match=r"\): deploy the version .* or do what its CHANGELOG says of"):
            runtime.create(dataclasses.replace(CONTEXT_VALUES, columns=columns))
    turned = (*CONTEXT_VALUES.columns[1:], CONTEXT_VALUES.columns[0])
    with pytest.raises(TrailvecError, match=r"in that order, by ALTER TABLE .* ALTER COLUMN .* AFTER"):
        runtime.create(dataclasses.replace(CONTEXT_VALUES, columns=turned))


def test_a_merge_sends_no_old_row_through_a_shuffle_that_no_new_one_meets(
    make_runtime: Callable[..., Runtime], spark: SparkSession
) -> None:
    runtime = make_runtime()
    random = Random(1)
    ids = [f"{random.getrandbits(128):032x}" for _ in range(20_000)]
    old = [make_event(event_id=event_id, user_id="u", item_id="i", event_ts=START) for event_id in ids]
    put(runtime, EVENTS, to_frame(spark, old))
    new = [row | {"amount": 7.0} for row in old[:5]] + [old[0] | {"event_id": "new"}]
    gone = to_frame(spark, old[5:8])

    def merge(runtime: Runtime) -> None:
        # A condition on the old rows too, or Spark would have no choice of which side to filter.
        where = F.col("old.event_id") >= min(ids)
        runtime.merge(EVENTS, to_frame(spark, new), gone, where=where, few=True)

    with Watch(spark) as watch:
        runtime.execute(Stage("merge", "", merge, reads=(), writes=(), settings=()), force=True)
    assert 0 < watch.shuffled_mb < 0.2  # the table's ids alone are 0.7
    found = {row["event_id"]: row["amount"] for row in read_delta(runtime.path(EVENTS))}
    kept = {row["event_id"]: row["amount"] for row in old[8:]}
    assert found == kept | {row["event_id"]: row["amount"] for row in new}


def test_a_stage_reads_what_was_there_when_it_began(make_runtime: Callable[..., Runtime], spark: SparkSession) -> None:
    runtime = make_runtime()
    put(runtime, CONTEXT_VALUES, spark.createDataFrame([("vertical", "before", 2)], VALUES))
    seen = []

    def run(runtime: Runtime) -> None:
        rows = runtime.read(CONTEXT_VALUES)
        runtime.write(CONTEXT_VALUES, rows.withColumn("value", F.lit("after")))
        seen.append(runtime.read(CONTEXT_VALUES).collect()[0].value)

    runtime.execute(Stage("reader", "", run, reads=(CONTEXT_VALUES,), writes=(), settings=()))
    assert seen == ["before"]
    assert runtime.latest(CONTEXT_VALUES).collect()[0].value == "after"


def test_nothing_to_change_is_noted_only_over_the_rows_in_which_it_was_found(
    make_runtime: Callable[..., Runtime], spark: SparkSession
) -> None:
    runtime = make_runtime()
    for word in ("ours", "another run's"):
        put(runtime, CONTEXT_VALUES, spark.createDataFrame([("vertical", word, 2)], VALUES))
    newest = runtime.stage_version(CONTEXT_VALUES)

    def touch(made_from: int) -> None:
        runtime.execute(Stage("touch", "", lambda r: r.touch(CONTEXT_VALUES, made_from=made_from)), force=True)

    with pytest.raises(TrailvecError, match="another run changed table context_values while this one worked on it"):
        touch(newest - 1)
    assert runtime.latest_version(CONTEXT_VALUES) == newest  # no commit that would force a full rebuild
    touch(newest)
    assert runtime.latest_version(CONTEXT_VALUES) == newest + 1


@pytest.mark.parametrize("ours", [0, 1])
def test_another_runs_rows_are_seen_though_our_own_merge_may_change_none(
    make_runtime: Callable[..., Runtime], spark: SparkSession, monkeypatch: pytest.MonkeyPatch, ours: int
) -> None:
    """Both runs are of one stage and one Spark application."""
    runtime = make_runtime()
    put(runtime, CONTEXT_VALUES, spark.createDataFrame([("vertical", "before", 2)], VALUES))
    made_from, execute = runtime.stage_version(CONTEXT_VALUES), DeltaMergeBuilder.execute

    def merge(runtime: Runtime, word: str, count: int) -> None:
        rows = spark.createDataFrame([("vertical", word, 3)], VALUES).limit(count)
        runtime.merge(CONTEXT_VALUES, rows, insert_only=True, made_from=made_from)

    def run(word: str, count: int) -> None:
        stage = Stage("merge", "", lambda r: merge(r, word, count), reads=(), writes=(), settings=())
        Runtime(runtime.config, spark).execute(stage, force=True)

    def between(builder: DeltaMergeBuilder) -> DataFrame:
        monkeypatch.setattr(DeltaMergeBuilder, "execute", execute)
        run("another run's", 1)
        return execute(builder)

    monkeypatch.setattr(DeltaMergeBuilder, "execute", between)
    with pytest.raises(TrailvecError, match="another run changed table context_values just as this one wrote to it"):
        run("ours", ours)
    last = Runtime(runtime.config, spark).last_writer(CONTEXT_VALUES)
    assert last is not None
    assert last["fingerprint"] is None  # the next run rebuilds the table


def read_log(path: str) -> History:
    """Read by Python; the same as through Spark, where the log is on another store or on a mount."""
    local, by_spark = History(Path(path)), History(HadoopPath(path))
    assert (local.newest, local.table_id, list(local)) == (by_spark.newest, by_spark.table_id, list(by_spark))
    return local


def test_the_commits_are_those_of_deltas_history(make_runtime: Callable[..., Runtime], spark: SparkSession) -> None:
    """Across a checkpoint, an upkeep, commits that change no row, and a foreign write; and after a log cleanup."""
    runtime, theirs = make_runtime(), "gdpr-12"
    rows = spark.createDataFrame([("vertical", "food", 2)], VALUES)
    with spark_conf(spark, {"spark.databricks.delta.properties.defaults.checkpointInterval": "4"}):  # instead of 10
        runtime.create(CONTEXT_VALUES)
    for _ in range(4):
        put(runtime, CONTEXT_VALUES, rows)
    path = runtime.path(CONTEXT_VALUES)
    rows.write.format("delta").mode("append").option("userMetadata", theirs).save(path)
    stage = Stage("touch", "", lambda r: r.touch(CONTEXT_VALUES, {"seen": 1}), reads=(), writes=(), settings=())
    runtime.execute(stage, force=True)
    spark.sql(f"OPTIMIZE delta.`{path}`")
    spark.sql(f"DELETE FROM delta.`{path}` WHERE value = 'nobody'")
    spark.sql(f"UPDATE delta.`{path}` SET value_index = 3 WHERE value = 'nobody'")
    spark.sql(f"ALTER TABLE delta.`{path}` ADD COLUMN more INT")  # as after an upgrade
    log = Path(path) / "_delta_log"
    assert list(log.glob("*.checkpoint.parquet"))
    history = (
        DeltaTable.forPath(spark, path)
        .history()
        .selectExpr("version", "timestamp", "operation", "operationParameters.mode AS mode", "userMetadata")
    )
    expected = history.collect()
    commits = list(read_log(path))
    assert [c.version for c in commits] == [row["version"] for row in expected] == [*range(10, -1, -1)]
    for commit, row in zip(commits, expected, strict=True):
        assert commit.committed_at == pytest.approx(row["timestamp"].timestamp(), abs=5)
        assert commit.replaced_all == (row["mode"] == "Overwrite")
        said = row["userMetadata"]
        assert commit.provenance == (json.loads(said) if said not in (None, theirs) else None)
    assert [c.version for c in commits if not c.changed_rows] == [10, 9, 8, 7, 6]
    assert commits[5].provenance is None
    assert [said["note"] for said in runtime.noted(CONTEXT_VALUES)] == [{"seen": 1}]
    assert [c.version for c in commits if c.foreign] == [5]
    (log / "00000000000000000003.json").unlink()
    assert [c.version for c in read_log(path)] == [*range(10, 3, -1)]
    (table_id,) = DeltaTable.forPath(spark, path).detail().select("id").collect()[0]
    assert read_log(path).table_id == table_id
    (log / "00000000000000000000.json").unlink()
    assert read_log(path).table_id == table_id
    (log / "00000000000000000010.crc").unlink()
    assert read_log(path).table_id == table_id
    for checksum in log.glob("*.crc"):
        checksum.unlink()
    assert read_log(path).table_id is None
    spark.sql(f"DELETE FROM delta.`{path}` WHERE value = 'food'")
    assert read_log(path).newest == 11
    assert next(iter(read_log(path))).foreign
    # A reader may find the _last_checkpoint file half written, or empty.
    for text in ('{"version":8,"si', ""):
        (log / "_last_checkpoint").write_text(text)
        (log / "._last_checkpoint.crc").unlink(missing_ok=True)
        assert read_log(path).newest == 11


@pytest.mark.usefixtures("spark")
def test_of_very_many_commits_all_are_told_and_few_are_read_where_few_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A topic polled every minute adds a thousand commits a day, and a nightly stage continues from them."""
    runtime = Runtime(load_config(None, [f'storage.root="{tmp_path}"']))
    log, now = Path(runtime.path(EVENTS)) / "_delta_log", int(time.time())
    log.mkdir(parents=True)
    said_by = json.dumps({"stage": "erase_users", "reads": {}, "note": {"erasure": "hers"}})
    for version in range(600):
        info = {"timestamp": 1000 * (now + version), "operation": "REMOVE COLUMN MAPPING" if version == 7 else "MERGE"}
        info |= {"userMetadata": said_by} if version in {50, 500} else {}
        (log / f"{version:020}.json").write_text(json.dumps({"commitInfo": info}))
    (log / "_last_checkpoint").write_text('{"version": 599}')
    found = runtime.erasure_commits(EVENTS, "hers", after=-1, since=now + 500)
    assert [commit.version for commit in found] == [500]
    assert len(runtime._history["events"]._read) == 101
    assert [commit.version for commit in runtime.erasure_commits(EVENTS, "hers", after=0, since=0)] == [500, 50]
    history = History(runtime.folder(EVENTS))
    assert isinstance(history._folder, Path)
    one, other = iter(history), iter(history)  # neither at its end
    assert [next(read).version for read in (one, other, other, one)] == [599, 599, 598, 598]
    assert [commit.version for commit in history] == [*range(599, -1, -1)]
    assert [commit.version for commit in history if not commit.foreign] == [500, 50, 7]
    with monkeypatch.context() as mount:
        mount.setattr("jobs.commits.is_mount", lambda _: True)  # it may show late what Spark has written
        assert isinstance(History(runtime.folder(EVENTS))._folder, HadoopPath)

    last = {"revisions": {}, "fingerprint": "", "config": {}, "reads": {"events": 40}}
    monkeypatch.setattr(runtime, "last_writer", lambda table: last)
    monkeypatch.setattr(runtime, "provenance", lambda: last)
    runtime._stage, runtime._versions = Stage("flag_users", "", lambda r: None), {"events": 599}
    assert (runtime._since(FLAGGED_USERS, EVENTS), runtime.report.notes) == (40, [])
    with monkeypatch.context() as retained:
        retained.setattr(runtime, "kept", lambda *_: True)
        assert runtime.changes(EVENTS, 3) is None  # Delta would refuse to read it
    with monkeypatch.context() as upgrade:
        upgrade.setattr(runtime, "provenance", lambda: last | {"revisions": {"flagged_users": 2}})
        assert runtime._since(FLAGGED_USERS, EVENTS) is None
    said = runtime.report.notes
    for version in (41, 42, 43):  # upkeep, which ran longer ago than files are kept
        info = {"timestamp": 1000 * (now - 200 * 3600), "operation": "OPTIMIZE", "operationMetrics": {}}
        (log / f"{version:020}.json").write_text(json.dumps({"commitInfo": info}))
    runtime._history.clear()
    assert (runtime._since(FLAGGED_USERS, EVENTS), said) == (43, [])
    info = {"timestamp": 1000 * (now - 200 * 3600), "operation": "MERGE", "userMetadata": said_by}
    (log / f"{43:020}.json").write_text(json.dumps({"commitInfo": info}))
    runtime._history.clear()
    assert runtime._since(FLAGGED_USERS, EVENTS) is None
    assert "it is 557 commits behind table events, of which only 556 are recent enough to be read" in said[0]
    said.clear()
    (log / f"{299:020}.json").unlink()
    runtime._history.clear()
    for _ in range(2):
        assert runtime.incremental(FLAGGED_USERS, EVENTS) is None
    (note,) = runtime.report.notes
    assert note.startswith("table flagged_users is rebuilt in full: it is 559 commits behind table events, of")
    assert "which only 300 are recent enough to be read (maintain.retention_hours) and still in Delta's log" in note


@pytest.mark.usefixtures("spark")
def test_upkeep_does_not_count_as_a_change_where_the_log_no_longer_tells_of_the_last_one(tmp_path: Path) -> None:
    runtime = Runtime(load_config(None, [f'storage.root="{tmp_path}"']))
    log = Path(runtime.path(EVENTS)) / "_delta_log"
    log.mkdir(parents=True)
    for newest in (46, 48):
        for version in range(45, newest + 1):
            info = {"timestamp": 1000, "operation": "OPTIMIZE"}
            (log / f"{version:020}.json").write_text(json.dumps({"commitInfo": info}))
        (log / "_last_checkpoint").write_text(json.dumps({"version": newest}))
        runtime._history.clear()
        runtime._versions = {"events": newest}
        assert runtime.changed_version(EVENTS) == 45


def test_tune_refuses_hdfs_in_one_sentence() -> None:
    runtime = Runtime(load_config(None, ['storage.root="hdfs://namenode/trailvec"']))
    refused = r"^storage\.root = hdfs://namenode/trailvec, but tune keeps its trials in a database on a local disk"
    with pytest.raises(TrailvecError, match=refused) as error:
        _ = runtime.root
    assert "\n" not in str(error.value)


def test_a_log_folder_without_a_commit_is_made_good(make_runtime: Callable[..., Runtime], spark: SparkSession) -> None:
    """Left behind by a kill during a table's creation."""
    runtime = make_runtime()
    log = Path(runtime.path(CONTEXT_VALUES)) / "_delta_log"
    (log / "_commits").mkdir(parents=True)
    (log / ".00000000000000000000.json.half.tmp").write_text("{")
    put(runtime, CONTEXT_VALUES, spark.createDataFrame([("vertical", "food", 2)], VALUES))
    assert [r.value for r in runtime.latest(CONTEXT_VALUES).collect()] == ["food"]


def test_a_commit_that_another_job_makes_at_that_moment_is_kept(
    make_runtime: Callable[..., Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_runtime(root=tmp_path / "other")
    other.create(CONTEXT_VALUES)
    commit = Path(other.path(CONTEXT_VALUES)) / "_delta_log/00000000000000000000.json"
    runtime = make_runtime()
    log = Path(runtime.path(CONTEXT_VALUES)) / "_delta_log"
    log.mkdir(parents=True)
    (log / ".00000000000000000000.json.half.tmp").write_text("{")
    # The other job commits after this one has checked, but before it clears the folder.
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: shutil.copy(commit, path.parent))
    runtime.create(CONTEXT_VALUES)
    assert (log / commit.name).read_text() == commit.read_text()


def test_a_worker_reads_no_directory_of_a_zip_before_each_task(spark: SparkSession) -> None:
    def zips(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import spark_udfs.arrow  # noqa: F401 - as every UDF of ours imports it

        for _ in batches:
            pass
        import wave  # noqa: F401 - found last on the path

        import pyspark.rddsampler  # noqa: F401 - a module not loaded yet is still found

        places = [place for place, of in sys.path_importer_cache.items() if isinstance(of, zipimporter)]
        yield pa.RecordBatch.from_arrays([pa.array([f"{places} {sys.path}"])], ["places"])

    ((said,),) = spark.range(1, numPartitions=1).mapInArrow(zips, "places string").collect()
    found, path = said.split("] [")
    assert "spark-core" not in path
    assert [place for place in found.split(", ") if "py4j" in place or "spark-core" in place] == []


def test_settings_are_what_they_were_when_a_block_fails(spark: SparkSession) -> None:
    given, default = "spark.sql.shuffle.partitions", "spark.sql.files.maxRecordsPerFile"
    assert (spark.conf.get(given), default in spark.sparkContext.getConf().toDebugString()) == ("2", False)

    def fail() -> None:
        with spark_conf(spark, {given: "7", default: "9"}):
            assert [spark.conf.get(key) for key in (given, default)] == ["7", "9"]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [spark.conf.get(key) for key in (given, default)] == ["2", "0"]


def test_what_is_stored_of_a_run_shows_no_secret(make_runtime: Callable[..., Runtime]) -> None:
    config = make_runtime().config
    conf = {
        "spark.hadoop.store.password": "open sesame",
        "spark.driver.extraJavaOptions": "-Xmn1g -Djavax.net.ssl.trustStorePassword=open",
        "spark.hadoop.fs.azure.account.key.shop.dfs.core.windows.net": "open",
        "spark.hadoop.fs.gs.auth.service.account.private.key": "open",
        "spark.hadoop.fs.azure.sas.logs.shop.blob.core.windows.net": "open",
        "spark.hadoop.fs.s3a.encryption.key": "open",
        "spark.hadoop.fs.azure.encryption.encoded.client-provided-key": "open",
        "spark.hadoop.logs": "https://shop.blob.core.windows.net/logs?sv=1&sig=open",
        "spark.executor.memory": "4g",
    }
    settings = config.spark.model_copy(update={"conf": conf})
    runtime = Runtime(config.model_copy(update={"spark": settings}), make_runtime().spark)
    stored = []
    runtime.execute(Stage("look", "", lambda r: stored.append(r.provenance())), force=True)
    assert [*stored[0]["config"]["spark"]["conf"].values()] == ["(redacted)"] * 8 + ["4g"]


def test_own_java_options_come_beside_ours(spark: SparkSession) -> None:
    """The tests set some of their own (tests/conftest.py)."""
    system = spark._jvm.java.lang.System  # type: ignore[union-attr]
    found = [system.getProperty(name) for name in ("delta.log.cacheSize", "arrow.enable_null_check_for_get")]
    assert found == ["64", "false"]


# ---- the session ----------------------------------------------------------------------------------------------------


def test_other_accounts_read_neither_sparks_files_nor_its_ports(spark: SparkSession) -> None:
    spark.range(9).repartition(2).collect()
    inside = spark._jsc.sc().env()  # type: ignore[union-attr]
    folders = [Path(folder) for folder in inside.blockManager().diskBlockManager().localDirsString()]
    assert any(path.is_file() for folder in folders for path in folder.rglob("*"))
    for folder in folders:
        assert any(stat.S_IMODE(parent.stat().st_mode) == 0o700 for parent in folder.parents)
    assert inside.securityManager().isAuthenticationEnabled()


@pytest.mark.parametrize("fault", ["mode", "link", "file"])
def test_a_temporary_folder_that_others_may_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("SPARK_LOCAL_DIRS", raising=False)
    config = load_config()
    scratch = Path(spark_session._closed_to_other_accounts(config)["spark.local.dir"])
    assert stat.S_IMODE(scratch.stat().st_mode) == 0o700
    both = {"spark.local.dir": str(scratch), "spark.authenticate": "true"}
    assert spark_session._closed_to_other_accounts(config) == both
    if fault == "mode":
        scratch.chmod(0o750)
    else:
        scratch.rename(tmp_path / "private")
        scratch.symlink_to(tmp_path / "private") if fault == "link" else scratch.write_text("")
    with pytest.raises(TrailvecError, match=r"is not a folder that only this account can read: remove it, or set"):
        spark_session._closed_to_other_accounts(config)
    # A folder of the user's choice needs none.
    own = load_config(None, ['spark.conf={ "spark.local.dir" = "/big" }'])
    assert spark_session._closed_to_other_accounts(own) == {"spark.authenticate": "true"}
