"""Sessions from sorted events, over Arrow: no Python object per event, memory bounded by a batch and `max_events`.

A *run* is a maximal chain of a user's events in which every pause is at most the gap of the vertical of the event
before the pause (what somebody was doing says how long they may be away: a ride takes longer than a search). A run is
cut into sessions from its start on. An event starts a new session if its local day or vertical differs from that of the
event before it, if it is more than `max_us` after the session's first event, or if the session already holds
`max_events` events. A session is thus a function of its run's events alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from training.arrays import Int64
from training.ragged import distinct

Key = tuple[str, int, str]  # user_id, event_ts in microseconds, event_id, which alone may recur on several days

_DAY_US = 86_400_000_000


@dataclass(frozen=True)
class Rules:
    """Where sessions end. Times are microseconds.

    Attributes:
        gap_us: the longest pause inside a run.
        gap_us_by_vertical: the verticals' own gaps, instead of `gap_us`.
        max_us: the longest time from a session's first event to its last; None: no limit.
        max_events: the most events of a session.
        midnight_of: the IANA zone at whose midnights sessions are cut; None: no cut at midnight.
        cut_on_vertical: whether a session holds one vertical only.
    """

    gap_us: int
    gap_us_by_vertical: Mapping[str, int] = field(default_factory=dict)
    max_us: int | None = None
    max_events: int = 10_000
    midnight_of: str | None = None
    cut_on_vertical: bool = False

    @property
    def longest_gap_us(self) -> int:
        """The longest pause inside a run, over all verticals."""
        return max([self.gap_us, *self.gap_us_by_vertical.values()])


@dataclass
class _Open:
    """State carried over to the next batch: the last event and its open run and session."""

    user_id: pa.Scalar
    vertical: str
    last_us: int  # of the last event
    day: int  # of the last event, in the rules' zone
    run_us: int  # start of its run
    first_us: int  # start of its session
    events: int  # of its session


def sessionize(
    batches: Iterable[pa.RecordBatch],
    rules: Rules,
    event_fields: list[str],
    run_us_of_split: Mapping[Key, int] | None = None,
) -> Iterator[pa.RecordBatch]:
    """One row per session.

    Args:
        batches: events, sorted by (user_id, event_ts, event_id) across all batches; event_ts in microseconds.
        event_fields: the columns that the `events` structs keep, in their order.
        run_us_of_split: for events that are known to start a session (`split_points`), the start of their run: the
            events before them may be missing.

    Yields:
        Batches of session_id (that of its first event), user_id, start_ts, end_ts, event_count (int32), verticals
        (list, sorted, distinct), amount (sum, NULL when no event has one), events (list of structs), run_start_ts.
    """
    parts: list[pa.RecordBatch] = []  # the events of the session that the last batch left open
    run_us = 0  # the start of that session's run
    for batch, starts, runs_us in _cut(batches, rules, run_us_of_split or {}):
        if len(starts) == 0:
            parts.append(batch)
            continue
        offsets, runs = starts, runs_us
        if parts:
            offsets = np.concatenate(([0], starts + sum(part.num_rows for part in parts)))
            runs = np.concatenate(([run_us], runs_us))
        if len(offsets) > 1:
            yield _to_sessions([*parts, batch.slice(0, starts[-1])], offsets, runs[:-1], event_fields)
        parts, run_us = [batch.slice(starts[-1])], int(runs_us[-1])
    if parts:
        offsets = np.array([0, sum(part.num_rows for part in parts)])
        yield _to_sessions(parts, offsets, np.array([run_us]), event_fields)


def split_points(batches: Iterable[pa.RecordBatch], rules: Rules, every: int) -> Iterator[pa.RecordBatch]:
    """Events that start a session, at least `every` rows apart: the log can be split before them.

    Args:
        batches: user_id, event_ts, event_id and vertical, sorted as for `sessionize`.

    Yields:
        Batches of user_id, event_us, event_id, run_us (int64, microseconds): the event and the start of its run.
    """
    ahead = every  # the earliest row of the next split, counted from the next batch's first row
    for batch, starts, runs_us in _cut(batches, rules, {}):
        chosen: list[int] = []
        while (nearest := int(np.searchsorted(starts, ahead))) < len(starts):
            chosen.append(nearest)
            ahead = int(starts[nearest]) + every
        ahead -= batch.num_rows
        rows = batch.take(pa.array(starts[chosen]))
        columns = [rows["user_id"], rows["event_ts"].cast(pa.int64()), rows["event_id"], pa.array(runs_us[chosen])]
        yield pa.RecordBatch.from_arrays(columns, ["user_id", "event_us", "event_id", "run_us"])


def _cut(
    batches: Iterable[pa.RecordBatch], rules: Rules, run_us_of_split: Mapping[Key, int]
) -> Iterator[tuple[pa.RecordBatch, Int64, Int64]]:
    """Each non-empty batch, the numbers of its rows that start a session, and the start of each one's run."""
    before: _Open | None = None
    split_ids = pa.array([event_id for _, _, event_id in run_us_of_split], pa.string())
    for batch in batches:
        if batch.num_rows == 0:
            continue
        users, times = batch["user_id"], batch["event_ts"].cast(pa.int64()).to_numpy()
        verticals = batch["vertical"].dictionary_encode()
        names, codes = verticals.dictionary.to_pylist(), verticals.indices.to_numpy()
        gaps = np.array([rules.gap_us_by_vertical.get(name, rules.gap_us) for name in names], np.int64)[codes]
        days = _local_days(batch["event_ts"], rules.midnight_of) if rules.midnight_of else np.zeros(1, np.int64)

        new_run, cut = np.empty(len(times), bool), np.empty(len(times), bool)
        new_run[1:] = pc.not_equal(users[1:], users[:-1]).to_numpy(zero_copy_only=False)
        new_run[1:] |= np.diff(times) > gaps[:-1]
        cut[1:] = new_run[1:]
        if rules.midnight_of:
            cut[1:] |= days[1:] != days[:-1]
        if rules.cut_on_vertical:
            cut[1:] |= codes[1:] != codes[:-1]
        if before is None or before.user_id != users[0]:
            new_run[0] = cut[0] = True
        else:
            gap = rules.gap_us_by_vertical.get(before.vertical, rules.gap_us)
            new_run[0] = times[0] - before.last_us > gap
            cut[0] = (
                new_run[0]
                or bool(rules.midnight_of and days[0] != before.day)
                or (rules.cut_on_vertical and names[codes[0]] != before.vertical)
            )

        run_us = times
        if splits := _splits_in(batch, run_us_of_split, split_ids):
            here, runs_here = np.array(splits, np.int64).T
            new_run[here] = cut[here] = True
            run_us = times.copy()
            run_us[here] = runs_here

        starts = _cut_long(times, np.flatnonzero(cut), before, rules)
        run_rows = np.flatnonzero(new_run)
        # The first entry is the run that the previous batch left open.
        run_starts = np.concatenate(([before.run_us if before else 0], run_us[run_rows]))
        runs = run_starts[np.searchsorted(run_rows, starts, side="right")]
        yield batch, starts, runs

        if len(starts):
            first_us, events = int(times[starts[-1]]), len(times) - int(starts[-1])
        else:
            assert before is not None  # otherwise row 0 would start a session
            first_us, events = before.first_us, before.events + len(times)
        last = int(codes[-1])
        before = _Open(users[-1], names[last], int(times[-1]), int(days[-1]), int(run_starts[-1]), first_us, events)


