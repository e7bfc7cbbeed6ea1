"""Conversations that branch, as products keep them whose users edit and regenerate: every message names the one before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from causalrm_ray.conversation import Conversation
from causalrm_ray.data.formats.base import LoggedImpression
from causalrm_ray.data.formats.parts.exchange import conversation_of
from causalrm_ray.data.formats.parts.messages import turns, why_no_answer
from causalrm_ray.data.formats.parts.reader import Found, Reader
from causalrm_ray.data.rows import RowError
from causalrm_ray.errors import brief

Messages = Mapping[
    str, Mapping[str, Any]
]  # by id, each with "before", the id of the one before it, and a message's role, content
Made = Callable[[str, Conversation, str], Iterable[LoggedImpression]]


def shown_answers(messages: Messages, ignored: Counter[str], made: Made) -> Iterator[LoggedImpression | RowError]:
    """What `made` makes of (id, messages before it, text) of every answer of a conversation. Regenerated ones reply to the same.

    An answer that cannot be read, or of which `made` raises a RowError, is one that names it.
    """
    quiet = Counter[str]()  # a message is on many paths, but is counted once
    for leaf, message in messages.items():
        try:
            own = turns([_turn(message)], ignored)
            if not own or own[-1]["role"] != "assistant":
                continue
            path = _path_to(messages, leaf, ignored)
            read = turns([_turn(messages[place]) for place in path], quiet)
            if (why := why_no_answer(read, len(read) - 1)) is not None:
                ignored[why] += 1
            else:
                yield from list(made(leaf, conversation_of(read[:-1]), read[-1]["content"]))
        except RowError as error:
            yield RowError(f"message {brief(leaf)}: {error}")


class TreeReader(Reader):
    """A format of a message a row, which puts its rows on the shelf as "message", by their conversation."""

    def finish(self) -> Iterator[Found]:
        """The answers of all conversations, each with its feedback."""
        for conversation, rows in self.shelf.groups("message"):
            messages = {self.identity(row): row for row in rows}
            tree = {identity: self.message(row) for identity, row in messages.items()}
            yield from shown_answers(tree, self.ignored, partial(self._made, messages, conversation))
        yield from super().finish()

    def identity(self, row: Mapping[str, Any]) -> str:
        """The message's id."""
        raise NotImplementedError

    def message(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Its role, content, and under "before" the id of the message before it."""
        raise NotImplementedError

    def answer(self, row: Mapping[str, Any], given: LoggedImpression) -> Iterator[LoggedImpression]:
        """The answer of a row, with what the format knows of it besides `given`: id, prompt, response and conversation."""
        raise NotImplementedError

    def _made(
        self, messages: Mapping[str, Mapping[str, Any]], conversation: str, identity: str, prompt: Conversation, text: str
    ) -> Iterator[LoggedImpression]:
        return self.answer(messages[identity], LoggedImpression(prompt, text, identity, conversation_id=conversation))


def _path_to(messages: Messages, leaf: str, ignored: Counter[str]) -> list[str]:
    """Ids of the messages from the first to `leaf`. One that names a message that is not there is the first."""
    path, before = [leaf], _before(messages[leaf])
    while before in messages and before not in path:
        path.append(before)
        before = _before(messages[before])
    if before.strip("0-"):  # a UUID of zeros is LibreChat's "none"
        ignored["messages before one that is missing"] += before not in messages
    return path[::-1]


def _before(message: Mapping[str, Any]) -> str:
    return str(message.get("before") or "")


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key in ("role", "content", "tool_calls", "tool_call_id")}
