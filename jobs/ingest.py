"""ingest: files → events, rejected_events.

Each source's mapping (`jobs/sources.py`) is applied to its files; nothing in a record makes the job fail. A record
that is no event goes to rejected_events with the first reason that holds, in this order: broken_row; the mapping's
own rules; missing_* (user_id, item_id, event_type, vertical, event_ts, event_id; blank counts as missing);
bad_event_ts, event_before_earliest, event_in_future, bad_amount, bad_quantity, bad_time_zone; long_* (an id of more
than 512 characters); duplicate_event_id.

The same event again, equal in every column, is dropped without a word; the same event_id with other content keeps
the row with the smallest (event_ts, hash of content). So files may come in any order and any number of times.

An id with an ordinal numbers the identical records *of one file*: a line that stands twice in a file is two events,
while a file that comes twice, even under another name, is the same events again. The price: a file cut in two
between two identical lines can't be told from a file and its copy, and makes one event of them.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from functools import reduce
from pathlib import Path
from typing import Any

from pyspark import StorageLevel
from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from jobs.cli import stage_main
from jobs.config import IngestSettings
from jobs.errors import TrailvecError, explain
from jobs.runtime import Runtime, Stage
from jobs.sources import Given, IdValue, Input, Lookup, TimeValue, Value, load_source
from jobs.tables import EVENTS, REJECTED_EVENTS

# Columns of a raw frame beside the record's own.
FILE = "trailvec_file"  # the file's URI
LINE = "trailvec_line"  # the record's text; NULL where the columns say it all
BROKEN = "trailvec_broken"  # the line could not be split into columns
_ORDINAL = "trailvec_ordinal"

REPEAT = "exact_repeat"  # not a refusal: the event is there already

_REQUIRED = ("user_id", "item_id", "event_type", "vertical", "event_ts", "event_id")
_IDS = ("event_id", "user_id", "item_id", "basket_id")
_LONGEST_ID = 512
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
_ISO_LOCAL = r"\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?)?"
_ISO_ZONED = r"\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?\s*(Z|[+-]\d{2}(:?\d{2})?)"
# Microseconds in one unit; and the widest number whose microseconds still fit into 64 bits.
_EPOCH = {"epoch_s": (1_000_000, "decimal(18,6)"), "epoch_ms": (1_000, "decimal(21,6)")}


# ---- files → raw frames -------------------------------------------------------------------------------


def find_files(data_dir: Path, path: str) -> list[Path]:
    """The files that a mapping's path (file, folder or pattern) stands for, sorted.

    Names that begin with `_` or `.` are no data: so Spark has it too.

    Raises:
        TrailvecError: there is none.
    """
    found = [Path(match) for match in sorted(glob.glob(str(data_dir / path)))]
    inside = [(top, file) for top in found for file in (top.rglob("*") if top.is_dir() else [top])]
    files = [
        file
        for top, file in inside
        if file.is_file() and not any(part[0] in "._" for part in (file.name, *file.relative_to(top).parts))
    ]
    if not files:
        raise TrailvecError(f"{data_dir / path}: no such file: correct the mapping's path or ingest.data_dir")
    return sorted(files)


def read_raw(spark: SparkSession, mapping: Input, data_dir: Path) -> DataFrame:
    """The records of an input: their own columns, those of the lookups, FILE, LINE and BROKEN.

    CSV and JSON columns are strings (a nested JSON value is its JSON text); Parquet columns keep their types.

    Raises:
        TrailvecError: a file does not exist, or a column that the mapping names.
    """
    # Spark takes the path itself, not the list of files: it finds partition columns (day=2017-01-01) that way.
    location = f"file://{data_dir / mapping.path}"
    files = find_files(data_dir, mapping.path)
    lookups = [_read_lookup(spark, lookup, data_dir) for lookup in mapping.lookups]
    looked_up = {name for lookup in lookups for name in lookup.columns}
    if mapping.format == "csv":
        records = _read_csv(spark, location, files[0], mapping.delimiter)
    elif mapping.format == "parquet":
        records = spark.read.parquet(location).select(
            "*", _file(), F.lit(None).cast("string").alias(LINE), F.lit(False).alias(BROKEN)
        )
    else:
        records = _read_json_lines(spark, location, [n for n in _named_columns(mapping) if n not in looked_up])
    for lookup, rows in zip(mapping.lookups, lookups, strict=True):
        records = _join_lookup(records, rows, lookup)
    _check_columns(mapping.path, records, mapping.column_names())
    return records


def _file() -> Column:
    return F.col("_metadata.file_path").alias(FILE)


def _read_csv(
    spark: SparkSession, location: str, first_file: Path, delimiter: str, mode: str = "PERMISSIVE"
) -> DataFrame:
    # enforceSchema=false: a file whose header is another one is an error, not shifted columns.
    reader = spark.read.options(header=True, sep=delimiter, escape='"', enforceSchema=False)
    header = reader.csv(f"file://{first_file}").columns
    schema = T.StructType([T.StructField(name, T.StringType()) for name in [*header, LINE]])
    rows = reader.options(mode=mode, columnNameOfCorruptRecord=LINE).schema(schema).csv(location)
    return rows.select("*", _file(), F.col(LINE).isNotNull().alias(BROKEN))


def _read_json_lines(spark: SparkSession, location: str, names: list[str]) -> DataFrame:
    schema = T.StructType([T.StructField(name, T.StringType()) for name in [*names, BROKEN]])
    parsed = F.from_json(LINE, schema, {"mode": "PERMISSIVE", "columnNameOfCorruptRecord": BROKEN})
    return (
        spark.read.text(location)
        .select(F.col("value").alias(LINE), _file())
        .where(F.trim(LINE) != "")
        .select(LINE, FILE, parsed.alias("parsed"))
        .select(
            *[F.col("parsed").getField(name).alias(name) for name in names],
            FILE,
            LINE,
            F.col("parsed").getField(BROKEN).isNotNull().alias(BROKEN),
        )
    )


def _named_columns(mapping: Input) -> list[str]:
    """Every raw column that the mapping names, those inside SQL expressions too."""
    names = mapping.column_names()
    for expression in mapping.expressions():
        leaves = F.expr(expression)._jc.expr().collectLeaves()
        for leaf in (leaves.apply(i) for i in range(leaves.size())):
            if leaf.getClass().getSimpleName() == "UnresolvedAttribute":
                names.append(leaf.nameParts().head())
    return list(dict.fromkeys(names))


def _read_lookup(spark: SparkSession, lookup: Lookup, data_dir: Path) -> DataFrame:
    """One row for each value of the `on` columns; these as text, under names of their own (_on)."""
    files = find_files(data_dir, lookup.path)
    location = f"file://{data_dir / lookup.path}"
    if lookup.format == "csv":
        rows = _read_csv(spark, location, files[0], lookup.delimiter, mode="FAILFAST").drop(FILE, LINE, BROKEN)
    else:
        rows = spark.read.parquet(location)
    _check_columns(lookup.path, rows, lookup.on)
    rest = [_column(name) for name in rows.columns if name not in lookup.on]
    keys = [_column(name).cast("string").alias(_on(name)) for name in lookup.on]
    # Two rows of one key would make two events of one record; the smallest of them does not depend on their order.
    return rows.groupBy(*keys).agg(F.min(F.struct(*rest)).alias("row")).select(*map(_on, lookup.on), "row.*")


def _join_lookup(records: DataFrame, rows: DataFrame, lookup: Lookup) -> DataFrame:
    if both := set(records.columns) & set(rows.columns):
        raise TrailvecError(
            f"{lookup.path}: the column {min(both)} is also one of the records' own: rename it in one of the files"
        )
    same = [_column(name).cast("string") == F.col(_on(name)) for name in lookup.on]
    return records.join(rows, reduce(Column.__and__, same), "left").drop(*map(_on, lookup.on))


def _on(name: str) -> str:
    return f"trailvec_on_{name}"


def _column(name: str) -> Column:
    """A column by its whole name, dots and blanks included."""
    return F.col("`" + name.replace("`", "``") + "`")


def _check_columns(path: str, rows: DataFrame, names: Sequence[str]) -> None:
    found = [name for name in rows.columns if not name.startswith("trailvec_")]
    missing = [name for name in names if name not in found]
    if missing:
        near = difflib.get_close_matches(missing[0], found, n=1)
        hint = f"did you mean {near[0]}?" if near else f"found {', '.join(found)}: correct the mapping"
        raise TrailvecError(f"{path} has no column {missing[0]}, which the source's mapping names; {hint}")


# ---- raw frames → events ------------------------------------------------------------------------------


def to_events(raw: DataFrame, mapping: Input, source: str, settings: IngestSettings, now: datetime) -> DataFrame:
    """The records as rows of EVENTS, with `reason` (NULL: an event), `raw` (of refused ones) and `file`.

    Args:
        raw: what `read_raw` gives.
        now: UTC, with zone; what is later than it by more than the tolerance is refused.

    Raises:
        TrailvecError: the mapping has an unknown zone or SQL that Spark does not take.
    """
    zones = _known_zones(raw.sparkSession)
    columns = mapping.columns
    if columns.event_ts.zone not in zones:
        near = difflib.get_close_matches(columns.event_ts.zone, zones, n=1)
        hint = f"did you mean {near[0]}?" if near else "write an IANA name such as Europe/London"
        raise TrailvecError(f"source {source}: event_ts: unknown zone {columns.event_ts.zone}; {hint}")

    fields = [_column(name) for name in raw.columns if name not in (FILE, LINE, BROKEN)]
    record = F.coalesce(F.col(LINE), F.to_json(F.struct(*fields)))
    if columns.event_id.ordinal:
        identical = Window.partitionBy(FILE, F.sha2(record, 256)).orderBy(FILE)
        raw = raw.withColumn(_ORDINAL, F.row_number().over(identical))
    try:
        event_ts = _given(columns.event_ts)
        event_ts_type = raw.select(event_ts).schema[0].dataType
        own_rules = [F.when(F.expr(rule.when), F.lit(rule.reason)) for rule in mapping.reject]
        texts = {n: _text(_given(value)) for n, value in columns.given().items() if n != "event_ts"}
        given = raw.select(
            *[
                texts.get(c.name, F.lit(None).cast("string")).alias(c.name)
                for c in EVENTS.columns
                if _is_mapped(c.name)
            ],
            _time(event_ts, event_ts_type, columns.event_ts).alias("event_ts"),
            _text(event_ts).isNotNull().alias("has_event_ts"),
            _attributes(mapping.attributes).alias("attributes"),
            F.coalesce(F.when(F.col(BROKEN), F.lit("broken_row")), *own_rules).alias("own_reason"),
            record.alias("raw"),
            F.col(FILE).alias("file"),
        )
    except AnalysisException as error:
        said = explain(error) or str(error).strip().splitlines()[0]
        raise TrailvecError(f"source {source}: {said}: correct the mapping") from None

    events = given.withColumn("reason", _reason(settings, now, zones)).withColumns(
        {"amount": _number("amount"), "quantity": _number("quantity"), "source": F.lit(source)}
    )
    return events.select(
        *[c.name for c in EVENTS.columns],
        "reason",
        F.when(F.col("reason").isNotNull(), F.col("raw")).alias("raw"),
        "file",
    )


def _is_mapped(name: str) -> bool:
    return name not in ("event_ts", "attributes", "source")


def _known_zones(spark: SparkSession) -> list[str]:
    """The zones that Spark itself knows: it is Java that converts times."""
    return sorted(str(zone) for zone in spark._jvm.java.time.ZoneId.getAvailableZoneIds())  # type: ignore[union-attr]


def _given(value: Given) -> Column:
    """The value as the record has it, of any type."""
    if isinstance(value, IdValue) and value.columns:
        parts = [_text(_column(name)) for name in value.columns]
        if value.ordinal:
            parts.append(F.col(_ORDINAL).cast("string"))
        between = F.lit(value.separator)
        joined = F.concat(*[part for name in parts for part in (between, name)][1:])
        return F.sha2(joined, 256) if value.sha256 else joined
    if value.constant is not None:
        return F.lit(value.constant)
    given = F.expr(value.expr) if value.expr is not None else _column(str(value.column))
    if isinstance(value, Value) and value.default is not None:
        return F.coalesce(_text(given), F.lit(value.default))
    return given


def _text(value: Column) -> Column:
    text = value.cast("string")
    return F.when(F.trim(text) != "", text)


def _number(name: str) -> Column:
    number = F.col(name).cast("double")
    return F.when(F.col(name).rlike(_NUMBER) & (F.abs(number) < float("inf")), number)


def _time(value: Column, given: T.DataType, mapping: TimeValue) -> Column:
    """The instant; NULL where it can't be read. A local time that the clock skips (spring) is read as if it had not
    been put forward; one that it shows twice (autumn) is the first."""
    if isinstance(given, T.TimestampType):
        return value
    if isinstance(given, (T.TimestampNTZType, T.DateType)):
        # The session's zone is UTC, so the cast takes the clock's reading as it is.
        return F.to_utc_timestamp(value.cast("timestamp"), mapping.zone)
    if mapping.format in _EPOCH:
        unit, number = _EPOCH[mapping.format]
        return F.timestamp_micros((value.cast(number) * unit).cast("bigint"))
    text = F.trim(value.cast("string"))
    if mapping.format is None:
        # Spark's cast alone would take "12:00" for noon of today.
        instant = text.cast("timestamp")
        local = F.when(text.rlike(f"^{_ISO_LOCAL}$"), F.to_utc_timestamp(instant, mapping.zone))
        return local.otherwise(F.when(text.rlike(f"^{_ISO_ZONED}$"), instant))
    instant = F.to_timestamp(text, mapping.format)
    return instant if _has_zone(mapping.format) else F.to_utc_timestamp(instant, mapping.zone)


def _has_zone(pattern: str) -> bool:
    """Whether a datetime pattern reads a zone: one of its letters outside quotes."""
    return any(letter in part for part in pattern.split("'")[::2] for letter in "VzOXxZ")


def _attributes(names: list[str]) -> Column:
    if not names:
        return F.lit(None).cast("map<string,string>")
    pairs = [part for name in names for part in (F.lit(name), _text(_column(name)))]
    return F.map_filter(F.create_map(*pairs), lambda _, value: value.isNotNull())


def _reason(settings: IngestSettings, now: datetime, zones: list[str]) -> Column:
    """Why a record is no event, over its texts; NULL when it is one."""
    event_ts = F.col("event_ts")
    earliest = settings.earliest.replace(tzinfo=timezone.utc)
    latest = now + timedelta(hours=settings.future_tolerance_hours)
    checks = {f"missing_{name}": F.col(name).isNull() for name in _REQUIRED}
    checks["missing_event_ts"] = ~F.col("has_event_ts")
    checks["bad_event_ts"] = event_ts.isNull()
    checks["event_before_earliest"] = event_ts < F.lit(earliest)
    checks["event_in_future"] = event_ts > F.lit(latest)
    for name in ("amount", "quantity"):
        checks[f"bad_{name}"] = F.col(name).isNotNull() & _number(name).isNull()
    checks["bad_time_zone"] = ~F.coalesce(F.col("time_zone").isin(zones), F.lit(False))
    checks |= {f"long_{name}": F.length(name) > _LONGEST_ID for name in _IDS}
    return F.coalesce(F.col("own_reason"), *[F.when(holds, F.lit(reason)) for reason, holds in checks.items()])


# ---- one event, one row -------------------------------------------------------------------------------


def mark_duplicates(records: DataFrame) -> DataFrame:
    """`records` (as `to_events` gives them) with a reason at every event but one of each event_id.

    The reason is REPEAT where the event equals the kept one in all columns, else duplicate_event_id. One shuffle.
    """
    is_event = F.col("reason").isNull()
    # Map columns have no hash; xxhash64 skips NULLs, so that each is marked.
    comparable = [
        F.sort_array(F.map_entries(c.name)) if c.type.startswith("map") else F.col(c.name) for c in EVENTS.columns
    ]
    content = F.xxhash64(*[part for column in comparable for part in (column, column.isNull())])
    # Refused records go the same way only to be spread evenly.
    same_id = Window.partitionBy(is_event, F.when(is_event, F.col("event_id")).otherwise(F.sha2("raw", 256)))
    in_order = same_id.orderBy("event_ts", "content")
    ranked = records.withColumn("content", content).withColumns(
        {"version": F.dense_rank().over(in_order), "place": F.row_number().over(in_order)}
    )
    conflicts = is_event & (F.col("version") > 1)
    reason = (
        F.when(conflicts, F.lit("duplicate_event_id"))
        .when(is_event & (F.col("place") > 1), F.lit(REPEAT))
        .otherwise(F.col("reason"))
    )
    event = F.to_json(F.struct(*[c.name for c in EVENTS.columns]))
    return ranked.withColumns({"raw": F.when(conflicts, event).otherwise(F.col("raw")), "reason": reason}).drop(
        "content", "version", "place"
    )


# ---- the stage ----------------------------------------------------------------------------------------


def run(runtime: Runtime) -> None:
    settings = runtime.config.ingest
    now = datetime.now(timezone.utc)
    if not settings.sources:
        raise TrailvecError(
            "ingest.sources is empty: name at least one mapping, such as conf/sources/completejourney.toml"
        )
    frames = []
    for source in map(load_source, settings.sources):
        for mapping in source.input:
            raw = read_raw(runtime.spark, mapping, _data_dir(runtime))
            frames.append(to_events(raw, mapping, source.name, settings, now))
    # Counted and written twice: read the files once.
    records = mark_duplicates(reduce(DataFrame.unionByName, frames)).persist(StorageLevel.DISK_ONLY)
    try:
        counts = {row["reason"]: int(row["count"]) for row in records.groupBy("reason").count().collect()}
        runtime.report.rows_in["records"] = sum(counts.values())
        if repeats := counts.pop(REPEAT, 0):
            runtime.report.notes.append(f"{repeats:,} exact repeats of an event dropped")
        _check_share(records, counts, runtime.report.rows_in["records"], settings.max_rejected_share)
        refused = F.col("reason").isNotNull() & (F.col("reason") != REPEAT)
        runtime.write(REJECTED_EVENTS, records.where(refused))
        runtime.write(EVENTS, records.where(F.col("reason").isNull()))
    finally:
        records.unpersist()


def _check_share(records: DataFrame, counts: dict[str | None, int], all_records: int, allowed: float) -> None:
    """Stops the job before anything is written where too much is refused."""
    refused = {reason: count for reason, count in counts.items() if reason is not None}
    total = sum(refused.values())
    if total <= allowed * all_records:
        return
    examples = []
    for reason, count in sorted(refused.items(), key=lambda item: (-item[1], item[0]))[:3]:
        row = records.where(F.col("reason") == reason).agg(F.min("raw").alias("raw")).collect()[0]
        examples.append(f"{reason} {count:,} (such as {str(row['raw'])[:200]})")
    raise TrailvecError(
        f"{total:,} of {all_records:,} records are refused, more than ingest.max_rejected_share = {allowed:g} allows; "
        f"nothing was written: correct the mapping or the files, or allow more; most often: {'; '.join(examples)}"
    )


def _data_dir(runtime: Runtime) -> Path:
    return Path(runtime.config.ingest.data_dir.removeprefix("file://")).absolute()


def inputs(runtime: Runtime) -> dict[str, Any]:
    """What the result depends on beside the settings: the mappings' text; path, size and time of each file."""
    mappings, files = {}, []
    for path in runtime.config.ingest.sources:
        source = load_source(path)
        mappings[path] = Path(path).read_text(encoding="utf-8")
        for mapping in source.input:
            for pattern in (mapping.path, *[lookup.path for lookup in mapping.lookups]):
                files += find_files(_data_dir(runtime), pattern)
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(set(files))]
    return {"mappings": mappings, "files": stats}


STAGE = Stage(
    "ingest",
    "read the sources' files, check and deduplicate their records",
    run,
    reads=(),
    writes=(REJECTED_EVENTS, EVENTS),
    settings=("ingest",),
    inputs=inputs,
)


def main() -> None:
    stage_main("ingest")


if __name__ == "__main__":
    main()
