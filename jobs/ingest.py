"""ingest: files and topics → events, rejected_events.

Structured Streaming keeps the books: a checkpoint for each input says which files (or offsets) were read, and each run
takes what is new (Trigger.AvailableNow). A batch is read (`jobs/raw_records.py`), checked (`jobs/checked_records.py`:
the source's mapping and the reasons why a record is no event), deduplicated against the batch and the table, and
committed: rejected_events first, under the batch's number, so that a batch that is done again adds nothing; then
events, by MERGE. A kill at any moment and the same command end as if nothing had happened (docs/decisions/0007).

The same event again, equal in every column, is dropped and not refused, however long ago it first came. Of events with
one event_id and different content, the one with the smallest (event_ts, hash of content) is kept, whichever came first,
and the others are refused: duplicate_event_id. So records may come in any order, in any batches and any number of
times.

What comes of a user whom erase_users took out is dropped, events and refused records alike, and only counted.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
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
from jobs.errors import TrailvecError, told
from jobs.files import Place
from jobs.pruning import within_days
from jobs.raw_records import LISTING, find_inputs, folder_of, is_data, read_raw, read_topic
from jobs.runtime import Runtime, Stage
from jobs.sources import Input, Kafka, Source, load_source
from jobs.spark_session import FEW, JSON_MICROSECONDS
from jobs.tables import EVENTS, REJECTED_EVENTS
from jobs.tombstones import erased_tests
from training.stores import remove_tree
from training.urls import file_url

REPEAT = "exact_repeat"  # not a refusal: the event is there already
_NO_REFUSAL = {REPEAT: "exact repeats of an event", ERASED: "records of erased users"}

_STORED = "table events"  # the file of a row that the table holds already

# Bytes of a file that may be one task (a Parquet file of one row group is, whatever its size) while cores are idle.
_ONE_TASK = 4_000_000


# ---- one event, one row -------------------------------------------------------------------------------


def mark_duplicates(records: DataFrame, duplicates: str) -> DataFrame:
    """`records` with one event kept of each event_id (where duplicates is "same_day": of each event_id and day). The
    others get a reason: REPEAT where they equal the kept one in all columns, else duplicate_event_id. One shuffle.

    Args:
        records: as `to_events` gives them, with `stored`: the row is in the table already.
    """
    is_event = F.col("reason").isNull()
    # Map columns have no hash; xxhash64 skips NULLs, so that each is marked.
    # Older code kept empty maps (checked_records.py); these are no other events.
    comparable = [
        F.when(F.size(c.name) > 0, F.sort_array(F.map_entries(c.name))) if c.type.startswith("map") else F.col(c.name)
        for c in EVENTS.columns
    ]
    content = F.xxhash64(*[part for column in comparable for part in (column, column.isNull())])
    # The id first: the sort goes by the first bytes of the first key, and looks into rows only where these are equal.
    # Refused records (the others have no hash here) go the same way only to be spread evenly.
    key = [F.col("event_id"), F.when(~is_event, F.xxhash64("raw"))]
    same_id = Window.partitionBy(*key, *([F.to_date("event_ts")] if duplicates == "same_day" else []))
    # One order for both: each order would be a sort of its own.
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


def same_ids(table: str, low: str, high: str, days: Sequence[date] | None) -> Column:
    """A condition that holds for all rows of the events table with an event_id of a batch. It is made of literals, so
    that Delta can tell by its files' statistics which files to leave unread.

    Args:
        table: the table's alias with a dot behind it, or "".
        low, high: the batch's first and last event_id. Ids that go up with time (most do) lie in few files.
        days: the days on which such a row may lie; None: on any.
    """
    condition = F.col(f"{table}event_id").between(low, high)
    return condition if days is None else condition & within_days(F.col(f"{table}event_ts"), days)


# ---- one batch ----------------------------------------------------------------------------------------


def commit_batch(
    runtime: Runtime, frames: list[DataFrame], batch: tuple[str, int], read: Counter[str | None], again: bool
) -> None:
    """Checks, deduplicates and commits the records of one batch (frames as `to_events` gives them).

    Args:
        batch: its writer and number; of the same batch, rejected_events takes the rows once.
        read: how many records of this run's earlier batches had which reason (None: events); this batch's are added.
        again: the inputs are read once more, so that rejected_events may hold what is refused already.
    """
    settings = runtime.config.ingest
    same_day = settings.duplicates == "same_day"
    given = without_erased(reduce(DataFrame.unionByName, frames), erased_tests(runtime))
    given = given.withColumn("stored", F.lit(False))
    together, where, few = given, F.lit(True), False
    if not runtime.latest(EVENTS).isEmpty():
        given = given.persist(StorageLevel.DISK_ONLY)  # looked into for its ids, then judged
        events = given.where(F.col("reason").isNull())
        low, high, count = events.agg(F.min("event_id"), F.max("event_id"), F.count("*")).collect()[0]
        few = count <= FEW
        days = [row[0] for row in events.select(F.to_date("event_ts")).distinct().collect()] if same_day else None
        if low is not None:
            ids, where = events.select("event_id").distinct(), same_ids("old.", low, high, days)
            stored = stored_events(runtime, F.broadcast(ids) if few else ids, same_ids("", low, high, days))
            together = given if stored is None else given.unionByName(stored)
    records = mark_duplicates(together, settings.duplicates).persist(StorageLevel.DISK_ONLY)  # counted, then written
    try:
        found = records.groupBy("reason", "stored").count().collect()
        counts = Counter({row["reason"]: int(row["count"]) for row in found if not row["stored"]})
        # What the table holds gives way to an earlier event of the same id.
        replaced = sum(row["count"] for row in found if row["stored"] and row["reason"] is not None)
        runtime.report.rows_in["records"] += counts.total()
        read += counts
        _check_share(records.where(~F.col("stored")), counts, read, settings.max_rejected_share)
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
    finally:
        records.unpersist()
        given.unpersist()


def stored_events(runtime: Runtime, ids: DataFrame, where: Column) -> DataFrame | None:
    """The rows of `events` with one of the ids (event_id, each once), as `mark_duplicates` wants them; None where there
    is none.

    The table is read twice, first for the ids and days of these rows alone: few batches bring an event again, and so
    all columns are read of few days' files, or of none.

    Args:
        where: `same_ids` of them.
    """
    table = runtime.latest(EVENTS)
    there = table.where(where).join(ids, "event_id", "left_semi")
    found = F.min("event_id"), F.max("event_id"), F.collect_set(F.to_date("event_ts"))
    low, high, days = there.agg(*found).collect()[0]
    if low is None:
        return None
    return (
        table.where(same_ids("", low, high, days))
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
    runtime.create(REJECTED_EVENTS)
    names = ("source", "reason", "raw")
    same = reduce(Column.__and__, [F.col(f"new.{name}").eqNullSafe(F.col(f"old.{name}")) for name in names])
    same &= F.col("old.file").isin(F.col("new.file"), F.lit(_STORED))
    return refused.alias("new").join(runtime.latest(REJECTED_EVENTS).alias("old"), same, "left_anti")


def _refused(counts: Counter[str | None]) -> Counter[str]:
    return Counter({reason: n for reason, n in counts.items() if reason is not None and reason not in _NO_REFUSAL})


def _check_share(records: DataFrame, counts: Counter[str | None], read: Counter[str | None], allowed: float) -> None:
    """Stops the job before this batch is written where too much is refused.

    The share is that of the run so far, this batch included: the last batch of a topic may be one record, and wrong.
    """
    total = _refused(read).total()
    if total <= allowed * read.total():
        return
    examples = []
    for reason, count in sorted(_refused(counts).items(), key=lambda item: (-item[1], item[0]))[:3]:
        row = records.where(F.col("reason") == reason).agg(F.min("raw").alias("raw")).collect()[0]
        examples.append(f"{reason} {count:,} (such as {str(row['raw'])[:200]})")
    changed = (
        "; events that come again, and that the mapping or a lookup now makes otherwise, are refused beside what was "
        "read before: to correct that, see Backfill in docs/operations.md"
    )
    raise TrailvecError(
        f"{total:,} of {read.total():,} records are refused, more than ingest.max_rejected_share = {allowed:g} allows; "
        f"nothing of this batch was written: correct the mapping or the files, or allow more; "
        f"most often: {'; '.join(examples)}{changed if counts['duplicate_event_id'] else ''}"
    )


# ---- the stage ----------------------------------------------------------------------------------------


def follow(runtime: Runtime, source: Source, mapping: Input) -> None:
    """Commits what is new of one of the source's inputs, batch by batch.

    Raises:
        TrailvecError: a batch is refused, or another ingest reads the same input right now.
    """
    settings, spark = runtime.config.ingest, runtime.spark
    name = f"{source.name}, {mapping.place}"
    zones = check_times(spark, mapping, source.name)
    checkpoint = _checkpoint(runtime, source, mapping)
    if runtime.forced:
        remove_tree(checkpoint)
    again = checkpoint / "again"  # until a run ends, also where it begins with a kill
    # Spark's first file, not the folder: a kill may come between the next two lines.
    if not (checkpoint / "metadata").exists() and (runtime.forced or _has_refused(runtime, source)):
        checkpoint.mkdir(parents=True, exist_ok=True)
        again.write_text("", encoding="utf-8")
    reads_again = again.exists()
    now = datetime.now(timezone.utc)
    read: Counter[str | None] = Counter()
    failed: list[BaseException] = []

    def batch(records: DataFrame, batch_number: int) -> None:
        started = time.monotonic()
        try:
            if mapping.kafka is not None:
                raw = read_topic(records, mapping, _data_dir(runtime, mapping))
            else:
                folder = folder_of(_data_dir(runtime, mapping), str(mapping.path))
                found = {row["path"]: row["length"] for row in records.collect() if is_data(row["path"], folder)}
                runtime.on_progress(f"{name}: batch {batch_number}, reading {decimal(sum(found.values()))}")
                _check_gzip(found)
                few = len(found) < spark.sparkContext.defaultParallelism
                spread = few and max(found.values(), default=0) > _ONE_TASK
                raw = read_raw(spark, mapping, _data_dir(runtime, mapping), sorted(found), spread) if found else []
            if raw:
                query = json.loads((checkpoint / "metadata").read_text())["id"]
                before = runtime.report.rows_in["records"]
                events = [to_events(frame, mapping, source.name, settings, now, zones=zones) for frame in raw]
                commit_batch(runtime, events, (f"ingest-{query}", batch_number), read, reads_again)
                count = runtime.report.rows_in["records"] - before
                seconds = time.monotonic() - started
                runtime.on_progress(f"{name}: batch {batch_number}, {count:,} records in {seconds:.1f} s")
        except BaseException as error:
            failed.append(error)
            raise RuntimeError("the batch failed") from error  # what the JVM is told, and does not understand

    stream = _topic(spark, mapping.kafka, settings) if mapping.kafka else _listing(spark, mapping, runtime)
    query = stream.writeStream.foreachBatch(batch).option("checkpointLocation", file_url(str(checkpoint)))
    try:
        query.trigger(availableNow=True).start().awaitTermination()
    except StreamingQueryException as error:
        if failed:
            raise failed[0] from None
        raise TrailvecError(f"{name}: {told(error)}") from error
    again.unlink(missing_ok=True)
    runtime.report.notes += [
        f"{name}: {read[reason]:,} {what} dropped" for reason, what in _NO_REFUSAL.items() if read[reason]
    ]


def _check_gzip(found: dict[str, int]) -> None:
    """Refuses a gzip file of no bytes (not even its head: an upload that failed). Of one among files of JSON Spark says
    no word."""
    if empty := [path for path, length in found.items() if length == 0 and path.endswith(".gz")]:
        raise TrailvecError(
            f"{min(empty)} is no gzip file, it has no bytes: fetch it again or take it out of the folder"
        )


def _checkpoint(runtime: Runtime, source: Source, mapping: Input) -> Place:
    return runtime.place / "checkpoints" / "ingest" / f"{source.name}-{mapping.key}"


def _has_refused(runtime: Runtime, source: Source) -> bool:
    """Whether the source was read before (by an input whose path was changed, say), and records were refused."""
    if not runtime.exists(REJECTED_EVENTS):
        return False
    return not runtime.latest(REJECTED_EVENTS).where(F.col("source") == source.name).isEmpty()


def _listing(spark: SparkSession, mapping: Input, runtime: Runtime) -> DataFrame:
    """The names of the input's files, as a stream; by its checkpoint Spark tells which of them are new."""
    given = _data_dir(runtime, mapping) / str(mapping.path)
    path = file_url(str(given))
    if given.is_file():
        # Spark's stream takes a folder or a pattern, not a file. For a name in braces Hadoop looks at that file alone;
        # for any other pattern it lists all files beside it, and fails at one with a colon in its name.
        folder, _, name = path.rpartition("/")
        path = "{}/{{/{}}}".format(folder, name.replace(",", "\\,"))
    files = spark.readStream.format("binaryFile").schema(LISTING)
    options = {
        "maxFilesPerTrigger": str(runtime.config.ingest.max_files_per_batch),
        "maxFileAge": "36500d",  # however old a file's time stamp is, when it comes, it is read
        "recursiveFileLookup": "true",  # in whatever folder inside: without it only in those named column=value
    }
    return files.options(**options).load(path).select("path", "length")


