"""Bots and test accounts: each rule with numbers to check by hand, a plain-Python oracle, and law 1 for increments."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import random
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from delta.tables import DeltaTable
from deltalake import DeltaTable as DeltaTableFiles
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import DataFrame, SparkSession

from jobs import build_vocabulary, sessionize
from jobs.config import FlagUsersSettings, load_config
from jobs.errors import TrailvecError
from jobs.flag_users import STAGE, flag_users
from jobs.runtime import Runtime, Stage
from jobs.spark_session import spark_conf
from jobs.tables import EVENTS, FLAGGED_USERS, ITEMS, SESSIONS, Table
from scripts.bench.measure import Watch
from tests.conftest import add, make_config, put
from tests.events import Row, make_event, seeds, to_frame

NOON = datetime(2023, 3, 25, 12, 0)
OFF = dict.fromkeys(("events_per_minute", "events_per_day", "constant_interval_events"), 10**9)
Flags = dict[tuple[str, date, str], float]


def events_at(user: str, times: Iterable[datetime]) -> list[Row]:
    return [make_event(event_id=f"{user}-{n}", user_id=user, item_id="i", event_ts=t) for n, t in enumerate(times)]


def seconds(*later: float) -> list[datetime]:
    return [NOON + timedelta(seconds=s) for s in later]


def flags(rows: DataFrame) -> Flags:
    found = [((r.user_id, r.day, r.rule), r.value) for r in rows.collect()]
    assert len(dict(found)) == len(found)
    return dict(found)


def by_rule(spark: SparkSession, events: list[Row], **rules: object) -> dict[str, float]:
    """What one rule alone measured, by user; asserts that the day is NOON's."""
    found = flags(flag_users(to_frame(spark, events), FlagUsersSettings.model_validate(OFF | rules)))
    assert {day for _, day, _ in found} <= {NOON.date()}
    return {user: value for (user, _, _), value in found.items()}


# ---- each rule by hand ------------------------------------------------------------------------------------


def test_more_events_in_one_clock_minute(spark: SparkSession) -> None:
    events = [
        *events_at("four", seconds(0, 10, 20, 59.999999)),
        *events_at("three", seconds(0, 10, 20)),
        *events_at("two minutes", seconds(58, 59, 60, 61)),  # four in three seconds, but two per clock minute
        *events_at("five then four", seconds(0, 1, 2, 3, 4, 60, 61, 62, 63)),
    ]
    assert by_rule(spark, events, events_per_minute=3) == {"four": 4, "five then four": 5}


def test_more_events_in_one_day_of_utc(spark: SparkSession) -> None:
    midnight = datetime(2023, 3, 25)
    last = timedelta(hours=24) - timedelta(microseconds=1)
    events = [
        *events_at("first to last moment", [midnight, midnight, midnight + last]),
        *events_at("two", [midnight, midnight + last]),
        *events_at("over midnight", [midnight - timedelta(microseconds=1), midnight, midnight + last]),
    ]
    assert by_rule(spark, events, events_per_day=2) == {"first to last moment": 3}


def test_four_events_in_step(spark: SparkSession) -> None:
    cases: dict[str, tuple[list[datetime], int | None]] = {
        "four": (seconds(0, 5, 10, 15), 4),
        "three": (seconds(0, 5, 10), None),
        "5 5 6 5 5": (seconds(0, 5, 10, 16, 21, 26), None),
        "begins and ends inside the day": (seconds(0, 1, 6, 11, 16, 17), 4),
        "the longer of two; its first event ends the other": (seconds(0, 5, 10, 15, 17, 19, 21, 23, 40), 5),
        "two simultaneous events break a series": (seconds(0, 5, 5, 10, 15), None),
        "a basket": (seconds(0, 0, 0, 0, 0), None),
        "intervals of 5,000.0, 5,000.4 and 5,000.3 ms": (seconds(0, 5, 10.0004, 15.0007), 4),
        "intervals of 5,000.0, 5,000.6 and 5,000.6 ms": (seconds(0, 5, 10.0006, 15.0012), None),
        "intervals below half a millisecond": (seconds(0, 0.0004, 0.0008, 0.0012, 0.0016), None),
        "midnight ends a series": (
            [datetime(2023, 3, 26) + timedelta(seconds=s) for s in (-99, -30, -20, -10, 0, 10, 20, 99)],
            None,
        ),
    }
    found = by_rule(
        spark, [e for u, (times, _) in cases.items() for e in events_at(u, times)], constant_interval_events=4
    )
    assert found == {user: in_step for user, (_, in_step) in cases.items() if in_step}


