"""The definition of a stage, and the runtime through which it reads and writes.

A stage reads tables at pinned versions and writes each of its tables in one Delta commit, whose user metadata records
what ran: code version, resolved config, versions read (law 7 of docs/decisions/0002). The same facts give the stage's
fingerprint: if the last commit of every table that it writes carries it, the stage is up to date and is skipped, which
makes a second `trailvec run` quick and a killed one resumable.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from delta.tables import DeltaTable
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.commits import UNMAPPED, Commit, newer_than
from jobs.config import Config
from jobs.errors import TrailvecError
from jobs.lake import Lake
from jobs.spark_session import FEW, known_size, persisted, spark_conf
from jobs.tables import CURRENT_MODEL, Table, conform
from training.urls import file_of_table

_PACKAGES = ("jobs", "spark_udfs", "training")
# Redacts Spark settings in commits and manifests, matched by name and, as in Spark, by value (Java options may hold a
# password): the default of spark.redaction.regex, plus the names of keys at Azure, Google and S3.
_SECRET = re.compile(
    r"(?i)secret|password|token|credential|(access|account|private|encryption)[.]?key|client-provided-key|[.]sas[.]|[?&]sig="
)


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    Attributes:
        run: the stage itself; all its reads and writes go through the runtime it is given.
        reads: tables that must exist; their versions are pinned when the stage begins.
        writes: tables whose last commit says whether the stage is up to date.
        settings: the config sections that affect its result.
        inputs: anything else that affects its result (files, a model's version), as plain values.
        also: a sentence for its help about what else it reads and writes (files, optional tables).
    """

    name: str
    help: str
    run: Callable[[Runtime], None]
    reads: tuple[Table, ...] = ()
    writes: tuple[Table, ...] = ()
    settings: tuple[str, ...] = ()
    inputs: Callable[[Runtime], dict[str, Any]] = lambda runtime: {}
    also: str = ""


# MERGE is an outer join that keeps the new rows, and Spark can't broadcast the preserved side of an outer join, so the
# old rows of all affected files get shuffled. With these settings, Spark drops most of them at the scan, by a Bloom
# filter on the new rows' first key. It builds one only if it would broadcast neither side, the new rows are filtered,
# and it knows that the old side is larger: `_filtering` sees to the last two.
_FILTERED_MERGE = {
    "spark.sql.optimizer.runtime.bloomFilter.enabled": "true",
    "spark.sql.optimizer.runtime.bloomFilter.creationSideThreshold": str(2**40),
    "spark.sql.optimizer.runtimeFilter.number.threshold": "1",
    "spark.sql.autoBroadcastJoinThreshold": "-1",
    # Delta's materialised copy of the new rows would have neither a known size nor a filter.
    "spark.databricks.delta.merge.materializeSource": "none",
    # Delta's shortcut for insert-only merges is an anti join, for which Spark builds no Bloom filter. The regular path
    # looks for matches and, if there are none, inserts everything.
    "spark.databricks.delta.merge.optimizeInsertOnlyMerge.enabled": "false",
}


