"""A source's mapping: a TOML file that says how raw files become rows of `events`, as typed settings.

    name = "shop"

    [[input]]
    path = "orders"               # file, folder or pattern, from ingest.data_dir
    format = "json"               # JSON lines; or csv, parquet
    lookups = [{ path = "products.csv", format = "csv", on = ["sku"] }]
    ignore = ["trace"]            # raw columns to drop; all others that nothing names go into `attributes`

    [input.columns]               # column of events = where it comes from
    event_id = { columns = ["order", "sku"], sha256 = true, ordinal = true }
    user_id = "customer"          # a raw column; short for { column = "customer" }
    item_id = "sku"
    event_type = { constant = "purchase" }
    event_ts = { column = "at", format = "dd/MM/yyyy HH:mm", zone = "Europe/London" }
    vertical = { column = "department", default = "OTHER" }
    amount = { expr = "price * quantity" }

    [[input.reject]]              # records that the source itself rejects
    reason = "test_order"
    when = "customer LIKE 'test-%'"

or, instead of path and format, a Kafka topic whose values are JSON objects:

    kafka = { bootstrap_servers = "127.0.0.1:9092", topic = "orders" }

Kafka records without a value (a compacted topic's tombstones) and blank lines are skipped.

`jobs/checked_records.py` applies the mapping. There may be several inputs, one per kind of record. Reading progress is
stored under an input's path or topic: two inputs with the same one need a `name` each, and an input with a name can
change its pattern (`orders` to `orders/*`) without being read again. Files that have moved are new files.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from jobs.config import parse, read_toml, shipped, written_as
from training.config import Section

Name = Annotated[
    str,
    written_as(r"[a-z][a-z0-9_]*", "must consist of lower-case letters (a-z), digits and _, and begin with a letter"),
]


class Given(Section):
    """Where a value comes from: exactly one of the keys below; a plain string names a raw column."""

    column: str | None = Field(None, description="a raw column")
    constant: str | None = Field(None, description="the same text for every record")
    expr: str | None = Field(None, description="a Spark SQL expression over the raw columns")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"column": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_origin(self) -> Given:
        origins = [key for key in ("column", "columns", "constant", "expr") if key in type(self).model_fields]
        if sum(getattr(self, key) is not None for key in origins) != 1:
            raise ValueError(f"needs exactly one of {', '.join(origins)}")
        return self


class Value(Given):
    """A text or a number."""

    default: str | None = Field(None, description="used if the value is missing")


class IdValue(Given):
    """The event's id; can be composed of several columns if the log has none."""

    columns: list[str] | None = Field(
        None, min_length=1, description="raw columns joined into one id; missing if one of them is missing"
    )
    separator: str = Field("-", description="between the columns, and before the ordinal")
    sha256: bool = Field(False, description="the id is the hash of the value, or of the joined columns")
    ordinal: bool = Field(
        False, description="number identical records of one file, each of which then has its own id (not for topics)"
    )


class TimeValue(Given):
    """A time. A raw column that is already a zoned timestamp (Parquet) is used as is. An expression that returns one
    (`to_timestamp`) takes neither format nor zone; with `to_date` and `to_timestamp_ntz` a zone is allowed."""

    format: str | None = Field(
        None,
        description="format of a text: a Spark datetime pattern, epoch_s or epoch_ms; None: ISO 8601, with or without "
        "a zone",
    )
    zone: str = Field(
        "UTC", description="IANA time zone of times and days that have none; a day begins at its midnight"
    )


class Columns(Section):
    """The columns of the events table (`jobs/tables.py`) except attributes and source."""

    event_id: IdValue
    user_id: Value
    item_id: Value
    event_type: Value
    event_ts: TimeValue
    vertical: Value
    amount: Value | None = None
    quantity: Value | None = None
    time_zone: Value = Value(constant="UTC")
    item_name: Value | None = None
    category: Value | None = None
    basket_id: Value | None = None

    def given(self) -> dict[str, Given]:
        """The columns that the mapping has, in the table's order."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}


class Lookup(Section):
    """Another file, joined to the records by equal `on` columns."""

    path: str
    format: Literal["csv", "parquet"]
    on: list[str] = Field(min_length=1, description="columns that both sides have")
    delimiter: str = Field(",", description="CSV: between the fields")


class Reject(Section):
    """Records that the source rejects."""

    reason: Name
    when: str = Field(description="a Spark SQL condition over the raw columns")


class Kafka(Section):
    """A topic."""

    bootstrap_servers: str = Field(description="host:port, several separated by commas")
    topic: str
    options: dict[str, str] = Field(
        default_factory=dict,
        description="further options of Spark's Kafka source; ${NAME} is taken from the environment, to keep secrets "
        "out of this file",
    )

    @model_validator(mode="after")
    def _begins_where_it_did(self) -> Self:
        """`ingest --force` and a backfill begin anew: at the topic's end they would leave out what came meanwhile."""
        for begin in (value.strip() for key, value in self.options.items() if key.lower() == "startingoffsets"):
            # By partition, -1 is the latest; a name's value may be anything.
            if begin.lower() == "latest" or re.search(r":\s*-1\b|\$\{", begin):
                raise ValueError(
                    f"startingOffsets = {begin} may be another place whenever the topic is read again: give a "
                    "startingTimestamp (milliseconds since 1970) instead"
                )
        return self


