"""The command as a process of its own, where that matters."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import time

import pytest
from rich.console import Console
from rich.table import Table as Grid

from jobs import cli
from jobs.cli import guarded, main, table_console
from jobs.config import Config
from jobs.errors import TrailvecError
from jobs.pipeline import ASIDE, STAGES
from jobs.runtime import Report, Runtime
from jobs.tables import Table


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "jobs.cli", "run", "--show-config"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()  # as `| head -0` does
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (0, "")


def test_another_broken_pipe_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def lose_java() -> None:
        raise BrokenPipeError("the JVM is gone")

    assert guarded(lose_java) == 1
    assert "unexpected BrokenPipeError: the JVM is gone" in capsys.readouterr().err


def test_every_command_has_help_and_a_stage_names_its_tables_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    # A stage that does something with a table has imported it.
    used = {stage.name: vars(sys.modules[f"jobs.{stage.name}"]).values() for stage in (*STAGES, *ASIDE)}
    names = {name: {one.name for one in of if isinstance(one, Table)} for name, of in used.items()}
    for stage in (*STAGES, *ASIDE):
        names[stage.name] |= set(re.findall(r"\.config\.(\w+)", inspect.getsource(stage.inputs)))
    names["maintain_tables"] = {"maintain"}
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    (\w+)", capsys.readouterr().out, re.MULTILINE)
    assert names.keys() | {"run", "erase_users", "serve_sql"} <= set(commands)
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        said = capsys.readouterr().out
        assert ended.value.code == 0, command
        about = said.split("\n\n")[1]  # after the usage
        assert not about.startswith(("options:", "positional arguments:")), (command, said)
        words = set(re.findall(r"\w+", said.rpartition("\n\n")[2]))
        assert names.get(command, set()) <= words, (command, said)


@pytest.mark.parametrize("port", ["0", "-1", "65536", "http"])
def test_a_port_that_nobody_can_call_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve_sql", f"--port={port}", "--show-config"])  # which would end it without an error
    assert ended.value.code == 2
    assert f"argument --port: expected a port from 1 to 65535, found {port}" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["note", "line", "status", "table"])
def test_brackets_are_printed_as_they_are(
    by: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = "food [new] of logs/[a-z]*.json, RLIKE '[/]', :star:"
    said = ""
    if by == "note":
        cli._print_report(Report("evaluate", notes=[odd]))
    elif by == "table":
        grid = Grid("found", caption=odd)
        grid.add_row(odd)
        table_console().print(grid)
        said = capsys.readouterr().out
        assert said.count(odd) == 2
    else:
        monkeypatch.setenv("TERM", "xterm")
        if by == "status":
            monkeypatch.setattr(cli, "_out", Console(stderr=True, force_terminal=True, width=160))
        runtime, until = Runtime(Config()), time.monotonic() + 20
        with cli._progress(runtime, "ingest"):
            runtime.on_progress(odd)
            while odd not in said and time.monotonic() < until:
                time.sleep(0.1)  # a status is drawn twice a second
                said += capsys.readouterr().err
    assert odd in said + capsys.readouterr().err


def test_what_notes_and_errors_quote_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    odd, shown = "food\x1b[2J\x9b2J", r"food\x1b[2J\x9b2J"

    def fail() -> None:
        raise TrailvecError(f"no vertical {odd}")

    cli._print_report(Report("evaluate", notes=[f"alarm: {odd}"]))
    assert f"alarm: {shown}" in capsys.readouterr().err
    assert guarded(fail) == 1
    assert capsys.readouterr().err == f"trailvec: no vertical {shown}\n"
