"""A superapp's log at any scale: python scripts/bench/superapp.py --events 1000000 --out build/superapp

Rides, food, groceries and retail in four cities, written by Spark in parallel as Parquet, in a folder per day of
*arrival*; `conf/sources/superapp.toml` reads it. The same seed gives the same rows however the work is split: every
random number is a hash of the seed and of what it is drawn for (a user, an outing, a step, an event), computed for
whole arrays at once.

What a model can learn:
- every user has a taste (one of TASTES) that largely decides what they take in food, groceries and retail;
- a ride has a destination, and food after a ride comes from there; people ride to work in the morning,
  home at night;
- people have favourites, habitual hours and a shopping day; one retail item leads to the next (views move on to the
  following item of the list); what is bought has mostly been viewed (an outing of one event may be a purchase).

What makes it hard, as in real logs: users of very different activity, Zipf-distributed items that appear and disappear,
users who come and go, late events, duplicated events, bots (crawlers at exact intervals, bursts of up to a hundred
views a second).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyspark import cloudpickle
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from scipy.special import ndtri

from jobs.tables import EVENTS, conform

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]
Columns = dict[str, NDArray[Any]]

START = datetime(2024, 1, 1, tzinfo=timezone.utc)  # a Monday
TASTES = 16
PLACES = 8  # districts of a city
ZONES = ("Asia/Singapore", "Europe/Istanbul", "Europe/London", "America/Sao_Paulo")
VERTICALS = ("rides", "food", "groceries", "retail")
RIDES, FOOD, GROCERIES, RETAIL = range(4)
TYPES = ("search", "ride", "view", "order", "purchase", "return")
SEARCH, RIDE, VIEW, ORDER, PURCHASE, RETURN = range(6)

# By vertical: share of first steps; probability of one more event in a step; items per 1 user ** 0.75; groups of items
# (places, places times kitchens, tastes, tastes); Zipf exponent; lifetime of an item in days (0: for ever); median
# price; probability that a user returns to a favourite.
_SHARE = (0.38, 0.24, 0.16, 0.22)
_MORE = (0.35, 0.68, 0.86, 0.8)
_ITEMS = (0.5, 1.5, 1.5, 6.0)
_GROUPS = (len(ZONES) * PLACES, len(ZONES) * PLACES * 8, TASTES, TASTES)
_ZIPF = (0.9, 1.0, 1.1, 1.05)
_LIFE = (0, 200, 300, 60)
_PRICE = (9.0, 16.0, 3.5, 28.0)
_FAVOURITE = (0.3, 0.4, 0.5, 0.1)
_LONGEST_STEP = 40  # events
# Probability of the vertical that follows a step, at once or soon, by the step's own (rides → food above all); the rest
# of each row: none.
_NEXT = ((0.0, 0.28, 0.05, 0.02), (0.14, 0.0, 0.02, 0.03), (0.06, 0.03, 0.0, 0.03), (0.02, 0.05, 0.03, 0.0))
# Local hours around which a vertical is used, each with its weight and its spread in hours; then weekday weights.
_HOURS = (
    ((8, 0.4, 0.8), (18, 0.4, 1.2), (22, 0.2, 2)),
    ((12.5, 0.4, 0.8), (19.5, 0.6, 1.2)),
    ((10, 0.5, 1.5), (18, 0.5, 1.5)),
    ((13, 0.3, 2.5), (21, 0.7, 1.8)),
)
_WEEKDAYS = (
    (1.1, 1.1, 1.1, 1.1, 1.4, 0.9, 0.6),
    (0.8, 0.8, 0.9, 1, 1.4, 1.5, 1.2),
    (0.7, 0.7, 0.7, 0.8, 1.1, 2, 1.2),
    (1, 1, 1, 1, 0.9, 1.1, 1.3),
)

_OUTINGS_A_DAY = 0.28  # of the mean user; activity is log-normal across users
_SPREAD = 1.1
_MOST_OUTINGS_A_DAY = 12.0
# Measured: of the mean user, and of a bot over the whole log (its bursts and crawls do not grow with the days).
_EVENTS_A_DAY, _EVENTS_OF_BOT = 0.712, 1680
MOST_DAYS = 900
_USERS_IN_BLOCK = 4096
_ROWS_HELD = 2_000_000  # some 350 MB
_REPEATING = ["user_id", "item_id", "event_type", "vertical", "time_zone", "category", "district", "quantity"]
_DAY = 86_400_000_000
_MINUTE = 60_000_000


@dataclass(frozen=True)
class World:
    """Parameters of a log; equal worlds make equal logs.

    Attributes:
        days: events happen on this many days from START on, each in the user's zone; the last to arrive are second
            copies of duplicated late events, up to nine days after the event.
        late: share of events that arrive one to seven days after they happened.
        doubled: share of events that are duplicated.
        bots: share of users that are bots.
        ids_by_time: event_ids begin with the time, as UUIDs of version 7 do; otherwise they have no order, like ids
            from many servers.
    """

    users: int
    days: int = 60
    seed: int = 1
    late: float = 0.01
    doubled: float = 0.005
    bots: float = 0.001
    ids_by_time: bool = False

    @classmethod
    def of_events(cls, events: int, days: int = 60, seed: int = 1, *, ids_by_time: bool = False) -> World:
        """With as many users as make about `events` events."""
        of_user = days * _EVENTS_A_DAY + cls.bots * _EVENTS_OF_BOT
        return cls(max(1, round(events / of_user)), days, seed, ids_by_time=ids_by_time)

    def ranks(self) -> tuple[int, ...]:
        """By vertical: the number of items alive at a time in each group."""
        every = self.users**0.75
        return tuple(max(4, round(every * n / g)) for n, g in zip(_ITEMS, _GROUPS, strict=True))


def raw_log(spark: SparkSession, world: World, partitions: int | None = None) -> DataFrame:
    """The log as its files hold it: SCHEMA's columns, duplicated events twice; in no order.

    Args:
        partitions: tasks; None: four per core.
    """

    def make(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for task in (number for batch in batches for number in batch.column(0).to_pylist()):
            yield from _blocks(world, task, tasks)

    rows, tasks = _tasks(spark, world, partitions)
    return rows.mapInArrow(make, SCHEMA)


def _tasks(spark: SparkSession, world: World, partitions: int | None) -> tuple[DataFrame, int]:
    """One row per task, each in its own partition, and the number of tasks."""
    # Pickled by value, so that Spark's workers need not import this file.
    by_value: Callable[[ModuleType], None] = cloudpickle.register_pickle_by_value
    by_value(sys.modules[__name__])
    blocks = -(-world.users // _USERS_IN_BLOCK)
    tasks = min(blocks, partitions or 4 * spark.sparkContext.defaultParallelism)
    return spark.range(0, tasks, 1, tasks), tasks


def _blocks(world: World, task: int, tasks: int) -> Iterator[pa.RecordBatch]:
    blocks = -(-world.users // _USERS_IN_BLOCK)
    for block in range(task * blocks // tasks, (task + 1) * blocks // tasks):
        yield _arrow(world, log_of_users(world, block * _USERS_IN_BLOCK))


def events(spark: SparkSession, world: World) -> DataFrame:
    """The log as rows of EVENTS, as ingest would make them from the files: each event once."""
    log = raw_log(spark, World(**(vars(world) | {"doubled": 0.0})))
    rows = log.withColumns(
        {
            "item_name": F.expr(ITEM_NAME),
            "attributes": F.create_map(F.lit("district"), F.col("district")),
            "source": F.lit("superapp"),
        }
    )
    return conform(rows, EVENTS)


ITEM_NAME = "concat(category, ' ', substring(item_id, 2))"
SCHEMA = (
    "event_id string, user_id string, item_id string, event_type string, event_ts timestamp, vertical string, "
    "amount double, quantity double, time_zone string, category string, basket_id string, district string, "
    "arrived_at timestamp, arrived date"
)


def write(spark: SparkSession, world: World, out: Path, partitions: int | None = None) -> tuple[int, int]:
    """Writes the log's files under out/arrived=YYYY-MM-DD/, a folder that every worker must see; counts its rows and
    users.

    Each task writes its own files, in a third of the time that Spark's writer takes for so many days at once.
    """

    def make(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for task in (number for batch in batches for number in batch.column(0).to_pylist()):
            rows, users = _write_blocks(_blocks(world, task, tasks), out, f"part-{task:05}.parquet")
            yield pa.RecordBatch.from_pydict({"rows": [rows], "users": [users]})

    for old in out.glob("arrived=*"):
        shutil.rmtree(old)
    start, tasks = _tasks(spark, world, partitions)
    totals = start.mapInArrow(make, "rows bigint, users bigint").agg(F.sum("rows"), F.sum("users")).collect()[0]
    return int(totals[0]), int(totals[1])


def _write_blocks(blocks: Iterator[pa.RecordBatch], out: Path, name: str) -> tuple[int, int]:
    """Writes one file per day, under a temporary name and then renamed; memory is bounded by _ROWS_HELD."""
    held: dict[object, list[pa.RecordBatch]] = {}
    writers: dict[object, pq.ParquetWriter] = {}
    rows = users = waiting = 0

    def flush() -> None:
        for day, batches in held.items():
            if day not in writers:
                (out / f"arrived={day}").mkdir(parents=True, exist_ok=True)
                writers[day] = pq.ParquetWriter(
                    out / f"arrived={day}" / f".{name}", batches[0].schema, use_dictionary=_REPEATING
                )
            writers[day].write_table(pa.Table.from_batches(batches))
        held.clear()

    for block in blocks:
        rows += len(block)
        users += pc.count_distinct(block["user_id"]).as_py()
        waiting += len(block)
        # The day is in the folder's name.
        plain = block.select([name for name in block.schema.names if name != "arrived"])
        for day, first, count in _runs(block["arrived"]):
            held.setdefault(day, []).append(plain.slice(first, count))
        if waiting > _ROWS_HELD:
            flush()
            waiting = 0
    flush()
    for day, writer in writers.items():
        writer.close()
        (out / f"arrived={day}" / f".{name}").rename(out / f"arrived={day}" / name)
    return rows, users


def _runs(sorted_values: pa.Array) -> list[tuple[object, int, int]]:
    """Each value of a sorted column, its first position and its count."""
    runs = pc.run_end_encode(sorted_values)
    ends = runs.run_ends.to_pylist()
    begins = [0, *ends][:-1]
    return [(v, begin, end - begin) for v, begin, end in zip(runs.values.to_pylist(), begins, ends, strict=True)]


# ---- random numbers ---------------------------------------------------------------------------------------

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: Keys) -> Keys:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection in which every output bit depends on every input
    bit.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class _Draw:
    """Uniform numbers in (0, 1) that depend only on the seed, on what is drawn and on the key it is drawn for."""

    def __init__(self, seed: int) -> None:
        self._seed = np.array([seed], np.uint64)

    def bits(self, what: str, key: NDArray[Any]) -> Keys:
        salt = _mix(self._seed * _GOLDEN + np.uint64(int.from_bytes(what.encode().ljust(8)[:8], "little")))
        return _mix(_mix(key.astype(np.uint64) * _GOLDEN + salt) + salt)

    def __call__(self, what: str, key: NDArray[Any]) -> Floats:
        return ((self.bits(what, key) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _pick(weights: NDArray[Any], u: Floats) -> Ints:
    """A weighted choice (an index) for each u; `weights`: one row for all, or one row each."""
    edges = np.cumsum(weights, axis=-1)
    if edges.ndim == 1:
        of_all: Ints = np.searchsorted(edges, u * edges[-1], side="right")
        return of_all
    of_each: Ints = (u[:, None] * edges[:, -1:] >= edges[:, :-1]).sum(axis=1)
    return of_each


def _zipf(u: Floats, n: NDArray[Any], exponent: NDArray[Any]) -> Ints:
    """Ranks 0 to n - 1 with probabilities like 1 / (rank + 1) ** exponent, by the inverse of the continuous
    distribution.
    """
    power = 1.0 - np.where(np.abs(exponent - 1) < 1e-9, 1 + 1e-9, exponent)
    rank = ((np.power(n + 1.0, power) - 1.0) * u + 1.0) ** (1.0 / power)
    return np.minimum(rank.astype(np.int64) - 1, n - 1)


def _repeated(counts: Ints) -> tuple[Ints, Ints]:
    """Repeats owner i `counts[i]` times: each element's owner, and its position within that owner."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


