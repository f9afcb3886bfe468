"""What training does in a store, over fsspec's own store in memory, or a small WebHDFS; HDFS itself: tests/cluster."""

from __future__ import annotations

import errno
import json
import pickle
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Barrier, Thread
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from jobs.errors import TrailvecError
from jobs.launch_training import _stopped
from jobs.train import count_rows
from training import stores
from training.batches import FEATURES
from training.checkpoint import (
    ItemVectors,
    Progress,
    best_checkpoint,
    checkpoints,
    newest_checkpoint,
    read_checkpoint,
    read_progress,
    write_checkpoint,
)
from training.data import Piece, _PlannedReader, _row_groups
from training.loop import _checkpoint_over
from training.profile import read_basis
from training.stores import StorePath, filled, fsspec_of, local_file, parquet_files, remove_tree, row_groups


@pytest.fixture
def store() -> Iterator[StorePath]:
    yield StorePath("memory://models/m1.checkpoints/")
    fsspec.filesystem("memory").rm("/", recursive=True)


class Hdfs(BaseHTTPRequestHandler):
    """A NameNode, and under /data a DataNode (operation READ), of local files, as far as reading needs them."""

    broken: dict[str, int]  # an operation that fails: its status; 0: no answer

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        asked = {name: value[0] for name, value in parse_qs(url.query).items()}
        operation = asked.get("op", "READ")
        file = Path(url.path.removeprefix("/data").removeprefix("/webhdfs/v1"))
        if self.broken.get(operation) == 0:
            self.connection.settimeout(5)
            self.rfile.read(1)  # until the other side has enough
        elif operation in self.broken:
            self._answer(self.broken[operation], {"RemoteException": {"exception": "IOException", "message": "busy"}})
        elif not file.exists():
            self._answer(404, {"RemoteException": {"exception": "FileNotFoundException", "message": "no such file"}})
        elif operation == "LISTSTATUS":
            self._answer(200, {"FileStatuses": {"FileStatus": [self._status(entry) for entry in file.iterdir()]}})
        elif operation == "GETFILESTATUS":
            self._answer(200, {"FileStatus": self._status(file)})
        elif operation == "OPEN":
            offset, length = asked["offset"], asked["length"]
            self._answer(307, {}, f"http://{self.headers['Host']}/data{file}?offset={offset}&length={length}")
        else:
            start = int(asked["offset"])
            self._answer(200, file.read_bytes()[start : start + int(asked["length"])])

    def _answer(self, status: int, content: Any, location: str = "") -> None:
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

    def _status(self, file: Path) -> dict[str, Any]:
        return {"pathSuffix": file.name, "type": "FILE", "length": file.stat().st_size}

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hdfs(tmp_path: Path) -> Iterator[StorePath]:
    """The folder `tmp_path` as a WebHDFS gives it, which fails at `Hdfs.broken`."""
    Hdfs.broken = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hdfs) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield StorePath(f"webhdfs://me@127.0.0.1:{server.server_port}{tmp_path}")
        server.shutdown()


def test_checkpoints_in_a_store_are_those_of_a_folder(store: StorePath, tmp_path: Path) -> None:
    assert newest_checkpoint(store) is None
    for folder in (store, tmp_path):
        for step in range(1, 5):
            progress = Progress(ranks=2, epoch=2, step=step, best_epoch=1)
            write_checkpoint(folder, progress, {"model.x": torch.full((3,), float(step))}, keep=2)
    found = newest_checkpoint(store)
    assert found is not None
    assert found.name == "00002-0000000004"
    assert [path.name for path in store.glob("*")] == sorted(path.name for path in tmp_path.iterdir())
    for path in (found, pickle.loads(pickle.dumps(found))):  # rank 0 sends it to the others
        progress, tensors = read_checkpoint(path)
        assert (progress.step, tensors["model.x"].tolist()) == (4, [4.0, 4.0, 4.0])
    assert str(best_checkpoint(store, progress)) == "memory://models/m1.checkpoints/00002-0000000000"


def test_two_runs_in_step_write_the_same_checkpoint(store: StorePath, tmp_path: Path) -> None:
    for folder in (store, tmp_path):
        with filled(folder / "00001-0000000002") as others:
            write_checkpoint(folder, Progress(ranks=1, step=2), {"model.x": torch.ones(1)}, keep=1)
            (others / "late").touch()
        assert [path.name for path in folder.glob("*")] == ["00001-0000000002"]
        assert (folder / "00001-0000000002" / "late").exists()


def test_of_two_runs_that_put_a_folder_into_place_at_once_both_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def then_the_other_run_is_there(of: Path) -> None:
        remove_tree(of)
        monkeypatch.setattr(stores, "remove_tree", remove_tree)
        (of / "of the other").mkdir(parents=True)

    monkeypatch.setattr(stores, "remove_tree", then_the_other_run_is_there)
    with filled(tmp_path / "target") as folder:
        (folder / "ours").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "ours"]


