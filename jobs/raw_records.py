"""Files and topics → raw frames: a source's records as read, before any validation.

A frame has the record's own columns, those of the mapping's lookups, and FILE, LINE, BROKEN, INVALID and REST.
`jobs/checked_records.py` turns them into events.
"""

from __future__ import annotations

import difflib
import glob
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, reduce
from pathlib import Path
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException, ParseException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from jobs.errors import FETCH_AGAIN, TrailvecError, explain
from jobs.files import Place
from jobs.sources import Input, Lookup
from jobs.spark_session import JSON_MICROSECONDS
from training.urls import file_url, local_path

# Columns that a raw frame has besides the record's own.
FILE = "trailvec_file"  # the file's URI, or the topic's name, partition and offset
LINE = "trailvec_line"  # the record's text; NULL where the columns hold all of it
BROKEN = "trailvec_broken"  # the line could not be split into columns
INVALID = "trailvec_invalid"  # some bytes are not UTF-8: if a value holds U+FFFD, it may stand for them
REST = "trailvec_rest"  # columns that the mapping doesn't mention, as a map

_PACKED = re.compile(r"[.](zip|7z|xz|rar|tar|tgz|gz|bz2|zst|lz4|snappy|deflate)$", re.IGNORECASE)
_TAR = re.compile(r"[.]tar([.]\w+)?$", re.IGNORECASE)  # an archive of several files, which no codec splits
BLANKS = " \t\n\x0b\f\r"

_INVALID_THERE = "trailvec_invalid_there"  # INVALID of a lookup's row
_END = "trailvec_end"
_PARSED = "trailvec_parsed"
_OBJECTS = "trailvec_objects"
_MAX_FIELDS = 1 << 20  # per CSV line, 8 MB in each task; Spark's default limit of 20,480 would fail the job

# Schema of Spark's file listing. If `content` isn't selected, no file is read.
LISTING = "path string, modificationTime timestamp, length long, content binary"


def find_files(data_dir: Path, path: str) -> list[Path]:
    """The local files that match a mapping's path (file, folder or pattern), sorted.

    Raises:
        TrailvecError: there are none.
    """
    folder = folder_of(data_dir, path)
    found = [file for match in glob.glob(str(data_dir / path)) for file in data_files(Path(match))]
    files = sorted(file for file in found if is_data(str(file), folder))
    if not files:
        raise _no_such_file(data_dir / path)
    return files


def folder_of(data_dir: Place, path: str) -> Place:
    """The mapping's path itself, or for a pattern the deepest folder without wildcards."""
    plain = itertools.takewhile(lambda part: not re.search(r"[*?\[{]", part), path.split("/"))
    return data_dir / "/".join(plain)


def is_data(file: str, folder: Place) -> bool:
    """Whether no path component below `folder` is one that Spark skips. Spark does not skip what a pattern matches:
    logs/* includes logs/_temporary, where a running job keeps half-written files."""
    path, above = (os.path.normpath(local_path(place) or place) for place in (file, str(folder)))
    below = path.removeprefix(above) if path.startswith(above) else os.path.basename(path)
    return not any(map(_is_hidden, below.split("/")))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or (name.startswith("_") and "=" not in name) or name.endswith("._COPYING_")


def data_files(top: Path) -> list[Path]:
    """The file itself, or all files below the folder, sorted.

    As in Spark, names that begin with `_` or `.` are not data, except partition folders such as _column=value.

    Raises:
        TrailvecError: a name is not UTF-8, so that Java would not list the file.
    """
    inside = files_below(top) if top.is_dir() else [top]
    files = sorted(file for file in inside if file.is_file() and is_data(str(file), top) and not _is_hidden(file.name))
    for file in files:
        try:
            str(file).encode()
        except UnicodeEncodeError:
            shown = str(file).encode(errors="backslashreplace").decode()
            said = f"the name of {shown} is not UTF-8, so Spark would leave the file out: rename it"
            raise TrailvecError(said) from None
    return files


