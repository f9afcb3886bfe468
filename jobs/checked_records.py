"""Raw frames → events: applies a source's mapping to its records, and says why a record is not an event.

No record makes the job fail. One that is not an event gets the first reason that applies, in this order: broken_row;
the mapping's own rules; invalid_utf8; missing_* (user_id, item_id, event_type, vertical, event_ts, event_id; blank
counts as missing); bad_type_* (an id that is neither text nor a whole number: in a JSON line an object, a list or,
without quotes, a fraction; another text that is a fraction in a Parquet file, an object or a list); bad_event_ts,
event_before_earliest, event_in_future, bad_amount, bad_quantity, negative_amount, bad_time_zone; nul_* (an id with a
NUL character, which numpy drops from the end of strings); long_* (an id of more than 512 characters).
(jobs/ingest.py adds duplicate_event_id, which a single record can't show.)

An id with an ordinal numbers identical records *within one file*: a line that occurs twice in a file is two events,
while a file that arrives twice, even under another name, is the same events again. The price: a file split between two
identical lines looks like a file and its copy, so the two lines become one event.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from functools import reduce
from operator import or_

from pyspark.errors import AnalysisException, IllegalArgumentException, SparkUpgradeException
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from jobs.config import IngestSettings
from jobs.errors import TrailvecError, one_sentence
from jobs.raw_records import (
    BROKEN,
    FILE,
    INVALID,
    LINE,
    REST,
    is_id_type,
    is_invalid,
    is_nested_type,
    named_column,
    stripped,
    text_of,
    valid_text,
    without_padding,
)
from jobs.sources import Given, IdValue, Input, TimeValue, Value
from jobs.spark_session import JSON_MICROSECONDS
from jobs.tables import EVENTS
from spark_udfs.keyed import ColumnTest

BROKEN_ROW = "broken_row"
ERASED = "erased_user"  # not a rejection: records of erased users are dropped without a trace

_ORDINAL = "trailvec_ordinal"
_REQUIRED = ("user_id", "item_id", "event_type", "vertical", "event_ts", "event_id")
_IDS = ("event_id", "user_id", "item_id", "basket_id")
_LISTED = ("user_id", "item_id")  # also named in user-supplied lists, where blanks are stripped too
_LONGEST_ID = 512
_NUMBERS = ("amount", "quantity")
# Two amounts of 1e308 add up to infinity, which would make every profile NaN; below this, no number of them does.
_TOO_LARGE = 1e100
# Not 32-bit floats, whose text is another number than their 64-bit value, nor times, which Spark casts to numbers.
_NUMBER_TYPES = (T.DoubleType, T.IntegralType)
_TIME_TYPES = (T.TimestampType, T.TimestampNTZType, T.DateType)
_ZONE_LETTERS = "VzOXxZ"
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
_FRACTION = r"^-?\d+(\.\d+([eE][+-]?\d+)?|[eE][+-]?\d+)$"  # or with an exponent, as JSON has them
# A JSON escape of one half of a UTF-16 pair without the other; not an escaped backslash before "ud83d".
_HALF = (
    r"(?<!\\)(?:\\\\)*"
    r"(?:\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)
_ISO_LOCAL = r"\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?)?"
_ISO_ZONED = r"\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?\s*(Z|[+-]\d{2}(:?\d{2})?)"
# Microseconds per unit, and the widest decimal whose microseconds still fit into 64 bits.
_EPOCH = {"epoch_s": (1_000_000, "decimal(18,6)"), "epoch_ms": (1_000, "decimal(21,6)")}


def check_times(spark: SparkSession, mapping: Input, source: str) -> Column:
    """The condition that an event's time_zone is one that Spark knows, for `to_events`. (Made once for all batches: it
    names 600 zones.)

    Raises:
        TrailvecError: the mapping has an unknown zone or format, or one that can't be applied.
    """
    zones = _known_zones(spark)
    zone = mapping.columns.event_ts.zone
    if zone not in zones:
        near = difflib.get_close_matches(zone, zones, n=1)
        hint = f"did you mean {near[0]}?" if near else "write an IANA name such as Europe/London"
        raise TrailvecError(f"source {source}: event_ts: unknown zone {zone}; {hint}")
    pattern = mapping.columns.event_ts.format
    if pattern is not None and pattern not in _EPOCH and not _reads_times(spark, pattern):
        raise TrailvecError(
            f"source {source}: event_ts: format = {pattern!r} is not a Spark datetime pattern: write one, such as "
            f"dd/MM/yyyy HH:mm, or {' or '.join(_EPOCH)}"
        )
    if pattern is not None and zone != "UTC" and may_lack_zone(pattern):
        raise TrailvecError(
            f"source {source}: event_ts: with format = {pattern!r}, a time without a zone would be read as UTC, not as "
            f"{zone}: give each of the two forms its own input, or leave format out, which reads ISO 8601 with or "
            "without a zone"
        )
    given = mapping.columns.time_zone
    is_same_for_all = given.constant is not None and given.default is None
    return F.lit(given.constant in zones) if is_same_for_all else F.col("time_zone").isin(zones)


def to_events(
    raw: DataFrame, mapping: Input, source: str, settings: IngestSettings, now: datetime, *, zone_is_known: Column
) -> DataFrame:
    """The records as rows of EVENTS, with `reason` (NULL: an event), `raw` (of rejected ones) and `file`.

    Args:
        raw: what `read_raw` returns.
        now: with time zone UTC; an event later than this by more than the tolerance is rejected.
        zone_is_known: what `check_times` returns for the mapping.

    Raises:
        TrailvecError: the mapping has SQL that Spark refuses, or times that its zone or format can't be applied to.
    """
    try:
        given = _mapped(raw, mapping, source)
    except AnalysisException as error:
        raise TrailvecError(f"source {source}: {one_sentence(error)}: correct the mapping") from None

    # Numbers first: several reasons depend on them.
    numbered = given.withColumns({n: _number(given, n) for n in _NUMBERS})
    events = numbered.withColumns({"reason": _reason(numbered, settings, now, zone_is_known), "source": F.lit(source)})
    as_json = F.to_json("record", JSON_MICROSECONDS)
    # An event's texts are valid already. A broken row's user may be a fragment of anything, and no erasure lists
    # {"id": 4711}, 4711.0 or an id with a NUL inside: NULL makes it search the raw record instead.
    user_id = F.when(F.col("reason").isNull(), F.col("user_id"))
    says_who = (F.col("reason") != BROKEN_ROW) & ~F.col("is_no_user")
    named = text_of(stripped(without_padding(valid_text(F.col("user_id")))))
    user_id = user_id.when(says_who & ~named.contains("\0"), named).alias("user_id")
    return events.select(
        *[user_id if c.name == "user_id" else c.name for c in EVENTS.columns],
        "reason",
        # Converted to text here, for rejected records only; above, it would be for every record.
        F.when(F.col("reason").isNotNull(), valid_text(F.coalesce("line", as_json))).alias("raw"),
        "file",
    )


def _mapped(raw: DataFrame, mapping: Input, source: str) -> DataFrame:
    """The mapping applied: EVENTS' columns as the record gives them (numbers still unparsed, named by `_as_given`), and
    what `_reason` and `to_events` need: has_event_ts, own_reason, bad_type, is_no_user, is_invalid, record, line and
    file."""
    columns = mapping.columns
    fields = [named_column(name) for name in raw.columns if name not in (FILE, LINE, BROKEN, INVALID, REST)]
    if columns.event_id.ordinal:
        record = F.coalesce(F.col(LINE), F.to_json(F.struct(*fields), JSON_MICROSECONDS))
        # The hash first: the sort compares a prefix of the first key, and a file's name can't tell its records apart.
        identical = Window.partitionBy(F.sha2(record, 256), FILE).orderBy(FILE)
        raw = raw.withColumn(_ORDINAL, F.row_number().over(identical))
    given = columns.given()
    values = {n: _given(value) for n, value in given.items()}
    # As the record has them; an id composed of several columns may have values of any type.
    origins = {n: _raw(value) for n, value in given.items() if not (isinstance(value, IdValue) and value.columns)}
    own_rules = [F.when(F.expr(rule.when), F.lit(rule.reason)) for rule in mapping.reject]
    rules = {f"reject {number}": rule for number, rule in enumerate(own_rules)}  # only to see that they can be resolved
    types, types_there = _types(raw, values), _types(raw, origins | rules)
    event_ts, event_ts_type = values["event_ts"], types["event_ts"]
    is_local = columns.event_ts.zone != "UTC" or columns.event_ts.format is not None
    if columns.event_ts.expr is not None and isinstance(event_ts_type, T.TimestampType) and is_local:
        raise TrailvecError(
            f"source {source}: event_ts: expr = {columns.event_ts.expr!r} returns an instant, to which zone and "
            "format can't apply: have it return the text (with format), or use to_timestamp_ntz"
        )
    is_json = mapping.format == "json"
    ids = {n: _is_no_id(given[n], origins[n], types_there[n], is_json) for n in _IDS if n in origins}
    words = {n: _is_no_word(origins[n], types_there[n], is_json) for n in given if _is_text(n) and n not in _IDS}
    bad_types = [F.when(is_bad, f"bad_type_{n}") for n, is_bad in (ids | words).items()]
    texts = {n: text_of(value) for n, value in values.items() if _is_text(n)}
    texts |= {n: text_of(stripped(values[n].cast("string"))) for n in _LISTED}
    numbers = {n: _text_unless(values[n], types[n], _NUMBER_TYPES) for n in given if n in _NUMBERS}
    missing = F.lit(None).cast("string")
    return raw.select(
        *[texts.get(c.name, missing).alias(c.name) for c in EVENTS.columns if _is_text(c.name)],
        *[numbers.get(n, missing).alias(_as_given(n)) for n in _NUMBERS],
        _time(event_ts, event_ts_type, columns.event_ts).alias("event_ts"),
        _text_unless(event_ts, event_ts_type, _TIME_TYPES).isNotNull().alias("has_event_ts"),
        # NULL rather than an empty map: a new column that is blank must not change the event.
        F.when(F.size(REST) > 0, F.col(REST)).alias("attributes"),
        F.coalesce(F.when(F.col(BROKEN), F.lit(BROKEN_ROW)), *own_rules).alias("own_reason"),
        F.coalesce(F.lit(None).cast("string"), *bad_types).alias("bad_type"),
        ids["user_id"].alias("is_no_user"),
        F.col(INVALID).alias("is_invalid"),
        F.struct(*fields).alias("record"),
        F.col(LINE).alias("line"),
        F.col(FILE).alias("file"),
    )


def _is_text(name: str) -> bool:
    return name not in ("event_ts", "attributes", "source", *_NUMBERS)


def _as_given(number: str) -> str:
    return f"given_{number}"


def _types(raw: DataFrame, values: dict[str, Column]) -> dict[str, T.DataType]:
    """The values' types. (One plan for all: each takes Spark some 10 ms.)"""
    # An expression over a column that the record lacks would read another value if that had the column's name.
    rows = raw.select(*[value.alias(f"trailvec_{number}") for number, value in enumerate(values.values())])
    return dict(zip(values, (field.dataType for field in rows.schema), strict=True))


