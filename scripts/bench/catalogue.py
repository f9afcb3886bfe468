"""What a training step costs as the catalogue grows: python scripts/bench/catalogue.py [--quick]

The same users' rows (as in scripts/bench/train.py: median 8 actions, at most 64), with items drawn by Zipf's law from
10,000, 100,000, 1 million and 5 million. The model knows all items; each has a category, a vertical and a price. One
GPT-2 block of width 64, batches of 64 rows, 1,024 negatives, one thread. Each case runs the product's loop in its own
process: two epochs, each followed by a validation, a checkpoint and the best weights' file.

  rowwise   train.item_optimizer = "rowwise"
  half      the same with train.item_precision = "bfloat16"
  dense     "adamw"; up to 1 million items: 5 million would take some 8 GB

Seconds are CPU seconds of the training thread per step of the second epoch, which a busy machine affects less than the
wall clock. Memory is the process's peak minus what it had before the model was built. --quick: up to 100,000 items.
The last line is one JSON object: step_ratio_5m_to_10k (rowwise: seconds per step), speedup_vs_dense_1m, and
peak_bytes_per_item (rowwise: growth of the peak from 10,000 to 5 million items, per item) beside the table's own
table_bytes_per_item; then for each case seconds_per_step, peak_mb and validation_s (wall clock, ranking all items for
128 users).
A chart of seconds by items goes to build/bench/catalogue.svg.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measure import chart, last_line, log, options
from train import CONTEXT_SIZES, MAX_LENGTH, MEDIAN_LENGTH, SPREAD

from training import loop
from training.batches import FEATURES, MAX_GAP_BUCKET, MAX_PRICE_BUCKET
from training.checkpoint import read_about
from training.config import ModelSpec, RunSpec, TrainSettings
from training.data import read_batches

NAMES = {10_000: "10k", 100_000: "100k", 1_000_000: "1m", 5_000_000: "5m"}
DENSE_UP_TO = 1_000_000
WIDTH, BATCH = 64, 64
ATTRIBUTE_SIZES = {"category": 1_000, "vertical": 6, "price": MAX_PRICE_BUCKET + 1}
HELD_USERS = 128
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "dense": {"item_optimizer": "adamw"},
    "rowwise": {"item_optimizer": "rowwise"},
    "half": {"item_optimizer": "rowwise", "item_precision": "bfloat16"},
}


def write_rows(folder: Path, items: int, rows: int) -> None:
    """Writes train rows, held-out rows and the items' arrays; the users are the same for every number of items."""
    random = np.random.default_rng(0)
    rows += HELD_USERS
    lengths = np.exp(random.normal(np.log(MEDIAN_LENGTH), SPREAD, rows)).round().clip(2, MAX_LENGTH).astype(np.int64)
    # Zipf's law: the probability of rank r is proportional to 1 / r. Ranks are scattered over the table, as the
    # vocabulary's indices are: the multiplier is coprime to the powers of ten.
    ranks = np.exp(random.random(lengths.sum()) * np.log(items)).astype(np.int64) % items
    actions = {FEATURES[0]: ranks * 2_654_435_761 % items + 2}  # 0 is padding, 1 is unknown
    for name, size in CONTEXT_SIZES.items():
        actions[name] = random.integers(1, size, lengths.sum())
    actions["gap_bucket"] = random.integers(3, MAX_GAP_BUCKET + 1, lengths.sum())
    offsets = pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32())
    lists = {n: pa.ListArray.from_arrays(offsets, pa.array(actions[n], pa.int32())) for n in FEATURES}
    table = pa.table({"length": pa.array(lengths, pa.int32()), **lists})
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pq.write_table(table.slice(HELD_USERS), folder / "train.parquet")
    targets = pa.array(random.integers(2, items + 2, (HELD_USERS, 1)).tolist(), pa.list_(pa.int32()))
    times = pa.array([[0]] * HELD_USERS, pa.list_(pa.int64()))
    held = table.slice(0, HELD_USERS).append_column("target_item_index", targets).append_column("target_ts", times)
    pq.write_table(held, folder / "valid.parquet")

    counts = np.bincount(actions[FEATURES[0]], minlength=items + 2) + 1
    counts[:2] = 0
    np.save(folder / "counts.npy", counts)
    sizes = ATTRIBUTE_SIZES.values()
    attributes = np.stack([random.integers(1, size, items + 2, dtype=np.int32) for size in sizes])
    np.save(folder / "attributes.npy", attributes)
    np.save(folder / "verticals.npy", attributes[1].astype(np.int64) - 1)