def _topic(spark: SparkSession, kafka: Kafka, settings: IngestSettings) -> DataFrame:
    options = {
        "kafka.bootstrap.servers": kafka.bootstrap_servers,
        "subscribe": kafka.topic,
        "startingOffsets": "earliest",
        "maxOffsetsPerTrigger": str(settings.max_records_per_batch),
        "kafka.isolation.level": "read_committed",  # else records of aborted transactions come too
        **{key: _from_environment(value, kafka) for key, value in kafka.options.items()},
    }
    return spark.readStream.format("kafka").options(**options).load()


def _from_environment(value: str, kafka: Kafka) -> str:
    def look_up(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise TrailvecError(f"kafka topic {kafka.topic}: its options want ${found[1]}, which is not set: export it")
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
            f"two mappings of ingest.sources are named {twice[0]}: give each a name of its own, since how far each was "
            "read is kept under it"
        )
    if settings.duplicates == "everywhere":
        _refuse_ids_of_several_days(runtime)
    if not runtime.exists(EVENTS):
        # The checkpoints tell of what was read into a table that is gone (moved away, say). All of them go, also those
        # of sources that are not configured now: were this run killed, the next one would find a table, and trust them.
        remove_tree(runtime.place / "checkpoints" / "ingest")
        runtime.create(REJECTED_EVENTS)  # before events, so that it is only missing beside them if somebody removed it
    elif not runtime.exists(REJECTED_EVENTS) and not runtime.forced:
        # Nothing is read again unasked: by a mapping that has changed since, old records would become other events.
        runtime.report.notes.append(
            "table rejected_events was gone, and what was refused before with it: `trailvec ingest --force` reads all "
            "inputs again"
        )
    runtime.create(EVENTS)  # from here on another ingest leaves the checkpoints
    for source in sources:
        for mapping in source.input:
            follow(runtime, source, mapping)
    # Only now is the stage up to date: a killed one has batches to come.
    runtime.touch(REJECTED_EVENTS)
    runtime.touch(EVENTS)


