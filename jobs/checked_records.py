"""Raw frames → events: a source's mapping applied to its records, and why a record is no event.

Nothing in a record makes the job fail. One that is no event gets the first reason that holds, in this order:
broken_row; the mapping's own rules; invalid_utf8; missing_* (user_id, item_id, event_type, vertical, event_ts,
event_id; blank counts as missing); bad_type_* (an id that is no text and no whole number in a Parquet file, or is an
object or a list in a line of JSON, of which a number can't be told from a text; another text that is an object or a
list); bad_event_ts, event_before_earliest, event_in_future, bad_amount, bad_quantity, negative_amount, bad_time_zone;
nul_* (an id with the character NUL, which numpy's texts lose at their end); long_* (an id of more than 512
characters). (duplicate_event_id, which no record tells by itself, is given by
jobs/ingest.py.)

An id with an ordinal numbers the identical records *of one file*: a line that stands twice in a file is two events,
while a file that comes twice, even under another name, is the same events again. The price: a file cut in two
between two identical lines can't be told from a file and its copy, and makes one event of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone

from pyspark.errors import AnalysisException, IllegalArgumentException, SparkUpgradeException
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from jobs.config import IngestSettings
from jobs.errors import TrailvecError, told
from jobs.raw_records import BROKEN, FILE, LINE, REST, is_id_type, named_column, stripped, text_of, valid_text
from jobs.sources import Given, IdValue, Input, TimeValue, Value
from jobs.spark_session import JSON_MICROSECONDS
from jobs.tables import EVENTS
from spark_udfs.keyed import ColumnTest

BROKEN_ROW = "broken_row"
ERASED = "erased_user"  # no refusal: whom erase_users took out stays out, and leaves no trace here either

_ORDINAL = "trailvec_ordinal"
_REQUIRED = ("user_id", "item_id", "event_type", "vertical", "event_ts", "event_id")
_IDS = ("event_id", "user_id", "item_id", "basket_id")
_LISTED = ("user_id", "item_id")  # lists that people hand in name them, and are stripped of blanks too
_LONGEST_ID = 512
_NUMBERS = ("amount", "quantity")
# Not 32-bit numbers, whose text is another number than their 64 bits, nor times, which Spark takes for numbers.
_NUMBER_TYPES = (T.DoubleType, T.IntegralType)
_TIME_TYPES = (T.TimestampType, T.TimestampNTZType, T.DateType)
_ZONE_LETTERS = "VzOXxZ"
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
_ISO_LOCAL = r"\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?)?"
_ISO_ZONED = r"\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?\s*(Z|[+-]\d{2}(:?\d{2})?)"
# Microseconds in one unit; and the widest number whose microseconds still fit into 64 bits.
_EPOCH = {"epoch_s": (1_000_000, "decimal(18,6)"), "epoch_ms": (1_000, "decimal(21,6)")}


def check_times(spark: SparkSession, mapping: Input, source: str) -> list[str]:
    """All zones that Spark knows, for `to_events`.

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
            f"source {source}: event_ts: format = {pattern!r} is no datetime pattern of Spark's: write one, such as "
            f"dd/MM/yyyy HH:mm, or {' or '.join(_EPOCH)}"
        )
    if pattern is not None and zone != "UTC" and may_lack_zone(pattern):
        raise TrailvecError(
            f"source {source}: event_ts: by format = {pattern!r} a time without a zone would be one of UTC, not of "
            f"{zone}: give the two forms an input each, or leave format out, which is ISO 8601 with a zone or without"
        )
    return zones


def to_events(
    raw: DataFrame, mapping: Input, source: str, settings: IngestSettings, now: datetime, *, zones: list[str]
) -> DataFrame:
    """The records as rows of EVENTS, with `reason` (NULL: an event), `raw` (of refused ones) and `file`.

    Args:
        raw: what `read_raw` gives.
        now: UTC, with zone; what is later than it by more than the tolerance is refused.
        zones: what `check_times` gives of the mapping.

    Raises:
        TrailvecError: the mapping has SQL that Spark does not take, or times to which their zone can't be applied.
    """
    try:
        given = _mapped(raw, mapping, source)
    except AnalysisException as error:
        raise TrailvecError(f"source {source}: {told(error)}: correct the mapping") from None

    # First the numbers, of which the reasons ask several times.
    numbered = given.withColumns({n: _number(given, n) for n in _NUMBERS})
    events = numbered.withColumns({"reason": _reason(numbered, settings, now, zones), "source": F.lit(source)})
    as_json = F.to_json("record", JSON_MICROSECONDS)
    # An event's texts are valid. What a broken row shows as its user may be a part of anything, and no erasure is of
    # {"id": 4711} or 4711.0: it is to look into the raw record.
    user_id = F.when(F.col("reason").isNull(), F.col("user_id"))
    says_who = (F.col("reason") != BROKEN_ROW) & ~F.col("is_no_user")
    user_id = user_id.when(says_who, valid_text(F.col("user_id"))).alias("user_id")
    return events.select(
        *[user_id if c.name == "user_id" else c.name for c in EVENTS.columns],
        "reason",
        # Made into text here and not above, where it would be made for every record.
        F.when(F.col("reason").isNotNull(), valid_text(F.coalesce("line", as_json))).alias("raw"),
        "file",
    )


