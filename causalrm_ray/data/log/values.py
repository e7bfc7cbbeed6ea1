"""Values of a row as the log holds them: labels and numbers that came as text, times in other units; conversions are counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from causalrm_ray.data.formats.base import LABEL_WORDS
from causalrm_ray.data.formats.parts.values import UNITS
from causalrm_ray.data.rows import RowError
from causalrm_ray.errors import brief

_LAST_DATE_S = 250_000_000_000  # that Python can write: year 9892
_LEAST_UNIT = min(least for least, *_ in UNITS)  # below it a time is in seconds
_AHEAD_S = 86_400.0  # clocks are wrong, and texts without a zone are up to 14 hours off


class ScaleError(RowError):
    """A label of another scale than 0 and 1: `value` is one of it. It refuses the whole source."""

    def __init__(self, value: Any) -> None:
        super().__init__(f"label must be 0 or 1, got {brief(value)}")
        self.value = value


class Values:
    """Converts the values of one import. `now` is its time, in seconds since the epoch."""

    def __init__(self, now: float) -> None:
        self._latest = now + _AHEAD_S
        self._converted: Counter[str] = Counter()
        self._future = 0

    def label(self, value: Any) -> int | None:
        """0 or 1 of a number, a Boolean, or one of their words. Raises ScaleError for another scale, RowError for no label."""
        if value is None or (isinstance(value, bool | int | float) and value in (0, 1)):
            return None if value is None else int(value)
        if isinstance(value, str) and value.strip():
            word = LABEL_WORDS.get(value.strip().casefold())
            if word is None:
                raise ScaleError(value)
            self._converted["labels were text, such as true or 1, and are read as 1 and 0"] += 1
            return word
        if isinstance(value, int | float) and math.isfinite(value):
            raise ScaleError(value)
        raise RowError(f"label must be 0 or 1, got {brief(value)}")

    def time(self, value: Any) -> Any:
        """Seconds since the epoch; what is no number as it is. Raises RowError for the future."""
        if type(value) is float and value < _LEAST_UNIT and value <= self._latest:
            return value
        number = self.number(value)
        if not isinstance(number, int | float) or isinstance(number, bool):
            return number
        for least, per_second, name in UNITS:
            if least <= number < math.inf:
                self._converted[f"times were {name}, by their size, and are read so"] += 1
                number = number / per_second
                break
        if self._latest < number < math.inf:
            self._future += 1
            shown = (
                f"{datetime.fromtimestamp(number, UTC):%Y-%m-%d %H:%M} UTC" if number < _LAST_DATE_S else f"{number:g} seconds"
            )
            raise RowError(f"time must not be in the future, got {shown}")
        return number

    def number(self, value: Any) -> Any:
        """The number in a text; anything else as it is."""
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
        return value

    def whole(self, value: Any) -> Any:
        """The whole number in a text; anything else as it is."""
        if type(value) is int:
            return value
        number = self.number(value)
        return int(number) if isinstance(number, float) and number.is_integer() else number

    def flag(self, value: Any) -> Any:
        """True or false of one of their words; anything else as it is."""
        return (
            bool(LABEL_WORDS[value.strip().casefold()])
            if isinstance(value, str) and value.strip().casefold() in LABEL_WORDS
            else value
        )

    def notes(self) -> Iterator[str]:
        """What was converted, and how often."""
        for what, count in sorted(self._converted.items()):
            yield f"{count} {what}"
        if self._future:
            yield f"{self._future} times are in the future: their rows are quarantined"
