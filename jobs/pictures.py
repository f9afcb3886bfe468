"""Charts as byte-reproducible SVG. The stages' only module that imports matplotlib.

Text stays text, drawn in the font of the enclosing page; names may contain any characters.
"""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

MODEL, FLOOR, ACCENT = "#1b6ca8", "#a9b3bb", "#d1495b"
# Distinguishable to colour-blind readers (Okabe & Ito 2008).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1", "#111111")
_REST = "#c8c8c8"
_NARROW = 4.6  # inches: legible on a phone
_LABEL = 30  # maximum characters of an axis label; longer ones would squeeze the plot
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a "$" in a name is literal
}


class Point(NamedTuple):
    """A value with its confidence interval; None: no interval."""

    value: float
    low: float | None
    high: float | None


def training(about: dict[str, Any], *, narrow: bool = False) -> str:
    """The training loss over rows read, and the validation metrics after each epoch; `about`: model.json's content.

    Args:
        narrow: stack the two plots vertically.
    """
    facts = about["training"]

    def draw(figure: Any) -> None:
        loss, ranking = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
        rows, losses = zip(*facts["curve"], strict=True)
        loss.plot(rows, losses, color=MODEL, marker="o" if len(rows) == 1 else "")  # a line needs two points
        loss.set(title="training loss", xlabel="rows read")
        epochs = [epoch for epoch in facts["epochs"] if "ndcg@10" in epoch]
        for metric, colour in (("ndcg@10", MODEL), ("recall@10", ACCENT)):
            ranking.plot([e["epoch"] for e in epochs], [e[metric] for e in epochs], "o-", color=colour, label=metric)
        ranking.axvline(facts["best_epoch"], color="#bbb", linestyle=":")
        ranking.set(title="next item, held-out users", xlabel="epoch")
        ranking.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        ranking.legend()

    return _picture(draw, (_NARROW, 4.4) if narrow else (9, 3.2), about["model_version"])


def bars(values: dict[str, dict[str, Point]], names: dict[str, str], first: str) -> str:
    """Horizontal bars, one group for each entry of `values`; error bars show the intervals.

    Args:
        values: by group title, then by key of `names`.
        names: label of each bar, by key.
        first: the key to highlight by colour.
    """
    present = {title: [key for key in names if key in group] for title, group in values.items()}
    heights = [0.5 + 0.15 * len(keys) for keys in present.values()]

    def draw(figure: Any) -> None:
        plots = figure.subplots(len(present), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (title, keys) in zip(plots, present.items(), strict=True):
            points = [values[title][key] for key in keys]
            colours = [MODEL if key == first else FLOOR for key in keys]
            widths = [point.value for point in points]
            axes.barh(range(len(keys)), widths, color=colours, xerr=_errors(points), error_kw={"elinewidth": 1.2})
            axes.set_yticks(range(len(keys)), [_shortened(names[key], _LABEL) for key in keys])
            axes.invert_yaxis()
            axes.set_title(title, loc="left", wrap=True)

    return _picture(draw, (_NARROW, 0.4 + sum(heights)), "bars")


def dots(
    classes: Sequence[str], values: dict[str, dict[str, Point]], names: dict[str, str], label: str, left: float = 0
) -> str:
    """A dot plot: one row per class, with a dot and its interval for each key of `names`.

    Args:
        classes: from top to bottom.
        values: by key of `names`, then by class.
        label: of the x axis.
        left: where the x axis begins, unless an interval begins further left.
    """
    lows = [point.value if point.low is None else point.low for of in values.values() for point in of.values()]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, (key, name) in enumerate(names.items()):
            places = [place for place, value in enumerate(classes) if value in values.get(key, {})]
            points = [values[key][classes[place]] for place in places]
            heights = np.array(places) + 0.6 * ((number + 0.5) / len(names) - 0.5)
            axes.errorbar(
                [point.value for point in points],
                heights,
                xerr=_errors(points),
                fmt="osD^vP"[number % 6],
                markersize=4 if number else 5,
                color=COLOURS[number % len(COLOURS)] if number else MODEL,
                alpha=0.75 if number else 1.0,
                label=name,
            )
        axes.set_yticks(range(len(classes)), [_shortened(name, _LABEL) for name in classes])
        axes.set_ylim(len(classes) - 0.5, -0.5)
        axes.set_xlim(left=min([left, *lows]))
        axes.set_xlabel(label)
        axes.grid(axis="x", color="#eee")
        figure.legend(loc="outside upper left", ncols=2, frameon=False)

    return _picture(draw, (_NARROW, 1.3 + 0.38 * len(classes)), "dots")


def scatter(points: npt.NDArray[Any], groups: Sequence[str | None], shares: Sequence[float], rest: str) -> str:
    """A scatter plot coloured by group: the largest groups get a colour each, all others are grey.

    Args:
        points: [n, 2].
        groups: each point's group, [n]; None: grey.
        shares: the share of the variance that each axis explains.
        rest: legend label of the grey points.
    """
    sizes = Counter(group for group in groups if group is not None)
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))[: len(COLOURS)]
    of = np.array([largest.index(group) if group in largest else -1 for group in groups])

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        if (of < 0).any():
            axes.scatter(*points[of < 0].T, s=7, color=_REST, linewidths=0, label=rest)
        for place, name in enumerate(largest):
            shown = points[of == place].T
            axes.scatter(*shown, s=7, color=COLOURS[place], alpha=0.7, linewidths=0, label=_shortened(name))
        axes.set_xlabel(f"first direction ({shares[0]:.0%} of the variance)")
        axes.set_ylabel(f"second ({shares[1]:.0%})")
        axes.set_aspect("equal", "datalim")
        figure.legend(loc="outside lower left", ncols=2, frameon=False, markerscale=2)

    return _picture(draw, (_NARROW, 5.2), "scatter")


def inline(svg: str) -> str:
    """The SVG for embedding in HTML: without the prolog and without ids that would clash between two charts."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    return re.sub(r' id="[A-Za-z0-9]+_\d+"', "", body)  # figure_1, axes_1, ...: never referenced


def _errors(points: Sequence[Point]) -> Any:
    """[2, n]: distances from the values to the ends of their intervals."""
    lows = [0.0 if p.low is None else max(0.0, p.value - p.low) for p in points]
    highs = [0.0 if p.high is None else max(0.0, p.high - p.value) for p in points]
    return np.array([lows, highs])


def _shortened(name: str, limit: int = 26) -> str:
    """Truncated in the middle: hierarchical names share their beginnings."""
    end = limit // 3
    # matplotlib leaves labels with a leading underscore out of the legend.
    return " " * name.startswith("_") + (name if len(name) <= limit else f"{name[: limit - 1 - end]}…{name[-end:]}")


def _picture(draw: Callable[[Any], None], size: tuple[float, float], salt: str) -> str:
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: PLC0415 - takes a second, and only charts need it
    from matplotlib.figure import Figure  # noqa: PLC0415

    with rc_context({**_STYLE, "svg.hashsalt": salt}), warnings.catch_warnings():  # reproducible ids
        # One warning per letter missing from matplotlib's font, but the reader's font draws the text.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})  # type: ignore[no-untyped-call]
    return text.getvalue()
