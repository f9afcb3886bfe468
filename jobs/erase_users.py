"""erase_users: takes people out of every table that holds them, keeps them out, and says what it did in `erasures`.

trailvec erase_users ids.txt --requested-by "privacy desk, case 4711" --conf conf/local.toml
trailvec erase_users --sql "SELECT user_id FROM customers_who_left" --requested-by dpo --conf conf/local.toml
trailvec maintain_tables --conf conf/local.toml        (after maintain.retention_hours)
trailvec erase_users --finish --conf conf/local.toml

In this order, each step one commit or a few, so that a kill and the same command end as if nothing had happened:

1. Keyed hashes of the users into `erased_users`: from here on ingest drops whatever comes of them.
2. The receipt, still open, with the exports that hold them (what the log of exports says is gone after step 3).
3. Their rows out of each table with a column of user ids, by MERGE with the list as a frame: no value stands in a
   query or in Delta's log of operations. Of rejected_events also the records whose user could not be read and whose
   text holds one of the ids.
4. Every deletion vector purged, older ones too: an old state of a person's row may be hidden in any file.
5. The receipt filled in: rows by table, versions before and after.

The versions before hold the users until VACUUM takes their files, after the retention (`trailvec maintain_tables`).
`--finish` then reads every Parquet file on disk, whatever version it belongs to, for anybody who was ever erased: who
stands in a table again (a job that began before step 1 may have written after step 3) is taken out again, and the
receipts of whose users no file holds one are closed.

Key: TRAILVEC_ERASE_KEY of the environment, for good (jobs/tombstones.py). What the choice was: docs/decisions/0017.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pandas as pd
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.cli import stage_main
from jobs.config import UserList
from jobs.errors import TrailvecError
from jobs.files import HadoopPath
from jobs.maintain_tables import disk_files
from jobs.raw_records import valid_text
from jobs.runtime import Report, Runtime, Stage, code_version
from jobs.tables import ERASED_USERS, ERASURES, EXPORTS, REJECTED_EVENTS, TABLES, Table
from jobs.tombstones import erase_key, erased_tests
from jobs.user_lists import copies, read_users
from spark_udfs.keyed import ColumnTest, hashed, key_mark, mentions, of_column, values
from training.urls import local_path

HOLDING_USERS = tuple(table for table in TABLES if table.user_columns())
_AGAIN = "finish"  # the erasure that commits of --finish are noted under
_EPOCH = datetime.fromtimestamp(0, timezone.utc)


def erase(runtime: Runtime, file: str | None = None, sql: str | None = None, requested_by: str | None = None) -> Report:
    """Takes the users of a list out of all tables; rows_out: how many rows of each.

    Args:
        file: as UserList.file.
        sql: instead, a query over the tables with a column user_id.
        requested_by: who asked for it; stands in the receipt.

    Raises:
        TrailvecError: the list is empty, not there or has no column user_id; nobody asked; the key is missing or
            another than before.
    """
    return runtime.execute(Stage("erase_users", "", lambda r: _erase(r, file, sql, requested_by)), force=True)


def finish(runtime: Runtime) -> Report:
    """Erases anybody again who came back, and closes the receipts of which nothing is left on disk.

    Raises:
        TrailvecError: the key is missing or another than before.
    """
    return runtime.execute(Stage("erase_users", "", _finish), force=True)


# ---- one request --------------------------------------------------------------------------------------


def _erase(runtime: Runtime, file: str | None, sql: str | None, requested_by: str | None) -> None:
    if not requested_by or not requested_by.strip():
        raise TrailvecError("nobody asked for the erasure: say who did with --requested-by")
    key = erase_key(runtime)
    ids = read_ids(runtime, file, sql)
    hashes = sorted(hashed(key, ids))
    ids_digest = hashed(key, ["\n".join(hashes)])[0]
    erasure_id = hashed(key, [f"{requested_by}\n{ids_digest}"])[0][:32]
    users = _frame(runtime, ids)

    runtime.on_progress("who must not come back")
    _bury(runtime, key, hashes, erasure_id)
    receipt: dict[str, Any] = {
        "erasure_id": erasure_id,
        "requested_by": requested_by,
        "requested_at": _now(),
        "ids_digest": ids_digest,
        "users": len(ids),
    }
    receipt = _open(runtime, receipt, users)
    take_out(runtime, users, of_column(mentions(ids)), erasure_id)
    told = _told(runtime, erasure_id)
    known = {entry["table"]: entry["rows"] for entry in receipt["tables"] or []}
    # The same list again, and nothing of them was there: the receipt stays as it is. (Delta forgets old commits.)
    if receipt["erased_at"] is None or any(entry["rows"] > known.get(entry["table"], 0) for entry in told):
        receipt |= {"tables": told, "erased_at": _now(), "finished_at": None}
        _save(runtime, [receipt])

    report = runtime.report
    report.rows_in["users"] = len(ids)
    report.rows_out = {entry["table"]: entry["rows"] for entry in receipt["tables"]}
    if not any(report.rows_out.values()):
        report.notes.append("no table held any of them: is it the right list?")
    for export in receipt["exports"]:
        report.notes.append(
            f"tell who has it: segment {export['segment']}, exported {export['exported_at']:%Y-%m-%d %H:%M} to "
            f"{export['destination']}, held {export['users']:,} of them"
        )
    longest = max(runtime.config.maintain.retention_hours_for(table.name) for table in HOLDING_USERS)
    gone = receipt["erased_at"] + timedelta(hours=longest)
    report.notes.append(
        f"erasure {erasure_id}: old versions hold them on disk until `trailvec maintain_tables` runs after "
        f"{gone:%Y-%m-%d %H:%M} UTC; then `trailvec erase_users --finish`"
    )


def read_ids(runtime: Runtime, file: str | None, sql: str | None) -> list[str]:
    """The list's user ids, sorted, each once.

    Raises:
        TrailvecError: it is empty, not there or has no column user_id.
    """
    if (file is None) == (sql is None):
        raise TrailvecError("erase_users needs either a file of user ids or --sql")
    absolute = None if file is None else str(Path(local_path(file) or file).absolute())
    if absolute is not None and not Path(absolute).exists():
        raise TrailvecError(f"the list {file} does not exist: correct the path")
    # A folder for each list, so that a request that begins meanwhile takes no other one's copy away.
    of_list = hashlib.sha256(str(absolute).encode()).hexdigest()[:12]
    with copies(runtime.staging(f"erasures-{of_list}")) as folder:
        users = read_users(runtime, UserList(file=absolute, sql=sql), Path("erase_users"), folder)
        rows = [row["user_id"] for row in users.distinct().collect()] if isinstance(users, DataFrame) else list(users)
    if not rows:
        raise TrailvecError("the list of users to erase is empty: nothing was done")
    return sorted(set(rows))


def _frame(runtime: Runtime, ids: Sequence[str]) -> DataFrame:
    return runtime.spark.createDataFrame(pd.DataFrame({"user_id": list(ids)}, dtype="str"), "user_id string")


def _bury(runtime: Runtime, key: bytes, hashes: Sequence[str], erasure_id: str) -> None:
    """Adds the hashes that are new to `erased_users`."""
    runtime.create(ERASED_USERS)
    values = pd.DataFrame({"user_hash": list(hashes)}, dtype="str")
    rows = runtime.spark.createDataFrame(values, "user_hash string").withColumns(
        {"erasure_id": F.lit(erasure_id), "erased_at": F.lit(_now()), "key_mark": F.lit(key_mark(key))}
    )
    runtime.merge(ERASED_USERS, rows, insert_only=True)


def _open(runtime: Runtime, receipt: dict[str, Any], users: DataFrame) -> dict[str, Any]:
    """The request's receipt, stored before anything is deleted; one that is there keeps what it knows."""
    runtime.create(ERASURES)
    old = next((r for r in _receipts(runtime) if r["erasure_id"] == receipt["erasure_id"]), receipt)
    exports = {export["export_id"]: export for export in [*_exports(runtime, users), *(old.get("exports") or [])]}
    receipt = {"tables": None, "erased_at": None, "finished_at": None} | old
    receipt["exports"] = sorted(exports.values(), key=lambda export: (export["exported_at"], export["export_id"]))
    _save(runtime, [receipt])
    return receipt


