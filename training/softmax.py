"""Losses over a large catalogue: none of them ever holds an array of all targets by all items.

States are float32 [targets, width], one for each target; a loss is a sum over the targets.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Targets whose scores of all items are in memory at once: 512 x 20,000 items are 40 MB.
_CHUNK_SCORES = 10_000_000


class Vectors(Protocol):
    """What gives the vectors of items, float32 [n, width], for their numbers, int64 [n]."""

    def __call__(self, items: Tensor) -> Tensor: ...


class FrequencySampler(nn.Module):
    """Negatives drawn by how often training saw an item, shared by a whole batch.

    Takes the place of Transformers4Rec's LogUniformSampler, which believes that a smaller number means a more
    frequent item; in an append-only vocabulary it does not.
    """

    def __init__(self, item_counts: Tensor, draws: int, power: float) -> None:
        """Args:
        item_counts: int64 [items]; an item with 0 is never drawn.
        draws: with replacement, for each batch.
        power: an item's share of the draws goes with count^power: 1 by frequency, 0 all alike.
        """
        super().__init__()
        weight = torch.where(item_counts > 0, item_counts.double() ** power, 0.0)
        self.draws, self.power, self.total = draws, power, float(weight.sum())
        self.register_buffer("counts", item_counts, persistent=False)
        self.register_buffer("cumulative", weight.div_(self.total).cumsum(0), persistent=False)

    def sample(self) -> tuple[Tensor, Tensor]:
        """The drawn items, int64 [n], each once, and the chance that each had of being drawn, float32 [n]."""
        points = torch.rand(self.draws, dtype=torch.float64, device=self.cumulative.device) * self.cumulative[-1]
        drawn = torch.searchsorted(self.cumulative, points, right=True).unique()  # type: ignore[no-untyped-call]
        # An item drawn twice is kept once, so what counts is the chance to be drawn at all: 1 - (1 - p)^draws.
        share = self.counts[drawn].double() ** self.power / self.total
        return drawn, -torch.expm1(self.draws * torch.log1p(-share)).float()


def sampled_softmax(states: Tensor, targets: Tensor, vectors: Vectors, sampler: FrequencySampler) -> Tensor:
    """Cross-entropy of each target among itself and the sampler's negatives, summed.

    log-Q correction: each negative stands for 1 / chance items like it, so its score is raised by -log(chance); the
    target is always there and stands for itself. The sum under the softmax is then an unbiased estimate of the one over
    all items (Bengio & Senécal, 2008; Khrylchenko et al., "Correcting the LogQ Correction", 2025).
    """
    drawn, chance = sampler.sample()
    scores = _products(states, vectors(drawn)) - chance.log()
    scores = scores.masked_fill(targets[:, None] == drawn, -torch.inf)
    own = (states * vectors(targets)).sum(dim=1)
    return (torch.logaddexp(own, scores.logsumexp(dim=1)) - own).sum()


def gbce(
    states: Tensor, targets: Tensor, vectors: Vectors, sampler: FrequencySampler, *, known_items: int, t: float
) -> Tensor:
    """Generalised binary cross-entropy with shared negatives, per negative drawn, summed.

    -log(sigmoid(target)^beta) - sum of log(1 - sigmoid(negative)), beta = a (t (1 - 1/a) + 1/a) for the share a of the
    catalogue that is drawn; t = 0 is plain binary cross-entropy (Petrov & Macdonald, gSASRec, 2023).
    """
    drawn, _ = sampler.sample()
    a = min(1.0, len(drawn) / max(known_items - 1, 1))  # the target may be among the drawn
    beta = a * (t * (1 - 1 / a) + 1 / a)
    scores = _products(states, vectors(drawn)).masked_fill(targets[:, None] == drawn, -torch.inf)
    own = (states * vectors(targets)).sum(dim=1)
    return (F.softplus(scores).sum(dim=1) + beta * F.softplus(-own)).sum()


def _products(states: Tensor, vectors: Tensor) -> Tensor:
    """The score of each of `vectors` for each state: in 32 bits, as the target's, also where autocast would take 16."""
    with torch.autocast(states.device.type, enabled=False):
        return states @ vectors.T


def full_softmax(states: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
    """Cross-entropy of each target among all of `vectors` (float32 [items, width]; targets are its rows), summed."""
    # Autocast would make products of 16 bits, which no sum of 32 takes in place.
    with torch.autocast(states.device.type, enabled=False):
        return _FullSoftmax.apply(states, targets, vectors)  # type: ignore[no-untyped-call,no-any-return]


class _FullSoftmax(torch.autograd.Function):
    """Gradients are made with the loss, some targets at a time, so that no scores are kept for a backward pass."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        loss = states.new_zeros(())
        of_states, of_vectors = torch.empty_like(states), torch.zeros_like(vectors)
        rows = max(1, _CHUNK_SCORES // len(vectors))
        for start in range(0, len(states), rows):
            part, wanted = states[start : start + rows], targets[start : start + rows, None]
            scores = part @ vectors.T
            sums = scores.logsumexp(dim=1, keepdim=True)
            loss += (sums - scores.gather(1, wanted)).sum()
            if any(ctx.needs_input_grad):
                errors = scores.sub_(sums).exp_()
                errors.scatter_add_(1, wanted, errors.new_full((1, 1), -1.0).expand_as(wanted))
                of_states[start : start + rows] = errors @ vectors
                of_vectors.addmm_(errors.T, part)
        ctx.save_for_backward(of_states, of_vectors)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        of_states, of_vectors = ctx.saved_tensors
        return of_states * gradients[0], None, of_vectors * gradients[0]
