"""Files and folders shared by training's processes, as named in a run spec. The only module that imports fsspec.

They are local; or on HDFS over WebHDFS (`webhdfs://user@host:port/path`), which needs neither a JVM nor Hadoop's native
library; or on S3 (`s3+https://region@host:port/bucket/path`) through pyarrow's own client, which takes its credentials
from the environment (AWS_ACCESS_KEY_ID, ...) or from the machine's role.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol, cast

import pyarrow.parquet as pq
from pyarrow import fs

_BYTES_AT_ONCE = 64 * 1024 * 1024  # block size of an upload; each block is a separate append
# Of HDFS, for which fsspec waits for ever. Less than Gloo's 300 (training.dist), so that this is told and not that the
# other ranks have waited in vain; enough for a block, which is sent within it.
_SECONDS_FOR_AN_ANSWER = 120.0
_SECONDS_TO_FILL = 24 * 3600  # longer than any write takes, even with clock skew between two machines


class StorePath:
    """A file or folder in a store, by URL: the subset of pathlib's interface that training needs."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def __truediv__(self, name: str) -> StorePath:
        return StorePath(f"{self._url}/{name}")

    def __str__(self) -> str:
        return self._url

    @property
    def name(self) -> str:
        return self._url.rpartition("/")[2]

    def exists(self) -> bool:
        try:
            self._system.info(self._path)  # fsspec's own `exists` takes any error for a no
        except FileNotFoundError:
            return False
        return True

    def glob(self, pattern: str) -> list[StorePath]:
        """The folder's entries whose names match the pattern; none if the folder does not exist."""
        try:
            found = self._system.ls(self._path, detail=False)
        except FileNotFoundError:
            return []
        names = [path.rpartition("/")[2] for path in found]
        return [self / name for name in sorted(names) if fnmatch.fnmatchcase(name, pattern)]

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Always creates parents and accepts an existing folder; the arguments only mirror pathlib's."""
        if self.renames:  # S3 has no folders, only names with a / in them
            self._system.makedirs(self._path, exist_ok=True)

    @property
    def parent(self) -> StorePath:
        return StorePath(self._url.rpartition("/")[0])

    @property
    def renames(self) -> bool:
        """Whether the store can rename a folder; S3 can only copy its files."""
        return not _S3.match(self._url)

    def read_text(self, encoding: str = "utf-8") -> str:
        return bytes(self._system.cat_file(self._path)).decode(encoding)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self._system.pipe_file(self._path, text.encode(encoding))

    def put(self, source: Path) -> None:
        """Copies the files of a local folder here; those that describe the others (JSON) last."""
        self.mkdir()
        for file in sorted(source.iterdir(), key=descriptions_last):
            target = (self / file.name)._path
            with file.open("rb") as read, self._system.open(target, "wb", block_size=_BYTES_AT_ONCE) as write:
                shutil.copyfileobj(read, write, _BYTES_AT_ONCE)

    def get(self, target: Path) -> None:
        """Copies the file to this machine."""
        self._system.get_file(self._path, str(target))

    def rename(self, target: StorePath) -> None:
        """Raises OSError if the store did not rename it."""
        self._system.mv(self._path, target._path, recursive=True)
        if not target.exists():  # WebHDFS reports a failure as `false`, which fsspec ignores
            raise OSError(f"{self} could not be renamed to {target.name}")

    def rmtree(self) -> None:
        """Deletes it recursively; does nothing if it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            self._system.rm(self._path, recursive=True)

    @property
    def _path(self) -> str:
        return str(self._system._strip_protocol(self._url))

    @property
    def _system(self) -> Any:
        return _system_of(self._url)


Folder = Path | StorePath


def folder_of(name: str) -> Folder:
    """The file or folder that a run spec names."""
    return StorePath(name) if _is_remote(name) else Path(name)


class Tree(Protocol):
    """A folder of another store, StorePath's here or Hadoop's (jobs/files.py)."""

    def rmtree(self) -> None: ...


def descriptions_last(file: Path) -> tuple[bool, str]:
    """Sort key for writing files: JSON last, because it describes the others and marks them as complete."""
    return file.suffix == ".json", file.name


def remove_tree(of: Path | Tree) -> None:
    """Deletes it recursively; does nothing if it does not exist."""
    if isinstance(of, Path):
        shutil.rmtree(of, ignore_errors=True)
    else:
        of.rmtree()


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, hexadecimal; read in blocks."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_whole(file: Path, text: str) -> None:
    """Writes a local file atomically: it holds all of the text, or what it held before."""
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def flush(place: Path) -> None:
    """Returns once a local file's content, or the names in a folder, would survive a power cut."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not place.is_dir():  # some mounts can't do it for folders
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def filled(target: Folder) -> Iterator[Path]:
    """A new local folder to fill, which replaces `target` when the block ends without an error: by a rename; on S3,
    which has none, by an upload that is complete once the description (JSON) is there. A kill leaves a `.*.part`."""
    # The UUID: another run may fill the same target. The time is for `remove_abandoned`.
    part = target.parent / f".{target.name}.{time.time():.0f}-{uuid.uuid4().hex}.part"
    try:
        if isinstance(part, Path):
            part.mkdir(parents=True)
            yield part
            remove_tree(target)
            with contextlib.suppress(OSError):
                part.rename(target)  # type: ignore[arg-type]  # both are of one kind
                return
            remove_tree(target)  # another run has just put its own there
            part.rename(target)  # type: ignore[arg-type]
            return
        with tempfile.TemporaryDirectory() as local:
            yield Path(local)
            if part.renames:
                part.put(Path(local))
                remove_tree(target)
                part.rename(target)  # type: ignore[arg-type]  # both are of one kind
            else:
                remove_tree(target)
                target.put(Path(local))  # type: ignore[union-attr]
    except BaseException:
        with contextlib.suppress(OSError):  # if the store is unreachable, the original error is the one to report
            remove_tree(part)
        raise