def test_test_accounts_match_a_like_pattern_with_each_days_events(spark: SparkSession) -> None:
    names = ("qa-1", "aqa-1", "load_test", "loadXtest", "QA-1")
    events = [e for name in names for e in events_at(name, seconds(0, 1))]
    events += events_at("qa-1 ", [NOON + timedelta(days=1)])
    rules = FlagUsersSettings.model_validate(OFF | {"test_accounts": ["qa-%", r"load\_test"]})
    assert flags(flag_users(to_frame(spark, events), rules)) == {
        ("qa-1", NOON.date(), "test_account"): 2,
        ("load_test", NOON.date(), "test_account"): 2,
        ("qa-1 ", NOON.date() + timedelta(days=1), "test_account"): 1,
    }


@pytest.mark.parametrize("pattern", ["qa-\\\\", "\\\\d+", ""])
def test_a_pattern_that_spark_would_not_take_is_refused_at_once(pattern: str) -> None:
    with pytest.raises(TrailvecError, match=r"flag_users\.test_accounts\.0: found .* a backslash only before"):
        load_config(None, [f'flag_users.test_accounts=["{pattern}"]'])


def test_one_day_may_break_every_rule_and_none_need_hold(spark: SparkSession) -> None:
    events = events_at("bot", seconds(*range(5)))
    rules = {"events_per_minute": 3, "events_per_day": 4, "constant_interval_events": 5, "test_accounts": ["b%"]}
    found = flags(flag_users(to_frame(spark, events), FlagUsersSettings.model_validate(rules)))
    assert {rule: value for (_, _, rule), value in found.items()} == {
        "events_per_minute": 5,
        "events_per_day": 5,
        "constant_interval": 5,
        "test_account": 5,
    }
    assert by_rule(spark, events) == {}


# ---- all rules against plain Python -----------------------------------------------------------------------


def oracle(events: list[Row], rules: FlagUsersSettings) -> Flags:
    days = defaultdict(list)
    for event in events:
        days[event["user_id"], event["event_ts"].date()].append(event["event_ts"])
    found: Flags = {}
    for (user, day), times in days.items():
        times.sort()
        gaps = [round((b - a) / timedelta(milliseconds=1)) for a, b in itertools.pairwise(times)]
        series = [1 + len(list(group)) for gap, group in itertools.groupby(gaps) if gap]
        minutes = Counter(time.replace(second=0, microsecond=0) for time in times)
        busiest, in_step = max(minutes.values()), max(series, default=1)
        if busiest > rules.events_per_minute:
            found[user, day, "events_per_minute"] = busiest
        if len(times) > rules.events_per_day:
            found[user, day, "events_per_day"] = len(times)
        if in_step >= rules.constant_interval_events:
            found[user, day, "constant_interval"] = in_step
        if user == "u0" and rules.test_accounts:
            found[user, day, "test_account"] = len(times)
    return found


# Steps in microseconds: zero, a millisecond, seconds in step, a minute, and past midnight.
_STEPS = [0, 1_000, 10_000_000, 10_000_000, 10_000_000, 60_000_000, 5 * 3_600_000_000]


def busy_log(chance: random.Random, users: int = 3) -> list[Row]:
    events = []
    for user in (f"u{n}" for n in range(users)):
        steps = chance.choices(_STEPS, k=chance.randint(1, 25))
        times = [NOON + timedelta(microseconds=us) for us in itertools.accumulate(steps)]
        events += events_at(user, times)
    chance.shuffle(events)
    return events


all_rules = st.builds(
    FlagUsersSettings,
    events_per_minute=st.integers(1, 4) | st.just(10**9),
    events_per_day=st.integers(1, 12) | st.just(10**9),
    constant_interval_events=st.integers(3, 5) | st.just(10**9),
    test_accounts=st.sampled_from([["_0"], []]),
)


