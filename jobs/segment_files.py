"""How a segment is exported: its user ids, file formats and destinations.

User ids are exported as HMAC-SHA256 under the key in the environment variable TRAILVEC_EXPORT_KEY. The driver hashes
them as it writes the rows, so neither a Spark plan nor a file ever holds the key. In CSV, all strings are quoted, and
one that begins with = + - @ (also fullwidth), a tab, a line break or NUL is prefixed with ', lest a spreadsheet run it
as a formula.

To add a format, add its name, which is also the file extension, to `Format` in jobs/segments.py and its writer to
`WRITERS`. The same rows must give the same bytes.
"""

from __future__ import annotations

import gzip
import hmac
import os
import re
import shutil
import uuid
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pandas.util import hash_array
from pyarrow import csv, fs

from jobs.errors import TrailvecError
from jobs.files import HadoopPath, Place, fetch, make_private, published, remove_replaced
from jobs.keys import key_of, long_enough
from jobs.runtime import Runtime
from jobs.segments import Format, Segment, SegmentFile
from jobs.user_lists import file_digest
from spark_udfs.keyed import hashed
from training.stores import remove_tree
from training.urls import local_path

KEY = "TRAILVEC_EXPORT_KEY"
MANIFEST, REPORT = "manifest.json", "report.html"
_TYPES = {"user_id": pa.string(), "score": pa.float32(), "rank": pa.int32()}
_AT_ONCE = 100_000  # ids as Python strings take ten times their bytes
_FORMULA = r"^([=+\-@\x{FF1D}\x{FF0B}\x{FF0D}\x{FF20}\t\r\n\x00])"  # the second four: fullwidth = + - @

# ---- ids ------------------------------------------------------------------------------------------------------------


def export_key() -> bytes:
    return long_enough(KEY, key_of(KEY, "user ids are hashed with"))


def held_back(segment: Segment, users: pa.Array) -> npt.NDArray[np.bool_]:
    """Which users are in the control group, by pandas' keyed hash (SipHash-2-4, mixed) under the group's own key: the
    same in every run, and independent between groups. (An HMAC per member took as long as writing the files.)"""
    if segment.group is None:
        return np.zeros(len(users), np.bool_)
    hashes = _fast_hashes(f"control\0{segment.group}", users)
    return np.asarray(hashes < np.uint64(int(segment.control_share * 2**64)))


def _fast_hashes(purpose: str, users: pa.Array) -> npt.NDArray[np.uint64]:
    """Hashes of the users under a key of that purpose, which HMAC makes of the export key."""
    digest = hmac.digest(export_key(), purpose.encode(), "sha256")
    key = b64encode(digest)[:16].decode()  # pandas requires 16 characters
    hashes = np.empty(len(users), np.uint64)
    for start in range(0, len(users), _AT_ONCE):
        some = texts(users.slice(start, _AT_ONCE))
        hashes[start : start + len(some)] = hash_array(some, encoding="utf8", hash_key=key, categorize=False)
    return hashes


