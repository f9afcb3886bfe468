"""The profile's parts by hand, what a basis keeps on disk, and the adapter that lays Arrow's lists out."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp

from jobs.config import Config, ProfileSettings
from jobs.errors import TrailvecError
from jobs.profile_users import run, too_late
from spark_udfs.arrow import as_lists
from spark_udfs.profile import KINDS, counts_of, profiles
from tests.conftest import make_config
from tests.sequence_files import SPEC
from training.profile import AT_ONCE, PARTS, WEIGHTS, Basis, Terms, _weighed, fit_basis, read_basis, write_basis

USERS = 60


@pytest.fixture
def sample() -> tuple[np.ndarray, dict[str, sp.csr_matrix]]:
    """States and counts of users."""
    random = np.random.default_rng(0)
    counts = {"items": random.poisson(0.5, (USERS, 30)), "categories": random.poisson(2, (USERS, 6))}
    counts["statistics"] = random.normal(5, [[1, 100, 0]], (USERS, 3))
    matrices = {kind: sp.csr_matrix(of.astype(np.float64)) for kind, of in counts.items()}
    return random.normal(3, size=(USERS, 4)).astype(np.float32), matrices


def fitted(
    states: np.ndarray, counts: dict[str, sp.csr_matrix], most: int = 100, before: sp.csr_matrix | None = None
) -> Basis:
    items = Terms.fit(counts["items"], most, presence=True)
    names = [f"{('red', 'green', 'blue')[n % 3]} item, no {n} of many" for n in range(len(items.numbers))]
    names[0] = ""  # has none
    once = counts["statistics"] + sp.csr_matrix([[1.0, 2, 0]] * len(states))
    return fit_basis(
        states,
        counts,
        names=("a", "b", "same"),
        items=items,
        item_names=names,
        before=once if before is None else before,
        since=np.log1p(np.arange(2.0 * len(states))).reshape(len(states), 2),
        item_width=7,
        width=5,
        most=most,
    )


def test_each_part_weighs_what_it_should(sample: tuple[np.ndarray, dict[str, sp.csr_matrix]]) -> None:
    basis = fitted(*sample)
    found = basis.profiles(*sample)
    widths = {"state": 4, "items": 7, "amounts": 5, "words": 5, "categories": 5, "statistics": 3, "forecast": 2}
    assert basis.widths == widths
    assert found.shape == (USERS, 31)
    assert found.dtype == np.float32
    directions = basis.directions["items"]  # a direction's sign is nothing that libraries agree on
    assert (directions[np.abs(directions).argmax(axis=0), range(directions.shape[1])] > 0).all()
    start = 0
    for part in PARTS:
        of_part = found[:, start : (start := start + basis.widths[part])]
        assert of_part.mean(axis=0) == pytest.approx(0, abs=1e-5)
        # Of three statistics one is the same for all, and is 0.
        share = 2 / 3 if part == "statistics" else 1
        assert (of_part**2).sum(axis=1).mean() == pytest.approx(share * WEIGHTS[part] ** 2, rel=1e-4), part


def test_terms_by_hand_and_what_the_basis_does_not_know_counts_nothing() -> None:
    counts = sp.csr_matrix(np.array([[0, 3, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0.0]]))
    presence, logs = (Terms.fit(counts, 2, presence=of) for of in (True, False))
    assert presence.numbers.tolist() == [1, 3]
    idf = np.log([4 / 3, 4 / 2]) + 1
    assert presence.idf == pytest.approx(idf)
    for terms, row in ((presence, idf), (logs, idf * [1 + np.log(3), 1])):
        expected = [row / np.linalg.norm(row), [1, 0], [0, 0]]
        assert terms.weigh(counts).toarray() == pytest.approx(np.array(expected))
    newer = sp.csr_matrix(np.array([[0, 1, 9, 0, 0, 5.0]]))
    assert presence.weigh(newer).toarray().tolist() == [[1, 0]]
    older = sp.csr_matrix(np.array([[0, 1.0]]))
    assert presence.weigh(older).toarray().tolist() == [[1, 0]]
    assert Terms.fit(counts, 1, presence=True).numbers.tolist() == [1]
    assert Terms.fit(counts[2:], 1, presence=True).weigh(counts).shape == (3, 0)


def test_memory_goes_by_what_users_have_and_not_by_the_largest_number() -> None:
    """An array as long as the catalogue would take gigabytes."""
    of = np.array([7, 2**31 - 2, 7, 10**9, 2**31 - 2, 7])
    counts = sp.csr_matrix((np.array([1.0, 2, 3, 4, 5, 6]), of, [0, 2, 4, 6]), (3, 2**31 - 1))
    tracemalloc.start()
    terms = Terms.fit(counts, 2, presence=True)
    assert terms.numbers.tolist() == [7, 2**31 - 2]
    assert terms.usual(counts) == pytest.approx([10 / 3, 7 / 2])
    assert terms.beside(counts, np.ones(2, np.float32)).toarray().tolist() == [[1, 2], [3, 0], [4, 4]]
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_amounts_by_hand() -> None:
    """How much of an item somebody takes, beside what others take: 0 stands for an amount that is not known."""
    items = sp.csr_matrix((np.array([2.0, 1, 6, 0, 90, 9]), [0, 1, 0, 2, 1, 3], [0, 2, 4, 6]), (3, 4))
    terms = Terms.fit(items, 3, presence=True)
    assert terms.numbers.tolist() == [0, 1, 2]  # of the two that one user has, the lower number
    usual = terms.usual(items)
    assert usual.tolist() == [4, 45.5, 0]
    beside = terms.beside(items, usual)
    assert beside.toarray() == pytest.approx(np.array([[0.5, 0.1, 0], [1.5, 0, 1], [0, 90 / 45.5, 0]]))  # at least .1
    basis = fit_basis(
        np.ones((3, 1), np.float32),
        {"items": items, "categories": items, "statistics": items},
        names=(),
        items=terms,
        item_names=["", "", ""],
        before=items[:0],
        since=np.empty((0, 2)),
        item_width=9,
        width=9,
        most=100,
    )
    weights = np.array([[0.5, 0.1, 0], [1.5, 0, 1], [0, 1, 0]]) * terms.idf
    weights /= np.linalg.norm(weights, axis=1)[:, None]
    half = np.sqrt(0.5)  # of two amounts one is above their mean and one as far below; one alone is neither
    for part, expected in (("items", weights), ("amounts", [[half, -half, 0], [half, 0, -half], [0, 0, 0]])):
        rows = np.linalg.svd(np.array(expected)).Vh
        found = basis.directions[part].T
        assert np.abs(found @ rows[: len(found)].T) == pytest.approx(np.eye(len(found)), abs=1e-5), part


def test_who_takes_twice_as_much_of_everything_takes_more_of_nothing(
    sample: tuple[np.ndarray, dict[str, sp.csr_matrix]],
) -> None:
    states, counts = sample
    for of_user in (np.zeros(USERS), np.random.default_rng(1).uniform(0.5, 2, USERS)):
        items = counts["items"].copy()
        items.data = np.repeat(of_user, np.diff(items.indptr))
        basis = fitted(states, {**counts, "items": items})
        basis.usual[:] = 1.0
        start = basis.widths["state"] + basis.widths["items"]
        end = start + basis.widths["amounts"]
        assert np.ptp(basis.profiles(states, {**counts, "items": items})[:, start:end], axis=0).max() == 0


def test_words_of_names_by_hand() -> None:
    """Names share words and pairs of words that stand side by side; single letters and digits are none."""
    items = sp.csr_matrix(np.array([[5, 0, 1.0], [0, 1, 0], [0, 0, 0]]))
    basis = fit_basis(
        np.ones((3, 1), np.float32),
        {"items": items, "categories": items, "statistics": items},
        names=(),
        items=Terms.fit(items, 9, presence=True),
        item_names=["Oat milk, 1 L", "oat 1 Flakes", "Milch-Kaffee x milch 12"],
        before=items[:0],
        since=np.empty((0, 2)),
        item_width=9,
        width=9,
        most=100,
    )
    # In order: 12, flakes, kaffee, kaffee milch, milch, milch 12, milch kaffee, milk, oat, oat flakes, oat milk.
    # A word that a name has twice is in it once.
    expected = [[0] * 7 + [1, 1, 0, 1], [0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0], [1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0]]
    assert basis.words.toarray().tolist() == expected
    # The first user has two items, each once, however often: of words in two users' items the weight is lower.
    rare, common = np.log(4 / 2) + 1, np.log(4 / 3) + 1
    weights = basis.terms["words"].weigh(basis.terms["items"].present(items) @ basis.words).toarray()
    first = np.array([rare, 0, rare, rare, rare, rare, rare, rare, common, 0, rare])
    assert weights[0] == pytest.approx(first / np.linalg.norm(first))
    assert basis.directions["forecast"].shape == (0, 2)


def test_the_forecast_is_a_ridge_regression_on_what_came_since(
    sample: tuple[np.ndarray, dict[str, sp.csr_matrix]],
) -> None:
    basis = fitted(*sample)
    once = sample[1]["statistics"].toarray() + np.array([1, 2, 0])
    since = np.log1p(np.arange(2.0 * USERS)).reshape(USERS, 2)
    told = (once - once.mean(axis=0))[:, :2] / once.std(axis=0)[:2]  # the third is the same for all
    weights = np.linalg.solve(told.T @ told + 30 * np.eye(2), told.T @ (since - since.mean(axis=0)))
    expected = np.vstack([weights / once.std(axis=0)[:2, None], np.zeros(2)])
    assert basis.directions["forecast"] == pytest.approx(expected, rel=1e-4)
    forecast = sample[1]["statistics"] @ expected
    found = basis.profiles(*sample)[:, -2:]
    assert np.corrcoef(found[:, 0], forecast[:, 0])[0, 1] == pytest.approx(1)


def test_a_user_alone_has_the_profile_that_they_have_among_others(
    sample: tuple[np.ndarray, dict[str, sp.csr_matrix]], tmp_path: Path
) -> None:
    basis = fitted(*sample)
    write_basis(tmp_path, basis, {"as_of": "2024"})
    read = read_basis(tmp_path)
    assert read is not None
    assert read[1]["as_of"] == "2024"
    states, counts = sample
    alone = read[0].profiles(states[7:8], {kind: of[7:8] for kind, of in counts.items()})
    assert alone[0] == pytest.approx(basis.profiles(*sample)[7], abs=1e-6)
    for name, content in (("profile.safetensors", b"x"), ("profile.json", b"[" * 100_000)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TrailvecError, match=r"damaged .*remove profile.json and profile.safetensors there"):
            read_basis(tmp_path)
    (tmp_path / "profile.json").unlink()
    assert read_basis(tmp_path) is None


def test_what_is_the_same_for_all_users_of_the_fit_is_0_for_those_who_come_later(
    sample: tuple[np.ndarray, dict[str, sp.csr_matrix]],
) -> None:
    states, counts = sample
    basis = fitted(states[:1], {kind: of[:1] for kind, of in counts.items()})
    assert not basis.profiles(states, counts).any()


@pytest.mark.parametrize(("kind", "said"), [("statistics", "b"), ("before", "b"), ("items", "quantity")])
def test_no_amount_makes_a_profile_infinite(
    sample: tuple[np.ndarray, dict[str, sp.csr_matrix]], kind: str, said: str
) -> None:
    """Older versions stored amounts whose sum overflows."""
    basis, (states, counts) = fitted(*sample), sample
    infinite = counts["statistics" if kind == "before" else kind].tolil()
    infinite[3, 1] = np.inf
    refused = pytest.raises(TrailvecError, match=rf"infinite statistics \({said}\): table events holds amounts or")
    if kind == "before":
        with refused:
            fitted(states, counts, before=infinite.tocsr())
        return
    with refused:
        fitted(states, counts | {kind: infinite.tocsr()})
    with refused:  # of a user who was not in the sample
        basis.profiles(states, counts | {kind: infinite.tocsr()})


def test_a_basis_that_is_not_finite_is_refused(
    sample: tuple[np.ndarray, dict[str, sp.csr_matrix]], tmp_path: Path
) -> None:
    basis = fitted(*sample)
    basis.shifts["statistics"][1] = np.nan
    write_basis(tmp_path, basis, {})
    with pytest.raises(TrailvecError, match=r"damaged \(its numbers are not finite\): remove profile.json and"):
        read_basis(tmp_path)


def test_settings_that_come_too_late_for_a_basis_are_said() -> None:
    told = {"settings": ProfileSettings().model_dump()}
    folder = Path("/models/m1")
    assert too_late(Config(), told, folder) is None
    changed = Config(profile=ProfileSettings(fit_users=9, width=8))
    assert too_late(changed, {"as_of": "2024"}, folder) is None  # older code told none
    assert too_late(changed, told, folder) == (
        "the profile's basis in /models/m1 stays as it was fitted, in spite of profile.fit_users = 9 (it has 20000), "
        "profile.width = 8 (it has 64): set that back, or remove profile.json and profile.safetensors there and run "
        "`trailvec profile_users --force`, which fits another one, whose dimensions mean something else"
    )


def test_lists_of_a_slice_as_counts() -> None:
    numbers = pa.array([[9], [3, 1], [], [2]], pa.list_(pa.int32())).slice(1)
    values = pa.array([[9.0], [5, 2], [], [7]], pa.list_(pa.float64())).slice(1)
    assert counts_of(numbers, values).toarray().tolist() == [[0, 2, 0, 5], [0, 0, 0, 0], [0, 0, 7, 0]]


def test_users_are_weighed_some_at_a_time_and_alike(
    sample: tuple[np.ndarray, dict[str, sp.csr_matrix]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All users of an Arrow batch, or of a fit, would take more memory than a worker or the driver has."""
    weighed: list[int] = []

    def count(counts: dict[str, sp.csr_matrix], *basis: Any) -> dict[str, sp.csr_matrix]:
        weighed.append(counts["items"].shape[0])
        return _weighed(counts, *basis)

    monkeypatch.setattr("training.profile._weighed", count)
    random = np.random.default_rng(1)
    rows = random.integers(0, USERS, 1500)
    states, counts = sample[0][rows], {kind: of[rows] for kind, of in sample[1].items()}
    basis = fitted(states, counts)
    assert weighed == [AT_ONCE, AT_ONCE, 1500 - 2 * AT_ONCE]
    monkeypatch.setattr("training.profile.AT_ONCE", 1500)
    at_once = fitted(states, counts)
    for part, directions in at_once.directions.items():
        assert basis.directions[part] == pytest.approx(directions, abs=1e-5), part

    def lists(of: np.ndarray, offsets: np.ndarray) -> pa.ListArray:
        return pa.ListArray.from_arrays(offsets, pa.array(of))

    columns = [lists(of, counts[kind].indptr) for kind in KINDS for of in (counts[kind].indices, counts[kind].data)]
    users = pa.array([f"u{n}" for n in range(1500)])
    batch = pa.RecordBatch.from_arrays([users, as_lists(states), *columns], list("abcdefgh"))
    context = SimpleNamespace(broadcast=lambda of: SimpleNamespace(value=of))
    frame: Any = SimpleNamespace(
        sparkSession=SimpleNamespace(sparkContext=context), mapInArrow=lambda make, _: list(make([batch, batch[:0]]))
    )
    expected = basis.profiles(states, counts)
    weighed.clear()
    found = pa.Table.from_batches(profiles(frame, basis))
    assert max(weighed) == AT_ONCE
    assert found["user_id"].to_pylist() == users.to_pylist()
    assert np.array(found["vector"].to_pylist()) == pytest.approx(expected, abs=1e-6)


def test_the_current_models_profiles_stay_until_what_it_was_trained_to_again_is_aligned(tmp_path: Path) -> None:
    (tmp_path / "m1").mkdir()
    about = {"spec": SPEC.model_dump(), "weights_sha256": "new"}
    (tmp_path / "m1/model.json").write_text(json.dumps(about))
    of_before = {"note": {"model": {"version": "m1", "weights": "old"}}}
    runtime: Any = SimpleNamespace(
        config=make_config(tmp_path, "model.version=m1"),
        models=tmp_path,
        newest_current_model=lambda: "m1",
        noted=lambda _: iter([of_before]),
    )
    with pytest.raises(TrailvecError, match="model m1, the current one, was trained again and is not aligned with its"):
        run(runtime)
