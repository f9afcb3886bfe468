"""Who ran what: the commits of a few tables, compared with delta-rs's reading of the same logs."""

from __future__ import annotations

import getpass
import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import cast

import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from jobs import cli, flag_users
from jobs.audit import audit
from jobs.commits import Commit, _commit_of
from jobs.maintain_tables import compact
from jobs.runtime import Runtime, Stage, code_version
from jobs.tables import EVENTS, FLAGGED_USERS
from tests.events import START, make_event, to_frame


def add(runtime: Runtime, event_id: str) -> None:
    event = to_frame(runtime.spark, [make_event(event_id=event_id, user_id="u", item_id="i", event_ts=START)])
    runtime.execute(Stage("add", "", lambda r: r.append(EVENTS, event), (), (EVENTS,), ()), force=True)


def test_every_commit_and_who_made_it(
    make_runtime: Callable[..., Runtime],
    spark: SparkSession,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runtime = make_runtime()
    assert audit(runtime) == []
    add(runtime, "a")
    add(runtime, "b")
    runtime.execute(flag_users.STAGE)
    compact(runtime, EVENTS)
    entries = audit(runtime)

    for table in (EVENTS, FLAGGED_USERS):
        theirs = {
            commit["version"]: (commit["operation"], commit["timestamp"])
            for commit in DeltaTable(runtime.path(table)).history()
        }
        ours = [entry for entry in entries if entry["table"] == table.name]
        assert [entry["version"] for entry in ours] == sorted(theirs, reverse=True)
        found = {
            e["version"]: (e["operation"], round(datetime.fromisoformat(e["at"]).timestamp() * 1000)) for e in ours
        }
        assert found == theirs
    assert [entry["at"] for entry in entries] == sorted((entry["at"] for entry in entries), reverse=True)

    (flagged, *_) = [entry for entry in entries if entry["table"] == "flagged_users"]
    assert (flagged["stage"], flagged["changed_rows"], flagged["erasure"]) == ("flag_users", True, None)
    assert (flagged["user"], flagged["code_version"]) == (getpass.getuser(), code_version())
    assert flagged["application"] == spark.sparkContext.applicationId
    (upkeep,) = [entry for entry in entries if entry["operation"] == "OPTIMIZE"]
    assert (upkeep["stage"], upkeep["changed_rows"]) == (None, False)

    assert audit(runtime, "events") == [entry for entry in entries if entry["table"] == "events"]
    middle = datetime.fromisoformat(entries[1]["at"])
    assert audit(runtime, since=middle) == [e for e in entries if datetime.fromisoformat(e["at"]) >= middle]
    assert audit(runtime, since=(datetime.now(timezone.utc) + timedelta(hours=1)).replace(tzinfo=None)) == []

    monkeypatch.setattr(cli, "Runtime", lambda config: Runtime(config, spark))
    command = ["audit", "--set", f'storage.root="{runtime.root}"']
    cli.main([*command, "--json", "--table", "events"])
    assert json.loads(capsys.readouterr().out) == audit(runtime, "events")
    cli.main(command)
    assert "flag_users" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*command, "--since", "yesterday"])
    assert capsys.readouterr().err.strip() == (
        "trailvec: --since yesterday is not a time: write it as 2026-01-31 or 2026-01-31T12:00:00Z"
    )


def test_a_writers_clock_that_is_behind_hides_no_newer_commit() -> None:
    def commits(table: object) -> Iterator[Commit]:
        for version, hour in ((4, 51), (3, 46), (2, 49), (1, 48), (0, 0)):
            yield _commit_of(version, {"timestamp": 3_600_000 * hour, "operation": "WRITE"})
        raise AssertionError("the log is read on beyond a day")

    runtime, since = cast(Runtime, SimpleNamespace(commits=commits)), datetime(1970, 1, 3)
    assert [entry["version"] for entry in audit(runtime, "events", since)] == [4, 2, 1]
