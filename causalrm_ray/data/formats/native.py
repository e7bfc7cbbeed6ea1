"""The format of our own documentation: a row holds one answer and at most one piece of feedback."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from causalrm_ray.data.formats.base import LoggedImpression
from causalrm_ray.data.sources import RowError, turn_text


class Native:
    """`prompt` (text or chat messages) and `response`, and optionally:

    id (or impression_id), user     text or whole numbers
    context                         traits by name: a mapping or JSON object
    time                            seconds, ISO text or timestamp; UTC where no zone is given
    policy_version                  whole number; 0 if not given
    signal, label                   the feedback: a signal of the log, or a bare label in {0, 1}; or either as `feedback`
    value, event_id                 of the feedback; 1.0 if not given
    """

    columns = frozenset(
        ["id", "impression_id", "prompt", "response", "user", "context", "time", "policy_version"]
        + ["signal", "label", "feedback", "value", "event_id"]
    )

    def read(self, fields: Mapping[str, Any]) -> list[LoggedImpression]:
        """The one answer of a row. Raises RowError."""
        signal, label, feedback = (fields.get(column) for column in ("signal", "label", "feedback"))
        if isinstance(feedback, str):
            signal = _agreed("signal", signal, feedback)
        elif feedback is not None:
            label = _agreed("label", label, feedback)
        return [
            LoggedImpression(
                prompt=turn_text(fields, "prompt", "user"),
                response=fields.get("response", ""),
                id=_name(fields, "id", "impression_id"),
                policy_version=_whole(fields.get("policy_version", 0)),
                time=seconds(fields.get("time")),
                user=_name(fields, "user"),
                context=traits(fields.get("context", {})),
                signal=signal,
                label=label,
                value=fields.get("value", 1.0),
                event_id=_name(fields, "event_id"),
            )
        ]


def seconds(time: Any) -> Any:
    """Seconds since the epoch of an ISO text or a timestamp; anything else as it is. Raises RowError for other text."""
    if isinstance(time, str):
        try:
            time = datetime.fromisoformat(time)
        except ValueError as error:
            raise RowError(f"time must be seconds or an ISO date and time, got {time!r:.80}") from error
    if isinstance(time, datetime):
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    return time


def traits(context: Any) -> dict[str, str]:
    """Traits by name, of a mapping or a JSON object: values other than text are kept as JSON, nulls are left out."""
    found = context
    if isinstance(context, str):
        try:
            found = json.loads(context)
        except (ValueError, RecursionError):
            found = None
    if not isinstance(found, Mapping):
        raise RowError(f"context must be a mapping or a JSON object, got {context!r:.80}")
    return {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        for name, value in found.items()
        if value is not None
    }


def _name(fields: Mapping[str, Any], *columns: str) -> str | None:
    """The first of `columns` that is given, as text; None if none is."""
    for column in columns:
        if column in fields:
            name = fields[column]
            if not isinstance(name, str | int) or not str(name).strip():
                raise RowError(f"{column} must be a text or whole number that is not empty, got {name!r:.80}")
            return str(name)
    return None


def _whole(number: Any) -> Any:
    """A whole number that a column with gaps turned into a float, as the whole number it was; anything else as it is."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _agreed(column: str, value: Any, feedback: Any) -> Any:
    if value is not None and value != feedback:
        raise RowError(f"feedback must agree with {column} {value!r:.80}, got {feedback!r:.80}")
    return feedback
