"""Ratings that stand in the row, or in the message, that they are about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from causalrm_ray.data.formats.base import LoggedEvent
from causalrm_ray.data.formats.parts.scores import scored, vote
from causalrm_ray.data.formats.parts.values import parsed

RATINGS = ("rating", "feedback", "user_feedback", "thumb", "thumbs", "thumbs_up", "thumbs_down", "vote", "annotation")
# In logs of one's own, where no format says what they mean:
GRADES = ("rating", "stars", "score", "thumb", "thumbs", "thumbs_up", "thumbs_down", "vote", "reaction", "grade", "dwell")
OURS = ("signal", "label", "value", "event_id")  # columns of a source go there by feedback.columns
_INNER = ("rating", "score", "thumb", "thumbs", "vote", "type", "value", "label")  # of a rating that is an object


def ratings(
    fields: Mapping[str, Any], ignored: Counter[str], time: float | None = None, where: str = ""
) -> Iterator[LoggedEvent]:
    """The events of `fields` under RATINGS and OURS. Comments and what else a rating holds are counted in `ignored`."""
    for column in RATINGS:
        value, rest = parsed(fields.get(column)), {}
        if isinstance(value, Mapping):
            key = next((key for key in _INNER if value.get(key) not in (None, "")), None)
            rest = {name: part for name, part in value.items() if name != key and part not in (None, "", [], {})}
            value = value[key] if key else None
        ignored.update(f"{where}{column}.{name}" for name in rest)
        if value not in (None, "") and (event := scored(column, value, time=time)) is not None:
            yield event
    label, signal = fields.get("label"), fields.get("signal")
    if label is not None or signal is not None:
        word = vote(label)
        number = float(label) if isinstance(label, str) and label.strip() in ("0", "1") else label
        yield LoggedEvent(
            signal=signal,
            label=number if word is None else float(word),
            value=fields.get("value"),
            id=fields.get("event_id"),
            time=time,
        )