def _text_unless(value: Column, kind: T.DataType, kinds: tuple[type[T.DataType], ...]) -> Column:
    """The value as text, or unchanged if it has one of the types: none of these is blank, and formatting is slow."""
    return value if isinstance(kind, kinds) else text_of(value)


def _known_zones(spark: SparkSession) -> list[str]:
    """The time zones that Spark itself knows: those of Java, which converts the times."""
    zones = spark._jvm.java.time.ZoneId.getAvailableZoneIds()  # type: ignore[union-attr]
    return sorted(str(zones.toString()).strip("[]").split(", "))  # one call, not one a zone


def _reads_times(spark: SparkSession, pattern: str) -> bool:
    """Whether Spark accepts the datetime pattern, which it only checks when it parses a time."""
    try:
        spark.sql("SELECT to_timestamp('-', :pattern)", {"pattern": pattern}).collect()
    except (IllegalArgumentException, SparkUpgradeException):
        return False
    return True


def _given(value: Given) -> Column:
    """The value that the mapping makes from the record, of any type."""
    if isinstance(value, IdValue) and (value.columns or value.sha256 or value.ordinal):
        origins = [named_column(name) for name in value.columns] if value.columns else [_raw(value)]
        parts = [text_of(origin) for origin in origins]
        if value.ordinal:
            parts.append(F.col(_ORDINAL).cast("string"))
        between = F.lit(value.separator)
        joined = F.concat(*[part for name in parts for part in (between, name)][1:])
        return F.sha2(joined, 256) if value.sha256 else joined
    given = _raw(value)
    if isinstance(value, Value) and value.default is not None:
        return F.coalesce(text_of(given), F.lit(value.default))
    return given


