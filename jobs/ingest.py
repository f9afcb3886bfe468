"""ingest: files and topics → events, rejected_events.

Structured Streaming keeps the books: a checkpoint for each input says which files (or offsets) were read, and each run
takes what is new (Trigger.AvailableNow). A batch is read, checked, deduplicated against the batch and the table, and
committed: rejected_events first, under the batch's number, so that a batch that is done again adds nothing; then
events, by MERGE. A kill at any moment and the same command end as if nothing had happened (docs/decisions/0007).

Each source's mapping (`jobs/sources.py`) is applied to its records; nothing in a record makes the job fail. A record
that is no event goes to rejected_events with the first reason that holds, in this order: broken_row; the mapping's
own rules; invalid_utf8; missing_* (user_id, item_id, event_type, vertical, event_ts, event_id; blank counts as
missing); bad_type_* (an id that is no text and no whole number in its file); bad_event_ts, event_before_earliest,
event_in_future, bad_amount, bad_quantity, negative_amount, bad_time_zone; long_* (an id of more than 512 characters);
duplicate_event_id.

The same event again, equal in every column, is dropped without a word, however long ago it came; the same event_id with
other content keeps the row with the smallest (event_ts, hash of content), whichever came first. So records may come in
any order, in any batches and any number of times.

What comes of a user whom erase_users took out is dropped, events and refused records alike, and only counted.

An id with an ordinal numbers the identical records *of one file*: a line that stands twice in a file is two events,
while a file that comes twice, even under another name, is the same events again. The price: a file cut in two
between two identical lines can't be told from a file and its copy, and makes one event of them.
"""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from datetime import date, datetime, timedelta, timezone
from functools import reduce
from pathlib import Path
from typing import Any

from pyspark import StorageLevel
from pyspark.errors import AnalysisException, ParseException, StreamingQueryException
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from jobs.cli import stage_main
from jobs.config import IngestSettings, shipped
from jobs.errors import TrailvecError, explain
from jobs.files import Place
from jobs.pruning import within_days
from jobs.runtime import Runtime, Stage
from jobs.sources import Given, IdValue, Input, Kafka, Lookup, Source, TimeValue, Value, load_source
from jobs.tables import EVENTS, REJECTED_EVENTS
from jobs.tombstones import Test, erased_tests
from training.stores import remove_tree
from training.urls import file_url

# Columns of a raw frame beside the record's own.
FILE = "trailvec_file"  # the file's URI, or the topic's name, partition and offset
LINE = "trailvec_line"  # the record's text; NULL where the columns say it all
BROKEN = "trailvec_broken"  # the line could not be split into columns
REST = "trailvec_rest"  # what nothing in the mapping names, as a map
_ORDINAL = "trailvec_ordinal"

REPEAT = "exact_repeat"  # not a refusal: the event is there already
BROKEN_ROW = "broken_row"
ERASED = "erased_user"  # nor is this: whom erase_users took out stays out, and leaves no trace here either

_NO_REFUSAL = (REPEAT, ERASED)
_REQUIRED = ("user_id", "item_id", "event_type", "vertical", "event_ts", "event_id")
_IDS = ("event_id", "user_id", "item_id", "basket_id")
_LONGEST_ID = 512
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
_ISO_LOCAL = r"\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?)?"
_ISO_ZONED = r"\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?\s*(Z|[+-]\d{2}(:?\d{2})?)"
# Microseconds in one unit; and the widest number whose microseconds still fit into 64 bits.
_EPOCH = {"epoch_s": (1_000_000, "decimal(18,6)"), "epoch_ms": (1_000, "decimal(21,6)")}
# What Spark's own file listing gives of a file without reading it.
_LISTING = "path string, modificationTime timestamp, length long, content binary"

# Bytes of a file that may be one task (a Parquet file of one row group is, whatever its size) while cores are idle.
_ONE_TASK = 4_000_000


# ---- files → raw frames -------------------------------------------------------------------------------


