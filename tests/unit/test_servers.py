"""Ports for the servers of tests and trials."""

from __future__ import annotations

import socket

from scripts.servers import HOST, free_ports


def test_ports_are_free_and_none_that_a_connection_may_be_given() -> None:
    (first,) = free_ports(1)
    with socket.socket() as taken:
        taken.bind((HOST, first + 1))
        found = free_ports(5)
    assert len({first, first + 1, *found}) == 7
    assert max(found) < 32_768
    for port in found:
        with socket.socket() as probe:
            probe.bind((HOST, port))