def _exports(runtime: Runtime, users: DataFrame) -> list[dict[str, Any]]:
    """The exports whose files hold some of the users."""
    if not runtime.exists(EXPORTS):
        return []
    held = runtime.latest(EXPORTS).where("NOT is_control").join(F.broadcast(users), "user_id", "left_semi")
    counts = held.groupBy("segment", "export_id", "destination").agg(
        F.unix_micros(F.min("exported_at")).alias("exported_at"), F.count("*").alias("users")
    )
    return [
        row.asDict() | {"exported_at": _EPOCH + timedelta(microseconds=row["exported_at"])} for row in counts.collect()
    ]


def _save(runtime: Runtime, receipts: Sequence[dict[str, Any]]) -> None:
    names = [c.name for c in ERASURES.columns]
    rows = [tuple({**receipt, "code_version": code_version()}[name] for name in names) for receipt in receipts]
    runtime.merge(ERASURES, runtime.spark.createDataFrame(rows, ERASURES.schema()))


def _receipts(runtime: Runtime) -> list[dict[str, Any]]:
    """The rows of `erasures`, the oldest first. Times travel as numbers: one that Spark collects has no zone."""
    times = [c.name for c in ERASURES.columns if c.type == "timestamp"]
    exports = F.transform("exports", lambda export: export.withField("exported_at", F.unix_micros(export.exported_at)))
    rows = runtime.latest(ERASURES).withColumns({name: F.unix_micros(name) for name in times} | {"exports": exports})
    receipts = [row.asDict(recursive=True) for row in rows.collect()]
    for receipt in receipts:
        for entry, names in [(receipt, times), *[(export, ["exported_at"]) for export in receipt["exports"] or []]]:
            entry |= {n: _EPOCH + timedelta(microseconds=entry[n]) for n in names if entry[n] is not None}
    return sorted(receipts, key=lambda receipt: (receipt["requested_at"], receipt["erasure_id"]))


