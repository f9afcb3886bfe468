"""Horovod's launcher for the processes of one machine:

    python -m training.horovodrun --gloo -np 2 -H localhost:2 COMMAND

Its server, where the processes find each other, asks for no credentials and would listen to every machine that reaches
this one. Here it listens on loopback, as all else that `horovodrun --gloo` opens for localhost does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from socketserver import TCPServer

from horovod.runner import launch
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


if __name__ == "__main__":
    with on_loopback():
        launch.run_commandline()
