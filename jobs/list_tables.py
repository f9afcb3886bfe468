"""`trailvec tables`: every table with its location, rows, Delta version, size and last writer."""

from __future__ import annotations

import json
from typing import Any

from delta.tables import DeltaTable
from rich.filesize import decimal
from rich.table import Table as Grid

from jobs.cli import table_console
from jobs.runtime import Runtime
from jobs.sql_names import tables_to_see
from jobs.tables import TABLES


def list_tables(runtime: Runtime) -> list[dict[str, Any]]:
    """One dictionary per table, in the order of TABLES.

    Keys: table, stage (the one that writes it), location, exists (None: not to be seen, since this user may not look
    into its folder); and if it exists: rows, version (Delta's), bytes and
    files (of the current version), written_at (UTC, ISO 8601), last_writer (see `Lake.last_writer`: stage and
    code_version, or None).
    """
    found, seen = [], tables_to_see(runtime)
    for table in TABLES:
        entry: dict[str, Any] = {"table": table.name, "stage": table.stage, "location": runtime.path(table)}
        entry["exists"] = seen[table.name]
        if entry["exists"]:
            delta = DeltaTable.forPath(runtime.spark, runtime.path(table))
            detail = delta.detail().select("sizeInBytes", "numFiles").collect()[0]
            # Formatted by Spark: a collected timestamp would be in this machine's time zone.
            commit = delta.history(1).selectExpr(
                "version", "date_format(timestamp, \"yyyy-MM-dd'T'HH:mm:ss'Z'\") AS written_at"
            )
            writer = runtime.last_writer(table)
            entry |= {
                "rows": delta.toDF().count(),
                **commit.collect()[0].asDict(),
                "bytes": detail["sizeInBytes"],
                "files": detail["numFiles"],
                "last_writer": writer and {key: writer[key] for key in ("stage", "code_version")},
            }
        found.append(entry)
    return found


def print_tables(runtime: Runtime, as_json: bool) -> None:
    """Prints `list_tables` as a table, or as one JSON array."""
    entries = list_tables(runtime)
    if as_json:
        print(json.dumps(entries, indent=2))
        return
    grid = Grid(caption=f"under {runtime.place / 'tables'}")
    for heading in ("table", "rows", "version", "size", "files", "written (UTC)", "by"):
        numeric = heading in ("rows", "version", "size", "files")
        grid.add_column(heading, justify="right" if numeric else "left", no_wrap=numeric or heading == "table")
    for entry in entries:
        if entry["exists"] is None:
            grid.add_row(entry["table"], *["-"] * 4, "no access", "-", style="dim")
            continue
        if not entry["exists"]:
            grid.add_row(entry["table"], *["-"] * 4, "not created yet", f"run `trailvec {entry['stage']}`", style="dim")
            continue
        writer = entry["last_writer"]
        grid.add_row(
            entry["table"],
            f"{entry['rows']:,}",
            str(entry["version"]),
            decimal(entry["bytes"]),
            f"{entry['files']:,}",
            entry["written_at"].replace("T", " ").rstrip("Z"),
            f"{writer['stage']} {writer['code_version']}" if writer else "-",
        )
    table_console().print(grid)
