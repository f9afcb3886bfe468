"""`trailvec audit`: who ran what and when, from the logs of all tables (Delta's history and the provenance in it).

A table's log keeps a commit for 30 days (Delta's default), and at most 5,000 commits of a table are read. To keep the
audit trail for longer, store the output (`--json`) where it can't be changed.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from itertools import takewhile
from typing import Any

from rich.table import Table as Grid

from jobs.cli import table_console
from jobs.commits import Commit
from jobs.errors import TrailvecError
from jobs.runtime import Runtime
from jobs.tables import TABLES

_A_DAY = 86_400  # seconds; a commit's time is its writer's, whose clock may be behind


def audit(runtime: Runtime, table: str | None = None, since: datetime | None = None) -> list[dict[str, Any]]:
    """One dictionary per commit, newest first.

    Keys: at (UTC, ISO 8601), table, version, operation (Delta's), changed_rows. Also, None if no trailvec stage made
    the commit (upkeep, other programs): stage, user, application (Spark's application id; on YARN, YARN's),
    code_version, erasure (the id of the request, if it is part of one).

    Args:
        table: only this table's commits.
        since: only commits at or after this time; UTC if it has no time zone.
    """
    if since is not None and since.tzinfo is None:
        since = since.replace(tzinfo=timezone.utc)

    earliest = 0.0 if since is None else since.timestamp()
    found = [
        _entry(one.name, commit)
        for one in TABLES
        if table in (None, one.name)
        for commit in takewhile(lambda commit: commit.committed_at >= earliest - _A_DAY, runtime.commits(one))
        if commit.committed_at >= earliest
    ]
    return sorted(found, key=lambda entry: (entry["at"], entry["table"], entry["version"]), reverse=True)


def _entry(table: str, commit: Commit) -> dict[str, Any]:
    at = datetime.fromtimestamp(commit.committed_at, timezone.utc)
    provenance = commit.provenance or {}
    return {
        "at": at.isoformat(timespec="milliseconds"),
        "table": table,
        "version": commit.version,
        "operation": commit.operation,
        "changed_rows": commit.changed_rows,
        **{key: provenance.get(key) for key in ("stage", "user", "application", "code_version")},
        "erasure": commit.erasure,
    }


def print_audit(runtime: Runtime, table: str | None, since: str | None, as_json: bool) -> None:
    """Prints `audit` as a table, or as one JSON array.

    Raises:
        TrailvecError: `since` is not a time.
    """
    try:
        earliest = None if since is None else datetime.fromisoformat(since)
    except ValueError as error:
        raise TrailvecError(f"--since {since} is not a time: write it as 2026-01-31 or 2026-01-31T12:00:00Z") from error
    entries = audit(runtime, table, earliest)
    if as_json:
        print(json.dumps(entries, indent=2))
        return
    grid = Grid(caption=f"{len(entries):,} commits under {runtime.place / 'tables'}")
    for heading in ("when (UTC)", "table", "version", "what", "stage", "user", "run", "code"):
        grid.add_column(heading, justify="right" if heading == "version" else "left", no_wrap=heading != "run")
    for entry in entries:
        grid.add_row(
            entry["at"][:19].replace("T", " "),
            entry["table"],
            str(entry["version"]),
            entry["operation"] if entry["changed_rows"] else f"{entry['operation']} (no rows)",
            f"erasure {entry['erasure'][:8]}" if entry["erasure"] else entry["stage"] or "-",
            entry["user"] or "-",
            entry["application"] or "-",
            entry["code_version"] or "-",
        )
    table_console(piped_width=200).print(grid)
