"""Files and topics → raw frames: a source's records as they are, before anything is said about them.

A frame has the record's own columns, those of the mapping's lookups, and FILE, LINE, BROKEN and REST.
`jobs/checked_records.py` makes events of them.
"""

from __future__ import annotations

import difflib
import glob
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException, ParseException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from jobs.errors import TrailvecError, explain
from jobs.files import Place
from jobs.sources import Input, Lookup
from training.urls import file_url, local_path

# Columns of a raw frame beside the record's own.
FILE = "trailvec_file"  # the file's URI, or the topic's name, partition and offset
LINE = "trailvec_line"  # the record's text; NULL where the columns say it all
BROKEN = "trailvec_broken"  # the line could not be split into columns
REST = "trailvec_rest"  # what nothing in the mapping names, as a map

_PACKED = re.compile(r"[.](zip|7z|xz|rar|tar|tgz|gz|bz2|zst|lz4|snappy|deflate)$", re.IGNORECASE)
_TAR = re.compile(r"[.]tar([.]\w+)?$", re.IGNORECASE)  # many files in one, which no codec parts
BLANKS = " \t\n\x0b\f\r"

_END = "trailvec_end"
_PARSED = "trailvec_parsed"
_OBJECTS = "trailvec_objects"
_MAX_FIELDS = 1 << 20  # of a line of CSV, 8 MB in each task; by itself Spark ends the job at 20,480

# What Spark's own file listing gives of a file without reading it.
LISTING = "path string, modificationTime timestamp, length long, content binary"


def find_files(data_dir: Path, path: str) -> list[Path]:
    """The local files that a mapping's path (file, folder or pattern) stands for, sorted.

    Raises:
        TrailvecError: there is none.
    """
    folder = folder_of(data_dir, path)
    found = [file for match in glob.glob(str(data_dir / path)) for file in data_files(Path(match))]
    files = sorted(file for file in found if is_data(str(file), folder))
    if not files:
        raise _no_such_file(data_dir / path)
    return files


def folder_of(data_dir: Place, path: str) -> Place:
    """What a mapping's path stands for, or of a pattern the folder that all its files lie in."""
    plain = itertools.takewhile(lambda part: not re.search(r"[*?\[{]", part), path.split("/"))
    return data_dir / "/".join(plain)


def is_data(file: str, folder: Place) -> bool:
    """Whether no name below `folder` is one that Spark leaves out. What a pattern stands for, Spark takes as it is:
    logs/* is logs/_temporary too, where a job has files that are half written."""
    path, above = (os.path.normpath(local_path(place) or place) for place in (file, str(folder)))
    below = path.removeprefix(above) if path.startswith(above) else os.path.basename(path)
    return not any(map(_is_hidden, below.split("/")))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or (name.startswith("_") and "=" not in name) or name.endswith("._COPYING_")


def data_files(top: Path) -> list[Path]:
    """The file, or those in the folder and the folders in it, sorted.

    Names that begin with `_` or `.` are no data (a folder _column=value is): so Spark has it too.
    """
    inside = files_below(top) if top.is_dir() else [top]
    return sorted(file for file in inside if file.is_file() and is_data(str(file), top) and not _is_hidden(file.name))


def files_below(folder: Path) -> Iterator[Path]:
    """All files in the folder and the folders in it, linked ones too, as Spark looks into them."""
    for inside, _, names in os.walk(folder, followlinks=True):
        yield from (Path(inside, name) for name in names)


def find_inputs(spark: SparkSession, data_dir: Place, path: str) -> list[tuple[str, int, int]]:
    """URI, size and time (of whatever unit) of each such file, wherever it lies; sorted.

    Raises:
        TrailvecError: there is none.
    """
    if isinstance(data_dir, Path):
        local = [(file, file.stat()) for file in find_files(data_dir, path)]
        return [(file_url(str(file)), stat.st_size, stat.st_mtime_ns) for file, stat in local]
    # Spark's own listing: it leaves out the same names, and asks the file system from many tasks at once.
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
    """The records of some files of an input: their own columns, those of the lookups, FILE, LINE, BROKEN and REST.

    CSV and JSON columns are strings (a nested JSON value is its JSON text); Parquet columns keep their types. Files
    whose columns differ come as frames of their own.

    Args:
        spread: parse the records in a task for each core, whatever files they lie in: for few and large files.

    Raises:
        TrailvecError: a file does not exist, or a column that the mapping names, or a header has it twice.
    """
    # With it, Spark finds partition columns (day=2017-01-01) in the files' paths.
    folder = folder_of(data_dir, str(mapping.path))
    base = {"basePath": file_url(str(folder))} if folder.is_dir() else {}
    named = _named_columns(mapping)
    groups: list[tuple[str, DataFrame]] = []
    for alike in by_partition_columns(files) if base else [files]:
        if mapping.format == "csv":
            groups += _read_csv_files(spark, alike, mapping.delimiter, named, base)
        elif mapping.format == "parquet":
            groups += [(mapping.place, _with_place(frame)) for frame in _read_parquet(spark, as_patterns(alike), base)]
        else:
            _check_packing(spark, alike)
            groups.append((mapping.place, _read_lines(spark, alike, base)))
    if spread:
        cores = spark.sparkContext.defaultParallelism
        groups = [(place, records.repartition(cores)) for place, records in groups]
    return _finish(groups, mapping, named, data_dir)


