"""Sequences against the plain-Python oracle, for both ways of splitting; and law 4 from the outside."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from delta.tables import DeltaTable
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs import build_sequences, build_vocabulary, sessionize, train
from jobs.config import SequencesSettings, SessionizeSettings
from jobs.errors import TrailvecError
from jobs.runtime import Runtime, Stage
from jobs.splits import Cuts, cut_times, log_end, noted_cuts
from jobs.tables import CONTEXT_VALUES, EVENTS, FLAGGED_USERS, ITEMS, SEQUENCES, SESSIONS, Table, conform
from jobs.train import rows_since, training_files
from tests import oracles
from tests.conftest import add, make_config, put
from tests.events import START, Row, full_logs, make_event, seeds, to_frame
from training.batches import UNKNOWN

VALID_FROM, TEST_FROM = datetime(2023, 3, 26, 1, 30), datetime(2023, 3, 27, 12)
CUTS = [f'sequences.{name}="{t.isoformat()}"' for name, t in (("valid_from", VALID_FROM), ("test_from", TEST_FROM))]
STAGES = (sessionize.STAGE, build_vocabulary.STAGE, build_sequences.STAGE)


def run(runtime: Runtime, events: list[Row], partitions: int = 1) -> dict[tuple[str, str, int], Row]:
    put(runtime, EVENTS, to_frame(runtime.spark, events, partitions))
    runtime.create(FLAGGED_USERS)
    for stage in STAGES:
        runtime.execute(stage)
    return {(r.user_id, r.split, r.part): r.asDict() for r in runtime.latest(SEQUENCES).collect()}


@pytest.mark.parametrize("leave_one_out", [False, True])
@settings(max_examples=1)
@given(events=full_logs(60, logs=2), partitions=st.integers(1, 3))
def test_equals_the_plain_python_sequences(
    spark: SparkSession, events: list[Row], leave_one_out: bool, partitions: int
) -> None:
    # The cut times must lie within the log, whatever was drawn.
    events = [*events, make_event(event_id="last", user_id="last", item_id="i0", event_ts=START + timedelta(days=9))]
    rules = SequencesSettings(
        valid_from=VALID_FROM,
        test_from=TEST_FROM,
        split_by="leave_one_out" if leave_one_out else "time",
        max_length=4,
        max_parts=2,
        seen_days=1,
        target_event_types=["purchase"],
    )
    counts = Counter(e["item_id"] for e in _training_events(events, leave_one_out))
    numbers = {item: 2 + n for n, item in enumerate(sorted({e["item_id"] for e in events}))}
    values = {
        kind: {value: 2 + n for n, value in enumerate(sorted({e[kind] for e in events}))}
        for kind in ("vertical", "event_type")
    }
    items_frame = spark.createDataFrame(
        [(item, number, counts[item]) for item, number in numbers.items()],
        "item_id string, item_index int, train_count long",
    )
    values_frame = spark.createDataFrame(
        [(kind, value, number) for kind, of_kind in values.items() for value, number in of_kind.items()],
        "kind string, value string, value_index int",
    )
    sessions = sessionize.sessionize(to_frame(spark, events, partitions), SessionizeSettings())
    actions = build_sequences.number_actions(sessions, build_sequences.in_vocabulary(items_frame, 2), values_frame)
    cuts = cut_times(log_end(to_frame(spark, events)), rules)
    rows = build_sequences.build_sequences(actions, cuts, rules).collect()
    found = {(r.user_id, r.split, r.part): r.asDict() for r in rows}

    known = {item: numbers[item] for item, count in counts.items() if count >= 2}
    expected = oracles.sequences(
        oracles.actions(events, known, values["vertical"], values["event_type"], ["purchase"]),
        valid_from=VALID_FROM,
        test_from=TEST_FROM,
        max_length=4,
        max_parts=2,
        seen_days=1,
        leave_one_out=leave_one_out,
    )
    assert len(rows) == len(found)
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        assert {name: found[key][name] for name in row} == row, key


def test_the_logs_end_is_looked_for_after_the_one_that_is_known(spark: SparkSession, tmp_path: Path) -> None:
    """Older files are not opened: here they have been deleted. If all that is newer is gone, they are."""
    table, newest = tmp_path / "log", TEST_FROM + timedelta(days=3)
    for day in (VALID_FROM, newest):
        row = make_event(event_id=str(day), user_id="u", item_id="i", event_ts=day)
        to_frame(spark, [row]).write.format("delta").mode("append").save(str(table))
        if day == VALID_FROM:
            early = list(table.glob("*.parquet"))
    beyond = Cuts(VALID_FROM, TEST_FROM, end=newest + timedelta(days=1))
    assert log_end(spark.read.format("delta").load(str(table)), since=beyond) == newest + timedelta(microseconds=1)
    for file in early:
        file.unlink()
    log = spark.read.format("delta").load(str(table))
    known = Cuts(VALID_FROM, TEST_FROM, end=newest + timedelta(microseconds=1))
    assert log_end(log, since=known) == known.end
    at_once = SequencesSettings(valid_from=TEST_FROM, test_from=TEST_FROM)  # which leaves nothing to validate on
    assert cut_times(known.end, at_once).test_from == TEST_FROM


def _training_events(events: list[Row], leave_one_out: bool) -> list[Row]:
    if not leave_one_out:
        return [e for e in events if e["event_ts"] < VALID_FROM]
    kept: list[Row] = []
    for user in {e["user_id"] for e in events}:
        kept += oracles.in_order([e for e in events if e["user_id"] == user])[:-2]
    return kept


@settings(max_examples=1, phases=[Phase.generate])
@given(events=full_logs(50, logs=2), chance=seeds)
def test_increments_of_leave_one_out_end_in_the_same_rows_as_one_build(
    spark: SparkSession,
    make_runtime: Callable[..., Runtime],
    tmp_path_factory: pytest.TempPathFactory,
    events: list[Row],
    chance: random.Random,
) -> None:
    """Law 1: batches in any order, with late ones; items enter the training window's vocabulary along the way. By time,
    `grown` shows it."""
    sets = [
        *CUTS,
        'sequences.split_by="leave_one_out"',
        *("sequences.max_length=4", "sequences.max_parts=2", "sequences.seen_days=1", "vocabulary.min_count=2"),
    ]
    runtime = make_runtime(*sets, root=tmp_path_factory.mktemp("increments"))
    # The cut times must lie within the log from the first batch on.
    last = make_event(event_id="last", user_id="last", item_id="i0", event_ts=START + timedelta(days=9))
    chance.shuffle(events)
    runtime.create(FLAGGED_USERS)
    for batch in ([last, *events[::2]], events[1::2]):
        add(runtime, EVENTS, to_frame(spark, batch))
        for stage in STAGES:
            runtime.execute(stage)
    history = DeltaTable.forPath(spark, runtime.path(SEQUENCES)).history().collect()
    assert [h.operationParameters.get("mode") for h in history].count("Overwrite") == 1  # all others were increments
    by_increments = _rows(runtime)
    runtime.execute(build_sequences.STAGE, force=True)
    assert by_increments == _rows(runtime)


def _rows(runtime: Runtime) -> dict[tuple[str, str, int], Row]:
    rows = runtime.latest(SEQUENCES).collect()
    found = {(r.user_id, r.split, r.part): r.asDict() for r in rows}
    assert len(found) == len(rows)
    return found


def test_row_groups_are_small_whatever_the_logs_size(
    make_runtime: Callable[..., Runtime], spark: SparkSession, tmp_path: Path
) -> None:
    runtime = make_runtime("train.warm_length=256")
    # Incompressible numbers: 8 kB per row. The MERGE updates half of the rows and inserts as many others.
    numbers = np.random.default_rng(1).integers(1, 2**31, (1500, 256), np.int32)
    rows_of = pa.table({"user_id": [f"u{n}" for n in range(1500)], "numbers": list(numbers)})
    pq.write_table(rows_of, tmp_path / "large.parquet")
    lists = {c.name: F.col("numbers") for c in SEQUENCES.columns if c.type == "array<int>"}
    fixed = {"split": "train", "part": 0, "as_of": START, "last_ts": START, "length": 256, "target_ts": None}
    large = spark.read.parquet(str(tmp_path / "large.parquet")).coalesce(1)
    large = conform(large.withColumns(lists | {n: F.lit(v) for n, v in fixed.items()}), SEQUENCES)

    def check_row_groups(footers: list[Any]) -> None:
        sizes = [f.row_group(n).total_byte_size for f in footers for n in range(f.num_row_groups)]
        assert sum(sizes) > 8e6
        assert max(sizes) < 5e6

    put(runtime, SEQUENCES, large.where("user_id < 'u6'"))
    check_row_groups(train_footers(runtime))
    merge = Stage("merge", "", lambda r: r.merge(SEQUENCES, large.where("user_id > 'u3'")), (), (), ())
    runtime.execute(merge, force=True)
    check_row_groups(train_footers(runtime))
    base = {"as_of": START, "model_version": "m"}
    check_row_groups(train_footers(runtime, lambda r: {"train": rows_since(r, base, tmp_path / "rows")}))


def train_footers(runtime: Runtime, files: Callable[[Runtime], dict[str, list[str]]] = training_files) -> list[Any]:
    """Parquet footers of the files that a training would read now."""
    found: dict[str, list[str]] = {}
    stage = Stage("look", "", lambda r: found.update(files(r)), reads=(SEQUENCES,), writes=(), settings=())
    runtime.execute(stage)
    return [pq.read_metadata(url.removeprefix("file://")) for url in found["train"]]


def acts(user: str, at: datetime, item: str = "i") -> Row:
    return make_event(event_id=f"{user} {at.isoformat()}", user_id=user, item_id=item, event_ts=at)


def hour(hours: float) -> datetime:
    return START + timedelta(hours=hours)


def around(cut: datetime) -> list[datetime]:
    return [cut + timedelta(microseconds=micros) for micros in (-2, -1, 0, 1)]


HISTORY = [
    *[acts(user, hour(at)) for user in ("after", "between", "before", "flagged") for at in (0, 1, 20, 50)],
    *[acts(f"of-some-{n % 2}", START + timedelta(minutes=n), f"i{n % 3}") for n in range(6)],
    *(acts("ann", hour(1), "rare"), acts("ann", hour(2)), acts("bob", hour(3)), acts("of-some-0", hour(1.5), "scarce")),
    *(acts("edge-valid", at) for at in around(VALID_FROM)),
    *(acts("edge-test", at) for at in around(TEST_FROM)),
    acts("last", START + timedelta(days=9)),
]
AFTER_VALID = [acts(f"of-some-{n % 2}", START + timedelta(days=1 + n), f"a{n % 3}") for n in range(6)]
AFTER_VALID += [acts(f"of-some-{n}", VALID_FROM, "scarce") for n in range(2)]  # often enough, but not in training


@pytest.fixture(scope="module")
def grown(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A lake and its increments, what was observed after each, and what a training would read then."""
    sets = [*CUTS, "vocabulary.min_count=2", "sequences.rows_per_file=3"]
    seen = SimpleNamespace(runtime=Runtime(make_config(tmp_path_factory.mktemp("grown"), *sets), spark))
    seen.rows, seen.splits, seen.operations, seen.versions = [run(seen.runtime, HISTORY)], [], [], []
    runtime, seen.files = seen.runtime, [train_footers(seen.runtime)]

    def increment(events: list[Row], stages: tuple[Stage, ...]) -> None:
        if events:
            add(runtime, EVENTS, to_frame(spark, events))
        before = runtime.latest_version(SEQUENCES)
        for stage in stages:
            runtime.execute(stage)
        seen.versions.append((before, runtime.latest_version(SEQUENCES)))
        table = DeltaTable.forPath(spark, runtime.path(SEQUENCES))
        seen.operations.append(table.history(1).collect()[0].operation)
        seen.rows.append(_rows(runtime))
        reader = spark.read.format("delta").option("readChangeFeed", "true").option("startingVersion", before + 1)
        splits: dict[str, set[str]] = {}
        for row in reader.load(runtime.path(SEQUENCES)).collect():
            splits.setdefault(row.user_id, set()).add(row.split)
        seen.splits.append(splits)

    flag = [("flagged", START.date(), "events_per_day", 1.0)]
    add(runtime, FLAGGED_USERS, spark.createDataFrame(flag, FLAGGED_USERS.schema()))
    later = TEST_FROM + timedelta(hours=30)
    increment([acts("after", later), acts("before", hour(2)), acts("bob", hour(3.2), "rare"), *AFTER_VALID], STAGES)
    numbered_before = (sessionize.STAGE, build_sequences.STAGE)
    in_rides = acts("between", VALID_FROM + timedelta(hours=1)) | {"vertical": "rides"}
    increment([in_rides, acts("before", hour(2.2))], numbered_before)
    increment([], (build_vocabulary.STAGE, build_sequences.STAGE))  # which numbers the new vertical

    seen.purged = []
    for _ in range(2):
        seen.files.append(train_footers(runtime))
        seen.purged.append(runtime.latest_version(SEQUENCES))
    seen.last = runtime.execute(build_sequences.STAGE)
    runtime.execute(build_sequences.STAGE, force=True)
    seen.anew = _rows(runtime)
    return seen


