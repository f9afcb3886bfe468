"""The page, read by html.parser: what it needs, what it says, and that no value is taken for HTML."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from jobs.evaluation_page import Example, Facts, Map, Neighbour, figure, page
from jobs.pictures import Point, bars, dots, training
from tests.unit.test_model_card import ABOUT

EVIL = "<script>alert('1')</script> & \"$5\" _or_ more"
EMPTY = {"path", "meta", "br", "use", "rect", "img", "link", "input", "hr", "line"}


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.style = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.text += " "

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.text += data


def row(task: str, method: str, metric: str, value: float, *of: Any) -> dict[str, Any]:
    kind, name, low, high = of or ("all", "all", value - 0.01, value + 0.01)
    return {
        "task": task,
        "method": method,
        "metric": metric,
        "slice": kind,
        "slice_value": name,
        "value": value,
        "low": low,
        "high": high,
        "counted": 1234,
    }


ROWS = [
    row("next", "model", "ndcg@10", 0.125),
    row("next", "popularity", "ndcg@10", 0.0625),
    row("next", "model_and_habit", "ndcg@10", 0.5),
    row("next", "own_frequency", "model_and_habit_lead_ndcg@10", 0.125),
    row("next", "popularity", "model_lead_ndcg@10", 0.0625),
    row("next", "own_frequency", "model_lead_ndcg@10", -0.25),
    row("next", "item_knn", "model_lead_ndcg@10", 0.005),
    row("next", "model", "popularity_bias@10", float(np.log(2.5))),
    row("next", "model", "coverage@10", 0.375, "all", "all", None, None),
    row("next", "model", "ndcg@10", 0.75, "vertical", EVIL, 0.5, 1.0),
    row("next", "model", "ndcg@10", 0.1875, "history", "5-19", 0.125, 0.25),
    row("next", "model", "ndcg@10", 0.2, "hours", "24-72", 0.1, 0.3),
    row("space", "items", "hubness@10", 1.375, "all", "all", None, None),
    row("space", "items", "dead_dimensions", 1.0, "all", "all", None, None),
    row("drift", "events", "stability_index", 0.375, "all", "all", None, None),
    row("drift", "users", "cosine", 0.875, "all", "all", 0.75, 1.0),
    row("drift", "events", "rate", 1.25, "vertical", EVIL, None, None),
    row("drift", "alarm", "max_stability", 0.375, "all", "all", None, None),
    row("drift", "alarm", "max_rate_factor", 1.25, "vertical", EVIL, None, None),
    row("drift", "alarm", "max_rate_factor", float("inf"), "vertical", "rides", None, None),
]


def probe(task: str, features: str = "vector", head: str = "logistic", value: float = 0.75) -> dict[str, Any]:
    of = {"task": task, "features": features, "head": head, "value": value}
    return of | {"model_version": "abc123", "metric": "auc", "std": 0.0625, "users": 4321, "positives": 987}


def facts(**other: Any) -> Facts:
    points = np.random.default_rng(1).normal(size=(30, 2))
    example = Example(EVIL, EVIL, [Neighbour(EVIL, "food", 0.875)])
    given: dict[str, Any] = {
        "fingerprint": "feed",
        "version": "abc123",
        "split": "test",
        "about": ABOUT,
        "rows": ROWS,
        "versions": [("abc123", True, ABOUT, ROWS), ("old", False, {}, [row("new", "model", "ndcg@10", 0.03125)])],
        "items": Map(points, [EVIL, "food", "_hidden"] * 10, (0.5, 0.25)),
        "users": Map(points, [None, f"{EVIL}s", None] * 10, (0.5, 0.25)),
        "examples": [example],
        "sample": 9876,
    }
    return Facts(**(given | other))


def test_it_needs_nothing_but_itself() -> None:
    text = page(facts(probes=[probe(EVIL)]))
    seen = Page(text)
    for tag, attributes in seen.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "img"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name.startswith("xmlns"):  # a name, never fetched
                continue
            assert "//" not in (value or ""), (tag, name, value)
            if name in ("href", "xlink:href", "src"):
                assert str(value).startswith("#")
    assert "@import" not in text
    assert "url(" not in seen.style
    assert "<!DOCTYPE svg" not in text
    assert seen.open == []


def test_names_are_text() -> None:
    seen = Page(page(facts(probes=[probe(EVIL)])))
    said = " ".join(seen.text.split())
    # The example, its vertical, its neighbour, the slice's row, the probe, the drift's alarm and row; the pictures
    # shorten it.
    assert said.count(EVIL) == 7
    assert said.count(f"{EVIL[:19]}…{EVIL[-10:]}") == 3  # axes
    assert "_hidden" in said


def test_it_says_what_the_rows_say() -> None:
    seen = Page(page(facts()))
    said = " ".join(seen.text.split())
    assert (
        "Any next item, the model (1,234 users, NDCG@10 0.1250 0.1150 to 0.1350): better than most popular items"
        in said
    )
    assert (
        "Any next item, the model and habit (1,234 users, NDCG@10 0.5000 0.4900 to 0.5100): "
        "better than the user's own most frequent (+0.1250, +0.1150 to +0.1350)." in said
    )
    assert "worse than the user's own most frequent (-0.2500, -0.2600 to -0.2400)" in said
    assert "level with item-kNN (+0.0050, -0.0050 to +0.0150)" in said
    few = " ".join(Page(page(facts(rows=[each | {"counted": 29} for each in ROWS]))).text.split())
    lead = "not reliably different from most popular items (+0.0625,"
    assert f"(29 users, NDCG@10 0.1250 0.1150 to 0.1350): {lead}" in few
    assert "the model 0.1250 0.1150 to 0.1350 2.50" in said  # twice and a half as popular
    assert "0.3750" in said
    assert "5-19 1,234 0.1875 0.1250 to 0.2500" in said
    assert "hubness of items 1.3750" in said
    assert "dead dimensions of items 1 directions with" in said
    assert "Alarm: 0.3750 is beyond evaluate.drift.max_stability." in said
    none_before = "rides: events after the cut, but none in as many days before it"
    assert f"Alarm: {none_before} (evaluate.drift.max_rate_factor)." in said
    assert "cosine of a user's vectors 0.8750 0.7500 to 1.0000" in said
    assert "In a sample of 9,876 items: the one acted on most in each of the largest verticals" in said
    assert "abc123 (current)" in said
    assert "old 0.0312" in said


def test_it_says_what_was_trained_on_and_what_the_figures_are_of() -> None:
    bare: dict[str, Any] = {"rows": [], "items": Map(), "users": Map()}  # pictures take their time
    timed = {name: value for name, value in ABOUT.items() if name != "training"}
    last = copy.deepcopy(timed)
    last["provenance"]["config"]["sequences"]["split_by"] = "leave_one_out"
    before, others = (
        "trained on actions before 2024-06-01 00:00.",
        "trained on all of a user's actions but the last two.",
    )
    for about, split, expected in (
        (timed, "test", f"{before} All figures are for the test window, which training never saw;"),
        (timed, "valid", f"{before} All figures are for the valid window, which chose the epoch;"),
        (last, "test", f"{others} All figures are for each user's last action, which training never saw;"),
        (last, "valid", f"{others} All figures are for each user's last action but one, which chose the epoch;"),
    ):
        assert expected in " ".join(Page(page(facts(about=about, split=split, **bare))).text.split())


@pytest.mark.parametrize("probes", [[], [probe("churn")]])
def test_its_sections_are_there_and_linked(probes: list[dict[str, Any]]) -> None:
    seen = Page(page(facts(probes=probes)))
    there = [attributes["id"] for tag, attributes in seen.tags if tag == "section"]
    expected = ["verdict", "ranking", "slices", "space", "probes", "drift", "training", "versions"]
    assert there == [name for name in expected if probes or name != "probes"]
    assert [a["href"] for tag, a in seen.tags if tag == "a"] == [f"#{name}" for name in there]
    assert ("churn" in seen.text) == bool(probes)
    ids = [a["id"] for _, a in seen.tags if "id" in a]
    referred = [str(a[name])[1:] for _, a in seen.tags for name in ("href", "xlink:href") if name in a]
    assert set(referred) <= set(ids)


def test_probes_are_told_by_the_best_head() -> None:
    rows = [probe("churn", "rfm", value=0.625), probe("churn", value=0.75), probe("churn", head="mlp", value=0.875)]
    said = " ".join(Page(page(facts(probes=rows))).text.split())
    assert "task users positives the vector recency, frequency, money churn 4,321 987 0.8750" in said
    assert "churn 4,321 987 0.8750 0.8125 to 0.9375 0.6250 0.5625 to 0.6875" in said


def test_a_model_of_which_little_is_known() -> None:
    seen = Page(page(facts(about={}, rows=[], versions=[], items=Map(), users=Map(), examples=[])))
    assert "Model abc123" in seen.text
    assert "A map of" not in seen.text


def test_its_maps_have_a_dot_for_each_vector_and_a_legend() -> None:
    points = np.random.default_rng(2).normal(size=(5, 2))
    users = Map(points, [None, "fans", None, "fans", "buyers"], (0.5, 0.25))
    text = page(facts(users=users, items=Map()))
    said = " ".join(Page(text).text.split())
    assert "A map of items" not in said
    assert "A map of users" in said
    assert "5 users, a sample of all" in said
    drawn = text.partition("A map of users")[2].partition("</svg>")[0]
    legend = [name for name in ("everybody", "fans", "buyers") if f">{name}<" in drawn]
    assert legend == ["everybody", "fans", "buyers"]
    dots = {colour: drawn.count(f"fill: {colour}") for colour in ("#c8c8c8", "#0072b2", "#e69f00")}
    assert dots == {"#c8c8c8": 3, "#0072b2": 3, "#e69f00": 2}  # the legend's dot is one more


@pytest.mark.filterwarnings("error::UserWarning")  # there is no room for the picture
@pytest.mark.parametrize("count", [1, 12])
def test_long_names_leave_a_picture_room_and_bars_have_theirs(count: int) -> None:
    names = {name: name for name in (f"{'a vertical of many words ' * 4}{n}" for n in range(count))}
    of = {name: Point(0.5, 0.25, 0.75) for name in names}
    assert ">a vertical of many …ny words 0<" in dots(list(names), {"model": of}, {"model": "the model"}, "NDCG@10")
    drawn = bars({"events after the cut for each one before it": of}, names, "")
    places = [float(y) for y in re.findall(r' y="([\d.]+)"[^>]*>[^<]*…', drawn)]
    assert len(places) == count
    assert all(np.diff(places) > 9)  # points, the height of their letters


@pytest.mark.filterwarnings("error::UserWarning")  # of letters that matplotlib's font has not: the page's has them
def test_names_in_any_letters_and_values_below_where_an_axis_begins() -> None:
    values = {"餐厅": Point(0.31, 0.29, 0.33), "b": Point(0.75, 0.7, 0.8)}
    drawn = dots(list(values), {"model": values}, {"model": "模型"}, "AUC", left=0.45)
    assert ">餐厅<" in drawn
    assert ">模型<" in drawn
    assert ">0.3<" in drawn  # a number on the axis


def test_a_loss_of_one_step_is_a_dot() -> None:
    for curve in ([(512, 7.0)], [(512, 7.0), (1024, 6.0)]):
        about = ABOUT | {"training": ABOUT["training"] | {"curve": curve}}
        loss, _, ranking = training(about).partition('id="axes_2"')
        assert loss.count("fill: #1b6ca8") == (len(curve) == 1)  # its lines are strokes
        assert "fill: #1b6ca8" in ranking  # the dots of the epochs


def test_the_same_facts_give_the_same_bytes() -> None:
    assert page(facts()) == page(facts())


def test_figures_for_people() -> None:
    values = [0.12345, 12.5, 12345.0, 3, 1, None, float("nan"), "a", True, 1.0, -0.5]
    said = ["0.1235", "12.50", "12,345", "3", "1", "", "", "a", "True", "1.0000", "-0.5000"]
    assert [figure(value) for value in values] == said