# ---- the log of some users --------------------------------------------------------------------------------


def log_of_users(world: World, first: int, count: int = _USERS_IN_BLOCK) -> Columns:
    """The log of the users from number `first` on, sorted by arrival, as arrays of numbers.

    Times are microseconds since START (UTC); `slot` is an item's place in its vertical, filled by items of consecutive
    `generation`; `key` identifies an event.
    """
    draw = _Draw(world.seed)
    user = np.arange(first, min(first + count, world.users), dtype=np.int64)
    people = _people(world, draw, user)
    steps = _steps(world, draw, people)
    log = _events(world, draw, people, steps)
    parts = [log, _returns(world, draw, log), _bots(world, draw, people)]
    log = {name: np.concatenate([part[name] for part in parts]) for name in log}
    late = draw("late", log["key"]) < world.late
    delay = np.where(late, _DAY * (1 + draw("delay", log["key"]) * 6), 1e6 + 29e6 * draw("transit", log["key"]))
    log["arrived_at"] = log["event_ts"] + delay.astype(np.int64)
    again = {name: column[draw("doubled", log["key"]) < world.doubled] for name, column in log.items()}
    again["arrived_at"] = again["arrived_at"] + (draw("again", again["key"]) * 2 * _DAY).astype(np.int64)
    log = {name: np.concatenate([log[name], again[name]]) for name in log}
    order = np.lexsort((log["key"], log["arrived_at"]))
    return {name: column[order] for name, column in log.items()}