def test_the_increments_of_the_lake_end_in_the_rows_of_one_build(grown: SimpleNamespace) -> None:
    assert grown.operations == ["MERGE"] * 3
    assert grown.rows[-1] == grown.anew


def test_who_met_an_item_that_becomes_known_has_new_rows(grown: SimpleNamespace) -> None:
    """Even without an event of their own in the batch."""
    first, second, *_ = (list(rows["ann", "score", 0]["item_index"]) for rows in grown.rows)
    assert (first, second) == ([UNKNOWN, 2], [6, 2])


def test_a_user_flagged_later_keeps_no_row(grown: SimpleNamespace) -> None:
    first, second, *_ = grown.rows
    assert {split for user, split, _ in first if user == "flagged"} == {"train", "valid", "test", "score"}
    assert {user for user, *_ in first} - {user for user, *_ in second} == {"flagged"}


def test_training_meets_no_deletion_vector_and_files_of_few_rows(grown: SimpleNamespace) -> None:
    def in_train(rows: dict[tuple[str, str, int], Row]) -> int:
        return sum(split == "train" for _, split, _ in rows)

    first, *looks = ([footer.num_rows for footer in footers] for footers in grown.files)
    assert (sum(first), max(first) <= 3) == (in_train(grown.rows[0]), True)
    assert all(after == before + 1 for before, after in grown.versions)  # only the merge committed
    assert [rows["before", "train", 0]["length"] for rows in grown.rows] == [2, 3, 4, 4]
    # The old rows are in no file.
    assert [sum(look) for look in looks] == [in_train(grown.rows[-1])] * 2
    assert grown.purged[0] == grown.purged[1]  # nothing was left to rewrite
    assert grown.last.skipped  # the purge does not count as a change


