"""maintain_tables: upkeep of every table. Not a stage of the pipeline: a separate job, run weekly, say.

trailvec maintain_tables --conf conf/local.toml [--table events] [--dry-run] [--json]

For each table, in commits that change no row, so that they give no stage more to do (only DELETE, which is opt-in,
changes rows):

- DELETE removes the rows older than `maintain.keep_days` allows; sessions, sequences and whatever else is made from
  events follow in the next run of their stages.
- OPTIMIZE packs small files up to `maintain.target_file_mb`, and clusters the tables that have `cluster_by`. A file of
  at least half that size is left alone, so that a byte is rewritten a few times, not every week. In a clustered table
  Delta packs whole cubes: new files, together with every cube smaller than 16 files of the target size. (Delta's
  default cube is 100 GB, and a smaller table would be rewritten in full each time.)
- VACUUM deletes the files that no version of the last `maintain.retention_hours` holds. The one rule for readers:
  whoever pins a version has that long to read it. A training reads the files of one snapshot until it ends, also when
  it resumes after a kill, so it must end within the retention. The retention is also set in the table's properties,
  because Delta's log forgets a removed file after that time, and VACUUM deletes what the log has forgotten.
- No ANALYZE: Delta keeps each file's minimum and maximum values and row count, and uses them to skip files, answer
  count(*) and size joins; only Spark's cost-based optimiser, which is off, would read ANALYZE's statistics. Delta also
  writes the checkpoints of its log by itself.

It may run concurrently with the other jobs: when two commits conflict, the later one is retried, by either job.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import deltalake
import pyarrow as pa
from delta.tables import DeltaTable
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from rich import box
from rich.filesize import decimal
from rich.table import Table as Grid

from jobs.cli import stage_main, table_console
from jobs.commits import KEEP_DAYS
from jobs.errors import TrailvecError
from jobs.files import file_sizes
from jobs.lake import CONFLICTS
from jobs.runtime import Runtime, Stage
from jobs.spark_session import spark_conf
from jobs.tables import TABLES, Table

MB, GB = 2**20, 2**30
_SMALL = 8  # a file under an eighth of the target is small
_CUBE_FILES = 16  # a cube of this many files of the target size is full: no longer packed
_RETENTION = "delta.deletedFileRetentionDuration"


def maintain(runtime: Runtime, names: Sequence[str] = (), dry_run: bool = False) -> list[dict[str, Any]]:
    """One dictionary per existing table (only those in `names`, if given), in the order of TABLES.

    Keys: table; rows; rows_hidden (deleted by deletion vectors, but still in files); bytes, files, small_files of the
    current version; bytes_on_disk (including older versions' files); these four also with `_before` unless `dry_run`;
    usd_per_month (cost of bytes_on_disk at maintain.usd_per_gb_month); bytes_freed; rows_too_old (deleted, or with
    `dry_run` to be deleted); seconds; conflict (True if upkeep gave up after repeated conflicts with other jobs).
    """
    found: list[dict[str, Any]] = []
    stage = Stage("maintain_tables", "", lambda r: found.extend(_maintain(r, names, dry_run)))
    runtime.execute(stage)  # as a stage, so that its commits have provenance
    return found


def _maintain(runtime: Runtime, names: Sequence[str], dry_run: bool) -> Iterator[dict[str, Any]]:
    keep_days = runtime.config.maintain.keep_days
    for table in TABLES:
        if (names and table.name not in names) or not runtime.exists(table):
            continue
        started = time.monotonic()
        entry: dict[str, Any] = {"table": table.name}
        before, disk_before = measure(runtime, table), disk_files(runtime, table)
        after, disk_after, conflict = before, disk_before, False
        days = keep_days.get(table.name)
        old = too_old(table, days)
        entry["rows_too_old"] = 0 if old is None else runtime.latest(table).where(old).count()
        if not dry_run:
            try:
                if old is not None and entry["rows_too_old"]:
                    runtime.delete(table, old, note={KEEP_DAYS: days})
                if entry["rows_too_old"] or (before["rows_hidden"] and only_hidden(runtime, table)):
                    runtime.purge(table)  # else deletion vectors would only hide the rows
                compact(runtime, table)
                vacuum(runtime, table)
            except CONFLICTS:
                conflict = True
            after, disk_after = measure(runtime, table), disk_files(runtime, table)
            entry |= {f"{key}_before": before[key] for key in ("bytes", "files", "small_files")}
            entry["bytes_on_disk_before"] = sum(disk_before.values())
        entry |= after | {
            "bytes_on_disk": (on_disk := sum(disk_after.values())),
            "usd_per_month": on_disk / GB * runtime.config.maintain.usd_per_gb_month,
            "bytes_freed": sum(size for file, size in disk_before.items() if file not in disk_after),
            "seconds": round(time.monotonic() - started, 3),
            "conflict": conflict,
        }
        yield entry


def too_old(table: Table, days: int | None) -> Column | None:
    """True for rows from before the last `days` whole days and today (UTC); None: no row is too old."""
    if table.ages_by is None or days is None:
        return None
    today = datetime.now(timezone.utc).replace(hour=0, minute=0, second=0, microsecond=0)
    return F.col(table.ages_by) < F.lit(today - timedelta(days=days))


def only_hidden(runtime: Runtime, table: Table) -> bool:
    """Whether rows were deleted for their age or for an erasure and not purged since: a kill came in between."""
    commits = (commit for commit in runtime.commits(table) if commit.housekeeping or commit.operation == "REORG")
    last = next(commits, None)
    return last is not None and last.housekeeping


def measure(runtime: Runtime, table: Table) -> dict[str, int]:
    """rows, rows_hidden, bytes, files and small_files of the current version, from the log: no data file is read."""
    version = runtime.latest_version(table)
    sizes, records = [], []
    for file in active_files(runtime, table, version):
        sizes.append(file["size_bytes"])
        records.append(file["num_records"] or 0)
    rows = runtime.at(table, version).count()
    small = runtime.config.maintain.target_file_mb * MB / _SMALL
    return {
        "rows": rows,
        "rows_hidden": sum(records) - rows,
        "bytes": sum(sizes),
        "files": len(sizes),
        "small_files": sum(size < small for size in sizes),
    }


def active_files(runtime: Runtime, table: Table, version: int) -> list[dict[str, Any]]:
    """path (in the table's folder), size_bytes and num_records (including deleted ones) of each file of the version."""
    if isinstance(runtime.place, Path):
        actions = deltalake.DeltaTable(runtime.path(table), version).get_add_actions(flatten=True)
        return pa.table(actions).select(["path", "size_bytes", "num_records"]).to_pylist()  # type: ignore[no-any-return]
    # delta-rs does not support hdfs://, and for other stores it would need the settings that Spark has.
    log: Any = runtime.spark._jvm.org.apache.spark.sql.delta.DeltaLog  # type: ignore[union-attr]
    log = log.forTable(runtime.spark._jsparkSession, runtime.path(table))
    rest = [getattr(log, f"getSnapshotAt$default${number}")() for number in (2, 3)]
    files = DataFrame(log.getSnapshotAt(version, *rest).allFiles().toDF(), runtime.spark)
    records = F.get_json_object("stats", "$.numRecords").cast("bigint")
    named = files.select("path", F.col("size").alias("size_bytes"), records.alias("num_records"))
    return [row.asDict() for row in named.collect()]


def disk_files(runtime: Runtime, table: Table) -> dict[str, int]:
    """File → size in bytes, in the table's folder, without the log and local checksum files."""
    return file_sizes(runtime.folder(table), without="_delta_log")


def compact(runtime: Runtime, table: Table) -> None:
    """OPTIMIZE; commits nothing if there is nothing to pack."""
    target = runtime.config.maintain.target_file_mb * MB
    settings = {
        "maxFileSize": str(target),
        "minFileSize": str(max(1, target // 2)),
        "clustering.mergeStrategy.minCubeSize.threshold": str(max(1, target * _CUBE_FILES)),
    }
    delta = DeltaTable.forPath(runtime.spark, runtime.path(table))
    # A full overwrite (in Delta 3.3.3) or a purge turns clustering off, and OPTIMIZE would then only pack files.
    runtime.cluster(table, table.cluster_by)
    with spark_conf(runtime.spark, {f"spark.databricks.delta.optimize.{k}": v for k, v in settings.items()}):
        runtime.commit(table, lambda: delta.optimize().executeCompaction())


def vacuum(runtime: Runtime, table: Table) -> None:
    """VACUUM: deletes files that no version within the retention holds, and equally old ones that none ever held."""
    delta = DeltaTable.forPath(runtime.spark, runtime.path(table))
    hours = runtime.config.maintain.retention_hours_for(table.name)
    retention = f"interval {round(hours * 60)} minutes"
    if runtime.detail(table, "properties").get(_RETENTION) != retention:
        set_it = f"ALTER TABLE {runtime.sql_name(table)} SET TBLPROPERTIES ('{_RETENTION}' = '{retention}')"
        runtime.commit(table, lambda: runtime.spark.sql(set_it))
    settings = {
        # Two commits per VACUUM would in time push the stages' commits out of the history that trailvec reads.
        "spark.databricks.delta.vacuum.logging.enabled": "false",
        # By default VACUUM runs 10,000 tasks in each of its steps, however small the table (140,000 in all).
        "spark.sql.sources.parallelPartitionDiscovery.parallelism": str(runtime.spark.sparkContext.defaultParallelism),
    }
    with spark_conf(runtime.spark, settings), jvm_console(runtime.spark):
        delta.vacuum()


@contextmanager
def jvm_console(spark: SparkSession) -> Iterator[Any]:
    """Redirects what Scala prints (VACUUM does) to the stream it yields: stdout may be read as JSON."""
    jvm: Any = spark._jvm
    console = jvm.java.lang.Class.forName("scala.Console$").getField("MODULE$").get(None)
    stdout, printed = console.out(), jvm.java.io.ByteArrayOutputStream()
    console.setOutDirect(jvm.java.io.PrintStream(printed))
    try:
        yield printed
    finally:
        console.setOutDirect(stdout)


def run_maintain(runtime: Runtime, names: Sequence[str], dry_run: bool, as_json: bool) -> None:
    """Maintains the tables and prints the report: a table, or one JSON array.

    Raises:
        TrailvecError: every attempt at some table conflicted with other jobs; the other tables are done.
    """
    entries = maintain(runtime, names, dry_run)
    if as_json:
        print(json.dumps(entries, indent=2))
    else:
        _print(runtime, entries)
    if busy := [entry["table"] for entry in entries if entry["conflict"]]:
        raise TrailvecError(
            f"other jobs committed to {', '.join(busy)} each time that upkeep tried to: run `trailvec maintain_tables` "
            f"again when they have ended; the other tables are done"
        )


def _print(runtime: Runtime, entries: list[dict[str, Any]]) -> None:
    settings, cost = runtime.config.maintain, sum(entry["usd_per_month"] for entry in entries)
    grid = Grid(
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),  # fits in 100 columns
        caption=f"under {runtime.place / 'tables'}; small: under {settings.target_file_mb / _SMALL:g} MB; on disk: "
        f"{cost:,.2f} USD a month in all, at {settings.usd_per_gb_month:g} a GB (maintain.usd_per_gb_month)",
    )
    grid.add_column("table", no_wrap=True)
    for heading in ("rows", "too old", "hidden", "size", "files", "small", "on disk", "freed", "USD"):
        grid.add_column(heading, justify="right", overflow="fold")
    for entry in entries:
        files, before = entry["files"], entry.get("files_before", entry["files"])
        share = entry["small_files"] / files if files else 0
        grid.add_row(
            entry["table"],
            f"{entry['rows']:,}",
            f"{entry['rows_too_old']:,}",
            f"{entry['rows_hidden']:,}",
            decimal(entry["bytes"]),
            f"{files:,}" if before == files else f"{before:,} → {files:,}",
            f"{share:.0%}",
            decimal(entry["bytes_on_disk"]),
            decimal(entry["bytes_freed"]),
            f"{entry['usd_per_month']:,.2f}",
        )
    console = table_console()
    # A narrow terminal breaks its lines, which can be made wider again; rich would break or cut each number.
    needed = console.measure(grid, options=console.options.update(max_width=1_000)).maximum
    console.width = max(console.width, needed)
    console.print(grid)


def main() -> None:
    stage_main("maintain_tables")


if __name__ == "__main__":
    main()
