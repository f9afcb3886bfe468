"""Exported segments as read by pyarrow: who is in them, in which order, under which id, and what a crash leaves."""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import hmac
import io
import json
import shutil
import subprocess
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import Mock, patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pyarrow.fs import LocalFileSystem
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from sklearn.linear_model import LogisticRegression

from jobs import export_segments, segment_files, segment_members, segment_rules
from jobs.config import load_config
from jobs.errors import TrailvecError
from jobs.export_segments import STAGE, _published
from jobs.runtime import Runtime, Stage
from jobs.segment_files import (
    KEY,
    WRITERS,
    ArrowFolder,
    Staging,
    check_destinations,
    check_place,
    staging_area,
    write_parts,
)
from jobs.segment_members import Export
from jobs.segment_rules import Combinations, Lists, Marked, Rules, allows, consenting, rules_of
from jobs.segments import Format, Segment, SegmentFile, read_segments
from jobs.spark_session import persisted, spark_conf
from jobs.tables import EXPORTS, ITEM_EMBEDDINGS, ITEMS, SESSIONS, USER_EMBEDDINGS, USER_PROFILES
from jobs.user_lists import read_users
from spark_udfs.likeness import candidates
from tests.conftest import make_config, put, read_delta
from tests.spark.test_neighbours import embed, put_item_vectors, put_users