def files_below(folder: Path) -> Iterator[Path]:
    """All files below the folder; like Spark, it follows links."""
    for inside, _, names in os.walk(folder, followlinks=True):
        yield from (Path(inside, name) for name in names)


def find_inputs(spark: SparkSession, data_dir: Place, path: str) -> list[tuple[str, int, int]]:
    """URI, size and modification time (in any unit) of each file of `find_files`, on any file system; sorted.

    Raises:
        TrailvecError: there are none.
    """
    if isinstance(data_dir, Path):
        local = [(file, file.stat()) for file in find_files(data_dir, path)]
        return [(file_url(str(file)), stat.st_size, stat.st_mtime_ns) for file, stat in local]
    # Spark's listing skips the same names and queries the file system in parallel.
    reader = spark.read.format("binaryFile").schema(LISTING).option("recursiveFileLookup", True)
    try:
        files = reader.load(str(data_dir / path)).select("path", "length", F.unix_micros("modificationTime")).collect()
    except AnalysisException as error:
        if "PATH_NOT_FOUND" not in str(error):
            raise
        files = []
    folder = folder_of(data_dir, path)
    found = sorted((file[0], file[1], file[2]) for file in files if is_data(file[0], folder))
    if not found:
        raise _no_such_file(data_dir / path)
    return found


def _no_such_file(path: Place) -> TrailvecError:
    return TrailvecError(f"{path}: no such file: correct the mapping's path or ingest.data_dir")


def read_raw(
    spark: SparkSession, mapping: Input, data_dir: Place, files: Sequence[str], spread: bool = False
) -> list[DataFrame]:
    """The records of some of an input's files: their own columns, those of the lookups, FILE, LINE, BROKEN, INVALID
    and REST.

    CSV and JSON columns are strings (a nested JSON value is its JSON text); Parquet columns keep their types. Files
    with different columns become separate frames.

    Args:
        spread: repartition to one task per core before parsing: for few, large files.

    Raises:
        TrailvecError: a file or a column that the mapping names doesn't exist, or a header has such a column twice.
    """
    # Spark needs it to find partition columns (day=2017-01-01) in the files' paths.
    folder = folder_of(data_dir, str(mapping.path))
    base = {"basePath": file_url(str(folder))} if folder.is_dir() else {}
    named = _named_columns(mapping)
    groups: list[tuple[str, DataFrame]] = []
    for alike in by_partition_columns(files) if base else [files]:
        if mapping.format == "csv":
            groups += _read_csv_files(spark, alike, mapping.delimiter, named, base)
        elif mapping.format == "parquet":
            frames = _read_parquet(spark, as_patterns(alike), base)
            ids = mapping.id_columns()
            groups += [(mapping.place, _bytes_as_text(_with_place(frame), ids)) for frame in frames]
        else:
            _check_packing(spark, alike)
            groups.append((mapping.place, _read_lines(spark, alike, base)))
    if spread:
        cores = spark.sparkContext.defaultParallelism
        groups = [(place, records.repartition(cores)) for place, records in groups]
    return _finish(groups, mapping, named, data_dir)


def read_topic(records: DataFrame, mapping: Input, data_dir: Place) -> list[DataFrame]:
    """As `read_raw`, for a batch of Kafka records."""
    place = F.concat_ws("/", "topic", "partition", "offset").alias(FILE)
    lines = records.select(F.col("value").cast("string").alias(LINE), place)
    return _finish([(mapping.place, lines)], mapping, _named_columns(mapping), data_dir)


