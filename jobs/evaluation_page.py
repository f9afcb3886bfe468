"""evaluation.html beside a model: a self-contained page (no other files, no network) on what its vectors are worth.

The same facts give the same bytes. The template escapes all values (jobs/templates/evaluation.html).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from jobs import pictures
from jobs.config import FEW_USERS
from jobs.pictures import Point
from jobs.ranking import HOURS_NAMES, MODELS, Cell
from training.metrics import HISTORY_NAMES

TASKS = {"next": "Any next item", "new": "A new item", "repeat": "A repeated item"}
METHODS = {
    "model": "the model",
    "model_and_habit": "the model and habit",
    "popularity": "most popular items",
    "own_frequency": "the user's own most frequent",
    "item_knn": "item-kNN",
}
FEATURES = {
    "vector": "the vector",
    "profile": "the profile",
    "tfidf_svd": "TF-IDF and SVD of the items",
    "aggregates": "counts by hand",
    "rfm": "recency, frequency, money",
    "majority": "nothing (majority class)",
}
METRICS = ("ndcg@10", "recall@10", "ndcg@20", "recall@20", "mrr@20")
SLICES = {
    "history": "By number of past actions that the model read",
    "hours": "By hours from the cut to the next action",
    "vertical": "By vertical of the next actions (those elsewhere do not count, nor do items without a number)",
}
SPACE = {
    ("items", "uniformity"): (
        "uniformity of items",
        "0: all point the same way; about -4: as even as random directions",
    ),
    ("users", "uniformity"): ("uniformity of users", "the same for users"),
    ("users_items", "alignment"): (
        "alignment of users with what they do next",
        "squared distance between directions: 0 identical, 2 unrelated",
    ),
    ("items", "effective_dimensions"): ("effective dimensions of items", "over how many the variance really spreads"),
    ("users", "effective_dimensions"): ("effective dimensions of users", "the same for users"),
    ("items", "dead_dimensions"): ("dead dimensions of items", "directions with less than 1 % of the widest's spread"),
    ("users", "dead_dimensions"): ("dead dimensions of users", "the same for users"),
    ("items", "norm_popularity"): (
        "length against popularity",
        "rank correlation: 1 the more popular an item, the longer its vector; 0 no relation",
    ),
    ("items", "hubness@10"): (
        "hubness of items",
        "skewness of how often each is a neighbour: 0 no hubs, above 2 strong ones",
    ),
    ("users", "hubness@10"): ("hubness of users", "the same for users"),
    ("items", "same_category@10"): ("neighbours of the same category", "share of an item's ten nearest"),
    ("items", "same_category_by_chance"): ("… by chance", "the same share if they were drawn at random"),
}
DRIFT = {
    ("events", "stability_index"): (
        "stability index of events",
        "how far the verticals' shares moved: under 0.1 little, above 0.25 much",
    ),
    ("events", "new_items"): ("events of new items", "the share of the events with items first seen after the cut"),
    ("users", "cosine"): ("cosine of a user's vectors", "at the cut and at the log's end: 1 the same"),
    ("users", "centroid_cosine"): ("cosine of the users' centroids", "the same for the mean of all users"),
}
LARGEST = 12  # verticals in a picture, at most
MAPPED_ITEMS = (
    "items, drawn by hash, along the two axes in which their directions differ most (PCA); coloured by vertical"
)
MAPPED_USERS = (
    "users, a sample of all and of each segment's last export, drawn by hash, along the two axes in "
    "which their directions differ most (PCA); a user in several segments is shown in the smallest"
)

Row = dict[str, Any]


class Neighbour(NamedTuple):
    name: str
    vertical: str
    cosine: float


class Example(NamedTuple):
    """An item and its neighbours, nearest first."""

    name: str
    vertical: str
    near: list[Neighbour]


@dataclass(frozen=True)
class Map:
    """Vectors as points in the plane.

    Attributes:
        points: [n, 2]; empty: there is no such map.
        groups: the group of each point, [n]; None: in no group that is shown.
        shares: the share of the variance along each axis.
    """

    points: npt.NDArray[Any] = field(default_factory=lambda: np.empty((0, 2)))
    groups: Sequence[str | None] = ()
    shares: Sequence[float] = (0.0, 0.0)


@dataclass(frozen=True)
class Facts:
    """What the page is made from.

    Attributes:
        about: the contents of model.json; parts may be missing.
        rows: the model's rows of EVALUATION for that split.
        versions: for each model in EVALUATION: its version, whether it is current, the contents of its model.json (if
            it still exists) and its rows.
        sample: how many items the examples and their neighbours were chosen from.
        probes: rows of the table probes.
    """

    fingerprint: str
    version: str
    split: str
    about: Row
    rows: list[Row]
    versions: list[tuple[str, bool, Row, list[Row]]]
    items: Map = Map()
    users: Map = Map()
    examples: Sequence[Example] = ()
    sample: int = 0
    probes: Sequence[Row] = ()


def page(facts: Facts) -> str:
    """The page, as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
    points = {(r["task"], Cell.of(r)): Point(r["value"], r["low"], r["high"]) for r in facts.rows}
    users = {
        (r["task"], r["slice"], r["slice_value"]): r["counted"]
        for r in facts.rows
        if r["metric"] == "ndcg@10" and r["method"] == "model"
    }
    tasks = [task for task in TASKS if (task, "all", "all") in users]
    sections = [("verdict", "In short"), ("ranking", "Ranking"), ("slices", "For whom"), ("space", "The space")]
    drift = _drift(points, facts.rows)
    sections += (
        [("probes", "Probes")] * bool(facts.probes)
        + [("drift", "Drift")] * bool(drift["rows"])
        + [("training", "Training"), ("versions", "All versions")]
    )
    training = facts.about.get("training")
    trained, evaluated = _windows(facts.about, facts.split)
    return environment.get_template("evaluation.html").render(
        fingerprint=facts.fingerprint,
        version=facts.version,
        trained=trained,
        evaluated=evaluated,
        split=facts.split,
        sections=sections,
        few_users=FEW_USERS,
        verdicts=[
            _verdict(task, model, points, users)
            for task in tasks
            for model in MODELS
            if (task, Cell(model, "ndcg@10")) in points
        ],
        ranking_picture=_picture(pictures.bars(_of_tasks(tasks, points), METHODS, "model")) if tasks else "",
        tasks=[_task(task, points, users) for task in tasks],
        slice_pictures=[*_slice_pictures(points, users)],
        slice_tables=[table for task in tasks for kind in SLICES if (table := _slice_table(task, kind, points, users))],
        space=_space(points),
        examples=facts.examples,
        sample=facts.sample,
        maps=_maps(facts),
        probes=_probes(facts.probes),
        drift=drift,
        training_picture=_picture(pictures.training(facts.about, narrow=True)) if training else "",
        facts=_facts(facts.about),
        versions=_versions(facts.versions),
    )


