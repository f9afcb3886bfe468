"""build_sequences: sessions + items + context_values → sequences.

Each split has one cut; a row holds a user's newest `max_length` actions before it. The train split also has rows of
older actions, so that the whole of a long history is learnt from. How and why: docs/decisions/0004. One shuffle by
user, one sort by (user_id, event_ts, event_id), then Arrow (`spark_udfs/sequences.py`).

An incremental run rebuilds the rows of users whose sessions changed since the last run, or who acted on an item, a
vertical or an event type whose number changed, and only in the splits that the change reaches. One MERGE replaces the
old rows. The cut times are those up to which build_vocabulary has counted. When they move (by default each week),
every user's rows change, and all are rebuilt.
"""

from __future__ import annotations

from datetime import datetime
from functools import partial
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs.build_vocabulary import numbers_of, unit_price
from jobs.cli import stage_main
from jobs.config import SequencesSettings
from jobs.errors import TrailvecError
from jobs.runtime import Runtime, Stage
from jobs.spark_session import FEW, broadcast_if_few, persisted, spark_conf
from jobs.splits import Cuts, cut_of, cut_times, is_target, log_end, microseconds, noted_cuts, utc
from jobs.tables import CONTEXT_VALUES, ITEMS, SEQUENCES, SESSIONS, conform
from spark_udfs.sequences import GIVEN, SPLITS, CutRules, cut_sequences
from training.batches import MAX_PRICE_BUCKET, SESSION_END, UNKNOWN

# Buckets of the context features; 0 is always padding. Those that training uses too are in training/batches.py.
PRICE_UNKNOWN, PRICE_NOT_POSITIVE, PRICE_MIN = 1, 2, 3
IN_SESSION = 1
SHARED_SETTINGS = ("split_by", "valid_from", "test_from", "target_event_types")  # those that items and sequences share


def number_actions(sessions: DataFrame, vocabulary: DataFrame, values: DataFrame) -> DataFrame:
    """One row per event, with ids as numbers. An item outside the training window's vocabulary is unknown (1)."""
    vocabulary = vocabulary.select("item_id", "item_index")
    actions = sessions.select("user_id", "event_count", F.posexplode("events").alias("place", "event")).select(
        "user_id",
        F.when(F.col("place") + 1 < F.col("event_count"), IN_SESSION).otherwise(SESSION_END).alias("session_end"),
        "event.*",
    )
    for kind in ("vertical", "event_type"):
        actions = actions.join(F.broadcast(numbers_of(values, kind)), kind, "left")
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
        price_bucket(unit_price()).alias("price_bucket"),
    )


def price_bucket(price: Column) -> Column:
    """Half-octave buckets of the unit price: 15 is 1.00 to 1.41; NULL (also for a quantity of 0) is unknown."""
    bucket = F.floor(2 * F.log2(price)) + 15
    return (
        F.when(price.isNull(), PRICE_UNKNOWN)
        .when(price <= 0, PRICE_NOT_POSITIVE)
        .otherwise(F.greatest(F.lit(PRICE_MIN), F.least(F.lit(MAX_PRICE_BUCKET), bucket)))
        .cast("int")
    )


def build_sequences(
    actions: DataFrame, cuts: Cuts, settings: SequencesSettings, splits: tuple[str, ...] = SPLITS
) -> DataFrame:
    """SEQUENCES rows of `splits` from numbered actions: one shuffle by user, one sort, then Arrow
    (`spark_udfs/sequences.py`)."""
    rules = CutRules(
        max_length=settings.max_length,
        max_parts=settings.max_parts,
        valid_us=microseconds(cuts.valid_from),
        test_us=microseconds(cuts.test_from),
        leave_one_out=settings.split_by == "leave_one_out",
        seen_us=settings.seen_days * 86_400_000_000 or None,
        splits=splits,
    )
    predicted = is_target(settings.target_event_types).alias("predicted")
    sorted_actions = (
        actions.select("user_id", "event_ts", "event_id", predicted, *GIVEN)
        .repartition("user_id")
        .sortWithinPartitions("user_id", "event_ts", "event_id")
        .drop("event_id")
    )
    return conform(sorted_actions.mapInArrow(partial(cut_sequences, rules=rules), SEQUENCES.schema()), SEQUENCES)


