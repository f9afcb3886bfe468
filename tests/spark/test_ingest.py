"""Ingest: small real files in all three formats, expectations by hand or from Python's csv."""

from __future__ import annotations

import base64
import bz2
import collections
import csv
import gzip
import hashlib
import json
import math
import random
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.checked_records import check_times, to_events
from jobs.config import IngestSettings
from jobs.errors import TrailvecError, explain
from jobs.ingest import _STORED, REPEAT, STAGE, _check_gzip, _not_yet_refused, mark_duplicates
from jobs.raw_records import _by_header, _open, find_files, read_raw
from jobs.runtime import Runtime
from jobs.sources import Input
from jobs.tables import EVENTS, REJECTED_EVENTS, Table
from tests.conftest import add, read_delta
from training.stores import remove_tree

ONLINE_RETAIL = Path("tests/data/online_retail")
NOW = datetime(2024, 1, 1, tzinfo=timezone.utc)
Row = dict[str, Any]

COLUMNS: Row = {
    "event_id": "id",
    "user_id": "user",
    "item_id": "item",
    "event_type": {"constant": "view"},
    "event_ts": "at",
    "vertical": {"constant": "shop"},
    "amount": "price",
}


def mapping(path: str, form: str = "csv", columns: Row | None = None, **more: Any) -> Input:
    return Input.model_validate({"path": path, "format": form, "columns": COLUMNS | (columns or {}), **more})


def to_records(spark: SparkSession, data_dir: Path, given: Input, **settings: Any) -> DataFrame:
    files = [f"file://{file}" for file in find_files(data_dir, str(given.path))]
    settings = {"negative_amount_event_types": ["view"]} | settings
    frames = read_raw(spark, given, data_dir, files)
    zone_is_known, limits = check_times(spark, given, "test"), IngestSettings(**settings)
    return reduce(
        DataFrame.unionByName,
        [to_events(raw, given, "test", limits, NOW, zone_is_known=zone_is_known) for raw in frames],
    )


def ingest_each(spark: SparkSession, data_dir: Path, inputs: dict[str, Input], **settings: Any) -> dict[str, list[Row]]:
    """What `ingest` returns of each of the inputs; in one Spark job, as each takes half a second whatever the rows."""
    records = [
        to_records(spark, data_dir, given, **settings).withColumn("input", F.lit(name))
        for name, given in inputs.items()
    ]
    found: dict[str, list[Row]] = {name: [] for name in inputs}
    for row in reduce(DataFrame.unionByName, records).collect():
        values = row.asDict(recursive=True)
        found[values.pop("input")].append(values)
    for rows in found.values():
        rows.sort(key=lambda row: (row["event_id"] or "", row["raw"] or ""))
    return found


def ingest(spark: SparkSession, data_dir: Path, given: Input, **settings: Any) -> list[Row]:
    """The records made from an input, before deduplication, by event_id and raw."""
    return ingest_each(spark, data_dir, {"": given}, **settings)[""]


def stored(runtime: Runtime, table: Table) -> list[Row]:
    """A table's rows as read by DuckDB, in a fixed order."""
    return sorted(read_delta(runtime.path(table)), key=repr)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes a text file in the test's folder, and returns the folder."""

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return tmp_path

    return write_file


# ---- the three formats --------------------------------------------------------------------------------

RECORDS: list[Row] = [
    {"id": "1", "user": "ann", "item": 'a "b", c', "at": "2023-05-01T10:00:00Z", "price": "1.5", "more": None},
    {"id": "2", "user": "bob", "item": "é", "at": "2023-05-01T12:00:00+02:00", "price": "-2", "more": "x"},
    {"id": "3", "user": None, "item": "d", "at": "2023-05-01T12:00:00Z", "price": None, "more": "y"},
]


