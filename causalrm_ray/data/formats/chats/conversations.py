"""Rows that hold whole conversations: WildChat, ShareGPT, OpenAI's fine-tuning files; and pairs of them with a winner: Chatbot
Arena, HH, preferences for DPO."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from causalrm_ray.data.formats.base import LoggedEvent, LoggedImpression
from causalrm_ray.data.formats.parts.exchange import conversation_of
from causalrm_ray.data.formats.parts.messages import Turn, answers, placed_turns
from causalrm_ray.data.formats.parts.ratings import OURS, RATINGS, ratings
from causalrm_ray.data.formats.parts.reader import Reader
from causalrm_ray.data.formats.parts.scores import vote
from causalrm_ray.data.formats.parts.values import mapping, name, parsed, seconds
from causalrm_ray.data.rows import RowError
from causalrm_ray.errors import brief, kind_of

_LISTS = ("conversation", "conversations", "messages")
_IDS = ("conversation_hash", "conversation_id", "question_id", "chat_id", "prompt_id", "id")
_TIMES = ("timestamp", "tstamp", "created_at", "create_time", "created", "time")
_USERS = ("user", "user_id", "hashed_ip", "judge")
_TURN = frozenset({"role", "from", "content", "value", "text", "parts", "tool_calls", "tool_call_id", "name", "function_call"})
_SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")  # of HH


class WildChat(Reader):
    """A `conversation` (`conversations`, `messages`) a row, roles as `role` or `from`, contents as `content` or `value`.

    Every answer is an impression that replies to all before it. The last one has the ratings of the row; a message's are its own.
    """

    columns = frozenset({*_LISTS, *_IDS, *_TIMES, *_USERS, "model", "system", "tools", *RATINGS, *OURS})

    def read(self, fields: Mapping[str, Any]) -> Iterator[LoggedImpression]:
        """The answers of a row. Raises RowError."""
        listed = parsed(next((fields[key] for key in _LISTS if key in fields), None))
        if not isinstance(listed, list):
            raise RowError(f"{' or '.join(_LISTS)} must be a list of messages, got {kind_of(listed)}")
        if isinstance(fields.get("system"), str):
            listed = [{"role": "system", "content": fields["system"]}, *listed]
        given = [mapping(message) for message in listed]
        user = next((found for part in (fields, *given) if (found := name(part, *_USERS))), None)
        shown = list(_shown(self, listed, fields, "", user))
        for number, (place, impression) in enumerate(shown, 1):
            events = list(ratings(given[place], self.ignored, where="messages."))
            if number == len(shown):
                events += ratings(fields, self.ignored)
            yield from self.scores.rate(impression, events)

    @classmethod
    def matches(cls, columns: frozenset[str], rows: Sequence[Mapping[str, Any]]) -> float:
        """A list of messages under one of the usual names, and nothing of a request log."""
        listed = [parsed(row[key])[:1] for row in rows for key in _LISTS if isinstance(parsed(row.get(key)), list)]
        messages = [message for part in listed for message in part if isinstance(message, Mapping)]
        is_list = bool(messages) and all({"role", "from"} & message.keys() for message in messages)
        return 0.9 if is_list and not {"choices", "prompt"} & columns else 0.0


class Arena(Reader):
    """Two answers and a winner a row: `conversation_a`, `conversation_b`, `model_a`, `model_b` and `winner` (Chatbot Arena);
    `prompt`, `response_a`, `response_b` with `winner_model_a` ...; or `chosen` and `rejected`, lists of messages or HH's text.

    Each conversation's last answer is liked or disliked, its earlier ones are impressions without feedback. A tie says nothing of
    either, unless both are bad.
    """

    columns = frozenset(
        ["conversation_a", "conversation_b", "response_a", "response_b", "model_a", "model_b", "winner", "chosen", "rejected"]
        + ["winner_model_a", "winner_model_b", "winner_tie", "prompt", *_IDS, *_TIMES, *_USERS]
    )

    def read(self, fields: Mapping[str, Any]) -> Iterator[LoggedImpression]:
        """The answers of both sides of a row. Raises RowError."""
        labels = self._labels(fields)
        for side, label in labels.items():
            shown = [found for _, found in _shown(self, _side(fields, side), fields, side, name(fields, *_USERS))]
            if not shown:
                raise RowError(f"the conversation of side {side} must end with an answer, got none")
            *earlier, last = shown
            yield from earlier
            yield from self.scores.rate(last, [] if label is None else [LoggedEvent(label=float(label))])

    def _labels(self, fields: Mapping[str, Any]) -> dict[str, int | None]:
        """The label of each side."""
        if "chosen" in fields and "rejected" in fields:
            return {"chosen": 1, "rejected": 0}
        winner = fields.get("winner")
        if winner is None:
            winner = next((key for key in ("winner_model_a", "winner_model_b", "winner_tie") if vote_of(fields.get(key))), None)
        word = re.sub(r"[^a-z]", "", str(winner).lower()).removeprefix("winner").removeprefix("model")
        if word in ("a", "b"):
            return {side: int(side == word) for side in ("a", "b")}
        if word in ("tiebothbad", "bothbad"):
            return {"a": 0, "b": 0}
        if winner is None or word.startswith("tie") or word == "bothgood":
            self.ignore("ties", winner)
            return {"a": None, "b": None}
        raise RowError(f"winner must be model_a, model_b or tie, got {brief(winner)}")

    @classmethod
    def matches(cls, columns: frozenset[str], rows: Sequence[Mapping[str, Any]]) -> float:
        """Two sides under the usual names."""
        pairs = ({"conversation_a", "conversation_b"}, {"response_a", "response_b", "prompt"}, {"chosen", "rejected"})
        return 1.0 if any(pair <= columns for pair in pairs) else 0.0


def _shown(
    reader: Reader, messages: Sequence[Any], fields: Mapping[str, Any], side: str, user: str | None
) -> Iterator[tuple[int, LoggedImpression]]:
    """(place of the message, impression) of the answers of a conversation, which is all of a row or a side of it."""
    given = [mapping(message) for message in messages]
    for message in given:
        for key in message.keys() - _TURN - {*RATINGS, *_TIMES, *_USERS}:
            reader.ignore(f"messages.{key}", message[key])
    time = next((seconds(fields[key], key) for key in _TIMES if fields.get(key) is not None), None)
    identity = name(fields, *_IDS)
    places = placed_turns([{key: message[key] for key in message.keys() & _TURN} for message in given])
    for number, before, text in answers([turn for _, turn in places], reader.ignored):
        place = places[number][0]
        own = next((seconds(given[place][key], key) for key in _TIMES if given[place].get(key) is not None), None)
        yield (
            place,
            LoggedImpression(
                prompt=conversation_of(before, fields.get("tools")),
                response=text,
                id=identity
                and "/".join([identity, *([side] if side else []), str(place)]),  # equal rows without ids are different
                time=time if own is None else own,
                user=user,
                conversation_id=identity or _digest(fields),
                model=name(fields, f"model_{side}", "model"),
            ),
        )


def _side(fields: Mapping[str, Any], side: str) -> list[Any]:
    """The messages of one side of a pair."""
    given = fields.get(f"conversation_{side}", fields.get(f"response_{side}", fields.get(side)))
    prompt, given = parsed(fields.get("prompt")), parsed(given)
    if isinstance(given, str) and _SPEAKER.search(given):
        parts = _SPEAKER.split("\n\n" + given.lstrip())
        return [{"role": role, "content": text} for role, text in zip(parts[1::2], parts[2::2], strict=True)]
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list) or not given:
        raise RowError(f"side {side} must be a list of messages or a text, got {kind_of(given)}")
    if isinstance(given[0], Mapping):
        before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}] if isinstance(prompt, str) else []
        return given if mapping(given[0]).get("role") in ("user", "system") else [*before, *given]
    asked = prompt if isinstance(prompt, list) else [prompt]
    if len(asked) != len(given):
        raise RowError(f"prompt must have as many turns as side {side}, {len(given)}, got {len(asked)}")
    pairs = zip(asked, given, strict=True)
    return [turn for question, answer in pairs for turn in (_turn("user", question), _turn("assistant", answer))]


def _turn(role: str, content: Any) -> Turn:
    return {"role": role, "content": "" if content is None else content}


def _digest(fields: Mapping[str, Any]) -> str:
    """An id of a conversation that has none."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:32]


def vote_of(value: Any) -> bool:
    """Whether a flag is set: 1, true, "1"."""
    return value in (1, "1") or vote(value) == 1
