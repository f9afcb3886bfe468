"""Fast inference: the state at each row's last action only, for scoring users and for validation.

`SequenceModel.encode` is the reference; this gives the same up to rounding, with less work, for causal models (GPT-2).
Only the last position's output of the last block is needed, so

- its query, projection and MLP are computed at one position per row;
- keys and values are never materialised: a score q · (K x) is (Kᵀ q) · x, and a weighted sum of V x is
  V (weighted sum of x).

With one block, the default, all that remains per action is to look up and normalise its embedding. The small tables
(context, item attributes) are concatenated into one, and summed during the lookup.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from training.model import ITEM, Batch, SequenceModel


def fast_encoder(model: SequenceModel) -> Callable[[Batch], Tensor]:
    """`model.encode`, or a faster equivalent. Call it again after the weights change: it copies some of them."""
    quick = model.spec.architecture == "gpt2" and model.spec.objective == "clm"
    return _LastStates(model) if quick else model.encode


class _LastStates:
    def __init__(self, model: SequenceModel) -> None:
        self._model = model
        self._names = list(model.spec.context_sizes)
        inputs: Any = model.inputs  # None if there are no names
        context = [cast(Tensor, inputs.categorical_module.embedding_tables[name].weight) for name in self._names]
        scale = math.sqrt(model.spec.width)  # as in SequenceModel._embed
        attributes = [cast(Tensor, part.weight) * scale for part in model.table.parts]
        with torch.no_grad():
            self._small = torch.cat([*context, *attributes]) if context or attributes else None
        sizes = [len(table) for table in [*context, *attributes]]
        self._starts = [sum(sizes[:place]) for place in range(len(sizes))]
        self._scale = scale

    def __call__(self, batch: Batch) -> Tensor:
        known = self._model.known(batch)
        lengths = (known[ITEM] > 0).sum(dim=1)
        transformer: Any = self._model.transformer
        hidden = self._embed(known) + transformer.wpe.weight[: known[ITEM].shape[1]]
        *blocks, last = transformer.h
        for block in blocks:
            hidden = block(hidden)[0]
        return cast(Tensor, transformer.ln_f(_last_of_block(last, hidden, lengths)))

    def _embed(self, known: Batch) -> Tensor:
        """SequenceModel._embed: [rows, length, width]."""
        items = known[ITEM]
        embedded = F.embedding(items, self._model.table.own.weight).float() * self._scale
        if self._small is None:
            return embedded
        numbers = [known[name] for name in self._names] + [of[items] for of in self._model.table.attributes]
        places = torch.stack([n + start for n, start in zip(numbers, self._starts, strict=True)], dim=-1)
        summed = F.embedding_bag(places.flatten(end_dim=1), self._small, mode="sum")
        return embedded + summed.view_as(embedded)


def _last_of_block(block: Any, hidden: Tensor, lengths: Tensor) -> Tensor:
    """A GPT-2 block's output at each row's last action, [rows, width], for its input [rows, length, width]."""
    attention = block.attn
    rows, length, width = hidden.shape
    heads = attention.num_heads
    weight, bias = attention.c_attn.weight, attention.c_attn.bias  # of query, key and value, side by side
    place = torch.arange(rows, device=hidden.device), lengths - 1
    normed = block.ln_1(hidden)
    # Heads first: a product of [heads, rows, ...] copies no weights.
    query = torch.addmm(bias[:width], normed[place], weight[:, :width]).view(rows, heads, -1).transpose(0, 1)
    keys = weight[:, width : 2 * width].view(width, heads, -1).permute(1, 2, 0)  # [heads, width / heads, width]
    # The key's bias shifts all scores of a row and head alike, so softmax cancels it.
    projected = (query @ keys).transpose(0, 1) / math.sqrt(width // heads)  # [rows, heads, width]
    later = torch.arange(length, device=hidden.device) >= lengths[:, None]
    shares = (projected @ normed.transpose(1, 2)).masked_fill(later[:, None], -math.inf).softmax(dim=-1)
    pooled = (shares @ normed).transpose(0, 1)  # [heads, rows, width]
    values = weight[:, 2 * width :].view(width, heads, -1).transpose(0, 1)  # [heads, width, width / heads]
    attended = (pooled @ values).transpose(0, 1).reshape(rows, width) + bias[2 * width :]
    attended = attention.c_proj(attended)
    state = hidden[place] + attended
    return cast(Tensor, state + block.mlp(block.ln_2(state)))