def taste_of(world: World, user: NDArray[Any]) -> Ints:
    """The users' tastes, which the log does not show: 0 to TASTES - 1, some more common than others."""
    return _pick(1.0 / np.sqrt(np.arange(1, TASTES + 1)), _Draw(world.seed)("taste", user))


def _people(world: World, draw: _Draw, user: Ints) -> Columns:
    taste = taste_of(world, user)
    city = _pick(np.array([4, 3, 2, 1]), draw("city", user))
    joined = np.maximum(0.0, draw("joined", user) * 1.5 - 0.5) * world.days
    stays = np.where(draw("stays", user) < 0.75, 1.0, draw("left", user))
    # A taste prefers some verticals, with individual variation.
    leaning = draw("leaning", np.arange(TASTES * 4)).reshape(TASTES, 4)[taste] * 2 + 0.2
    own = np.stack([draw(f"own{v}", user) for v in range(4)], axis=1) * 2 + 0.1
    rate = _OUTINGS_A_DAY * np.exp(_SPREAD * ndtri(draw("rate", user)) - _SPREAD**2 / 2)
    bot = draw("bot", user) < world.bots
    active = (world.days - joined) * stays
    outings = np.floor(np.minimum(rate, _MOST_OUTINGS_A_DAY) * active + draw("outings", user))
    return {
        "user": user,
        "taste": taste,
        "second": _pick(np.ones(TASTES), draw("second", user)),
        "city": city,
        "home": city * PLACES + (draw("home", user) * PLACES).astype(np.int64),
        "work": city * PLACES + (draw("work", user) * PLACES).astype(np.int64),
        "joined": joined,
        "active": active,
        "weights": np.array(_SHARE) * leaning * own,
        "bot": bot,
        "outings": np.where(bot, 0, outings).astype(np.int64),
    }


