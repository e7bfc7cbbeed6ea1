"""Attributes of spans: flat names with dots, OTLP's lists of typed values, and columns of a table, as one nested mapping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from causalrm_ray.data.formats.parts.values import mapping, parsed

_TYPES = ("stringValue", "boolValue", "doubleValue", "bytesValue", "string_value", "bool_value", "double_value")


def attributes(given: Any) -> dict[str, Any]:
    """Attributes by name, not nested yet: of a mapping, its JSON text, pairs, or OTLP's list of {key, value}."""
    given = parsed(given)
    if isinstance(given, list) and all(isinstance(part, Mapping) and "key" in part for part in given):
        return {str(part["key"]): _value(part.get("value")) for part in given}
    return dict(mapping(given))


def _value(value: Any) -> Any:
    """What an OTLP AnyValue holds."""
    if not isinstance(value, Mapping):
        return value
    for key in _TYPES:
        if key in value:
            return value[key]
    for key in ("intValue", "int_value"):
        if key in value:
            return int(value[key])
    for key in ("arrayValue", "array_value"):
        if key in value:
            return [_value(part) for part in value[key].get("values", [])]
    for key in ("kvlistValue", "kvlist_value"):
        if key in value:
            return attributes(value[key].get("values", []))
    return value


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1, "c.0.d": 2} as {"a": {"b": 1}, "c": [{"d": 2}]}; what is nested already stays so."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        if isinstance(value, Mapping):
            value = nested(value)
        place, parts = tree, name.split(".")
        for part in parts[:-1]:
            below = place.setdefault(part, {})
            if not isinstance(below, dict):  # "a" and "a.b" both have a value
                below = place[part] = {"": below}
            place = below
        last = place.get(parts[-1])
        place[parts[-1]] = {**last, **value} if isinstance(last, dict) and isinstance(value, dict) else value
    return {name: _listed(value) for name, value in tree.items()}


def _listed(value: Any) -> Any:
    if isinstance(value, list):
        return [_listed(nested(part)) if isinstance(part, Mapping) else part for part in value]
    if not isinstance(value, dict):
        return value
    found = {name: _listed(part) for name, part in value.items()}
    if found and all(name.isdigit() for name in found):
        return [found[name] for name in sorted(found, key=int)]
    return found


def unread(flat: Mapping[str, Any], read: tuple[str, ...]) -> Iterator[str]:
    """Names of attributes that begin with none of `read`; numbers in them are left out."""
    for name, value in flat.items():
        if value not in (None, "", [], {}) and not name.startswith(read):
            yield "attributes." + ".".join(part for part in name.split(".") if not part.isdigit())
