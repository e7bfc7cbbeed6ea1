"""Values as exports of many systems write them: ids, times, JSON inside of text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from causalrm_ray.data.rows import RowError
from causalrm_ray.errors import brief

_JSON = ("{", "[", '"', " ", "\n")  # how the JSON text of an object, a list or a string begins
UNITS = ((1e17, 1e9, "nanoseconds"), (1e14, 1e6, "microseconds"), (1e11, 1e3, "milliseconds"))  # 1e11 s is the year 5138


def seconds(time: Any, column: str = "time") -> float | None:
    """Seconds since the epoch of an ISO text, a timestamp, a number in seconds to nanoseconds (which its size shows), or
    MongoDB's {"$date": ...}; UTC where no zone is given; None for none. Raises RowError for anything else."""
    if time is None or time == "":
        return None
    found = time
    while isinstance(found, Mapping) and len(found) == 1:
        found = found.get("$date", found.get("$numberLong"))
    if isinstance(found, str):
        found = _from_text(found)
    if isinstance(found, datetime):
        found = (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise RowError(f"{column} must be a time: ISO text, or seconds or milliseconds since 1970, got {brief(time)}")
    return next((found / per_second for least, per_second, _ in UNITS if abs(found) >= least), float(found))


def _from_text(text: str) -> float | datetime | None:
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text.removesuffix(" UTC"))
    except ValueError:
        return None


def seconds_of_uuid(name: str | None) -> float | None:
    """The time in a UUID of version 7, whose first 48 bits are milliseconds; None for other ids."""
    try:
        found = UUID(name)
    except (ValueError, TypeError, AttributeError):
        return None
    return (found.int >> 80) / 1e3 if found.version == 7 else None


def name(fields: Mapping[str, Any], *columns: str) -> str | None:
    """The first of `columns` that is given and not empty, as text: of a text, a whole number, a UUID or MongoDB's {"$oid": ...}.

    None if none is. Raises RowError for other values.
    """
    for column in columns:
        value = fields.get(column)
        if isinstance(value, Mapping) and "$oid" in value:
            value = value["$oid"]
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # a column of whole numbers with gaps
        if value is None or value == "":
            continue
        if isinstance(value, bool) or not isinstance(value, str | int | UUID):
            raise RowError(f"{column} must be a text or whole number, got {brief(value)}")
        return str(value)
    return None


def must(found: str | None, column: str) -> str:
    """`found`, unless it is missing: then raises RowError."""
    if found is None:
        raise RowError(f"{column} must be given, got none")
    return found


def parsed(value: Any) -> Any:
    """What a JSON text of an object, a list or a string holds; anything else as it is."""
    if isinstance(value, str) and value[:1] in _JSON:
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def dig(value: Any, *path: str) -> Any:
    """value[path[0]][path[1]]..., None where there is none; JSON text on the way is read."""
    for key in path:
        value = parsed(value)
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping, or that of a JSON text or of a list of pairs, as Parquet gives maps; anything else is an empty one."""
    if type(value) is dict:
        return value
    value = parsed(value)
    if isinstance(value, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        value = dict(value)
    return value if isinstance(value, Mapping) else {}
