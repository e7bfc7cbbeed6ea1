"""A port that was found free is still free when its server starts, however many connections are opened meanwhile."""

from __future__ import annotations

import contextlib
import socket

from actors.cluster.ports import free_port


def test_ports_are_none_that_the_system_gives_to_others() -> None:
    found = {free_port("127.0.0.1") for _ in range(50)}
    with contextlib.ExitStack() as held:
        for _ in range(2000):  # as many as a busy machine opens in a second
            other = held.enter_context(socket.socket())
            other.bind(("127.0.0.1", 0))
            assert other.getsockname()[1] not in found
        for port in found:
            held.enter_context(socket.socket()).bind(("127.0.0.1", port))


def test_a_port_in_use_is_not_found() -> None:
    with contextlib.ExitStack() as held:
        for _ in range(20):
            port = free_port("127.0.0.1")
            held.enter_context(socket.socket()).bind(("127.0.0.1", port))
