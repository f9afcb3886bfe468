"""The vocabulary's law: a number is given once, whatever comes later."""

from __future__ import annotations

import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from datetime import date, timedelta, timezone
from typing import Any

import pytest
from delta.tables import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs import build_vocabulary
from jobs.config import SequencesSettings
from jobs.errors import TrailvecError
from jobs.item_facts import attribute_matrix, item_attributes
from jobs.runtime import Runtime
from jobs.splits import Cuts
from jobs.tables import CONTEXT_VALUES, EVENTS, FLAGGED_USERS, ITEMS, Table
from tests.conftest import add, make_config, put, read_delta
from tests.events import START, Row, make_event, to_frame

CUTS = ['sequences.valid_from="2023-03-26T00:00:00"', 'sequences.test_from="2023-03-26T00:30:00"']


def event(number: int, item: str, hours: float, **values: object) -> Row:
    of_user = {"user_id": f"u{number % 3}"} | values
    return make_event(event_id=f"e{number}", item_id=item, event_ts=START + timedelta(hours=hours), **of_user)


def put_log(runtime: Runtime, log: list[Row]) -> None:
    put(runtime, EVENTS, to_frame(runtime.spark, log))
    runtime.create(FLAGGED_USERS)


def items(runtime: Runtime) -> dict[str, tuple[int, int, int, int]]:
    return {
        r.item_id: (r.item_index, r.event_count, r.train_count, r.target_count) for r in runtime.latest(ITEMS).collect()
    }


def values(runtime: Runtime) -> dict[tuple[str, str], int]:
    return {(r.kind, r.value): r.value_index for r in runtime.latest(CONTEXT_VALUES).collect()}


def test_numbers_go_by_first_time_within_their_kind_and_never_change(make_runtime: Callable[..., Runtime]) -> None:
    targets = 'sequences.target_event_types=["purchase", "purchsae"]'
    runtime = make_runtime(*CUTS, "vocabulary.min_count=2", targets)
    # 22:00 is START; the cut is two hours later. "c" is seen once only.
    log = [
        event(0, "b", 0),
        event(1, "a", 0.5, event_type="view"),
        event(2, "a", 1),
        event(3, "b", 3, vertical="rides"),
        event(4, "c", 3),
    ]
    put_log(runtime, log)
    assert runtime.execute(build_vocabulary.STAGE).notes == [
        "sequences.target_event_types names purchsae, but no event has that type yet (found purchase, view)"
    ]
    assert items(runtime) == {"b": (2, 2, 1, 1), "a": (3, 2, 2, 1)}
    verticals, types = {("vertical", "food"): 2, ("vertical", "rides"): 3}, {"purchase": 2, "view": 3}
    first = verticals | {("event_type", name): number for name, number in types.items()}
    assert values(runtime) == first

    # Later "c" is seen again and "z" comes, earlier than all: old numbers stay, new ones follow by their first time.
    of_z = [event(n, "z", hours, vertical="ads") for n, hours in ((6, -5), (7, -4))]
    put_log(runtime, [*log, event(5, "c", 4), *of_z])
    runtime.execute(build_vocabulary.STAGE)
    assert items(runtime) == {"b": (2, 2, 1, 1), "a": (3, 2, 2, 1), "z": (4, 2, 2, 2), "c": (5, 2, 0, 0)}
    assert values(runtime) == first | {("vertical", "ads"): 4}


class Early(Runtime):
    """A run that began when the log had one event."""

    def read(self, table: Table) -> DataFrame:
        rows = super().read(table)
        return rows.where("event_id = 'e0'") if table is EVENTS else rows


