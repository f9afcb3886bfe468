"""What is told of files and mappings without Spark."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.checked_records import may_lack_zone
from jobs.errors import TrailvecError
from jobs.files import HadoopPath, Place
from jobs.raw_records import find_files, folder_of, is_data
from jobs.user_lists import file_digest


def test_a_linked_folder_is_looked_into_as_spark_does(tmp_path: Path) -> None:
    for folder in ("logs", "disk"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.csv").write_text("id\n1\n")
    (tmp_path / "logs/2024").symlink_to(tmp_path / "disk")
    before = file_digest(tmp_path / "logs")
    (tmp_path / "disk/b.csv").write_text("id\n2\n")
    assert find_files(tmp_path, "logs") == [tmp_path / "logs" / name for name in ("2024/a.csv", "2024/b.csv", "a.csv")]
    assert file_digest(tmp_path / "logs") != before


def test_a_file_whose_name_java_does_not_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name in ("grün.csv".encode(), "Verkäufe.csv".encode("latin-1")):
        Path(os.fsdecode(os.fsencode(tmp_path / "logs") + b"/" + name)).touch()
    with pytest.raises(TrailvecError, match=r"the name of .*/logs/Verk\\udce4ufe.csv is not UTF-8, so Spark would"):
        find_files(tmp_path, "logs")


@pytest.mark.parametrize(
    ("path", "folder"),
    [("logs", "/d/logs"), ("logs/*.csv", "/d/logs"), ("logs/day=*/a?.csv", "/d/logs"), ("log[12].csv", "/d")],
)
def test_the_folder_of_a_pattern_ends_before_its_first_sign(path: str, folder: str) -> None:
    assert folder_of(Path("/d"), path) == Path(folder)


@pytest.mark.parametrize(
    ("file", "kept"),
    [
        ("2024/a.json", True),
        ("_day=7/a.json", True),
        ("_temporary/0/a.json", False),
        ("2024/.staging/a.json", False),
        ("a.json._COPYING_", False),
    ],
)
def test_hidden_and_unfinished_files_are_no_data(file: str, kept: bool) -> None:
    places: list[tuple[str, Place]] = [("file:/home/.me/logs", Path("/home/.me/logs"))]
    places.append(("hdfs://host:8020/_raw/logs", HadoopPath("hdfs://host:8020/_raw/logs")))
    for url, folder in places:
        assert is_data(f"{url}/{file}", folder) is kept


@pytest.mark.parametrize(
    ("pattern", "optional"),
    [
        ("yyyy-MM-dd HH:mm[:ss]XXX", False),
        ("yyyy-MM-dd HH:mm['[Z'] z", False),
        ("yyyy-MM-dd HH:mm[XXX]", True),
        ("yyyy-MM-dd HH:mm[:ss[.SSS][ VV]]", True),
        ("yyyy-MM-dd HH:mm[ 'Z']", False),
    ],
)
def test_a_zone_in_brackets_may_be_lacking(pattern: str, optional: bool) -> None:
    assert may_lack_zone(pattern) is optional
