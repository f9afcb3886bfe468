"""Lists that people hand in: of users seeds, suppressions, consents, labels, whom to erase; of items what is in stock.

A list is a query over the tables, a Parquet or CSV file with a column user_id, or a text of one id per line. A file
lies beside the configuration, on the driver's machine, which never holds it as a whole: Spark reads it, a text goes by
line. On a cluster Spark's tasks see no file of that machine: they read a copy beside the tables, gone afterwards.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.config import UserList
from jobs.errors import TrailvecError
from jobs.files import Place, make_private
from jobs.runtime import Runtime
from jobs.sql import ask
from training.stores import remove_tree
from training.urls import file_url

_CSV = (".csv", ".csv.gz")


def file_digest(path: Path) -> str:
    """SHA-256 of the file's bytes, hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
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
        TrailvecError: it has no such column; when it is read, a text is no UTF-8.
    """
    if users.sql is not None:
        where = f"{path}: the query of a list of its users"
        frame = ask(runtime, users.sql, where)
    else:
        file = path.parent / str(users.file)
        if not file.name.lower().endswith((*_CSV, ".parquet")):
            return _read_lines(file)
        frame, where = read_rows(runtime, file, folder), f"{path}: the list {file}"
    if "user_id" not in frame.columns:
        raise TrailvecError(f"{where} gives {', '.join(frame.columns) or 'nothing'}: it needs a column user_id")
    return frame.select(F.col("user_id").cast("string")).where("user_id <> ''")


def _read_lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            yield from filter(None, map(str.strip, lines))
    except UnicodeDecodeError as error:
        raise TrailvecError(f"the list {file} is no UTF-8 text ({error.reason}): save it as such") from None


def read_rows(runtime: Runtime, file: Path, folder: Place) -> DataFrame:
    """The rows of a local file, Parquet or CSV with a header. Where `folder` lies on storage that all machines share,
    they are read from a copy in it, whenever Spark needs them: it must stay so long."""
    url = _to_tasks(file, folder)
    if file.name.lower().endswith(_CSV):
        return runtime.spark.read.csv(url, header=True, escape='"')
    return runtime.spark.read.parquet(url)


def read_text_ids(runtime: Runtime, file: Path, folder: Place) -> DataFrame:
    """id string, not empty: the lines of a local text; `folder` as for `read_rows`.

    Raises:
        TrailvecError: it is no UTF-8.
    """
    lines = runtime.spark.read.text(_to_tasks(file, folder))
    ids = lines.select(F.regexp_replace("value", r"^[\s\ufeff]+|\s+$", "").alias("id")).where("id <> ''")
    if not ids.where(F.col("id").contains("\ufffd")).isEmpty():  # what Spark reads for bytes that are none
        raise TrailvecError(f"the list {file} is no UTF-8 text: save it as such")
    return ids


def _to_tasks(file: Path, folder: Place) -> str:
    """Where Spark's tasks find a local file: a copy of it, where `folder` lies on storage that all machines share."""
    if isinstance(folder, Path):
        return file_url(str(file))  # a path alone Spark would look for in Hadoop's default file system
    copy = folder / uuid.uuid4().hex / file.name
    copy.put(file)
    return str(copy)
