"""The feedback log's tables, and the rules a record must meet to become a row of one.

    impressions   one row per response shown            key: the impression's id
    events        one row per thing a user did about it key: the event's id; its impression may be missing still
    log_state     one row: the position of the newest row, and how many repeated deliveries were ignored

`seq` is one counter over both tables, given out while the writer holds the row of `log_state`: a row with a lower `seq` was
committed no later, so that "everything up to position p" never changes again. `digest` shows whether a row is still the one
that was written: SQLite keeps no checksums.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from sqlalchemy import BigInteger, Column, Double, Index, Integer, MetaData, String, Table, Text

from causalrm_ray.errors import InputError, brief
from causalrm_ray.types import LABEL_SIGNALS, FeedbackEvent, Impression, Meaning

RETRACT = "retract"  # the signal of an event that withdraws another
MAX_ID_CHARS = 255

# Ids are compared byte by byte on every database: a language's collation would change the order of ties.
Identifier = (
    String(MAX_ID_CHARS)
    .with_variant(String(MAX_ID_CHARS, collation="C"), "postgresql")
    .with_variant(String(MAX_ID_CHARS, collation="utf8mb4_bin"), "mysql", "mariadb")
)

metadata = MetaData()


def row_digest(*columns: Any) -> str:
    """A hash of the columns of a row, as they are written and as a database gives them back (-0.0 comes back as 0.0)."""
    values = [value + 0.0 if isinstance(value, float) else value for value in columns]
    return hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()


def digested_columns(table: Table) -> list[Column[Any]]:
    """The columns that `row_digest` hashes, in their order."""
    return [column for column in table.c if column.name != "digest"]


def _digest_column() -> Column[str]:
    """Computed on insertion; NULL in rows of logs from before there was one."""

    def digest(context: Any) -> str:
        row = context.get_current_parameters()
        return row_digest(*(row[column.name] for column in digested_columns(context.current_column.table)))

    return Column("digest", String(16), default=digest)


impression_table = Table(
    "impressions",
    metadata,
    Column("id", Identifier, primary_key=True),
    Column("seq", BigInteger, nullable=False, unique=True),
    Column("prompt", Text, nullable=False),
    Column("response", Text, nullable=False),
    Column("policy_version", BigInteger, nullable=False),
    Column("time", Double, nullable=False),
    Column("user", Text),
    Column("context", Text, nullable=False),
    Column("conversation_id", Text),
    Column("model", Text),
    Column("logprob", Double),
    Column("asked_for_feedback", Integer),
    _digest_column(),
)

event_table = Table(
    "events",
    metadata,
    Column("id", Identifier, primary_key=True),
    Column("seq", BigInteger, nullable=False, unique=True),
    Column("impression_id", Identifier, nullable=False),
    Column("signal", Identifier, nullable=False),
    Column("value", Double, nullable=False),
    Column("time", Double, nullable=False),
    Column("retracts", Identifier),
    _digest_column(),
)
Index("events_by_impression", event_table.c.impression_id, event_table.c.time, event_table.c.id)
_withdraws = event_table.c.retracts.is_not(None)
Index("events_by_retracts", event_table.c.retracts, sqlite_where=_withdraws, postgresql_where=_withdraws)

state_table = Table(
    "log_state",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("position", BigInteger, nullable=False),
    Column("redelivered", BigInteger, nullable=False),
)


class RecordError(ValueError):
    """A record that cannot be logged: names the field, the rule and the value."""


def check_signals(signals: Mapping[str, Meaning]) -> dict[str, Meaning]:
    """The meaning of each signal, those of LABEL_SIGNALS too. Raises InputError on a label other than 0 and 1."""
    for signal, label in signals.items():
        _identifier("signal", signal)
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
    thing = f"impression {impression.id!r}"
    return {
        "id": _identifier("impression id", impression.id),
        "prompt": impression.prompt.json,
        "response": _text(f"{thing}: response", impression.response),
        "policy_version": _version(f"{thing}: policy_version", impression.policy_version),
        "time": _time(f"{thing}: time", impression.time),
        "user": _optional_text(f"{thing}: user", impression.user),
        "context": _context(f"{thing}: context", impression.context),
        "conversation_id": _optional_text(f"{thing}: conversation_id", impression.conversation_id),
        "model": _optional_text(f"{thing}: model", impression.model),
        "logprob": _logprob(f"{thing}: logprob", impression.logprob),
        "asked_for_feedback": _flag(f"{thing}: asked_for_feedback", impression.asked_for_feedback),
    }


def event_row(event: FeedbackEvent, signals: Mapping[str, Meaning]) -> dict[str, Any]:
    """The columns of one event, without `seq` and `digest`; raises RecordError. `signals` are those that are known."""
    thing = f"event {event.id!r}"
    row = {
        "id": _identifier("event id", event.id),
        "impression_id": _identifier(f"{thing}: impression_id", event.impression_id),
        "signal": event.signal,
        "value": _finite(f"{thing}: value", event.value),
        "time": _time(f"{thing}: time", event.time),
        "retracts": None if event.retracts is None else _identifier(f"{thing}: retracts", event.retracts),
    }
    if event.retracts is None:
        _require(event.signal in signals, f"{thing}: signal", f"be one of {sorted(signals)}", event.signal)
    else:
        _require(event.signal == RETRACT, f"{thing}: signal", f"be {RETRACT!r} where retracts is given", event.signal)
        _require(event.retracts != event.id, f"{thing}: retracts", "name another event", event.retracts)
    return row


def _require(holds: bool, thing: str, rule: str, value: Any) -> None:
    if not holds:
        raise RecordError(f"{thing} must {rule}, got {brief(value)}")


def _text(thing: str, value: Any) -> str:
    _require(isinstance(value, str), thing, "be text", value)
    _require(bool(value.strip()), thing, "not be empty", value)
    return _storable(thing, value)


def _optional_text(thing: str, value: Any) -> str | None:
    return None if value is None else _text(thing, value)


def _logprob(thing: str, value: Any) -> float | None:
    _require(value is None or _finite(thing, value) <= 0, thing, "be the log of a probability, at most 0", value)
    return value


def _flag(thing: str, value: Any) -> int | None:
    _require(value is None or value in (0, 1), thing, "be true or false", value)
    return None if value is None else int(value)


def _storable(thing: str, value: str) -> str:
    _require("\x00" not in value, thing, "not hold a NUL character", value)
    _require(value.encode(errors="ignore").decode() == value, thing, "be valid Unicode", value)
    return value


def _identifier(thing: str, value: Any) -> str:
    _require(len(_text(thing, value)) <= MAX_ID_CHARS, thing, f"have at most {MAX_ID_CHARS} characters", len(value))
    return value


def _finite(thing: str, value: Any) -> float:
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        number = math.inf
    _require(math.isfinite(number), thing, "be a finite number", value)
    return number


def _time(thing: str, value: Any) -> float:
    seconds = _finite(thing, value)
    _require(seconds >= 0, thing, "be at least 0 seconds", value)
    return seconds


def _version(thing: str, value: Any) -> int:
    _require(isinstance(value, int) and 0 <= value < 2**63, thing, "be a whole number in [0, 2^63)", value)
    return int(value)


def _context(thing: str, value: Any) -> str:
    texts = isinstance(value, Mapping) and all(isinstance(part, str) for item in value.items() for part in item)
    _require(texts, thing, "map text to text", value)
    return _storable(thing, json.dumps(dict(value), sort_keys=True, ensure_ascii=False))