def _splits_in(batch: pa.RecordBatch, run_us_of_split: Mapping[Key, int], ids: pa.Array) -> list[tuple[int, int]]:
    """(row, start of its run) of each of the batch's events that is a split; `ids` are the splits' event_ids."""
    if not run_us_of_split:
        return []
    # Filtering by id leaves few rows, and only these become Python objects.
    like = pa.array(np.flatnonzero(pc.is_in(batch["event_id"], ids).to_numpy(zero_copy_only=False)))
    key_columns = (batch["user_id"], batch["event_ts"].cast(pa.int64()), batch["event_id"])
    keys = zip(*(column.take(like).to_pylist() for column in key_columns), strict=True)
    return [
        (row, run_us_of_split[key]) for row, key in zip(like.to_pylist(), keys, strict=True) if key in run_us_of_split
    ]


def _local_days(times: pa.Array, zone: str) -> Int64:
    local = pc.local_timestamp(times.cast(pa.timestamp("us", zone)))
    local_us: Int64 = local.cast(pa.int64()).to_numpy()
    return local_us // _DAY_US


def _cut_long(times: Int64, starts: Int64, before: _Open | None, rules: Rules) -> Int64:
    """`starts`, plus those where a session would exceed `max_events` or `max_us`: one loop iteration per such start."""
    if before is None or (len(starts) > 0 and starts[0] == 0):
        first_rows, first_us, earlier_events = starts, times[starts], np.zeros(len(starts), np.int64)
    else:  # the batch begins inside a session
        first_rows = np.concatenate(([0], starts))
        first_us = np.concatenate(([before.first_us], times[starts]))
        earlier_events = np.zeros(len(first_rows), np.int64)
        earlier_events[0] = before.events
    ends = np.concatenate((first_rows[1:], [len(times)]))
    long = ends - first_rows + earlier_events > rules.max_events
    if rules.max_us is not None:
        long |= times[ends - 1] - first_us > rules.max_us
    more: list[int] = []
    for segment in np.flatnonzero(long):
        row, end, since, already = first_rows[segment], ends[segment], first_us[segment], earlier_events[segment]
        while True:
            stop = min(end, row + rules.max_events - already)
            if rules.max_us is not None:
                stop = row + np.searchsorted(times[row:stop], since + rules.max_us, side="right")
            if stop == end:
                break
            more.append(stop)
            row, since, already = stop, times[stop], 0
    return np.sort(np.concatenate((starts, np.array(more, np.int64)))) if more else starts


