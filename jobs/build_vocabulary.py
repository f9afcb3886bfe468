"""build_vocabulary: events + flagged_users (+ existing items, context_values) → items, context_values.

The law: a number is assigned once, never changed and never reused (docs/decisions/0005). An item gets a row, and with
it a number, once it has `vocabulary.min_count` events; numbers follow the time of the first event, ties broken by
item_id. Counts and names of existing rows are updated, their numbers never. To number its *new* items, a run sorts them
in one task: the limit is 10^8 new items at once, not the log's size. A flagged user's events do not count, as long as
the user is flagged.

It also decides on the cut times (`jobs/splits.py`). As long as training's cut stays, runs are incremental: new events
are added to the rows of their items, and all other rows stay as they are. Four kinds of items are recomputed from the
whole log: those that lost an event, those of users who were flagged or unflagged, those without a row yet (they had too
few events for one, so there is nothing to add to), and those that had no events left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from jobs.cli import stage_main
from jobs.config import SequencesSettings
from jobs.flag_users import flagged_now
from jobs.runtime import Runtime, Stage
from jobs.spark_session import broadcast_if_few
from jobs.splits import Cuts, before_cut, cut_times, is_target, log_end, noted_cuts
from jobs.tables import CONTEXT_VALUES, EVENTS, FLAGGED_USERS, ITEMS, Table, conform
from training.batches import FIRST_INDEX

LATEST = ("item_name", "category", "vertical", "unit_price")
COUNTS = ("event_count", "train_count", "target_count")
# The columns read of events that were added or removed.
OF_EVENTS = ("item_id", "event_ts", "event_type", "vertical", "category", "item_name", "amount", "quantity")


def category_value() -> Column:
    """A category as CONTEXT_VALUES names it, `vertical/category`: two verticals may use one word for different things.
    (With a slash in a vertical's name, two categories may share a number: docs/extending.md.)"""
    return F.when(F.col("category").isNotNull(), F.concat_ws("/", "vertical", "category"))


def unit_price() -> Column:
    """An event's price per unit; NULL if it has no amount, or a quantity of 0."""
    return F.col("amount") / F.coalesce("quantity", F.lit(1.0))


def numbers_of(values: DataFrame, kind: str) -> DataFrame:
    """CONTEXT_VALUES of one kind, as columns named after it: `<kind>` and `<kind>_index`."""
    of_kind = values.where(F.col("kind") == kind)
    return of_kind.select(F.col("value").alias(kind), F.col("value_index").alias(f"{kind}_index"))


def absent_event_types(values: DataFrame, named: Sequence[str]) -> tuple[list[str], str]:
    """Those of the named types that no event has, by CONTEXT_VALUES, and the types that there are, in words."""
    types = sorted(row["event_type"] for row in numbers_of(values, "event_type").collect())
    return [name for name in named if name not in types], ", ".join(types)


def describe_items(events: DataFrame, cuts: Cuts, settings: SequencesSettings) -> DataFrame:
    """One row per item of the log: every column of ITEMS but the number."""
    price = unit_price()
    # Spark must sort to aggregate the maximum of structs that contain text. So equal descriptions of an item are first
    # counted by hash, and only these few rows are sorted instead of the log.
    alike = (
        events.withColumn("unit_price", F.when(price > 0, price))
        .withColumn("in_training", before_cut("train", cuts, settings))
        .groupBy("item_id", *LATEST)
        .agg(
            F.max("event_ts").alias("last_ts"),
            F.min("event_ts").alias("first_ts"),
            F.count("*").alias("event_count"),
            F.count_if("in_training").alias("train_count"),
            F.count_if(F.col("in_training") & is_target(settings.target_event_types)).alias("target_count"),
        )
    )
    described = alike.groupBy("item_id").agg(
        *[F.max(_value_with_time(name, F.col("last_ts"), F.col)).alias(name) for name in LATEST],
        F.min("first_ts").alias("first_ts"),
        *[F.sum(name).alias(name) for name in COUNTS],
    )
    return _unpacked(described)


def _value_with_time(name: str, when: Column, value: Callable[[str], Column]) -> Column:
    """A value and its event's time, as a struct; NULL without a value. The greater of two structs is the later one or,
    at the same time, the one with the greater value.

    A category only has a meaning within its vertical. So a vertical that comes with a category ranks above one without,
    and categories compare by vertical first: the maxima of both then come from the same event.

    Args:
        value: returns the column of a name, from an event or a row of ITEMS.
    """
    fields = [when.alias("ts"), value(name).alias(name)]
    if name == "vertical":
        fields.insert(0, value("category").isNotNull().alias("with_category"))
    elif name == "category":
        fields.insert(1, value("vertical").alias("vertical"))
    return F.when(value(name).isNotNull(), F.struct(*fields))


def _unpacked(rows: DataFrame) -> DataFrame:
    """Rows whose LATEST columns are structs of `_value_with_time` → the plain values, and said_ts, the time of each."""
    times = F.struct(*[F.col(f"{name}.ts").alias(name) for name in LATEST]).alias("said_ts")
    values = {name: F.col(f"{name}.{name}") for name in LATEST}
    return rows.select("*", times).withColumns(values)


def add_events(items: DataFrame, described: DataFrame) -> DataFrame:
    """The rows of `items` with new events added; `described` is `describe_items` of these events. Items missing from
    either are left out."""
    old, new = items.alias("old"), described.alias("new")

    def with_time(side: str, name: str) -> Column:
        return _value_with_time(name, F.col(f"{side}.said_ts.{name}"), lambda column: F.col(f"{side}.{column}"))

    latest = [F.greatest(with_time("old", name), with_time("new", name)).alias(name) for name in LATEST]
    added = [(F.col(f"old.{name}") + F.col(f"new.{name}")).alias(name) for name in COUNTS]
    first = F.least("old.first_ts", "new.first_ts").alias("first_ts")
    both = old.join(new, "item_id").select("item_id", "old.item_index", *latest, first, *added)
    return conform(_unpacked(both), ITEMS)


def number_items(described: DataFrame, items: DataFrame, min_count: int, next_index: int) -> DataFrame:
    """ITEMS rows to merge: existing items keep their number, new ones with `min_count` events get the next numbers.

    Args:
        described, items: `describe_items` and the existing rows, both of all items or both of the same subset.
        next_index: the first number that was never assigned.
    """
    described = described.localCheckpoint()  # else the log is read three times: for old, gone and new items
    old = items.select("item_id", "item_index")
    # An item whose last event is gone (its users were erased) keeps its row and its number, with counts of 0.
    none = {name: F.lit(0) for name in COUNTS}
    gone = items.join(described, "item_id", "left_anti").withColumns(none)
    known = described.join(old, "item_id").unionByName(gone.select(*described.columns, "item_index"))
    new = described.where(F.col("event_count") >= min_count).join(old, "item_id", "left_anti")
    place = F.row_number().over(Window.orderBy("first_ts", "item_id"))
    return conform(known.unionByName(new.withColumn("item_index", place + next_index - 1)), ITEMS)


def number_context_values(events: DataFrame, values: DataFrame, came: Column | int = 1) -> DataFrame:
    """CONTEXT_VALUES rows to add: values without a number yet, numbered in their sort order.

    Args:
        events: all of them, or the changed ones.
        came: 1; among changed events -1 for an event, or its earlier state, that was removed. A value without a number
            that was removed as often as added is in no event: had it been there before, it would have a number.
    """
    kinds = {"vertical": F.col("vertical"), "event_type": F.col("event_type"), "category": category_value()}
    pairs = F.create_map(*[part for kind, value in kinds.items() for part in (F.lit(kind), value)])
    found = events.select(F.lit(came).alias("came"), F.explode(pairs).alias("kind", "value"))
    left = found.where("value IS NOT NULL").groupBy("kind", "value").agg(F.sum("came").alias("left")).where("left > 0")
    new = left.select("kind", "value").join(values, ["kind", "value"], "left_anti")
    next_by_kind = values.groupBy("kind").agg((F.max("value_index") + 1).alias("next"))
    rank = F.row_number().over(Window.partitionBy("kind").orderBy("value"))
    numbered = new.join(next_by_kind, "kind", "left").withColumn(
        "value_index", F.coalesce("next", F.lit(FIRST_INDEX)) + rank - 1
    )
    return conform(numbered, CONTEXT_VALUES)


def changed_events(
    runtime: Runtime, written: Table, flagged: DataFrame
) -> tuple[DataFrame, DataFrame, DataFrame] | None:
    """What changed in the events since `written` was made; None if `written` must be rebuilt.

    Args:
        flagged: user_id of all users who are flagged now.

    Returns:
        The changed events (OF_EVENTS and _change_type) of users flagged neither now nor then; user_id of those who
        were flagged since; user_id of those who were unflagged since.
    """
    changes, flags = runtime.incremental(written, EVENTS), runtime.incremental(written, FLAGGED_USERS)
    before = runtime.previous(written, FLAGGED_USERS)
    if changes is None or flags is None or before is None:
        return None
    before = before.select("user_id").distinct()
    # `flags` also has users who were flagged for one more day. The join avoids reading all flags if none changed.
    changed = flags.select("user_id").distinct()
    gained, lost = (
        users.join(others, "user_id", "left_anti").join(changed, "user_id", "left_semi").localCheckpoint()
        for users, others in ((flagged, before), (before, flagged))
    )
    changes = changes.join(flagged.union(lost), "user_id", "left_anti").select(*OF_EVENTS, "_change_type")
    # The feed is planned and read once, even if both tables use it.
    return changes.localCheckpoint(), gained, lost


def to_describe_anew(items: DataFrame, changes: DataFrame, of_turned: Sequence[DataFrame]) -> DataFrame:
    """item_id of the touched items that must be recomputed: new events can't just be added to their rows.

    Args:
        changes: item_id and _change_type of changed events.
        of_turned: events that counted and no longer do, or the reverse, since their users were flagged or unflagged.
    """
    touched = changes.select("item_id", (F.col("_change_type") == "insert").alias("came"))
    for events in of_turned:
        touched = touched.union(events.select("item_id", F.lit(False)))
    touched = touched.groupBy("item_id").agg(F.bool_and("came").alias("only_came"))
    touched = touched.join(items.select("item_id", "item_index", "event_count"), "item_id", "left")
    # A lost event can't be subtracted from a latest value, and an item without a row has nothing to add to. The row of
    # an item without events still holds the last ones' values.
    nothing_to_add_to = F.col("item_index").isNull() | (F.col("event_count") == 0)
    return touched.where(~F.col("only_came") | nothing_to_add_to).select("item_id")


def next_index(items: DataFrame) -> int:
    """The first number that no item has had."""
    return int(items.agg(F.coalesce(F.max("item_index") + 1, F.lit(FIRST_INDEX))).collect()[0][0])


def run(runtime: Runtime) -> None:
    settings, min_count = runtime.config.sequences, runtime.config.vocabulary.min_count
    flagged = flagged_now(runtime)
    events = runtime.read(EVENTS).join(flagged, "user_id", "left_anti")
    runtime.create(ITEMS)
    runtime.create(CONTEXT_VALUES)
    # Two concurrent runs could give one number to two items: the later commit is refused (`made_from`).
    items_from, values_from = (runtime.stage_version(table) for table in (ITEMS, CONTEXT_VALUES))
    noted = noted_cuts(runtime.last_writer(ITEMS))
    cuts = cut_times(log_end(events, since=noted), settings)
    # Items without a changed event keep their rows only if the cut stays; in leave-one-out every event moves a cut.
    fixed = settings.split_by == "time" and noted is not None and noted.valid_from == cuts.valid_from
    # Items are written last, so the changes since then include those since context_values was written.
    written = ITEMS if fixed and runtime.last_writer(CONTEXT_VALUES) else CONTEXT_VALUES
    changed = changed_events(runtime, written, flagged)
    value_events, came = events.select(*OF_EVENTS), F.lit(1)
    of_turned: list[DataFrame] = []
    if changed is not None:
        changes, gained, lost = changed
        value_events, came = changes, F.when(F.col("_change_type").isin("insert", "update_postimage"), 1).otherwise(-1)
        if not lost.isEmpty():  # none of their events were counted; reads all events
            of_turned.append(events.join(broadcast_if_few(lost), "user_id", "left_semi"))
            value_events = value_events.union(of_turned[0].select(*OF_EVENTS, F.lit("insert")))
        if not gained.isEmpty():
            # As the events were: a bot that came and was flagged at once was never counted, and changes no item.
            counted = runtime.previous(written, EVENTS)
            assert counted is not None  # or there were no changes to go by either
            of_turned.append(counted.join(broadcast_if_few(gained), "user_id", "left_semi"))
    new_values = number_context_values(value_events, runtime.latest(CONTEXT_VALUES), came)
    runtime.merge(CONTEXT_VALUES, new_values, insert_only=True, made_from=values_from)
    if settings.target_event_types:
        absent, types = absent_event_types(runtime.latest(CONTEXT_VALUES), settings.target_event_types)
        runtime.report.notes += [
            f"sequences.target_event_types names {name}, but no event has that type yet (found {types})"
            for name in absent
        ]

    items = runtime.latest(ITEMS)
    if changed is None or not fixed:
        rows = number_items(describe_items(events, cuts, settings), items, min_count, next_index(items))
        runtime.merge(ITEMS, rows, made_from=items_from, note=cuts.note())
        return
    # Checkpointed, not persisted: the commit to `items` would plan it again.
    anew = broadcast_if_few(to_describe_anew(items, changes, of_turned).localCheckpoint(eager=False))
    rows = add_events(items.join(anew, "item_id", "left_anti"), describe_items(changes, cuts, settings))
    if not anew.isEmpty():
        of_log, old = (of.join(anew, "item_id", "left_semi") for of in (events, items))
        described = describe_items(of_log, cuts, settings)
        rows = rows.unionByName(number_items(described, old, min_count, next_index(items)))
    runtime.merge(ITEMS, rows, made_from=items_from, note=cuts.note())


STAGE = Stage(
    "build_vocabulary",
    "give items (with at least vocabulary.min_count events), categories, verticals and event types permanent numbers",
    run,
    reads=(EVENTS, FLAGGED_USERS),
    writes=(CONTEXT_VALUES, ITEMS),
    settings=("vocabulary", "sequences"),
)


def main() -> None:
    stage_main("build_vocabulary")


if __name__ == "__main__":
    main()
