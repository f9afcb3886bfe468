"""ingest: files and topics → events, rejected_events.

Structured Streaming tracks progress: one checkpoint per input records which files (or offsets) were read, and each run
takes what is new (Trigger.AvailableNow). A batch is read (`jobs/raw_records.py`), checked (`jobs/checked_records.py`:
the source's mapping, and why a record is refused), deduplicated against itself and the table, and committed:
rejected_events first, under the batch's number, so that a replayed batch adds nothing; then events, by MERGE. After a
kill at any moment, the same command gives the result of an undisturbed run (docs/decisions/0007).

An exact repeat of an event, equal in every column, is dropped and not refused, however old the first copy. Among events
with one event_id and different content, the one with the smallest (event_ts, hash of content) is kept, in whatever
order they arrive, and the others are refused: duplicate_event_id. So records may arrive in any order, in any batches
and any number of times.

Records of users erased by erase_users, valid or not, are dropped and only counted.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date, datetime, timezone
from functools import reduce
from pathlib import Path
from typing import Any

from pyspark import StorageLevel
from pyspark.errors import StreamingQueryException
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from rich.filesize import decimal

from jobs.checked_records import ERASED, check_times, to_events, without_erased
from jobs.cli import stage_main
from jobs.config import IngestSettings, shipped
from jobs.errors import ANOTHER_INGEST, FETCH_AGAIN, TrailvecError, one_sentence
from jobs.files import Place, write_json
from jobs.pruning import id_ranges, within_days
from jobs.raw_records import LISTING, find_inputs, folder_of, is_data, read_raw, read_topic
from jobs.runtime import Runtime, Stage
from jobs.sources import Input, Kafka, Source, load_source
from jobs.spark_session import FEW, JSON_MICROSECONDS, persisted
from jobs.tables import EVENTS, REJECTED_EVENTS
from jobs.tombstones import erased_tests
from training.stores import remove_tree
from training.urls import file_url

REPEAT = "exact_repeat"  # not a refusal: the event is already stored
_NO_REFUSAL = {REPEAT: "exact repeats of an event", ERASED: "records of erased users"}

_STORED = "table events"  # the `file` of a row that is already in the table

# A larger file, in bytes, is not left to one task while cores are idle (a Parquet file of one row group always is one).
_ONE_TASK = 4_000_000


# ---- one event, one row -------------------------------------------------------------------------------


def mark_duplicates(records: DataFrame, duplicates: str) -> DataFrame:
    """`records`, of which one event per event_id is kept (per event_id and day if duplicates is "same_day"). The others
    get a reason: REPEAT if they equal the kept one in all columns, else duplicate_event_id. One shuffle.

    Args:
        records: the columns of `to_events`, and `stored`: the row is already in the table.
    """
    is_event = F.col("reason").isNull()
    # Maps can't be hashed, so they become arrays. xxhash64 skips NULLs, so isNull is hashed too. Older versions stored
    # empty maps where checked_records.py now gives NULL: both count as the same content.
    comparable = [
        F.when(F.size(c.name) > 0, F.sort_array(F.map_entries(c.name))) if c.type.startswith("map") else F.col(c.name)
        for c in EVENTS.columns
    ]
    content = F.xxhash64(*[part for column in comparable for part in (column, column.isNull())])
    # The id first: Spark sorts by the first bytes of the first key, and compares rows only where these are equal. The
    # hash, NULL for events, only spreads refused records evenly.
    key = [F.col("event_id"), F.when(~is_event, F.xxhash64("raw"))]
    same_id = Window.partitionBy(*key, *([F.to_date("event_ts")] if duplicates == "same_day" else []))
    # One order for all window functions: each different order would cost a sort.
    in_order = same_id.orderBy("event_ts", "content", F.desc("stored"))
    so_far = in_order.rowsBetween(Window.unboundedPreceding, Window.currentRow)
    ranked = records.withColumn("content", content).withColumns(
        {
            "kept_ts": F.first("event_ts").over(so_far),
            "kept_content": F.first("content").over(so_far),
            "place": F.row_number().over(in_order),
        }
    )
    is_kept = (F.col("event_ts") == F.col("kept_ts")) & (F.col("content") == F.col("kept_content"))
    conflicts = is_event & ~is_kept
    reason = (
        F.when(conflicts, F.lit("duplicate_event_id"))
        .when(is_event & (F.col("place") > 1), F.lit(REPEAT))
        .otherwise(F.col("reason"))
    )
    event = F.to_json(F.struct(*[c.name for c in EVENTS.columns]), JSON_MICROSECONDS)
    return ranked.withColumns({"raw": F.when(conflicts, event).otherwise(F.col("raw")), "reason": reason}).drop(
        "content", "kept_ts", "kept_content", "place"
    )


def same_ids(table: str, ids: Sequence[tuple[str, str]], days: Sequence[date] | None) -> Column:
    """A condition that holds for all rows of the events table that have an event_id of a batch. It uses only literals,
    so that Delta can skip files by their statistics.

    Args:
        table: the table's alias followed by a dot, or "".
        ids: ranges (first, last; inclusive) that hold the batch's event_ids. Ids that grow with time are in few files.
        days: the days on which such a row may be; None: any.
    """
    event_id = F.col(f"{table}event_id")
    condition = F.lit(False)
    for first, last in ids:
        condition |= event_id.between(first, last)
    return condition if days is None else condition & within_days(F.col(f"{table}event_ts"), days)


# ---- one batch ----------------------------------------------------------------------------------------


def commit_batch(
    runtime: Runtime, frames: list[DataFrame], batch: tuple[str, int], earlier: Counter[str | None], again: bool
) -> Counter[str | None]:
    """Deduplicates one batch of records, checks the share refused, and commits it.

    Args:
        frames: results of `to_events`.
        batch: its writer and number; rejected_events takes the rows of a batch only once.
        earlier: records per reason (None: events) in this run's earlier batches.
        again: the inputs are read again, so rejected_events may already hold what is refused.

    Returns:
        This batch's records per reason.

    Raises:
        TrailvecError: too large a share of the run's records is refused.
    """
    settings = runtime.config.ingest
    same_day = settings.duplicates == "same_day"
    incoming = without_erased(reduce(DataFrame.unionByName, frames), erased_tests(runtime))
    incoming = incoming.withColumn("stored", F.lit(False))
    with contextlib.ExitStack() as until_written:
        stored, where, few = None, F.lit(True), False
        if not runtime.latest(EVENTS).isEmpty():
            # Scanned for its ids, then deduplicated.
            incoming = until_written.enter_context(persisted(incoming, StorageLevel.DISK_ONLY))
            stored, where, few = _same_events(runtime, incoming.where(F.col("reason").isNull()), same_day)
        together = incoming if stored is None else incoming.unionByName(stored)
        marked = mark_duplicates(together, settings.duplicates)
        # Counted, then written.
        records = until_written.enter_context(persisted(marked, StorageLevel.DISK_ONLY))
        groups = records.groupBy("reason", "stored").count().collect()
        counts = Counter({row["reason"]: int(row["count"]) for row in groups if not row["stored"]})
        # A stored event is replaced by one with the same id that sorts before it.
        replaced = sum(row["count"] for row in groups if row["stored"] and row["reason"] is not None)
        runtime.report.rows_in["records"] += counts.total()
        _check_share(records.where(~F.col("stored")), counts, earlier + counts, settings.max_rejected_share)
        refused = records.where(F.col("reason").isNotNull() & ~F.col("reason").isin(*_NO_REFUSAL))
        refused = refused.withColumn("refused_on", F.current_date())
        if again:
            refused = _not_yet_refused(runtime, refused)
        if _refused(counts) or replaced:
            runtime.append(REJECTED_EVENTS, refused, batch=batch, done=False)
        if counts[None]:
            new = records.where(F.col("reason").isNull() & ~F.col("stored"))
            if same_day:
                where &= F.to_date("old.event_ts") == F.to_date("new.event_ts")
            runtime.merge(EVENTS, new, where=where, insert_only=replaced == 0, few=few, done=False)
        return counts


def _same_events(runtime: Runtime, events: DataFrame, same_day: bool) -> tuple[DataFrame | None, Column, bool]:
    """What the events table may hold of a batch's events already.

    Returns:
        The stored rows (`stored_events`), a condition for MERGE that holds for all of them (over `old.*`), and whether
        the batch's events are few.
    """
    bounds = F.min("event_id").alias("first"), F.max("event_id").alias("last"), F.count("*").alias("events")
    of_days = events.groupBy(F.to_date("event_ts").alias("day")).agg(*bounds).collect()
    few = sum(row["events"] for row in of_days) <= FEW
    if not of_days:
        return None, F.lit(True), few
    # A range of ids for each day: one late event would make a single range as long as it is late.
    bounds_of_ids = id_ranges((row["first"], row["last"]) for row in of_days)
    days = [row["day"] for row in of_days] if same_day else None
    ids = events.select("event_id").distinct()
    stored = stored_events(runtime, F.broadcast(ids) if few else ids, same_ids("", bounds_of_ids, days))
    return stored, same_ids("old.", bounds_of_ids, days), few


def stored_events(runtime: Runtime, ids: DataFrame, where: Column) -> DataFrame | None:
    """The rows of the events table with one of the ids, as input of `mark_duplicates`; None if there are none.

    The table is read twice, first only for the ids and days of these rows: few batches repeat an event, so all columns
    are read from the files of few days, or of none.

    Args:
        ids: event_id, distinct.
        where: `same_ids` of these ids.
    """
    table = runtime.latest(EVENTS)
    repeated = table.where(where).join(ids, "event_id", "left_semi")
    bounds = F.min("event_id"), F.max("event_id"), F.collect_set(F.to_date("event_ts"))
    low, high, days = repeated.agg(*bounds).collect()[0]
    if low is None:
        return None
    return (
        table.where(same_ids("", [(low, high)], days))
        .join(ids, "event_id", "left_semi")
        .select(
            *[c.name for c in EVENTS.columns],
            F.lit(None).cast("string").alias("reason"),
            F.lit(None).cast("string").alias("raw"),
            F.lit(_STORED).alias("file"),
            F.lit(True).alias("stored"),
        )
    )


def _not_yet_refused(runtime: Runtime, refused: DataFrame) -> DataFrame:
    """The refused records that the table does not hold. A million of them may be equal (`{}` or `,,,`), so both joins
    compare keys alone: another condition would be tested for every pair."""
    runtime.create(REJECTED_EVENTS)
    old = runtime.latest(REJECTED_EVENTS).alias("old")

    def same(*names: str) -> Column:
        return reduce(Column.__and__, [F.col(f"new.{name}").eqNullSafe(F.col(f"old.{name}")) for name in names])

    new = refused.alias("new").join(old, same("source", "reason", "raw", "file"), "left_anti")
    replaced = old.where(F.col("old.file") == _STORED)
    return new.join(replaced, same("source", "reason", "raw"), "left_anti")


def _refused(counts: Counter[str | None]) -> Counter[str]:
    return Counter({reason: n for reason, n in counts.items() if reason is not None and reason not in _NO_REFUSAL})


def _check_share(
    records: DataFrame, counts: Counter[str | None], run_counts: Counter[str | None], allowed: float
) -> None:
    """Stops the job before this batch is written if too large a share is refused, both of the batch and of the run so
    far: the last batch of a topic may be a single bad record, and an earlier one may have been let through by a higher
    limit.
    """
    refused, total = _refused(counts), _refused(run_counts).total()
    if refused.total() <= allowed * counts.total() or total <= allowed * run_counts.total():
        return
    examples = []
    for reason, count in sorted(refused.items(), key=lambda item: (-item[1], item[0]))[:3]:
        row = records.where(F.col("reason") == reason).agg(F.min("raw").alias("raw")).collect()[0]
        examples.append(f"{reason} {count:,} (such as {str(row['raw'])[:200]})")
    changed = (
        "; an event read again with other values conflicts with the one read before, and only one of the two is kept: "
        "name columns that differ from delivery to delivery (a new one, or a folder's column=value) under `ignore`; if "
        "the mapping or a lookup has changed, see Backfill in docs/operations.md"
    )
    raise TrailvecError(
        f"{total:,} of {run_counts.total():,} records are refused, more than ingest.max_rejected_share = "
        f"{allowed:g} allows; nothing of this batch was written: correct the mapping or the files, or raise the limit; "
        f"most frequent reasons: {'; '.join(examples)}{changed if counts['duplicate_event_id'] else ''}"
    )


# ---- the stage ----------------------------------------------------------------------------------------


def follow(runtime: Runtime, source: Source, mapping: Input) -> None:
    """Commits what is new in one of the source's inputs, batch by batch.

    Raises:
        TrailvecError: a batch is refused, or another ingest is reading the same input.
    """
    settings, spark = runtime.config.ingest, runtime.spark
    name = f"{source.name}, {mapping.place}"
    zone_is_known = check_times(spark, mapping, source.name)
    checkpoint = _checkpoint(runtime, source, mapping)
    if runtime.forced:
        # First, so that no kill leaves a checkpoint without offsets, which Spark would start again under the same id.
        (checkpoint / "metadata").unlink(missing_ok=True)
    begun = ("offsets", "commits", "sources")
    if not (checkpoint / "metadata").exists() and any((checkpoint / name).exists() for name in begun):
        # What a kill left of one: Spark would go on with its offsets under a new id. (Another run that is just starting
        # has none of the three yet: its folder stays.)
        remove_tree(checkpoint)
    again = checkpoint / "again"  # a marker that stays until a run finishes, through any kills
    # Tests for Spark's first file, not the folder: a kill may come between the next two lines.
    if not (checkpoint / "metadata").exists() and (runtime.forced or _has_refused(runtime, source)):
        checkpoint.mkdir(parents=True, exist_ok=True)
        again.write_text("", encoding="utf-8")
    reads_again = again.exists()
    now = datetime.now(timezone.utc)
    counts_file = checkpoint / "read.json"  # stays until a run finishes, too
    counts = _counts(counts_file)
    failed: list[BaseException] = []

    def batch(records: DataFrame, batch_number: int) -> None:
        started = time.monotonic()
        try:
            if raw := _read_batch(runtime, mapping, records, f"{name}: batch {batch_number}"):
                query = json.loads((checkpoint / "metadata").read_text())["id"]
                events = [
                    to_events(frame, mapping, source.name, settings, now, zone_is_known=zone_is_known) for frame in raw
                ]
                # A batch repeated after a kill may be among the counts already, which then says what it brought.
                earlier = _total(reasons for number, reasons in counts.items() if number < batch_number)
                of_batch = commit_batch(runtime, events, (f"ingest-{query}", batch_number), earlier, reads_again)
                counts.setdefault(batch_number, of_batch)
                write_json(counts_file, {str(number): list(reasons.items()) for number, reasons in counts.items()})
                seconds = time.monotonic() - started
                runtime.on_progress(f"{name}: batch {batch_number}, {of_batch.total():,} records in {seconds:.1f} s")
        except BaseException as error:
            failed.append(error)
            raise RuntimeError("the batch failed") from error  # the JVM does not pass the error on; `failed` does

    stream = _topic(spark, mapping.kafka, settings) if mapping.kafka else _listing(spark, mapping, runtime)
    query = stream.writeStream.foreachBatch(batch).option("checkpointLocation", file_url(str(checkpoint)))
    try:
        query.trigger(availableNow=True).start().awaitTermination()
    except StreamingQueryException as error:
        if failed:
            raise failed[0] from None
        if re.search(ANOTHER_INGEST, str(error)):
            counts_file.unlink(missing_ok=True)  # the other ingest has ended its run, or writes its counts again
        raise TrailvecError(f"{name}: {one_sentence(error)}") from error
    again.unlink(missing_ok=True)
    counts_file.unlink(missing_ok=True)
    total = _total(counts.values())
    runtime.report.notes += [
        f"{name}: {total[reason]:,} {what} dropped" for reason, what in _NO_REFUSAL.items() if total[reason]
    ]


def _counts(file: Place) -> dict[int, Counter[str | None]]:
    """For each batch of the run that the last process has left, its records per reason; empty if that run finished, or
    if the file was cut off with the machine."""
    if not file.exists():
        return {}
    try:
        return {int(number): Counter(dict(reasons)) for number, reasons in json.loads(file.read_text()).items()}
    except json.JSONDecodeError:
        return {}


def _total(counts: Iterable[Counter[str | None]]) -> Counter[str | None]:
    return sum(counts, Counter())


def _read_batch(runtime: Runtime, mapping: Input, records: DataFrame, label: str) -> list[DataFrame]:
    """The raw frames of a batch of the stream: of a topic's records, or of the files that it names."""
    data_dir = _data_dir(runtime, mapping)
    if mapping.kafka is not None:
        return read_topic(records, mapping, data_dir)
    folder = folder_of(data_dir, str(mapping.path))
    sizes = {row["path"]: row["length"] for row in records.collect() if is_data(row["path"], folder)}
    runtime.on_progress(f"{label}, reading {decimal(sum(sizes.values()))}")
    _check_gzip(sizes)
    few = len(sizes) < runtime.spark.sparkContext.defaultParallelism
    spread = few and max(sizes.values(), default=0) > _ONE_TASK
    return read_raw(runtime.spark, mapping, data_dir, sorted(sizes), spread) if sizes else []