def _write_records(folder: Path, form: str) -> None:
    if form == "csv":
        with (folder / "log.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(RECORDS[0]))
            writer.writeheader()
            writer.writerows(RECORDS)
    elif form == "json":
        (folder / "log.json").write_text("\n".join(map(json.dumps, RECORDS)) + "\n\n", encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(RECORDS), folder / "log.parquet")


def test_each_format_gives_the_same_events(spark: SparkSession, tmp_path: Path) -> None:
    forms = ("csv", "json", "parquet")
    for form in forms:
        _write_records(tmp_path, form)
    inputs = {form: mapping(f"log.{form}", form, attributes=["more"]) for form in forms}
    for form, (first, second, third) in ingest_each(spark, tmp_path, inputs).items():
        assert [first["reason"], second["reason"], third["reason"]] == [None, None, "missing_user_id"], form
        assert first["item_id"] == 'a "b", c', form
        assert second["item_id"] == "é", form
        assert (first["event_ts"], second["event_ts"]) == (datetime(2023, 5, 1, 10), datetime(2023, 5, 1, 10)), form
        assert (first["amount"], second["amount"], third["amount"]) == (1.5, -2.0, None), form
        assert (first["attributes"], second["attributes"]) == (None, {"more": "x"}), form
        made = (first["quantity"], first["time_zone"], first["source"], first["raw"])
        assert made == (None, "UTC", "test", None), form
        assert json.loads(third["raw"])["more"] == "y", form
        assert third["file"].endswith(f"log.{form}")


def test_a_nested_json_value_is_kept_as_its_text(spark: SparkSession, write: Callable[[str, str], Path]) -> None:
    nested = '"shop": {"tags": ["x"]}, "geo": {"lat": 1, "tags": ["x"]}'
    line = '{"id": 7, "user": "ann", "item": "a", "at": "2023-05-01T10:00:00Z", "price": 3, ' + nested + "}"
    columns = {"vertical": {"expr": "get_json_object(shop, '$.tags[0]')"}}  # a column named only in an expression
    (row,) = ingest(spark, write("log.json", line), mapping("log.json", "json", columns, attributes=["geo"]))
    assert row["reason"] is None
    assert (row["event_id"], row["amount"], row["vertical"]) == ("7", 3.0, "x")
    assert json.loads(row["attributes"]["geo"]) == {"lat": 1, "tags": ["x"]}


# ---- times --------------------------------------------------------------------------------------------


# Times as they stand in the log, by the format and zone that its mapping gives.
TIMES: list[tuple[str | None, str, dict[str, datetime | None]]] = [
    (
        "yyyy-MM-dd HH:mm:ss",
        "Europe/London",
        {
            "2011-03-27 00:59:59": datetime(2011, 3, 27, 0, 59, 59),  # GMT, one second before the clocks go forward
            "2011-03-27 02:00:00": datetime(2011, 3, 27, 1),  # BST, one second later
            "2011-03-27 01:30:00": datetime(2011, 3, 27, 1, 30),  # a time the clock skipped: read as GMT
            "2011-10-30 01:30:00": datetime(2011, 10, 30, 0, 30),  # ambiguous: the first, BST
            "2011-10-30 02:00:00": datetime(2011, 10, 30, 2),
            "2011-02-30 10:00:00": None,
            "yesterday": None,
        },
    ),
    (
        "yyyy-MM-dd",  # days begin at the zone's midnight, five hours behind UTC in winter, four in summer
        "America/New_York",
        {"2017-03-12": datetime(2017, 3, 12, 5), "2017-03-13": datetime(2017, 3, 13, 4), "2017-13-01": None},
    ),
    (
        None,
        "Europe/London",
        {
            "2011-07-01T12:00:00Z": datetime(2011, 7, 1, 12),
            "2011-07-01T12:00:00+02:00": datetime(2011, 7, 1, 10),
            "2011-07-01 12:00": datetime(2011, 7, 1, 11),
            "2011-07-01T12:00:00.123456": datetime(2011, 7, 1, 11, 0, 0, 123456),
            "2011-07-01": datetime(2011, 6, 30, 23),
            "12:00": None,
            "2011": None,
        },
    ),
    ("dd/MM/yyyy HH:mm XXX", "Europe/London", {"01/07/2011 12:00 +02:00": datetime(2011, 7, 1, 10)}),
    (
        "epoch_s",
        "Europe/London",
        {
            "1500000000": datetime(2017, 7, 14, 2, 40),
            "1500000000.25": datetime(2017, 7, 14, 2, 40, 0, 250000),
            "1500000000000000": None,  # microseconds: too large for seconds, and not wrapped around
            "x": None,
        },
    ),
    ("epoch_ms", "UTC", {"1500000000123": datetime(2017, 7, 14, 2, 40, 0, 123000)}),
]


def test_times_as_text(spark: SparkSession, write: Callable[[str, str], Path]) -> None:
    inputs = {}
    for number, (form, zone, expected) in enumerate(TIMES):
        lines = [f"{text},ann,a,{text},1" for text in expected]
        folder = write(f"{number}.csv", "\n".join(["id,user,item,at,price", *lines]))
        time = {"column": "at", "format": form, "zone": zone}
        inputs[f"{form} in {zone}"] = mapping(f"{number}.csv", columns={"event_ts": time})
    found = ingest_each(spark, folder, inputs)
    for (name, rows), (_, _, expected) in zip(found.items(), TIMES, strict=True):
        assert {row["event_id"]: row["event_ts"] for row in rows} == expected, name
        bad = {row["event_id"] for row in rows if row["reason"] == "bad_event_ts"}
        assert bad == {text for text, time in expected.items() if not time}, name


def test_times_of_parquet_types(spark: SparkSession, tmp_path: Path) -> None:
    noon = datetime(2011, 7, 1, 12)
    kinds = {
        "instant": pa.array([noon], pa.timestamp("us", tz="UTC")),
        "naive": pa.array([noon], pa.timestamp("us")),
        "day": pa.array([date(2011, 7, 1)]),
        "int96": pa.array([noon], pa.timestamp("ns")),
    }
    inputs = {}
    for kind, array in kinds.items():
        texts = {name: ["x"] for name in ("id", "user", "item")}
        table = pa.table({**texts, "price": [1.0], "at": array})
        pq.write_table(table, tmp_path / f"{kind}.parquet", use_deprecated_int96_timestamps=kind == "int96")
        columns = {"event_ts": {"column": "at", "zone": "Europe/London"}}
        inputs[kind] = mapping(f"{kind}.parquet", "parquet", columns)
    seen = {kind: row["event_ts"] for kind, (row,) in ingest_each(spark, tmp_path, inputs).items()}
    assert seen == {"instant": noon, "naive": datetime(2011, 7, 1, 11), "day": datetime(2011, 6, 30, 23), "int96": noon}


def test_no_time_is_too_old_or_too_new_to_be_read(spark: SparkSession, tmp_path: Path) -> None:
    records, dates = [], ("day", "infinity")
    for kind in ("instant", "naive", "int96", *dates):
        first, last = (
            (date(1, 1, 1), date(2011, 7, 1))
            if kind in dates
            else (datetime(1, 1, 1), datetime(9999, 12, 31, 23, 59, 59))
        )
        of_kind = pa.date32() if kind in dates else pa.timestamp("us", tz="UTC" if kind == "instant" else None)
        odd = pa.array([2**31 - 1], pa.int32()).cast(of_kind) if kind == "infinity" else pa.array([first], of_kind)
        at, more = pa.chunked_array([odd, pa.array([last], of_kind)]), pa.chunked_array([odd, odd])
        ids = {"id": [f"{kind} 1", f"{kind} 2"], "user": ["1", "2"], "item": ["1", "2"]}
        table = pa.table({**ids, "price": [1.0, 1.0], "at": at, "more": more})
        pq.write_table(table, tmp_path / f"{kind}.parquet", use_deprecated_int96_timestamps=kind == "int96")
        columns = {"event_ts": {"column": "at", "zone": "America/New_York"}} if kind == "infinity" else {}
        records.append(to_records(spark, tmp_path, mapping(f"{kind}.parquet", "parquet", columns)))
    reduce(DataFrame.unionByName, records).write.parquet(str(tmp_path / "records"))
    found = {row["event_id"]: row for row in pq.read_table(tmp_path / "records").to_pylist()}
    assert len(found) == 10
    for kind in ("instant", "naive", "int96", *dates):
        bad, good = found[f"{kind} 1"], found[f"{kind} 2"]
        expected = ("bad_event_ts", None) if kind == "infinity" else ("event_before_earliest", datetime(1, 1, 1))
        assert (bad["reason"], bad["event_ts"] and bad["event_ts"].replace(tzinfo=None)) == expected, kind
        assert good["reason"] == (None if kind in dates else "event_in_future"), kind
        begin = "+5881580-0" if kind == "infinity" else "0001-01-01"
        assert dict(good["attributes"])["more"][:10] == begin, kind


def test_records_that_differ_in_microseconds_are_others_and_are_kept_whole(spark: SparkSession, tmp_path: Path) -> None:
    times = [datetime(2011, 7, 1, 12, 0, 0, microsecond) for microsecond in (1, 2)]
    same = {name: pa.array([text] * 2, pa.string()) for name, text in (("id", "x"), ("user", None), ("item", "x"))}
    instants, naive = pa.array(times, pa.timestamp("us", tz="UTC")), pa.array(times, pa.timestamp("us"))
    pq.write_table(pa.table({**same, "price": [1.0] * 2, "at": instants, "local": naive}), tmp_path / "log.parquet")
    columns = {"event_id": {"columns": ["id"], "ordinal": True}}
    rows = ingest(spark, tmp_path, mapping("log.parquet", "parquet", columns))
    assert {(row["reason"], row["event_id"]) for row in rows} == {("missing_user_id", rows[0]["event_id"])}
    texts = sorted((raw["at"], raw["local"]) for raw in (json.loads(row["raw"]) for row in rows))
    assert texts == [(f"2011-07-01T12:00:00.00000{n}Z", f"2011-07-01T12:00:00.00000{n}") for n in (1, 2)]


def test_numbers_and_missing_times_of_parquet_types(spark: SparkSession, tmp_path: Path) -> None:
    """A number of another type is the number that its text shows: float32 0.1 is not 0.10000000149."""
    prices_of = {
        "double": pa.array([0.1, math.nan, sys.float_info.max, None]),
        "float": pa.array([0.1, math.nan, -math.inf, None], pa.float32()),
        "text": pa.array(["0.1", "NaN", "1e999", " "]),
        "decimal": pa.array([Decimal("0.10"), None], pa.decimal128(9, 2)),
        "whole": pa.array([2**53 - 1, None]),
        "instant": pa.array([datetime(2011, 7, 1), None], pa.timestamp("us", tz="UTC")),
        "naive": pa.array([datetime(2011, 7, 1), None], pa.timestamp("us")),
        "day": pa.array([date(2011, 7, 1), None]),
    }
    for kind, prices in prices_of.items():
        ids = pa.array([f"{kind} {number}" for number in range(len(prices))])
        at = pa.array([datetime(2011, 7, 1, 12)] * (len(prices) - 1) + [None], pa.timestamp("us", tz="UTC"))
        table = pa.table({"id": ids, "user": ids, "item": ids, "price": prices, "at": at})
        pq.write_table(table, tmp_path / f"{kind}.parquet")
    each = ingest_each(spark, tmp_path, {kind: mapping(f"{kind}.parquet", "parquet") for kind in prices_of})
    found = {row["event_id"]: (row["amount"], row["reason"]) for rows in each.values() for row in rows}
    no_time = (None, "missing_event_ts")
    assert found == {
        **{f"{kind} 0": (0.1, None) for kind in ("double", "float", "text", "decimal")},
        **{f"{kind} {n}": (None, "bad_amount") for kind in ("double", "float", "text") for n in (1, 2)},
        **{f"{kind} 3": no_time for kind in ("double", "float", "text")},
        "decimal 1": no_time,
        "whole 0": (2**53 - 1, None),
        "whole 1": no_time,
        **{f"{kind} 0": (None, "bad_amount") for kind in ("instant", "naive", "day")},
        **{f"{kind} 1": no_time for kind in ("instant", "naive", "day")},
    }


# ---- what is rejected ---------------------------------------------------------------------------------


def test_each_record_is_refused_for_its_first_reason(spark: SparkSession, write: Callable[[str, str], Path]) -> None:
    good, late = "2023-05-01T10:00:00Z", "2024-01-02T00:00:01Z"  # NOW plus 24 hours and one second
    rows = {
        "missing_user_id": f"e1,\t ,a,{good},1,2,UTC",
        "missing_item_id": rf"e2,ann,\N,{good},1,2,UTC",
        "missing_event_ts": "e3,ann,a,,1,2,UTC",
        "missing_event_id": f",ann,a,{good},1,2,UTC",
        "bad_event_ts": "e5,ann,a,noon,x,2,UTC",  # with a bad amount too
        "event_before_earliest": "e6,ann,a,1999-12-31T23:59:59Z,1,2,UTC",
        "event_in_future": f"e7,ann,a,{late},1,2,UTC",
        "bad_amount": f"e8,ann,a,{good},1d,2,UTC",  # which Java reads as 1.0
        "bad_quantity": f"e9,ann,a,{good},1,-1.7976931348623157e308,UTC",  # finite, unlike the sum of two
        "bad_time_zone": f"f1,ann,a,{good},1,2,Mars/Olympus",
        "long_event_id": f"{'f' * 513},ann,a,{good},1,2,UTC",
        "long_user_id": f"f3,{'u' * 513},a,{good},1,2,UTC",
        "long_item_id": f"f4,ann,{'i' * 513},{good},1,2,UTC",
        "nul_user_id": f"f6,ann\0,a,{good},1,2,UTC",
        "nul_item_id": f"f7,ann,\0{'i' * 600},{good},1,2,UTC",
        "test_order": f"f5,test,,{good},1,2,UTC",  # the mapping's own rule comes before missing_item_id
    }
    allowed = [f"{'ü' * 512},ann,a,{good},,,UTC", "g2, bob\t,\va b ,2024-01-02T00:00:00Z,-1e3,+.5,Europe/Paris"]
    folder = write("log.csv", "\n".join(["id,user,item,at,price,n,zone", *rows.values(), *allowed]))
    rules = [{"reason": "test_order", "when": "user = 'test'"}]
    item = {"expr": r"nullif(item, '\\N')"}  # as docs/extending.md shows for users
    given = mapping("log.csv", columns={"item_id": item, "quantity": "n", "time_zone": "zone"}, reject=rules)
    found = ingest(spark, folder, given)
    refused = {
        row["reason"]: ",".join((json.loads(row["raw"]).get(n) or "") for n in ("id", "at"))
        for row in found
        if row["reason"]
    }
    assert refused == {reason: ",".join(line.split(",")[i] for i in (0, 3)) for reason, line in rows.items()}
    names = ("user_id", "item_id", "amount", "quantity", "time_zone")
    kept = [tuple(row[name] for name in names) for row in found if row["reason"] is None]
    assert kept == [("bob", "a b", -1000.0, 0.5, "Europe/Paris"), ("ann", "a", None, None, "UTC")]


def test_a_broken_csv_row_is_kept_as_its_line(spark: SparkSession, write: Callable[[str, str], Path]) -> None:
    broken = ["2,bob,b", "3,bob,b,2023-05-01T10:00:00Z,1,extra", '4,bob,"b,2023-05-01T10:00:00Z,1']
    broken += ['5,bob,b,2023-05-01T10:00:00Z,"1', '2"', '6,bob,"b', 'c",2023-05-01T10:00:00Z,1']  # two-line records
    broken.append('8,bob,b,2023-05-01T10:00:00Z,1,"one too many')
    broken += ["9,bob" + "," * fields for fields in (30_000, 1 << 20)]  # beyond Spark's default limit, and ours
    good = ["1,ann,a,2023-05-01T10:00:00Z,1", '7,"c ""d"" ,""",5" c,2023-05-01T10:00:00Z,"1"']
    lines = ["id,user,item,at,price", good[0], *broken, "id,user,item,at,price", good[1]]  # two files joined
    signs = {",": ",", r"\t": "\t"}  # by how the mapping names them
    for number, sign in enumerate(signs.values()):
        text = "\n".join(["\ufeff", *lines, "\t\t ", "\x1a"])  # with the leftovers of editors and DOS
        folder = write(f"{number}.csv", text.replace(",", sign))
    inputs = {name: mapping(f"{number}.csv", delimiter=name) for number, name in enumerate(signs)}
    for name, rows in ingest_each(spark, folder, inputs).items():
        refused = [row["raw"] for row in rows if row["reason"] == "broken_row"]
        assert sorted(refused) == sorted(line.replace(",", signs[name]) for line in broken), name
        found = [(row["user_id"], row["item_id"]) for row in rows if row["reason"] is None]
        assert found == [("ann", "a"), (f'c "d" {signs[name]}"', '5" c')], name


def test_a_broken_json_line_is_kept_as_it_is(spark: SparkSession, write: Callable[[str, str], Path]) -> None:
    good = '{"id": "1", "user": "ann", "item": "a", "at": "2023-05-01T10:00:00Z", "price": 1}'
    two = good + good.replace("1", "2")  # two files concatenated, the first without a final newline
    broken = ['"text"', '[{"id": "2"}]', good[:30], two, good + "," + good, good + " and more"]
    broken.append(good.replace('"price": 1', '"price": 1, "k": 1, "k": 2'))  # ambiguous
    broken += [good + "], more", good + "," + good + "], more", good + "]", good + "],[" + good, "{}x", good + ","]
    rows = ingest(spark, write("log.json", "\n".join([good, "\t", *broken])), mapping("log.json", "json"))
    assert sorted(row["raw"] for row in rows if row["reason"] == "broken_row") == sorted(broken)
    assert [row["event_id"] for row in rows if row["reason"] is None] == ["1"]


def test_a_missing_file_or_column_is_named(spark: SparkSession, write: Callable[[str, str], Path]) -> None:
    folder = write("log.csv", "id,user,item,at,price\n1,ann,a,2023-05-01,1\n")
    with pytest.raises(TrailvecError, match=r"nowhere\.csv: no such file"):
        ingest(spark, folder, mapping("nowhere.csv"))
    with pytest.raises(TrailvecError, match=r"log\.csv has no column itm.*did you mean item\?"):
        ingest(spark, folder, mapping("log.csv", columns={"item_id": "itm"}))
    with pytest.raises(TrailvecError, match=r"unknown zone Europe/Lodnon; did you mean Europe/London\?"):
        ingest(spark, folder, mapping("log.csv", columns={"event_ts": {"column": "at", "zone": "Europe/Lodnon"}}))
    for format in ("millis", "%Y-%m-%d", "YYYY-MM-dd", "'at"):
        with pytest.raises(
            TrailvecError, match=rf"format = .{format}. is not a Spark datetime .* epoch_s or epoch_ms$"
        ):
            ingest(spark, folder, mapping("log.csv", columns={"event_ts": {"column": "at", "format": format}}))
    said = r"with format = \"yyyy.*\", a time without a zone would be read as UTC, not as Europe/London: give each"
    for zoned, match in (
        ({"column": "at", "format": "yyyy-MM-dd'T'HH:mm:ss[XXX]"}, said),
        (
            {"expr": "to_timestamp(at)"},
            r"expr = 'to_timestamp\(at\)' returns an instant, to which zone and format can't",
        ),
    ):
        with pytest.raises(TrailvecError, match=f"source test: event_ts: {match}"):
            ingest(spark, folder, mapping("log.csv", columns={"event_ts": {**zoned, "zone": "Europe/London"}}))
    for sql in ("to_timestamp(at, '%Y')", "regexp_replace(at, '(', '')", "from_utc_timestamp(at, 'Mars')"):
        with pytest.raises((PySparkException, Py4JJavaError)) as failed:
            ingest(spark, folder, mapping("log.csv", columns={"item_id": {"expr": sql}}))
        assert str(explain(failed.value)).startswith("the SQL fails: ")
    with pytest.raises(TrailvecError, match=r"source test: .*`itm`.*correct the mapping"):
        ingest(spark, folder, mapping("log.csv", columns={"item_id": {"expr": "upper(itm)"}}))
    with pytest.raises(TrailvecError, match=r"log\.csv: the SQL can't be parsed: Syntax error at.*correct the mapping"):
        ingest(spark, folder, mapping("log.csv", columns={"item_id": {"expr": "upper(("}}))


def test_a_cut_parquet_file_is_named(spark: SparkSession, tmp_path: Path) -> None:
    table = pa.table({name: [str(n) for n in range(1000)] for name in ("id", "user", "item", "at", "price")})
    pq.write_table(table, tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception) as error:  # noqa: PT011 - Spark's own, of several types
        ingest(spark, tmp_path, mapping("*.parquet", "parquet"))
    assert "cut.parquet is not a complete Parquet file" in str(explain(error.value))


def test_a_cut_compressed_file_is_told(spark: SparkSession, tmp_path: Path) -> None:
    lines = "".join(f"{n},ann,a,2023-05-01,{n * 7919 % 1013}\n" for n in range(50_000))
    packed = gzip.compress(("id,user,item,at,price\n" + lines).encode())
    files = [
        ("log.csv.gz", packed[:5], r"log\.csv\.gz can't be read"),
        ("log.csv.gz", packed[:100_000], "bzip2 -t FILE tells which"),
        ("log.csv.bz2", bz2.compress(packed)[:30], r"log\.csv\.bz2 can't be read"),
        ("log.csv.bz2", lines.encode(), r"log\.csv\.bz2 is not a bzip2 file"),
        ("log.json.bz2", b"", r"log\.json\.bz2 is not a bzip2 file"),
        ("log.json.gz", lines.encode(), r"log\.json\.gz is not compressed as its name says \(not a gzip file\)"),
        ("log.csv.zst", b"", r"log\.csv\.zst can't be read \(.*zStandard"),
        ("log.json.zip", packed, r"log\.json\.zip is packed in a way that Spark can't unpack"),
        ("log.csv.GZ", packed, r"log\.csv\.GZ is packed in a way"),
        ("log.csv.tar.gz", packed, r"log\.csv\.tar\.gz is packed in a way"),
    ]
    for name, content, said in files:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Exception) as error:  # noqa: PT011 - ours, or Spark's own
            ingest(spark, tmp_path, mapping(name, name.split(".")[1]))
        text = str(error.value) if isinstance(error.value, TrailvecError) else str(explain(error.value))
        assert re.search(rf"{said}.*: (fetch it again|compress it).* or take it out", text)
        (tmp_path / name).unlink()
    for name in ("gone.csv", "gone.json.bz2"):
        with pytest.raises(TrailvecError, match=rf"{name} can't be read \(java\.io\.FileNotFoundException"):
            read_raw(spark, mapping("*", name.split(".")[1]), tmp_path, [f"file://{tmp_path}/{name}"])
    with pytest.raises(TrailvecError, match=r"b\.json\.gz is not a gzip file \(it is empty\)"):
        _check_gzip({"a.json": 0, "b.json.gz": 0, "c.json.gz": 20})