@settings(max_examples=7)
@given(events=seeds.map(busy_log), rules=all_rules, partitions=st.integers(1, 3))
def test_the_rows_are_those_of_plain_python(
    spark: SparkSession, events: list[Row], rules: FlagUsersSettings, partitions: int
) -> None:
    assert flags(flag_users(to_frame(spark, events, partitions), rules)) == oracle(events, rules)


# ---- the stage --------------------------------------------------------------------------------------------

RULES = (
    "flag_users.events_per_minute=3",
    "flag_users.events_per_day=12",
    "flag_users.constant_interval_events=4",
)
BOT, OTHER = events_at("bot", seconds(0, 1, 2, 3, 4)), events_at("other", seconds(0, 1, 2, 3))
KEPT = {("other", NOON.date(), rule): 4.0 for rule in ("events_per_minute", "constant_interval")}
CAUGHT = {("bot", NOON.date(), rule): 4.0 for rule in ("events_per_minute", "constant_interval")}


def change(runtime: Runtime, rows: DataFrame, deletes: DataFrame | None = None) -> None:
    """Upserts rows into events and deletes from it, as another stage would."""
    stage = Stage("change", "", lambda r: r.merge(EVENTS, rows, deletes), reads=(), writes=(), settings=())
    runtime.execute(stage, force=True)


