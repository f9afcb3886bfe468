"""Real processes, killed, doubled and on a full disk: `scripts/faults.py` in small. Its own runs are longer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from scripts.faults import Job, differences, full_disk, kills, two_ingests

DAYS = Path("tests/data/online_retail").absolute()


def test_differences_are_seen(tmp_path: Path) -> None:
    """What the other tests rely on."""
    one = tmp_path / "data"
    one.mkdir()
    lines = (DAYS / "2011-02-06.csv").read_text().splitlines()
    roots = []
    for name, kept in (("some", lines[:20]), ("more", lines[:22])):
        (one / "day.csv").write_text("\n".join(kept) + "\n")
        Job(tmp_path, one, tmp_path / name).run()
        roots.append(tmp_path / name)
    found = differences(*roots)
    assert found["events"] + found["rejected_events"] == 2
    assert differences(roots[0], roots[0]) == dict.fromkeys(found, 0)


def test_kills_at_random_moments_leave_no_trace(tmp_path: Path) -> None:
    found = kills(tmp_path, DAYS, times=3, seed=os.getpid())
    assert len(found["kills"]) == 3
    assert found["wrong"] == {}, found


def test_of_two_ingests_at_once_none_loses_or_doubles_a_row(tmp_path: Path) -> None:
    found = two_ingests(tmp_path, DAYS)
    assert found["wrong"] == {}, found
    for code, said in zip(found["codes"], found["said"], strict=True):
        assert code == 0 or said.startswith("trailvec: "), said


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "--map-root-user", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system lets nobody but root make a mount namespace")
    found = full_disk(tmp_path, DAYS)
    assert found["wrong"] == {}, found
    assert all(found["kept"].values()), found
    assert any(one["code"] for one in found["full"]), found
    for one in found["full"]:
        assert one["code"] == 0 or one["said"].startswith("trailvec: the disk is full"), one
