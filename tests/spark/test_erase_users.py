"""People erased from a small warehouse: gone from every file, kept out, and the pipeline continues as if they had never
existed.

Every erased user has "erika" in the id, and nothing else does: whatever holds the word holds one of them.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession

from jobs import build_sequences, build_vocabulary, cli, commits, erase_users, flag_users, ingest, sessionize
from jobs import lake as lake_module
from jobs.config import UserList
from jobs.erase_users import HOLDING_USERS, _files, erase, finish, read_ids
from jobs.errors import TrailvecError
from jobs.files import HadoopPath, Place
from jobs.maintain_tables import maintain, vacuum
from jobs.runtime import Runtime, Stage
from jobs.tables import (
    ERASED_USERS,
    ERASURES,
    EVENTS,
    EXPORTS,
    FLAGGED_USERS,
    ITEMS,
    NEIGHBOURS,
    REJECTED_EVENTS,
    SEQUENCES,
    SESSIONS,
    TABLES,
    USER_EMBEDDINGS,
    USER_PROFILES,
    Table,
)
from jobs.tombstones import ERASE_KEY
from jobs.user_lists import read_users
from tests.conftest import add, expired, make_config, put, read_delta
from tests.events import START, make_event, to_frame

KEY = "a key of the tests"
ERASED = ("erika-1", "qa-erika", 'o"neil; erika')  # the last one is escaped differently in CSV and in JSON
OTHERS = ("bob", "carl", "qa-dora")
STAGES = (ingest.STAGE, flag_users.STAGE, sessionize.STAGE, build_vocabulary.STAGE, build_sequences.STAGE)
HEADER = "id,user,item,at,price\n"
MAPPING = """
name = "shop"
[[input]]
path = "log*.csv"
format = "csv"
[input.columns]
event_id = "id"
user_id = "user"
item_id = "item"
event_type = { constant = "purchase" }
event_ts = "at"
vertical = { constant = "shop" }
amount = "price"
"""


def line(number: int, user: str, item: str, at: str, price: str = "1") -> str:
    quoted = '"' + user.replace('"', '""') + '"'
    return f"{number},{quoted},{item},{at},{price}\n"


def first_days() -> list[str]:
    everyone = [*ERASED, *OTHERS]
    lines = [
        line(100 * n + day, user, f"i{(n + day) % 4}", f"2023-05-{day:02} 10:{n:02}:00")
        for n, user in enumerate(everyone)
        for day in range(1, 8)
    ]
    return [
        *lines,
        line(900, "erika-1", "only-hers", "2023-05-01 11:00:00"),
        line(901, "erika-1", "i1", "2023-05-01", price="dear"),  # rejected, with a user
        line(902, "bob", "i1", "2023-05-01", price="dear"),
        line(1, "bob", "i1", "2023-04-30"),  # the id of an event of erika-1, but earlier: hers is rejected
        '903,"o""neil; erika",i1,2023-05-01,1,one too many\n',  # broken: no user can be read
        "904,carl,i1,2023-05-01,1,one too many\n",
    ]


def more_days() -> list[str]:
    """Sessions of the first days get longer, so that deletion vectors hide their earlier rows."""
    return [line(700 + n, user, "i2", f"2023-05-05 10:{n + 9:02}:00") for n, user in enumerate([*ERASED, *OTHERS])]


def late_days() -> list[str]:
    """Arrives a week after the erasure."""
    return [
        line(800, "erika-1", "i1", "2023-05-06 10:30:00"),
        line(801, "erika-1", "i1", "never"),
        "802,erika-1,i1,2023-05-06,1,one too many\n",
        line(803, "bob", "i3", "2023-05-06 10:30:00"),
        "804,bob,i1,2023-05-06,1,one too many\n",
    ]


def without_them(lines: list[str]) -> list[str]:
    return [text for text in lines if "erika" not in text]


def shop(spark: SparkSession, folder: Path) -> Runtime:
    (folder / "data").mkdir(parents=True)
    (folder / "shop.toml").write_text(MAPPING)
    sets = (
        f"ingest.sources={json.dumps([str(folder / 'shop.toml')])}",
        f'ingest.data_dir="{folder / "data"}"',
        "ingest.max_rejected_share=0.9",
        'flag_users.test_accounts=["qa-%"]',
        "vocabulary.min_count=1",
        "sequences.valid_from=2023-05-04T00:00:00Z",
        "sequences.test_from=2023-05-06T00:00:00Z",
        'storage.database="erased"',
    )
    return Runtime(make_config(folder / "warehouse", *sets), spark)


def arrive(runtime: Runtime, name: str, lines: list[str], stages: Sequence[Stage] = STAGES) -> dict[str, list[str]]:
    """Writes a file of the lines and runs the pipeline (or the given stages); returns the notes of each stage."""
    (Path(runtime.config.ingest.data_dir) / f"log-{name}.csv").write_text(HEADER + "".join(lines))
    return {stage.name: runtime.execute(stage).notes for stage in stages}


def add_vectors(runtime: Runtime) -> None:
    """What a model, its neighbours and an export would leave, including an item named like an erased user."""
    spark, at = runtime.spark, datetime(2023, 5, 8, tzinfo=timezone.utc)
    users = [*ERASED, *OTHERS]
    vectors = [(u, m, at, 1, False, [1.0, float(n)]) for m in ("m1", "m2") for n, u in enumerate(users)]
    put(runtime, USER_EMBEDDINGS, spark.createDataFrame(vectors, USER_EMBEDDINGS.schema()))
    profiles = [(u, "m1", at, [1.0, float(n)]) for n, u in enumerate(users)]
    put(runtime, USER_PROFILES, spark.createDataFrame(profiles, USER_PROFILES.schema()))
    pairs = [
        *(("m1", "user_user", a, n, b, 0.5) for a in users for n, b in enumerate(users) if a != b),
        *(("m1", "user_item", a, 1, "i1", 0.5) for a in users),
        ("m1", "item_item", "qa-erika", 1, "i1", 0.5),
    ]
    put(runtime, NEIGHBOURS, spark.createDataFrame(pairs, NEIGHBOURS.schema()))
    log = [
        ("x1", "fans", "erika-1", False, at, "m1", "s3://partner/fans"),
        ("x1", "fans", "bob", False, at, "m1", "s3://partner/fans"),
        ("x2", "held", "qa-erika", True, at, "m1", "/exports/held"),  # in the control group: in no file
    ]
    put(runtime, EXPORTS, spark.createDataFrame(log, EXPORTS.schema()))


def parquet_files(runtime: Runtime, table: Table) -> list[Path]:
    return [p for p in Path(runtime.path(table)).rglob("*.parquet") if "_delta_log" not in p.parts]


def holding(runtime: Runtime) -> set[str]:
    """The tables with a Parquet file on disk, of any version, that holds an erased user, as read by DuckDB."""
    found = set()
    for table in TABLES:
        for file in parquet_files(runtime, table) if runtime.exists(table) else []:
            rows = duckdb.execute("SELECT t::VARCHAR FROM read_parquet(?, hive_partitioning = true) AS t", [str(file)])
            texts = [text for (text,) in rows.fetchall() if "item_item" not in text]
            found |= {table.name} if any("erika" in text for text in texts) else set()
    return found


def showing(runtime: Runtime) -> set[str]:
    """The tables whose current version shows an erased user."""
    rows = {t.name: str(read_delta(runtime.path(t))) for t in TABLES if runtime.exists(t) and t is not NEIGHBOURS}
    neighbours = [row for row in read_delta(runtime.path(NEIGHBOURS)) if row["kind"] != "item_item"]
    return {name for name, text in (rows | {"neighbours": str(neighbours)}).items() if "erika" in text}


def receipts(runtime: Runtime) -> list[dict[str, Any]]:
    return read_delta(runtime.path(ERASURES))


def operations(runtime: Runtime) -> str:
    """The commitInfo lines in Delta's logs."""
    logs = [log for table in TABLES for log in Path(runtime.path(table)).glob("_delta_log/*.json")]
    return "\n".join(text for log in logs for text in log.read_text().splitlines() if text.startswith('{"commitInfo"'))