def figure(value: Any) -> str:
    """A value formatted for people: counts (int) and large whole numbers with commas, others with about four digits; ""
    for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) >= 2):
        return f"{int(value):,}"
    return f"{value:.4f}" if abs(value) < 2 else f"{value:,.2f}"


def _picture(svg: str) -> Markup:
    return Markup(pictures.inline(svg))  # noqa: S704 - matplotlib escapes the texts in it


# ---- parts -------------------------------------------------------------------------------------------------------

Points = dict[tuple[str, Cell], Point]  # by task and cell
Users = dict[tuple[str, str, str], int]  # by task, slice and slice_value


def _windows(about: Row, split: str) -> tuple[str, str]:
    """(what the model was trained on, what the metrics cover), in words; empty if unknown."""
    sequences = about.get("provenance", {}).get("config", {}).get("sequences", {})
    if sequences.get("split_by") == "leave_one_out":
        last = "each user's last action but one" if split == "valid" else "each user's last action"
        return "all of a user's actions but the last two", last
    as_of = about.get("as_of", "")[:16].replace("T", " ")
    return f"actions before {as_of}" if as_of else "", f"the {split} window"


def _of_tasks(tasks: list[str], points: Points) -> dict[str, dict[str, Point]]:
    return {TASKS[task]: {m: p for m in METHODS if (p := points.get((task, Cell(m, "ndcg@10"))))} for task in tasks}


def _verdict(task: str, model: str, points: Points, users: Users) -> Row:
    leads = []
    for method, name in METHODS.items():
        lead = points.get((task, Cell(method, f"{model}_lead_ndcg@10")))
        if lead is None or lead.low is None or lead.high is None:
            continue
        word = "better" if lead.low > 0 else "worse" if lead.high < 0 else "level"
        comparison = {"better": "better than", "worse": "worse than", "level": "level with"}[word]
        if users[task, "all", "all"] < FEW_USERS:
            word, comparison = "few", "not reliably different from"
        by = f"{lead.value:+.4f}, {lead.low:+.4f} to {lead.high:+.4f}"
        leads.append({"word": word, "comparison": comparison, "name": name, "by": by})
    return {
        "title": f"{TASKS[task]}, {METHODS[model]}",
        "users": users[task, "all", "all"],
        "model": points[task, Cell(model, "ndcg@10")],
        "leads": leads,
    }


def _task(task: str, points: Points, users: Users) -> Row:
    rows = []
    for method, name in METHODS.items():
        of = [points.get((task, Cell(method, metric))) for metric in METRICS]
        bias = points.get((task, Cell(method, "popularity_bias@10")))
        of.append(bias and Point(*(None if x is None else math.exp(x) for x in bias)))  # type: ignore[arg-type]
        of.append(points.get((task, Cell(method, "coverage@10"))))
        if any(of):
            rows.append([name, *of])
    columns = ["method", *METRICS, "popularity bias", "coverage@10"]
    return {"title": TASKS[task], "users": users[task, "all", "all"], "columns": columns, "rows": rows}


def _classes(task: str, kind: str, users: Users) -> list[str]:
    """The classes of a slice that hold users, in their own order; verticals by number of users, largest first."""
    present = [value for (of, name, value) in users if of == task and name == kind]
    order = {"history": HISTORY_NAMES, "hours": HOURS_NAMES}.get(kind)
    if order is not None:
        return [value for value in order if value in present]
    return sorted(present, key=lambda value: (-users[task, kind, value], value))


def _slice_pictures(points: Points, users: Users) -> list[Row]:
    rows = []
    for kind, caption in SLICES.items():
        classes = _classes("next", kind, users)[:LARGEST]
        if classes:
            values = {
                method: {c: p for c in classes if (p := points.get(("next", Cell(method, "ndcg@10", kind, c))))}
                for method in METHODS
            }
            rows.append({"svg": _picture(pictures.dots(classes, values, METHODS, "NDCG@10")), "caption": f"{caption}."})
    return rows


def _slice_table(task: str, kind: str, points: Points, users: Users) -> Row | None:
    classes = _classes(task, kind, users)
    rows = [
        [value, users[task, kind, value], *(points.get((task, Cell(m, "ndcg@10", kind, value))) for m in METHODS)]
        for value in classes
    ]
    title = f"{TASKS[task]}: {SLICES[kind][0].lower()}{SLICES[kind][1:]}"
    return {"title": title, "columns": [kind, "users", *METHODS.values()], "rows": rows} if rows else None


def _probe_points(rows: Sequence[Row]) -> dict[str, dict[str, Point]]:
    """By features, by task: the AUC of the best head, plus and minus one standard deviation."""
    best: dict[str, dict[str, Point]] = {}
    for row in rows:
        of = best.setdefault(row["features"], {})
        if row["metric"] == "auc" and (row["task"] not in of or row["value"] > of[row["task"]].value):
            of[row["task"]] = Point(row["value"], row["value"] - row["std"], row["value"] + row["std"])
    return {features: best[features] for features in FEATURES if features in best}


def _probes(rows: Sequence[Row]) -> Row:
    points = _probe_points(rows)
    sizes = {row["task"]: (row["users"], row["positives"]) for row in rows}
    table = [
        [task, users, positives, *(of.get(task) for of in points.values())]
        for task, (users, positives) in sizes.items()
    ]
    names = {features: FEATURES[features] for features in points}
    return {
        "picture": _picture(pictures.dots(list(sizes), points, names, "AUC; 0.5 is chance", left=0.45)) if rows else "",
        "columns": ["task", "users", "positives", *names.values()],
        "rows": table,
    }


def _space(points: Points) -> list[Row]:
    rows = []
    for (of, metric), (name, meaning) in SPACE.items():
        if point := points.get(("space", Cell(of, metric))):
            value = int(point.value) if metric == "dead_dimensions" else point.value  # a count
            rows.append({"name": name, "meaning": meaning, "value": value})
    return rows


def _maps(facts: Facts) -> list[Row]:
    return [
        {
            "title": title,
            "picture": _picture(pictures.scatter(of.points, of.groups, of.shares, rest)),
            "caption": caption,
        }
        for title, of, rest, caption in (
            ("A map of items", facts.items, "others", f"{len(facts.items.points):,} {MAPPED_ITEMS}"),
            ("A map of users", facts.users, "everybody", f"{len(facts.users.points):,} {MAPPED_USERS}"),
        )
        if len(of.points)
    ]


def _drift(points: Points, rows: Sequence[Row]) -> Row:
    """The figures, the alarms and the verticals' rates, from the rows of the task drift."""
    of = [row for row in rows if row["task"] == "drift"]
    rates = sorted(
        (row for row in of if row["metric"] == "rate"), key=lambda row: (-row["counted"], row["slice_value"])
    )
    shown = {row["slice_value"]: Point(row["value"], None, None) for row in rates[:LARGEST]}
    title = "events after the cut for each one before it"
    figures = [
        [name, points["drift", Cell(*key)], meaning]
        for key, (name, meaning) in DRIFT.items()
        if ("drift", Cell(*key)) in points
    ]
    picture = pictures.bars({title: shown}, {name: name for name in shown}, "") if shown else ""
    return {
        "rows": figures,
        "alarms": [
            {
                "limit": row["metric"],
                "of": "" if row["slice"] == "all" else row["slice_value"],
                "value": None if math.isinf(row["value"]) else row["value"],  # a rate over no event before the cut
            }
            for row in of
            if row["method"] == "alarm"
        ],
        "picture": _picture(picture) if picture else "",
        "rates": [[row["slice_value"], row["counted"], row["value"]] for row in rates],
    }


