"""The profile's parts by hand, what a basis keeps on disk, and the adapter that lays Arrow's lists out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp

from jobs.errors import TrailvecError
from spark_udfs.profile import counts_of
from training.profile import PARTS, WEIGHTS, Basis, Terms, fit_basis, fit_terms, read_basis, write_basis

USERS = 60


@pytest.fixture
def sample() -> tuple[np.ndarray, dict[str, sp.csr_matrix]]:
    """States and counts of users."""
    random = np.random.default_rng(0)
    counts = {"items": random.poisson(0.5, (USERS, 30)), "categories": random.poisson(2, (USERS, 6))}
    counts["statistics"] = random.normal(5, [[1, 100, 0]], (USERS, 3))
    matrices = {kind: sp.csr_matrix(of.astype(np.float64)) for kind, of in counts.items()}
    return random.normal(3, size=(USERS, 4)).astype(np.float32), matrices


def fitted(states: np.ndarray, counts: dict[str, sp.csr_matrix], most: int = 100) -> Basis:
    terms = fit_terms(counts, most)
    vectors = np.random.default_rng(1).normal(size=(len(terms["items"].numbers), 4)).astype(np.float32)
    vectors[0] = 0  # the model has no vector of it
    return fit_basis(states, counts, names=("a", "b", "same"), terms=terms, item_vectors=vectors, width=5)


def test_each_part_weighs_what_it_should(sample: tuple[np.ndarray, dict[str, sp.csr_matrix]]) -> None:
    basis = fitted(*sample)
    found = basis.profiles(*sample)
    assert basis.widths == {"state": 4, "items": 5, "categories": 5, "tastes": 4, "statistics": 3}
    assert found.shape == (USERS, 21)
    assert found.dtype == np.float32
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
    (tmp_path / "profile.safetensors").write_bytes(b"x")
    with pytest.raises(TrailvecError, match=r"damaged .*remove profile.json and profile.safetensors there"):
        read_basis(tmp_path)
    (tmp_path / "profile.json").unlink()
    assert read_basis(tmp_path) is None


def test_lists_of_a_slice_as_counts() -> None:
    numbers = pa.array([[9], [3, 1], [], [2]], pa.list_(pa.int32())).slice(1)
    values = pa.array([[9.0], [5, 2], [], [7]], pa.list_(pa.float64())).slice(1)
    assert counts_of(numbers, values).toarray().tolist() == [[0, 2, 0, 5], [0, 0, 0, 0], [0, 0, 7, 0]]