def find_files(data_dir: Path, path: str) -> list[Path]:
    """The local files that a mapping's path (file, folder or pattern) stands for, sorted.

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
        raise _no_such_file(data_dir / path)
    return sorted(files)


def _find(spark: SparkSession, data_dir: Place, path: str) -> list[tuple[str, int, int]]:
    """URI, size and time (of whatever unit) of each such file, wherever it lies; sorted.

    Raises:
        TrailvecError: there is none.
    """
    if isinstance(data_dir, Path):
        local = [(file, file.stat()) for file in find_files(data_dir, path)]
        return [(file_url(str(file)), stat.st_size, stat.st_mtime_ns) for file, stat in local]
    # Spark's own listing: it leaves out the same names, and asks the file system from many tasks at once.
    reader = spark.read.format("binaryFile").schema(_LISTING).option("recursiveFileLookup", True)
    try:
        files = reader.load(str(data_dir / path)).select("path", "length", F.unix_micros("modificationTime")).collect()
    except AnalysisException as error:
        if "PATH_NOT_FOUND" not in str(error):
            raise
        files = []
    if not files:
        raise _no_such_file(data_dir / path)
    return sorted((file[0], file[1], file[2]) for file in files)


def _no_such_file(path: Place) -> TrailvecError:
    return TrailvecError(f"{path}: no such file: correct the mapping's path or ingest.data_dir")


def read_raw(
    spark: SparkSession, mapping: Input, data_dir: Place, files: Sequence[str], spread: bool = False
) -> list[DataFrame]:
    """The records of some files of an input: their own columns, those of the lookups, FILE, LINE, BROKEN and REST.

    CSV and JSON columns are strings (a nested JSON value is its JSON text); Parquet columns keep their types. Files
    whose columns differ come as frames of their own.

    Args:
        spread: parse the records in a task for each core, whatever files they lie in: for few and large files.

    Raises:
        TrailvecError: a file does not exist, or a column that the mapping names.
    """
    # With it, Spark finds partition columns (day=2017-01-01) in the files' paths.
    folder = data_dir / str(mapping.path)
    base = {"basePath": file_url(str(folder))} if folder.is_dir() else {}
    if mapping.format == "csv":
        groups = [_read_csv(spark, group, mapping.delimiter, base) for group in _by_header(spark, files)]
    elif mapping.format == "parquet":
        groups = [_with_place(frame) for frame in _read_parquet(spark, _as_patterns(files), base)]
    else:
        groups = [spark.read.options(**base).text(_as_patterns(files)).select(F.col("value").alias(LINE), _file())]
    if spread:
        groups = [records.repartition(spark.sparkContext.defaultParallelism) for records in groups]
    return _finish(groups, mapping, data_dir)


def read_topic(records: DataFrame, mapping: Input, data_dir: Place) -> list[DataFrame]:
    """As `read_raw`, of a batch of Kafka's records."""
    place = F.concat_ws("/", "topic", "partition", "offset").alias(FILE)
    return _finish([records.select(F.col("value").cast("string").alias(LINE), place)], mapping, data_dir)


def _finish(groups: list[DataFrame], mapping: Input, data_dir: Place) -> list[DataFrame]:
    """The records parsed, if they are lines of JSON, with the lookups' columns and REST."""
    if not groups:
        return []
    lookups = [_read_lookup(groups[0].sparkSession, lookup, data_dir) for lookup in mapping.lookups]
    looked_up = {name for rows in lookups for name in rows.columns}
    named = _named_columns(mapping)
    claimed = {*named, *mapping.ignore} - set(mapping.attributes)

    def finish(records: DataFrame) -> DataFrame:
        if mapping.format == "json":
            records = _parse_json(records, [name for name in named if name not in looked_up], claimed)
        else:
            rest = [name for name in records.columns if not name.startswith("trailvec_") and name not in claimed]
            records = records.withColumn(REST, _texts(rest))
        for lookup, rows in zip(mapping.lookups, lookups, strict=True):
            records = _join_lookup(records, rows, lookup)
        _check_columns(mapping.place, records, mapping.column_names())
        return records

    return [finish(records) for records in groups]


def _as_patterns(files: Sequence[str]) -> list[str]:
    """Names as Spark's readers, which take patterns, have to be told them."""
    return [re.sub(r"([][{}*?\\])", r"\\\1", file) for file in files]