@dataclass
class Report:
    """What one run of a stage did; row counts by what it read and wrote, and by table (`Runtime.count_rows`)."""

    stage: str
    skipped: bool = False
    seconds: float = 0.0
    rows_in: dict[str, int] = field(default_factory=dict)
    rows_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Runtime(Lake):
    """The lake, and the one stage that is running in it."""

    def __init__(self, config: Config, spark: SparkSession | None = None) -> None:
        super().__init__(config, spark)
        self._stage: Stage | None = None
        self._versions: dict[str, int] = {}
        self._table_ids: dict[str, str | None] = {}  # a recreated table restarts its versions at 0
        self._frames: dict[str, DataFrame] = {}
        # Row counts by table name, id and version, kept between stages: what one writes the next one reads.
        self._rows: dict[tuple[str, str | None, int], int] = {}
        self.fingerprint = ""
        self._run = ""  # a name in the commits of this run alone: two runs may share an application and a fingerprint
        self.inputs: dict[str, Any] = {}  # `Stage.inputs`, as in the fingerprint: asked again, they may have changed
        self.forced = False
        self.went_back = False  # `go_back`
        self.report = Report("")
        self.on_progress: Callable[[str], None] = lambda text: None

    # ---- one stage -------------------------------------------------------------------------------

    def execute(self, stage: Stage, force: bool = False) -> Report:
        """Runs the stage, or skips it if its tables already hold what it would write.

        Raises:
            TrailvecError: a table that it reads does not exist, or its input is wrong.
        """
        started = time.monotonic()
        self.report = Report(stage.name)
        self._stage, self._run = stage, uuid.uuid4().hex
        self._history, self._frames = {}, {}
        self.forced, self.went_back = force, False
        self._versions = {table.name: self.latest_version(table) for table in stage.reads}
        self._table_ids = {table.name: self._commits(table).table_id for table in stage.reads}
        self.fingerprint = digest(self._facts(stage))
        if not force and stage.writes and all(self._is_up_to_date(t) for t in stage.writes):
            self.report.skipped = True
        else:
            # Check before any work: an increment would already have written new rows next to the old ones.
            for table in (*stage.reads, *stage.writes):
                if self.exists(table):
                    self._refuse_other_columns(table)
            stage.run(self)
        self._history = {}  # so that later commits by others are seen
        self.report.seconds = time.monotonic() - started
        return self.report

    def count_rows(self) -> Report:
        """The report of the stage that ran last, with the row counts of its tables. (Several Spark jobs, a tenth of a
        small increment, so only who shows them asks.)"""
        assert self._stage is not None
        started = time.monotonic()
        if not self.report.skipped:
            self.report.rows_in |= {table.name: self.row_count(table) for table in self._stage.reads}
            for table in self._stage.writes:
                version = self.latest_version(table)
                self.report.rows_out[table.name] = self._count(table, self._commits(table).table_id, version)
        self.report.seconds += time.monotonic() - started
        return self.report

    def row_count(self, table: Table) -> int:
        """The number of rows that `read` returns."""
        return self._count(table, self._table_ids[table.name], self._versions[table.name])

    def _count(self, table: Table, table_id: str | None, version: int) -> int:
        """The table's row count at that version."""
        key = table.name, table_id, version
        if key not in self._rows:
            self._rows[key] = self.at(table, version).count()
        return self._rows[key]

    def running_tasks(self) -> str:
        """Spark's active stages as "done/total tasks"; empty if nothing runs or Spark isn't started."""
        if self._spark is None:
            return ""
        tracker = self._spark.sparkContext.statusTracker()
        stages = [tracker.getStageInfo(number) for number in tracker.getActiveStageIds()]
        return "  ".join(f"{info.numCompletedTasks}/{info.numTasks} tasks" for info in stages if info)

    def read(self, table: Table) -> DataFrame:
        """The table as it was when the stage began."""
        # Cached: Delta would rebuild an old version's snapshot for every frame.
        if table.name not in self._frames:
            self._frames[table.name] = self.at(table, self._versions[table.name])
        return self._frames[table.name]

    def pin(self, table: Table) -> None:
        """Lets the stage `read` a table that it does not always need, at its newest version now.

        Raises:
            TrailvecError: the table does not exist.
        """
        self._versions[table.name] = self.latest_version(table)

    def version(self, table: Table) -> int:
        """The Delta version at which the stage reads the table."""
        return self._versions[table.name]

    def read_after_upkeep(self, table: Table) -> None:
        """Re-pins the table to its newest version, after maintenance that moved the same rows to other files.

        Raises:
            TrailvecError: another run has changed rows since the stage began.
        """
        newest = self.latest_version(table)
        pinned = self._versions[table.name]
        if any(commit.changed_rows for commit in newer_than(self._commits(table), pinned)):
            raise changed_by_another_run(table, f"since {self.report.stage} began")
        self._versions[table.name] = newest
        self._frames.pop(table.name, None)

    def can_go_back(self, provenance: dict[str, Any]) -> bool:
        """Whether the stage can read its tables at the versions in this provenance: the tables are the same ones, those
        versions and their files still exist, and since then no rows have been deleted for an erasure, nor changed by
        anything but trailvec (RESTORE, SQL)."""
        assert self._stage is not None
        if not self.read_these(provenance):
            return False
        for table in self._stage.reads:
            version = provenance["reads"][table.name]
            if not self.kept(table, version) or any(c.housekeeping or c.foreign for c in self._newer(table, version)):
                return False
            files = self.at(table, version).inputFiles()  # a manual VACUUM may have deleted more
            if not all(self.place_of(file_of_table(file)).exists() for file in files):
                return False
        return True

    def go_back(self, provenance: dict[str, Any]) -> bool:
        """Pins the stage to the table versions and the fingerprint of this provenance.

        Returns False, with nothing changed, if today's other inputs give a different fingerprint.
        """
        assert self._stage is not None
        before = self._versions, self.fingerprint, self.inputs
        self._versions, self._frames = dict(provenance["reads"]), {}
        self.fingerprint = digest(self._facts(self._stage))
        self.went_back = self.fingerprint == provenance["fingerprint"]
        if not self.went_back:
            (self._versions, self.fingerprint, self.inputs), self._frames = before, {}
        return self.went_back

    def changed_version(self, table: Table) -> int:
        """The newest version that changed rows, up to the pinned version (of a table that isn't pinned, the newest).

        Maintenance alone doesn't move it, so what was derived from the table stays up to date. Of changes of which
        Delta's log no longer tells it is the oldest known commit.
        """
        at = self._versions[table.name] if table.name in self._versions else self.latest_version(table)
        oldest = at
        for commit in (c for c in self._commits(table) if c.version <= at):
            oldest = commit.version
            if commit.changed_rows:
                break
        return oldest

    def state(self, table: Table) -> tuple[str | None, int]:
        """The table's Delta id and `changed_version`: equal as long as it is the same table with the same rows."""
        changed = self.changed_version(table)  # reads the log anew
        return self._commits(table).table_id, changed

    def current_model(self) -> str:
        """The version of the model whose vectors the stage reads: the one for which all users have a vector.

        Raises:
            TrailvecError: there is none yet, or the configuration names another.
        """
        versions = [row["model_version"] for row in self.read(CURRENT_MODEL).collect()]
        wanted = self.config.model.version
        if not versions:
            raise TrailvecError("no model has a vector for every user yet: run `trailvec score_users` first")
        if wanted is not None and wanted != versions[0]:
            raise TrailvecError(
                f"the current model is {versions[0]}, but model.version is {wanted}: run `trailvec score_users` first"
            )
        return str(versions[0])

    # ---- what changed since the last run ---------------------------------------------------------

    def incremental(self, written: Table, read: Table) -> DataFrame | None:
        """Delta's change data feed of `read` since `written` was built from it: the columns of `read`,
        _change_type and _commit_version.

        None if `written` needs a full rebuild: it does not exist yet; the stage was forced; its settings or the table's
        revision have changed; something other than trailvec changed its rows; `read` was overwritten as a whole or
        replaced by another table of that name; or its changes are no longer retained.
        """
        since = self._since(written, read)
        return None if since is None else self.changes(read, since)

    def previous(self, written: Table, read: Table) -> DataFrame | None:
        """`read` as it was when `written` was built; None where `written` needs a full rebuild (see `incremental`)."""
        since = self._since(written, read)
        if since is None:
            return None
        return self.read(read) if self._unchanged_since(read, since) else self.at(read, since)

    def is_unchanged(self, written: Table, read: Table) -> bool:
        """Whether `read` has the same rows as when `written` was built; False if `written` needs a full rebuild."""
        since = self._since(written, read)
        return since is not None and self._unchanged_since(read, since)

    def _unchanged_since(self, read: Table, since: int) -> bool:
        """Whether no commit after version `since` changed a row."""
        return since >= self.changed_version(read)

    def changes(self, read: Table, since: int) -> DataFrame | None:
        """What changed in `read` after its version `since`, as in `incremental`; None if it was overwritten as a whole,
        its columns were mapped until then, or the changes are no longer retained."""
        until, since = self._versions[read.name], self.past_upkeep(read, since)
        if self._unchanged_since(read, since):
            nothing = self.read(read).limit(0).withColumn("_change_type", F.lit("insert"))
            return nothing.withColumn("_commit_version", F.lit(until).cast("bigint"))
        # Delta reads no feed from files of mapped columns once they are mapped no longer.
        ends_feed = (c.replaced_all or c.operation == UNMAPPED for c in self._newer(read, since))
        if any(ends_feed) or not self.kept(read, since):
            return None
        reader = self.spark.read.format("delta").option("readChangeFeed", "true")
        return reader.option("startingVersion", since + 1).option("endingVersion", until).load(self.path(read))

    def _since(self, written: Table, read: Table) -> int | None:
        """The version of `read` that `written` was built from; None if it can't be updated incrementally from there."""
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
        return self.followed(written, read, since)

    def followed(self, written: Table, read: Table, version: int) -> int | None:
        """`version` of `read`, from which `written` was made, past the upkeep since; None, and a note that `written` is
        rebuilt in full, if that version or the changes since can't be read any more."""
        version = self.past_upkeep(read, version)
        if self.kept(read, version):
            return version
        told, behind = len(self._recent(read, version)), self._versions[read.name] - version
        note = (
            f"table {written.name} is rebuilt in full: it is {behind:,} commits behind table {read.name}, of which "
            f"only {told:,} are recent enough to be read (maintain.retention_hours) and still in Delta's log: run the "
            f"stage more often"
        )
        if told < behind and note not in self.report.notes:  # a stage calls this several times
            self.report.notes.append(note)
        return None

    def _newer(self, read: Table, version: int) -> list[Commit]:
        """The known commits after that version, up to the pinned one."""
        newer = newer_than(self._commits(read), version)
        return [commit for commit in newer if commit.version <= self._versions[read.name]]

    def past_upkeep(self, read: Table, version: int) -> int:
        """The newest version that has the rows of `version`, up to the pinned one: the commits between change none, and
        its files stay part of the table for longer."""
        for commit in reversed(self._newer(read, version)):
            if commit.version != version + 1 or commit.changed_rows:
                break
            version += 1
        return version

    def _recent(self, read: Table, version: int) -> list[Commit]:
        """The commits after that version whose changes can still be read."""
        # Files removed by the commit after `version` exist until VACUUM deletes them.
        oldest = time.time() - self.config.maintain.retention_hours_for(read.name) * 3600
        return [commit for commit in self._newer(read, version) if commit.committed_at > oldest]

    def kept(self, read: Table, version: int) -> bool:
        """Whether that version of a table that the stage reads, and all changes since, can still be read."""
        until = self._versions[read.name]
        return version <= until and len(self._recent(read, version)) == until - version

    # ---- writing ---------------------------------------------------------------------------------

    def create(self, table: Table) -> None:
        """As in Lake. (`execute` has checked the columns of the stage's own tables.)"""
        own = () if self._stage is None else (*self._stage.reads, *self._stage.writes)
        if table not in own or not self.exists(table):
            super().create(table)

    def write(
        self,
        table: Table,
        df: DataFrame,
        done: bool = True,
        note: dict[str, Any] | None = None,
        of: Mapping[str, str | tuple[str, ...]] | None = None,
    ) -> None:
        """Replaces the table's rows by `df` in one commit; in a table partitioned by model_version, only the partitions
        that occur in `df`.

        Args:
            done, note: as in `append`.
            of: column → allowed value or values: replaces exactly the rows that match, even if `df` has none.
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
            batch: (writer, number), for idempotence: a number that this writer has committed is not written again.
            done: False if more commits of the same run follow: the stage is not up to date yet.
            note: stage-specific data, stored in the commit's provenance.
        """
        options = {} if batch is None else {"txnAppId": batch[0], "txnVersion": str(batch[1])}
        self._save(table, df, "append", options, done=done, note=note)

    def touch(
        self, table: Table, note: dict[str, Any] | None = None, done: bool = True, made_from: int | None = None
    ) -> None:
        """Records by an empty commit that the stage found nothing to change.

        Args:
            done, note: as in `append`.
            made_from: the `stage_version` in which it found nothing to change, as in `merge`.

        Raises:
            TrailvecError: another run has changed rows since `made_from`, so there may be something to change.
        """
        self.create(table)
        self._refuse_other_version(table, made_from)
        self.append(table, self.latest(table).limit(0), done=done, note=note)
        # Delta lets an append follow whatever came in between. (Older: it has cleaned its log.)
        if made_from is not None and self.stage_version(table) > made_from:
            self.touch(table, done=False)  # forces a full rebuild
            raise TrailvecError(
                f"another run changed table {table.name} just as this one noted that nothing had changed: run "
                f"`trailvec {table.stage}` again when that one has ended, which rebuilds it in full"
            )

    def _refuse_other_version(self, table: Table, made_from: int | None) -> None:
        """Raises TrailvecError if `made_from` is not the newest `stage_version`; None: not checked."""
        if made_from is not None and self.stage_version(table) != made_from:
            raise changed_by_another_run(table, "while this one worked on it")

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
        self.commit(table, lambda: writer.save(self.path(table)))

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
        """Upserts the rows of `upserts` by the table's key and deletes those of `deletes`, in one commit.

        Args:
            deletes: rows with the key columns, disjoint from `upserts`.
            where: a condition over `old.*` that holds for all affected old rows, so that Delta can skip other files.
            insert_only: matching old rows are left as they are, and no file is rewritten.
            few: both frames are small compared with the table (about FEW rows at most): most old rows then skip the
                shuffle.
            made_from: the `stage_version` from which `upserts` was computed; it must still be the newest. None: not
                checked.
            done, note: as in `append`.

        Raises:
            TrailvecError: another run has changed rows since `made_from`. If it did so between our check and Delta's,
                the table has the rows of both, and the stage's next run rebuilds it in full.
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
        with contextlib.ExitStack() as until_written:
            given, settings = until_written.enter_context(_filtering(new)) if few else (new, {})
            merge = DeltaTable.forPath(self.spark, self.path(table)).alias("old").merge(given.alias("new"), on)
            if not insert_only:
                merge = merge.whenMatchedDelete("new.trailvec_delete").whenMatchedUpdate(set=values)
            merge = merge.whenNotMatchedInsert("NOT new.trailvec_delete", values=values)

            def write() -> None:
                self._refuse_other_version(table, made_from)
                with spark_conf(self.spark, settings):
                    merge.execute()

            self._noted_commit(table, write, done, note)
        if made_from is not None:
            self._refuse_rows_of_two_runs(table, made_from)

    def _refuse_rows_of_two_runs(self, table: Table, made_from: int) -> None:
        """Raises TrailvecError if another run has changed rows since version `made_from`."""
        newer = (c for c in newer_than(self._commits(table), made_from) if c.changed_rows and not c.housekeeping)
        if any((commit.provenance or {}).get("run") != self._run for commit in newer):
            self.touch(table, done=False)  # forces a full rebuild
            raise TrailvecError(
                f"another run changed table {table.name} just as this one wrote to it, and the table has the rows "
                f"of both: run `trailvec {table.stage}` again when that one has ended, which rebuilds it in full"
            )

    def merge_differences(self, table: Table, differing: DataFrame, count: int, where: Column, made_from: int) -> None:
        """Replaces the `old` rows of jobs.tables.differences by the `new` ones, in one commit.

        Args:
            differing: should be checkpointed: it is read several times.
            count: its rows.
            where, made_from: as in `merge`.
        """
        gone = differing.where("new IS NULL").select(*table.key)
        new = differing.where("new IS NOT NULL").select("new.*")
        self.merge(table, new, gone, where=where, few=count <= FEW, made_from=made_from)

    def delete(self, table: Table, where: Column, note: dict[str, Any]) -> None:
        """Deletes the rows that match a condition, in one commit; `note` as in `append`."""
        rows = DeltaTable.forPath(self.spark, self.path(table))
        self._noted_commit(table, lambda: rows.delete(where), True, note)

    def erase(self, table: Table, users: DataFrame, on: Column, erasure: str) -> None:
        """Deletes the rows that match one of `users` by `on`, a condition over `old.*` and `gone.user_id`.

        One commit, labelled with the erasure.

        If the table allows deletion vectors, rows are only marked as deleted and stay in their files until `purge`.
        Otherwise their files are rewritten.
        """
        rows = DeltaTable.forPath(self.spark, self.path(table)).alias("old")
        merge = rows.merge(users.alias("gone"), on).whenMatchedDelete()
        self._noted_commit(table, merge.execute, True, {"erasure": erasure})

    def _noted_commit(self, table: Table, write: Callable[[], Any], done: bool, note: dict[str, Any] | None) -> None:
        with spark_conf(self.spark, {"spark.databricks.delta.commitInfo.userMetadata": self._metadata(done, note)}):
            self.commit(table, write)

    # ---- what ran --------------------------------------------------------------------------------

    def provenance(self) -> dict[str, Any]:
        """What is running, as stored in every commit; secrets are redacted."""
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
        fingerprint = self.fingerprint if done else None
        said = self.provenance() | {"fingerprint": fingerprint, "run": self._run} | words
        return json.dumps(said, sort_keys=True)

    def _facts(self, stage: Stage) -> dict[str, Any]:
        """What the fingerprint is made of; sets `inputs`."""
        self.inputs = stage.inputs(self)
        settings = self.config.model_dump(mode="json", include=set(stage.settings))
        return {
            "stage": stage.name,
            "code": code_version(),
            "settings": settings,
            "reads": {table.name: self.changed_version(table) for table in stage.reads},
            "inputs": self.inputs,
        }

    def _is_up_to_date(self, table: Table) -> bool:
        last = self.last_writer(table) or {}
        return last.get("fingerprint") == self.fingerprint and self.read_these(last)

    def fingerprint_here(self, fingerprint: str) -> str:
        """This fingerprint combined with the tables' ids, so that it differs once a table is recreated."""
        return digest({"fingerprint": fingerprint, "table_ids": self._table_ids})

    def read_these(self, provenance: dict[str, Any]) -> bool:
        """Whether this provenance is of the same tables that the stage reads, not earlier ones of the same names.
        (Not part of the fingerprint, so that the same data in another warehouse give the same model version.)"""
        told = provenance.get("table_ids", {})  # older code recorded none
        return all(told.get(name) in (None, table_id) for name, table_id in self._table_ids.items())