def _raw(value: Given) -> Column:
    """The single value as the record has it, of any type."""
    if value.constant is not None:
        return F.lit(value.constant)
    return F.expr(value.expr) if value.expr is not None else named_column(str(value.column))


def _number(given: DataFrame, name: str) -> Column:
    """As double; NULL if it is not a number, or too large."""
    value = F.col(_as_given(name))
    number = value.cast("double")
    is_number = F.abs(number) < _TOO_LARGE
    return F.when(value.rlike(_NUMBER) & is_number if _is_string(given, _as_given(name)) else is_number, number)


def _is_string(given: DataFrame, name: str) -> bool:
    return isinstance(given.schema[name].dataType, T.StringType)


def _time(value: Column, given: T.DataType, mapping: TimeValue) -> Column:
    """The instant; NULL if it can't be parsed. A local time that daylight saving skips (spring) is read as if the clock
    had not been put forward; of an ambiguous one (autumn) the first is taken."""
    if isinstance(given, T.BinaryType):
        value = value.cast("string")
    if isinstance(given, T.TimestampType):
        return value
    if isinstance(given, (T.TimestampNTZType, T.DateType)):
        # Years that need more digits (a database's "infinity") overflow, which would fail the job.
        value = F.when(F.year(value).between(1, 9999), value)
        # The session's time zone is UTC, so the cast keeps the wall-clock time.
        return F.to_utc_timestamp(value.cast("timestamp"), mapping.zone)
    if mapping.format in _EPOCH:
        unit, number = _EPOCH[mapping.format]
        return F.timestamp_micros((value.cast(number) * unit).cast("bigint"))
    text = F.trim(value.cast("string"))
    if mapping.format is None:
        # Spark's cast alone would read "12:00" as noon today.
        instant = text.cast("timestamp")
        local = F.when(text.rlike(f"^{_ISO_LOCAL}$"), F.to_utc_timestamp(instant, mapping.zone))
        return local.otherwise(F.when(text.rlike(f"^{_ISO_ZONED}$"), instant))
    instant = F.to_timestamp(text, mapping.format)
    return instant if _has_zone(mapping.format) else F.to_utc_timestamp(instant, mapping.zone)