def _check_gzip(sizes: dict[str, int]) -> None:
    """Refuses an empty gzip file: it lacks even a header, so an upload failed. Spark would silently accept one among
    JSON files."""
    if empty := [path for path, length in sizes.items() if length == 0 and path.endswith(".gz")]:
        raise TrailvecError(f"{min(empty)} is not a gzip file (it is empty): {FETCH_AGAIN}")


def _checkpoint(runtime: Runtime, source: Source, mapping: Input) -> Place:
    return runtime.place / "checkpoints" / "ingest" / f"{source.name}-{mapping.key}"


def _has_refused(runtime: Runtime, source: Source) -> bool:
    """Whether the source was read before (through an input whose path has changed, say) and records were refused."""
    if not runtime.exists(REJECTED_EVENTS):
        return False
    return not runtime.latest(REJECTED_EVENTS).where(F.col("source") == source.name).isEmpty()


def _listing(spark: SparkSession, mapping: Input, runtime: Runtime) -> DataFrame:
    """The names of the input's files, as a stream; the checkpoint tells Spark which of them are new."""
    place = _data_dir(runtime, mapping) / str(mapping.path)
    path = file_url(str(place))
    if place.is_file():
        # A Spark stream takes a folder or a pattern, not a file. A name in braces makes Hadoop look up that file alone;
        # any other pattern makes it list the whole folder, and fail on a name with a colon.
        folder, _, name = path.rpartition("/")
        path = "{}/{{/{}}}".format(folder, name.replace(",", "\\,"))
    files = spark.readStream.format("binaryFile").schema(LISTING)
    options = {
        "maxFilesPerTrigger": str(runtime.config.ingest.max_files_per_batch),
        "maxFileAge": "36500d",  # a new file is read however old its timestamp
        "recursiveFileLookup": "true",  # in any subfolder; without it, only in those named column=value
    }
    return files.options(**options).load(path).select("path", "length")


