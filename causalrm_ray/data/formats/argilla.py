"""Argilla's data sets of annotated records, as `to_datasets`, `to_parquet` and its export to the hub write them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from causalrm_ray.data.formats.base import LoggedEvent, LoggedImpression
from causalrm_ray.data.formats.parts.exchange import answer_of, conversation_of, prompt_of
from causalrm_ray.data.formats.parts.reader import Reader
from causalrm_ray.data.formats.parts.scores import scored
from causalrm_ray.data.formats.parts.values import mapping, name, parsed, seconds
from causalrm_ray.data.rows import RowError
from causalrm_ray.errors import kind_of

_PROMPTS = ("prompt", "instruction", "question", "input", "messages", "chat")
_ANSWERS = ("response", "completion", "answer", "output", "generation")
_IDS, _TIMES = ("id", "external_id", "_server_id"), ("inserted_at", "updated_at")
_USERS = ("user", "user_id", "metadata.user", "metadata.user_id")
_RESPONSES = ".responses"
_MODELS = ("model", "metadata.model")


class _Columns(Container[str]):
    """The columns that are read: questions have any name."""

    def __contains__(self, column: object) -> bool:
        known = (*_PROMPTS, *_ANSWERS, *_IDS, *_TIMES, *_USERS, *_MODELS, "status", "fields", "responses")
        return column in known or any(part in str(column) for part in (_RESPONSES, ".status", ".users"))


class Argilla(Reader):
    """A prompt and an answer in fields of the usual names, and the answers of annotators to questions about them.

    Each submitted response (`QUESTION.responses`, `.users`, `.status`; or records with `fields` and `responses`) is an event with
    the question as its score; drafts and discarded ones are none. Suggestions, which models make, are not read.
    """

    columns = _Columns()

    def read(self, fields: Mapping[str, Any]) -> Iterator[LoggedImpression]:
        """The answer of a record. Raises RowError."""
        shown = {**fields, **mapping(fields.get("fields"))}
        prompt = next((found for key in _PROMPTS if (found := prompt_of(shown.get(key), self.ignored))), None)
        answer = next((found for key in _ANSWERS if key in shown and (found := answer_of(shown[key], self.ignored))), None)
        if prompt and answer is None and len(prompt) > 1 and prompt[-1]["role"] == "assistant":
            *prompt, answer = prompt  # a chat that ends with the answer
        if not prompt or answer is None:
            raise RowError(
                f"the record must have one of {', '.join(_PROMPTS)} and one of {', '.join(_ANSWERS)}, got {kind_of(shown)}"
            )
        impression = LoggedImpression(
            prompt=conversation_of(prompt),
            response=answer["content"],
            id=name(fields, *_IDS),
            time=next((seconds(fields[key], key) for key in _TIMES if key in fields), None),
            user=name(fields, *_USERS),
            model=name(fields, *_MODELS),
        )
        yield from self.scores.rate(impression, list(self._events(fields)))

    def _events(self, fields: Mapping[str, Any]) -> Iterator[LoggedEvent]:
        for question, user, status, value in _responses(fields):
            if status not in (None, "submitted"):
                self.ignore(f"{question}: responses that are {status}")
            elif isinstance(value, list | Mapping):
                self.ignore(f"{question}: rankings, spans and several labels", value)
            elif value not in (None, "") and (event := scored(question, value, id=_event_id(fields, question, user))) is not None:
                yield event

    @classmethod
    def matches(cls, columns: frozenset[str], rows: Sequence[Mapping[str, Any]]) -> float:
        """Columns of a question's responses and of who gave them, or a record's fields and responses."""
        questions = {column.removesuffix(_RESPONSES) for column in columns if column.endswith(_RESPONSES)}
        if any({f"{question}{_RESPONSES}.status", f"{question}{_RESPONSES}.users"} & columns for question in questions):
            return 1.0
        return 1.0 if {"fields", "responses"} <= columns else 0.0


def _responses(fields: Mapping[str, Any]) -> Iterator[tuple[str, str | None, str | None, Any]]:
    """(question, user, status, value) of every response of a record, in the column form or in that of records."""
    for column in fields:
        if column.endswith(_RESPONSES):
            values = _list(fields[column])
            users, states = _list(fields.get(f"{column}.users")), _list(fields.get(f"{column}.status"))
            for place, value in enumerate(values):
                yield column.removesuffix(_RESPONSES), _at(users, place), _at(states, place), value
    given = parsed(fields.get("responses"))
    if isinstance(given, Mapping):  # {"question": [{"value", "user_id", "status"}]}
        for question, responses in given.items():
            for response in map(mapping, _list(responses)):
                yield question, name(response, "user_id"), name(response, "status"), response.get("value")
    for response in map(mapping, given if isinstance(given, list) else []):  # [{"values": {"question": {"value"}}, ...}]
        for question, value in mapping(response.get("values")).items():
            yield question, name(response, "user_id"), name(response, "status"), mapping(value).get("value", value)


def _event_id(fields: Mapping[str, Any], question: str, user: str | None) -> str | None:
    """Several annotators answer a question about one record: each answer is an event of its own."""
    record = name(fields, *_IDS)
    return None if record is None or user is None else f"{record}/{question}/{user}"


def _list(value: Any) -> list[Any]:
    value = parsed(value)
    return value if isinstance(value, list) else [] if value is None else [value]


def _at(values: Sequence[Any], place: int) -> Any:
    return values[place] if place < len(values) else None
