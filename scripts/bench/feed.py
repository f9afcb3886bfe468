"""How fast training data is fed, without training: python scripts/bench/feed.py [--quick]

Seeded rows of `sequences` with skewed lengths (2 to 64 actions), in Parquet files with row groups of 16,384 rows; in
turns, medians:

  pyarrow     reads the columns that a model needs, row group by row group, and discards them: the lower bound
  trailvec    training.data.read_batches, end to end: one rank's shuffled batches as tensors, with targets
  dataloader  petastorm.pytorch.DataLoader over make_batch_reader, both unmodified, with a shuffle buffer of as many
              rows. A DataLoader cannot batch rows of unequal length, so a TransformSpec pads each column to 64. It
              makes no targets.

Then a training step is simulated (5 ms of computing per batch, on one core), to measure how long it waits for data.

The last line is one JSON object: ratio_to_pyarrow and speedup_vs_dataloader (trailvec's rows/s over the other's); the
medians of rows/s and of this process's CPU seconds per million rows; padding_share, also with randomly formed batches;
wait_share, which includes the wait for the first batch, and that wait itself (first_wait_s). A chart goes to
build/bench/feed.svg.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measure import bars, in_turns, last_line, options

from training.batches import FEATURES, pad
from training.data import CHUNK_ROWS, padding, read_batches

warnings.filterwarnings("ignore", category=FutureWarning)  # Petastorm emits thousands
from petastorm import TransformSpec, make_batch_reader  # noqa: E402
from petastorm.pytorch import DataLoader  # noqa: E402

MAX_LENGTH = 64
ROW_GROUP, FILE = 16_384, 65_536  # rows
STEP_SECONDS = 0.005


def write_files(folder: Path, rows: int) -> list[str]:
    """URLs of the files, created if missing; as build_sequences writes them, but for one split only."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    urls = []
    for start in range(0, rows, FILE):
        count = min(FILE, rows - start)
        path = folder / f"feed-{rows}-{start}.parquet"
        if not path.exists():
            pq.write_table(make_rows(random, count, start), path, row_group_size=ROW_GROUP, compression="snappy")
        urls.append(f"file://{path}")
    return urls


def make_rows(random: np.random.Generator, count: int, first_user: int) -> pa.Table:
    lengths = random.lognormal(2.3, 1.0, count).astype(int).clip(0, MAX_LENGTH - 2) + 2
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    actions = int(offsets[-1])
    columns = {
        "item_index": 2 + random.zipf(1.3, actions) % 50_000,
        "event_type_index": random.integers(2, 6, actions),
        "vertical_index": random.integers(2, 7, actions),
        "gap_bucket": np.where(random.random(actions) < 0.4, 2, random.integers(3, 31, actions)),  # baskets
        "session_end": np.where(random.random(actions) < 0.3, 2, 1),
        "hour": random.integers(1, 25, actions),
        "weekday": random.integers(1, 8, actions),
        "price_bucket": random.normal(18, 4, actions).astype(int).clip(3, 40),
    }
    lists = {
        name: pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(columns[name], pa.int32()))
        for name in FEATURES
    }
    users = [f"user-{number:09}" for number in range(first_user, first_user + count)]
    return pa.table({"user_id": users, "length": pa.array(lengths, pa.int32()), **lists})


def pyarrow_alone(files: list[str], batch_size: int) -> int:
    rows = 0
    for url in files:
        file = pq.ParquetFile(url.removeprefix("file://"))
        for number in range(file.num_row_groups):
            rows += len(file.read_row_group(number, columns=list(FEATURES)))
    return rows


