"""Losses over a large catalogue: none of them ever materialises a full targets-by-items array.

States are float32 [targets, width], one per target; a loss is a sum over the targets.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Scores held at once, targets x items: 512 x 20,000 are 40 MB.
_CHUNK_SCORES = 10_000_000


class Vectors(Protocol):
    """A function of item numbers, int64 [n], that returns the items' vectors, float32 [n, width]."""

    def __call__(self, items: Tensor) -> Tensor: ...


class FrequencySampler(nn.Module):
    """Negatives sampled by how often training saw an item, shared by a whole batch.

    Replaces Transformers4Rec's LogUniformSampler, which assumes that a smaller number means a more frequent item. In an
    append-only vocabulary that does not hold.
    """

    def __init__(self, item_counts: Tensor, draws: int, power: float) -> None:
        """Args:
        item_counts: int64 [items]; an item with count 0 is never drawn.
        draws: per batch, with replacement.
        power: an item's chance per draw is proportional to count^power: 1 by frequency, 0 uniform.
        """
        super().__init__()
        weight = torch.where(item_counts > 0, item_counts.double() ** power, 0.0)
        self.draws, self.power, self.total = draws, power, float(weight.sum())
        self.register_buffer("counts", item_counts, persistent=False)
        self.register_buffer("cumulative", weight.div_(self.total).cumsum(0), persistent=False)

    def sample(self) -> tuple[Tensor, Tensor]:
        """The distinct drawn items, sorted, int64 [n], and each one's probability of being drawn, float32 [n]."""
        points = torch.rand(self.draws, dtype=torch.float64, device=self.cumulative.device) * self.cumulative[-1]
        drawn = torch.searchsorted(self.cumulative, points, right=True).unique()  # type: ignore[no-untyped-call]
        # An item drawn twice is kept once, so its probability is that of being drawn at all: 1 - (1 - p)^draws.
        share = self.counts[drawn].double() ** self.power / self.total
        return drawn, -torch.expm1(self.draws * torch.log1p(-share)).float()


def sampled_softmax(states: Tensor, targets: Tensor, vectors: Vectors, sampler: FrequencySampler) -> Tensor:
    """Cross-entropy of each target against the sampler's negatives, summed.

    log-Q correction: each negative stands for 1 / chance items like it, so -log(chance) is added to its score. The
    target is always present and stands for itself. The softmax's denominator is then an unbiased estimate of the sum
    over all items (Bengio & Senécal, 2008; Khrylchenko et al., "Correcting the LogQ Correction", 2025).
    """
    drawn, chance = sampler.sample()
    negatives, own = vectors(drawn), vectors(targets)
    with torch.autocast(states.device.type, enabled=False):
        return _SampledSoftmax.apply(states, targets, own, drawn, negatives, chance)  # type: ignore[no-untyped-call,no-any-return]


class _SampledSoftmax(torch.autograd.Function):
    """Computes gradients with the loss, in the same array of scores: with fewer passes over it than autograd makes, and
    none of it kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        states, targets, own, drawn, negatives, chance = inputs
        scores = torch.addmm(-chance.log().to(states.dtype), states, negatives.T)
        # `drawn` is sorted. A target greater than all of it gets the last place, where it is not.
        place = torch.searchsorted(drawn, targets).clamp_(max=len(drawn) - 1)[:, None]
        is_target = drawn[place] == targets[:, None]
        scores.scatter_(1, place, scores.gather(1, place).masked_fill_(is_target, -torch.inf))
        of_target = (states * own).sum(dim=1, keepdim=True)
        sums = torch.logaddexp(of_target, scores.logsumexp(dim=1, keepdim=True))
        if any(ctx.needs_input_grad):
            errors, own_error = scores.sub_(sums).exp_(), torch.expm1(of_target - sums)
            of_states = (errors @ negatives).addcmul_(own_error, own)
            ctx.save_for_backward(of_states, own_error * states, errors.T @ states)
        return (sums - of_target).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_states, of_own, of_negatives = (saved * gradients[0] for saved in ctx.saved_tensors)
        return of_states, None, of_own, None, of_negatives, None


def gbce(
    states: Tensor, targets: Tensor, vectors: Vectors, sampler: FrequencySampler, *, known_items: int, t: float
) -> Tensor:
    """Generalised binary cross-entropy with shared negatives, summed over targets and negatives.

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
    """Each state's score of each vector, in 32 bits like the target's score, even under 16-bit autocast."""
    with torch.autocast(states.device.type, enabled=False):
        return states @ vectors.T


def full_softmax(states: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
    """Cross-entropy of each target against all `vectors` (float32 [items, width]; targets are row numbers), summed."""
    # Autocast would make 16-bit products, which cannot be added to 32-bit sums in place.
    with torch.autocast(states.device.type, enabled=False):
        return _FullSoftmax.apply(states, targets, vectors)  # type: ignore[no-untyped-call,no-any-return]


class _FullSoftmax(torch.autograd.Function):
    """Computes gradients with the loss, in chunks of targets, so that no scores are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        loss = states.new_zeros(())
        of_states, of_vectors = torch.empty_like(states), torch.zeros_like(vectors)
        rows = max(1, _CHUNK_SCORES // len(vectors))
        for start in range(0, len(states), rows):
            part, own_target = states[start : start + rows], targets[start : start + rows, None]
            scores = part @ vectors.T
            sums = scores.logsumexp(dim=1, keepdim=True)
            loss += (sums - scores.gather(1, own_target)).sum()
            if any(ctx.needs_input_grad):
                errors = scores.sub_(sums).exp_()
                errors.scatter_add_(1, own_target, errors.new_full((1, 1), -1.0).expand_as(own_target))
                of_states[start : start + rows] = errors @ vectors
                of_vectors.addmm_(errors.T, part)
        ctx.save_for_backward(of_states, of_vectors)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        of_states, of_vectors = ctx.saved_tensors
        return of_states * gradients[0], None, of_vectors * gradients[0]
