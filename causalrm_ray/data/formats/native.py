"""The format of our own documentation: a row holds an answer and what was done about it, or one event about another row's."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from causalrm_ray.data.formats.base import LABEL_WORDS, LoggedEvent, LoggedImpression
from causalrm_ray.data.rows import RowError, conversation
from causalrm_ray.errors import brief, kind_of

_DATE = re.compile(r"[-:T]|^(19|20)\d{6}$")  # other digits are a number of seconds


class Native:
    """`prompt` (text or messages) and `response`, and optionally:

    id (or impression_id), user     text or whole numbers
    conversation_id, model          likewise
    tools                           schemas of the tools that the answer could call
    context                         traits by name: a mapping or JSON object
    time                            seconds, ISO text or timestamp; UTC where no zone is given
    policy_version                  whole number; 0 if not given
    logprob, asked_for_feedback     log of the answer's probability; whether the product asked for feedback
    signal, label                   the feedback: a signal of the log, or a bare label in {0, 1}; or either as `feedback`
    value, event_id                 of the feedback; a signal with thresholds must have a value
    events                          more feedback: a list of {signal, label, value, time, event_id, retracts}

    A row without `prompt` and `response`, but with `impression_id`, is an event: its signal or label, value, time, event_id and
    `retracts`, the id of an event that it withdraws.
    """

    columns = frozenset(
        ["id", "impression_id", "prompt", "response", "user", "context", "time", "policy_version"]
        + ["conversation_id", "model", "tools", "logprob", "asked_for_feedback", "events"]
        + ["signal", "label", "feedback", "value", "event_id", "retracts"]
    )

    labels = ("label", "feedback", "events")

    @classmethod
    def matches(cls, columns: Collection[str], rows: Sequence[Mapping[str, Any]]) -> float:
        """0.9 for answers or events as above: another format may know columns beside them that say more."""
        if {"prompt", "response"} <= set(columns):
            return 0.9
        return 0.9 * ("impression_id" in columns and not {"signal", "label", "feedback", "retracts"}.isdisjoint(columns))

    def read(self, fields: Mapping[str, Any]) -> list[LoggedImpression | LoggedEvent]:
        """The one answer of a row, or its one event. Raises RowError."""
        if "impression_id" in fields and "prompt" not in fields and "response" not in fields:
            return [_event(fields, _name(fields, "impression_id"))]
        given = [fields] if "signal" in fields or "label" in fields or "feedback" in fields else []
        if "events" in fields:
            later = parsed(fields["events"])
            if not isinstance(later, list) or not all(isinstance(event, Mapping) for event in later):
                raise RowError(f"events must be a list of JSON objects, got {brief(later)}")
            given += later
        return [
            LoggedImpression(
                prompt=conversation(fields.get("prompt"), parsed(fields.get("tools"))),
                response=fields.get("response", ""),
                id=_name(fields, "id" if fields.get("id") is not None else "impression_id"),
                policy_version=_whole(fields.get("policy_version", 0)),
                time=seconds(fields.get("time")),
                user=_name(fields, "user"),
                context=traits(fields["context"]) if "context" in fields else {},
                conversation_id=_name(fields, "conversation_id"),
                model=_name(fields, "model"),
                logprob=fields.get("logprob"),
                asked_for_feedback=fields.get("asked_for_feedback"),
                events=[_event(event) for event in given],
            )
        ]


def _event(fields: Mapping[str, Any], impression_id: str | None = None) -> LoggedEvent:
    signal, label, feedback = (fields.get(column) for column in ("signal", "label", "feedback"))
    if isinstance(feedback, str) and feedback.strip().casefold() not in LABEL_WORDS:
        signal = _agreed("signal", signal, feedback)
    elif feedback is not None:
        label = _agreed("label", label, feedback)
    retracts = _name(fields, "retracts")
    if signal is None and label is None and retracts is None:
        raise RowError("an event must have a signal, a label or the id of an event that it retracts, got none")
    return LoggedEvent(
        signal=signal,
        label=label,
        value=fields.get("value"),
        id=_name(fields, "event_id"),
        time=seconds(fields.get("time")),
        retracts=retracts,
        impression_id=impression_id,
    )


def seconds(time: Any) -> Any:
    """Seconds since the epoch of an ISO text or a timestamp; anything else as it is. Raises RowError for other text."""
    if isinstance(time, float):
        return time
    if isinstance(time, str):
        try:
            time = datetime.fromisoformat(time) if _DATE.search(time) else float(time)
        except ValueError as error:
            raise RowError(f"time must be seconds or an ISO date and time, got {brief(time)}") from error
    if isinstance(time, datetime):
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    return time


def parsed(value: Any) -> Any:
    """What a JSON text holds, as columns of text files do; anything else as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def traits(context: Any) -> dict[str, str]:
    """Traits by name, of a mapping or a JSON object: values other than text are kept as JSON, nulls are left out."""
    found = parsed(context)
    if not isinstance(found, Mapping):
        raise RowError(f"context must be a mapping or a JSON object, got {kind_of(context)}")
    return {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        for name, value in found.items()
        if value is not None
    }


def _name(fields: Mapping[str, Any], column: str) -> str | None:
    """A column as text; None if it is not given."""
    name = fields.get(column)
    if name is None or (isinstance(name, str) and name and not name.isspace()):
        return name
    if not isinstance(name, int):
        raise RowError(f"{column} must be a text or whole number that is not empty, got {brief(name)}")
    return str(name)


def _whole(number: Any) -> Any:
    """A whole number that a column with gaps turned into a float, as the whole number it was; anything else as it is."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _agreed(column: str, value: Any, feedback: Any) -> Any:
    if value is not None and value != feedback:
        raise RowError(f"feedback must agree with {column} {brief(value)}, got {brief(feedback)}")
    return feedback
