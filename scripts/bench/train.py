"""How fast training is compared with Transformers4Rec's own Trainer: python scripts/bench/train.py [--quick]

Rows as build_sequences writes them: lengths skewed as in real logs (log-normal, median 8, 2 to 64), items by Zipf's
law, every other action follows from the one before. One GPT-2 block of width 64, batches of 256 rows, 2 threads. In
turns, medians of the epochs' examples/s:

  trailvec           the product's loop, full softmax over 12,000 items
  peer               Transformers4Rec's Trainer and PyarrowDataLoader: same model, initial weights, rows and loss
  trailvec longer    trailvec for half as many epochs more
  sampled 100k       the loop with sampled softmax over 100,000 items, with the row-wise optimizer that `trailvec train`
                     takes for so many
  peer 100k          the Trainer with full softmax over them
  peer sampled 100k  the Trainer with its own sampled softmax over them, reported but not compared: its sampling
                     distribution differs
  fed, in memory     the loop with sampled softmax over 12,000 items, from files; the same batches kept in memory
  1 rank, 2 ranks    the model of trailvec and peer from files, started as `trailvec train` starts it, 1 thread per rank
  1 rank sampled, 2 ranks sampled    the model of fed, whose steps are six times as short, started the same way

A first round is not counted. Then up to ten steps are profiled (the rows of --quick give two).

The last line is one JSON object: speedup_vs_t4rec_trainer, speedup_at_peers_loss (of trailvec longer, all its epochs
counted; left out if its held_out_loss is above the peer's), speedup_sampled_100k, fed_vs_synthetic, two_rank_speedup,
two_rank_speedup_sampled; data_wait_share (the share of the fed loop's time spent waiting for batches, the first one
included), data_first_wait_s (that first wait); for each contestant the median and the last epoch's loss: trailvec's is
the mean of all actions, the Trainer's that of its steps. held_out_loss, of trailvec, peer and trailvec longer, is the
same figure for all: the mean over the next items of rows that none has trained on. cpu_...: the same in CPU seconds,
which a busy machine affects less, least of all with OMP_WAIT_POLICY=passive. A chart of seconds per 1,000 rows:
build/bench/train.svg.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import t4rec_peer
import torch
from measure import bars, cpu_seconds, last_line, log, options

from jobs.launch_training import launch
from training import loop
from training.batches import BUCKET_SIZES, FEATURES, MAX_GAP_BUCKET, TARGET
from training.checkpoint import read_about, read_tensors
from training.config import ModelSpec, RunSpec, TrainSettings
from training.data import read_batches
from training.model import build_model

MAX_LENGTH = 64
MEDIAN_LENGTH, SPREAD = 8, 0.9  # SPREAD: standard deviation of the logarithm
ROWS_PER_FILE = 1024
ITEMS, MANY_ITEMS = 12_000, 100_000
CONTEXT_SIZES = {"event_type_index": 6, "vertical_index": 6, **BUCKET_SIZES}
LONGER = 1.5  # times the epochs: takes trailvec below the peer's held-out loss
QUICK = ("trailvec", "peer", "sampled 100k", "peer 100k", "fed", "in memory", "1 rank", "2 ranks")
CONTESTANTS = (*QUICK, "trailvec longer", "peer sampled 100k", "1 rank sampled", "2 ranks sampled")
Epochs = list[dict[str, Any]]


def write_rows(folder: Path, items: int, files: int) -> None:
    """Writes `files` Parquet files of ROWS_PER_FILE rows, one row group each, as many rows to hold out as one of them,
    and the items' counts."""
    random = np.random.default_rng(items)
    rows = (files + 1) * ROWS_PER_FILE
    lengths = np.exp(random.normal(np.log(MEDIAN_LENGTH), SPREAD, rows)).round().clip(2, MAX_LENGTH).astype(np.int64)
    popularity = (1 / np.arange(1, items + 1)).cumsum()
    following = random.permutation(items)
    item = np.empty((rows, MAX_LENGTH), np.int64)
    for place in range(MAX_LENGTH):
        item[:, place] = popularity.searchsorted(random.random(rows) * popularity[-1])
        if place:
            follows = random.random(rows) < 0.5
            item[follows, place] = following[item[follows, place - 1]]
    inside = np.arange(MAX_LENGTH) < lengths[:, None]
    actions = {FEATURES[0]: item[inside] + 2}  # 0 is padding, 1 is unknown
    for name, size in CONTEXT_SIZES.items():
        actions[name] = random.integers(1, size, inside.sum())
    # Distinct times, so that trailvec's reader has nothing to reorder.
    actions["gap_bucket"] = random.integers(3, MAX_GAP_BUCKET + 1, inside.sum())

    folder.mkdir(parents=True, exist_ok=True)
    offsets = pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32())
    lists = {n: pa.ListArray.from_arrays(offsets, pa.array(actions[n], pa.int32())) for n in FEATURES}
    table = pa.table({"length": pa.array(lengths, pa.int32()), **lists})
    for number, name in enumerate([*(f"part-{number:03}" for number in range(files)), "held-out"]):
        pq.write_table(table.slice(number * ROWS_PER_FILE, ROWS_PER_FILE), folder / f"{name}.parquet")
    # Every item is known, because Transformers4Rec's softmax covers them all.
    trained_on = actions[FEATURES[0]][: offsets[files * ROWS_PER_FILE].as_py()]
    counts = np.bincount(trained_on, minlength=items + 2) + 1
    counts[:2] = 0
    np.save(folder / "counts.npy", counts)


