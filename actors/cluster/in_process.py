"""Roles without Ray, for a debugger: a call runs at once in the caller's process and its error is the caller's own.

handle.verb.remote(...)  -->  role.verb(...)        where Ray gives a promise, here is the value itself
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any


class Verb:
    """One method of a role, called as Ray's are."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self._method(*args, **kwargs)

    def options(self, **options: Any) -> Verb:
        """Itself: `options` are about processes."""
        return self


class Handle:
    """A role in this process, which looks like a Ray actor's handle."""

    def __init__(self, role: object) -> None:
        self._role = role

    def __getattr__(self, name: str) -> Verb:
        return Verb(getattr(self._role, name))


def stream(calls: Mapping[str, Iterator[Any]]) -> Iterator[tuple[str, Any]]:
    """(name of the call, item), one call after the other."""
    for name, items in calls.items():
        for item in items:
            yield name, item