class Input(Section):
    """One kind of file, or one topic."""

    name: Name | None = Field(
        None, description="name under which reading progress is stored; None: under its path or topic"
    )
    path: str | None = Field(
        None, description="file, folder or pattern (`*`, `?`, `[...]`; no braces), relative to ingest.data_dir"
    )
    kafka: Kafka | None = Field(None, description="a topic instead of a path; its values are JSON objects")
    format: Literal["json", "csv", "parquet"] = Field(
        "json", description="json: one object per line; csv: one record per line, no line breaks inside quotes"
    )
    delimiter: str = Field(",", description="CSV: between the fields")
    lookups: list[Lookup] = Field(default_factory=list)
    columns: Columns
    attributes: list[str] = Field(
        default_factory=list,
        description="raw columns to keep in the event's map although the mapping also uses them elsewhere, and lookup "
        "columns to keep",
    )
    ignore: list[str] = Field(
        default_factory=list,
        description="raw columns to drop; all others that the mapping does not name become attributes",
    )
    reject: list[Reject] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_place(self) -> Input:
        if (self.path is None) == (self.kafka is None):
            raise ValueError("needs either path or kafka")
        if self.kafka is not None and self.format != "json":
            raise ValueError(f"format = {self.format}, but a topic's values are JSON and need no format")
        if self.kafka is not None and self.columns.event_id.ordinal:
            raise ValueError(
                "event_id.ordinal numbers the identical records of a file, which a topic does not have: make the id of "
                "columns that differ"
            )
        return self

    @property
    def place(self) -> str:
        """Where the records are, human-readable."""
        return self.path if self.path is not None else f"kafka topic {self.kafka and self.kafka.topic}"

    @property
    def key(self) -> str:
        """Identifies the input within its source, whatever its position in the mapping and its other settings."""
        return self.name or hashlib.sha256(self.place.encode()).hexdigest()[:12]

    def column_names(self) -> list[str]:
        """The raw columns named outside expressions, without duplicates."""
        values = self.columns.given().values()
        names = [value.column for value in values if value.column]
        names += self.columns.event_id.columns or []
        names += [name for lookup in self.lookups for name in lookup.on]
        return list(dict.fromkeys(names + self.attributes))

    def id_columns(self) -> list[str]:
        """The raw columns whose values are ids as they are, and the lookups' keys."""
        columns = self.columns
        ids = [columns.event_id, columns.user_id, columns.item_id, columns.basket_id]
        names = [value.column for value in ids if value is not None and value.column]
        return names + [name for lookup in self.lookups for name in lookup.on]

    def expressions(self) -> list[str]:
        """The SQL expressions of the mapping."""
        values = self.columns.given().values()
        return [value.expr for value in values if value.expr] + [rule.when for rule in self.reject]


class Source(Section):
    """A mapping file."""

    name: Name = Field(description="written to the source column of every event")
    input: list[Input] = Field(min_length=1)

    @model_validator(mode="after")
    def _unique_keys(self) -> Source:
        counts = Counter(mapping.key for mapping in self.input)
        if twice := [mapping for mapping in self.input if counts[mapping.key] > 1]:
            what = f"are named {twice[0].name}" if twice[0].name else f"read {twice[0].place}"
            raise ValueError(
                f"two inputs {what}, but each needs a unique name, under which its reading progress is stored"
            )
        return self


def load_source(path: str | Path) -> Source:
    """The mapping in a TOML file.

    Raises:
        TrailvecError: the file is missing or not TOML, a value is invalid, or a key is unknown (the nearest is named).
    """
    return parse(Source, read_toml(shipped(path)), str(path))