def run_spec(data: Path, items: int, files: int, **settings: Any) -> RunSpec:
    """A run over the first `files` files; targets are the next actions, as in Transformers4Rec's causal masking."""
    chosen = TrainSettings.model_validate(
        {"threads": 2, "batch_size": 256, "later_share": 0.0, "epochs": 1, "start": "random", **settings}
    )
    sizes = chosen.model_dump(include=set(ModelSpec.model_fields))
    return RunSpec(
        settings=chosen,
        model=ModelSpec(
            **sizes,
            sparse=chosen.row_wise(items + 2),
            max_length=MAX_LENGTH,
            items=items + 2,
            context_sizes=CONTEXT_SIZES,
        ),
        train_files=[f"file://{path}" for path in sorted(data.glob("part-*.parquet"))[:files]],
        train_rows=files * ROWS_PER_FILE,
        valid_files=[],
        item_counts=str(data / "counts.npy"),
        output="",
        about={"model_version": "bench"},
    )


def changed(spec: RunSpec, **settings: int) -> RunSpec:
    return spec.model_copy(update={"settings": spec.settings.model_copy(update=settings)})


# ---- trailvec's own contestants, in a process that stays up ----------------------------------------------------

Batch = dict[str, torch.Tensor]
_kept_batches: list[Batch] = []


