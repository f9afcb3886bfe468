"""Rows of `sequences` from sorted actions, over Arrow: no Python object per action.

A user's actions are sorted, so a row is a range of them that ends at a cut. The ranges of all users of a batch are
computed at once, by arithmetic on positions, and each list column is then a single gather.

A user whose actions continue in the next batch is held back until they end. Of actions too far back for any row, only
the items are kept, because valid and test rows must still list them as seen. So memory is bounded by a batch, except
for one user's actions after the first cut: all are kept, as any may be a target (161 bytes each at the peak).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from training.arrays import Bool, Int32, Int64
from training.batches import FEATURES, MAX_GAP_BUCKET, SAME_MOMENT, SESSION_END
from training.ragged import distinct, ranges

SPLITS = ("train", "valid", "test", "score")
GAP_FIRST = 1  # the gap_bucket of a user's first action
# The input columns besides user_id, event_ts and `predicted`; gap_bucket is computed here.
GIVEN = tuple(name for name in FEATURES if name != "gap_bucket")


@dataclass(frozen=True)
class CutRules:
    """Which rows to make. Times are microseconds.

    Attributes:
        max_length: the most actions in a row: the newest before its cut.
        max_parts: the most train rows per user: the newest max_length actions, the max_length before them, ...
        valid_us, test_us: the cuts; train shares valid's.
        leave_one_out: cut before the last action but one (train, valid) and before the last (test) instead.
        seen_us: an item with a `predicted` action within this time before a cut is not new after it; None: with one at
            any time. Other actions don't count: what a user looked at and did not buy is worth recommending.
        splits: the ones to make, out of SPLITS.
    """

    max_length: int
    max_parts: int
    valid_us: int
    test_us: int
    leave_one_out: bool = False
    seen_us: int | None = None
    splits: tuple[str, ...] = SPLITS

    @property
    def farthest(self) -> int:
        """How many actions before the cut to keep: as far back as train rows reach, plus one, whose time gives the
        oldest action's gap."""
        return self.max_parts * self.max_length + 1


class _Seen(NamedTuple):
    """Items of a user's dropped actions, sorted: those that the user's valid and test rows must list as seen, besides
    the items of the actions still held."""

    valid: Int64
    test: Int64


_NONE = _Seen(np.empty(0, np.int64), np.empty(0, np.int64))


def cut_sequences(batches: Iterable[pa.RecordBatch], rules: CutRules) -> Iterator[pa.RecordBatch]:
    """One row for each (user, split, part): the columns of SEQUENCES.

    Args:
        batches: user_id, event_ts (microseconds), predicted (bool: may be a target) and GIVEN (int32), sorted by
            (user_id, event_ts, event_id) across all batches.
    """
    held: list[pa.RecordBatch] = []  # the actions of the last user, which may continue
    seen, limit = _NONE, 2 * rules.farthest
    for batch in batches:
        if batch.num_rows == 0:
            continue
        users = batch["user_id"]
        if held and held[0]["user_id"][0] == users[-1]:
            held.append(batch)
            if sum(part.num_rows for part in held) > limit:
                held, seen = _newest(held, rules, seen)
                # Double the limit: all actions after the cut must stay, maybe a million, and must not be concatenated
                # again for each batch.
                limit = 2 * (rules.farthest + held[0].num_rows)
            continue
        first_of_last = pc.index(users, users[-1]).as_py()
        if held or first_of_last > 0:
            yield _rows([*held, batch.slice(0, first_of_last)], rules, seen)
        held, seen, limit = [batch.slice(first_of_last)], _NONE, 2 * rules.farthest
    if held:
        yield _rows(held, rules, seen)


def _newest(held: list[pa.RecordBatch], rules: CutRules, seen: _Seen) -> tuple[list[pa.RecordBatch], _Seen]:
    """A user's actions without those too far back for any row, and `seen` plus the items of the dropped ones."""
    together = pa.Table.from_batches(held).combine_chunks().to_batches()[0]
    times = together["event_ts"].cast(pa.int64()).to_numpy()
    before_valid = len(times) - 2 if rules.leave_one_out else int(np.searchsorted(times, rules.valid_us))
    drop = before_valid - rules.farthest
    if drop <= 0:
        return [together], seen
    items = together["item_index"].to_numpy()[:drop].astype(np.int64)
    predicted = together["predicted"].to_numpy(zero_copy_only=False)[:drop]

    def with_items(known: Int64, cut_us: int) -> Int64:
        return np.union1d(known, items[predicted & (times[:drop] >= _seen_from(cut_us, rules))])

    return [together.slice(drop)], _Seen(with_items(seen.valid, rules.valid_us), with_items(seen.test, rules.test_us))


