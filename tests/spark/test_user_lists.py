"""Lists that people supply: CSV and Parquet through Spark, text by line, and the copies that a cluster's tasks read."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from pyspark.sql import SparkSession

from jobs.config import UserList
from jobs.errors import TrailvecError
from jobs.files import HadoopPath
from jobs.runtime import Runtime
from jobs.user_lists import as_ids, copies, ids_of, read_rows, read_users


def test_lists_in_csv(make_runtime: Callable[..., Runtime], tmp_path: Path) -> None:
    """As tools write them: a byte order mark, quotes, extra columns."""
    runtime = make_runtime()
    text = '\ufeff"user_id","date"\r\n" ann ","2024-01-01"\r\n"o""neil, b",\r\n,"2024-01-02"\r\n'.encode()
    (tmp_path / "gone.csv").write_bytes(text)
    (tmp_path / "gone.csv.gz").write_bytes(gzip.compress(text))
    for name in ("gone.csv", "gone.csv.gz"):
        users = read_users(runtime, UserList(file=name), tmp_path / "likes.toml", tmp_path)
        assert {row["user_id"] for row in users.collect()} == {"ann", 'o"neil, b'}  # type: ignore[union-attr]
    plan = users._jdf.queryExecution().optimizedPlan().toString()  # type: ignore[union-attr]
    assert plan.count("from_csv(") == 1  # each line is parsed once
    asked = UserList(sql="SELECT explode(array(' 4711\t', '')) AS user_id")
    assert read_users(runtime, asked, tmp_path / "likes.toml", tmp_path).collect() == [("4711",)]  # type: ignore[union-attr]
    (tmp_path / "gone.csv").write_text("customer;date\nann;2024-01-01\n")
    with pytest.raises(TrailvecError, match=r"the list .*gone\.csv has no column user_id \(found customer;date\)"):
        read_users(runtime, UserList(file="gone.csv"), tmp_path / "likes.toml", tmp_path)
    (tmp_path / "gone.csv").write_text("user_id\nrené\n", encoding="latin-1")
    with pytest.raises(TrailvecError, match=r"the list .*gone\.csv is not UTF-8 text: save it as UTF-8"):
        read_users(runtime, UserList(file="gone.csv"), tmp_path / "likes.toml", tmp_path)
    (tmp_path / "gone.csv").write_text("user_id\nren\ufffd\n", encoding="utf-8")  # as events may call her
    assert read_users(runtime, UserList(file="gone.csv"), tmp_path / "likes.toml", tmp_path).collect() == [
        ("ren\ufffd",)
    ]  # type: ignore[union-attr]
    (tmp_path / "gone.csv").write_text('user_id,name\n"ann","Zoë"\n', encoding="latin-1")  # only ids must be UTF-8
    assert read_users(runtime, UserList(file="gone.csv"), tmp_path / "likes.toml", tmp_path).count() == 1  # type: ignore[union-attr]
    (tmp_path / "gone.csv").write_text('note,user_id\n"two é\nlines",ann\nnone,bob\n', encoding="latin-1")
    with pytest.raises(TrailvecError, match=r"line 2 of the list .*gone\.csv does .* is part of a record that spans"):
        read_users(runtime, UserList(file="gone.csv"), tmp_path / "likes.toml", tmp_path)
    (tmp_path / "gone.csv").write_text('user_id,note\nann,TV 55"\nbob,"TV 55"" or 60"""\n')  # an inch sign
    found = read_users(runtime, UserList(file="gone.csv"), tmp_path / "likes.toml", tmp_path).collect()  # type: ignore[union-attr]
    assert {row["user_id"] for row in found} == {"ann", "bob"}
    (tmp_path / "gone.csv").write_text("name,user_id\nSmith, Ann,ann\n")  # the id is not " Ann"
    with pytest.raises(TrailvecError, match=r"line 2 of the list .*gone\.csv does not fit its header") as error:
        read_users(runtime, UserList(file="gone.csv"), tmp_path / "likes.toml", tmp_path)
    assert "Ann" not in str(error.value)  # whoever is to be erased would stay in logs
    (tmp_path / "parts.csv/day=1").mkdir(parents=True)
    (tmp_path / "parts.csv/day=1/a.csv").write_text("user_id,note\nann,1\n")
    found = read_rows(runtime, tmp_path / "parts.csv", tmp_path).collect()
    assert [row.asDict() for row in found] == [{"user_id": "ann", "note": "1", "day": "1"}]
    (tmp_path / "parts.csv/day=1/b.csv").write_text("note,user_id\n2,bob\n")  # the id is not 2
    with pytest.raises(TrailvecError, match=r"b\.csv has the columns note, user_id, day; other files of the list "):
        read_users(runtime, UserList(file="parts.csv"), tmp_path / "likes.toml", tmp_path)
    (tmp_path / "gone.tsv").write_text('date\t"user_id"\n2024-01-01\tann\n')  # its lines would be nobody's ids
    with pytest.raises(TrailvecError, match=r"the list .*gone\.tsv has a header of 2 columns, but the name of a"):
        list(read_users(runtime, UserList(file="gone.tsv"), tmp_path / "likes.toml", tmp_path))
    (tmp_path / "none.parquet").mkdir()
    (tmp_path / "none.parquet/_SUCCESS").touch()
    with pytest.raises(TrailvecError, match=r"the list .*none\.parquet holds no file that Spark reads"):
        read_users(runtime, UserList(file="none.parquet"), tmp_path / "likes.toml", tmp_path)
    pd.DataFrame({"user_id": ["ann"]}).to_parquet(tmp_path / "none.parquet/a.parquet")
    (tmp_path / "none.parquet/b.parquet").touch()  # Spark would read only the others
    with pytest.raises(TrailvecError, match=r"the list .*none\.parquet/b\.parquet is not a complete Parquet"):
        read_users(runtime, UserList(file="none.parquet"), tmp_path / "likes.toml", tmp_path)
    (tmp_path / "none.parquet/b.parquet").unlink()
    (tmp_path / "none.parquet/eu").mkdir()
    pd.DataFrame({"user_id": ["bob\t\0\0"]}).to_parquet(tmp_path / "none.parquet/eu/b.parquet")
    found = read_users(runtime, UserList(file="none.parquet"), tmp_path / "likes.toml", tmp_path).collect()  # type: ignore[union-attr]
    assert {row["user_id"] for row in found} == {"ann", "bob"}
    pd.DataFrame({"userid": ["cyd"]}).to_parquet(tmp_path / "none.parquet/c.parquet")  # it would read as NULL user_ids
    with pytest.raises(TrailvecError, match=r"c\.parquet has the columns userid; other files of .* have user_id"):
        read_users(runtime, UserList(file="none.parquet"), tmp_path / "likes.toml", tmp_path)
    for name, part in (("none.parquet", "a.parquet"), ("parts.csv", "day=1/a.csv")):
        (tmp_path / name / "task=x").mkdir()
        shutil.copy(tmp_path / name / part, tmp_path / name / "task=x")  # Spark would read only one kind
        with pytest.raises(TrailvecError, match=rf"the list .*{name} has files with different partition columns"):
            read_users(runtime, UserList(file=name), tmp_path / "likes.toml", tmp_path)
    with pytest.raises(TrailvecError, match=r"the list .* is a folder: name a file"):
        list(read_users(runtime, UserList(file="."), tmp_path / "likes.toml", tmp_path))
    pd.DataFrame({"user_id": [4711, None]}).to_parquet(tmp_path / "gone.parquet")  # 4711.0
    with pytest.raises(
        TrailvecError, match=r"gone\.parquet has a column user_id of type double: write the ids as text"
    ):
        read_users(runtime, UserList(file="gone.parquet"), tmp_path / "likes.toml", tmp_path)


