"""The only module that knows paths: where everything is stored, and how Delta tables are created, read and written."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from delta import exceptions
from delta.tables import DeltaTable, DeltaTableBuilder
from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession

from jobs.commits import Commit, History, newer_than
from jobs.config import Config
from jobs.errors import ONLY_HERE, TrailvecError
from jobs.files import Place, place_of
from jobs.spark_session import spark_conf, start_spark
from jobs.tables import CURRENT_MODEL, Table

# Another job committed in the meantime. In Python, unlike Java, these exceptions have no common base class.
CONFLICTS = (
    exceptions.ConcurrentAppendException,
    exceptions.ConcurrentDeleteDeleteException,
    exceptions.ConcurrentDeleteReadException,
    exceptions.ConcurrentTransactionException,
    exceptions.ConcurrentWriteException,
    exceptions.MetadataChangedException,
    exceptions.ProtocolChangedException,
)
_NEVER_MOVED = "never move that folder away: its rows may be stored nowhere else"
_ATTEMPTS = 5  # per commit, if it conflicts with other jobs' commits


class Lake:
    """The tables, models and exports of one configuration, for readers and writers."""

    def __init__(self, config: Config, spark: SparkSession | None = None) -> None:
        self.config = config
        self._spark = spark
        self._history: dict[str, History] = {}

    # ---- sessions and paths ----------------------------------------------------------------------

    @property
    def spark(self) -> SparkSession:
        if self._spark is None:
            self._spark = start_spark(self.config)
        return self._spark

    @cached_property
    def place(self) -> Place:
        """The folder that holds everything trailvec writes."""
        return self.place_of(self.config.storage.root)

    def place_of(self, text: str) -> Place:
        """A folder named in the configuration."""
        place = place_of(text)
        return place if isinstance(place, Path) else place.qualified(self.spark)

    @property
    def root(self) -> Path:
        """`place` as a local path, for the database of tune.

        Raises:
            TrailvecError: it is not local.
        """
        root = place_of(self.config.storage.root)
        if not isinstance(root, Path):
            raise TrailvecError(
                f"storage.root = {root}, but tune keeps its trials in a database on a local disk: copy sequences, "
                f"items and context_values to a local storage.root and run tune there"
            )
        return root

    def path(self, table: Table) -> str:
        return str(self.folder(table))

    def folder(self, table: Table) -> Place:
        return self.place / "tables" / table.name

    @property
    def models(self) -> Place:
        return self.place / "models"

    @property
    def exports(self) -> Place:
        return self.place / "exports"

    def staging(self, of: str) -> Place:
        """A stage's temporary folder, which may hold user ids; `of`: exports, erasures-…, labels or neighbours."""
        return self.place / f".{of}.staging"

    def exists(self, table: Table) -> bool:
        return bool(DeltaTable.isDeltaTable(self.spark, self.path(table)))

    def sql_name(self, table: Table) -> str:
        """The table's name in SQL."""
        return f"delta.`{self.path(table).replace('`', '``')}`"

    # ---- reading ---------------------------------------------------------------------------------

    def latest(self, table: Table) -> DataFrame:
        """The table as it is now; for a stage that reads its own output."""
        return self.spark.read.format("delta").load(self.path(table))

    def at(self, table: Table, version: int) -> DataFrame:
        """The table at a Delta version whose files still exist."""
        return self.spark.read.format("delta").option("versionAsOf", version).load(self.path(table))

    def latest_version(self, table: Table) -> int:
        """The table's newest Delta version.

        Raises:
            TrailvecError: the table does not exist.
        """
        if not self.exists(table):
            raise TrailvecError(
                f"table {table.name} does not exist under {self.place}: run `trailvec {table.stage}` first"
            )
        self._history.pop(table.name, None)  # others may have written
        return self._commits(table).newest

    def stage_version(self, table: Table) -> int:
        """The newest version that changed rows, ignoring deletions for erasure or age; -1 if there is none."""
        self.latest_version(table)  # reloads the commits
        return next((c.version for c in self._commits(table) if c.changed_rows and not c.housekeeping), -1)

    def commits(self, table: Table) -> Iterable[Commit]:
        """The table's commits, newest first, as far back as its log is kept (at most 5,000); empty without a table."""
        return self._commits(table) if self.exists(table) else ()

    def _commits(self, table: Table) -> History:
        """The table's commits, cached until this lake commits to it (or `latest_version` is asked)."""
        if table.name not in self._history:
            self._history[table.name] = History(self.folder(table))
        return self._history[table.name]

    def table_id(self, table: Table) -> str | None:
        """Delta's id of the table, which changes when it is recreated; None if it does not exist."""
        return self._commits(table).table_id if self.exists(table) else None

    def noted(self, table: Table) -> Iterator[dict[str, Any]]:
        """The provenance of the table's commits to which a stage added a `note`, newest first and lazily. Ends where
        something other than trailvec changed rows: earlier notes no longer hold."""
        ours = takewhile(lambda commit: not commit.foreign, self.commits(table))
        stages = (c.provenance for c in ours if c.provenance is not None and not c.housekeeping)
        return (provenance for provenance in stages if "note" in provenance)

    def erasure_commits(self, table: Table, erasure: str, after: int, since: float) -> list[Commit]:
        """The table's commits of that erasure, newest first. The log is read back only to version `after` (exclusive)
        and time `since` (seconds since 1970)."""
        newer = takewhile(lambda commit: commit.committed_at >= since, newer_than(self._commits(table), after))
        return [commit for commit in newer if commit.erasure == erasure]

    def last_writer(self, table: Table) -> dict[str, Any] | None:
        """The provenance of trailvec's newest commit to the table, ignoring `Commit.housekeeping`.

        None if there is none, or if something other than trailvec has changed rows since (a RESTORE, say): the rows are
        then not what that commit wrote.
        """
        if not self.exists(table):
            return None
        told = (c for c in self._commits(table) if c.foreign or (c.provenance is not None and not c.housekeeping))
        return next((c.provenance for c in told), None)

    def newest_current_model(self) -> str | None:
        """The current model's version now, whatever the stage pinned or the configuration says; None: none yet."""
        if not self.exists(CURRENT_MODEL):
            return None
        return next((str(row["model_version"]) for row in self.latest(CURRENT_MODEL).collect()), None)

    # ---- creating and committing -----------------------------------------------------------------

    def create(self, table: Table) -> None:
        """Creates the table, empty, if it does not exist: types, NOT NULL, comments, partitions.

        Raises:
            TrailvecError: it exists with other columns.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            if self.exists(table):
                self._refuse_other_columns(table)
                return
            try:
                self.commit(table, self._builder(table).execute)
                return
            except (AnalysisException, Py4JJavaError):
                # Another job is creating it, or was killed while it did. Waits are short: a full disk ends here too,
                # and should be reported within seconds.
                if attempt == _ATTEMPTS:
                    raise
                time.sleep(random.uniform(0.2, 1))  # noqa: S311 - spreads the two, nothing secret
                if attempt > 1 and not self.exists(table):
                    self._clear_log(table)

    def _builder(self, table: Table) -> DeltaTableBuilder:
        builder = DeltaTable.createIfNotExists(self.spark).location(self.path(table)).comment(table.comment)
        builder = builder.addColumns(table.schema())
        if table.partition_by:
            builder = builder.partitionedBy(*table.partition_by)
        if table.cluster_by:
            builder = builder.clusterBy(*table.cluster_by)
        properties = {
            "delta.dataSkippingStatsColumns": ",".join(table.statistics_columns()),
            # A Databricks workspace or cluster may set these for all new tables. Readers of plain files refuse tables
            # with the first, and do not find columns and files under the names that the others give them.
            "delta.enableDeletionVectors": "false",
            "delta.columnMapping.mode": "none",
            "delta.randomizeFilePrefixes": "false",
            **table.properties,
        }
        for name, value in properties.items():
            builder = builder.property(name, value)
        return builder

    def _refuse_other_columns(self, table: Table) -> None:
        found, wanted = self.latest(table).schema, table.schema()
        has, needs = ([(f.name, f.dataType) for f in schema] for schema in (found, wanted))
        if has != needs:
            if table.name not in ONLY_HERE:
                what = f"move that folder away and run `trailvec {table.stage}` again"
            elif not all(column in needs for column in has):  # a later version's, most likely
                what = (
                    "deploy the version that wrote it, or a later one, or do what its CHANGELOG says of this table "
                    f"({_NEVER_MOVED})"
                )
            elif table.stage == "ingest":
                what = "rebuild the events as in Backfill in docs/operations.md"
            else:
                what = (
                    "give it those in docs/tables.md, in that order, by ALTER TABLE (ADD COLUMN, ALTER COLUMN ... "
                    f"AFTER; {_NEVER_MOVED})"
                )
            raise TrailvecError(
                f"table {table.name} at {self.path(table)} has the columns of another version of trailvec "
                f"({', '.join(found.names)}): {what}"
            )

    def _clear_log(self, table: Table) -> None:
        """Removes a log without commits, as left by a kill between the creation of its folder and the first commit:
        with it, Delta can neither read nor create the table. It holds at most a half-written commit that nobody has
        seen.
        (Another job may be about to commit there: a folder that holds a commit is never removed.)"""
        log = self.folder(table) / "_delta_log"
        for part in log.glob(".*"):
            part.unlink(missing_ok=True)
        for folder in (log / "_commits", log):  # Delta creates both before it commits
            with contextlib.suppress(OSError):
                folder.rmdir()

    def commit(self, table: Table, write: Callable[[], Any]) -> None:
        """One commit to the table; retries after a conflict with another job (maintain_tables, say).

        Raises:
            one of CONFLICTS: all five attempts conflicted, with 15 to 30 seconds of waiting in all.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                write()
                self._history.pop(table.name, None)
                return
            except CONFLICTS:
                if attempt == _ATTEMPTS:
                    raise
                time.sleep(2**attempt * random.uniform(0.5, 1))  # noqa: S311 - spreads the two, nothing secret

    # ---- upkeep ----------------------------------------------------------------------------------

    def cluster(self, table: Table, by: Sequence[str]) -> None:
        """Sets the table's clustering columns, by which OPTIMIZE puts rows with close values into the same files;
        empty turns clustering off. A table without `cluster_by` stays as it is."""
        if table.cluster_by and self._clustered_by(table) != list(by):
            columns = f"({', '.join(by)})" if by else "NONE"
            self.commit(table, lambda: self.spark.sql(f"ALTER TABLE {self.sql_name(table)} CLUSTER BY {columns}"))

    def _clustered_by(self, table: Table) -> list[str]:
        return list(self.detail(table, "clusteringColumns"))

    def detail(self, table: Table, name: str) -> Any:
        """What Delta's DESCRIBE DETAIL says under that name, such as the table's `properties`, a dict of texts."""
        return DeltaTable.forPath(self.spark, self.path(table)).detail().select(name).collect()[0][0]

    def purge(self, table: Table, where: str | None = None) -> None:
        """Rewrites the files in which deletion vectors hide rows, so that no file of the newest version holds them.

        Files without hidden rows stay, except those that MERGE wrote into a table with a change data feed: these have a
        column that the table lacks, and are rewritten too. Each file is rewritten on its own; by default Delta would
        pack them into files of 1 GB, each written by one task.

        This turns the table's clustering off until `maintain_tables` turns it on again: in a clustered table Delta does
        not rewrite the files of a full cube or of a single one, and their hidden rows would stay.

        Args:
            where: a condition over the partition columns; SQL, from code, never from input. None: all partitions.
        """
        of = f"WHERE {where} " if where else ""
        while True:
            self.cluster(table, ())
            with spark_conf(self.spark, {"spark.databricks.delta.optimize.maxFileSize": "1"}):
                self.commit(table, lambda: self.spark.sql(f"REORG TABLE {self.sql_name(table)} {of}APPLY (PURGE)"))
            # Else `maintain_tables` turned clustering on again meanwhile, and the purge may have skipped files.
            if not (table.cluster_by and self._clustered_by(table)):
                return