def _texts(names: Sequence[str]) -> Column:
    if not names:
        return F.lit(None).cast("map<string,string>")
    pairs = [part for name in names for part in (F.lit(name), _text(_column(name)))]
    return F.map_filter(F.create_map(*pairs), lambda _, value: value.isNotNull())


def _file() -> Column:
    return F.col("_metadata.file_path").alias(FILE)


def _with_place(rows: DataFrame) -> DataFrame:
    return rows.select("*", _file(), F.lit(None).cast("string").alias(LINE), F.lit(False).alias(BROKEN))


def _by_header(spark: SparkSession, files: Sequence[str]) -> list[list[str]]:
    """The files of each header, in the order of their names."""
    jvm: Any = spark._jvm
    conf = spark._jsc.hadoopConfiguration()
    codecs = jvm.org.apache.hadoop.io.compress.CompressionCodecFactory(conf)
    groups: dict[str, list[str]] = {}
    for file in sorted(files):
        path = jvm.org.apache.hadoop.fs.Path(file)
        codec = codecs.getCodec(path)
        opened = path.getFileSystem(conf).open(path)
        text = opened if codec is None else codec.createInputStream(opened)
        reader = jvm.java.io.BufferedReader(jvm.java.io.InputStreamReader(text, "UTF-8"))
        groups.setdefault(reader.readLine() or "", []).append(file)
        reader.close()
    return [group for header, group in groups.items() if header]  # an empty file has no records


def _read_csv(
    spark: SparkSession, files: Sequence[str], delimiter: str, base: dict[str, str], mode: str = "PERMISSIVE"
) -> DataFrame:
    """Files of one header."""
    reader = spark.read.options(header=True, sep=delimiter, escape='"', enforceSchema=False, **base)
    files = _as_patterns(files)
    header = reader.csv(files[0]).columns
    schema = T.StructType([T.StructField(name, T.StringType()) for name in [*header, LINE]])
    rows = reader.options(mode=mode, columnNameOfCorruptRecord=LINE).schema(schema).csv(files)
    return rows.select("*", _file(), F.col(LINE).isNotNull().alias(BROKEN))


def _read_parquet(spark: SparkSession, files: Sequence[str], base: dict[str, str]) -> list[DataFrame]:
    reader = spark.read.options(**base)
    try:
        return [reader.option("mergeSchema", True).parquet(*files)]
    except Exception as error:
        if "CANNOT_MERGE_SCHEMAS" not in str(error):
            raise
    # A column has other types in other files: each kind of file is read by its own.
    groups: dict[str, list[str]] = {}
    for file in sorted(files):
        groups.setdefault(reader.parquet(file).schema.json(), []).append(file)
    return [reader.parquet(*group) for group in groups.values()]


def _parse_json(lines: DataFrame, names: list[str], claimed: set[str]) -> DataFrame:
    """One object of each line that is not blank; a key that the mapping names nowhere stands in REST."""
    rest = F.map_filter("parsed", lambda key, value: ~key.isin(*claimed) & _text(value).isNotNull())
    return (
        lines.where(F.trim(LINE) != "")
        .select(LINE, FILE, F.from_json(LINE, "map<string,string>").alias("parsed"))
        .select(
            *[F.col("parsed")[name].alias(name) for name in names],
            FILE,
            LINE,
            F.col("parsed").isNull().alias(BROKEN),
            rest.alias(REST),
        )
    )


def _named_columns(mapping: Input) -> list[str]:
    """Every raw column that the mapping names, those inside SQL expressions too."""
    names = mapping.column_names()
    for expression in mapping.expressions():
        try:
            leaves = F.expr(expression)._jc.expr().collectLeaves()
        except ParseException as error:
            raise TrailvecError(f"{mapping.place}: {explain(error)}: correct the mapping") from None
        for leaf in (leaves.apply(i) for i in range(leaves.size())):
            if leaf.getClass().getSimpleName() == "UnresolvedAttribute":
                names.append(leaf.nameParts().head())
    return list(dict.fromkeys(names))


