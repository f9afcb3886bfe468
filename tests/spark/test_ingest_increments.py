"""Incremental ingest: growing files and topics, repeated events, in any order: the same result as one batch."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pyspark.sql import Column, DataFrame, SparkSession

from jobs import ingest
from jobs.errors import TrailvecError
from jobs.ingest import STAGE
from jobs.runtime import Runtime
from jobs.sources import Input, Source, load_source
from jobs.spark_session import spark_conf
from jobs.tables import EVENTS, REJECTED_EVENTS
from scripts.bench.measure import Watch
from scripts.kafka_broker import Broker
from tests.conftest import add, read_delta
from tests.events import make_event, to_frame

HEADER = "id,user,item,at,price\n"
COLUMNS = """
[input.columns]
event_id = "id"
user_id = "user"
item_id = "item"
event_type = { constant = "view" }
event_ts = "at"
vertical = { constant = "shop" }
amount = "price"
"""
ONE_BY_ONE = "ingest.max_files_per_batch=1"


def arrive(folder: Path, number: int, lines: str) -> None:
    """A new file; those of one run are read in the order of their numbers."""
    log = folder / f"log{number}.csv"
    log.write_text(HEADER + lines)
    os.utime(log, (number + 1, number + 1))  # the stream takes the oldest file first


def source(folder: Path, place: str = 'path = "log*.csv"\nformat = "csv"') -> str:
    path = folder / "shop.toml"
    path.write_text(f'name = "shop"\n[[input]]\n{place}\n{COLUMNS}')
    return str(path)


def settings(folder: Path, mapping: str, *more: str) -> tuple[str, ...]:
    return (
        f"ingest.sources={json.dumps([mapping])}",
        f'ingest.data_dir="{folder}"',
        "ingest.max_rejected_share=0.6",
        *more,
    )


def events(runtime: Runtime) -> list[dict[str, Any]]:
    return sorted(read_delta(runtime.path(EVENTS)), key=lambda row: (row["event_id"], row["event_ts"]))


def both_tables(runtime: Runtime) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rejected = read_delta(runtime.path(REJECTED_EVENTS))
    for row in rejected:
        del row["refused_on"]  # midnight may fall between two runs
    return events(runtime), rejected


def stops_at(line: str) -> Callable[[str], None]:
    """In place of `on_progress`: stops the run where it says so."""

    def on_progress(text: str) -> None:
        if line in text:
            raise TrailvecError("stopped")

    return on_progress


def stopped_by_another(runtime: Runtime, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    """Runs ingest; while it commits a batch, another run writes a file into the checkpoint, on which it stops."""
    commit = ingest.commit_batch

    def beside(*arguments: Any) -> Any:
        (checkpoint,) = (Path(runtime.config.storage.root) / "checkpoints/ingest").iterdir()
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text(text)
        return commit(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "commit_batch", beside)
        with pytest.raises(TrailvecError, match="another ingest is reading the same input"):
            runtime.execute(STAGE)


def stop(runtime: Runtime, monkeypatch: pytest.MonkeyPatch, name: str, instead: Callable[..., None]) -> None:
    """Runs ingest with the function `name` replaced by `instead`, which stops it midway."""
    with monkeypatch.context() as patch:
        patch.setattr(ingest, name, instead)
        with pytest.raises(TrailvecError, match="stopped"):
            runtime.execute(STAGE)


def test_the_ids_of_a_small_batch_go_to_each_task_and_only_files_that_may_hold_one_are_searched(
    make_runtime: Callable[..., Runtime], spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, plans, searched = make_runtime(), [], []

    def look(runtime: Runtime, ids: DataFrame, where: Column) -> DataFrame | None:
        there = runtime.latest(EVENTS).join(ids, "event_id", "left_semi")
        plans.append(there._jdf.queryExecution().executedPlan().toString())  # type: ignore[operator]
        searched.append(len(runtime.latest(EVENTS).where(where).inputFiles()))
        return stored(runtime, ids, where)

    stored, found = ingest.stored_events, []
    monkeypatch.setattr(ingest, "stored_events", look)
    monkeypatch.setattr(ingest, "FEW", 2)
    # Each batch makes a file; the third and fourth repeat an id of an earlier one, the last holds a late event.
    batches = (["a1", "a2"], ["z1", "z4"], ["z1", "z2", "z3"], ["a1", "a3"], ["a11 of the day before", "z11"])
    for ids in batches:
        days = [datetime(2023, 5, 1 if " " in event_id else 2) for event_id in ids]
        of_day = zip(ids, days, strict=True)
        batch = to_frame(spark, [make_event(event_id=i, user_id="ann", item_id="a", event_ts=day) for i, day in of_day])
        there: list[str] = []
        if runtime.exists(EVENTS):
            with spark_conf(spark, {"spark.sql.autoBroadcastJoinThreshold": "-1"}):  # as when Spark knows no size
                rows, _, _ = ingest._same_events(runtime, batch, False)
            there = [row["event_id"] for row in rows.collect()] if rows is not None else []
            found.append(there)
        add(runtime, EVENTS, batch.where(~batch["event_id"].isin(there)).coalesce(1))
    joins = ("BroadcastHashJoin", "SortMergeJoin", "BroadcastHashJoin", "BroadcastHashJoin")
    assert [join in plan for join, plan in zip(joins, plans, strict=True)] == [True] * 4
    assert searched == [0, 1, 1, 2]
    assert found == [[], ["z1"], ["a1"], []]


def test_inputs_are_known_by_path_or_name_wherever_they_stand(
    make_runtime: Callable[..., Runtime], tmp_path: Path
) -> None:
    (tmp_path / "log.csv").write_text(HEADER + "1,ann,a,2023-05-01,1\n2,,b,2023-05-02,1\n")
    (tmp_path / "and, more.csv").write_text(HEADER + "3,cyd,c,2023-05-03,1\n")
    (tmp_path / "12:00.csv").write_text("no log")  # Hadoop rejects colons, so must not see it
    log, more = ('path = "log.csv"\nformat = "csv"', 'path = "and, more.csv"\nformat = "csv"')
    runtime = make_runtime(*settings(tmp_path, source(tmp_path, log)))
    runtime.execute(STAGE)

    # Two in front: a file, and another kind of event in the file already read, with a name and so its own checkpoint.
    of_events = COLUMNS.replace('event_id = "id"', "event_id = { expr = \"concat('b', id)\" }")
    baskets = f'[[input]]\nname = "baskets"\n{log}\n{of_events}'
    in_front = Path(source(tmp_path, more)).read_text() + f"[[input]]\n{log}\n{COLUMNS}"
    (tmp_path / "shop.toml").write_text(in_front.replace("[[input]]", f"{baskets}[[input]]", 1))
    assert runtime.execute(STAGE).rows_in["records"] == 3
    assert [row["event_id"] for row in events(runtime)] == ["1", "3", "b1"]


def test_a_changed_path_reads_again_and_writes_nothing_again(
    make_runtime: Callable[..., Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if that run stops between its batches and the next one continues."""
    for n in range(2):
        arrive(tmp_path, n, f"{n},ann,a,2023-05-01,1\n{n},,b,2023-05-02,1\n")
    runtime = make_runtime(*settings(tmp_path, source(tmp_path), ONE_BY_ONE))
    runtime.execute(STAGE)
    before = both_tables(runtime)
    assert [len(rows) for rows in before] == [2, 2]

    commit = ingest.commit_batch

    def only_one(runtime: Runtime, frames: list[DataFrame], batch: tuple[str, int], *rest: Any) -> Any:
        if batch[1] == 1:
            raise TrailvecError("stopped")
        return commit(runtime, frames, batch, *rest)

    changed = load_source(source(tmp_path, 'path = "log?.csv"\nformat = "csv"'))
    checkpoint = ingest._checkpoint(runtime, changed, changed.input[0])
    checkpoint.mkdir()  # as an early kill may leave it
    (checkpoint / ".metadata.tmp").touch()  # or another run may have made it that is just starting
    stop(runtime, monkeypatch, "commit_batch", only_one)
    assert (checkpoint / ".metadata.tmp").exists()
    assert runtime.execute(STAGE).rows_in["records"] == 2
    assert both_tables(runtime) == before


