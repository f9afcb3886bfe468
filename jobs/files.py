"""Files wherever Hadoop's file systems reach (hdfs://, s3a://, abfss://), asked through Spark's JVM.

`HadoopPath` has pathlib's names and meanings, as far as the stages need them: a `Place` is either.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark import SparkContext
from pyspark.sql import SparkSession

from training.urls import local_path


class HadoopPath:
    """A file or folder, by its URI; a path without a scheme is of Hadoop's default file system.

    It can be named at any time, and asked for once Spark runs.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri.rstrip("/")

    def __truediv__(self, name: str) -> HadoopPath:
        return HadoopPath(f"{self._uri}/{name}")

    def __str__(self) -> str:
        return self._uri

    def qualified(self, spark: SparkSession) -> HadoopPath:
        """With the host that `hdfs:///` leaves out; Spark's streams and Delta want it."""
        path = spark._jvm.org.apache.hadoop.fs.Path(self._uri)  # type: ignore[union-attr]
        system = path.getFileSystem(spark._jsc.hadoopConfiguration())
        return HadoopPath(system.makeQualified(path).toString())

    def is_dir(self) -> bool:
        return self.exists() and bool(self._system.getFileStatus(self._path).isDirectory())

    def is_file(self) -> bool:
        return self.exists() and bool(self._system.getFileStatus(self._path).isFile())

    def exists(self) -> bool:
        return bool(self._system.exists(self._path))

    def glob(self, pattern: str) -> list[HadoopPath]:
        found = self._system.globStatus(self._jvm.org.apache.hadoop.fs.Path(self._path, pattern)) or []
        return [HadoopPath(status.getPath().toString()) for status in found]

    def lines(self) -> Iterator[str]:
        """The lines of a text file, read as they are asked for."""
        io = self._jvm.java.io
        reader = io.BufferedReader(io.InputStreamReader(self._system.open(self._path), "UTF-8"))
        try:
            while (line := reader.readLine()) is not None:
                yield line
        finally:
            reader.close()

    def read_text(self) -> str:
        return "\n".join(self.lines())

    def unlink(self, missing_ok: bool = False) -> None:
        if not self._system.delete(self._path, False) and not missing_ok:
            raise FileNotFoundError(self._uri)

    def rmdir(self) -> None:
        try:
            self._system.delete(self._path, False)
        except Py4JJavaError as error:  # it is not empty
            raise OSError(str(error.java_exception)) from None

    def rmtree(self) -> None:
        """Deletes it with all that is in it; nothing where it does not exist."""
        self._system.delete(self._path, True)

    @property
    def _jvm(self) -> Any:
        return _context()._jvm

    @property
    def _path(self) -> Any:
        return self._jvm.org.apache.hadoop.fs.Path(self._uri)

    @property
    def _system(self) -> Any:
        return self._path.getFileSystem(_context()._jsc.hadoopConfiguration())


def _context() -> Any:
    context = SparkContext._active_spark_context
    assert context is not None, "start_spark comes before any file"
    return context


Place = Path | HadoopPath


def place_of(text: str) -> Place:
    """A folder that the configuration names: a local one by its absolute path."""
    path = local_path(text)
    return HadoopPath(text) if path is None else Path(path).absolute()


def remove_tree(of: Place) -> None:
    """Deletes a folder with all that is in it; nothing where it does not exist."""
    if isinstance(of, Path):
        shutil.rmtree(of, ignore_errors=True)
    else:
        of.rmtree()
