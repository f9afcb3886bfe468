"""How a segment leaves: under which ids, in which files, and where to.

User ids leave as HMAC-SHA256 with the key in the environment's TRAILVEC_EXPORT_KEY, taken on the driver as the rows
are written: neither a Spark plan nor a file ever holds the key. A text in a CSV that begins with = + - @, a tab or a
carriage return gets a ' in front, so that no spreadsheet takes it for a formula; all texts are quoted.

A new format: its name, which ends the files' names, in jobs/segments.py's `Format`, and in `WRITERS` what writes it,
the same bytes for the same rows.
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
from jobs.files import HadoopPath, Place, fetch, make_private, published
from jobs.keys import key_of
from jobs.runtime import Runtime
from jobs.segments import Format, Segment, SegmentFile
from jobs.user_lists import file_digest
from spark_udfs.keyed import hashed
from training.stores import remove_tree
from training.urls import local_path

KEY = "TRAILVEC_EXPORT_KEY"
MANIFEST, REPORT = "manifest.json", "report.html"
_TYPES = {"user_id": pa.string(), "score": pa.float32(), "rank": pa.int32()}
_FORMULA = r"^([=+\-@\t\r])"

# ---- ids ------------------------------------------------------------------------------------------------------------


def export_key() -> bytes:
    return key_of(KEY, "user ids are hashed with")


def held_back(segment: Segment, users: pa.Array) -> npt.NDArray[np.bool_]:
    """Whom the control group holds: pandas' keyed hash (SipHash-2-4, mixed) of the user under the group's own key
    decides, so that it is the same in every run, and no group tells of another. (An HMAC of each member took as long as
    the files.)"""
    if not segment.control_share:
        return np.zeros(len(users), np.bool_)
    group = f"control\0{segment.control_group or segment.name}"
    key = b64encode(hmac.digest(export_key(), group.encode(), "sha256"))[:16].decode()  # pandas asks for 16 characters
    hashes = hash_array(texts(users), encoding="utf8", hash_key=key, categorize=False)
    return np.asarray(hashes < np.uint64(int(segment.control_share * 2**64)))


def texts(users: pa.Array) -> npt.NDArray[np.object_]:
    """The ids as Python's strings, in a tenth of the time of `to_pylist`."""
    found: npt.NDArray[np.object_] = users.to_numpy(zero_copy_only=False)
    return found


# ---- files ----------------------------------------------------------------------------------------------------------