# ---- logs that change -----------------------------------------------------------------------------------


def test_a_csv_file_with_other_columns_is_read_by_its_own_header(
    spark: SparkSession, write: Callable[[str, str], Path]
) -> None:
    folder = write("day1.csv", "id,user,item,at,price\n1,ann,a,2023-05-01,1\n")
    write("day2.csv", "id,user,item,price,at\n2,ann,a,2,2023-05-02\n")
    write("day3.csv", "id,user,item,at,price,channel\n3,ann,a,2023-05-03,3,app\n")
    write("day4.csv", "\n  \nid,user,item,price,at\n4,ann,a,4,2023-05-04\n")
    write("day5.csv", "\n")
    write("o.csv", "id,user,what,at,price\n5,ann,a,2023-05-05,5\n")
    with pytest.raises(TrailvecError, match=r"/o\.csv has no column item.*: correct the mapping or remove the file"):
        ingest(spark, folder, mapping("*.csv"))
    rows = ingest(spark, folder, mapping("day*.csv"))
    assert [row["reason"] for row in rows] == [None] * 4
    assert [row["amount"] for row in rows] == [1.0, 2.0, 3.0, 4.0]
    assert [row["event_ts"].day for row in rows] == [1, 2, 3, 4]
    assert [row["attributes"] or {} for row in rows] == [{}, {}, {"channel": "app"}, {}]


