"""Settings of training, and the file that a training process is started with. No heavy imports here."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _to_utc(value: datetime) -> datetime:
    return value if value.tzinfo is None else value.astimezone(timezone.utc).replace(tzinfo=None)


# A time without a zone is UTC; one with a zone is converted.
UtcDatetime = Annotated[datetime, AfterValidator(_to_utc)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values don't change after parsing."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainSettings(Section):
    """sequences → model."""

    processes: int = Field(1, ge=1, description="Horovod processes; each reads its own part of the data")
    threads: int = Field(1, ge=1, description="CPU threads of one process")
    architecture: Literal["gpt2"] = Field("gpt2", description="the Hugging Face block inside Transformers4Rec")
    width: int = Field(64, ge=8, description="length of the vectors")
    layers: int = Field(1, ge=1)
    heads: int = Field(1, ge=1)
    dropout: float = Field(0.2, ge=0, lt=1)
    context_width: int = Field(8, ge=1, description="length of the embedding of each context feature")
    negatives: int = Field(
        1024, ge=0, description="sampled softmax: items drawn by frequency, shared in a batch; 0: full softmax"
    )
    batch_size: int = Field(64, ge=1, description="rows per process and step")
    epochs: int = Field(10, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0, description="the gradient is scaled down to this norm")
    seed: int = Field(0, ge=0)