SECRET = "correct horse battery staple"
USERS = {
    "ann": [1.0, 0.0],  # seed
    "amy": [2.0, 0.0],  # seed, same direction as ann
    "bob": [0.0, 2.0],  # seed, different taste
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
method = "nearest_seed"
"""


@pytest.fixture(scope="module")
def filled(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with the vectors of nine users; each test takes a copy."""
    root = tmp_path_factory.mktemp("filled")
    embed(Runtime(make_config(root), spark), spark, USERS, {"i1": [1.0, 0.0]})
    return root


@pytest.fixture
def shop(
    filled: Path,
    make_runtime: Callable[..., Runtime],
    spark: SparkSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Runtime:
    """The nine users' vectors, a segment's file and its seed list with one unknown user."""
    monkeypatch.setenv(KEY, SECRET)
    spark.sql("DROP DATABASE IF EXISTS segments CASCADE")  # the session is shared: drop the last test's tables
    runtime = make_runtime(
        "storage.database=segments",
        f'export.segments=["{tmp_path / "likes.toml"}"]',
    )
    shutil.copytree(filled, runtime.root)
    (tmp_path / "likes.toml").write_text(SEGMENT)
    (tmp_path / "seeds.txt").write_text("\ufeffann\r\n bob \n\nann\nghost\namy\n", encoding="utf-8")
    return runtime


def read(runtime: Runtime, name: str = "likes", folder: Path | None = None) -> tuple[dict[str, Any], list[Any]]:
    """The manifest, and the rows: dicts from Parquet, lists of strings from CSV, header included."""
    folder = folder or runtime.exports / name
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {part["name"] for part in manifest["files"]}
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "report.html", *files}
    counts = manifest["counts"]
    assert counts["in"] == sum(r["users"] for r in counts["removed"]) + counts["control"] + counts["exported"]
    rows: list[Any] = []
    for part in manifest["files"]:
        data = (folder / part["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (part["bytes"], part["sha256"])
        if part["name"].endswith(".parquet"):
            found: list[Any] = pq.read_table(folder / part["name"]).to_pylist()
            assert len(found) == part["rows"]
        else:
            found = csv_rows(folder / part["name"])
            assert len(found) == part["rows"] + 1
        rows += found
    return manifest, rows


def csv_rows(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(gzip.decompress(path.read_bytes()).decode("utf-8"), newline="")))


def removed(manifest: dict[str, Any]) -> dict[str, int]:
    return {rule["rule"]: rule["users"] for rule in manifest["counts"]["removed"]}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hashed(user: str) -> str:
    """Computed by openssl, independently of Python's hmac."""
    command = ["openssl", "dgst", "-sha256", "-hmac", SECRET]
    return subprocess.run(command, input=user.encode(), capture_output=True, check=True).stdout.decode().split()[-1]


def best_four(segment: str = "likes") -> list[tuple[str, float]]:
    """The members of SEGMENT and their scores, as in the files: ties by a hash; far is cut off."""
    near, middle = 3 / np.hypot(3, 0.1), 1 / np.sqrt(2)
    scores = {"cat": near, "dan": near, "eva": middle, "eve": middle}
    return sorted(scores.items(), key=lambda of: (-of[1], fast_hash(of[0], f"order\0{segment}")))


def test_who_is_in_a_segment_and_that_the_key_is_nowhere(
    make_runtime: Callable[..., Runtime], shop: Runtime, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All users are seeds of segment `all`, so nobody is in it."""
    (tmp_path / "likes.toml").write_text(SEGMENT.replace("size = 4", "size = 4\nrows_per_file = 3"))
    (tmp_path / "all.txt").write_text("\n".join(USERS))
    (tmp_path / "all.toml").write_text(SEGMENT.replace("likes", "all").replace("seeds.txt", "all.txt"))
    shop = make_runtime(
        "storage.database=segments", f'export.segments=["{tmp_path}/likes.toml", "{tmp_path}/all.toml"]'
    )
    report = shop.execute(STAGE)
    assert report.rows_out == {"likes": 4, "all": 0}
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err
    written = [path for path in shop.root.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]

    manifest, rows = read(shop)
    expected = best_four()
    assert [(row["user_id"], row["rank"]) for row in rows] == [
        (hashed(user), n) for n, (user, _) in enumerate(expected, 1)
    ]
    assert [row["score"] for row in rows] == pytest.approx([score for _, score in expected], rel=1e-6)
    assert [part["rows"] for part in manifest["files"]] == [3, 1]
    assert manifest["counts"] == {
        "in": 9,
        "removed": [{"rule": "seed", "users": 3}, {"rule": "after the best 4", "users": 2}],
        "control": 0,
        "exported": 4,
        "seeds": {"given": 4, "known": 3, "unknown": 1, "cold": 0, "used": 3},
    }
    assert (manifest["score"]["min"], manifest["score"]["max"]) == (rows[-1]["score"], rows[0]["score"])
    histogram = manifest["score"]["histogram"]
    assert sum(histogram["counts"]) == 4
    assert histogram["counts"][0] == histogram["counts"][-1] == 2
    assert (histogram["edges"][0], histogram["edges"][-1]) == (rows[-1]["score"], rows[0]["score"])
    logged = read_delta(shop.root / "tables" / "exports")
    assert {(row["user_id"], row["segment"], row["is_control"], row["model_version"]) for row in logged} == {
        (user, "likes", False, "m1") for user, _ in expected
    }
    assert {row["export_id"] for row in logged} == {manifest["export_id"]}
    assert manifest["model_version"] == "m1"
    assert manifest["as_of"] == "2017-12-01T00:00:00.000000Z"
    assert manifest["segment"]["owner"] == "marketing"
    assert manifest["provenance"]["reads"] == {"current_model": 1, "user_embeddings": 1}

    manifest, rows = read(shop, "all")
    assert rows == []
    assert manifest["counts"]["seeds"]["unknown"] == 1  # nil
    assert manifest["score"] == {"min": None, "max": None, "histogram": None}
    assert "<svg" not in (shop.exports / "all" / "report.html").read_text()
    assert "<svg" in (shop.exports / "likes" / "report.html").read_text()
    assert pq.read_schema(shop.exports / "all" / "part-00000.parquet").names == ["user_id", "score", "rank"]


def test_a_rerun_is_skipped_and_a_forced_one_gives_the_same_bytes(
    shop: Runtime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shop.execute(STAGE)
    first = bytes_of(shop.exports)
    # Left by a run that was killed as soon as this export was in place, and made by one that is filling it.
    for name in (".likes.9ab.old.staging", ".likes.1f.staging"):
        (shop.exports / name).mkdir()
    assert shop.execute(STAGE).skipped
    assert sorted(path.name for path in shop.exports.iterdir()) == [".likes.1f.staging", "likes"]
    assert DeltaTable(shop.path(USER_EMBEDDINGS)).optimize.compact()["numFilesRemoved"] > 1  # upkeep: same rows
    logged = sorted(row["user_id"] for row in read_delta(shop.path(EXPORTS)))
    put(shop, EXPORTS, shop.latest(EXPORTS).where("user_id <> 'cat'"))  # as if other code had not selected her
    with spark_conf(shop.spark, {"spark.sql.shuffle.partitions": "3"}):
        report = shop.execute(STAGE, force=True)
    assert not report.skipped
    assert bytes_of(shop.exports) == first
    assert {"user", "application"}.isdisjoint(read(shop)[0]["provenance"])  # they differ between processes
    config = read(shop)[0]["provenance"]["config"]
    assert (config.keys(), config["export"].keys()) == ({"export", "model"}, {"segments"})
    assert sorted(row["user_id"] for row in read_delta(shop.path(EXPORTS))) == logged  # each of the four once

    def is_pending() -> bool:
        (export,) = export_segments._exports(shop, datetime(2024, 3, 1, tzinfo=timezone.utc))
        return _published(shop, export) is None

    seeds = (tmp_path / "seeds.txt").read_bytes()
    (tmp_path / "seeds.txt").write_text("far\n")
    assert is_pending()  # the list has changed
    (tmp_path / "seeds.txt").write_bytes(seeds)
    assert not is_pending()
    monkeypatch.setenv(KEY, "another key of the tests")
    assert is_pending()
    monkeypatch.setenv(KEY, SECRET)
    assert not is_pending()
    now = datetime(2024, 3, 1, tzinfo=timezone.utc)
    (before,) = export_segments._exports(shop, now)
    for line in ('format = "csv.gz"', 'columns = ["user_id"]', "rows_per_file = 3", 'approved_by = "a"', "threshold"):
        text = SEGMENT.replace("size = 4", f"size = 4\n{line}").replace("size = 4\nthreshold", "threshold = 0.1")
        (tmp_path / "likes.toml").write_text(text)
        assert is_pending()
        (export,) = export_segments._exports(shop, now)
        assert (export.id == before.id) == ("threshold" not in line)  # who is in it
    of_lists = set()
    for more in ("", ", may_be_empty = true"):
        line = f'size = 4\nsuppress = [{{ file = "seeds.txt"{more} }}]'
        (tmp_path / "likes.toml").write_text(SEGMENT.replace("size = 4", line))
        assert is_pending()
        of_lists |= {export.id for export in export_segments._exports(shop, now)}
    assert len(of_lists) == 1
    (tmp_path / "likes.toml").write_text(SEGMENT)
    assert not is_pending()
    shutil.rmtree(shop.path(USER_EMBEDDINGS))  # another table of that name, at the same version
    shop.spark._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()  # type: ignore[union-attr]
    put_users(shop, USERS)
    shop.execute(Stage("look", "", lambda _: None, STAGE.reads, writes=(), settings=()))
    assert is_pending()


def test_a_crash_before_the_manifest_leaves_no_half_export(
    shop: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The members are logged by then; the same command yields the export that was due, and logs nothing twice."""

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    limited = SEGMENT.replace("size = 4", "size = 4\nat_most = { exports = 1, days = 7 }")
    (tmp_path / "likes.toml").write_text(limited)
    log = shop.root / "tables" / "exports"
    with monkeypatch.context() as broken:
        broken.setattr(export_segments, "write_json", dies)
        with pytest.raises(KeyboardInterrupt):
            shop.execute(STAGE)
    assert [path.name for path in shop.exports.iterdir() if not path.name.startswith(".")] == []
    before = read_delta(log)
    assert len(before) == 4
    logged = shop.spark.createDataFrame(before, EXPORTS.schema())
    DeltaTable(str(log)).delete()
    lists_of = segment_rules.rules_of

    def logs_meanwhile(*given: Any, **more: Any) -> Rules:
        """As an older run does that has just lost its staging."""
        if not read_delta(log):
            put(Runtime(shop.config, shop.spark), EXPORTS, logged)
        return lists_of(*given, **more)

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(segment_members, "rules_of", logs_meanwhile)
        shop.execute(STAGE)
    whole = bytes_of(shop.exports)
    assert read(shop)[0]["counts"]["exported"] == 4
    assert sorted(map(str, read_delta(log))) == sorted(map(str, before))
    assert [path.name for path in shop.exports.iterdir()] == ["likes"]
    assert sorted(path.name for path in shop.root.iterdir()) == ["exports", "models", "tables"]
    with monkeypatch.context() as broken:
        broken.setattr(export_segments, "write_json", dies)
        with pytest.raises(KeyboardInterrupt):
            shop.execute(STAGE, force=True)
    assert {name: data for name, data in bytes_of(shop.exports).items() if not name.startswith(".")} == whole
    assert sorted(map(str, read_delta(log))) == sorted(map(str, before))


def test_of_two_runs_at_once_the_newer_one_exports(shop: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    log = export_segments._log_members

    def overtaken(*arguments: Any) -> None:
        with monkeypatch.context() as whole:
            whole.setattr(export_segments, "_log_members", log)
            Runtime(shop.config, shop.spark).execute(STAGE)
        log(*arguments)

    monkeypatch.setattr(export_segments, "_log_members", overtaken)
    with pytest.raises(TrailvecError, match="the newer run replaces this one: wait until it ends"):
        shop.execute(STAGE)
    assert read(shop)[0]["counts"]["exported"] == 4
    assert len(read_delta(shop.root / "tables" / "exports")) == 4
    assert sorted(path.name for path in shop.root.iterdir()) == ["exports", "models", "tables"]


def test_who_is_overtaken_logs_nothing(shop: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    log = export_segments._log_members

    def overtaken(*arguments: Any) -> None:
        (arguments[2].shared / "ours").unlink()  # the newer run removed everything; tasks recreated folders
        log(*arguments)

    monkeypatch.setattr(export_segments, "_log_members", overtaken)
    with pytest.raises(TrailvecError, match="newer run"):
        shop.execute(STAGE)
    assert read_delta(shop.root / "tables" / "exports") == []


def test_the_older_run_leaves_what_the_newer_one_has_laid_down(shop: Runtime) -> None:
    older = staging_area(shop)
    older.__enter__()
    with staging_area(shop) as newer:
        assert newer.local.stat().st_mode & 0o777 == 0o700  # it holds user ids
        (newer.local / "log").mkdir()
        with pytest.raises(TrailvecError, match="newer run"):
            older.__exit__(FileNotFoundError, FileNotFoundError("log"), None)
        assert (newer.local / "log").exists()
    assert not shop.staging("exports").exists()


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

    def id_on(day: int, condition: str) -> str:
        (tmp_path / "likes.toml").write_text(text.replace(' = 1"', f'{condition}"'))
        (export,) = export_segments._exports(shop, datetime(2024, 3, day, tzinfo=timezone.utc))
        return export.id

    for still in (" = 1", " = 1 AND user_id <> 'now()'"):
        assert id_on(1, still) == id_on(2, still)
    for timely in (
        " > year(current_date)",
        " IN (SELECT 1 FROM user_embeddings WHERE as_of < now() - INTERVAL 1 DAY)",
        " = 1 OR DATE 'today' > DATE '2024-03-01'",
        " = 1 OR TIMESTAMP 'Tomorrow Europe/Berlin' > '2024-03-01'",
    ):
        assert id_on(1, timely) == id_on(1, timely) != id_on(2, timely)

    for log in ("exports", f"delta.`{shop.path(EXPORTS)}`"):  # a repeated run would find its own members there
        with pytest.raises(TrailvecError, match=r"likes\.toml: the query of a list of its users reads exports, to"):
            id_on(1, f" = 1 AND user_id NOT IN (SELECT user_id FROM {log})")
    (tmp_path / "in.csv").write_text("ann\n")
    with pytest.raises(TrailvecError, match=r"likes\.toml: the query of .* reads the files /.*/in\.csv, whose changes"):
        id_on(1, f" = 1 AND user_id IN (SELECT _c0 FROM csv.`{tmp_path}/in.csv`)")
    shop.spark.sql("CREATE TABLE theirs USING parquet AS SELECT 'ann' AS user_id")
    shop.spark.sql("CREATE TABLE theirs_too USING delta AS SELECT 'ann' AS user_id")
    for theirs in ("theirs", "theirs_too"):  # whose versions are not part of an id
        condition = f" = 1 AND user_id IN (SELECT user_id FROM {theirs})"
        assert id_on(1, condition) == id_on(1, condition) != id_on(2, condition)
    id_on(1, " = 1 AND user_id IN (WITH exports AS (SELECT 'ann') SELECT * FROM exports)")

    # The tables read, by views of views too, are part of it, and those that nearest_items reads unseen. Others are not.
    shop.spark.sql("CREATE VIEW wares AS SELECT item_id FROM items")
    shop.spark.sql("CREATE VIEW mine AS SELECT item_id FROM wares")
    of_items = " = 1 AND user_id NOT IN (SELECT item_id FROM mine)"
    before = [id_on(1, condition) for condition in (" = 1", of_items)]
    DeltaTable(shop.path(ITEMS)).delete()
    after = [id_on(1, condition) for condition in (" = 1", of_items)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False]
    DeltaTable(shop.path(ITEM_EMBEDDINGS)).delete()
    assert id_on(1, " = 1") != before[0]

    (tmp_path / "likes.toml").write_text(text.replace("SELECT user_id", "SELECT history_length"))
    with pytest.raises(TrailvecError, match=r"has no column user_id \(found history_length\): add it"):
        shop.execute(STAGE)


def test_what_is_refused_while_it_runs(shop: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "seeds.txt").write_text("ghost\nnil\n")
    with pytest.raises(TrailvecError, match=r"none of its 2 seeds has a vector of model m1 .*set model\.version=m1` f"):
        shop.execute(STAGE)
    (tmp_path / "seeds.txt").write_text("\n")
    with pytest.raises(TrailvecError, match=r"likes\.toml: its list of seeds is empty: correct it"):
        shop.execute(STAGE)
    monkeypatch.delenv(KEY)
    (tmp_path / "likes.toml").write_text(SEGMENT.replace('file = "seeds.txt"', 'sql = "SELECT * FROM nowhere"'))
    with pytest.raises(TrailvecError, match=f"the environment has no {KEY}"):  # before any query is run
        shop.execute(STAGE)
    write_segments(tmp_path, {"likes": 'sql = "SELECT CAST(7 AS DOUBLE) AS user_id"\n'})
    with pytest.raises(TrailvecError, match=r"likes\.toml: its sql has a column user_id of type double: write the ids"):
        shop.execute(STAGE)
    assert not shop.exports.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("size = 4", "", "seeds needs either size or threshold, found neither"),
        ("size = 4", "threshold = nan", "threshold = nan: Input should be a finite number: correct it"),
        ("size = 4", "size = 4\nthreshold = 0.5", "seeds needs either size or threshold, found size and threshold"),
        (
            "size = 4",
            'size = 4\nsql = "SELECT 1"',
            "needs exactly one of seeds, affinity, sql and include, found seeds and sql",
        ),
        ("size = 4", 'size = 4\nsuppress = [{ file = "gone.txt" }]', r"the list of users .*gone\.txt does not exist"),
        ("size = 4", 'size = 4\nexclude = ["buyers"]', "segment buyers is in no file of export.segments: add its file"),
        ("size = 4", 'size = 4\nexclude = ["likes"]', r"in a cycle \(likes → likes\): remove one of these"),
        (
            "size = 4",
            'size = 4\ndestination = "~/x"',
            "destination: found '~/x', but ~ is not expanded here and has to be written",
        ),
        ("size = 4", 'size = 4\ndestination = "s3://me:pass@bucket/x"', "destination contains credentials, which"),
        ("size = 4", 'size = 4\ndestination = "s3a://me:pa/ss@bucket/x"', "destination contains credentials, which"),
        ("[seeds]", "[seeds]\nsize = 4", r"unknown key seeds\.size; size belongs above the first \[heading\]"),
        (
            "size = 4",
            'size = 4\nsuppress = ["seeds.txt"]',
            r"suppress\.0 = 'seeds\.txt': write a table, such as { file = \.\.\. } "
            r"\(known keys: file, sql, may_be_empty\)",
        ),
        (
            "size = 4",
            'size = 4\nsuppress = "optout.txt"',
            r"suppress = 'optout\.txt': write a list of tables, such as \[",
        ),
        ("size = 4", "size = 4\ncontrol_share = 1", "control_share = 1: Input should be less than 1"),
        (
            "size = 4",
            'size = 4\ncontrol_group = "all"',
            r"likes\.toml: control_group needs a control_share above 0, or",
        ),
        (
            'method = "nearest_seed"',
            "tastes = 3",
            "seeds: tastes needs method 'tastes', found 'classifier': correct it",
        ),
        ('name = "likes"', 'name = "../likes"', "name: found '../likes', which must consist of"),
        ("size = 4", 'size = 4\nuser_ids = "plain"', r"likes.toml: plain user ids need approved_by, .*: correct it"),
        (
            "size = 4",
            "size = 4\nat_most = { exports = 1, days = 1_000_000 }",
            "at_most.days = 1000000: Input should be less",
        ),
        ("size = 4", "size = 0", "size = 0: Input should be greater than or equal to 1"),
        ("size = 4", "sise = 4", "unknown key sise; did you mean size"),
        ("size = 4", 'size = 4\ncolumns = ["rank", "rank"]', "columns lists a column twice"),
        ("size = 4", 'size = 4\ncolumns = ["email"]', "columns.0 = 'email'"),
        ('file = "seeds.txt"', "", "likes.toml: seeds: needs exactly one of file and sql: correct it"),
        ('file = "seeds.txt"', 'file = "seeds.txt"\nsql = "SELECT 1"', "needs exactly one of file and sql"),
        ("seeds.txt", "none.txt", r"the list of users .*none\.txt does not exist"),
        ('owner = "marketing"', "", "owner is missing"),
    ],
)
def test_what_a_segment_file_may_not_say(tmp_path: Path, old: str, new: str, message: str) -> None:
    (tmp_path / "seeds.txt").write_text("ann\n")
    (tmp_path / "likes.toml").write_text(SEGMENT.replace(old, new))
    with pytest.raises(TrailvecError, match=message):
        read_segments([str(tmp_path / "likes.toml")])


def test_a_union_whose_parts_exports_reach_its_limit_would_hold_nobody(tmp_path: Path) -> None:
    limit = "at_most = {{ exports = {}, days = 7 }}\n".format
    paths = write_segments(
        tmp_path,
        {
            "nested": 'include = ["both", "union"]\n' + limit(2),
            "union": 'include = ["both", "a"]\n' + limit(2),  # members of `a` alone have one
            "both": 'include = ["a", "b"]\n',
            **{name: 'sql = "SELECT 1 AS user_id"\n' + limit(1) for name in ("a", "b")},
        },
    )
    told = r"nested\.toml: at_most would count the exports of both, union, and of .* in this same run, at least 2, so"
    with pytest.raises(TrailvecError, match=told):
        read_segments(paths)
    write_segments(tmp_path, {"nested": 'include = ["both", "union"]\n' + limit(3)})
    assert [file.segment.name for file in read_segments(paths)][-1] == "nested"
    write_segments(tmp_path, {"both": 'include = ["a", "b"]\n' + limit(1)})
    with pytest.raises(TrailvecError, match=r"both\.toml: at_most would count the exports of a, b, .*at least 1, so"):
        read_segments(paths)
    write_segments(tmp_path, {"both": 'include = ["nested", "b"]\n' + limit(1)})
    with pytest.raises(TrailvecError, match="in a cycle"):
        read_segments(paths)


def test_segments_are_exported_in_the_files_order_but_each_after_those_that_it_names(tmp_path: Path) -> None:
    asked = 'sql = "SELECT 1 AS user_id"\n'
    texts = {"staff": asked, "vip": asked + 'exclude = ["staff"]\n', "mass": asked, "all": 'include = ["b", "a"]\n'}
    paths = write_segments(tmp_path, texts | {"a": asked, "b": asked})
    names = [file.segment.name for file in read_segments(paths)]
    assert names == ["staff", "vip", "mass", "a", "b", "all"]


@pytest.mark.parametrize(("group", "refused"), [('control_group = "all"\n', True), ("", False)])
def test_a_control_group_has_one_share(tmp_path: Path, group: str, refused: bool) -> None:
    """Of two shares, the segment of the lower one would export some whom the other holds back."""
    asked = f'sql = "SELECT 1 AS user_id"\n{group}'
    shares = {"a": 0.1, "b": 0.1, "c": 0.2}
    paths = write_segments(tmp_path, {name: f"control_share = {share}\n{asked}" for name, share in shares.items()})
    if refused:
        said = (
            r"c\.toml and .*a\.toml share the control group all, but .* control_share is 0\.2, the other's 0\.1: give"
        )
        with pytest.raises(TrailvecError, match=said):
            read_segments(paths)
    else:
        assert len(read_segments(paths)) == 3


def test_two_segments_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "seeds.txt").write_text("ann\n")
    for name in ("a.toml", "b.toml"):
        (tmp_path / name).write_text(SEGMENT)
    with pytest.raises(TrailvecError, match="both set name = 'likes': rename one"):
        read_segments([str(tmp_path / name) for name in ("a.toml", "b.toml")])


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ("/somewhere", "/somewhere/", "both export to /somewhere: give"),
        ("/exports/b/../b", None, "both export to /exports/b: give"),
        ("s3://bucket/x/?region=r", "s3://bucket/x?region=r", r"both export to s3://bucket/x\?region=r: give"),
        (
            "/exports",
            None,
            r"b\.toml exports to /exports/b and \S*a\.toml to /exports, and one lies inside",
        ),
        ("s3://bucket/x/y?region=r", "s3://bucket/x?region=r", "one lies inside the other: give"),
        ("s3://bucket/x?region=r", "s3://bucket/xy?region=r", None),
        ("b", None, None),  # a folder b in the working directory, which is not under /exports
    ],
)
def test_two_segments_of_one_place(tmp_path: Path, one: str, other: str | None, message: str | None) -> None:
    (tmp_path / "seeds.txt").write_text("ann\n")
    for name, destination in {"a": one, "b": other}.items():
        line = "" if destination is None else f'\ndestination = "{destination}"'
        text = SEGMENT.replace('"likes"', f'"{name}"').replace("size = 4", f"size = 4{line}")
        (tmp_path / f"{name}.toml").write_text(text)
    files = read_segments([str(tmp_path / f"{name}.toml") for name in ("a", "b")])
    refused = nullcontext() if message is None else pytest.raises(TrailvecError, match=message)
    with refused:
        check_destinations(SimpleNamespace(exports=Path("/exports")), files)  # type: ignore[arg-type]