def test_a_header_without_a_name_or_with_one_twice_is_read(
    spark: SparkSession, write: Callable[[str, str], Path]
) -> None:
    folder = write("day1.csv", ",id,user,item,at,price\n0,1,ann,a,2023-05-01,1\n")  # pandas' index
    write("day2.csv", "id,user,item,at,price,\n2,ann,a,2023-05-02,2,\n3,ann,a,2023-05-02,2\n")
    write("day3.csv", "id,user,item,at,price,note,Note\n4,ann,a,2023-05-03,3,x,y\n")
    rows = ingest(spark, folder, mapping("day*.csv"))
    assert [row["raw"] for row in rows if row["reason"] == "broken_row"] == ["3,ann,a,2023-05-02,2"]
    found = [(row["event_id"], row["attributes"]) for row in rows if not row["reason"]]
    assert found == [("1", {"_c0": "0"}), ("2", None), ("4", {"note5": "x", "Note6": "y"})]
    for category in ("note", {"expr": "upper(NOTE)"}):
        with pytest.raises(TrailvecError, match=r"day3\.csv: the header has several columns named (note|NOTE), which"):
            ingest(spark, folder, mapping("day3.csv", columns={"category": category}))


def test_a_header_of_a_lookup_is_read_as_a_log_s(spark: SparkSession, write: Callable[[str, str], Path]) -> None:
    folder = write("log.csv", ",id,user,item,at,price\n7,1,ann,a,2023-05-01,1\n")  # both with pandas' index
    write("kinds/1.csv", ",user,kind,note,Note\n0,ann,tea,x,y\n")
    write("kinds/2.csv", '"",user,kind,note,Note\n1,bob,jam,x,y\n')
    lookups = [{"path": "kinds", "format": "csv", "on": ["user"]}]
    (row,) = ingest(spark, folder, mapping("log.csv", columns={"category": "kind"}, lookups=lookups))
    assert (row["category"], row["attributes"]) == ("tea", {"_c0": "7"})
    with pytest.raises(TrailvecError, match="kinds: the records also have a column _c0: rename it"):
        ingest(spark, folder, mapping("log.csv", columns={"category": "_c0"}, lookups=lookups))
    with pytest.raises(TrailvecError, match=r"1\.csv: the header has several columns named note, which the source's"):
        ingest(spark, folder, mapping("log.csv", columns={"category": "note"}, lookups=lookups))
    write("kinds/3.csv", 'user,kind\nann,"tea\nand milk"\n')
    with pytest.raises(Exception, match="TrailvecError") as error:
        ingest(spark, folder, mapping("log.csv", lookups=[lookups[0] | {"path": "kinds/3.csv"}]))
    assert re.search("kinds/3.csv: a row of 8 characters can't be split into the header's", str(explain(error.value)))
    write("kinds/3.csv", "user,colour\nann,red\n")
    with pytest.raises(TrailvecError, match=r"3\.csv has the columns user, colour; other files of the lookup"):
        ingest(spark, folder, mapping("log.csv", columns={"category": "kind"}, lookups=lookups))


def test_what_a_folder_says_is_a_column_whatever_folders_are_beside_it(spark: SparkSession, tmp_path: Path) -> None:
    folders = ["log", "log/2023/05", "log/store=007", "log/store=007/till=1", "log/2023/store=A1", "log/2024/store=A1"]
    folders.append("alone/store=007")
    inputs = {}
    for form in ("csv", "json", "parquet"):
        for number, folder in enumerate(folders):
            file = tmp_path / form / folder / f"{number}.{form}"
            file.parent.mkdir(parents=True, exist_ok=True)
            row = {"id": str(number), "user": "ann", "item": "a", "at": "2023-05-01", "price": "1"}
            if form == "parquet":
                pq.write_table(pa.Table.from_pylist([row]), file)
            else:
                file.write_text(json.dumps(row) if form == "json" else ",".join(row) + "\n" + ",".join(row.values()))
        inputs[form] = mapping(f"{form}/log", form)
        for path in (f"{form}/alone", f"{form}/alone/store=*"):
            inputs[path] = mapping(path, form, {"category": "store"})
    given = [{}, {}, {"store": "007"}, {"store": "007", "till": "1"}, {"store": "A1"}, {"store": "A1"}]
    for name, rows in ingest_each(spark, tmp_path, inputs).items():
        if "alone" in name:
            found = [(row["reason"], row["category"], row["attributes"] or {}) for row in rows]
            assert found == [(None, "007", {})], name
        else:
            assert [row["attributes"] or {} for row in rows] == given, name


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_a_new_column_is_kept_in_attributes_unless_it_is_ignored(
    spark: SparkSession, tmp_path: Path, form: str
) -> None:
    record: Row = {"id": "1", "user": "ann", "item": "a", "at": "2023-05-01", "price": "1"}
    geo = {"lat": 1, "seen": datetime(2023, 5, 1, 10, 0, 0, 1)}
    nested = {"geo": geo, "tags": ["x", None], "photo": bytes(range(256))}
    newer = record | {"id": "2", "channel": "app", "trace": "x" * 40, **nested}

    def in_json(value: Any) -> str:
        return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value.isoformat())

    for name, row in (("old", record), ("new", newer)):
        if form == "json":
            (tmp_path / f"{name}.json").write_text(json.dumps(row, default=in_json))
        else:
            pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{name}.parquet")
    first, second = ingest(spark, tmp_path, mapping(f"*.{form}", form, ignore=["trace"]))
    assert first["attributes"] is first["reason"] is second["reason"] is None
    assert second["attributes"] == {
        "channel": "app",
        "geo": '{"lat":1,"seen":"2023-05-01T10:00:00.000001"}',
        "tags": '["x",null]',
        "photo": in_json(nested["photo"]),
    }


def test_a_nested_value_has_the_same_text_whatever_is_read_beside_it(spark: SparkSession, tmp_path: Path) -> None:
    """Spark merges the fields of several files in the order of the first: with any first, one of these would change."""
    given = [{"b": 1, "c": 2}, {"a": 1, "z": 2}, {"b": 1, "z": 2}, {"a": 1, "c": 2}]
    for number, geo in enumerate(given):
        row = {"id": str(number), "user": "ann", "item": "a", "at": "2023-05-01", "price": "1", "stops": [{"geo": geo}]}
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{number}.parquet")
    rows = ingest(spark, tmp_path, mapping("*.parquet", "parquet"))
    assert [json.loads(row["attributes"]["stops"], object_pairs_hook=list) for row in rows] == [
        [[("geo", list(geo.items()))]] for geo in given
    ]