def trained(spec: RunSpec, out: Path, train: Callable[[RunSpec], None] = loop.train) -> Epochs:
    """Trains, and returns the epochs recorded in the model's file."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    train(spec.model_copy(update={"output": str(out)}))
    epochs: Epochs = read_about(out)["training"]["epochs"]
    return epochs


def watched(spec: RunSpec, out: Path, read: Callable[..., Iterator[Batch]]) -> Epochs:
    """Runs the loop over the batches of `read`.

    `waited` is the share of an epoch's time spent waiting for batches, `first_wait` the seconds until the first one.
    The first epoch's `rows_per_cpu_second` includes setting up the model, since its rows are read meanwhile.
    """
    waits: list[tuple[float, float]] = []
    worked: list[float] = []

    def timed(*args: Any, **options: Any) -> Iterator[Batch]:
        return counted(cpu_seconds(), read(*args, **options))  # which reads ahead from now on

    def counted(before: float, batches: Iterator[Batch]) -> Iterator[Batch]:
        waited = first = 0.0
        while True:
            started = time.monotonic()
            batch = next(batches, None)
            waited += time.monotonic() - started
            first = first or waited
            if batch is None:
                break
            yield batch
        waits.append((waited, first))
        worked.append(cpu_seconds() - before)

    with patch.object(loop, "read_batches", timed):
        epochs = trained(spec, out)
    for epoch, (waited, first), seconds in zip(epochs, waits, worked, strict=True):
        epoch["waited"] = waited * epoch["rows_per_second"] / spec.train_rows
        epoch["first_wait"] = first
        epoch["rows_per_cpu_second"] = spec.train_rows / seconds
    return epochs


def fed(spec: RunSpec, out: Path) -> Epochs:
    """Runs the loop over its files; keeps the last epoch's batches. The last epoch's `held_out_loss` is the model's,
    unless the softmax is a sampled one."""

    def read(*args: Any, **options: Any) -> Iterator[Batch]:
        return kept(read_batches(*args, **options))

    def kept(batches: Iterator[Batch]) -> Iterator[Batch]:
        _kept_batches.clear()
        for batch in batches:
            _kept_batches.append(batch)
            yield batch

    epochs = watched(spec, out, read)
    if not spec.model.negatives:
        epochs[-1]["held_out_loss"] = held_out_loss(spec, out)
    return epochs


@torch.no_grad()
def held_out_loss(spec: RunSpec, out: Path) -> float:
    """The same figure as `t4rec_peer.held_out_loss`, of the model that was last trained here."""
    model = build_model(spec.model, torch.from_numpy(np.load(spec.item_counts)))
    model.load_state_dict(read_tensors(out / "model.safetensors"))
    model.eval()
    loss, targets = 0.0, 0
    for batch in t4rec_peer.held_out_batches(spec):
        following = torch.nn.functional.pad(batch[FEATURES[0]][:, 1:], (0, 1))
        summed, count = model.loss({**batch, TARGET: following})
        loss, targets = loss + float(summed), targets + count
    return loss / targets


def in_memory(spec: RunSpec, out: Path) -> Epochs:
    """Runs the loop over the batches that the last fed epoch kept in memory."""
    return watched(spec, out, lambda *_, **__: iter(_kept_batches))


def profile(spec: RunSpec, out: Path) -> str:
    """A table of the operators in up to ten steps, after two warm-up steps, under the number of steps."""
    tables: list[str] = []

    def looked_at(*args: Any, **options: Any) -> Iterator[Batch]:
        batches = read_batches(*args, **options)
        yield from islice(batches, 2)
        steps = 0
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for steps, batch in enumerate(islice(batches, 10), 1):  # noqa: B007 - the last value is the number of steps
                yield batch
        tables.append(f"{steps} steps")
        averages = profiler.key_averages()
        tables.extend(averages.table(sort_by=by, row_limit=14) for by in ("self_cpu_time_total", "cpu_time_total"))

    with patch.object(loop, "read_batches", looked_at):
        trained(spec, out)
    return "\n".join(tables)


# ---- started as the product starts it ---------------------------------------------------------------------------


def launched(spec: RunSpec, out: Path) -> Epochs:
    def start(spec: RunSpec) -> None:
        run_file = out.with_suffix(".json")
        run_file.write_text(spec.model_dump_json())
        launch(run_file, spec, lambda _: None)

    return trained(spec, out, start)


RATIOS = {
    "speedup_vs_t4rec_trainer": ("trailvec", "peer"),
    "speedup_at_peers_loss": ("trailvec longer", "peer"),
    "speedup_sampled_100k": ("sampled 100k", "peer 100k"),
    "speedup_sampled_100k_vs_peer_sampled": ("sampled 100k", "peer sampled 100k"),
    "fed_vs_synthetic": ("fed", "in memory"),
    "two_rank_speedup": ("2 ranks", "1 rank"),
    "two_rank_speedup_sampled": ("2 ranks sampled", "1 rank sampled"),
}


def ratios(rates: dict[str, float], prefix: str = "") -> dict[str, float]:
    """Ratios of the contestants' rates, where both were measured; of a longer training's rate per epoch of the
    others."""
    epochs = {"trailvec longer": LONGER}
    measured = [(key, a, b) for key, (a, b) in RATIOS.items() if a in rates and b in rates]
    return {prefix + key: rates[a] / epochs.get(a, 1) / rates[b] for key, a, b in measured}


def where_reached(all_ratios: dict[str, float], held_out: dict[str, float | None]) -> dict[str, float]:
    """The ratios, without speedup_at_peers_loss if trailvec longer ended above the peer's loss."""
    ours, theirs = held_out.get("trailvec longer"), held_out.get("peer")
    if ours is None or theirs is None or ours <= theirs:
        return all_ratios
    log(f"trailvec longer ended at a held-out loss of {ours:.4f}, above the peer's {theirs:.4f}: no ratio for it")
    return {key: ratio for key, ratio in all_ratios.items() if not key.endswith("speedup_at_peers_loss")}


def parsed() -> argparse.Namespace:
    parser = options(
        __doc__,
        quick="two minutes: few rows, one epoch, no warm-up, only some of the contestants",
        folder="the rows and the output",
    )
    parser.add_argument("--files", type=int, help="number of files, of 1,024 rows each (default: 16)")
    parser.add_argument("--rounds", type=int, help="rounds, of which the medians are reported (default: 5)")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="only these contestants")
    arguments = parser.parse_args()
    if "in memory" in (arguments.only or ()) and "fed" not in arguments.only:
        parser.error("in memory trains on the batches that fed has read: name both")
    if "trailvec longer" in (arguments.only or ()) and arguments.quick:
        parser.error("trailvec longer trains for half as many epochs more, and --quick has one epoch: leave one out")
    return arguments


