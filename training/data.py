"""Feeds training from the Parquet files of one Delta snapshot: the only module that imports Petastorm.

A pass shuffles the row groups by the seed and cuts their rows into one contiguous shard per rank: shards are disjoint,
complete and of equal size (to within one row), however few or unequal the row groups are. Chunk by chunk, a rank's rows
are shuffled, batched by similar length and given their targets. Each chunk's random generator is seeded by the chunk's
number, so a pass can resume at any batch and reads only what follows.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pds
import torch

# On every read, Petastorm 0.12.1 uses what pyarrow 14 deprecates. Only Petastorm's FutureWarnings are silenced.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"petastorm\.")

from petastorm.fs_utils import get_filesystem_and_path_or_paths  # noqa: E402
from petastorm.reader import Reader  # noqa: E402
from petastorm.workers_pool import EmptyResultError, thread_pool  # noqa: E402
from petastorm.workers_pool.worker_base import WorkerBase  # noqa: E402
from pyarrow.filesystem import DaskFileSystem  # noqa: E402

from training.arrays import Bool, Int32, Int64  # noqa: E402
from training.batches import FEATURES, OF_PLACE, PADDING, SAME_MOMENT, SESSION_END, TARGET, UNKNOWN, pad  # noqa: E402
from training.ragged import ranges  # noqa: E402
from training.stores import fsspec_of, parquet_files, row_groups  # noqa: E402
from training.urls import file_url  # noqa: E402

Batch = dict[str, torch.Tensor]

CHUNK_ROWS = 16_384  # about as many rows are shuffled and batched by length together
READY_ROWS = 8_192  # prefetched as batches, so that the next chunk is made while steps consume them
_ITEM_ROW, _TYPE_ROW, _GAP_ROW, _END_ROW = (
    FEATURES.index(name) for name in ("item_index", "event_type_index", "gap_bucket", "session_end")
)
_ORDER, _ROWS, _BATCHES = range(3)  # what a random generator is for

# How often an idle worker checks for a stop signal. Petastorm's 1 ms takes 2 % of a core away from the step.
thread_pool.IO_TIMEOUT_INTERVAL_S = 0.02


def read_batches(
    files: list[str],
    *,
    max_length: int,
    batch_size: int,
    rank: int,
    size: int,
    seed: int,
    skip: int = 0,
    later_share: float = 0.0,
    horizon: int = 1,
    target_types: Sequence[int] | None = None,
    shuffle_baskets: bool = True,
) -> Generator[Batch, None, None]:
    """One pass over this rank's rows, each once, prepared in a background thread from this call on.

    The random draws depend on the arguments alone: not on torch's or numpy's global generators, nor on timing. The
    thread ends with the pass, or when the generator is closed; its errors are raised with the next batch.

    Args:
        files: URLs (training.stores) of Parquet files with the columns of `sequences`; rows of at least one action.
        max_length: a longer row keeps its newest actions.
        seed: the same on all ranks, another for each pass.
        skip: how many of this rank's first batches to leave out.
        later_share, horizon: see `choose_targets`.
        target_types: numbers of the event types whose actions can be targets; None: all.
        shuffle_baskets: whether to shuffle the actions of one moment (`shuffle_moments`) or keep the log's order.

    Yields:
        For each of FEATURES, and `target`, int64 [rows, length]: `batch_size` rows (fewer in one batch of the last
        chunk), as long as the longest row, zero-padded. In any one step all ranks have rows of similar length, so
        that none waits long for another.
    """
    per_chunk = max(1, CHUNK_ROWS // batch_size)
    first, skipped = divmod(skip, per_chunk)

    def make() -> Generator[Batch, None, None]:
        pieces = _plan(files, rank, size, seed, first * per_chunk * batch_size)
        for number, table in enumerate(_chunks(pieces, per_chunk * batch_size), first):
            random = _generator(seed, _ROWS, number, rank)
            values, lengths = _shuffled(table, max_length, shuffle_baskets, random)
            is_target = None if target_types is None else np.isin(values[_TYPE_ROW], target_types)
            values[_END_ROW], values[-1] = choose_targets(
                values[_ITEM_ROW],
                values[_END_ROW],
                lengths,
                is_target,
                later_share=later_share,
                horizon=horizon,
                random=random,
            )
            order = _generator(seed, _BATCHES, number).permutation(math.ceil(len(lengths) / batch_size))
            yield from _batches(values, lengths, batch_size, order[skipped if number == first else 0 :])

    return _ahead(make(), READY_ROWS // batch_size + 1)


def rows_digest(files: list[str]) -> str:
    """SHA-256 of each row group's row and byte counts, from the files' footers.

    Equal digests mean that a pass takes the same rows in the same order: other rows, or the same rows in other row
    groups, have another digest. File names don't matter."""
    return hashlib.sha256(json.dumps([sizes for _, _, *sizes in _row_groups(tuple(files))]).encode()).hexdigest()