@pytest.fixture
def keyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ERASE_KEY, KEY)


@pytest.fixture(scope="module")
def story(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """All that happens, in order, and what was observed at each step."""
    folder, seen = tmp_path_factory.mktemp("erase"), SimpleNamespace()
    seen.runtime = runtime = shop(spark, folder / "erased")
    ids = folder / "ids.txt"
    ids.write_text("\n".join([*ERASED, "erika-unknown", ""]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ERASE_KEY, KEY)
        arrive(runtime, "1", first_days())
        arrive(runtime, "2", more_days(), [ingest.STAGE, sessionize.STAGE])
        maintain(runtime, [EVENTS.name, SESSIONS.name])  # Delta treats hidden rows of clustered tables differently
        add_vectors(runtime)
        seen.before = {"showing": showing(runtime), "holding": holding(runtime)}

        def killed(runtime: Runtime, table: Table, *more: Any, delete: Any = erase_users._delete) -> None:
            if table == SEQUENCES:
                raise KeyboardInterrupt
            delete(runtime, table, *more)

        with pytest.MonkeyPatch.context() as kill:
            kill.setattr(erase_users, "_delete", killed)
            with pytest.raises(KeyboardInterrupt):
                erase(runtime, str(ids), requested_by="desk")
        seen.killed = {"showing": showing(runtime), "receipt": receipts(runtime)[0]}
        seen.report = erase(runtime, str(ids), requested_by="desk")
        seen.after = {"showing": showing(runtime), "holding": holding(runtime), "receipt": receipts(runtime)[0]}
        seen.versions = {table.name: runtime.latest_version(table) for table in HOLDING_USERS}

        seen.early = finish(runtime)
        seen.late = arrive(runtime, "3", late_days())
        for table in HOLDING_USERS:
            vacuum(expired(runtime), table)
        seen.vacuumed = holding(runtime)
        seen.finished, seen.receipt = finish(runtime), receipts(runtime)[0]

        seen.oracle = oracle = shop(spark, folder / "oracle")
        arrive(oracle, "all", without_them([*first_days(), *more_days(), *late_days()]))
    return seen


# ---- gone ------------------------------------------------------------------------------------------------


def test_no_table_is_forgotten() -> None:
    """erase_users knows every column that may hold a user."""
    named = {t.name for t in TABLES for c in t.columns if c.name.endswith("_id") or "user" in c.name}
    no_users = {"items", "context_values", "item_embeddings", "evaluation", "probes", "erasures", "erased_users"}
    assert {t.name for t in HOLDING_USERS} == named - no_users


def test_nobody_shows_and_old_versions_hold_them_until_vacuum(story: SimpleNamespace) -> None:
    everywhere = {table.name for table in HOLDING_USERS}
    assert story.before == {"showing": everywhere, "holding": everywhere}
    assert story.after["showing"] == set()
    assert story.after["holding"] == everywhere


def test_after_vacuum_no_parquet_file_holds_them(story: SimpleNamespace) -> None:
    assert story.vacuumed == set()
    assert all(parquet_files(story.runtime, table) for table in HOLDING_USERS)


def test_a_row_that_an_update_hid_goes_too(
    make_runtime: Callable[..., Runtime], tmp_path: Path, keyed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Her event was corrected once: the old file now shows only bob's, and must be rewritten all the same."""
    runtime = make_runtime()
    old, new = (
        make_event(event_id="e1", user_id="erika", item_id=item, event_ts=START) for item in ("mistaken", "right")
    )
    put(runtime, EVENTS, to_frame(runtime.spark, [old, old | {"event_id": "e2", "user_id": "bob"}]))
    correct = Stage("correct", "", lambda r: r.merge(EVENTS, to_frame(r.spark, [new])), (), (), ())
    runtime.execute(correct, force=True)
    (tmp_path / "ids.txt").write_text("erika\n")
    erase(runtime, str(tmp_path / "ids.txt"), requested_by="desk")
    files = [Path(runtime.path(EVENTS)) / name for name in DeltaTable(runtime.path(EVENTS)).file_uris()]
    rows = duckdb.execute("SELECT user_id FROM read_parquet(?)", [list(map(str, files))]).fetchall()
    assert rows == [("bob",)]

    # No table file holds her any more, but a file left by a killed export may, or a table made in SQL.
    for table in HOLDING_USERS:
        if runtime.exists(table):
            vacuum(expired(runtime), table)
    left = [
        runtime.root / ".exports.staging",
        runtime.root / ".erasures-0123456789ab.staging",
        runtime.exports / ".segment.9ab.staging",
        runtime.root / "spark/trailvec.db/made_in_sql",
        runtime.root / "spark/made_in_default",
    ]
    for folder in left:
        folder.mkdir(parents=True)
        report = finish(runtime)
        assert report.rows_out == {"finished": 0}
        assert str(folder) in report.notes[0]
        folder.rmdir()

    # So may a file of no version that a job has only begun to write, which no reader can open.
    half = Path(runtime.path(EVENTS)) / f"part-00009-{uuid.uuid4()}-c000.snappy.parquet"
    half.write_bytes(b"PAR1" + bytes(65536))
    report = finish(runtime)
    assert report.rows_out == {"finished": 0}
    assert f"1 half-written files of tables, such as {half}, could not be read" in report.notes[0]
    half.unlink()

    # Where nothing was read, nothing is proven: a folder that only Spark sees, say.
    with monkeypatch.context() as blind:
        blind.setattr("jobs.maintain_tables.file_sizes", lambda *_, **__: {})
        with pytest.raises(
            TrailvecError, match=r"^\d+ files of table events, such as part-\S+, are not in /.*/events,"
        ):
            finish(runtime)

    # An erasure that runs beside the search stays open: the search does not know its users.
    on_disk = erase_users._on_disk

    def beside(*given: Any) -> tuple[set[str], list[str]]:
        monkeypatch.setattr(erase_users, "_on_disk", on_disk)
        (tmp_path / "ids.txt").write_text("bob\n")
        erase(Runtime(runtime.config, runtime.spark), str(tmp_path / "ids.txt"), requested_by="another desk")
        return on_disk(*given)

    monkeypatch.setattr(erase_users, "_on_disk", beside)
    assert finish(runtime).rows_out == {"finished": 1}
    open_until_searched = {receipt["requested_by"]: receipt["finished_at"] is None for receipt in receipts(runtime)}
    assert open_until_searched == {"desk": False, "another desk": True}

    # Half-written files hide nobody who is back, not even beside the rows of other files.
    add(runtime, EVENTS, to_frame(runtime.spark, [new | {"event_id": "e3"}]))
    half.write_bytes(b"PAR1")
    report = finish(runtime)
    assert report.rows_out == {"finished": 0, "events": 1}
    assert [note for note in report.notes if "1 half-written files" in note]
    assert {row["user_id"] for row in read_delta(runtime.path(EVENTS))} == set()


def test_finish_ends_what_was_killed_and_names_exports_that_were_made_meanwhile(
    make_runtime: Callable[..., Runtime], tmp_path: Path, keyed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = make_runtime()
    spark, at = runtime.spark, datetime(2023, 5, 8, tzinfo=timezone.utc)
    events = [
        make_event(event_id=f"e{n}", user_id=u, item_id="i", event_ts=START) for n, u in enumerate(("erika", "bob"))
    ]
    put(runtime, EVENTS, to_frame(spark, events))

    def export(number: int) -> DataFrame:
        row = (f"x{number}", "fans", "erika", False, at, "m1", f"/exports/{number}")
        return spark.createDataFrame([row], EXPORTS.schema())

    put(runtime, EXPORTS, export(1))
    hers = "SELECT user_id FROM events WHERE user_id = 'erika'"
    delete = erase_users._delete

    with monkeypatch.context() as kill:
        kill.setattr(erase_users, "_open", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            erase(runtime, sql=hers, requested_by="desk")
    # Nobody is deleted without a receipt that says who has exports of them.
    (note,) = finish(runtime).notes
    assert "has no receipt yet" in note
    assert (runtime.latest(EVENTS).count(), runtime.latest(EXPORTS).count(), runtime.exists(ERASURES)) == (2, 1, False)

    numbers = itertools.count(2)

    def beside(runtime: Runtime, table: Table, *more: Any) -> None:
        """Runs of export_segments that began earlier log their members, even after the log was read for the last
        time."""
        if table in (EVENTS, EXPORTS):
            runtime.append(EXPORTS, export(next(numbers)))
        delete(runtime, table, *more)

    def killed(runtime: Runtime, table: Table, *more: Any) -> None:
        beside(runtime, table, *more)
        if table == EXPORTS:
            raise KeyboardInterrupt

    (first,) = (file for file in parquet_files(runtime, EXPORTS) if pq.read_metadata(file).num_rows)
    with monkeypatch.context() as kill:
        kill.setattr(erase_users, "_delete", killed)
        with pytest.raises(KeyboardInterrupt):
            erase(runtime, sql=hers, requested_by="desk")
    first.unlink()  # as VACUUM may
    with pytest.raises(TrailvecError, match=r"list of users to erase is empty: nothing was done"):
        erase(runtime, sql=hers, requested_by="somebody else")
    with pytest.raises(TrailvecError, match=r"that desk asked for .* is not complete: .* --finish"):
        erase(runtime, sql=hers, requested_by="desk")

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(erase_users, "_delete", beside)
        ended = finish(runtime)
        meanwhile.setattr(erase_users, "_delete", killed)
        with pytest.raises(KeyboardInterrupt):
            finish(runtime)
        meanwhile.setattr(erase_users, "_delete", beside)
        again = finish(runtime)
    (receipt,) = receipts(runtime)
    assert {entry["table"]: entry["rows"] for entry in receipt["tables"]} == {"events": 1, "exports": 5}
    assert ended.rows_out == {"finished": 0, "events": 1, "exports": 5}
    assert again.rows_out == {"finished": 0, "exports": 2}
    named = [f"x{n}" for n in range(1, 10)]
    assert [export["export_id"] for export in receipt["exports"]] == named
    assert [note.split(", exported")[0] for note in ended.notes[:2]] == [
        f"erasure {receipt['erasure_id']} was not complete: it is now",
        "notify the recipient of segment fans",
    ]
    told = [[n for note in report.notes for n in range(1, 10) if f"/exports/{n}" in note] for report in (ended, again)]
    assert told == [[1, 2, 3, 4, 5], [7, 8, 9]]  # 6 was written down by the `--finish` that was killed

    # She is back, and so is the request. Delta's log no longer has the commits before it.
    add(runtime, EVENTS, to_frame(spark, events[:1]))
    monkeypatch.setattr(commits, "_HISTORY", 2)
    (tmp_path / "ids.txt").write_text("erika\n")
    old, seen = receipt, []
    for rows in (1, 0):
        report = erase(runtime, str(tmp_path / "ids.txt"), requested_by="desk")
        assert report.rows_out == {"events": rows, "exports": 0}
        seen.append((receipts(runtime), runtime.latest_version(EVENTS), runtime.latest_version(EXPORTS)))
    assert seen[0] == seen[1]  # the same list again changes nothing
    ((receipt,), *_) = seen[0]
    assert {entry["table"]: entry["rows"] for entry in receipt["tables"]} == {"events": 2, "exports": 5}
    assert receipt["erased_at"] > old["erased_at"]
    assert [export["export_id"] for export in receipt["exports"]] == named


def test_files_that_a_vacuum_takes_meanwhile_are_passed_over(spark: SparkSession, tmp_path: Path) -> None:
    for n in range(2):
        pq.write_table(pa.table({"user_id": [f"u{n}"]}), tmp_path / f"{n}.parquet")
    files = [str(tmp_path / f"{n}.parquet") for n in range(3)]  # the last does not exist
    rows = erase_users._read_existing(spark, "user_id string", files)
    assert sorted(row["user_id"] for row in rows.collect()) == ["u0", "u1"]
    assert erase_users._read_existing(spark, "user_id string", files[2:]).isEmpty()


def test_a_log_of_exports_whose_older_versions_delta_has_forgotten_stops_nothing() -> None:
    runtime = Mock()
    runtime.erasure_commits.return_value = [Mock(version=3)]
    runtime.at.side_effect = AnalysisException("Cannot time travel Delta table to version 2")
    assert erase_users._deleted_exports(runtime, Mock(), "e", -1, 0) == {}
    runtime.at.assert_called_once_with(EXPORTS, 2)


def test_texts_that_no_utf8_holds_stop_nothing(
    make_runtime: Callable[..., Runtime], tmp_path: Path, keyed: None
) -> None:
    """Half of an emoji in JSON, and bytes in another encoding in lines and in Parquet columns. Ids that C padded."""
    data = tmp_path / "data"
    data.mkdir()
    name, columns = MAPPING.split("[[input]]")
    inputs = [f"[[input]]{columns}".replace("csv", form) for form in ("json", "parquet")]
    (tmp_path / "shop.toml").write_text(name + "".join(inputs))
    sources = f"ingest.sources={json.dumps([str(tmp_path / 'shop.toml')])}"
    runtime = make_runtime(sources, f'ingest.data_dir="{data}"', "ingest.max_rejected_share=1.0")
    own = (
        b'"user": "bob"',
        b'"note": "caf\xe9 erika"',
        b'"other": "erika", "note": "cut \\ud83d"',
        b'"note": "caf\xe9"',
        b'"note": "cut \\ud83d"',
        b'"user": "erika \\u0000\\u0000"',
        b'"user": "erika \\u0000old"',
    )
    users = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 4, 9], pa.int32()).buffers()[1], pa.py_buffer(b"caf\xe9erika")]
    )

    def arrive(day: int) -> list[str]:
        rest = b'"item": "i", "at": "2023-05-01", "price": 1'
        lines = [b'{"id": "%d%d", %s, %s}' % (day, number, text, rest) for number, text in enumerate(own)]
        (data / f"log{day}.json").write_bytes(b"\n".join(lines))
        same = {"item": ["i"] * 2, "at": ["2023-05-01"] * 2, "price": ["dear"] * 2}
        pq.write_table(pa.table({"id": [f"p{day}", f"q{day}"], "user": users, **same}), data / f"log{day}.parquet")
        return runtime.execute(ingest.STAGE).notes

    def refused() -> list[tuple[str, str | None]]:
        rows = runtime.latest(REJECTED_EVENTS).select("reason", "user_id", "raw").collect()
        return sorted((row["reason"], row["user_id"] or "") for row in rows)

    arrive(1)
    kept = [("invalid_utf8", ""), ("invalid_utf8", "caf\ufffd"), ("missing_user_id", "")]
    hers = [("bad_amount", "erika"), ("invalid_utf8", ""), ("missing_user_id", "")]
    hers += [("nul_user_id", "erika"), ("nul_user_id", "")]  # what stands behind the NUL is not part of an id
    assert refused() == sorted([*kept, *hers])
    assert all("\ufffd" in row["raw"] for row in read_delta(runtime.path(REJECTED_EVENTS)) if "caf" in row["raw"])

    # Older rows, with the original bytes.
    old = [(None, bytearray(own[1])), (None, bytearray(own[3])), (bytearray(b"caf\xe9"), None)]
    rows = runtime.spark.createDataFrame(old, "user_id binary, raw binary").selectExpr(
        "'shop' source", "'f' file", "string(user_id)", "'old' reason", "string(raw)", "current_date() refused_on"
    )
    add(runtime, REJECTED_EVENTS, rows)
    refused_ids = [
        ("4711.0", "missing_item_id", '{"user": 4711.0}'),
        ('{"id":4711}', "bad_amount", '{"user": {"id": 4711}}'),
        ("4711\0", "bad_amount", '{"user": "4711"}'),
        ("NDcxMQ==", "bad_type_user_id", '{"user": "4711"}'),
    ]
    as_users = runtime.spark.createDataFrame(refused_ids, "user_id string, reason string, raw string").selectExpr(
        "'shop' source", "'f' file", "user_id", "reason", "raw", "current_date() refused_on"
    )
    add(runtime, REJECTED_EVENTS, as_users)
    (tmp_path / "ids.txt").write_text("erika\0\0\n4711\n")
    erase(runtime, str(tmp_path / "ids.txt"), requested_by="desk")
    left = sorted([*kept, ("old", ""), ("old", "caf\ufffd")])
    assert refused() == left
    assert arrive(2) == [
        "shop, log*.json: 4 records of erased users dropped",
        "shop, log*.parquet: 1 records of erased users dropped",
    ]
    assert refused() == sorted([*left, *kept])
    add(runtime, REJECTED_EVENTS, as_users)
    assert "2 erased users" in finish(runtime).notes[-1]
    assert refused() == sorted([*left, *kept])


def test_where_no_table_of_users_is_nobody_is_said_to_be_erased(
    tmp_path: Path, keyed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without --conf: the receipt would go into an empty warehouse."""
    for there, said in (
        (ITEMS, f"no table that holds users exists under {tmp_path}: check"),
        (EXPORTS, "list .* does not"),
    ):
        monkeypatch.setattr(Runtime, "exists", lambda runtime, table, there=there: table == there)
        with pytest.raises(TrailvecError, match=said):
            erase_users._erase(Runtime(make_config(tmp_path)), str(tmp_path / "none.txt"), None, "desk")


def test_lists_are_read_from_any_store_and_keep_their_copies(
    make_runtime: Callable[..., Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, lake, meanwhile = make_runtime(), HadoopPath(f"file://{tmp_path}/lake"), []
    for user in ("ann", "bob"):
        (tmp_path / f"{user}.csv").write_text(f"user_id\n{user}\n")

    def read(runtime: Runtime, users: UserList, path: Path, folder: Place) -> DataFrame | Iterator[str]:
        found = read_users(runtime, users, path, folder)
        if not meanwhile:
            meanwhile.append("bob")
            meanwhile.extend(read_ids(runtime, str(tmp_path / "bob.csv"), None))
        return found

    monkeypatch.setattr(Runtime, "staging", lambda _, of: lake / f".{of}.staging")
    monkeypatch.setattr(erase_users, "read_users", read)
    assert read_ids(runtime, str(tmp_path / "ann.csv"), None) == ["ann"]
    assert meanwhile == ["bob", "bob"]

    monkeypatch.setattr(erase_users, "place_of", HadoopPath)  # as with hdfs://
    (tmp_path / "ids.txt").write_text("carl\n")
    for name, user in (("ids.txt", "carl"), ("ann.csv", "ann")):
        assert read_ids(runtime, f"file://{tmp_path}/{name}", None) == [user]
    with pytest.raises(TrailvecError, match=r"the list file:.*/none\.txt does not exist: correct the path"):
        read_ids(runtime, f"file://{tmp_path}/none.txt", None)
    (tmp_path / "bob.csv").write_text("name\nbob\n")
    with pytest.raises(TrailvecError, match=rf"the list file:.*{tmp_path}/bob\.csv has no column user_id"):
        read_ids(runtime, f"file://{tmp_path}/bob.csv", None)
    assert not list((tmp_path / "lake").iterdir())


def test_a_writer_beside_it_loses_nothing_and_brings_nobody_back(
    make_runtime: Callable[..., Runtime], tmp_path: Path, keyed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lake_module, "time", SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 2)))
    runtime = make_runtime()

    def event(number: int, user: str, item: str = "i") -> dict[str, Any]:
        return make_event(event_id=f"e{number}", user_id=user, item_id=item, event_ts=START)

    # Her events share files with bob's, which the other job keeps changing.
    put(runtime, EVENTS, to_frame(runtime.spark, [event(n, "erika" if n % 2 else "bob") for n in range(8)]))
    other = Runtime(runtime.config, runtime.spark.newSession())  # with its own settings, like another process
    errors: list[BaseException] = []
    began, ended = threading.Event(), threading.Event()
    written: list[int] = []

    def write() -> None:
        try:
            for number in itertools.takewhile(lambda _: not ended.is_set(), itertools.count(8)):
                rows = to_frame(other.spark, [event(0, "bob", f"changed-{number}"), event(number, "carl")])
                change = Stage("change", "", lambda r, rows=rows: r.merge(EVENTS, rows), (), (), ())
                other.execute(change, force=True)
                written.append(number)
                began.set()
                ended.wait(0.3 * 2 ** (number - 8))  # at first too short to commit in, then long enough
        except BaseException as error:
            errors.append(error)
            began.set()

    writer = threading.Thread(target=write)
    writer.start()
    began.wait()
    (tmp_path / "ids.txt").write_text("erika\n")
    erase(runtime, str(tmp_path / "ids.txt"), requested_by="desk")
    ended.set()
    writer.join()
    assert errors == []
    assert len(written) > 1  # while the other was working
    rows = sorted((row["event_id"], row["user_id"], row["item_id"]) for row in read_delta(runtime.path(EVENTS)))
    bobs = [("e0", "bob", f"changed-{written[-1]}"), *[(f"e{n}", "bob", "i") for n in (2, 4, 6)]]
    assert rows == sorted([*bobs, *[(f"e{n}", "carl", "i") for n in written]])


def test_others_and_items_of_their_name_stay(story: SimpleNamespace) -> None:
    vectors, neighbours, log = (
        read_delta(story.runtime.path(table)) for table in (USER_EMBEDDINGS, NEIGHBOURS, EXPORTS)
    )
    assert sorted((r["user_id"], r["model_version"]) for r in vectors) == sorted(
        (user, model) for user in OTHERS for model in ("m1", "m2")
    )
    assert sorted((r["kind"], r["source_id"], r["neighbour_id"]) for r in neighbours) == sorted(
        [
            *(("user_user", a, b) for a in OTHERS for b in OTHERS if a != b),
            *(("user_item", a, "i1") for a in OTHERS),
            ("item_item", "qa-erika", "i1"),
        ]
    )
    assert [r["user_id"] for r in log] == ["bob"]


# ---- kept out, and the pipeline goes on ------------------------------------------------------------------


def test_late_events_are_dropped_and_counted(story: SimpleNamespace) -> None:
    assert story.late["ingest"] == ["shop, log*.csv: 3 records of erased users dropped"]


def without(rows: list[dict[str, Any]], *names: str) -> list[str]:
    return sorted(str({k: v for k, v in row.items() if k not in names}) for row in rows)


def test_the_road_ends_as_if_they_had_never_been(story: SimpleNamespace) -> None:
    for table in (EVENTS, FLAGGED_USERS, SESSIONS):
        rows, expected = (read_delta(r.path(table)) for r in (story.runtime, story.oracle))
        assert without(rows) == without(expected) != [], table.name
    rows, expected = (read_delta(r.path(REJECTED_EVENTS)) for r in (story.runtime, story.oracle))
    assert without(rows, "file", "refused_on") == without(expected, "file", "refused_on") != []

    def named(runtime: Runtime) -> list[str]:
        """Sequences with the items' names: indices are assigned once, and who met an item first does not matter."""
        items = {row["item_index"]: row["item_id"] for row in read_delta(runtime.path(ITEMS))}
        sequences = read_delta(runtime.path(SEQUENCES))
        for row in sequences:
            for column in ("item_index", "target_item_index"):
                row[column] = row[column] and [items[n] for n in row[column]]
            row["seen_item_index"] = row["seen_item_index"] and sorted(items[n] for n in row["seen_item_index"])
        return without(sequences)

    assert named(story.runtime) == named(story.oracle) != []
    items, expected = (read_delta(r.path(ITEMS)) for r in (story.runtime, story.oracle))
    left = [row for row in items if row["event_count"]]
    assert without(left, "item_index") == without(expected, "item_index")
    assert [(r["item_id"], r["train_count"], r["target_count"]) for r in items if not r["event_count"]] == [
        ("only-hers", 0, 0)
    ]


def test_stages_go_on_from_where_they_were(story: SimpleNamespace) -> None:
    """No table was rebuilt as a whole after the first time."""
    for table in (FLAGGED_USERS, SESSIONS, SEQUENCES):
        commits = list(story.runtime._commits(table))
        assert sum(commit.replaced_all for commit in commits) == 1, table.name
        assert any(commit.erasure for commit in commits)
        assert story.runtime.last_writer(table)["stage"] == table.stage


# ---- receipts --------------------------------------------------------------------------------------------


def test_the_receipt_says_who_asked_and_what_went(story: SimpleNamespace) -> None:
    receipt = story.after["receipt"]
    assert (receipt["requested_by"], receipt["users"], len(receipt["ids_digest"])) == ("desk", 4, 64)
    assert receipt["requested_at"] < receipt["erased_at"]
    assert receipt["finished_at"] is None
    rows = {entry["table"]: entry["rows"] for entry in receipt["tables"]}
    assert rows == story.report.rows_out
    # Three users' first seven days, one more day, and "only-hers"; one of those ids had gone to bob.
    assert (rows["events"], rows["rejected_events"], rows["flagged_users"]) == (24, 3, 7)
    assert (rows["user_embeddings"], rows["neighbours"], rows["exports"]) == (6, 27, 2)
    assert all(entry["version_before"] < entry["version_after"] for entry in receipt["tables"])
    assert {entry["table"]: entry["version_after"] for entry in receipt["tables"]} == story.versions


def test_the_receipt_names_the_exports_that_left(story: SimpleNamespace) -> None:
    (export,) = story.after["receipt"]["exports"]  # found before the kill, when the log still held them
    assert (export["segment"], export["export_id"], export["users"]) == ("fans", "x1", 1)
    assert export["exported_at"] == datetime(2023, 5, 8, tzinfo=timezone.utc)
    assert export["destination"] == "s3://partner/fans"  # no configured segment has that name any more
    assert any("segment fans" in note for note in story.report.notes)


def test_a_killed_erasure_ends_by_the_same_command(story: SimpleNamespace) -> None:
    assert {"sequences", "exports"} <= story.killed["showing"]
    assert "events" not in story.killed["showing"]
    assert story.killed["receipt"]["erased_at"] is None
    for name in ("erasure_id", "requested_at", "ids_digest"):
        assert story.killed["receipt"][name] == story.after["receipt"][name]


def test_the_receipt_closes_when_nothing_is_left_on_disk(story: SimpleNamespace) -> None:
    assert story.early.rows_out == {"finished": 0}
    assert "old files of events, rejected_events" in story.early.notes[0]
    assert story.finished.rows_out == {"finished": 1}
    assert story.receipt["finished_at"] > story.receipt["erased_at"]


def test_a_receipt_closes_and_opens_again() -> None:
    asked, erased, closed, now = (datetime(2023, 5, day, tzinfo=timezone.utc) for day in (1, 2, 3, 4))
    nowhere = {"held": False, "returned": False, "leftovers": False}

    def times(erased_at: datetime | None, finished_at: datetime | None, **found: bool) -> tuple[Any, Any]:
        receipt = {"requested_at": asked, "erased_at": erased_at, "finished_at": finished_at}
        settled = erase_users._settled(receipt, now=now, **nowhere | found)
        assert settled["requested_at"] == asked
        return settled["erased_at"], settled["finished_at"]

    assert times(erased, None) == (erased, now)
    assert times(erased, closed) == (erased, closed)
    assert times(None, None) == (None, None)  # killed, and begun after the killed ones were completed
    assert times(erased, None, leftovers=True) == (erased, None)
    assert times(erased, closed, leftovers=True) == (erased, closed)
    assert times(erased, None, returned=True) == (erased, now)  # another erasure's users had come back
    assert times(erased, None, held=True) == (erased, None)
    assert times(erased, closed, held=True) == (erased, None)
    assert times(erased, closed, held=True, returned=True, leftovers=True) == (now, None)


def test_no_receipt_tombstone_or_log_of_operations_shows_an_id_or_the_key(story: SimpleNamespace) -> None:
    texts = [
        str(read_delta(story.runtime.path(ERASURES))),
        str(read_delta(story.runtime.path(ERASED_USERS))),
        *(str(vars(report)) for report in (story.report, story.early, story.finished)),
        operations(story.runtime),
    ]
    assert len(read_delta(story.runtime.path(ERASED_USERS))) == 4
    for text in texts:
        assert text
        assert "erika" not in text
        assert KEY not in text


# ---- refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "arguments", "sentence"),
    [
        ({}, ["missing.txt"], "the list missing.txt does not exist"),
        ({}, ["empty.txt"], "the list of users to erase is empty"),
        ({}, ["--sql", "SELECT 1 AS id"], "has no column user_id (found id): add it"),
        ({}, [], "either a file of user ids or --sql"),
        ({"by": None}, ["ids.txt"], "--requested-by is missing or empty: name who asked"),
        ({"key": None}, ["ids.txt"], f"the environment has no {ERASE_KEY}"),
        ({"key": "another"}, ["ids.txt"], f"{ERASE_KEY} is not the key that users were erased with"),
        ({"by": None}, ["ids.txt", "--finish"], "--finish applies to all erasures"),
    ],
)
def test_one_sentence_for_what_is_wrong(
    story: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sets: dict[str, Any],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    Path("ids.txt").write_text("bob\n")
    monkeypatch.setattr(cli, "load_config", lambda *_: story.runtime.config)
    by, key = sets.get("by", "desk"), sets.get("key", KEY)
    if key is None:
        monkeypatch.delenv(ERASE_KEY, raising=False)
    else:
        monkeypatch.setenv(ERASE_KEY, key)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["erase_users", *arguments, *(["--requested-by", by] if by else [])])
    said = capsys.readouterr().err
    assert stopped.value.code == 1
    assert sentence in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("key", [None, "another"])
def test_ingest_refuses_to_run_blind(story: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, key: str | None) -> None:
    monkeypatch.delenv(ERASE_KEY, raising=False)
    if key:
        monkeypatch.setenv(ERASE_KEY, key)
    version = story.runtime.latest_version(EVENTS)
    forced = Runtime(story.runtime.config, story.runtime.spark)
    with pytest.raises(TrailvecError, match=ERASE_KEY):
        forced.execute(ingest.STAGE, force=True)
    assert forced.latest_version(EVENTS) == version


def test_files_that_name_their_columns_otherwise_close_no_receipt(make_runtime: Callable[..., Runtime]) -> None:
    """As in tables made where a cluster maps the columns of all new tables: no search by name finds anybody there."""
    runtime = make_runtime()
    runtime.create(EVENTS)
    assert _files(runtime, EVENTS) == ([], [])
    mapped = "'delta.feature.columnMapping' = 'supported', 'delta.columnMapping.mode' = 'name'"
    runtime.spark.sql(f"ALTER TABLE {runtime.sql_name(EVENTS)} SET TBLPROPERTIES ({mapped})")
    with pytest.raises(TrailvecError, match=r"^table events has delta.columnMapping.mode = name, so its files name"):
        _files(runtime, EVENTS)