def main() -> None:
    arguments = parsed()
    folder, rounds = arguments.folder.absolute() / "train", arguments.rounds or (1 if arguments.quick else 5)
    few, epochs = arguments.files or (1 if arguments.quick else 16), 1 if arguments.quick else 2
    for items in (ITEMS, MANY_ITEMS):
        write_rows(folder / str(items), items, few)

    full = run_spec(folder / str(ITEMS), ITEMS, max(few // 2, 1), negatives=0, epochs=epochs)
    sampled = run_spec(folder / str(ITEMS), ITEMS, few, negatives=1024, epochs=epochs)
    sampled_100k = run_spec(folder / str(MANY_ITEMS), MANY_ITEMS, few, negatives=1024)
    full_100k = run_spec(folder / str(MANY_ITEMS), MANY_ITEMS, max(few // 8, 1), negatives=0)

    def launches(count: int, spec: RunSpec) -> Callable[[], Epochs]:
        return functools.partial(launched, changed(spec, processes=count, threads=1), folder / "launched")

    processes = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, processes) as ours, ProcessPoolExecutor(1, processes) as peer:

        def run_ours(train: Callable[[RunSpec, Path], Any], spec: RunSpec) -> Any:
            return ours.submit(train, spec, folder / "out").result()

        def run_peer(spec: RunSpec) -> Epochs:
            return peer.submit(t4rec_peer.train, spec).result()

        contestants: dict[str, Callable[[], Epochs]] = {
            "trailvec": functools.partial(run_ours, fed, full),
            "peer": functools.partial(run_peer, full),
            "trailvec longer": functools.partial(run_ours, fed, changed(full, epochs=round(LONGER * epochs))),
            "sampled 100k": functools.partial(run_ours, fed, sampled_100k),
            "peer 100k": functools.partial(run_peer, full_100k),
            "peer sampled 100k": functools.partial(run_peer, sampled_100k),
            "fed": functools.partial(run_ours, fed, sampled),
            "in memory": functools.partial(run_ours, in_memory, sampled),
            "1 rank": launches(1, full),
            "2 ranks": launches(2, full),
            "1 rank sampled": launches(1, sampled),
            "2 ranks sampled": launches(2, sampled),
        }
        chosen = arguments.only or (QUICK if arguments.quick else contestants)
        contestants = {name: run for name, run in contestants.items() if name in chosen}
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        by_cpu: dict[str, list[float]] = {name: [] for name in contestants}
        losses: dict[str, list[float]] = {name: [] for name in contestants}
        held_out: dict[str, float | None] = {}  # the same in each round: the seed is
        waited: list[float] = []
        first_waits: list[float] = []
        for number in range(1 if arguments.quick else 0, rounds + 1):
            for name, run in contestants.items():
                epochs_of_run = run()
                if not number:
                    continue
                rates[name] += [epoch["rows_per_second"] for epoch in epochs_of_run]
                losses[name].append(epochs_of_run[-1]["loss"])
                held_out[name] = epochs_of_run[-1].get("held_out_loss")
                if name == "fed":
                    waited += [epoch["waited"] for epoch in epochs_of_run]
                    first_waits += [epoch["first_wait"] for epoch in epochs_of_run]
                by_cpu[name] += [
                    epoch["rows_per_cpu_second"] for epoch in epochs_of_run if "rows_per_cpu_second" in epoch
                ]
                log(
                    f"round {number} {name:18} examples/s {' '.join(f'{rate:,.0f}' for rate in rates[name])}, per CPU "
                    f"second {' '.join(f'{rate:,.0f}' for rate in by_cpu[name])}, loss {losses[name][-1]:.4f}"
                )
        tables = {name: run_ours(profile, spec) for name, spec in (("full", full), ("sampled 100k", sampled_100k))}

    print("\n".join(f"{name}: {table}" for name, table in tables.items()))
    bars(folder.parent / "train.svg", {name: [1000 / rate for rate in values] for name, values in rates.items()})
    median = {name: statistics.median(values) for name, values in rates.items()}
    cpu = {name: statistics.median(values) for name, values in by_cpu.items() if values}
    result: dict[str, Any] = {"rounds": rounds} | where_reached(ratios(median) | ratios(cpu, "cpu_"), held_out)
    if waited:
        result["data_wait_share"] = statistics.median(waited)
        result["data_first_wait_s"] = statistics.median(first_waits)
    result |= {f"{name.replace(' ', '_')}_held_out_loss": loss for name, loss in held_out.items() if loss}
    for name, rate in median.items():
        key = name.replace(" ", "_")
        result |= {f"{key}_examples_per_s": round(rate), f"{key}_loss": statistics.median(losses[name])}
        if name in cpu:
            result[f"{key}_examples_per_cpu_s"] = round(cpu[name])
    last_line(result)


if __name__ == "__main__":
    main()
