"""Columns of a home-made log by our names: feedback.columns.<ours>=<theirs>, a column or a path into it.

{"q": .., "a": [{"text": ..}], "x": ..} --{prompt: q, response: a.0.text}--> {"prompt": .., "response": .., "a": .., "x": ..}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_ABSENT = object()


class ColumnMap:
    """`columns` maps our name of a column to theirs: a name, or a path of names and places of lists, joined by dots."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.columns = dict(columns)

    def __call__(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row by our names. A column that is mapped as a whole is no longer there under its own."""
        if not self.columns:
            return fields
        found = {ours: value for ours, theirs in self.columns.items() if (value := _at(fields, theirs)) is not _ABSENT}
        whole = set(self.columns.values())
        return {**{name: value for name, value in fields.items() if name not in whole}, **found}

    def has(self, ours: str, fields: Mapping[str, Any]) -> bool:
        """Whether a row has the column that is mapped to `ours`."""
        return _at(fields, self.columns[ours]) is not _ABSENT

    def sources(self, ours: str) -> set[str]:
        """Names to look for in the bytes of a file for a column of ours: the column, and the first and last name of a path."""
        theirs = self.columns.get(ours, ours)
        return {theirs, theirs.split(".")[0], theirs.split(".")[-1]}


def _at(fields: Any, path: str) -> Any:
    """The value at a path; a column whose own name holds dots comes first, and JSON text on the way is read."""
    if isinstance(fields, Mapping) and path in fields:
        return fields[path]
    found = fields
    for name in path.split("."):
        if isinstance(found, str) and found[:1] in ("{", "["):
            try:
                found = json.loads(found)
            except (ValueError, RecursionError):
                return _ABSENT
        if isinstance(found, Mapping) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.removeprefix("-").isdecimal() and -len(found) <= int(name) < len(found):
            found = found[int(name)]
        else:
            return _ABSENT
    return found