def test_a_type_that_no_id_has_is_refused(spark: SparkSession, tmp_path: Path) -> None:
    """17850.0 would be a different user from 17850; an integer and its text are the same user."""
    rest: dict[str, list[Any]] = {"item": ["a"], "at": ["2023-05-01"], "price": [1.0]}
    kinds: dict[str, list[Any]] = {"text": ["17850"], "whole": [17850], "real": [17850.0], "object": [{"id": 17850}]}
    for kind, value in kinds.items():
        pq.write_table(pa.table({"id": [kind], "user": value, **rest}), tmp_path / f"{kind}.parquet")
    for kind, bytes_ in {"bytes": b"17850", "no text": b"\xff17850"}.items():  # some writers mark no column as text
        pq.write_table(pa.table({"id": [kind], "user": [bytes_], **rest}), tmp_path / f"{kind}.parquet")
    types = {"missing": (None, pa.float64()), "decimal": ("17850", pa.decimal128(38, 0))}
    types["fraction"] = ("17850", pa.decimal128(38, 10))
    for kind, (value, type) in types.items():
        user = pa.array([value and Decimal(value)], type)
        pq.write_table(pa.table({"id": [kind], "user": user, **rest}), tmp_path / f"{kind}.parquet")
    lines = [{"id": kind, "user": value[0]} | {k: v[0] for k, v in rest.items()} for kind, value in kinds.items()]
    lines += [lines[0] | {"id": "quoted", "user": "17850.0"}, lines[0] | {"id": "exponent", "user": 1.785e44}]
    lines += [lines[0] | {"id": "inside", "user": "12e45", "at": "2023-05-01", "parent": {"user": 17}}]
    compact = json.dumps(lines[2] | {"id": "compact"}, separators=(",", ":"))
    (tmp_path / "log.json").write_text("\n".join([*map(json.dumps, lines), compact]))
    found = {
        row["event_id"]: (row["user_id"], row["reason"])
        for row in ingest(
            spark, tmp_path, mapping("*.parquet", "parquet", {"user_id": {"column": "user", "default": "nobody"}})
        )
    }
    assert found["text"] == found["whole"] == found["bytes"] == ("17850", None)
    assert found["no text"] == ("\ufffd17850", "invalid_utf8")
    assert found["missing"] == ("nobody", None)
    assert found["decimal"] == ("17850", None)
    # With no user_id, so that an erasure searches the raw record.
    assert found["real"] == found["fraction"] == found["object"] == (None, "bad_type_user_id")
    # No mapping intends an object's text as a category, and 17850.0 would be another one than 17850.
    by_category = {
        row["event_id"]: row["reason"]
        for row in ingest(spark, tmp_path, mapping("*.parquet", "parquet", {"user_id": "item", "category": "user"}))
    }
    assert [by_category.pop(kind) for kind in ("object", "real", "fraction")] == ["bad_type_category"] * 3
    assert by_category.pop("no text") == "invalid_utf8"
    assert set(by_category.values()) == {None}
    texts = ["[new] tea", "{tea", {"name": "tea"}, ["tea"]]
    lines_of_texts = [lines[0] | {"id": str(number), "kind": text} for number, text in enumerate(texts)]
    (tmp_path / "texts.json").write_text("\n".join(map(json.dumps, lines_of_texts)))
    found_texts = ingest(
        spark, tmp_path, mapping("texts.json", "json", {"category": {"column": "kind", "default": "x"}})
    )
    assert [row["reason"] for row in found_texts] == [None, None, "bad_type_category", "bad_type_category"]
    rows = ingest(spark, tmp_path, mapping("log.json", "json"))
    in_json = {row["event_id"]: (row["user_id"], row["reason"]) for row in rows}
    assert {in_json.pop(kind) for kind in ("object", "real", "exponent", "compact")} == {(None, "bad_type_user_id")}
    assert [in_json.pop(kind) for kind in ("quoted", "inside")] == [("17850.0", None), ("12e45", None)]
    assert in_json == {"text": ("17850", None), "whole": ("17850", None)}
    escaped = json.dumps({"id": "1", "Käufer": 17850.0, "item": "a", "at": "2023-05-01", "price": 1.0})
    (tmp_path / "escaped.json").write_text(escaped)
    (row,) = ingest(spark, tmp_path, mapping("escaped.json", "json", {"user_id": "Käufer"}))
    assert row["reason"] == "bad_type_user_id"


