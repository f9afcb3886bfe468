"""profile_users: sessions + items + context_values + the model in use → user_profiles, and the profile's basis.

A second vector for every user, for other teams' models. It combines the sequence state; the items, the words of their
names and their categories over the whole history; time and value statistics; and a forecast of how often the user will
come (training/profile.py says how). `probe` evaluates this very function. All users are rewritten in one commit, as of
the log's end, because recency changes every day.

If a model has no basis yet, one is fitted on a sample of users and kept in the model's folder. From then on each
dimension of a profile keeps its meaning, so heads that teams have trained stay valid. A new model gets new profiles,
and so does one that `align` has rotated since, because the basis was fitted on the states before the rotation.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp
from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs import align
from jobs.build_sequences import build_sequences, in_vocabulary, number_actions
from jobs.cli import stage_main
from jobs.config import Config, SequencesSettings
from jobs.errors import TrailvecError
from jobs.files import Place
from jobs.item_facts import item_attributes
from jobs.model_folders import add_to_model, model_folder, model_inputs
from jobs.models import encode_sequences, stacked
from jobs.runtime import Runtime, Stage, code_version
from jobs.spark_session import broadcast_if_few, collect_sorted, persisted
from jobs.splits import Cuts, is_target, log_end, utc
from jobs.tables import CONTEXT_VALUES, EVENT_IN_SESSION, ITEMS, SESSIONS, USER_PROFILES, events_of
from spark_udfs.profile import KINDS, counts_of, profiles
from training.arrays import Float64, Int64
from training.checkpoint import rotation_sha256
from training.profile import ABOUT, TENSORS, Basis, Terms, fit_basis, read_basis, write_basis

OF_EVENTS = tuple(name for name in EVENT_IN_SESSION if name != "event_id")  # read of each event
_WINDOWS = (7, 14, 28, 56, 91, 182)  # days before the cut
_TYPES = "sequences.target_event_types"
_MOST_STATISTICS = 100
_MOST_TERMS = 50_000  # limits of items, words and categories in the basis: those that most users have
_HORIZONS = (7, 28)  # days; what the forecast covers from the cut on. It is fitted as of max(_HORIZONS) days before


# ---- event features -------------------------------------------------------------------------------------------------


def before(events: DataFrame, cuts: DataFrame) -> DataFrame:
    """The events strictly before their user's cut, with `days` (double) between the event and the cut.

    Args:
        cuts: user_id, cut (timestamp); one row per user. Users without a row are dropped.
    """
    return _until(events.join(cuts, "user_id"), F.col("cut"))


def _until(events: DataFrame, cut: Column) -> DataFrame:
    days = (F.unix_micros(cut) - F.unix_micros("event_ts")) / F.lit(86400e6)
    return events.where(F.col("event_ts") < cut).withColumn("days", days)


def rfm(visible: DataFrame, targets: list[str]) -> DataFrame:
    """user_id and five log-scaled numbers: days since the last and first action, actions, active days, amount."""
    return (
        visible.where(is_target(targets))
        .groupBy("user_id")
        .agg(
            F.log1p(F.min("days")).alias("recency"),
            F.log1p(F.max("days")).alias("tenure"),
            F.log1p(F.count("*")).alias("actions"),
            F.log1p(_distinct(F.to_date("event_ts"))).alias("active_days"),
            F.log1p(F.greatest(F.sum(F.coalesce("amount", F.lit(0.0))), F.lit(0.0))).alias("amount"),
        )
    )


def _local_time() -> Column:
    """The event's time in the event's time zone."""
    return F.from_utc_timestamp("event_ts", F.col("time_zone"))


def _distinct(values: Column) -> Column:
    # Several count_distinct make Spark duplicate every row once per distinct column.
    return F.size(F.collect_set(values))


def statistics(visible: DataFrame, targets: list[str]) -> DataFrame:
    """user_id, name, value: how often, when and for how much a user acts, in long form.

    The five numbers of `rfm`; those of `pauses`; log counts of actions and active days in windows before the cut; for
    each event type its log count and the closeness of its last event, 1 / (1 + log days); shares of 4-hour bins and
    weekdays (both in the user's zone) and of verticals; mean and standard deviation of the log amount; mean log
    quantity; actions per session and amount per active day. Unknown amounts and quantities count as 0.
    """
    local = _local_time()
    count, day = F.count("*"), F.to_date(local)
    amount = F.log1p(F.greatest("amount", F.lit(0.0)))
    wide = {f"actions_{d}": F.log1p(F.count_if(F.col("days") <= d)) for d in _WINDOWS}
    wide |= {f"days_{d}": F.log1p(_distinct(F.when(F.col("days") <= d, day))) for d in _WINDOWS}
    wide |= {f"hour_{h}": F.count_if(F.floor(F.hour(local) / 4) == h) / count for h in range(6)}
    wide |= {f"weekday_{d}": F.count_if(F.dayofweek(local) == d) / count for d in range(1, 8)}
    wide |= {
        "amount_mean": F.avg(amount),
        "amount_spread": F.stddev_pop(amount),
        "per_session": F.log1p(count / F.greatest(F.count_if("opens"), F.lit(1))),
        "per_day": F.log1p(F.greatest(F.sum("amount"), F.lit(0.0)) / _distinct(day)),
        "quantity": F.avg(F.log1p(F.greatest("quantity", F.lit(0.0)))),
    }
    aggregates = visible.groupBy("user_id").agg(*[value.alias(name) for name, value in wide.items()])
    parts = (aggregates, rfm(visible, targets), pauses(visible, targets))
    long = reduce(DataFrame.union, [of_users.unpivot("user_id", None, "name", "value") for of_users in parts])
    types = visible.groupBy("user_id", "event_type").agg(F.log1p(count).alias("n"), F.log1p(F.min("days")).alias("d"))
    for prefix, value in (("type", F.col("n")), ("closeness", 1 / (1 + F.col("d")))):
        long = long.union(types.select("user_id", F.concat(F.lit(f"{prefix}_"), "event_type"), value))
    of_user = visible.groupBy("user_id").agg(count.alias("all"))
    shares = visible.groupBy("user_id", "vertical").agg(count.alias("n")).join(of_user, "user_id")
    return long.union(shares.select("user_id", F.concat(F.lit("vertical_"), "vertical"), F.col("n") / F.col("all")))


def pauses(visible: DataFrame, targets: list[str]) -> DataFrame:
    """user_id and statistics of the pauses between days with a target action, in days of the user's zone.

    In logs: mean, median, 90th percentile, maximum, standard deviation, mean of the last three; how many pauses lasted
    28 days or more, and how many at least as long as the current one. Not in logs: the latter count per active day; the
    current pause relative to the median and to the maximum (each plus a day); and the probability of 28 days without an
    active day if these were a Poisson process.
    """
    day = F.to_date(_local_time())
    rows = (
        visible.where(is_target(targets))
        .groupBy("user_id")
        .agg(F.sort_array(F.collect_set(day)).alias("dates"), F.min("days").alias("now"), F.max("days").alias("all"))
    )
    later, earlier = (F.expr(f"slice(dates, {start}, size(dates) - 1)") for start in (2, 1))
    rows = rows.withColumn("pauses", F.zip_with(later, earlier, lambda a, b: F.datediff(a, b).cast("double")))
    rows = rows.withColumn("sorted", F.sort_array("pauses")).withColumn("count", F.size("pauses"))

    def mean(values: Column) -> Column:
        return F.aggregate(values, F.lit(0.0), lambda a, b: a + b) / F.nullif(F.size(values), F.lit(0))

    def quantile(share: float) -> Column:
        return F.when(F.col("count") > 0, F.element_at("sorted", F.ceil(share * F.col("count")).cast("int")))

    average = mean(F.col("pauses"))
    longer = F.size(F.filter("pauses", lambda pause: pause >= F.col("now")))
    logs = {
        "mean": average,
        "median": quantile(0.5),
        "most": quantile(0.9),
        "longest": quantile(1.0),
        "spread": F.sqrt(mean(F.transform("pauses", lambda pause: (pause - average) ** 2))),
        "last": mean(F.expr("slice(pauses, greatest(size(pauses) - 2, 1), 3)")),
        "of_28": F.size(F.filter("pauses", lambda pause: pause >= 28)),
        "longer": longer,
    }
    plain = {
        "longer_share": longer / F.size("dates"),
        "now_of_median": F.col("now") / (quantile(0.5) + 1),
        "now_of_longest": F.col("now") / (quantile(1.0) + 1),
        "none_in_28": F.exp(-28 * F.size("dates") / (F.col("all") + 1)),
    }
    wide = {name: F.log1p(value) for name, value in logs.items()} | plain
    return rows.select("user_id", *[F.coalesce(value, F.lit(0.0)).alias(f"pause_{n}") for n, value in wide.items()])


def states(runtime: Runtime, sessions: DataFrame, cuts: DataFrame | None, model_dir: Path, end: datetime) -> DataFrame:
    """user_id and the vector encoded from the events before the user's cut only; without `cuts`, from all events."""
    vocabulary = in_vocabulary(runtime.read(ITEMS), runtime.config.vocabulary.min_count)
    values = runtime.read(CONTEXT_VALUES)
    if cuts is None:
        known = number_actions(sessions, vocabulary, values)
    else:
        actions = number_actions(sessions.join(cuts, "user_id", "left_semi"), vocabulary, values)
        known = actions.join(cuts, "user_id").where("event_ts < cut").drop("cut")
    settings = SequencesSettings(max_length=runtime.config.sequences.max_length)
    rows = build_sequences(known, Cuts(end, end, end), settings, splits=("score",))
    encoded = encode_sequences(runtime, rows, ["user_id"], model_dir=model_dir)
    return encoded.select("user_id", "vector")


# ---- profiles -------------------------------------------------------------------------------------------------------


def profile_rows(
    visible: DataFrame, encoded: DataFrame, numbers: DataFrame, stats: DataFrame, terms: DataFrame | None = None
) -> DataFrame:
    """The inputs of a profile, one row per user of `encoded`: user_id, vector (the state), and for each of KINDS
    <kind>_numbers array<int> and <kind>_values array<double>. The values are: for items the mean quantity per action
    (0: none is known), for categories the number of actions, for statistics the statistic itself.

    Args:
        visible: as `before` returns it.
        encoded: user_id, vector.
        numbers: item_id, item_index, category (its number; 0: none).
        stats: user_id, number, value of the statistics.
        terms: item_index of the items in the basis: only these are listed. None: all items.
    """
    known = visible.join(numbers, "item_id")
    listed = known if terms is None else known.join(F.broadcast(terms), "item_index", "left_semi")
    rows = encoded.select("user_id", "vector")
    counts = {
        "items": listed.groupBy("user_id", F.col("item_index").alias("number")).agg(
            F.avg(F.when(F.col("quantity") > 0, F.col("quantity"))).alias("value")
        ),
        "categories": known.where("category > 0")
        .groupBy("user_id", F.col("category").alias("number"))
        .agg(F.count("*").alias("value")),
        "statistics": stats,
    }
    for kind in KINDS:
        kept = rows.columns
        rows = rows.join(_listed(counts[kind]), "user_id", "left").select(
            *kept,
            F.coalesce("pairs.number", F.array().cast("array<int>")).alias(f"{kind}_numbers"),
            F.coalesce("pairs.value", F.array().cast("array<double>")).alias(f"{kind}_values"),
        )
    return rows


def _listed(counts: DataFrame) -> DataFrame:
    """user_id, number, value → user_id, pairs: one list per user; NULL values become 0.

    Sorted, so that float sums are bit-identical whatever the partitioning.
    """
    pair = F.struct(
        F.col("number").cast("int").alias("number"),
        F.coalesce(F.col("value").cast("double"), F.lit(0.0)).alias("value"),
    )
    return counts.groupBy("user_id").agg(F.sort_array(F.collect_list(pair)).alias("pairs"))


def item_numbers(runtime: Runtime) -> DataFrame:
    """item_id, item_index, category (its number; 0: none) of all items, including rare ones."""
    attributes = item_attributes(runtime.read(ITEMS), runtime.read(CONTEXT_VALUES))
    # Spark overestimates what these joins return, and would shuffle the log by item, once for items and for categories.
    return broadcast_if_few(attributes.select("item_id", "item_index", "category").localCheckpoint())


def numbered(stats: DataFrame, names: tuple[str, ...]) -> DataFrame:
    """The statistics, keyed by their position in `names` instead of by name; others are dropped."""
    schema = "name string, number int"
    places = stats.sparkSession.createDataFrame([(name, number) for number, name in enumerate(names)], schema)
    return stats.join(F.broadcast(places), "name").select("user_id", "number", "value")


def statistic_names(stats: DataFrame) -> tuple[str, ...]:
    """Names of the statistics that are non-zero for the most users, sorted; at most 100."""
    counted = stats.where("value != 0").groupBy("name").count().orderBy(F.desc("count"), "name").limit(_MOST_STATISTICS)
    return tuple(sorted(row["name"] for row in counted.collect()))


def fit(runtime: Runtime, visible: DataFrame, encoded: DataFrame, *, numbers: DataFrame, stats: DataFrame) -> Basis:
    """The basis, fitted on the driver on at most profile.fit_users users of `encoded`.

    Args:
        visible, encoded, numbers: as in `profile_rows`.
        stats: as `statistics` returns it.

    Raises:
        TrailvecError: no user has an event before their cut.
    """
    settings, targets = runtime.config.profile, runtime.config.sequences.target_event_types
    bucket = F.xxhash64("user_id")
    with persisted(encoded.orderBy(bucket, "user_id").limit(settings.fit_users)) as sample:
        visible, stats = (of.join(F.broadcast(sample.select("user_id")), "user_id") for of in (visible, stats))
        names = statistic_names(stats)
        rows = collect_sorted(profile_rows(visible, sample, numbers, numbered(stats, names)), "user_id")
        if rows.empty:
            raise TrailvecError("no user has an event before the cut: there is nothing to build profiles from")
        matrix = stacked(rows["vector"])
        counts = {kind: _counts(rows[f"{kind}_numbers"], rows[f"{kind}_values"]) for kind in KINDS}
        items = Terms.fit(counts["items"], _MOST_TERMS, presence=True)
        earlier, since = _once(visible, targets, names)
    return fit_basis(
        matrix,
        counts,
        names=names,
        items=items,
        item_names=_names_of(runtime, items.numbers),
        before=earlier,
        since=since,
        item_width=settings.item_width,
        width=settings.width,
        most=_MOST_TERMS,
    )


def _once(visible: DataFrame, targets: list[str], names: tuple[str, ...]) -> tuple[sp.csr_matrix, Float64]:
    """The forecast's training data: the users' statistics `max(_HORIZONS)` days before their cuts, [users, statistics],
    and log(1 + days with a target action) within each horizon from then on, [users, horizons]."""
    ago = max(_HORIZONS)
    then = visible.where(F.col("days") > ago).withColumn("days", F.col("days") - ago)
    lists = _listed(numbered(statistics(then, targets), names))
    day = F.to_date(_local_time())
    came = (
        visible.where(is_target(targets))
        .groupBy("user_id")
        .agg(
            F.array(
                *[
                    F.log1p(_distinct(F.when((F.col("days") <= ago) & (F.col("days") > ago - horizon), day)))
                    for horizon in _HORIZONS
                ]
            ).alias("came")
        )
    )
    both = lists.join(came, "user_id", "left").select("user_id", "pairs.number", "pairs.value", "came")
    rows = collect_sorted(both, "user_id")
    none = np.zeros(len(_HORIZONS))
    since = [none if came is None else np.asarray(came, np.float64) for came in rows["came"]]
    return _counts(rows["number"], rows["value"]), np.array(since).reshape(len(rows), len(_HORIZONS))


def _counts(numbers: pd.Series[Any], values: pd.Series[Any]) -> sp.csr_matrix:
    """Per-user lists of numbers and values as a sparse matrix (`counts_of`)."""
    return counts_of(pa.array(numbers, pa.list_(pa.int32())), pa.array(values, pa.list_(pa.float64())))


def _names_of(runtime: Runtime, numbers: Int64) -> list[str]:
    """The names of the items with these (ascending) numbers; "" for items without a name."""
    wanted = F.broadcast(_as_rows(runtime, numbers))
    rows = runtime.read(ITEMS).join(wanted, "item_index").select("item_index", "item_name")
    found = {row["item_index"]: row["item_name"] or "" for row in rows.collect()}
    return [found.get(number, "") for number in numbers.tolist()]


def _as_rows(runtime: Runtime, numbers: Int64) -> DataFrame:
    """The numbers as a frame with one column, item_index."""
    return runtime.spark.createDataFrame(pd.DataFrame({"item_index": numbers}), "item_index int")


def too_late(config: Config, about: dict[str, Any], folder: Place) -> str | None:
    """A warning that names the settings changed since the basis in that folder was fitted; None if none changed, or the
    basis doesn't record them."""
    now = {f"profile.{name}": value for name, value in config.profile.model_dump().items()}
    now[_TYPES] = sorted(config.sequences.target_event_types)
    fitted = {f"profile.{name}": value for name, value in about.get("settings", {}).items()}  # older code recorded none
    fitted[_TYPES] = about.get("target_event_types", now[_TYPES])  # likewise
    others = [f"{name} = {of} (it has {fitted[name]})" for name, of in now.items() if fitted.get(name, of) != of]
    if not others:
        return None
    return (
        f"the profile's basis in {folder} stays as it was fitted, in spite of {', '.join(others)}: set that back, or "
        f"remove {ABOUT} and {TENSORS} there and run `trailvec profile_users --force`, which fits another one, whose "
        f"dimensions mean something else"
    )


def _refuse_other_basis(runtime: Runtime, version: str, sha256: str | None) -> None:
    """Raises TrailvecError if the stored basis of the model is not the one with this hash; None: if there is one."""
    about = runtime.models / version / ABOUT
    if (json.loads(about.read_text())["sha256"] if about.exists() else None) != sha256:
        raise TrailvecError(
            f"another run has fitted a basis of model {version}'s profiles while this one worked: run `trailvec "
            f"profile_users` again when that one has ended"
        )


def run(runtime: Runtime) -> None:
    settings, model_dir = runtime.config.profile, model_folder(runtime)
    align.check_again(runtime, model_dir)
    sessions = runtime.read(SESSIONS)
    end = log_end(sessions, "end_ts")
    targets = runtime.config.sequences.target_event_types
    stored, rotation = read_basis(model_dir), rotation_sha256(model_dir)
    sha256 = None if stored is None else stored[1]["sha256"]
    if stored is not None and stored[1].get("rotation", rotation) != rotation:  # older code recorded none
        runtime.report.notes.append(
            f"the profile's basis of model {model_dir.name} is fitted again: `trailvec align` has rotated the model's "
            f"vectors since, so the dimensions of a profile now mean something else"
        )
        stored = None
    if stored is not None:  # else its statistics would mean something else
        targets = stored[1].get("target_event_types", targets)  # older code recorded none
    with (
        # All users share one cut, the log's end, so no join is needed. On disk: it is read a dozen times and log-sized.
        persisted(_until(events_of(sessions, *OF_EVENTS), utc(end)), StorageLevel.DISK_ONLY) as visible,
        persisted(states(runtime, sessions, None, model_dir, end)) as encoded,  # encoding is the expensive step
    ):
        stats, numbers = statistics(visible, targets), item_numbers(runtime)
        if stored is None:
            runtime.on_progress("fitting the basis")
            basis = fit(runtime, visible, encoded, numbers=numbers, stats=stats)
            about: dict[str, object] = {
                "as_of": end.isoformat(timespec="microseconds"),
                "code_version": code_version(),
                "rotation": rotation,
                "settings": settings.model_dump(),
                "target_event_types": sorted(targets),
            }
            _refuse_other_basis(runtime, model_dir.name, sha256)
            sha256 = write_basis(model_dir, basis, about)
            add_to_model(runtime, model_dir, TENSORS, ABOUT)
        else:
            basis = stored[0]
            if warning := too_late(runtime.config, stored[1], runtime.models / model_dir.name):
                runtime.report.notes.append(warning)
        terms = _as_rows(runtime, basis.terms["items"].numbers)
        rows = profiles(profile_rows(visible, encoded, numbers, numbered(stats, basis.names), terms), basis)
        rows = rows.withColumn("model_version", F.lit(model_dir.name)).withColumn("as_of", utc(end))
        runtime.write(USER_PROFILES, rows)
    try:
        _refuse_other_basis(runtime, model_dir.name, sha256)
    except TrailvecError:
        runtime.touch(USER_PROFILES, done=False)  # else profiles of a basis that is gone would count as up to date
        raise
    widths = ", ".join(f"{part} {width}" for part, width in basis.widths.items())
    current = runtime.newest_current_model()
    if current not in (None, model_dir.name):
        runtime.report.notes.append(
            f"the profiles of model {current}, which is current and which segments use, are not updated: "
            f"run `trailvec profile_users --set model.version={current}`"
        )
    runtime.report.notes.append(f"model {model_dir.name}: dimensions of a profile: {widths}")


STAGE = Stage(
    "profile_users",
    "write a second vector for every user, for other teams' models: sequence, tastes, time and value",
    run,
    reads=(SESSIONS, ITEMS, CONTEXT_VALUES),
    writes=(USER_PROFILES,),
    settings=("profile", "sequences", "vocabulary"),
    also="It also reads the model and, if the current model was trained again, its alignment.json, and writes the "
    "basis of its profiles into the model's folder.",
    inputs=model_inputs,
)


def main() -> None:
    stage_main("profile_users")


if __name__ == "__main__":
    main()
