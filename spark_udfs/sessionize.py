"""Sessions out of sorted events, over Arrow: no Python object per event, memory bounded by a batch and one session.

A session ends where the user changes or where the pause to the next event is longer than the gap of the vertical of
the event before the pause (what somebody was doing says how long they may be away: a ride takes longer than a search).
A pause of exactly the gap does not end it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Int64 = npt.NDArray[np.int64]


def sessionize(
    batches: Iterable[pa.RecordBatch], gap_us: int, gap_us_by_vertical: Mapping[str, int], event_fields: list[str]
) -> Iterator[pa.RecordBatch]:
    """One row per session.

    Args:
        batches: events, sorted by (user_id, event_ts, event_id) across all batches; event_ts in microseconds.
        gap_us: the longest pause inside a session, microseconds.
        gap_us_by_vertical: other gaps, by vertical.
        event_fields: the columns that the `events` structs keep, in their order.

    Yields:
        Batches of user_id, start_ts, end_ts, event_count (int32), verticals (list, sorted, distinct), amount (sum,
        NULL when no event has one), events (list of structs).
    """
    open_session: list[pa.RecordBatch] = []  # the events of the session that the last batch left open
    for batch in batches:
        if batch.num_rows == 0:
            continue
        before = open_session[-1].slice(open_session[-1].num_rows - 1) if open_session else None
        starts = _session_starts(batch, before, gap_us, gap_us_by_vertical)
        if len(starts) > 0:
            carried = sum(part.num_rows for part in open_session)
            offsets = starts + carried if carried == 0 else np.concatenate(([0], starts + carried))
            closed = [*open_session, batch.slice(0, starts[-1])]
            if offsets[-1] > 0:
                yield _to_sessions(closed, offsets, event_fields)
            open_session = [batch.slice(starts[-1])]
        else:
            open_session.append(batch)
    if open_session:
        yield _to_sessions(open_session, np.array([0, sum(part.num_rows for part in open_session)]), event_fields)


def _session_starts(
    batch: pa.RecordBatch, before: pa.RecordBatch | None, gap_us: int, gap_us_by_vertical: Mapping[str, int]
) -> Int64:
    """Row numbers of `batch` at which a session starts; `before` is the one event that precedes the batch."""
    key = ["user_id", "event_ts", "vertical"]
    rows = pa.Table.from_batches(([before.select(key)] if before is not None else []) + [batch.select(key)])
    rows = rows.combine_chunks()
    users = rows["user_id"].combine_chunks()
    times = rows["event_ts"].cast(pa.int64()).to_numpy()
    verticals = rows["vertical"].combine_chunks().dictionary_encode()
    gap_of_code = np.array(
        [gap_us_by_vertical.get(name, gap_us) for name in verticals.dictionary.to_pylist()], np.int64
    )
    gaps = gap_of_code[verticals.indices.to_numpy()]

    same_user = pc.equal(users[1:], users[:-1]).to_numpy(zero_copy_only=False)
    starts = ~same_user | (np.diff(times) > gaps[:-1])
    if before is None:
        starts = np.concatenate(([True], starts))
    return np.flatnonzero(starts).astype(np.int64)


def _to_sessions(parts: list[pa.RecordBatch], offsets: Int64, event_fields: list[str]) -> pa.RecordBatch:
    """The sessions whose events are rows offsets[i] to offsets[i+1] of the parts laid end to end."""
    events = pa.Table.from_batches(parts).combine_chunks()
    column = {name: events[name].combine_chunks() for name in events.column_names}
    first, last = offsets[:-1], offsets[1:] - 1
    list_offsets = pa.array(offsets, pa.int32())
    structs = pa.StructArray.from_arrays([column[name] for name in event_fields], event_fields)
    return pa.RecordBatch.from_pydict(
        {
            "user_id": column["user_id"].take(pa.array(first)),
            "start_ts": column["event_ts"].take(pa.array(first)),
            "end_ts": column["event_ts"].take(pa.array(last)),
            "event_count": pa.array(np.diff(offsets), pa.int32()),
            "verticals": _distinct_sorted(column["vertical"], offsets),
            "amount": _sums(column["amount"], offsets),
            "events": pa.ListArray.from_arrays(list_offsets, structs),
        }
    )


def _distinct_sorted(values: pa.Array, offsets: Int64) -> pa.ListArray:
    """The distinct values of each slice, sorted."""
    encoded = values.dictionary_encode()
    order = pc.sort_indices(encoded.dictionary)
    rank_of_code = np.empty(len(order), np.int64)
    rank_of_code[order.to_numpy()] = np.arange(len(order))
    session = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    pairs = np.unique(session * len(order) + rank_of_code[encoded.indices.to_numpy()])
    counts = np.bincount(pairs // len(order), minlength=len(offsets) - 1)
    starts = np.concatenate(([0], np.cumsum(counts)))
    return pa.ListArray.from_arrays(
        pa.array(starts, pa.int32()), encoded.dictionary.take(order).take(pa.array(pairs % len(order)))
    )


def _sums(amounts: pa.Array, offsets: Int64) -> pa.Array:
    """The sum of each slice; NULL where a slice has no value."""
    sums = np.add.reduceat(pc.fill_null(amounts, 0.0).to_numpy(), offsets[:-1])
    known = np.add.reduceat(pc.is_valid(amounts).to_numpy(zero_copy_only=False).astype(np.int64), offsets[:-1])
    return pa.array(sums, mask=known == 0)