def _now() -> datetime:
    return datetime.now(timezone.utc)


# ---- the tables ---------------------------------------------------------------------------------------


def take_out(runtime: Runtime, users: DataFrame, in_raw: ColumnTest, erasure: str) -> None:
    """Deletes the users' rows from every table, and rewrites the files in which deletion vectors hide any rows.

    Args:
        users: user_id, each once.
        in_raw: of a rejected record's text, whether it holds one of the users.
    """
    for table in HOLDING_USERS:
        if not runtime.exists(table):
            continue
        runtime.on_progress(table.name)
        for name, where in table.user_columns().items():
            _delete(runtime, table, (name, where), users, erasure)
        if table == REJECTED_EVENTS:
            _delete_unread(runtime, in_raw, erasure)
        runtime.purge(table)


def _delete(runtime: Runtime, table: Table, column: tuple[str, str], users: DataFrame, erasure: str) -> None:
    name, where = column
    # A look first: a commit that changes nothing is one more for others to get in the way of.
    of_users = runtime.latest(table).alias("old").where(where).select(F.col(f"old.{name}").alias("user_id"))
    if not of_users.join(F.broadcast(users), "user_id", "left_semi").isEmpty():
        runtime.erase(table, users, F.expr(where) & (F.col(f"old.{name}") == F.col("gone.user_id")), erasure)


def _delete_unread(runtime: Runtime, in_raw: ColumnTest, erasure: str) -> None:
    """Rejected records of nobody known whose text holds one of the users. Such a record has no key: a hash names it."""
    unread = runtime.latest(REJECTED_EVENTS).where("user_id IS NULL").where(in_raw(valid_text(F.col("raw"))))
    texts = [row[0] for row in unread.select(F.sha2("raw", 256)).distinct().collect()]
    if texts:
        same = F.sha2("old.raw", 256) == F.col("gone.user_id")
        runtime.erase(REJECTED_EVENTS, _frame(runtime, texts), F.col("old.user_id").isNull() & same, erasure)


def _told(runtime: Runtime, erasure: str) -> list[dict[str, Any]]:
    """By table: rows that the erasure's commits took out, those of a killed run too, and the versions around them."""
    found = []
    for table in HOLDING_USERS:
        if not runtime.exists(table):
            continue
        newest, commits = runtime.latest_version(table), runtime.erasure_commits(table, erasure)
        found.append(
            {
                "table": table.name,
                "rows": sum(commit.rows_deleted for commit in commits),
                "version_before": commits[-1].version - 1 if commits else newest,
                "version_after": newest,
            }
        )
    return found


# ---- the end ------------------------------------------------------------------------------------------


