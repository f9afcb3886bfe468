"""Which events a model may learn from and which it predicts: the two cut times and the target event types."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from jobs.config import TEST_DAYS, VALID_DAYS, SequencesSettings
from jobs.errors import TrailvecError

_A_MONDAY = datetime(1970, 1, 5)
_NOTE = "cuts"


@dataclass(frozen=True)
class Cuts:
    """UTC: training < valid_from ≤ validation < test_from ≤ test < end. All events are before `end`.

    The stage that decides on them, build_vocabulary, and build_sequences note them in their commits.
    """

    valid_from: datetime
    test_from: datetime
    end: datetime

    def are_those_of(self, other: Cuts | None) -> bool:
        """Whether both cut at the same times, wherever the log ends."""
        return other is not None and (self.valid_from, self.test_from) == (other.valid_from, other.test_from)

    def note(self) -> dict[str, dict[str, str]]:
        """As a note for a commit's provenance; `noted_cuts` reads it."""
        return {_NOTE: {name: time.isoformat() for name, time in asdict(self).items()}}


def noted_cuts(provenance: dict[str, Any] | None) -> Cuts | None:
    """The cuts that a commit with this provenance (`Lake.last_writer`) was made with; None if they are not known."""
    noted = ((provenance or {}).get("note") or {}).get(_NOTE)
    return None if noted is None else Cuts(**{name: datetime.fromisoformat(time) for name, time in noted.items()})


def log_end(rows: DataFrame, time: str = "event_ts", since: Cuts | None = None) -> datetime:
    """The moment after the log's newest event, UTC, in one pass over the time column.

    Args:
        rows: events or sessions.
        time: the column whose maximum is the log's newest time: `event_ts` of events, `end_ts` of sessions.
        since: cuts of an earlier log: only files with times from its end on are read, if there are any.

    Raises:
        TrailvecError: the log is empty.
    """
    newest = F.unix_micros(F.max(time))
    last = None
    if since is not None:  # Delta skips the other files by their statistics
        last = rows.where(F.col(time) >= utc(since.end - timedelta(microseconds=1))).agg(newest).collect()[0][0]
    if last is None:
        last = rows.agg(newest).collect()[0][0]
    if last is None:
        raise TrailvecError(
            "table events is empty, or all of its users are flagged: check rejected_events and flagged_users, then run "
            "`trailvec ingest --force`, which reads all inputs again"
        )
    return time_at(last + 1)  # exclusive, so that the last event too is before it


def cut_times(end: datetime, settings: SequencesSettings) -> Cuts:
    """The cuts of a log that ends at `end`: those configured; otherwise so many days before the last midnight, UTC, at
    which cuts move, which is every `cut_step_days` days (if these are weeks, on Mondays).

    Raises:
        TrailvecError: the configured times are out of order.
    """
    step = timedelta(days=settings.cut_step_days)
    moved = end - (end - _A_MONDAY) % step
    cuts = Cuts(
        valid_from=settings.valid_from or moved - timedelta(days=VALID_DAYS),
        test_from=settings.test_from or moved - timedelta(days=TEST_DAYS),
        end=end,
    )
    if not cuts.valid_from <= cuts.test_from <= cuts.end:
        raise TrailvecError(
            f"sequences.valid_from = {cuts.valid_from} and sequences.test_from = {cuts.test_from} must be in order "
            f"and not after the log's end, {cuts.end}: correct them (one that is not set follows the "
            f"log's end: set both)"
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
