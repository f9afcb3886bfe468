"""The item vectors' start against numpy's dense SVD."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.sequence_files import ITEMS, item_counts, make_rows, write_files
from training.batches import FEATURES
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
    expected *= 0.1 / np.sqrt((expected[known] ** 2).sum(axis=1).mean())
    # Signs and order of singular vectors are free: their inner products are not.
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-6)
    np.testing.assert_allclose(found[~known], 0, atol=1e-12)


def test_no_vector_is_much_longer_than_the_others(tmp_path: Path) -> None:
    """Item 2 is in every row, fifty others in one each."""
    rows = [{**row, "item_index": [2, 3 + number]} for number, row in enumerate(make_rows(50))]
    known = np.arange(60) > 1
    files = write_files(tmp_path, [{**row, "length": 2, **{f: row[f][:2] for f in FEATURES[1:]}} for row in rows])
    lengths = np.linalg.norm(item_factors(files, known, width=2, seed=1), axis=1)
    assert lengths.max() == pytest.approx(0.4)
    assert lengths.argmax() == 2


def test_rows_that_are_all_alike_say_nothing_of_other_items(tmp_path: Path) -> None:
    known = np.arange(30) > 1
    rows = [{**row, "item_index": [2, 3]} for row in make_rows(20)]
    files = write_files(tmp_path, [{**row, "length": 2, **{f: row[f][:2] for f in FEATURES[1:]}} for row in rows])
    found = item_factors(files, known, width=8, seed=1)
    assert np.flatnonzero(np.abs(found).max(axis=1) > 1e-9).tolist() == [2, 3]


def test_the_same_files_give_the_same_start_and_few_rows_leave_zeros(tmp_path: Path) -> None:
    rows = make_rows(4)
    files, known = write_files(tmp_path, rows), item_counts(rows) > 0
    first, second = (item_factors(files, known, width=8, seed=1) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first[:, :3].any()
    assert not first[:, 3:].any()  # four rows have three factors below their full rank
    assert not item_factors(files, known, width=8, seed=1, max_rows=1).any()