def test_of_two_columns_of_ids_neither_is_taken() -> None:
    rows: Any = SimpleNamespace(columns=["user_id", "day", "user_id"])  # Spark is not asked
    with pytest.raises(
        TrailvecError, match=r"^its sql has several columns user_id \(found user_id, day, user_id\): keep one$"
    ):
        ids_of(rows, "its sql")
    with pytest.raises(
        TrailvecError, match=r"^consent has several columns user_id \(found user_id, day, user_id\): keep one$"
    ):
        as_ids(rows, "consent")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("user_id\nann\n\nbob, jr\n", ["ann", "bob, jr"]),
        ('\ufeff"user_id"\r\no\'neil\r\n', ["o'neil"]),
        ("ann\nuser_id\n", ["ann", "user_id"]),
        ("user_id\n", []),
        ("ann\u00a0\n \ufeffbob\v\n", ["ann\u00a0", "bob"]),  # not stripped from an event's id, so not here
        ('\nann\n"4711"\n', 3),
        ("'4711'\n", 1),
        ("ann\n4711,\n", 2),
        ("user_id\n4711 ; \n", 2),
        ("ann\0\0\nbob \0\n", ["ann", "bob"]),
    ],
)
def test_ids_in_a_text(tmp_path: Path, text: str, ids: list[str] | int) -> None:
    (tmp_path / "gone.txt").write_text(text)
    runtime: Any = None  # Spark is not asked
    users = read_users(runtime, UserList(file="gone.txt"), tmp_path / "likes.toml", tmp_path)
    if isinstance(ids, list):
        assert list(users) == ids
    else:
        with pytest.raises(TrailvecError, match=rf"line {ids} of the list .*gone\.txt is quoted or ends in a"):
            list(users)