def write_parts(
    folder: Path, segment: Segment, ids: pa.Array, scores: npt.NDArray[np.float32] | None
) -> list[dict[str, Any]]:
    """Writes the rows, best first, to the segment's files; what each file holds.

    There is always a first part, so that whoever loads an empty segment still finds its columns.
    """
    names = segment.exported_columns
    parts: list[dict[str, Any]] = []
    for start in range(0, max(len(ids), 1), segment.rows_per_file):
        of_part = ids.slice(start, segment.rows_per_file)
        values = {
            # Hashed here: the texts of all members would be four times as large as their ids.
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
    """CSV (RFC 4180, UTF-8) in gzip, without a time or a name in it: the same rows give the same bytes."""
    columns = [
        pc.replace_substring_regex(column, pattern=_FORMULA, replacement=r"'\1")
        if column.type == pa.string()
        else column
        for column in rows.columns
    ]
    with path.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        csv.write_csv(pa.table(columns, names=rows.column_names), packed)


WRITERS: dict[Format, Callable[[pa.Table, Path], None]] = {"parquet": pq.write_table, "csv.gz": _write_csv}
_OURS = re.compile(rf"part-\d{{5,}}\.({'|'.join(map(re.escape, WRITERS))})|{re.escape(MANIFEST)}|{re.escape(REPORT)}")


# ---- what a run lays down meanwhile ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Staging:
    """What a run lays down meanwhile.

    Attributes:
        shared: where Spark's tasks write and read.
        local: where the driver does; the same folder, where that is on a local disk.
    """

    shared: Place
    local: Path

    def parts_of(self, segment: str) -> Path:
        """A segment's files, before they go to their place."""
        return self.local / "parts" / segment

    def to_tasks(self, name: str) -> str:
        """A folder that the driver has filled, where tasks find it."""
        if isinstance(self.shared, HadoopPath):
            (self.shared / name).put(self.local / name)
        return str(self.shared / name)

    def from_tasks(self, name: str) -> Path:
        """A folder of files that tasks have written, where the driver finds it."""
        if isinstance(self.shared, HadoopPath):
            remove_tree(self.local / name)
            fetch(self.shared / name, self.local / name)
        return self.local / name

    @property
    def _ours(self) -> Place:
        return self.shared / "ours"

    def take(self) -> None:
        """Makes it, empty; it is to hold user ids."""
        make_private(self.shared)
        self._ours.write_text("")

    def check(self) -> None:
        """
        Raises:
            TrailvecError: a newer run has begun meanwhile.
        """
        if not self._ours.exists():
            raise TrailvecError(
                "export_segments was started again meanwhile, and the newer run goes on in this one's place: "
                "wait for its end, then run this again"
            )


@contextmanager
def laid_down(runtime: Runtime) -> Iterator[Staging]:
    """An empty staging, which is gone after the block. What other runs have laid down goes first: what a kill left and,
    of two runs at once, what is the older one's.

    Raises:
        TrailvecError: a newer run has begun meanwhile.
    """
    remove_tree(runtime.staging("exports"))
    shared = runtime.staging("exports") / uuid.uuid4().hex
    with TemporaryDirectory() as local:
        staging = Staging(shared, shared if isinstance(shared, Path) else Path(local))
        staging.take()
        try:
            yield staging
        except Exception:
            staging.check()  # what failed may be for want of what the newer one has removed
            raise
        finally:
            remove_tree(shared)
            with suppress(OSError):  # a newer run's is in it
                shared.parent.rmdir()


# ---- places ---------------------------------------------------------------------------------------------------------


class ArrowFolder(NamedTuple):
    """Where an export goes: a file system's folder. Only a folder of this machine's can be put there at once."""

    system: fs.FileSystem
    folder: str
    local: bool


def destination_of(runtime: Runtime, segment: Segment) -> str:
    """A local folder's own path, another store's URI: one text for one place."""
    destination = str(runtime.exports / segment.name) if segment.destination is None else segment.destination
    path = local_path(destination)
    # Where a link leads: `published` can't take the place of the link itself.
    return re.sub(r"(?<=[^:/])/+(?=\?|$)", "", destination) if path is None else os.path.realpath(path)


def check_destinations(runtime: Runtime, files: list[SegmentFile]) -> None:
    """
    Raises:
        TrailvecError: two segments have one destination, or one of them lies inside the other.
    """
    found: dict[str, Path] = {}
    for segment, path in files:
        place = destination_of(runtime, segment)
        if place in found:
            raise TrailvecError(f"{path} and {found[place]} both export to {place}: give each a destination")
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


def place_of(runtime: Runtime, segment: Segment) -> ArrowFolder | HadoopPath:
    destination = destination_of(runtime, segment)
    if local_path(destination) is not None:
        return ArrowFolder(fs.LocalFileSystem(), destination, local=True)
    # pyarrow asks for a native library that few machines have, and knows not all that Hadoop does.
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
    """What the manifest says that is there; None where there is none."""
    if isinstance(place, HadoopPath):
        return (place / MANIFEST).read_text() if (place / MANIFEST).exists() else None
    path = f"{place.folder}/{MANIFEST}"
    with _refusals_told(place):
        if place.system.get_file_info(path).type == fs.FileType.NotFound:
            return None
        with place.system.open_input_stream(path) as file:
            return str(file.read(), "utf-8", "replace")


def check_place(place: ArrowFolder | HadoopPath) -> None:
    """Does first what a delivery does first: whoever could not be delivered must not stand in the log.

    Raises:
        TrailvecError: the place is a mount point, holds other files than an export's, or can't be read or written.
    """
    if isinstance(place, ArrowFolder) and place.local and os.path.ismount(place.folder):
        raise TrailvecError(
            f"{place.folder} is a mount point, which a new export can't take the place of: name a folder inside it as "
            "the segment's destination"
        )
    _files_of_export(place)
    if isinstance(place, HadoopPath):
        _make_and_remove(place)
        return
    with _refusals_told(place):
        if place.local:
            _make_and_remove(Path(place.folder))
        else:
            place.system.create_dir(place.folder, recursive=True)


def _make_and_remove(target: Place) -> None:
    folder = target.with_name(f".{target.name}.check.staging")  # `published` removes what a kill leaves of that name
    folder.mkdir(parents=True, exist_ok=True)
    remove_tree(folder)


@contextmanager
def delivered(place: ArrowFolder | HadoopPath, staging: Path) -> Iterator[Path]:
    """A folder to fill, which is put in its place, the manifest last, when the block ends without an error.

    Raises:
        TrailvecError: as `check_place`.
    """
    found = _files_of_export(place)
    if isinstance(place, HadoopPath) or place.local:
        with published(place if isinstance(place, HadoopPath) else Path(place.folder)) as folder:
            yield folder
        return
    folder = staging / "delivery"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder
    with _refusals_told(place):
        place.system.create_dir(place.folder, recursive=True)
        for name in sorted(found, key=lambda name: name != MANIFEST):
            place.system.delete_file(f"{place.folder}/{name}")
        for file in sorted(folder.iterdir(), key=lambda file: file.name == MANIFEST):
            path = f"{place.folder}/{file.name}"
            # Asked nothing, pyarrow packs what goes to a name in .gz, packed as it is.
            with file.open("rb") as source, place.system.open_output_stream(path, compression=None) as target:
                shutil.copyfileobj(source, target)


@contextmanager
def _refusals_told(place: ArrowFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrailvecError(
            f"{place.folder} can't be read or written ({error}): correct the segment's destination, or who may do so"
        ) from None


def _files_of_export(place: ArrowFolder | HadoopPath) -> list[str]:
    """The names of the last export's files.

    Raises:
        TrailvecError: others are there too.
    """
    if isinstance(place, HadoopPath):
        folder, names = str(place), [file.name for file in place.iterdir()] if place.exists() else []
    else:
        with _refusals_told(place):
            found = place.system.get_file_info(fs.FileSelector(place.folder, allow_not_found=True))
        folder, names = place.folder, [info.base_name for info in found]
    if others := sorted(name for name in names if not _OURS.fullmatch(name)):
        raise TrailvecError(f"{folder} holds {others[0]}, which no export wrote: give the segment a folder of its own")
    return names
