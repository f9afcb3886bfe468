"""Training settings, and the run spec that a training process is started with. No heavy imports here."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from training.urls import holds_secret


def _no_number(value: Any) -> Any:
    """Pydantic reads a number, even in quotes, as seconds since 1970: 20111101 would be a day in 1970."""
    digits = isinstance(value, str) and value.strip().lstrip("+-").replace(".", "", 1).isdigit()
    if digits or isinstance(value, int | float):
        raise ValueError(f"found {value!r}, a number, where a time is expected, such as 2011-11-01T00:00:00")
    return value


def _to_utc(value: datetime) -> datetime:
    try:
        return value if value.tzinfo is None else value.astimezone(timezone.utc).replace(tzinfo=None)
    except OverflowError:
        raise ValueError("found a time outside the years 1 to 9999") from None


# A time without a zone is UTC; one with a zone is converted.
UtcDatetime = Annotated[datetime, BeforeValidator(_no_number), AfterValidator(_to_utc)]


class Section(BaseModel):
    """A section of the configuration: immutable; unknown keys and non-finite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes true as 1, which would turn a limit off."""
        wanted = cls.model_fields[str(info.field_name)].annotation
        kinds = {getattr(kind, "__origin__", kind) for kind in (wanted, *get_args(wanted))}
        found = value.values() if isinstance(value, dict) else [value]
        if kinds & {int, float} and any(isinstance(one, bool) for one in found):
            raise ValueError("found true or false where a number is expected")
        return value


Architecture = Literal["gpt2", "xlnet", "bert", "electra"]
Objective = Literal["clm", "mlm", "rtd", "plm"]
ContextFeature = Literal[
    "event_type_index", "vertical_index", "gap_bucket", "session_end", "hour", "weekday", "price_bucket"
]
CONTEXT_FEATURES: tuple[ContextFeature, ...] = get_args(ContextFeature)
Precision = Literal["float32", "bfloat16"]
ItemAttribute = Literal["category", "vertical", "price"]
ITEM_ATTRIBUTES: tuple[ItemAttribute, ...] = get_args(ItemAttribute)

# From this many items on, "auto" picks the row-wise optimizer: a dense step takes about twice as long there.
ROW_WISE_FROM = 50_000


class Network(Section):
    """The training settings that define a model, and that the model's own spec keeps."""

    architecture: Architecture = Field(
        "gpt2", description="the Hugging Face block inside Transformers4Rec; electra has bert's network"
    )
    objective: Objective = Field(
        "clm",
        description="what is predicted. clm: the next action, or a later one; mlm, rtd, plm: masked actions "
        "(training/model.py)",
    )
    width: int = Field(64, ge=8, description="length of the vectors")
    layers: int = Field(1, ge=1, description="number of stacked blocks")
    heads: int = Field(2, ge=1, description="attention heads per block; width must be a multiple of their number")
    dropout: float = Field(0.2, ge=0, lt=1, description="share of the blocks' activations that training sets to 0")
    loss: Literal["softmax", "gbce"] = Field(
        "softmax",
        description="gbce: binary cross-entropy calibrated for uniform negatives; requires negative_power = 0",
    )
    negatives: int = Field(
        1024, ge=0, description="items sampled for each batch and shared by its rows; 0: full softmax"
    )
    negative_power: float = Field(
        1.0, ge=0, le=1, description="negatives are sampled in proportion to count^power: 1 by frequency, 0 uniformly"
    )
    gbce_t: float = Field(0.75, ge=0, le=1, description="gbce's calibration; 0: plain binary cross-entropy")
    item_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="how often training drops an item's own embedding, so that its attributes learn to stand alone",
    )
    item_precision: Precision = Field(
        "float32",
        description="number format of the items' own embeddings, in training and in the model; bfloat16: half the size",
    )


