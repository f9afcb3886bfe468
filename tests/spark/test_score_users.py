"""score_users over models with random weights, against a plain loop: `model.encode`, one user at a time."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import duckdb
import numpy as np
import pytest
import torch
from deltalake import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs import cli, find_neighbours, retire_model, score_users, write_report
from jobs.config import GateSettings
from jobs.errors import TrailvecError
from jobs.evaluate import shortfalls
from jobs.files import write_json
from jobs.retire_model import retire
from jobs.runtime import Report, Runtime, Stage
from jobs.score_users import progress_line
from jobs.spark_session import spark_conf
from jobs.sql import query
from jobs.tables import (
    CONTEXT_VALUES,
    CURRENT_MODEL,
    EVALUATION,
    ITEM_EMBEDDINGS,
    ITEMS,
    NEIGHBOURS,
    SEQUENCES,
    SESSIONS,
    USER_EMBEDDINGS,
    Table,
)
from scripts.faults import delta_reader
from tests.conftest import add, make_config, put, read_delta
from tests.sequence_files import MAX_LENGTH, SPEC, item_counts, make_rows, save_model
from tests.spark.test_train_and_score import CUT, fill, sequences
from training.batches import FEATURES
from training.checkpoint import WEIGHTS, write_alignment
from training.model import SequenceModel, build_model

USERS = 40
Rows = list[dict[str, Any]]


def make_model(runtime: Runtime, version: str, seed: int) -> SequenceModel:
    """Writes a model's folder, as if aligned, and makes it the current model. It does not know item 29."""
    torch.manual_seed(seed)
    model = build_model(SPEC, torch.from_numpy(item_counts(make_rows(200)))).eval()
    folder = runtime.models / version
    folder.mkdir(parents=True)
    save_model(folder, model, {"model_version": version, "as_of": "2017-12-01T00:00:00"})
    write_alignment(folder, None, {"model_version": version, "onto": runtime.newest_current_model(), "said": ""})
    write_json(runtime.models / "current.json", {"model_version": version})
    return model


def score_rows(count: int, seed: int, first_user: int = 0) -> Rows:
    rows = sequences(make_rows(count, seed), "score")
    return [row | {"user_id": f"u{first_user + number}"} for number, row in enumerate(rows)]


def first_rows() -> Rows:
    """The score rows of all users, u0 … u39. The model knows no item of the last five but one of u38 and one of u39,
    which is too old to be read."""
    rows = score_rows(USERS, seed=1)
    for row, items in zip(rows[-5:], ([1] * 8, [29] * 8, [5000] * 8, [1] * 7 + [4], [4] + [1] * 7), strict=True):
        row.update({name: (row[name] * 8)[:8] for name in FEATURES}, length=8, item_index=items)
    return rows


def change(runtime: Runtime, upserts: Rows, deletes: Rows) -> None:
    """One MERGE into sequences, as build_sequences does it."""
    new, gone = (runtime.spark.createDataFrame(rows, SEQUENCES.schema()) for rows in (upserts, deletes))
    stage = Stage("change", "", lambda r: r.merge(SEQUENCES, new, deletes=gone), (), (SEQUENCES,), ())
    runtime.execute(stage, force=True)


def by_plain_loop(model: SequenceModel, rows: Rows) -> dict[str, tuple[Any, ...]]:
    found = {}
    for row in rows:
        read = {name: torch.tensor([row[name][-(MAX_LENGTH - 1) :]]) for name in FEATURES}
        known = [item for item in read["item_index"][0].tolist() if item < SPEC.items and model.item_counts[item] > 0]
        with torch.inference_mode():
            vector = model.encode(read)[0].numpy()
        found[row["user_id"]] = (vector, len(read["item_index"][0]), not known)
    return found


def assert_vectors(runtime: Runtime, model: SequenceModel, version: str, rows: Rows) -> None:
    """The table holds exactly the vectors of the rows, as read by DuckDB."""
    expected = by_plain_loop(model, rows)
    found = [r for r in read_delta(runtime.path(USER_EMBEDDINGS)) if r["model_version"] == version]
    assert sorted(r["user_id"] for r in found) == sorted(expected)
    for r in found:
        vector, history_length, is_cold = expected[r["user_id"]]
        np.testing.assert_allclose(r["vector"], vector, rtol=1e-4, atol=1e-5)
        assert (r["history_length"], r["is_cold"]) == (history_length, is_cold)
        assert r["as_of"].replace(tzinfo=None) == CUT


def current(runtime: Runtime) -> tuple[set[str], int]:
    """The current model and the number of its vectors, as read by DuckDB."""
    models = {row["model_version"] for row in read_delta(runtime.path(CURRENT_MODEL))}
    return models, sum(row["model_version"] in models for row in read_delta(runtime.path(USER_EMBEDDINGS)))