@pytest.mark.parametrize("coding", ["utf-16-le", "utf-16-be", "utf-16"])
def test_another_coding_names_nobody_else(tmp_path: Path, coding: str) -> None:
    """Without a mark, UTF-16 is valid UTF-8, with a NUL beside each letter: 4711 must not become 4."""
    (tmp_path / "gone.txt").write_text("4711\n4\n", encoding=coding)
    runtime: Any = None  # Spark is not asked
    with pytest.raises(TrailvecError, match=r"the list .*gone\.txt is not UTF-8 text.*: save it as UTF-8"):
        list(read_users(runtime, UserList(file="gone.txt"), tmp_path / "likes.toml", tmp_path))


@pytest.mark.parametrize("name", ["gone.csv", "gone[1].parquet"])  # a name, not a glob
def test_tasks_that_do_not_see_the_drivers_files_read_a_copy(
    make_runtime: Callable[..., Runtime], tmp_path: Path, name: str
) -> None:
    """As on a cluster: the original is removed before the first task reads it."""
    runtime = make_runtime()
    write = pd.DataFrame.to_csv if name.endswith(".csv") else pd.DataFrame.to_parquet
    write(pd.DataFrame({"user_id": ["ann", "bob"]}), tmp_path / name, index=False)
    with copies(HadoopPath(f"file://{tmp_path}/lake/.labels.staging")) as folder:
        users = read_users(runtime, UserList(file=name), tmp_path / "likes.toml", folder)
        (tmp_path / name).unlink()
        assert [path.stat().st_mode & 0o777 for path in (tmp_path / "lake/.labels.staging").iterdir()] == [0o700]
        assert {row["user_id"] for row in users.collect()} == {"ann", "bob"}  # type: ignore[union-attr]
    assert [path for path in (tmp_path / "lake").rglob("*") if not path.name.endswith(".crc")] == []


def test_of_two_runs_at_once_the_newer_one_keeps_its_copies(spark: SparkSession, tmp_path: Path) -> None:
    staging = HadoopPath(f"file://{tmp_path}/.neighbours.staging")
    older = copies(staging)
    older.__enter__()
    with copies(staging) as newer:
        (newer / "stock.txt").write_text("i1")
        with pytest.raises(TrailvecError, match="began later has removed the lists that this one had copied to"):
            older.__exit__(FileNotFoundError, FileNotFoundError("stock.txt"), None)
        assert (newer / "stock.txt").read_text() == "i1"
    assert not staging.exists()