def _facts(about: Row) -> list[list[Any]]:
    spec, training, provenance = (about.get(part, {}) for part in ("spec", "training", "provenance"))
    epochs = training.get("epochs", [])
    facts = {
        "code": provenance.get("code_version"),
        "data": ", ".join(f"{table} version {number}" for table, number in provenance.get("reads", {}).items()),
        "network": f"{spec['architecture']}, width {spec['width']}, layers {spec['layers']}" if spec else None,
        "epochs": len(epochs) or None,
        "kept epoch": training.get("best_epoch"),
        "loss": f"{epochs[0]['loss']:.4f} in the first epoch, {epochs[-1]['loss']:.4f} in the last" if epochs else None,
        "seconds": round(training["seconds"]) if "seconds" in training else None,
    }
    return [[name, str(value)] for name, value in facts.items() if value]


def _versions(versions: list[tuple[str, bool, Row, list[Row]]]) -> Row:
    rows = []
    for version, is_current, about, of in versions:
        best = {
            r["task"]: Point(r["value"], r["low"], r["high"])
            for r in of
            if (r["method"], r["metric"], r["slice"]) == ("model", "ndcg@10", "all")
        }
        spec, epochs = about.get("spec", {}), about.get("training", {}).get("epochs", [])
        name = f"{version} (current)" if is_current else version
        network = f"{spec['architecture']}, {spec['width']}" if spec else None
        rows.append([name, about.get("as_of", "")[:10], network, len(epochs) or None, *(best.get(t) for t in TASKS)])
    return {"columns": ["model", "trained up to", "network", "epochs", *TASKS.values()], "rows": rows}
