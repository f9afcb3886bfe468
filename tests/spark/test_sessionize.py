"""The sessions table through Spark: law 1 for any order, partitioning and batches; stable ids; what a batch touches."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import Mock
from urllib.parse import urlsplit

import pytest
from delta.tables import DeltaMergeBuilder, DeltaTable
from hypothesis import Phase, given, settings
from pyspark.sql import DataFrame, SparkSession

from jobs import sessionize
from jobs.config import SessionizeSettings
from jobs.errors import TrailvecError
from jobs.runtime import Runtime, Stage
from jobs.tables import CONTEXT_VALUES, EVENTS, FLAGGED_USERS, SESSIONS, Table
from tests import oracles
from tests.conftest import make_config, put
from tests.events import START, Row, full_logs, make_event, make_log, seeds, to_frame

GAPS = ("sessionize.gap_minutes=30", "sessionize.gap_minutes_by_vertical={rides = 60}")
DAY = 24 * 60  # minutes
ORACLE_GAPS = (timedelta(minutes=30), {"rides": timedelta(hours=1)})


def rows(frame: DataFrame) -> list[dict[str, Any]]:
    found = (r.asDict(recursive=True) for r in frame.collect())
    return sorted(found, key=lambda r: (r["session_id"], r["start_ts"], r["user_id"]))


def in_words(sessions: list[dict[str, Any]]) -> list[list[str]]:
    return sorted([e["event_id"] for e in s["events"]] for s in sessions)


def event(event_id: str, user_id: str, minutes: float, **values: Any) -> Row:
    times = {"event_ts": START + timedelta(minutes=minutes)}
    return make_event(event_id=event_id, user_id=user_id, item_id="i", **(times | values))


@pytest.fixture(scope="module", autouse=True)
def nobody_flagged(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An empty flags table, of which `Tables` takes a copy."""
    runtime = Runtime(make_config(tmp_path_factory.mktemp("flags")), spark)
    put(runtime, FLAGGED_USERS, spark.createDataFrame([], FLAGGED_USERS.schema()))
    Tables.nobody_flagged = runtime.path(FLAGGED_USERS)


class Tables:
    """The stage's tables under one root, changed as ingest and flag_users would, and inspected after each run."""

    nobody_flagged: ClassVar[str]

    def __init__(self, runtime: Runtime, events: list[Row] | None = None) -> None:
        self.runtime, self.spark = runtime, runtime.spark
        if events is not None:  # else the tables are there
            shutil.copytree(self.nobody_flagged, runtime.path(FLAGGED_USERS))
            put(runtime, EVENTS, to_frame(self.spark, events))

    def _commit(self, write: Callable[[Runtime], None]) -> None:
        self.runtime.execute(Stage("send", "", write, reads=(), writes=(), settings=()), force=True)

    def append(self, events: list[Row]) -> None:
        self._commit(lambda r: r.append(EVENTS, to_frame(self.spark, events)))

    def merge(self, events: list[Row], gone: list[str] | None = None) -> None:
        deletes = self.spark.createDataFrame([(g,) for g in gone or []], "event_id string")
        self._commit(lambda r: r.merge(EVENTS, to_frame(self.spark, events), deletes))

    def flag(self, on: list[str], off: list[str]) -> None:
        def frame(users: list[str]) -> DataFrame:
            flags = [(user, date(2023, 3, 25), "events_per_day", 1.0) for user in users]
            return self.spark.createDataFrame(flags, FLAGGED_USERS.schema())

        self._commit(lambda r: r.merge(FLAGGED_USERS, frame(on), frame(off)))

    def run(self) -> list[dict[str, Any]]:
        assert not self.runtime.execute(sessionize.STAGE).skipped
        return rows(self.runtime.latest(SESSIONS))

    def last_commit(self) -> dict[str, Any]:
        row = DeltaTable.forPath(self.spark, self.runtime.path(SESSIONS)).history(1).collect()[0]
        return {"operation": row["operation"], "version": row["version"]} | row["operationMetrics"]

    def changed_rows(self) -> dict[str, int]:
        """The last commit's row counts by kind."""
        metrics = self.last_commit()
        assert metrics["operation"] == "MERGE"
        return {kind: int(metrics[f"numTargetRows{kind}"]) for kind in ("Inserted", "Updated", "Deleted")}


Begun = Callable[[Runtime], Tables]