def remove_abandoned(folder: Folder) -> None:
    """Removes what killed processes left of `filled`, if begun a day ago or earlier: newer parts may belong to a run
    that is still going."""
    for part in folder.glob(".*.part"):
        match = re.search(r"\.(\d+)-[0-9a-f]+\.part$", part.name)
        if match and time.time() - int(match[1]) > _SECONDS_TO_FILL:
            remove_tree(part)


@contextlib.contextmanager
def local_file(file: Folder) -> Iterator[Path]:
    """The file itself, or a local copy that exists until the block ends. (Memory maps of the copy stay valid.)

    Raises:
        OSError: it does not exist or can't be read.
    """
    if isinstance(file, Path):
        yield file
    else:
        with tempfile.TemporaryDirectory() as local:
            copy = Path(local) / file.name
            file.get(copy)
            yield copy


def parquet_files(urls: list[str]) -> tuple[fs.FileSystem, list[str]]:
    """The pyarrow file system of these files, and their paths in it.

    Args:
        urls: file:// URLs, or URLs of one store.
    """
    if (store := fsspec_of(urls)) is None:
        return fs.LocalFileSystem(), [url.removeprefix("file://") for url in urls]
    system = store.fs if _S3.match(urls[0]) else fs.PyFileSystem(fs.FSSpecHandler(store))
    return system, [str(store._strip_protocol(url)) for url in urls]


def row_groups(urls: list[str]) -> list[list[tuple[int, int]]]:
    """(rows, compressed bytes) of each row group of each Parquet file, in the files' order.

    Read concurrently: a store has a latency for each footer. None is kept, as they take 12 KB per row group.
    """
    system, paths = parquet_files(urls)

    def sizes(path: str) -> list[tuple[int, int]]:
        footer = pq.read_metadata(path, filesystem=system)
        return [
            (group.num_rows, sum(group.column(n).total_compressed_size for n in range(group.num_columns)))
            for group in map(footer.row_group, range(footer.num_row_groups))
        ]

    with ThreadPoolExecutor() as pool:
        return list(pool.map(sizes, paths))


def fsspec_of(urls: list[str]) -> Any | None:
    """The fsspec file system of these files; None if they are local."""
    return _system_of(urls[0]) if urls and _is_remote(urls[0]) else None


_S3 = re.compile(r"s3\+(https?)://([^@/]+)@([^/]+)/")


def _is_remote(name: str) -> bool:
    return name.startswith("webhdfs://") or _S3.match(name) is not None


def _system_of(url: str) -> Any:
    if match := _S3.match(url):
        return _s3_store(*match.groups())
    from fsspec.core import url_to_fs  # noqa: PLC0415 - nothing on a local disk needs it, nor do the data stages

    _register_webhdfs()
    return cast(Any, url_to_fs(url))[0]  # fsspec caches one per host


@cache
def _register_webhdfs() -> None:
    import fsspec  # noqa: PLC0415
    from fsspec.implementations.webhdfs import WebHDFS  # noqa: PLC0415

    class Store(WebHDFS):  # type: ignore[misc]
        def _connect(self) -> None:
            super()._connect()
            self.session.hooks["response"].append(self._check)
            self.session.request = partial(self.session.request, timeout=_SECONDS_FOR_AN_ANSWER)

        def _check(self, answer: Any, **_: Any) -> None:
            """fsspec looks at the NameNode's errors alone: a DataNode's would count as the file's content."""
            if not answer.url.startswith(self.url):
                answer.raise_for_status()

    fsspec.register_implementation("webhdfs", Store, clobber=True)


@cache
def _s3_store(scheme: str, region: str, host: str) -> Any:
    """pyarrow's S3 client, wrapped for fsspec."""
    import fsspec  # noqa: PLC0415
    from fsspec.implementations.arrow import ArrowFSWrapper  # noqa: PLC0415

    class Store(ArrowFSWrapper):  # type: ignore[misc]
        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            """The path as bucket/key."""
            return _S3.sub("", path).rstrip("/")

    fsspec.register_implementation(f"s3+{scheme}", Store, clobber=True)  # Petastorm resolves URLs through fsspec
    return Store(fs.S3FileSystem(scheme=scheme, region=region, endpoint_override=host))
