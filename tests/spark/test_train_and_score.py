"""The stages train, embed_items and score_users over real Delta tables, with two real Horovod processes."""

import json
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from delta.tables import DeltaTable
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from safetensors.numpy import load_file

from jobs import embed_items, item_facts, score_users, train, tune
from jobs.errors import TrailvecError
from jobs.launch_training import launch_in_spark
from jobs.model_folders import model_folder
from jobs.models import encode_sequences
from jobs.runtime import Runtime, Stage
from jobs.spark_session import spark_conf
from jobs.tables import CONTEXT_VALUES, ITEM_EMBEDDINGS, ITEMS, SEQUENCES, USER_EMBEDDINGS, Table
from scripts.faults import delta_reader
from spark_udfs.encode import LoadedModel, encode_rows
from tests.conftest import make_config
from tests.sequence_files import MAX_LENGTH, item_counts, make_rows, train_here
from training.batches import FEATURES
from training.checkpoint import WEIGHTS, Progress, load_model, newest_checkpoint, write_checkpoint
from training.config import ITEM_ATTRIBUTES, ModelSpec, RunSpec

CUT = datetime(2024, 6, 1)
SETTINGS = (
    f"sequences.max_length={MAX_LENGTH}",
    "sequences.seen_days=0",
    'sequences.target_event_types=["event_type2", "event_type3"]',
    "vocabulary.min_count=3",
    "train.processes=2",
    "train.epochs=6",
    "train.width=16",
    "train.negatives=12",
    "train.batch_size=16",
    "train.learning_rate=0.02",
    "train.rate_scaling=none",
    "score.batch_size=7",
)


def fill(
    runtime: Runtime, table: Table, rows: list[dict[str, Any]], files: int = 1, note: dict[str, Any] | None = None
) -> None:
    """Writes the rows as a stage would, with its `note`; `files` data files per partition."""
    frame = runtime.spark.createDataFrame(rows, table.schema()).repartition(files)
    runtime.execute(Stage("fill", "", lambda r: r.write(table, frame, note=note), (), (table,), ()), force=True)


def sequences(rows: list[dict[str, Any]], split: str, first_user: int = 0) -> list[dict[str, Any]]:
    return [
        {
            **{column.name: None for column in SEQUENCES.columns},
            "user_id": f"u{first_user + number // 2 if split == 'train' else number}",
            "split": split,
            "part": number % 2 if split == "train" else 0,
            "as_of": CUT,
            "last_ts": CUT - timedelta(days=1),
            **row,
        }
        for number, row in enumerate(rows)
    ]


def fill_all(runtime: Runtime) -> None:
    train_rows = make_rows(240, seed=1)
    counts = item_counts(train_rows)
    counts[28] = 2  # below vocabulary.min_count
    items = [
        {"item_index": number, "item_id": f"i{number}", "item_name": None, "category": None, "unit_price": None}
        # The model knows no attribute of the last one.
        | {
            "vertical": "vertical2" if number < 29 else "shop",
            "first_ts": CUT,
            "event_count": 9,
            "train_count": int(counts[number]),
            "target_count": int(counts[number]),
            "said_ts": (None,) * 4,
        }
        for number in range(2, len(counts))
    ]
    values = [
        {"kind": kind, "value": f"{kind}{number}", "value_index": number}
        for kind, largest in (("event_type", 3), ("vertical", 4))
        for number in range(2, largest + 1)
    ]
    valid = make_rows(20, seed=2)
    for row in valid:
        following = (row["item_index"][-1] - 1) % 27 + 2
        row.update(target_item_index=[following], target_ts=[CUT], seen_item_index=[])
    score = make_rows(40, seed=3)
    score[0]["item_index"] = [1] * score[0]["length"]  # only unknown items
    score[1]["item_index"][0] = 999  # an item appended after training
    # An earlier version, whose files stay on disk but must not be read.
    fill(runtime, SEQUENCES, sequences(make_rows(50, seed=8), "train"), files=2)
    fill(runtime, ITEMS, items)
    fill(runtime, CONTEXT_VALUES, values)
    rows = sequences(train_rows, "train") + sequences(valid, "valid") + sequences(score, "score")
    rows += [row | {"as_of": CUT + timedelta(days=28)} for row in sequences(make_rows(1, seed=4), "test")]
    fill(runtime, SEQUENCES, rows, files=3)