def read_topic(records: DataFrame, mapping: Input, data_dir: Place) -> list[DataFrame]:
    """As `read_raw`, of a batch of Kafka's records."""
    place = F.concat_ws("/", "topic", "partition", "offset").alias(FILE)
    lines = records.select(F.col("value").cast("string").alias(LINE), place)
    return _finish([(mapping.place, lines)], mapping, _named_columns(mapping), data_dir)


def _finish(
    groups: list[tuple[str, DataFrame]], mapping: Input, named: Sequence[str], data_dir: Place
) -> list[DataFrame]:
    """The records parsed, if they are lines of JSON, with the lookups' columns and REST. With each group comes where
    its columns are from, for people to read."""
    if not groups:
        return []
    lookups = [_read_lookup(groups[0][1].sparkSession, lookup, data_dir, named) for lookup in mapping.lookups]
    looked_up = {name: lk.path for lk, rows in zip(mapping.lookups, lookups, strict=True) for name in rows.columns}
    # An attribute out of a lookup comes into REST when it has been joined; the record's own stay in it from the start.
    joined = [name for name in looked_up if name in mapping.attributes]
    claimed = {*named, *mapping.ignore} - {name for name in mapping.attributes if name not in looked_up}

    def finish(place: str, records: DataFrame) -> DataFrame:
        if mapping.format == "json":
            taken = {name: looked_up[name] for name in named if name in looked_up}
            records = _parse_json(records, [name for name in named if name not in taken], claimed, taken)
        else:
            rest = [name for name in records.columns if not name.startswith("trailvec_") and name not in claimed]
            records = records.withColumn(REST, _texts(rest))
        for lookup, rows in zip(mapping.lookups, lookups, strict=True):
            records = _join_lookup(records, rows, lookup, named, place)
        if joined:
            more = _texts(joined)
            records = records.withColumn(REST, F.coalesce(F.map_concat(REST, more), more))
        _check_columns(place, records, mapping.column_names())
        return records

    return [finish(place, records) for place, records in groups]


def by_partition_columns(files: Sequence[str]) -> list[list[str]]:
    """The files in groups that Spark can read together: those with the same partition columns (folders column=value)
    below the same folder. Of files that differ in these, Spark leaves some out or refuses all."""
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
    """Each name as a pattern that stands for it alone: Spark's readers take patterns."""
    return [re.sub(r"([][{}*?\\])", r"\\\1", file) for file in files]


def _texts(names: Sequence[str]) -> Column:
    if not names:
        return F.lit(None).cast("map<string,string>")
    pairs = [part for name in names for part in (F.lit(name), text_of(named_column(name)))]
    return F.map_filter(F.create_map(*pairs), lambda _, value: value.isNotNull())


def _file() -> Column:
    return F.col("_metadata.file_path").alias(FILE)


def _with_place(rows: DataFrame) -> DataFrame:
    return rows.select("*", _file(), F.lit(None).cast("string").alias(LINE), F.lit(False).alias(BROKEN))


def _by_header(spark: SparkSession, files: Sequence[str]) -> dict[str, list[str]]:
    """The files of each header, in the order of their names."""
    jvm: Any = spark._jvm
    conf = spark._jsc.hadoopConfiguration()
    codecs = jvm.org.apache.hadoop.io.compress.CompressionCodecFactory(conf)
    _check_packing(spark, files)
    groups: dict[str, list[str]] = {}
    for file in sorted(files):
        path = jvm.org.apache.hadoop.fs.Path(file)
        codec = codecs.getCodec(path)
        opened = reader = _open(path, conf)
        try:
            text = opened if codec is None else codec.createInputStream(opened)
            reader = jvm.java.io.BufferedReader(jvm.java.io.InputStreamReader(text, "UTF-8"))
            header = reader.readLine()
            while header is not None and not header.removeprefix("\ufeff").strip():
                header = reader.readLine()
        except Py4JJavaError as error:
            raise _unreadable(file, error) from None
        finally:
            reader.close()
        if header is not None:  # else it has no records
            groups.setdefault(header, []).append(file)
    return groups


