"""Which files an input stands for, and a list: told by their names alone."""

from __future__ import annotations

from pathlib import Path

from jobs.raw_records import find_files
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
