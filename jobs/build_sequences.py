"""build_sequences: sessions + items + context_values → sequences.

For each split one cut; a row holds a user's newest `max_length` actions before it. Train has older parts too, so that
a long history teaches whole. How and why: docs/decisions/0004. One window over (user, newest first) ranks the actions
for all four splits at once, and the rows are collected without a second shuffle.

Rows are made anew for the users whose sessions changed since the last run, and for those who met an item, a vertical or
an event type whose number changed; one MERGE puts them in the place of the old ones. Cut times that move with the
log's end (the default) change everybody's rows: give `valid_from` and `test_from` to go by increments.
"""

from __future__ import annotations

from datetime import timedelta

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs.cli import stage_main
from jobs.config import SequencesSettings
from jobs.runtime import Runtime, Stage, spark_conf
from jobs.splits import Cuts, before_cut, cut_of, cut_times, newest_first, utc
from jobs.tables import CONTEXT_VALUES, ITEMS, SEQUENCES, SESSIONS, conform
from training.batches import FEATURES, MAX_GAP_BUCKET, MAX_PRICE_BUCKET, SAME_MOMENT, SESSION_END

UNKNOWN = 1
SPLITS = ("train", "valid", "test", "score")
# Buckets of the context features; 0 is padding everywhere. Those that training knows too stand in training/batches.py.
GAP_FIRST = 1
PRICE_UNKNOWN, PRICE_NOT_POSITIVE, PRICE_MIN = 1, 2, 3
IN_SESSION = 1


def number_actions(sessions: DataFrame, vocabulary: DataFrame, values: DataFrame) -> DataFrame:
    """One row per event with its numbers. An item outside the training window's vocabulary is unknown (1)."""
    vocabulary = vocabulary.select("item_id", "item_index")
    actions = sessions.select("user_id", "event_count", F.posexplode("events").alias("place", "event")).select(
        "user_id",
        F.when(F.col("place") + 1 < F.col("event_count"), IN_SESSION).otherwise(SESSION_END).alias("session_end"),
        "event.*",
    )
    for kind in ("vertical", "event_type"):
        numbers = values.where(F.col("kind") == kind).select(
            F.col("value").alias(kind), F.col("value_index").alias(f"{kind}_index")
        )
        actions = actions.join(F.broadcast(numbers), kind, "left")
    local = F.from_utc_timestamp("event_ts", F.col("time_zone"))
    return actions.join(vocabulary, "item_id", "left").select(
        "user_id",
        "event_ts",
        "event_id",
        "event_type",
        *[
            F.coalesce(name, F.lit(UNKNOWN)).alias(name)
            for name in ("item_index", "event_type_index", "vertical_index")
        ],
        "session_end",
        (F.hour(local) + 1).alias("hour"),
        F.dayofweek(local).alias("weekday"),
        price_bucket(F.col("amount") / F.coalesce("quantity", F.lit(1.0))).alias("price_bucket"),
    )


def price_bucket(unit_price: Column) -> Column:
    """Half-octaves of the unit price: 15 holds 1.00 to 1.41; NULL (also a quantity of 0) is unknown."""
    bucket = F.floor(2 * F.log2(unit_price)) + 15
    return (
        F.when(unit_price.isNull(), PRICE_UNKNOWN)
        .when(unit_price <= 0, PRICE_NOT_POSITIVE)
        .otherwise(F.greatest(F.lit(PRICE_MIN), F.least(F.lit(MAX_PRICE_BUCKET), bucket)))
        .cast("int")
    )


def gap_bucket(gap_us: Column) -> Column:
    """Octaves of the seconds since the user's last action; NULL (there is none) is the first."""
    octave = F.floor(F.log2(F.greatest(gap_us / 1e6, F.lit(1.0)))) + 3
    return (
        F.when(gap_us.isNull(), GAP_FIRST)
        .when(gap_us == 0, SAME_MOMENT)
        .otherwise(F.least(F.lit(MAX_GAP_BUCKET), octave))
        .cast("int")
    )


