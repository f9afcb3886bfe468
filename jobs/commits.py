"""What Delta's log says about a table: its commits, which stage made them, and whether they changed rows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs.files import HadoopPath, Place, lines_of
from training.urls import is_mount

_COMMIT_INFO, _METADATA = '{"commitInfo"', '{"metaData"'
KEEP_DAYS = "keep_days"  # marks, in its note, a commit that deletes rows for their age
_HISTORY = 5_000  # newest commits of a table that are read; a stage further behind rebuilds its table
UNMAPPED = "REMOVE COLUMN MAPPING"  # delta.columnMapping.mode = none
# Operations that rewrite or drop files or change the table's metadata, but no rows.
_UPKEEP = {
    *("OPTIMIZE", "REORG", "VACUUM START", "VACUUM END", "CLUSTER BY", "SET TBLPROPERTIES", "UNSET TBLPROPERTIES"),
    *("UPGRADE PROTOCOL", UNMAPPED, "ADD COLUMNS", "CHANGE COLUMN", "ADD CONSTRAINT", "DROP CONSTRAINT"),
}


@dataclass(frozen=True)
class Commit:
    """One commit of a table.

    Attributes:
        committed_at: seconds since 1970.
        operation: Delta's name for it: WRITE, MERGE, OPTIMIZE, ...
        changed_rows: False for upkeep (OPTIMIZE and the like), and for a commit that only records that a stage ran.
        replaced_all: it was an overwrite: of all rows, or of those that a condition or some partitions hold.
        provenance: what trailvec stored about the run that made it (`Runtime.provenance`); None: it was not trailvec.
        foreign: it changed rows, and trailvec did not make it: a RESTORE, a DELETE by SQL, another writer.
        erasure: the id of the erasure that it is part of; None: it is part of none.
        housekeeping: it deleted rows for an erasure, or for their age. The table's stage ignores such commits: the
            remaining rows are as it wrote them, so it can continue from its own last commit.
        rows_deleted: how many rows a MERGE deleted.
    """

    version: int
    committed_at: float
    operation: str
    changed_rows: bool
    replaced_all: bool
    provenance: dict[str, Any] | None
    foreign: bool
    erasure: str | None
    housekeeping: bool
    rows_deleted: int


def _commit_of(version: int, info: dict[str, Any]) -> Commit:
    """From the commitInfo in Delta's log."""
    metrics, parameters = info.get("operationMetrics") or {}, info.get("operationParameters") or {}
    mode, operation = parameters.get("mode"), info.get("operation")
    changes = [n for n in metrics if n in ("numTargetRowsInserted", "numTargetRowsUpdated", "numTargetRowsDeleted")]
    if operation == "WRITE" and mode == "Append":
        changes = ["numOutputRows"]
    elif operation in {"DELETE", "UPDATE"}:  # without row counts in the metrics, whole files were removed
        changes = ["numRemovedFiles", *(n for n in metrics if n in {"numDeletedRows", "numUpdatedRows"})]
    empty = bool(changes) and all(metrics.get(name, "1") == "0" for name in changes)
    provenance = _provenance(info.get("userMetadata") or "")
    note = (provenance or {}).get("note") or {}
    changed_rows = operation not in _UPKEEP and not empty
    return Commit(
        version=version,
        committed_at=info["timestamp"] / 1000,
        operation=str(operation),
        changed_rows=changed_rows,
        replaced_all=mode == "Overwrite",
        provenance=provenance,
        foreign=changed_rows and provenance is None and operation != "CREATE TABLE",
        erasure=note.get("erasure"),
        housekeeping=not note.keys().isdisjoint(("erasure", KEEP_DAYS)),
        rows_deleted=int(metrics.get("numTargetRowsDeleted") or 0),
    )


def newer_than(commits: Iterable[Commit], version: int) -> Iterator[Commit]:
    """Those of a table's commits, given newest first, that came after that version; lazily."""
    return itertools.takewhile(lambda commit: commit.version > version, commits)


def _provenance(text: str) -> dict[str, Any] | None:
    """The provenance that a stage stored in its commit; None for what others stored there, in whatever form."""
    try:
        said = json.loads(text)
    except ValueError:
        return None
    return said if isinstance(said, dict) and {"stage", "reads"} <= said.keys() else None


class History:
    """A table's commits, newest first, from the one that was newest when this was created. Each is read from the log's
    files on first use.

    (Delta's own history() costs a Spark job or two, and a stage asks a dozen times. A local log is read without Java, a
    hundred calls less. But a mount may show late what Spark has written, and elsewhere Spark may mean another file.)
    """

    def __init__(self, table: Place) -> None:
        is_local = isinstance(table, Path) and not is_mount(table) and (table / "_delta_log").is_dir()
        self._folder = (table if is_local else HadoopPath(str(table))) / "_delta_log"
        self._read: list[Commit] = []
        self.newest = self._newest()

    def __iter__(self) -> Iterator[Commit]:
        for place in range(min(self.newest + 1, _HISTORY)):
            if place == len(self._read):  # not read yet, by another iterator either
                version = self.newest - place
                lines = self._lines(f"{version:020}.json")
                info = next((line for line in lines if line.startswith(_COMMIT_INFO)), None)
                if info is None:  # older commits have been cleaned from the log
                    return
                self._read.append(_commit_of(version, json.loads(info)["commitInfo"]))
            yield self._read[place]

    @cached_property
    def table_id(self) -> str | None:
        """Delta's id of the table; it changes when the table is dropped and recreated. None: the log does not say."""
        made = next((line for line in self._lines(f"{0:020}.json") if line.startswith(_METADATA)), None)
        if made is not None:
            return str(json.loads(made)["metaData"]["id"])
        # The first commit is no longer in the log, but the checksum file that Spark writes beside each commit holds the
        # id too. The newest may be missing: not all writers make one, and a kill may come between the two.
        checksums = (self._lines(f"{version:020}.crc") for version in range(self.newest, max(self.newest - 10, -1), -1))
        said = next(itertools.chain.from_iterable(checksums), "{}")
        table_id = (json.loads(said).get("metadata") or {}).get("id")
        return None if table_id is None else str(table_id)

    def _newest(self) -> int:
        # At most a few commits follow the last checkpoint.
        try:
            version = int(json.loads(next(self._lines("_last_checkpoint"), '{"version": 0}'))["version"])
        except ValueError:  # half written: Delta overwrites it in place
            version = 0
        if version == 0 and not (self._folder / f"{0:020}.json").exists():
            # No checkpoint was read, and the first commits have been cleaned from the log.
            version = max((int(file.name[:20]) for file in self._folder.glob("?" * 20 + ".json")), default=0)
        while (self._folder / f"{version + 1:020}.json").exists():
            version += 1
        return version

    def _lines(self, name: str) -> Iterator[str]:
        file = self._folder / name
        return lines_of(file) if file.exists() else iter(())