def padding(batch: Batch) -> tuple[int, int]:
    """How many cells of the batch's item matrix are padding, and how many it has in all."""
    items = batch[FEATURES[_ITEM_ROW]]
    return int((items == PADDING).sum()), items.numel()


def to_batch(actions: torch.Tensor) -> Batch:
    """int [features, rows, length] → the batch, cut to its longest row."""
    longest = int((actions[0] > 0).sum(dim=1).max())
    return dict(zip(FEATURES, actions[:, :, :longest].long(), strict=True))


def to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    return {name: values.pin_memory().to(device, non_blocking=True) for name, values in batch.items()}


# ---- which rows, and how they are read --------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """The rows `start` to `stop` (not included) of a file's row group."""

    file: str  # its URL
    row_group: int
    start: int
    stop: int


@lru_cache(maxsize=4)
def _row_groups(files: tuple[str, ...]) -> tuple[tuple[str, int, int, int], ...]:
    """(URL, number in the file, rows, compressed bytes) of every row group, from the files' footers."""
    return tuple(
        (url, number, *sizes)
        for url, groups in zip(files, row_groups(list(files)), strict=True)
        for number, sizes in enumerate(groups)
    )


def _plan(files: list[str], rank: int, size: int, seed: int, skipped_rows: int) -> list[Piece]:
    """What the rank reads, in order: its share of the rows of all row groups, which `seed` shuffles."""
    groups = _row_groups(tuple(files))
    total = sum(rows for _, _, rows, _ in groups)
    first, last = total * rank // size + skipped_rows, total * (rank + 1) // size
    pieces, before = [], 0
    for number in _generator(seed, _ORDER).permutation(len(groups)):
        file, row_group, rows, _ = groups[number]
        start, stop = max(first - before, 0), min(last - before, rows)
        if start < stop:
            pieces.append(Piece(file, row_group, start, stop))
        before += rows
    return pieces


def _chunks(pieces: list[Piece], rows: int) -> Iterator[pa.Table]:
    """The pieces' rows in tables of `rows` rows each; the last may have fewer."""
    if not pieces:
        return
    buffered: list[pa.Table] = []
    count = 0
    with _PlannedReader(pieces) as reader:
        for piece in pieces:
            buffered.append(next(reader).slice(piece.start, piece.stop - piece.start))
            count += len(buffered[-1])
            while count >= rows:
                table = pa.concat_tables(buffered)
                yield table.slice(0, rows)
                buffered, count = [table.slice(rows)], count - rows
        if count:
            yield pa.concat_tables(buffered)


