"""Ports for the servers of tests and trials."""

from __future__ import annotations

import socket

from scripts.servers import HOST, free_ports


def test_ports_are_free_and_none_that_a_connection_may_be_given() -> None:
    first, second = free_ports(2)
    with socket.socket() as taken:
        taken.bind((HOST, second))
        found = free_ports(5)
    assert len({first, second, *found}) == 7
    assert max(found) < 32_768
    for port in found:
        with socket.socket() as probe:
            probe.bind((HOST, port))
