"""Places in every form that clusters name them, and what training, export and the configuration make of each."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from pyarrow import fs

import jobs.train
import training.data
from jobs.config import load_config, parse, shipped
from jobs.erase_users import read_ids
from jobs.errors import TrailvecError
from jobs.files import HadoopPath
from jobs.segment_files import ArrowFolder, check_place, delivered, open_destination
from jobs.segments import Segment
from jobs.spark_session import forget_other_spark, refuse_other_files
from jobs.train import snapshot_files
from jobs.user_lists import _to_tasks, copies
from tests.sequence_files import make_rows, make_run
from training.data import Piece, read_batches
from training.urls import file_url, is_mount, local_path

ABFSS = "abfss://vectors@account.dfs.core.windows.net/trailvec"
FORMS = [  # a place, its path among this machine's files, its URL
    ("/data/trailvec", "/data/trailvec", "file:///data/trailvec"),
    ("file:/data/trailvec", "/data/trailvec", "file:///data/trailvec"),
    ("file:///data/trailvec", "/data/trailvec", "file:///data/trailvec"),
    ("/Volumes/c/s/v/a b", "/Volumes/c/s/v/a b", "file:///Volumes/c/s/v/a b"),
    ("dbfs:/Volumes/c/s/v", "/Volumes/c/s/v", "file:///Volumes/c/s/v"),
    ("dbfs:///Volumes/c/s/v", "/Volumes/c/s/v", "file:///Volumes/c/s/v"),
    ("/dbfs/mnt/lake", "/dbfs/mnt/lake", "file:///dbfs/mnt/lake"),
    ("dbfs:/mnt/lake", "/dbfs/mnt/lake", "file:///dbfs/mnt/lake"),
    ("dbfs:/VolumesOfMine/x", "/dbfs/VolumesOfMine/x", "file:///dbfs/VolumesOfMine/x"),
    ("s3://bucket/trailvec", None, "s3://bucket/trailvec"),
    ("s3a://bucket/trailvec", None, "s3a://bucket/trailvec"),
    (ABFSS, None, ABFSS),
    ("hdfs://namenode:8020/trailvec", None, "hdfs://namenode:8020/trailvec"),
    ("/data/day=1/at=10:/x", "/data/day=1/at=10:/x", "file:///data/day=1/at=10:/x"),
]


@pytest.mark.parametrize(("place", "path", "url"), FORMS)
def test_a_place_has_a_path_where_it_is_mounted_and_a_url_always(place: str, path: str | None, url: str) -> None:
    assert local_path(place) == path
    assert file_url(place) == url
    assert file_url(url) == url
    assert is_mount(Path(path or "/")) == ("Volumes/" in url or "/dbfs/" in url)


def test_a_relative_path_becomes_absolute_in_a_url() -> None:
    assert local_path("build/warehouse") == "build/warehouse"
    assert file_url("build/warehouse") == f"file://{Path.cwd()}/build/warehouse"


def test_what_training_calls_a_file_on_s3_is_no_path() -> None:
    url = "s3+http://region@host:80/bucket/x"
    assert (local_path(url), file_url(url)) == (None, url)


@pytest.mark.parametrize(("place", "path", "url"), FORMS)
def test_training_gets_the_urls_of_a_snapshots_files(
    place: str, path: str | None, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def open_table(table: str, version: int) -> Any:
        opened.append((table, version))
        return SimpleNamespace(file_uris=lambda filters: [f"{table}/{name}.parquet" for name in "ba"])

    monkeypatch.setattr(jobs.train, "DeltaTable", open_table)
    assert snapshot_files(f"{place}/sequences", 3, "train") == [f"{url}/sequences/{name}.parquet" for name in "ab"]
    assert opened == [(f"{path or place}/sequences", 3)]


def test_a_real_snapshots_files_are_found_by_their_urls(tmp_path: Path) -> None:
    rows = pa.table({"split": ["train", "valid"], "length": [1, 2]})
    table = tmp_path / "a wärehouse, 100%" / "sequences"
    write_deltalake(str(table), rows, partition_by=["split"])
    for form in (f"{table}", f"file://{table}", f"file:{table}"):
        (url,) = snapshot_files(form, 0, "train")
        assert url.startswith(f"file://{table}/split=train/")
        assert Path(url.removeprefix("file://")).is_file()


def test_petastorm_reads_a_table_whose_path_has_a_space_and_an_umlaut(tmp_path: Path) -> None:
    folder = tmp_path / "a wärehouse, 100%"
    folder.mkdir()
    (url,) = make_run(folder, [make_rows(20)]).train_files
    rows = pq.read_table(url.removeprefix("file://")).append_column("split", pa.array(["train"] * 20))
    write_deltalake(str(folder / "sequences"), rows, partition_by=["split"])
    files = snapshot_files(str(folder / "sequences"), 0, "train")
    batches = read_batches(files, max_length=8, batch_size=4, rank=0, size=1, seed=0)
    assert sum(len(batch["item_index"]) for batch in batches) == 20


@pytest.mark.parametrize(
    ("name", "found"), [("a#b", "#"), ("a?b", r"\?"), ("a%20b", "%20"), ("a|b", r"\|"), ("a^b", r"\^")]
)
def test_a_path_that_training_cannot_read_is_one_sentence(
    name: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    for sets in ([f"storage.root=s3a://bucket/{name}"], ["storage.root=warehouse"], []):
        with pytest.raises(TrailvecError, match=f"^storage.root = .* contains {found}, which training can't read"):
            load_config(None, sets)


def test_a_local_root_is_refused_where_spark_would_look_for_it_elsewhere() -> None:
    refuse_other_files(Path("/lake"), "file:///")
    refuse_other_files(Path("/Volumes/a/b"), "dbfs:/")
    refuse_other_files(HadoopPath("hdfs:///lake"), "hdfs://master:8020")
    said = (
        'storage.root = /lake .* fs.defaultFS is hdfs://master:8020, .* "hdfs://master:8020/..." or unset HADOOP_CONF'
    )
    with pytest.raises(TrailvecError, match=said):
        refuse_other_files(Path("/lake"), "hdfs://master:8020")


def test_pyspark_starts_the_spark_that_it_was_installed_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_HOME", "/opt/spark")
    forget_other_spark("")
    assert os.environ["SPARK_HOME"] == "/opt/spark"  # Databricks' own
    forget_other_spark("local[2]")
    assert "SPARK_HOME" not in os.environ


def test_with_kerberos_training_is_not_sent_to_local_files_beside_hdfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """These are refused as long as HADOOP_CONF_DIR names the cluster."""
    users = SimpleNamespace(UserGroupInformation=SimpleNamespace(isSecurityEnabled=lambda: True))
    java = SimpleNamespace(apache=SimpleNamespace(hadoop=SimpleNamespace(security=users)))
    context = SimpleNamespace(_jvm=SimpleNamespace(org=java), _jsc=SimpleNamespace(hadoopConfiguration=dict))
    monkeypatch.setattr("jobs.files._context", lambda: context)
    monkeypatch.setattr(HadoopPath, "_system", SimpleNamespace(getScheme=lambda: "hdfs"))
    with pytest.raises(TrailvecError, match=r"^hdfs:///lake is on an HDFS with Kerberos.* unset\)$") as told:
        HadoopPath("hdfs:///lake").shared_url()
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("root", ["dbfs:/mnt/lake", "/dbfs/mnt/lake", "dbfs:///dbfs", "file:/dbfs/Volumes/c/s/v"])
def test_a_root_that_spark_and_python_would_find_in_two_folders_is_one_sentence(root: str) -> None:
    with pytest.raises(TrailvecError, match=r"^storage.root = /dbfs\S* is on DBFS, .* in a volume, /Volumes/catalog/"):
        load_config(None, [f"storage.root={root}"])


@pytest.mark.parametrize("character", "[]{}*\\")
def test_a_path_that_spark_takes_for_a_pattern_is_one_sentence(character: str) -> None:
    root = f"a{character}b"
    for place in (root, f"s3a://bucket/{root}"):
        with pytest.raises(TrailvecError) as told:
            load_config(None, [f"storage.root='{place}'"])
        assert str(told.value).startswith("storage.root = ")
        assert f"{root} contains {character}, which Spark reads as a glob pattern" in str(told.value)


@pytest.mark.parametrize(("place", "path", "url"), FORMS)
def test_petastorm_is_given_each_file_by_its_url(
    place: str, path: str | None, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def stop(urls: list[str]) -> Any:
        given.extend(urls)
        raise InterruptedError

    monkeypatch.setattr(training.data, "get_filesystem_and_path_or_paths", stop)
    with pytest.raises(InterruptedError):
        training.data._PlannedReader([Piece(f"{path or place}/a.parquet", 0, 0, 1)])
    assert given == [f"{url}/a.parquet"]


def segment(destination: str | None) -> Segment:
    values = {"name": "fans", "owner": "o", "purpose": "p", "sql": "SELECT user_id FROM users"}
    return parse(Segment, values | ({} if destination is None else {"destination": destination}), "fans.toml")


@pytest.mark.parametrize(("place", "path"), [(place, path) for place, path, _ in FORMS if path is not None])
def test_a_mounted_destination_is_written_as_a_folder(place: str, path: str) -> None:
    found = open_destination(SimpleNamespace(exports=Path("/elsewhere")), segment(place))  # type: ignore[arg-type]
    assert (type(found.system), found.folder, found.local) == (fs.LocalFileSystem, path, True)


def test_a_segment_without_destination_goes_beside_the_others() -> None:
    found = open_destination(SimpleNamespace(exports=Path("/Volumes/c/s/v/exports")), segment(None))  # type: ignore[arg-type]
    assert (found.folder, found.local) == ("/Volumes/c/s/v/exports/fans", True)


def test_a_destination_that_is_a_link_is_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "fans").symlink_to(tmp_path / "disk" / "fans")
    for text in ("old", "new"):
        place = open_destination(SimpleNamespace(), segment(str(tmp_path / "fans")))  # type: ignore[arg-type]
        check_place(place)
        with delivered(place, tmp_path) as folder:
            (folder / "manifest.json").write_text(text)
    assert (tmp_path / "fans").is_symlink()
    assert (tmp_path / "disk" / "fans" / "manifest.json").read_text() == "new"


def test_a_mount_point_is_no_destination() -> None:
    with pytest.raises(
        TrailvecError, match=r"/ is a mount point, .*: set the segment's destination to a folder inside it"
    ):
        check_place(open_destination(SimpleNamespace(), segment("/")))  # type: ignore[arg-type]


def test_what_goes_to_hdfs_goes_by_hadoop() -> None:
    runtime = SimpleNamespace(exports=HadoopPath("hdfs://namenode/trailvec/exports"))
    for destination, folder in ((None, "trailvec/exports/fans"), ("hdfs://namenode/crm/fans", "crm/fans")):
        found = open_destination(runtime, segment(destination))  # type: ignore[arg-type]
        assert isinstance(found, HadoopPath)
        assert str(found) == f"hdfs://namenode/{folder}"


def test_a_bucket_is_opened_by_its_own_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.segment_files.fs.FileSystem", SimpleNamespace(from_uri=lambda uri: ("s3", uri[5:])))
    found = open_destination(SimpleNamespace(), segment("s3://bucket/fans"))  # type: ignore[arg-type]
    assert found == ("s3", "bucket/fans", False)


def test_a_container_is_no_credential_and_what_cannot_be_opened_is_told() -> None:
    with pytest.raises(TrailvecError, match=r"its destination abfss://vectors@account\.dfs\S+ can't be opened"):
        open_destination(SimpleNamespace(), segment(ABFSS))  # type: ignore[arg-type]
    for secret in ("s3://me:pass@bucket/x", "s3://me@bucket/x", "abfss://c:pass@account/x", f"{ABFSS}?sig_key=1"):
        with pytest.raises(TrailvecError, match="destination contains credentials"):
            segment(secret)


class Noting:
    """A file system that notes what is deleted and written."""

    def __init__(self) -> None:
        self.system, self.did = fs.LocalFileSystem(), list[str]()

    def delete_file(self, path: str) -> None:
        self.did.append(f"delete {Path(path).name}")
        self.system.delete_file(path)

    def open_output_stream(self, path: str, **settings: Any) -> Any:
        self.did.append(f"write {Path(path).name}")
        return self.system.open_output_stream(path, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.system, name)


def test_where_nothing_can_be_renamed_the_manifest_goes_first_and_comes_last(tmp_path: Path) -> None:
    (tmp_path / "staging").mkdir()
    system, bucket = Noting(), tmp_path / "bucket"
    place = ArrowFolder(system, str(bucket), local=False)  # type: ignore[arg-type]
    for run in ("first", "second"):
        with delivered(place, tmp_path / "staging") as folder:
            for name in ("manifest.json", "part-00000.csv.gz"):
                (folder / name).write_text(run)
    written = ["write part-00000.csv.gz", "write manifest.json"]
    assert system.did == [*written, "delete manifest.json", "delete part-00000.csv.gz", *written]
    assert {file.name: file.read_bytes() for file in bucket.iterdir()} == {
        "manifest.json": b"second",
        "part-00000.csv.gz": b"second",  # pyarrow would pack it once more, by its name
    }
    (bucket / "holiday.jpg").write_text("precious")
    with pytest.raises(TrailvecError, match=r"holds holiday\.jpg"), delivered(place, tmp_path / "staging"):
        raise AssertionError("nothing is to be filled")


@pytest.mark.parametrize(("place", "path"), [(place, path) for place, path, _ in FORMS])
def test_the_configuration_knows_what_is_mounted_by_its_path(place: str, path: str | None) -> None:
    keys = ["ingest.data_dir", "neighbours.in_stock", "probe.labels.file", "export.consent.file"]
    keys += [] if (path or "").startswith("/dbfs/") else ["storage.root"]
    config = load_config(None, [f'{key}="{place}"' for key in keys])
    labels, consent = config.probe.labels, config.export.consent
    assert labels is not None
    assert consent is not None
    assert config.storage.root == (path or place) or "storage.root" not in keys
    assert config.ingest.data_dir == config.neighbours.in_stock == labels.file == consent.file == (path or place)


def test_a_list_whom_to_erase_is_found_by_its_mounted_name(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("erika\n")
    runtime = SimpleNamespace(staging=lambda name: tmp_path / name)
    assert read_ids(runtime, f"file:{tmp_path}/ids.txt", None) == ["erika"]  # type: ignore[arg-type]


def test_tasks_on_other_machines_read_a_list_of_the_driver_as_a_copy_on_the_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = tmp_path / "Volumes"
    monkeypatch.setattr("jobs.user_lists.is_mount", lambda path: path.is_relative_to(volume))
    there = volume / "there.csv"
    for file in (tmp_path / "a.csv", tmp_path / "b.parquet/day=1/part", there):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    with copies(volume / ".lists.staging") as folder:
        for name, part in (("a.csv", ""), ("b.parquet", "/day=1/part")):
            url = _to_tasks(tmp_path / name, folder)
            assert url.startswith(f"file://{folder}/")
            assert url.endswith(f"/{name}")
            copy = Path(url.removeprefix("file://") + part)
            assert copy.read_text() == copy.name == (tmp_path / f"{name}{part}").name
        assert _to_tasks(there, folder) == f"file://{there}"
    assert list(volume.iterdir()) == [there]

    def lose_the_copies() -> None:
        with copies(volume / ".lists.staging") as folder:
            shutil.rmtree(folder)
            raise FileNotFoundError(folder)

    with pytest.raises(TrailvecError, match=r"^another run that began later has removed the lists"):
        lose_the_copies()
    with copies(tmp_path / ".lists.staging") as folder:  # one machine
        assert _to_tasks(tmp_path / "a.csv", folder) == f"file://{tmp_path}/a.csv"


def test_files_that_come_with_trailvec_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("conf/databricks.toml").train.launcher == "spark"
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/base.toml").write_text("sessionize.gap_minutes = 7")
    assert load_config("conf/base.toml").sessionize.gap_minutes == 7  # one's own comes first
    assert shipped("conf/nothing.toml") == Path("conf/nothing.toml")
    with pytest.raises(TrailvecError, match=r"^conf/nothing.toml does not exist: correct the path$"):
        load_config("conf/nothing.toml")