def test_bytes_are_text_where_they_are_an_id_alone(spark: SparkSession, tmp_path: Path) -> None:
    code = bytes.fromhex("e28228a1c3d44142")  # no UTF-8: as a text, its first four characters would be seven bytes
    table = pa.table(
        {
            "id": [b"1", b"2"],
            "card": [b"c1"] * 2,
            "item": [b"a", code],
            "code": [code] * 2,
            "at": [b"1682899200"] * 2,
            "price": [1.0] * 2,
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    pq.write_table(pa.table({"card": [b"c1"], "user": [b"ann"]}), tmp_path / "cards.parquet")
    columns = {
        "category": {"expr": "hex(substring(code, 1, 4))"},
        "item_id": {"expr": "nullif(item, '')"},
        "event_ts": {"column": "at", "format": "epoch_s"},
    }
    row, other = ingest(
        spark,
        tmp_path,
        mapping(
            "log.parquet",
            "parquet",
            columns,
            lookups=[{"path": "cards.parquet", "format": "parquet", "on": ["card"]}],
            attributes=["id", "code", "user"],
            reject=[{"reason": "odd_code", "when": "length(code) <> 8"}],
        ),
    )
    assert (row["event_id"], row["user_id"], row["item_id"], row["reason"]) == ("1", "ann", "a", None)
    assert row["category"] == "E28228A1"
    assert row["attributes"] == {"id": "1", "code": base64.b64encode(code).decode(), "user": "ann"}
    assert row["event_ts"] == datetime(2023, 5, 1)
    assert (other["event_id"], other["user_id"], other["reason"]) == ("2", "ann", "invalid_utf8")


@pytest.mark.parametrize(
    "more",
    [
        {"columns": {"category": {"expr": "lower(item_id)"}}},
        {"reject": [{"reason": "odd", "when": "item_id LIKE 'x%'"}]},
    ],
)
def test_an_expression_reads_columns_of_the_record_not_values_made_of_it(
    spark: SparkSession, write: Callable[[str, str], Path], more: Row
) -> None:
    folder = write("log.csv", "id,user,item,at,price\n1,ann,a,2023-05-01,1\n")
    with pytest.raises(TrailvecError, match=r"`item_id`.* cannot be resolved"):
        ingest(spark, folder, mapping("log.csv", **more))


def test_an_id_of_any_origin_may_be_hashed_and_numbered(spark: SparkSession, write: Callable[[str, str], Path]) -> None:
    folder = write("log.csv", "id,user,item,at,price\n" + "1,ann,a,2023-05-01,1\n" * 2 + ",ann,a,2023-05-01,1\n")
    origins: list[Row] = [{"column": "id"}, {"expr": "upper(id)"}, {"columns": ["id"]}]
    inputs = {
        str(origin): mapping("log.csv", columns={"event_id": origin | {"sha256": True, "ordinal": True}})
        for origin in origins
    }
    hashes = [hashlib.sha256(text).hexdigest() for text in (b"1-1", b"1-2")]
    for origin, rows in ingest_each(spark, folder, inputs).items():
        found = [row["event_id"] or row["reason"] for row in rows]
        assert sorted(found) == sorted([*hashes, "missing_event_id"]), origin


@pytest.mark.parametrize("form", ["csv", "json"])
def test_bytes_that_are_no_utf8_are_refused(spark: SparkSession, tmp_path: Path, form: str) -> None:
    lines = ((1, b"\xc3\xa9", b"1"), (2, b"\xe9", b"1"), (3, b"\xc3\xa9", b"1\xe9"))
    texts = {
        "csv": [b"id,user,item,at,price,caf\xe9", *(b"%d,ann,caf%s,2023-05-01,%s," % line for line in lines)],
        "json": [
            b'{"id": "%d", "user": "ann", "item": "caf%s", "at": "2023-05-01", "price": "%s"}' % line for line in lines
        ],
    }
    (tmp_path / f"log.{form}").write_bytes(b"\n".join(texts[form]))
    first, second, third = ingest(spark, tmp_path, mapping(f"log.{form}", form))
    assert (first["item_id"], first["reason"]) == ("caf\u00e9", None)
    assert second["reason"] == third["reason"] == "invalid_utf8"


def test_an_id_with_half_a_character_is_refused(spark: SparkSession, tmp_path: Path) -> None:
    """JSON escapes halves of UTF-16 pairs. Another text may lose its end: nobody is told apart by it."""
    users = {
        r"ann\ud83d": None,
        r"ann\uDE00": None,
        r"ann\ude00\ud83d": None,
        r"ann\ud83dx?": None,
        r"ann\ud83d\ude00?": "ann😀?",
        r"ann\\ud83d?": r"ann\ud83d?",
        "ann?": "ann?",
        "bob?": "bob?",
    }
    end = r', "query": "a \ud83d?"'
    lines = [
        f'{{"id": "{n}", "user": "{user}", "item": "a", "at": "2023-05-01", "price": 1{end if user == "bob?" else ""}}}'
        for n, user in enumerate(users)
    ]
    (tmp_path / "log.json").write_text("\n".join(lines))
    found = ingest(spark, tmp_path, mapping("log.json", "json"))
    assert [row["reason"] for row in found] == [None if user else "invalid_utf8" for user in users.values()]
    assert [row["user_id"] for row in found if not row["reason"]] == [user for user in users.values() if user]


@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
def test_a_replacement_character_is_a_text_like_any_other(spark: SparkSession, tmp_path: Path, form: str) -> None:
    """What read Latin-1 as UTF-8 long before us wrote it: such a file is valid."""
    queries = [b"caf\xef\xbf\xbd", b"caf\\ufffd" if form == "json" else b"\xef\xbf\xbd", b"caf\xe9"]
    rows = list(enumerate(queries, 1))
    lines = {
        "csv": [b"id,user,item,at,price,query", *(b"%d,ann,a,2023-05-01,1,%s" % row for row in rows)],
        "json": [
            b'{"id": "%d", "user": "ann", "item": "a", "at": "2023-05-01", "price": 1, "query": "%s"}' % row
            for row in rows
        ],
    }
    if form == "parquet":
        texts = pa.array(queries).view(pa.string())  # unchecked
        same = {name: ["1"] * 3 for name in ("user", "item", "price")} | {"at": ["2023-05-01"] * 3}
        more = {"query": texts.take([0, 1, 0]), "nested": pa.StructArray.from_arrays([texts], ["text"])}
        table = pa.table({"id": ["1", "2", "3"], **same, **more})
        pq.write_table(table, tmp_path / "log.parquet")
    else:
        (tmp_path / f"log.{form}").write_bytes(b"\n".join(lines[form]))
    first, second, third = ingest(spark, tmp_path, mapping(f"log.{form}", form))
    assert (first["reason"], first["attributes"]["query"]) == (None, "caf\ufffd")
    assert (second["reason"], second["attributes"]["query"][-1]) == (None, "\ufffd")
    assert third["reason"] == "invalid_utf8"


def test_bytes_that_an_expression_makes_text_of_are_checked_too(spark: SparkSession, tmp_path: Path) -> None:
    """Of two people whose names end in different bytes it would make one user."""
    names = [b"REN\xef\xbf\xbd", b"REN\xc9", b"REN\xc8"]
    same = {name: ["1"] * 3 for name in ("item", "price")} | {"at": ["2023-05-01"] * 3}
    pq.write_table(pa.table({"id": ["1", "2", "3"], "name": names, **same}), tmp_path / "log.parquet")
    found = ingest(spark, tmp_path, mapping("log.parquet", "parquet", {"user_id": {"expr": "lower(name)"}}))
    assert [(row["reason"], row["user_id"]) for row in found[:1]] == [(None, "ren\ufffd")]
    assert [row["reason"] for row in found[1:]] == ["invalid_utf8"] * 2


def test_a_lookup_s_bytes_that_are_no_utf8_are_refused(spark: SparkSession, write: Callable[[str, str], Path]) -> None:
    folder = write("log.csv", "id,user,item,at,price\n" + "".join(f"{i},ann,{i},2023-05-01,1\n" for i in "abc"))
    kinds = [b"item,kind", b"a,caf\xe9", b"b,caf\xef\xbf\xbd"]
    (folder / "kinds.csv").write_bytes(b"\n".join(kinds))
    texts = pa.array([line.split(b",")[1] for line in kinds[1:]]).view(pa.string())
    pq.write_table(pa.table({"item": ["a", "b"], "kind": texts}), folder / "kinds.parquet")
    for form in ("csv", "parquet"):
        lookups = [{"path": f"kinds.{form}", "format": form, "on": ["item"]}]
        found = ingest(spark, folder, mapping("log.csv", columns={"category": "kind"}, lookups=lookups))
        assert [(row["reason"], row["category"]) for row in found[1:]] == [(None, "caf\ufffd"), (None, None)]
        assert found[0]["reason"] == "invalid_utf8"


def test_a_negative_amount_is_for_returns_alone(spark: SparkSession, write: Callable[[str, str], Path]) -> None:
    lines = ["1,return,-1", "2,buy,-1", "3,buy,0", "4,buy,", "5,buy,-0.0"]
    text = ["id,kind,price,user,item,at", *[f"{line},ann,a,2023-05-01" for line in lines]]
    given = mapping("log.csv", columns={"event_type": "kind"})
    rows = ingest(spark, write("log.csv", "\n".join(text)), given, negative_amount_event_types=["return"])
    assert {row["event_id"]: row["reason"] for row in rows if row["reason"]} == {"2": "negative_amount"}


def test_the_headers_of_many_files_are_read_at_a_time(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On S3, each takes a tenth of a second."""
    both = threading.Barrier(2, timeout=60)

    def opened(path: Any, conf: Any) -> Any:
        both.wait()
        return _open(path, conf)

    monkeypatch.setattr("jobs.raw_records._open", opened)
    files = [f"file://{tmp_path}/{name}" for name in ("d.csv", "b.csv", "a.csv", "c.csv")]
    for file, header in zip(files, ("id,user\n1,ann\n", "id,user", "", "id"), strict=True):
        Path(file.removeprefix("file://")).write_text(header)
    assert list(_by_header(spark, files).items()) == [("id,user", [files[1], files[0]]), ("id", [files[3]])]
    gone = [f"file://{tmp_path}/{name}" for name in ("z.csv", "y.csv", "a.csv", "x.csv")]
    monkeypatch.undo()
    with pytest.raises(TrailvecError, match=r"/x\.csv can't be read"):
        _by_header(spark, gone)


def test_a_file_name_is_no_pattern(spark: SparkSession, write: Callable[[str, str], Path]) -> None:
    folder = write("log [1] {a}*.csv", "id,user,item,at,price\n1,ann,a,2023-05-01,1\n")
    write("log 1 a.csv", "id,user,item,at,price\n2,ann,a,2023-05-01,1\n")
    frames = read_raw(spark, mapping("*.csv"), folder, [f"file://{folder}/log [1] {{a}}*.csv"])
    assert [row["id"] for frame in frames for row in frame.collect()] == ["1"]


def _source(folder: Path, name: str = "shop") -> str:
    """A mapping file for log*.csv in the folder."""
    path = folder / f"{name}.toml"
    path.write_text(
        f"""name = "{name}"
[[input]]
path = "log*.csv"
format = "csv"
[input.columns]
event_id = "id"
user_id = "user"
item_id = "item"
event_type = {{ constant = "view" }}
event_ts = "at"
vertical = {{ constant = "shop" }}
amount = "price"
"""
    )
    return str(path)


def _settings(folder: Path, sources: list[str], share: float = 0.05) -> tuple[str, ...]:
    return (
        f"ingest.sources={json.dumps(sources)}",
        f'ingest.data_dir="{folder}"',
        f"ingest.max_rejected_share={share}",
    )


def test_too_many_refused_records_stop_before_anything_is_written(
    make_runtime: Callable[..., Runtime], write: Callable[[str, str], Path]
) -> None:
    good = "id,user,item,at,price\n1,ann,a,2023-05-01,1\n2,ann,a,2023-05-02,1\n"
    folder = write("log.csv", good)
    sources = [_source(folder)]
    runtime = make_runtime(*_settings(folder, sources, 0.4))
    runtime.execute(STAGE)
    before = [DeltaTable(runtime.path(table)).version() for table in STAGE.writes]

    more = "3,,a,2023-05-01,1\n4,ann,a,2023-05-01,much\n5,,b,2023-05-01,1\n6,ann,a,2023-05-01,1\n"
    more += "7,ann,,2023-05-01,1\n8,ann,a,soon,1\n"
    write("log2.csv", f"id,user,item,at,price\n{more}")
    with pytest.raises(TrailvecError) as error:
        runtime.execute(STAGE)
    text = str(error.value)
    assert "5 of 6 records are refused, more than ingest.max_rejected_share = 0.4 allows" in text
    assert (
        'missing_user_id 2 (such as {"id":"3","item":"a","at":"2023-05-01","price":"1"}); bad_amount 1 (such as' in text
    )
    # The three most frequent reasons; of equally frequent ones the first in the alphabet, so not missing_item_id.
    assert re.findall(r"(\w+) \d+ \(such as", text) == ["missing_user_id", "bad_amount", "bad_event_ts"]
    assert [DeltaTable(runtime.path(table)).version() for table in STAGE.writes] == before

    allowed = make_runtime(*_settings(folder, sources, 0.9))
    allowed.execute(STAGE)
    report = allowed.count_rows()
    assert (report.rows_in["records"], report.rows_out) == (6, {"events": 3, "rejected_events": 5})
    reasons = {row["reason"] for row in stored(allowed, REJECTED_EVENTS)}
    assert reasons == {"missing_user_id", "missing_item_id", "bad_amount", "bad_event_ts"}


def test_no_sources_is_an_error(make_runtime: Callable[..., Runtime]) -> None:
    with pytest.raises(TrailvecError, match=r"ingest\.sources is empty"):
        make_runtime().execute(STAGE)


def test_a_folder_of_a_pattern_s_name_is_refused(
    make_runtime: Callable[..., Runtime], write: Callable[[str, str], Path]
) -> None:
    folder = write("logs [new]/log.csv", "id,user,item,at,price\n1,ann,a,2023-05-01,1\n") / "logs [new]"
    with pytest.raises(TrailvecError, match=r"ingest\.data_dir = .*/logs \[new\] contains \[, which Spark reads"):
        make_runtime(*_settings(folder, [_source(folder)])).execute(STAGE)


# ---- one event, one row -------------------------------------------------------------------------------


def test_the_same_id_is_one_event(spark: SparkSession, write: Callable[[str, str], Path]) -> None:
    lines = [
        "1,ann,a,2023-05-02T00:00:00.000001,1",
        "1,ann,a,2023-05-01,1",
        "1,ann,a,2023-05-01,1",
        "2,bob,b,2023-05-01,",
    ]
    lines.append("2,bob,,2023-04-30,")  # rejected: among records of one id, the valid event counts
    given = mapping("log.csv", attributes=["user"])

    def judge(order: list[str], partitions: int) -> list[tuple[Any, ...]]:
        folder = write("log.csv", "\n".join(["id,user,item,at,price", *order]))
        events = to_records(spark, folder, given).withColumn("stored", F.lit(False))
        rows = mark_duplicates(events.repartition(partitions), "everywhere").collect()
        return sorted((row["event_id"], row["event_ts"], row["reason"] or "", row["raw"] or "") for row in rows)

    first = judge(lines, 1)
    assert [row[:3] for row in first] == [
        ("1", datetime(2023, 5, 1), ""),
        ("1", datetime(2023, 5, 1), REPEAT),
        ("1", datetime(2023, 5, 2, 0, 0, 0, 1), "duplicate_event_id"),
        ("2", datetime(2023, 4, 30), "missing_item_id"),
        ("2", datetime(2023, 5, 1), ""),
    ]
    assert json.loads(first[2][3])["event_ts"] == "2023-05-02T00:00:00.000001Z"
    assert judge(lines[::-1], 3) == first


def test_a_null_beside_a_value_is_other_content(spark: SparkSession, write: Callable[[str, str], Path]) -> None:
    # Spark's hash skips NULLs: (NULL, x) and (x, NULL) would look equal.
    folder = write("log.csv", "id,user,item,at,price,name,kind\n1,a,a,2023-05-01,1,x,\n1,a,a,2023-05-01,1,,x\n")
    given = mapping("log.csv", columns={"item_name": "name", "category": "kind"})
    events = to_records(spark, folder, given).withColumn("stored", F.lit(False))
    found = [row["reason"] or "" for row in mark_duplicates(events, "everywhere").collect()]
    assert sorted(found) == ["", "duplicate_event_id"]


def test_a_new_column_that_is_blank_makes_no_other_event(
    spark: SparkSession, write: Callable[[str, str], Path]
) -> None:
    write("day1.csv", "id,user,item,at,price\n1,a,a,2023-05-01,1\n")
    folder = write("day2.csv", "id,user,item,at,price,channel\n1,a,a,2023-05-01,1,\n")
    events = to_records(spark, folder, mapping("day*.csv")).withColumn("stored", F.lit(False))
    found = mark_duplicates(events, "everywhere").collect()
    assert sorted(row["reason"] or "" for row in found) == ["", REPEAT]
    assert [row["attributes"] for row in found] == [None, None]  # whichever was read first


def test_a_lookup_never_multiplies_or_loses_records(spark: SparkSession, write: Callable[[str, str], Path]) -> None:
    folder = write("log.csv", "id,user,item,at,price\n1,ann,7\t ,2023-05-01,1\n2,ann,8,2023-05-01,1\n")
    table = pa.table(
        {"item": [7, 7, 9], "department": ["toys", "food", "none"]}  # integers here, text in the log
        | {"sizes": pa.array([None, [("s", 1)], []], pa.map_(pa.string(), pa.int32()))}
    )
    pq.write_table(table, folder / "items [1].parquet")
    lookups = [{"path": "items*.parquet", "format": "parquet", "on": ["item"]}]
    columns = {"vertical": {"column": "department", "default": "OTHER"}}
    rows = ingest(spark, folder, mapping("log.csv", columns=columns, lookups=lookups, attributes=["sizes"]))
    assert [(row["event_id"], row["vertical"]) for row in rows] == [("1", "food"), ("2", "OTHER")]
    assert [row["attributes"] for row in rows] == [{"sizes": '{"s":1}'}, None]
    doubled = table.set_column(0, "item", pa.array([7.0, None, 9.0]))  # pandas with a missing value: 7.0 is not 7
    pq.write_table(doubled, folder / "items [1].parquet")
    with pytest.raises(TrailvecError, match=r"lookup items\*\.parquet has a column item of type double: write the ids"):
        ingest(spark, folder, mapping("log.csv", columns=columns, lookups=lookups))
    pq.write_table(table, folder / "items [1].parquet")
    pq.write_table(
        pa.table({"id": ["1"], "user": ["ann"], "item": [7.0], "at": ["x"], "price": [1]}), folder / "log.pq"
    )
    with pytest.raises(TrailvecError, match=r"log\.pq has a column item of type double: write the ids as text"):
        ingest(spark, folder, mapping("log.pq", "parquet", columns=columns, lookups=lookups))


@pytest.mark.parametrize("form", ["csv", "json"])
def test_a_column_that_the_records_and_a_lookup_have_is_told(
    spark: SparkSession, write: Callable[[str, str], Path], form: str
) -> None:
    def log(**more: str | None) -> str:
        row = {"id": "1", "user": "ann", "item": "a", "at": "2023-05-01", "price": "1"} | more
        return json.dumps(row) if form == "json" else ",".join(row) + "\n" + ",".join(t or "" for t in row.values())

    write("kinds.csv", "item,kind\na,tea\n")
    folder = write(f"both.{form}", log(kind="milk"))
    write(f"alone.{form}", log(shelf="7", **({"kind": None} if form == "json" else {})))
    lookups = [{"path": "kinds.csv", "format": "csv", "on": ["item"]}]
    (row,) = ingest(spark, folder, mapping(f"alone.{form}", form, {"category": "kind"}, lookups=lookups))
    assert (row["category"], row["attributes"]) == ("tea", {"shelf": "7"})
    (kept,) = ingest(spark, folder, mapping(f"alone.{form}", form, lookups=lookups, attributes=["kind"]))
    assert kept["attributes"] == {"kind": "tea", "shelf": "7"}
    with pytest.raises(Exception, match="column kind") as error:
        ingest(spark, folder, mapping(f"both.{form}", form, {"category": "kind"}, lookups=lookups))
    said = "kinds.csv: the records also have a column kind: rename it in one of the files"
    assert (explain(error.value) or str(error.value)) == said


# ---- Online Retail, four real days against plain Python -----------------------------------------------


def _retail_oracle(files: Iterable[Path]) -> Iterator[tuple[str, Row]]:
    """(event_id or the reason for rejection, line) of each line of the files, by csv and hashlib."""
    id_columns = ["InvoiceNo", "StockCode", "Description", "Quantity", "UnitPrice", "InvoiceDate", "CustomerID"]
    for path in files:
        times: collections.Counter[tuple[str, ...]] = collections.Counter()
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                times[tuple(line.values())] += 1
                if not (len(line["StockCode"]) >= 5 and line["StockCode"][:5].isdigit()):
                    yield "not_a_product", line
                elif not line["CustomerID"]:
                    yield "missing_user_id", line
                else:
                    parts = [*(line[name] for name in id_columns), str(times[tuple(line.values())])]
                    yield hashlib.sha256("-".join(parts).encode()).hexdigest(), line


def test_growing_folders_of_online_retail_end_in_what_plain_python_finds(
    make_runtime: Callable[..., Runtime], tmp_path: Path
) -> None:
    """Law 1: days in any order, and one of them again a run later, under another name and with its lines shuffled."""
    folder = tmp_path / "growing"
    folder.mkdir()
    sources = ["conf/sources/online_retail.toml"]
    runtime = make_runtime(*_settings(folder, sources, 0.6), "ingest.max_files_per_batch=2")
    days = sorted(ONLINE_RETAIL.glob("*.csv"))
    records = []
    for number, arriving in enumerate(([days[2]], [days[3], days[0], days[2], days[1]])):
        for day in arriving:
            header, *lines = day.read_text(encoding="utf-8").splitlines()
            random.Random(number).shuffle(lines)
            (folder / f"{number}-{day.name}").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
        records.append(runtime.execute(STAGE).rows_in["records"])
    assert runtime.execute(STAGE).skipped
    first, every = (list(_retail_oracle(files)) for files in ([days[2]], folder.iterdir()))
    assert records == [len(first), len(every) - len(first)]
    expected = {key: line for key, line in every if len(key) == 64}
    refused = collections.Counter(key for key, _ in every if len(key) != 64)  # each time, with its file
    repeated = sum(len(key) == 64 for key, _ in first)
    assert len(expected) + repeated + refused.total() == len(every)
    assert min(repeated, *refused.values()) > 0  # the fixture has each kind

    assert collections.Counter(row["reason"] for row in stored(runtime, REJECTED_EVENTS)) == refused
    events = {row["event_id"]: row for row in stored(runtime, EVENTS)}
    assert events.keys() == expected.keys()
    returns = 0
    for event_id, line in expected.items():
        row = events[event_id]
        # British Summer Time began on 2011-03-27 at 01:00; no line of that day is earlier.
        summer = line["InvoiceDate"] >= "2011-03-27"
        local = datetime.fromisoformat(line["InvoiceDate"]).replace(tzinfo=timezone.utc)
        is_return = line["InvoiceNo"].startswith("C")
        returns += is_return
        assert row["event_ts"] == local - timedelta(hours=summer)
        assert row["event_type"] == ("return" if is_return else "purchase")
        assert row["amount"] == pytest.approx(int(line["Quantity"]) * float(line["UnitPrice"]), abs=1e-3)
        assert row["quantity"] == int(line["Quantity"])
        assert (row["user_id"], row["item_id"]) == (line["CustomerID"].removesuffix(".0"), line["StockCode"])
        assert (row["basket_id"], row["item_name"]) == (line["InvoiceNo"], line["Description"].strip())
        assert dict(row["attributes"]) == {"Country": line["Country"]}
        assert (row["time_zone"], row["vertical"], row["source"]) == ("Europe/London", "GIFTS", "online_retail")
        assert row["category"] is None
    assert returns > 0


def test_a_second_run_is_skipped_and_a_forced_one_changes_no_row(
    make_runtime: Callable[..., Runtime], write: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write("log.csv", "id,user,item,at,price\n1,ann,a,2023-05-01,1\n2,bob,b,2023-05-01,1\n")
    runtime = make_runtime(*_settings(folder, [_source(folder)], share=1))
    assert not runtime.execute(STAGE).skipped
    assert runtime.execute(STAGE).skipped  # rejected_events, though empty, has its commit too
    refused = "3,,c,2023-05-01,1\n" * 2 + "1,ann,a,2023-04-30,1\n"  # the last replaces the first
    write("log1.csv", "id,user,item,at,price\n" + refused)
    runtime.execute(STAGE)
    before = [stored(runtime, table) for table in (EVENTS, REJECTED_EVENTS)]
    assert [row["reason"] for row in before[1]].count("missing_user_id") == 2
    assert not runtime.execute(STAGE, force=True).skipped
    assert [stored(runtime, table) for table in (EVENTS, REJECTED_EVENTS)] == before

    def killed(checkpoint: Path) -> None:
        (checkpoint / ".metadata.crc").unlink()
        remove_tree(checkpoint / "sources")
        raise KeyboardInterrupt

    with monkeypatch.context() as while_removing:
        while_removing.setattr("jobs.ingest.remove_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            runtime.execute(STAGE, force=True)
    write("log2.csv", "id,user,item,at,price\n3,cyd,c,2023-05-01,1\n")
    runtime.execute(STAGE)
    assert runtime.count_rows().rows_out["events"] == 3  # a new file is seen
    assert [stored(runtime, REJECTED_EVENTS)] == before[1:]
    mapping = Path(_source(folder))
    mapping.write_text(mapping.read_text().replace('"item"', '{ expr = "upper(item)" }'))
    with pytest.raises(TrailvecError, match=r"duplicate_event_id .*with other values .*`ignore`.*see Backfill"):
        make_runtime(*_settings(folder, [str(mapping)])).execute(STAGE, force=True)


def test_refused_records_are_looked_up_by_keys_alone(make_runtime: Callable[..., Runtime], spark: SparkSession) -> None:
    """A condition beside the keys would be tested for every pair of equal records: a million of `{}` have one key."""
    runtime = make_runtime()

    def refused(*rows: tuple[str, str, str | None]) -> DataFrame:
        whole = [("shop", file, None, reason, raw, date(2024, 1, 1)) for file, reason, raw in rows]
        return spark.createDataFrame(whole, REJECTED_EVENTS.schema())

    held = [("a", "broken_row", "{}"), ("a", "broken_row", None), (_STORED, "duplicate_event_id", "1")]
    add(runtime, REJECTED_EVENTS, refused(*held))
    new = [("b", "broken_row", "{}"), ("a", "odd", "{}"), ("b", "broken_row", None), (_STORED, "odd", "1")]
    left = _not_yet_refused(runtime, refused(*held, ("b", "duplicate_event_id", "1"), *new))
    assert {(row["file"], row["reason"], row["raw"]) for row in left.collect()} == set(new)

    def conditions(plan: Any) -> Iterator[bool]:
        if plan.nodeName().endswith("Join"):
            yield plan.condition().isDefined()
        for number in range(plan.children().size()):
            yield from conditions(plan.children().apply(number))

    assert list(conditions(left._jdf.queryExecution().sparkPlan())) == [False, False]


# ---- Complete Journey, its schema with a few rows made by hand -----------------------------------------


def test_complete_journey(make_runtime: Callable[..., Runtime], tmp_path: Path) -> None:
    def put(name: str, **columns: Any) -> None:
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet", use_deprecated_int96_timestamps=True)

    def times(*values: datetime) -> pa.Array:
        return pa.array(values, pa.timestamp("ns"))

    zeros = [0.0, 0.0]
    put(
        "transactions",
        household_id=[900, 901],
        store_id=[330, 330],
        basket_id=[31198570044, 31198570044],
        product_id=[1095275, 5],
        quantity=[1, 19598],
        sales_value=[0.5, 55.05],
        retail_disc=zeros,
        coupon_disc=zeros,
        coupon_match_disc=zeros,
        week=[1, 1],
        transaction_timestamp=times(datetime(2017, 1, 1, 11, 53, 26), datetime(2017, 7, 1, 0, 0, 1)),
    )
    put(
        "products",
        product_id=[1095275],
        manufacturer_id=[2],
        department=["PASTRY"],
        brand=["National"],
        product_category=["ROLLS"],
        product_type=["ROLLS: BAGELS"],
        package_size=["4 OZ"],
    )
    put("campaigns", campaign_id=[18], household_id=[900])
    put(
        "campaign_descriptions",
        campaign_id=[18],
        campaign_type=["Type A"],
        start_date=times(datetime(2017, 10, 30)),
        end_date=times(datetime(2017, 12, 24)),
    )
    put(
        "coupon_redemptions",
        household_id=[900],
        coupon_upc=[10000085364],
        campaign_id=[18],
        redemption_date=times(datetime(2017, 11, 6)),
    )
    runtime = make_runtime(*_settings(tmp_path, ["conf/sources/completejourney.toml"]))
    runtime.execute(STAGE)
    assert runtime.count_rows().rows_out == {"events": 4, "rejected_events": 0}
    rows = {row["event_id"]: row for row in stored(runtime, EVENTS)}
    what = ("user_id", "item_id", "event_type", "vertical", "category", "item_name", "amount", "quantity", "basket_id")
    assert {event_id: tuple(row[name] for name in what) for event_id, row in rows.items()} == {
        "31198570044-1095275": (
            *("900", "1095275", "purchase", "PASTRY", "ROLLS", "ROLLS: BAGELS, 4 OZ, National brand"),
            *(0.5, 1.0, "31198570044"),
        ),
        "31198570044-5": ("901", "5", "purchase", "UNKNOWN", None, "product 5", 55.05, 19598.0, "31198570044"),
        "campaign-18-900": (
            *("900", "campaign:18", "campaign_received", "CAMPAIGN", "Type A", "campaign 18, Type A"),
            *(None, None, None),
        ),
        "coupon-900-10000085364-18-2017-11-06": (
            *("900", "coupon:10000085364", "coupon_redeemed", "COUPON", None, "coupon 10000085364"),
            *(None, None, None),
        ),
    }
    # Purchases are instants; days begin at New York's midnight: UTC-4 until 2017-11-05, then UTC-5.
    assert {event_id: row["event_ts"].replace(tzinfo=None) for event_id, row in rows.items()} == {
        "31198570044-1095275": datetime(2017, 1, 1, 11, 53, 26),
        "31198570044-5": datetime(2017, 7, 1, 0, 0, 1),
        "campaign-18-900": datetime(2017, 10, 30, 4),
        "coupon-900-10000085364-18-2017-11-06": datetime(2017, 11, 6, 5),
    }
    assert {row["time_zone"] for row in rows.values()} == {"America/New_York"}