class TrainSettings(Network):
    """sequences → model."""

    processes: int = Field(1, ge=1, description="Horovod processes; each reads its own share of the data")
    threads: int = Field(1, ge=1, description="CPU threads per process")
    inputs: tuple[ContextFeature, ...] = Field(
        CONTEXT_FEATURES, description="what the model reads of an action besides its item"
    )
    item_attributes: tuple[ItemAttribute, ...] = Field(
        ITEM_ATTRIBUTES, description="attributes whose embeddings are added to the item's own to form its vector"
    )
    start: Literal["svd", "random"] = Field(
        "svd",
        description="item vectors start from an SVD of which user acted on which item (up to 200,000 items), or at "
        "random",
    )
    later_share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of the actions that learn to predict a later session instead of the next action; clm only",
    )
    shuffle_baskets: bool = Field(
        True,
        description="shuffle actions with the same timestamp anew in each epoch; False: keep the log's order, by "
        "event_id",
    )
    horizon: int = Field(
        64,
        ge=1,
        description="for later_share: the target is any of this many actions to predict after the session's end",
    )
    batch_size: int = Field(64, ge=1, description="rows per batch, in each process")
    local_steps: int = Field(
        1,
        ge=1,
        description="batches whose gradients a process accumulates before the processes exchange them: one step",
    )
    epochs: int = Field(10, ge=1, description="maximum number of epochs; the learning rate decays over all of them")
    min_steps: int = Field(
        0,
        ge=0,
        description="epochs is raised until there are at least this many steps, since a small log needs more passes",
    )
    patience: int = Field(
        0,
        ge=0,
        description="training stops after this many epochs without a better validation ndcg@10 (those before its first "
        "above 0 don't count); 0: never",
    )
    learning_rate: float = Field(1e-3, gt=0, description="for one process with one batch per step; see rate_scaling")
    rate_scaling: Literal["sqrt", "none"] = Field(
        "sqrt",
        description="how the learning rate is scaled for processes * local_steps, the factor by which a step has more "
        "rows: sqrt multiplies it by the square root, which suits Adam (Malladi et al., 2022)",
    )
    warm_up: float = Field(
        0.05,
        gt=0,
        le=1,
        description="share of all rows, over all epochs, during which the learning rate rises; the decay sets in "
        "at the beginning, so a large share lowers the peak (.05: by .6 %, .5: by 28 %)",
    )
    weight_decay: float = Field(
        0.0, ge=0, description="AdamW's: each step shrinks a weight by this share, times the learning rate"
    )
    clip_norm: float = Field(1.0, gt=0, description="a gradient with a larger norm is scaled down to this norm")
    item_optimizer: Literal["auto", "adamw", "rowwise"] = Field(
        "auto",
        description="optimizer of the items' own embeddings. adamw: a step costs time and memory for every item; "
        "rowwise: only for the items that it uses (training/rowwise.py); auto: rowwise from 50,000 items on if there "
        "are negatives, and with item_precision bfloat16",
    )
    fp16_gradients: bool = Field(False, description="processes exchange gradients as 16-bit numbers")
    warm_start: bool = Field(
        False, description="continue from the current model, on the rows of users who acted since it was trained"
    )
    warm_epochs: int = Field(1, ge=1, description="number of epochs in a warm start")
    warm_rate: float = Field(
        0.4,
        gt=0,
        description="factor on the learning rate in a warm start: at the full rate, the model forgets what it has "
        "learnt",
    )
    warm_length: int = Field(
        64,
        ge=2,
        description="number of each row's newest actions that a warm start reads; its batches hold more rows instead",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**31,
        description="seed of everything random: initial weights, order of the rows, negatives, dropout",
    )
    launcher: Literal["local", "spark"] = Field(
        "local",
        description="local: processes on this machine, started by horovodrun if there are several; spark: one task of "
        "the Spark application per process (YARN, Databricks)",
    )
    checkpoint_minutes: float = Field(
        10, ge=0, description="minutes between two checkpoints; the end of each epoch also writes one"
    )
    keep_checkpoints: int = Field(2, ge=1, description="number of newest checkpoints to keep, besides the best epoch's")
    tracking_uri: str = Field(
        "local",
        description="where MLflow stores runs: local (mlflow.db under storage.root), none, or a server's address",
    )

    @model_validator(mode="after")
    def _supported(self) -> TrainSettings:
        for key, names in (("inputs", self.inputs), ("item_attributes", self.item_attributes)):
            if repeated := [name for place, name in enumerate(names) if name in names[:place]]:
                raise ValueError(f"{key} names {repeated[0]!r} more than once")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads = {self.heads}, found {self.width}")
        if self.architecture == "xlnet" and self.width % 2:
            raise ValueError(f"xlnet needs an even width, found {self.width}")
        if self.architecture == "gpt2" and self.objective != "clm":
            raise ValueError(
                f"gpt2 only looks back and needs objective 'clm', found {self.objective!r}, which looks both ways"
            )
        if self.objective == "plm" and self.architecture != "xlnet":
            raise ValueError(f"plm needs architecture 'xlnet', found {self.architecture!r}")
        if holds_secret(self.tracking_uri):
            raise ValueError(
                "tracking_uri contains a user, a password or a key, which belong in MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD"
            )
        if self.loss == "gbce" and not self.negatives:
            raise ValueError("gbce needs negatives, found 0")
        if self.loss == "gbce" and self.negative_power:
            raise ValueError(
                f"gbce is calibrated for uniform negatives and needs negative_power = 0, found {self.negative_power}"
            )
        if self.item_dropout and not self.item_attributes:
            raise ValueError(f"item_dropout = {self.item_dropout} needs item_attributes to fall back on, found none")
        if self.item_precision == "bfloat16" and self.item_optimizer == "adamw":
            raise ValueError("item_precision 'bfloat16' needs item_optimizer 'rowwise' or 'auto', found 'adamw'")
        return self

    def row_wise(self, items: int) -> bool:
        """Whether an item table of `items` rows gets the row-wise optimizer: ModelSpec.sparse."""
        large = items >= ROW_WISE_FROM and self.negatives > 0  # a full softmax uses all rows in each step
        return self.item_optimizer == "rowwise" or (
            self.item_optimizer == "auto" and (large or self.item_precision == "bfloat16")
        )


