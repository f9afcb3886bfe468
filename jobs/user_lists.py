"""Lists that people hand in: of users seeds, suppressions, consents, labels, whom to erase; of items what is in stock.

A list is a query over the tables, a Parquet or CSV file with a column user_id (or a folder of such files, as Spark
writes it), or a text of one id per line, under such a header or none. A file lies on the driver's machine, which
never holds it as a whole: Spark reads it, a text goes by line. On a cluster Spark's tasks see no file of that machine:
they read a copy beside the tables, gone afterwards.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    LINE,
    as_patterns,
    by_partition_columns,
    data_files,
    files_below,
    read_csv_table,
    stripped,
    valid_text,
)
from jobs.runtime import Runtime
from jobs.sql import ask
from training.stores import remove_tree, sha256_of
from training.urls import file_url

_CSV = (".csv", ".csv.gz")
_OF_CSV = re.compile(r"""(["']).*\1|.*[,;|]""")
TEXT_OR_WHOLE = ("string", "tinyint", "smallint", "int", "bigint")  # Spark's types


def file_digest(path: Path) -> str:
    """SHA-256 of the file's bytes, or of the names and bytes of the folder's files, hexadecimal."""
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
    """A folder for `read_rows`. It holds user ids: nothing of it stays after the block, nor what a kill left."""
    remove_tree(folder)
    if not isinstance(folder, Path):
        make_private(folder)
    try:
        yield folder
    finally:
        remove_tree(folder)


def read_users(runtime: Runtime, users: UserList, path: Path, folder: Place) -> DataFrame | Iterator[str]:
    """A column user_id, not empty; of a text the ids, read as they are asked for.

    Args:
        path: of the file that names the list, which may say where it lies by a relative path.
        folder: as for `read_rows`.

    Raises:
        TrailvecError: it has no such column, or one of numbers that are not whole; when it is read, it is no UTF-8, or
            a text with columns or quotes.
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
    """A column item_id, not empty, of a local list of items; `folder` as for `read_rows`.

    Raises:
        TrailvecError: as `read_users`.
    """
    if _is_table(file):
        return ids_of(read_rows(runtime, file, folder, "item_id"), f"the list {file}", "item_id")
    if file.is_dir():
        raise _no_table(file)
    lines = runtime.spark.read.text(as_patterns([_to_tasks(file, folder)]))
    if not lines.where(_is_other_text("value")).isEmpty():
        raise _other_text(file)
    ids = lines.select(stripped(F.col("value")).alias("item_id"))
    if not ids.where(F.col("item_id").rlike(f"^(?:{_OF_CSV.pattern})$")).isEmpty():
        raise _no_bare_id(f"a line of the list {file}")
    return ids.where("item_id NOT IN ('', 'item_id')")


def _no_bare_id(line: str) -> TrailvecError:
    return TrailvecError(
        f"{line} is in quotes or ends in a delimiter, and a text holds bare ids: take them out, or name the list .csv, "
        "with a header"
    )


def ids_of(rows: DataFrame, where: str, name: str = "user_id") -> DataFrame:
    """That column alone, not empty.

    Raises:
        TrailvecError: there is none, or as `as_ids`.
    """
    if name not in rows.columns:
        raise TrailvecError(f"{where} gives {', '.join(rows.columns) or 'nothing'}: it needs a column {name}")
    ids = as_ids(rows, where, name)
    return rows.select(ids).where(f"{name} <> ''")


def as_ids(rows: DataFrame, where: str, name: str = "user_id") -> Column:
    """The rows' column of that name as text, stripped of blanks as the ids of events are.

    Raises:
        TrailvecError: there are several; or it holds neither texts nor whole numbers. (pandas makes doubles of whole
            numbers beside a missing one: as text 4711.0, who is nobody.)
    """
    if rows.columns.count(name) > 1:
        raise TrailvecError(f"{where} gives {', '.join(rows.columns)}: it needs one column {name}")
    kind = rows.schema[name].dataType.simpleString()
    if kind not in TEXT_OR_WHOLE:
        raise TrailvecError(f"{where} has a column {name} of type {kind}: write the ids as text")
    return stripped(F.col(name).cast("string")).alias(name)


def _read_lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            texts = (line.lstrip(f"{BLANKS}\ufeff").rstrip(BLANKS) for line in lines)
            ids = ((number, text) for number, text in enumerate(texts, 1) if text)
            first = next(ids, (1, ""))
            fields = re.split(r"[,;|\t]", first[1].replace('"', ""))
            if len(fields) > 1 and "user_id" in fields:  # as ids, its lines would be nobody's
                raise TrailvecError(
                    f"the list {file} has a header of {len(fields)} columns, and a name as a text of one id per line: "
                    "name it .csv, with commas between the columns, or take out the other columns"
                )
            for number, text in ids if fields in ([""], ["user_id"]) else chain([first], ids):
                if _OF_CSV.fullmatch(text):  # nobody's either
                    raise _no_bare_id(f"line {number} of the list {file}")
                yield text
    except IsADirectoryError:
        raise _no_table(file) from None
    except UnicodeDecodeError as error:
        raise TrailvecError(f"the list {file} is no UTF-8 text ({error.reason}): save it as such") from None


def _is_table(file: Path) -> bool:
    return file.name.lower().endswith((*_CSV, ".parquet"))


def _no_table(folder: Path) -> TrailvecError:
    return TrailvecError(
        f"the list {folder} is a folder: name a file, or a folder of Parquet or CSV files whose own name ends in "
        ".parquet or .csv"
    )


def read_rows(runtime: Runtime, file: Path, folder: Place, name: str = "user_id") -> DataFrame:
    """The rows of a local file, Parquet or CSV with a header. Where `folder` lies on storage that all machines share,
    they are read from a copy in it, whenever Spark needs them: it must stay so long.

    Raises:
        TrailvecError: it holds no file, an empty one, or files that Spark does not read together: with other columns,
            or in folders of different kinds; the ids of a CSV, `name`, are no UTF-8, or a line of it is no record of
            the header's columns.
    """
    parts = data_files(file)
    if not parts:
        raise TrailvecError(
            f"the list {file} holds no file that Spark reads (names that begin with _ or . it leaves out): add one, or "
            "correct the path"
        )
    if len(by_partition_columns([str(part.relative_to(file)) for part in parts])) > 1:
        raise TrailvecError(f"the list {file} has files in folders of different kinds: lay them side by side")
    is_csv = file.name.lower().endswith(_CSV)
    if not is_csv:
        _check_alike(file, parts)
    url = _to_tasks(file, folder)
    base = {"basePath": url} if file.is_dir() else {}  # Spark finds columns in the names of folders (task=churn)
    files = [f"{url}/{part.relative_to(file)}" for part in parts] if base else [url]
    if not is_csv:
        return runtime.spark.read.options(**base).parquet(*as_patterns(files))
    rows = read_csv_table(runtime.spark, files, ",", (), f"the list {file}", base=base)
    is_other = _is_other_text(name) if name in rows.columns else F.lit(False)
    if (wrong := rows.where(F.col(BROKEN) | is_other).first()) is not None:
        if not wrong[BROKEN]:
            raise _other_text(file)
        raise TrailvecError(
            f"the list {file} has a line that does not fit its header, or a record that goes on in another line (found "
            f"{wrong[LINE]!r}): write each record on one line"
        )
    return rows.drop(FILE, LINE, BROKEN)


def _check_alike(file: Path, parts: Sequence[Path]) -> None:
    """Refuses Parquet files with other columns than the first. Spark takes one file's for those of all, and has NULL
    for the ids of a file that names them otherwise."""
    first: list[str] = []
    for part in parts:
        try:
            names = sorted(pq.read_schema(part).names)
        except pa.ArrowInvalid:
            raise TrailvecError(f"the list {part} is empty or cut short, no Parquet file: fetch it again") from None
        first = first or names
        if names != first:
            raise TrailvecError(
                f"{part} has the columns {', '.join(names)}, other files of the list {file} have {', '.join(first)}: "
                "correct it"
            )


def _is_other_text(name: str) -> Column:
    return valid_text(F.col(name)).contains("\ufffd")  # for bytes that are no UTF-8


def _other_text(file: Path) -> TrailvecError:
    return TrailvecError(f"the list {file} is no UTF-8 text: save it as such")


def _to_tasks(file: Path, folder: Place) -> str:
    """Where Spark's tasks find a local file: a copy of it, where `folder` lies on storage that all machines share."""
    if isinstance(folder, Path):
        return file_url(str(file))  # a path alone Spark would look for in Hadoop's default file system
    copy = folder / uuid.uuid4().hex / file.name
    copy.put(file)
    return str(copy)
