"""Conversations: what an answer replies to, as one canonical text that a log stores and a chat template renders.

text | messages (OpenAI's chat form) + tools --Conversation.of--> Conversation.json --messages, tools--> tokenizer's chat template
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring  # type: ignore[attr-defined]
from typing import Any

from causalrm_ray.errors import brief, kind_of

ROLES = ("system", "developer", "user", "assistant", "tool")
_INSTRUCTIONS = ("system", "developer")  # of no turn
KEPT_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")  # what chat templates render


class ConversationError(ValueError):
    """A list of messages that is no conversation: names the message, the rule and the value."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages before an answer, in the order in which they were written, and the tools that the answer could call.

    `json` is canonical: equal conversations are equal texts. It is the list of messages, or {"messages", "tools"} where there
    are tools. Build one with `of` or `user`: the constructor trusts its text.
    """

    json: str

    @classmethod
    def user(cls, text: str) -> Conversation:
        """One turn of a user. Raises ConversationError for an empty text or one that cannot be stored."""
        if not isinstance(text, str) or not text or text.isspace() or not text.isascii():
            return cls.of([{"role": "user", "content": text}])
        return cls(f'[{{"content":{encode_basestring(text)},"role":"user"}}]')  # what `of` writes, faster

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
        """Messages in OpenAI's form: {"role", "content", "tool_calls", ...}; of each the KEPT_KEYS that are not null.

        A content of several text parts becomes one text, the parts on lines of their own. Raises ConversationError for an
        unknown role, a part that is no text (an image, a sound), no message, or a last message of the assistant: an answer
        replies to a user or a tool.
        """
        if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
            raise ConversationError(f"messages must be a list of at least one message, got {kind_of(messages)}")
        kept = [_message(number, message) for number, message in enumerate(messages, 1)]
        if kept[-1]["role"] not in ("user", "tool"):
            raise ConversationError(f"the last message must be a user's or a tool's, got one of the {kept[-1]['role']}")
        if not all(isinstance(tool, Mapping) for tool in tools):
            raise ConversationError(f"tools must be a list of JSON objects, got {kind_of(tools)}")
        written = _dump({"messages": kept, "tools": list(tools)} if tools else kept)
        try:
            written.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON lets through
            raise ConversationError(f"messages must be valid Unicode: {error.reason}") from error
        return cls(written)

    def parse(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The messages, as a chat template takes them, and the schemas of the tools, none without any."""
        read = json.loads(self.json)
        return (read["messages"], read["tools"]) if isinstance(read, dict) else (read, [])

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages of `parse`."""
        return self.parse()[0]

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The tools of `parse`."""
        return self.parse()[1]

    @property
    def text(self) -> str:
        """The last user's message: what the answer replies to, for a person to read."""
        return next((message["content"] for message in reversed(self.messages) if message["role"] == "user"), "")

    @property
    def num_turns(self) -> int:
        """How many turns there are, at least 1: a turn is a user's message and all up to the next user's, and what comes before
        the first of them is a turn, too."""
        return len(_turn_starts(self.messages))

    def latest(self, turns: int) -> Conversation:
        """The last `turns` turns, at least 1, whole; all messages of the system and of developers, and the tools, stay."""
        messages, tools = self.parse()
        first = _turn_starts(messages)[-turns:][0]
        kept = [message for number, message in enumerate(messages) if number >= first or message["role"] in _INSTRUCTIONS]
        return Conversation(_dump({"messages": kept, "tools": tools} if tools else kept))


def _turn_starts(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The places of the messages with which turns begin."""
    spoken = [number for number, message in enumerate(messages) if message["role"] not in _INSTRUCTIONS]
    return spoken[:1] + [number for number in spoken[1:] if messages[number]["role"] == "user"]


def _message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ConversationError(f"message {number} must be a JSON object with role and content, got {kind_of(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise ConversationError(f"message {number}: role must be one of {', '.join(ROLES)}, got {brief(role)}")
    kept = {key: message[key] for key in KEPT_KEYS if message.get(key) is not None}
    given = message.get("content")
    kept["content"] = "\n".join(_texts(number, given))
    if not kept["content"].strip() and role in ("user", "system", "developer"):
        raise ConversationError(f"message {number}: content must be a text that is not empty, got {kind_of(given)}")
    return kept


def _texts(number: int, content: Any) -> Iterator[str]:
    """The text parts of a content; a call of a tool may have none."""
    for part in content if isinstance(content, Sequence) and not isinstance(content, str) else [content or ""]:
        if isinstance(part, Mapping) and part.get("type", "text") == "text":
            part = part.get("text")
        if not isinstance(part, str):
            raise ConversationError(f"message {number}: content must be text or parts of text, got {kind_of(part)}")
        yield part


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