def _steps(world: World, draw: _Draw, people: Columns) -> Columns:
    """Outings of one or two steps, in order of user and outing; a step is one thing done in one vertical."""
    owner, place = _repeated(people["outings"])
    key = (people["user"][owner] << 20) | (place << 1)
    vertical = _pick(people["weights"][owner], draw("vertical", key))
    start, hour = _starts(world, draw, people, owner=owner, key=key, vertical=vertical)
    follows = np.array([[*row, 1 - sum(row)] for row in _NEXT])[vertical]
    after = _pick(follows, draw("next", key))

    outing, second = _repeated(1 + (after < 4).astype(np.int64))
    key = key[outing] | second
    owner = owner[outing]
    step_vertical = np.where(second == 1, after[outing] % 4, vertical[outing])
    # Place: home, work or elsewhere in the city; people commute.
    home, work = people["home"][owner], people["work"][owner]
    some = people["city"][owner] * PLACES + np.minimum(draw("where", key) ** 2 * PLACES, PLACES - 1).astype(np.int64)
    commute = np.where(hour[outing] < 12, work, home)
    habit = draw("habit", key)
    where = np.where(step_vertical == RIDES, np.where(habit < 0.55, commute, some), np.where(habit < 0.7, home, work))
    before = np.roll(step_vertical, 1)
    came_by_ride = (second == 1) & (before == RIDES)
    where = np.where(came_by_ride, np.roll(where, 1), where)  # the ride's destination
    where = np.where((second == 1) & (step_vertical == RIDES), home, where)
    # The shelf is mostly that of one's own taste.
    choice = draw("shelf", key)
    any_taste = (draw("any", key) * TASTES).astype(np.int64)
    shelf = np.where(choice < 0.72, people["taste"][owner], np.where(choice < 0.82, people["second"][owner], any_taste))
    more = np.log(draw("events", key)) / np.log(np.array(_MORE))[step_vertical]
    return {
        "key": key,
        "owner": owner,
        "outing": outing,
        "second": second,
        "start": start[outing],
        "vertical": step_vertical,
        "where": where,
        "shelf": shelf,
        "count": np.minimum(1 + more.astype(np.int64), _LONGEST_STEP),
    }