def _finish(
    groups: list[tuple[str, DataFrame]], mapping: Input, named: Sequence[str], data_dir: Place
) -> list[DataFrame]:
    """The records with the lookups' columns and REST, parsed if they are JSON lines. Each group comes with a
    human-readable origin of its columns."""
    if not groups:
        return []
    ids = mapping.id_columns()
    lookups = [_read_lookup(groups[0][1].sparkSession, lookup, data_dir, named, ids) for lookup in mapping.lookups]
    looked_up = {name: lk.path for lk, rows in zip(mapping.lookups, lookups, strict=True) for name in rows.columns}
    # Attributes from a lookup are added to REST after the join; the record's own are in it from the start.
    joined = [name for name in looked_up if name in mapping.attributes]
    claimed = {*named, *mapping.ignore} - {name for name in mapping.attributes if name not in looked_up}

    def finish(place: str, records: DataFrame) -> DataFrame:
        if mapping.format == "json":
            taken = {name: looked_up[name] for name in named if name in looked_up}
            records = _parse_json(records, [name for name in named if name not in taken], claimed, taken)
        else:
            rest = [name for name in records.columns if not name.startswith("trailvec_") and name not in claimed]
            records = _checked(records, named) if mapping.format == "parquet" else records
            records = records.withColumn(REST, _texts(records, rest))
        for lookup, rows in zip(mapping.lookups, lookups, strict=True):
            records = _join_lookup(records, rows, lookup, named, place)
        if joined:
            more = _texts(records, joined)
            records = records.withColumn(REST, F.coalesce(F.map_concat(REST, more), more))
        _check_columns(place, records, mapping.column_names())
        return records

    return [finish(place, records) for place, records in groups]


def by_partition_columns(files: Sequence[str]) -> list[list[str]]:
    """The files grouped into those that Spark can read together: with the same partition columns (column=value folders)
    below the same folder. When these differ, Spark skips some files or refuses all of them."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for file in files:
        folders = file.split("/")[:-1]
        while folders and "=" not in folders[-1]:
            folders.pop()
        columns = list(itertools.takewhile(lambda folder: "=" in folder, reversed(folders)))
        above = folders[: len(folders) - len(columns)]
        groups.setdefault((*above, *[column.partition("=")[0] for column in columns]), []).append(file)
    return list(groups.values())


def as_patterns(files: Sequence[str]) -> list[str]:
    """The file names with wildcards escaped, because Spark's readers expect patterns."""
    return [re.sub(r"([][{}*?\\])", r"\\\1", file) for file in files]


def _texts(records: DataFrame, names: Sequence[str]) -> Column:
    """The named columns as a map, without the blank ones. A nested value or bytes become what JSON lines have for them:
    a cast to string would drop the names of a struct's fields, and make invalid UTF-8 of bytes."""
    if not names:
        return F.lit(None).cast("map<string,string>")

    def text(name: str) -> Column:
        value, kind = named_column(name), records.schema[name].dataType
        if is_nested_type(kind):
            value = F.to_json(value, JSON_MICROSECONDS)
        elif isinstance(kind, T.BinaryType):
            value = F.translate(F.base64(value), "\r\n", "")  # Spark wraps its lines
        return text_of(value)

    pairs = [part for name in names for part in (F.lit(name), text(name))]
    return F.map_filter(F.create_map(*pairs), lambda _, value: value.isNotNull())


def _file() -> Column:
    return F.col("_metadata.file_path").alias(FILE)


def _with_place(rows: DataFrame) -> DataFrame:
    return rows.select("*", _file(), F.lit(None).cast("string").alias(LINE), F.lit(False).alias(BROKEN))


