"""Transformers4Rec's half of scripts/bench/train.py: its own Trainer, fed by its own PyarrowDataLoader.

The model is built as in Transformers4Rec's documentation, with the same parts and sizes as trailvec's, and starts from
the same weights. The optimizer, the warm-up and cosine schedule and the gradient norm are those of trailvec's loop. The
differences are what Transformers4Rec does by itself: rows padded to the model's maximum length by a loader in a
separate process, its masking, its prediction task, and the Trainer.
"""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers4rec.torch as tr
from measure import cpu_seconds
from merlin.schema import ColumnSchema, Schema, Tags
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers4rec.config.trainer import T4RecTrainingArguments
from transformers4rec.config.transformer import GPT2Config
from transformers4rec.torch.tabular.aggregation import ElementwiseSum

from training.batches import FEATURES, pad
from training.config import ModelSpec, RunSpec
from training.model import SequenceModel, build_model

# The loader and the Trainer are deprecated, but they are what is measured.
warnings.filterwarnings("ignore", category=DeprecationWarning)
warnings.filterwarnings("ignore", message="'pin_memory' argument is set", category=UserWarning)


class SumWithLongerItems(ElementwiseSum):
    """trailvec's inputs: an item's vector is scaled by sqrt(width) in the input, relative to the head."""

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        item = inputs[FEATURES[0]]
        summed: torch.Tensor = super().forward({**inputs, FEATURES[0]: item * math.sqrt(item.shape[-1])})
        return summed


def peer_model(spec: ModelSpec, schema: Schema) -> torch.nn.Module:
    inputs = tr.TabularSequenceFeatures.from_schema(
        schema,
        max_sequence_length=spec.max_length,
        embedding_dims={FEATURES[0]: spec.width},
        embedding_dim_default=spec.width,
        aggregation=SumWithLongerItems(),
        masking="causal",
    )
    config = GPT2Config.build(
        d_model=spec.width,
        n_head=spec.heads,
        n_layer=spec.layers,
        total_seq_length=spec.max_length,
        dropout=spec.dropout,
        layer_norm_eps=1e-5,
    )
    body = tr.SequentialBlock(inputs, tr.TransformerBlock(config, masking=inputs.masking))
    # 0 skips the division by the temperature, which trailvec's model lacks, and saves a copy of all logits.
    task = tr.NextItemPredictionTask(
        weight_tying=True,
        softmax_temperature=0,
        sampled_softmax=spec.negatives > 0,
        max_n_samples=max(spec.negatives, 1),
    )
    return cast(torch.nn.Module, tr.Model(tr.Head(body, task, inputs=inputs)))


def schema_of(spec: ModelSpec) -> Schema:
    sizes = {FEATURES[0]: spec.items, **spec.context_sizes}
    length = {"min": spec.max_length, "max": spec.max_length}
    return Schema(
        [
            ColumnSchema(
                name,
                dtype="int64",
                is_list=True,
                is_ragged=False,
                tags=[Tags.CATEGORICAL, *([Tags.ITEM_ID] if name == FEATURES[0] else [])],
                properties={"domain": {"min": 0, "max": sizes[name] - 1}, "value_count": length},
            )
            for name in FEATURES
        ]
    )


@torch.no_grad()
def take_weights(model: torch.nn.Module, ours: SequenceModel) -> None:
    """Copies trailvec's weights into every weight of the peer's that affects its loss."""
    body = model.heads[0].body
    tables = body.inputs.categorical_module.embedding_tables
    tables[FEATURES[0]].weight.copy_(ours.table.own.weight)
    assert ours.inputs is not None  # the model reads context
    for name in ours.spec.context_sizes:
        tables[name].weight.copy_(ours.inputs.categorical_module.embedding_tables[name].weight)
    transformer = body[1].transformer
    transformer.load_state_dict(transformer.state_dict() | ours.transformer.state_dict())


class Clock(TrainerCallback):
    """Each epoch's seconds and CPU seconds, excluding the initial reading of the files into memory."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._started, self._worked = time.monotonic(), cpu_seconds()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds.append(time.monotonic() - self._started)
        self.cpu_seconds.append(cpu_seconds() - self._worked)


def held_out_batches(spec: RunSpec) -> Iterator[dict[str, torch.Tensor]]:
    """The rows that no contestant trains on, 256 at a time, padded to the model's maximum length: int64 [rows, length]
    by feature. They lie beside the counts, as held-out.parquet."""
    rows = pq.read_table(Path(spec.item_counts).with_name("held-out.parquet"))
    for batch in rows.to_batches(256):
        lengths = batch["length"].to_numpy().astype(np.int64)
        flat = {name: batch[name].flatten().to_numpy() for name in FEATURES}
        yield {name: torch.from_numpy(pad(flat[name], lengths, spec.model.max_length)).long() for name in FEATURES}


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, spec: RunSpec) -> float:
    """The mean cross-entropy of each next item of the held-out rows, without dropout."""
    model.eval()
    loss, targets = 0.0, 0
    for batch in held_out_batches(spec):
        count = int((batch[FEATURES[0]][:, 1:] > 0).sum())
        # `training` is what makes it predict each item, not only a row's last.
        loss += count * float(model(batch, training=True)["loss"])
        targets += count
    return loss / targets


def train(spec: RunSpec) -> list[dict[str, float]]:
    """Each epoch's `rows_per_second`, `rows_per_cpu_second` and mean `loss` over its steps; the last one's
    `held_out_loss` too, unless the softmax is a sampled one."""
    settings = spec.settings
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    counts = np.load(spec.item_counts)
    ours = build_model(spec.model, torch.from_numpy(counts))
    schema = schema_of(spec.model)
    model = peer_model(spec.model, schema)
    take_weights(model, ours)

    steps = math.ceil(spec.train_rows / settings.batch_size) * settings.epochs
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        arguments = T4RecTrainingArguments(
            output_dir=out,
            data_loader_engine="pyarrow",
            max_sequence_length=spec.model.max_length,
            per_device_train_batch_size=settings.batch_size,
            num_train_epochs=settings.epochs,
            optim="adamw_torch",
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.clip_norm,
            lr_scheduler_type="cosine",
            warmup_steps=round(settings.warm_up * steps),
            learning_rate_num_cosine_cycles_by_epoch=0.5 / settings.epochs,
            logging_strategy="epoch",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            no_cuda=True,
            seed=settings.seed,
        )
        paths = [url.removeprefix("file://") for url in spec.train_files]
        trainer = tr.Trainer(model, arguments, schema=schema, train_dataset_or_path=paths, callbacks=[clock])
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    epochs = [
        {
            "rows_per_second": spec.train_rows / seconds,
            "rows_per_cpu_second": spec.train_rows / worked,
            "loss": loss,
        }
        for seconds, worked, loss in zip(clock.seconds, clock.cpu_seconds, losses, strict=True)
    ]
    if not spec.model.negatives:
        epochs[-1]["held_out_loss"] = held_out_loss(model, spec)
    return epochs
