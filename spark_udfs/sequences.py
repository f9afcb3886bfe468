"""Rows of `sequences` out of actions in order, over Arrow: no Python object per action.

A user's actions lie in order, so a row is a range of them: from so many actions before a cut up to it. The ranges of
all users of a batch are worked out at once, by arithmetic over places, and each list column is then one gather.

A user whose actions go on in the next batch is held back until they end. Of actions too far back for any row only the
items are kept: a valid or test row must still name them as seen. So memory is bounded by a batch but for one user's
actions after the first cut, which are all kept: any of them may be a target (161 bytes each at the peak).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from spark_udfs.ragged import distinct, ranges
from training.batches import FEATURES, MAX_GAP_BUCKET, SAME_MOMENT, SESSION_END

SPLITS = ("train", "valid", "test", "score")
GAP_FIRST = 1  # the gap_bucket of a user's first action
# What an action brings along beside user_id, event_ts and whether it is `predicted`; gaps are found here.
GIVEN = tuple(name for name in FEATURES if name != "gap_bucket")

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class CutRules:
    """What rows there are. Times are microseconds.

    Attributes:
        max_length: actions in a row, the newest ones before its cut.
        max_parts: train rows of a user: the newest max_length actions, the ones before them, ...
        valid_us, test_us: the cuts; train shares valid's.
        leave_one_out: cut before the last action but one (train, valid) and the last one (test) instead.
        seen_us: items acted on so long before a cut are not new after it; None: ever.
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
        """How many actions before its cut a train row may reach back, and one more, whose time says the last gap."""
        return self.max_parts * self.max_length + 1


class _Seen(NamedTuple):
    """Items of a user's actions that are no longer held, sorted: those that the user's valid and test row must name as
    seen, beside those of the actions that are held."""

    valid: Int64
    test: Int64


_NONE = _Seen(np.empty(0, np.int64), np.empty(0, np.int64))


def cut_sequences(batches: Iterable[pa.RecordBatch], rules: CutRules) -> Iterator[pa.RecordBatch]:
    """One row for each (user, split, part): the columns of SEQUENCES.

    Args:
        batches: user_id, event_ts (microseconds), predicted (bool: may be a target) and GIVEN (int32), sorted by
            (user_id, event_ts, event_id) across all batches.
    """
    held: list[pa.RecordBatch] = []  # the actions of the last user, who may go on
    seen, limit = _NONE, 2 * rules.farthest
    for batch in batches:
        if batch.num_rows == 0:
            continue
        users = batch["user_id"]
        if held and held[0]["user_id"][0] == users[-1]:
            held.append(batch)
            if sum(part.num_rows for part in held) > limit:
                held, seen = _newest(held, rules, seen)
                # Next time at twice as many: all actions after the cut must stay, maybe a million, and they are not to
                # be laid together anew for each batch.
                limit = 2 * (rules.farthest + held[0].num_rows)
            continue
        first_of_last = pc.index(users, users[-1]).as_py()
        if held or first_of_last > 0:
            yield _rows([*held, batch.slice(0, first_of_last)], rules, seen)
        held, seen, limit = [batch.slice(first_of_last)], _NONE, 2 * rules.farthest
    if held:
        yield _rows(held, rules, seen)


def _newest(held: list[pa.RecordBatch], rules: CutRules, seen: _Seen) -> tuple[list[pa.RecordBatch], _Seen]:
    """A user's actions without those that are too far back for any row, and `seen` with the items of the latter."""
    together = pa.Table.from_batches(held).combine_chunks().to_batches()[0]
    times = together["event_ts"].cast(pa.int64()).to_numpy()
    before_valid = len(times) - 2 if rules.leave_one_out else int(np.searchsorted(times, rules.valid_us))
    gone = before_valid - rules.farthest
    if gone <= 0:
        return [together], seen
    items = together["item_index"].to_numpy()[:gone].astype(np.int64)
    predicted = together["predicted"].to_numpy(zero_copy_only=False)[:gone]

    def with_items(known: Int64, cut_us: int) -> Int64:
        return np.union1d(known, items[predicted & (times[:gone] >= _seen_from(cut_us, rules))])

    return [together.slice(gone)], _Seen(with_items(seen.valid, rules.valid_us), with_items(seen.test, rules.test_us))


def _seen_from(cut_us: int, rules: CutRules) -> int:
    """From when on an item acted on is not new at the cut."""
    if rules.leave_one_out or rules.seen_us is None:
        return int(np.iinfo(np.int64).min)
    return cut_us - rules.seen_us


class _Rows(NamedTuple):
    """Rows of one split.

    Attributes:
        user: whose: the user's number in the history.
        start, stop: from where to where in the history the input lies.
        targets, seen: the same of what comes next and of what is not new, as places in `History.predicted`.
    """

    split: str
    user: Int64
    part: Int64
    start: Int64
    stop: Int64
    targets: tuple[Int64, Int64]
    seen: tuple[Int64, Int64]


