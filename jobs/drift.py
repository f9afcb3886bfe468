"""How far the log and the vectors have drifted: the days from an evaluation's cut on, against as many days before it.

Drift does not say that a model is bad: it says that what comes in is no longer what came in just before the cut.
For the test split these are about the weeks of validation, so what changed slowly since training does not show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from typing import NamedTuple

import numpy as np
import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs.config import DriftSettings
from jobs.splits import utc
from jobs.tables import events_of
from spark_udfs.alignment import mean_cosine, row_cosines
from training.arrays import Float32, Float64, Int64

_LEAST = 1e-4  # the smallest share of a vertical in `stability`: 0 has no logarithm


class Alarm(NamedTuple):
    """A figure beyond its limit.

    Attributes:
        limit: its key in evaluate.drift.
        vertical: None if the figure covers all.
        message: the message for people, with the limit.
    """

    limit: str
    vertical: str | None
    value: float
    message: str


@dataclass(frozen=True)
class Drift:
    """What moved. NaN: one of the two windows is empty or, for rates and new_items_before, the log does not cover both
    windows.

    Attributes:
        events: events in the window after the cut.
        stability: the population stability index of the verticals' shares.
        rates: by vertical, events after the cut per event before it; without verticals that had none before.
        counts: by vertical, events in both windows together, largest first.
        new_items, new_items_before: share of a window's events whose item was first seen within it. An item too rare
            for the vocabulary does not count as new.
        cosines: of each sampled user's vectors at the cut and at the log's end, [users].
        centroid: cosine of the mean vectors at the cut and at the log's end.
    """

    events: int
    stability: float
    rates: dict[str, float]
    counts: dict[str, int]
    new_items: float
    new_items_before: float
    cosines: Float64
    centroid: float

    @property
    def cosine(self) -> float:
        """The mean of `cosines`; NaN without a user."""
        return float(self.cosines.mean()) if len(self.cosines) else math.nan


def event_counts(sessions: DataFrame, items: DataFrame, cut: datetime, end: datetime) -> DataFrame:
    """Events per vertical from the cut to the end, and in a window of the same length before the cut; of each, those of
    items first seen in that window. Columns vertical, after, before, new_after, new_before.

    Args:
        sessions, items: rows of these tables.
    """
    start = _start(cut, end)
    known = items.select("item_id", "first_ts")
    events = events_of(sessions.where(F.col("end_ts") >= utc(start)), "item_id", "vertical", "event_ts")
    late = F.col("event_ts") >= utc(cut)
    seen = events.where((F.col("event_ts") >= utc(start)) & (F.col("event_ts") < utc(end)))
    # Counted by item first, so that the join moves counts, not events.
    of_items = seen.groupBy("item_id", "vertical").agg(
        F.count_if(late).alias("after"), F.count_if(~late).alias("before")
    )

    def new(side: str, since: datetime) -> Column:
        return F.sum(F.when(F.col("first_ts") >= utc(since), F.col(side)).otherwise(0)).alias(f"new_{side}")

    return (
        of_items.join(known, "item_id", "left")
        .groupBy("vertical")
        .agg(F.sum("after").alias("after"), F.sum("before").alias("before"), new("after", cut), new("before", start))
    )


def reaches_back(sessions: DataFrame, cut: datetime, end: datetime) -> bool:
    """Whether the log begins no later than the window before the cut that `event_counts` uses."""
    return not sessions.where(F.col("start_ts") <= utc(_start(cut, end))).isEmpty()


def _start(cut: datetime, end: datetime) -> datetime:
    """Where the window before the cut begins. In a log of dates (midnights in UTC) the newest event stands for its
    whole day: n dates are compared with n, not with n - 1."""
    newest = end - timedelta(microseconds=1)
    if newest.time() == time.min:
        end = newest + timedelta(days=1)
    return cut - (end - cut)


def drift_of(counts: pd.DataFrame, at_cut: Float32, at_end: Float32, *, comparable: bool = True) -> Drift:
    """The drift figures.

    Args:
        counts: what `event_counts` returns.
        at_cut, at_end: vectors of the same users, float32 [users, width] each.
        comparable: what `reaches_back` returns. If False, a steady vertical would seem to have more events after the
            cut than before, and all items are new where the log begins.
    """
    ordered = counts.assign(all=counts["after"] + counts["before"]).sort_values(
        ["all", "vertical"], ascending=[False, True]
    )
    after, before = int(counts["after"].sum()), int(counts["before"].sum())
    cosines = row_cosines(at_cut, at_end)
    defined = ~np.isnan(cosines)
    one, other = at_cut[defined].astype(np.float64), at_end[defined].astype(np.float64)
    return Drift(
        events=after,
        stability=stability(counts["before"].to_numpy(), counts["after"].to_numpy()),
        rates={row.vertical: int(row.after) / int(row.before) for row in ordered.itertuples() if row.before}
        if comparable
        else dict.fromkeys(ordered["vertical"], math.nan),
        counts={row.vertical: int(row.all) for row in ordered.itertuples()},
        new_items=int(counts["new_after"].sum()) / after if after else math.nan,
        new_items_before=int(counts["new_before"].sum()) / before if before and comparable else math.nan,
        cosines=cosines[defined],
        centroid=mean_cosine(one.mean(axis=0, keepdims=True), other.mean(axis=0, keepdims=True))
        if defined.any()
        else math.nan,
    )


def stability(before: Int64, after: Int64) -> float:
    """The population stability index, Σ (q - p) ln(q / p) over the shares p before and q after (Siddiqi 2006): below
    0.1 little has changed, above 0.25 much. Shares are at least 0.0001. NaN if one window is empty."""
    if not before.sum() or not after.sum():
        return math.nan
    p = np.maximum(before / int(before.sum()), _LEAST)
    q = np.maximum(after / int(after.sum()), _LEAST)
    return float(((q - p) * np.log(q / p)).sum())


def alarms(drift: Drift, settings: DriftSettings) -> list[Alarm]:
    """The figures beyond their limits."""
    found = []

    def check(limit: str, beyond: bool, value: float, message: str, vertical: str | None = None) -> None:
        if beyond:
            where = f" (evaluate.drift.{limit} = {getattr(settings, limit):g})"
            found.append(Alarm(limit, vertical, value, message + where))

    moved = f"the verticals' shares of the events have shifted: stability index {drift.stability:.2f}"
    check("max_stability", drift.stability > settings.max_stability, drift.stability, moved)
    for vertical, count in drift.counts.items():
        rate = drift.rates.get(vertical, math.inf)
        most = settings.max_rate_factor
        beyond = count >= settings.min_events and (rate < 1 / most or rate > most)
        times = (
            f"{rate:.2f} times the events of the period before"
            if vertical in drift.rates
            else "events, but none before"
        )
        check("max_rate_factor", beyond, rate, f"vertical {vertical} has {times}", vertical)
    before = "" if math.isnan(drift.new_items_before) else f" (before: {drift.new_items_before:.0%})"
    new = f"{drift.new_items:.0%} of the events after the cut are of items first seen after it{before}"
    check("max_new_items", drift.new_items > settings.max_new_items, drift.new_items, new)
    turned = f"users' vectors have changed direction: mean cosine {drift.cosine:.2f} between the cut and the log's end"
    check("min_user_cosine", drift.cosine < settings.min_user_cosine, drift.cosine, turned)
    return found