def _to_sessions(
    parts: list[pa.RecordBatch], offsets: Int64, runs_us: Int64, event_fields: list[str]
) -> pa.RecordBatch:
    """The sessions whose events are rows offsets[i] to offsets[i+1] of the concatenated parts."""
    events = pa.Table.from_batches(parts).combine_chunks()
    column = {name: events[name].combine_chunks() for name in events.column_names}
    first, last = offsets[:-1], offsets[1:] - 1
    list_offsets = pa.array(offsets, pa.int32())
    structs = pa.StructArray.from_arrays([column[name] for name in event_fields], event_fields)
    return pa.RecordBatch.from_pydict(
        {
            "session_id": column["event_id"].take(pa.array(first)),
            "user_id": column["user_id"].take(pa.array(first)),
            "start_ts": column["event_ts"].take(pa.array(first)),
            "end_ts": column["event_ts"].take(pa.array(last)),
            "event_count": pa.array(np.diff(offsets), pa.int32()),
            "verticals": _distinct_sorted(column["vertical"], offsets),
            "amount": _sums(column["amount"], offsets),
            "events": pa.ListArray.from_arrays(list_offsets, structs),
            "run_start_ts": pa.array(runs_us, pa.int64()).cast(column["event_ts"].type),
        }
    )


def _distinct_sorted(values: pa.Array, offsets: Int64) -> pa.ListArray:
    """The distinct values of each slice, sorted."""
    encoded = values.dictionary_encode()
    order = pc.sort_indices(encoded.dictionary)
    rank_of_code = np.empty(len(order), np.int64)
    rank_of_code[order.to_numpy()] = np.arange(len(order))
    session = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    starts, ranks = distinct(session, rank_of_code[encoded.indices.to_numpy()], len(offsets) - 1)
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), encoded.dictionary.take(order).take(pa.array(ranks)))


def _sums(amounts: pa.Array, offsets: Int64) -> pa.Array:
    """The sum of each slice; NULL if a slice has no value."""
    sums = np.add.reduceat(pc.fill_null(amounts, 0.0).to_numpy(), offsets[:-1])
    value_counts = np.add.reduceat(pc.is_valid(amounts).to_numpy(zero_copy_only=False).astype(np.int64), offsets[:-1])
    return pa.array(sums, mask=value_counts == 0)
