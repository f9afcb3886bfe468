"""Exported segments, read by pyarrow: who is in them, in which order, under which id, and what is left of a crash."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from jobs import export_segments
from jobs.errors import TrailvecError
from jobs.export_segments import KEY, STAGE, read_segments
from jobs.runtime import Runtime
from tests.spark.test_neighbours import embed

SECRET = "correct horse battery staple"
USERS = {
    "ann": [1.0, 0.0],  # seed
    "amy": [2.0, 0.0],  # seed, as like ann as can be
    "bob": [0.0, 2.0],  # seed, of another taste
    "cat": [3.0, 0.1],
    "dan": [0.1, 3.0],
    "eve": [1.0, 1.0],
    "eva": [2.0, 2.0],  # as near as eve
    "far": [-1.0, -1.0],
    "nil": [0.0, 0.0],  # no direction
}
SEGMENT = """
name = "likes"
owner = "marketing"
purpose = "a test"
size = 4
[seeds]
file = "seeds.txt"
"""


@pytest.fixture
def shop(
    make_runtime: Callable[..., Runtime], spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Runtime:
    """Nine users' vectors, a segment's file and its seed list with one unknown user."""
    monkeypatch.setenv(KEY, SECRET)
    spark.sql("DROP DATABASE IF EXISTS segments CASCADE")  # the session is shared: forget the last test's tables
    runtime = make_runtime(
        "storage.database=segments",
        f'export.segments=["{tmp_path / "likes.toml"}"]',
        "neighbours.block_rows=3",
    )
    embed(runtime, spark, USERS, {"i": [1.0, 0.0]})
    (tmp_path / "likes.toml").write_text(SEGMENT)
    (tmp_path / "seeds.txt").write_text("\ufeffann\r\n bob \n\nann\nghost\namy\n", encoding="utf-8")
    return runtime


def read(runtime: Runtime) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder = runtime.exports / "likes"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *(part["name"] for part in manifest["files"])}
    rows = []
    for part in manifest["files"]:
        data = (folder / part["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (part["bytes"], part["sha256"])
        found = pq.read_table(folder / part["name"]).to_pylist()
        assert len(found) == part["rows"]
        rows += found
    return manifest, rows


def hashed(user: str) -> str:
    """By openssl, not by Python's hmac."""
    command = ["openssl", "dgst", "-sha256", "-hmac", SECRET]
    return subprocess.run(command, input=user.encode(), capture_output=True, check=True).stdout.decode().split()[-1]


def test_who_is_in_a_segment(shop: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_segments, "_ROWS_PER_FILE", 3)
    report = shop.execute(STAGE)
    assert report.rows_out == {"likes": 4}

    manifest, rows = read(shop)
    near, middle = 3 / np.hypot(3, 0.1), 1 / np.sqrt(2)
    expected = [("cat", near), ("dan", near), ("eva", middle), ("eve", middle)]  # ties by id; the far one is cut off
    assert [(row["user_id"], row["rank"]) for row in rows] == [
        (hashed(user), n) for n, (user, _) in enumerate(expected, 1)
    ]
    assert [row["score"] for row in rows] == pytest.approx([score for _, score in expected], rel=1e-6)
    assert [part["rows"] for part in manifest["files"]] == [3, 1]
    assert manifest["counts"] == {
        "seeds_given": 4,
        "seeds_known": 3,
        "seeds_unknown": 1,
        "candidates": 5,
        "exported": 4,
    }
    assert manifest["score"] == {"min": rows[-1]["score"], "max": rows[0]["score"]}
    assert manifest["model_version"] == "m1"
    assert manifest["as_of"] == "2017-12-01T00:00:00Z"
    assert manifest["segment"]["owner"] == "marketing"
    assert manifest["provenance"]["reads"] == {"current_model": 1, "user_embeddings": 1}