def changed_users(
    sessions: DataFrame, changes: DataFrame, items: DataFrame | None, values: DataFrame | None
) -> DataFrame:
    """user_id, since: users whose sequences may have changed, and the start of their earliest session concerned.

    Args:
        changes: the sessions' change data feed.
        items, values: item_id, and kind and value, whose numbers changed; None: none did.
    """
    users = changes.select("user_id", "start_ts")
    # Both are rare: late events that bring an item into the training window's vocabulary (though loading a vertical's
    # whole past may bring millions at once), and a new vertical or event type.
    if items is not None and not (items := items.localCheckpoint()).isEmpty():
        session_items = sessions.select(
            "user_id", "start_ts", F.explode(F.array_distinct("events.item_id")).alias("item_id")
        )
        users = users.union(
            session_items.join(broadcast_if_few(items), "item_id", "left_semi").select("user_id", "start_ts")
        )
    if values is not None and not values.isEmpty():
        session_events = sessions.select("user_id", "start_ts", F.explode("events").alias("event"))
        same = F.when(F.col("kind") == "vertical", F.col("event.vertical")).otherwise(F.col("event.event_type"))
        users = users.union(
            session_events.join(F.broadcast(values), same == F.col("value")).select("user_id", "start_ts")
        )
    return users.groupBy("user_id").agg(F.min("start_ts").alias("since"))


def may_differ(split: str, since: Column, cuts: Cuts, settings: SequencesSettings) -> Column:
    """Whether a user's rows of the split may change if their sessions changed from the one starting at `since` on.

    A train row ends at valid's cut, and a valid row's targets at test's: later events, such as most of a new batch,
    change neither. In leave-one-out every event moves all cuts.
    """
    if settings.split_by == "leave_one_out" or split in ("test", "score"):
        return F.lit(True)
    return since < utc(cuts.valid_from if split == "train" else cuts.test_from)


def _differing(new: DataFrame, old: DataFrame, key: list[str], number: str) -> DataFrame:
    """The keys whose number changed, or that were added or removed."""
    both = new.select(*key, number).join(old.select(*key, F.col(number).alias("old")), key, "full")
    return both.where(~F.col(number).eqNullSafe(F.col("old"))).select(*key)


def in_vocabulary(items: DataFrame, min_count: int) -> DataFrame:
    """The items that a model may know: enough events in the training window."""
    return items.where(F.col("train_count") >= min_count)


def refuse_other_counts(runtime: Runtime, rows: dict[str, Any], min_count: int, cut: datetime | None = None) -> None:
    """Law 4: the counts in `items` decide what a model may know. build_vocabulary took them before its own cut, which
    must therefore not be later than that of the rows; and `items` must have all items that a model may know.

    Args:
        rows: the [sequences] settings that the rows are made with, as a commit's provenance has them.
        min_count: the number of events from which a model is to know an item.
        cut: of the rows; None: not known, or to be that of the counts.

    Raises:
        TrailvecError: items was counted up to a later cut, with other settings, or with a higher min_count, so that
            rarer items have no row.
    """
    provenance = runtime.last_writer(ITEMS)
    if provenance and (was := provenance["config"]["vocabulary"]["min_count"]) > min_count:
        raise TrailvecError(
            f"table items was made with vocabulary.min_count = {was}, not {min_count} as configured, so rarer items "
            f"have no row in it: run `trailvec build_vocabulary` and `trailvec build_sequences` first"
        )
    if provenance and (other := other_setting(provenance["config"]["sequences"], rows, *SHARED_SETTINGS)):
        raise TrailvecError(
            f"table items was counted with {other} as for the rows of sequences: run `trailvec build_vocabulary` and "
            f"`trailvec build_sequences` first"
        )
    counted = noted_cuts(provenance)
    if cut and counted and counted.valid_from > cut and rows["split_by"] == "time":
        raise TrailvecError(
            f"table items was counted up to {counted.valid_from}, since training's end has moved, but the rows of "
            f"sequences were cut at {cut}: run `trailvec build_sequences` first"
        )


def refuse_other_rows(runtime: Runtime, split: str) -> None:
    """Raises TrailvecError if sequences was made with settings other than today's, which the evaluation would apply to
    its rows, or with item counts other than those in `items`."""
    provenance, now = runtime.last_writer(SEQUENCES), runtime.provenance()["config"]
    min_count = now["vocabulary"]["min_count"]
    if provenance:
        other = other_setting(provenance["config"]["sequences"], now["sequences"], *SHARED_SETTINGS, "seen_days")
        if (was := provenance["config"]["vocabulary"]["min_count"]) != min_count:
            other = f"vocabulary.min_count = {was}, not {min_count}"
        if other:
            raise TrailvecError(
                f"table sequences was made with {other} as configured: run `trailvec build_vocabulary` and "
                f"`trailvec build_sequences` first, or set it back"
            )
    cuts = noted_cuts(provenance)
    refuse_other_counts(runtime, now["sequences"], min_count, cut_of(split, cuts) if cuts else None)


def other_setting(old: dict[str, Any], now: dict[str, Any], *names: str) -> str | None:
    """The first of these [sequences] settings that differs, in words; None if none does."""
    differing = (name for name in names if old.get(name) != now.get(name))
    return next((f"sequences.{name} = {old.get(name)}, not {now.get(name)}" for name in differing), None)