def _mapped(raw: DataFrame, mapping: Input, source: str) -> DataFrame:
    """The mapping applied: EVENTS' columns as the record gives them (of numbers what is to be read, under the names of
    `_as_given`), and what `_reason` and `to_events` go by: has_event_ts, own_reason, bad_type, is_no_user, record, line
    and file."""
    columns = mapping.columns
    fields = [named_column(name) for name in raw.columns if name not in (FILE, LINE, BROKEN, REST)]
    if columns.event_id.ordinal:
        record = F.coalesce(F.col(LINE), F.to_json(F.struct(*fields), JSON_MICROSECONDS))
        # The hash first: the sort goes by the first bytes of the first key, and a file's name tells no records apart.
        identical = Window.partitionBy(F.sha2(record, 256), FILE).orderBy(FILE)
        raw = raw.withColumn(_ORDINAL, F.row_number().over(identical))
    event_ts = _given(columns.event_ts)
    event_ts_type = raw.select(event_ts).schema[0].dataType
    is_local = columns.event_ts.zone != "UTC" or columns.event_ts.format is not None
    if columns.event_ts.expr is not None and isinstance(event_ts_type, T.TimestampType) and is_local:
        raise TrailvecError(
            f"source {source}: event_ts: expr = {columns.event_ts.expr!r} gives an instant, to which zone and format "
            "can't apply: let it give the text (with format), or use to_timestamp_ntz"
        )
    own_rules = [F.when(F.expr(rule.when), F.lit(rule.reason)) for rule in mapping.reject]
    ids = {n: _is_no_id(raw, value, mapping) for n, value in columns.given().items() if n in _IDS}
    others = [n for n in columns.given() if _is_text(n) and n not in _IDS]
    nested = {n: _is_nested(raw, columns.given()[n], mapping) for n in others}
    bad_types = [F.when(is_bad, f"bad_type_{n}") for n, is_bad in (ids | nested).items()]
    values = {n: _given(value) for n, value in columns.given().items() if n != "event_ts"}
    texts = {n: text_of(value) for n, value in values.items() if n not in _NUMBERS}
    texts |= {n: text_of(stripped(values[n].cast("string"))) for n in _LISTED}
    numbers = {n: _text_unless(raw, value, _NUMBER_TYPES) for n, value in values.items() if n in _NUMBERS}
    missing = F.lit(None).cast("string")
    return raw.select(
        *[texts.get(c.name, missing).alias(c.name) for c in EVENTS.columns if _is_text(c.name)],
        *[numbers.get(n, missing).alias(_as_given(n)) for n in _NUMBERS],
        _time(event_ts, event_ts_type, columns.event_ts).alias("event_ts"),
        _text_unless(raw, event_ts, _TIME_TYPES).isNotNull().alias("has_event_ts"),
        # An empty map is none: a new column that is blank makes no other event.
        F.when(F.size(REST) > 0, F.col(REST)).alias("attributes"),
        F.coalesce(F.when(F.col(BROKEN), F.lit(BROKEN_ROW)), *own_rules).alias("own_reason"),
        F.coalesce(F.lit(None).cast("string"), *bad_types).alias("bad_type"),
        ids["user_id"].alias("is_no_user"),
        F.struct(*fields).alias("record"),
        F.col(LINE).alias("line"),
        F.col(FILE).alias("file"),
    )


def _is_text(name: str) -> bool:
    return name not in ("event_ts", "attributes", "source", *_NUMBERS)


def _as_given(number: str) -> str:
    return f"given_{number}"


def _text_unless(raw: DataFrame, value: Column, kinds: tuple[type[T.DataType], ...]) -> Column:
    """The value as text; as it is where it has one of the types, none of which is blank: to write it out takes long."""
    return value if isinstance(raw.select(value).schema[0].dataType, kinds) else text_of(value)


def _known_zones(spark: SparkSession) -> list[str]:
    """The zones that Spark itself knows: it is Java that converts times."""
    return sorted(str(zone) for zone in spark._jvm.java.time.ZoneId.getAvailableZoneIds())  # type: ignore[union-attr]


def _reads_times(spark: SparkSession, pattern: str) -> bool:
    """Whether Spark knows the datetime pattern, which it looks at when it reads a time by it."""
    try:
        spark.sql("SELECT to_timestamp('-', :pattern)", {"pattern": pattern}).collect()
    except (IllegalArgumentException, SparkUpgradeException):
        return False
    return True