def _starts(
    world: World, draw: _Draw, people: Columns, *, owner: Ints, key: Ints, vertical: Ints
) -> tuple[Ints, Floats]:
    """When the outings start: microseconds since START (UTC), and the local hour."""
    last_day = world.days - 1
    day = people["joined"][owner] + draw("day", key) * people["active"][owner]
    weekday = np.zeros(len(key), np.int64)
    quantile = np.zeros(len(key))
    hour = np.zeros(len(key))
    grid = np.linspace(0, 24, 24 * 12 + 1)
    user = people["user"][owner]
    for v in range(4):
        mine = vertical == v
        weekday[mine] = _pick(np.array(_WEEKDAYS[v]), draw("weekday", key[mine]))
        # Half of the outings are at the user's usual hour.
        own = draw("hour", user[mine] * 4 + v)
        quantile[mine] = np.where(draw("usual", key[mine]) < 0.5, own, draw("time", key[mine]))
        density = sum(w * np.exp(-0.5 * ((grid - at) / spread) ** 2) / spread for at, w, spread in _HOURS[v])
        below = np.cumsum(density)
        hour[mine] = np.interp(quantile[mine], below / below[-1], grid)
    shopping_day = (vertical == GROCERIES) & (draw("shopping", key) < 0.5)
    weekday = np.where(shopping_day, _pick(np.array(_WEEKDAYS[GROCERIES]), draw("shopday", user)), weekday)
    day = np.minimum(day.astype(np.int64), last_day)
    same_week = day - day % 7 + weekday
    day = np.where((same_week <= last_day) & (same_week >= people["joined"][owner]), same_week, day)
    hour = np.clip(hour + 0.3 * ndtri(draw("jitter", key)), 0, 23.99)
    local = day * _DAY + (hour * 60 * _MINUTE).astype(np.int64)
    start = local - _offsets(world.days)[people["city"][owner], day]
    return start, hour


def _offsets(days: int) -> Ints:
    """Each city's UTC offset in microseconds, by city and day."""
    noons = [START + timedelta(days=day, hours=12) for day in range(days)]
    seconds = [[ZoneInfo(zone).utcoffset(noon).total_seconds() for noon in noons] for zone in ZONES]  # type: ignore[union-attr]
    return (np.array(seconds) * 1e6).astype(np.int64)