def _by_header(spark: SparkSession, files: Sequence[str]) -> dict[str, list[str]]:
    """The files of each distinct header, sorted by name."""
    jvm: Any = spark._jvm
    conf = spark._jsc.hadoopConfiguration()
    codecs = jvm.org.apache.hadoop.io.compress.CompressionCodecFactory(conf)
    _check_packing(spark, files)

    def header_of(file: str) -> str | None:
        path = jvm.org.apache.hadoop.fs.Path(file)
        codec = codecs.getCodec(path)
        opened = reader = _open(path, conf)
        try:
            text = opened if codec is None else codec.createInputStream(opened)
            reader = jvm.java.io.BufferedReader(jvm.java.io.InputStreamReader(text, "UTF-8"))
            header: str | None = reader.readLine()
            while header is not None and not header.removeprefix("\ufeff").strip():
                header = reader.readLine()
            return header
        except Py4JJavaError as error:
            raise _unreadable(file, error) from None
        finally:
            reader.close()

    groups: dict[str, list[str]] = {}
    names = sorted(files)
    for file, header in zip(names, _readers().map(header_of, names), strict=True):
        if header is not None:  # else the file is empty
            groups.setdefault(header, []).append(file)
    return groups


@cache
def _readers() -> ThreadPoolExecutor:
    """Threads that wait for an object store, which takes a tenth of a second to open a file. Kept, since each has a
    thread and a connection in Java that would outlive it."""
    return ThreadPoolExecutor(16)


def _open(path: Any, conf: Any) -> Any:
    """A Java stream of the file's bytes."""
    try:
        return path.getFileSystem(conf).open(path)
    except Py4JJavaError as error:
        raise _unreadable(path.toString(), error) from None


def _unreadable(file: str, error: Py4JJavaError) -> TrailvecError:
    said = error.java_exception.toString()
    return TrailvecError(f"{file} can't be read ({said}): compress it with gzip instead, {FETCH_AGAIN}")


def _check_packing(spark: SparkSession, files: Sequence[str]) -> None:
    """Refuses files that Hadoop can't decompress, whose bytes would be read as lines, and files named .bz2 that aren't
    bzip2, from which Hadoop silently reads nothing."""
    jvm: Any = spark._jvm
    conf = spark._jsc.hadoopConfiguration()
    codecs = jvm.org.apache.hadoop.io.compress.CompressionCodecFactory(conf)
    for file in sorted(file for file in files if _PACKED.search(file)):
        path = jvm.org.apache.hadoop.fs.Path(file)
        if _TAR.search(file) or codecs.getCodec(path) is None:
            raise TrailvecError(
                f"{file} is packed in a way that Spark can't unpack: compress it with gzip (extension .gz), or "
                "take it out of the folder"
            )
        if not file.endswith(".bz2"):
            continue
        opened = _open(path, conf)
        try:
            start = [opened.read() for _ in range(3)]
        finally:
            opened.close()
        if start != list(b"BZh"):
            raise TrailvecError(f"{file} is not a bzip2 file: {FETCH_AGAIN}")


def _check_doubled(file: str, header: str, columns: Sequence[str], names: Sequence[str]) -> None:
    """Refuses a header that has one of the names twice. By then Spark has renamed such columns: it appends each one's
    position (note0, Note3; it ignores case)."""
    for name in names:
        for place, column in enumerate(columns):
            if column.lower() == f"{name}{place}".lower() and column not in header:
                raise TrailvecError(
                    f"{file}: the header has several columns named {name}, which the source's mapping uses: give each "
                    f"a unique name"
                )


def _read_lines(spark: SparkSession, files: Sequence[str], base: dict[str, str]) -> DataFrame:
    return spark.read.schema(f"{LINE} string").options(**base).text(as_patterns(files)).select("*", _file())


def _read_csv_files(
    spark: SparkSession, files: Sequence[str], delimiter: str, named: Sequence[str], base: dict[str, str]
) -> list[tuple[str, DataFrame]]:
    """For each distinct header, its first file and the records of all its files."""
    found = []
    for header, group in _by_header(spark, files).items():
        records = _read_csv(_read_lines(spark, group, base), group[0], header, delimiter)
        _check_doubled(group[0], header, records.columns, named)
        found.append((group[0], records))
    return found