def build_sequences(actions: DataFrame, cuts: Cuts, settings: SequencesSettings) -> DataFrame:
    """SEQUENCES rows out of numbered actions."""
    newest = newest_first()
    micros = F.unix_micros("event_ts")
    ranked = actions.withColumn("gap_bucket", gap_bucket(micros - F.lead(micros).over(newest)))
    for split in SPLITS[1:]:  # train shares valid's cut
        before = F.col(f"before_{split}")
        ranked = ranked.withColumn(f"before_{split}", before_cut(split, cuts, settings)).withColumn(
            # From newest to oldest, the running count of actions before the cut is their rank from it: 1, 2, ...
            f"rank_{split}",
            F.when(before, F.count_if(before).over(newest)),
        )
    # At the cut nobody knows whether the session goes on: the newest action always stands for its end, so that the
    # state there asks what comes in the next session. (The true value would tell about events after the cut.)
    session_end = F.when(F.col("newest"), SESSION_END).otherwise(F.col("session_end")).alias("session_end")
    element = F.struct("event_ts", "event_id", *[session_end if name == "session_end" else name for name in FEATURES])
    rows = (
        ranked.withColumn("role", F.explode(F.filter(_roles(cuts, settings), lambda role: role.isNotNull())))
        .select("*", "role.*")
        .select("user_id", "split", "part", "kind", element.alias("action"))
        .groupBy("user_id", "split", "part")
        .agg(*[_in_order(kind).alias(kind) for kind in ("input", "target", "seen")])
    )
    evaluated = F.col("split").isin("valid", "test")
    # A user's own time: the log's end would change every row with every event of anybody.
    last_ts = F.element_at("input", -1)["event_ts"]
    after_newest = F.timestamp_micros(F.unix_micros(last_ts) + 1)
    as_of = after_newest
    if settings.split_by == "time":
        of_cut = F.create_map(*[c for s in SPLITS[:-1] for c in (F.lit(s), utc(cut_of(s, cuts)))])[F.col("split")]
        as_of = F.coalesce(of_cut, after_newest)
    sequences = rows.where(
        (F.size("input") >= F.when(F.col("split") == "train", 2).otherwise(1)) & (~evaluated | (F.size("target") > 0))
    ).select(
        "user_id",
        "split",
        "part",
        as_of.alias("as_of"),
        last_ts.alias("last_ts"),
        F.size("input").alias("length"),
        *[_pluck("input", name).alias(name) for name in FEATURES],
        F.when(evaluated, _pluck("target", "item_index")).alias("target_item_index"),
        F.when(evaluated, _pluck("target", "event_ts")).alias("target_ts"),
        F.when(evaluated, F.array_sort(F.array_distinct(_pluck("seen", "item_index")))).alias("seen_item_index"),
    )
    return conform(sequences, SEQUENCES)


def _roles(cuts: Cuts, settings: SequencesSettings) -> Column:
    """The rows that an action has a part in: an array of (split, part, kind, newest), NULL where it has none."""
    part = F.floor((F.col("rank_valid") - 1) / settings.max_length)
    newest = F.col("rank_valid") == 1
    roles = [_role("train", part, "input", F.col("before_valid") & (part < settings.max_parts), newest)]
    for split in ("valid", "test", "score"):
        rank = F.col(f"rank_{split}")
        roles.append(_role(split, F.lit(0), "input", rank <= settings.max_length, rank == 1))
    predicted = F.col("event_type").isin(settings.target_event_types) if settings.target_event_types else F.lit(True)
    for split, following in (("valid", "test"), ("test", "score")):
        is_target = ~F.col(f"before_{split}") & F.col(f"before_{following}") & predicted
        is_seen = F.col(f"before_{split}") & predicted
        if settings.seen_days and settings.split_by == "time":
            is_seen &= F.col("event_ts") >= utc(cut_of(split, cuts) - timedelta(days=settings.seen_days))
        roles += [_role(split, F.lit(0), "target", is_target), _role(split, F.lit(0), "seen", is_seen)]
    return F.array(*roles)


def _role(split: str, part: Column, kind: str, condition: Column, newest: Column | None = None) -> Column:
    fields = {
        "split": F.lit(split),
        "part": part.cast("int"),
        "kind": F.lit(kind),
        "newest": F.lit(False) if newest is None else newest,
    }
    return F.when(condition, F.struct(*[value.alias(name) for name, value in fields.items()]))


def _in_order(kind: str) -> Column:
    # The structs begin with (event_ts, event_id), so sorting them is sorting by time.
    return F.sort_array(F.collect_list(F.when(F.col("kind") == kind, F.col("action"))))