def test_the_segments_of_the_repository_are_some() -> None:
    (file,) = read_segments(["conf/segments/lookalike_demo.toml"])
    assert file.segment.size == 200
    assert file.segment.user_ids == "hashed"


def test_a_pattern_stands_for_all_segments_that_it_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_segments(tmp_path, dict.fromkeys("cab", "sql = \"SELECT 'ann' AS user_id\"\n"))
    (tmp_path / "b[1].toml").write_text((tmp_path / "b.toml").read_text().replace('"b"', '"b1"'))
    (tmp_path / ".b.toml").write_text("unfinished")

    def names(*paths: str) -> list[str]:
        return [file.segment.name for file in read_segments(list(paths))]

    assert names(f"{tmp_path}/*.toml") == ["a", "b", "b1", "c"]
    assert names(f"{tmp_path}/c.toml", f"{tmp_path}/?.toml", f"{tmp_path}/b[1].toml") == ["c", "a", "b", "b1"]
    with pytest.raises(TrailvecError, match=r"/z\*\.toml does not exist: correct the path"):
        names(f"{tmp_path}/z*.toml")
    monkeypatch.chdir(tmp_path)  # then trailvec's own
    assert set(names("conf/segments/*.toml")) >= {"lookalike_demo", "produce_fans"}


# ---- rules, all kinds of segments at once ---------------------------------------------------------------------------

COUNT = 300
SIZES = {"near": 40, "fond": 30, "rest": 25}


def write_segments(folder: Path, texts: dict[str, str]) -> list[str]:
    """Segment files with plain ids."""
    for name, text in texts.items():
        head = f'name = "{name}"\nowner = "o"\npurpose = "p"\nuser_ids = "plain"\napproved_by = "a"\n'
        (folder / f"{name}.toml").write_text(head + text)
    return [str(folder / f"{name}.toml") for name in texts]


def control_of(user: str, group: str, share: float) -> bool:
    return fast_hash(user, f"control\0{group}") / 2**64 < share


def fast_hash(user: str, purpose: str) -> int:
    digest = hmac.new(SECRET.encode(), purpose.encode(), hashlib.sha256).digest()
    value = siphash(base64.b64encode(digest)[:16], user.encode())
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # pandas applies SplitMix64's finaliser
        value = (value ^ value >> shift) * factor % 2**64
    return value ^ value >> 31


