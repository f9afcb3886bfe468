"""Starts a training's processes, reads their output and ends them: on this machine (through Horovod's launcher if there
are several), or in tasks of the Spark application."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jobs.errors import TrailvecError
from training.checkpoint import newest_checkpoint
from training.config import RunSpec
from training.stores import Folder, folder_of

FORCED = ".forced.checkpoints"  # suffix of a forced training's checkpoint folder
_LINES = 20_000  # kept of the output: a failing process prints the cause first, each other one 30 lines after it
_EXCEPTION = re.compile(r"(?:[\w.]*(?:Error|Exception)|what\(\)): +[^ ]")  # outside a traceback
# A shell's word for a signal, which may follow a traceback that was cut short.
_SHELLS = re.compile(r"(?:Terminated|Killed|Aborted)\b(?!:)")
_PROCESS = r"^\[\d+\]<std(?:err|out)>:"  # before each line of one of several processes
_FOLLOWS = re.compile(r"HorovodInternalError|: Horovod (?:has been shut down|detected)|gloo/")
_LOST = ": Horovod has been shut down"
_LAUNCHERS = ": Horovod detected"
_PLACES = r"(?:\[\S+:\d+\] )*"  # the source locations in Gloo's C++ messages


def launch(run_file: Path, spec: RunSpec, on_event: Callable[[dict[str, Any]], None]) -> None:
    """Runs the training processes on this machine to completion and forwards rank 0's events.

    Raises:
        TrailvecError: a process failed or was killed; the message gives the cause (`last_words`).
    """
    processes, threads = spec.settings.processes, spec.settings.threads
    command = [sys.executable, "-m", "training.loop", str(run_file)]
    if processes > 1:
        horovodrun = [sys.executable, "-m", "training.horovodrun"]
        command = [*horovodrun, "--gloo", "-np", str(processes), "-H", f"localhost:{processes}", *command]
    path = os.environ.get("PYTHONPATH", "")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        # The modules of this checkout or wheel. Not the working directory, which `python -m` and an empty path entry
        # stand for: a file there may have the name of any module.
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, path.split(os.pathsep))]),
        "PYTHONSAFEPATH": "1",
    }
    child = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",  # whatever the locale
        errors="replace",  # a library may write bytes that are not text
        preexec_fn=_die_with_parent,  # noqa: PLW1509 - it makes one system call and takes no lock
    )
    assert child.stdout is not None
    assert child.stderr is not None
    words: deque[str] = deque(maxlen=_LINES)
    on_line = _hearing(on_event, words)  # Horovod's launcher reports on stdout how a process ended
    # Apart from stdout: a line of one within a traceback on the other would count as its exception.
    errors: deque[str] = deque(maxlen=_LINES)
    listener = threading.Thread(target=errors.extend, args=(child.stderr,), daemon=True)
    listener.start()
    try:
        for line in child.stdout:
            on_line(line)
        code = child.wait()
    finally:
        # On Ctrl-C or an error here: on SIGTERM, Horovod's launcher ends its processes.
        child.terminate()
        child.wait()
    listener.join()
    if code != 0:
        raise _stopped(spec, [*words, *errors], code)


def launch_in_spark(spec: RunSpec, on_event: Callable[[dict[str, Any]], None]) -> None:
    """As `launch`, but in tasks of the active Spark application, one per process; the files of rank 0 are copied here.

    The executors need trailvec in their Python, and access to the data and checkpoint folders.

    Raises:
        TrailvecError: a process failed or was killed, or Spark had no free tasks for all of them within two minutes.
    """
    from training import dist  # noqa: PLC0415 - loads PyTorch, which `launch` keeps out of this process
    from training.loop import train_in_executor  # noqa: PLC0415

    words: deque[str] = deque(maxlen=_LINES)
    environment = {
        "OMP_NUM_THREADS": str(spec.settings.threads),
        "PYTHONSAFEPATH": "1",  # as above, for an executor's working directory
    }
    places = {name: getattr(spec, name) for name in ("item_counts", "item_attributes", "item_verticals")}
    arrays = {name: Path(place).read_bytes() for name, place in places.items() if place}
    arguments = (spec.model_dump_json(), arrays)
    try:
        files, *_ = dist.run_in_spark(
            train_in_executor, arguments, spec.settings.processes, environment, _hearing(on_event, words)
        )
    except Exception as error:  # Horovod raises plain Exception and RuntimeError
        raise _stopped(spec, [*words, *f"{type(error).__name__}: {error}".splitlines()], 1) from error
    for name in sorted(files, key=lambda name: name == "model.json"):  # the description comes last, as everywhere
        (Path(spec.output) / name).write_bytes(files[name])


def _hearing(on_event: Callable[[dict[str, Any]], None], words: deque[str]) -> Callable[[str], None]:
    """A callback for a run's output lines: forwards events and collects everything else in `words`."""

    def on_line(line: str) -> None:
        if event := parse_event(line):
            on_event(event)
        else:
            words.append(line)

    return on_line


