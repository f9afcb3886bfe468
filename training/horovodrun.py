"""Horovod's launcher for the processes of one machine:

    python -m training.horovodrun --gloo -np 2 -H localhost:2 COMMAND

Its server, where the processes find each other, asks for no credentials and would listen to every machine that reaches
this one. Here it listens on loopback, as all else that `horovodrun --gloo` opens for localhost does.

And it would write the whole environment, keys and all, into each process's command line, which everybody on the machine
can read. Here the processes inherit it.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from socketserver import TCPServer
from types import SimpleNamespace
from typing import Any

from horovod.runner import gloo_run, launch
from horovod.runner.common.util import network
from horovod.runner.http import http_server


@contextmanager
def on_loopback() -> Iterator[None]:
    """Horovod's servers that this process starts meanwhile listen on 127.0.0.1."""
    modules = http_server, network
    kept = [module.find_port for module in modules]
    for module in modules:
        module.find_port = _find_loopback_port
    try:
        yield
    finally:
        for module, find_port in zip(modules, kept, strict=True):
            module.find_port = find_port


def _find_loopback_port(make_server: Callable[[tuple[str, int]], TCPServer]) -> tuple[TCPServer, int]:
    """What Horovod's `find_port` gives: a server and its port."""
    server = make_server(("127.0.0.1", 0))
    return server, server.server_address[1]


@contextmanager
def kept_alive() -> Iterator[None]:
    """A machine that is gone without a word is missed within three minutes by what Horovod asks it meanwhile from this
    process. It asks for the end of each rank, and would wait for the answer for ever."""
    kept = network.socket
    network.socket = SimpleNamespace(**{**vars(socket), "socket": _alive_socket})
    try:
        yield
    finally:
        network.socket = kept


def _alive_socket(*of_kind: Any) -> socket.socket:
    """A TCP socket that asks a silent machine for a sign of life after a minute, and soon gives up to reach one."""
    made = socket.socket(*of_kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        options = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 6, socket.TCP_SYNCNT: 3}
        for option, value in options.items():
            made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made


def _said_aloud(name: str) -> bool:
    """Whether a variable is written into a process's command line: those that this process does not have itself."""
    return name.startswith("HOROVOD_") or name == "PYTHONUNBUFFERED"


if __name__ == "__main__":
    gloo_run.env_util = SimpleNamespace(is_exportable=_said_aloud)
    with on_loopback():
        launch.run_commandline()