def _open(path: Any, conf: Any) -> Any:
    """A Java stream of the file's bytes."""
    try:
        return path.getFileSystem(conf).open(path)
    except Py4JJavaError as error:
        raise _unreadable(path.toString(), error) from None


def _unreadable(file: str, error: Py4JJavaError) -> TrailvecError:
    said = error.java_exception.toString()
    return TrailvecError(
        f"{file} can't be read ({said}): fetch it again, or packed by gzip, or take it out of the folder"
    )


def _check_packing(spark: SparkSession, files: Sequence[str]) -> None:
    """Refuses files that Hadoop does not unpack, whose bytes would be taken for lines, and one that is called .bz2 and
    is none, of which it reads no line and says no word."""
    jvm: Any = spark._jvm
    conf = spark._jsc.hadoopConfiguration()
    codecs = jvm.org.apache.hadoop.io.compress.CompressionCodecFactory(conf)
    for file in sorted(file for file in files if _PACKED.search(file)):
        path = jvm.org.apache.hadoop.fs.Path(file)
        if _TAR.search(file) or codecs.getCodec(path) is None:
            raise TrailvecError(
                f"{file} is packed in a way that Spark does not unpack: pack it by gzip, named .gz, or take it out of "
                "the folder"
            )
        if not file.endswith(".bz2"):
            continue
        opened = _open(path, conf)
        try:
            start = [opened.read() for _ in range(3)]
        finally:
            opened.close()
        if start != list(b"BZh"):
            raise TrailvecError(f"{file} is no bzip2 file: fetch it again, or take it out of the folder")


def _check_doubled(file: str, header: str, columns: Sequence[str], names: Sequence[str]) -> None:
    """Refuses a header that has one of the names twice. Spark has renamed such columns by then: behind the name of each
    it puts the column's place (note0, Note3: case makes no difference to it)."""
    for name in names:
        for place, column in enumerate(columns):
            if column.lower() == f"{name}{place}".lower() and column not in header:
                raise TrailvecError(
                    f"{file}: the header has several columns {name}, which the source's mapping names: give each a "
                    f"name of its own"
                )


def _read_lines(spark: SparkSession, files: Sequence[str], base: dict[str, str]) -> DataFrame:
    return spark.read.schema(f"{LINE} string").options(**base).text(as_patterns(files)).select("*", _file())


def _read_csv_files(
    spark: SparkSession, files: Sequence[str], delimiter: str, named: Sequence[str], base: dict[str, str]
) -> list[tuple[str, DataFrame]]:
    """For each header the first of its files, and the records of all of them."""
    found = []
    for header, group in _by_header(spark, files).items():
        records = _read_csv(_read_lines(spark, group, base), group[0], header, delimiter)
        _check_doubled(group[0], header, records.columns, named)
        found.append((group[0], records))
    return found


def _read_csv(lines: DataFrame, file: str, header: str, delimiter: str) -> DataFrame:
    """A record of each line that is neither blank nor the header; `file`: one of those whose header it is."""
    spark = lines.sparkSession
    options = {"sep": delimiter, "escape": '"', "maxColumns": str(_MAX_FIELDS)}
    names = spark.read.options(header=True, **options).csv(as_patterns([file])).columns
    in_path = [name for name in lines.columns if name not in (LINE, FILE)]  # they win over the file's, as in Parquet
    hidden = {name.lower() for name in in_path}
    # Where a quoted field goes on in the next line, Spark would give its first part and not say a word. So a delimiter
    # is put behind each line, and one more field, an empty one, is asked for. A field that is still open takes the
    # delimiter in: then there is one field too few, which Spark says; or, in a line with one too many, the last one
    # stands where the empty one should, and is not empty.
    behind = spark._jvm.org.apache.spark.sql.catalyst.csv.CSVExprUtils.toDelimiterStr(delimiter)  # type: ignore[union-attr]
    fields = [f"_{place} string" for place in range(len(names) + 1)]
    # Of more fields than that `from_csv` would end the job: it gets a single quote instead, a field too few. Few lines
    # are so long that they have to be counted.
    delimiters = (F.length(LINE) - F.length(F.replace(F.col(LINE), F.lit(behind), F.lit("")))) / len(behind)
    is_short = (F.octet_length(LINE) < _MAX_FIELDS) | (delimiters < _MAX_FIELDS - 1)
    record = F.from_csv(
        F.when(is_short, F.concat(LINE, F.lit(behind))).otherwise('"'),
        ", ".join([*fields, f"{BROKEN} string"]),
        {**options, "columnNameOfCorruptRecord": BROKEN},
    )
    # Bytes that are no UTF-8 stand as U+FFFD in the header, which Java has read.
    line = valid_text(F.col(LINE)) if "\ufffd" in header else F.col(LINE)
    parsed = F.col(_PARSED)
    is_broken = parsed[BROKEN].isNotNull() | parsed[f"_{len(names)}"].isNotNull()
    return (
        lines.where(F.col(LINE).rlike(r"[^\x00-\x20]") & (line != header.removeprefix("\ufeff")))
        # A condition that is laid on a column would be moved below this, and parse the line once more. Below what is
        # not deterministic Spark moves none; this is always true.
        .withColumn(_PARSED, F.when(F.spark_partition_id() >= 0, record))
        .select(
            *[parsed[f"_{place}"].alias(name) for place, name in enumerate(names) if name.lower() not in hidden],
            *map(named_column, in_path),
            FILE,
            F.when(is_broken, F.col(LINE)).alias(LINE),
            is_broken.alias(BROKEN),
        )
    )


