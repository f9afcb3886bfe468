"""Small `sequences` rows whose next item a model can learn, as Parquet files that training reads."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.launch_training import parse_event
from training.batches import BUCKET_SIZES, FEATURES
from training.checkpoint import describe_weights, save_weights
from training.config import ModelSpec, RunSpec, TrainSettings

if TYPE_CHECKING:
    from training.model import SequenceModel

ITEMS = 30  # indices 2 to 29; 29 is in no row, so unknown to training
MAX_LENGTH = 8
CONTEXT_SIZES = {"event_type_index": 4, "vertical_index": 5, **BUCKET_SIZES}
SPEC = ModelSpec(
    architecture="gpt2",
    width=16,
    layers=1,
    heads=2,
    dropout=0.0,
    negatives=0,
    max_length=MAX_LENGTH,
    items=ITEMS,
    context_sizes=CONTEXT_SIZES,
)


def train_here(_: Path, spec: RunSpec, on_event: Callable[[dict[str, Any]], None]) -> None:
    """In place of `launch` where no process needs to end by itself: in this one, in which PyTorch is imported once."""
    from training.loop import train

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train(spec)
    for line in said.getvalue().splitlines():
        if event := parse_event(line):
            on_event(event)


def save_model(folder: Path, model: SequenceModel, about: dict[str, Any]) -> None:
    """Writes a model into an existing folder, as training does."""
    save_weights(folder, model.tensors())
    describe_weights(folder, model.spec, about)


def make_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of 1 to MAX_LENGTH actions: each item is its predecessor plus one, and 28 wraps around to 2."""
    random = np.random.default_rng(seed)
    rows = []
    for length in random.integers(1, MAX_LENGTH + 1, count).tolist():
        items = (random.integers(0, 27) + np.arange(length)) % 27 + 2
        row = {"length": length, "item_index": items.tolist()}
        for name in FEATURES[1:]:
            row[name] = random.integers(1, CONTEXT_SIZES[name], length).tolist()
        # Distinct times within one session: nothing for training to shuffle.
        row["gap_bucket"] = random.integers(3, CONTEXT_SIZES["gap_bucket"], length).tolist()
        row["session_end"] = [1] * length
        rows.append(row)
    return rows


def item_counts(rows: list[dict[str, Any]]) -> np.ndarray:
    counts = np.bincount(np.concatenate([row["item_index"] for row in rows]), minlength=ITEMS)
    counts[:2] = 0
    return counts


def write_files(folder: Path, *parts: list[dict[str, Any]], row_group_size: int | None = None) -> list[str]:
    """Writes one file per part, with one row group if no size is given; returns their URLs."""
    schema = pa.schema([("length", pa.int32()), *((name, pa.list_(pa.int32())) for name in FEATURES)])
    urls = []
    for number, rows in enumerate(parts):
        path = folder / f"part-{number}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size)
        urls.append(f"file://{path}")
    return urls


def damage(url: str) -> None:
    """Overwrites the data pages of a Parquet file; its footer stays."""
    path = Path(url.removeprefix("file://"))
    good = path.read_bytes()
    footer = int.from_bytes(good[-8:-4], "little") + 8
    path.write_bytes(b"\0" * (len(good) - footer) + good[-footer:])


def write_valid(
    folder: Path, rows: list[dict[str, Any]], targets: list[list[int]], seen: list[list[int]] | None = None
) -> list[str]:
    """Writes a file of the valid split: each row with its user's next items, all at one time, and those not new."""
    path = folder / "valid.parquet"
    held = [
        {**row, "target_item_index": items, "target_ts": [0] * len(items), "seen_item_index": old}
        for row, items, old in zip(rows, targets, seen or [[]] * len(rows), strict=True)
    ]
    lists = ((name, pa.list_(pa.int32())) for name in (*FEATURES, "target_item_index", "seen_item_index"))
    schema = pa.schema([("length", pa.int32()), *lists, ("target_ts", pa.list_(pa.int64()))])
    pq.write_table(pa.Table.from_pylist(held, schema), path)
    return [f"file://{path}"]


def next_items(rows: list[dict[str, Any]]) -> list[list[int]]:
    """The item that follows each of `make_rows`' rows."""
    return [[(row["item_index"][-1] - 1) % 27 + 2] for row in rows]


def make_run(
    folder: Path,
    parts: list[list[dict[str, Any]]],
    valid: tuple[list[dict[str, Any]], list[list[int]]] | None = None,
    model: ModelSpec = SPEC,
    **settings: Any,
) -> RunSpec:
    """A run spec over those files, with its output in `folder`/model and its checkpoints in `folder`/checkpoints.

    `valid`: the rows of held-out users, and their next items.
    """
    (folder / "model").mkdir(parents=True)
    rows = [row for part in parts for row in part]
    counts = folder / "counts.npy"
    np.save(counts, item_counts(rows))
    return RunSpec(
        settings=TrainSettings.model_validate({"dropout": 0.0, **settings}),
        model=model,
        train_files=write_files(folder, *parts),
        train_rows=len(rows),
        valid_files=write_valid(folder, *valid) if valid else [],
        item_counts=str(counts),
        output=str(folder / "model"),
        checkpoints=str(folder / "checkpoints"),
        about={"model_version": "test"},
    )
