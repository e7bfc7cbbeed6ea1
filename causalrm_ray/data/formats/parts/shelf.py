"""Parts of records on disk, by kind and key, until all files of an import are read: exports spread one answer over many rows."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

from causalrm_ray.conversation import Conversation
from causalrm_ray.data.formats.base import LoggedEvent, LoggedImpression

_WAITING = 1_000  # parts in memory


class Shelf:
    """Values, as JSON keeps them, in a temporary file that SQLite deletes itself; memory does not grow with their number."""

    def __init__(self) -> None:
        self._parts: sqlite3.Connection | None = None
        self._waiting: list[tuple[str, str, str]] = []
        self._is_indexed = False

    def put(self, kind: str, key: str, value: Any) -> None:
        """Add `value` to those of `kind` and `key`."""
        self._waiting.append((kind, _storable(key), json.dumps(value, default=str)))
        if len(self._waiting) >= _WAITING:
            self._flush()

    def get(self, kind: str, key: str) -> list[Any]:
        """The values of `kind` and `key` in the order in which they came."""
        rows = self._read("SELECT value FROM parts WHERE kind = ? AND key = ? ORDER BY number", kind, _storable(key))
        return [json.loads(value) for (value,) in rows]

    def has(self, kind: str, key: str) -> bool:
        """Whether there is any value of `kind` and `key`."""
        return self._read("SELECT 1 FROM parts WHERE kind = ? AND key = ? LIMIT 1", kind, _storable(key)).fetchone() is not None

    def scan(self, kind: str) -> Iterator[Any]:
        """The values of `kind`, whatever their key, in the order in which they came."""
        for (value,) in self._read("SELECT value FROM parts WHERE kind = ? ORDER BY number", kind):
            yield json.loads(value)

    def groups(self, kind: str) -> Iterator[tuple[str, list[Any]]]:
        """Every key of `kind`, sorted, with its values in the order in which they came. One group at a time is in memory."""
        rows = self._read("SELECT key, value FROM parts WHERE kind = ? ORDER BY key, number", kind)
        for key, group in groupby(rows, itemgetter(0)):
            yield key, [json.loads(value) for _, value in group]

    def _read(self, query: str, *values: str) -> sqlite3.Cursor:
        parts = self._flush()
        if not self._is_indexed:
            parts.execute("CREATE INDEX by_key ON parts (kind, key, number)")
            self._is_indexed = True
        return parts.execute(query, values)

    def _flush(self) -> sqlite3.Connection:
        if self._parts is None:
            self._parts = sqlite3.connect("", isolation_level=None)  # "": a temporary database on disk
            self._parts.execute("PRAGMA journal_mode = OFF")
            self._parts.execute("CREATE TABLE parts (number INTEGER PRIMARY KEY, kind TEXT, key TEXT, value TEXT)")
        if self._waiting:
            self._parts.execute("BEGIN")
            self._parts.executemany("INSERT INTO parts (kind, key, value) VALUES (?, ?, ?)", self._waiting)
            self._parts.execute("COMMIT")
            self._waiting = []
        return self._parts


def _storable(key: str) -> str:
    """`key`, with half surrogate pairs, which JSON lets through and SQLite does not, written out."""
    return key if key.isascii() else key.encode(errors="backslashreplace").decode()


def unpacked_event(fields: dict[str, Any]) -> LoggedEvent:
    """The event whose `content_of` this is."""
    return LoggedEvent(**fields)


def unpacked_impression(fields: dict[str, Any]) -> LoggedImpression:
    """The impression whose `content_of` this is; its prompt must have been a Conversation or text."""
    prompt, events = fields.pop("prompt"), fields.pop("events")
    return LoggedImpression(
        prompt=Conversation(prompt["json"]) if isinstance(prompt, dict) else prompt,
        events=[LoggedEvent(**event) for event in events],
        **fields,
    )
