"""The tables' expected rows, computed in plain Python from lists of dicts: slow, obvious, independent of Spark."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

Row = dict[str, Any]


def in_order(events: list[Row]) -> list[Row]:
    return sorted(events, key=lambda e: (e["user_id"], e["event_ts"], e["event_id"]))


def runs(events: list[Row], gap: timedelta, gap_by_vertical: dict[str, timedelta]) -> list[list[Row]]:
    """The events of each user's runs (no pause longer than the gap), in order."""
    found: list[list[Row]] = []
    for event in in_order(events):
        last = found[-1][-1] if found else None
        if (
            last is not None
            and last["user_id"] == event["user_id"]
            and event["event_ts"] - last["event_ts"] <= gap_by_vertical.get(last["vertical"], gap)
        ):
            found[-1].append(event)
        else:
            found.append([event])
    return found


def sessions(
    events: list[Row],
    gap: timedelta,
    gap_by_vertical: dict[str, timedelta],
    *,
    max_length: timedelta = timedelta.max,
    max_events: int = 10_000,
    midnight_of: str | None = None,
    cut_on_vertical: bool = False,
) -> list[list[Row]]:
    """The events of each session, in order."""

    def day(event: Row) -> Any:
        return (
            midnight_of and event["event_ts"].replace(tzinfo=ZoneInfo("UTC")).astimezone(ZoneInfo(midnight_of)).date()
        )

    found: list[list[Row]] = []
    for run in runs(events, gap, gap_by_vertical):
        found.append([run[0]])
        for last, event in itertools.pairwise(run):
            if (
                day(event) != day(last)
                or (cut_on_vertical and event["vertical"] != last["vertical"])
                or event["event_ts"] - found[-1][0]["event_ts"] > max_length
                or len(found[-1]) == max_events
            ):
                found.append([event])
            else:
                found[-1].append(event)
    return found


def gap_bucket(before: Row | None, event: Row) -> int:
    if before is None:
        return 1
    seconds = (event["event_ts"] - before["event_ts"]).total_seconds()
    if seconds == 0:
        return 2
    return min(31, 3 + (math.floor(math.log2(seconds)) if seconds >= 1 else 0))


def price_bucket(event: Row) -> int:
    quantity = 1.0 if event["quantity"] is None else event["quantity"]
    if event["amount"] is None or quantity == 0:
        return 1
    price = event["amount"] / quantity
    return 2 if price <= 0 else max(3, min(40, math.floor(2 * math.log2(price)) + 15))


def actions(
    events: list[Row],
    numbers: dict[str, int],
    verticals: dict[str, int],
    event_types: dict[str, int],
    target_types: list[str],
) -> dict[str, list[Row]]:
    """Each user's events in order, encoded; `numbers` holds the training window's vocabulary only."""
    last_of_session = {session[-1]["event_id"] for session in sessions(events, timedelta(minutes=30), {})}
    found: dict[str, list[Row]] = defaultdict(list)
    before: dict[str, Row] = {}
    for event in in_order(events):
        user = event["user_id"]
        local = event["event_ts"].replace(tzinfo=ZoneInfo("UTC")).astimezone(ZoneInfo(event["time_zone"]))
        found[user].append(
            {
                "event_ts": event["event_ts"],
                "predicted": not target_types or event["event_type"] in target_types,
                "item_index": numbers.get(event["item_id"], 1),
                "event_type_index": event_types[event["event_type"]],
                "vertical_index": verticals[event["vertical"]],
                "gap_bucket": gap_bucket(before.get(user), event),
                "session_end": 2 if event["event_id"] in last_of_session else 1,
                "hour": local.hour + 1,
                "weekday": local.isoweekday() % 7 + 1,
                "price_bucket": price_bucket(event),
            }
        )
        before[user] = event
    return found


def sequences(
    by_user: dict[str, list[Row]],
    *,
    valid_from: datetime,
    test_from: datetime,
    max_length: int,
    max_parts: int,
    seen_days: int,
    leave_one_out: bool = False,
) -> dict[tuple[str, str, int], Row]:
    """SEQUENCES rows by (user_id, split, part), from the result of `actions`."""
    rows: dict[tuple[str, str, int], Row] = {}
    for user, history in by_user.items():

        def before_cut(cut: datetime, left_out: int, history: list[Row] = history) -> int:
            if leave_one_out:
                return max(0, len(history) - left_out)
            return sum(a["event_ts"] < cut for a in history)

        n_valid, n_test, n_all = before_cut(valid_from, 2), before_cut(test_from, 1), len(history)
        for part in range(max_parts):
            stop = n_valid - part * max_length
            chunk = history[max(0, stop - max_length) : max(0, stop)]
            if len(chunk) >= 2:
                rows[user, "train", part] = _row(chunk, None if leave_one_out else valid_from, newest=part == 0)
        for split, cut, n, following in (("valid", valid_from, n_valid, n_test), ("test", test_from, n_test, n_all)):
            targets = [a for a in history[n:following] if a["predicted"]]
            if n and targets:
                oldest = cut - timedelta(days=seen_days) if seen_days and not leave_one_out else datetime.min
                seen = {a["item_index"] for a in history[:n] if a["predicted"] and a["event_ts"] >= oldest}
                rows[user, split, 0] = _row(history[max(0, n - max_length) : n], None if leave_one_out else cut) | {
                    "target_item_index": [a["item_index"] for a in targets],
                    "target_ts": [a["event_ts"] for a in targets],
                    "seen_item_index": sorted(seen),
                }
        rows[user, "score", 0] = _row(history[-max_length:], None)
    return rows


def _row(chunk: list[Row], as_of: datetime | None, newest: bool = True) -> Row:
    """A SEQUENCES row; `as_of` None: right after the newest action."""
    as_of = as_of or chunk[-1]["event_ts"] + timedelta(microseconds=1)
    features = ("item_index", "event_type_index", "vertical_index", "gap_bucket", "session_end", "hour", "weekday")
    row = {"as_of": as_of, "last_ts": chunk[-1]["event_ts"], "length": len(chunk)}
    row |= {name: [a[name] for a in chunk] for name in (*features, "price_bucket")}
    if newest:  # at a cut it is unknown whether the session continues
        row["session_end"][-1] = 2
    return row
