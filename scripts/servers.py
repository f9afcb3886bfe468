"""Shared by the servers for tests and trials (kafka_broker.py, s3_server.py, yarn_cluster.py)."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

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