def in_view(runtime: Runtime) -> tuple[set[str], int]:
    """The same by the view."""
    rows = query(runtime, "SELECT user_id, model_version FROM current_user_embeddings").collect()
    return {row["model_version"] for row in rows}, len(rows)


SETTINGS = ("storage.database=scores", "score.batch_size=7")


def in_chunks(runtime: Runtime, users: int) -> Runtime:
    return Runtime(make_config(runtime.root, *SETTINGS, f"score.chunk_users={users}"), runtime.spark)


class Lake(NamedTuple):
    """A lake to copy, its newest model, and what score_users said."""

    root: Path
    model: SequenceModel
    notes: list[str]


@pytest.fixture(scope="module")
def m1_scored(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """40 users to score and a few training rows, with the users' vectors by the current model, m1."""
    runtime = Runtime(make_config(tmp_path_factory.mktemp("scored"), *SETTINGS), spark)
    fill(runtime, SEQUENCES, first_rows() + sequences(make_rows(6, seed=2), "train"), files=2)
    model = make_model(runtime, "m1", seed=1)
    runtime.execute(score_users.STAGE)
    report = runtime.count_rows()
    assert report.rows_out == {"users_encoded": USERS, "user_embeddings": USERS, "current_model": 1}
    return Lake(runtime.root, model, report.notes)


@pytest.fixture(scope="module")
def m2_scored(m1_scored: Lake, spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """The same after m2, too, has scored all users and become current."""
    root = shutil.copytree(m1_scored.root, tmp_path_factory.mktemp("scored-twice") / "warehouse")
    runtime = Runtime(make_config(root, *SETTINGS), spark)
    model = make_model(runtime, "m2", seed=2)
    return Lake(root, model, runtime.execute(score_users.STAGE).notes)


@pytest.fixture
def empty(make_runtime: Callable[..., Runtime], spark: SparkSession) -> Runtime:
    spark.sql("DROP DATABASE IF EXISTS scores CASCADE")  # the session is shared: drop the last test's tables
    return make_runtime(*SETTINGS)


@pytest.fixture
def scored(empty: Runtime, m1_scored: Lake) -> tuple[Runtime, SequenceModel]:
    """The lake scored by the current model, m1; and m1."""
    shutil.copytree(m1_scored.root, empty.root)
    return empty, m1_scored.model


@pytest.fixture
def scored_twice(empty: Runtime, m1_scored: Lake, m2_scored: Lake) -> tuple[Runtime, SequenceModel]:
    """The lake scored by m1 and then by m2; and m1."""
    shutil.copytree(m2_scored.root, empty.root)
    return empty, m1_scored.model


def evaluation_row(version: str, low: float | None, value: float, high: float | None) -> dict[str, Any]:
    cell = {"method": "popularity", "metric": "model_lead_ndcg@10", "slice": "all", "slice_value": "all"}
    of = {"model_version": version, "split": "test", "task": "new", "low": low, "value": value, "high": high}
    return of | cell | {"counted": 30}


def test_a_model_without_the_asked_rows_of_evaluation_does_not_become_current(
    scored: tuple[Runtime, SequenceModel],
) -> None:
    shop, _ = scored
    make_model(shop, "m2", seed=2)
    gate = '{{task="new", method="popularity", metric="model_lead_ndcg@10", {}}}'.format
    asked = [
        "storage.database=scores",
        "train.tracking_uri=none",
        f"evaluate.gate=[{gate('at_least=0.0')}, {gate('at_most=0.5')}]",
    ]
    strict = Runtime(make_config(shop.root, *asked), shop.spark)

    def refused(reason: str) -> None:
        with pytest.raises(
            TrailvecError, match=re.escape(f"model m2 must not become current (evaluate.gate): {reason}")
        ):
            strict.execute(score_users.STAGE)
        assert current(shop) == ({"m1"}, USERS)

    name = "new popularity model_lead_ndcg@10"
    others = [evaluation_row("m1", 0.1, 0.2, 0.3), evaluation_row("m2", 0.1, 0.2, 0.3) | {"split": "valid"}]
    fill(shop, EVALUATION, others)
    refused(f"table evaluation has no row for its {name} in split test; table evaluation has no row")
    fill(shop, EVALUATION, [*others, evaluation_row("m2", -0.01, 0.2, 0.3)])
    refused(f"{name} is 0.2000 (-0.0100 to 0.3000), not significantly above 0: run")
    about = {"item_name": None, "category": None, "unit_price": None, "vertical": "food", "said_ts": (None,) * 4}
    counts = dict.fromkeys(("event_count", "train_count", "target_count"), 9)
    item = {"item_id": "i2", "item_index": 2}
    fill(shop, ITEMS, [item | about | counts | {"first_ts": CUT}])
    fill(shop, ITEM_EMBEDDINGS, [])
    (shop.models / "m1" / WEIGHTS).unlink()  # for an older model, the page needs only its description, not its weights
    strict.execute(write_report.STAGE)  # as the message advises
    assert "Model m2" in (shop.models / "m2" / write_report.PAGE).read_text()
    of_model = {"model_version": "m2", "as_of": CUT, "is_cold": False, "vector": [1.0]}
    fill(shop, ITEM_EMBEDDINGS, [item | of_model])
    fill(shop, EVALUATION, [evaluation_row("m2", 0.01, 0.2, 0.49)])
    strict.execute(score_users.STAGE)
    assert current(shop) == ({"m2"}, USERS)


def test_the_current_model_trained_again_is_asked_like_a_new_one_and_changed_in_one_commit(
    scored: tuple[Runtime, SequenceModel],
) -> None:
    runtime, old = scored
    shop = in_chunks(runtime, 14)
    gate = 'evaluate.gate=[{task="new", method="popularity", metric="model_lead_ndcg@10", at_least=0.0}]'
    strict = Runtime(make_config(shop.root, *SETTINGS, "score.chunk_users=14", gate), shop.spark)
    rows = first_rows()
    rows[7] = score_rows(1, seed=9, first_user=7)[0]
    change(shop, [rows[7]], [])
    assert strict.execute(score_users.STAGE).rows_out["users_encoded"] == 1  # same weights: no gate

    shutil.rmtree(shop.models / "m1")
    new = make_model(shop, "m1", seed=5)
    folder = shop.models / "m1"
    aligned = json.loads((folder / "alignment.json").read_text())
    with pytest.raises(TrailvecError, match=r"model m1 must not become current \(evaluate\.gate\)"):
        strict.execute(score_users.STAGE)
    write_alignment(folder, None, aligned | {"items": {"overlap@10": 0.01}})
    with pytest.raises(TrailvecError, match=r"model m1 must not replace m1: 1\.00% of an item's 10 nearest items stay"):
        shop.execute(score_users.STAGE)
    assert_vectors(shop, old, "m1", rows)
    write_alignment(folder, None, aligned)
    assert shop.execute(score_users.STAGE).rows_out["users_encoded"] == USERS
    assert_vectors(shop, new, "m1", rows)
    weights = json.loads((folder / "model.json").read_text())["weights_sha256"]
    notes = [said["note"] for said in Runtime(shop.config, shop.spark).noted(USER_EMBEDDINGS)]
    assert [note["chunks"] for note in notes if note["model"]["weights"] == weights] == [1, 1]


@pytest.mark.parametrize(
    ("interval", "counted", "lacks"),
    [
        ((0.01, 0.49), 30, []),
        ((-0.01, 0.3), 30, ["is 0.2000 (-0.0100 to 0.3000), not significantly above 0"]),
        # A zero interval is a tie, over all users or over one.
        ((0.0, 0.0), 2_000, ["is 0.2000 (0.0000 to 0.0000), not significantly above 0"]),
        ((0.2, 0.5), 30, ["is 0.2000 (0.2000 to 0.5000), not significantly below 0.5"]),
        ((0.2, 0.2), 29, ["covers 29 users, fewer than min_users = 30"]),
    ],
)
def test_what_a_row_lacks_of_what_the_gate_asks(interval: tuple[float, float], counted: int, lacks: list[str]) -> None:
    of = {"task": "new", "method": "popularity", "metric": "model_lead_ndcg@10"}
    asked = GateSettings.model_validate(of | {"at_least": 0.0, "at_most": 0.5})
    low, high = interval
    row = evaluation_row("m", low, 0.2, high) | {"counted": counted}
    assert list(shortfalls(row, asked)) == lacks
    assert not list(shortfalls(row | {"counted": 1}, GateSettings.model_validate(of | {"at_most": 1, "min_users": 1})))
    for value, lack in (
        (0.0, []),
        (0.5, []),
        (-0.1, ["is -0.1000, not at least 0"]),
        (0.7, ["is 0.7000, not at most 0.5"]),
    ):
        assert list(shortfalls(evaluation_row("m", None, value, None) | {"counted": 1}, asked)) == lack


def test_increments_end_as_a_plain_loop_over_all_users(scored: tuple[Runtime, SequenceModel]) -> None:
    shop, model = scored
    rows = first_rows()
    assert_vectors(shop, model, "m1", rows)
    assert shop.execute(score_users.STAGE).skipped

    changed = score_rows(3, seed=3, first_user=5) + score_rows(2, seed=4, first_user=USERS)
    training = sequences(make_rows(6, seed=5), "train")  # of u0, u1, u2: their score rows do not change
    change(shop, changed + training, rows[20:22])
    with spark_conf(shop.spark, {"spark.sql.adaptive.coalescePartitions.enabled": "false"}):
        report = shop.execute(score_users.STAGE)
    assert report.rows_out["users_encoded"] == 5
    newest, *_ = (c for c in DeltaTable(shop.path(USER_EMBEDDINGS)).history() if c["operation"] == "MERGE")
    assert newest["operationMetrics"]["numTargetFilesAdded"] == "2"  # spark.sql.shuffle.partitions: not by one task
    rows = rows[:5] + rows[8:20] + rows[22:] + changed
    assert_vectors(shop, model, "m1", rows)
    assert shop.execute(score_users.STAGE).skipped

    # One user changed twice between two runs, another added and removed again.
    change(shop, score_rows(1, seed=6, first_user=5) + score_rows(1, seed=6, first_user=77), [])
    last = score_rows(1, seed=7, first_user=5)
    change(shop, last, score_rows(1, seed=6, first_user=77))
    assert shop.execute(score_users.STAGE).rows_out["users_encoded"] == 1
    rows = [row for row in rows if row["user_id"] != "u5"] + last
    assert_vectors(shop, model, "m1", rows)


def test_a_table_made_anew_as_a_whole_is_compared_with_what_it_was(scored: tuple[Runtime, SequenceModel]) -> None:
    runtime, model = scored
    shop = in_chunks(runtime, 20)
    # Removed and recreated with as many commits, it is another table: an equal version means nothing.
    version = shop.latest_version(SEQUENCES)
    shutil.rmtree(shop.path(SEQUENCES))
    shop.spark._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()  # type: ignore[union-attr]
    rows = score_rows(USERS, seed=10)
    fill(shop, SEQUENCES, rows)
    assert shop.latest_version(SEQUENCES) == version
    assert shop.execute(score_users.STAGE).rows_out["users_encoded"] == USERS
    assert_vectors(shop, model, "m1", rows)

    # The same table, written anew.
    rows = rows[:-1]
    rows[3] = score_rows(1, seed=9, first_user=3)[0]
    fill(shop, SEQUENCES, rows, files=3)
    assert shop.execute(score_users.STAGE).rows_out["users_encoded"] == 1
    assert_vectors(shop, model, "m1", rows)

    # Forced: all users again, into the existing vectors.
    assert shop.execute(score_users.STAGE, force=True).rows_out["users_encoded"] == len(rows)
    assert_vectors(shop, model, "m1", rows)


class Killed(BaseException):
    """Not an Exception: no handler may swallow it."""


@contextlib.contextmanager
def at_the_end(act: Callable[[], None], _: float) -> Iterator[None]:
    """In place of `meanwhile`: acts once, when all is done."""
    yield
    act()


def test_a_new_model_killed_in_the_middle_goes_on_while_readers_see_the_old_one_whole(
    scored: tuple[Runtime, SequenceModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, old = scored
    shop = in_chunks(runtime, 14)
    new = make_model(shop, "m2", seed=2)
    rows = first_rows()
    seen: list[tuple[set[str], int]] = []
    real = score_users.Scorer._score_chunk

    def chunk(self: score_users.Scorer, scoring: score_users.Scoring, *rest: Any) -> None:
        if len(seen) == 2:
            raise Killed
        real(self, scoring, *rest)
        seen.append(in_view(Runtime(shop.config, shop.spark)))

    monkeypatch.setattr(score_users.Scorer, "_score_chunk", chunk)
    with pytest.raises(Killed):
        shop.execute(score_users.STAGE)
    assert seen == [({"m1"}, USERS)] * 2
    of_new = [r["user_id"] for r in read_delta(shop.path(USER_EMBEDDINGS)) if r["model_version"] == "m2"]
    assert 0 < len(of_new) < USERS
    other = Runtime(make_config(shop.root, "model.version=m2"), shop.spark)
    item = ("i2", 2, "m2", datetime(2024, 1, 1), False, [1.0])
    for table, of_table in ((ITEM_EMBEDDINGS, [item]), (ITEMS, []), (CONTEXT_VALUES, []), (SESSIONS, [])):
        put(other, table, shop.spark.createDataFrame(of_table, table.schema()))
    with pytest.raises(TrailvecError, match=r"the current model is m1, but model\.version is m2: run"):
        other.execute(find_neighbours.STAGE)

    # Meanwhile a user in a finished chunk acts, another leaves, and one in the chunk that is left to do is erased.
    acted = score_rows(1, seed=8, first_user=int(of_new[0][1:]))
    gone = [row for row in rows if row["user_id"] == of_new[1]]
    change(shop, acted, gone)
    erased = next(row["user_id"] for row in rows if row["user_id"] not in of_new)

    def erase(runtime: Runtime) -> None:
        for table in (SEQUENCES, USER_EMBEDDINGS):
            runtime.delete(table, F.col("user_id") == erased, {"erasure": "e"})

    shop.execute(Stage("erase", "", erase))
    monkeypatch.setattr(score_users.Scorer, "_score_chunk", real)
    monkeypatch.setattr(score_users, "meanwhile", at_the_end)
    said: list[str] = []
    monkeypatch.setattr(shop, "on_progress", said.append)
    with monkeypatch.context() as once_more:
        once_more.setattr(score_users.Scorer, "score_changed", Mock(side_effect=Killed))
        with pytest.raises(Killed):
            shop.execute(score_users.STAGE)
    assert erased not in {r["user_id"] for r in read_delta(shop.path(USER_EMBEDDINGS))}
    report = shop.execute(score_users.STAGE)
    assert report.rows_out["users_encoded"] == 1
    lines = [re.fullmatch(r"(\d+) of 40 users  [\d,]+ users/s  \d+:\d\d left", line) for line in said]
    # One of three chunks was left to do: its users are added to those of the two others.
    assert [int(line[1]) for line in lines if line][-1] == USERS - USERS // 3 + USERS - len(of_new) - 1
    rows = [row for row in rows if row["user_id"] != erased]
    left = [row for row in rows if row["user_id"] not in of_new[:2]] + acted
    assert_vectors(shop, new, "m2", left)
    assert_vectors(shop, old, "m1", rows)  # they stay until m1 is retired
    assert in_view(shop) == current(shop) == ({"m2"}, USERS - 2)
    assert shop.execute(score_users.STAGE).skipped
    # The same as read by another reader, from the files alone: docs/decisions/0012.
    query = (
        "SELECT u.* FROM delta_scan('…/current_model') c JOIN delta_scan('…/user_embeddings') u USING (model_version)"
    )
    found = delta_reader().sql(query.replace("…", f"{shop.root}/tables"))
    assert (len(found.columns), len(found)) == (len(USER_EMBEDDINGS.columns), USERS - 2)
    with pytest.raises(duckdb.IOException, match="nowhere/current_model"):  # the first that is opened
        delta_reader().sql(query.replace("…", "/nowhere"))


def test_back_to_an_old_model_only_what_changed_since_is_encoded(scored_twice: tuple[Runtime, SequenceModel]) -> None:
    shop, model = scored_twice
    rows = first_rows()
    rows[7] = score_rows(1, seed=9, first_user=7)[0]
    change(shop, [rows[7]], [])
    write_json(shop.models / "current.json", {"model_version": "m1"})
    gate = 'evaluate.gate=[{task="new", method="popularity", metric="model_lead_ndcg@10", at_least=0.0}]'
    strict = Runtime(make_config(shop.root, *SETTINGS, gate), shop.spark)  # only for models that were never current
    assert strict.execute(score_users.STAGE).rows_out["users_encoded"] == 1
    assert_vectors(shop, model, "m1", rows)
    assert current(shop) == ({"m1"}, USERS)


def test_a_model_compared_with_one_that_is_current_no_more_does_not_become_current(
    scored: tuple[Runtime, SequenceModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop, _ = scored
    for version, seed in (("m2", 2), ("m3", 3)):
        make_model(shop, version, seed)
    monkeypatch.setattr(score_users.Scorer, "score_changed", Mock(side_effect=Killed))
    with pytest.raises(Killed):  # its vectors are written, but not what may have changed since
        shop.execute(score_users.STAGE)
    monkeypatch.undo()

    def use(version: str, force: bool = False) -> None:
        write_json(shop.models / "current.json", {"model_version": version})
        shop.execute(score_users.STAGE, force=force)
        assert current(shop)[0] == {version}

    def made_current(version: str) -> None:
        row = shop.spark.createDataFrame([(version,)], CURRENT_MODEL.schema())
        put(Runtime(shop.config, shop.spark), CURRENT_MODEL, row)  # another run

    # Another model becomes current, or this one is aligned again, while it is scored.
    folder = shop.models / "m2"
    aligned = json.loads((folder / "alignment.json").read_text())
    overtaken = "m9 has become current while this run scored, and m2 was not compared with it"
    for step, meanwhile, refused in (
        (
            "score_all",
            lambda: write_alignment(folder, np.eye(16, dtype=np.float32), aligned),
            "m2 was trained or aligned again while this run scored",
        ),
        ("score_all", lambda: made_current("m9"), overtaken),
        ("score_changed", lambda: made_current("m9"), overtaken),
    ):
        real = getattr(score_users.Scorer, step)

        def scored_and(
            *given: Any, real: Callable[..., None] = real, meanwhile: Callable[[], None] = meanwhile
        ) -> None:
            real(*given)
            meanwhile()

        with monkeypatch.context() as patched:
            patched.setattr(score_users.Scorer, step, scored_and)
            with pytest.raises(TrailvecError, match=refused):
                use("m2", force=True)  # replaces in one commit what rows there are, which is not yet the run's last
        if step == "score_all" and refused == overtaken:  # the next attempt is refused too
            with pytest.raises(TrailvecError, match="model m2 was compared with m1, and m9 has become current since"):
                use("m2")
        made_current("m1")
        write_alignment(folder, None, aligned)

    use("m2")
    refused = "model m3 was compared with m1, and m2 has become current since: run `trailvec align --force` and"
    with pytest.raises(TrailvecError, match=refused):
        use("m3")
    for version in ("m1", "m3", "m2"):  # back to a model that was current, and on to one compared with it
        use(version)


def test_cold_users(m1_scored: Lake) -> None:
    assert "40 users encoded" in m1_scored.notes[0]
    assert "4 of them cold" in m1_scored.notes[0]
    found = {r["user_id"]: r for r in read_delta(m1_scored.root / "tables/user_embeddings")}
    assert [user for user, r in sorted(found.items()) if r["is_cold"]] == ["u35", "u36", "u37", "u39"]
    assert all(np.isfinite(r["vector"]).all() and np.any(r["vector"]) for r in found.values())
    assert found["u35"]["vector"] != found["u36"]["vector"]  # by their context


def test_an_old_model_is_retired_and_can_be_scored_again(
    scored_twice: tuple[Runtime, SequenceModel], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shop, model = scored_twice
    shop.create(NEIGHBOURS)
    with pytest.raises(TrailvecError, match="model m2 is the current one"):
        retire(shop, "m2")
    with pytest.raises(TrailvecError, match=r"no table has a row of model m9 \(found: m1, m2\)"):
        retire(shop, "m9")
    monkeypatch.setattr(cli, "Runtime", lambda config: Runtime(config, shop.spark))
    cli.main(["retire_model", "m1", "--set", f'storage.root="{shop.root}"'])
    assert {r["model_version"] for r in read_delta(shop.path(USER_EMBEDDINGS))} == {"m2"}
    assert current(shop) == ({"m2"}, USERS)
    assert shop.latest_version(NEIGHBOURS) == 0  # it had no row of the model
    newest, *_ = shop.noted(USER_EMBEDDINGS)
    with monkeypatch.context() as patch:  # Delta has cleaned up older notes
        patch.setattr(Runtime, "noted", lambda *_: [newest])
        assert score_users.was_scored(shop, "m1")

    write_json(shop.models / "current.json", {"model_version": "m1"})
    assert shop.execute(score_users.STAGE).rows_out["users_encoded"] == USERS
    assert_vectors(shop, model, "m1", first_rows())


def test_a_model_trained_again_was_scored_once_all_users_have_vectors_of_its_new_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of its old weights say nothing of them: somebody has to ask again whether it may become current."""
    (tmp_path / "m1").mkdir()

    def train(weights: str) -> None:
        (tmp_path / "m1/model.json").write_text(json.dumps({"weights_sha256": weights}))

    def left(weights: str, done: bool) -> dict[str, Any]:
        note = {"model": {"version": "m1", "weights": weights}, "chunks": 1, "into_empty": False}
        return {"note": note, "fingerprint": "run" if done else None}

    def after(*commits: dict[str, Any]) -> Any:
        return Mock(models=tmp_path, **{"noted.side_effect": lambda _: iter(commits)})

    def was_scored(*commits: dict[str, Any]) -> bool:
        return score_users.was_scored(after(*commits), "m1")

    train("old")
    monkeypatch.setattr(retire_model, "F", Mock())  # without Spark
    runtime = after(left("old", done=True))
    retire_model._run(runtime, "m1")
    retired = {"note": runtime.delete.call_args.kwargs["note"], "fingerprint": "retired"}
    assert was_scored(retired)
    train("new")
    assert not was_scored(left("new", done=False), left("old", done=True))
    assert not was_scored(left("new", done=False), retired)
    assert was_scored(left("new", done=True), left("new", done=False), left("old", done=True))


def test_a_version_is_looked_for_in_the_tables_that_there_are(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    runtime.create(ITEM_EMBEDDINGS)
    with pytest.raises(TrailvecError, match=r"no table has a row of model typo \(found: none\)"):
        retire(runtime, "typo")


def test_vectors_written_twice_are_never_made_current_and_repaired_by_force(
    scored: tuple[Runtime, SequenceModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop, _ = scored
    new = make_model(shop, "m2", seed=2)
    real = Runtime.append

    def twice(self: Runtime, table: Table, df: DataFrame, **rest: Any) -> None:
        for _ in range(2):
            real(self, table, df, **rest | {"batch": None})

    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "append", twice)
        with pytest.raises(TrailvecError, match="80 vectors of model m2 for 40 users"):
            shop.execute(score_users.STAGE)
    assert current(shop) == ({"m1"}, USERS)
    fill(shop, CURRENT_MODEL, [{"model_version": "m2"}])  # as another run may have done just before
    for _ in range(2):  # it never counts as up to date
        with pytest.raises(TrailvecError, match=r"80 vectors .*: run `trailvec score_users --force`"):
            shop.execute(score_users.STAGE)
    assert shop.execute(score_users.STAGE, force=True).rows_out["users_encoded"] == USERS
    assert_vectors(shop, new, "m2", first_rows())
    assert current(shop) == ({"m2"}, USERS)
    assert shop.execute(score_users.STAGE).skipped


@pytest.mark.parametrize("other", ["killed in between", "whole", "of other sequences"])
def test_two_runs_that_begin_at_once_write_each_vector_once(
    scored: tuple[Runtime, SequenceModel], monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    shop = in_chunks(scored[0], 20)
    new = make_model(shop, "m2", seed=2)
    rows = first_rows()
    real = score_users.Scorer._score_chunk
    calls = 0

    def chunk(self: score_users.Scorer, *rest: Any) -> None:
        nonlocal calls
        calls += 1
        call = calls
        if call == 1:  # the other run begins and writes before the first one's first commit
            if other == "of other sequences":
                rows[7] = score_rows(1, seed=9, first_user=7)[0]
                change(shop, [rows[7]], [])
            with contextlib.suppress(Killed):
                Runtime(shop.config, shop.spark).execute(score_users.STAGE)
        if call == 3 and other == "killed in between":
            raise Killed
        real(self, *rest)

    monkeypatch.setattr(score_users.Scorer, "_score_chunk", chunk)
    if other == "killed in between":
        shop.execute(score_users.STAGE)
    else:
        with pytest.raises(TrailvecError, match="another run changed table user_embeddings while this one worked"):
            shop.execute(score_users.STAGE)
    assert_vectors(shop, new, "m2", rows)
    assert current(shop) == ({"m2"}, USERS)
    assert shop.execute(score_users.STAGE).skipped


def test_of_two_runs_that_replace_vectors_the_one_of_newer_sequences_stops(
    scored: tuple[Runtime, SequenceModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its note would say of the other's vectors that they are of its sequences: it began before those came, so it
    does not look at them again."""
    shop = in_chunks(scored[0], 20)
    new = make_model(shop, "m2", seed=2)
    left_over = shop.latest(USER_EMBEDDINGS).limit(1).withColumn("model_version", F.lit("m2"))
    add(shop, USER_EMBEDDINGS, left_over)  # so that chunks are merged
    rows = score_rows(USERS, seed=9)
    real = score_users.Scorer._score_chunk
    calls: list[tuple[Any, ...]] = []

    def chunk(*given: Any) -> None:
        calls.append(given)
        if len(calls) == 1:  # the other run begins before the first one's first commit
            change(shop, rows, [])
            with pytest.raises(TrailvecError, match="another run changed table user_embeddings while this one worked"):
                Runtime(shop.config, shop.spark).execute(score_users.STAGE)
            raise Killed
        if len(calls) == 3:  # and has written the first chunk when the first one does
            real(*calls[0])
        real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(score_users.Scorer, "_score_chunk", chunk)
        with pytest.raises(Killed):
            shop.execute(score_users.STAGE)
    assert len(calls) == 3
    shop.execute(score_users.STAGE)
    assert_vectors(shop, new, "m2", rows)


def commits_with(*notes: tuple[int, dict[str, Any] | None]) -> Mock:
    """A runtime with these commits of user_embeddings, newest first: number and note (None: not by trailvec)."""
    commits = [
        Mock(version=version, foreign=said is None, provenance=said and {"note": said}) for version, said in notes
    ]
    return Mock(forced=False, **{"commits.return_value": commits})


@pytest.mark.parametrize(("into_empty", "after"), [(True, 1), (False, 8)])
def test_the_chunks_of_a_scoring_keep_their_ids_when_delta_cleans_its_log(into_empty: bool, after: int) -> None:
    """Merged chunks have no ids."""
    model = {"version": "m2"}
    begun = score_users.Scoring(sequences=3, chunks=4, done=frozenset(), into_empty=into_empty, after=1)
    note = score_users.Scorer._note(Mock(model=model), begun, 0)
    runtime = commits_with((9, note), (8, {"model": {"version": "m1"}}))
    assert score_users.scoring_so_far(runtime, model) == replace(begun, done=frozenset({0}), after=after)


def test_a_scoring_goes_on_past_upkeep_that_is_older_than_the_retention() -> None:
    """Version 3 can no longer be read, but 5, which upkeep made of it, can; until that is too old as well."""
    begun = score_users.Scoring(sequences=3, chunks=4, done=frozenset({0}), into_empty=True, after=1)
    runtime = commits_with((9, score_users.Scorer._note(Mock(model={"version": "m2"}), begun, 0)))
    runtime.report, runtime._versions = Report("score_users"), {"sequences": 9}
    runtime.past_upkeep.side_effect = lambda _, version: version + 2
    runtime.kept.side_effect = lambda _, version: version == 5
    runtime.followed = partial(Runtime.followed, runtime)
    assert score_users.scoring_so_far(runtime, {"version": "m2"}) == begun
    assert runtime.report.notes == []
    score_users.Scorer.rows(Mock(_runtime=runtime), 3)
    runtime.at.assert_called_once_with(SEQUENCES, 5)
    runtime.kept.side_effect = lambda *_: False
    runtime._recent.return_value = ["version 9"]
    assert score_users.scoring_so_far(runtime, {"version": "m2"}) is None
    said = "table user_embeddings is rebuilt in full: it is 4 commits behind table sequences, of which only 1 are"
    assert runtime.report.notes[0].startswith(said)


def test_a_scoring_whose_chunks_ids_are_used_up_begins_anew() -> None:
    """Otherwise each run would take the same ids, write nothing, and be refused for the other commit."""
    model = {"version": "m2"}
    begun = score_users.Scoring(sequences=3, chunks=2, done=frozenset(), into_empty=True, after=1)
    first, second = (score_users.Scorer._note(Mock(model=model), begun, number) for number in (0, 1))
    resumed = replace(begun, done=frozenset({0, 1}))
    assert score_users.scoring_so_far(commits_with((3, second), (2, first), (1, None)), model) == resumed
    retired = {"model": model | {"retired": True}}
    for beside in (None, retired):
        runtime = commits_with((4, second), (3, beside), (2, first), (1, {"model": {"version": "m1"}}))
        assert score_users.scoring_so_far(runtime, model) is None


@pytest.mark.parametrize(
    ("weights", "sequences", "refused"), [("w", 4, False), ("w", 2, True), ("others", 4, True), (None, 0, True)]
)
def test_no_run_goes_on_from_an_increment_that_missed_older_vectors_written_beside_it(
    monkeypatch: pytest.MonkeyPatch, weights: str | None, sequences: int, refused: bool
) -> None:
    """The increment takes the vectors of sequences 3 to 5, while another run commits vectors of `sequences`."""
    model = {"version": "m2", "weights": "w"}

    def of(sequences: int, weights: str = "w") -> dict[str, Any]:
        facts = {"sequences": sequences, "chunks": 1, "chunk": 0, "into_empty": False, "after": 0}
        return {"model": model | {"weights": weights}, **facts}

    before = [(7, of(3)), (6, of(2))]
    runtime = commits_with(*before)
    runtime.report = Report("score_users")
    beside = (8, weights and of(sequences, weights))
    scorer = Mock(version="m2", model=model, _runtime=runtime, started=0, **{"counts.value": (0, 0, 0, 0)})
    scorer.score_changed.side_effect = lambda _: setattr(
        runtime.commits, "return_value", commits_with((9, of(5)), beside, *before).commits()
    )
    scorer.refuse_older_vectors = partial(score_users.Scorer.refuse_older_vectors, scorer)
    monkeypatch.setattr(score_users, "Scorer", lambda _: scorer)
    for name in ("model_folder", "trained_again", "check_successor", "check_items"):
        monkeypatch.setattr(score_users, name, Mock())
    if refused:
        with pytest.raises(TrailvecError, match="another run changed table user_embeddings while this one worked"):
            score_users.run(runtime)
        note = runtime.touch.call_args.kwargs["note"]
        assert score_users.scoring_so_far(commits_with((10, note), (9, of(5))), model) is None
    else:
        score_users.run(runtime)
    scorer.score_changed.assert_called_once_with(3)
    assert scorer.make_current.called != refused


def test_too_few_vectors_need_no_force() -> None:
    scorer = Mock(version="m2")
    scorer.rows.return_value.count.return_value = 40
    scorer.vectors.return_value.count.return_value = 39
    said = "39 vectors of model m2 for 40 users (was somebody erased meanwhile?): run `trailvec score_users` again"
    with pytest.raises(TrailvecError, match=re.escape(said)):
        score_users.Scorer.make_current(scorer)


def test_what_is_said_meanwhile() -> None:
    assert progress_line(500, 1_500, 2_000, 5.0) == "1,000 of 2,000 users  100 users/s  0:10 left"
    assert progress_line(0, 1_500, 2_000, 5.0) == "500 of 2,000 users, first tasks running"
