"""Hadoop file systems behind pathlib's names, on Hadoop's own local one; HDFS itself: tests/cluster."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from pyspark.sql import SparkSession

from jobs import files
from jobs.errors import TrailvecError
from jobs.files import HadoopPath, fetch, file_sizes, four_bytes, make_private, published, remove_replaced, write_json
from jobs.model_folders import add_to_model, has_model, model_folder
from jobs.runtime import Runtime
from jobs.score_users import Scorer
from training.checkpoint import describe_weights
from training.config import ModelSpec

SPEC = ModelSpec(
    architecture="gpt2", width=8, layers=1, heads=1, dropout=0, negatives=0, max_length=4, items=3, context_sizes={}
)


@pytest.fixture
def store(spark: SparkSession, tmp_path: Path) -> HadoopPath:
    return HadoopPath(f"file://{tmp_path}/store")


def names(folder: HadoopPath) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_private_folder_is_its_owners_alone(store: HadoopPath, tmp_path: Path) -> None:
    make_private(store / "parent" / "ids")
    make_private(tmp_path / "store" / "here" / "ids")
    for parent in ("parent", "here"):
        assert (tmp_path / "store" / parent / "ids").stat().st_mode & 0o777 == 0o700


def test_a_folder_is_published_whole_or_not_at_all(store: HadoopPath) -> None:
    for text in ("old", "new"):
        with published(store / "m1") as folder:
            (folder / "a").write_text(text)
            (folder / text).write_text(text)
    assert names(store / "m1") == ["a", "new"]
    assert (store / "m1" / "a").read_text() == "new"
    with pytest.raises(NotADirectoryError), published(store / "m1") as folder:
        (folder / "a" / "b").write_text(str((folder / "a").write_text("half")))
    assert names(store) == ["m1"]
    assert (store / "m1" / "a").read_text() == "new"
    (store / ".m1.9ab.staging" / "a").write_text("what a kill left")
    with published(store / "m1") as folder:
        (folder / "b").write_text("newest")
    assert (names(store), names(store / "m1")) == (["m1"], ["b"])


def test_whoever_could_look_into_a_folder_of_hadoops_can_still(store: HadoopPath, tmp_path: Path) -> None:
    here = tmp_path / "store/m1"
    here.mkdir(parents=True)
    here.chmod(0o750)
    before = here.stat()
    with published(store / "m1") as folder:
        (folder / "a").write_text("new")
    after = here.stat()
    assert after.st_ino != before.st_ino
    assert after.st_mode == before.st_mode


def test_whoever_could_look_into_a_folder_can_still(tmp_path: Path) -> None:
    (tmp_path / "m1").mkdir()
    (tmp_path / "m1").chmod(0o2710)
    if os.getuid() == 0:
        os.chown(tmp_path / "m1", 1234, 5678)
    before = (tmp_path / "m1").stat()
    with published(tmp_path / "m1") as folder:
        assert folder.stat().st_mode == before.st_mode  # also while it is being filled
    after = (tmp_path / "m1").stat()
    assert after.st_ino != before.st_ino
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_whoever_an_acl_lets_into_a_folder_can_still_but_not_its_whole_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access, nobody = "system.posix_acl_access", 0xFFFFFFFF
    # As in linux/posix_acl_xattr.h: the owner rwx, user 1234 r-x, the group and all others nothing, the mask r-x.
    entries = ((1, 7, nobody), (2, 5, 1234), (4, 0, nobody), (16, 5, nobody), (32, 0, nobody))
    (tmp_path / "m1").mkdir()
    try:
        os.setxattr(tmp_path / "m1", access, struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *e) for e in entries))
    except OSError:
        pytest.skip("this file system has no ACLs")
    before = os.getxattr(tmp_path / "m1", access)
    assert (tmp_path / "m1").stat().st_mode & 0o777 == 0o750
    with published(tmp_path / "m1") as folder:
        (folder / "a").write_text("new")
    assert os.getxattr(tmp_path / "m1", access) == before
    (tmp_path / "m2").mkdir(mode=0o750)
    os.setxattr(tmp_path, "system.posix_acl_default", before)  # which all that is made here from now on inherits
    with published(tmp_path / "m2"):
        pass
    assert (os.listxattr(tmp_path / "m2"), (tmp_path / "m2").stat().st_mode & 0o777) == ([], 0o750)
    monkeypatch.setattr(os, "setxattr", Mock(side_effect=OSError))
    with published(tmp_path / "m1") as folder:
        (folder / "a").write_text("newer")
    assert (tmp_path / "m1").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("fails", [False, True])
def test_of_two_who_fill_a_place_the_later_one_takes_it(tmp_path: Path, fails: bool) -> None:
    """Whether the earlier one fails because its files are missing, or has nothing more to write."""

    def fill_at_once() -> None:
        with published(tmp_path / "m1") as earlier:
            (earlier / "a").write_text("earlier")
            with published(tmp_path / "m1") as later:
                (later / "a").write_text("later")
            if fails:
                (earlier / "b").write_text("earlier")

    with pytest.raises(TrailvecError, match="another run that began later also makes"):
        fill_at_once()
    assert [path.name for path in tmp_path.iterdir()] == ["m1"]
    assert (tmp_path / "m1" / "a").read_text() == "later"


@pytest.mark.parametrize("then", ["before the copy", "after a file of it", "in a file of it"])
def test_on_hadoops_systems_too_whenever_the_later_one_comes(
    store: HadoopPath, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    put = HadoopPath.put

    def fill_beside() -> None:
        with published(store / "m1") as later:
            (later / "a").write_text("later")

    def beside(path: HadoopPath, source: Path) -> None:
        monkeypatch.setattr(HadoopPath, "put", put)
        put(path, source)
        fill_beside()
        if then == "in a file of it":
            raise InterruptedError("as HDFS closes a file that was deleted while it was written")

    def fill_at_once() -> None:
        with published(store / "m1") as earlier:
            for name in ("a", "b"):
                (earlier / name).write_text("earlier")
            if then == "before the copy":
                fill_beside()
            else:
                monkeypatch.setattr(HadoopPath, "put", beside)

    with pytest.raises(TrailvecError, match="another run that began later also makes"):
        fill_at_once()
    assert (names(store), names(store / "m1")) == (["m1"], ["a"])
    assert (store / "m1" / "a").read_text() == "later"


def test_a_kill_leaves_no_half_folder_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(text: str) -> None:
        with published(tmp_path / "m1") as folder:
            for name in ("a", "b"):
                (folder / name).write_text(text)

    def killed(folder: Path, *_: Path) -> None:
        if folder.is_dir():
            next(folder.iterdir()).unlink()
            raise KeyboardInterrupt

    fill("old")
    with monkeypatch.context() as while_deleting:
        while_deleting.setattr(files, "remove_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            fill("new")
    assert {file.name: file.read_text() for file in (tmp_path / "m1").iterdir()} == {"a": "new", "b": "new"}
    assert len([*tmp_path.iterdir()]) == 2
    (tmp_path / ".m1.9ab.staging").mkdir()  # of a run that is filling it
    remove_replaced(tmp_path / "m1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m1.9ab.staging", "m1"]
    with monkeypatch.context() as between_renames:
        between_renames.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            fill("newer")
    assert not (tmp_path / "m1").exists()
    fill("newest")
    assert [path.name for path in tmp_path.iterdir()] == ["m1"]


def test_a_json_file_takes_the_place_of_the_old_one(store: HadoopPath) -> None:
    for version in ("m1", "m2"):
        write_json(store / "current.json", {"model_version": version})
    assert json.loads((store / "current.json").read_text()) == {"model_version": "m2"}
    assert names(store) == ["current.json"]


def test_only_what_has_changed_is_fetched_again(store: HadoopPath, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in ("a", "b", "c"):
        (store / name).write_text(name)
    (store / "folder" / "d").write_text("d")
    assert sorted(fetch(store, copy)) == ["a", "b", "c"]
    assert fetch(store, copy) == []
    (store / "a").write_text("longer")
    (store / "b").unlink()
    assert fetch(store, copy) == ["a"]
    assert {path.name: path.read_text() for path in copy.iterdir()} == {"a": "longer", "c": "c"}


def model(folder: Path, weights: bytes) -> None:
    (folder / "model.safetensors").write_bytes(weights)
    describe_weights(folder, SPEC, {"model_version": folder.name})


def test_a_model_elsewhere_is_read_from_a_whole_copy_and_added_to_there(
    make_runtime: Callable[..., Runtime], store: HadoopPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runtime, "place", store)
    runtime = make_runtime()
    with pytest.raises(TrailvecError, match=r"no model under file:\S+/store/models: run"):
        model_folder(runtime)
    for version in ("m1", "m2"):
        with published(runtime.models / version) as folder:
            model(folder, version.encode())
    write_json(runtime.models / "current.json", {"model_version": "m2"})
    (runtime.models / ".m3.9ab.staging" / "model.json").write_text("what a kill left")
    with pytest.raises(TrailvecError, match=r"model m3 does not exist under \S+/models \(found: m1, m2\)"):
        model_folder(runtime, "m3")
    assert (has_model(runtime, "m1"), has_model(runtime, "m3")) == (True, False)

    copy = model_folder(runtime)
    assert (copy.name, (copy / "model.safetensors").read_bytes()) == ("m2", b"m2")
    (copy / "page.html").write_text("a page")
    add_to_model(runtime, copy, "page.html", "not made")
    assert names(runtime.models / "m2") == ["model.json", "model.safetensors", "page.html"]
    assert (model_folder(runtime) / "page.html").read_text() == "a page"

    def add(text: str) -> None:
        for name in ("vectors", "vectors.json"):
            (copy / name).write_text(text)
        add_to_model(runtime, copy, "vectors", "vectors.json")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    add("old")
    with monkeypatch.context() as patch:
        patch.setattr(HadoopPath, "put_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            add("new")
    assert names(runtime.models / "m2") == ["model.json", "model.safetensors", "page.html", "vectors"]
    add("new")
    assert (model_folder(runtime) / "vectors.json").read_text() == "new"

    scorer = Scorer(runtime)
    with published(runtime.models / "m2") as folder:
        model(folder, b"trained again")
    with pytest.raises(TrailvecError, match="model m2 was trained or aligned again while this run scored"):
        scorer.refuse_if_overtaken(None)

    (store / "models" / "m2" / "model.safetensors").write_text("damaged")
    with pytest.raises(
        TrailvecError, match=r"the model in file:\S+/store/models/m2 is damaged: model.safetensors is not"
    ):
        model_folder(runtime)
    with pytest.raises(TrailvecError, match="is damaged"):  # again, since the copy is not kept
        model_folder(runtime)


def test_bytes_are_read_at_their_place(store: HadoopPath, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store/file").write_bytes(b"PAR1\x00\xff\xfe\xfdPAR1")
    for place in (tmp_path / "store", store):
        found = [four_bytes(place / "file", at) for at in (0, 4, 5)]
        assert found == [b"PAR1", b"\x00\xff\xfe\xfd", b"\xff\xfe\xfdP"]
        with pytest.raises(FileNotFoundError):
            four_bytes(place / "none", 0)


def test_every_file_but_hidden_ones_and_those_of_one_folder(store: HadoopPath, tmp_path: Path) -> None:
    for name in ("a", "b", "b/.hidden", "b/c=1", "log", "b/log"):
        (store / name / "file").write_text(name)
    (store / ".hidden").write_text("x")
    here = {f"{tmp_path}/store/{name}/file": len(name) for name in ("a", "b", "b/.hidden", "b/c=1")}
    assert file_sizes(tmp_path / "store", "log") == here
    assert file_sizes(store, "log") == {f"file:{path}": size for path, size in here.items()}
    assert file_sizes(store / "missing", "log") == file_sizes(tmp_path / "missing", "log") == {}


def test_where_nothing_can_be_renamed_descriptions_come_last(
    store: HadoopPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hadoop's local file system stands in for S3's; S3 itself: tests/cluster."""
    (store / "m1" / "old").write_text("old")
    put, done = HadoopPath.put, list[str]()
    monkeypatch.setattr(HadoopPath, "renames", False)
    monkeypatch.setattr(HadoopPath, "replace", None)
    monkeypatch.setattr(HadoopPath, "put", lambda path, source: (done.append(str(path)), put(path, source)))
    with published(store / "m1") as folder:
        for name in ("run.json", "model.json", "model.safetensors", "card.md"):
            (folder / name).write_text(name)
        assert names(store / "m1") == ["old"]
    write_json(store / "current.json", {"model_version": "m1"})
    order = ["m1/card.md", "m1/model.safetensors", "m1/model.json", "m1/run.json", "current.json"]
    assert done == [f"{store}/{name}" for name in order]
    assert (names(store), len(names(store / "m1"))) == (["current.json", "m1"], 4)


