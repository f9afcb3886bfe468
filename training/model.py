"""The model: the only module that imports Transformers4Rec (and Merlin, whose schema Transformers4Rec needs).

A transformer reads a user's actions and predicts items. The item table is both input and output embedding (tied
weights, no bias), so the state that predicts a user's next item is a vector in the items' space: its dot product with
an item's vector is the model's own score.

The training objectives (`train.objective`):

- clm: each action predicts the target chosen for it (training.data) from the actions up to and including it.
- mlm: some actions are masked and predicted from all the others (BERT4Rec; Sun et al., 2019).
- rtd: mlm, plus detecting whether each action is the true one or a replacement proposed by the model itself (ELECTRA;
  Clark et al., 2020, as in Transformers4Rec; de Souza Pereira Moreira et al., 2021).
- plm: some actions are predicted in a random order, each from the visible ones and those before it (XLNet).

Only clm yields a state at every action. The others predict at one extra, masked action appended to the row.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Merlin probes for frameworks that are not needed here.
warnings.filterwarnings("ignore", message=".* dtype mappings did not load successfully", category=UserWarning)

import transformers4rec.torch as tr  # noqa: E402
from merlin.schema import ColumnSchema, Schema, Tags  # noqa: E402
from transformers4rec.config import transformer as blocks  # noqa: E402
from transformers4rec.torch import masking  # noqa: E402

from training.batches import FEATURES, PADDING, TARGET, UNKNOWN  # noqa: E402
from training.config import ModelSpec  # noqa: E402
from training.softmax import FrequencySampler, full_softmax, gbce, sampled_softmax  # noqa: E402

ITEM = FEATURES[0]

Batch = dict[str, Tensor]


class ItemTable(nn.Module):
    """Item vectors: each is the sum of the item's own part and one part per attribute (category, vertical, ...).

    An item that training never saw has no part of its own: its vector is the sum of its attributes' parts. With
    `item_dropout`, training randomly drops own parts, so that the attributes learn to stand alone.
    """

    attributes: Tensor

    def __init__(self, spec: ModelSpec, attributes: Tensor, own: Tensor | None) -> None:
        """Args:
        attributes: int32 [len(spec.attribute_sizes), items]: each item's attribute numbers, 0 where it has none.
        own: the own parts of a trained model, used in place, without a copy; None: fresh ones.
        """
        super().__init__()
        self.register_buffer("attributes", attributes)
        self.dropout = spec.item_dropout
        if own is None:
            dtype = getattr(torch, spec.item_precision)
            self.own = nn.Embedding(spec.items, spec.width, padding_idx=PADDING, sparse=spec.sparse, dtype=dtype)
            nn.init.normal_(self.own.weight, std=_FIRST_STD)
            with torch.no_grad():
                self.own.weight[PADDING] = 0
        elif own.shape == (spec.items, spec.width):
            self.own = nn.Embedding.from_pretrained(own, padding_idx=PADDING)  # type: ignore[no-untyped-call]
        else:
            raise RuntimeError(f"the item table is {tuple(own.shape)}, not {(spec.items, spec.width)}")
        self.parts = nn.ModuleList(
            nn.Embedding(size, spec.width, padding_idx=PADDING) for size in spec.attribute_sizes.values()
        )
        with torch.no_grad():
            for part in self.parts:
                cast(nn.Embedding, part).weight.zero_()

    def forward(self, items: Tensor, kept: Tensor | None = None) -> Tensor:
        """Item numbers, int64 [...] → their vectors, float32 [..., width]. `kept`, bool [...]: whose own part counts;
        None: every item's, minus those that `item_dropout` drops in training."""
        if kept is None and self.training and self.dropout and len(self.parts):
            kept = torch.rand(items.shape, device=items.device) >= self.dropout
        vectors = self.own(items).float()
        if kept is not None:
            vectors = vectors * kept.unsqueeze(-1)
        for numbers, part in zip(self.attributes, self.parts, strict=True):
            vectors = vectors + part(numbers[items])
        return cast(Tensor, vectors)


