"""build_vocabulary: events (+ items, context_values as they are) → items, context_values.

The law: a number is given once and never again (docs/decisions/0005). An item gets a row, and with it a number, once it
has `vocabulary.min_count` events; numbers go up with the time of the first event, ties by item_id. The counts and names
of old rows are brought up to date, where the cut is given (`sequences.valid_from`) only of those that changed events
name; their numbers are not touched. The numbering of one run's *new* items sorts them in
one task: 10^8 new items at once are its limit, not the log's size.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from jobs.cli import stage_main
from jobs.config import SequencesSettings
from jobs.runtime import Runtime, Stage
from jobs.splits import Cuts, before_cut, cut_times
from jobs.tables import CONTEXT_VALUES, EVENTS, ITEMS, conform

FIRST_INDEX = 2  # 0 is padding, 1 is unknown


def category_value() -> Column:
    """A category as CONTEXT_VALUES names it: two verticals may use one word for different things."""
    return F.when(F.col("category").isNotNull(), F.concat_ws("/", "vertical", "category"))


def describe_items(events: DataFrame, cuts: Cuts, settings: SequencesSettings) -> DataFrame:
    """One row per item of the log: everything in ITEMS but the number."""
    targets = settings.target_event_types
    is_target = F.col("event_type").isin(targets) if targets else F.lit(True)
    order = F.struct("event_ts", "event_id")
    price = F.col("amount") / F.coalesce("quantity", F.lit(1.0))

    def latest(name: str) -> Column:
        return F.max_by(name, F.when(F.col(name).isNotNull(), order)).alias(name)

    return (
        events.withColumn("unit_price", F.when(price > 0, price))
        .withColumn("in_training", before_cut("train", cuts, settings))
        .groupBy("item_id")
        .agg(
            latest("item_name"),
            latest("category"),
            latest("vertical"),
            latest("unit_price"),
            F.min("event_ts").alias("first_ts"),
            F.count("*").alias("event_count"),
            F.count_if("in_training").alias("train_count"),
            F.count_if(F.col("in_training") & is_target).alias("target_count"),
        )
    )


def number_items(described: DataFrame, items: DataFrame, min_count: int, next_index: int) -> DataFrame:
    """ITEMS rows to merge: old items keep their number, new ones with `min_count` events get the next numbers.

    Args:
        described, items: `describe_items` and the old rows, both of all items or both of some.
        next_index: the first number that no item ever had.
    """
    old = items.select("item_id", "item_index")
    # An item whose last event is gone (its users were erased) keeps its number and its row, and counts for nothing.
    none = {name: F.lit(0) for name in ("event_count", "train_count", "target_count")}
    gone = items.join(described, "item_id", "left_anti").withColumns(none)
    known = described.join(old, "item_id").unionByName(gone.select(*described.columns, "item_index"))
    new = described.where(F.col("event_count") >= min_count).join(old, "item_id", "left_anti")
    place = F.row_number().over(Window.orderBy("first_ts", "item_id"))
    return conform(known.unionByName(new.withColumn("item_index", place + next_index - 1)), ITEMS)


def number_context_values(events: DataFrame, values: DataFrame) -> DataFrame:
    """CONTEXT_VALUES rows to add: values that have no number yet, in their own order."""
    kinds = {"vertical": F.col("vertical"), "event_type": F.col("event_type"), "category": category_value()}
    pairs = F.create_map(*[part for kind, value in kinds.items() for part in (F.lit(kind), value)])
    found = events.select(F.explode(pairs).alias("kind", "value"))
    new = found.where("value IS NOT NULL").distinct().join(values, ["kind", "value"], "left_anti")
    next_by_kind = values.groupBy("kind").agg((F.max("value_index") + 1).alias("next"))
    rank = F.row_number().over(Window.partitionBy("kind").orderBy("value"))
    numbered = new.join(next_by_kind, "kind", "left").withColumn(
        "value_index", F.coalesce("next", F.lit(FIRST_INDEX)) + rank - 1
    )
    return conform(numbered, CONTEXT_VALUES)


def run(runtime: Runtime) -> None:
    settings, min_count = runtime.config.sequences, runtime.config.vocabulary.min_count
    events = runtime.read(EVENTS)
    runtime.create(ITEMS)
    runtime.create(CONTEXT_VALUES)
    arrived = runtime.incremental(CONTEXT_VALUES, EVENTS)
    met = events if arrived is None else arrived
    runtime.merge(CONTEXT_VALUES, number_context_values(met, runtime.latest(CONTEXT_VALUES)))

    cuts, items = cut_times(events, settings), runtime.latest(ITEMS)
    # What no change names stands as it is, unless the cut moves; in leave-one-out a user's every event moves one.
    fixed = settings.split_by == "time" and settings.valid_from is not None
    changes = runtime.incremental(ITEMS, EVENTS) if fixed else None
    next_index = items.agg(F.coalesce(F.max("item_index") + 1, F.lit(FIRST_INDEX))).collect()[0][0]
    if changes is not None:
        touched = changes.select("item_id").distinct()
        events, items = (rows.join(touched, "item_id", "left_semi") for rows in (events, items))
    runtime.merge(ITEMS, number_items(describe_items(events, cuts, settings), items, min_count, next_index))


STAGE = Stage(
    "build_vocabulary",
    "give every item, vertical and event type its number, once and for all",
    run,
    reads=(EVENTS,),
    writes=(CONTEXT_VALUES, ITEMS),
    settings=("vocabulary", "sequences"),
)


def main() -> None:
    stage_main("build_vocabulary")


if __name__ == "__main__":
    main()
