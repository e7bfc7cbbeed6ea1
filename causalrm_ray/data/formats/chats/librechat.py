"""LibreChat's collection `messages`, as mongoexport writes it, and its exports of single conversations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from causalrm_ray.data.formats.base import LoggedImpression
from causalrm_ray.data.formats.chats.tree import TreeReader
from causalrm_ray.data.formats.parts.ratings import ratings
from causalrm_ray.data.formats.parts.values import mapping, must, name, parsed, seconds

_KEPT = {"messageId", "conversationId", "parentMessageId", "user", "model", "isCreatedByUser", "text", "content", "createdAt"}
_KNOWN = {"_id", "__v", "sender", "updatedAt", "endpoint", "feedback", "error", "unfinished", "messages", "tokenCount"}


class LibreChat(TreeReader):
    """A message a row, with `parentMessageId` and `isCreatedByUser`; `feedback.rating` is thumbsUp or thumbsDown.

    Also a file of one conversation, whose messages are a list under `messages`. Messages that are errors are no answers.
    """

    columns = frozenset({*_KEPT, "feedback", "error", "messages"})

    def read(self, fields: Mapping[str, Any]) -> Sequence[LoggedImpression]:
        """Nothing yet: what an answer replies to may be in a later row. Raises RowError."""
        listed = parsed(fields.get("messages"))
        for row in map(mapping, listed) if isinstance(listed, list) else [fields]:
            must(name(row, "messageId"), "messageId")
            conversation = must(name(row, "conversationId") or name(fields, "conversationId"), "conversationId")
            seconds(row.get("createdAt"), "createdAt")
            for key in row.keys() - _KEPT - _KNOWN:
                self.ignore(f"messages.{key}", row[key])
            self.shelf.put("message", conversation, {key: row[key] for key in row.keys() & {*_KEPT, "feedback", "error"}})
        return []

    def identity(self, row: Mapping[str, Any]) -> str:
        """`messageId`."""
        return str(row["messageId"])

    def message(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row, and what it says by whom."""
        return {**row, "before": row.get("parentMessageId"), **_message(row)}

    def answer(self, row: Mapping[str, Any], given: LoggedImpression) -> Iterator[LoggedImpression]:
        """With time, user, model and vote; nothing for an error in the place of an answer."""
        if row.get("error"):
            self.ignored["errors in the place of answers"] += 1
            return
        time = seconds(row.get("createdAt"), "createdAt")
        impression = replace(given, time=time, user=name(row, "user"), model=name(row, "model"))
        yield from self.scores.rate(impression, list(ratings({"feedback": row.get("feedback")}, self.ignored)))

    @classmethod
    def matches(cls, columns: frozenset[str], rows: Sequence[Mapping[str, Any]]) -> float:
        """LibreChat's names of a message's id and author."""
        nested = [message for row in rows if isinstance(listed := parsed(row.get("messages")), list) for message in listed[:1]]
        names = [columns, *(mapping(message).keys() for message in nested)]
        return 1.0 if any({"messageId", "isCreatedByUser"} <= set(found) for found in names) else 0.0


def _message(row: Mapping[str, Any]) -> dict[str, Any]:
    """Role and content; calls of tools in an answer's content were made before its text, and stay out of it."""
    content = parsed(row.get("content"))
    if not isinstance(content, list) or not content:
        return {"role": "user" if row.get("isCreatedByUser") else "assistant", "content": row.get("text") or ""}
    kept = [part for part in content if mapping(part).get("type") not in ("tool_call", "error")]
    return {"role": "user" if row.get("isCreatedByUser") else "assistant", "content": kept}