def _has_zone(pattern: str) -> bool:
    """Whether a datetime pattern parses a time zone: it has one of the zone letters outside quotes."""
    return any(letter in part for part in pattern.split("'")[::2] for letter in _ZONE_LETTERS)


def may_lack_zone(pattern: str) -> bool:
    """Whether the time zone is optional in a datetime pattern: a zone letter is in brackets."""
    unquoted = "".join(pattern.split("'")[::2])
    before = [unquoted[:place] for place, letter in enumerate(unquoted) if letter in _ZONE_LETTERS]
    return any(text.count("[") > text.count("]") for text in before)


def _is_no_id(value: Given, origin: Column, kind: T.DataType, is_json: bool) -> Column:
    """True if the value has a type that no id has: 17850.0 may be 17850 in an earlier file, and nobody would notice."""
    is_wrong = F.lit(not is_id_type(kind)) & origin.isNotNull()
    if is_json:
        text = origin.cast("string")
        is_wrong |= F.ltrim(text).rlike(r"^[\[{]")  # an object or a list
        if value.column is not None:
            # All values of a JSON line are read as texts. Read once more as a number, "17850.0" is NULL.
            number = T.StructType([T.StructField(value.column, T.DoubleType())])
            is_wrong |= F.when(text.rlike(_FRACTION), F.from_json(LINE, number).getField(value.column).isNotNull())
    return F.coalesce(is_wrong, F.lit(False))