def _seen_from(cut_us: int, rules: CutRules) -> int:
    """The time from which on a `predicted` action makes its item not new at the cut."""
    if rules.leave_one_out or rules.seen_us is None:
        return int(np.iinfo(np.int64).min)
    return cut_us - rules.seen_us


class _Rows(NamedTuple):
    """Rows of one split.

    Attributes:
        user: the user's number in the history.
        start, stop: the range of the input actions in the history.
        targets, seen: the ranges (start, stop) of the targets and of the items that are not new, in
            `_History.predicted`.
    """

    split: str
    user: Int64
    part: Int64
    start: Int64
    stop: Int64
    targets: tuple[Int64, Int64]
    seen: tuple[Int64, Int64]


class _History:
    """The complete actions of some users, concatenated."""

    def __init__(self, parts: list[pa.RecordBatch]) -> None:
        actions = pa.Table.from_batches(parts).combine_chunks()
        self.users = actions["user_id"].combine_chunks()  # of each action
        self.times = actions["event_ts"].cast(pa.int64()).to_numpy()
        self.time_type = actions.schema.field("event_ts").type
        self.predicted = np.flatnonzero(actions["predicted"].to_numpy())  # positions of the actions
        new_user = np.ones(len(self.times), bool)
        new_user[1:] = pc.not_equal(self.users[1:], self.users[:-1]).to_numpy(zero_copy_only=False)
        self.first = np.flatnonzero(new_user)  # each user's first action; `end` is one past the last
        self.end = np.append(self.first[1:], len(self.times))
        self.columns = {name: actions[name].to_numpy() for name in GIVEN}
        self.columns["gap_bucket"] = _gap_buckets(self.times, new_user)

    def place_of(self, time_us: int) -> Int64:
        """Per user, the position of the first action at that time or later; `end` if there is none."""
        earlier: Int64 = np.add.reduceat((self.times < time_us).astype(np.int64), self.first)
        return self.first + earlier


