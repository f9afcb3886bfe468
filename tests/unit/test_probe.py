"""The heads against scikit-learn used directly, TF-IDF and SVD against plain numpy, folds and matrices by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, TimeSeriesSplit, cross_val_score

from jobs import evaluate
from jobs.config import ProbeSettings
from jobs.probe import _inputs, fold_notes, matrix, results_of
from jobs.runtime import Runtime
from tests.conftest import make_config
from tests.sequence_files import SPEC
from training.checkpoint import describe_weights
from training.probes import HEADS, folds_of, one_length, probe, standardised, tfidf_svd


@pytest.fixture
def told() -> tuple[np.ndarray, np.ndarray]:
    """Features of which the first says something of the label."""
    random = np.random.default_rng(0)
    labels = (random.random(120) < 0.4).astype(np.int64)
    features = random.normal(size=(120, 5)) * [1, 10, 100, 1, 1] + labels[:, None] * [1, 0, 0, 0, 0]
    return features, labels


@pytest.mark.parametrize("head", ["logistic", "boosting"])
def test_a_probe_is_scikit_learns_own_cross_validation(head: str, told: tuple[np.ndarray, np.ndarray]) -> None:
    features, labels = told
    found = probe(features, labels, head, folds=4, seeds=2)
    for metric, name in (("auc", "roc_auc"), ("average_precision", "average_precision")):
        expected = []
        for seed in (0, 1):
            folds = StratifiedKFold(4, shuffle=True, random_state=seed)
            expected.append(
                cross_val_score(HEADS[head](seed), one_length(features), labels, cv=folds, scoring=name).mean()
            )
        assert found[metric] == pytest.approx(expected)
        assert len(set(found[metric])) == 2


@pytest.mark.parametrize(("head", "fits"), [("logistic", 3), ("boosting", 6)])
def test_by_time_the_figures_are_those_of_the_folds(
    head: str, fits: int, told: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All seeds have the same folds, and to the logistic head they are the same altogether."""
    features, labels = told
    expected = [
        cross_val_score(HEADS[head](seed), one_length(features), labels, cv=TimeSeriesSplit(3), scoring="roc_auc")
        for seed in (0, 1)
    ]
    made, make = [], HEADS[head]
    monkeypatch.setitem(HEADS, head, lambda seed: made.append(seed) or make(seed))
    found = probe(features, labels, head, folds=3, seeds=2, times=np.arange(120))
    assert found["auc"] == pytest.approx(np.mean(expected, axis=0))
    assert len(set(found["auc"])) == len(set(found["average_precision"])) == 3
    assert len(made) == fits


@pytest.mark.parametrize(("seed", "strength"), [(15, 1.0), (1, 0.1)])
def test_the_logistic_head_is_held_back_as_its_own_training_rows_ask_for(seed: int, strength: float) -> None:
    random = np.random.default_rng(seed)
    labels = (random.random(90) < 0.5).astype(np.int64)
    features = random.normal(size=(90, 3)) / np.sqrt(3) + labels[:, None] * [0.5, 0, 0]
    scores = {
        c: cross_val_score(LogisticRegression(C=c, max_iter=1000), features, labels, cv=3, scoring="roc_auc").mean()
        for c in (0.1, 0.3, 1.0)
    }
    assert max(scores, key=scores.__getitem__) == strength
    expected = LogisticRegression(C=strength, max_iter=1000).fit(features, labels).predict_proba(features)
    assert HEADS["logistic"](0).fit(features, labels).predict_proba(features) == pytest.approx(expected, abs=1e-3)
    rare = np.arange(90) < 5  # too few to ask
    expected = LogisticRegression(C=0.3, max_iter=1000).fit(features, rare).predict_proba(features)
    found = HEADS["logistic"](0).fit(features, rare.astype(np.int64))
    assert found.predict_proba(features) == pytest.approx(expected, abs=1e-3)


def test_the_majority_ranks_nobody(told: tuple[np.ndarray, np.ndarray]) -> None:
    found = probe(*told, "majority", folds=4, seeds=1)
    assert found["auc"] == [0.5]
    assert found["average_precision"] == pytest.approx([told[1].mean()], abs=0.02)


def test_with_times_training_comes_before_testing() -> None:
    times = np.array([50, 10, 40, 20, 30, 30, 60, 30])
    labels = np.array([0, 0, 1, 1, 0, 1, 1, 0])
    found = [(times[a].tolist(), times[b].tolist()) for a, b in folds_of(labels, times, 3, seed=0)]
    # In order: 10 20 30 30 30 40 50 60; the second of two stretches that share a moment learns nothing from it.
    assert found == [([10, 20], [30, 30]), ([10, 20], [30, 40]), ([10, 20, 30, 30, 30, 40], [50, 60])]