@pytest.fixture(scope="module")
def begun(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Begun:
    """Gives a runtime a copy of the tables after a first run: event e1 of user u, and its session."""
    first = Tables(Runtime(make_config(tmp_path_factory.mktemp("begun")), spark), [event("e1", "u", 0)])
    assert in_words(first.run()) == [["e1"]]

    def copy(runtime: Runtime) -> Tables:
        shutil.copytree(first.runtime.root, runtime.root)
        return Tables(runtime)

    return copy


@settings(max_examples=1)
@given(events=full_logs(80, logs=5), chance=seeds)
def test_order_and_partitioning_of_the_events_do_not_matter(
    spark: SparkSession, events: list[Row], chance: random.Random
) -> None:
    rules = SessionizeSettings(gap_minutes=30, gap_minutes_by_vertical={"rides": 60})
    shuffled = list(events)
    chance.shuffle(shuffled)
    first = rows(sessionize.sessionize(to_frame(spark, events, 1), rules))
    second = rows(sessionize.sessionize(to_frame(spark, shuffled, 3), rules))
    assert first == second
    assert in_words(first) == sorted([e["event_id"] for e in s] for s in oracles.sessions(events, *ORACLE_GAPS))


@pytest.mark.parametrize(("max_minutes", "max_events", "every"), [(None, 2, 1), (30, 10_000, 7)])
@settings(max_examples=1)
@given(events=full_logs(120))
def test_parting_the_users_with_many_events_changes_nothing(
    spark: SparkSession, events: list[Row], max_minutes: float | None, max_events: int, every: int
) -> None:
    rules = SessionizeSettings(gap_minutes_by_vertical={"rides": 60}, max_minutes=max_minutes, max_events=max_events)
    frame = to_frame(spark, events)
    splits = sessionize.find_splits(frame, rules, every)
    parted = sessionize.sessionize(frame, rules, splits)
    assert rows(parted) == rows(sessionize.sessionize(frame, rules))

    users = Counter(e["user_id"] for e in events)
    assert {s.user_id for s in splits} <= {user for user, count in users.items() if count > every}
    if every == 1:  # every session is its own part, except the first of a task
        assert len(splits) >= sum(users[s["user_id"]] > 1 for s in rows(parted)) - 2


def test_a_run_without_an_end_is_parted_too(spark: SparkSession) -> None:
    events = to_frame(spark, [event(f"e{n:03}", "u", n) for n in range(200)])
    rules = SessionizeSettings(max_events=7)
    splits = sessionize.find_splits(events, rules, 50)
    assert [s.event_id for s in splits] == ["e056", "e112", "e168"]
    parts = sessionize.sessionize(events, rules, splits).where("run_start_ts = timestamp'2023-03-25 22:00'")
    assert in_words(rows(parts)) == [[f"e{n:03}" for n in range(a, min(a + 7, 200))] for a in range(0, 200, 7)]
    numbers = events.select(sessionize._part(splits).alias("part")).groupBy("part").count().collect()
    assert {r["part"]: r["count"] for r in numbers} == {0: 56, 1: 56, 2: 56, 3: 32}


def test_so_many_users_may_be_parted_that_spark_could_not_walk_down_a_chain_of_them(spark: SparkSession) -> None:
    at = int(START.timestamp() * 1_000_000)
    splits = [sessionize.Split(f"u{n:04}", at, "e1", at) for n in range(1500)]
    events = [event("e0", "u0007", 0), event("e1", "u0007", 0), event("e1", "u1499", 0), event("e1", "v", 0)]
    found = to_frame(spark, events).select("user_id", "event_id", sessionize._part(splits).alias("part")).collect()
    assert sorted(map(tuple, found)) == [
        ("u0007", "e0", 7),
        ("u0007", "e1", 8),
        ("u1499", "e1", 1500),
        ("v", "e1", 0),
    ]


def test_users_of_many_events_are_found_in_a_table_of_many_files(make_runtime: Callable[..., Runtime]) -> None:
    # Sampling every second event finds 125 of this user's, above the threshold of 100; in half of the files only 62.
    runtime = make_runtime()
    frame = to_frame(runtime.spark, [event(f"e{n:03}", "u1", n) for n in range(250)])
    put(runtime, EVENTS, frame.repartitionByRange(10, "event_id"))
    assert len(runtime.latest(EVENTS).inputFiles()) == 10
    splits = sessionize.find_splits(runtime.latest(EVENTS), SessionizeSettings(max_events=50), 200)
    assert [split.event_id for split in splits] == ["e200"]


def test_a_session_keeps_its_id_when_the_other_users_change(spark: SparkSession) -> None:
    mine = [event(f"m{n}", "me", n) for n in range(3)]
    alone = rows(sessionize.sessionize(to_frame(spark, mine), SessionizeSettings()))
    together = rows(sessionize.sessionize(to_frame(spark, [event("o", "aa", 0), *mine]), SessionizeSettings()))
    assert alone == [s for s in together if s["user_id"] == "me"]
    assert len({s["session_id"] for s in together}) == 2


def test_the_settings_reach_the_rules(spark: SparkSession) -> None:
    # Every 20 minutes from 22:00 UTC on 25 March; midnight in Paris is at 23:00 UTC.
    events = to_frame(spark, [event(f"e{n}", "u", 20 * n, vertical="food" if n == 8 else "rides") for n in range(9)])

    def lengths(**rules: Any) -> list[int]:
        made = sessionize.sessionize(events, SessionizeSettings(**rules)).orderBy("start_ts")
        return [r["event_count"] for r in made.collect()]

    assert lengths(gap_minutes=20) == [9]
    assert lengths(gap_minutes=10, gap_minutes_by_vertical={"rides": 20}) == [9]
    assert lengths(gap_minutes=20, max_minutes=79.9) == [4, 4, 1]
    assert lengths(gap_minutes=20, max_events=5) == [5, 4]
    assert lengths(gap_minutes=20, midnight_of="Europe/Paris") == [3, 6]
    assert lengths(gap_minutes=20, cut_on_vertical=True) == [8, 1]


def test_the_stage_writes_once_and_then_is_up_to_date(
    make_runtime: Callable[..., Runtime], spark: SparkSession
) -> None:
    runtime = make_runtime()
    Tables(runtime, [event(f"e{n}", "u", 60 * n) for n in range(3)])

    runtime.execute(sessionize.STAGE)
    first = runtime.count_rows()
    runtime.execute(sessionize.STAGE)
    second = runtime.count_rows()
    read = {"events": 3, "flagged_users": 0}
    assert (first.skipped, first.rows_in, first.rows_out) == (False, read, {"sessions": 3})
    assert (second.skipped, second.rows_in, second.rows_out) == (True, {}, {})
    words = spark.createDataFrame([("vertical", "food", 2), ("category", "foood", 2)], CONTEXT_VALUES.schema())
    put(runtime, CONTEXT_VALUES, words)
    misspelt = "sessionize.gap_minutes_by_vertical={foood = 5, food = 61}"
    other_gap = make_runtime("sessionize.gap_minutes=61", misspelt)
    other_gap.execute(sessionize.STAGE)
    changed = other_gap.count_rows()
    assert (changed.skipped, changed.rows_out) == (False, {"sessions": 1})
    assert ["for foood" in note for note in changed.notes] == [True]

    written = runtime.last_writer(SESSIONS)
    assert written is not None
    assert written["stage"] == "sessionize"
    assert written["reads"] == {"events": 1, "flagged_users": 1}
    assert written["config"]["sessionize"]["gap_minutes"] == 61


def test_a_table_that_was_made_anew_is_another_one(
    make_runtime: Callable[..., Runtime], begun: Begun, spark: SparkSession
) -> None:
    """First with as many commits as before, then with one more: versions of two tables are not comparable."""
    runtime = make_runtime()
    tables = begun(runtime)
    for first, more in (("e2", []), ("e3", ["e4"])):
        shutil.rmtree(runtime.path(EVENTS))
        spark._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()  # type: ignore[union-attr]
        put(runtime, EVENTS, to_frame(spark, [event(first, "v", 0)]))
        for name in more:
            tables.append([event(name, "w", 60)])
        assert in_words(tables.run()) == [[first], *([name] for name in more)]


def test_sessions_that_somebody_else_changed_are_made_anew(
    make_runtime: Callable[..., Runtime], begun: Begun, spark: SparkSession
) -> None:
    runtime = make_runtime()
    tables = begun(runtime)
    version = runtime.latest_version(SESSIONS)
    tables.append([event("e2", "u", 600)])
    assert in_words(tables.run()) == [["e1"], ["e2"]]
    spark.sql(f"RESTORE TABLE {runtime.sql_name(SESSIONS)} TO VERSION AS OF {version}")
    assert in_words(tables.run()) == [["e1"], ["e2"]]
    spark.sql(f"OPTIMIZE {runtime.sql_name(SESSIONS)}")
    assert runtime.execute(sessionize.STAGE).skipped


# ---- batch by batch -------------------------------------------------------------------------------------


def batches(chance: random.Random, how: tuple[str, ...]) -> tuple[list[Row], list[list[Row]]]:
    """A log of many users and its batches, one for each of `how` they come: in any order, some events repeated, some
    wrong at first."""
    log = [
        e | {"event_id": f"{n}-{e['event_id']}", "user_id": f"{n}-{e['user_id']}"}
        for n in range(100)
        for e in make_log(chance, chance.randint(1, 24))
    ]
    sent: list[list[Row]] = [[] for _ in how]
    for e in log:
        number = chance.randrange(len(how))
        again = [n for n in range(number + 1, len(how)) if how[n] == "merge"]
        kind = chance.choice(["once", "once", "again", "wrong"] if again else ["once"])
        times = {"event_ts": e["event_ts"] + timedelta(minutes=chance.choice([-31, -1, 1, 45]))}
        sent[number].append(e | times | {"vertical": "retail"} if kind == "wrong" else e)
        if kind != "once":
            sent[chance.choice(again)].append(e)
    return log, sent


# No shrinking: with Spark it takes an hour.
@pytest.mark.parametrize(
    ("how", "max_minutes", "max_events", "midnight_of", "cut_on_vertical"),
    [
        (("append", "append", "merge"), 30, 10_000, "Europe/London", False),
        (("append", "merge"), None, 2, None, True),
    ],
)
@settings(max_examples=1, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(chance=seeds)
def test_law_1_any_split_into_batches_ends_in_the_sessions_of_one_batch(
    make_runtime: Callable[..., Runtime],
    tmp_path_factory: pytest.TempPathFactory,
    chance: random.Random,
    how: tuple[str, ...],
    max_minutes: float | None,
    max_events: int,
    midnight_of: str | None,
    cut_on_vertical: bool,
) -> None:
    log, sent = batches(chance, how)
    sets = [*GAPS, f"sessionize.max_events={max_events}"]
    sets += ["sessionize.cut_on_vertical=true"] if cut_on_vertical else []
    sets += [f"sessionize.max_minutes={max_minutes}"] if max_minutes else []
    sets += [f"sessionize.midnight_of={midnight_of}"] if midnight_of else []
    runtime = make_runtime(*sets, root=tmp_path_factory.mktemp("batches"))

    tables = Tables(runtime, sent[0])
    found = tables.run()
    for name, events in zip(how[1:], sent[1:], strict=True):
        tables.append(events) if name == "append" else tables.merge(events)
        found = tables.run()
        assert tables.last_commit()["operation"] == "MERGE"
    assert found == rows(sessionize.sessionize(to_frame(runtime.spark, log), runtime.config.sessionize))
    expected = oracles.sessions(
        log,
        *ORACLE_GAPS,
        max_length=timedelta.max if max_minutes is None else timedelta(minutes=max_minutes),
        max_events=max_events,
        midnight_of=midnight_of,
        cut_on_vertical=cut_on_vertical,
    )
    assert in_words(found) == sorted([e["event_id"] for e in s] for s in expected)


@pytest.fixture(scope="module")
def changing(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Sessions at first and after each change, and which rows each change concerned. No two tests share a user."""
    seen = SimpleNamespace(sessions=[], changed_rows=[])
    tables = Tables(
        Runtime(make_config(tmp_path_factory.mktemp("changing"), *GAPS), spark),
        [
            *(event(f"extended-{n}", "extended", 10 * n) for n in range(2)),
            *(event(f"joined-{n}", "joined", 60 * n) for n in range(2)),
            *(event(f"preceded-{n}", "preceded", 100 + n) for n in range(2)),
            # After a ride 50 minutes are allowed; a meal in between, after which only 30 are, splits the two.
            *(event(f"split-{n}", "split", 50 * n, vertical="rides") for n in range(2)),
            event("far-0", "far", 0),
            event("still-0", "still", 0),
            # 40 minutes after the meal are too many, 50 after the ride are not.
            event("rejoined-0", "rejoined", 0, vertical="rides"),
            event("rejoined-1", "rejoined", 10, vertical="food"),
            event("rejoined-2", "rejoined", 50),
            *(event(f"parted-{n}", "parted", 20 * n) for n in range(3)),
            event("only", "gone", 0),
            event("bot-0", "bot", 0),
            event("me-0", "me", 0),
            event("a", "ann", 0),
            event("x", "bob", 0),
        ],
    )
    seen.sessions.append(tables.run())

    tables.append(
        [
            event("extended-2", "extended", 40),
            event("joined-late", "joined", 30),
            event("preceded-late", "preceded", 70),
            event("split-late", "split", 10),
            event("far-late", "far", 30 + 1 / 60_000_000),
            *(event("b", "ann", minutes) for minutes in (9 * DAY + 115, 2 * DAY)),
            event("x", "ann", 3 * DAY),
        ]
    )
    tables.merge([], gone=["rejoined-1", "parted-1", "only"])
    tables.flag(["bot"], [])
    tables.append([event("bot-1", "bot", 10), event("me-1", "me", 10)])
    seen.sessions.append(tables.run())
    seen.changed_rows.append(tables.changed_rows())

    tables.append([event("bot-2", "bot", 100), event("b", "ann", 9 * DAY + 125), event("y", "bob", 5)])
    seen.sessions.append(tables.run())
    tables.flag([], ["bot"])
    seen.sessions.append(tables.run())
    seen.changed_rows.append(tables.changed_rows())

    tables.merge([event("still-0", "still", 0, item_name="another name")])
    with pytest.MonkeyPatch.context() as patch:
        seen.touch = Mock(wraps=tables.runtime.touch)
        patch.setattr(tables.runtime, "touch", seen.touch)
        seen.sessions.append(tables.run())
    seen.stage_version = tables.runtime.stage_version(SESSIONS)
    seen.last_commit, seen.last = tables.last_commit(), tables.runtime.execute(sessionize.STAGE)
    tables.runtime.execute(sessionize.STAGE, force=True)
    seen.anew = rows(tables.runtime.latest(SESSIONS))
    return seen


def of_users(sessions: list[dict[str, Any]], *users: str) -> list[list[str]]:
    return in_words([s for s in sessions if s["user_id"] in users])


def test_late_events_extend_join_split_and_precede_sessions(changing: SimpleNamespace) -> None:
    first, after, *_ = changing.sessions
    assert of_users(after, "extended", "far", "joined", "preceded", "split", "still") == [
        ["extended-0", "extended-1", "extended-2"],
        ["far-0"],
        ["far-late"],
        ["joined-0", "joined-late", "joined-1"],
        ["preceded-late", "preceded-0", "preceded-1"],
        ["split-0", "split-late"],
        ["split-1"],
        ["still-0"],
    ]
    before = {s["user_id"]: s["session_id"] for s in first}
    assert before["extended"] in {s["session_id"] for s in after}
    assert before["preceded"] not in {s["session_id"] for s in after}


def test_only_the_rows_that_a_change_reaches_are_changed(changing: SimpleNamespace) -> None:
    # preceded's session has another first event and so another id: it is deleted and inserted.
    updated = ("extended", "joined", "split", "rejoined", "parted", "me")
    deleted = ("joined", "preceded", "rejoined", "gone", "bot")
    inserted = ("preceded", "split", "far", "parted", "ann", "ann", "ann")
    assert changing.changed_rows == [
        {"Updated": len(updated), "Deleted": len(deleted), "Inserted": len(inserted)},
        {"Updated": 0, "Deleted": 0, "Inserted": 2},  # the bot's
    ]


def test_an_event_that_goes_can_join_part_and_end_sessions(changing: SimpleNamespace) -> None:
    first, after, *_ = changing.sessions
    assert of_users(first, "rejoined") == [["rejoined-0", "rejoined-1"], ["rejoined-2"]]
    assert of_users(after, "rejoined", "parted", "gone") == [["parted-0"], ["parted-2"], ["rejoined-0", "rejoined-2"]]


def test_a_flagged_user_is_left_out_from_then_on_and_comes_back_whole(changing: SimpleNamespace) -> None:
    first, flagged, still_flagged, back, _ = (of_users(found, "bot", "me") for found in changing.sessions)
    assert first == [["bot-0"], ["me-0"]]
    assert flagged == still_flagged == [["me-0", "me-1"]]
    assert back == [["bot-0", "bot-1"], ["bot-2"], ["me-0", "me-1"]]


def test_a_change_that_no_session_shows_rewrites_nothing(changing: SimpleNamespace) -> None:
    assert changing.sessions[-1] == changing.sessions[-2]
    assert {k: changing.last_commit[k] for k in ("operation", "numOutputRows")} == {
        "operation": "WRITE",
        "numOutputRows": "0",
    }
    assert changing.last.skipped
    assert changing.touch.call_args.kwargs == {"made_from": changing.stage_version}


def test_all_increments_end_in_the_rows_of_one_build(changing: SimpleNamespace) -> None:
    assert changing.sessions[-1] == changing.anew


def test_one_id_on_two_days_is_two_events(changing: SimpleNamespace) -> None:
    """As `ingest.duplicates = "same_day"` allows."""
    first, second, third, *_ = (of_users(found, "ann", "bob") for found in changing.sessions)
    assert first == [["a"], ["x"]]
    assert second == [["a"], ["b"], ["b"], ["x"], ["x"]]
    assert third == [["a"], ["b"], ["b", "b"], ["x"], ["x", "y"]]  # the newest b came after midnight


def test_a_late_event_moves_every_cut_of_a_run_that_goes_far_beyond_its_day(
    make_runtime: Callable[..., Runtime],
) -> None:
    tables = Tables(
        make_runtime(f"sessionize.gap_minutes={2 * DAY}", "sessionize.max_events=2"),
        [event(f"e{n:02}", "u", 1.5 * DAY * n) for n in range(40)],
    )
    assert in_words(tables.run())[0] == ["e00", "e01"]
    tables.append([event("late", "u", -1)])
    found = tables.run()
    assert in_words(found)[-1] == ["late", "e00"]
    assert in_words(found)[0] == ["e01", "e02"]
    assert {s["run_start_ts"] for s in found} == {START - timedelta(minutes=1)}
    assert len(found) == 21


class Early(Runtime):
    """A run that began before e8 arrived."""

    def incremental(self, table: Table, source: Table) -> DataFrame | None:
        rows = super().incremental(table, source)
        return rows.where("event_id != 'e8'") if source is EVENTS and rows is not None else rows


def test_of_two_runs_at_once_the_one_that_ends_later_is_refused(
    make_runtime: Callable[..., Runtime], begun: Begun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise e9 would be in two sessions: the early run's, and the one that begins with e8."""
    tables = begun(make_runtime())
    tables.append([event("e8", "u", 45), event("e9", "u", 60)])

    def meanwhile(written: Table, read: Table) -> DataFrame | None:
        changed = incremental(written, read)
        monkeypatch.setattr(tables.runtime, "incremental", incremental)
        Early(tables.runtime.config, tables.spark).execute(sessionize.STAGE)
        return changed

    incremental = tables.runtime.incremental
    monkeypatch.setattr(tables.runtime, "incremental", meanwhile)
    with pytest.raises(TrailvecError, match="another run changed table sessions"):
        tables.run()
    assert in_words(rows(tables.runtime.latest(SESSIONS))) == [["e1"], ["e9"]]

    # Between our last check and Delta's own: it sees no conflict, and inserts the new session a second time.
    tables.append([event("e20", "v", 0)])
    execute = DeltaMergeBuilder.execute

    def between(merge: DeltaMergeBuilder) -> DataFrame:
        monkeypatch.setattr(DeltaMergeBuilder, "execute", execute)
        Runtime(tables.runtime.config, tables.spark).execute(sessionize.STAGE)
        return execute(merge)

    monkeypatch.setattr(DeltaMergeBuilder, "execute", between)
    with pytest.raises(TrailvecError, match="the table has the rows of both"):
        tables.run()
    assert in_words(tables.run()) == [["e1"], ["e20"], ["e8", "e9"]]  # a full rebuild


def test_a_batch_leaves_the_files_of_other_days_and_the_rows_of_other_users_alone(
    make_runtime: Callable[..., Runtime],
) -> None:
    tables = Tables(make_runtime(*GAPS), [event(f"a{n}", f"a{n}", 0) for n in range(20)])
    tables.run()
    first_day = tables.runtime.latest(SESSIONS).inputFiles()
    tables.append([event(f"b{n}", f"b{n}", 5 * DAY) for n in range(20)])
    tables.run()
    tables.append([event("b3-late", "b3", 5 * DAY + 1)])
    for file in first_day:
        Path(urlsplit(file).path).unlink()  # any reader would fail
    tables.runtime.execute(sessionize.STAGE)

    assert tables.changed_rows() == {"Updated": 1, "Deleted": 0, "Inserted": 0}
    metrics = tables.last_commit()
    # The row is marked deleted in its file and rewritten in another; nothing else is.
    assert int(metrics["numTargetRowsCopied"]) == 0
    assert int(metrics["numTargetFilesRemoved"]) == 0
    assert int(metrics["numTargetDeletionVectorsAdded"]) == 1