def _events(world: World, draw: _Draw, people: Columns, steps: Columns) -> Columns:
    step, place = _repeated(steps["count"])
    owner = steps["owner"][step]
    vertical = steps["vertical"][step]
    user = people["user"][owner]
    # An event's number within its user: the key for everything drawn for it.
    firsts = np.searchsorted(owner, np.arange(len(people["user"])))
    key = (user << 24) | (np.arange(len(step)) - firsts[owner])
    step_key = steps["key"][step]

    last = place == steps["count"][step] - 1
    buys = last & (draw("buys", step_key) < np.array([0.9, 0.75, 1.0, 0.35])[vertical])
    looks = np.array([SEARCH, VIEW, PURCHASE, VIEW])[vertical]
    event_type = np.where(buys, np.array([RIDE, ORDER, PURCHASE, PURCHASE])[vertical], looks)

    # Integer microseconds: a float cumulative sum would depend on the rows before it.
    pause = -np.log(draw("pause", key)) * np.array([40e6, 35e6, 15e6, 30e6])[vertical] + 1e6
    minutes = np.where(draw("soon", step_key) < 0.6, 4 + 20 * draw("gap", step_key), 40 + 80 * draw("gap", step_key))
    second = steps["second"][step] == 1
    pause = np.where(place > 0, pause, np.where(second, minutes * _MINUTE, 0.0)).astype(np.int64)
    since = np.cumsum(pause)
    opens = (place == 0) & ~second
    opened = np.maximum.accumulate(np.where(opens, np.arange(len(step)), 0))
    event_ts = steps["start"][step] + since - since[opened]

    # What is bought has been viewed; a retail view leads to the next item of the list.
    viewed = np.where(buys & (vertical != GROCERIES) & (place > 0), place - 1, place)
    ranks = np.array(world.ranks())[vertical]
    favourite = draw("favour", step_key * 64 + viewed)
    again = favourite < np.array(_FAVOURITE)[vertical]
    # Twelve favourites per user and vertical, the first ones more often.
    number = (12 * (favourite / np.array(_FAVOURITE)[vertical]) ** 2).astype(np.int64)
    chained = (vertical == RETAIL) & ~again & (draw("chained", step_key) < 0.5)
    chosen = draw("item", step_key * 64 + np.where(chained, 0, viewed))
    u = np.where(again, draw("fav", (user * 4 + vertical) * 16 + np.minimum(number, 11)), chosen)
    rank = _zipf(u, ranks, np.array(_ZIPF)[vertical])
    rank = np.where(chained, (rank + viewed) % ranks, rank)
    where, shelf = steps["where"][step], steps["shelf"][step]
    group = np.choose(vertical, [where, where * 8 + shelf % 8, shelf, shelf])
    slot = group * ranks + rank
    amount, quantity = _amounts(draw, vertical, slot, key, event_type)
    return {
        "key": key,
        "user": user,
        "vertical": vertical,
        "slot": slot,
        "generation": _generation(draw, vertical, slot, event_ts),
        "event_type": event_type,
        "event_ts": event_ts,
        "amount": amount,
        "quantity": quantity,
        "city": people["city"][owner],
        "category": vertical * TASTES + np.choose(vertical, [0 * shelf, shelf % 8, shelf, shelf]),
        "where": where,
        "basket": np.where(np.isnan(amount), -1, step_key),
    }


def _generation(draw: _Draw, vertical: Ints, slot: Ints, event_ts: Ints) -> Ints:
    """Which of the successive items in a slot is alive at that time."""
    key = slot * 4 + vertical
    life = np.array(_LIFE)[vertical] * (0.3 + 2 * draw("life", key) ** 2)
    born = event_ts / _DAY + draw("phase", key) * life
    return np.where(life > 0, born / np.maximum(life, 1), 0).astype(np.int64)


def _amounts(draw: _Draw, vertical: Ints, slot: Ints, key: Ints, event_type: Ints) -> tuple[Floats, Floats]:
    """Amount and quantity of purchases; NaN for other events."""
    bought = (event_type != VIEW) & (event_type != SEARCH)
    many = (vertical == GROCERIES) & (draw("many", key) < 0.25)
    quantity = np.where(many, 2.0 + np.floor(3 * draw("howmany", key)), 1.0)
    price = np.array(_PRICE)[vertical] * np.exp(0.6 * ndtri(draw("price", slot * 4 + vertical)))
    return np.where(bought, np.round(price * quantity, 2), np.nan), np.where(bought, quantity, np.nan)