def _read_parquet(spark: SparkSession, files: Sequence[str], base: dict[str, str]) -> list[DataFrame]:
    reader = spark.read.options(**base)
    try:
        return [reader.option("mergeSchema", True).parquet(*files)]
    except Exception as error:
        if "CANNOT_MERGE_SCHEMAS" not in str(error):
            raise
    # A column has other types in other files: the files of each schema are read by themselves.
    groups: dict[str, list[str]] = {}
    for file in sorted(files):
        groups.setdefault(reader.parquet(file).schema.json(), []).append(file)
    return [reader.parquet(*group) for group in groups.values()]


def _parse_json(lines: DataFrame, names: list[str], claimed: set[str], taken: Mapping[str, str]) -> DataFrame:
    """One object of each line that is not blank; a key that the mapping names nowhere stands in REST.

    Args:
        taken: the columns that the mapping names and a lookup gives, and its path. Only the records tell whether they
            have such a key too: at one that does, the job ends with a sentence.
    """
    in_path = [name for name in lines.columns if name not in (LINE, FILE)]  # they win over the line's, as in Parquet
    rest = F.map_filter(_PARSED, lambda key, value: ~key.isin(*claimed, *in_path) & text_of(value).isNotNull())
    if unclaimed := [name for name in in_path if name not in claimed]:
        rest = F.map_concat(rest, _texts(unclaimed))
    # Read as a list of two: the line's object, and one of ours. Of several objects in a line by itself Spark would give
    # the first and not say a word of the others. And a line may end the list itself, with a "]", behind which Spark
    # reads nothing more: then our own object is missing.
    text = F.concat(F.lit("["), LINE, F.lit(f',{{"{_END}":""}}]'))
    objects = F.from_json(text, "array<map<string,string>>")
    keys = F.map_keys(F.col(_OBJECTS)[0])
    # A key that stands twice would be twice in the map, which other readers refuse.
    is_one = (F.size(_OBJECTS) == 2) & F.col(_OBJECTS)[1][_END].isNotNull()
    is_one &= F.size(keys) == F.size(F.array_distinct(keys))
    # In a column that is always asked for, not in a condition: moved below the parsing, it would do it once more.
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


def _read_lookup(spark: SparkSession, lookup: Lookup, data_dir: Place, named: Sequence[str]) -> DataFrame:
    """One row for each value of the `on` columns; these as text, under names of their own (_on)."""
    files = [file for file, *_ in find_inputs(spark, data_dir, lookup.path)]
    if lookup.format == "csv":
        rows = read_csv_table(spark, files, lookup.delimiter, named, f"the lookup {lookup.path}", base={})
        rows = rows.where(_is_whole()).drop(FILE, LINE, BROKEN)
    else:
        rows = spark.read.parquet(*as_patterns(files))
    _check_columns(lookup.path, rows, lookup.on)
    rest = [name for name in rows.columns if name not in lookup.on]
    keys = [_key(rows, name, f"the lookup {lookup.path}").alias(_on(name)) for name in lookup.on]
    # Two rows of one key would make two events of one record; the smallest of them does not depend on their order.
    # (Spark has no order of maps.)
    maps = {field.name for field in rows.schema if isinstance(field.dataType, T.MapType)}
    order = [F.sort_array(F.map_entries(named_column(n))) if n in maps else named_column(n) for n in rest]
    smallest = F.min_by(F.struct(*map(named_column, rest)), F.struct(*order)).alias("row")
    return rows.groupBy(*keys).agg(smallest).select(*map(_on, lookup.on), "row.*")