def test_where_events_was_moved_away_all_inputs_are_read_again(
    make_runtime: Callable[..., Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the second one, if the run stops after the first."""
    (tmp_path / "log.csv").write_text(HEADER + "1,ann,a,2023-05-01,1\n2,,b,2023-05-02,1\n")
    (tmp_path / "more.csv").write_text(HEADER + "3,cyd,c,2023-05-03,1\n")
    runtime = make_runtime(*settings(tmp_path, source(tmp_path, 'path = "log.csv"\nformat = "csv"')))
    with (tmp_path / "shop.toml").open("a") as mapping:
        mapping.write(f'[[input]]\npath = "more.csv"\nformat = "csv"\n{COLUMNS}')
    runtime.execute(STAGE)
    before = both_tables(runtime)
    shutil.move(runtime.path(EVENTS), tmp_path / "away")

    def stop_at_more(runtime: Runtime, source: Source, mapping: Input) -> None:
        if mapping.path == "more.csv":
            raise TrailvecError("stopped")
        follow(runtime, source, mapping)

    follow = ingest.follow
    stop(runtime, monkeypatch, "follow", stop_at_more)
    assert runtime.execute(STAGE).rows_in["records"] == 1
    assert both_tables(runtime) == before

    shutil.move(runtime.path(REJECTED_EVENTS), tmp_path / "refused")
    (note,) = runtime.execute(STAGE).notes
    assert note.startswith("table rejected_events was missing, and the records refused before are lost with it")
    assert both_tables(runtime) == (before[0], [])
    runtime.execute(STAGE, force=True)
    assert both_tables(runtime) == before


def test_a_last_batch_of_one_wrong_record_is_weighed_with_those_before_it(
    make_runtime: Callable[..., Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run stops after that batch is committed and before Spark notes it, so that it is read again."""
    runtime = make_runtime(*settings(tmp_path, source(tmp_path), ONE_BY_ONE, "ingest.max_rejected_share=0.1"))
    arrive(tmp_path, 0, "".join(f"{n},ann,a,2023-05-01,1\n" for n in range(9)))
    arrive(tmp_path, 1, "9,,a,2023-05-01,1\n10,ann,a,2023-05-01,1\n")

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "on_progress", stops_at("batch 1, 2 records"))
        with pytest.raises(TrailvecError, match="stopped"):
            runtime.execute(STAGE)
    runtime.execute(STAGE)
    report = runtime.count_rows()
    assert (report.rows_in["records"], report.rows_out) == (2, {"events": 10, "rejected_events": 1})
    assert not any("dropped" in note for note in report.notes)  # what the run itself had written is no repeat
    arrive(tmp_path, 2, "11,,a,2023-05-01,1\n")
    with pytest.raises(TrailvecError, match="1 of 1 records are refused"):  # a run of its own
        runtime.execute(STAGE)


def test_a_batch_that_was_let_through_stops_no_later_one(
    make_runtime: Callable[..., Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that let it through is killed in its next batch; the run that goes on has the usual limit."""
    sets = settings(tmp_path, source(tmp_path), ONE_BY_ONE)
    arrive(tmp_path, 0, "".join(f"{n},,a,2023-05-01,1\n" for n in range(9)))
    arrive(tmp_path, 1, "9,ann,a,2023-05-01,1\n")
    lenient = make_runtime(*sets, "ingest.max_rejected_share=1")
    monkeypatch.setattr(lenient, "on_progress", stops_at("batch 1, reading"))
    with pytest.raises(TrailvecError, match="stopped"):
        lenient.execute(STAGE)
    usual = make_runtime(*sets, "ingest.max_rejected_share=0.1")
    usual.execute(STAGE)
    assert len(events(usual)) == 1


def test_a_run_that_is_overtaken_in_its_last_batch_leaves_no_counts(
    make_runtime: Callable[..., Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be those of another run: its many good records would let any wrong ones pass."""
    runtime = make_runtime(*settings(tmp_path, source(tmp_path)), "ingest.max_rejected_share=0.1")
    arrive(tmp_path, 0, "".join(f"{n},ann,a,2023-05-01,1\n" for n in range(20)))
    stopped_by_another(runtime, monkeypatch, "commits/0", 'v1\n{"nextBatchWatermarkMs":0}')
    assert len(events(runtime)) == 20
    arrive(tmp_path, 1, "20,,a,2023-05-01,1\n21,,a,2023-05-01,1\n")
    with pytest.raises(TrailvecError, match="2 of 2 records are refused"):
        runtime.execute(STAGE)


def test_two_runs_that_stop_each_other_lose_nothing(
    make_runtime: Callable[..., Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that starts between two writes of another one can enter the next batch's files, lose the batch before to
    it, and so leave an entry on which the other stops as well."""
    runtime = make_runtime(*settings(tmp_path, source(tmp_path), ONE_BY_ONE))
    for n in range(3):
        arrive(tmp_path, n, f"{n},ann,a,2023-05-01,1\n")
    entry = {"path": (tmp_path / "log1.csv").as_uri(), "timestamp": 2000, "batchId": 1}
    stopped_by_another(runtime, monkeypatch, "sources/0/1", f"v1\n{json.dumps(entry)}")
    assert len(events(runtime)) == 1
    runtime.execute(STAGE)
    assert len(events(runtime)) == 3


def test_a_large_file_is_parsed_in_a_task_for_each_core(
    make_runtime: Callable[..., Runtime], spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log.csv").write_text(HEADER + "".join(f"{n},ann,a,2023-05-01,1\n" for n in range(200)))
    mapping = source(tmp_path)
    runtime, (shop,) = make_runtime(*settings(tmp_path, mapping)), load_source(mapping).input
    listed = spark.read.format("binaryFile").load(f"file://{tmp_path}/log.csv").select("path", "length")
    found = []
    for least, tasks in ((ingest._ONE_TASK, 1), (100, 2)):
        monkeypatch.setattr(ingest, "_ONE_TASK", least)
        (raw,) = ingest._read_batch(runtime, shop, listed, "shop")
        assert raw.rdd.getNumPartitions() == tasks
        found.append(sorted(raw.collect(), key=lambda row: int(row["id"])))
    assert found[0] == found[1]
    assert [row["id"] for row in found[1]] == [str(n) for n in range(200)]


def test_of_one_id_the_earliest_stays_whichever_came_first(
    make_runtime: Callable[..., Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = make_runtime(*settings(tmp_path, source(tmp_path), ONE_BY_ONE))
    today = datetime.now(timezone.utc).date()

    def days() -> list[tuple[str, int]]:
        return [(row["event_id"], row["event_ts"].day) for row in events(runtime)]

    arrive(tmp_path, 0, "1,ann,a,2023-05-01,1\n3,ann,a,2023-05-09,1\n")
    # Of 1, the stored one is the earlier; of 3, the new one.
    arrive(tmp_path, 1, "1,ann,a,2023-05-09,1\n2,ann,a,2023-05-09,1\n3,ann,a,2023-05-01,1\n")
    runtime.execute(STAGE)
    assert days() == [("1", 1), ("2", 9), ("3", 1)]
    refused = read_delta(runtime.path(REJECTED_EVENTS))
    assert [row["reason"] for row in refused] == ["duplicate_event_id"] * 2
    for row in refused:
        assert today <= row["refused_on"] <= datetime.now(timezone.utc).date()
        assert json.loads(row["raw"])["event_ts"].startswith("2023-05-09")
    by_id = {json.loads(row["raw"])["event_id"]: row["file"] for row in refused}
    assert by_id.keys() == {"1", "3"}
    assert (by_id["1"].endswith("log1.csv"), by_id["3"].endswith("table events")) == (True, True)

    # What another run commits after this one has looked is not doubled.
    monkeypatch.setattr(ingest, "stored_events", lambda *of: None)  # it looked before the events were there
    arrive(tmp_path, 2, "1,ann,a,2023-05-01,1\n4,ann,a,2023-05-02,1\n")
    runtime.execute(STAGE)
    assert days() == [("1", 1), ("2", 9), ("3", 1), ("4", 2)]


def test_files_in_whatever_folder_and_of_whatever_age_are_found(
    make_runtime: Callable[..., Runtime], tmp_path: Path
) -> None:
    more = '[[input]]\npath = "more/*/*"\nformat = "csv"'
    mapping = source(tmp_path, f'path = "logs"\nformat = "csv"\n{COLUMNS}{more}')
    runtime = make_runtime(*settings(tmp_path, mapping))
    first = ["logs/05/a", "logs/05/day=1/b", "more/1/e"]
    hidden = ["logs/.staging/x", "more/_temporary/0/x", "more/2/.x"]  # the pattern alone would match two of them
    for arriving in (first + hidden, ["logs/06/c", "logs/_day=7/d", "more/2/f"]):
        for name in arriving:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / f"{name}.csv").write_text(HEADER + f"{name},ann,a,2023-05-01,1\n")
            if arriving[0] not in first:  # Spark would leave out what is a week older than what it has read
                os.utime(tmp_path / f"{name}.csv", (1, 1))
        runtime.execute(STAGE)
    assert [row["event_id"] for row in events(runtime)] == sorted([*first, *arriving])
    for name in (*first, *arriving):  # removed once read
        (tmp_path / f"{name}.csv").unlink()
    runtime.execute(STAGE)
    assert runtime.count_rows().rows_out["events"] == 6
    with pytest.raises(TrailvecError, match=r"logs: no such file"):
        runtime.execute(STAGE, force=True)
    twice = runtime.config.ingest.sources[0]
    with pytest.raises(TrailvecError, match=r"two mappings in ingest\.sources are named shop"):
        make_runtime(*settings(tmp_path, twice), f"ingest.sources={json.dumps([twice, twice])}").execute(STAGE)
    shutil.rmtree(tmp_path / "logs")
    with pytest.raises(TrailvecError, match=r"logs: no such file"):
        runtime.execute(STAGE)


def test_same_day_finds_an_event_again_and_takes_another_day_for_another(
    make_runtime: Callable[..., Runtime], tmp_path: Path
) -> None:
    runtime = make_runtime(*settings(tmp_path, source(tmp_path), ONE_BY_ONE, 'ingest.duplicates="same_day"'))
    for number, lines in enumerate(("1,ann,a,2023-05-01,1\n", "1,ann,a,2023-05-01,1\n1,ann,a,2023-05-09,1\n")):
        arrive(tmp_path, number, lines)
    assert runtime.execute(STAGE).notes == ["shop, log*.csv: 1 exact repeats of an event dropped"]
    assert [row["event_ts"].day for row in events(runtime)] == [1, 9]
    arrive(tmp_path, 2, "1,ann,a,2023-04-30,1\n")
    runtime.spark.sql(f"UPDATE delta.`{runtime.path(EVENTS)}` SET user_id = 'bob'")  # by hand
    with pytest.raises(
        TrailvecError, match=r"holds 1 ids on several days.*but everywhere does not: set it back, or move"
    ):
        make_runtime(*settings(tmp_path, source(tmp_path))).execute(STAGE)
    runtime.execute(STAGE)
    assert runtime.count_rows().rows_out["events"] == 3


def test_a_small_batch_sends_no_id_of_the_table_through_a_shuffle(
    make_runtime: Callable[..., Runtime], spark: SparkSession, tmp_path: Path
) -> None:
    runtime, ids = make_runtime(*settings(tmp_path, source(tmp_path))), [str(uuid.uuid4()) for _ in range(20_002)]
    for number, part in enumerate((ids[:-2], ids[-3:])):  # the second repeats one
        lines = "".join(f"{event_id},ann,a,2023-05-01,1\n" for event_id in part)
        (tmp_path / f"log{number}.csv").write_text(HEADER + lines)
        # The table is small too, and would otherwise be broadcast itself.
        with Watch(spark) as watch, spark_conf(spark, {"spark.sql.autoBroadcastJoinThreshold": "-1"}):
            report = runtime.execute(STAGE)
    assert report.notes == ["shop, log*.csv: 1 exact repeats of an event dropped"]
    assert 0 < watch.shuffled_mb < 0.1  # the table's ids alone are 0.7
    assert [row["event_id"] for row in events(runtime)] == sorted(ids)
    # Delta looks for no row to update, and so rewrites no file.
    merges = [commit for commit in DeltaTable(runtime.path(EVENTS)).history() if commit["operation"] == "MERGE"]
    assert [merge["operationParameters"]["matchedPredicates"] for merge in merges] == ["[]", "[]"]
    assert [merge["operationMetrics"]["numTargetRowsInserted"] for merge in merges] == ["2", "20000"]
    assert [merge["operationMetrics"]["numTargetFilesRemoved"] for merge in merges] == ["0", "0"]


def test_a_topic_is_read_once_across_a_broker_that_dies_in_the_middle(
    make_runtime: Callable[..., Runtime], spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, dead_after = ingest.commit_batch, []

    def commit_and_kill(runtime: Runtime, frames: list[DataFrame], batch: tuple[str, int], *rest: Any) -> Any:
        counts = commit(runtime, frames, batch, *rest)
        if batch[1] == 0:  # the first of the run's two batches
            broker.kill()
            with pytest.raises(TrailvecError, match="has exited"):
                broker.check()
            broker.start()
            broker.check()
            dead_after.append(batch[1])
        return counts

    def send(first: int, last: int) -> None:
        value = (
            "to_json(named_struct('id', string(id), 'user', concat('u', id % 7), 'item', 'i', "
            "'at', '2023-05-01T10:00:00Z', 'price', 1, 'channel', 'app')) AS value"
        )
        rows = spark.range(first, last).selectExpr(value).union(spark.sql("SELECT 'no json' AS value"))
        rows.write.format("kafka").option("kafka.bootstrap.servers", broker.address).option("topic", "views").save()

    def transaction(value: str, *, abort: bool) -> None:
        """A record written in a transaction, which is then committed or aborted."""
        jvm: Any = spark._jvm
        text = "org.apache.kafka.common.serialization.StringSerializer"
        settings = {"bootstrap.servers": broker.address, "transactional.id": "one"}
        settings |= {"key.serializer": text, "value.serializer": text}
        producer = jvm.org.apache.kafka.clients.producer.KafkaProducer(jvm.java.util.HashMap(settings))
        producer.initTransactions()
        producer.beginTransaction()
        producer.send(jvm.org.apache.kafka.clients.producer.ProducerRecord("views", value)).get()
        (producer.abortTransaction if abort else producer.commitTransaction)()
        producer.close()

    def recreate() -> None:
        """The topic again, empty, with one partition instead of three."""
        jvm: Any = spark._jvm
        kafka = jvm.org.apache.kafka.clients.admin
        admin = kafka.Admin.create(jvm.java.util.HashMap({"bootstrap.servers": broker.address}))
        admin.deleteTopics(jvm.java.util.List.of("views")).all().get()
        admin.createTopics(jvm.java.util.List.of(kafka.NewTopic("views", 1, 1))).all().get()
        admin.close()

    with Broker(tmp_path / "kafka") as broker:
        place = f'kafka = {{ bootstrap_servers = "{broker.address}", topic = "views" }}'
        runtime = make_runtime(*settings(tmp_path, source(tmp_path, place), "ingest.max_records_per_batch=70"))
        monkeypatch.setattr(ingest, "commit_batch", commit_and_kill)
        send(0, 100)
        assert runtime.execute(STAGE).rows_in["records"] == 101
        send(90, 150)  # ten of them repeated
        transaction("neither json", abort=True)
        report = runtime.execute(STAGE)
        monkeypatch.setattr(ingest, "commit_batch", commit)
        recreate()
        transaction('{"id": "new", "user": "u", "item": "i", "at": "2023-05-02T10:00:00Z", "price": 1}', abort=False)
        with pytest.raises(TrailvecError, match=r"topic views: partitions views-., views-. are gone: the topic was"):
            runtime.execute(STAGE)
        assert runtime.execute(STAGE, force=True).rows_in["records"] == 1
    assert dead_after == [0]
    assert report.rows_in["records"] == 61
    found = events(runtime)
    assert {row["event_id"] for row in found} == {"new", *map(str, range(150))}
    assert len(found) == 151
    assert dict(found[0]["attributes"]) == {"channel": "app"}
    refused = read_delta(runtime.path(REJECTED_EVENTS))
    assert [row["reason"] for row in refused] == ["broken_row", "broken_row"]
    assert all(row["file"].startswith("views/") for row in refused)


def test_a_secret_of_a_topic_comes_from_the_environment(
    make_runtime: Callable[..., Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VIEWS_PASSWORD", raising=False)
    place = (
        'kafka = { bootstrap_servers = "127.0.0.1:9", topic = "views", '
        'options = { "kafka.sasl.jaas.config" = "password=${VIEWS_PASSWORD}" } }'
    )
    with pytest.raises(TrailvecError, match=r"its options use \$VIEWS_PASSWORD, which is not set"):
        make_runtime(*settings(tmp_path, source(tmp_path, place))).execute(STAGE)


def test_a_file_cut_short_is_named_and_read_once_it_is_whole(
    make_runtime: Callable[..., Runtime], tmp_path: Path
) -> None:
    table = pa.table(
        {"id": [str(n) for n in range(500)], "user": ["ann"] * 500, "item": ["a"] * 500}
        | {"at": ["2023-05-01"] * 500, "price": [1.0] * 500}
    )
    pq.write_table(table, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "log.parquet").write_bytes(whole[: len(whole) // 2])
    runtime = make_runtime(*settings(tmp_path, source(tmp_path, 'path = "log.parquet"\nformat = "parquet"')))
    with pytest.raises(Exception, match=r"log\.parquet"):
        runtime.execute(STAGE)
    shutil.copy(tmp_path / "whole", tmp_path / "log.parquet")
    runtime.execute(STAGE)
    assert runtime.count_rows().rows_out["events"] == 500
