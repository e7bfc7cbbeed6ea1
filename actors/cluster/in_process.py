"""Roles without Ray, for a debugger: a call runs at once in the caller's process and its error is the caller's own.

handle.verb.remote(...)  -->  role.verb(...)        where Ray returns a reference, this returns the value itself
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

_in_process: ContextVar[bool] = ContextVar("in_process", default=False)


def in_process() -> bool:
    """Whether roles live in this process, without Ray."""
    return _in_process.get()


@contextlib.contextmanager
def enter_in_process() -> Iterator[None]:
    """Let roles that are placed in this block live in this process."""
    previous = _in_process.set(True)
    try:
        yield
    finally:
        _in_process.reset(previous)


class Verb:
    """One method of a role, called as Ray's are."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method

    def options(self, **options: Any) -> Verb:
        """Itself: `options` are about processes."""
        return self


class Handle:
    """A role in this process, which looks like a Ray actor's handle."""

    def __init__(self, role: object) -> None:
        self._role = role

    def __getattr__(self, name: str) -> Verb:
        return Verb(getattr(self._role, name))