def read_csv_table(
    spark: SparkSession, files: Sequence[str], delimiter: str, named: Sequence[str], what: str, *, base: dict[str, str]
) -> DataFrame:
    """The rows of files that have one header, with FILE, LINE and BROKEN; `what` they are, for people to read.

    Raises:
        TrailvecError: they have no header, or several, or one that has one of the columns `named` twice.
    """
    frames: list[DataFrame] = []
    for file, rows in _read_csv_files(spark, files, delimiter, named, base):
        if frames and rows.columns != frames[0].columns:
            found, others = (", ".join(frame.columns[:-3]) for frame in (rows, frames[0]))
            raise TrailvecError(
                f"{file} has the columns {found}, other files of {what} have {others}: correct its header"
            )
        frames.append(rows)
    if not frames:
        raise TrailvecError(f"{what} is empty, without even a header: fetch it again or take it out")
    return reduce(DataFrame.union, frames)


def _is_whole() -> Column:
    """True, or the job ends with a sentence: there is no table for the refused rows of a lookup."""
    said = F.format_string(
        "jobs.errors.TrailvecError: %s: the row %s can't be split into the header's columns: correct it", FILE, LINE
    )
    return F.when(F.col(BROKEN), F.raise_error(said)).otherwise(True)


def _join_lookup(records: DataFrame, rows: DataFrame, lookup: Lookup, named: Sequence[str], place: str) -> DataFrame:
    both = set(records.columns) & set(rows.columns)
    if wanted := both & set(named):
        raise TrailvecError(_both_have(lookup.path, min(wanted)))
    rows = rows.drop(*both)  # nobody asks for them (`_c0`, where pandas wrote its index into both files)
    same = [_key(records, name, place) == F.col(_on(name)) for name in lookup.on]
    return records.join(rows, reduce(Column.__and__, same), "left").drop(*map(_on, lookup.on))


def _key(rows: DataFrame, name: str, where: str) -> Column:
    """A column that a lookup goes by, as text, stripped of blanks as ids are.

    Raises:
        TrailvecError: its text is not the other file's: 4711.0 is no 4711, and nothing would match.
    """
    kind = rows.select(named_column(name)).schema[0].dataType
    if not is_id_type(kind):
        raise TrailvecError(f"{where} has a column {name} of type {kind.simpleString()}: write the ids as text")
    return stripped(named_column(name).cast("string"))


def is_id_type(kind: T.DataType) -> bool:
    """Whether it has texts, days or whole numbers, of which all files write the same text."""
    is_whole = isinstance(kind, T.DecimalType) and kind.scale == 0
    return is_whole or isinstance(kind, (T.StringType, T.IntegralType, T.DateType, T.NullType))


def _both_have(path: str, name: str) -> str:
    return f"{path}: the column {name} is also one of the records' own: rename it in one of the files"


def _on(name: str) -> str:
    return f"trailvec_on_{name}"


def named_column(name: str) -> Column:
    """A column by its whole name, dots and blanks included."""
    return F.col("`" + name.replace("`", "``") + "`")


def _check_columns(path: str, rows: DataFrame, names: Sequence[str]) -> None:
    found = [name for name in rows.columns if not name.startswith("trailvec_")]
    missing = [name for name in names if name not in found]
    if missing:
        near = difflib.get_close_matches(missing[0], found, n=1)
        hint = f"did you mean {near[0]}?" if near else f"found {', '.join(found)}: correct the mapping, or take it out"
        raise TrailvecError(f"{path} has no column {missing[0]}, which the source's mapping names; {hint}")


def valid_text(value: Column) -> Column:
    """The text with U+FFFD in the place of bytes that are no UTF-8. Spark's readers keep such bytes, Python and DuckDB
    refuse them."""
    return F.decode(F.encode(value, "UTF-8"), "UTF-8")


def stripped(text: Column) -> Column:
    """The text without blanks around it, as ids stand in events and in lists of them: what is no such blank is part of
    the id."""
    # No regular expression: it took an eighth of the time of reading a list.
    without_start = F.call_function("ltrim", F.lit(f"{BLANKS}\ufeff"), text)
    return F.call_function("rtrim", F.lit(BLANKS), without_start)


def text_of(value: Column) -> Column:
    """The value as text; NULL where it is blank."""
    text = value.cast("string")
    return F.when(F.trim(text) != "", text)
