"""Settings of training, and the file that a training process is started with. No heavy imports here."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated, Any, Literal

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
    heads: int = Field(2, ge=1)
    dropout: float = Field(0.2, ge=0, lt=1)
    negatives: int = Field(
        1024, ge=0, description="sampled softmax: items drawn by frequency, shared in a batch; 0: full softmax"
    )
    later_share: float = Field(
        1.0, ge=0, le=1, description="of the actions, those that are asked for later sessions, not the next action"
    )
    horizon: int = Field(64, ge=1, description="later sessions: any of that many actions after the session's end")
    batch_size: int = Field(64, ge=1, description="rows in one batch of a process")
    local_steps: int = Field(
        1, ge=1, description="batches whose gradients a process adds up before the processes exchange them: one step"
    )
    epochs: int = Field(10, ge=1, description="at most; the learning rate falls over all of them")
    patience: int = Field(0, ge=0, description="epochs without a better validation ndcg@10 that end training; 0: never")
    learning_rate: float = Field(1e-3, gt=0, description="of one process with one batch per step; see rate_scaling")
    rate_scaling: Literal["sqrt", "linear", "none"] = Field(
        "sqrt",
        description="what processes * local_steps (so many times more rows in a step) multiplies the learning rate by: "
        "its square root suits Adam (Malladi et al., 2022), linear suits SGD (Goyal et al., 2017)",
    )
    warm_up: float = Field(0.05, gt=0, le=1, description="share of all rows over which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0, description="the gradient is scaled down to this norm")
    fp16_gradients: bool = Field(False, description="gradients travel between the processes as 16-bit numbers")
    seed: int = Field(0, ge=0)
    launcher: Literal["local", "spark"] = Field(
        "local",
        description="local: processes of this machine, by horovodrun where there are several; spark: one task of the "
        "Spark application for each process (YARN, Databricks)",
    )
    checkpoint_minutes: float = Field(10, ge=0, description="between two checkpoints; each epoch's end makes one too")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that stay, beside the best epoch's")
    tracking_uri: str = Field(
        "local",
        description="where MLflow keeps runs: local (mlflow.db under storage.root), none, a server's address",
    )


class ModelSpec(Section):
    """What a model is built from."""

    architecture: Literal["gpt2"]
    width: int
    layers: int
    heads: int
    dropout: float
    negatives: int
    max_length: int = Field(description="actions in a row of sequences")
    items: int = Field(description="rows of the item table: the largest item_index + 1")
    context_sizes: dict[str, int] = Field(description="rows of each context feature's table")

    @property
    def history_length(self) -> int:
        """How many actions the model reads of a user: from the last place in a row nothing was ever predicted."""
        return self.max_length - 1


class RunSpec(Section):
    """The file that a training process is started with: plain values, so that training knows nothing of tables."""

    settings: TrainSettings
    model: ModelSpec
    train_files: list[str] = Field(description="file:// URLs: the active files of one snapshot of sequences")
    train_rows: int = Field(description="their rows")
    valid_files: list[str]
    item_counts: str = Field(description=".npy, int64 [items]: events of an item that training may see, 0: unknown")
    item_verticals: str | None = Field(None, description=".npy, int64 [items]: an item's place in verticals, or -1")
    verticals: list[str] = Field([], description="the verticals that validation also reports")
    output: str = Field(description="an empty folder: the model's files are written here, model.json last")
    checkpoints: str | None = Field(
        None, description="a folder of this run alone: checkpoints are written here, and the newest is gone on from"
    )
    about: dict[str, Any] = Field(description="goes into model.json as it is")