def siphash(key: bytes, text: bytes) -> int:
    """SipHash-2-4 as published by Aumasson and Bernstein (2012)."""
    word = 2**64 - 1
    halves = [int.from_bytes(key[start : start + 8], "little") for start in (0, 8)]
    begun = (0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573)
    v = [of ^ halves[n % 2] for n, of in enumerate(begun)]

    def turned(value: int, bits: int) -> int:
        return (value << bits | value >> (64 - bits)) & word

    def rounds(count: int) -> None:
        for _ in range(count):
            v[0], v[2] = (v[0] + v[1]) & word, (v[2] + v[3]) & word
            v[1], v[3] = turned(v[1], 13) ^ v[0], turned(v[3], 16) ^ v[2]
            v[0] = turned(v[0], 32)
            v[2], v[0] = (v[2] + v[1]) & word, (v[0] + v[3]) & word
            v[1], v[3] = turned(v[1], 17) ^ v[2], turned(v[3], 21) ^ v[0]
            v[2] = turned(v[2], 32)

    text += bytes(-(len(text) + 1) % 8) + bytes([len(text) % 256])
    for start in range(0, len(text), 8):
        m = int.from_bytes(text[start : start + 8], "little")
        v[3] ^= m
        rounds(2)
        v[0] ^= m
    v[2] ^= 0xFF
    rounds(4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def test_siphash_gives_what_its_paper_says() -> None:
    """The paper's test vector (appendix A) validates the oracle."""
    assert siphash(bytes(range(16)), bytes(range(15))) == 0xA129CA6149BE45E5


def test_the_order_of_hashed_ids_does_not_tell_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the ids, whoever knows that they are the numbers from 0 to 49 knows all of them."""
    monkeypatch.setenv(KEY, SECRET)
    ids = [f"{n:02d}" for n in range(50)]
    segment = Segment(name="all", owner="o", purpose="p", sql="SELECT user_id FROM user_embeddings", rows_per_file=20)
    files = write_parts(tmp_path, segment, pa.array(ids, pa.large_string()), None)
    found = [user for file in files for user in pq.read_table(tmp_path / file["name"])["user_id"].to_pylist()]
    assert found == [hashed(user) for user in sorted(ids, key=lambda user: fast_hash(user, "order\0all"))]
    # With scores, only those of equal ones move.
    scores = np.array([2.0] * 20 + [1.5] + [1.0] * 28 + [0.5], np.float32)
    (file, *_) = write_parts(tmp_path, segment.model_copy(update={"rows_per_file": 50}), pa.array(ids), scores)
    expected = sorted(range(50), key=lambda n: (-scores[n], fast_hash(ids[n], "order\0all")))
    assert pq.read_table(tmp_path / file["name"])["user_id"].to_pylist() == [hashed(ids[n]) for n in expected]


def test_the_order_of_hashed_ids_takes_few_bytes_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may have ten million members; as Python strings their ids would take 2 GB."""
    monkeypatch.setenv(KEY, SECRET)
    segment = Segment(name="all", owner="o", purpose="p", sql="SELECT user_id FROM user_embeddings")
    ids = pa.array([f"user-{n:010d}" for n in range(300_000)], pa.large_string())
    tracemalloc.start()
    try:
        segment_files._by_hash_where_tied(segment, ids, None)
        assert tracemalloc.get_traced_memory()[1] < 100 * len(ids)
    finally:
        tracemalloc.stop()


def best(scores: dict[str, float], size: int) -> list[str]:
    return sorted(scores, key=lambda user: (-scores[user], user))[:size]


def by_logistic_regression(seeds: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The direction of method `classifier`, by scikit-learn: standardised, both sides weigh a half, and a ridge of a
    third of the numbers per seed, less for numbers whose means differ by more than chance."""
    rows, counts = np.concatenate([seeds, others]), [len(seeds), len(others)]
    spread = rows.std(axis=0)
    apart = np.square((seeds.mean(axis=0) - others.mean(axis=0)) / spread)
    beyond = np.clip(apart - sum(1 / count for count in counts), 0, None)
    spread /= np.sqrt(1 + beyond / beyond.mean())
    weights = np.repeat([0.5 / count for count in counts], counts)
    regression = LogisticRegression(C=3 * len(seeds) / rows.shape[1], tol=1e-8)
    regression.fit((rows - rows.mean(axis=0)) / spread, np.repeat([1, 0], counts), sample_weight=weights)
    return np.asarray(regression.coef_[0] / spread)


def test_many_segments_in_one_pass_against_plain_python(
    make_runtime: Callable[..., Runtime],
    shop: Runtime,
    spark: SparkSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every kind of segment and rule at once; the score floors come from a small sample."""
    monkeypatch.setattr(segment_members, "_SAMPLE", 60)
    rng = np.random.default_rng(4)
    users = {f"ü{n:03d}": v.tolist() for n, v in enumerate(rng.normal(size=(COUNT, 6)).astype(np.float32))}
    users["ü000"] = [0.0] * 6
    items = {f"i{n}": v.tolist() for n, v in enumerate(rng.normal(size=(6, 6)).astype(np.float32))}
    names = list(users)
    seeds, suppressed = names[5:12], names[10:60]
    consents = [(user, n % 3 > 0, True) for n, user in enumerate(names[:280])] + [(names[20], False, True)]
    (tmp_path / "seeds.txt").write_text("\n".join([*seeds, "ghost"]), encoding="utf-8")
    (tmp_path / "suppressed.parquet").mkdir()  # as Spark writes Parquet
    for part in (0, 1):
        pq.write_table(pa.table({"user_id": suppressed[part::2]}), tmp_path / f"suppressed.parquet/{part}.parquet")
    with (tmp_path / "consent.csv").open("w", encoding="utf-8") as file:
        file.write("user_id,email,push\n")
        file.writelines(f"{user},{str(email).lower()},{str(push).lower()}\n" for user, email, push in consents)
    rules = 'consent = "email"\nsuppress = [{ file = "suppressed.parquet" }]\n'
    of_seeds = 'seeds = { file = "seeds.txt", method = "nearest_seed" }\n'
    held, of_all = "control_share = 0.25\n", 'control_group = "all"\n'
    paths = write_segments(
        tmp_path,
        {
            "rest": 'size = 25\nexclude = ["near", "fond"]\n' + of_seeds,
            "near": f"size = 40\n{rules}{held}{of_seeds}",
            "fond": f'size = 30\n{held}{of_all}{rules}affinity = {{ items = ["i0", "i4"] }}\n',
            "fruit": 'threshold = 2.5\naffinity = { vertical = "FRUIT" }\n',
            "asked": "sql = \"SELECT user_id FROM user_embeddings WHERE user_id < 'ü050' UNION SELECT 'nobody'\"\n"
            + rules,
            "both": 'include = ["asked", "fond"]\nconsent = "push"\nexclude = ["near"]\n',
            "sweet": 'size = 20\nformat = "csv.gz"\naffinity = { vertical = "FRUIT", category = "SWEET" }\n',
            "middle": 'size = 20\nseeds = { file = "seeds.txt", method = "tastes", tastes = 1 }\n',
            "alike": 'size = 20\nseeds = { file = "seeds.txt" }\n',
        },
    )
    runtime = make_runtime(
        "storage.database=segments",
        f"export.segments={json.dumps(paths)}",
        f'export.consent={{ file = "{tmp_path / "consent.csv"}" }}',
    )
    put_users(runtime, users)
    put_item_vectors(runtime, items)
    now = datetime(2024, 1, 1, tzinfo=timezone.utc)
    kinds = [
        (n, f"i{n}", None, category, "FRUIT" if n in (1, 2) else "OTHER", 1.0, now, 1, 1, 1, (None,) * 4)
        for n, category in enumerate((None, "SOUR", "SWEET", None, None, "SWEET"))
    ]
    put(runtime, ITEMS, spark.createDataFrame(kinds, ITEMS.schema()))
    visits = [
        (user, user, now, now, 1, ["FRUIT", "TOYS"] if n < 60 else ["TOYS"], None, [], now)
        for n, user in enumerate(names)
    ]
    put(runtime, SESSIONS, spark.createDataFrame(visits, SESSIONS.schema()))
    sample = segment_members.Selection._seeds_and_sample
    with (
        patch.object(segment_rules, "read_users", wraps=read_users) as reads,
        patch.object(segment_members, "candidates", wraps=candidates) as passes,
        patch.object(segment_members.Selection, "_seeds_and_sample", autospec=True, side_effect=sample) as samples,
    ):
        report = runtime.execute(STAGE)
    assert sorted(call.args[1].file for call in reads.call_args_list) == ["seeds.txt", "suppressed.parquet"]
    # Two reads of the vectors for all segments with a score, and one more for each whose floor was too high.
    assert samples.call_count == 1
    first, *again = (len(call.args[1]) for call in passes.call_args_list)
    assert (first, set(again)) in ((7, set()), (7, {1}))
    made = bytes_of(runtime.exports)
    with spark_conf(spark, {"spark.sql.shuffle.partitions": "3"}):
        runtime.execute(STAGE, force=True)
    assert bytes_of(runtime.exports) == made

    def highest(user: str, anchors: Sequence[Sequence[float] | np.ndarray], cosine: bool) -> float:
        a, b = np.array(users[user]), np.array(anchors)
        lengths = np.linalg.norm(a) * np.linalg.norm(b, axis=1) if cosine else 1.0
        return float(np.max(b @ a / lengths))

    agreed = {user for user, email, _ in consents if email} - {names[20]}
    allowed = [user for user in names[1:] if user in agreed and user not in suppressed]
    likeness = {user: highest(user, [users[s] for s in seeds], True) for user in names[1:] if user not in seeds}
    near = best({user: likeness[user] for user in allowed if user in likeness}, 40)
    fond = best({user: highest(user, [items["i0"], items["i4"]], False) for user in allowed}, 30)
    rest = best({user: score for user, score in likeness.items() if user not in near + fond}, 25)
    fruit = {user: highest(user, [items["i1"], items["i2"]], False) for user in names[1:]}
    fruit = {user: score for user, score in fruit.items() if score >= 2.5}
    sweet = {user: highest(user, [items["i2"]], False) for user in names[1:]}
    unit = {user: np.array(users[user]) / np.linalg.norm(users[user]) for user in names[1:]}
    # One taste is the mean. The classifier's other users are the sample: one user in 300 / 60.
    mean = np.mean([unit[user] for user in seeds], axis=0)
    ids = spark.createDataFrame([(user,) for user in likeness], "user_id string")
    others = [row.user_id for row in ids.where("pmod(xxhash64(user_id), 5) = 0").collect()]
    direction = by_logistic_regression(*(np.stack([unit[user] for user in of]) for of in (seeds, others)))
    middle, alike = ({user: highest(user, [to], True) for user in likeness} for to in (mean, direction))
    asked = [user for user in names if user < "ü050" and user in agreed and user not in suppressed]
    pushed = {user for user, _, push in consents if push}
    both = sorted(user for user in {*asked, *fond} & pushed if user not in near)
    expected = {
        "near": [user for user in near if not control_of(user, "near", 0.25)],
        "fond": [user for user in fond if not control_of(user, "all", 0.25)],
        "rest": rest,
        "fruit": best(fruit, 1000),
        "asked": asked,
        "both": both,
        "sweet": best(sweet, 20),
        "middle": best(middle, 20),
        "alike": best(alike, 20),
    }
    assert 0 < len(fruit) < 100
    assert report.rows_out == {name: len(members) for name, members in expected.items()}
    for name, members in expected.items():
        rows = read(runtime, name)[1]
        ids = [row[0] for row in rows[1:]] if name == "sweet" else [row["user_id"] for row in rows]
        assert ids == members, name
    manifest, rows = read(runtime, "near")
    assert [row["score"] for row in rows] == pytest.approx([likeness[row["user_id"]] for row in rows], rel=1e-6)
    assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
    assert manifest["counts"]["control"] == 40 - len(rows) > 0
    assert sum(manifest["score"]["histogram"]["counts"]) == len(rows)  # of those in the files alone
    others = [user for user in names if user not in seeds]
    assert removed(manifest) == {
        "seed": 7,
        "no consent to email": sum(user not in agreed for user in others),
        "suppressed by suppressed.parquet": sum(user in agreed and user in suppressed for user in others),
        "after the best 40": len([user for user in allowed if user in likeness]) - 40,
    }
    met = likeness[rest[-1]]
    assert removed(read(runtime, "rest")[0]) == {
        "seed": 7,
        "member of near, fond": sum(score >= met for user, score in likeness.items() if user in near + fond),
        "after the best 25": COUNT
        - 7
        - 25
        - sum(score >= met for user, score in likeness.items() if user in near + fond),
    }
    assert removed(read(runtime, "both")[0])["no consent to push"] == len({*asked, *fond} - pushed)
    counts = read(runtime, "asked")[0]["counts"]
    assert (counts["in"], counts["removed"][0]) == (51, {"rule": "no vector", "users": 1})  # nobody

    page = (runtime.exports / "asked" / "report.html").read_text()
    share = len({*asked} & {*both}) / len(asked)
    assert f'<td>both<td class="n">{share:.1%}' in page
    assert '<td>FRUIT<td class="n">100.0%<td class="n">20.0%' in page  # all its members are among the first 60
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")

    # One segment is requested again: the others stay, and it still knows their members. A segment whose log holds
    # somebody that other code selected is exported again.
    other = next(user for user in names if user in pushed and user not in {*near, *fond, *asked})
    log = runtime.latest(EXPORTS)
    of_fond = log.where("segment = 'fond'").limit(1).withColumn("user_id", F.lit(other))
    put(runtime, EXPORTS, log.unionByName(of_fond).localCheckpoint())
    (tmp_path / "both.toml").write_text((tmp_path / "both.toml").read_text() + 'columns = ["user_id"]\n')
    before = {name: (runtime.exports / name / "manifest.json").stat().st_mtime_ns for name in expected}
    runtime.execute(STAGE)
    after = {name: (runtime.exports / name / "manifest.json").stat().st_mtime_ns for name in expected}
    assert [name for name in expected if before[name] != after[name]] == ["fond", "both"]
    assert [row["user_id"] for row in read(runtime, "both")[1]] == both


def test_profiles_say_who_is_alike_where_the_model_has_some(
    make_runtime: Callable[..., Runtime],
    shop: Runtime,
    spark: SparkSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Segment `likes` leaves the vectors open, `asked` asks for embeddings."""
    (tmp_path / "asked.toml").write_text(SEGMENT.replace("likes", "asked") + 'vectors = "embedding"')
    both = [str(tmp_path / f"{name}.toml") for name in ("likes", "asked")]
    shop = make_runtime("storage.database=segments", f"export.segments={json.dumps(both)}")
    names = {hashed(user): user for user in USERS}

    def exported() -> tuple[list[str], dict[str, tuple[str, list[str]]]]:
        """The notes on profiles; the vectors and the members by segment."""
        report, found = shop.execute(STAGE), {}
        for name in ("likes", "asked"):
            manifest, rows = read(shop, name)
            found[name] = manifest["vectors"], [names[row["user_id"]] for row in rows]
        return [note for note in report.notes if "user_profiles" in note], found

    def fill_profiles(version: str, as_of: datetime) -> None:
        seeds = {seed: [1.0, 0.0, 0.0] for seed in ("ann", "amy", "bob")}
        others = {"cat": [0.0, 1.0, 0.0], "dan": [0.0, 0.0, 1.0], "eve": [2.0, 1.0, 0.0], "far": [3.0, 0.0, 0.0]}
        gone = {"bot": [4.0, 0.0, 0.0], "ada": [1.0, 0.0, 0.0]}  # had profiles, but no longer have vectors
        everyone = seeds | others | gone  # none for eva and nil
        rows = [(user, version, as_of, vector) for user, vector in everyone.items()]
        put(shop, USER_PROFILES, spark.createDataFrame(rows, USER_PROFILES.schema()))

    by_embedding = {name: ("embedding", [user for user, _ in best_four(name)]) for name in ("likes", "asked")}
    now = datetime(2024, 1, 1, 0, 0, 0, 1, tzinfo=timezone.utc)  # the newest event was at midnight
    fill_profiles("m0", now)
    (note,), found = exported()
    assert found == by_embedding
    assert note.startswith("user_profiles has no row of model m1, so users are compared by user_embeddings")
    assert "in likes: run" in note
    assert "run `trailvec profile_users --set model.version=m1`" in note
    (tmp_path / "likes.toml").write_text(f'{SEGMENT}vectors = "profile"')
    with pytest.raises(TrailvecError, match=r"user_profiles, which has no row of model m1: run .*version=m1` first"):
        shop.execute(STAGE)
    (tmp_path / "likes.toml").write_text(SEGMENT)
    fill_profiles("m1", now)
    with (tmp_path / "seeds.txt").open("a", encoding="utf-8") as seeds:
        seeds.write("ada\n")
    pending = export_segments._pending

    def of_a_changed_table(*given: Any) -> Any:
        DeltaTable(shop.path(USER_PROFILES)).delete("user_id = 'far'")  # after the export's id has been made
        return pending(*given)

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(export_segments, "_pending", of_a_changed_table)
        (note,), found = exported()
    assert found == by_embedding | {"likes": ("profile", ["far", "eve", "cat", "dan"])}
    assert note.startswith(f"2 of {len(USERS)} users have no row in user_profiles (new since profile_users last ran), ")
    assert "run `trailvec profile_users --set model.version=m1`" in note
    assert "so likes can't contain them: run" in note
    manifest, _ = read(shop)
    counts = manifest["counts"]
    assert manifest["as_of"] == "2024-01-01T00:00:00.000001Z"  # the profiles'
    assert (counts["seeds"]["known"], counts["seeds"]["used"]) == (3, 3)
    assert counts["in"] == len(USERS) == counts["exported"] + sum(removed(manifest).values())
    of_embeddings = datetime(2017, 12, 1, tzinfo=timezone.utc)
    assert read(shop, "asked")[0]["as_of"] == "2017-12-01T00:00:00.000000Z"

    fill_profiles("m1", of_embeddings - timedelta(days=30))
    (_, note), _ = exported()
    assert note.startswith(
        "user_profiles knows nothing of the last 30 days (profile_users last ran at the log's end of 2017-11-01), "
    )
    assert "so likes may miss users who have changed: run" in note
    selection: Any = SimpleNamespace(_runtime=shop, version="m1", pending=[], everyone=SimpleNamespace(total=9))
    for day, notes in ((23, 1), (24, 0)):  # eight days before the embeddings, and seven
        shop.report.notes.clear()
        as_of = {"embedding": "2017-12-01T00:00:00.000000Z", "profile": f"2017-11-{day}T00:00:00.000000Z"}
        segment_members.Selection.note_old_profiles(selection, as_of)
        assert len(shop.report.notes) == notes


def test_a_floor_that_was_too_high_is_lowered(shop: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    floors = iter([0.99, 0.9, -np.inf])
    monkeypatch.setattr(segment_members.Selection, "_floor", lambda *_: next(floors))
    taken: list[segment_members.Taken] = []
    select = segment_members.Selection.select
    monkeypatch.setattr(segment_members.Selection, "select", lambda s: (select(s), taken.extend(s.taken.values())))
    shop.execute(STAGE)
    rows = read(shop)[1]
    assert [(row["user_id"], row["rank"]) for row in rows] == [
        (hashed(user), n) for n, (user, _) in enumerate(best_four(), 1)
    ]
    assert [row["score"] for row in rows] == pytest.approx([score for _, score in best_four()], rel=1e-6)
    assert next(floors, None) is None
    assert [one.ids.type for one in taken] == [pa.large_string()]  # so that more than 2 GiB of ids fit


def test_a_floor_goes_below_all_whom_another_segment_may_take() -> None:
    """How many users a segment without a size takes is not known in advance."""
    tried: list[int] = []
    selection = Mock(spec=segment_members.Selection, _work={0: SimpleNamespace()}, **{"_needed.return_value": 4})
    selection._walk.side_effect = [None, None, "taken"]
    selection.members.return_value = range(900)
    selection._floor.side_effect = lambda _, wanted: tried.append(wanted)
    segment = SimpleNamespace(include=(), exclude=("a", "b"), size=4)
    export: Any = SimpleNamespace(number=0, segment=segment)
    assert segment_members.Selection._take(selection, export) == "taken"
    assert tried == [1804, 7216]


def test_a_floor_goes_by_those_who_have_the_vectors_compared() -> None:
    """Mark 0: a vector, 1: a profile. Of 1,000 users half have a profile, and all of these are in the sample."""
    everyone = Combinations(Marked(np.array([[1], [3]])), np.array([500, 500]))
    scores = np.arange(500, 0, -1, dtype=np.float32)
    of_kind = {"embedding": everyone, "profile": everyone.of(1)}
    work = SimpleNamespace(sample=scores, rules=Rules(0, (), None, (), ()))
    selection: Any = SimpleNamespace(_work={0: work}, _with=of_kind)
    export: Any = SimpleNamespace(number=0, vectors="profile", segment=SimpleNamespace(threshold=None))
    floor = segment_members.Selection._floor(selection, export, 200)
    assert 200 < (scores >= floor).sum() < 300


def test_the_log_of_more_members_than_an_array_of_texts_holds() -> None:
    texts = export_segments._repeated("0123456789abcdef" * 2, 70_000_000)
    assert texts[69_999_999].as_py() == "0123456789abcdef" * 2


def test_of_many_seeds_some_stand_for_all(
    make_runtime: Callable[..., Runtime],
    shop: Runtime,
    spark: SparkSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which seeds are drawn depends only on their ids; all are counted, and none is exported."""
    monkeypatch.setattr(segment_members, "_SEEDS", 7)
    seeds = {f"s{n:02}": [float(np.cos(n / 9)), float(np.sin(n / 9))] for n in range(12)}
    ids = ", ".join(f"('{user}')" for user in seeds)
    one_in_two = spark.sql(f"SELECT id FROM VALUES {ids} AS t(id) WHERE pmod(xxhash64(id), 2) = 0").collect()
    drawn = sorted(row.id for row in one_in_two)
    assert 1 < len(drawn) < 11
    cold = {drawn[0], min(seeds.keys() - drawn)}
    put_users(shop, USERS | seeds, cold=cold)

    ghosts = [f"ghost{n}" for n in range(40)]
    (tmp_path / "seeds.txt").write_text("\n".join([*seeds, *ghosts]))  # 12 are known, half of which are drawn
    (tmp_path / "likes.toml").write_text(SEGMENT.replace("size = 4", "size = 8"))
    # All seeds of the other segment are drawn: they are among the rows looked up.
    (tmp_path / "few.txt").write_text("\n".join(list(seeds)[:5]))
    (tmp_path / "few.toml").write_text(SEGMENT.replace("likes", "few").replace("seeds.txt", "few.txt"))
    both = [str(tmp_path / name) for name in ("likes.toml", "few.toml")]
    make_runtime("storage.database=segments", f"export.segments={json.dumps(both)}").execute(STAGE)
    manifest, rows = read(shop)

    assert manifest["counts"]["seeds"] == {"given": 52, "known": 12, "unknown": 40, "cold": 2, "used": len(drawn) - 1}
    assert read(shop, "few")[0]["counts"]["seeds"]["used"] == len(set(list(seeds)[:5]) - cold)
    assert removed(manifest)["seed"] == 12
    unit = {user: np.array(vector) / np.linalg.norm(vector) for user, vector in USERS.items() if any(vector)}
    best = {user: max(float(of @ seeds[seed]) for seed in drawn[1:]) for user, of in unit.items()}
    assert {row["user_id"]: row["score"] for row in rows} == pytest.approx({hashed(u): s for u, s in best.items()})


def test_how_often_a_user_is_exported(shop: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most twice in three days, counting the log and the run's own segments; the control group received nothing.

    On day 1, ann and cat were in a segment that is gone.
    """
    asked = {"a": ["ann", "bob", "cat", "nil"], "b": ["ann"], "c": ["ann", "bob", "cat", "nil"]}
    held_back = [user for user in asked["a"] if control_of(user, "n", 0.3)]
    assert len(held_back) == 1
    query = "SELECT user_id FROM user_embeddings WHERE user_id IN ('{}')"
    texts = {name: f'sql = "{query}"\n'.format("', '".join(users)) for name, users in asked.items()}
    limit = "at_most = { exports = 2, days = 3 }\n"
    paths = write_segments(
        tmp_path,
        {
            "a": 'control_share = 0.3\ncontrol_group = "n"\n' + texts["a"],
            "b": limit + texts["b"],
            "c": limit + texts["c"],
            "amy": 'size = 1\nexclude = ["a"]\naffinity = { items = ["i1"] }\n',
        },
    )
    settings = [f'storage.root="{shop.root}"', "storage.database=segments"]
    count, embeddings = segment_members.Selection._count, DeltaTable(shop.path(USER_EMBEDDINGS))

    def counting(*given: Any) -> None:
        count(*given)
        embeddings.delete("user_id = 'cat'")

    got = [("ann", 1), ("cat", 1)]  # (user, day) of each export
    first = [("x", "gone", user, False, datetime(2024, 3, 1, tzinfo=timezone.utc), "m1", "") for user, _ in got]
    put(shop, EXPORTS, shop.spark.createDataFrame(first, EXPORTS.schema()))
    for day in (2, 4):
        now = datetime(2024, 3, day, 23, tzinfo=timezone.utc)
        monkeypatch.setattr(export_segments, "_now", lambda now=now: now)
        of_day = paths[:3]
        if day == 4:  # another program changes the table between the two uses of what the queries return
            of_day = paths
            monkeypatch.setattr(segment_members.Selection, "_count", counting)
            got.append(("amy", day))
        runtime = Runtime(load_config(None, [*settings, f"export.segments={json.dumps(of_day)}"]), shop.spark)
        runtime.execute(STAGE)
        for name, users in asked.items():
            if name == "a":  # it has no limit per days: after its first day it is up to date
                got += [(user, day) for user in users if user not in held_back and day == 2]
            else:
                sent = [user for user in users if sum(u == user and at > day - 3 for u, at in got) < 2]
                got += [(user, day) for user in sent]
                manifest, rows = read(runtime, name)
                assert [row["user_id"] for row in rows] == sent, (day, name)
                assert removed(manifest) == {"no vector": 0, "exported 2 times in 3 days": len(users) - len(sent)}
    logged = read_delta(shop.root / "tables" / "exports")
    assert sorted((r["user_id"], r["exported_at"].day) for r in logged if not r["is_control"]) == sorted(got)
    assert [r["user_id"] for r in logged if r["is_control"]] == held_back


def test_who_is_held_back_leaves_as_often_as_who_is_exported(
    shop: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log of days 1 to 6, seen on day 7, on which y is exported before a. x and y hold nobody back."""
    histories: dict[str, tuple[list[tuple[str, int]], bool]] = {  # in the log (segment, day); whether they are left out
        "new": ([], False),
        "days ago": ([("a", 1), ("x", 4), ("a", 4)], False),
        "once": ([("a", 5)], False),
        "twice": ([("a", 5), ("a", 6)], True),
        "once by x": ([("a", 5), ("x", 6)], True),
        "once and by y": ([("a", 5)], True),
    }
    # Of each history two users, of whom a's control group has the second.
    numbers = {of: [f"{of} {n}" for n in range(99)] for of in histories}
    users = {
        of: [next(user for user in some if control_of(user, "n", 0.3) is held) for held in (False, True)]
        for of, some in numbers.items()
    }
    log = [
        (f"{by}{day}", by, user, bool(n) and by == "a", datetime(2024, 3, day, tzinfo=timezone.utc), "m1", "/exports")
        for of, (logged, _) in histories.items()
        for by, day in logged
        for n, user in enumerate(users[of])
    ]
    put_users(shop, {user: [1.0, 0.0] for pair in users.values() for user in pair})
    put(shop, EXPORTS, shop.spark.createDataFrame(log, EXPORTS.schema()))
    query = "sql = \"SELECT user_id FROM user_embeddings WHERE user_id LIKE '{}%'\"\n".format
    limit = 'at_most = { exports = 2, days = 3 }\ncontrol_share = 0.3\ncontrol_group = "n"\n'
    paths = write_segments(tmp_path, {"y": query("once and by y"), "a": limit + query("")})
    monkeypatch.setattr(export_segments, "_now", lambda: datetime(2024, 3, 7, 23, tzinfo=timezone.utc))
    settings = [f'storage.root="{shop.root}"', "storage.database=segments", f"export.segments={json.dumps(paths)}"]
    runtime = Runtime(load_config(None, settings), shop.spark)
    runtime.execute(STAGE)
    manifest, rows = read(runtime, "a")
    stay = [of for of, (_, out) in histories.items() if not out]
    assert [row["user_id"] for row in rows] == sorted(users[of][0] for of in stay)
    today = [r for r in read_delta(shop.path(EXPORTS)) if r["segment"] == "a" and r["exported_at"].day == 7]
    assert sorted(r["user_id"] for r in today if r["is_control"]) == sorted(users[of][1] for of in stay)
    assert removed(manifest) == {
        "no vector": 0,
        "exported 2 times in 3 days": 3,
        "exported or held back 2 times in 3 days": 3,
    }


def test_whoever_a_shared_control_group_holds_back_leaves_its_other_segments(
    shop: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All want the same users; who was held back counts as exported for that group alone, in this run and later."""
    users = [f"u{n:02d}" for n in range(99)]
    put_users(shop, {user: [1.0, float(n)] for n, user in enumerate(users)})
    put_item_vectors(shop, {"i1": [0.0, -1.0]})  # the first users' scores are highest
    groups = {"one": "all", "two": "all", "all": None, "own": None, "more": "all"}  # None: named after the segment
    limits = {"one": 1, "two": 1, "all": 1, "own": 2, "more": 2}
    texts = {
        name: 'size = 9\naffinity = { items = ["i1"] }\ncontrol_share = 0.4\n'
        + f"at_most = {{ exports = {limits[name]}, days = 3 }}\n"
        + (f'control_group = "{group}"\n' if group else "")
        for name, group in groups.items()
    }
    paths = dict(zip(texts, write_segments(tmp_path, texts), strict=True))
    exported: Counter[str] = Counter()
    held: Counter[tuple[str, str]] = Counter()
    for day, names in ((1, ("one", "two", "own", "more")), (2, ("two", "one", "all", "more", "own"))):
        now = datetime(2024, 3, day, 23, tzinfo=timezone.utc)
        monkeypatch.setattr(export_segments, "_now", lambda now=now: now)
        asked = f"export.segments={json.dumps([paths[name] for name in names])}"
        settings = [f'storage.root="{shop.root}"', "storage.database=segments", asked]
        runtime = Runtime(load_config(None, settings), shop.spark)
        runtime.execute(STAGE)
        logged = [r for r in read_delta(shop.root / "tables" / "exports") if r["exported_at"].day == day]
        for name in names:
            group = groups[name] or name
            taken = [user for user in users if exported[user] + held[group, user] < limits[name]][:9]
            control = [user for user in taken if control_of(user, group, 0.4)]
            found = sorted((r["user_id"], r["is_control"]) for r in logged if r["segment"] == name)
            assert found == [(user, user in control) for user in taken], (day, name)
            out = removed(read(runtime, name)[0])
            by_exports = sum(exported[user] >= limits[name] for user in users[: users.index(taken[-1])])
            assert sum(out.values()) == len(users) - 9
            assert out[f"exported {limits[name]} times in 3 days"] == by_exports, (day, name)
            exported.update(set(taken) - set(control))
            held.update((group, user) for user in control)


def test_of_very_many_items_those_that_most_acted_on_make_an_affinity(
    make_runtime: Callable[..., Runtime],
    shop: Runtime,
    spark: SparkSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segment_members, "_ITEMS", 2)
    fruit, named = 'affinity = { vertical = "FRUIT" }\n', 'affinity = { items = ["i0", "I3", "i3"] }\n'
    query = "SELECT user_id FROM user_embeddings WHERE as_of > DATE('31.10.2011') UNION SELECT 'ghost'"
    nobody = f'consent = "push"\nsql = "{query}"\n'
    texts = {"fruit": f"size = 3\n{fruit}", "named": f"size = 3\n{named}", "nobody": nobody}
    paths = write_segments(tmp_path, texts)
    consent = "export.consent={ sql = \"SELECT 'ann' AS user_id, DATE('x') < DATE('y') AS push\" }"
    runtime = make_runtime("storage.database=segments", f"export.segments={json.dumps(paths)}", consent)
    users = {"ann": [1.0, 0.0, 0.0], "bob": [0.0, 1.0, 0.0], "cat": [0.0, 0.0, 1.0]}
    items = {"i0": [5.0, 0.0, 0.0], "i1": [0.0, 4.0, 0.0], "i2": [0.0, 0.0, 3.0], "i3": [0.0, 0.0, 6.0]}
    put_users(runtime, users)
    put_item_vectors(runtime, items)
    now = datetime(2024, 1, 1, tzinfo=timezone.utc)
    counts = {"i0": 1, "i1": 9, "i2": 7, "i3": 99}
    kinds = [
        (n, item, None, None, "TOYS" if item == "i3" else "FRUIT", 1.0, now, counts[item], 1, 1, (None,) * 4)
        for n, item in enumerate(items)
    ]
    put(runtime, ITEMS, spark.createDataFrame(kinds, ITEMS.schema()))
    pending = export_segments._pending

    def of_changed_tables(*given: Any) -> Any:
        for table in (ITEMS, ITEM_EMBEDDINGS):  # after the exports' ids have been made
            DeltaTable(runtime.path(table)).delete("item_id = 'i1'")
        return pending(*given)

    monkeypatch.setattr(export_segments, "_pending", of_changed_tables)
    no_date = "(a date that Spark can't parse is NULL)"
    assert runtime.execute(STAGE).notes == [
        f"{paths[2]}: no consent to push from any user, so nobody is exported {no_date}",
        f"{paths[2]}: its sql returns no user with a vector {no_date}",
        f"{paths[1]}: 1 of the 3 items of its affinity have no vector of model m1 (I3); are their ids written as in "
        f"the events?",
    ]
    manifest, rows = read(runtime, "fruit")
    assert [row["user_id"] for row in rows] == ["bob", "cat", "ann"]  # few users acted on i0
    assert manifest["counts"]["items"] == {"named": 3, "used": 2}
    manifest, rows = read(runtime, "named")
    assert [row["user_id"] for row in rows] == ["cat", "ann", "bob"]
    assert manifest["counts"]["items"] == {"named": 3, "used": 2}

    for names, message in (
        ('vertical = "Toys"', r"no item is in vertical 'Toys' \(the nearest names: 'TOYS', 'FRUIT'\): correct it"),
        ('vertical = "TOYS", category = "x"', r"no item of vertical 'TOYS' is in category 'x' \(the nearest .* none\)"),
    ):
        write_segments(tmp_path, {"fruit": f"size = 3\naffinity = {{ {names} }}\n"})
        (file,) = read_segments(paths[:1])
        selection: Any = SimpleNamespace(_runtime=runtime, version="m1", _work={})
        with pytest.raises(TrailvecError, match=message):
            segment_members.Selection._item_anchors(selection, [Export(0, *file, "embedding", "x")])


def test_an_earlier_export_counts_where_it_is_made_again(
    shop: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeated because its files were moved away once loaded, or by --force: counted once, both before and after the
    limited exports.
    """
    query = "sql = \"SELECT user_id FROM user_embeddings WHERE user_id IN ('ann', 'bob')\"\n"
    limits = {name: f"at_most = {{ exports = {n}, days = 30 }}\n" for name, n in (("b", 1), ("d", 2))}
    b, a, d = write_segments(tmp_path, {"b": limits["b"] + query, "a": query, "d": limits["d"] + query})
    cat, dan, both = (query.replace("'ann', 'bob'", users) for users in ("'cat'", "'dan'", "'cat', 'dan'"))
    others = {"e": cat, "f": limits["b"] + both, "g": both, "new": dan}
    e, f, g, new = write_segments(tmp_path, others)

    def run(day: int, hour: int, paths: list[str], force: bool = False) -> Runtime:
        now = datetime(2024, 3, day, hour, tzinfo=timezone.utc)
        monkeypatch.setattr(export_segments, "_now", lambda: now)
        settings = [f"export.segments={json.dumps(paths)}", "storage.database=segments"]
        runtime = Runtime(load_config(None, [f'storage.root="{shop.root}"', *settings]), shop.spark)
        runtime.execute(STAGE, force=force)
        return runtime

    runtime = run(1, 4, [a])
    shutil.rmtree(runtime.exports / "a")
    runtime = run(5, 4, [b, a, d, e, f, g])
    assert read(runtime, "b")[1] == []
    assert len(read(runtime, "a")[1]) == 2
    assert len(read(runtime, "d")[1]) == 2  # each user had one export
    assert [row["user_id"] for row in read(runtime, "f")[1]] == ["dan"]  # e took cat
    # Repeated on its day, a limited export is unchanged: later exports, in that run or since, do not matter. The same
    # holds for one (d) that should only look otherwise.
    with Path(d).open("a") as file:
        file.write('format = "csv.gz"\n')
    for name in "abf":
        shutil.rmtree(runtime.exports / name)
    for hour, force in ((5, False), (6, True)):
        runtime = run(5, hour, [new, b, a, d, e, f, g], force)
        assert [len(read(runtime, name)[1]) for name in "ba"] == [0, 2]
        assert read(runtime, "d")[1] == [["user_id"], ["ann"], ["bob"]]
        assert [row["user_id"] for row in read(runtime, "f")[1]] == ["dan"]
    assert len(read_delta(shop.root / "tables" / "exports")) == 9


def test_csv_for_spreadsheets(tmp_path: Path) -> None:
    begins = "=+-@\t\r\n\0\uff1d\uff0b\uff0d\uff20"  # the last four: fullwidth
    ids = [*(f"{first}1+1" for first in begins), 'say "hi", you', "line\nbreak", "naïve ☕", "plain", "a=b"]
    form = {"format": "csv.gz", "rows_per_file": 9, "user_ids": "plain", "approved_by": "a"}
    scored = {"name": "all", "owner": "o", "purpose": "p", "affinity": {"items": ["i1"]}, "size": 100}
    segment = Segment.model_validate(scored | form)
    scores = 1 - np.arange(len(ids), dtype=np.float32) / 32
    parts = write_parts(tmp_path, segment, pa.array(ids, pa.large_string()), scores)
    assert [part["name"] for part in parts] == ["part-00000.csv.gz", "part-00001.csv.gz"]
    rows = [row for part in parts for row in csv_rows(tmp_path / part["name"])]
    shown = [f"'{user}" if user[0] in begins else user for user in ids]
    assert [row[0] for row in rows] == ["user_id", *shown[:9], "user_id", *shown[9:]]
    assert rows[2][1:] == ["0.96875", "2"]
    for part in parts:
        assert (tmp_path / part["name"]).read_bytes()[3:8] == bytes(5)  # gzip stores no name and no time


def test_each_format_has_a_writer_and_files_that_are_known_again(tmp_path: Path) -> None:
    assert set(WRITERS) == set(get_args(Format))
    for name, write in WRITERS.items():
        for number in ("00000", "100000"):
            write(pa.table({"user_id": ["ann"]}), tmp_path / f"part-{number}.{name}")
        one, other = (tmp_path / f"part-{number}.{name}" for number in ("00000", "100000"))
        assert one.read_bytes() == other.read_bytes()
    (tmp_path / "manifest.json").touch()
    (tmp_path / "report.html").touch()
    check_place(ArrowFolder(LocalFileSystem(), str(tmp_path), local=True))


def test_where_it_goes(shop: Runtime, tmp_path: Path) -> None:
    place = tmp_path / "bucket" / "likes"
    for name, user in {"strangers": "ann.0", "known": "far"}.items():
        (tmp_path / f"{name}.txt").write_text(user)
    queried = "{ sql = \"SELECT 'ann' AS user_id WHERE false\", may_be_empty = true }"
    lists = f'suppress = [{{ file = "strangers.txt" }}, {{ file = "known.txt" }}, {queried}]'
    (tmp_path / "likes.toml").write_text(
        SEGMENT.replace("size = 4", f'size = 4\n{lists}\ndestination = "file://{place}"')
    )
    place.mkdir(parents=True)
    (place / "manifest.json").write_text("{}")
    (place / "part-00007.parquet").write_text("of a longer export")
    assert shop.execute(STAGE).notes == [
        "user_profiles has no row of model m1, so users are compared by user_embeddings, which finds fewer of the "
        "users sought, in likes: run `trailvec profile_users --set model.version=m1`, then `trailvec export_segments` "
        "again, or set seeds.vectors",
        "suppressed by strangers.txt: none of its 1 users has a vector, so it leaves nobody out; are its ids "
        "written as in the events?",
    ]
    assert len(read(shop, folder=place)[1]) == 4
    assert {row["destination"] for row in read_delta(shop.root / "tables" / "exports")} == {str(place)}
    assert shop.execute(STAGE).skipped

    def logged() -> int:
        return len(read_delta(shop.root / "tables" / "exports"))

    before = logged()
    (place / "holiday.jpg").write_text("precious")
    (tmp_path / "likes.toml").write_text(SEGMENT.replace("size = 4", f'size = 3\ndestination = "{place}"'))
    with pytest.raises(
        TrailvecError, match=r"likes holds holiday.jpg, which no export wrote: give the segment a folder"
    ):
        shop.execute(STAGE)
    assert (place / "holiday.jpg").exists()
    below = tmp_path / "seeds.txt" / "likes"  # no folder can be created there
    (tmp_path / "likes.toml").write_text(SEGMENT.replace("size = 4", f'size = 3\ndestination = "{below}"'))
    with pytest.raises(TrailvecError, match=r"seeds\.txt/likes can't be read or written .*: correct the segment's"):
        shop.execute(STAGE)
    assert logged() == before  # users whose export failed are not logged


@pytest.mark.parametrize(
    "text", [b"[]", b"none", b"\xff", b'{"export_id": "x"}', b'{"export_id": "x", "provenance": 1}']
)
def test_a_damaged_manifest_is_no_export(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "seeds.txt").touch()
    (tmp_path / "likes.toml").write_text(SEGMENT)
    (file,) = read_segments([str(tmp_path / "likes.toml")])
    (tmp_path / "likes").mkdir()
    manifest = tmp_path / "likes" / "manifest.json"
    manifest.write_bytes(text)
    runtime: Any = SimpleNamespace(exports=tmp_path)
    assert _published(runtime, Export(0, *file, "embedding", "x")) is None
    manifest.unlink()
    manifest.mkdir()
    with pytest.raises(TrailvecError, match="likes can't be read or written"):
        _published(runtime, Export(0, *file, "embedding", "x"))


def test_what_is_refused_of_lists(shop: Runtime, spark: SparkSession, tmp_path: Path) -> None:
    def refused(line: str, message: str, *settings: str) -> None:
        (tmp_path / "likes.toml").write_text(SEGMENT.replace("size = 4", f"size = 4\n{line}"))
        sets = [
            f'storage.root="{shop.root}"',
            f'export.segments=["{tmp_path / "likes.toml"}"]',
            "storage.database=segments",
        ]
        with pytest.raises(TrailvecError, match=message):
            Runtime(load_config(None, [*sets, *settings]), spark).execute(STAGE)
        assert not shop.exports.exists()

    (tmp_path / "consent.csv").write_text("user_id,push\nann,true\n")
    refused('consent = "email"', "requires consent 'email', but export.consent is missing: set it to the file or query")
    gone = f'export.consent={{ file = "{tmp_path / "gone.csv"}" }}'
    refused('consent = "email"', r"the list .*gone\.csv can't be read \(No such file or directory\)", gone)
    there = f'export.consent={{ file = "{tmp_path / "consent.csv"}" }}'
    refused('consent = "email"', r"has no column email \(found user_id, push\): correct one of them", there)
    for name, text in {"nobody.txt": "\n", "nobody.csv": "user_id,date\n"}.items():
        (tmp_path / name).write_text(text)
        refused(
            f'suppress = [{{ file = "seeds.txt" }}, {{ file = "{name}" }}]',
            f"likes.toml: no user at all is suppressed by {name}: correct that list, or write may_be_empty = true",
        )
    since = "sql = \"SELECT user_id FROM user_embeddings WHERE as_of > DATE('2017-13-01')\""
    refused(
        f'suppress = [{{ file = "nobody.txt", may_be_empty = true }}, {{ {since} }}]',
        r"no user at all is suppressed by a query \(a date that Spark can't parse is NULL\): correct that list",
    )
    (tmp_path / "latin.txt").write_bytes("anna\nrené\n".encode("latin-1"))
    refused('suppress = [{ file = "latin.txt" }]', r"the list .*/latin\.txt is not UTF-8 text .*: save it as UTF-8")
    deletes = 'sql = "DELETE FROM user_embeddings"'
    refused(
        f"suppress = [{{ {deletes} }}]", "likes.toml: the query of a list of its users is not a query .found 'DELETE"
    )
    consent = f"export.consent={{ {deletes} }}"
    refused(
        'consent = "email"', "export.consent.sql is not a query .found 'DELETE FROM user_embeddings'.: write", consent
    )
    refused(
        'suppress = [{ sql = "SELECT user_id FROM blocked" }]',
        r"likes\.toml: the query of a list of its users: .*`blocked` cannot be",
    )
    (tmp_path / "likes.toml").write_text(SEGMENT)

    put_users(shop, USERS, cold=USERS)
    with pytest.raises(TrailvecError, match=r"3 of its 3 seeds are cold \(model m1 knows none of their items\): use"):
        shop.execute(STAGE)


def test_what_a_consent_may_say(spark: SparkSession) -> None:
    def agreeing(*said: str) -> list[str]:
        rows = ", ".join(f"('u{n}', {value})" for n, value in enumerate(said))
        consents = spark.sql(f"SELECT * FROM VALUES {rows} AS t(user_id, push)")
        return [row["user_id"] for row in consenting(consents, "push", Path("likes.toml")).where("holds").collect()]

    assert agreeing("true", "false", "NULL") == ["u0"]
    assert agreeing("1", "0", "NULL") == ["u0"]
    assert agreeing("'True'", "' 1'", "'no'", "'0'", "' '", "NULL") == ["u0", "u1"]
    for wrong, shown in (("-1", "'-1'"), ("'maybe'", "'maybe'"), ("'NaN'", "'NaN'")):
        with pytest.raises(
            TrailvecError, match=f"consent 'push', but that column of export.consent contains {shown}: write"
        ):
            agreeing("'1'" if "'" in wrong else "1", wrong)
    for wrong, kind in (("DOUBLE('NaN')", "double"), ("TIMESTAMP '2024-01-01'", "timestamp")):
        with pytest.raises(TrailvecError, match=f"consent 'push', but that column of export.consent has type {kind}: "):
            agreeing(wrong)


def test_queries_that_suppress_are_told_apart() -> None:
    """The counts by rule go by its name."""

    def names(*lists: dict[str, str]) -> list[str]:
        given = {"name": "x", "owner": "o", "purpose": "p", "sql": "SELECT 'ann' AS user_id", "suppress": lists}
        file = SegmentFile(Segment.model_validate(given), Path("x.toml"))
        nothing: Any = Mock()
        rest: Any = {"everyone": 0, "log": None, "logged_at": None, "now": None, "controlled": {}}
        return [rule.name for rule in rules_of(nothing, file, nothing, None, **rest).steps]

    assert names({"sql": "A"}, {"file": "a.csv"}) == ["suppressed by a query", "suppressed by a.csv"]
    assert names({"sql": "A"}, {"file": "a.csv"}, {"sql": "B"}) == [
        "suppressed by query 1",
        "suppressed by a.csv",
        "suppressed by query 2",
    ]


def test_more_lists_than_a_word_has_bits_are_told_apart(
    make_runtime: Callable[..., Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.segment_rules._BATCH", 2)
    runtime = make_runtime()
    lists = Lists(runtime, Staging(tmp_path, tmp_path))
    for number in range(130):
        assert lists.mark(f"list {number}", lambda n=number: iter([f"u{n}", f"u{n + 1}", "everywhere"])) == number
    rows = lists.of_users()
    words = lists.words
    assert len(words) == 3
    found = rows.toPandas()
    marked = Marked(found[words].to_numpy())
    for number in range(130):
        assert set(found["user_id"][marked.has(number)]) == {f"u{number}", f"u{number + 1}", "everywhere"}

    bits = {"forbidden": lists.bits([100]), "required": lists.bits([61, 62])}
    decided = rows.withColumns({f"{kind}_{n}": F.lit(bit) for kind, of in bits.items() for n, bit in enumerate(of)})
    assert {row["user_id"] for row in decided.where(allows(lists)).collect()} == {"u62"}
    bits["forbidden"] = lists.bits([62])
    decided = rows.withColumns({f"{kind}_{n}": F.lit(bit) for kind, of in bits.items() for n, bit in enumerate(of)})
    assert decided.where(allows(lists)).isEmpty()

    # Persisted, they are neither shuffled nor sorted again by a join: the candidates alone are.
    with spark_conf(runtime.spark, {"spark.sql.autoBroadcastJoinThreshold": "-1"}), persisted(rows) as kept:
        kept.count()
        candidates = runtime.spark.createDataFrame([("u1",)], "user_id string")
        plan = candidates.join(kept, "user_id", "left")._jdf.queryExecution().executedPlan().toString()
    above = plan[: plan.index("InMemoryTableScan")]
    assert (above.count("Exchange "), above.count("Sort ")) == (1, 1), above