def _is_no_word(origin: Column, kind: T.DataType, is_json: bool) -> Column:
    """True if the value's text can't be meant as a name or a category: an object, a list, or, where files have types, a
    fraction (1.0 is "1" in a file whose column is whole, as pandas writes it without missing values)."""
    if is_json:  # a plain text may begin like that too: "[new] tea"
        text = F.ltrim(origin.cast("string"))
        is_object = F.when(text.rlike(r"^[\[{]"), F.get_json_object(text, "$").isNotNull())
        return F.coalesce(is_object, F.lit(False))
    is_fraction = isinstance(kind, T.FractionalType) and not is_id_type(kind)
    return F.lit(is_nested_type(kind)) | (F.lit(is_fraction) & origin.isNotNull())


def _is_valid_text(names: Sequence[str]) -> Column:
    """False if some bytes are not UTF-8. Java reads these as U+FFFD; but whoever wrote a clean log may have done so
    too, and then the record's own bytes tell."""
    parts = [*map(F.col, names), F.array_join(F.map_values("attributes"), "")]
    text = F.concat_ws("", *parts)
    return ~(valid_text(text).contains("\ufffd") & (F.col("is_invalid") | is_invalid(text)))


def _has_half_a_character(ids: Sequence[str]) -> Column:
    """Whether an id has a question mark that stands for half a character: JSON can hold half of a UTF-16 pair, left by
    what cuts texts in JavaScript, and Java makes a question mark of it. Of two users it would make one. (A question
    mark of the id's own stands in the line too.)"""
    marked = [F.contains(name, F.lit("?")) & ~F.contains("line", F.col(name)) for name in ids]
    any_marked = reduce(or_, [F.coalesce(each, F.lit(False)) for each in marked])
    return any_marked & F.coalesce(F.col("line").rlike(_HALF), F.lit(False))


def _reason(given: DataFrame, settings: IngestSettings, now: datetime, zone_is_known: Column) -> Column:
    """Why a record is not an event; NULL if it is one."""
    event_ts = F.col("event_ts")
    earliest = settings.earliest.replace(tzinfo=timezone.utc)
    latest = now + timedelta(hours=settings.future_tolerance_hours)
    may_be_negative = F.col("event_type").isin(*settings.negative_amount_event_types)
    texts = [c.name for c in EVENTS.columns if _is_text(c.name)]
    texts += [_as_given(n) for n in _NUMBERS if _is_string(given, _as_given(n))]
    unread = {"invalid_utf8": ~_is_valid_text(texts) | _has_half_a_character(_IDS)}
    unread |= {f"missing_{name}": F.col(name).isNull() for name in _REQUIRED}
    unread["missing_event_ts"] = ~F.col("has_event_ts")
    wrong = {
        "bad_event_ts": event_ts.isNull(),
        "event_before_earliest": event_ts < F.lit(earliest),
        "event_in_future": event_ts > F.lit(latest),
        **{f"bad_{n}": F.col(_as_given(n)).isNotNull() & F.col(n).isNull() for n in _NUMBERS},
        "negative_amount": (F.col("amount") < 0) & ~may_be_negative,
        "bad_time_zone": ~F.coalesce(zone_is_known, F.lit(False)),
        **{f"nul_{n}": F.contains(n, F.lit("\0")) for n in _IDS},
        # Bytes first: counting characters has to walk the text.
        **{f"long_{n}": (F.octet_length(n) > _LONGEST_ID) & (F.length(n) > _LONGEST_ID) for n in _IDS},
    }

    def named(checks: dict[str, Column]) -> list[Column]:
        return [F.when(holds, F.lit(reason)) for reason, holds in checks.items()]

    return F.coalesce(F.col("own_reason"), *named(unread), F.col("bad_type"), *named(wrong))


def without_erased(records: DataFrame, tests: tuple[ColumnTest, ColumnTest] | None) -> DataFrame:
    """`records` (from `to_events`), those of erased users with reason ERASED and without the raw record. A user is
    recognised by user_id or, if that could not be read, by the contents of the raw record."""
    if tests is None:
        return records
    is_erased, holds_erased = tests
    unread = F.when(F.col("user_id").isNull(), F.col("raw"))  # testing NULL costs nothing
    erased = records.withColumn("erased", is_erased(F.col("user_id")) | holds_erased(unread))
    keep = ~F.col("erased")
    return erased.withColumns(
        {"reason": F.when(keep, F.col("reason")).otherwise(ERASED), "raw": F.when(keep, F.col("raw"))}
    ).drop("erased")