def _gap_buckets(times: Int64, new_user: Bool) -> Int32:
    """Power-of-two buckets of the seconds since the user's previous action; less than a second counts as one."""
    gaps = np.diff(times, prepend=times[:1])
    octave = np.frexp(np.maximum(gaps // 1_000_000, 1).astype(np.float64))[1] - 1
    buckets = np.where(gaps == 0, SAME_MOMENT, np.minimum(octave + 3, MAX_GAP_BUCKET))
    buckets[new_user] = GAP_FIRST
    return buckets.astype(np.int32)


def _rows(parts: list[pa.RecordBatch], rules: CutRules, seen: _Seen) -> pa.RecordBatch:
    """All rows of the users whose actions are the concatenated parts; `seen` belongs to the first of these users."""
    history = _History(parts)
    first, end = history.first, history.end
    if rules.leave_one_out:
        valid, test = np.maximum(first, end - 2), np.maximum(first, end - 1)
    else:
        valid, test = history.place_of(rules.valid_us), history.place_of(rules.test_us)
    make = {
        "train": lambda: _rows_without_targets(
            "train", history, valid, rules.max_length, most=rules.max_parts, shortest=2
        ),
        "valid": lambda: _rows_with_targets("valid", history, (valid, test), rules.valid_us, rules),
        "test": lambda: _rows_with_targets("test", history, (test, end), rules.test_us, rules),
        "score": lambda: _rows_without_targets("score", history, end, rules.max_length, most=1, shortest=1),
    }
    return _to_batch([make[split]() for split in rules.splits], history, rules, seen)


def _rows_without_targets(split: str, history: _History, cut: Int64, length: int, *, most: int, shortest: int) -> _Rows:
    """Rows without targets: at most `most` per user, backwards from the cut."""
    count = np.minimum(-(-(cut - history.first) // length), most)
    user = np.repeat(np.arange(len(cut)), count)
    part = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
    stop = cut[user] - part * length
    start = np.maximum(history.first[user], stop - length)
    kept = stop - start >= shortest
    none = np.zeros(int(kept.sum()), np.int64)
    return _Rows(split, user[kept], part[kept], start[kept], stop[kept], (none, none), (none, none))


def _rows_with_targets(split: str, history: _History, cuts: tuple[Int64, Int64], cut_us: int, rules: CutRules) -> _Rows:
    """A row for each user with a `predicted` action between the two cuts, and any action before them."""
    recent = np.minimum(history.place_of(_seen_from(cut_us, rules)), cuts[0])
    since, at, until = (np.searchsorted(history.predicted, places) for places in (recent, *cuts))
    user = np.flatnonzero((cuts[0] > history.first) & (until > at))
    stop = cuts[0][user]
    start = np.maximum(history.first[user], stop - rules.max_length)
    return _Rows(
        split, user, np.zeros_like(user), start, stop, targets=(at[user], until[user]), seen=(since[user], at[user])
    )


def _to_batch(rows: list[_Rows], history: _History, rules: CutRules, seen: _Seen) -> pa.RecordBatch:
    """The rows of all splits as one batch."""
    split = np.repeat([SPLITS.index(of.split) for of in rows], [len(of.user) for of in rows])
    user, part, start, stop = (np.concatenate([of[n] for of in rows]) for n in range(1, 5))
    last_us = history.times[stop - 1]
    as_of = last_us + 1
    if not rules.leave_one_out:
        cut_us = np.array([rules.valid_us, rules.valid_us, rules.test_us, 0])[split]
        as_of = np.where(split == SPLITS.index("score"), as_of, cut_us)

    offsets, places = ranges(start, stop)
    inputs = {name: history.columns[name][places] for name in FEATURES}
    # At the cut it is unknown whether the session continues: the newest action is always marked as its end, so that the
    # state there predicts the next session. (The true value would leak events after the cut.)
    inputs["session_end"][offsets[1:][part == 0] - 1] = SESSION_END

    target_offsets, places = ranges(*_together(of.targets for of in rows))
    targets = history.predicted[places]
    known_offsets, places = ranges(*_together(of.seen for of in rows))
    row_of_known = np.repeat(np.arange(len(split)), np.diff(known_offsets))
    items = history.columns["item_index"]
    known = items[history.predicted[places]].astype(np.int64)
    for name, more in seen._asdict().items():  # the first user's dropped actions
        for row in np.flatnonzero((split == SPLITS.index(name)) & (user == 0)):
            row_of_known, known = np.append(row_of_known, np.full(len(more), row)), np.append(known, more)
    known_offsets, known = distinct(row_of_known, known, len(split))

    without_targets = pa.array((split == SPLITS.index("train")) | (split == SPLITS.index("score")))

    def lists(offsets: Int64, values: pa.Array, nulls: pa.Array | None = None) -> pa.ListArray:
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=nulls)

    def timestamps(micros: Int64) -> pa.Array:
        return pa.array(micros, pa.int64()).cast(history.time_type)

    return pa.RecordBatch.from_pydict(
        {
            "user_id": history.users.take(pa.array(start)),
            "split": pa.array(SPLITS).take(pa.array(split)),
            "part": pa.array(part, pa.int32()),
            "as_of": timestamps(as_of),
            "last_ts": timestamps(last_us),
            "length": pa.array(stop - start, pa.int32()),
            **{name: lists(offsets, pa.array(values, pa.int32())) for name, values in inputs.items()},
            "target_item_index": lists(target_offsets, pa.array(items[targets], pa.int32()), without_targets),
            "target_ts": lists(target_offsets, timestamps(history.times[targets]), without_targets),
            "seen_item_index": lists(known_offsets, pa.array(known, pa.int32()), without_targets),
        }
    )


def _together(ranges: Iterable[tuple[Int64, Int64]]) -> tuple[Int64, Int64]:
    starts, stops = zip(*ranges, strict=True)
    start: Int64 = np.concatenate(starts)
    stop: Int64 = np.concatenate(stops)
    return start, stop
