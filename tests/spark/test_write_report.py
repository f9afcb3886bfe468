"""write_report: which users its map shows, and what makes its page out of date."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from jobs import probe, write_report
from jobs.runtime import Runtime
from jobs.tables import EXPORTS, USER_EMBEDDINGS
from tests.spark.test_train_and_score import CUT, fill


def member(user: int, segment: str, export: str, day: int) -> dict[str, Any]:
    at = datetime(2020, 1, day, tzinfo=timezone.utc)
    of = {"export_id": export, "segment": segment, "exported_at": at, "model_version": "m1"}
    return of | {"destination": "/exports", "user_id": f"u{user}", "is_control": user % 2 == 0}


def test_users_of_the_last_exports_and_some_of_everybody(
    make_runtime: Callable[..., Runtime], spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    spark.sql("DROP DATABASE IF EXISTS scores CASCADE")
    runtime = make_runtime("storage.database=scores")
    assert write_report._users(runtime, "m1").empty
    about = {"as_of": CUT, "history_length": 3}
    rows = [
        {"user_id": f"u{n}", "model_version": version, "is_cold": n == 0, "vector": [float(n), 1.0]} | about
        for n in range(200)
        for version in ("m1", "m2")
    ]
    fill(runtime, USER_EMBEDDINGS, rows)
    assert write_report._users(runtime, "m1").empty  # nothing was exported
    log = [member(n, "small", "e1", 1) for n in range(90, 95)]  # an older export of the segment
    log += [member(n, "small", "e2", 2) for n in range(6)]  # u0 is cold: not shown
    log += [member(n, "large", "e3", 1) for n in range(3, 20)]
    log += [member(n, "huge", "e5", 1) for n in range(20, 200)]
    log += [member(n, "tiny", "e4", 1) for n in (150,)]  # more segments than there is room for
    fill(runtime, EXPORTS, log)
    monkeypatch.setattr(write_report, "SEGMENTS_MAPPED", 3)
    monkeypatch.setattr(write_report, "MAPPED", 120)
    found = write_report._users(runtime, "m1")
    numbers = found["vector"].map(lambda vector: int(vector[0]))
    assert len(set(numbers)) == len(numbers)
    of_small = set(numbers[found["segment"] == "small"])
    assert of_small == {1, 2, 3, 4, 5}  # u3 to u5 are in the larger one too
    assert set(numbers[found["segment"] == "large"]) == set(range(6, 20))
    in_huge = set(numbers[found["segment"] == "huge"])
    assert len(in_huge) == 20
    assert in_huge <= set(range(20, 200))
    assert len(numbers) > 60
    assert set(found["segment"].dropna()) == {"small", "large", "huge"}
    assert list(numbers) == list(write_report._users(runtime, "m1")["vector"].map(lambda vector: int(vector[0])))


def test_a_table_that_was_made_anew_is_another_one(
    make_runtime: Callable[..., Runtime], spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a page, for labels by SQL, which may read any table, and for the row counts that a stage reports: versions of
    the two tables are not comparable."""
    runtime = make_runtime('probe.labels={sql="SELECT * FROM exports"}')
    monkeypatch.setattr(write_report, "model_folder", lambda runtime: Path("m1"))
    monkeypatch.setattr(probe, "model_inputs", lambda runtime: {"model_version": "m1"})
    found = []
    for members in (1, 2):
        fill(runtime, EXPORTS, [member(n, "fans", "e1", 1) for n in range(members)])
        assert runtime.count_rows().rows_out["exports"] == members
        found.append((write_report._inputs(runtime), probe._inputs(runtime)))
        shutil.rmtree(runtime.path(EXPORTS))
        spark._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()  # type: ignore[union-attr]
    (page, labels), (another_page, other_labels) = found
    assert page != another_page
    assert labels != other_labels