def test_a_run_that_begins_removes_what_was_abandoned_and_nothing_that_another_run_writes(
    store: StorePath, tmp_path: Path
) -> None:
    for folder in (store, tmp_path):
        of_days = {days: folder / f".00001-0000000001.{time.time() - days * 86_400:.0f}-9ab.part" for days in (2, 0.5)}
        for part in of_days.values():
            part.mkdir()
            (part / "state.safetensors").write_text("half")
        with filled(folder / "00001-0000000002") as ours:
            (ours / "state.safetensors").touch()
            assert _checkpoint_over("", folder) is None
        assert (folder / "00001-0000000002" / "state.safetensors").exists()
        with pytest.raises(FileNotFoundError), filled(folder / "00001-0000000003") as ours:
            (ours / "no-such" / "state.safetensors").touch()
        assert [path.name for path in folder.glob(".*")] == [of_days[0.5].name]


def test_what_is_damaged_in_a_store_is_told(store: StorePath) -> None:
    write_checkpoint(store, Progress(ranks=1, step=2), {"model.x": torch.ones(1)}, keep=1)
    assert [path.name for path in store.glob("*")] == ["00001-0000000002"]
    whole = store / "00001-0000000002"
    (whole / "state.safetensors").write_text("damaged")
    with pytest.raises(TrailvecError, match=r"^the checkpoint memory://models/m1\S+ is damaged \(state.safetensors is"):
        read_checkpoint(whole)