def _read_csv(lines: DataFrame, file: str, header: str, delimiter: str) -> DataFrame:
    """One record per line that is neither blank nor the header; `file`: any file that has this header."""
    spark = lines.sparkSession
    options = {"sep": delimiter, "escape": '"', "maxColumns": str(_MAX_FIELDS)}
    names = spark.read.options(header=True, **options).csv(as_patterns([file])).columns
    in_path = [name for name in lines.columns if name not in (LINE, FILE)]  # they win over the file's, as in Parquet
    hidden = {name.lower() for name in in_path}
    # If a quoted field continues on the next line, Spark silently returns its first part. So we append a delimiter to
    # each line and expect one more, empty field. A quote that is still open swallows that delimiter: then a field is
    # missing, which Spark reports; or, if the line had one field too many, its last one is in the extra field's place
    # and not empty.
    behind = spark._jvm.org.apache.spark.sql.catalyst.csv.CSVExprUtils.toDelimiterStr(delimiter)  # type: ignore[union-attr]
    fields = [f"_{place} string" for place in range(len(names) + 1)]
    # On more than _MAX_FIELDS fields `from_csv` would fail the job, so it gets a lone quote instead, which has too few
    # fields. Only very long lines need their delimiters counted.
    delimiters = (F.length(LINE) - F.length(F.replace(F.col(LINE), F.lit(behind), F.lit("")))) / len(behind)
    is_short = (F.octet_length(LINE) < _MAX_FIELDS) | (delimiters < _MAX_FIELDS - 1)
    record = F.from_csv(
        F.when(is_short, F.concat(LINE, F.lit(behind))).otherwise('"'),
        ", ".join([*fields, f"{BROKEN} string"]),
        {**options, "columnNameOfCorruptRecord": BROKEN},
    )
    # Java read the header, so it has U+FFFD in place of invalid UTF-8.
    line = valid_text(F.col(LINE)) if "\ufffd" in header else F.col(LINE)
    parsed = F.col(_PARSED)
    is_broken = parsed[BROKEN].isNotNull() | parsed[f"_{len(names)}"].isNotNull()
    return (
        lines.where(F.col(LINE).rlike(r"[^\x00-\x20]") & (line != header.removeprefix("\ufeff")))
        # Spark would push filters on the parsed columns below this projection and parse each line again. It pushes
        # nothing below a non-deterministic expression; this one is always true.
        .withColumn(_PARSED, F.when(F.spark_partition_id() >= 0, record))
        .select(
            *[parsed[f"_{place}"].alias(name) for place, name in enumerate(names) if name.lower() not in hidden],
            *map(named_column, in_path),
            FILE,
            F.when(is_broken, F.col(LINE)).alias(LINE),
            is_broken.alias(BROKEN),
            _is_invalid_line(F.concat_ws("", *[parsed[f"_{place}"] for place in range(len(names))])).alias(INVALID),
        )
    )


def _read_parquet(spark: SparkSession, files: Sequence[str], base: dict[str, str]) -> list[DataFrame]:
    def read(files: Sequence[str]) -> DataFrame:
        records = spark.read.options(**base, mergeSchema="true").parquet(*files)
        schema = _sorted_by_name(records.schema)
        # Only if it must be: each reader lists the files.
        return records if schema == records.schema else spark.read.options(**base).schema(schema).parquet(*files)

    try:
        return [read(files)]
    except Exception as error:
        if "CANNOT_MERGE_SCHEMAS" not in str(error):
            raise
    # A column's type differs between files: read the files of each schema separately.
    groups: dict[T.StructType, list[str]] = {}
    for file in sorted(files):
        groups.setdefault(_sorted_by_name(spark.read.options(**base).parquet(file).schema), []).append(file)
    return [read(group) for group in groups.values()]