def test_two_runs_at_once_give_no_number_twice(
    make_runtime: Callable[..., Runtime], spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = make_runtime(*CUTS, "vocabulary.min_count=1")
    put_log(runtime, [event(0, "b", 3, vertical="shop"), event(1, "a", 4, vertical="food")])
    for step, table in (("number_context_values", "context_values"), ("number_items", "items")):
        number = getattr(build_vocabulary, step)

        def meanwhile(*arguments: Any, step: str = step, number: Callable[..., DataFrame] = number) -> DataFrame:
            monkeypatch.setattr(build_vocabulary, step, number)
            Early(runtime.config, spark).execute(build_vocabulary.STAGE, force=True)
            return number(*arguments)

        monkeypatch.setattr(build_vocabulary, step, meanwhile)
        with pytest.raises(TrailvecError, match=f"another run changed table {table} while this one worked on it"):
            runtime.execute(build_vocabulary.STAGE, force=True)
    runtime.execute(build_vocabulary.STAGE, force=True)
    assert {name: row[0] for name, row in items(runtime).items()} == {"b": 2, "a": 3}
    verticals = runtime.latest(CONTEXT_VALUES).where("kind = 'vertical'").collect()
    assert sorted(row.value_index for row in verticals) == [2, 3]


@pytest.fixture(scope="module")
def described(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """A vocabulary made of events that say different things of their items."""
    log = [
        event(0, "a", 0, category="tea", amount=9.0, quantity=3.0),
        event(1, "a", 1, category="tea", amount=8.0, quantity=None),
        event(2, "a", 2, category="tea", amount=-8.0, quantity=1.0),  # a return
        event(3, "a", 3, category="tea", amount=5.0, quantity=0.0),
        event(4, "b", 4, category="tea", vertical="retail"),
        event(5, "c", 5, category=None, amount=-1.0, quantity=-2.0),
        event(6, "named", 6, item_name="old", category="tea"),
        event(7, "named", 7, item_name="new", category=None),
        event(8, "named", 8, item_name=None, category=None, vertical="rides"),
    ]
    runtime = Runtime(make_config(tmp_path_factory.mktemp("described"), *CUTS, "vocabulary.min_count=1"), spark)
    put_log(runtime, log)
    runtime.execute(build_vocabulary.STAGE)
    return runtime


def test_name_and_category_are_the_latest_known(described: Runtime) -> None:
    (row,) = described.latest(ITEMS).where("item_id = 'named'").collect()
    # A category means something in its own vertical alone.
    assert (row.item_name, row.category, row.vertical) == ("new", "tea", "food")

    # The aggregate that the log goes through, the last in the plan's text, is one that does not sort it.
    anew = build_vocabulary.describe_items(
        described.latest(EVENTS), Cuts(START, START, START), described.config.sequences
    )
    plan = anew._jdf.queryExecution().executedPlan().toString()
    assert re.findall(r"\w+Aggregate\(", plan)[-1] == "HashAggregate("


def test_a_category_is_numbered_within_its_vertical_and_a_price_is_the_latest_above_zero(described: Runtime) -> None:
    categories = {value: number for (kind, value), number in values(described).items() if kind == "category"}
    assert categories == {"food/tea": 2, "retail/tea": 3}
    prices = {r.item_id: r.unit_price for r in described.latest(ITEMS).collect()}
    assert prices == {"a": 8.0, "b": None, "c": 0.5, "named": None}

    # What a model is told of the items: numbers of category and vertical, and the price's half-octave; 0: not known.
    table = item_attributes(described.latest(ITEMS), described.latest(CONTEXT_VALUES))
    found = {r.item_index: (r.category, r.vertical, r.price) for r in table.collect()}
    assert found == {2: (2, 2, 21), 3: (3, 3, 0), 4: (0, 2, 13), 5: (2, 2, 0)}
    matrix = attribute_matrix(table, ["price", "category"], 7).tolist()
    assert matrix == [[0, 0, 21, 0, 13, 0, 0], [0, 0, 2, 3, 0, 2, 0]]


def test_an_increment_does_not_count_what_no_change_names(described: Runtime, spark: SparkSession) -> None:
    add(described, EVENTS, to_frame(spark, [event(9, "b", 2)]))
    described.execute(build_vocabulary.STAGE)
    newest = DeltaTable.forPath(spark, described.path(ITEMS)).history(1).collect()[0].operationMetrics
    assert (newest["numTargetRowsUpdated"], newest["numTargetRowsInserted"]) == ("1", "0")


def test_an_increment_ends_as_a_build_of_everything(make_runtime: Callable[..., Runtime], spark: SparkSession) -> None:
    """Law 1: events arrive and go; items come over min_count on the way, or lose all that was said of them; and the
    cut, which is not given, moves. (The next test has one that does not.)"""
    runtime = make_runtime("vocabulary.min_count=2")
    put_log(runtime, [event(n, item, n, category="tea") for n, item in enumerate("abacdbacgg")])
    runtime.execute(build_vocabulary.STAGE)
    assert {item: row[0] for item, row in items(runtime).items()} == {"a": 2, "b": 3, "c": 4, "g": 5}
    later = [
        event(10, "b", 9, category="mistyped", item_name="renamed", vertical="rides"),
        event(11, "d", -3),
        event(12, "e", 80 * 24),  # moves the log's end, and with it the cut
    ]
    add(runtime, EVENTS, to_frame(spark, later))
    # What comes and goes, or is corrected, before a run sees it leaves no word behind: it may hold somebody's name.
    add(runtime, EVENTS, to_frame(spark, [event(13, "b", 9, category="gone")]))
    table = DeltaTable.forPath(spark, runtime.path(EVENTS))
    table.update("event_id = 'e10'", {"category": F.lit("mate")})
    table.delete("event_id IN ('e6', 'e8', 'e9', 'e13')")  # e6 is of item a, e8 and e9 are all of g
    runtime.execute(build_vocabulary.STAGE)
    assert {value for kind, value in values(runtime) if kind == "category"} == {"food/tea", "rides/mate"}
    # An item that is gone from the log (its users were erased) keeps its row and number, and counts for nothing.
    assert items(runtime) == {
        "a": (2, 2, 2, 2),
        "b": (3, 3, 3, 3),
        "c": (4, 2, 2, 2),
        "d": (6, 2, 2, 2),
        "g": (5, 0, 0, 0),
    }
    # What comes of g again says less than what is gone said.
    add(runtime, EVENTS, to_frame(spark, [event(14, "g", 10, item_name=None)]))
    runtime.execute(build_vocabulary.STAGE)
    g = runtime.latest(ITEMS).where("item_id = 'g'").collect()[0]
    assert (g.item_index, g.event_count, g.item_name, g.category) == (5, 1, None, None)
    # The cut has not moved since.
    newest = DeltaTable.forPath(spark, runtime.path(ITEMS)).history(1).collect()[0].operationMetrics
    assert newest["numTargetRowsUpdated"] == "1"
    by_increment = [sorted(runtime.latest(table).collect()) for table in (ITEMS, CONTEXT_VALUES)]
    runtime.execute(build_vocabulary.STAGE, force=True)
    assert by_increment == [sorted(runtime.latest(table).collect()) for table in (ITEMS, CONTEXT_VALUES)]


def test_events_that_come_and_go_count_whatever_their_order(
    make_runtime: Callable[..., Runtime], spark: SparkSession
) -> None:
    """Law 1 again, with a given cut: late events, values that change and change back, several at one moment, items
    under min_count; events that go or are corrected, and an item of which nothing is left for a while."""
    chance = random.Random(20)
    names, categories, amounts = (None, "old", "new"), (None, "tea", "mate"), (None, -1.0, 2.0, 3.0)
    log = [
        event(
            n,
            chance.choice("abcdefgh"),
            chance.randrange(12) / 2,  # many at one moment
            item_name=chance.choice(names),
            category=chance.choice(categories),
            vertical=chance.choice(("food", "rides")),
            amount=chance.choice(amounts),
            quantity=None,
        )
        for n in range(60)
    ]
    of_gone = [event(n, "gone", 1, category="tea") for n in range(60, 63)]
    again = event(63, "gone", 2, item_name=None)  # says less
    runtime = make_runtime(*CUTS, "vocabulary.min_count=3", 'sequences.target_event_types=["purchase"]')
    put_log(runtime, [*log[:20], *of_gone])
    runtime.execute(build_vocabulary.STAGE)
    first = items(runtime)
    add(runtime, EVENTS, to_frame(spark, [log[20] | {"category": "mistyped"}, *log[21:40]]))
    table = DeltaTable.forPath(spark, runtime.path(EVENTS))
    table.update("event_id = 'e20'", {"category": F.lit("corrected")})
    log[20]["category"] = "corrected"
    left = [row for n, row in enumerate(log) if n >= 40 or n % 5 != 3]
    table.delete(F.col("event_id").isin([row["event_id"] for row in (*log, *of_gone) if row not in left]))
    runtime.execute(build_vocabulary.STAGE)
    second = items(runtime)
    assert first["gone"][1:] == (3, 3, 3)
    assert second["gone"] == (first["gone"][0], 0, 0, 0)
    add(runtime, EVENTS, to_frame(spark, [*log[40:], again]))
    runtime.execute(build_vocabulary.STAGE)

    found = {row["item_id"]: row for row in read_delta(runtime.root / "tables/items")}
    assert not [value for _, value in values(runtime) if "mistyped" in value]
    for before, after in ((first, second), (second, items(runtime))):
        assert {item: row[0] for item, row in after.items() if item in before} == {i: r[0] for i, r in before.items()}
    cut = START + timedelta(hours=2)
    left.append(again)
    for item in sorted({row["item_id"] for row in left}):
        of_item = [row for row in left if row["item_id"] == item]
        if len(of_item) < 3 and item not in second:
            assert item not in found
            continue
        said = {
            "item_name": [(row["event_ts"], row["item_name"]) for row in of_item if row["item_name"]],
            "unit_price": [(row["event_ts"], row["amount"]) for row in of_item if (row["amount"] or 0) > 0],
        }
        latest = {name: max(pairs)[1] if pairs else None for name, pairs in said.items()}
        # The vertical is that of the event that said the category, where any did.
        of_category = [row for row in of_item if row["category"]] or of_item
        place = max((row["event_ts"], row["vertical"], row["category"]) for row in of_category)
        latest |= {"vertical": place[1], "category": place[2]}
        row = found[item]
        assert {name: row[name] for name in latest} == latest
        assert row["first_ts"] == min(r["event_ts"] for r in of_item).replace(tzinfo=timezone.utc)
        assert row["event_count"] == len(of_item)
        assert row["train_count"] == sum(r["event_ts"] < cut for r in of_item)
    assert len(found) > 5


def test_after_a_stop_between_its_two_tables_and_the_loss_of_one_all_is_there(
    make_runtime: Callable[..., Runtime], described: Runtime, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = make_runtime(*CUTS, "vocabulary.min_count=1")
    shutil.copytree(described.root, runtime.root)
    before = items(runtime)
    merge = runtime.merge

    def stops(table: Table, *rows: Any, **options: Any) -> None:
        if table == ITEMS:
            raise KeyboardInterrupt
        merge(table, *rows, **options)

    add(runtime, EVENTS, to_frame(spark, [event(21, "d", 1, vertical="shop")]))
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "merge", stops)
        with pytest.raises(KeyboardInterrupt):
            runtime.execute(build_vocabulary.STAGE)
    add(runtime, EVENTS, to_frame(spark, [event(22, "e", 2, vertical="ads")]))
    runtime.execute(build_vocabulary.STAGE)
    assert items(runtime).keys() == before.keys() | {"d", "e"}

    shutil.rmtree(runtime.path(CONTEXT_VALUES))
    add(runtime, EVENTS, to_frame(spark, [event(23, "e", 3, vertical="films")]))
    runtime.execute(build_vocabulary.STAGE)
    verticals = {row.value for row in runtime.latest(CONTEXT_VALUES).where("kind = 'vertical'").collect()}
    assert verticals == {"food", "rides", "retail", "shop", "ads", "films"}
    assert items(runtime)["e"][1] == 2


def flagged(spark: SparkSession, *users: str) -> DataFrame:
    rows = [(user, date(2023, 3, 25), "test_account", 1.0, 0.0) for user in users]
    return spark.createDataFrame([row[: len(FLAGGED_USERS.columns)] for row in rows], FLAGGED_USERS.schema())


def test_what_flagged_users_did_counts_for_nothing_while_they_are_flagged(
    make_runtime: Callable[..., Runtime], spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = make_runtime(*CUTS, "vocabulary.min_count=1")
    # x is of u1 and u2; y is of u0, and once of u2.
    log = [event(n, item, n, vertical=f"of_u{n % 3}") for n, item in enumerate("abcaxcyax")]
    log.append(event(11, "y", 11))
    put_log(runtime, log)
    put(runtime, FLAGGED_USERS, flagged(spark, "u1"))
    path = runtime.path(FLAGGED_USERS)

    def check(flags: str) -> None:
        runtime.execute(build_vocabulary.STAGE)
        kept = [row for row in log if row["user_id"] not in flags.split()]
        counts = Counter(row["item_id"] for row in kept)
        assert {name: row[1] for name, row in items(runtime).items() if row[1]} == counts
        numbered = {row.value for row in runtime.latest(CONTEXT_VALUES).where("kind = 'vertical'").collect()}
        assert {row["vertical"] for row in kept} <= numbered

    check("u1")
    assert "of_u1" not in {row.value for row in runtime.latest(CONTEXT_VALUES).collect()}
    numbers = {name: row[0] for name, row in items(runtime).items()}
    # One flag goes, with events that come; another comes, with events that come and one that goes.
    log += [event(10, "z", 1), event(12, "a", 1), event(13, "q", 2), event(16, "a", 3), event(17, "q", 3)]
    add(runtime, EVENTS, to_frame(spark, log[-5:]))
    DeltaTable.forPath(spark, runtime.path(EVENTS)).delete("event_id = 'e11'")
    DeltaTable.forPath(spark, path).delete("user_id = 'u1'")
    add(runtime, FLAGGED_USERS, flagged(spark, "u2"))
    check("u2")
    # Where flags only come, the log is not read for the numbers of words.
    add(runtime, FLAGGED_USERS, flagged(spark, "u0"))
    number, met = build_vocabulary.number_context_values, []

    def noting(events: DataFrame, *rest: Any) -> DataFrame:
        met.append(events)
        return number(events, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(build_vocabulary, "number_context_values", noting)
        check("u0 u2")
    assert met[0].inputFiles() == []
    found = items(runtime)
    assert numbers == {name: found[name][0] for name in numbers}
    # What comes of a flagged user does not count. A bot that comes and is flagged at once was never counted, and flags
    # that are said once more change nothing: the log is not read for the items of any of them.
    DeltaTable.forPath(spark, path).update(set={"day": F.lit(date(2023, 3, 26))})
    add(runtime, EVENTS, to_frame(spark, [event(20, "new", 4), event(23, "a", 23, user_id="bot")]))
    add(runtime, FLAGGED_USERS, flagged(spark, "bot"))
    describe, anew = build_vocabulary.to_describe_anew, []

    def described(*of: Any) -> DataFrame:
        anew.append(describe(*of))
        return anew[0]

    with monkeypatch.context() as patch:
        patch.setattr(build_vocabulary, "to_describe_anew", described)
        check("u0 u2")
    assert anew[0].collect() == []
    by_increments = [sorted(runtime.latest(table).collect()) for table in (ITEMS, CONTEXT_VALUES)]
    runtime.execute(build_vocabulary.STAGE, force=True)
    assert by_increments == [sorted(runtime.latest(table).collect()) for table in (ITEMS, CONTEXT_VALUES)]


def test_leave_one_out_counts_all_but_the_last_two_of_each_user(spark: SparkSession) -> None:
    log = to_frame(spark, [event(3 * n, item, n) for n, item in enumerate("aabab")])  # all of user u0
    settings = SequencesSettings(split_by="leave_one_out")
    rows = build_vocabulary.describe_items(log, Cuts(START, START, START), settings).collect()
    assert {row.item_id: row.train_count for row in rows} == {"a": 2, "b": 1}