@pytest.fixture(scope="module")
def filled(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One event of `bot`, and four of `other`, who is flagged."""
    runtime = Runtime(make_config(tmp_path_factory.mktemp("filled"), *RULES), spark)
    put(runtime, EVENTS, to_frame(spark, BOT[:1] + OTHER))
    assert not runtime.execute(STAGE).skipped
    assert flags(runtime.latest(FLAGGED_USERS)) == KEPT
    return runtime.root


@pytest.fixture
def flagged(filled: Path, make_runtime: Callable[..., Runtime]) -> Runtime:
    """A copy of `filled`."""
    runtime = make_runtime(*RULES)
    shutil.copytree(filled, runtime.root)
    return runtime


def latest_commit(runtime: Runtime) -> Row:
    history = DeltaTable.forPath(runtime.spark, runtime.path(FLAGGED_USERS)).history(1)
    return dict(history.select("version", "operation", "operationMetrics").collect()[0].asDict())


@settings(max_examples=1)
@given(chance=seeds)
def test_any_split_of_the_log_ends_in_the_rows_of_one_batch(
    make_runtime: Callable[..., Runtime],
    spark: SparkSession,
    tmp_path_factory: pytest.TempPathFactory,
    chance: random.Random,
) -> None:
    runtime = make_runtime(*RULES, root=tmp_path_factory.mktemp("split"))
    events, doubled = busy_log(chance, users=6), chance.randint(0, 40)
    edges = [0, *sorted(chance.choices(range(len(events)), k=2)), len(events)]
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        again = events[max(0, start - doubled) : stop]  # with events that are already there
        if number == 0:
            put(runtime, EVENTS, to_frame(spark, again))
        else:
            change(runtime, to_frame(spark, again))
        runtime.execute(STAGE)
    assert flags(runtime.latest(FLAGGED_USERS)) == oracle(events, runtime.config.flag_users)


def test_a_flag_comes_changes_and_goes_with_the_events(flagged: Runtime, spark: SparkSession) -> None:
    assert flagged.execute(STAGE).skipped
    add(flagged, EVENTS, to_frame(spark, BOT[1:4]))  # late events: flagged
    flagged.execute(STAGE)
    assert flags(flagged.latest(FLAGGED_USERS)) == KEPT | CAUGHT
    commit = latest_commit(flagged)
    assert (commit["operation"], commit["operationMetrics"]["numTargetRowsInserted"]) == ("MERGE", "2")
    assert commit["operationMetrics"]["numTargetRowsUpdated"] == "0"  # other's rows are unchanged

    add(flagged, EVENTS, to_frame(spark, BOT[4:]))  # one more: the measured value grows
    flagged.execute(STAGE)
    assert flags(flagged.latest(FLAGGED_USERS)) == KEPT | dict.fromkeys(CAUGHT, 5.0)
    assert latest_commit(flagged)["operationMetrics"]["numTargetRowsUpdated"] == "2"

    # An update, by which two events are of another day, and a deletion.
    corrected = [event | {"event_ts": NOON + timedelta(days=1)} for event in BOT[3:]]
    change(flagged, to_frame(spark, corrected), to_frame(spark, OTHER[1:2]))
    flagged.execute(STAGE)
    assert flags(flagged.latest(FLAGGED_USERS)) == {}


def test_what_changes_no_flag_is_recorded_without_a_row(flagged: Runtime, spark: SparkSession) -> None:
    before = latest_commit(flagged)["version"]
    quiet = [*events_at("quiet", seconds(0)), *events_at("other", seconds(0, 1, 2, 3, 1000))[4:]]
    add(flagged, EVENTS, to_frame(spark, quiet))
    newer = dataclasses.replace(STAGE, inputs=lambda runtime: {"code": "newer"})  # with events unchanged
    for stage in (STAGE, newer):
        assert not flagged.execute(stage).skipped
        assert flagged.execute(stage).skipped
    assert latest_commit(flagged)["version"] == before + 2
    changes = spark.read.format("delta").option("readChangeFeed", "true").option("startingVersion", before + 1)
    assert changes.load(flagged.path(FLAGGED_USERS)).count() == 0


class Early(Runtime):
    """A run that began before the bot's last event arrived."""

    def read(self, table: Table) -> DataFrame:
        rows = super().read(table)
        return rows.where("event_id != 'bot-4'") if table is EVENTS else rows


def test_of_two_runs_at_once_the_one_that_ends_later_is_refused(
    flagged: Runtime, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(flagged, EVENTS, to_frame(spark, BOT[1:]))

    def meanwhile(written: Table, read: Table) -> DataFrame | None:
        changes = incremental(written, read)
        monkeypatch.setattr(flagged, "incremental", incremental)
        Early(flagged.config, spark).execute(STAGE)
        return changes

    incremental = flagged.incremental
    monkeypatch.setattr(flagged, "incremental", meanwhile)
    with pytest.raises(TrailvecError, match="another run changed table flagged_users"):
        flagged.execute(STAGE)
    assert flags(flagged.latest(FLAGGED_USERS)) == KEPT | CAUGHT  # from the run that finished


def test_nothing_changed_is_not_noted_over_older_rows_that_another_run_wrote_meanwhile(
    flagged: Runtime, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Runtime(flagged.config, spark)
    write, append = flagged.write, other.append

    def last(*rows_without_the_bot: Any) -> None:
        def meanwhile(*given: Any, **more: Any) -> None:
            monkeypatch.setattr(other, "append", append)
            write(*rows_without_the_bot)
            append(*given, **more)

        add(flagged, EVENTS, to_frame(spark, BOT[1:4]))
        other.execute(STAGE)
        add(flagged, EVENTS, to_frame(spark, events_at("quiet", seconds(0))))
        monkeypatch.setattr(other, "append", meanwhile)
        with pytest.raises(TrailvecError, match="flagged_users just as this one noted that nothing had changed"):
            other.execute(STAGE)

    monkeypatch.setattr(flagged, "write", last)
    flagged.execute(STAGE, force=True)
    assert flags(flagged.latest(FLAGGED_USERS)) == KEPT
    other.execute(STAGE)
    assert flags(other.latest(FLAGGED_USERS)) == KEPT | CAUGHT


def test_other_rules_make_all_rows_anew(
    flagged: Runtime, make_runtime: Callable[..., Runtime], spark: SparkSession
) -> None:
    laxer = make_runtime(*RULES, "flag_users.events_per_minute=4")
    laxer.execute(STAGE)
    assert flags(laxer.latest(FLAGGED_USERS)) == {("other", NOON.date(), "constant_interval"): 4.0}


# ---- what it costs ----------------------------------------------------------------------------------------


def test_a_full_build_shuffles_the_log_once(flagged: Runtime) -> None:
    built = flag_users(flagged.latest(EVENTS), FlagUsersSettings())
    built.collect()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        built.explain()
    final = said.getvalue().partition("== Initial Plan ==")[0]
    assert "isFinalPlan=true" in final
    assert re.findall(r"^\W*(?:\*\(\d+\) )?(\w*Exchange)\b", final, re.MULTILINE) == ["Exchange", "ReusedExchange"]


def test_an_increment_reads_only_the_files_of_the_days_touched(
    make_runtime: Callable[..., Runtime], spark: SparkSession
) -> None:
    runtime = make_runtime(*RULES)
    put(runtime, EVENTS, to_frame(spark, events_at("bot", seconds(0, 1, 2, 3))))
    for days in (1, 2):
        add(runtime, EVENTS, to_frame(spark, events_at(f"u{days}", [t + timedelta(days=days) for t in seconds(0, 1)])))
    runtime.execute(STAGE)
    add(runtime, EVENTS, to_frame(spark, events_at("late", [t + timedelta(days=1) for t in seconds(0, 1, 2, 3)])))
    files = [Path(f.removeprefix("file://")) for f in DeltaTableFiles(runtime.path(EVENTS)).file_uris()]
    others = [f for f in files if {r["event_ts"].day for r in pq.read_table(f).to_pylist()} != {26}]
    assert (len(files), len(others)) == (4, 2)
    for file in others:
        file.unlink()  # any reader would fail
    runtime.execute(STAGE)
    found = flags(runtime.latest(FLAGGED_USERS))
    assert {(user, day.day) for user, day, _ in found} == {("bot", 25), ("late", 26)}


def test_no_event_is_shuffled_to_find_the_users_who_are_flagged(
    make_runtime: Callable[..., Runtime], spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spark judges by the rows, of which a bot has one a day: here as if all tables were large."""
    sets = ['sequences.valid_from="2023-03-25T12:00:00"', 'sequences.test_from="2023-03-25T12:00:01"']
    runtime = make_runtime(*sets, "vocabulary.min_count=1")
    log = [event for n in range(300) for event in events_at(f"u{n}", seconds(*range(10)))]
    random.Random(2).shuffle(log)
    put(runtime, EVENTS, to_frame(spark, log))
    days = [(user, date(2023, 3, 25) + timedelta(days=n), "test_account", 1.0) for user in ("u1", "u2") for n in (0, 1)]
    put(runtime, FLAGGED_USERS, spark.createDataFrame(days, FLAGGED_USERS.schema()))
    shuffled, joined = [], []
    cut, anew = sessionize.sessionize, build_vocabulary.to_describe_anew

    def broadcasts(rows: DataFrame) -> int:
        return str(rows._jdf.queryExecution().sparkPlan()).count("BroadcastHashJoin")

    def noting_cut(events: DataFrame, *rest: Any) -> DataFrame:
        joined.append(broadcasts(events))
        return cut(events, *rest)

    def noting_anew(items: DataFrame, changes: DataFrame, of_turned: list[DataFrame]) -> DataFrame:
        joined.extend(map(broadcasts, of_turned))
        return anew(items, changes, of_turned)

    monkeypatch.setattr(sessionize, "sessionize", noting_cut)
    monkeypatch.setattr(build_vocabulary, "to_describe_anew", noting_anew)

    def run() -> None:
        for stage in (sessionize.STAGE, build_vocabulary.STAGE):
            with Watch(spark) as watch, spark_conf(spark, {"spark.sql.autoBroadcastJoinThreshold": "-1"}):
                assert not runtime.execute(stage).skipped
            shuffled.append(watch.shuffled_mb)

    run()
    assert {row.user_id for row in runtime.latest(SESSIONS).collect()} == {f"u{n}" for n in range(300)} - {"u1", "u2"}
    DeltaTable.forPath(spark, runtime.path(FLAGGED_USERS)).delete("user_id = 'u1'")
    add(runtime, FLAGGED_USERS, spark.createDataFrame([("u3", *days[0][1:])], FLAGGED_USERS.schema()))
    add(
        runtime,
        EVENTS,
        to_frame(spark, [event | {"event_id": "late", "item_id": "new"} for event in events_at("u4", seconds(11))]),
    )
    monkeypatch.setattr("jobs.flag_users.FEW", 0)  # more rows than are broadcast without counting the users
    run()
    assert {row.user_id for row in runtime.latest(SESSIONS).collect()} == {f"u{n}" for n in range(300)} - {"u2", "u3"}
    counts = {row.item_id: row.event_count for row in runtime.latest(ITEMS).collect()}
    assert sum(counts.values()) == 298 * 10 + 1
    # All events; those of who is no longer flagged, twice (these among all who are not), and of who is flagged now.
    assert joined == [1, 1, 2, 1]
    once, by_vocabulary, *_ = shuffled  # sessionize's own shuffle of the log, by user
    assert by_vocabulary < 0.5 * once, shuffled
