"""The losses over the catalogue against plain loops over single targets and items."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.sequence_files import ITEMS, SPEC
from training.model import build_model
from training.softmax import FrequencySampler, full_softmax, gbce, sampled_softmax
from training.validation import best_items

COUNTS = torch.tensor([0, 0, 50, 5, 0, 30, 1])


def states_and_table(targets: int, items: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    states, table = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (targets, items))
    return states.requires_grad_(), table.requires_grad_()


def sampled(states: torch.Tensor, targets: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return sampled_softmax(states, targets, lambda items: table[items], FrequencySampler(COUNTS, draws=3, power=1.0))


def binary(states: torch.Tensor, targets: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    sampler = FrequencySampler(COUNTS, draws=3, power=1.0)
    return gbce(states, targets, lambda items: table[items], sampler, known_items=4, t=0.75)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_sampler_draws_as_often_as_it_says(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, rounds = FrequencySampler(COUNTS, draws=3, power=power), 20_000
    torch.manual_seed(0)
    drawn_in = torch.zeros(len(COUNTS))
    for _ in range(rounds):
        drawn, chances = sampler.sample()
        assert len(drawn) == len(set(drawn.tolist())) == len(chances)
        drawn_in[drawn] += 1
    assert drawn_in[[0, 1, 4]].sum() == 0
    weights = [count**power if count else 0 for count in COUNTS.tolist()]
    expected = [1 - (1 - weight / sum(weights)) ** 3 for weight in weights]
    # Four standard deviations of a share over so many rounds.
    np.testing.assert_allclose(drawn_in / rounds, expected, atol=4 * np.sqrt(0.25 / rounds))
    np.testing.assert_allclose(chances, [expected[item] for item in drawn], rtol=1e-5)
    monkeypatch.setattr(torch, "rand", torch.zeros)  # the smallest number that it can give
    assert sampler.sample()[0].tolist() == [2]


def test_the_full_softmax_and_its_gradients_are_torchs_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.softmax._CHUNK_SCORES", 15)  # two targets at a time
    targets = torch.tensor([3, 0, 6, 6, 1])
    states, table = states_and_table(len(targets))
    (2 * full_softmax(states, targets, table)).backward()
    found = states.grad.clone(), table.grad.clone()
    states.grad = table.grad = None
    expected = 2 * torch.nn.functional.cross_entropy(states @ table.T, targets, reduction="sum")
    expected.backward()
    for ours, theirs in zip(found, (states.grad, table.grad), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(full_softmax(states, targets, table) * 2, expected)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation gives, in elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        sizes = [part.numel() for part in tree_leaves(given) if isinstance(part, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return given


@pytest.mark.parametrize("loss_of", [full_softmax, sampled, binary])
def test_no_loss_holds_the_scores_of_all_targets_and_items(
    monkeypatch: pytest.MonkeyPatch, loss_of: Callable[..., torch.Tensor]
) -> None:
    monkeypatch.setattr("training.softmax._CHUNK_SCORES", 70)  # ten targets at a time
    states, table = states_and_table(400)
    targets = torch.randint(0, 7, (400,), generator=torch.Generator().manual_seed(1))
    with Largest() as seen:
        loss_of(states, targets, table).backward()
    assert seen.elements == states.numel() < 400 * 7  # at most three negatives are drawn


@pytest.mark.parametrize(("users", "at_once"), [(8, (4, 256)), (100, (20, 3))])
def test_the_best_items_are_found_without_all_vectors_or_scores(
    monkeypatch: pytest.MonkeyPatch, users: int, at_once: tuple[int, int]
) -> None:
    for name, number in zip(("ITEMS_AT_ONCE", "USERS_AT_ONCE"), at_once, strict=True):
        monkeypatch.setattr(f"training.validation.{name}", number)
    model = build_model(SPEC, torch.ones(ITEMS, dtype=torch.int64)).eval()
    states = torch.randn(users, SPEC.width)
    with torch.inference_mode(), Largest() as seen:
        best_items(model, states, torch.arange(2, 29), (np.empty(0, np.int64), np.zeros(users + 1, np.int64)))
    assert 0 < seen.elements <= states.numel()


@pytest.mark.parametrize("loss_of", [full_softmax, sampled, binary])
def test_losses_are_of_32_bits_under_autocast_too(loss_of: Callable[..., torch.Tensor]) -> None:
    targets = torch.tensor([3, 0, 6])
    losses = []
    for enabled in (False, True):
        states, table = (tensor.detach().float().requires_grad_() for tensor in states_and_table(len(targets)))
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = loss_of(states, targets, table)
        loss.backward()
        losses.append((loss, states.grad, table.grad))
    for ours, theirs in zip(*losses, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_sampled_softmax_is_the_corrected_sum_over_the_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, drawn, chances = [3, 5], torch.tensor([2, 3, 6]), torch.tensor([0.9, 0.2, 0.01], dtype=torch.float64)
    sampler = FrequencySampler(COUNTS, draws=3, power=1.0)
    monkeypatch.setattr(sampler, "sample", lambda: (drawn, chances))
    states, table = states_and_table(2)
    found = sampled_softmax(states, torch.tensor(targets), lambda items: table[items], sampler)
    expected = 0.0
    for state, target in zip(states.tolist(), targets, strict=True):
        score = [math.exp(sum(a * b for a, b in zip(state, row, strict=True))) for row in table.tolist()]
        others = sum(score[i] / q for i, q in zip(drawn.tolist(), chances.tolist(), strict=True) if i != target)
        expected += -math.log(score[target] / (score[target] + others))
    assert float(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("targets", [[3, 5, 3, 6, 2, 0], [2], []])
@pytest.mark.parametrize("drawn", [[1, 2, 3, 5], [2], [4]])  # with targets before, among and after the drawn
def test_the_sampled_softmax_is_autograds_and_keeps_no_scores(
    targets: list[int], drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = FrequencySampler(COUNTS, draws=3, power=1.0)
    items, chances = torch.tensor(drawn), torch.linspace(0.01, 0.9, len(drawn))
    monkeypatch.setattr(sampler, "sample", lambda: (items, chances))
    states, table = states_and_table(len(targets))
    of, kept = torch.tensor(targets, dtype=torch.int64), [0]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: kept.append(saved.numel()) or saved, lambda saved: saved
    ):
        found = sampled_softmax(states, of, lambda rows: table[rows], sampler)
    assert max(kept) <= max(states.numel(), table[items].numel())
    scores = (states @ table[items].T - chances.log()).masked_fill(of[:, None] == items, -torch.inf)
    own = (states * table[of]).sum(dim=1)
    expected = (torch.logaddexp(own, scores.logsumexp(dim=1)) - own).sum()
    for ours, theirs in zip(
        (found, *torch.autograd.grad(2 * found, (states, table))),
        (expected, *torch.autograd.grad(2 * expected, (states, table))),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_the_correction_makes_the_sum_under_the_softmax_right_on_average() -> None:
    torch.manual_seed(1)
    states, table = states_and_table(1)
    known = COUNTS.nonzero().squeeze(1)
    with torch.no_grad():
        full = math.exp(full_softmax(states, torch.tensor([1]), table[known]))  # item 3: 1 / its share
        for power in (0.0, 0.5):
            sampler = FrequencySampler(COUNTS, draws=4, power=power)
            found = [
                math.exp(sampled_softmax(states, torch.tensor([3]), lambda items: table[items], sampler))
                for _ in range(4_000)
            ]
            error = np.std(found) / math.sqrt(len(found))
            assert abs(np.mean(found) - full) < 4 * error
            assert error < 0.03 * full


@pytest.mark.parametrize("known_items", [11, 3])  # of three, all are drawn
@pytest.mark.parametrize("t", [0.0, 0.75, 1.0])
def test_gbce_is_the_papers_formula(t: float, known_items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    targets, drawn = [3, 5], torch.tensor([2, 3, 6])
    sampler = FrequencySampler(COUNTS, draws=3, power=0.0)
    monkeypatch.setattr(sampler, "sample", lambda: (drawn, torch.ones(3)))
    states, table = states_and_table(2)
    found = gbce(states, torch.tensor(targets), lambda items: table[items], sampler, known_items=known_items, t=t)
    alpha = {11: 3 / 10, 3: 1.0}[known_items]
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    expected = 0.0
    for state, target in zip(states.tolist(), targets, strict=True):
        sigmoid = [1 / (1 + math.exp(-sum(a * b for a, b in zip(state, row, strict=True)))) for row in table.tolist()]
        expected -= math.log(sigmoid[target] ** beta)
        expected -= sum(math.log(1 - sigmoid[item]) for item in drawn.tolist() if item != target)
    assert float(found) == pytest.approx(expected, rel=1e-9)