def _refuse_ids_of_several_days(runtime: Runtime) -> None:
    """Of an id that same_day let stand on two days, an earlier event that comes would take the place of both rows."""
    last = runtime.last_writer(EVENTS)  # None: it may have such ids, as after a RESTORE
    if not runtime.exists(EVENTS) or (last is not None and last["config"]["ingest"]["duplicates"] != "same_day"):
        return
    several = runtime.latest(EVENTS).groupBy("event_id").count().where("count > 1").count()
    if several:
        raise TrailvecError(
            f"table events at {runtime.path(EVENTS)} holds {several:,} ids on several days, as ingest.duplicates = "
            f"same_day lets them stand, found everywhere: set it back, or move that folder away and run "
            f"`trailvec ingest` again, which reads all inputs anew"
        )


def _data_dir(runtime: Runtime, mapping: Input) -> Place:
    """Raises TrailvecError: a path of the mapping begins there, and Spark would take it for a pattern."""
    data_dir = runtime.place_of(runtime.config.ingest.data_dir)
    place = data_dir.absolute() if isinstance(data_dir, Path) else data_dir
    paths = [path for path in (mapping.path, *(lookup.path for lookup in mapping.lookups)) if path]
    is_used = any(str(place / path).startswith(f"{place}/") for path in paths)
    if is_used and (wild := re.search(r"[][{}*?\\]", str(place))):
        raise TrailvecError(
            f"ingest.data_dir = {place}, a path with {wild[0]}, which Spark takes for a pattern of names: choose one "
            "without it"
        )
    return data_dir


