"""The row-wise optimizer against plain numpy that passes over all rows in each step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from training.config import TrainSettings
from training.rowwise import RowWiseAdam, rounded_by_chance, summed

ROWS, WIDTH = 6, 3


def make_table(dtype: torch.dtype = torch.float32) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(ROWS, WIDTH, padding_idx=0, sparse=True, dtype=dtype)


def test_a_step_is_that_of_the_formula_for_all_rows() -> None:
    table, random = make_table(), np.random.default_rng(1)
    decay, rates = 0.4, [0.01] * 7
    optimizer = RowWiseAdam(table.weight, weight_decay=decay, seed=0)
    w, v = table.weight.detach().numpy().astype(np.float64).copy(), np.zeros(ROWS)
    used = [[1, 2], [2], [2, 5], [], [1], [1], list(range(ROWS))]
    for step, (rows, rate) in enumerate(zip(used, rates, strict=True), start=1):
        g = np.zeros((ROWS, WIDTH))
        g[rows] = random.normal(size=(len(rows), WIDTH)) * 10.0 ** random.integers(-6, 3, (len(rows), 1))
        optimizer.step(torch.tensor(rows, dtype=torch.int64), torch.tensor(g[rows], dtype=torch.float32), rate)
        v = 0.999 * v + 0.001 * (g**2).mean(axis=1)
        w = w * (1 - rate * decay) - rate * g / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)[:, None]
    np.testing.assert_allclose(table.weight.detach().numpy(), w, rtol=1e-5, atol=1e-7)


def test_an_unused_row_stays_as_it_is() -> None:
    table = make_table()
    optimizer, before = RowWiseAdam(table.weight, weight_decay=0.1, seed=0), table.weight.detach().clone()
    optimizer.step(torch.tensor([4]), torch.ones(1, WIDTH), rate=0.5)
    changed = (table.weight != before).any(dim=1)
    assert changed.tolist() == [False, False, False, False, True, False]


def test_a_gradient_is_the_sum_of_a_rows_uses() -> None:
    table = make_table()
    optimizer = RowWiseAdam(table.weight, weight_decay=0.0, seed=0)
    for items in ([4, 2, 0, 4], [2]):  # 0 is padding; two backward passes
        (table(torch.tensor(items)) * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    rows, gradient = optimizer.take_gradient()
    assert rows.tolist() == [2, 4]
    assert gradient.tolist() == [[2, 20, 200], [2, 20, 200]]
    rows, gradient = optimizer.take_gradient()  # no backward pass since
    assert (rows.shape, rows.dtype, gradient.shape, gradient.dtype) == ((0,), torch.int64, (0, WIDTH), torch.float32)
    optimizer.step(rows, gradient, rate=0.1)


def test_sums_are_made_in_32_bits() -> None:
    rows, sums = summed(torch.zeros(300, dtype=torch.int64), torch.ones(300, 1, dtype=torch.bfloat16), 1)
    assert (rows.tolist(), sums.tolist()) == ([0], [[300.0]])  # in bfloat16, 256 + 1 is 256


def test_a_loaded_optimizer_goes_on_alike() -> None:
    tables = [make_table(torch.bfloat16), make_table(torch.bfloat16)]
    whole, first = (RowWiseAdam(table.weight, weight_decay=0.1, seed=3) for table in tables)
    for step in range(1, 7):
        rows, gradient = torch.tensor([1, step % 3 + 2]), torch.randn(2, WIDTH)
        whole.step(rows, gradient, rate=0.01)
        first.step(rows, gradient, rate=0.01)
        if step == 3:
            state = {name: tensor.clone() for name, tensor in first.tensors().items()}
            first = RowWiseAdam(tables[1].weight, weight_decay=0.1, seed=3)
            first.load_tensors(state)
    assert torch.equal(tables[0].weight, tables[1].weight)
    assert all(torch.equal(tensor, first.tensors()[name]) for name, tensor in whole.tensors().items())


def test_rounding_by_chance_is_right_on_average() -> None:
    values = torch.tensor([1.0, 1.001, -1.001, 3e-5, -0.0]).repeat(20_000, 1)
    rounded = rounded_by_chance(values, torch.Generator().manual_seed(1))
    assert rounded.dtype == torch.bfloat16
    digit = 2.0**-7  # of numbers from 1 to 2
    assert set(rounded[:, 1].tolist()) == {1.0, 1.0 + digit}
    assert set(rounded[:, 2].tolist()) == {-1.0, -1.0 - digit}
    assert rounded[:, 0].unique().tolist() == [1.0]
    assert rounded[:, 4].unique().tolist() == [0.0]
    error = 4 * digit / 2 / len(values) ** 0.5
    np.testing.assert_allclose(rounded.float().mean(0)[:4], values[0, :4], rtol=error)
    assert torch.equal(rounded, rounded_by_chance(values, torch.Generator().manual_seed(1)))


def test_steps_below_the_last_digit_of_a_bfloat16_count() -> None:
    table = nn.Embedding(3, 500, sparse=True, dtype=torch.bfloat16)
    nn.init.ones_(table.weight)
    optimizer = RowWiseAdam(table.weight, weight_decay=0.0, seed=0)
    for _ in range(100):
        optimizer.step(torch.tensor([1]), torch.ones(1, 500), rate=1e-4)  # a quarter of 2^-8 is 1e-3
    assert float(table.weight[1].float().mean()) == pytest.approx(1 - 100 * 1e-4, abs=1e-3)
    assert (table.weight[[0, 2]] == 1).all()


def test_which_optimizer_a_catalogue_gets() -> None:
    def row_wise(items: int, **settings: object) -> bool:
        return TrainSettings.model_validate(settings).row_wise(items)

    assert [row_wise(items) for items in (20_000, 49_999, 50_000, 5_000_000)] == [False, False, True, True]
    assert not row_wise(5_000_000, negatives=0)  # a full softmax uses all rows
    assert not row_wise(5_000_000, item_optimizer="adamw")
    assert row_wise(10, item_optimizer="rowwise")
    assert row_wise(10, item_precision="bfloat16")
    with pytest.raises(ValidationError, match="needs item_optimizer 'rowwise' or 'auto', found 'adamw'"):
        TrainSettings(item_precision="bfloat16", item_optimizer="adamw")