def _sorted_by_name(schema: T.StructType) -> T.StructType:
    """The schema with the fields of nested structs sorted. Spark keeps the order of the first file that it merges, so
    that without this a nested value's JSON text, and with it the event, would depend on the files of its batch."""

    def of(kind: T.DataType) -> T.DataType:
        if isinstance(kind, T.StructType):
            return T.StructType([field_of(field) for field in sorted(kind, key=lambda field: field.name)])
        if isinstance(kind, T.ArrayType):
            return T.ArrayType(of(kind.elementType), kind.containsNull)
        if isinstance(kind, T.MapType):
            return T.MapType(of(kind.keyType), of(kind.valueType), kind.valueContainsNull)
        return kind

    def field_of(field: T.StructField) -> T.StructField:
        return T.StructField(field.name, of(field.dataType), field.nullable, field.metadata)

    return T.StructType([field_of(field) for field in schema])


def _bytes_as_text(records: DataFrame, ids: Sequence[str]) -> DataFrame:
    """The records with those of the columns `ids` that are binary as text: some writers do not mark texts as such. A
    refused record would have its id in base64, where no erasure finds it. (Other columns keep their bytes, which an
    expression may want to count or to cut.)"""
    binary = [f.name for f in records.schema if f.name in ids and isinstance(f.dataType, T.BinaryType)]
    return records.withColumns({name: named_column(name).cast("string") for name in binary})


def _is_invalid_line(texts: Column) -> Column:
    """INVALID of a line that was parsed to these texts. (To look at the bytes of each would take a tenth of ingest.)"""
    return texts.contains("\ufffd") & is_invalid(F.col(LINE))


def _checked(records: DataFrame, named: Sequence[str]) -> DataFrame:
    """The records with INVALID, by their texts, nested ones too. (Binary columns are no texts, unless the mapping names
    them: an expression may take them for such. Numbers and times have no other bytes, and formatting them is slow.)"""

    def may_hold_text(field: T.StructField) -> bool:
        if isinstance(field.dataType, T.BinaryType):
            return field.name in named
        return isinstance(field.dataType, T.StringType) or is_nested_type(field.dataType)

    fields = [field for field in records.schema if not field.name.startswith("trailvec_") and may_hold_text(field)]
    texts = [named_column(field.name).cast("string") for field in fields]  # a cast keeps the bytes
    return records.withColumn(INVALID, is_invalid(F.concat_ws("", *texts)))


def _parse_json(lines: DataFrame, names: list[str], claimed: set[str], taken: Mapping[str, str]) -> DataFrame:
    """One object per non-blank line; keys that the mapping doesn't name go into REST.

    Args:
        taken: columns that the mapping names and a lookup provides, with the lookup's path. Whether a record has such a
            key too is only known when it is parsed: then the job fails with a clear error.
    """
    in_path = [name for name in lines.columns if name not in (LINE, FILE)]  # they win over the line's, as in Parquet
    rest = F.map_filter(_PARSED, lambda key, value: ~key.isin(*claimed, *in_path) & text_of(value).isNotNull())
    if unclaimed := [name for name in in_path if name not in claimed]:
        rest = F.map_concat(rest, _texts(lines, unclaimed))
    # Parsed as a list of two: the line's object and a sentinel. Of several objects on a line, Spark alone would return
    # the first and silently drop the others. A "]" in the line may also close the list early, after which Spark stops
    # reading: then the sentinel is missing.
    text = F.concat(F.lit("["), LINE, F.lit(f',{{"{_END}":""}}]'))
    objects = F.from_json(text, "array<map<string,string>>")
    keys = F.map_keys(F.col(_OBJECTS)[0])
    # A repeated key would be in the map twice, which other readers refuse.
    is_one = (F.size(_OBJECTS) == 2) & F.col(_OBJECTS)[1][_END].isNotNull()
    is_one &= F.size(keys) == F.size(F.array_distinct(keys))
    # In a column that is always selected, not in a filter: pushed below the parsing, a filter would parse again.
    is_broken = F.col(_PARSED).isNull()
    for name, path in taken.items():
        own = named_column(name) if name in in_path else F.col(_PARSED)[name]
        said = F.raise_error(f"jobs.errors.TrailvecError: {_both_have(path, name)}")
        is_broken = F.when(text_of(own).isNotNull(), said).otherwise(is_broken)
    return (
        lines.where(F.col(LINE).rlike(r"[^\x00-\x20]"))
        .withColumn(_OBJECTS, objects)
        .withColumn(_PARSED, F.when(is_one, F.col(_OBJECTS)[0]))
        .select(
            *[(named_column(name) if name in in_path else F.col(_PARSED)[name]).alias(name) for name in names],
            FILE,
            LINE,
            is_broken.alias(BROKEN),
            _is_invalid_line(F.array_join(F.map_values(_PARSED), "")).alias(INVALID),
            rest.alias(REST),
        )
    )