def test_a_batch_of_new_events_leaves_the_rows_of_older_cuts_alone(grown: SimpleNamespace) -> None:
    counting, same_numbers, numbered = grown.splits
    assert counting["after"] == {"test", "score"}
    assert same_numbers["between"] == {"valid", "test", "score"}
    assert counting["before"] == same_numbers["before"] == {"train", "valid", "test", "score"}
    assert counting["of-some-0"] == counting["of-some-1"] == {"valid", "test", "score"}
    # All who have no event in the batch, and nothing that became known, keep all their rows.
    assert counting.keys() == {"after", "before", "ann", "bob", "flagged", "of-some-0", "of-some-1"}
    assert same_numbers.keys() == {"between", "before"}
    assert numbered == {"between": {"valid", "test", "score"}}


def test_an_event_at_the_very_moment_of_the_cut_comes_after_it(grown: SimpleNamespace) -> None:
    (rows, *_) = grown.rows
    assert rows["edge-valid", "train", 0]["length"] == rows["edge-test", "test", 0]["length"] == 2
    for split, cut in (("valid", VALID_FROM), ("test", TEST_FROM)):
        targets = rows[f"edge-{split}", split, 0]["target_ts"]
        assert [t - cut for t in targets] == [timedelta(0), timedelta(microseconds=1)]


