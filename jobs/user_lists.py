"""Lists supplied by people: of users (seeds, suppressions, consents, labels, erasures) and of items (in stock).

A list is a query over the tables, a Parquet or CSV file with a column user_id (or a folder of such files, as written by
Spark), or a text file with one id per line and an optional header user_id. Files are on the driver's machine, which
never loads a whole one: Spark reads tables, text is read line by line. On a cluster, Spark's tasks can't see the
driver's files, so they read a copy next to the tables, which is deleted afterwards.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs.config import UserList
from jobs.errors import TrailvecError
from jobs.files import Place, make_private
from jobs.raw_records import (
    BLANKS,
    BROKEN,
    FILE,
    INVALID,
    LINE,
    as_patterns,
    by_partition_columns,
    data_files,
    files_below,
    is_invalid,
    read_csv_table,
    stripped,
    valid_text,
    without_padding,
)
from jobs.runtime import Runtime
from jobs.sql import ask
from training.stores import remove_tree, sha256_of
from training.urls import file_url, is_mount

_CSV = (".csv", ".csv.gz")
_OF_CSV = re.compile(r"""(["']).*\1|.*[,;|]""")
TEXT_OR_WHOLE = ("string", "tinyint", "smallint", "int", "bigint")  # Spark's types


def file_digest(path: Path) -> str:
    """SHA-256 of the file's bytes, or of the names and contents of the folder's files, hexadecimal."""
    if path.is_dir():
        files = sorted(file for file in files_below(path) if file.is_file())
        parts = [f"{file.relative_to(path)}\n{file_digest(file)}\n" for file in files]
        return hashlib.sha256("".join(parts).encode()).hexdigest()
    try:
        return sha256_of(path)
    except OSError as error:
        raise TrailvecError(f"the list {path} can't be read ({error.strerror}): add it or correct the path") from None


@contextmanager
def copies(folder: Place) -> Iterator[Place]:
    """A folder for `read_rows`, inside `folder`. As it holds user ids, it is removed after the block, and before, if a
    kill left it. So of two blocks at once with the same `folder`, the one that started later wins.

    Raises:
        TrailvecError: a block that started later removed this one's files, and this one failed.
    """
    remove_tree(folder)
    own = folder / uuid.uuid4().hex
    if _is_shared(own):
        make_private(own)
    try:
        yield own
    except Exception as error:
        if not _is_shared(own) or own.exists():
            raise
        raise TrailvecError(
            f"another run that began later has removed the lists that this one had copied to {folder}: wait until it "
            f"ends, then run this again"
        ) from error
    finally:
        remove_tree(own)
        with suppress(OSError):  # not empty: a newer run's copies are in it
            folder.rmdir()


def read_users(runtime: Runtime, users: UserList, path: Path, folder: Place) -> DataFrame | Iterator[str]:
    """A frame with one column, user_id, never empty strings; for a text file the ids, read lazily.

    Args:
        path: the file that names the list, to which a relative path of the list refers.
        folder: as for `read_rows`.

    Raises:
        TrailvecError: there is no such column, or its type is neither text nor integer; or, once it is read, the list
            is not UTF-8, or a text file has several columns or quotes.
    """
    if users.sql is not None:
        where = f"{path}: the query of a list of its users"
        frame = ask(runtime, users.sql, where)
    else:
        file = path.parent / str(users.file)
        if not _is_table(file):
            return _read_lines(file)
        frame, where = read_rows(runtime, file, folder), f"{path}: the list {file}"
    return ids_of(frame, where)


def read_items(runtime: Runtime, file: Path, folder: Place) -> DataFrame:
    """A frame with one column, item_id, never empty strings, from a local list of items; `folder`: as for `read_rows`.

    Raises:
        TrailvecError: as `read_users`.
    """
    if _is_table(file):
        return ids_of(read_rows(runtime, file, folder, "item_id"), f"the list {file}", "item_id")
    if file.is_dir():
        raise _no_table(file)
    lines = runtime.spark.read.text(as_patterns([_to_tasks(file, folder)]))
    if not lines.where(_is_other_text("value", is_invalid(F.col("value")))).isEmpty():
        raise _other_text(file)
    ids = lines.select(stripped(without_padding(F.col("value"))).alias("item_id"))
    if not ids.where(F.col("item_id").rlike(f"^(?:{_OF_CSV.pattern})$")).isEmpty():
        raise _no_bare_id(f"a line of the list {file}")
    return ids.where("item_id NOT IN ('', 'item_id')")


def _no_bare_id(line: str) -> TrailvecError:
    return TrailvecError(
        f"{line} is quoted or ends in a delimiter, but a text file holds bare ids: remove quotes and delimiters, or "
        "name the list .csv and give it a header"
    )


def ids_of(rows: DataFrame, where: str, name: str = "user_id") -> DataFrame:
    """Only the column `name`, without empty strings.

    Raises:
        TrailvecError: there is no such column, or as `as_ids`.
    """
    if name not in rows.columns:
        raise TrailvecError(f"{where} has no column {name} (found {', '.join(rows.columns) or 'none'}): add it")
    ids = as_ids(rows, where, name)
    return rows.select(ids).where(f"{name} <> ''")


def as_ids(rows: DataFrame, where: str, name: str = "user_id") -> Column:
    """The column `name` as text without NULs behind it, stripped of blanks as the ids of events are.

    Raises:
        TrailvecError: there are several such columns, or its type is neither text nor integer. (pandas turns integers
            with a missing value into doubles, whose text, 4711.0, matches no id.)
    """
    if rows.columns.count(name) > 1:
        raise TrailvecError(f"{where} has several columns {name} (found {', '.join(rows.columns)}): keep one")
    kind = rows.schema[name].dataType.simpleString()
    if kind not in TEXT_OR_WHOLE:
        raise TrailvecError(f"{where} has a column {name} of type {kind}: write the ids as text")
    return stripped(without_padding(F.col(name).cast("string"))).alias(name)


def _read_lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            texts = (line.rstrip("\n").rstrip("\0").lstrip(f"{BLANKS}\ufeff").rstrip(BLANKS) for line in lines)
            ids = ((number, text) for number, text in enumerate(texts, 1) if text)
            first = next(ids, (1, ""))
            fields = re.split(r"[,;|\t]", first[1].replace('"', ""))
            if len(fields) > 1 and "user_id" in fields:  # read as ids, its lines would match nobody
                raise TrailvecError(
                    f"the list {file} has a header of {len(fields)} columns, but the name of a text file, which holds "
                    "one id per line: name it .csv, with commas between the columns, or remove the other columns"
                )
            for number, text in ids if fields in ([""], ["user_id"]) else chain([first], ids):
                if "\0" in text:  # UTF-16 without a mark; what lies before the NUL may be somebody else's id
                    raise _other_text(file)
                if _OF_CSV.fullmatch(text):  # would match nobody either
                    raise _no_bare_id(f"line {number} of the list {file}")
                yield text
    except IsADirectoryError:
        raise _no_table(file) from None
    except UnicodeDecodeError as error:
        raise TrailvecError(f"the list {file} is not UTF-8 text ({error.reason}): save it as UTF-8") from None


def _is_table(file: Path) -> bool:
    return file.name.lower().endswith((*_CSV, ".parquet"))


def _no_table(folder: Path) -> TrailvecError:
    return TrailvecError(
        f"the list {folder} is a folder: name a file, or a folder of Parquet or CSV files whose own name ends in "
        ".parquet or .csv"
    )


def read_rows(runtime: Runtime, file: Path, folder: Place, name: str = "user_id") -> DataFrame:
    """The rows of a local file or folder, Parquet or CSV with a header. If `folder` is on shared storage, Spark lazily
    reads a copy in it, so it must exist as long as the rows are used.

    Raises:
        TrailvecError: there is no file, an empty one, or files that Spark can't read together (different columns, or
            different partition folders); or in a CSV, the ids (`name`) are not UTF-8 or a line doesn't fit the header.
    """
    parts = data_files(file)
    if not parts:
        raise TrailvecError(
            f"the list {file} holds no file that Spark reads (it skips names that begin with _ or .): add one, or "
            "correct the path"
        )
    if len(by_partition_columns([str(part.relative_to(file)) for part in parts])) > 1:
        raise TrailvecError(
            f"the list {file} has files with different partition columns (column=value), or such folders in several "
            "places: put them side by side, with the same columns"
        )
    is_csv = file.name.lower().endswith(_CSV)
    if not is_csv:
        _check_alike(file, parts)
    url = _to_tasks(file, folder)
    base = {"basePath": url} if file.is_dir() else {}  # for partition columns in folder names (task=churn)
    files = [f"{url}/{part.relative_to(file)}" for part in parts] if base else [url]
    if not is_csv:
        return runtime.spark.read.options(**base).parquet(*as_patterns(files))
    rows = read_csv_table(runtime.spark, files, ",", (), f"the list {file}", base=base)
    is_other = _is_other_text(name, F.col(INVALID)) if name in rows.columns else F.lit(False)
    if (wrong := rows.where(F.col(BROKEN) | is_other).first()) is not None:
        if not wrong[BROKEN]:
            raise _other_text(file)
        raise TrailvecError(
            f"{_line_of(parts, wrong[LINE]) or f'a line of the list {file}'} does not fit its header, or is "
            "part of a record that spans several lines: write each record on one line"
        )
    return rows.drop(FILE, LINE, BROKEN, INVALID)


def _line_of(parts: Sequence[Path], text: str) -> str | None:
    """Where the first line with this text is. An error shows that, as the text may say who somebody is."""
    for part in parts:
        with pa.input_stream(str(part)) as raw, io.TextIOWrapper(raw, "utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if line.rstrip("\n") == text:
                    return f"line {number} of the list {part}"
    return None  # Java may read invalid UTF-8 in another way


def _check_alike(file: Path, parts: Sequence[Path]) -> None:
    """Refuses Parquet files whose columns differ from the first one's. Spark takes one file's schema for all, and reads
    NULL ids from files that name them differently."""
    first: list[str] = []
    for part in parts:
        try:
            names = sorted(pq.read_schema(part).names)
        except pa.ArrowInvalid:
            raise TrailvecError(
                f"the list {part} is not a complete Parquet file (truncated?): fetch it again"
            ) from None
        first = first or names
        if names != first:
            raise TrailvecError(
                f"{part} has the columns {', '.join(names)}; other files of the list {file} have {', '.join(first)}: "
                "correct it"
            )


def _is_other_text(name: str, in_line: Column) -> Column:
    """Whether it holds invalid UTF-8 (which U+FFFD replaces; `in_line`: whether its line does), or a NUL other than as
    padding, as UTF-16 does."""
    text = valid_text(F.col(name))
    return (in_line & text.contains("\ufffd")) | without_padding(text).contains("\0")


def _other_text(file: Path) -> TrailvecError:
    return TrailvecError(f"the list {file} is not UTF-8 text: save it as UTF-8")


def _is_shared(folder: Place) -> bool:
    """Whether it is not on this machine alone, so that lists are copied into it."""
    return not isinstance(folder, Path) or is_mount(folder)


def _to_tasks(file: Path, folder: Place) -> str:
    """A URL under which Spark's tasks can read a local file or folder: of a copy, if `folder` is on shared storage and
    the file is not."""
    if not _is_shared(folder) or (isinstance(folder, Path) and is_mount(file)):
        return file_url(str(file))  # Spark would look up a bare path in Hadoop's default file system
    copy = folder / uuid.uuid4().hex / file.name
    make_private(copy.parent)  # also where a newer run has just removed `folder` (`copies`)
    if not isinstance(copy, Path):
        copy.put(file)
        return str(copy)
    for part in data_files(file) if file.is_dir() else [file]:
        target = copy / part.relative_to(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(part, target)  # a mount may refuse the mode
    return file_url(str(copy))