def _read_lookup(spark: SparkSession, lookup: Lookup, data_dir: Place) -> DataFrame:
    """One row for each value of the `on` columns; these as text, under names of their own (_on)."""
    files = [file for file, *_ in _find(spark, data_dir, lookup.path)]
    if lookup.format == "csv":
        rows = _read_csv(spark, files, lookup.delimiter, {}, mode="FAILFAST").drop(FILE, LINE, BROKEN)
    else:
        rows = spark.read.parquet(*files)
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

    fields = [_column(name) for name in raw.columns if name not in (FILE, LINE, BROKEN, REST)]
    if columns.event_id.ordinal:
        record = F.coalesce(F.col(LINE), F.to_json(F.struct(*fields)))
        identical = Window.partitionBy(FILE, F.sha2(record, 256)).orderBy(FILE)
        raw = raw.withColumn(_ORDINAL, F.row_number().over(identical))
    try:
        event_ts = _given(columns.event_ts)
        event_ts_type = raw.select(event_ts).schema[0].dataType
        own_rules = [F.when(F.expr(rule.when), F.lit(rule.reason)) for rule in mapping.reject]
        bad_types = [F.when(_is_no_id(raw, columns.given()[n], mapping), f"bad_type_{n}") for n in _given_ids(mapping)]
        texts = {n: _text(_given(value)) for n, value in columns.given().items() if n != "event_ts"}
        given = raw.select(
            *[
                texts.get(c.name, F.lit(None).cast("string")).alias(c.name)
                for c in EVENTS.columns
                if _is_mapped(c.name)
            ],
            _time(event_ts, event_ts_type, columns.event_ts).alias("event_ts"),
            _text(event_ts).isNotNull().alias("has_event_ts"),
            F.col(REST).alias("attributes"),
            F.coalesce(F.when(F.col(BROKEN), F.lit(BROKEN_ROW)), *own_rules).alias("own_reason"),
            F.coalesce(F.lit(None).cast("string"), *bad_types).alias("bad_type"),
            F.struct(*fields).alias("record"),
            F.col(LINE).alias("line"),
            F.col(FILE).alias("file"),
        )
    except AnalysisException as error:
        said = explain(error) or str(error).strip().splitlines()[0]
        raise TrailvecError(f"source {source}: {said}: correct the mapping") from None

    events = given.withColumn("reason", _reason(settings, now, zones)).withColumns(
        {"amount": _number("amount"), "quantity": _number("quantity"), "source": F.lit(source)}
    )
    # What a broken row shows as its user may be a part of anything.
    user_id = F.when(F.col("reason").isNull() | (F.col("reason") != BROKEN_ROW), F.col("user_id")).alias("user_id")
    return events.select(
        *[user_id if c.name == "user_id" else c.name for c in EVENTS.columns],
        "reason",
        # Made into text here and not above, where it would be made for every record.
        F.when(F.col("reason").isNotNull(), F.coalesce("line", F.to_json("record"))).alias("raw"),
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


def _given_ids(mapping: Input) -> list[str]:
    return [name for name in _IDS if name in mapping.columns.given()]


def _is_no_id(raw: DataFrame, value: Given, mapping: Input) -> Column:
    """True where the value has a type that no id has: 17850.0 is 17850 in the file before, and nobody would notice."""
    if isinstance(value, IdValue) and value.columns:
        return F.lit(False)  # made of many values, of any type
    given = _given(value)
    if mapping.format == "json":
        return F.coalesce(F.ltrim(given.cast("string")).rlike(r"^[\[{]"), F.lit(False))  # an object or a list
    kind = raw.select(given).schema[0].dataType
    return F.lit(not isinstance(kind, (T.StringType, T.IntegralType, T.DateType, T.NullType, T.DecimalType)))


def _is_valid_text(names: Sequence[str]) -> Column:
    """False where bytes are no UTF-8: Java reads them as U+FFFD, which no clean log holds."""
    parts = [*map(F.col, names), F.array_join(F.map_values("attributes"), "")]
    return ~F.decode(F.encode(F.concat_ws("", *parts), "UTF-8"), "UTF-8").contains("\ufffd")


def _reason(settings: IngestSettings, now: datetime, zones: list[str]) -> Column:
    """Why a record is no event, over its texts; NULL when it is one."""
    event_ts, amount = F.col("event_ts"), _number("amount")
    earliest = settings.earliest.replace(tzinfo=timezone.utc)
    latest = now + timedelta(hours=settings.future_tolerance_hours)
    may_be_negative = F.col("event_type").isin(*settings.negative_amount_event_types)
    texts = [c.name for c in EVENTS.columns if _is_mapped(c.name)]
    unread = {"invalid_utf8": ~_is_valid_text(texts)}
    unread |= {f"missing_{name}": F.col(name).isNull() for name in _REQUIRED}
    unread["missing_event_ts"] = ~F.col("has_event_ts")
    wrong = {
        "bad_event_ts": event_ts.isNull(),
        "event_before_earliest": event_ts < F.lit(earliest),
        "event_in_future": event_ts > F.lit(latest),
        "bad_amount": F.col("amount").isNotNull() & amount.isNull(),
        "bad_quantity": F.col("quantity").isNotNull() & _number("quantity").isNull(),
        "negative_amount": (amount < 0) & ~may_be_negative,
        "bad_time_zone": ~F.coalesce(F.col("time_zone").isin(zones), F.lit(False)),
        **{f"long_{name}": F.length(name) > _LONGEST_ID for name in _IDS},
    }

    def named(checks: dict[str, Column]) -> list[Column]:
        return [F.when(holds, F.lit(reason)) for reason, holds in checks.items()]

    return F.coalesce(F.col("own_reason"), *named(unread), F.col("bad_type"), *named(wrong))


def without_erased(records: DataFrame, tests: tuple[Test, Test] | None) -> DataFrame:
    """`records` (as `to_events` gives them) with reason ERASED and no raw record where the user is erased: by their
    user_id, and where it can't be read, by what stands in the raw record."""
    if tests is None:
        return records
    is_erased, holds_erased = tests
    unread = F.when(F.col("user_id").isNull(), F.col("raw"))  # NULL is tested for free
    erased = records.withColumn("erased", is_erased(F.col("user_id")) | holds_erased(unread))
    keep = ~F.col("erased")
    return erased.withColumns(
        {"reason": F.when(keep, F.col("reason")).otherwise(ERASED), "raw": F.when(keep, F.col("raw"))}
    ).drop("erased")


# ---- one event, one row -------------------------------------------------------------------------------


def mark_duplicates(records: DataFrame, duplicates: str) -> DataFrame:
    """`records` (as `to_events` gives them, and `stored`: the row is in the table) with a reason at every event but
    one of each event_id (where duplicates is "same_day": of each event_id and day).

    The reason is REPEAT where the event equals the kept one in all columns, else duplicate_event_id. One shuffle.
    """
    is_event = F.col("reason").isNull()
    # Map columns have no hash; xxhash64 skips NULLs, so that each is marked.
    comparable = [
        F.sort_array(F.map_entries(c.name)) if c.type.startswith("map") else F.col(c.name) for c in EVENTS.columns
    ]
    content = F.xxhash64(*[part for column in comparable for part in (column, column.isNull())])
    # Refused records go the same way only to be spread evenly.
    key = [is_event, F.when(is_event, F.col("event_id")).otherwise(F.sha2(F.coalesce("raw", "event_id"), 256))]
    same_id = Window.partitionBy(*key, *([F.to_date("event_ts")] if duplicates == "same_day" else []))
    in_order = same_id.orderBy("event_ts", "content")
    ranked = records.withColumn("content", content).withColumns(
        {
            "version": F.dense_rank().over(in_order),
            "place": F.row_number().over(same_id.orderBy("event_ts", "content", F.desc("stored"))),
        }
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


def same_ids(table: str, low: str, high: str, days: Sequence[date] | None) -> Column:
    """A condition over the columns of the events table (`table` is its alias, with a dot, or "") that all its rows with
    an event_id of a batch fulfil, in literals, so that the files' statistics spare most files.

    Args:
        low, high: the batch's first and last event_id. Ids that go up with time (most do) lie in few files.
        days: the days on which such a row may lie; None: on any.
    """
    condition = F.col(f"{table}event_id").between(low, high)
    return condition if days is None else condition & within_days(F.col(f"{table}event_ts"), days)


# ---- one batch ----------------------------------------------------------------------------------------


def commit_batch(
    runtime: Runtime, frames: list[DataFrame], writer: str, number: int, read: Counter[str | None]
) -> None:
    """Checks, deduplicates and commits the records of one batch (frames as `to_events` gives them).

    Args:
        writer, number: the batch's name; of the same batch, rejected_events takes the rows once.
        read: by reason (None: an event), the records of this run's earlier batches; this one's are added.
    """
    settings = runtime.config.ingest
    same_day = settings.duplicates == "same_day"
    # Read once; looked into for its ids, judged, counted and written.
    given = without_erased(reduce(DataFrame.unionByName, frames), erased_tests(runtime))
    given = given.withColumn("stored", F.lit(False)).persist(StorageLevel.DISK_ONLY)
    events = given.where(F.col("reason").isNull())
    low, high = events.agg(F.min("event_id"), F.max("event_id")).collect()[0]
    days = [row[0] for row in events.select(F.to_date("event_ts")).distinct().collect()] if same_day else None
    runtime.create(EVENTS)
    ids = events.select("event_id").distinct()
    stored = None if low is None else stored_events(runtime, ids, same_ids("", low, high, days), days)
    together = given if stored is None else given.unionByName(stored)
    records = mark_duplicates(together, settings.duplicates).persist(StorageLevel.DISK_ONLY)
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
        if counts.total() > counts[None] + sum(counts[reason] for reason in _NO_REFUSAL) or replaced:
            runtime.append(REJECTED_EVENTS, refused, batch=(writer, number), done=False)
        if counts[None]:
            new = records.where(F.col("reason").isNull() & ~F.col("stored"))
            where = same_ids("old.", low, high, days)
            if same_day:
                where &= F.to_date("old.event_ts") == F.to_date("new.event_ts")
            runtime.merge(EVENTS, new, where=where, insert_only=replaced == 0, done=False)
        if repeats := counts[REPEAT]:
            runtime.report.notes.append(f"{repeats:,} exact repeats of an event dropped")
        if erased := counts[ERASED]:
            runtime.report.notes.append(f"{erased:,} records of erased users dropped")
    finally:
        records.unpersist()
        given.unpersist()


def stored_events(runtime: Runtime, ids: DataFrame, where: Column, days: Sequence[date] | None) -> DataFrame | None:
    """The rows of `events` with one of the ids (event_id, each once), as `mark_duplicates` wants them; None where there
    is none.

    The ids alone first: most batches bring nothing again, and read one of the table's columns instead of all.

    Args:
        where: `same_ids` of them.
        days: as there.
    """
    table = runtime.latest(EVENTS)
    there = table.where(where).select("event_id").join(ids, "event_id", "left_semi")
    low, high = there.agg(F.min("event_id"), F.max("event_id")).collect()[0]
    if low is None:
        return None
    return (
        table.where(same_ids("", low, high, days))
        .join(ids, "event_id", "left_semi")
        .select(
            *[c.name for c in EVENTS.columns],
            F.lit(None).cast("string").alias("reason"),
            F.lit(None).cast("string").alias("raw"),
            F.lit("table events").alias("file"),
            F.lit(True).alias("stored"),
        )
    )


def _check_share(records: DataFrame, counts: Counter[str | None], read: Counter[str | None], allowed: float) -> None:
    """Stops the job before this batch is written where too much is refused.

    The share is that of the run so far, this batch included: the last batch of a topic may be one record, and wrong.
    """

    def refused(of: Counter[str | None]) -> list[tuple[str, int]]:
        return [(reason, count) for reason, count in of.items() if reason not in (None, *_NO_REFUSAL)]

    total = sum(count for _, count in refused(read))
    if total <= allowed * read.total():
        return
    examples = []
    for reason, count in sorted(refused(counts), key=lambda item: (-item[1], item[0]))[:3]:
        row = records.where(F.col("reason") == reason).agg(F.min("raw").alias("raw")).collect()[0]
        examples.append(f"{reason} {count:,} (such as {str(row['raw'])[:200]})")
    raise TrailvecError(
        f"{total:,} of {read.total():,} records are refused, more than ingest.max_rejected_share = {allowed:g} allows; "
        f"nothing of this batch was written: correct the mapping or the files, or allow more; "
        f"most often: {'; '.join(examples)}"
    )


# ---- the stage ----------------------------------------------------------------------------------------


def follow(runtime: Runtime, source: Source, number: int) -> None:
    """Commits what is new of one input, batch by batch.

    Raises:
        TrailvecError: a batch is refused, or another ingest reads the same input right now.
    """
    mapping, settings, spark = source.input[number], runtime.config.ingest, runtime.spark
    name = f"{source.name}-{number}"
    checkpoint = runtime.place / "checkpoints" / "ingest" / name
    if runtime.forced:
        remove_tree(checkpoint)
    now = datetime.now(timezone.utc)
    read: Counter[str | None] = Counter()
    failed: list[BaseException] = []

    def batch(records: DataFrame, batch_number: int) -> None:
        started = time.monotonic()
        try:
            if mapping.kafka is not None:
                raw = read_topic(records, mapping, _data_dir(runtime))
            else:
                found = {row["path"]: row["length"] for row in records.collect()}
                few = len(found) < spark.sparkContext.defaultParallelism
                spread = few and max(found.values(), default=0) > _ONE_TASK
                raw = read_raw(spark, mapping, _data_dir(runtime), sorted(found), spread) if found else []
            if raw:
                query = json.loads((checkpoint / "metadata").read_text())["id"]
                before = runtime.report.rows_in["records"]
                events = [to_events(frame, mapping, source.name, settings, now) for frame in raw]
                commit_batch(runtime, events, f"ingest-{query}", batch_number, read)
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
        raise TrailvecError(f"{name}: {explain(error) or str(error).strip().splitlines()[0]}") from error


def _listing(spark: SparkSession, mapping: Input, runtime: Runtime) -> DataFrame:
    """The names of the input's files, as a stream: which of them are new, Spark's checkpoint knows."""
    given = _data_dir(runtime) / str(mapping.path)
    path = file_url(str(given))
    if given.is_file():
        path = f"{path[:-1]}[{path[-1]}]"  # Spark's stream takes a pattern or a folder, not a file
    files = spark.readStream.format("binaryFile").schema(_LISTING)
    # However old a file's time stamp is, when it comes, it is read.
    options = {"maxFilesPerTrigger": str(runtime.config.ingest.max_files_per_batch), "maxFileAge": "36500d"}
    return files.options(**options).load(path).select("path", "length")


def _topic(spark: SparkSession, kafka: Kafka, settings: IngestSettings) -> DataFrame:
    options = {
        "kafka.bootstrap.servers": kafka.bootstrap_servers,
        "subscribe": kafka.topic,
        "startingOffsets": "earliest",
        "maxOffsetsPerTrigger": str(settings.max_records_per_batch),
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
    for source in map(load_source, settings.sources):
        for number in range(len(source.input)):
            follow(runtime, source, number)
    # Only now is the stage up to date: a killed one has batches to come.
    runtime.touch(REJECTED_EVENTS)
    runtime.touch(EVENTS)


def _data_dir(runtime: Runtime) -> Place:
    return runtime.place_of(runtime.config.ingest.data_dir)


def inputs(runtime: Runtime) -> dict[str, Any]:
    """What the result depends on beside the settings: the mappings' text; path, size and time of each file."""
    mappings: dict[str, str] = {}
    files: list[tuple[str, int, int]] = []
    for path in runtime.config.ingest.sources:
        source = load_source(path)
        mappings[path] = shipped(path).read_text(encoding="utf-8")
        for mapping in source.input:
            for pattern in (mapping.path, *[lookup.path for lookup in mapping.lookups]):
                files += _find(runtime.spark, _data_dir(runtime), pattern) if pattern else []
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
    inputs=inputs,
)


def main() -> None:
    stage_main("ingest")


if __name__ == "__main__":
    main()