def _named_columns(mapping: Input) -> list[str]:
    """All raw columns that the mapping names, including those in SQL expressions."""
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


def _read_lookup(
    spark: SparkSession, lookup: Lookup, data_dir: Place, named: Sequence[str], ids: Sequence[str]
) -> DataFrame:
    """One row per value of the `on` columns, which become text and are renamed by `_on`; with _INVALID_THERE."""
    files = [file for file, *_ in find_inputs(spark, data_dir, lookup.path)]
    if lookup.format == "csv":
        rows = read_csv_table(spark, files, lookup.delimiter, named, f"the lookup {lookup.path}", base={})
        rows = rows.where(_is_whole()).drop(FILE, LINE, BROKEN)
    else:
        rows = _checked(_bytes_as_text(spark.read.parquet(*as_patterns(files)), ids), named)
    rows = rows.withColumnRenamed(INVALID, _INVALID_THERE)
    _check_columns(lookup.path, rows, lookup.on)
    rest = [name for name in rows.columns if name not in lookup.on]
    keys = [_key(rows, name, f"the lookup {lookup.path}").alias(_on(name)) for name in lookup.on]
    # Two rows with the same key would turn one record into two events; taking the smallest row doesn't depend on their
    # order. (Spark can't order maps, hence the sorted entries.)
    maps = {field.name for field in rows.schema if isinstance(field.dataType, T.MapType)}
    order = [F.sort_array(F.map_entries(named_column(n))) if n in maps else named_column(n) for n in rest]
    smallest = F.min_by(F.struct(*map(named_column, rest)), F.struct(*order)).alias("row")
    return rows.groupBy(*keys).agg(smallest).select(*map(_on, lookup.on), "row.*")


def read_csv_table(
    spark: SparkSession, files: Sequence[str], delimiter: str, named: Sequence[str], what: str, *, base: dict[str, str]
) -> DataFrame:
    """The rows of files with the same header, with FILE, LINE, BROKEN and INVALID; `what`: how errors call the files.

    Raises:
        TrailvecError: the files have no header, or different ones, or one that repeats a column of `named`.
    """
    frames: list[DataFrame] = []
    for file, rows in _read_csv_files(spark, files, delimiter, named, base):
        if frames and rows.columns != frames[0].columns:
            found, others = (", ".join(frame.columns[:-4]) for frame in (rows, frames[0]))
            raise TrailvecError(
                f"{file} has the columns {found}; other files of {what} have {others}: correct its header"
            )
        frames.append(rows)
    if not frames:
        raise TrailvecError(f"{what} is empty, without even a header: fetch it again or remove it")
    return reduce(DataFrame.union, frames)


def _is_whole() -> Column:
    """True, else the job fails with a clear error: there is no table for rejected lookup rows. It gives the row's
    length, by which it can be found, not the row, which may say who somebody is."""
    said = F.format_string(
        "jobs.errors.TrailvecError: %s: a row of %d characters can't be split into the header's columns: correct it",
        FILE,
        F.length(LINE),
    )
    return F.when(F.col(BROKEN), F.raise_error(said)).otherwise(True)


