"""Messages of many systems as those of OpenAI's chat form, and the answers of a conversation with all that was before each.

messages of any system --turns--> [{"role", "content", "tool_calls", ...}] --answers--> (place, messages before it, answer)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from causalrm_ray.conversation import KEPT_KEYS
from causalrm_ray.data.formats.parts.values import parsed
from causalrm_ray.data.rows import RowError
from causalrm_ray.errors import brief, kind_of

Turn = dict[str, Any]
ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "humanmessage", "humanmessagechunk"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatbot", "chatgpt", "model", "ai", "agent", "aimessage"), "assistant"),
    **dict.fromkeys(("aimessagechunk", "bing", "bard", "claude"), "assistant"),
    **dict.fromkeys(("system", "systemmessage"), "system"),
    "developer": "developer",
    **dict.fromkeys(
        ("tool", "function", "observation", "ipython", "toolmessage", "function_response", "functionmessage"), "tool"
    ),
}
_TEXTS = ("text", "input_text", "output_text", "raw_text", "refusal", "template")
_THOUGHTS = ("think", "thinking", "thought", "reasoning", "redacted_thinking")
_CALLS = ("tool_call", "tool_use", "function_call", "tool-call")
_RESULTS = ("tool_result", "tool_call_response", "function_call_output", "tool-result", "tool_response")
_ROLE_KEYS = ("role", "from", "type", "author", "sender")
_READ_KEYS = {
    *KEPT_KEYS,
    *_ROLE_KEYS,
    "id",
    "value",
    "text",
    "parts",
    "contents",
    "kwargs",
    "data",
    "lc",
    "message",
    "function_call",
}


def turns(messages: Any, ignored: Counter[str] | None = None) -> list[Turn]:
    """A list of messages in OpenAI's form; of each what Conversation keeps, other keys are counted in `ignored` as messages.KEY.

    Roles go by many names (human, gpt, model, ...), a content may be `content`, `value`, `text` or parts; a result of a tool
    inside of a user's message becomes a message of the tool. Raises RowError for what is no message, or no text.
    """
    return [turn for _, turn in placed_turns(messages, ignored)]


def placed_turns(messages: Any, ignored: Counter[str] | None = None) -> list[tuple[int, Turn]]:
    """The same with the place in `messages` that each comes from."""
    ignored = Counter[str]() if ignored is None else ignored
    messages = parsed(messages)
    if isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], list):
        messages = messages[0]  # a batch of one conversation
    if not isinstance(messages, list):
        raise RowError(f"messages must be a list, got {kind_of(messages)}")
    return [(place, turn) for place, message in enumerate(messages) for turn in _turns(place + 1, message, ignored)]


def answers(conversation: Sequence[Turn], ignored: Counter[str]) -> Iterator[tuple[int, list[Turn], str]]:
    """(place, messages before it, text) of every answer: a message of the assistant to a user or tool that calls no tool.

    The assistant's other messages are counted in `ignored`.
    """
    for place, turn in enumerate(conversation):
        if turn["role"] != "assistant":
            continue
        if (why := why_no_answer(conversation, place)) is None:
            yield place, list(conversation[:place]), turn["content"]
        else:
            ignored[why] += 1


def why_no_answer(conversation: Sequence[Turn], place: int) -> str | None:
    """What a message of the assistant is that is no answer; None of an answer."""
    turn = conversation[place]
    if turn.get("tool_calls"):
        return "messages that call a tool"
    if not turn["content"].strip():
        return "answers without text"
    if place == 0 or conversation[place - 1]["role"] not in ("user", "tool"):
        return "messages of the assistant that reply to no message"
    return None


def content_text(content: Any, ignored: Counter[str] | None = None) -> str:
    """The text of a content, given as text or as parts; empty where there is none. Raises RowError for other parts."""
    found = _parts(0, content, Counter() if ignored is None else ignored)
    return "\n".join(found.texts)


class _Parts:
    """What the parts of a content hold."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.results: list[Turn] = []
        self.has_thoughts = False


