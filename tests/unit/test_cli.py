"""The command as a process of its own, where that matters."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jobs.cli import guarded


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
