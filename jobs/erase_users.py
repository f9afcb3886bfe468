"""erase_users: deletes people from every table that holds them, keeps them out, and records it in `erasures`.

trailvec erase_users ids.txt --requested-by "privacy desk, case 4711" --conf conf/local.toml
trailvec erase_users --sql "SELECT user_id FROM customers_who_left" --requested-by dpo --conf conf/local.toml
trailvec maintain_tables --conf conf/local.toml        (after maintain.retention_hours)
trailvec erase_users --finish --conf conf/local.toml

The steps run in this order, each in one commit or a few. After a kill, running the same command again ends as if
nothing had happened. (If the list is a query over these tables, it may return other users by then, or none: `--finish`
completes what was begun.)

1. Keyed hashes of the users go into `erased_users`: from here on ingest drops whatever arrives of them.
2. The receipt is opened, with the exports that hold the users. (Step 3 deletes them from the log of exports, so the log
   is read once more just before, and as it was then: a run of export_segments may have logged some meanwhile.)
3. Their rows are deleted from each table with a column of user ids, by a MERGE with the list as a frame, so that no id
   appears in a query or in Delta's log of operations. In rejected_events, this includes records whose user could not
   be read and whose text holds one of the ids.
4. All deletion vectors are purged, older ones too: an old state of a person's row may be hidden in any file.
5. The receipt is completed: rows by table, versions before and after.

Older versions hold the users until VACUUM deletes their files, after the retention (`trailvec maintain_tables`).
`--finish` then reads every Parquet file of the tables on disk, whatever version it belongs to, for anybody who was ever
erased. It deletes again whoever is back in a table (a job that began before step 1 may have written after step 3),
completes erasures that were killed (those killed before step 2 it only names), and closes the receipts whose users are
in no file, once no staging folder or half-written file is left either, nor a table that somebody made with CREATE TABLE
in SQL.

Key: TRAILVEC_ERASE_KEY in the environment; it must never change (jobs/tombstones.py). Why: docs/decisions/0017.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.cli import stage_main
from jobs.config import UserList
from jobs.errors import TrailvecError
from jobs.files import HadoopPath, Place, four_bytes, place_of
from jobs.maintain_tables import active_files, disk_files
from jobs.raw_records import valid_text
from jobs.runtime import Report, Runtime, Stage, code_version
from jobs.spark_session import spark_conf
from jobs.tables import ERASED_USERS, ERASURES, EXPORTS, REJECTED_EVENTS, TABLES, Table
from jobs.tombstones import erase_key, erased_tests
from jobs.user_lists import copies, read_users
from spark_udfs.keyed import ColumnTest, hashed, key_mark, mentions, of_column, values

HOLDING_USERS = tuple(table for table in TABLES if table.user_columns())
_BEFORE_EXPORTS = tuple(table for table in HOLDING_USERS if table != EXPORTS)
# Rejected records whose user no list names. Those of unreleased versions may have an id as user that is refused now, a
# fraction, an object, base64 or with a NUL, whatever else was the reason.
_UNREAD = """(old.user_id IS NULL OR old.reason = 'bad_type_user_id' OR old.user_id RLIKE '^-?[0-9]+[.]0+$'
    OR substr(old.user_id, 1, 1) IN ('{', '[') OR instr(old.user_id, char(0)) > 0)"""
_AN_HOUR = 3600  # more than the clocks of two machines differ by
_AGAIN = "finish"  # instead of an erasure's id, in commits that delete returned users
_PARQUET = b"PAR1"  # the end of a whole Parquet file
_READERS = 16  # files whose ends are read at once
_EPOCH = datetime.fromtimestamp(0, timezone.utc)


def erase(runtime: Runtime, file: str | None = None, sql: str | None = None, requested_by: str | None = None) -> Report:
    """Deletes the users of a list from all tables; rows_out: how many rows of each.

    Args:
        file: as UserList.file, or the URI of such a list on another store (hdfs://, s3a://).
        sql: instead of a file, a query over the tables with a column user_id.
        requested_by: who asked for it; recorded in the receipt.

    Raises:
        TrailvecError: the list is empty, missing or has no column user_id; requested_by is empty; the key is missing or
            not the one used before; there is no table of users.
    """
    return runtime.execute(Stage("erase_users", "", lambda r: _erase(r, file, sql, requested_by)))


def finish(runtime: Runtime) -> Report:
    """Completes killed erasures, deletes again whoever came back, and closes the receipts whose users are no longer on
    disk.

    Raises:
        TrailvecError: the key is missing or not the one used before; nobody has been erased yet; or files of a table
            are not where they should be.
    """
    return runtime.execute(Stage("erase_users", "", _finish))


# ---- one request --------------------------------------------------------------------------------------


def _erase(runtime: Runtime, file: str | None, sql: str | None, requested_by: str | None) -> None:
    if not requested_by or not requested_by.strip():
        raise TrailvecError("--requested-by is missing or empty: name who asked for the erasure")
    key = erase_key(runtime)
    if not _holding(runtime):
        raise TrailvecError(f"no table that holds users exists under {runtime.place}: check --conf and storage.root")
    ids = read_ids(runtime, file, sql)
    if not ids:
        raise _nobody_listed(runtime, requested_by)
    hashes = sorted(hashed(key, ids))
    ids_digest = hashed(key, ["\n".join(hashes)])[0]
    erasure_id = hashed(key, [f"{requested_by}\n{ids_digest}"])[0][:32]

    runtime.on_progress("recording who must not come back")
    _add_hashes(runtime, key, hashes, erasure_id)
    receipt: dict[str, Any] = {
        "erasure_id": erasure_id,
        "requested_by": requested_by,
        "requested_at": _now(),
        "ids_digest": ids_digest,
        "users": len(ids),
    }
    receipt, rows = _erase_and_complete(runtime, receipt, ids)

    report = runtime.report
    report.rows_in["users"] = len(ids)
    report.rows_out = rows
    if not any(entry["rows"] for entry in receipt["tables"]):
        report.notes.append("no table held any of the users: check that it is the right list")
    report.notes.extend(map(_recipient_note, receipt["exports"]))
    longest = max(runtime.config.maintain.retention_hours_for(table.name) for table in HOLDING_USERS)
    gone = receipt["erased_at"] + timedelta(hours=longest)
    report.notes.append(
        f"erasure {erasure_id}: old versions hold the users on disk until `trailvec maintain_tables` runs after "
        f"{gone:%Y-%m-%d %H:%M} UTC; then run `trailvec erase_users --finish`"
    )


def _erase_and_complete(
    runtime: Runtime, receipt: dict[str, Any], ids: Sequence[str]
) -> tuple[dict[str, Any], dict[str, int]]:
    """Deletes the receipt's users and completes it. Also returns, by table, the rows deleted since its last state."""
    users, in_raw = _frame(runtime, ids), of_column(mentions(ids))
    receipt = _open(runtime, receipt, users)
    delete_users(runtime, _BEFORE_EXPORTS, users, in_raw, receipt["erasure_id"])
    receipt = _open(runtime, receipt, users)  # a run of export_segments may have logged some of them meanwhile
    delete_users(runtime, (EXPORTS,), users, in_raw, receipt["erasure_id"])
    old_entries = {entry["table"]: entry for entry in receipt["tables"] or []}
    after = old_entries.get(EXPORTS.name, {"version_after": -1})["version_after"]
    of_erasure = users.withColumn("erasure_id", F.lit(receipt["erasure_id"]))
    since = receipt["requested_at"].timestamp() - _AN_HOUR
    found = _deleted_exports(runtime, of_erasure, receipt["erasure_id"], after, since)
    receipt = _with_exports(receipt, found)
    entries = _table_entries(runtime, receipt, old_entries)
    rows = {entry["table"]: entry["rows"] - old_entries.get(entry["table"], {"rows": 0})["rows"] for entry in entries}
    # The same list again, and nothing was left to delete: the receipt stays as it is.
    if receipt["tables"] is None or any(rows.values()):
        receipt = receipt | {"tables": entries, "erased_at": _now(), "finished_at": None}
        _save(runtime, [receipt])
    return receipt, rows


def _nobody_listed(runtime: Runtime, requested_by: str) -> TrailvecError:
    """The error for an empty list. A query over the tables returns one if a killed run already deleted its users."""
    for receipt in _receipts(runtime):
        if receipt["erased_at"] is None and receipt["requested_by"] == requested_by:
            return TrailvecError(
                f"the list of users to erase is empty, but the erasure {receipt['erasure_id']} that {requested_by} "
                f"asked for at {receipt['requested_at']:%Y-%m-%d %H:%M} UTC is not complete: run `trailvec "
                f"erase_users --finish`, which completes it"
            )
    return TrailvecError("the list of users to erase is empty: nothing was done")


def _recipient_note(export: dict[str, Any]) -> str:
    # An upgraded log of exports has none for the older ones.
    where = export["destination"] or "a place that the log of exports does not name"
    return (
        f"notify the recipient of segment {export['segment']}, exported {export['exported_at']:%Y-%m-%d %H:%M} to "
        f"{where}: it held {export['users']:,} of the erased users"
    )


def read_ids(runtime: Runtime, file: str | None, sql: str | None) -> list[str]:
    """The list's user ids, sorted and distinct.

    Raises:
        TrailvecError: the list is missing or has no column user_id, or not exactly one of file and sql is given.
    """
    if (file is None) == (sql is None):
        raise TrailvecError("erase_users needs either a file of user ids or --sql")
    place = None if file is None else place_of(file)
    if isinstance(place, HadoopPath):
        place = place.qualified(runtime.spark)
    if place is not None and not place.exists():
        raise TrailvecError(f"the list {file} does not exist: correct the path")
    # A folder per list, so that a concurrent request does not remove another one's copy.
    of_list = hashlib.sha256(str(place).encode()).hexdigest()[:12]
    with TemporaryDirectory() as fetched, copies(runtime.staging(f"erasures-{of_list}")) as folder:
        local = place
        if isinstance(place, HadoopPath):
            local = Path(fetched) / place.name
            place.get(local)
        of_users = UserList(file=str(local) if local else None, sql=sql)
        try:
            users = read_users(runtime, of_users, Path("erase_users"), folder)
            if isinstance(users, DataFrame):
                users = (row["user_id"] for row in users.distinct().collect())
            return sorted(set(users))
        except TrailvecError as error:
            raise TrailvecError(str(error).replace(str(local), str(place))) from None


def _frame(runtime: Runtime, ids: Sequence[str]) -> DataFrame:
    return runtime.spark.createDataFrame(pd.DataFrame({"user_id": list(ids)}, dtype="str"), "user_id string")


def _add_hashes(runtime: Runtime, key: bytes, hashes: Sequence[str], erasure_id: str) -> None:
    """Adds to `erased_users` the hashes that it does not have yet."""
    runtime.create(ERASED_USERS)
    values = pd.DataFrame({"user_hash": list(hashes)}, dtype="str")
    rows = runtime.spark.createDataFrame(values, "user_hash string").withColumns(
        {"erasure_id": F.lit(erasure_id), "erased_at": F.lit(_now()), "key_mark": F.lit(key_mark(key))}
    )
    runtime.merge(ERASED_USERS, rows, insert_only=True)


def _open(runtime: Runtime, receipt: dict[str, Any], users: DataFrame) -> dict[str, Any]:
    """The request's receipt, saved before anything is deleted; an existing one keeps its contents."""
    runtime.create(ERASURES)
    old = next((r for r in _receipts(runtime) if r["erasure_id"] == receipt["erasure_id"]), None)
    opened = {"tables": None, "erased_at": None, "finished_at": None} | (old or receipt)
    found = _exports(runtime, users.withColumn("erasure_id", F.lit(receipt["erasure_id"])))
    opened = _with_exports(opened, found)
    if opened != old:
        _save(runtime, [opened])
    return opened


def _with_exports(receipt: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The receipt, with those exports from `_exports` added that it does not name yet."""
    exports = [*found.get(receipt["erasure_id"], []), *(receipt.get("exports") or [])]
    by_id = {export["export_id"]: export for export in exports}
    return receipt | {"exports": sorted(by_id.values(), key=lambda e: (e["exported_at"], e["export_id"]))}


def _exports(runtime: Runtime, users: DataFrame, version: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """By erasure, the exports whose files hold some of its users.

    Args:
        users: user_id, erasure_id.
        version: of the log of exports; None: the newest.
    """
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    if not runtime.exists(EXPORTS):
        return found
    log = runtime.latest(EXPORTS) if version is None else runtime.at(EXPORTS, version)
    held = log.where("NOT is_control").join(F.broadcast(users), "user_id")
    counts = held.groupBy("erasure_id", "segment", "export_id", "destination").agg(
        F.unix_micros(F.min("exported_at")).alias("exported_at"), F.count("*").alias("users")
    )
    for row in counts.collect():
        export = row.asDict() | {"exported_at": _EPOCH + timedelta(microseconds=row["exported_at"])}
        found[export.pop("erasure_id")].append(export)
    return found


def _deleted_exports(
    runtime: Runtime, users: DataFrame, erasure: str, after: int, since: float
) -> dict[str, list[dict[str, Any]]]:
    """`_exports` of the log as it was just before each of the erasure's commits (a killed run's too) deleted rows of
    it: those too that were logged after the receipt was saved.

    Args:
        users: as in `_exports`.
        erasure, after, since: as in `Lake.erasure_commits`.
    """
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    commits = runtime.erasure_commits(EXPORTS, erasure, after, since) if runtime.exists(EXPORTS) else []
    # Since a killed run, VACUUM may have deleted files, and Delta the log of that version: what is left is read.
    with spark_conf(runtime.spark, {"spark.sql.files.ignoreMissingFiles": "true"}):
        for commit in commits:
            with suppress(AnalysisException):
                for erasure_id, exports in _exports(runtime, users, commit.version - 1).items():
                    found[erasure_id] += exports
    return found


def _name_exports(runtime: Runtime, found: dict[str, list[dict[str, Any]]]) -> None:
    """Adds the exports from `_exports` to their receipts."""
    named = [(r, _with_exports(r, found)) for r in _receipts(runtime) if r["erasure_id"] in found]
    if changed := [new for old, new in named if new != old]:
        _save(runtime, changed)


def _save(runtime: Runtime, receipts: Sequence[dict[str, Any]]) -> None:
    names = [c.name for c in ERASURES.columns]
    rows = [tuple({**receipt, "code_version": code_version()}[name] for name in names) for receipt in receipts]
    runtime.merge(ERASURES, runtime.spark.createDataFrame(rows, ERASURES.schema()))


def _receipts(runtime: Runtime) -> list[dict[str, Any]]:
    """The rows of `erasures`, oldest first. Times are collected as numbers, as Spark's collected times have no zone."""
    if not runtime.exists(ERASURES):
        return []
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


def _holding(runtime: Runtime) -> list[Table]:
    return [table for table in HOLDING_USERS if runtime.exists(table)]


def delete_users(runtime: Runtime, tables: Sequence[Table], users: DataFrame, in_raw: ColumnTest, erasure: str) -> None:
    """Deletes the users' rows from those of the tables that exist, and rewrites all files with rows hidden by deletion
    vectors.

    Args:
        users: user_id, distinct.
        in_raw: whether a rejected record's text holds one of the users.
    """
    for table in filter(runtime.exists, tables):
        runtime.on_progress(table.name)
        for name, where in table.user_columns().items():
            _delete(runtime, table, (name, where), users, erasure)
        if table == REJECTED_EVENTS:
            _delete_unread(runtime, in_raw, erasure)
        runtime.purge(table)


def _delete(runtime: Runtime, table: Table, column: tuple[str, str], users: DataFrame, erasure: str) -> None:
    name, where = column
    # Checked first: even a commit that changes nothing may conflict with concurrent ones.
    of_users = runtime.latest(table).alias("old").where(where).select(F.col(f"old.{name}").alias("user_id"))
    if not of_users.join(F.broadcast(users), "user_id", "left_semi").isEmpty():
        runtime.erase(table, users, F.expr(where) & (F.col(f"old.{name}") == F.col("gone.user_id")), erasure)


def _delete_unread(runtime: Runtime, in_raw: ColumnTest, erasure: str) -> None:
    """Deletes the `_UNREAD` rejected records whose text holds one of the users. Their hashes serve as keys."""
    unread = runtime.latest(REJECTED_EVENTS).alias("old").where(_UNREAD).where(in_raw(valid_text(F.col("raw"))))
    texts = [row[0] for row in unread.select(F.sha2("raw", 256)).distinct().collect()]
    if texts:
        same = F.sha2("old.raw", 256) == F.col("gone.user_id")
        runtime.erase(REJECTED_EVENTS, _frame(runtime, texts), F.expr(_UNREAD) & same, erasure)


def _table_entries(
    runtime: Runtime, receipt: dict[str, Any], old_entries: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """By table: the rows that the erasure's commits (a killed run's too) deleted, and the versions before and after.

    Args:
        old_entries: the receipt's entries so far, by table. Delta forgets old commits, so only newer ones are counted.
    """
    entries = []
    since = receipt["requested_at"].timestamp() - _AN_HOUR
    for table in _holding(runtime):
        newest = runtime.latest_version(table)
        old = old_entries.get(table.name, {"table": table.name, "rows": 0, "version_before": None, "version_after": -1})
        newer = runtime.erasure_commits(table, receipt["erasure_id"], old["version_after"], since)
        before = newer[-1].version - 1 if newer else newest
        entries.append(
            old
            | {
                "rows": old["rows"] + sum(commit.rows_deleted for commit in newer),
                "version_before": before if old["version_before"] is None else old["version_before"],
                "version_after": newest,
            }
        )
    return entries


# ---- the end ------------------------------------------------------------------------------------------


def _finish(runtime: Runtime) -> None:
    key = erase_key(runtime)
    # First, as an erasure stores its hashes before its receipt: an erasure that runs beside the search, which does not
    # know its users, must stay open.
    earlier = _receipts(runtime)
    tests = erased_tests(runtime)
    if tests is None:
        raise TrailvecError("nobody has been erased here: run `trailvec erase_users FILE --requested-by NAME` first")
    erasures_of = _erasures_by_hash(runtime)

    runtime.on_progress("searching the files on disk")
    searched = {table.name: _on_disk(runtime, table, tests) for table in _holding(runtime)}
    on_disk = {name: users for name, (users, _) in searched.items()}
    half_written = [file for _, files in searched.values() for file in files]
    # An unreadable record yields everything that may be one of its values.
    found = set[str]().union(*on_disk.values())
    by_user = zip(found, hashed(key, found), strict=True)
    named = {user: erasures_of[digest] for user, digest in by_user if digest in erasures_of}
    # Killed before its receipt, or running: only its own command writes down whom to notify, before it deletes.
    known = {receipt["erasure_id"] for receipt in earlier}
    unopened = sorted(set[str]().union(*named.values()) - known)
    held = {user: mine for user, erasures in named.items() if (mine := erasures & known)}

    killed = {receipt["erasure_id"]: receipt for receipt in earlier if receipt["erased_at"] is None}
    of_complete = {user: erasures for user, erasures in held.items() if erasures.isdisjoint(killed)}
    again = _erase_returned(runtime, of_complete, tests[1])
    returned = again.total()
    # Last: once its receipt is complete, no later run notes its recipients.
    rows = _complete_killed(runtime, killed, held)

    # Left by a killed export or list copy, or in use by a job that began before: either may hold erased users.
    leftovers = [*runtime.place.glob(".*.staging"), *runtime.exports.glob(".*")]
    made = _made_in_sql(runtime)
    searched_for = {receipt["erasure_id"] for receipt in earlier}
    receipts = [receipt for receipt in _receipts(runtime) if receipt["erasure_id"] in searched_for]
    waiting, left_over = set[str]().union(*held.values()), bool(leftovers or made or half_written)
    settled = [_settled(r, r["erasure_id"] in waiting, bool(returned), left_over, _now()) for r in receipts]
    if changed := [new for old, new in zip(receipts, settled, strict=True) if new != old]:
        _save(runtime, changed)

    report = runtime.report
    report.rows_in["receipts"] = len(receipts)
    report.rows_out = {"finished": sum(receipt["finished_at"] is not None for receipt in settled)}
    report.rows_out |= rows + again
    report.notes.extend(map(_recipient_note, _new_exports(earlier, receipts)))
    report.notes.extend(
        f"erasure {erasure_id} has no receipt yet, and files hold users whom it named: unless it still runs, run its "
        f"command again, with the same list and --requested-by"
        for erasure_id in unopened
    )
    if returned:
        report.notes.append(f"{returned:,} rows of erased users had come back and were deleted again")
    if leftovers:
        report.notes.append(
            f"{', '.join(map(str, leftovers))} may hold erased users: a running or killed job made it; run "
            f"export_segments (with --force, if there is nothing to do), erase_users, probe or find_neighbours, "
            f"whichever made it, or delete it, then run this again"
        )
    if made:
        report.notes.append(
            f"{', '.join(map(str, made))} may hold erased users: somebody made it with CREATE TABLE; "
            f"delete it, or move it out of storage.root, then run this again"
        )
    if half_written:
        report.notes.append(
            f"{len(half_written):,} half-written files of tables, such as {half_written[0]}, could not be read and may "
            f"hold erased users: a job is writing them, or was killed; run `trailvec maintain_tables`, which deletes "
            f"those older than maintain.retention_hours, when these have passed, then run this again"
        )
    if held:
        report.notes.append(
            f"old files of {', '.join(name for name, users in on_disk.items() if users)} hold {len(held):,} erased "
            f"users: run `trailvec maintain_tables` when maintain.retention_hours have passed, then run this again"
        )


def _made_in_sql(runtime: Runtime) -> list[Place]:
    """The folders of tables made by `trailvec sql` or clients of serve_sql: their catalogue ended with the session."""
    databases = runtime.place.glob("spark/*.db/*")
    return [*databases, *(folder for folder in runtime.place.glob("spark/*") if not folder.name.endswith(".db"))]


def _erasures_by_hash(runtime: Runtime) -> dict[str, set[str]]:
    """By a user's hash: the erasures that named the user."""
    erasures: dict[str, set[str]] = defaultdict(set)
    for row in runtime.latest(ERASED_USERS).select("user_hash", "erasure_id").collect():
        erasures[row["user_hash"]].add(row["erasure_id"])
    return erasures


def _complete_killed(runtime: Runtime, killed: dict[str, dict[str, Any]], held: dict[str, set[str]]) -> Counter[str]:
    """Completes killed erasures, given by their ids. Returns, by table, the deleted rows.

    Args:
        held: the users that some file holds, each with the erasures that named them.
    """
    rows = Counter[str]()
    for erasure_id, receipt in killed.items():
        ids = sorted(user for user, erasures in held.items() if erasure_id in erasures)
        rows.update(_erase_and_complete(runtime, receipt, ids)[1])
        runtime.report.notes.append(f"erasure {erasure_id} was not complete: it is now")
    return rows


def _settled(receipt: dict[str, Any], held: bool, returned: bool, leftovers: bool, now: datetime) -> dict[str, Any]:
    """The receipt after a search of the files on disk: closed, open, or opened again.

    Args:
        held: some file holds one of its users.
        returned: rows of users who had come back were deleted from some table.
        leftovers: there are staging folders, half-written files or tables made in SQL, which may hold its users.
    """
    if held:  # returned rows are in old files from now on
        return receipt | {"finished_at": None, "erased_at": now if returned else receipt["erased_at"]}
    if receipt["finished_at"] is None and receipt["erased_at"] is not None and not leftovers:
        return receipt | {"finished_at": now}
    return receipt


def _new_exports(earlier: Sequence[dict[str, Any]], receipts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The exports that the receipts name and their earlier states did not; all of those of erasures that were killed,
    which told nobody."""
    told = [receipt for receipt in earlier if receipt["erased_at"] is not None]
    named = {(receipt["erasure_id"], export["export_id"]) for receipt in told for export in receipt["exports"] or []}
    exports = [(receipt["erasure_id"], export) for receipt in receipts for export in receipt["exports"] or []]
    return [export for erasure_id, export in exports if (erasure_id, export["export_id"]) not in named]


def _erase_returned(runtime: Runtime, held: dict[str, set[str]], in_raw: ColumnTest) -> Counter[str]:
    """Deletes again the users that some file holds although their erasures are complete. Returns, by table, the deleted
    rows: those of users who had come back.

    Args:
        held: as in `_complete_killed`.
        in_raw: as in `delete_users`.
    """
    if not held:
        return Counter()
    pairs = [(user, erasure_id) for user, erasures in held.items() for erasure_id in erasures]
    of_requests = runtime.spark.createDataFrame(pd.DataFrame(pairs, dtype="str"), "user_id string, erasure_id string")
    users = _frame(runtime, sorted(held))
    before = [(table, runtime.latest_version(table)) for table in _holding(runtime)]
    delete_users(runtime, _BEFORE_EXPORTS, users, in_raw, _AGAIN)
    _name_exports(runtime, _exports(runtime, of_requests))
    delete_users(runtime, (EXPORTS,), users, in_raw, _AGAIN)
    named = set[str]().union(*held.values())
    # `_settled` moves these times on when rows were deleted.
    since = min(r["erased_at"].timestamp() for r in _receipts(runtime) if r["erasure_id"] in named) - _AN_HOUR
    _name_exports(runtime, _deleted_exports(runtime, of_requests, _AGAIN, -1, since))
    return Counter(
        {
            table.name: sum(commit.rows_deleted for commit in runtime.erasure_commits(table, _AGAIN, version, 0))
            for table, version in before
        }
    )


def _on_disk(runtime: Runtime, table: Table, tests: tuple[ColumnTest, ColumnTest]) -> tuple[set[str], list[str]]:
    """The erased users that some Parquet file of the table holds (for an unreadable record: all its possible values),
    and the files that are half-written. Reads the user id columns of every other file on disk, including files of no
    version and of the change feed."""
    is_erased, holds_erased = tests
    found: set[str] = set()
    whole, half_written = _files(runtime, table)
    for rows in _frames(runtime, table, whole):
        for name, where in table.user_columns().items():
            users = rows.where(where).select(valid_text(F.col(f"old.{name}")).alias("user_id")).distinct()
            found.update(row["user_id"] for row in users.where(is_erased(F.col("user_id"))).collect())
        if table == REJECTED_EVENTS:
            raw = valid_text(F.col("raw")).alias("raw")
            texts = rows.where(_UNREAD).select(raw).distinct().where(holds_erased(F.col("raw")))
            found.update(*[values(row["raw"]) for row in texts.collect()])
    return found, half_written


def _files(runtime: Runtime, table: Table) -> tuple[list[str], list[str]]:
    """The table's Parquet files on disk: the whole ones, and those of no current version that are half-written.

    Raises:
        TrailvecError: files of the newest version are not among them, or have other names for the columns, so that
            they prove nothing.
    """
    if (mode := runtime.detail(table, "properties").get("delta.columnMapping.mode", "none")) != "none":
        raise TrailvecError(
            f"table {table.name} has delta.columnMapping.mode = {mode}, so its files name the columns otherwise and no "
            f"receipt can be closed: rewrite it with mode none and VACUUM it, then run this again"
        )
    # Listed first: a job may commit meanwhile.
    newest = {file["path"].rpartition("/")[2] for file in active_files(runtime, table, runtime.latest_version(table))}
    on_disk = disk_files(runtime, table)
    if missing := newest - {file.rpartition("/")[2] for file in on_disk}:
        raise TrailvecError(
            f"{len(missing):,} files of table {table.name}, such as {min(missing)}, are not in {runtime.path(table)}, "
            f"so no receipt can be closed: check storage.root, or restore the table's folder"
        )
    files = [file for file in on_disk if file.endswith(".parquet")]
    # Delta writes to a file's final name, and what a killed job wrote stays there until VACUUM: Spark would stop at it.
    others = [file for file in files if file.rpartition("/")[2] not in newest]
    with ThreadPoolExecutor(_READERS) as readers:  # some 50 ms a file on an object store
        whole = readers.map(lambda file: _is_whole(file, on_disk[file]), others)
        half_written = [file for file, is_whole in zip(others, whole, strict=True) if not is_whole]
    return sorted({*files} - {*half_written}), half_written


def _is_whole(file: str, size: int) -> bool:
    """Whether a Parquet file has its end, or VACUUM has deleted it meanwhile."""
    try:
        return size > len(_PARQUET) and four_bytes(place_of(file), size - len(_PARQUET)) == _PARQUET
    except FileNotFoundError:
        return True


def _frames(runtime: Runtime, table: Table, files: Sequence[str]) -> Iterator[DataFrame]:
    """The rows of the table's files, a frame per folder, with the partition values from the folder's name."""
    names = {*table.user_columns(), *(["reason", "raw"] if table == REJECTED_EVENTS else [])}
    schema = ", ".join(f"`{c.name}` {c.type}" for c in table.columns if c.name in names)
    folders: dict[str, list[str]] = defaultdict(list)
    for file in files:
        folders[file.removeprefix(runtime.path(table)).rpartition("/")[0]].append(file)
    for folder, of_folder in folders.items():
        parts = [part.split("=", 1) for part in folder.split("/") if "=" in part]
        rows = _read_existing(runtime.spark, schema, of_folder)
        yield rows.withColumns({name: F.lit(value) for name, value in parts}).alias("old")


def _read_existing(spark: SparkSession, schema: str, files: list[str]) -> DataFrame:
    """The files' rows. A concurrent VACUUM may delete some files before they are read: Spark skips these while it reads
    (`ignoreMissingFiles`), but not while it creates the frame."""
    if not files:
        return spark.createDataFrame([], schema)
    try:
        return spark.read.schema(schema).option("ignoreMissingFiles", True).parquet(*files)
    except AnalysisException:
        existing = [file for file in files if HadoopPath(file).exists()]
        if existing == files:
            raise
        return _read_existing(spark, schema, existing)


def main() -> None:
    stage_main("erase_users")


if __name__ == "__main__":
    main()
