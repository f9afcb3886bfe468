"""report.html next to a segment's files: a self-contained page for the people who asked for the segment.

Plain HTML and one SVG, so that it opens wherever the files go; the same input gives the same bytes.
"""

from __future__ import annotations

from html import escape
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_POINTS = 200  # on the curve
_ROWS = 20  # per table
_STYLE = """body{font:14px sans-serif;max-width:52em;margin:2em auto;color:#222}
table{border-collapse:collapse;width:100%}td,th{padding:.2em .6em;text-align:left;border-bottom:1px solid #eee}
td.n,th.n{text-align:right}i{display:inline-block;height:.7em;background:#1b6ca8}i.all{background:#bbb}"""


class Share(NamedTuple):
    """A share of the segment's members and, if known, of all users; 0 to 1."""

    name: str
    segment: float
    everyone: float | None


def page(
    manifest: dict[str, Any], scores: npt.NDArray[np.float32], overlaps: list[Share], verticals: list[Share] | None
) -> str:
    """The page as HTML.

    Args:
        manifest: the content of manifest.json.
        scores: of the members, descending; empty if the segment has no scores.
        overlaps: the shares of the segment's members that each other segment exports too.
        verticals: the shares of its members, and of everyone, who acted in each vertical; None: not known.
    """
    segment, counts = manifest["segment"], manifest["counts"]
    steps = [("users to begin with", counts["in"])]
    steps += [(f"left out: {removed['rule']}", -removed["users"]) for removed in counts["removed"]]
    steps += [("control group, held back", -counts["control"]), ("exported", counts["exported"])]
    parts = [
        f"<h1>{escape(segment['name'])}</h1>",
        f"<p>{escape(segment['purpose'])}. Owner: {escape(segment['owner'])}. Model {escape(manifest['model_version'])}"
        f", as of {escape(str(manifest['as_of']))}. Export {escape(manifest['export_id'])}.</p>",
        "<h2>Who is in it</h2><table>",
        *(f'<tr><td>{escape(name)}<td class="n">{count:,}' for name, count in steps),
        "</table>",
    ]
    if len(scores):
        parts += ["<h2>Score by rank</h2>", _curve(scores)]
    parts.append("<h2>Who else exports them</h2>")
    shared = [share for share in overlaps if share.segment > 0]
    parts += _table("segment", shared) if shared else ["<p>No other segment exports a member of this one.</p>"]
    parts.append("<h2>Where they act</h2>")
    if verticals:
        parts += ["<p>Share of the members (blue) and of all users (grey) who acted in a vertical.</p>"]
        parts += _table("vertical", verticals)
    else:
        parts.append("<p>Not known: the table sessions does not exist, or has no vertical for these users.</p>")
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(segment["name"])}</title>'
        f"<style>{_STYLE}</style>\n{body}\n</html>\n"
    )


def _table(heading: str, shares: list[Share]) -> list[str]:
    """The largest shares as table rows with bars."""
    lines = [f'<table><tr><th>{heading}<th class="n">members<th class="n">everyone<th>']
    for name, segment, everyone in sorted(shares, key=lambda share: (-share.segment, share.name))[:_ROWS]:
        bars = f'<i style="width:{12 * segment:.2f}em"></i>'
        if everyone is not None:
            bars += f'<br><i class="all" style="width:{12 * everyone:.2f}em"></i>'
        all_users = "" if everyone is None else f"{everyone:.1%}"
        lines.append(f'<tr><td>{escape(name)}<td class="n">{segment:.1%}<td class="n">{all_users}<td>{bars}')
    return [*lines, "</table>"]


def _curve(scores: npt.NDArray[np.float32]) -> str:
    places = np.unique(np.linspace(0, len(scores) - 1, _POINTS).astype(int))
    low, high = float(scores[-1]), float(scores[0])
    x = 60 + 560 * places / max(len(scores) - 1, 1)
    y = 20 + 180 * (high - scores[places].astype(np.float64)) / ((high - low) or 1)
    line = " ".join(f"{across:.1f},{down:.1f}" for across, down in zip(x, y, strict=True))
    dot = f'<circle cx="{x[0]:.1f}" cy="{y[0]:.1f}" r="3" fill="#1b6ca8"/>' if len(x) == 1 else ""  # it has no line
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="660" height="240" font-size="12">'
        f'<path d="M60 20v180h560" fill="none" stroke="#bbb"/>'
        f'<polyline points="{line}" fill="none" stroke="#1b6ca8" stroke-width="2"/>{dot}'
        f'<text x="4" y="24">{high:.4f}</text><text x="4" y="204">{low:.4f}</text>'
        f'<text x="60" y="220">1</text><text x="620" y="220" text-anchor="end">{len(scores):,}</text></svg>'
    )
