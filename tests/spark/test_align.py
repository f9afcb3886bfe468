"""align over two models with random weights, against scipy's rotation and numpy's products of the tables' vectors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from scipy.linalg import orthogonal_procrustes

from jobs import align, embed_items, score_users
from jobs.errors import TrailvecError
from jobs.runtime import Runtime
from jobs.tables import CONTEXT_VALUES, ITEM_EMBEDDINGS, ITEMS, SEQUENCES, USER_EMBEDDINGS
from tests.conftest import make_config, read_delta
from tests.sequence_files import SPEC
from tests.spark.test_score_users import by_plain_loop, current, make_model, score_rows
from tests.spark.test_train_and_score import CUT, fill
from training.model import SequenceModel

LEARNT = range(2, 29)


SETTINGS = ("storage.database=scores", "align.min_overlap=0")


@pytest.fixture(scope="module")
def filled(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SequenceModel]:
    """A warehouse with the vectors of m1, the first model, and the model itself; each test takes a copy."""
    runtime = Runtime(make_config(tmp_path_factory.mktemp("filled"), *SETTINGS), spark)
    fill(runtime, SEQUENCES, score_rows(40, seed=1))
    about = {"item_name": None, "category": None, "unit_price": None, "first_ts": CUT, "said_ts": (None,) * 4}
    counts = {"event_count": 9, "train_count": 9, "target_count": 9}
    items = [
        {"item_index": n, "item_id": f"i{n}", "vertical": "food" if n % 2 else "rides"} | about | counts
        for n in range(2, 30)
    ]
    fill(runtime, ITEMS, items)
    fill(runtime, CONTEXT_VALUES, [{"kind": "vertical", "value": "food", "value_index": 2}])
    model = make_unaligned(runtime, "m1", seed=1)
    for stage in (align.STAGE, embed_items.STAGE, score_users.STAGE):
        runtime.execute(stage)
    return runtime.root, model


@pytest.fixture
def shop(filled: tuple[Path, SequenceModel], make_runtime: Callable[..., Runtime], spark: SparkSession) -> Runtime:
    spark.sql("DROP DATABASE IF EXISTS scores CASCADE")
    runtime = make_runtime(*SETTINGS)
    shutil.copytree(filled[0], runtime.root)
    return runtime


def make_unaligned(runtime: Runtime, version: str, seed: int) -> SequenceModel:
    shutil.rmtree(runtime.models / version, ignore_errors=True)
    model = make_model(runtime, version, seed)
    (runtime.models / version / "alignment.json").unlink()
    return model


def vectors(runtime: Runtime, table: Any, version: str) -> dict[str, np.ndarray]:
    key = table.key[0]
    return {
        row[key]: np.array(row["vector"], np.float32)
        for row in read_delta(runtime.path(table))
        if row["model_version"] == version
    }


def test_a_new_model_is_laid_onto_the_current_one_unless_it_turns_too_far(
    shop: Runtime, filled: tuple[Path, SequenceModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, old_model = filled
    assert json.loads((shop.models / "m1" / "alignment.json").read_text())["onto"] is None
    model = make_unaligned(shop, "m2", seed=2)
    with pytest.raises(TrailvecError, match="model m2 is not aligned with m1 yet: run `trailvec align` first"):
        shop.execute(score_users.STAGE)
    strict = Runtime(make_config(shop.root, "storage.database=scores", "align.min_overlap=0.999"), shop.spark)
    refused = r"model m2 must not replace m1: [\d.]+% of a user's 10 nearest items stay \(align\.min_overlap = 0\.999\)"
    with monkeypatch.context() as few:
        few.setattr(align, "FEWEST_USERS", 1)
        for stage in (align.STAGE, align.STAGE, score_users.STAGE):
            with pytest.raises(TrailvecError, match=refused):
                strict.execute(stage)
    assert current(shop) == ({"m1"}, 40)
    assert not vectors(shop, USER_EMBEDDINGS, "m2")
    report = shop.execute(align.STAGE)  # with the limit changed
    with pytest.raises(TrailvecError, match=r"model m2 has no item vectors yet: run `trailvec embed_items` first"):
        shop.execute(score_users.STAGE)
    assert current(shop) == ({"m1"}, 40)
    assert report.notes[0].startswith("model m2 aligned with m1 by 27 items: cosine of a user's old and new vectors ")
    for stage in (embed_items.STAGE, score_users.STAGE):
        shop.execute(stage)
    assert current(shop) == ({"m2"}, 40)

    raw = {of: of.item_vectors().detach().numpy()[LEARNT] for of in (old_model, model)}
    rotation = orthogonal_procrustes(raw[model], raw[old_model])[0]
    items, users = vectors(shop, ITEM_EMBEDDINGS, "m2"), vectors(shop, USER_EMBEDDINGS, "m2")
    np.testing.assert_allclose(np.stack([items[f"i{n}"] for n in LEARNT]), raw[model] @ rotation, atol=1e-4)
    states = {name: state for name, (state, _, _) in by_plain_loop(model, score_rows(40, seed=1)).items()}
    names = sorted(states)
    unturned = np.stack([states[name] for name in names])
    np.testing.assert_allclose(np.stack([users[name] for name in names]), unturned @ rotation, atol=1e-4)
    # Within the model all scores are unchanged.
    scores = np.stack([users[name] for name in names]) @ np.stack([items[f"i{n}"] for n in LEARNT]).T
    np.testing.assert_allclose(scores, unturned @ raw[model].T, rtol=1e-3, atol=1e-3)

    told = json.loads((shop.models / "m2" / "alignment.json").read_text())
    old_users = by_plain_loop(old_model, score_rows(40, seed=1))
    warm = [name for name in names if not old_users[name][2]]
    before = [_cosine(states[name], old_users[name][0]) for name in warm]
    after = [_cosine(users[name], old_users[name][0]) for name in warm]
    assert told["users"]["compared"] == len(warm)
    assert told["users"]["cosine_before"] == pytest.approx(np.mean(before), abs=1e-3)
    assert told["users"]["cosine_after"] == pytest.approx(np.mean(after), abs=1e-3)
    assert told["items"]["cosine_after"] > told["items"]["cosine_before"]
    assert {name: of["items"] for name, of in told["centroids"].items()} == {"food": 13, "rides": 14}
    for stage in (align.STAGE, embed_items.STAGE, score_users.STAGE):
        assert shop.execute(stage).skipped

    again = make_unaligned(shop, "m2", seed=3)  # as after a forced training on GPUs: the weights differ
    with pytest.raises(TrailvecError, match="model m2, the current one, was trained again and is not aligned with its"):
        strict.execute(embed_items.STAGE)
    for stage in (align.STAGE, embed_items.STAGE):
        with pytest.raises(TrailvecError, match=r"model m2 must not replace m2: [\d.]+% of an item's 10 nearest items"):
            strict.execute(stage)
    unchanged = vectors(shop, ITEM_EMBEDDINGS, "m2")
    assert all(np.array_equal(unchanged[name], vector) for name, vector in items.items())
    report = shop.execute(align.STAGE)
    assert report.notes[0].startswith("model m2 aligned with m2 by 27 items: ")
    with pytest.raises(
        TrailvecError, match="model m2 was trained or aligned again after its item vectors were written"
    ):
        shop.execute(score_users.STAGE)
    raw[again] = again.item_vectors().detach().numpy()[LEARNT]
    rotation = orthogonal_procrustes(raw[again], np.stack([items[f"i{n}"] for n in LEARNT]))[0]
    for stage in (embed_items.STAGE, score_users.STAGE):
        shop.execute(stage)
    items = vectors(shop, ITEM_EMBEDDINGS, "m2")
    np.testing.assert_allclose(np.stack([items[f"i{n}"] for n in LEARNT]), raw[again] @ rotation, atol=1e-4)

    shop.spark.sql(f"DELETE FROM delta.`{shop.path(ITEM_EMBEDDINGS)}` WHERE model_version = 'm2'")
    make_unaligned(shop, "m3", seed=3)
    for _ in range(2):
        with pytest.raises(
            TrailvecError, match=r"model m2, the current one, has no item vectors to align another model with: "
        ):
            shop.execute(align.STAGE)
        shutil.rmtree(shop.path(ITEM_EMBEDDINGS), ignore_errors=True)  # the second time there is no table


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_who_has_acted_since_or_is_cold_is_not_compared(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that encodes a history as one number, and the same model again: only what users did since can differ."""
    later = CUT + timedelta(days=1)
    rows = [("same", "score", CUT, 1.0), ("acted", "score", later, 2.0), ("same", "test", later, 3.0)]
    rows += [("was cold", "score", CUT, 4.0), ("is cold", "score", CUT, 5.0)]
    sequences = spark.createDataFrame(rows, "user_id string, split string, as_of timestamp, state float")
    made = [("same", "m1", CUT, [1.0]), ("acted", "m1", CUT, [1.5]), ("acted", "m0", later, [2.5])]
    made += [("was cold", "m1", CUT, [4.0]), ("is cold", "m1", CUT, [5.0])]
    schema = "user_id string, model_version string, as_of timestamp, vector array<float>"
    old = spark.createDataFrame(made, schema).withColumn("is_cold", F.col("user_id") == "was cold")
    tables = {SEQUENCES.name: sequences, USER_EMBEDDINGS.name: old}
    runtime = SimpleNamespace(read=lambda t: tables[t.name], latest=lambda t: tables[t.name])

    def encoded(_: object, rows: DataFrame, keep: list[str], **of: object) -> DataFrame:
        is_cold = (F.col("user_id") == "is cold").alias("is_cold")
        return rows.select(*keep, is_cold, F.array("state").alias("vector"))

    monkeypatch.setattr(align, "encode_sequences", encoded)
    found = align._users(runtime, Path("m2"), "m1").collect()  # type: ignore[arg-type]
    assert [tuple(row) for row in found] == [("same", [1.0], [1.0])]