def _topic(spark: SparkSession, kafka: Kafka, settings: IngestSettings) -> DataFrame:
    options = {
        "kafka.bootstrap.servers": kafka.bootstrap_servers,
        "subscribe": kafka.topic,
        "startingOffsets": "earliest",
        "startingOffsetsByTimestampStrategy": "latest",  # a partition without records since a startingTimestamp
        "maxOffsetsPerTrigger": str(settings.max_records_per_batch),
        "kafka.isolation.level": "read_committed",  # else records of aborted transactions are read too
        **{key: _from_environment(value, kafka) for key, value in kafka.options.items()},
    }
    return spark.readStream.format("kafka").options(**options).load()


def _from_environment(value: str, kafka: Kafka) -> str:
    def look_up(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise TrailvecError(f"kafka topic {kafka.topic}: its options use ${found[1]}, which is not set: export it")
        return os.environ[found[1]]

    return re.sub(r"\$\{(\w+)\}", look_up, value)


def run(runtime: Runtime) -> None:
    settings = runtime.config.ingest
    if not settings.sources:
        raise TrailvecError(
            "ingest.sources is empty: name at least one mapping, such as conf/sources/completejourney.toml"
        )
    runtime.report.rows_in["records"] = 0
    sources = [load_source(path) for path in settings.sources]
    names = Counter(source.name for source in sources)
    if twice := [name for name, count in names.items() if count > 1]:
        raise TrailvecError(
            f"two mappings in ingest.sources are named {twice[0]}: give each a unique name, under which its reading "
            "progress is stored"
        )
    if settings.duplicates == "everywhere":
        _refuse_ids_of_several_days(runtime)
    if not runtime.exists(EVENTS):
        # The checkpoints describe what was read into a table that is gone (moved away, say). Remove all of them, also
        # those of sources not configured now: if this run is killed, the next one finds a table and trusts them.
        remove_tree(runtime.place / "checkpoints" / "ingest")
        runtime.create(REJECTED_EVENTS)  # before events, so that it is missing beside them only if somebody removed it
    elif not runtime.exists(REJECTED_EVENTS) and not runtime.forced:
        # Nothing is read again unasked: a mapping changed since would turn old records into other events.
        runtime.report.notes.append(
            "table rejected_events was missing, and the records refused before are lost with it: run `trailvec ingest "
            "--force` to read all inputs again"
        )
    runtime.create(EVENTS)  # from here on, another ingest keeps the checkpoints
    for source in sources:
        for mapping in source.input:
            follow(runtime, source, mapping)
    # Only now is the stage up to date: a killed run still has batches to read.
    runtime.touch(REJECTED_EVENTS)
    runtime.touch(EVENTS)


def _refuse_ids_of_several_days(runtime: Runtime) -> None:
    """Raises TrailvecError where the table has an id on several days, as same_day allows: an earlier event with that id
    would replace all of these rows."""
    last = runtime.last_writer(EVENTS)  # None: unknown (after a RESTORE, say), so the ids are counted
    if not runtime.exists(EVENTS) or (last is not None and last["config"]["ingest"]["duplicates"] != "same_day"):
        return
    several = runtime.latest(EVENTS).groupBy("event_id").count().where("count > 1").count()
    if several:
        raise TrailvecError(
            f"table events at {runtime.path(EVENTS)} holds {several:,} ids on several days, which ingest.duplicates = "
            f"same_day allows, but everywhere does not: set it back, or move that folder away and run `trailvec "
            f"ingest`, which then reads all inputs again"
        )


def _data_dir(runtime: Runtime, mapping: Input) -> Place:
    """The folder ingest.data_dir.

    Raises:
        TrailvecError: the mapping reads files below it, and Spark would read it as a glob pattern.
    """
    data_dir = runtime.place_of(runtime.config.ingest.data_dir)
    place = data_dir.absolute() if isinstance(data_dir, Path) else data_dir
    paths = [path for path in (mapping.path, *(lookup.path for lookup in mapping.lookups)) if path]
    is_used = any(str(place / path).startswith(f"{place}/") for path in paths)
    if is_used and (wild := re.search(r"[][{}*?\\]", str(place))):
        raise TrailvecError(
            f"ingest.data_dir = {place} contains {wild[0]}, which Spark reads as a glob pattern: choose a path without "
            "it"
        )
    return data_dir


def _files(runtime: Runtime, source: Source, mapping: Input) -> list[tuple[str, int, int]]:
    """`find_inputs` of an input's own files; empty if the input was read before and all its files were removed since.
    (A missing folder is still an error: its disk may not be mounted.)"""
    data_dir, path = _data_dir(runtime, mapping), str(mapping.path)
    try:
        return find_inputs(runtime.spark, data_dir, path)
    except TrailvecError:
        was_read = runtime.exists(EVENTS) and _checkpoint(runtime, source, mapping).exists()
        if runtime.forced or not was_read or not folder_of(data_dir, path).is_dir():
            raise
        return []


def inputs(runtime: Runtime) -> dict[str, Any]:
    """What the result depends on besides the settings: the mappings' text; path, size and time of each file."""
    mappings: dict[str, str] = {}
    files: list[tuple[str, int, int]] = []
    for path in runtime.config.ingest.sources:
        source = load_source(path)
        mappings[path] = shipped(path).read_text(encoding="utf-8")
        for mapping in source.input:
            files += _files(runtime, source, mapping) if mapping.path else []
            for lookup in mapping.lookups:
                files += find_inputs(runtime.spark, _data_dir(runtime, mapping), lookup.path)
            if mapping.kafka is not None:
                mappings[path] += f"# {time.time()}"  # a topic is read on every run
    return {"mappings": mappings, "files": sorted(set(files))}


STAGE = Stage(
    "ingest",
    "read the sources' files and topics, check and deduplicate their records",
    run,
    reads=(),
    writes=(REJECTED_EVENTS, EVENTS),
    settings=("ingest",),
    also="It also reads erased_users, if anybody was erased.",
    inputs=inputs,
)


def main() -> None:
    stage_main("ingest")


if __name__ == "__main__":
    main()