class _PlannedReader(Reader):  # type: ignore[misc]
    """A Petastorm reader that yields the planned row groups in order, each as an Arrow table of FEATURES.

    Petastorm's make_batch_reader would turn every row group into a pandas frame and every cell into a numpy array: four
    times the work of reading, holding the GIL that the training step needs.
    """

    def __init__(self, pieces: list[Piece]) -> None:
        self._planned = pieces
        files = list(dict.fromkeys(piece.file for piece in pieces))
        urls = [file_url(file) for file in files]
        store = fsspec_of(urls)
        own = {} if store is None else {"filesystem": _LegacyFileSystem(store)}
        filesystem, paths = get_filesystem_and_path_or_paths(urls, **own)
        self._path_of = dict(zip(files, paths, strict=True))
        super().__init__(
            filesystem,
            paths,
            schema_fields=[f"^{name}$" for name in FEATURES],
            worker_class=_ArrowWorker,
            reader_pool=thread_pool.ThreadPool(1, results_queue_size=2),  # one worker: the order is the plan's
            shuffle_row_groups=False,
            is_batched_reader=True,
        )

    def _filter_row_groups(self, dataset: Any, row_groups: list[Any], *rest: Any) -> tuple[list[int], None]:
        numbers = {(group.path, group.row_group): number for number, group in enumerate(row_groups)}
        return [numbers[self._path_of[piece.file], piece.row_group] for piece in self._planned], None


class _LegacyFileSystem(DaskFileSystem):  # type: ignore[misc]
    """Adapts an fsspec file system to pyarrow's legacy (pre-2.0) interface, which Petastorm 0.12.1 needs."""

    def isdir(self, path: str) -> bool:
        return bool(self.fs.isdir(path))

    def isfile(self, path: str) -> bool:
        return bool(self.fs.isfile(path))


class _ArrowWorker(WorkerBase):  # type: ignore[misc]
    """Reads row groups as Arrow tables, unconverted."""

    @staticmethod
    def new_results_queue_reader() -> _ArrowResults:
        return _ArrowResults()

    def process(self, piece_index: int, **rest: Any) -> None:
        _, _, schema, _, row_groups, *_ = self.args
        self.publish_func(row_groups[piece_index].read(columns=list(schema.fields)))


class _ArrowResults:
    batched_output = True

    def read_next(self, pool: thread_pool.ThreadPool, schema: Any, ngram: None) -> pa.Table:
        try:
            return pool.get_results()
        except EmptyResultError as end:
            raise StopIteration from end


def _ahead(batches: Generator[Batch, None, None], count: int) -> Generator[Batch, None, None]:
    """The batches, prefetched by a thread, which starts at once: `count` of them or a few more."""
    pool = ThreadPoolExecutor(1)
    at_once = min(8, count)  # handing over small batches one by one would cost half as much as making them

    def some() -> list[Batch]:
        return list(islice(batches, at_once))

    def hand_over() -> Generator[Batch, None, None]:
        try:
            yield {}
            while ready := waiting.popleft().result():
                waiting.append(pool.submit(some))
                yield from ready
        finally:
            pool.shutdown(cancel_futures=True)
            batches.close()

    waiting = deque(pool.submit(some) for _ in range(math.ceil(count / at_once)))
    handed_over = hand_over()
    next(handed_over)  # to its `try`: closed before the first batch too, it ends the thread
    return handed_over


# ---- what happens to a chunk ------------------------------------------------------------------------------
# A chunk's rows are concatenated: values int32 [features, actions], lengths int64 [rows], actions = sum(lengths).
# The work is memory-bound, so each column is gathered only once, straight to where it ends up.


def _generator(seed: int, *drawn: int) -> np.random.Generator:
    return np.random.default_rng([seed, *drawn])


def _shuffled(
    table: pa.Table, max_length: int, shuffle_baskets: bool, random: np.random.Generator
) -> tuple[Int32, Int64]:
    """(values, lengths) of the table's rows, sorted by length; rows of equal length are shuffled by `random`.

    `values` has one row per feature, then one left empty for the targets.
    """
    whole = pc.list_value_length(table[FEATURES[_ITEM_ROW]]).to_numpy().astype(np.int64)
    ends, lengths = np.cumsum(whole), np.minimum(whole, max_length)
    rows = random.permutation(len(lengths))
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    ends, lengths = ends[rows], lengths[rows]
    # The positions, among all of the table's actions, of those that the rows keep: their newest.
    _, kept = ranges(ends - lengths, ends)
    columns = [pc.list_flatten(table[name]).to_numpy() for name in FEATURES]
    moved = kept[shuffle_moments(columns[_GAP_ROW][kept], lengths, random)] if shuffle_baskets else kept
    values = np.empty((len(FEATURES) + 1, len(kept)), np.int32)
    for number, (name, column) in enumerate(zip(FEATURES, columns, strict=True)):
        np.take(column, kept if name in OF_PLACE else moved, out=values[number], mode="clip")
    return values, lengths