def test_what_comes_after_a_cut_does_not_change_what_lies_before(grown: SimpleNamespace) -> None:
    """Law 4: training rows are identical byte for byte in two whole builds, whether or not the later events exist."""
    into_training = {"before", "ann", "bob", "flagged"}  # whose new events, flag or known item do reach it

    def training_rows(rows: dict[tuple[str, str, int], Row]) -> list[Any]:
        return sorted((key, row) for key, row in rows.items() if key[1] == "train" and key[0] not in into_training)

    assert training_rows(grown.anew) == training_rows(grown.rows[0])
    of_some = grown.anew["of-some-0", "train", 0]["item_index"]
    assert of_some[-1] == UNKNOWN  # scarce: training has one event of it
    assert {"after", "between", "of-some-0", "edge-valid"} <= {user for (user, *_), _ in training_rows(grown.anew)}


def test_two_builds_at_once_do_not_mix(
    grown: SimpleNamespace, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(grown.runtime.config, spark)
    add(runtime, SESSIONS, sessionize.sessionize(to_frame(spark, [acts("new", hour(3.4))]), SessionizeSettings()))

    def meanwhile(written: Table, read: Table) -> DataFrame | None:
        changes = incremental(written, read)
        Runtime(runtime.config, spark).execute(build_sequences.STAGE)
        return changes

    incremental = runtime.incremental
    monkeypatch.setattr(runtime, "incremental", meanwhile)
    with pytest.raises(TrailvecError, match="another run changed table sequences while this one worked on it"):
        runtime.execute(build_sequences.STAGE)

    # Other counts alone change no row: this is noted of those that the other run left.
    counted = runtime.latest(ITEMS).withColumn("event_count", F.col("event_count") + 1)
    note = (runtime.last_writer(ITEMS) or {})["note"]
    runtime.execute(Stage("count", "", lambda r: r.merge(ITEMS, counted, note=note)), force=True)
    touch = Mock()
    monkeypatch.setattr(runtime, "incremental", incremental)
    monkeypatch.setattr(runtime, "touch", touch)
    runtime.execute(build_sequences.STAGE)
    assert touch.call_args.kwargs["made_from"] == runtime.stage_version(SEQUENCES)


def test_training_does_not_begin_on_rows_that_another_run_changes(
    grown: SimpleNamespace, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Runtime(grown.runtime.config, spark)

    def another_run(*_: object) -> None:
        put(other, SEQUENCES, other.latest(SEQUENCES))

    monkeypatch.setattr(Runtime, "purge", another_run)
    with pytest.raises(TrailvecError, match="another run changed table sequences since look began"):
        train_footers(grown.runtime)


@pytest.fixture(scope="module")
def by_default(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """A lake built with the default settings."""
    events = [
        make_event(event_id=f"{user}{n}", user_id=user, item_id=f"i{n}", event_ts=START + timedelta(days=n))
        for user, count in (("one", 1), ("two", 2), ("many", 70))
        for n in range(count)
    ]
    zone = {"user_id": "londoner", "item_id": "i", "time_zone": "Europe/London"}
    events += [
        make_event(event_id="a", event_ts=datetime(2023, 3, 26, 0, 59, 59), **zone),
        make_event(event_id="b", event_ts=datetime(2023, 3, 26, 1, 0, 0), **zone),
        make_event(event_id="c", event_ts=datetime(2023, 3, 26, 23, 30, 0), **zone),
    ]
    runtime = Runtime(make_config(tmp_path_factory.mktemp("scored")), spark)
    run(runtime, events)
    return runtime


@pytest.fixture(scope="module")
def scored(by_default: Runtime) -> dict[tuple[str, str, int], Row]:
    return _rows(by_default)


def test_every_user_has_exactly_one_row_to_score(scored: dict[tuple[str, str, int], Row]) -> None:
    lengths = {user: row["length"] for (user, split, _), row in scored.items() if split == "score"}
    assert lengths == {"one": 1, "two": 2, "many": 64, "londoner": 3}


def test_the_clock_change_is_read_in_the_users_zone(scored: dict[tuple[str, str, int], Row]) -> None:
    """In London the clock went from 00:59:59 to 02:00 on 26 March 2023, a Sunday."""
    row = scored["londoner", "score", 0]
    assert row["hour"] == [1, 3, 1]
    assert row["weekday"] == [1, 1, 2]


def test_cuts_that_follow_the_logs_end_move_on_mondays_and_only_then_all_rows_are_made_anew(
    by_default: Runtime, scored: dict[tuple[str, str, int], Row], spark: SparkSession
) -> None:
    assert by_default.report.notes == []  # there was no table
    assert scored["many", "score", 0]["length"] == 64
    monday = datetime(2023, 6, 5)
    assert monday - timedelta(days=7) < max(row["last_ts"] for row in scored.values()) < monday - timedelta(days=2)

    def night(at: datetime) -> tuple[str, dict[tuple[str, str, int], Row]]:
        """What came in a night whose last event is at `at`: the operation that wrote the rows, and the rows."""
        add(by_default, EVENTS, to_frame(spark, [acts("one", at)]))
        for stage in STAGES:
            by_default.execute(stage)
        (commit,) = DeltaTable.forPath(spark, by_default.path(SEQUENCES)).history(1).collect()
        return commit.operation, _rows(by_default)

    def cuts(rows: dict[tuple[str, str, int], Row]) -> list[set[datetime]]:
        return [{row["as_of"] for (_, of, _), row in rows.items() if of == split} for split in ("train", "test")]

    # The log's end is the moment after its newest event.
    operation, rows = night(monday - timedelta(microseconds=2))
    assert operation == "MERGE"
    assert cuts(rows) == [{monday - timedelta(days=7 + 56)}, {monday - timedelta(days=7 + 28)}]
    assert by_default.execute(build_sequences.STAGE, force=True).notes == []  # as requested
    assert rows == _rows(by_default)
    operation, rows = night(monday - timedelta(microseconds=1))
    assert operation == "WRITE"
    moved = "table sequences is rebuilt in full: the cuts have moved to 2023-04-10 00:00:00 and 2023-05-08 00:00:00"
    assert by_default.report.notes == [moved]
    assert cuts(rows) == [{monday - timedelta(days=56)}, {monday - timedelta(days=28)}]


@pytest.mark.parametrize(("days", "first"), [(1, "2023-06-07"), (7, "2023-06-05"), (14, "2023-05-29")])
def test_cuts_move_by_so_many_days(days: int, first: str) -> None:
    settings, end = SequencesSettings(cut_step_days=days), datetime(2023, 6, 7, 9)
    assert cut_times(end, settings).test_from + timedelta(days=28) == datetime.fromisoformat(first)
    assert noted_cuts({"note": cut_times(end, settings).note()}) == cut_times(end, settings)


def test_cuts_out_of_order_or_an_empty_log_are_refused(spark: SparkSession) -> None:
    with pytest.raises(TrailvecError, match="must be in order"):
        cut_times(START, SequencesSettings(valid_from=datetime(2023, 4, 1)))  # test_from follows the log's end
    with pytest.raises(TrailvecError, match="events is empty"):
        log_end(to_frame(spark, []))


def test_a_vocabulary_that_was_counted_up_to_another_cut_or_lacks_rarer_items_is_refused(
    make_runtime: Callable[..., Runtime], spark: SparkSession
) -> None:
    """Law 4: with counts up to a later cut, a model would know items first seen after its own cut."""
    later, earlier = make_runtime(*CUTS), make_runtime('sequences.valid_from="2023-03-01T00:00:00"', CUTS[1])
    rarer = make_runtime(*CUTS, "vocabulary.min_count=4")
    put(later, ITEMS, spark.createDataFrame([], ITEMS.schema()))
    for table in (SESSIONS, CONTEXT_VALUES):
        later.create(table)
    # As by code that did not note its cuts.
    with pytest.raises(TrailvecError, match="items does not say up to when it was counted: run `trailvec build_vocab"):
        later.execute(build_sequences.STAGE)
    put(earlier, SEQUENCES, spark.createDataFrame([], SEQUENCES.schema()))
    counted = f"items was counted with sequences.valid_from = {VALID_FROM.isoformat()}, not 2023-03-01T00:00:00"
    for stage in (build_sequences.STAGE, train.STAGE):
        with pytest.raises(TrailvecError, match=counted):
            earlier.execute(stage)
    put(rarer, SEQUENCES, spark.createDataFrame([], SEQUENCES.schema()))
    for stage in (build_sequences.STAGE, train.STAGE):
        with pytest.raises(
            TrailvecError, match=r"items was made with vocabulary\.min_count = 5, not 4 as configured, so rarer items"
        ):
            rarer.execute(stage)
    same_cut = later.config.model_dump(mode="json")["sequences"]
    build_sequences.refuse_other_counts(later, same_cut, 6)  # rarer items are read as unknown


def test_rows_cut_before_training_s_end_moved_are_refused(
    make_runtime: Callable[..., Runtime], spark: SparkSession
) -> None:
    """Law 4, too: build_vocabulary has counted up to the next week's cut, and build_sequences was killed. What split
    test asks about lies behind both."""
    runtime, week = make_runtime(), timedelta(days=7)
    cuts = Cuts(VALID_FROM, VALID_FROM + 2 * week, VALID_FROM + 3 * week)
    for table, of in ((SEQUENCES, cuts), (ITEMS, replace(cuts, valid_from=VALID_FROM + week))):
        empty = spark.createDataFrame([], table.schema())
        write = partial(Runtime.write, table=table, df=empty, note=of.note())
        runtime.execute(Stage("put", "", write), force=True)
    for table in (SESSIONS, CONTEXT_VALUES):
        runtime.create(table)

    def asks(split: str) -> Stage:
        look = partial(build_sequences.refuse_other_rows, split=split)
        return Stage("look", "", look, reads=(SEQUENCES, ITEMS))

    runtime.execute(asks("test"))
    for stage in (train.STAGE, asks("valid")):
        with pytest.raises(
            TrailvecError,
            match=f"counted up to {VALID_FROM + week}, since training's end has moved, but the rows of sequences were "
            f"cut at {VALID_FROM}: run `trailvec build_sequences` first",
        ):
            runtime.execute(stage)


def test_rows_made_before_items_came_into_the_vocabulary_are_refused(
    make_runtime: Callable[..., Runtime], spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Late events bring an item in while the cut stays. No user of a session acted on it, so build_sequences then only
    notes that it has nothing to change."""
    runtime = make_runtime("vocabulary.min_count=5")
    note = Cuts(VALID_FROM, TEST_FROM, TEST_FROM + timedelta(days=7)).note()

    def count(**train_counts: int) -> None:
        rows = [(item, ord(item), n, n) for item, n in train_counts.items()]
        counted = spark.createDataFrame(rows, "item_id string, item_index int, event_count long, train_count long")
        unknown = [F.lit(None).alias(name) for name in build_vocabulary.LATEST]
        others = {name: F.lit(None) for name in ("item_name", "category", "unit_price")}
        others |= {"vertical": F.lit("shop"), "first_ts": F.lit(START), "target_count": F.lit(0)}
        counted = counted.withColumns(others | {"said_ts": F.struct(*unknown)})
        runtime.execute(Stage("count", "", lambda r: r.merge(ITEMS, counted, note=note)), force=True)

    def refusal() -> str:
        with pytest.raises(TrailvecError) as refused:
            runtime.execute(train.STAGE)
        return str(refused.value)

    for table in (SESSIONS, CONTEXT_VALUES):
        runtime.create(table)
    count(a=5, b=4, c=4)
    runtime.execute(build_sequences.STAGE)
    passed = refusal()
    assert "the train split of table sequences has no rows" in passed
    count(a=6, c=3)  # no more than the counts, as on most days
    assert refusal() == passed
    count(b=5)
    assert refusal() == (
        "table items has 1 items that are unknown in the rows of table sequences, such as b, since they came into the "
        "vocabulary later: run `trailvec build_sequences` first"
    )
    runtime.execute(build_sequences.STAGE)
    assert runtime.stage_version(SEQUENCES) < runtime.latest_version(SEQUENCES)  # nothing to change
    assert refusal() == passed
    assert runtime.execute(build_sequences.STAGE).skipped
    assert refusal() == passed

    since, kept = runtime.latest_version(ITEMS), Runtime.kept

    def keep(oldest: int) -> None:
        """Of `items`, no version before `oldest` can be read any more."""
        monkeypatch.setattr(Runtime, "kept", lambda self, t, v: v >= oldest if t == ITEMS else kept(self, t, v))

    runtime.execute(Stage("upkeep", "", lambda r: r.touch(ITEMS, note=note)), force=True)
    count(a=7)
    keep(since + 1)  # which has the rows of `since`
    assert refusal() == passed
    keep(since + 2)
    assert f"was made from version {since + 1} of table items, which has changed and can no longer be" in refusal()
    runtime.execute(build_sequences.STAGE)
    assert refusal() == passed


def test_a_missing_table_names_the_stage_that_makes_it(make_runtime: Callable[..., Runtime]) -> None:
    with pytest.raises(TrailvecError, match="run `trailvec sessionize` first"):
        make_runtime().execute(build_sequences.STAGE)
    assert SESSIONS.stage == "sessionize"
