"""Shared by the servers for tests and trials (kafka_broker.py, s3_server.py, yarn_cluster.py)."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

from jobs.errors import TrailvecError

HOST = "127.0.0.1"


# Below the ephemeral ports (Linux: from 32768, others: from 49152), one of which may be taken in the seconds that a
# server needs to start. Offset by process id, so that two processes starting servers at once do not collide.
_LOWEST, _COUNT = 10_000, 22_000
_candidates = (_LOWEST + (os.getpid() * 1009 + number) % _COUNT for number in itertools.count())


def free_ports(count: int) -> list[int]:
    """Distinct loopback ports that are free right now, none returned by an earlier call."""
    ports: list[int] = []
    for port in _candidates:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            ports.append(port)
        if len(ports) == count:
            break
    return ports


def failed(what: str, log: Path) -> TrailvecError:
    """An error that says what went wrong, with the last lines of the server's log."""
    last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    return TrailvecError(f"{what}: see {log}, which ends:\n{last}")


class OneProcess(ABC):
    """A server that is one process over one data folder; as a context manager it runs inside the block. A subclass has
    `start`, which calls `_run`, and `stop`."""

    def __init__(self, data: Path, log: str, name: str, patience: float) -> None:
        """
        Args:
            data: the folder.
            log: the log's name in it.
            name: in errors.
            patience: the longest that it may take to start, in seconds.
        """
        self._data = data.absolute()
        self._log = self._data / log
        self._name, self._patience = name, patience
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self) -> None: ...

    def kill(self) -> None:
        """Kills the server with SIGKILL, as a crash would; does nothing if it is not running."""
        if self._process is None:
            return
        self._process.kill()  # a no-op if it has already exited
        self._process.wait()
        self._process = None

    def check(self) -> None:
        """Does nothing while the server runs.

        Raises:
            TrailvecError: it has exited; quotes its last log lines.
        """
        if self._process is None or self._process.poll() is not None:
            raise self._failed("has exited")

    def _run(self, command: Sequence[str], is_up: Callable[[], bool]) -> None:
        """Starts the process, its output in the log, and returns once `is_up()`."""
        with self._log.open("wb") as log:
            # Its own process group, so that Ctrl-C reaches only the script, which then stops the server.
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + self._patience
        while not is_up():
            if self._process.poll() is not None:
                raise self._failed("exited while starting")
            if time.monotonic() > until:
                self.kill()
                raise self._failed(f"did not start within {self._patience:.0f} s")
            time.sleep(0.1)

    def _failed(self, what: str) -> TrailvecError:
        return failed(f"{self._name} {what}", self._log)


def run(server: AbstractContextManager[Any], check: Callable[[], None], greeting: Callable[[], str]) -> None:
    """Runs a server as a command until Ctrl-C or SIGTERM, or until `check` raises TrailvecError; prints `greeting()`
    once it is up."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        with server:
            print(greeting(), flush=True)
            while not stopped.wait(0.5):
                check()
    except TrailvecError as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")
