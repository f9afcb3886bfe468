"""The model: the only module that imports Transformers4Rec (and Merlin, whose schema it wants).

A causal transformer reads the actions of a user; at each action it predicts the item of the next one. The item
table is both input and output (tied weights, no bias), so the state at a user's last action is a vector in
the space of the items: its dot product with an item's vector is the model's own score.
"""

from __future__ import annotations

import warnings
from typing import cast

import torch
from torch import Tensor, nn

# Merlin probes for frameworks that it does not need here.
warnings.filterwarnings("ignore", message=".* dtype mappings did not load successfully", category=UserWarning)

import transformers4rec.torch as tr  # noqa: E402
from merlin.schema import ColumnSchema, Schema, Tags  # noqa: E402
from transformers4rec.config.transformer import GPT2Config  # noqa: E402
from transformers4rec.torch.masking import CausalLanguageModeling, MaskingInfo  # noqa: E402

from training.batches import FEATURES, TARGET  # noqa: E402
from training.config import ModelSpec  # noqa: E402

ITEM = FEATURES[0]
UNKNOWN = 1

Batch = dict[str, Tensor]


class SequenceModel(nn.Module):
    """Transformers4Rec's model with what the stages need of it.

    A batch is, for each of FEATURES, int64 [rows, length]: numbers from 1 on, left-aligned, zeros after.
    """

    item_counts: Tensor

    def __init__(self, spec: ModelSpec, item_counts: Tensor) -> None:
        """`item_counts`, int64 [items]: how often training saw each item; 0 for one that the model must not know."""
        super().__init__()
        self.spec = spec
        self.register_buffer("item_counts", item_counts)
        self.network = _network(spec, item_counts)

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        """The summed loss over all positions whose target (`batch["target"]`) is known, and how many they are."""
        features = dict(batch)
        self._masking().chosen = features.pop(TARGET)
        output = self.network(features, training=True)
        return output["loss"], len(output["labels"])

    def encode(self, batch: Batch) -> Tensor:
        """The state at each row's last action, float32 [rows, width].

        Numbers that the model has not learnt (a newer item, a newer vertical) are read as unknown. Rows hold at
        most `spec.history_length` actions.
        """
        known = self.known(batch)
        states = self.network.heads[0].body(known, training=False, testing=False)
        lengths = (batch[ITEM] > 0).sum(dim=1)
        return cast(Tensor, states[torch.arange(len(states)), lengths - 1])

    def known(self, batch: Batch) -> Batch:
        """The batch with 1 (unknown) for every number that the model has not learnt."""
        items = batch[ITEM]
        counts = self.item_counts[items.clamp(max=self.spec.items - 1)]
        learnt = (items < self.spec.items) & ((counts > 0) | (items <= UNKNOWN))
        sizes = self.spec.context_sizes
        context = {name: batch[name].where(batch[name] < sizes[name], UNKNOWN) for name in FEATURES[1:]}
        return {ITEM: items.where(learnt, UNKNOWN), **context}

    def item_vectors(self) -> Tensor:
        """The vectors of all items, float32 [items, width]; the rows of unknown items mean nothing."""
        return self._table().weight

    @torch.no_grad()
    def start_from(self, factors: Tensor) -> None:
        """Makes `factors`, float32 [items, width], the first item vectors; some of the random ones stays in them, so
        that no two items begin alike."""
        self.item_vectors().mul_(0.3).add_(factors)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that was learnt, each tensor once: `item_vectors`, `item_counts`, and the network's."""
        table = self._table().weight
        rest = {name: p.detach() for name, p in self.network.named_parameters() if p is not table}
        return {"item_vectors": table.detach(), "item_counts": self.item_counts, **rest}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `tensors()` gave.

        Raises:
            KeyError: a tensor is missing or one too many.
            RuntimeError: a tensor has another shape.
        """
        mine = self.tensors()
        if odd := mine.keys() ^ tensors.keys():
            raise KeyError(", ".join(sorted(odd)))
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])

    def _masking(self) -> _ChosenTargets:
        return cast(_ChosenTargets, self.network.heads[0].body.inputs.masking)

    def _table(self) -> nn.Embedding:
        return cast(nn.Embedding, self.network.heads[0].body.inputs.item_embedding_table)


def build_model(spec: ModelSpec, item_counts: Tensor) -> SequenceModel:
    """A fresh model; its first weights come from torch's generator.

    Args:
        item_counts: int64 [spec.items]; see SequenceModel.
    """
    return SequenceModel(spec, item_counts)


def _network(spec: ModelSpec, item_counts: Tensor) -> nn.Module:
    sizes = {ITEM: spec.items, **spec.context_sizes}
    columns = [
        ColumnSchema(
            name,
            dtype="int64",
            is_list=True,
            is_ragged=False,
            tags=[Tags.CATEGORICAL, *([Tags.ITEM_ID] if name == ITEM else [])],
            properties={
                "domain": {"min": 0, "max": sizes[name] - 1},
                "value_count": {"min": spec.max_length, "max": spec.max_length},
            },
        )
        for name in FEATURES
    ]
    inputs = tr.TabularSequenceFeatures.from_schema(
        Schema(columns),
        max_sequence_length=spec.max_length,
        embedding_dims={ITEM: spec.width},
        embedding_dim_default=spec.width,
        aggregation="element-wise-sum",
        masking=_ChosenTargets(hidden_size=spec.width),
    )
    block = tr.TransformerBlock(
        GPT2Config.build(
            d_model=spec.width,
            n_head=spec.heads,
            n_layer=spec.layers,
            total_seq_length=spec.max_length,
            dropout=spec.dropout,
            layer_norm_eps=1e-5,
            initializer_range=0.02,
        ),
        masking=inputs.masking,
    )
    _pass_history_on(block.transformer)
    # It adds a causal mask to a block that is causal by itself, at the price of one more pass over all weights.
    block.prepare_module = None
    task = tr.NextItemPredictionTask(
        loss=nn.CrossEntropyLoss(reduction="sum"),
        metrics=[],
        weight_tying=True,
        softmax_temperature=0,  # none: dividing all logits by 1 costs a copy of them
        sampled_softmax=spec.negatives > 0,
        max_n_samples=max(spec.negatives, 1),
    )
    model = tr.Model(tr.Head(tr.SequentialBlock(inputs, block), task, inputs=inputs))
    if spec.negatives:
        task.pre.module.sampler = FrequencySampler(item_counts, spec.negatives)
    return cast(nn.Module, model)


def _pass_history_on(transformer: nn.Module) -> None:
    """Lets attention start as the mean of what it attends to: value and output projections begin as the identity.

    With tied weights such a mean already scores the items of the history above all others. People mostly do again what
    they did before, and from small random projections that takes many epochs to learn.
    """
    for layer in transformer.h:
        width = layer.attn.c_proj.weight.shape[0]
        with torch.no_grad():
            layer.attn.c_proj.weight.copy_(torch.eye(width))
            layer.attn.c_attn.weight[:, 2 * width :] = torch.eye(width)


class _ChosenTargets(CausalLanguageModeling):  # type: ignore[misc]
    """Causal, with targets chosen outside; never the unknown item, which stands for many. Inputs stay as they are."""

    chosen: Tensor  # int64 [rows, length]

    def predict_all(self, item_ids: Tensor) -> MaskingInfo:
        info = super().predict_all(item_ids)
        # Transformers4Rec's schema hides a row's last action, so that nothing can be predicted from it.
        targets = self.chosen.masked_fill((self.chosen == UNKNOWN) | ~info.schema, self.padding_idx)
        return MaskingInfo(info.schema, targets)


class FrequencySampler(nn.Module):
    """Negatives for a sampled softmax, drawn by how often training saw an item, shared by a whole batch.

    Takes the place of Transformers4Rec's LogUniformSampler, which believes that a smaller number means a more
    frequent item; in an append-only vocabulary it does not.
    """

    def __init__(self, item_counts: Tensor, draws: int) -> None:
        """`item_counts` int64 [items]: an item with 0 is never drawn. `draws`: with replacement, per batch."""
        super().__init__()
        share = item_counts.double() / item_counts.sum()
        self.draws = draws
        self.register_buffer("cumulative", share.cumsum(0))
        # An item drawn twice is kept once, so what counts is the chance to be drawn at all: 1 - (1 - p)^draws.
        self.register_buffer("chance", -torch.expm1(draws * torch.log1p(-share)).float())

    def sample(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The drawn items [n], and the chance of being drawn of each target [targets] and of each drawn item [n].

        The task subtracts the logarithm of these chances from the scores (log-Q correction), so that a frequent
        item is not pushed down just for being drawn often.
        """
        points = torch.rand(self.draws, dtype=torch.float64) * self.cumulative[-1]
        drawn = torch.searchsorted(self.cumulative, points, right=True).unique()  # type: ignore[no-untyped-call]
        return drawn, self.chance[targets], self.chance[drawn]