def test_items_cold_to_either_model_are_not_compared(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cold item's vector is not learnt: it comes from the item's attributes."""
    names = ("learnt", "was cold", "is cold", "new")
    old = [(name, "m1", [1.0], name == "was cold") for name in names[:3]] + [("new", "m0", [1.0], False)]
    new = spark.createDataFrame(
        [(name, [2.0], name == "is cold") for name in names], "item_id string, vector array<float>, is_cold boolean"
    )
    schema = "item_id string, model_version string, vector array<float>, is_cold boolean"
    tables = {
        ITEM_EMBEDDINGS.name: spark.createDataFrame(old, schema),
        ITEMS.name: spark.createDataFrame([(name, "food") for name in names], "item_id string, vertical string"),
    }
    runtime = SimpleNamespace(read=lambda t: tables[t.name], latest=lambda t: tables[t.name])
    monkeypatch.setattr(align, "item_vectors", lambda *_, **of: new)
    found = align._pairs(runtime, Path("m2"), "m1")  # type: ignore[arg-type]
    rows = found.select("item_id", "vertical", "new", "old").collect()
    assert [tuple(row) for row in rows] == [("learnt", "food", [2.0], [1.0])]


def test_spaces_of_unlike_width_are_told_apart(shop: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.spark.test_score_users.SPEC", SPEC.model_copy(update={"width": 8}))
    make_unaligned(shop, "m2", seed=2)
    ranking = {"m1": 0.5, "m2": None, "m3": 0.1}
    monkeypatch.setattr(align, "_ranking", lambda about: ranking[about["model_version"]])
    assert shop.execute(align.STAGE).notes == [
        "model m2 can't be aligned with m1 (found widths {16} and 8): its space is a new one",
        "align.max_ranking_loss says nothing about model m2: nobody in its valid split has a next item that it knows",
    ]
    told = json.loads((shop.models / "m2" / "alignment.json").read_text())
    assert told["rotation_sha256"] is None
    assert "centroids" not in told
    assert told["items"]["compared"] == 27
    for kind in ("users", "items"):  # what needs no common space is compared all the same
        assert 0 < told[kind]["overlap@10"] < 1
        assert "cosine_after" not in told[kind]

    make_unaligned(shop, "m3", seed=3)
    for stage in (align.STAGE, score_users.STAGE):
        with pytest.raises(TrailvecError, match=r"model m3 must not replace m1: NDCG@10 in validation fell by 80\.00%"):
            shop.execute(stage)