def _finish(runtime: Runtime) -> None:
    key = erase_key(runtime)
    tests = erased_tests(runtime)
    if tests is None:
        raise TrailvecError("nobody has been erased here: run `trailvec erase_users FILE --requested-by NAME` first")
    requests: dict[str, set[str]] = defaultdict(set)
    for row in runtime.latest(ERASED_USERS).select("user_hash", "erasure_id").collect():
        requests[row["user_hash"]].add(row["erasure_id"])
    there = [table for table in HOLDING_USERS if runtime.exists(table)]
    before = {table.name: runtime.latest_version(table) for table in there}

    runtime.on_progress("what is on disk")
    on_disk = {table.name: _on_disk(runtime, table, tests) for table in there}
    # A text that can't be read gives all that may be a value of it.
    of_hash = {hashed(key, [user])[0]: user for found in on_disk.values() for user in found}
    held = {digest: user for digest, user in of_hash.items() if digest in requests}
    if held:
        take_out(runtime, _frame(runtime, sorted(held.values())), tests[1], _AGAIN)
    again = {
        table.name: sum(
            c.rows_deleted for c in runtime.erasure_commits(table, _AGAIN) if c.version > before[table.name]
        )
        for table in there
    }
    returned = sum(again.values())

    waiting = {erasure_id for digest in held for erasure_id in requests[digest]}
    # What a killed export or a list's copy left holds user ids; a job that runs right now has begun before.
    leftovers = [*runtime.place.glob(".*.staging"), *runtime.exports.glob(".*")]
    receipts = _receipts(runtime)
    changed = []
    for receipt in receipts:
        if receipt["erasure_id"] not in waiting:
            finished_at = receipt["finished_at"] or (_now() if receipt["erased_at"] and not leftovers else None)
            new = receipt | {"finished_at": finished_at}
        else:  # where a row came back, old files hold it from now on
            new = receipt | {"finished_at": None, "erased_at": _now() if returned else receipt["erased_at"]}
        if new != receipt:
            changed.append(new)
    if changed:
        _save(runtime, changed)

    report = runtime.report
    report.rows_in["receipts"] = len(receipts)
    report.rows_out = {"finished": sum(receipt["finished_at"] is not None for receipt in _receipts(runtime))}
    report.rows_out |= {name: rows for name, rows in again.items() if rows}
    if returned:
        report.notes.append(f"{returned:,} rows of erased users had come back and were taken out again")
    if leftovers:
        report.notes.append(
            f"{', '.join(map(str, leftovers))} may hold erased users: a job that runs, or a killed one, made it; run "
            f"export_segments, erase_users, probe or find_neighbours, whose it is, or delete it, then this again"
        )
    if held:
        report.notes.append(
            f"old files of {', '.join(name for name, found in on_disk.items() if found)} hold {len(held):,} erased "
            f"users: run `trailvec maintain_tables` when maintain.retention_hours have passed, then this again"
        )


def _on_disk(runtime: Runtime, table: Table, tests: tuple[ColumnTest, ColumnTest]) -> set[str]:
    """The erased users whom some Parquet file of the table holds (of a text that can't be read: all that may be one).
    Reads the columns of user ids of every file on disk, those of no version and of the change feed too."""
    is_erased, holds_erased = tests
    found: set[str] = set()
    for rows in _files(runtime, table):
        for name, where in table.user_columns().items():
            users = rows.where(where).select(valid_text(F.col(f"old.{name}")).alias("user_id")).distinct()
            found.update(row["user_id"] for row in users.where(is_erased(F.col("user_id"))).collect())
        if table == REJECTED_EVENTS:
            raw = valid_text(F.col("raw")).alias("raw")
            texts = rows.where("user_id IS NULL").select(raw).distinct().where(holds_erased(F.col("raw")))
            found.update(*[values(row["raw"]) for row in texts.collect()])
    return found


def _files(runtime: Runtime, table: Table) -> Iterator[DataFrame]:
    """The Parquet files on disk of each folder of the table, with the partition's values from the folder's name."""
    names = {*table.user_columns(), *(["raw"] if table == REJECTED_EVENTS else [])}
    schema = ", ".join(f"`{c.name}` {c.type}" for c in table.columns if c.name in names)
    folders: dict[str, list[str]] = defaultdict(list)
    for file in disk_files(runtime, table):
        if file.endswith(".parquet"):
            folders[file.removeprefix(runtime.path(table)).rpartition("/")[0]].append(file)
    for folder, files in folders.items():
        parts = [part.split("=", 1) for part in folder.split("/") if "=" in part]
        rows = _of_those_there(runtime.spark, schema, files)
        yield rows.withColumns({name: F.lit(value) for name, value in parts}).alias("old")


def _of_those_there(spark: SparkSession, schema: str, files: list[str]) -> DataFrame:
    """The files' rows. A VACUUM beside this job may take some before they are read: Spark passes over these while it
    reads (`ignoreMissingFiles`), but not when it makes the frame."""
    if not files:
        return spark.createDataFrame([], schema)
    try:
        return spark.read.schema(schema).option("ignoreMissingFiles", True).parquet(*files)
    except AnalysisException:
        there = [file for file in files if HadoopPath(file).exists()]
        if there == files:
            raise
        return _of_those_there(spark, schema, there)


def main() -> None:
    stage_main("erase_users")


if __name__ == "__main__":
    main()