class _History:
    """The actions of some users, whole, laid end to end."""

    def __init__(self, parts: list[pa.RecordBatch]) -> None:
        actions = pa.Table.from_batches(parts).combine_chunks()
        self.users = actions["user_id"].combine_chunks()  # of each action
        self.times = actions["event_ts"].cast(pa.int64()).to_numpy()
        self.time_type = actions.schema.field("event_ts").type
        self.predicted = np.flatnonzero(actions["predicted"].to_numpy())  # places
        new_user = np.ones(len(self.times), bool)
        new_user[1:] = pc.not_equal(self.users[1:], self.users[:-1]).to_numpy(zero_copy_only=False)
        self.first = np.flatnonzero(new_user)  # of each user; after the last: end
        self.end = np.append(self.first[1:], len(self.times))
        self.columns = {name: actions[name].to_numpy() for name in GIVEN}
        self.columns["gap_bucket"] = _gap_buckets(self.times, new_user)

    def place_of(self, time_us: int) -> Int64:
        """Of each user, the place of the first action at that time or later; `end` where there is none."""
        earlier: Int64 = np.add.reduceat((self.times < time_us).astype(np.int64), self.first)
        return self.first + earlier


def _gap_buckets(times: Int64, new_user: Bool) -> Int32:
    """Octaves of the seconds since the user's last action; what is under a second counts as one."""
    gaps = np.diff(times, prepend=times[:1])
    octave = np.frexp(np.maximum(gaps // 1_000_000, 1).astype(np.float64))[1] - 1
    buckets = np.where(gaps == 0, SAME_MOMENT, np.minimum(octave + 3, MAX_GAP_BUCKET))
    buckets[new_user] = GAP_FIRST
    return buckets.astype(np.int32)


def _rows(parts: list[pa.RecordBatch], rules: CutRules, seen: _Seen) -> pa.RecordBatch:
    """All rows of the users whose actions the parts hold, laid end to end; `seen` belongs to the first of them."""
    history = _History(parts)
    first, end = history.first, history.end
    if rules.leave_one_out:
        valid, test = np.maximum(first, end - 2), np.maximum(first, end - 1)
    else:
        valid, test = history.place_of(rules.valid_us), history.place_of(rules.test_us)
    make = {
        "train": lambda: _unasked("train", history, valid, rules.max_length, most=rules.max_parts, shortest=2),
        "valid": lambda: _asked("valid", history, (valid, test), rules.valid_us, rules),
        "test": lambda: _asked("test", history, (test, end), rules.test_us, rules),
        "score": lambda: _unasked("score", history, end, rules.max_length, most=1, shortest=1),
    }
    return _to_batch([make[split]() for split in rules.splits], history, rules, seen)


def _unasked(split: str, history: _History, cut: Int64, length: int, *, most: int, shortest: int) -> _Rows:
    """Rows without targets: of each user at most `most`, back from the cut."""
    count = np.minimum(-(-(cut - history.first) // length), most)
    user = np.repeat(np.arange(len(cut)), count)
    part = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
    stop = cut[user] - part * length
    start = np.maximum(history.first[user], stop - length)
    kept = stop - start >= shortest
    none = np.zeros(int(kept.sum()), np.int64)
    return _Rows(split, user[kept], part[kept], start[kept], stop[kept], (none, none), (none, none))


def _asked(split: str, history: _History, cuts: tuple[Int64, Int64], cut_us: int, rules: CutRules) -> _Rows:
    """A row for each user who did something to be predicted between the two cuts, and anything before."""
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
    # At the cut nobody knows whether the session goes on: the newest action always stands for its end, so that the
    # state there asks what comes in the next session. (The true value would tell about events after the cut.)
    inputs["session_end"][offsets[1:][part == 0] - 1] = SESSION_END

    target_offsets, places = ranges(*_together(of.targets for of in rows))
    targets = history.predicted[places]
    known_offsets, places = ranges(*_together(of.seen for of in rows))
    row_of_known = np.repeat(np.arange(len(split)), np.diff(known_offsets))
    items = history.columns["item_index"]
    known = items[history.predicted[places]].astype(np.int64)
    for name, more in seen._asdict().items():  # what the first user did before what is held
        for row in np.flatnonzero((split == SPLITS.index(name)) & (user == 0)):
            row_of_known, known = np.append(row_of_known, np.full(len(more), row)), np.append(known, more)
    known_offsets, known = distinct(row_of_known, known, len(split))

    unasked = pa.array((split == SPLITS.index("train")) | (split == SPLITS.index("score")))

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
            "target_item_index": lists(target_offsets, pa.array(items[targets], pa.int32()), unasked),
            "target_ts": lists(target_offsets, timestamps(history.times[targets]), unasked),
            "seen_item_index": lists(known_offsets, pa.array(known, pa.int32()), unasked),
        }
    )


def _together(ranges: Iterable[tuple[Int64, Int64]]) -> tuple[Int64, Int64]:
    starts, stops = zip(*ranges, strict=True)
    start: Int64 = np.concatenate(starts)
    stop: Int64 = np.concatenate(stops)
    return start, stop