def test_a_place_on_s3_has_a_name_for_training(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = spark.sparkContext._jsc.hadoopConfiguration()
    monkeypatch.setattr(HadoopPath, "_system", SimpleNamespace(getScheme=lambda: "s3a"))
    place = HadoopPath("s3a://lake/a/b")
    settings = [
        ({"endpoint.region": "eu-west-1"}, "s3+https://eu-west-1@s3.eu-west-1.amazonaws.com/lake/a/b"),
        ({"endpoint": "http://127.0.0.1:80/"}, "s3+http://eu-west-1@127.0.0.1:80/lake/a/b"),
        ({"endpoint": "store:80", "connection.ssl.enabled": "false"}, "s3+http://eu-west-1@store:80/lake/a/b"),
        ({"bucket.lake.endpoint": "https://own"}, "s3+https://eu-west-1@own/lake/a/b"),
    ]
    try:
        for more, url in settings:
            for name, value in more.items():
                conf.set(f"fs.s3a.{name}", value)
            assert place.shared_url() == url
    finally:
        for more, _ in settings:
            for name in more:
                conf.unset(f"fs.s3a.{name}")


def test_training_on_a_store_that_it_does_not_reach_is_refused_in_one_sentence(store: HadoopPath) -> None:
    with pytest.raises(TrailvecError, match=r"^file:\S+/store is neither on HDFS nor on S3, and training") as error:
        store.shared_url()
    assert "\n" not in str(error.value)
