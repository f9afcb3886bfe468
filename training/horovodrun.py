"""Horovod's launcher for the processes of one machine:

    python -m training.horovodrun --gloo -np 2 -H localhost:2 COMMAND

Horovod's rendezvous server asks for no credentials and by default listens on all interfaces. Here it listens on
loopback, like everything else that `horovodrun --gloo` opens for localhost.

By default Horovod also writes the whole environment, secrets included, into each process's command line, which every
user of the machine can read. Here the processes inherit the environment.
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
    """Within the block, Horovod's servers started by this process listen on 127.0.0.1."""
    modules = http_server, network
    originals = [module.find_port for module in modules]
    for module in modules:
        module.find_port = _find_loopback_port
    try:
        yield
    finally:
        for module, find_port in zip(modules, originals, strict=True):
            module.find_port = find_port


def _find_loopback_port(make_server: Callable[[tuple[str, int]], TCPServer]) -> tuple[TCPServer, int]:
    """Replaces Horovod's `find_port`: returns a server and its port."""
    server = make_server(("127.0.0.1", 0))
    return server, server.server_address[1]


@contextmanager
def kept_alive() -> Iterator[None]:
    """Within the block, Horovod's requests from this process notice within three minutes that a machine has vanished.
    Without this, its wait for a rank to end would never return."""
    original = network.socket
    network.socket = SimpleNamespace(**{**vars(socket), "socket": _alive_socket})
    try:
        yield
    finally:
        network.socket = original


def _alive_socket(*of_kind: Any) -> socket.socket:
    """A TCP socket that probes a silent peer after a minute, and gives up early on connecting to a dead one."""
    connection = socket.socket(*of_kind)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        options = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 6, socket.TCP_SYNCNT: 3}
        for option, value in options.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection


def _in_command_line(name: str) -> bool:
    """Whether a variable goes into a process's command line: only those that it cannot inherit from this process."""
    return name.startswith("HOROVOD_") or name == "PYTHONUNBUFFERED"


if __name__ == "__main__":
    gloo_run.env_util = SimpleNamespace(is_exportable=_in_command_line)
    with on_loopback():
        launch.run_commandline()