def _cuts_of_counts(runtime: Runtime) -> Cuts:
    """The cuts up to which build_vocabulary has counted `items`. If something other than trailvec has changed its rows
    since (a RESTORE, say), they are not known: then those of today's log.

    Raises:
        TrailvecError: code that noted no cuts has counted it, or two runs at once.
    """
    provenance = runtime.last_writer(ITEMS)
    if provenance is None:
        return cut_times(log_end(runtime.read(SESSIONS), "end_ts"), runtime.config.sequences)
    if (cuts := noted_cuts(provenance)) is None:
        raise TrailvecError("table items does not say up to when it was counted: run `trailvec build_vocabulary` first")
    return cuts


def run(runtime: Runtime) -> None:
    settings, min_count = runtime.config.sequences, runtime.config.vocabulary.min_count
    refuse_other_counts(runtime, runtime.provenance()["config"]["sequences"], min_count)
    # Categories belong to items, not to actions.
    sessions, values = runtime.read(SESSIONS), runtime.read(CONTEXT_VALUES).where("kind != 'category'")
    items = in_vocabulary(runtime.read(ITEMS), min_count)
    cuts, noted = _cuts_of_counts(runtime), noted_cuts(runtime.last_writer(SEQUENCES))
    fixed = runtime.exists(SEQUENCES) and (settings.split_by == "leave_one_out" or cuts.are_those_of(noted))
    if noted and not fixed and not runtime.forced:
        runtime.report.notes.append(
            f"table sequences is rebuilt in full: the cuts have moved to {cuts.valid_from} and {cuts.test_from}"
        )
    made_from = runtime.stage_version(SEQUENCES) if fixed else -1  # read before deciding whether to go on incrementally
    changes = runtime.incremental(SEQUENCES, SESSIONS) if fixed else None
    # (Not asked for a full rebuild: `previous` would only report that the old versions are gone.)
    old_items = None if changes is None else runtime.previous(SEQUENCES, ITEMS)
    old_values = None if changes is None else runtime.previous(SEQUENCES, CONTEXT_VALUES)
    if changes is None or old_items is None or old_values is None:
        sequences = build_sequences(number_actions(sessions, items, values), cuts, settings)
        # Files of similar size, as many as the rows need, in an order independent of the users.
        shuffled = sequences.hint("rebalance").sortWithinPartitions("split", F.xxhash64("user_id", "split", "part"))
        with spark_conf(runtime.spark, {"spark.sql.files.maxRecordsPerFile": str(settings.rows_per_file)}):
            runtime.write(SEQUENCES, shuffled, note=cuts.note())
        return
    other_items, other_values = None, None
    if not runtime.is_unchanged(SEQUENCES, ITEMS):
        other_items = _differing(items, in_vocabulary(old_items, min_count), ["item_id"], "item_index")
    if not runtime.is_unchanged(SEQUENCES, CONTEXT_VALUES):
        other_values = _differing(values, old_values.where("kind != 'category'"), ["kind", "value"], "value_index")
    with persisted(changed_users(sessions, changes, other_items, other_values)) as users:
        differ = [F.max(may_differ(split, F.col("since"), cuts, settings)).alias(split) for split in SPLITS]
        found = users.agg(F.count("*").alias("users"), *differ).collect()[0]
        splits = tuple(split for split in SPLITS if found[split])
        if splits:
            actions = number_actions(sessions.join(users, "user_id", "left_semi"), items, values)
            _update(runtime, actions, users, cuts, splits, few=found["users"] <= FEW, made_from=made_from)
        else:
            runtime.touch(SEQUENCES, note=cuts.note(), made_from=made_from)


def _update(
    runtime: Runtime,
    actions: DataFrame,
    users: DataFrame,
    cuts: Cuts,
    splits: tuple[str, ...],
    *,
    few: bool,
    made_from: int,
) -> None:
    """Replaces the users' rows of `splits` that may differ; `few`: there are at most FEW users; `made_from`: as in
    `Runtime.merge`."""
    settings = runtime.config.sequences

    def concerned(rows: DataFrame) -> DataFrame:
        differ = F.lit(False)
        for split in splits:
            differ |= (F.col("split") == split) & may_differ(split, F.col("since"), cuts, settings)
        return rows.join(users, "user_id").where(differ).drop("since")

    with persisted(concerned(build_sequences(actions, cuts, settings, splits))) as new:
        before = concerned(runtime.latest(SEQUENCES).select(*SEQUENCES.key).where(F.col("split").isin(*splits)))
        gone = before.join(new, list(SEQUENCES.key), "left_anti")
        # Deletion vectors only hide the old rows. Training, which can't read such files, has them rewritten.
        where = F.col("old.split").isin(*splits)
        runtime.merge(SEQUENCES, new, deletes=gone, where=where, few=few, note=cuts.note(), made_from=made_from)


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