def _sql_texts(values: str | tuple[str, ...]) -> str:
    """One or several values as SQL string literals."""
    some = (values,) if isinstance(values, str) else values
    escaped = [value.replace("\\", "\\\\").replace("'", "\\'") for value in some]
    return ", ".join(f"'{value}'" for value in escaped)


@contextlib.contextmanager
def _filtering(new: DataFrame) -> Iterator[tuple[DataFrame, dict[str, str]]]:
    """The new rows of a MERGE and the settings (_FILTERED_MERGE) with which Spark drops most old rows at the scan."""
    # Cached so that Spark knows its size; checkpointed first, because the commit invalidates caches of frames that were
    # read from the table.
    with persisted(new.localCheckpoint(eager=False)) as rows:
        rows.count()
        more = "spark.sql.optimizer.runtime.bloomFilter.applicationSideScanSizeThreshold"
        filtered = rows.where(F.col("trailvec_delete") >= F.lit(False))  # always true
        yield filtered, _FILTERED_MERGE | {more: str(known_size(rows) + 1)}


def changed_by_another_run(table: Table, during: str) -> TrailvecError:
    return TrailvecError(
        f"another run changed table {table.name} {during}: run this again when that one has ended; nothing is lost"
    )


@cache
def code_version() -> str:
    """The package's version and a hash of its source, so that it changes exactly when the code does."""
    sha256 = hashlib.sha256()
    for package in _PACKAGES:
        folder = Path(__file__).parent.parent / package
        for file in sorted(file for suffix in ("*.py", "*.html") for file in folder.rglob(suffix)):
            sha256.update(str(file.relative_to(folder.parent)).encode() + b"\0" + file.read_bytes())
    return f"{importlib.metadata.version('trailvec')}+{sha256.hexdigest()[:12]}"


def digest(value: dict[str, Any]) -> str:
    """SHA-256 of plain values, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