def test_what_can_not_be_read_now_is_not_called_damaged(
    hdfs: StorePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever followed the advice to delete it would lose the training."""
    write_checkpoint(tmp_path / "m", Progress(ranks=1, step=2), {"model.x": torch.ones(1)}, keep=1)
    newest = newest_checkpoint(hdfs / "m")
    assert newest is not None
    assert read_checkpoint(newest)[1]["model.x"].tolist() == [1.0]
    Hdfs.broken = {"READ": 403}  # in JSON, which must not count as the file's content
    for read in (read_progress, read_checkpoint):
        with pytest.raises(OSError, match=r"^403 Client Error"):
            read(newest)
    Hdfs.broken = {}

    def get(_: StorePath, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(StorePath, "get", get)
        with pytest.raises(OSError, match="No space left") as error:
            read_checkpoint(newest)
    spec: Any = SimpleNamespace(checkpoints=str(hdfs / "m"))
    assert str(_stopped(spec, [f"[1]<stderr>:OSError: {error.value}"], 1)) == (
        "training stopped: [Errno 28] No space left on device; no model was replaced, and the same command resumes "
        "from epoch 1 after 2 steps"
    )
    (tmp_path / "m" / newest.name / "state.safetensors").unlink()
    with pytest.raises(TrailvecError, match=r"is damaged \(no such file\): remove that folder"):
        read_checkpoint(newest)

    no_way = tmp_path / "model.safetensors"
    no_way.symlink_to(no_way)  # it is there, but nobody can open it, not even root
    with pytest.raises(OSError, match="symbolic links"):
        ItemVectors(no_way)
    (tmp_path / "profile.json").write_text("{}")
    (tmp_path / "profile.safetensors").symlink_to(no_way)
    with pytest.raises(OSError, match="symbolic links"):
        read_basis(tmp_path)


def test_a_checkpoint_that_a_store_does_not_tell_of_just_now_is_not_passed_over(
    hdfs: StorePath, tmp_path: Path
) -> None:
    """The run would begin again from an older one, or remove the newest."""
    for step in (1, 2):
        write_checkpoint(tmp_path / "m", Progress(ranks=1, step=step), {"model.x": torch.ones(1)}, keep=2)
    (tmp_path / "m/00001-0000000009").mkdir()  # not complete
    assert [path.name for path in checkpoints(hdfs / "m")] == ["00001-0000000001", "00001-0000000002"]
    assert newest_checkpoint(hdfs / "none") is None
    Hdfs.broken = {"GETFILESTATUS": 503}
    with pytest.raises(OSError, match=r"^503 Server Error"):
        newest_checkpoint(hdfs / "m")
    Hdfs.broken = {"GETFILESTATUS": 500}  # of those whose JSON fsspec reads
    with pytest.raises(RuntimeError, match="busy"):
        newest_checkpoint(hdfs / "m")


def test_no_rank_waits_for_ever_for_a_store(hdfs: StorePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_SECONDS_FOR_AN_ANSWER", 0.2)
    (tmp_path / "file").write_text("x")
    for operation in ("GETFILESTATUS", "READ"):  # of the NameNode, of a DataNode
        Hdfs.broken = {operation: 0}
        with pytest.raises(OSError, match="Read timed out"):
            (hdfs / "file").read_text()
    Hdfs.broken = {}
    assert (hdfs / "file").read_text() == "x"


def test_a_rename_that_the_store_does_not_do_is_an_error(store: StorePath, monkeypatch: pytest.MonkeyPatch) -> None:
    """WebHDFS answers "false", and fsspec takes it for a yes."""
    (store / "a").write_text("a")
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "mv", lambda *_, **__: None)
    with pytest.raises(OSError, match="could not be renamed to b"):
        (store / "a").rename(store / "b")


def test_where_nothing_can_be_renamed_a_checkpoint_is_whole_with_its_description(
    store: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on S3; itself: tests/cluster."""
    monkeypatch.setattr(StorePath, "renames", False)
    monkeypatch.setattr(StorePath, "rename", None)
    opened, written = StorePath._system.fget, list[str]()  # type: ignore[attr-defined]

    def noted(path: StorePath) -> object:
        written.append(path.name)
        return opened(path)

    monkeypatch.setattr(StorePath, "_system", property(noted))
    for step in (1, 2):
        write_checkpoint(store, Progress(ranks=1, step=step), {"model.x": torch.ones(1)}, keep=1)
    files = [name for name in written if name.endswith(("json", "tensors"))]
    assert files[:2] == ["state.safetensors", "checkpoint.json"]
    (store / "00009-0000000009" / "state.safetensors").write_text("what a kill left")
    newest = newest_checkpoint(store)
    assert newest is not None
    assert newest.name == "00001-0000000002"
    assert read_checkpoint(newest)[0].step == 2


def test_an_s3_url_says_where_to_ask_and_what_for() -> None:
    url = "s3+http://eu-west-1@127.0.0.1:9/lake/a b/part.parquet"
    system, paths = parquet_files([url])
    assert (system.type_name, system.region, paths) == ("s3", "eu-west-1", ["lake/a b/part.parquet"])
    assert fsspec_of([url]) is fsspec_of(["s3+http://eu-west-1@127.0.0.1:9/other/x"])
    assert fsspec_of(["s3://lake/x"]) is None
    assert not StorePath(url).renames


def test_of_many_footers_only_those_being_read_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take 12 KB per row group: of 500 million users a gigabyte, in each rank and in the driver."""
    file, read = tmp_path / "part.parquet", pq.read_metadata
    pq.write_table(pa.table({"a": range(5), "b": range(5)}), file, row_group_size=3)
    columns = [[read(file).row_group(n).column(c).total_compressed_size for c in range(2)] for n in range(2)]
    opened, freed, alive = list[str](), list[str](), list[int]()

    def counted(path: str, **rest: Any) -> pq.FileMetaData:
        footer = read(path, **rest)
        weakref.finalize(footer, freed.append, path)
        opened.append(path)
        alive.append(len(opened) - len(freed))
        return footer

    monkeypatch.setattr(pq, "read_metadata", counted)
    monkeypatch.setattr(stores, "ThreadPoolExecutor", partial(ThreadPoolExecutor, 3))
    assert row_groups([f"file://{file}"] * 50) == [[(3, sum(columns[0])), (2, sum(columns[1]))]] * 50
    assert len(alive) == 50
    assert max(alive) <= 3


def test_petastorm_reads_planned_row_groups_out_of_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """webhdfs:// with fsspec's store of local files in the place of HDFS."""
    rows = {name: [[row, row + 1] for row in range(6)] for name in FEATURES}
    pq.write_table(pa.table(rows), tmp_path / "a b.parquet", row_group_size=3)

    class Store(LocalFileSystem):
        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return path.removeprefix("webhdfs://me@host:9870")

    local = Store()
    monkeypatch.setattr(stores, "_system_of", lambda url: local)
    url = f"webhdfs://me@host:9870{tmp_path}/a b.parquet"
    assert fsspec_of([url]) is local
    system, paths = parquet_files([url])
    assert pq.read_metadata(paths[0], filesystem=system).num_rows == 6
    assert [group[:3] for group in _row_groups((url,))] == [(url, 0, 3), (url, 1, 3)]
    both_asked, asked = Barrier(2, timeout=30), pq.read_metadata  # one after the other, the first waits in vain
    with monkeypatch.context() as patch:
        patch.setattr(pq, "read_metadata", lambda path, **rest: (both_asked.wait(), asked(path, **rest))[1])
        assert count_rows([url, url]) == 12
    with _PlannedReader([Piece(url, 1, 0, 3), Piece(url, 0, 1, 3)]) as reader:
        read = [table["item_index"].to_pylist() for table in reader]
    assert read == [[[3, 4], [4, 5], [5, 6]], [[0, 1], [1, 2], [2, 3]]]


def test_a_file_of_a_store_lies_here_while_it_is_read(store: StorePath, tmp_path: Path) -> None:
    (store / "weights").write_text("numbers")
    with local_file(store / "weights") as copy:
        assert copy.read_text() == "numbers"
    assert not copy.exists()
    (tmp_path / "weights").write_text("numbers")
    with local_file(tmp_path / "weights") as same:
        assert same == tmp_path / "weights"