class SequenceModel(nn.Module):
    """Transformers4Rec's inputs and transformer, with the methods that the stages need.

    A batch holds, for each of FEATURES, int64 [rows, length]: numbers from 1 up, left-aligned, zero-padded.
    """

    item_counts: Tensor
    known_items: Tensor

    def __init__(self, spec: ModelSpec, item_counts: Tensor, attributes: Tensor, own: Tensor | None) -> None:
        """`item_counts`, int64 [items]: how often training saw each item; 0 for an item that the model must not know.
        `attributes` and `own`: see ItemTable."""
        super().__init__()
        self.spec = spec
        self.register_buffer("item_counts", item_counts)
        self.table = ItemTable(spec, attributes, own)
        self.inputs = _inputs(spec)
        self.transformer = _transformer(spec)
        if spec.objective != "clm":
            self.masking = _MASKINGS[spec.objective](hidden_size=spec.width)
            # XLNet has its own mask vector.
            self.masking.masked_item_embedding.requires_grad_(spec.objective != "plm")
        if spec.objective == "rtd":
            self.discriminator = nn.Linear(spec.width, 1)
        # These are as long as the catalogue and only training reads them: a trained model does without.
        if own is None and spec.negatives:
            self.sampler = FrequencySampler(item_counts, spec.negatives, spec.negative_power)
            self.known_count = int((item_counts > 0).sum())
        elif own is None:
            self.register_buffer("known_items", item_counts.nonzero().squeeze(1), persistent=False)
            self.register_buffer("place", (item_counts > 0).cumsum(0) - 1, persistent=False)  # in known_items

    # ---- training

    def loss(self, batch: Batch, target_types: Tensor | None = None) -> tuple[Tensor, int]:
        """The loss summed over all targets, and the number of targets. UNKNOWN is never a target: it stands for many
        items; nor is, for the objectives that mask actions, one whose event type is not of `target_types`, int64 (None:
        all). (TARGET, which clm predicts, is chosen by them already.)

        In rows made for a larger vocabulary, numbers that the model does not know are read as UNKNOWN, as in `encode`.
        """
        known = self.known(batch)
        embedded, items = self._embed(known), known[ITEM]
        if self.spec.objective == "clm":
            targets = batch[TARGET].where(batch[TARGET] < self.spec.items, UNKNOWN)
            return self._item_loss(self._states(embedded, items > 0), targets)
        info = self.masking.compute_masked_targets(items, training=True)
        if self.spec.objective == "plm":
            chosen = {"perm_mask": self.masking.perm_mask, "target_mapping": self.masking.target_mapping}
            # Where a position may attend to nothing, XLNet averages over everything, the target included.
            # Transformers4Rec keeps one action visible, except in a short row whose padding it masks, too: there, such
            # targets are dropped.
            sees = ((self.masking.perm_mask == 0) & (items > 0)[:, None]).any(dim=2)
            targets = _of_types(info.targets.where(sees, 0), batch, target_types)
            return self._item_loss(self._states(embedded, items > 0, **chosen), targets)
        hidden = self.masking.apply_mask_to_inputs(embedded, info.schema, training=True)
        states = self._states(hidden, items > 0)
        loss, count = self._item_loss(states, _of_types(info.targets, batch, target_types))
        if self.spec.objective == "rtd" and count:
            loss = loss + count * self._replacement_loss(known, states, info.targets)
        return loss, count

    def _item_loss(self, states: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        is_known = self.item_counts[targets] > 0
        states, targets = states[is_known].float(), targets[is_known]
        if len(targets) == 0:
            return states.sum() * 0, 0
        if not self.spec.negatives:
            return full_softmax(states, self.place[targets], self.table(self.known_items)), len(targets)
        if self.spec.loss == "gbce":
            known, t = self.known_count, self.spec.gbce_t
            return gbce(states, targets, self.table, self.sampler, known_items=known, t=t), len(targets)
        return sampled_softmax(states, targets, self.table, self.sampler), len(targets)

    def _replacement_loss(self, batch: Batch, states: Tensor, targets: Tensor) -> Tensor:
        """Replaced-action detection, averaged over all actions: each masked action is replaced by a masked item of the
        batch, sampled by the model's own scores."""
        hidden, original = targets > 0, batch[ITEM]
        table = self.table(targets[hidden]).detach().T
        # In chunks and in 32 bits: Transformers4Rec itself holds several matrices of all masked actions by all masked
        # items, and under autocast its sampling noise is bfloat16, which takes only 256 values.
        parts = torch.split(states[hidden].detach(), _DRAWN_AT_ONCE)
        drawn = torch.cat([self.masking.sample_from_softmax((part @ table).float()) for part in parts])
        items = original.masked_scatter(hidden, targets[hidden][drawn])
        replaced, present = items != original, original > 0
        doubts = self.discriminator(self._states(self._embed({**batch, ITEM: items}), present)).squeeze(-1)
        return F.binary_cross_entropy_with_logits(doubts[present], replaced[present].float())

    # ---- use

    def encode(self, batch: Batch) -> Tensor:
        """The state that predicts each row's next item, float32 [rows, width].

        Numbers that the model has not learnt (a newer item, a newer vertical) are read as UNKNOWN. Rows hold at
        most `spec.history_length` actions.
        """
        known = self.known(batch)
        embedded, lengths = self._embed(known), (known[ITEM] > 0).sum(dim=1)
        rows = torch.arange(len(lengths), device=lengths.device)
        if self.spec.objective == "clm":
            return self._states(embedded, known[ITEM] > 0)[rows, lengths - 1].float()
        # Append one masked action to each row.
        longer = F.pad(embedded, (0, 0, 0, 1))
        present = torch.arange(longer.shape[1], device=lengths.device) <= lengths[:, None]
        if self.spec.objective != "plm":
            longer[rows, lengths] = self.masking.masked_item_embedding.to(longer.dtype)
            return self._states(longer, present)[rows, lengths].float()
        target_mask = F.one_hot(lengths, longer.shape[1]).to(longer.dtype)
        unseen = target_mask[:, None, :].expand(-1, longer.shape[1], -1)  # no position sees the masked action's content
        return self._states(longer, present, perm_mask=unseen, target_mapping=target_mask[:, None])[:, 0].float()

    def known(self, batch: Batch) -> Batch:
        """The batch with UNKNOWN in place of every number that the model has not learnt.

        A vertical or event type that was numbered before the training, but occurs in none of its rows, keeps its random
        vector (of an expected length of .4 at width 64).
        """
        items = batch[ITEM]
        counts = self.item_counts[items.clamp(max=self.spec.items - 1)]
        learnt = (items < self.spec.items) & ((counts > 0) | (items <= UNKNOWN))
        sizes = self.spec.context_sizes
        context = {name: batch[name].where(batch[name] < size, UNKNOWN) for name, size in sizes.items()}
        return {ITEM: items.where(learnt, UNKNOWN), **context}

    @torch.no_grad()
    def item_vectors(self, items: Tensor | None = None) -> Tensor:
        """Item numbers, int64 [n] → their vectors, float32 [n, width]; None: all items, which takes the memory of a
        second table. An item that the model does not know gets the sum of its attributes' parts, zeros without any."""
        if items is None:
            items = torch.arange(self.spec.items, device=self.item_counts.device)
        return cast(Tensor, self.table(items, kept=self.item_counts[items] > 0))

    # ---- weights

    @torch.no_grad()
    def start_from(self, factors: Tensor) -> None:
        """Initialises the item vectors with `factors`, float32 [items, width], plus a fraction of the random ones, so
        that no two items start alike."""
        self.table.own.weight.mul_(0.3).add_(factors)

    @torch.no_grad()
    def grow_from(self, tensors: dict[str, Tensor]) -> None:
        """Starts from the `tensors()` of an older model, whose spec differs only in having shorter vocabularies.

        Old rows keep their numbers and meaning. A new item's own part starts at zero, so its vector is the sum of its
        attributes' parts.

        Raises:
            KeyError, RuntimeError: the older model is of another kind.
        """
        mine, own_data = self.tensors(), ("item_counts", "table.attributes")
        if odd := mine.keys() ^ tensors.keys():
            raise KeyError(", ".join(sorted(odd)))
        fresh = self.item_counts > 0
        old_counts = tensors["item_counts"]
        fresh[: len(old_counts)] &= old_counts == 0
        for name, old in tensors.items():
            if name not in own_data:
                (mine[name][: len(old)] if old.dim() else mine[name]).copy_(old)
        self.table.own.weight[fresh] = 0

    def tensors(self) -> dict[str, Tensor]:
        """Everything learnt or counted, including `item_counts`; each tensor once."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    # ---- parts

    def _embed(self, batch: Batch) -> Tensor:
        """The transformer's input: per action, its item's vector plus its context's, [rows, length, width]."""
        # The tied vectors are small as outputs, so that no item starts far ahead of the others; scaled up as inputs,
        # they match a layer's other inputs in size (Vaswani et al., 2017, 3.4).
        embedded = self.table(batch[ITEM]) * math.sqrt(self.spec.width)
        if self.inputs is not None:
            embedded = embedded + self.inputs({name: batch[name] for name in self.spec.context_sizes})
        return cast(Tensor, embedded)

    def _states(self, embedded: Tensor, present: Tensor, **more: Tensor) -> Tensor:
        # A causal block never looks right, where the padding is; the others need a mask.
        if self.spec.objective != "clm":
            more["attention_mask"] = present.to(embedded.dtype)
        elif self.spec.architecture == "xlnet":  # its own attn_type="uni" fails in transformers 4.30 (torch.ones)
            later = torch.ones(embedded.shape[1], embedded.shape[1], device=embedded.device).triu(1)
            more["perm_mask"] = later.expand(len(embedded), -1, -1)
        return cast(Tensor, self.transformer(inputs_embeds=embedded, **more)[0])


def build_model(
    spec: ModelSpec, item_counts: Tensor, attributes: Tensor | None = None, own: Tensor | None = None
) -> SequenceModel:
    """A new model, initialised from torch's global generator.

    Args:
        item_counts: int64 [spec.items]; see SequenceModel.
        attributes: integers [len(spec.attribute_sizes), spec.items]; see ItemTable. None: the spec has none.
        own: the items' own parts, [spec.items, spec.width], of a trained model, whose other weights the caller loads.
            They are used in place, and the model can't be trained. None: fresh ones.
    """
    if attributes is None:
        attributes = torch.empty((0, spec.items), dtype=torch.int32)
    return SequenceModel(spec, item_counts, attributes.int(), own)


def _of_types(targets: Tensor, batch: Batch, types: Tensor | None) -> Tensor:
    """The targets, 0 at actions of other event types than these."""
    return targets if types is None else targets.where(torch.isin(batch["event_type_index"], types), 0)


_FIRST_STD = 0.02  # of the item vectors' coordinates at initialisation
_DRAWN_AT_ONCE = 1024  # masked actions whose replacements are sampled together

# The probabilities are the shares of actions that are masked.
_MASKINGS = {
    "mlm": partial(masking.MaskedLanguageModeling, mlm_probability=0.3),
    "rtd": partial(masking.ReplacementLanguageModeling, mlm_probability=0.3, sample_from_batch=True),
    "plm": partial(masking.PermutationLanguageModeling, plm_probability=0.3),
}


def _inputs(spec: ModelSpec) -> nn.Module | None:
    """Transformers4Rec's embeddings of an action's context, summed; None if the model reads no context."""
    if not spec.context_sizes:
        return None
    columns = [
        ColumnSchema(
            name,
            dtype="int64",
            is_list=True,
            is_ragged=False,
            tags=[Tags.CATEGORICAL],
            properties={
                "domain": {"min": 0, "max": size - 1},
                "value_count": {"min": spec.max_length, "max": spec.max_length},
            },
        )
        for name, size in spec.context_sizes.items()
    ]
    inputs = tr.TabularSequenceFeatures.from_schema(
        Schema(columns),
        max_sequence_length=spec.max_length,
        embedding_dim_default=spec.width,
        aggregation="element-wise-sum",
    )
    return cast(nn.Module, inputs)


def _transformer(spec: ModelSpec) -> nn.Module:
    """The Hugging Face transformer that Transformers4Rec builds for the architecture."""
    sizes: dict[str, Any] = {
        "d_model": spec.width,
        "n_head": spec.heads,
        "n_layer": spec.layers,
        "total_seq_length": spec.max_length,
        "dropout": spec.dropout,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
    }
    causal = spec.objective == "clm"
    if spec.architecture == "gpt2":
        config = blocks.GPT2Config.build(**sizes)
    elif spec.architecture == "xlnet":
        config = blocks.XLNetConfig.build(**sizes, mem_len=None)
    else:
        # Transformers4Rec leaves BERT's dropout and inner width at the defaults of its 110-million-parameter model.
        build = {"bert": blocks.BertConfig.build, "electra": blocks.ElectraConfig.build}[spec.architecture]
        if spec.architecture == "bert":
            sizes |= {"intermediate_size": 4 * spec.width, "hidden_dropout_prob": spec.dropout}
        config = build(**sizes, attention_probs_dropout_prob=spec.dropout, is_decoder=causal)
    transformer = tr.TransformerBlock(config).transformer
    # Tokens are looked up in our own tables: the transformer's one-row table would be dead weight.
    transformer.set_input_embeddings(nn.Identity())
    for name, parameter in transformer.named_parameters():  # unused here: no gradient, nothing to reduce
        if "pooler" in name or "seg_embed" in name or "r_s_bias" in name:
            parameter.requires_grad_(False)
        if name == "mask_emb" and spec.objective != "plm":
            parameter.requires_grad_(False)
    _pass_history_on(transformer, spec.width, math.sqrt(spec.max_length) / 2)
    return cast(nn.Module, transformer)


def _pass_history_on(transformer: nn.Module, width: int, factor: float) -> None:
    """Initialises the value projection to the identity and the output projection to `factor` times it, so that
    attention starts as that multiple of the mean of its inputs.

    With tied weights that mean already scores the history's items above all others. People mostly repeat what they did
    before, which takes many epochs to learn from small random projections. A mean of n unrelated vectors is sqrt(n)
    times shorter than they are: without the factor a long history weighs less than the last action.
    """
    identity = torch.eye(width)
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if name.endswith("attn.c_attn.weight"):  # GPT-2: queries, keys and values beside each other
                weight[:, 2 * width :] = identity
            elif name.endswith(("rel_attn.v", "attention.self.value.weight")):  # XLNet, by heads; BERT and ELECTRA
                weight.copy_(identity.view_as(weight))
            elif name.endswith(("attn.c_proj.weight", "rel_attn.o", "attention.output.dense.weight")):
                weight.copy_(factor * identity.view_as(weight))