def ours(files: list[str], batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    return read_batches(
        files, max_length=MAX_LENGTH, batch_size=batch_size, rank=0, size=1, seed=1, later_share=1.0, horizon=64
    )


def trailvec(files: list[str], batch_size: int) -> int:
    return sum(len(batch["item_index"]) for batch in ours(files, batch_size))


def dataloader(files: list[str], batch_size: int) -> int:
    def to_matrices(frame: pd.DataFrame) -> pd.DataFrame:
        lengths = frame["length"].to_numpy(np.int64)
        return pd.DataFrame(
            {name: list(pad(np.concatenate(frame[name].to_numpy()), lengths, MAX_LENGTH)) for name in FEATURES}
        )

    spec = TransformSpec(
        to_matrices,
        edit_fields=[(name, np.int32, (MAX_LENGTH,), False) for name in FEATURES],
        selected_fields=list(FEATURES),
    )
    reader = make_batch_reader(files, schema_fields=["^length$", *(f"^{n}$" for n in FEATURES)], transform_spec=spec)
    with DataLoader(reader, batch_size, shuffling_queue_capacity=CHUNK_ROWS) as loader:
        return sum(len(batch["item_index"]) for batch in loader)


def waits(files: list[str], batch_size: int, steps: int) -> tuple[float, float]:
    """The share of time that `steps` steps spend waiting for data, and the seconds of the first wait."""
    torch.set_num_threads(1)
    matrix = torch.rand(256, 256)
    batches, waited, first, began = ours(files, batch_size), 0.0, 0.0, time.perf_counter()
    for _ in range(steps):
        started = time.perf_counter()
        if next(batches, None) is None:
            break
        received = time.perf_counter()
        waited += received - started
        first = first or waited
        while time.perf_counter() - received < STEP_SECONDS:
            matrix @ matrix
    share = waited / (time.perf_counter() - began)
    batches.close()  # type: ignore[attr-defined]
    return share, first


def paddings(files: list[str], batch_size: int) -> tuple[float, float]:
    """The padding share of all batch positions: as batched, and with randomly formed batches."""
    empty, places, lengths = 0, 0, []
    for batch in ours(files, batch_size):
        counts = padding(batch)
        empty, places = empty + counts[0], places + counts[1]
        lengths += (batch["item_index"] > 0).sum(dim=1).tolist()
    np.random.default_rng(1).shuffle(lengths)
    by_chance = sum(batch_size * max(lengths[n : n + batch_size]) for n in range(0, len(lengths), batch_size))
    return empty / places, 1 - sum(lengths) / by_chance


def main() -> None:
    parser = options(__doc__, quick="16,384 rows, 3 rounds, the first of them cold", folder="the files and the chart")
    parser.add_argument("--rows", type=int, help="number of rows (default: 131072)")
    parser.add_argument("--rounds", type=int, help="rounds, of which the medians are reported (default: 5)")
    parser.add_argument("--batch-size", type=int, default=64, help="rows per batch (default: 64, as in training)")
    arguments = parser.parse_args()
    rows = arguments.rows or (16_384 if arguments.quick else 131_072)
    rounds = arguments.rounds or (3 if arguments.quick else 5)
    batch_size = arguments.batch_size

    files = write_files(arguments.folder.absolute(), rows)
    contestants: dict[str, Callable[[list[str], int], int]] = {
        "pyarrow": pyarrow_alone,
        "trailvec": trailvec,
        "dataloader": dataloader,
    }

    def whole(read: Callable[[list[str], int], int]) -> Callable[[], None]:
        def run() -> None:
            count = read(files, batch_size)
            assert count == rows, f"{read.__name__} gave {count} of {rows} rows"

        return run

    acts = {name: whole(read) for name, read in contestants.items()}
    times, cpu = in_turns(acts, rounds, warm=0 if arguments.quick else 1)
    bars(arguments.folder / "feed.svg", times)

    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    padding_share, by_chance = paddings(files, batch_size)
    share, first = waits(files, batch_size, steps=200 if arguments.quick else 2000)
    result: dict[str, Any] = {"rows": rows, "rounds": rounds, "batch_size": batch_size}
    result |= {
        "ratio_to_pyarrow": median["pyarrow"] / median["trailvec"],
        "speedup_vs_dataloader": median["dataloader"] / median["trailvec"],
        "padding_share": padding_share,
        "padding_share_by_chance": by_chance,
        "wait_share": share,
        "first_wait_s": first,
    }
    result |= {f"{name}_rows_per_s": round(rows / seconds) for name, seconds in median.items()}
    result |= {f"{name}_cpu_s_per_million": statistics.median(cpu[name]) / rows * 1e6 for name in contestants}
    last_line(result)


if __name__ == "__main__":
    main()