@pytest.fixture(scope="module")
def trained(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    runtime = Runtime(make_config(tmp_path_factory.mktemp("trained"), *SETTINGS), spark)
    fill_all(runtime)
    report = runtime.execute(train.STAGE)
    assert not report.skipped
    runtime.execute(embed_items.STAGE)
    runtime.execute(score_users.STAGE)
    return runtime


def about_of(runtime: Runtime) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((model_folder(runtime) / "model.json").read_text())
    return about


def test_loss_falls_on_both_ranks_which_end_alike(trained: Runtime) -> None:
    training = about_of(trained)["training"]
    first, last = training["epochs"][0], training["epochs"][-1]
    assert all(after < before - 0.3 for before, after in zip(first["loss_by_rank"], last["loss_by_rank"], strict=True))
    digests = training["parameters_sha256_by_rank"]
    assert len(digests) == 2
    assert digests[0] == digests[1]
    assert training["epochs"][training["best_epoch"] - 1]["ndcg@10"] == max(e["ndcg@10"] for e in training["epochs"])
    assert last["ndcg@10"] > 0.5  # by chance: about 0.15


def active_files(table: Path) -> set[str]:
    """The train split's active files, by replaying the table's log by hand."""
    active: set[str] = set()
    for commit in sorted((table / "_delta_log").glob("*.json")):
        actions = [json.loads(line) for line in commit.read_text().splitlines()]
        active -= {action["remove"]["path"] for action in actions if "remove" in action}
        active |= {action["add"]["path"] for action in actions if "add" in action}
    return {str(table / unquote(path)) for path in active if "split=train" in path}


def test_ranks_read_the_snapshots_active_files_each_row_once(trained: Runtime) -> None:
    run = json.loads((model_folder(trained) / "run.json").read_text())
    table = Path(trained.path(SEQUENCES))
    on_disk = {str(path) for path in (table / "split=train").glob("*.parquet")}
    read = {url.removeprefix("file://") for url in run["train_files"]}
    assert read == active_files(table)
    assert read < on_disk
    for epoch in about_of(trained)["training"]["epochs"]:
        assert all(epoch["rows_by_rank"])
        assert sum(epoch["rows_by_rank"]) == run["train_rows"] == 240
    assert run["target_event_types"] == [2, 3]


def test_the_event_types_to_predict_have_the_numbers_of_the_vocabulary(trained: Runtime) -> None:
    def numbers(types: list[str], target_count: int) -> list[int] | None:
        config = make_config(trained.root, *SETTINGS, f"sequences.target_event_types={json.dumps(types)}")
        items = trained.latest(ITEMS).withColumn(
            "target_count", F.when(F.col("train_count") < 3, 9).otherwise(target_count)
        )
        return train.event_types_to_predict(config, items, trained.latest(CONTEXT_VALUES))

    assert numbers([], 0) is None
    assert numbers(["event_type3", "vertical2", "nope"], 1) == [3]
    with pytest.raises(
        TrailvecError, match=r"nothing to predict: no item .*types = \[\"nope\"\] in the training window"
    ):
        numbers(["nope"], 0)


def test_a_model_reads_only_the_configured_inputs_and_attributes(trained: Runtime) -> None:
    def sizes(*sets: str) -> tuple[list[str], list[str]]:
        config = make_config(trained.root, *SETTINGS, *sets)
        spec = train.model_spec(config, 30, trained.latest(CONTEXT_VALUES))
        return list(spec.context_sizes), list(spec.attribute_sizes)

    assert sizes('train.inputs=["hour"]', 'train.item_attributes=["price"]') == (["hour"], ["price"])
    assert sizes("train.inputs=[]", "train.item_attributes=[]") == ([], [])


def test_the_search_for_settings_reads_these_tables_and_resumes(
    trained: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "launch", train_here)
    said: list[str] = []
    runtime = Runtime(make_config(trained.root, *SETTINGS, "train.processes=1", "train.epochs=1"), trained.spark)
    runtime.on_progress = said.append
    for _ in range(2):
        found = tune.run_tune(runtime, 1)
        assert re.fullmatch(r"# ndcg@10 0\.\d{4} on the validation users, trial 0 of 1", found[0])
    assert any(line.startswith("trial 0  epoch 1/1") for line in said)
    assert said[-1] == "resumes the search after 1 trials"  # and no trial after it


def test_model_json_says_what_made_it(trained: Runtime) -> None:
    about = about_of(trained)
    assert about["model_version"] == model_folder(trained).name
    assert (about["as_of"], about["test_from"]) == ("2024-06-01T00:00:00.000000", "2024-06-29T00:00:00.000000")
    # Version 0 created the table; each write adds one.
    assert about["provenance"]["reads"] == {"sequences": 2, "items": 1, "context_values": 1}
    assert about["provenance"]["config"]["train"]["epochs"] == 6
    assert about["spec"]["context_sizes"]["vertical_index"] == 5


def test_the_card_the_plot_and_the_run_in_mlflow(trained: Runtime) -> None:
    about = about_of(trained)
    text = (model_folder(trained) / "card.md").read_text()
    assert "| data | sequences version 2, items version 1, context_values version 1 |" in text
    best = about["training"]["epochs"][about["training"]["best_epoch"] - 1]
    assert f"| vertical2 | {best['by_vertical']['vertical2']['users']} |" in text
    assert sum(group["users"] for group in best["by_history"].values()) == about["training"]["held_users"] <= 20
    assert ElementTree.parse(model_folder(trained) / "training.svg").getroot().tag.endswith("svg")

    connection = sqlite3.connect(trained.root / "mlflow.db")
    runs = connection.execute("SELECT run_uuid, status FROM runs WHERE name = ?", [about["model_version"]]).fetchall()
    assert [status for _, status in runs] == ["FINISHED"]
    query = "SELECT value FROM metrics WHERE run_uuid = ? AND key = 'epoch_loss' ORDER BY step"
    losses = [value for (value,) in connection.execute(query, [runs[0][0]])]
    connection.close()
    assert losses == [epoch["loss"] for epoch in about["training"]["epochs"]]
    assert not list(trained.models.glob("*.checkpoints"))  # no longer needed


def kill_a_rank(checkpoints: Path, killed_at: list[float]) -> None:
    """Kills (SIGKILL) rank 1 of the training in Spark's tasks, once there is a checkpoint."""
    ranks: list[psutil.Process] = []
    while not ranks:
        time.sleep(0.2)
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # it has ended meanwhile
                if "horovod.spark.task.gloo_exec_fn" in process.cmdline() and process.environ()["HOROVOD_RANK"] == "1":
                    ranks.append(process)
    while not any(checkpoints.glob("0*")):
        time.sleep(0.01)
    ranks[0].kill()
    killed_at.append(time.monotonic())


def test_tasks_of_spark_train_the_same_model_as_horovodrun(trained: Runtime, tmp_path: Path) -> None:
    """After one of them was killed."""
    counts = item_facts.item_counts(trained.latest(ITEMS), min_count=3)
    np.save(tmp_path / "counts.npy", counts)
    attributes = item_facts.item_attributes(trained.latest(ITEMS), trained.latest(CONTEXT_VALUES))
    np.save(tmp_path / "attributes.npy", item_facts.attribute_matrix(attributes, list(ITEM_ATTRIBUTES), len(counts)))
    output = tmp_path / "model"
    output.mkdir()
    spec = RunSpec.model_validate_json((model_folder(trained) / "run.json").read_text()).model_copy(
        update={"item_counts": str(tmp_path / "counts.npy"), "item_verticals": None, "verticals": []}
        | {
            "item_attributes": str(tmp_path / "attributes.npy"),
            "output": str(output),
            "checkpoints": str(tmp_path / "checkpoints"),
        }
    )
    each_step = spec.settings.model_copy(update={"checkpoint_minutes": 0})
    killed_at: list[float] = []
    threading.Thread(target=kill_a_rank, args=(tmp_path / "checkpoints", killed_at), daemon=True).start()
    with pytest.raises(TrailvecError) as error:
        launch_in_spark(spec.model_copy(update={"settings": each_step}), lambda event: None)
    assert time.monotonic() - killed_at[0] < 60
    # Which process: only if Horovod, which asks each once a second, finds this one ended first.
    assert re.fullmatch(
        r"training stopped: .+; no model .+ the same command resumes from epoch \d .+", str(error.value)
    )
    assert not (output / "model.json").exists()

    events: list[dict[str, Any]] = []
    listening: set[str] = set()

    def hear(event: dict[str, Any]) -> None:
        events.append(event)
        sockets = psutil.Process().net_connections("tcp")
        listening.update(found.laddr.ip for found in sockets if found.status == psutil.CONN_LISTEN)

    launch_in_spark(spec, hear)
    assert listening == {"127.0.0.1"}
    assert events[0]["event"] == "resumed"
    assert [event["epoch"] for event in events if event["event"] == "epoch"] == [*range(events[0]["epoch"], 7)]
    about = json.loads((output / "model.json").read_text())
    expected = about_of(trained)["training"]["parameters_sha256_by_rank"]
    assert about["training"]["parameters_sha256_by_rank"] == expected
    assert load_file(output / "model.safetensors").keys() == load_file(model_folder(trained) / WEIGHTS).keys()

    broken = spec.model_copy(update={"settings": spec.settings.model_copy(update={"learning_rate": 1e30})})
    broken = broken.model_copy(update={"checkpoints": None})
    with pytest.raises(TrailvecError, match=r"training stopped: the loss is nan in epoch \d: lower train") as error:
        launch_in_spark(broken, events.append)
    assert "\n" not in str(error.value)


def test_vectors_from_duckdb_rank_like_the_model_itself(trained: Runtime) -> None:
    database = delta_reader()
    users, all_items = (
        database.sql(f"FROM delta_scan('{trained.path(table)}') ORDER BY {key}").fetchnumpy()
        for table, key in ((USER_EMBEDDINGS, "user_id"), (ITEM_EMBEDDINGS, "item_index"))
    )
    # Known to the model: at least min_count events. Not 28 (2 events), nor 29 (none, and without attributes).
    assert all_items["item_index"].tolist() == list(range(2, 29))
    assert all_items["is_cold"].tolist() == [False] * 26 + [True]
    items = {name: column[:-1] for name, column in all_items.items()}
    user_vectors, item_vectors = (np.stack([np.array(v) for v in t["vector"]]) for t in (users, items))
    assert np.isfinite(user_vectors).all()

    about = about_of(trained)
    model = load_model(model_folder(trained) / "model.safetensors", ModelSpec.model_validate(about["spec"]))
    rows = {row["user_id"]: row for row in sequences(make_rows(40, seed=3), "score")}
    rows["u0"]["item_index"] = [1] * rows["u0"]["length"]
    rows["u1"]["item_index"][0] = 1
    for number, user in enumerate(users["user_id"]):
        row = rows.pop(user)
        batch = {name: torch.tensor([row[name][-(MAX_LENGTH - 1) :]]) for name in FEATURES}
        batch["item_index"][batch["item_index"] == 28] = 1
        with torch.inference_mode():
            own = (model.encode(batch) @ model.item_vectors().T)[0].numpy()
        scores = user_vectors[number] @ item_vectors.T
        np.testing.assert_allclose(scores, own[2:28], rtol=1e-4, atol=1e-4)
        best = items["item_index"][np.argsort(-scores)[:10]].tolist()
        assert best == (np.argsort(-own[2:28])[:10] + 2).tolist()
        assert users["history_length"][number] == min(row["length"], MAX_LENGTH - 1)
    assert rows == {}  # a vector for every user
    assert set(users["model_version"]) == set(items["model_version"]) == {about["model_version"]}
    assert set(users["as_of"].astype("datetime64[s]").tolist()) == {CUT}
    # The cold item's vector is its vertical's; no other attribute of it is known.
    np.testing.assert_array_equal(all_items["vector"][-1], model.table.parts[1].weight[2].detach())
    assert np.any(all_items["vector"][-1])


def test_rows_are_encoded_alike_in_any_order_and_batch_size(trained: Runtime) -> None:
    spec = ModelSpec.model_validate(about_of(trained)["spec"])
    model = LoadedModel(load_model(model_folder(trained) / "model.safetensors", spec))
    rows = make_rows(30, seed=4)

    def encode(rows: list[dict[str, Any]], batch_size: int) -> np.ndarray:
        values = [np.concatenate([row[name] for row in rows]).astype(np.int32) for name in FEATURES]
        return encode_rows(model, np.array([row["length"] for row in rows]), values, batch_size)[0]

    expected = np.concatenate([encode([row], 1) for row in rows])
    np.testing.assert_allclose(encode(rows, 7), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(encode(rows[::-1], 100)[::-1], expected, rtol=1e-4, atol=1e-5)


def test_the_same_command_again_trains_nothing(trained: Runtime) -> None:
    weights = model_folder(trained) / "model.safetensors"
    before = weights.stat().st_mtime_ns
    (trained.models / "current.json").unlink()
    assert trained.execute(train.STAGE).skipped
    assert weights.stat().st_mtime_ns == before
    assert trained.execute(embed_items.STAGE).skipped  # so current.json exists again
    assert trained.execute(score_users.STAGE).skipped


def test_failed_training_leaves_the_old_model_current(trained: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "launch", train_here)
    current = (trained.models / "current.json").read_text()
    models = sorted(path.parent.name for path in trained.models.glob("*/model.json"))
    sets = (*SETTINGS, "train.processes=1", "train.learning_rate=1e30", "train.epochs=2", "train.tracking_uri=none")
    config = make_config(trained.root, *sets)
    with pytest.raises(TrailvecError, match=r"^the loss is nan in epoch \d: lower train"):
        Runtime(config, trained.spark).execute(train.STAGE)
    config = make_config(trained.root, *SETTINGS, "vocabulary.min_count=2")
    with pytest.raises(TrailvecError, match=r"vocabulary\.min_count = 3, not 2 as .*: run `trailvec build_vo"):
        Runtime(config, trained.spark).execute(train.STAGE)
    assert (trained.models / "current.json").read_text() == current
    assert sorted(path.parent.name for path in trained.models.glob("*/model.json")) == models


def test_missing_and_damaged_models_and_one_of_other_tables(trained: Runtime) -> None:
    config = make_config(trained.root, *SETTINGS, "model.version=nope")
    with pytest.raises(TrailvecError, match="model nope does not exist under"):
        Runtime(config, trained.spark).execute(score_users.STAGE)
    damaged = trained.models / "damaged"
    damaged.mkdir()
    (damaged / "model.json").write_text((model_folder(trained) / "model.json").read_text())
    of_others = shutil.copytree(model_folder(trained), trained.models / "of_others")
    about = about_of(trained)
    about["provenance"]["table_ids"]["items"] = "removed since"
    (of_others / "model.json").write_text(json.dumps(about))
    for version, sentence in (
        ("damaged", r"model\.safetensors is missing"),
        ("of_others", "uses the numbers of tables items and context_values that were removed since: "),
    ):
        config = make_config(trained.root, *SETTINGS, f"model.version={version}")
        for stage in (score_users.STAGE, embed_items.STAGE):
            with pytest.raises(TrailvecError, match=sentence):
                Runtime(config, trained.spark).execute(stage)
    current = trained.models / "current.json"
    there = current.read_text()
    for text in ("", "[]", "{}", "[" * 100_000):
        current.write_text(text)
        with pytest.raises(TrailvecError, match=r"current\.json does not say which model is in use"):
            model_folder(trained)
    current.write_text(there)


def test_a_user_in_many_batches_of_arrow_still_has_one_vector(trained: Runtime) -> None:
    runtime = Runtime(make_config(trained.root, *SETTINGS, "score.batch_size=2"), trained.spark)
    rows = runtime.latest(SEQUENCES).where("split = 'score'")
    key = "spark.sql.execution.arrow.maxRecordsPerBatch"
    trained.spark.conf.set(key, "3")
    try:
        small = encode_sequences(runtime, rows, ["user_id"], model_dir=model_folder(trained)).collect()
    finally:
        trained.spark.conf.unset(key)
    stored = trained.spark.read.format("delta").load(trained.path(USER_EMBEDDINGS)).select("user_id", F.col("vector"))
    expected = {row["user_id"]: row["vector"] for row in stored.collect()}
    assert len(small) == len(expected)
    for row in small:
        np.testing.assert_allclose(row["vector"], expected[row["user_id"]], rtol=1e-4, atol=1e-5)


def test_a_warm_start_grows_from_the_current_model_over_new_rows_and_only_once(
    trained: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "launch", train_here)
    shutil.copytree(trained.root, tmp_path / "root")
    sets = (*SETTINGS, "train.processes=1", "train.warm_start=true", "train.warm_rate=0.3")
    sets += (f"train.warm_length={MAX_LENGTH // 2}", "train.tracking_uri=none")
    runtime = Runtime(make_config(tmp_path / "root", *sets), trained.spark)
    base = model_folder(runtime).name
    report = runtime.execute(train.STAGE)
    assert report.skipped
    assert report.notes == [
        f"nothing is new to model {base}: it was trained up to 2024-06-01 00:00:00, where training still ends"
    ]
    with pytest.raises(TrailvecError, match=f"no row of the train split .* 2024-06-01.*model {base} was trained: run"):
        runtime.execute(train.STAGE, force=True)
    quiet = sequences(make_rows(240, seed=1), "train")
    for row in quiet:
        row.update(as_of=CUT + timedelta(days=9))
    fill(runtime, SEQUENCES, quiet, files=2)
    report = runtime.execute(train.STAGE)
    assert report.skipped
    assert report.notes == [
        f"nothing is new to model {base}: it was trained up to 2024-06-01 00:00:00, where training ends later, but "
        f"without an action since"
    ]

    old, new = sequences(make_rows(240, seed=1), "train"), sequences(make_rows(30, seed=7), "train", first_user=500)
    for row in new:
        row.update(last_ts=CUT + timedelta(days=2))
    for row in old + new:
        row.update(as_of=CUT + timedelta(days=9))
    fill(runtime, SEQUENCES, old + new, files=2)
    for _ in range(2):  # the second finds the first one's model
        report = runtime.execute(train.STAGE)
        about = about_of(runtime)
        assert about["grown_from"] == base
        assert [epoch["rows_by_rank"] for epoch in about["training"]["epochs"]] == [[30]]
        assert about["as_of"] == "2024-06-10T00:00:00.000000"
        before = runtime.version(SEQUENCES)
        DeltaTable.forPath(runtime.spark, runtime.path(SEQUENCES)).optimize().executeCompaction()
    assert report.skipped
    assert before > about["provenance"]["reads"]["sequences"]  # upkeep ran in between
    spec = RunSpec.model_validate_json((model_folder(runtime) / "run.json").read_text())
    settings = spec.settings
    assert spec.new_only
    assert (settings.epochs, settings.learning_rate) == (1, pytest.approx(0.02 * 0.3))
    assert settings.batch_size == 2 * 16  # for rows half as long
    assert not (model_folder(runtime) / "rows").exists()
    # Its only step, at the end of the schedule, has moved nothing far.
    old_weights, grown = (load_file(runtime.models / of / WEIGHTS) for of in (base, about["model_version"]))
    for name, tensor in old_weights.items():
        np.testing.assert_allclose(grown[name], tensor, atol=1e-3, err_msg=name)

    wider = Runtime(make_config(tmp_path / "root", *sets, "train.width=32"), trained.spark)
    with pytest.raises(
        TrailvecError, match=r"was trained with width = 16, not 32 as configured: set it back, or set train\.warm"
    ):
        wider.execute(train.STAGE)

    # The warm-started model is the newest but not current: align or the gate may have refused it.
    def base_with(*more: str) -> str | None:
        found: list[str | None] = []
        stage = Stage("look", "", lambda r: found.append(train.base_of(r)), train.STAGE.reads)
        Runtime(make_config(tmp_path / "root", *sets, *more), trained.spark).execute(stage)
        return found[0]

    grown, other = about["model_version"], "train.warm_rate=0.5"
    assert base_with() == base_with(other) == base
    assert base_with(other, f"model.version={grown}") == grown
    again = Runtime(make_config(tmp_path / "root", *sets, other, f"model.version={grown}"), trained.spark)
    with pytest.raises(
        TrailvecError, match=rf"false, or continue {base} again, .* did \(--set model\.version={base}\)$"
    ):
        again.execute(train.STAGE, force=True)
    shutil.rmtree(runtime.models / base)
    with pytest.raises(TrailvecError, match=rf"model {base} does not exist .*: set train\.warm_start = false to train"):
        runtime.execute(train.STAGE, force=True)
    assert base_with(other) == grown


def test_a_forced_training_that_was_killed_goes_on_and_keeps_what_other_stages_added_to_the_same_weights(
    trained: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained.root, tmp_path / "root")
    runtime = Runtime(make_config(tmp_path / "root", *SETTINGS), trained.spark)
    folder = model_folder(runtime)
    as_trained = shutil.copytree(folder, tmp_path / "as_trained")
    for name in ("alignment.json", "alignment.safetensors"):
        (as_trained / name).unlink(missing_ok=True)
        (folder / name).write_text("how its space was turned")

    started_from: list[bool] = []

    def train_again(_: Runtime, version: str, staging: Path, checkpoints: Path) -> None:
        assert version == folder.name
        started_from.append(checkpoints.exists())
        if not started_from[-1]:
            checkpoints.mkdir()
            raise InterruptedError
        shutil.copytree(as_trained, staging, dirs_exist_ok=True)

    monkeypatch.setattr(train, "_train", train_again)
    assert runtime.execute(train.STAGE).skipped
    # Left by a training that was killed as soon as it had its model.
    left = runtime.models / f"{folder.name}_{runtime.fingerprint_here(runtime.fingerprint)[:8]}.checkpoints"
    replaced = folder.with_name(f".{folder.name}.9ab.old.staging")
    for path in (left, replaced):
        path.mkdir()
    assert runtime.execute(train.STAGE).skipped
    assert [path for path in (left, replaced) if path.exists()] == []
    left.mkdir()  # and by one that was killed earlier
    with pytest.raises(InterruptedError):
        runtime.execute(train.STAGE, force=True)
    runtime.execute(train.STAGE, force=True)
    assert started_from == [False, True]  # it resumes only from its own checkpoints
    assert not list(runtime.models.glob(f"{folder.name}*.checkpoints"))  # another model's stay
    for name in ("alignment.json", "alignment.safetensors"):
        assert (folder / name).read_text() == "how its space was turned"


def test_a_killed_training_goes_on_over_the_tables_as_they_were_whatever_was_committed_since(
    trained: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = (*SETTINGS, "train.processes=1", "train.epochs=3", "train.tracking_uri=none")
    rows = sequences(make_rows(60, seed=7), "train", first_user=500)
    lines: list[str] = []
    epochs: list[int] = []  # of the newest checkpoint that each killed training has left

    def delete(runtime: Runtime, user: str) -> None:
        """Deletes as an erasure does: the row is only hidden, until training purges it."""
        stage = Stage("delete", "", lambda r: r.delete(SEQUENCES, F.col("user_id") == user, {"erasure": "e"}))
        runtime.execute(stage, force=True)

    def increment(user: str) -> None:
        """New rows, and one deleted, which is hidden in the newest version's files."""
        frame = runtime.spark.createDataFrame(rows, SEQUENCES.schema())
        gone = runtime.latest(SEQUENCES).where(F.col("user_id") == user).select(*SEQUENCES.key)
        merge = Stage("merge", "", lambda r: r.merge(SEQUENCES, frame, gone), (), (SEQUENCES,), ())
        runtime.execute(merge, force=True)

    def hear(line: str) -> None:
        lines.append(line)
        if "epoch 2/3" in line:
            raise InterruptedError

    def leave_a_checkpoint(_: Path, spec: RunSpec, on_event: Callable[..., None]) -> None:
        write_checkpoint(Path(spec.checkpoints or ""), Progress(ranks=1, step=1), {}, keep=1)
        raise InterruptedError

    def train_killed() -> tuple[Any, dict[str, Any]]:
        before = set(runtime.models.glob("*.checkpoints"))
        with pytest.raises(InterruptedError):
            runtime.execute(train.STAGE)
        left = next(place for place in runtime.models.glob("*.checkpoints") if place not in before)
        newest = newest_checkpoint(left)  # it may have come further than what it has said
        assert newest is not None
        epochs.append(int(newest.name[:5]))
        return left, json.loads((left / "begun.json").read_text())

    shutil.copytree(trained.root, tmp_path / "disturbed")
    runtime = Runtime(make_config(tmp_path / "disturbed", *sets), trained.spark)
    delete(runtime, "u3")
    runtime.on_progress = hear
    left, begun = train_killed()
    # The same purged files: a second purge would give other names and another row order.
    shutil.copytree(runtime.root, tmp_path / "whole", ignore=shutil.ignore_patterns("*.checkpoints"))
    whole = Runtime(make_config(tmp_path / "whole", *sets), trained.spark)
    with monkeypatch.context() as patch:
        patch.setattr(train, "launch", train_here)
        whole.execute(train.STAGE)

    increment("u4")
    newest = runtime.latest_version(SEQUENCES)
    runtime.on_progress = lines.append
    with monkeypatch.context() as patch:
        patch.setattr(train, "launch", train_here)
        report = runtime.execute(train.STAGE)
    assert any(f"resumes from a checkpoint: epoch {epochs[0]}, after 0 steps" in line for line in lines)
    for told in (report.notes, lines):  # at once, and at the end
        assert any("resumes the training that was stopped, on the tables as they were" in line for line in told)
    assert runtime.latest_version(SEQUENCES) == newest  # nothing unread was purged
    about, expected = about_of(runtime), about_of(whole)
    for of in ("model_version", "weights_sha256", "as_of"):
        assert about[of] == expected[of]
    assert about["provenance"]["reads"] == expected["provenance"]["reads"] == begun["reads"]
    assert about["training"]["epochs"][1]["rows_by_rank"] == expected["training"]["epochs"][1]["rows_by_rank"]
    assert not left.exists()

    # Now over the newest rows, and killed again, without processes. Forced, it starts over; so does one with other
    # settings.
    monkeypatch.setattr(train, "launch", leave_a_checkpoint)
    left, begun = train_killed()
    assert begun["reads"]["sequences"] > newest
    increment("u6")
    began: list[tuple[int, bool]] = []

    def stop(runtime: Runtime, version: str, staging: Path, checkpoints: Path) -> None:
        began.append((runtime.version(SEQUENCES), checkpoints == left))
        raise InterruptedError

    monkeypatch.setattr(train, "_train", stop)
    other = Runtime(make_config(tmp_path / "disturbed", *sets, "train.seed=5"), trained.spark)
    newest = runtime.latest_version(SEQUENCES)
    for one, force in ((runtime, True), (other, False), (runtime, False)):
        with pytest.raises(InterruptedError):
            one.execute(train.STAGE, force=force)
    assert began == [(newest, False), (newest, False), (begun["reads"]["sequences"], True)]

    # Without one of its files, or after rows were erased, it can't resume; another command's checkpoints stay.
    answers: list[bool] = []
    look = Stage("look", "", lambda r: answers.append(r.can_go_back(begun)), train.STAGE.reads)
    file = next(Path(runtime.path(ITEMS)).glob("*.parquet"))
    runtime.execute(look)
    file.rename(file.with_suffix(".gone"))
    runtime.execute(look)
    file.with_suffix(".gone").rename(file)
    assert answers == [True, False]
    delete(runtime, "u5")
    with pytest.raises(InterruptedError):
        other.execute(train.STAGE)
    assert left.exists()
    with pytest.raises(InterruptedError):
        runtime.execute(train.STAGE)
    assert not left.exists()
    assert began[-1] == (runtime.latest_version(SEQUENCES), False)


def test_the_rows_of_a_warm_start_are_the_newest_actions_in_the_same_order_each_time(
    make_runtime: Callable[..., Runtime], tmp_path: Path
) -> None:
    runtime = make_runtime("sequences.rows_per_file=50", "train.warm_length=4")
    rows = sequences(make_rows(120, seed=1), "train")
    fill(runtime, SEQUENCES, rows, files=2)
    found: list[list[list[dict[str, Any]]]] = []

    def look(runtime: Runtime) -> None:
        about = {"as_of": "2024-05-01T00:00:00", "model_version": "m"}
        files = train.rows_since(runtime, about, tmp_path / f"rows-{len(found)}")
        found.append([pq.read_table(file.removeprefix("file://")).to_pylist() for file in files])

    for partitions in ("2", "3"):  # shuffle partitions, when unspecified
        conf = {"spark.sql.shuffle.partitions": partitions, "spark.sql.adaptive.coalescePartitions.enabled": "false"}
        with spark_conf(runtime.spark, conf):
            report = runtime.execute(Stage("look", "", look, (SEQUENCES,), (), ()), force=True)
        DeltaTable.forPath(runtime.spark, runtime.path(SEQUENCES)).optimize().executeCompaction()
    whole = sum(row["length"] for row in rows)
    left_out = sum(max(row["length"] - 4, 0) for row in rows)
    assert report.notes == [
        f"leaves out {left_out:,} of {whole:,} actions: it reads the newest train.warm_length = 4 of each row, also of "
        "users with more since 2024-05-01T00:00:00"
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 3
    later = {"as_of": "2034-05-01T00:00:00", "model_version": "m"}
    stage = Stage("look", "", lambda r: train.rows_since(r, later, tmp_path) and None, (SEQUENCES,), (), ())
    with pytest.raises(TrailvecError, match=r"on newer events, up to a later sequences\.valid_from, or"):
        runtime.execute(stage, force=True)
    newest = [{name: row[name][-4:] for name in FEATURES} | {"length": min(4, row["length"])} for row in rows]
    assert {len(row["hour"]) for row in newest} == {1, 2, 3, 4}
    written = [row for file in found[0] for row in file]
    assert sorted(json.dumps(row, sort_keys=True) for row in written) == sorted(
        json.dumps(row, sort_keys=True) for row in newest
    )