def shuffle_moments(gaps: Int32, lengths: Int64, random: np.random.Generator) -> Int64:
    """A permutation of the actions, [actions], that shuffles those of one moment (the same event_ts: a basket).

    The log orders them by event_id, which says nothing about the user, but a model would learn it.
    """
    begins = gaps != SAME_MOMENT
    begins[np.cumsum(lengths) - lengths] = True  # a row can begin in the middle of a moment
    # The key is the moment's number plus a random fraction: almost sorted already, so a stable sort is fast.
    return np.argsort(np.cumsum(begins) + random.random(len(begins)), kind="stable")


def choose_targets(
    items: Int32,
    session_ends: Int32,
    lengths: Int64,
    is_target: Bool | None = None,
    *,
    later_share: float,
    horizon: int,
    random: np.random.Generator,
) -> tuple[Int32, Int32]:
    """(session_end, target), both int32 [actions]; `target` is the item that each action is to predict, 0 for none.

    Targets are the actions of `is_target`, [actions] (None: all). Each action predicts the next one in its row; but a
    share of the actions, drawn from `random`, predicts a random one of the first `horizon` after its session. These get
    session_end set, like the newest action before a cut. The next action mostly completes the current visit, while a
    vector is used to predict later visits; a longer horizon makes the prediction steadier (Pancha et al., PinnerFormer,
    2022, train on all actions of a window).
    """
    ends = np.cumsum(lengths)  # of the rows
    closes = session_ends == SESSION_END
    closes[ends - 1] = True
    # The targets' items, and a 0 for none; how many targets lie before each action, and before the end of its row.
    of_targets = np.append(items if is_target is None else items[is_target], np.int32(0))
    before = np.arange(len(items) + 1) if is_target is None else np.concatenate([[0], np.cumsum(is_target)])
    until = np.repeat(before[ends], lengths)
    # The first target of the next session, and how many the action's row offers from there on, up to `horizon`.
    start = before[(np.flatnonzero(closes) + 1)[np.cumsum(closes) - closes]]
    later = np.minimum(until - start, horizon)
    share, place = random.random((2, len(items)))
    is_later = (share < later_share) & (later > 0)
    chosen = np.where(is_later, start + (place * later).astype(np.int64), before[1:])
    found = of_targets[np.where(chosen < until, chosen, len(of_targets) - 1)]
    return np.where(is_later, np.int32(SESSION_END), session_ends), found


