"""Logs of requests to OpenAI's chat API, and to the many servers and gateways that speak it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from causalrm_ray.data.formats.base import LoggedImpression
from causalrm_ray.data.formats.parts.exchange import conversation_of
from causalrm_ray.data.formats.parts.messages import turns
from causalrm_ray.data.formats.parts.ratings import OURS, RATINGS, ratings
from causalrm_ray.data.formats.parts.reader import Reader
from causalrm_ray.data.formats.parts.values import dig, mapping, name, parsed, seconds
from causalrm_ray.data.rows import RowError
from causalrm_ray.errors import kind_of

_BODIES = {"request", "response", "request_body", "response_body", "body"}
_USERS = ("user", "user_id", "userId", "safety_identifier")
_CONVERSATIONS = ("conversation_id", "conversationId", "session_id", "sessionId", "thread_id", "chat_id")


class OpenAi(Reader):
    """A request and its response in one row: `messages` (`tools`) and `choices`, side by side or in `request` and `response`.

    The answer is the first choice's message; a row whose answer only calls a tool is no impression. `created` is the time,
    `metadata` may hold the user and the conversation; its other values are traits of the context. Ratings are in columns of the
    log's own: `rating`, `feedback`, `thumb` and the like are read, others by feedback.columns.
    """

    columns = frozenset(
        ["id", "custom_id", "created", "created_at", "time", "model", "messages", "choices", "tools", "metadata"]
        + [*_BODIES, *_USERS, *_CONVERSATIONS, *RATINGS, *OURS]
    )

    def read(self, fields: Mapping[str, Any]) -> Iterator[LoggedImpression]:
        """The answer of a row. Raises RowError."""
        request, response = dict(fields), dict(fields)
        for column in fields.keys() & _BODIES:
            body = mapping(dig(fields, column, "body") or fields.get(column))
            (response if "choices" in body else request).update(body)
        choices = parsed(response.get("choices"))
        if not isinstance(choices, list) or not choices:
            raise RowError(f"choices must be a list with the answer, got {kind_of(choices)}")
        self.ignored["choices after the first"] += len(choices) - 1
        answer = turns([{"role": "assistant", **mapping(dig(choices[0], "message"))}])[-1]
        if answer.get("tool_calls") or not answer["content"].strip():
            self.ignored["answers that only call a tool" if answer.get("tool_calls") else "answers without text"] += 1
            return
        metadata = {**mapping(request.get("metadata")), **mapping(response.get("metadata"))}
        named = {**request, **metadata, **{key: value for key, value in fields.items() if value is not None}}
        identity = name(response, "id") or name(fields, "custom_id")
        impression = LoggedImpression(
            prompt=conversation_of(turns(request.get("messages"), self.ignored), request.get("tools")),
            response=answer["content"],
            id=identity,
            time=next((seconds(response[key], key) for key in ("created", "created_at", "time") if response.get(key)), None),
            user=name(named, *_USERS),
            conversation_id=name(named, *_CONVERSATIONS),
            model=name(response, "model"),
            context={key: str(value) for key, value in metadata.items() if key not in (*_USERS, *_CONVERSATIONS, *RATINGS)},
        )
        yield from self.scores.rate(impression, list(ratings({**metadata, **fields}, self.ignored)))

    @classmethod
    def matches(cls, columns: frozenset[str], rows: Sequence[Mapping[str, Any]]) -> float:
        """Messages and choices, or a request and a response that hold them."""
        if {"messages", "choices"} <= columns:
            return 1.0
        bodies = [mapping(dig(row, column, "body") or row.get(column)) for row in rows for column in _BODIES]
        return 0.9 if any("choices" in body for body in bodies) and any("messages" in body for body in bodies) else 0.0