def _turns(number: int, message: Any, ignored: Counter[str]) -> Iterator[Turn]:
    message = parsed(message)
    if not isinstance(message, Mapping):
        raise RowError(f"message {number} must be an object with a role and a content, got {kind_of(message)}")
    if "role" not in message and message.get("type") in (*_CALLS, *_RESULTS, *_THOUGHTS):  # of OpenAI's Responses
        message = {"role": "assistant", "content": [message]}
    kind = message["id"] if isinstance(message.get("id"), list) else message.get("type")
    for wrapper in ("message", "kwargs", "data"):  # LangChain's serialized messages, OpenInference's
        inner = message.get(wrapper)
        if isinstance(inner, Mapping) and "content" not in message:
            message = {"role": inner.get("role") or inner.get("type") or kind, **inner}
    role = _role(number, message)
    content = next((message[key] for key in ("content", "value", "parts", "contents", "text") if message.get(key)), "")
    found = _parts(number, content, ignored)
    for key in message.keys() - _READ_KEYS:
        if message[key] not in (None, "", [], {}):
            ignored[f"messages.{key}"] += 1
    calls = [_call(call) for call in [*(parsed(message.get("tool_calls")) or []), *found.calls] if isinstance(call, Mapping)]
    if isinstance(old := message.get("function_call"), Mapping):
        calls.append(_call(old))
    yield from found.results
    if found.texts or calls or not (found.results or found.has_thoughts):
        turn: Turn = {"role": role, "content": "\n".join(found.texts)}
        if calls and role == "assistant":
            turn["tool_calls"] = calls
        turn |= {key: message[key] for key in ("name", "tool_call_id") if isinstance(message.get(key), str) and role == "tool"}
        yield turn


def _role(number: int, message: Mapping[str, Any]) -> str:
    for key in _ROLE_KEYS:
        value = message.get(key)
        if isinstance(value, Mapping):
            value = value.get("role")
        if isinstance(value, list) and value:  # LangChain's constructor: the path of its class
            value = value[-1]
        if isinstance(value, str) and value not in ("message", "constructor", "chat"):
            if (role := ROLES.get(value.lower())) is None:
                raise RowError(f"message {number}: {key} must be a role such as user or assistant, got {brief(value)}")
            return role
    raise RowError(f"message {number} must have a role, got {kind_of(message)}")


def _parts(number: int, content: Any, ignored: Counter[str]) -> _Parts:
    found = _Parts()
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            found.texts += [part] if part else []
        elif isinstance(part, Mapping):
            _part(number, part.get("message_content", part), found, ignored)
        elif part is not None:
            raise RowError(f"message {number}: content must be text or parts of text, got {kind_of(part)}")
    return found


def _part(number: int, part: Mapping[str, Any], found: _Parts, ignored: Counter[str]) -> None:
    kind = part.get("type", "text")
    if kind in _TEXTS:
        keys = ("text", "content", "value", "refusal", "arguments")
        text = next((part[key] for key in keys if part.get(key) is not None), "")
        if isinstance(text, Mapping) and isinstance(text.get("value"), str):
            text = text["value"]
        found.texts.append(text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, sort_keys=True, default=str))
    elif kind in _THOUGHTS:
        found.has_thoughts = True
        ignored["thoughts in messages"] += 1
    elif kind in _CALLS:
        found.calls.append(part.get("tool_call", part))
    elif kind in _RESULTS:
        result = next((part[key] for key in ("result", "response", "content", "output") if part.get(key) is not None), "")
        name = part.get("id") or part.get("tool_use_id") or part.get("call_id")
        text = result if isinstance(result, str) else content_text(result) if isinstance(result, list) else json.dumps(result)
        found.results.append({"role": "tool", "content": text, **({"tool_call_id": name} if isinstance(name, str) else {})})
    else:
        raise RowError(f"message {number}: content must be parts of text, got one of type {brief(kind)}")


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call of a tool in OpenAI's form, from that of any system."""
    call = call.get("tool_call", call)
    inner = call.get("function")
    function = inner if isinstance(inner, Mapping) else call
    arguments = next(
        (function[key] for key in ("arguments", "args", "input", "raw_arguments") if function.get(key) is not None), {}
    )
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, sort_keys=True, default=str)
    name = function.get("name") or function.get("raw_name") or function.get("toolName") or ""
    identity = call.get("id") or call.get("call_id")
    return {
        **({"id": identity} if isinstance(identity, str) else {}),
        "type": "function",
        "function": {"name": name, "arguments": text},
    }