def _join_lookup(records: DataFrame, rows: DataFrame, lookup: Lookup, named: Sequence[str], place: str) -> DataFrame:
    both = set(records.columns) & set(rows.columns)
    if wanted := both & set(named):
        raise TrailvecError(_both_have(lookup.path, min(wanted)))
    rows = rows.drop(*both)  # not named by the mapping (`_c0`, where pandas wrote its index into both files)
    same = [_key(records, name, place) == F.col(_on(name)) for name in lookup.on]
    joined = records.join(rows, reduce(Column.__and__, same), "left").drop(*map(_on, lookup.on))
    return joined.withColumn(INVALID, F.col(INVALID) | F.coalesce(_INVALID_THERE, F.lit(False))).drop(_INVALID_THERE)


def _key(rows: DataFrame, name: str, where: str) -> Column:
    """A lookup's join key as text, stripped of blanks as ids are.

    Raises:
        TrailvecError: the type's text form varies between files: 4711.0 is not 4711, so nothing would match.
    """
    kind = rows.select(named_column(name)).schema[0].dataType
    if not is_id_type(kind):
        raise TrailvecError(f"{where} has a column {name} of type {kind.simpleString()}: write the ids as text")
    return stripped(named_column(name).cast("string"))


def is_nested_type(kind: T.DataType) -> bool:
    """Whether values of the type are objects or lists."""
    return isinstance(kind, (T.StructType, T.ArrayType, T.MapType))


def is_id_type(kind: T.DataType) -> bool:
    """Whether it is text, bytes (UTF-8), date or integral: the types whose text form is the same in all files."""
    is_whole = isinstance(kind, T.DecimalType) and kind.scale == 0
    return is_whole or isinstance(kind, (T.StringType, T.BinaryType, T.IntegralType, T.DateType, T.NullType))


def _both_have(path: str, name: str) -> str:
    return f"{path}: the records also have a column {name}: rename it in one of the files"


def _on(name: str) -> str:
    return f"trailvec_on_{name}"


def named_column(name: str) -> Column:
    """The column with exactly this name, dots and blanks included."""
    return F.col("`" + name.replace("`", "``") + "`")


def _check_columns(path: str, rows: DataFrame, names: Sequence[str]) -> None:
    found = [name for name in rows.columns if not name.startswith("trailvec_")]
    missing = [name for name in names if name not in found]
    if missing:
        near = difflib.get_close_matches(missing[0], found, n=1)
        hint = (
            f"did you mean {near[0]}?" if near else f"found {', '.join(found)}: correct the mapping or remove the file"
        )
        raise TrailvecError(f"{path} has no column {missing[0]}, which the source's mapping names; {hint}")


def valid_text(value: Column) -> Column:
    """The text with U+FFFD for invalid UTF-8. Spark's readers keep such bytes, Python and DuckDB refuse them."""
    return F.decode(F.encode(value, "UTF-8"), "UTF-8")


def is_invalid(text: Column) -> Column:
    """Whether some of its bytes are not UTF-8, as Spark's readers keep them."""
    return valid_text(text) != text


def stripped(text: Column) -> Column:
    """The text without surrounding BLANKS, as for ids in events and lists; any other character is part of the id. A
    leading U+FEFF is removed too."""
    # Not by regular expression, which took an eighth of the time of reading a list.
    without_start = F.call_function("ltrim", F.lit(f"{BLANKS}\ufeff"), text)
    return F.call_function("rtrim", F.lit(BLANKS), without_start)


def without_padding(text: Column) -> Column:
    """The text without the NULs behind it: fixed-width exports pad ids with them."""
    return F.call_function("rtrim", F.lit("\0"), text)


def text_of(value: Column) -> Column:
    """The value as text; NULL if blank."""
    text = value.cast("string")
    return F.when(F.trim(text) != "", text)
