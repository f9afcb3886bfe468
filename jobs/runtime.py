"""What a stage is, and what it reads and writes through.

A stage reads tables at pinned versions and writes each of its tables in one Delta commit, whose user
metadata says what ran: code version, resolved config, versions read (law 7). From the same facts comes
the stage's fingerprint: where the last commit of every table that it writes carries it, the stage is
up to date and is skipped, which makes a second `trailvec run` quick and a killed one resumable.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from delta.tables import DeltaTable
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.commits import Commit
from jobs.config import Config
from jobs.errors import TrailvecError
from jobs.lake import Lake
from jobs.spark_session import FEW, known_size, spark_conf
from jobs.tables import CURRENT_MODEL, Table, conform
from training.urls import file_of_table

_PACKAGES = ("jobs", "spark_udfs", "training")
# Spark settings that no commit and no manifest may show, by their names and, as Spark does it, by their values (Java's
# options may hold a password); the pattern is spark.redaction.regex's default, and what Azure, Google and S3 call keys.
_SECRET = re.compile(
    r"(?i)secret|password|token|credential|(access|account|private|encryption)[.]?key|client-provided-key|[.]sas[.]|[?&]sig="
)


@dataclass(frozen=True)
class Stage:
    """One stage of the road.

    Attributes:
        run: reads and writes through the runtime that it is handed.
        reads: tables that must be there; the versions that they have as the stage begins are those that it reads.
        writes: tables whose last commit says whether the stage is up to date.
        settings: the sections of the configuration that change its result.
        inputs: what else changes its result (files, a model's version), as plain values.
        also: what else it reads and writes (files, tables that may be missing): a sentence, for its help.
    """

    name: str
    help: str
    run: Callable[[Runtime], None]
    reads: tuple[Table, ...] = ()
    writes: tuple[Table, ...] = ()
    settings: tuple[str, ...] = ()
    inputs: Callable[[Runtime], dict[str, Any]] = lambda runtime: {}
    also: str = ""


# MERGE is an outer join that keeps the new rows, and Spark can't broadcast the side that an outer join keeps: the old
# rows of all files concerned go through a shuffle. These settings have Spark drop most of them as they are read, by a
# Bloom filter of the new rows' first key. It makes such a filter only where it would broadcast neither side, where the
# new rows have a condition, and where it knows that the old ones are more: `merge` sees to the last two.
_FILTERED_MERGE = {
    "spark.sql.optimizer.runtime.bloomFilter.enabled": "true",
    "spark.sql.optimizer.runtime.bloomFilter.creationSideThreshold": str(2**40),
    "spark.sql.optimizer.runtimeFilter.number.threshold": "1",
    "spark.sql.autoBroadcastJoinThreshold": "-1",
    # Delta's own copy of the new rows has neither a size nor a condition.
    "spark.databricks.delta.merge.materializeSource": "none",
    # Delta's shorter way for inserts alone is an anti join, in which Spark makes no filter. The usual one looks for
    # matches, and finding none, inserts all.
    "spark.databricks.delta.merge.optimizeInsertOnlyMerge.enabled": "false",
}


@dataclass
class Report:
    """What one run of a stage did; rows by table (or by what else was read or written)."""

    stage: str
    skipped: bool = False
    seconds: float = 0.0
    rows_in: dict[str, int] = field(default_factory=dict)
    rows_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Runtime(Lake):
    """The lake, and the one stage that runs in it at a time."""

    def __init__(self, config: Config, spark: SparkSession | None = None) -> None:
        super().__init__(config, spark)
        self._stage: Stage | None = None
        self._versions: dict[str, int] = {}
        self._table_ids: dict[str, str | None] = {}  # a table made anew counts its versions from 0 again
        self._frames: dict[str, DataFrame] = {}
        # By table, its id and version; what one stage writes the next one reads.
        self._rows: dict[tuple[str, str | None, int], int] = {}
        self.fingerprint = ""
        self.forced = False
        self.went_back = False  # `go_back`
        self.report = Report("")
        self.on_progress: Callable[[str], None] = lambda text: None

    # ---- one stage -------------------------------------------------------------------------------

    def execute(self, stage: Stage, force: bool = False) -> Report:
        """Runs the stage, or skips it where its tables already hold what it would write.

        Raises:
            TrailvecError: a table that it reads does not exist, or its input is wrong.
        """
        started = time.monotonic()
        self.report = Report(stage.name)
        self._stage = stage
        self._history, self._frames = {}, {}
        self.forced, self.went_back = force, False
        self._versions = {table.name: self.latest_version(table) for table in stage.reads}
        self._table_ids = {table.name: self._commits(table).table_id() for table in stage.reads}
        self.fingerprint = digest(self._facts(stage))
        if not force and stage.writes and all(self._is_up_to_date(t) for t in stage.writes):
            self.report.skipped = True
        else:
            # Before anything is done: an increment would lay new rows beside the old ones first.
            for table in (*stage.reads, *stage.writes):
                if self.exists(table):
                    self._refuse_other_columns(table)
            stage.run(self)
        for table in stage.reads:
            self.report.rows_in.setdefault(table.name, self._count(table, self._versions[table.name]))
        for table in stage.writes:
            self.report.rows_out.setdefault(table.name, self._count(table, self.latest_version(table)))
        self._history = {}  # what others commit from now on is looked up
        self.report.seconds = time.monotonic() - started
        return self.report

    def _count(self, table: Table, version: int) -> int:
        """The table's rows at that version."""
        key = table.name, self._commits(table).table_id(), version
        if key not in self._rows:
            self._rows[key] = self.at(table, version).count()
        return self._rows[key]

    def running_tasks(self) -> str:
        """Spark's running stages as "done/all tasks"; empty when nothing runs or Spark is not up."""
        if self._spark is None:
            return ""
        tracker = self._spark.sparkContext.statusTracker()
        stages = [tracker.getStageInfo(number) for number in tracker.getActiveStageIds()]
        return "  ".join(f"{info.numCompletedTasks}/{info.numTasks} tasks" for info in stages if info)

    def read(self, table: Table) -> DataFrame:
        """The table as it was when the stage began."""
        # One frame for all: Delta puts a snapshot of an old version together anew for each.
        if table.name not in self._frames:
            self._frames[table.name] = self.at(table, self._versions[table.name])
        return self._frames[table.name]

    def version(self, table: Table) -> int:
        """The Delta version at which the stage reads the table."""
        return self._versions[table.name]

    def read_after_upkeep(self, table: Table) -> None:
        """Has the stage read the table as it is now, after upkeep of its files: the same rows in other files.

        Raises:
            TrailvecError: another run has changed rows since the stage began.
        """
        newest = self.latest_version(table)
        pinned = self._versions[table.name]
        since = itertools.takewhile(lambda commit: commit.version > pinned, self._commits(table))
        if any(commit.changed_rows for commit in since):
            raise _changed_by_another_run(table, f"{self.report.stage} began")
        self._versions[table.name] = newest
        self._frames.pop(table.name, None)

    def can_go_back(self, provenance: dict[str, Any]) -> bool:
        """Whether the stage could read its tables as the run that stored this did: they are the same ones, those
        versions are kept, with their files, and no row of them had to go since, for an erasure or for its age."""
        assert self._stage is not None
        if not self.read_these(provenance):
            return False
        for table in self._stage.reads:
            version = provenance["reads"][table.name]
            if not self.kept(table, version) or any(c.housekeeping for c in self._newer(table, version)):
                return False
            files = self.at(table, version).inputFiles()  # a VACUUM by hand may have kept less
            if not all(self.place_of(file_of_table(file)).exists() for file in files):
                return False
        return True

    def go_back(self, provenance: dict[str, Any]) -> bool:
        """Has the stage read its tables as the run that stored this did, and have its fingerprint; False, and nothing
        is changed, where other inputs of today give it another one."""
        assert self._stage is not None
        before = self._versions, self.fingerprint
        self._versions, self._frames = dict(provenance["reads"]), {}
        self.fingerprint = digest(self._facts(self._stage))
        self.went_back = self.fingerprint == provenance["fingerprint"]
        if not self.went_back:
            (self._versions, self.fingerprint), self._frames = before, {}
        return self.went_back

    def changed_version(self, table: Table) -> int:
        """The newest version that changed rows, at or before the one that the stage reads (else, the newest of all).
        After upkeep alone it is what it was: what was made from the table is still up to date."""
        at = self._versions[table.name] if table.name in self._versions else self.latest_version(table)
        return next((c.version for c in self._commits(table) if c.changed_rows and c.version <= at), at)

    def state(self, table: Table) -> tuple[str | None, int]:
        """Delta's id of the table and `changed_version`: the same as long as the table is the same one with the same
        rows."""
        return self._commits(table).table_id(), self.changed_version(table)

    def current_model(self) -> str:
        """The version of the model whose vectors the stage reads: the one that all users have a vector of.

        Raises:
            TrailvecError: there is none yet, or the configuration asks for another.
        """
        versions = [row["model_version"] for row in self.read(CURRENT_MODEL).collect()]
        wanted = self.config.model.version
        if not versions:
            raise TrailvecError("no model has a vector of every user yet: run `trailvec score_users` first")
        if wanted is not None and wanted != versions[0]:
            raise TrailvecError(
                f"the current model is {versions[0]}, found model.version = {wanted}: run `trailvec score_users` first"
            )
        return str(versions[0])

    # ---- what changed since the last run ---------------------------------------------------------

    def incremental(self, written: Table, read: Table) -> DataFrame | None:
        """What changed in `read` since `written` was made from it, as Delta's change data feed has it: the columns of
        `read`, _change_type and _commit_version.

        None where `written` has to be made anew: it does not exist yet; the stage was forced; its settings or the
        table's revision have changed; something other than trailvec changed its rows; `read` was replaced as a whole or
        is another table of that name; or its changes are no longer kept.
        """
        since = self._since(written, read)
        return None if since is None else self.changes(read, since)

    def previous(self, written: Table, read: Table) -> DataFrame | None:
        """`read` as it was when `written` was made; None where `incremental` would give None."""
        since = self._since(written, read)
        return None if since is None else self.at(read, since)

    def is_unchanged(self, written: Table, read: Table) -> bool:
        """Whether `read` has the same rows as when `written` was made; False where `incremental` gives None."""
        since = self._since(written, read)
        return since is not None and self._unchanged_since(read, since)

    def _unchanged_since(self, read: Table, since: int) -> bool:
        """Whether no commit after the version changed a row."""
        return since >= self.changed_version(read)

    def changes(self, read: Table, since: int) -> DataFrame | None:
        """What changed in `read` after its version `since`, as in `incremental`; None where it was replaced as a whole
        or the changes are no longer kept."""
        until = self._versions[read.name]
        if self._unchanged_since(read, since):
            nothing = self.read(read).limit(0).withColumn("_change_type", F.lit("insert"))
            return nothing.withColumn("_commit_version", F.lit(until).cast("bigint"))
        if any(commit.replaced_all for commit in self._newer(read, since)) or not self.kept(read, since):
            return None
        reader = self.spark.read.format("delta").option("readChangeFeed", "true")
        return reader.option("startingVersion", since + 1).option("endingVersion", until).load(self.path(read))

    def _since(self, written: Table, read: Table) -> int | None:
        """The version of `read` that `written` was made from, if one can go on from there."""
        assert self._stage is not None
        last = None if self.forced else self.last_writer(written)
        now = self.provenance()
        if last is None or last.get("revisions") != now["revisions"] or last["fingerprint"] is None:
            return None
        if any(last["config"].get(s) != now["config"][s] for s in self._stage.settings):
            return None
        since = last["reads"].get(read.name) if self.read_these(last) else None
        if since is None:
            return None
        if self.kept(read, since):
            return int(since)
        told, behind = len(self._newer(read, since)), self._versions[read.name] - since
        note = (
            f"table {written.name} is made anew as a whole: it is {behind:,} commits of table {read.name} behind, of "
            f"which {told:,} are looked at or still in Delta's log: run the stage more often"
        )
        if told < behind and note not in self.report.notes:  # the stage asks several times
            self.report.notes.append(note)
        return None

    def _newer(self, read: Table, version: int) -> list[Commit]:
        """The commits after that version, as far as they are told, up to the one that the stage reads."""
        newer = itertools.takewhile(lambda commit: commit.version > version, self._commits(read))
        return [commit for commit in newer if commit.version <= self._versions[read.name]]

    def kept(self, read: Table, version: int) -> bool:
        """Whether that version of a table that the stage reads can still be read, and what changed since."""
        until = self._versions[read.name]
        # What the commit after `version` dropped is there until VACUUM takes it.
        oldest = time.time() - self.config.maintain.retention_hours_for(read.name) * 3600
        commits = self._newer(read, version)
        return version <= until and len(commits) == until - version and all(c.committed_at > oldest for c in commits)

    # ---- writing ---------------------------------------------------------------------------------

    def write(
        self,
        table: Table,
        df: DataFrame,
        done: bool = True,
        note: dict[str, Any] | None = None,
        of: Mapping[str, str | tuple[str, ...]] | None = None,
    ) -> None:
        """Replaces the table's rows by `df` in one commit; in a table partitioned by model_version, only
        the rows of the partitions that `df` holds.

        Args:
            done, note: as in `append`.
            of: columns and the value of each, or some: only the rows that have them are replaced, also where `df` holds
                none.
        """
        if of is not None:
            options = {"replaceWhere": " AND ".join(f"{name} IN ({_sql_texts(values)})" for name, values in of.items())}
        else:
            dynamic = "model_version" in table.partition_by
            options = {"partitionOverwriteMode": "dynamic" if dynamic else "static"}
        self._save(table, df, "overwrite", options, done=done, note=note)

    def append(
        self,
        table: Table,
        df: DataFrame,
        batch: tuple[str, int] | None = None,
        done: bool = True,
        note: dict[str, Any] | None = None,
    ) -> None:
        """Adds the rows of `df` in one commit.

        Args:
            batch: (writer, number): a number of that writer that was committed before is not written again.
            done: False for a commit that others of the same run follow: the stage is not up to date after it.
            note: the stage's own words, kept in the commit's provenance.
        """
        options = {} if batch is None else {"txnAppId": batch[0], "txnVersion": str(batch[1])}
        self._save(table, df, "append", options, done=done, note=note)

    def touch(self, table: Table, note: dict[str, Any] | None = None, done: bool = True) -> None:
        """Records that the stage ran and found nothing to change; `done` and `note` as in `append`."""
        self.create(table)
        self.append(table, self.latest(table).limit(0), done=done, note=note)

    def _save(
        self,
        table: Table,
        df: DataFrame,
        mode: str,
        options: dict[str, str],
        *,
        done: bool,
        note: dict[str, Any] | None,
    ) -> None:
        self.create(table)
        writer = conform(df, table).write.format("delta").mode(mode).options(**options)
        writer = writer.option("userMetadata", self._metadata(done, note))
        self.commit(lambda: writer.save(self.path(table)))

    def merge(
        self,
        table: Table,
        upserts: DataFrame,
        deletes: DataFrame | None = None,
        *,
        where: Column | None = None,
        insert_only: bool = False,
        few: bool = False,
        made_from: int | None = None,
        done: bool = True,
        note: dict[str, Any] | None = None,
    ) -> None:
        """Updates or inserts the rows of `upserts` by the table's key and deletes those of `deletes`, in one commit.

        Args:
            deletes: rows with the key's columns, none of them in `upserts`.
            where: a condition over `old.*` that holds for all old rows concerned, so that Delta reads no other files.
            insert_only: old rows stay as they are, and no file is rewritten.
            few: both have few rows beside the table (about FEW at most): most of its rows then need no shuffle.
            made_from: the `stage_version` that `upserts` was made from; it must still be the newest. None: not asked.
            done, note: as in `append`.

        Raises:
            TrailvecError: another run has changed rows since `made_from`; if it did so between the last look at that
                and Delta's own, the rows of both are in the table, and the stage makes all anew when it runs again.
        """
        self.create(table)
        new = conform(upserts, table).withColumn("trailvec_delete", F.lit(False))
        if deletes is not None:
            gone = deletes.select(*table.key, F.lit(True).alias("trailvec_delete"))
            new = new.unionByName(gone, allowMissingColumns=True)
        on = where if where is not None else F.lit(True)
        for name in table.key:
            on &= F.col(f"old.{name}") == F.col(f"new.{name}")
        values = {c.name: F.col(f"new.{c.name}") for c in table.columns}
        given, settings = new, {}
        if few:
            # Cached, so that Spark knows its size; checkpointed before, since the commit would have Spark compute anew
            # what is cached and was read from the table.
            new = new.localCheckpoint(eager=False).persist()
            new.count()
            given = new.where(F.col("trailvec_delete") >= F.lit(False))  # which holds for all
            more = "spark.sql.optimizer.runtime.bloomFilter.applicationSideScanSizeThreshold"
            settings = _FILTERED_MERGE | {more: str(known_size(new) + 1)}
        merge = DeltaTable.forPath(self.spark, self.path(table)).alias("old").merge(given.alias("new"), on)
        if not insert_only:
            merge = merge.whenMatchedDelete("new.trailvec_delete").whenMatchedUpdate(set=values)
        merge = merge.whenNotMatchedInsert("NOT new.trailvec_delete", values=values)

        def write() -> None:
            if made_from is not None and self.stage_version(table) != made_from:
                raise _changed_by_another_run(table, "this one worked on it")
            with spark_conf(self.spark, settings):
                merge.execute()

        try:
            self._noted_commit(write, done, note)
        finally:
            if few:
                new.unpersist()
        if made_from is not None:
            self.latest_version(table)  # looks the commits up anew
            newer = itertools.takewhile(lambda commit: commit.version > made_from, self._commits(table))
            if sum(commit.changed_rows and not commit.housekeeping for commit in newer) > 1:
                self.touch(table, done=False)  # nothing goes on from here
                raise TrailvecError(
                    f"another run changed table {table.name} in the moment in which this one wrote to it, and the rows "
                    f"of both are in it: run `trailvec {table.stage}` again when that one has ended: it makes all anew"
                )

    def merge_differences(self, table: Table, differing: DataFrame, where: Column, made_from: int) -> None:
        """Puts the `new` rows of jobs.tables.differences in the place of the `old` ones, in one commit.

        Args:
            differing: read several times: checkpointed.
            where, made_from: as in `merge`.
        """
        gone = differing.where("new IS NULL").select(*table.key)
        new = differing.where("new IS NOT NULL").select("new.*")
        few = differing.count() <= FEW
        self.merge(table, new, gone, where=where, few=few, made_from=made_from)

    def delete(self, table: Table, where: Column, note: dict[str, Any]) -> None:
        """Deletes the rows that fulfil a condition, in one commit; `note` as in `append`."""
        rows = DeltaTable.forPath(self.spark, self.path(table))
        self._noted_commit(lambda: rows.delete(where), True, note)

    def erase(self, table: Table, users: DataFrame, on: Column, erasure: str) -> None:
        """Deletes the rows that fulfil a condition (over `old.*`) with one of `users` (`gone.user_id`), in one commit,
        which is known as that erasure's.

        Where the table may have deletion vectors, the rows are only marked in them: they stay in their files until
        `purge`. Else their files are written anew.
        """
        rows = DeltaTable.forPath(self.spark, self.path(table)).alias("old")
        merge = rows.merge(users.alias("gone"), on).whenMatchedDelete()
        self._noted_commit(merge.execute, True, {"erasure": erasure})

    def _noted_commit(self, write: Callable[[], Any], done: bool, note: dict[str, Any] | None) -> None:
        with spark_conf(self.spark, {"spark.databricks.delta.commitInfo.userMetadata": self._metadata(done, note)}):
            self.commit(write)

    # ---- what ran --------------------------------------------------------------------------------

    def provenance(self) -> dict[str, Any]:
        """What is running, as it is stored in what it writes; without secrets."""
        assert self._stage is not None
        config = self.config.model_dump(mode="json")
        config["spark"]["conf"] = {
            key: "(redacted)" if _SECRET.search(key) or _SECRET.search(value) else value
            for key, value in config["spark"]["conf"].items()
        }
        return {
            "stage": self._stage.name,
            "fingerprint": self.fingerprint,
            "code_version": code_version(),
            "user": self.spark.sparkContext.sparkUser(),
            "application": self.spark.sparkContext.applicationId,
            "reads": self._versions,
            "table_ids": self._table_ids,
            "revisions": {table.name: table.revision for table in self._stage.writes},
            "config": config,
        }

    def _metadata(self, done: bool, note: dict[str, Any] | None) -> str:
        words = {} if note is None else {"note": note}
        return json.dumps(self.provenance() | ({} if done else {"fingerprint": None}) | words, sort_keys=True)

    def _facts(self, stage: Stage) -> dict[str, Any]:
        settings = self.config.model_dump(mode="json", include=set(stage.settings))
        return {
            "stage": stage.name,
            "code": code_version(),
            "settings": settings,
            "reads": {table.name: self.changed_version(table) for table in stage.reads},
            "inputs": stage.inputs(self),
        }

    def _is_up_to_date(self, table: Table) -> bool:
        last = self.last_writer(table) or {}
        return last.get("fingerprint") == self.fingerprint and self.read_these(last)

    @property
    def fingerprint_here(self) -> str:
        """The fingerprint of the stage over these very tables: another one over others that have taken their names."""
        return digest({"fingerprint": self.fingerprint, "table_ids": self._table_ids})

    def read_these(self, provenance: dict[str, Any]) -> bool:
        """Whether the run that stored this read the very tables that the stage reads, not earlier ones of their names.
        (No part of the fingerprint: the same data in another warehouse give the same model's version.)"""
        told = provenance.get("table_ids", {})  # older code told none
        return all(told.get(name) in (None, table_id) for name, table_id in self._table_ids.items())


def _sql_texts(values: str | tuple[str, ...]) -> str:
    """One value, or some, as literals of SQL."""
    some = (values,) if isinstance(values, str) else values
    escaped = [value.replace("\\", "\\\\").replace("'", "\\'") for value in some]
    return ", ".join(f"'{value}'" for value in escaped)


def _changed_by_another_run(table: Table, during: str) -> TrailvecError:
    return TrailvecError(
        f"another run changed table {table.name} while {during}: run this again when that one has ended; "
        f"nothing is lost"
    )


@cache
def code_version() -> str:
    """The package's version and a hash of its source: changes exactly when the code does."""
    sha256 = hashlib.sha256()
    for package in _PACKAGES:
        folder = Path(__file__).parent.parent / package
        for file in sorted(file for suffix in ("*.py", "*.html") for file in folder.rglob(suffix)):
            sha256.update(str(file.relative_to(folder.parent)).encode() + b"\0" + file.read_bytes())
    return f"{importlib.metadata.version('trailvec')}+{sha256.hexdigest()[:12]}"


def digest(value: dict[str, Any]) -> str:
    """SHA-256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