def _files(runtime: Runtime, source: Source, mapping: Input) -> list[tuple[str, int, int]]:
    """As `find_inputs`, of an input's own files; none where they were read before, and are all taken away since. (A
    folder that is gone itself may be a disk that is not mounted.)"""
    data_dir, path = _data_dir(runtime, mapping), str(mapping.path)
    try:
        return find_inputs(runtime.spark, data_dir, path)
    except TrailvecError:
        was_read = runtime.exists(EVENTS) and _checkpoint(runtime, source, mapping).exists()
        if runtime.forced or not was_read or not folder_of(data_dir, path).is_dir():
            raise
        return []


def inputs(runtime: Runtime) -> dict[str, Any]:
    """What the result depends on beside the settings: the mappings' text; path, size and time of each file."""
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
                mappings[path] += f"# {time.time()}"  # a topic is asked each time
    return {"mappings": mappings, "files": sorted(set(files))}


STAGE = Stage(
    "ingest",
    "read the sources' files, check and deduplicate their records",
    run,
    reads=(),
    writes=(REJECTED_EVENTS, EVENTS),
    settings=("ingest",),
    also="It also reads erased_users, where somebody was erased.",
    inputs=inputs,
)


def main() -> None:
    stage_main("ingest")


if __name__ == "__main__":
    main()
