"""The rules a record must meet to become a row of the feedback log, and the signals that have a fixed meaning.

Impression, FeedbackEvent --rules--> the columns of a row, without `seq` and `digest` | RecordError
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from causalrm_ray.conversation import Conversation
from causalrm_ray.data.log.tables import MAX_ID_CHARS
from causalrm_ray.errors import InputError, brief
from causalrm_ray.types import LABEL_SIGNALS, FeedbackEvent, Impression, Meaning

RETRACT = "retract"  # the signal of an event that withdraws another


_Of = tuple[str, Any] | None  # what record a field is of: its kind and id


class RecordError(ValueError):
    """A record that cannot be logged: names the field, the rule and the value."""


def check_signals(signals: Mapping[str, Meaning]) -> dict[str, Meaning]:
    """The meaning of each signal, those of LABEL_SIGNALS too. Raises InputError on a label other than 0 and 1."""
    for signal, label in signals.items():
        _identifier(None, "signal", signal)
        if signal == RETRACT:
            raise InputError(f"signals must not map {RETRACT!r}: it withdraws an event and has no label")
        if not isinstance(label, int | float):
            continue
        if label not in (0, 1):
            raise InputError(f"signals[{signal!r}] must be 0 or 1, got {label!r}")
        if LABEL_SIGNALS.get(signal, label) != label:
            raise InputError(f"signals[{signal!r}] must be {LABEL_SIGNALS[signal]}, its fixed meaning, got {label!r}")
    return {**LABEL_SIGNALS, **signals}


def impression_row(impression: Impression) -> dict[str, Any]:
    """The columns of one impression, without `seq` and `digest`; raises RecordError."""
    return impression_columns(*(getattr(impression, name) for name in impression.__slots__))


def impression_columns(
    id: Any,
    prompt: Conversation,
    response: Any,
    policy_version: Any,
    time: Any,
    user: Any,
    context: Any,
    conversation_id: Any,
    model: Any,
    logprob: Any,
    asked_for_feedback: Any,
) -> dict[str, Any]:
    """The same of an impression's fields, which an import has by the million and makes no record of."""
    of = ("impression", id)
    return {
        "id": _identifier(None, "impression id", id),
        "prompt": prompt.json,
        "response": _text(of, "response", response),
        "policy_version": _version(of, "policy_version", policy_version),
        "time": _time(of, "time", time),
        "user": None if user is None else _text(of, "user", user),
        "context": _context(of, "context", context),
        "conversation_id": None if conversation_id is None else _text(of, "conversation_id", conversation_id),
        "model": None if model is None else _text(of, "model", model),
        "logprob": None if logprob is None else _logprob(of, "logprob", logprob),
        "asked_for_feedback": None if asked_for_feedback is None else _flag(of, "asked_for_feedback", asked_for_feedback),
    }


def event_row(event: FeedbackEvent, signals: Mapping[str, Meaning]) -> dict[str, Any]:
    """The columns of one event, without `seq` and `digest`; raises RecordError. `signals` are those that are known."""
    of = ("event", event.id)
    row = {
        "id": _identifier(None, "event id", event.id),
        "impression_id": _identifier(of, "impression_id", event.impression_id),
        "signal": event.signal,
        "value": _finite(of, "value", event.value),
        "time": _time(of, "time", event.time),
        "retracts": None if event.retracts is None else _identifier(of, "retracts", event.retracts),
    }
    if event.retracts is None:
        if event.signal not in signals:
            raise _fault(of, "signal", f"be one of {sorted(signals)}", event.signal)
    elif event.signal != RETRACT:
        raise _fault(of, "signal", f"be {RETRACT!r} where retracts is given", event.signal)
    elif event.retracts == event.id:
        raise _fault(of, "retracts", "name another event", event.retracts)
    return row


def _fault(of: _Of, field: str, rule: str, value: Any) -> RecordError:
    record = f"{of[0]} {brief(of[1])}: " if of else ""
    return RecordError(f"{record}{field} must {rule}, got {brief(value)}")


def _text(of: _Of, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _fault(of, field, "be text", value)
    if not value or value.isspace():
        raise _fault(of, field, "not be empty", value)
    return value if value.isascii() and "\x00" not in value else _storable(of, field, value)


def _storable(of: _Of, field: str, value: str) -> str:
    if "\x00" in value:
        raise _fault(of, field, "not hold a NUL character", value)
    if not value.isascii() and value.encode(errors="ignore").decode() != value:  # half of a surrogate pair
        raise _fault(of, field, "be valid Unicode", value)
    return value


def _identifier(of: _Of, field: str, value: Any) -> str:
    if len(_text(of, field, value)) > MAX_ID_CHARS:
        raise _fault(of, field, f"have at most {MAX_ID_CHARS} characters", len(value))
    return value


def _finite(of: _Of, field: str, value: Any) -> float:
    if type(value) is float and math.isfinite(value):
        return value
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _fault(of, field, "be a finite number", value)
    return number


def _time(of: _Of, field: str, value: Any) -> float:
    seconds = _finite(of, field, value)
    if seconds < 0:
        raise _fault(of, field, "be at least 0 seconds", value)
    return seconds


def _logprob(of: _Of, field: str, value: Any) -> float:
    if _finite(of, field, value) > 0:
        raise _fault(of, field, "be the log of a probability, at most 0", value)
    return value


def _flag(of: _Of, field: str, value: Any) -> int:
    if value not in (0, 1):
        raise _fault(of, field, "be true or false", value)
    return int(value)


def _version(of: _Of, field: str, value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise _fault(of, field, "be a whole number in [0, 2^63)", value)
    return int(value)


def _context(of: _Of, field: str, value: Any) -> str:
    if type(value) is dict and not value:
        return "{}"
    if not isinstance(value, Mapping) or not all(isinstance(part, str) for item in value.items() for part in item):
        raise _fault(of, field, "map text to text", value)
    return _storable(of, field, _context_text(tuple(value.items())))


@lru_cache(maxsize=1 << 14)
def _context_text(items: tuple[tuple[str, str], ...]) -> str:
    """JSON of a context; most rows of a log share a few."""
    return json.dumps(dict(items), sort_keys=True, ensure_ascii=False)