def test_folds_of_one_label_do_not_count() -> None:
    times = np.arange(12)
    labels = np.array([0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0])
    found = probe(times[:, None].astype(float), labels, "logistic", folds=3, seeds=1, times=times)
    # Only the second fold tests on both labels: rows 6 to 8 by 0 to 5; the feature's sign decides about all of it.
    assert len(found["auc"]) == 1
    assert probe(np.zeros((6, 1)), np.zeros(6, np.int64), "logistic", folds=2, seeds=1, times=np.arange(6)) == {
        "auc": [],
        "average_precision": [],
    }
    timed = pd.DataFrame({"user_id": [f"u{n}" for n in times], "task": "one", "label": labels, "cut": times})
    none = timed.assign(task="none", label=times // 6)
    assert list(fold_notes(pd.concat([timed, none, timed.assign(task="shuffled", cut=0)]), ProbeSettings(folds=3))) == [
        "none is not probed: no fold by label_ts has both labels in its training and its test part",
        "one: 1 of 3 folds by label_ts counted: the others lack one of the labels in their training or test part",
    ]


def test_tfidf_svd_is_numpys() -> None:
    counts = np.random.default_rng(1).poisson(0.7, size=(40, 15))
    counts[3] = 0
    df = (counts > 0).sum(axis=0)
    weights = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * (np.log(41 / (1 + df)) + 1)
    lengths = np.linalg.norm(weights, axis=1, keepdims=True)
    u, s, _ = np.linalg.svd(weights / np.where(lengths, lengths, 1), full_matrices=False)
    expected = u[:, :4] * s[:4]
    found = tfidf_svd(sp.csr_matrix(counts), 4)
    # A direction's sign is free.
    assert np.abs(found) == pytest.approx(np.abs(expected), abs=1e-3)
    assert not found[3].any()
    assert tfidf_svd(sp.csr_matrix(counts[:, :3]), 64).shape == (40, 2)


def test_one_length_keeps_what_columns_are_to_each_other_and_standardised_does_not() -> None:
    numbers = np.array([[1.0, 10, 7], [3, 50, 7]])
    assert one_length(numbers) == pytest.approx(np.array([[-1, -20, 0], [1, 20, 0]]) / np.sqrt(401))
    assert standardised(numbers).tolist() == [[-1, -1, 0], [1, 1, 0]]
    assert not one_length(np.ones((3, 2))).any()


def test_matrix_by_hand() -> None:
    rows = pd.DataFrame({"user_id": ["b", "a", "b"], "name": ["y", "y", "x"], "value": [2, 3, None]})
    assert matrix(rows, ["a", "b", "c"], "name", "value").toarray().tolist() == [[0, 3], [0, 2], [0, 0]]


def test_results_hold_the_users_of_each_task_and_leave_out_what_has_too_few() -> None:
    users = [f"u{n}" for n in range(40)]
    full = pd.DataFrame({"user_id": users, "task": "told", "label": [0, 1] * 20, "cut": 0})
    few = pd.DataFrame({"user_id": users[:9], "task": "few", "label": [1] + [0] * 8, "cut": 0})
    features = {
        name: np.array([[n % 2.0] for n in range(40)])
        for name in ("vector", "profile", "majority", "rfm", "tfidf_svd", "aggregates")
    }
    settings = ProbeSettings(heads=["logistic"], folds=2, seeds=2)
    shuffled = pd.concat([few, full]).sample(frac=1, random_state=0)
    rows = list(results_of(shuffled, users, features, settings))
    assert {row.task for row in rows} == {"told"}
    assert {row.features: row.value for row in rows if row.metric == "auc"} == {name: 1.0 for name in features} | {
        "majority": 0.5
    }
    assert {(row.users, row.positives) for row in rows} == {(40, 20)}


def test_a_model_trained_again_under_its_version_is_another_one(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "m1"
    folder.mkdir(parents=True)
    runtime = Runtime(make_config(tmp_path, "model.version=m1"))
    for inputs in (_inputs, evaluate._inputs):
        found = []
        for weights in (b"once", b"again"):
            (folder / "model.safetensors").write_bytes(weights)
            describe_weights(folder, SPEC, {"model_version": "m1"})
            found.append(inputs(runtime))
        assert found[0] != found[1]