def _given(value: Given) -> Column:
    """The value as the mapping makes it of the record, of any type."""
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
    """The one value as the record has it, of any type."""
    if value.constant is not None:
        return F.lit(value.constant)
    return F.expr(value.expr) if value.expr is not None else named_column(str(value.column))


def _number(given: DataFrame, name: str) -> Column:
    """As double; NULL where it is no number, or no finite one."""
    value = F.col(_as_given(name))
    number = value.cast("double")
    is_number = F.abs(number) < float("inf")
    return F.when(value.rlike(_NUMBER) & is_number if _is_string(given, _as_given(name)) else is_number, number)


def _is_string(given: DataFrame, name: str) -> bool:
    return isinstance(given.schema[name].dataType, T.StringType)


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
    return any(letter in part for part in pattern.split("'")[::2] for letter in _ZONE_LETTERS)


def may_lack_zone(pattern: str) -> bool:
    """Whether a zone is optional in a datetime pattern: one of its letters stands in brackets."""
    unquoted = "".join(pattern.split("'")[::2])
    before = [unquoted[:place] for place, letter in enumerate(unquoted) if letter in _ZONE_LETTERS]
    return any(text.count("[") > text.count("]") for text in before)


def _is_no_id(raw: DataFrame, value: Given, mapping: Input) -> Column:
    """True where the value has a type that no id has: 17850.0 is 17850 in the file before, and nobody would notice."""
    if isinstance(value, IdValue) and value.columns:
        return F.lit(False)  # made of many values, of any type
    given = _raw(value)
    if mapping.format == "json":
        return F.coalesce(F.ltrim(given.cast("string")).rlike(r"^[\[{]"), F.lit(False))  # an object or a list
    return F.lit(not is_id_type(raw.select(given).schema[0].dataType)) & given.isNotNull()


def _is_nested(raw: DataFrame, value: Given, mapping: Input) -> Column:
    """True where the value is an object or a list in its file, whose text nobody means by a name or a category."""
    given = _raw(value)
    if mapping.format == "json":  # "[new] tea" is a text that begins so, too
        text = F.ltrim(given.cast("string"))
        is_json = F.when(text.rlike(r"^[\[{]"), F.get_json_object(text, "$").isNotNull())
        return F.coalesce(is_json, F.lit(False))
    return F.lit(isinstance(raw.select(given).schema[0].dataType, (T.StructType, T.ArrayType, T.MapType)))


def _is_valid_text(names: Sequence[str]) -> Column:
    """False where bytes are no UTF-8: Java reads them as U+FFFD, which no clean log holds."""
    parts = [*map(F.col, names), F.array_join(F.map_values("attributes"), "")]
    return ~valid_text(F.concat_ws("", *parts)).contains("\ufffd")


def _reason(given: DataFrame, settings: IngestSettings, now: datetime, zones: list[str]) -> Column:
    """Why a record is no event; NULL when it is one."""
    event_ts = F.col("event_ts")
    earliest = settings.earliest.replace(tzinfo=timezone.utc)
    latest = now + timedelta(hours=settings.future_tolerance_hours)
    may_be_negative = F.col("event_type").isin(*settings.negative_amount_event_types)
    texts = [c.name for c in EVENTS.columns if _is_text(c.name)]
    texts += [_as_given(n) for n in _NUMBERS if _is_string(given, _as_given(n))]
    unread = {"invalid_utf8": ~_is_valid_text(texts)}
    unread |= {f"missing_{name}": F.col(name).isNull() for name in _REQUIRED}
    unread["missing_event_ts"] = ~F.col("has_event_ts")
    wrong = {
        "bad_event_ts": event_ts.isNull(),
        "event_before_earliest": event_ts < F.lit(earliest),
        "event_in_future": event_ts > F.lit(latest),
        **{f"bad_{n}": F.col(_as_given(n)).isNotNull() & F.col(n).isNull() for n in _NUMBERS},
        "negative_amount": (F.col("amount") < 0) & ~may_be_negative,
        "bad_time_zone": ~F.coalesce(F.col("time_zone").isin(zones), F.lit(False)),
        **{f"nul_{n}": F.contains(n, F.lit("\0")) for n in _IDS},
        # Characters are counted one by one, bytes are not.
        **{f"long_{n}": (F.octet_length(n) > _LONGEST_ID) & (F.length(n) > _LONGEST_ID) for n in _IDS},
    }

    def named(checks: dict[str, Column]) -> list[Column]:
        return [F.when(holds, F.lit(reason)) for reason, holds in checks.items()]

    return F.coalesce(F.col("own_reason"), *named(unread), F.col("bad_type"), *named(wrong))


def without_erased(records: DataFrame, tests: tuple[ColumnTest, ColumnTest] | None) -> DataFrame:
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