def _batches(values: Int32, lengths: Int64, batch_size: int, order: Int64) -> Iterator[Batch]:
    """The rows, sorted by length, as batches of consecutive rows; yields the batches numbered by `order`, in order."""
    last = np.minimum(np.arange(len(lengths)) // batch_size * batch_size + batch_size, len(lengths)) - 1
    widths = lengths[last]  # each row's padded length: that of its batch's last, longest row
    starts = np.concatenate([[0], np.cumsum(widths)])
    padded = np.zeros((len(values), starts[-1]), np.int32)
    _, places = ranges(starts[:-1], starts[:-1] + lengths)
    for feature, column in zip(padded, values, strict=True):
        feature[places] = column
    for first in order * batch_size:
        batch = padded[:, starts[first] : starts[last[first] + 1]].reshape(len(values), -1, widths[first])
        yield dict(zip((*FEATURES, TARGET), torch.from_numpy(batch.astype(np.int64)), strict=True))


# ---- validation -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Users held out for validation: their history, their next items, and the items not to rank for them.

    `actions` int32 [features, users, length]; user u's targets are `targets[offsets[u]:offsets[u + 1]]`, and `seen` and
    `seen_offsets` are alike.
    """

    actions: Int32
    targets: Int64
    offsets: Int64
    seen: Int64
    seen_offsets: Int64

    def part(self, rank: int, size: int) -> Held:
        """Every size-th user from `rank` on."""
        mine = np.arange(len(self.offsets) - 1) % size == rank

        def of_mine(values: Int64, offsets: Int64) -> tuple[Int64, Int64]:
            counts = np.diff(offsets)
            return values[np.repeat(mine, counts)], np.cumsum([0, *counts[mine]])

        return Held(self.actions[:, mine], *of_mine(self.targets, self.offsets), *of_mine(self.seen, self.seen_offsets))


def read_held(files: list[str], max_length: int, known: Bool, max_users: int, *, new_only: bool = False) -> Held:
    """The first `max_users` rows of the valid split with a known target; targets are the items at the row's earliest
    target time. Reads `max_users` rows at a time, and many rows if few targets are known.

    Args:
        files: URLs of the split's files (Spark has spread the users over them by hash).
        known: whether the model knows an item, [items]; other targets are left out.
        new_only: the items of a row's `seen_item_index` are neither targets nor to be ranked, as in evaluate's task
            `new`.
    """
    columns = ["length", *FEATURES, "target_item_index", "target_ts", *["seen_item_index"] * new_only]
    system, paths = parquet_files(files)
    rows = pds.dataset(paths, filesystem=system).to_batches(
        columns=columns, batch_size=max_users, batch_readahead=1, fragment_readahead=1
    )
    none = np.empty(0, np.int64)
    parts = [(np.empty((len(FEATURES), 0, max_length), np.int32), none, none, none, none)]
    for batch in rows:
        parts.append(_held(batch, max_length, known, new_only))
        if sum(len(counts) for _, _, counts, _, _ in parts) >= max_users:
            break
    actions, targets, counts, seen, seen_counts = zip(*parts, strict=True)

    def first(values: tuple[Int64, ...], counts: tuple[Int64, ...]) -> tuple[Int64, Int64]:
        offsets = np.cumsum([0, *np.concatenate(counts)[:max_users]])
        return np.concatenate(values)[: offsets[-1]], offsets

    return Held(np.concatenate(actions, axis=1)[:, :max_users], *first(targets, counts), *first(seen, seen_counts))


def _held(
    rows: pa.RecordBatch, max_length: int, known: Bool, new_only: bool
) -> tuple[Int32, Int64, Int64, Int64, Int64]:
    """For the rows with a known target: their actions, all targets concatenated, and the number of targets of each; the
    same of the items not to rank."""

    def flat(name: str) -> Int64:
        return np.asarray(pc.list_flatten(rows[name]).to_numpy(), np.int64)

    def owners(name: str) -> Int64:
        return np.repeat(np.arange(len(rows)), pc.fill_null(pc.list_value_length(rows[name]), 0).to_numpy())

    owner, items, times = owners("target_ts"), flat("target_item_index"), flat("target_ts")
    seen_owner, seen = np.empty((2, 0), np.int64)
    if new_only:
        seen_owner, seen = owners("seen_item_index"), flat("seen_item_index")
        base = 1 + max(int(items.max(initial=0)), int(seen.max(initial=0)))
        # An unknown item is nobody's old one.
        new = (items == UNKNOWN) | ~np.isin(owner * base + items, seen_owner * base + seen)
        owner, items, times = owner[new], items[new], times[new]
    first = np.zeros(len(rows), np.int64)
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    first[owner[starts]] = times[starts]  # the lists are sorted by time
    is_target = (times == first[owner]) & (items < len(known)) & known[np.minimum(items, len(known) - 1)]

    users, user_counts = np.unique(owner[is_target], return_counts=True)
    lengths = rows["length"].to_numpy().astype(np.int64)
    actions = np.stack([pad(flat(name).astype(np.int32), lengths, max_length)[users] for name in FEATURES])
    seen_counts = np.bincount(seen_owner, minlength=len(rows))[users]
    return actions, items[is_target], user_counts, seen[np.isin(seen_owner, users)], seen_counts
