"""trailvec evaluate --compare: two models with random weights, against plain Python over the states of a plain loop."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import DataFrame, SparkSession

from jobs import embed_items, evaluate
from jobs.cli import main
from jobs.compare_models import Difference, compare, print_differences
from jobs.errors import TrailvecError
from jobs.models import item_vectors
from jobs.runtime import Runtime, Stage
from jobs.splits import Cuts, cut_times, log_end, microseconds
from jobs.tables import CONTEXT_VALUES, EVALUATION, ITEM_EMBEDDINGS, ITEMS, SEQUENCES, SESSIONS, events_of
from tests.conftest import make_config
from tests.sequence_files import make_rows, save_model
from tests.spark.test_score_users import Rows, by_plain_loop, evaluation_row, make_model
from tests.spark.test_train_and_score import CUT, fill, sequences
from training.batches import FEATURES

USERS = 60


SETTINGS = ("evaluate.resamples=200",)


@pytest.fixture(scope="module")
def filled(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    """A warehouse without a model, and its sequences; each test takes a copy."""
    runtime = Runtime(make_config(tmp_path_factory.mktemp("filled"), *SETTINGS), spark)
    random = np.random.default_rng(7)
    rows = sequences(make_rows(USERS, seed=1), "test")
    for row in rows:
        following = random.integers(2, 31, random.integers(1, 4)).tolist()
        seen = sorted({*row["item_index"], *following[:1]}) if random.random() < 0.5 else []
        row.update(target_item_index=following, target_ts=[CUT] * len(following), seen_item_index=seen)
    fill(runtime, SEQUENCES, rows)
    about = {"item_name": None, "category": None, "unit_price": None, "first_ts": CUT, "vertical": "food"}
    counts = {"event_count": 9, "train_count": 9, "said_ts": (None,) * 4}
    items = [{"item_index": n, "item_id": f"i{n}", "target_count": n % 5} | about | counts for n in range(2, 30)]
    fill(runtime, ITEMS, items)
    fill(runtime, CONTEXT_VALUES, [{"kind": "vertical", "value": "food", "value_index": 2}])
    return runtime.root, rows


@pytest.fixture
def shop(filled: tuple[Path, Rows], make_runtime: Callable[..., Runtime]) -> tuple[Runtime, Rows]:
    root, rows = filled
    runtime = make_runtime(*SETTINGS)
    shutil.copytree(root, runtime.root)
    return runtime, copy.deepcopy(rows)


def session_of(user: str, item: str, when: datetime, event_type: str) -> dict[str, Any]:
    """A session of one event."""
    event = {"event_ts": when, "event_id": f"{user}-{when}", "item_id": item, "event_type": event_type}
    event["vertical"] = "food"
    event |= {"amount": None, "quantity": None, "time_zone": "UTC"}
    of = {"session_id": event["event_id"], "user_id": user, "verticals": ["food"], "events": [event], "event_count": 1}
    return of | {"amount": None} | dict.fromkeys(("start_ts", "end_ts", "run_start_ts"), when)


def test_both_models_and_their_difference_over_the_same_users(shop: tuple[Runtime, Rows]) -> None:
    runtime, rows = shop
    models = [make_model(runtime, version, seed) for version, seed in (("m1", 1), ("m2", 2))]
    found = compare(runtime, ("m1", "m2"))
    rankable = [n for n in range(2, 29) if n % 5]  # 29 no model has seen
    expected: dict[str, list[list[float]]] = {"next": [], "new": [], "repeat": []}
    for model in models:
        states = by_plain_loop(model, rows)
        vectors = model.item_vectors().detach().numpy()
        values: dict[str, list[float]] = {task: [] for task in expected}
        for row in rows:
            scores = {n: float(states[row["user_id"]][0] @ vectors[n]) for n in rankable}
            seen = set(row["seen_item_index"])
            for task in expected:
                relevant = {n for n in row["target_item_index"] if task == "next" or (n in seen) == (task == "repeat")}
                candidates = [n for n in rankable if task != "new" or n not in seen]
                best = sorted(candidates, key=lambda n: -scores[n])[:10]
                if relevant:
                    gain = sum(1 / math.log2(rank + 2) for rank, n in enumerate(best) if n in relevant)
                    values[task].append(gain / sum(1 / math.log2(rank + 2) for rank in range(len(relevant))))
        for task in expected:
            expected[task].append(values[task])
    for task, (one, other) in expected.items():
        (difference,) = [d for d in found if (d.task, d.metric) == (task, "ndcg@10")]
        assert difference.users == len(one)
        assert difference.one == pytest.approx(np.mean(one))
        assert difference.other == pytest.approx(np.mean(other))
        by = np.array(other) - np.array(one)
        error = by.std() / math.sqrt(len(by))
        assert difference.low == pytest.approx(by.mean() - 1.96 * error, abs=error / 2)
        assert difference.high == pytest.approx(by.mean() + 1.96 * error, abs=error / 2)


def test_a_pipe_gets_a_line_for_each_metric(capsys: pytest.CaptureFixture[str]) -> None:
    found = Difference("next", "popularity_bias@10", 20_000, 0.1234, 0.1301, -0.0012, 0.0146)
    print_differences([found], ("20261128-120000-abcdef", "20261129-120000-abcdef"), "test")
    last = capsys.readouterr().out.split("\n")[-3].split("  ")
    assert [cell.strip() for cell in last if cell] == [
        *("next", "popularity_bias@10", "20,000", "0.1234", "0.1301", "+0.0067 (-0.0012 to +0.0146)")
    ]


def test_a_model_that_is_not_there_or_has_no_vectors_of_its_own_is_one_sentence(
    shop: tuple[Runtime, Rows], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, _ = shop
    make_model(runtime, "m1", seed=1)
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--set", f'storage.root="{runtime.root}"', "--compare", "m1", "nope"])
    assert stopped.value.code == 1
    assert "model nope does not exist under" in capsys.readouterr().err
    for table in (SESSIONS, ITEM_EMBEDDINGS):
        runtime.create(table)
    with pytest.raises(TrailvecError, match="no vector of an item that model m1 knows: run `trailvec embed_items`"):
        runtime.execute(evaluate.STAGE)

    def trained_again_meanwhile(runtime: Runtime, folder: Path) -> DataFrame:
        vectors = item_vectors(runtime, folder)
        shutil.rmtree(folder)
        make_model(runtime, "m1", seed=2)
        return vectors

    monkeypatch.setattr(embed_items, "item_vectors", trained_again_meanwhile)
    runtime.execute(embed_items.STAGE)
    with pytest.raises(TrailvecError, match="m1 was trained or aligned again after its item vectors were written: run"):
        runtime.execute(evaluate.STAGE)


def test_a_model_that_has_learnt_from_what_it_is_asked_is_refused(
    shop: tuple[Runtime, Rows], capsys: pytest.CaptureFixture[str]
) -> None:
    runtime, rows = shop
    for version, as_of in (("m1", CUT), ("late", CUT + timedelta(microseconds=1))):
        model = make_model(runtime, version, seed=1)
        save_model(runtime.models / version, model, {"model_version": version, "as_of": as_of.isoformat()})
    found = compare(runtime, ("m1", "m1"))  # trained right up to the cut
    assert {(d.other - d.one, d.low, d.high) for d in found} == {(0, 0, 0)}
    print_differences(found, ("m1", "m1"), "test")
    assert "ndcg@10" in capsys.readouterr().out
    leak = "model late was trained on events up to 2024-06-01 00:00:00.000001, but split test asks about events"
    with pytest.raises(TrailvecError, match=leak):
        compare(runtime, ("m1", "late"))
    with pytest.raises(TrailvecError, match=leak):
        evaluate.evaluated_rows(runtime, runtime.models / "late")
    weekly = Runtime(make_config(runtime.root, "sequences.seen_days=7"), runtime.spark)
    with pytest.raises(TrailvecError, match=r"sequences was made with sequences\.seen_days = 28, not 7 as configured"):
        compare(weekly, ("m1", "m1"))  # what is new is in the rows
    config = make_config(runtime.root, "evaluate.resamples=200", "sequences.split_by=leave_one_out")
    by_user = Runtime(config, runtime.spark)
    with pytest.raises(
        TrailvecError, match=r"made with sequences\.split_by = time, not leave_one_out as configured: run"
    ):
        compare(by_user, ("m1", "late"))
    items = [row.asDict(recursive=True) for row in runtime.latest(ITEMS).collect()]
    fill(by_user, SEQUENCES, rows)
    with pytest.raises(TrailvecError, match=r"items was counted with sequences\.split_by = time, not leave_one_out"):
        compare(by_user, ("m1", "late"))
    fill(by_user, ITEMS, items)
    compare(by_user, ("m1", "late"))  # each user has a cut
    rarer = Runtime(
        make_config(runtime.root, "vocabulary.min_count=6", "sequences.split_by=leave_one_out"), runtime.spark
    )
    with pytest.raises(
        TrailvecError, match=r"sequences was made with vocabulary\.min_count = \d+, not 6 as configured: run"
    ):
        compare(rarer, ("m1", "m1"))  # to the floors more items would be unknown than to the model
    fill(rarer, ITEMS, items)
    with pytest.raises(
        TrailvecError, match=r"items was made with vocabulary\.min_count = 6, not \d+ as configured, so rarer items"
    ):
        compare(by_user, ("m1", "m1"))
    fill(by_user, ITEMS, items)
    told = {"config": {"sequences": {"split_by": "time"}}, "table_ids": {}}
    save_model(runtime.models / "late", model, {"model_version": "late", "as_of": "2024-06-01", "provenance": told})
    with pytest.raises(
        TrailvecError, match=r"late was trained with sequences\.split_by = time, and has learnt the last action of"
    ):
        compare(by_user, ("m1", "late"))


def test_what_nothing_can_be_said_of_is_one_sentence(shop: tuple[Runtime, Rows]) -> None:
    runtime, _ = shop
    make_model(runtime, "m1", seed=1)
    runtime.spark.sql(f"DELETE FROM delta.`{runtime.path(SEQUENCES)}` WHERE pmod(xxhash64(user_id), 1000000) < 500000")
    one = Runtime(make_config(runtime.root, "evaluate.max_users=1"), runtime.spark)
    with pytest.raises(TrailvecError, match=r"evaluate\.max_users = 1 drew none of the users of split test: raise it"):
        compare(one, ("m1", "m1"))
    runtime.spark.sql(f"UPDATE delta.`{runtime.path(ITEMS)}` SET target_count = 0")
    with pytest.raises(TrailvecError, match=r"in training none has an event of sequences\.target_event_types = "):
        compare(runtime, ("m1", "m1"))
    runtime.spark.sql(f"DELETE FROM delta.`{runtime.path(SEQUENCES)}`")
    with pytest.raises(TrailvecError, match="table sequences has no row of split test, so nothing can be ranked"):
        compare(runtime, ("m1", "m1"))


def test_an_evaluation_replaces_its_models_rows_of_its_split_alone(shop: tuple[Runtime, Rows]) -> None:
    runtime, _ = shop
    make_model(runtime, "o'm", seed=1)
    about = {"model_version": "o'm", "as_of": CUT, "is_cold": False}
    items = [{"item_id": f"i{n}", "item_index": n, "vector": [1.0, float(n)]} | about for n in (2, 3)]
    fill(runtime, ITEM_EMBEDDINGS, items)
    session = {"session_id": "s", "user_id": "u", "verticals": [], "events": [], "event_count": 0, "amount": None}
    fill(runtime, SESSIONS, [session | dict.fromkeys(("start_ts", "end_ts", "run_start_ts"), CUT)])
    both = [evaluation_row(model, 0.1, 0.2, 0.3) for model in ("m2", "o'm")]
    fill(runtime, EVALUATION, [row | {"split": split} for row in both for split in ("test", "valid")])
    Runtime(make_config(runtime.root, 'evaluate.split="valid"'), runtime.spark).execute(evaluate.STAGE)
    found = {(r.model_version, r.split, r.task) for r in runtime.latest(EVALUATION).collect()}
    kept = {("m2", "test", "new"), ("m2", "valid", "new"), ("o'm", "test", "new")}
    assert found == kept | {("o'm", "valid", "space")}


def test_the_stages_figures_are_what_plain_python_counts(shop: tuple[Runtime, Rows]) -> None:
    """Another week has begun since the sequences were cut; some items are unknown, or came after the model."""
    runtime, rows = shop
    settings = (*SETTINGS, 'sequences.target_event_types=["buy"]')
    items = [row.asDict(recursive=True) for row in runtime.latest(ITEMS).collect()]
    runtime = Runtime(make_config(runtime.root, *settings), runtime.spark)
    fill(runtime, ITEMS, items)
    model = make_model(runtime, "m1", seed=1)
    vectors = model.item_vectors().detach().numpy()
    about = {"model_version": "m1", "as_of": CUT, "is_cold": False}
    embedded = [{"item_id": f"i{n}", "item_index": n, "vector": vectors[n].tolist()} | about for n in range(2, 29)]
    fill(runtime, ITEM_EMBEDDINGS, embedded)
    for row, following in zip(rows, ([4], [1, 1, 4], [29], [22], [21]), strict=False):
        row.update(target_item_index=following, target_ts=[CUT] * len(following))
    rows[0].update({name: (rows[0][name] * 20)[:20] for name in FEATURES}, length=20)
    day = timedelta(days=1)
    newest = sequences(make_rows(USERS, seed=2), "score")
    fill(runtime, SEQUENCES, rows + newest, note=Cuts(CUT - 28 * day, CUT, CUT).note())
    log = [
        ("u3", 22, -day, "buy"),  # the model ranks it low
        ("u4", 21, -2 * day, "view"),
        ("u4", 21, day / 2, "buy"),
        ("u4", 22, -27.5 * day, "buy"),
        *[("other", item, -60 * day, "buy") for item in (4, 16, 28)],
        *[("another", item, -50 * day, "buy") for item in (4, 11, 26)],
        ("other", 4, 30 * day, "buy"),  # a Monday
    ]
    sessions = [session_of(user, f"i{item}", CUT + after, of) for user, item, after, of in log]
    fill(runtime, SESSIONS, sessions)
    runtime.execute(evaluate.STAGE)

    evaluation = runtime.latest(EVALUATION).collect()
    found = {
        (r["method"], r["slice"], r["slice_value"]): r
        for r in evaluation
        if (r["task"], r["metric"]) == ("next", "recall@10")
    }
    rankable = [n for n in range(2, 29) if n % 5]
    popular = sorted(rankable, key=lambda n: (-(n % 5), n))[:10]
    own = {"u3": 22, "u4": 22}  # the other one of u4's is what the row asks

    def recall(best: list[int], targets: list[int]) -> float:
        hits = set(best) & set(targets)
        return len(hits) / (len(set(targets) - {1}) + targets.count(1))

    def mean(method: str, kind: str, name: str) -> tuple[Any, int]:
        row = found[method, kind, name]
        return pytest.approx(row["value"]), row["counted"]

    targets = {row["user_id"]: row["target_item_index"] for row in rows}
    values = [recall(popular, of) for of in targets.values()]
    assert mean("popularity", "all", "all") == (np.mean(values), USERS)
    values = [recall([own[user], *popular[:9]] if user in own else popular, of) for user, of in targets.items()]
    assert mean("own_frequency", "all", "all") == (np.mean(values), USERS)
    numbered = [inside for of in targets.values() if (inside := [n for n in of if 1 < n < 30])]
    values = [recall(popular, of) for of in numbered]
    assert mean("popularity", "vertical", "food") == (np.mean(values), len(numbered))
    few = sum(row["length"] < 5 for row in rows)
    assert {key[2]: r["counted"] for key, r in found.items() if key[:2] == ("popularity", "history")} == {
        "1-4": few,
        "5-19": USERS - few,  # a model reads so many of longer rows
    }

    states = {user: state for user, (state, *_) in by_plain_loop(model, rows).items()}
    values = [
        recall(sorted(rankable, key=lambda n, user=user: -float(states[user] @ vectors[n]))[:10], of)
        for user, of in targets.items()
    ]
    assert mean("model", "all", "all") == (np.mean(values), USERS)
    buyers = {n: {user for user, item, after, _ in log if item == n and after < -28 * day} for n in rankable}

    def likeness(one: int, other: int) -> float:
        both = buyers[one] & buyers[other]
        return len(both) / math.sqrt(len(buyers[one]) * len(buyers[other])) if both else 0.0

    values = []
    for row in rows:
        history = [n for n in reversed(row["item_index"]) if n in rankable]
        scores = {n: sum(0.7**step * likeness(one, n) for step, one in enumerate(history)) for n in rankable}
        best = sorted(rankable, key=lambda n: (-round(scores[n], 5), n))[:10]
        values.append(recall(best, row["target_item_index"]))
    assert mean("item_knn", "all", "all") == (np.mean(values), USERS)

    whole = {(r["method"], r["metric"]): r for r in evaluation if r["task"] in ("space", "drift")}
    pairs = [(states[user], vectors[n]) for user, of in targets.items() for n in of if n in rankable]
    apart = [one / np.linalg.norm(one) - other / np.linalg.norm(other) for one, other in pairs]
    row = whole["users_items", "alignment"]
    assert (row["value"], row["counted"]) == (pytest.approx(np.mean([each @ each for each in apart])), len(pairs))
    later = {user: state for user, (state, *_) in by_plain_loop(model, newest).items()}
    cosines = [
        one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        for one, other in ((states[user], later[user]) for user in targets)
    ]
    assert whole["users", "cosine"]["value"] == pytest.approx(np.mean(cosines))

    gate = 'evaluate.gate=[{task="next", method="model", metric="ndcg@10", at_least=0.0}]'
    asked = Runtime(make_config(runtime.root, *settings, gate), runtime.spark)
    assert asked.execute(evaluate.STAGE).skipped
    assert evaluate.refusal(asked, "m1") is None
    shutil.rmtree(runtime.models / "m1")
    make_model(runtime, "m1", seed=2)
    assert evaluate.refusal(asked, "m1") == (
        "model m1 must not become current (evaluate.gate): it was trained or aligned again after it was evaluated: "
        "run `trailvec evaluate` first"
    )

    # Today's training window ends two days after the one that rows of the valid split were cut by.
    valid = Runtime(make_config(runtime.root, 'evaluate.split="valid"'), runtime.spark)
    users = pd.DataFrame({"user_id": ["u4"], "cut_us": [microseconds(CUT - 28 * day)]})
    trained: list[np.ndarray] = []
    met: list[set[str]] = []  # whose sessions are laid out event by event, each time

    def lay_out(sessions: DataFrame, *names: str) -> DataFrame:
        met.append({row.user_id for row in sessions.select("user_id").distinct().collect()})
        return events_of(sessions, *names)

    def look(runtime: Runtime) -> None:
        cuts = cut_times(log_end(runtime.read(SESSIONS), "end_ts"), runtime.config.sequences)
        trained.append(evaluate._interactions(runtime, users, 29, cuts)[1].toarray())

    with patch.object(evaluate, "events_of", lay_out):
        report = valid.execute(Stage("look", "", look, reads=(SESSIONS, ITEMS, CONTEXT_VALUES)))
    assert not report.notes
    of_rows, of_all, of_known = met
    assert (of_rows, of_known) == ({"u4"}, {"other", "another"})
    assert of_rows | of_known < of_all
    assert np.argwhere(trained[0]).tolist() == [[0, 4], [0, 11], [0, 26], [1, 4], [1, 16], [1, 28]]  # without u4


def test_of_too_many_users_item_knn_learns_from_a_sample_of_its_own(shop: tuple[Runtime, Rows]) -> None:
    runtime, _ = shop
    early = CUT - timedelta(days=1)
    fill(runtime, SESSIONS, [session_of(f"v{n}", "i4", early, "buy") for n in range(300)])
    evaluated = evaluate._sample(runtime.latest(SESSIONS).select("user_id"), 300, 10).toPandas()
    laid_out: list[set[str]] = []  # the users of each layout: those evaluated, all, those that item-kNN learns from
    trained: list[np.ndarray] = []

    def lay_out(sessions: DataFrame, *names: str) -> DataFrame:
        laid_out.append({row.user_id for row in sessions.select("user_id").distinct().collect()})
        return events_of(sessions, *names)

    def look(runtime: Runtime) -> None:
        users = evaluated.assign(cut_us=microseconds(CUT))
        trained.append(evaluate._interactions(runtime, users, 29, Cuts(CUT, CUT, CUT))[1].toarray())

    with patch.object(evaluate, "events_of", lay_out), patch.object(evaluate, "KNN_USERS", 10):
        report = runtime.execute(Stage("look", "", look, reads=(SESSIONS, ITEMS, CONTEXT_VALUES)))
    asked, everybody, known = laid_out
    assert (asked, len(everybody)) == (set(evaluated["user_id"]), 300)
    assert 0 < len(known) == len(trained[0]) < 30
    assert not asked <= known
    assert report.notes == [f"item_knn learnt from {len(known)} of 300 users, a sample"]