def tied(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The places at which a sorted array has a value that it has more than once."""
    same = np.diff(scores) == 0
    return np.flatnonzero(np.append(same, False) | np.append(False, same))


def _by_hash_where_tied(segment: Segment, ids: pa.Array, scores: npt.NDArray[np.float32] | None) -> pa.Array:
    """The users in an order that does not depend on their ids: where ids are numbers given one after the other, an
    order by id tells whose hash is whose.

    Args:
        scores: descending; None: all are equal.
    """
    scores = np.zeros(len(ids), np.float32) if scores is None else scores
    places, order = tied(scores), np.arange(len(ids))
    hashes = _fast_hashes(f"order\0{segment.name}", ids.take(pa.array(places)))
    order[places] = places[np.lexsort((hashes, -scores[places]))]
    return ids.take(pa.array(order))


def texts(users: pa.Array) -> npt.NDArray[np.object_]:
    """The ids as Python strings, ten times as fast as `to_pylist`."""
    found: npt.NDArray[np.object_] = users.to_numpy(zero_copy_only=False)
    return found


# ---- files ----------------------------------------------------------------------------------------------------------


def write_parts(
    folder: Path, segment: Segment, ids: pa.Array, scores: npt.NDArray[np.float32] | None
) -> list[dict[str, Any]]:
    """Writes the rows to the segment's files; returns each file's name, rows, bytes and sha256.

    There is always a first part, so that even an empty segment loads with its columns.

    Args:
        ids: best first.
        scores: theirs; None if the segment has none.
    """
    names = segment.exported_columns
    if segment.user_ids == "hashed":
        ids = _by_hash_where_tied(segment, ids, scores)
    parts: list[dict[str, Any]] = []
    for start in range(0, max(len(ids), 1), segment.rows_per_file):
        of_part = ids.slice(start, segment.rows_per_file)
        values = {
            # Hashed part by part: the hashes of all members would take four times the memory of their ids.
            "user_id": hashed(export_key(), texts(of_part)) if segment.user_ids == "hashed" else of_part,
            "score": None if scores is None else scores[start : start + segment.rows_per_file],
            "rank": np.arange(start + 1, start + len(of_part) + 1, dtype=np.int32),
        }
        path = folder / f"part-{len(parts):05d}.{segment.format}"
        some = pa.table([pa.array(values[name], _TYPES[name]) for name in names], names=list(names))
        WRITERS[segment.format](some, path)
        parts.append({"name": path.name, "rows": len(some), "bytes": path.stat().st_size, "sha256": file_digest(path)})
    return parts


def _write_csv(rows: pa.Table, path: Path) -> None:
    """Gzipped CSV (RFC 4180, UTF-8), without timestamp or file name: the same rows give the same bytes."""
    columns = [
        pc.replace_substring_regex(column, pattern=_FORMULA, replacement=r"'\1")
        if column.type == pa.string()
        else column
        for column in rows.columns
    ]
    with path.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        csv.write_csv(pa.table(columns, names=rows.column_names), packed)


def _write_parquet(rows: pa.Table, path: Path) -> None:
    pq.write_table(rows, path, use_dictionary=False)  # hardly a value comes twice: a dictionary only costs


WRITERS: dict[Format, Callable[[pa.Table, Path], None]] = {"parquet": _write_parquet, "csv.gz": _write_csv}
_OURS = re.compile(rf"part-\d{{5,}}\.({'|'.join(map(re.escape, WRITERS))})|{re.escape(MANIFEST)}|{re.escape(REPORT)}")


# ---- staging --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Staging:
    """A run's temporary folders.

    Attributes:
        shared: for Spark's tasks.
        local: for the driver; the same folder as `shared` if that is on a local disk.
    """

    shared: Place
    local: Path

    def parts_of(self, segment: str) -> Path:
        """The folder of a segment's files before delivery."""
        return self.local / "parts" / segment

    def to_tasks(self, name: str) -> str:
        """Makes a folder that the driver has filled visible to tasks; returns its path for them."""
        if isinstance(self.shared, HadoopPath):
            (self.shared / name).put(self.local / name)
        return str(self.shared / name)

    def from_tasks(self, name: str) -> Path:
        """Makes a folder that tasks have written visible to the driver; returns its local path."""
        if isinstance(self.shared, HadoopPath):
            remove_tree(self.local / name)
            fetch(self.shared / name, self.local / name)
        return self.local / name

    @property
    def _marker(self) -> Place:
        return self.shared / "ours"

    def create(self) -> None:
        """Creates it, empty and private, since it will hold user ids."""
        make_private(self.shared)
        self._marker.write_text("")

    def check(self) -> None:
        """
        Raises:
            TrailvecError: a newer run has begun since.
        """
        if not self._marker.exists():
            raise TrailvecError(
                "export_segments was started again meanwhile, and the newer run replaces this one: wait until it "
                "ends, then run this again"
            )


@contextmanager
def staging_area(runtime: Runtime) -> Iterator[Staging]:
    """An empty staging area, removed after the block. First removes those of other runs: what a killed run left, and
    that of an older run still going.

    Raises:
        TrailvecError: a newer run has begun since.
    """
    remove_tree(runtime.staging("exports"))
    shared = runtime.staging("exports") / uuid.uuid4().hex
    with TemporaryDirectory() as local:
        staging = Staging(shared, shared if isinstance(shared, Path) else Path(local))
        staging.create()
        try:
            yield staging
        except Exception:
            staging.check()  # the failure may be due to a newer run removing this one's files
            raise
        finally:
            remove_tree(shared)
            with suppress(OSError):  # not empty: a newer run's staging is in it
                shared.parent.rmdir()


# ---- places ---------------------------------------------------------------------------------------------------------


class ArrowFolder(NamedTuple):
    """A destination folder in a file system. Only local folders can be replaced atomically."""

    system: fs.FileSystem
    folder: str
    local: bool


def destination_of(runtime: Runtime, segment: Segment) -> str:
    """The destination in canonical form: the real path of a local folder, or another store's URI."""
    destination = str(runtime.exports / segment.name) if segment.destination is None else segment.destination
    path = local_path(destination)
    # Resolve links: `published` can't replace the link itself.
    return re.sub(r"(?<=[^:/])/+(?=\?|$)", "", destination) if path is None else os.path.realpath(path)


def check_destinations(runtime: Runtime, files: list[SegmentFile]) -> None:
    """
    Raises:
        TrailvecError: two segments have the same destination, or one destination lies inside the other.
    """
    found: dict[str, Path] = {}
    for segment, path in files:
        place = destination_of(runtime, segment)
        if place in found:
            raise TrailvecError(f"{path} and {found[place]} both export to {place}: give each its own destination")
        for other, its in found.items():
            if _is_inside(place, other) or _is_inside(other, place):
                raise TrailvecError(
                    f"{path} exports to {place} and {its} to {other}, and one lies inside the other: give each a "
                    f"folder of its own"
                )
        found[place] = path


def _is_inside(place: str, other: str) -> bool:
    (folder, _, settings), (outer, _, others) = place.partition("?"), other.partition("?")
    return settings == others and folder.startswith(f"{outer}/")


def open_destination(runtime: Runtime, segment: Segment) -> ArrowFolder | HadoopPath:
    destination = destination_of(runtime, segment)
    if local_path(destination) is not None:
        return ArrowFolder(fs.LocalFileSystem(), destination, local=True)
    # pyarrow's HDFS needs a native library that few machines have, and supports less than Hadoop does.
    if segment.destination is None or destination.startswith("hdfs://"):
        return HadoopPath(destination)
    try:
        system, folder = fs.FileSystem.from_uri(destination)
    except (ValueError, OSError) as error:
        raise TrailvecError(
            f"segment {segment.name}: its destination {destination} can't be opened ({error}): correct it"
        ) from None
    return ArrowFolder(system, folder, local=False)


def read_manifest(place: ArrowFolder | HadoopPath) -> str | None:
    """The text of the manifest at the destination; None if there is none."""
    if isinstance(place, HadoopPath):
        return (place / MANIFEST).read_text() if (place / MANIFEST).exists() else None
    path = f"{place.folder}/{MANIFEST}"
    with _explaining_os_errors(place):
        if place.system.get_file_info(path).type == fs.FileType.NotFound:
            return None
        with place.system.open_input_stream(path) as file:
            return str(file.read(), "utf-8", "replace")


def check_place(place: ArrowFolder | HadoopPath) -> None:
    """Tries the first steps of a delivery, before the log is written: it must not record users who can't be delivered.

    Raises:
        TrailvecError: the place is a mount point, has files that no export wrote, or can't be read or written.
    """
    if isinstance(place, ArrowFolder) and place.local and os.path.ismount(place.folder):
        raise TrailvecError(
            f"{place.folder} is a mount point, which an export can't replace: set the segment's destination to a "
            "folder inside it"
        )
    _files_of_export(place)
    if isinstance(place, HadoopPath):
        _make_and_remove(place)
        return
    with _explaining_os_errors(place):
        if place.local:
            _make_and_remove(Path(place.folder))
        else:
            place.system.create_dir(place.folder, recursive=True)


def _make_and_remove(target: Place) -> None:
    folder = target.with_name(f".{target.name}.check.staging")  # if killed here, `published` cleans up this name
    folder.mkdir(parents=True, exist_ok=True)
    remove_tree(folder)


def remove_replaced_export(place: ArrowFolder | HadoopPath) -> None:
    """Removes what a run that was killed right after it published this export left of the one before."""
    if isinstance(place, ArrowFolder) and place.local:  # elsewhere nothing is moved away
        remove_replaced(Path(place.folder))


@contextmanager
def delivered(place: ArrowFolder | HadoopPath, staging: Path) -> Iterator[Path]:
    """A folder to fill; if the block succeeds, it is moved or copied to the destination, the manifest last.

    Raises:
        TrailvecError: as `check_place`.
    """
    old_files = _files_of_export(place)
    if isinstance(place, HadoopPath) or place.local:
        with published(place if isinstance(place, HadoopPath) else Path(place.folder)) as folder:
            yield folder
        return
    folder = staging / "delivery"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder
    with _explaining_os_errors(place):
        place.system.create_dir(place.folder, recursive=True)
        for name in sorted(old_files, key=lambda name: name != MANIFEST):
            place.system.delete_file(f"{place.folder}/{name}")
        for file in sorted(folder.iterdir(), key=lambda file: file.name == MANIFEST):
            path = f"{place.folder}/{file.name}"
            # By default pyarrow compresses streams to names in .gz, even if the data is compressed already.
            with file.open("rb") as source, place.system.open_output_stream(path, compression=None) as target:
                shutil.copyfileobj(source, target)


@contextmanager
def _explaining_os_errors(place: ArrowFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrailvecError(
            f"{place.folder} can't be read or written ({error}): correct the segment's destination or its permissions"
        ) from None


def _files_of_export(place: ArrowFolder | HadoopPath) -> list[str]:
    """The names of the last export's files.

    Raises:
        TrailvecError: there are other files too.
    """
    if isinstance(place, HadoopPath):
        folder, names = str(place), [file.name for file in place.iterdir()] if place.exists() else []
    else:
        with _explaining_os_errors(place):
            found = place.system.get_file_info(fs.FileSelector(place.folder, allow_not_found=True))
        folder, names = place.folder, [info.base_name for info in found]
    if others := sorted(name for name in names if not _OURS.fullmatch(name)):
        raise TrailvecError(f"{folder} holds {others[0]}, which no export wrote: give the segment a folder of its own")
    return names
