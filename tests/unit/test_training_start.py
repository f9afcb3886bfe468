"""The item vectors' start against numpy's dense SVD."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.sequence_files import ITEMS, item_counts, make_rows, write_files
from training.start import item_factors


def test_the_factors_are_those_of_the_dense_svd(tmp_path: Path) -> None:
    rows = make_rows(60)
    known = item_counts(rows) > 0
    known[5] = False  # in the rows, but the model must not know it
    found = item_factors(write_files(tmp_path, rows[:20], rows[20:]), known, width=6, seed=1)

    dense = np.zeros((len(rows), ITEMS))
    for number, row in enumerate(rows):
        for item in row["item_index"]:
            dense[number, item] += known[item]
    _, _, right = np.linalg.svd(np.log1p(dense))
    expected = right[:6].T
    # Signs and order of singular vectors are free: their inner products are not.
    scale = (found[known] ** 2).sum() / (expected[known] ** 2).sum()
    np.testing.assert_allclose(found @ found.T, scale * (expected @ expected.T), atol=1e-6)
    np.testing.assert_allclose(found[~known], 0, atol=1e-12)
    np.testing.assert_allclose(np.sqrt((found[known] ** 2).sum(axis=1).mean()), 0.4, rtol=1e-5)


def test_the_same_files_give_the_same_start_and_few_rows_leave_zeros(tmp_path: Path) -> None:
    rows = make_rows(4)
    files, known = write_files(tmp_path, rows), item_counts(rows) > 0
    first, second = (item_factors(files, known, width=8, seed=1) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first[:, :3].any()
    assert not first[:, 3:].any()  # four rows have three factors below their full rank
    assert not item_factors(files, known, width=8, seed=1, max_rows=1).any()