class ModelSpec(Network):
    """What a model is built from."""

    sparse: bool = Field(False, description="gradients of the item table hold only the rows used in the step")
    max_length: int = Field(description="maximum number of actions in a row of sequences")
    items: int = Field(description="rows of the item table: the largest item_index + 1")
    context_sizes: dict[str, int] = Field(
        description="rows of each context feature's table; the model reads no other features"
    )
    attribute_sizes: dict[str, int] = Field(default_factory=dict, description="rows of each item attribute's table")

    @property
    def history_length(self) -> int:
        """How many of a user's actions the model reads: training never predicts from a row's last position."""
        return self.max_length - 1


class RunSpec(Section):
    """The file that a training process is started with. Plain values only: training knows nothing of tables."""

    settings: TrainSettings
    model: ModelSpec
    train_files: list[str] = Field(description="URLs (training.stores): the active files of one snapshot of sequences")
    train_rows: int = Field(description="number of rows in train_files")
    target_event_types: list[int] | None = Field(
        None, description="numbers of the event types to predict, the others are context alone; None: all"
    )
    valid_files: list[str]
    new_only: bool = Field(
        False, description="validation neither ranks nor asks for items of which the user had an event to predict"
    )
    item_counts: str = Field(
        description=".npy, int64 [items]: each item's number of events in the training window; 0: unknown to the model"
    )
    item_attributes: str | None = Field(None, description=".npy, int32 [attributes, items]; None: the model has none")
    item_verticals: str | None = Field(None, description=".npy, int64 [items]: an item's position in verticals, or -1")
    verticals: list[str] = Field([], description="verticals that validation also reports separately")
    start_from: str | None = Field(None, description="weights of an older model to start from; None: a new model")
    output: str = Field(description="an empty folder: the model's files are written here, model.json last")
    checkpoints: str | None = Field(
        None,
        description="a folder for this run only: checkpoints are written here, and training resumes from the newest",
    )
    about: dict[str, Any] = Field(description="copied into model.json unchanged")