def _pluck(kind: str, name: str) -> Column:
    return F.transform(kind, lambda action: action[name])


def changed_users(
    sessions: DataFrame, changes: DataFrame, numbers: tuple[DataFrame, DataFrame], old: tuple[DataFrame, DataFrame]
) -> DataFrame:
    """One row (user_id) for each user whose sequences may be others than they were.

    Args:
        changes: the sessions' change data feed.
        numbers, old: the items of the vocabulary (item_id, item_index) and the context values, now and then.
    """
    users = changes.select("user_id")
    items = _differing(numbers[0], old[0], ["item_id"], "item_index")
    values = _differing(numbers[1], old[1], ["kind", "value"], "value_index")
    # Both are rare: an item that comes into the training window's vocabulary by late events; a new vertical or type.
    met = sessions.select("user_id", F.explode("events").alias("event"))
    if not items.isEmpty():
        users = users.union(met.join(F.broadcast(items), F.col("event.item_id") == F.col("item_id")).select("user_id"))
    if not values.isEmpty():
        same = F.when(F.col("kind") == "vertical", F.col("event.vertical")).otherwise(F.col("event.event_type"))
        users = users.union(met.join(F.broadcast(values), same == F.col("value")).select("user_id"))
    return users.distinct()


def _differing(new: DataFrame, old: DataFrame, key: list[str], number: str) -> DataFrame:
    """The keys whose number is another than it was, or that have come or gone."""
    both = new.select(*key, number).join(old.select(*key, F.col(number).alias("old")), key, "full")
    return both.where(~F.col(number).eqNullSafe(F.col("old"))).select(*key)


def in_vocabulary(items: DataFrame, min_count: int) -> DataFrame:
    """The items that a model may know: enough events in the training window."""
    return items.where(F.col("train_count") >= min_count)


def run(runtime: Runtime) -> None:
    settings, min_count = runtime.config.sequences, runtime.config.vocabulary.min_count
    # Categories belong to items, not to actions.
    sessions, values = runtime.read(SESSIONS), runtime.read(CONTEXT_VALUES).where("kind != 'category'")
    items = in_vocabulary(runtime.read(ITEMS), min_count)
    cuts = cut_times(sessions.select(F.col("end_ts").alias("event_ts")), settings)
    fixed = settings.split_by == "leave_one_out" or (settings.valid_from and settings.test_from)
    changes = runtime.incremental(SEQUENCES, SESSIONS) if fixed else None
    old_items, old_values = runtime.previous(SEQUENCES, ITEMS), runtime.previous(SEQUENCES, CONTEXT_VALUES)
    if changes is None or old_items is None or old_values is None:
        sequences = build_sequences(number_actions(sessions, items, values), cuts, settings)
        # Files of like size, as many as the rows want, in an order that has nothing to do with the users.
        shuffled = sequences.hint("rebalance").sortWithinPartitions("split", F.xxhash64("user_id", "split", "part"))
        with spark_conf(runtime.spark, {"spark.sql.files.maxRecordsPerFile": str(settings.rows_per_file)}):
            runtime.write(SEQUENCES, shuffled)
        return
    old = (in_vocabulary(old_items, min_count), old_values.where("kind != 'category'"))
    users = changed_users(sessions, changes, (items, values), old).persist()
    try:
        if users.isEmpty():
            runtime.touch(SEQUENCES)
        else:
            of_users = sessions.join(users, "user_id", "left_semi")
            new = build_sequences(number_actions(of_users, items, values), cuts, settings).persist()
            before = runtime.latest(SEQUENCES).select(*SEQUENCES.key).join(users, "user_id", "left_semi")
            runtime.merge(SEQUENCES, new, deletes=before.join(new, list(SEQUENCES.key), "left_anti"))
            new.unpersist()
    finally:
        users.unpersist()
    # Petastorm, which feeds the training, knows nothing of deletion vectors.
    runtime.purge(SEQUENCES, "split IN ('train', 'valid')")


STAGE = Stage(
    "build_sequences",
    "cut every user's actions into the rows that a model reads",
    run,
    reads=(SESSIONS, ITEMS, CONTEXT_VALUES),
    writes=(SEQUENCES,),
    settings=("vocabulary", "sequences"),
)


def main() -> None:
    stage_main("build_sequences")


if __name__ == "__main__":
    main()
