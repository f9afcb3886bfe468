"""The page next to a segment's files. Whole segments: tests/spark/test_export_segments.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.export_segments import _overlaps
from jobs.segment_report import Share, page

MANIFEST: dict[str, Any] = {
    "segment": {"name": "s", "purpose": "p", "owner": "o"},
    "counts": {"in": 5, "removed": [{"rule": "at_most", "users": 1}], "control": 1, "exported": 3},
    "model_version": "m",
    "as_of": "2024-06-01",
    "export_id": "e",
}


def test_the_curve_falls_from_the_best_score_to_the_last() -> None:
    text = page(MANIFEST, np.array([3, 2, 1], np.float32), [], None)
    assert '<polyline points="60.0,20.0 340.0,110.0 620.0,200.0"' in text  # the axes: 60 to 620 across, 20 to 200 down
    assert '<text x="4" y="24">3.0000</text><text x="4" y="204">1.0000</text>' in text
    assert ">1</text>" in text
    assert ">3</text></svg>" in text
    assert "<svg" not in page(MANIFEST, np.array([], np.float32), [], None)


def test_the_curve_of_equal_scores_is_level() -> None:
    for scores, points in (([2], "60.0,20.0"), ([2, 2], "60.0,20.0 620.0,20.0")):
        text = page(MANIFEST, np.array(scores, np.float32), [], None)
        assert f'points="{points}"' in text
        assert text.count('<circle cx="60.0" cy="20.0"') == (len(scores) == 1)  # a line of one point is not drawn


def test_what_people_wrote_is_shown_as_it_is() -> None:
    odd = {"name": "s", "purpose": "<b>&", "owner": "<i>o"}
    removed = [{"rule": "suppressed by <u>.txt", "users": 1}]
    manifest = MANIFEST | {"segment": odd, "counts": MANIFEST["counts"] | {"removed": removed}}
    text = page(manifest, np.array([], np.float32), [Share("a<s", 1.0, None)], [Share("a&b", 1.0, 0.5)])
    for shown in ("<p>&lt;b&gt;&amp;. Owner: &lt;i&gt;o.", "by &lt;u&gt;.txt<td", "<td>a&lt;s<td", "<td>a&amp;b<td"):
        assert shown in text


def test_of_many_members_the_curve_has_200_points() -> None:
    text = page(MANIFEST, np.linspace(1, 0, 1000, dtype=np.float32), [], None)
    points = text.split('points="')[1].split('"')[0].split()
    assert (len(points), points[0], points[-1]) == (200, "60.0,20.0", "620.0,200.0")


def test_another_segment_exports_only_those_whom_it_does_not_hold_back() -> None:
    """Of a's four members, b exports y and holds back x; c shares nobody and d has no member."""
    members = {"a": {"w": 0, "x": 0, "y": 1, "z": 1}, "b": {"x": 1, "y": 0}, "c": {"v": 0}, "d": {}}  # 1: held back
    chosen: Any = SimpleNamespace(
        exports=[SimpleNamespace(name=name) for name in members],
        members_and_control=lambda name: (
            pa.array(list(members[name]), pa.large_string()),
            np.array(list(members[name].values()), np.bool_),
        ),
    )
    found = {name: {share.name: share.segment for share in shares} for name, shares in _overlaps(chosen).items()}
    assert found["a"] == {"b": 1 / 4, "c": 0, "d": 0}
    assert found["b"] == {"a": 1 / 2, "c": 0, "d": 0}  # x, whom b itself holds back; a holds back y
    assert found["d"] == {"a": 0, "b": 0, "c": 0}