def parse_event(line: str) -> dict[str, Any] | None:
    """The event in a line of rank 0's stdout; None for any other line, or one cut short by a kill."""
    text = re.sub(r"^\[\d+\]<stdout>:", "", line.strip())
    if not text.startswith('{"event": '):
        return None
    try:
        event: dict[str, Any] = json.loads(text)
    except ValueError:
        return None
    return event


def _exceptions(lines: Iterable[str]) -> Iterator[str]:
    """The lines that name an exception: the first one that is not indented after the head of a process's traceback, or
    one that looks like it."""
    within: set[str] = set()  # the processes whose traceback goes on
    for line in lines:
        found = re.match(_PROCESS, line)
        process = found[0] if found else ""
        text = line[len(process) :].rstrip()
        if text.startswith("Traceback (most recent call last)"):
            within.add(process)
        elif _SHELLS.match(text):
            within.discard(process)
        elif (process in within and text and not text[0].isspace()) or _EXCEPTION.match(text.strip()):
            within.discard(process)
            yield text.strip()


def last_words(lines: list[str], code: int) -> str:
    """The cause of a failed run, from its output: an exception (Python's, or what() of C++), else the signal that
    killed a process, else that a process was lost, else a process's exit code or another signal, else the last line.
    That a rank lost the others, or the launcher a rank, is a consequence: it counts only if nothing else tells the
    cause."""
    texts = [text for line in lines if (text := re.sub(_PROCESS, "", line).strip())]
    exceptions = list(_exceptions(lines))
    causes = [text for text in exceptions if not _FOLLOWS.search(text)]
    # The launcher's report of one process; in Spark there is no other.
    ended = re.search(r"Process name: (\d+)\nExit code: (\d+)", "\n".join(texts))
    killed = [found[1] for text in texts if (found := re.search(r"(\d+) exit with status code 137", text))]
    killed += [ended[1]] if ended and ended[2] == "137" else []
    if not causes and (killed or code in (-signal.SIGKILL, 137)):
        return f"process {killed[0] if killed else 0} was killed by signal 9 (did the machine run out of memory?)"
    messages = causes[:1] or [text for text in exceptions if _LAUNCHERS not in text][:1]
    # Reported by the other ranks, or by the launcher, about a rank that could no longer report anything itself.
    if not causes and ("Exit code: -1" in texts or (messages and _LOST in messages[0])):
        return "a process was lost, with its executor or its machine"
    if messages:
        return re.sub(rf"^\S+: +{_PLACES}", "", messages[0])
    if ended:
        return f"process {ended[1]} ended with code {ended[2]}"
    if code < 0:
        return f"a process was ended by signal {-code} ({signal.strsignal(-code)})"
    return texts[-1] if texts else f"exit code {code}"


def _stopped(spec: RunSpec, lines: list[str], code: int) -> TrailvecError:
    why = last_words(lines, code)
    # Our own errors say what to do first: the same command would only meet them again.
    says_what_to_do = any(line.rstrip().endswith(f"TrailvecError: {why}") for line in lines)
    found: Folder | None = None
    again = ""
    try:
        if spec.checkpoints and not says_what_to_do:
            found = newest_checkpoint(folder_of(spec.checkpoints))
    except Exception:  # the store may be what failed; the cause is to be told, not this
        again = f", and the same command resumes if {spec.checkpoints}, which can't be read now, holds a checkpoint"
    if found:
        epoch, step = map(int, found.name.split("-"))
        again = f", and the same command resumes from epoch {epoch} after {step:,} steps"
        if found.parent.name.endswith(FORCED):  # which resumes only if the tables are unchanged
            again += " (if a data job or maintain_tables runs first: from an earlier checkpoint, or from scratch)"
    return TrailvecError(f"training stopped: {why}; no model was replaced{again}")


def _die_with_parent() -> None:
    """In the child: get SIGTERM when this stage dies, even by kill -9 (Linux only; elsewhere does nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
