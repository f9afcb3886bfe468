"""Ports for the servers of tests and trials."""

from __future__ import annotations

import socket

import pytest

from scripts import servers
from scripts.servers import HOST, free_ports


def test_ports_are_free_and_none_that_a_connection_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *others = free_ports(7)
    with socket.socket() as taken:
        taken.bind((HOST, second))
        monkeypatch.setattr(servers, "_candidates", iter([second, *others]))
        found = free_ports(5)
    assert len({first, second, *found}) == 7
    assert max(found) < 32_768
    for port in found:
        with socket.socket() as probe:
            probe.bind((HOST, port))
