"""Horovod's launcher for the processes of one machine:

    python -m training.horovodrun --gloo -np 2 -H localhost:2 COMMAND

Its server, where the processes find each other, asks for no credentials and would listen to every machine that reaches
this one. Here it listens on loopback, as all else that `horovodrun --gloo` opens for localhost does.
"""

from __future__ import annotations

from collections.abc import Callable
from http.server import HTTPServer

from horovod.runner import launch
from horovod.runner.http import http_server


def find_loopback_port(make_server: Callable[[tuple[str, int]], HTTPServer]) -> tuple[HTTPServer, int]:
    """What Horovod's `find_port` gives, a server and its port, on 127.0.0.1."""
    server = make_server(("127.0.0.1", 0))
    return server, server.server_port


if __name__ == "__main__":
    http_server.find_port = find_loopback_port
    launch.run_commandline()
