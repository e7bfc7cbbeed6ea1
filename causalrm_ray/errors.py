"""Errors that a user can fix: each names the thing, the rule and the value. Loads nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_NAME = re.compile(r"[\w.:+/-]{0,40}")  # a signal, an id, a number, a time: nothing that a person wrote


class InputError(ValueError):
    """What the user gave cannot be used (a log, a prompt file, a run folder): names the thing, the rule and the value."""


class ConfigError(ValueError):
    """A configuration that cannot run: names the key, the rule and the value."""


def brief(value: Any) -> str:
    """A value as an error may show it: numbers and short names as they are, of anything else its kind and size.

    Errors go to consoles and log files, where texts of users must not be.
    """
    return repr(value) if isinstance(value, str) and _NAME.fullmatch(value) else kind_of(value)


def kind_of(value: Any) -> str:
    """The same of a value that may be a person's words, even one of them: of a text never more than its length."""
    if value is None or isinstance(value, bool | int | float):
        return f"{value!r:.40}"
    if isinstance(value, str):
        return f"a text of {len(value)} characters"
    if isinstance(value, Mapping):
        shown = [key if isinstance(key, str) and _NAME.fullmatch(key) else "..." for key in list(value)[:5]]
        return f"an object with the keys {', '.join(shown)}{', ...' if len(value) > 5 else ''}" if value else "an empty object"
    return f"a list of {len(value)} items" if isinstance(value, list | tuple) else f"a value of type {type(value).__name__}"