def test_the_key_is_nowhere(shop: Runtime, capfd: pytest.CaptureFixture[str]) -> None:
    shop.execute(STAGE)
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err
    written = [path for path in shop.root.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


def test_a_rerun_is_skipped_and_a_forced_one_gives_the_same_bytes(
    shop: Runtime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shop.execute(STAGE)
    first = (shop.exports / "likes" / "part-00000.parquet").read_bytes()
    assert shop.execute(STAGE).skipped
    report = shop.execute(STAGE, force=True)
    assert not report.skipped
    assert (shop.exports / "likes" / "part-00000.parquet").read_bytes() == first

    (tmp_path / "seeds.txt").write_text("far\n")
    assert not shop.execute(STAGE).skipped  # the list has changed
    assert shop.execute(STAGE).skipped
    monkeypatch.setenv(KEY, "another key")
    assert not shop.execute(STAGE).skipped


def test_a_crash_before_the_manifest_leaves_no_half_export(shop: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    def visible() -> list[str]:
        return [path.name for path in shop.exports.iterdir() if not path.name.startswith(".")]

    with monkeypatch.context() as broken:
        broken.setattr(export_segments, "write_json", dies)
        with pytest.raises(KeyboardInterrupt):
            shop.execute(STAGE)
    assert visible() == []

    shop.execute(STAGE)
    whole = read(shop)
    with monkeypatch.context() as broken:
        broken.setattr(export_segments, "write_json", dies)
        with pytest.raises(KeyboardInterrupt):
            shop.execute(STAGE, force=True)
    assert read(shop) == whole
    shop.execute(STAGE, force=True)
    assert read(shop) == whole
    assert [path.name for path in shop.exports.iterdir()] == ["likes"]


def test_seeds_by_sql_plain_ids_and_chosen_columns(
    shop: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY)  # not needed for plain ids
    sql = "SELECT user_id FROM user_embeddings WHERE vector_norm(vector) = 1"
    text = SEGMENT.replace('file = "seeds.txt"', f'sql = "{sql}"').replace(
        "size = 4", 'size = 100\ncolumns = ["rank", "user_id"]\nuser_ids = "plain"\napproved_by = "the privacy officer"'
    )
    (tmp_path / "likes.toml").write_text(text)
    shop.execute(STAGE)
    manifest, rows = read(shop)
    assert rows == [
        {"rank": n, "user_id": u} for n, u in enumerate(["amy", "cat", "eva", "eve", "dan", "bob", "far"], 1)
    ]
    assert manifest["segment"]["approved_by"] == "the privacy officer"

    (tmp_path / "likes.toml").write_text(text.replace("SELECT user_id", "SELECT history_length"))
    with pytest.raises(TrailvecError, match="gives history_length: it needs a column user_id"):
        shop.execute(STAGE)


def test_all_users_are_seeds(shop: Runtime, tmp_path: Path) -> None:
    (tmp_path / "seeds.txt").write_text("\n".join(USERS))
    shop.execute(STAGE)
    manifest, rows = read(shop)
    assert rows == []
    assert manifest["counts"]["seeds_unknown"] == 1  # nil
    assert manifest["score"] == {"min": None, "max": None}
    assert pq.read_schema(shop.exports / "likes" / "part-00000.parquet").names == ["user_id", "score", "rank"]


def test_what_is_refused_while_it_runs(shop: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "seeds.txt").write_text("ghost\nnil\n")
    with pytest.raises(TrailvecError, match="none of its 2 seeds is a user with a vector of model m1"):
        shop.execute(STAGE)
    monkeypatch.delenv(KEY)
    with pytest.raises(TrailvecError, match=f"the environment has no {KEY}"):
        shop.execute(STAGE)
    assert not shop.exports.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "likes"', 'name = "../likes"', "name = '../likes': String should match pattern"),
        ("size = 4", 'size = 4\nuser_ids = "plain"', r"likes.toml: plain user ids need approved_by, .*: correct it"),
        ("size = 4", "size = 0", "size = 0: Input should be greater than or equal to 1"),
        ("size = 4", "sise = 4", "unknown key sise; did you mean size"),
        ("size = 4", 'size = 4\ncolumns = ["rank", "rank"]', "a column stands in columns twice"),
        ("size = 4", 'size = 4\ncolumns = ["email"]', "columns.0 = 'email'"),
        ('file = "seeds.txt"', "", "likes.toml: seeds: give either file or sql: correct it"),
        ('file = "seeds.txt"', 'file = "seeds.txt"\nsql = "SELECT 1"', "give either file or sql"),
        ("seeds.txt", "none.txt", r"the seed list .*none\.txt does not exist"),
        ('owner = "marketing"', "", "owner is missing"),
    ],
)
def test_what_a_segment_file_may_not_say(tmp_path: Path, old: str, new: str, message: str) -> None:
    (tmp_path / "seeds.txt").write_text("ann\n")
    (tmp_path / "likes.toml").write_text(SEGMENT.replace(old, new))
    with pytest.raises(TrailvecError, match=message):
        read_segments([str(tmp_path / "likes.toml")])


def test_two_segments_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "seeds.txt").write_text("ann\n")
    for name in ("a.toml", "b.toml"):
        (tmp_path / name).write_text(SEGMENT)
    with pytest.raises(TrailvecError, match="both say name = 'likes': rename one"):
        read_segments([str(tmp_path / name) for name in ("a.toml", "b.toml")])


def test_the_demo_segment_is_one() -> None:
    (file,) = read_segments(["conf/segments/lookalike_demo.toml"])
    assert file.segment.size == 200
    assert file.segment.user_ids == "hashed"
