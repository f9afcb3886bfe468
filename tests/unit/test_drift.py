"""Drift, by numbers that one can check by hand."""

from __future__ import annotations

import math
from datetime import datetime, timedelta, timezone

import numpy as np
import pandas as pd
import pytest

from jobs.config import DriftSettings
from jobs.drift import Drift, _start, alarms, drift_of, stability

LIMITS = DriftSettings(max_stability=0.25, max_rate_factor=3, min_events=100, max_new_items=0.3, min_user_cosine=0.5)


@pytest.mark.parametrize(("newest", "start"), [("06 00:00", "01 00:00"), ("06 12:00", "01 11:59:59.999999")])
def test_in_a_log_of_dates_as_many_are_before_the_cut_as_after_it(newest: str, start: str) -> None:
    """3 June is the last day before the cut: of the dates 1 to 6 June three are on each side."""
    cut, after, before = (
        datetime.fromisoformat(f"2024-06-{day}").replace(tzinfo=timezone.utc) for day in ("04", newest, start)
    )
    assert _start(cut, after + timedelta(microseconds=1)) == before


def moved(**other: object) -> Drift:
    given: dict[str, object] = {
        "events": 1000,
        "stability": 0.1,
        "rates": {"food": 1.0, "rides": 0.5},
        "counts": {"food": 500, "rides": 500},
        "new_items": 0.1,
        "new_items_before": 0.1,
        "cosines": np.array([1.0, 0.5]),
        "centroid": 0.9,
    }
    return Drift(**(given | other))  # type: ignore[arg-type]


def test_the_stability_index_is_that_of_the_formula() -> None:
    # Shares 1/2 and 1/2 become 3/4 and 1/4: (1/4) ln(3/2) + (-1/4) ln(1/2).
    assert stability(np.array([5, 5]), np.array([9, 3])) == pytest.approx(0.25 * math.log(1.5) + 0.25 * math.log(2))
    assert stability(np.array([5, 5]), np.array([50, 50])) == 0
    # A vertical that was not there counts as a share of one in ten thousand.
    new = stability(np.array([1, 0]), np.array([1, 1]))
    assert new == pytest.approx(-0.5 * math.log(0.5) + (0.5 - 1e-4) * math.log(0.5 / 1e-4))
    assert math.isnan(stability(np.array([0, 0]), np.array([1, 1])))


def test_figures_of_a_small_log() -> None:
    counts = pd.DataFrame(
        {
            "vertical": ["rides", "food", "new"],
            "after": [30, 10, 20],
            "before": [10, 40, 0],
            "new_after": [5, 0, 10],
            "new_before": [0, 5, 0],
        }
    )
    at_cut = np.array([[1, 0], [0, 2], [0, 0]], np.float32)
    at_end = np.array([[2, 0], [3, 0], [1, 1]], np.float32)  # the same direction; a right angle; no direction before
    drift = drift_of(counts, at_cut, at_end)
    assert drift.events == 60
    assert drift.rates == {"food": 0.25, "rides": 3.0}
    assert list(drift.counts.items()) == [("food", 50), ("rides", 40), ("new", 20)]
    assert (drift.new_items, drift.new_items_before) == (0.25, 0.1)
    assert drift.cosines.tolist() == [1.0, 0.0]
    assert drift.centroid == pytest.approx(1 / math.sqrt(5))  # (1/2, 1) and (5/2, 0)


def test_a_log_that_does_not_reach_over_the_time_before_gives_no_rates() -> None:
    """36 days of a steady log, cut 28 days before its end: 28 days beside 8."""
    counts = pd.DataFrame({"vertical": ["food", "new"], "after": [280, 150], "before": [80, 0]})
    counts[["new_after", "new_before"]] = 0
    none = np.empty((0, 2), np.float32)
    assert {alarm.vertical for alarm in alarms(drift_of(counts, none, none), LIMITS)} >= {"food", "new"}
    drift = drift_of(counts, none, none, comparable=False)
    assert all(math.isnan(rate) for rate in drift.rates.values())
    assert {alarm.limit for alarm in alarms(drift, LIMITS)} == {"max_stability"}  # shares are of whatever time
    counts["new_after"], counts["new_before"] = [100, 150], [80, 0]
    (message,) = [
        a.message for a in alarms(drift_of(counts, none, none, comparable=False), LIMITS) if "first seen" in a.message
    ]
    assert (
        message
        == "58% of the events after the cut are of items first seen after it (evaluate.drift.max_new_items = 0.3)"
    )


def test_within_the_limits_nobody_is_called() -> None:
    assert alarms(moved(), LIMITS) == []


@pytest.mark.parametrize(
    ("other", "limit", "said"),
    [
        ({"stability": 0.3}, "max_stability", "stability index 0.30 (evaluate.drift.max_stability = 0.25)"),
        ({"rates": {"food": 4.0, "rides": 1.0}}, "max_rate_factor", "vertical food has 4.00 times the events"),
        ({"rates": {"food": 1.0, "rides": 0.2}}, "max_rate_factor", "vertical rides has 0.20 times the events"),
        ({"rates": {"food": 1.0}}, "max_rate_factor", "vertical rides has events, but none before"),
        (
            {"new_items": 0.4},
            "max_new_items",
            "40% of the events after the cut are of items first seen after it (before: 10%",
        ),
        ({"cosines": np.array([0.5, 0.25])}, "min_user_cosine", "mean cosine 0.38"),
    ],
)
def test_a_figure_beyond_its_limit_is_said(other: dict[str, object], limit: str, said: str) -> None:
    (alarm,) = alarms(moved(**other), LIMITS)
    assert alarm.limit == limit
    assert said in alarm.message


def test_small_verticals_and_empty_windows_raise_no_alarm() -> None:
    assert alarms(moved(rates={"food": 9.0, "rides": 1.0}, counts={"food": 99, "rides": 500}), LIMITS) == []
    empty = moved(stability=math.nan, new_items=math.nan, cosines=np.array([]), centroid=math.nan, rates={}, counts={})
    assert alarms(empty, LIMITS) == []
