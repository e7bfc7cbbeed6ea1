"""The prompt and the answer in what a traced function was given and gave back, in the many shapes that libraries log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from causalrm_ray.conversation import Conversation, ConversationError
from causalrm_ray.data.formats.parts.messages import Turn, content_text, turns
from causalrm_ray.data.formats.parts.values import parsed
from causalrm_ray.data.rows import RowError

_SHAPES = ("role", "messages", "choices", "generations", "kwargs", "lc", "parts", "output_messages")  # of what libraries log
_LISTS = ("messages", "chat_history", "history", "input_messages", "prompt")
_QUESTIONS = (
    "input",
    "question",
    "query",
    "prompt",
    "user_input",
    "user_message",
    "message",
    "text",
    "content",
    "request",
    "inputs",
)
_ANSWERS = (
    "output",
    "answer",
    "response",
    "result",
    "text",
    "content",
    "completion",
    "generation",
    "reply",
    "output_text",
    "value",
)


def prompt_of(given: Any, ignored: Counter[str] | None = None) -> list[Turn] | None:
    """The messages in an input: a text, a list of messages, or an object with either under a usual name; None where there is
    neither. Raises RowError for messages that cannot be read."""
    given = _unpacked(given, {*_SHAPES, *_LISTS, *_QUESTIONS})
    if isinstance(given, str):
        return [{"role": "user", "content": given}] if given.strip() else None
    if isinstance(given, list):
        if given and all(isinstance(text, str) for text in given):
            return [{"role": "user", "content": "\n".join(given)}]
        return turns(given, ignored) if given else None
    if not isinstance(given, Mapping):
        return None
    if "role" in given and "content" in given:
        return turns([given], ignored)
    found: list[Turn] = []
    for key in _LISTS:
        listed = parsed(given.get(key))
        if isinstance(listed, list) and listed and not isinstance(listed[0], str):
            found = turns(listed, ignored)
            break
    system = given.get("system") or given.get("instructions")
    if isinstance(system, str | list) and system and (not found or found[0]["role"] != "system"):
        found = [{"role": "system", "content": content_text(system)}, *found]
    if not found or found[-1]["role"] not in ("user", "tool"):
        asked = next((inner for key in _QUESTIONS if key in given and (inner := prompt_of(given[key], ignored))), None)
        if asked is None and len(given) == 1:  # a function of one argument, whatever its name
            asked = prompt_of(next(iter(given.values())), ignored)
        found = found + asked if asked else found
    return found if found and found[-1]["role"] in ("user", "tool") else None


def answer_of(given: Any, ignored: Counter[str] | None = None) -> Turn | None:
    """The last message of the assistant in an output: a text, a message, messages, choices or generations, or an object with one
    of them under a usual name; None where there is none. Raises RowError for a message that cannot be read."""
    given = _unpacked(given, _SHAPES)
    if isinstance(given, str):
        return {"role": "assistant", "content": given}
    if isinstance(given, list):
        if given and all(
            isinstance(part, Mapping) and "role" not in part and "text" in part and "type" in part for part in given
        ):
            return turns([{"role": "assistant", "content": given}], ignored)[0]
        return next((found for part in reversed(given) if (found := answer_of(part, ignored))), None)
    if not isinstance(given, Mapping):
        return None
    for key in ("choices", "generations", "messages", "candidates", "output_messages"):
        inner = parsed(given.get(key))
        if isinstance(inner, list) and inner:
            return answer_of(inner[:1] if key in ("choices", "generations", "candidates") else inner, ignored)
    if isinstance(given.get("message"), Mapping) and (found := answer_of(given["message"], ignored)):
        return found
    if any(key in given for key in ("role", "kwargs", "tool_calls", "lc")):
        last = turns([{"type": "ai", **given} if "kwargs" in given else {"role": "assistant", **given}], ignored)
        return last[-1] if last and last[-1]["role"] == "assistant" else None
    found = next((inner for key in _ANSWERS if key in given and (inner := answer_of(given[key], ignored))), None)
    if found is None and len(given) == 1:
        return answer_of(next(iter(given.values())), ignored)
    return found


def _unpacked(given: Any, names: Collection[str]) -> Any:
    """What a JSON text holds, if that is messages or has one of `names`; a text of any other JSON may be what somebody wrote."""
    found = parsed(given)
    if not isinstance(given, str) or isinstance(found, str):
        return found
    parts = found if isinstance(found, list) else [found]
    while parts and isinstance(parts[0], list):
        parts = parts[0]
    objects = [part for part in parts if isinstance(part, Mapping)]
    known = _SHAPES if isinstance(found, list) else names
    return found if objects and len(objects) == len(parts) and not objects[0].keys().isdisjoint(known) else given


def conversation_of(messages: Sequence[Turn], tools: Any = None) -> Conversation:
    """Messages and schemas of tools as a Conversation. Raises RowError."""
    tools = parsed(tools)
    try:
        return Conversation.of(list(messages), tools if isinstance(tools, list) else ())
    except ConversationError as error:
        raise RowError(f"prompt: {error}") from error