def run_spec(folder: Path, items: int, rows: int, **settings: Any) -> RunSpec:
    chosen = TrainSettings.model_validate(
        {"threads": 1, "batch_size": BATCH, "width": WIDTH, "epochs": 2, "later_share": 0.0, **settings}
    )
    model = ModelSpec(
        **chosen.model_dump(include=set(ModelSpec.model_fields)),
        sparse=chosen.row_wise(items + 2),
        max_length=MAX_LENGTH,
        items=items + 2,
        context_sizes=CONTEXT_SIZES,
        attribute_sizes=ATTRIBUTE_SIZES,
    )
    return RunSpec(
        settings=chosen,
        model=model,
        train_files=[f"file://{folder}/train.parquet"],
        train_rows=rows,
        valid_files=[f"file://{folder}/valid.parquet"],
        item_counts=f"{folder}/counts.npy",
        item_attributes=f"{folder}/attributes.npy",
        item_verticals=f"{folder}/verticals.npy",
        verticals=["a", "b", "c", "d", "e"],
        output=f"{folder}/model",
        checkpoints=f"{folder}/checkpoints",
        about={"model_version": "bench"},
    )


def measured(spec: RunSpec) -> dict[str, float]:
    """Trains in a forked process, so that PyTorch is imported only once."""
    for folder in (Path(spec.output), Path(str(spec.checkpoints))):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(spec, sender))
    process.start()
    sender.close()
    try:
        result: dict[str, float] = receiver.recv()
    finally:
        process.join()
    return result


def _train(spec: RunSpec, sender: Any) -> None:
    before, seconds = _memory("VmRSS"), list[float]()

    def timed(*args: Any, **options: Any) -> Iterator[dict[str, torch.Tensor]]:
        started = time.thread_time()
        yield from read_batches(*args, **options)
        seconds.append(time.thread_time() - started)

    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        patch.object(loop, "read_batches", timed),
    ):
        loop.train(spec)
    peak = _memory("VmHWM") - before
    last = read_about(Path(spec.output))["training"]["epochs"][-1]
    steps = spec.train_rows / spec.settings.batch_size
    validation_s = last["seconds"] - spec.train_rows / last["rows_per_second"]
    sender.send({"seconds_per_step": seconds[-1] / steps, "peak_mb": peak / 1e6, "validation_s": validation_s})


def _memory(what: str) -> int:
    """A memory figure of this process in bytes: VmRSS (current) or VmHWM (peak so far)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{what}:")[2].split()[0]) * 1024


def main() -> None:
    parser = options(__doc__, quick="10,000 and 100,000 items, 5 steps", folder="the rows and the output")
    parser.add_argument("--steps", type=int, help="steps per epoch (default: 20)")
    parser.add_argument("--items", type=int, nargs="+", choices=NAMES, help="only these catalogue sizes")
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, help="only these optimizers")
    arguments = parser.parse_args()
    sizes = arguments.items or ([10_000, 100_000] if arguments.quick else list(NAMES))
    rows = BATCH * (arguments.steps or (5 if arguments.quick else 20))
    torch.set_num_threads(1)

    cases: dict[tuple[str, int], dict[str, float]] = {}
    for items in sizes:
        folder = arguments.folder.absolute() / "catalogue"
        write_rows(folder, items, rows)
        for name in arguments.only or OPTIMIZERS:
            if name == "dense" and items > DENSE_UP_TO:
                continue
            case = cases[name, items] = measured(run_spec(folder, items, rows, **OPTIMIZERS[name]))
            table = items * WIDTH * (2 if name == "half" else 4) / 1e6
            log(
                f"{name:8} {items:9,} items  {1000 * case['seconds_per_step']:8.1f} ms a step, "
                f"peak {case['peak_mb']:6,.0f} MB, of which the table {table:6,.0f} MB, "
                f"validation {case['validation_s']:.1f} s"
            )
        shutil.rmtree(folder)

    lines = {
        name: [(float(items), case["seconds_per_step"]) for (of, items), case in cases.items() if of == name]
        for name in OPTIMIZERS
    }
    chart(
        arguments.folder / "catalogue.svg",
        "CPU seconds of a training step",
        {name: line for name, line in lines.items() if line},
        across="items",
    )
    result: dict[str, Any] = {}
    low, high = min(sizes), max(sizes)
    if ("rowwise", high) in cases and high > low:
        small, large = cases["rowwise", low], cases["rowwise", high]
        ratio = large["seconds_per_step"] / small["seconds_per_step"]
        growth = (large["peak_mb"] - small["peak_mb"]) * 1e6 / (high - low)
        result |= {f"step_ratio_{NAMES[high]}_to_{NAMES[low]}": ratio, "peak_bytes_per_item": round(growth, 1)}
        result["table_bytes_per_item"] = 4 * WIDTH
    for items in sizes:
        if ("dense", items) in cases and ("rowwise", items) in cases:
            speedup = cases["dense", items]["seconds_per_step"] / cases["rowwise", items]["seconds_per_step"]
            result[f"speedup_vs_dense_{NAMES[items]}"] = speedup
    for (name, items), case in cases.items():
        result |= {f"{name}_{NAMES[items]}_{what}": value for what, value in case.items()}
    last_line(result)


if __name__ == "__main__":
    main()