def _returns(world: World, draw: _Draw, log: Columns) -> Columns:
    """Some retail purchases are returned within two weeks."""
    later = log["event_ts"] + (_DAY * (1 + 13 * draw("backday", log["key"]))).astype(np.int64)
    back = (log["event_type"] == PURCHASE) & (log["vertical"] == RETAIL) & (draw("back", log["key"]) < 0.06)
    back &= later < world.days * _DAY
    returned = {name: column[back] for name, column in log.items()}
    return returned | {
        "key": returned["key"] | (1 << 23),
        "event_ts": later[back],
        "event_type": np.full(back.sum(), RETURN),
        "amount": -returned["amount"],
        "quantity": -returned["quantity"],
    }


def _bots(world: World, draw: _Draw, people: Columns) -> Columns:
    """Crawlers that view one retail item after another at exact intervals, and bursts of 1,500 views or more in a
    minute.
    """
    user = people["user"][people["bot"]]
    burst = draw("burst", user) < 0.3
    count = np.where(burst, 1500 + 1500 * draw("views", user), 300 + 1200 * draw("views", user)).astype(np.int64)
    step = np.where(burst, 10_000 + 8_000 * draw("step", user), 1e6 * np.floor(2 + 20 * draw("step", user)))
    begin = draw("begin", user) * np.maximum(world.days - 1, 0.5) * _DAY
    owner, place = _repeated(count)
    jitter = np.where(burst[owner], draw("bjitter", (user[owner] << 24) | place) * 5_000, 0)
    event_ts = begin.astype(np.int64)[owner] + place * step.astype(np.int64)[owner] + jitter.astype(np.int64)
    ranks = world.ranks()[RETAIL]
    slot = (draw("bitem", (user[owner] << 24) | place) * TASTES * ranks).astype(np.int64)
    vertical = np.full(len(owner), RETAIL)
    city = people["city"][people["bot"]][owner]
    return {
        "key": (user[owner] << 24) | place,
        "user": user[owner],
        "vertical": vertical,
        "slot": slot,
        "generation": _generation(draw, vertical, slot, event_ts),
        "event_type": np.full(len(owner), VIEW),
        "event_ts": event_ts,
        "amount": np.full(len(owner), np.nan),
        "quantity": np.full(len(owner), np.nan),
        "city": city,
        "category": RETAIL * TASTES + slot // ranks,
        "where": people["home"][people["bot"]][owner],
        "basket": np.full(len(owner), -1),
    }


# ---- numbers → Arrow --------------------------------------------------------------------------------------

_KITCHENS = ("thai", "turkish", "indian", "italian", "brazilian", "chinese", "burger", "vegan")
_CATEGORIES = [
    *["trip"] * TASTES,
    *[_KITCHENS[n % 8] for n in range(TASTES)],
    *[f"aisle {n:02}" for n in range(TASTES)],
    *[f"department {n:02}" for n in range(TASTES)],
]
_DISTRICTS = [f"{zone.split('/')[1].lower()} {place + 1}" for zone in ZONES for place in range(PLACES)]
_HEX = np.array([f"{byte:02x}".encode() for byte in range(256)], "S2").view(np.uint16)


