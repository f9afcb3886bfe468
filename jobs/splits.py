"""Which events a model may learn from and which it predicts: the two cut times and the target event types."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from jobs.config import TEST_DAYS, VALID_DAYS, SequencesSettings
from jobs.errors import TrailvecError


@dataclass(frozen=True)
class Cuts:
    """UTC: training < valid_from ≤ validation < test_from ≤ test < end. All events are before `end`."""

    valid_from: datetime
    test_from: datetime
    end: datetime


def cut_times(rows: DataFrame, settings: SequencesSettings, time: str = "event_ts") -> Cuts:
    """The cut times of a log, in one pass over the time column; if cuts are configured, only over files after the later
    one.

    Args:
        rows: events or sessions.
        time: the column whose maximum is the log's end: `event_ts` of events, `end_ts` of sessions.

    Raises:
        TrailvecError: the log is empty, or the configured times are out of order.
    """
    newest = F.unix_micros(F.max(time))
    configured = [cut for cut in (settings.valid_from, settings.test_from) if cut is not None]
    # Delta skips files that end before it by their statistics.
    last = rows.where(F.col(time) >= utc(max(configured))).agg(newest).collect()[0][0] if configured else None
    if last is None:
        last = rows.agg(newest).collect()[0][0]
    if last is None:
        raise TrailvecError(
            "table events is empty, or all of its users are flagged: check rejected_events and flagged_users, then run "
            "`trailvec ingest --force`, which reads all inputs again"
        )
    # Exclusive, so that the last event too is strictly before it.
    end = time_at(last + 1)
    cuts = Cuts(
        valid_from=settings.valid_from or end - timedelta(days=VALID_DAYS),
        test_from=settings.test_from or end - timedelta(days=TEST_DAYS),
        end=end,
    )
    if not cuts.valid_from <= cuts.test_from <= cuts.end:
        raise TrailvecError(
            f"sequences.valid_from = {cuts.valid_from} and sequences.test_from = {cuts.test_from} must be in order "
            f"and not after the log's end, {cuts.end}: correct them"
        )
    return cuts


def before_cut(split: str, cuts: Cuts, settings: SequencesSettings) -> Column:
    """True for events before the cut of `split` (train and valid share one).

    By time: event_ts before the cut. Leave-one-out: all of a user's events except the last two (train, valid) or the
    last one (test).
    """
    if settings.split_by == "leave_one_out":
        left_out = {"train": 2, "valid": 2, "test": 1}[split]
        newest_first = Window.partitionBy("user_id").orderBy(F.desc("event_ts"), F.desc("event_id"))
        return F.row_number().over(newest_first) > left_out
    return F.col("event_ts") < utc(cut_of(split, cuts))


def is_target(event_types: list[str]) -> Column:
    """True for events of these types, the ones to predict (`sequences.target_event_types`); if empty, for all."""
    return F.col("event_type").isin(event_types) if event_types else F.lit(True)


def cut_of(split: str, cuts: Cuts) -> datetime:
    """The time of a split's cut."""
    return {"train": cuts.valid_from, "valid": cuts.valid_from, "test": cuts.test_from}[split]


def utc(time: datetime) -> Column:
    """A naive UTC time as a Spark timestamp, whatever zone Python and the session are in."""
    return F.timestamp_micros(F.lit(microseconds(time)))


def microseconds(time: datetime) -> int:
    """A naive UTC time as microseconds since 1970."""
    return (time - datetime(1970, 1, 1)) // timedelta(microseconds=1)


def time_at(us: int) -> datetime:
    """The naive UTC time that is `us` microseconds after 1970."""
    return datetime(1970, 1, 1) + timedelta(microseconds=us)


def refuse_leak(model: str, trained_to: datetime, cut: datetime, *, evaluator: str, instead: str) -> None:
    """Law 4: a model is evaluated only on events after its training data.

    Args:
        trained_to: the model's as_of.
        evaluator, instead: for the message: what evaluates on events after the cut; the remedy besides retraining.

    Raises:
        TrailvecError: the model was trained on events after the cut.
    """
    if trained_to > cut:
        raise TrailvecError(
            f"model {model} was trained on events up to {trained_to}, but {evaluator} asks about events after {cut}: "
            f"{instead}, or train only up to that time"
        )
