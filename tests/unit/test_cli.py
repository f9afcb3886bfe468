"""The command as a process of its own, where that matters."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from jobs.cli import _BESIDE, guarded, main
from jobs.pipeline import ASIDE, STAGES


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


def test_every_command_has_help_and_a_stage_names_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    tables = {stage.name: {table.name for table in (*stage.reads, *stage.writes)} for stage in (*STAGES, *ASIDE)}
    for command in (*tables, *_BESIDE):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        said = capsys.readouterr().out
        assert ended.value.code == 0, command
        words = set(re.findall(r"\w+", said.rpartition("\n\n")[2]))
        assert tables.get(command, set()) <= words, (command, said)
