"""The rotation between two spaces against scipy's, and how alike they are against counting by hand."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from scipy.linalg import orthogonal_procrustes
from scipy.stats import ortho_group

from jobs.align import (
    FEWEST_HELD,
    FEWEST_USERS,
    _ranking,
    _rankings,
    check_again,
    compare,
    no_ranking,
    refusal,
    too_few_items,
    too_few_users,
)
from jobs.config import AlignSettings
from jobs.model_folders import description
from jobs.runtime import Runtime
from jobs.tables import Table
from spark_udfs.alignment import mean_cosine, overlap, rotation_of
from tests.conftest import make_config
from training import checkpoint
from training.checkpoint import read_alignment, read_rotation, write_alignment


def vectors(rows: int, seed: int, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def test_a_model_that_was_never_scored_is_not_sought_in_the_whole_log(tmp_path: Path) -> None:
    read: list[int] = []

    def noted(_: Table) -> Iterator[dict[str, Any]]:
        for number in range(5):
            read.append(number)
            yield {"note": {"model": {"version": "m1", "weights": "w"}}}

    check_again(Mock(noted=noted, newest_current_model=lambda: "m1"), tmp_path / "m2")
    assert read == [0]


def test_the_rotation_is_scipys_and_keeps_all_products() -> None:
    new, old = vectors(50, 1), vectors(50, 2)
    found = rotation_of(new.T.astype(np.float64) @ old)
    np.testing.assert_allclose(found, orthogonal_procrustes(new, old)[0], atol=1e-5)
    np.testing.assert_allclose((new @ found) @ (new @ found).T, new @ new.T, atol=1e-4)


def test_a_space_that_was_only_turned_comes_back() -> None:
    old = vectors(50, 1)
    turn = ortho_group.rvs(8, random_state=3)
    new = (old @ turn).astype(np.float32)
    found = rotation_of(new.T.astype(np.float64) @ old)
    np.testing.assert_allclose(new @ found, old, atol=1e-5)
    report = compare((new[:10], old[:10]), (new, old), pd.Series(["a"] * 20 + ["b"] * 30), found.astype(np.float32))
    assert report["users"]["cosine_before"] < 0.5
    assert report["users"]["cosine_after"] == 1
    assert report["users"]["overlap@10"] == report["items"]["overlap@10"] == 1
    assert report["centroids"]["b"] == {"items": 30, "cosine": 1.0, "moved": 0.0}
    assert report["items"]["mean_norm"]["old"] == report["items"]["mean_norm"]["new"]
    # The items of one vertical on the other side, twice as far out.
    new[:20] *= -2
    report = compare((new, old), (new, old), pd.Series(["a"] * 20 + ["b"] * 30), found.astype(np.float32))
    assert report["centroids"]["a"] == {"items": 20, "cosine": -1.0, "moved": 3.0}
    assert report["centroids"]["b"]["moved"] == 0
    norms = {name: float(np.sqrt((of**2).sum(axis=1)).mean()) for name, of in (("old", old), ("new", new))}
    assert norms["new"] > 1.2 * norms["old"]
    assert report["items"]["mean_norm"] == pytest.approx(norms, abs=1e-4)


def by_hand(queries: np.ndarray, candidates: np.ndarray, k: int, cosine: bool) -> list[set[int]]:
    found = []
    for number, query in enumerate(queries):
        scores = []
        for place, candidate in enumerate(candidates):
            if cosine and place == number:
                continue
            score = float(query @ candidate)
            if cosine:
                score /= float(np.linalg.norm(query) * np.linalg.norm(candidate))
            scores.append((-score, place))
        found.append({place for _, place in sorted(scores)[:k]})
    return found


@pytest.mark.parametrize("cosine", [False, True])
def test_overlap_is_what_counting_finds(cosine: bool) -> None:
    items = vectors(600, 1), vectors(600, 1) + vectors(600, 2) / 3
    queries = tuple(of[:300] for of in items) if cosine else (vectors(300, 3), vectors(300, 3) + vectors(300, 4) / 3)
    one, other = (by_hand(*pair, 5, cosine) for pair in zip(queries, items, strict=True))
    expected = sum(len(a & b) for a, b in zip(one, other, strict=True)) / (300 * 5)
    assert 0.2 < expected < 0.8
    found = overlap((queries[0], queries[1]), items, 5, "cosine" if cosine else "dot", ids=cosine)
    assert found == pytest.approx(expected)


def test_a_vector_of_zeros_has_no_direction() -> None:
    assert mean_cosine(np.array([[1, 0], [0, 0]], np.float32), np.array([[1, 1], [1, 0]], np.float32)) == pytest.approx(
        0.5**0.5
    )
    assert np.isnan(mean_cosine(np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)))


def report_of(users: float | None, items: float, old: float | None, new: float | None) -> dict[str, object]:
    return {
        "model_version": "m2",
        "onto": "m1",
        "users": {"overlap@10": users},
        "items": {"overlap@10": items},
        "ranking": {"old": old, "new": new},
    }


def test_the_gate_says_by_how_much() -> None:
    settings = AlignSettings(min_overlap=0.5, max_ranking_loss=0.1)
    assert refusal(report_of(0.5, 0.6, 0.20, 0.181), settings) is None
    assert refusal(report_of(None, 0.6, None, 0.18), settings) is None
    assert refusal(report_of(0.49, 0.2, 0.2, 0.17), settings) == (
        "model m2 must not replace m1: 49.00% of a user's 10 nearest items stay (align.min_overlap = 0.5), and "
        "20.00% of an item's 10 nearest items stay (align.min_overlap = 0.5), and "
        "NDCG@10 in validation fell by 15.00%, from 0.2000 to 0.1700 (align.max_ranking_loss = 0.1); "
        "train another model (train.warm_start = true keeps the space) or change the limit"
    )
    near = refusal(report_of(0.0996, 0.6, 0.2, None), AlignSettings(min_overlap=0.1))
    assert near is not None  # so near its limit that it would round to it
    assert "9.96% of a user's 10 nearest items stay (align.min_overlap = 0.1)" in near
    assert refusal({"model_version": "m2", "onto": None}, settings) is None


def test_without_validation_the_gate_says_that_it_says_nothing() -> None:
    settings = AlignSettings(min_overlap=0.5, max_ranking_loss=0.1)
    assert refusal(report_of(0.5, 0.6, 0.2, None), settings) is None
    assert no_ranking(report_of(0.5, 0.6, 0.2, None), settings) == (
        "align.max_ranking_loss says nothing about model m2: nobody in its valid split has a next item that it knows"
    )
    for old, said in ((None, "not known"), (0.0, "0")):
        assert no_ranking(report_of(0.5, 0.6, old, 0.2), settings) == (
            f"align.max_ranking_loss says nothing about model m2: NDCG@10 in validation of m1 is {said}"
        )
    for old, new in ((0.2, 0.1), (0.2, 0.0), (None, None), (0.0, None)):
        assert no_ranking(report_of(0.5, 0.6, old, new), settings) is None
    assert no_ranking({"model_version": "m2", "onto": None}, settings) is None
    assert no_ranking(report_of(0.5, 0.6, 0.2, None), AlignSettings(max_ranking_loss=1)) is None


def test_without_users_of_the_same_history_items_alone_decide() -> None:
    nobody = (vectors(0, 1), vectors(0, 2))
    items = vectors(20, 3), vectors(20, 4)
    report: dict[str, Any] = {"model_version": "m2", "onto": "m1"}
    report |= compare(nobody, items, pd.Series(["a"] * 20), np.eye(8, dtype=np.float32))
    assert report["users"]["compared"] == 0
    assert report["users"]["overlap@10"] is None
    why = refusal(report, AlignSettings(min_overlap=1))
    assert why is not None
    assert re.match(r"model m2 must not replace m1: [\d.]+% of an item's 10 nearest items stay ", why)
    assert too_few_users(report, AlignSettings()) == (
        "0 users with a vector of model m1 have not acted since and are not cold, fewer than the 50 needed: "
        "align.min_overlap is checked on items alone for model m2"
    )
    assert too_few_users(report, AlignSettings(min_overlap=0)) is None
    assert too_few_users({"model_version": "m2", "onto": None}, AlignSettings()) is None


@pytest.mark.parametrize(("compared", "decide"), [(1, False), (FEWEST_USERS - 1, False), (FEWEST_USERS, True)])
def test_a_handful_of_users_decides_for_nobody_else(compared: int, decide: bool) -> None:
    report = report_of(0.0, 0.6, None, None)
    report["users"] = {"overlap@10": 0.0, "compared": compared}
    assert (refusal(report, AlignSettings(min_overlap=0.5)) is not None) == decide
    assert (too_few_users(report, AlignSettings(min_overlap=0.5)) is None) == decide


def test_of_few_items_the_gate_says_that_it_says_nothing() -> None:
    users = vectors(600, 1), vectors(600, 2)
    for count, by_chance in ((8, 1.0), (51, 0.2), (201, 0.05)):
        items = vectors(count, 3), vectors(count, 4)
        report: dict[str, Any] = {"model_version": "m2", "shared_items": count}
        report |= compare(users, items, pd.Series(["a"] * count), None)
        assert report["items"]["overlap@10_by_chance"] == by_chance
        for kind in ("users", "items"):
            assert report[kind]["overlap@10"] == pytest.approx(report[kind]["overlap@10_by_chance"], abs=0.03)
        assert (too_few_items(report, AlignSettings(min_overlap=0.2)) is None) == (by_chance < 0.2)
        assert too_few_items(report, AlignSettings(min_overlap=0)) is None
    assert too_few_items({"model_version": "m2", "onto": None}, AlignSettings()) is None
    assert too_few_items({**report, "items": {"overlap@10_by_chance": 0.2}}, AlignSettings()) == (
        "with so few items (201), 20.00% of the 10 nearest would stay by chance alone: align.min_overlap = 0.1 says "
        "nothing about model m2"
    )


def test_a_models_ranking_is_read_from_its_description_alone(tmp_path: Path) -> None:
    runtime = Runtime(make_config(tmp_path))
    assert _ranking(description(runtime, "m1")) is None
    folder = tmp_path / "models" / "m1"
    folder.mkdir(parents=True)
    training = {"best_epoch": 2, "epochs": [{"ndcg@10": 0.1}, {"ndcg@10": 0.3}, {"ndcg@10": 0.2}]}
    for text, found in ((json.dumps({"training": training}), 0.3), ("{}", None), ("[]", None), ("{", None)):
        (folder / "model.json").write_text(text)
        assert _ranking(description(runtime, "m1")) == found


@pytest.mark.parametrize(
    ("was", "now", "asks"),
    [
        ({"sequences": {"seen_days": 28}}, {"sequences": {"seen_days": 0}}, "sequences.seen_days = 0, not 28"),
        ({"sequences": {"seen_days": 28}}, {"sequences": {"seen_days": 14}}, None),
        (
            {"sequences": {"target_event_types": []}},
            {"sequences": {"target_event_types": ["buy"]}},
            "sequences.target_event_types = ['buy'], not []",
        ),
        ({"vocabulary": {"min_count": 5}}, {"vocabulary": {"min_count": 9}}, "vocabulary.min_count = 9, not 5"),
        ({}, {"vocabulary": {"min_count": 9}}, None),
    ],
)
def test_answers_to_two_questions_are_not_compared(
    tmp_path: Path, was: dict[str, Any], now: dict[str, Any], asks: str | None
) -> None:
    """With seen_days = 0 validation asks for new items alone, which is harder: a model as good scores half as much."""
    runtime = Runtime(make_config(tmp_path))
    for version, ndcg, config in (("m1", 0.12, was), ("m2", 0.06, now)):
        (tmp_path / "models" / version).mkdir(parents=True)
        training = {"best_epoch": 1, "epochs": [{"ndcg@10": ndcg}]}
        about = {"training": training, "provenance": {"config": config}}
        (tmp_path / "models" / version / "model.json").write_text(json.dumps(about))
    report = {"model_version": "m2", "onto": "m1", "ranking": _rankings(runtime, "m1", "m2")}
    if asks is None:
        assert "NDCG@10 in validation fell by 50.00%" in str(refusal(report, AlignSettings()))
        assert no_ranking(report, AlignSettings()) is None
    else:
        assert refusal(report, AlignSettings()) is None
        assert no_ranking(report, AlignSettings()) == (
            f"align.max_ranking_loss says nothing about model m2: its validation asks something else than that of m1 "
            f"({asks})"
        )


@pytest.mark.parametrize(("held", "decide"), [(3, False), (FEWEST_HELD - 1, False), (FEWEST_HELD, True)])
def test_a_ranking_of_few_held_out_users_decides_for_nobody(tmp_path: Path, held: int, decide: bool) -> None:
    runtime = Runtime(make_config(tmp_path))
    for version, ndcg, users in (("m1", 0.3333, 2 * FEWEST_HELD), ("m2", 0.0, held)):
        (tmp_path / "models" / version).mkdir(parents=True)
        training = {"best_epoch": 1, "epochs": [{"ndcg@10": ndcg}], "held_users": users}
        (tmp_path / "models" / version / "model.json").write_text(json.dumps({"training": training}))
    report = {"model_version": "m2", "onto": "m1", "ranking": _rankings(runtime, "m1", "m2")}
    assert (refusal(report, AlignSettings()) is not None) == decide
    few = (
        f"align.max_ranking_loss says nothing about model m2: a validation had {held:,} held-out users, fewer than the "
        f"1,000 needed"
    )
    assert no_ranking(report, AlignSettings()) == (None if decide else few)


def test_a_kill_while_an_alignment_is_made_anew_leaves_a_model_that_is_not_aligned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (np.eye(8, dtype=np.float32) * sign for sign in (1, -1))
    write_alignment(tmp_path, first, {"onto": "m1"})

    def killed(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            write_alignment(tmp_path, second, {"onto": "m2"})
    assert read_alignment(tmp_path) is None  # so that `align` makes it
    assert read_rotation(tmp_path) is None
    write_alignment(tmp_path, second, {"onto": "m2"})
    assert (read_rotation(tmp_path) == second).all()