def _arrow(world: World, log: Columns) -> pa.RecordBatch:
    start = int(START.timestamp()) * 1_000_000
    salt = _Draw(world.seed).bits("ids", np.zeros(1))
    bought = log["basket"] >= 0
    baskets = _hex(_mix(log["basket"].astype(np.uint64) + salt + salt), 8)
    ids = _hex(_mix(log["key"].astype(np.uint64) + salt), 8)  # a bijection, so ids are unique
    if world.ids_by_time:
        ids = pc.binary_join_element_wise(_hex(log["event_ts"] + start, 8), ids, "")
    columns = {
        "event_id": ids,
        "user_id": _hex(log["user"], 4, b"u"),
        "item_id": _hex((log["slot"] << 8) | np.minimum(log["generation"], 255), 4, b"rfgs", log["vertical"]),
        "event_type": _words(TYPES, log["event_type"]),
        "event_ts": _times(log["event_ts"] + start),
        "vertical": _words(VERTICALS, log["vertical"]),
        "amount": pa.array(log["amount"], mask=np.isnan(log["amount"])),
        "quantity": pa.array(log["quantity"], mask=np.isnan(log["quantity"])),
        "time_zone": _words(ZONES, log["city"]),
        "category": _words(_CATEGORIES, log["category"]),
        "basket_id": pc.if_else(pa.array(bought), baskets, None),
        "district": _words(_DISTRICTS, log["where"]),
        "arrived_at": _times(log["arrived_at"] + start),
        "arrived": pa.array(((log["arrived_at"] + start) // _DAY).astype(np.int32)).view(pa.date32()),
    }
    return pa.RecordBatch.from_pydict(columns)


def _hex(numbers: NDArray[Any], width: int, prefix: bytes = b"", which: Ints | None = None) -> pa.Array:
    """Strings of equal length: a letter of `prefix` (the `which`-th, if any), then the numbers' low `width` bytes in
    hex.
    """
    raw = numbers.astype(">u8").view(np.uint8).reshape(-1, 8)[:, 8 - width :]
    text = np.ascontiguousarray(_HEX[raw]).view(np.uint8).reshape(-1, 2 * width)
    if prefix:
        letters = np.frombuffer(prefix, np.uint8)[np.zeros(len(text), np.int64) if which is None else which]
        text = np.concatenate([letters[:, None], text], axis=1)
    offsets = np.arange(len(text) + 1, dtype=np.int32) * text.shape[1]
    return pa.StringArray.from_buffers(len(text), pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(text)))


def _words(words: list[str] | tuple[str, ...], numbers: Ints) -> pa.Array:
    return pa.DictionaryArray.from_arrays(numbers.astype(np.int32), list(words)).dictionary_decode()


def _times(microseconds: Ints) -> pa.Array:
    return pa.array(microseconds).view(pa.timestamp("us", "UTC"))


# ---- the command ------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the log of a superapp; conf/sources/superapp.toml reads it.")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--events", type=float, help="approximate number of events, such as 1e8")
    size.add_argument("--users", type=float, help="number of users")
    parser.add_argument(
        "--days",
        type=int,
        default=60,
        help=f"days of the log, {MOST_DAYS} at most (default: 60, "
        "too few for a training without sequences.valid_from and test_from)",
    )
    parser.add_argument("--seed", type=int, default=1, help="a different seed gives a different log (default: 1)")
    parser.add_argument("--out", type=Path, required=True, help="output folder; its content is replaced")
    parser.add_argument(
        "--partitions", type=int, help="number of tasks, and therefore of files per day (default: four per core)"
    )
    arguments = parser.parse_args()
    if not 1 <= arguments.days <= MOST_DAYS:
        parser.error(
            f"--days is {arguments.days}: it goes from 1 to {MOST_DAYS}, since a task keeps a file open for each"
        )
    if arguments.events:
        world = World.of_events(int(arguments.events), arguments.days, arguments.seed)
    else:
        world = World(int(arguments.users), arguments.days, arguments.seed)

    from jobs.config import load_config  # noqa: PLC0415
    from jobs.spark_session import start_spark  # noqa: PLC0415

    spark = start_spark(load_config(None, ['spark.conf={"spark.ui.enabled"="false", "spark.driver.memory"="3g"}']))
    out = arguments.out.absolute()
    started = time.monotonic()
    rows, users = write(spark, world, out, arguments.partitions)
    seconds = time.monotonic() - started
    items = spark.read.parquet(f"file://{out}").agg(F.approx_count_distinct("item_id", 0.02)).collect()[0][0]
    files = list(out.rglob("*.parquet"))
    size_of_all = sum(file.stat().st_size for file in files)
    print(
        f"{out}: {rows:,} rows of {users:,} users with about {items:,} items, {size_of_all:,} bytes in {len(files):,} "
        f"files, {seconds:.1f} s ({rows / seconds:,.0f} rows/s)"
    )
    spark.stop()


if __name__ == "__main__":
    main()
