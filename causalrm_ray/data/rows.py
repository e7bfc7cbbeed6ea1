"""Rows of a source as they came, the errors that refuse them, and where refused rows go.

reader --RawRow--> row_fields --> a format            a fault in a row: RowError --> Quarantine; in the source: SourceError
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from causalrm_ray.conversation import Conversation, ConversationError
from causalrm_ray.errors import InputError, brief

JSON_PROMPTS = ('[{"', '{"messages":')  # how messages begin that a column of text holds


class SourceError(InputError):
    """A source that cannot be read, or holds no usable row: names the source, the rule and what was found."""


class RowError(ValueError):
    """A row that breaks a rule: names the field, the rule and the value, but never a text that a person wrote."""


@dataclass(slots=True)  # not frozen: that takes three times as long to make, and there is one for each row
class RawRow:
    """One row as it came: `where` is the file or source, `number` its row there from 1 (in JSONL: its line).

    `fields` is None where the row could not be parsed, and `fault` says why. `raw` is the row as it was read, None for rows
    that are no text.
    """

    where: str
    number: int
    raw: str | bytes | None
    fields: Mapping[str, Any] | None
    fault: str = ""

    @property
    def text(self) -> str:
        """The whole row for a person to read."""
        if self.raw is None:
            return json.dumps(self.fields, default=str, ensure_ascii=False)
        text = self.raw.decode(errors="backslashreplace") if isinstance(self.raw, bytes) else self.raw
        return text.strip().removeprefix("\ufeff")


class Quarantine:
    """A JSONL file of the rows that broke a rule: {source, row, reason, raw}."""

    def __init__(self, file: TextIO) -> None:
        self.count = 0
        self.first_fault = ""
        self._file = file

    def refuse(self, where: str, number: int, reason: str, raw: str) -> None:
        """Write one row; `number` counts from 1 within `where`."""
        self.count += 1
        self.first_fault = self.first_fault or f"{where} row {number}: {reason}"
        self._file.write(json.dumps({"source": where, "row": number, "reason": reason, "raw": raw}) + "\n")


def row_fields(row: RawRow) -> Mapping[str, Any]:
    """The fields of a row; raises RowError if it could not be parsed."""
    if row.fields is None:
        raise RowError(row.fault)
    return row.fields


def conversation(prompt: Any, tools: Any = None) -> Conversation:
    """A prompt, one user's text or messages in OpenAI's form (or their JSON text), as a conversation. Raises RowError."""
    if isinstance(prompt, str) and prompt.startswith(JSON_PROMPTS):
        try:
            read = json.loads(prompt)
        except (ValueError, RecursionError):
            pass  # a text that begins like one
        else:
            prompt, tools = (read["messages"], read.get("tools", tools)) if isinstance(read, dict) else (read, tools)
    if not isinstance(prompt, list):
        plain = isinstance(prompt, str) and prompt.isascii()
        return Conversation.user(prompt if plain and prompt.strip() else turn_text({"prompt": prompt}, "prompt", "user"))
    try:
        return Conversation.of(prompt, tools or ())
    except ConversationError as error:
        raise RowError(f"prompt: {error}") from error


def turn_text(fields: Mapping[str, Any], column: str, role: Literal["user", "assistant"]) -> str:
    """A text, or the last turn of `role` in a list of chat messages, in valid Unicode. Raises RowError."""
    text = fields.get(column)
    if isinstance(text, list):
        turns = [turn for turn in text if isinstance(turn, Mapping) and turn.get("role") == role]
        if not turns:
            raise RowError(f"{column} must hold {'a user' if role == 'user' else 'an assistant'}'s turn, got {brief(text)}")
        text = turns[-1].get("content")
    if not isinstance(text, str) or not text.strip():
        raise RowError(f"{column} must be a text that is not empty, got {brief(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON lets through
        raise RowError(f"{column} must be valid Unicode, got half of a surrogate pair at place {error.start}") from error
    return text
