"""OASST's messages: rows of a tree, with the roles prompter and assistant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from causalrm_ray.data.formats.base import LoggedImpression
from causalrm_ray.data.formats.chats.tree import TreeReader
from causalrm_ray.data.formats.parts.ratings import OURS, RATINGS, ratings
from causalrm_ray.data.formats.parts.values import must, name, seconds

_TREES = ("message_tree_id", "conversation_id")


class Oasst(TreeReader):
    """A message a row: `message_id`, `parent_id`, `role`, `text` (`content`). It has no votes; those in columns of the log's own
    (`rating`, `feedback`, ...) are read."""

    columns = frozenset(
        ["message_id", "parent_id", *_TREES, "role", "text", "content", "user_id", "created_date", "created_at", "model_name"]
        + [*RATINGS, *OURS]
    )

    def read(self, fields: Mapping[str, Any]) -> Sequence[LoggedImpression]:
        """Nothing yet: what an answer replies to may be in a later row. Raises RowError."""
        must(name(fields, "message_id"), "message_id")
        self.shelf.put("message", must(name(fields, *_TREES), "message_tree_id"), dict(fields))
        return []

    def identity(self, row: Mapping[str, Any]) -> str:
        """`message_id`."""
        return str(name(row, "message_id"))

    def message(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Role and text, under any of their names."""
        return {"role": row.get("role"), "content": row.get("text", row.get("content")), "before": row.get("parent_id")}

    def answer(self, row: Mapping[str, Any], given: LoggedImpression) -> Iterator[LoggedImpression]:
        """With time, model, and votes in columns of the log's own."""
        time = seconds(row.get("created_date", row.get("created_at")))
        impression = replace(given, time=time, model=name(row, "model_name"))
        yield from self.scores.rate(impression, list(ratings(row, self.ignored)))

    @classmethod
    def matches(cls, columns: frozenset[str], rows: Sequence[Mapping[str, Any]]) -> float:
        """A message's id and that of the one before it."""
        return 1.0 if {"message_id", "parent_id", "role"} <= columns and columns & set(_TREES) else 0.0
