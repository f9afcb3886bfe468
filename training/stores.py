"""Folders and files that training's processes share, by the names in a run spec. The only module that imports fsspec.

They are local; or on HDFS over WebHDFS (`webhdfs://user@host:port/path`), which needs neither a JVM nor Hadoop's native
library; or on S3 (`s3+https://region@host:port/bucket/path`), by pyarrow's own client, which finds its keys in the
environment (AWS_ACCESS_KEY_ID, ...) or asks the machine's role.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

import pyarrow.parquet as pq
from pyarrow import fs

_BYTES_AT_ONCE = 64 * 1024 * 1024  # of a file that is sent; each is an append of its own
_SECONDS_TO_FILL = 24 * 3600  # so long nobody takes, whatever the clocks of two machines say


class StorePath:
    """A file or folder in a store, by its URL, with pathlib's names and meanings as far as training needs them."""

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
        return bool(self._system.exists(self._path))

    def glob(self, pattern: str) -> list[StorePath]:
        """What lies in the folder under names of that pattern; nothing where it does not exist."""
        try:
            found = self._system.ls(self._path, detail=False)
        except FileNotFoundError:
            return []
        names = [path.rpartition("/")[2] for path in found]
        return [self / name for name in sorted(names) if fnmatch.fnmatchcase(name, pattern)]

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Always with its parents, and content with a folder that is there; the arguments are pathlib's."""
        if self.renames:  # elsewhere there are no folders, only names with a / in them
            self._system.makedirs(self._path, exist_ok=True)

    @property
    def parent(self) -> StorePath:
        return StorePath(self._url.rpartition("/")[0])

    @property
    def renames(self) -> bool:
        """Whether the store can give a folder another name; S3 can only copy its files."""
        return not _S3.match(self._url)

    def read_text(self, encoding: str = "utf-8") -> str:
        return bytes(self._system.cat_file(self._path)).decode(encoding)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self._system.pipe_file(self._path, text.encode(encoding))

    def put(self, source: Path) -> None:
        """Copies the files of a local folder here; those that describe the others (JSON) after them."""
        self.mkdir()
        for file in sorted(source.iterdir(), key=descriptions_last):
            target = (self / file.name)._path
            with file.open("rb") as read, self._system.open(target, "wb", block_size=_BYTES_AT_ONCE) as write:
                shutil.copyfileobj(read, write, _BYTES_AT_ONCE)

    def get(self, target: Path) -> None:
        """Copies the file to this machine."""
        self._system.get_file(self._path, str(target))

    def rename(self, target: StorePath) -> None:
        """Raises OSError where the store did not do it."""
        self._system.mv(self._path, target._path, recursive=True)
        if not target.exists():  # WebHDFS says false, which fsspec does not look at
            raise OSError(f"{self} could not be renamed to {target.name}")

    def rmtree(self) -> None:
        """Deletes it with all that is in it; nothing where it does not exist."""
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
    """A file or folder that a run spec names."""
    return StorePath(name) if _is_remote(name) else Path(name)


class Tree(Protocol):
    """A folder of another store, StorePath's here or Hadoop's (jobs/files.py)."""

    def rmtree(self) -> None: ...


def descriptions_last(file: Path) -> tuple[bool, str]:
    """The order in which files become a whole: JSON says what the others are, and that they are all there."""
    return file.suffix == ".json", file.name


def remove_tree(of: Path | Tree) -> None:
    """Deletes it with all that is in it; nothing where it does not exist."""
    if isinstance(of, Path):
        shutil.rmtree(of, ignore_errors=True)
    else:
        of.rmtree()


def sha256_of(file: Path) -> str:
    """Of its bytes, hexadecimal; a block of them at a time."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_whole(file: Path, text: str) -> None:
    """Makes a local file hold the text: all of it, or what it held before."""
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


@contextlib.contextmanager
def filled(target: Folder) -> Iterator[Path]:
    """A new local folder to fill, which takes target's place when the block ends without an error: at once, by a
    rename; on S3, which has none, it is whole when its description (JSON) is there. A kill leaves a `.*.part`."""
    # Another run may fill the same place. The time is for `remove_abandoned`.
    part = target.parent / f".{target.name}.{time.time():.0f}-{uuid.uuid4().hex}.part"
    try:
        if isinstance(part, Path):
            part.mkdir(parents=True)
            yield part
            remove_tree(target)
            with contextlib.suppress(OSError):
                part.rename(target)  # type: ignore[arg-type]  # both are of one kind
                return
            remove_tree(target)  # another run put its own there in this moment
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
        with contextlib.suppress(OSError):  # a store that is away: what stopped the block is what is told
            remove_tree(part)
        raise


def remove_abandoned(folder: Folder) -> None:
    """Removes from the folder what kills left of `filled`: what it began a day ago or earlier. What is newer may be
    another run's that goes on."""
    for part in folder.glob(".*.part"):
        begun = re.search(r"\.(\d+)-[0-9a-f]+\.part$", part.name)
        if begun and time.time() - int(begun[1]) > _SECONDS_TO_FILL:
            remove_tree(part)


@contextlib.contextmanager
def local_file(file: Folder) -> Iterator[Path]:
    """The file itself, or a copy of it on this machine until the block ends. (What is mapped into memory stays there.)

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
    """The file system of all of these files, as pyarrow knows it, and their paths in it.

    Args:
        urls: file:// URLs, or those of one store.
    """
    if (store := fsspec_of(urls)) is None:
        return fs.LocalFileSystem(), [url.removeprefix("file://") for url in urls]
    system = store.fs if _S3.match(urls[0]) else fs.PyFileSystem(fs.FSSpecHandler(store))
    return system, [str(store._strip_protocol(url)) for url in urls]


def footers(urls: list[str]) -> list[pq.FileMetaData]:
    """What the footers of these Parquet files say, in the files' order. Several are read at once: a store lets each be
    waited for."""
    system, paths = parquet_files(urls)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda path: pq.read_metadata(path, filesystem=system), paths))


def fsspec_of(urls: list[str]) -> Any | None:
    """The store of these files, as fsspec knows it; None where they are local."""
    return _system_of(urls[0]) if urls and _is_remote(urls[0]) else None


_S3 = re.compile(r"s3\+(https?)://([^@/]+)@([^/]+)/")


def _is_remote(name: str) -> bool:
    return name.startswith("webhdfs://") or _S3.match(name) is not None


def _system_of(url: str) -> Any:
    if found := _S3.match(url):
        return _s3_store(*found.groups())
    from fsspec.core import url_to_fs  # noqa: PLC0415 - nothing on a local disk needs it, nor do the data stages

    return cast(Any, url_to_fs(url))[0]  # one for each host, kept by fsspec


@cache
def _s3_store(scheme: str, region: str, host: str) -> Any:
    """pyarrow's client for a store, as fsspec knows it."""
    import fsspec  # noqa: PLC0415
    from fsspec.implementations.arrow import ArrowFSWrapper  # noqa: PLC0415

    class Store(ArrowFSWrapper):  # type: ignore[misc]
        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            """bucket/key"""
            return _S3.sub("", path).rstrip("/")

    fsspec.register_implementation(f"s3+{scheme}", Store, clobber=True)  # whom Petastorm asks for a URL's path
    return Store(fs.S3FileSystem(scheme=scheme, region=region, endpoint_override=host))
