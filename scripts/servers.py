"""What the servers for tests and trials share (kafka_broker.py, s3_server.py, yarn_cluster.py)."""

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


# Below what the system itself gives to connections (Linux: from 32768, others: from 49152): one of those may be taken
# in the seconds that a server needs to start. By process, so that two that start servers at once don't meet.
_LOWEST, _COUNT = 10_000, 22_000
_candidates = (_LOWEST + (os.getpid() * 1009 + number) % _COUNT for number in itertools.count())


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody has right now, each another, none that an earlier call gave."""
    found: list[int] = []
    for port in _candidates:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            found.append(port)
        if len(found) == count:
            break
    return found


def failed(what: str, log: Path) -> TrailvecError:
    """What went wrong, with the last lines of a server's log."""
    last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    return TrailvecError(f"{what}: see {log}, which ends:\n{last}")


def run(server: AbstractContextManager[Any], check: Callable[[], None], greeting: Callable[[], str]) -> None:
    """Runs it, as a command of its own, until Ctrl-C or SIGTERM, or until `check` raises TrailvecError; once it is up,
    prints what `greeting` says."""
    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    try:
        with server:
            print(greeting(), flush=True)
            while not told.wait(0.5):
                check()
    except TrailvecError as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")
