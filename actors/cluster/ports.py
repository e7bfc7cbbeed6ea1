"""Ports for servers that start a moment later, in a process of their own."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")  # Linux; what the system gives to connections and to port 0
_LOWEST = 20_000  # Ray's workers have those below
_TRIES = 100


def free_port(host: str = "") -> int:
    """A port that is free on `host` now, and that the system gives to nobody who asks for any port: another connection, of which
    a busy machine opens thousands, does not take it before its server starts. Raises OSError where none is found."""
    try:
        given_away = int(_RANGE.read_text().split()[0])
    except (OSError, ValueError):
        given_away = 32_768
    draw = random.SystemRandom()  # not the run's seed: runs side by side must not draw alike
    for _ in range(_TRIES if given_away > _LOWEST else 0):
        port = draw.randrange(_LOWEST, given_away)
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
