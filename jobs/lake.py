"""The only place that knows paths: where everything lies, and how its Delta tables are made, read and committed to."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from delta import exceptions
from delta.tables import DeltaTable, DeltaTableBuilder
from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession

from jobs.commits import Commit, History
from jobs.config import Config
from jobs.errors import TrailvecError
from jobs.files import Place, place_of
from jobs.spark_session import spark_conf, start_spark
from jobs.tables import CURRENT_MODEL, Table

# Another job committed in the meantime. In Python these have no base of their own, as they have in Java.
CONFLICTS = (
    exceptions.ConcurrentAppendException,
    exceptions.ConcurrentDeleteDeleteException,
    exceptions.ConcurrentDeleteReadException,
    exceptions.ConcurrentTransactionException,
    exceptions.ConcurrentWriteException,
    exceptions.MetadataChangedException,
    exceptions.ProtocolChangedException,
)
_ATTEMPTS = 5  # at a commit that another job's commit got in the way of


class Lake:
    """Tables, models and exports of one configuration, whoever reads or writes them."""

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

    @property
    def place(self) -> Place:
        """The folder that holds everything trailvec writes."""
        return self.place_of(self.config.storage.root)

    def place_of(self, text: str) -> Place:
        """A folder that the configuration names."""
        place = place_of(text)
        return place if isinstance(place, Path) else place.qualified(self.spark)

    @property
    def root(self) -> Path:
        """The same, for what needs it on a local disk: the database of tune.

        Raises:
            TrailvecError: it is not local.
        """
        root = place_of(self.config.storage.root)
        if not isinstance(root, Path):
            raise TrailvecError(
                f"storage.root = {root}, but tune keeps its trials in a database on a local disk: copy sequences, "
                f"items and context_values into a local storage.root and search there"
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
        """What a stage lays down while it runs, user ids among it: `of` exports, erasures, labels or neighbours."""
        return self.place / f".{of}.staging"

    def exists(self, table: Table) -> bool:
        return bool(DeltaTable.isDeltaTable(self.spark, self.path(table)))

    def sql_name(self, table: Table) -> str:
        """The table in SQL."""
        return f"delta.`{self.path(table).replace('`', '``')}`"

    # ---- what is there ---------------------------------------------------------------------------

    def latest(self, table: Table) -> DataFrame:
        """The table as it is now; for a stage that reads what it writes itself."""
        return self.spark.read.format("delta").load(self.path(table))

    def at(self, table: Table, version: int) -> DataFrame:
        """The table as it was at a Delta version whose files are still there."""
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
        """The newest version that changed rows, and not for an erasure or for their age; -1: there is none."""
        self.latest_version(table)  # looks the commits up anew
        return next((c.version for c in self._commits(table) if c.changed_rows and not c.housekeeping), -1)

    def commits(self, table: Table) -> Iterable[Commit]:
        """The table's commits, newest first, as far back as its log is kept (at most 5,000); none where it is not."""
        return self._commits(table) if self.exists(table) else ()

    def _commits(self, table: Table) -> History:
        """The table's commits; looked up once until the next commit through this lake."""
        if table.name not in self._history:
            self._history[table.name] = History(self.path(table))
        return self._history[table.name]

    def noted(self, table: Table) -> Iterator[dict[str, Any]]:
        """The provenance of those of the table's commits that a stage gave a `note`, newest first, read as far as
        asked for. It ends where something other than trailvec changed rows: what earlier notes say no longer holds."""
        ours = takewhile(lambda commit: not commit.foreign, self.commits(table))
        stages = (c.provenance for c in ours if c.provenance is not None and not c.housekeeping)
        return (provenance for provenance in stages if "note" in provenance)

    def erasure_commits(self, table: Table, erasure: str, after: int, since: float) -> list[Commit]:
        """The table's commits of that erasure, newest first: those after a version that were not made before a time
        (seconds since 1970). The log is read no further back."""
        newer = takewhile(lambda commit: commit.version > after and commit.committed_at >= since, self._commits(table))
        return [commit for commit in newer if commit.erasure == erasure]

    def last_writer(self, table: Table) -> dict[str, Any] | None:
        """The provenance of the table's newest commit that trailvec made, without those that are `Commit.housekeeping`.

        None: there is none, or something other than trailvec has changed rows since (a RESTORE, say), so that they are
        not what that commit wrote.
        """
        if not self.exists(table):
            return None
        told = (c for c in self._commits(table) if c.foreign or (c.provenance is not None and not c.housekeeping))
        return next((c.provenance for c in told), None)

    def newest_current_model(self) -> str | None:
        """The current model's version now, whatever the stage pinned and the configuration asks for; None: none yet."""
        if not self.exists(CURRENT_MODEL):
            return None
        return next((str(row["model_version"]) for row in self.latest(CURRENT_MODEL).collect()), None)

    # ---- making and committing -------------------------------------------------------------------

    def create(self, table: Table) -> None:
        """Makes the table, empty, where it does not exist: types, NOT NULL, comments, partitions.

        Raises:
            TrailvecError: it exists with other columns.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            if self.exists(table):
                self._refuse_other_columns(table)
                return
            try:
                self.commit(self._builder(table).execute)
                return
            except (AnalysisException, Py4JJavaError):
                # Another job makes it at this moment, or was killed as it did. No long waits: a full disk comes this
                # way too, and is to be said within seconds.
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
        statistics = {"delta.dataSkippingStatsColumns": ",".join(table.statistics_columns())}
        for name, value in {**statistics, **table.properties}.items():
            builder = builder.property(name, value)
        return builder

    def _refuse_other_columns(self, table: Table) -> None:
        found, wanted = self.latest(table).schema, table.schema()
        if [(f.name, f.dataType) for f in found] != [(f.name, f.dataType) for f in wanted]:
            raise TrailvecError(
                f"table {table.name} at {self.path(table)} has the columns of another version of trailvec "
                f"({', '.join(found.names)}): move that folder away and run `trailvec {table.stage}` again"
            )

    def _clear_log(self, table: Table) -> None:
        """Removes a log without a commit: what a kill between the making of its folder and the first commit leaves, and
        Delta neither reads nor creates. At most a half-written commit lies in it, which nobody has ever seen.
        (Another job may be about to commit there: a folder that holds a commit is not removed, whoever made it.)"""
        log = self.folder(table) / "_delta_log"
        for part in log.glob(".*"):
            part.unlink(missing_ok=True)
        for folder in (log / "_commits", log):  # Delta makes both before it commits
            with contextlib.suppress(OSError):
                folder.rmdir()

    def commit(self, write: Callable[[], Any]) -> None:
        """One commit to a table; tries again where another job (maintain_tables, say) got in its way.

        Raises:
            one of CONFLICTS: it did so five times, 15 to 30 seconds of waiting in all.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                write()
                self._history = {}
                return
            except CONFLICTS:
                if attempt == _ATTEMPTS:
                    raise
                time.sleep(2**attempt * random.uniform(0.5, 1))  # noqa: S311 - spreads the two, nothing secret

    # ---- upkeep ----------------------------------------------------------------------------------

    def cluster(self, table: Table, by: Sequence[str]) -> None:
        """Has Delta's OPTIMIZE lay rows of like values of `by` into the same files from now on (none: no more). A table
        without `cluster_by` stays as it is."""
        if table.cluster_by and self._clustered_by(table) != list(by):
            columns = f"({', '.join(by)})" if by else "NONE"
            self.commit(lambda: self.spark.sql(f"ALTER TABLE {self.sql_name(table)} CLUSTER BY {columns}"))

    def _clustered_by(self, table: Table) -> list[str]:
        columns = DeltaTable.forPath(self.spark, self.path(table)).detail().select("clusteringColumns")
        return list(columns.collect()[0][0])

    def purge(self, table: Table, where: str | None = None) -> None:
        """Rewrites the files in which deletion vectors hide rows, so that no file of the newest version holds them.

        Files without hidden rows stay, but for those that MERGE wrote into a table with a change data feed: they have a
        column that the table lacks, and are rewritten too. Each file is rewritten by itself; by default Delta would
        pack them into files of 1 GB, each written by one task.

        The table's clustering is turned off, until `maintain_tables` turns it on again: in a clustered table Delta does
        not rewrite the files of a full cube, or of an only one, and their hidden rows would stay.

        Args:
            where: a condition over the partition columns; SQL, from code, never from input. None: all partitions.
        """
        of = f"WHERE {where} " if where else ""
        while True:
            self.cluster(table, ())
            with spark_conf(self.spark, {"spark.databricks.delta.optimize.maxFileSize": "1"}):
                self.commit(lambda: self.spark.sql(f"REORG TABLE {self.sql_name(table)} {of}APPLY (PURGE)"))
            # Otherwise `maintain_tables` turned it on again meanwhile, and the purge may have left files out.
            if not (table.cluster_by and self._clustered_by(table)):
                return
