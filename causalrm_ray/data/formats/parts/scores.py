"""What a score means: a thumb, a Boolean, a number on some scale, a category.

score --scored--> LoggedEvent: a word or Boolean has its label; a number waits in Scores until the whole scale was seen:
                  of 0 and 1, or -1 and 1, it is a vote; on another scale it has no label, and only feedback.signals gives one
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from causalrm_ray.data.formats.base import LoggedEvent, LoggedImpression, content_of
from causalrm_ray.data.formats.parts.shelf import Shelf, unpacked_event, unpacked_impression

_LIKED = """true yes up thumb_up thumbs_up thumbsup thumbup upvote upvoted like liked love loved positive good helpful correct
    accepted accept 👍 :thumbsup: :+1:"""
_DISLIKED = """false no down thumb_down thumbs_down thumbsdown thumbdown downvote downvoted dislike disliked hate hated negative
    bad unhelpful not_helpful incorrect rejected reject 👎 :thumbsdown: :-1:"""
VOTES: dict[str, int] = {**dict.fromkeys(_LIKED.split(), 1), **dict.fromkeys(_DISLIKED.split(), 0)}
_SCALES = ({0.0: 0, 1.0: 1}, {-1.0: 0, 1.0: 1})
_KEPT_VALUES = 3  # distinct ones of a score: more are no votes


def vote(value: Any) -> int | None:
    """The label that a Boolean or a word has by itself: true, "thumbsUp", "👎"; None of numbers and other words."""
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, str):
        return None
    word = value.strip()
    snake = re.sub(r"[\s\-]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", word)).lower()
    return VOTES.get(word.lower(), VOTES.get(snake))


def scored(score: str, value: Any, **rest: Any) -> LoggedEvent | None:
    """The event that a score is: `rest` are its other fields. None for a dislike that is false.

    A score whose name is a dislike (thumbs_down) turns the meaning of true and 1 around; a word that is no vote is a category,
    "score:word".
    """
    number = _number(value)
    label = vote(value) if number is None else None
    if vote(score) == 0 and (label is not None or number in (0, 1)):
        return LoggedEvent(score=score, label=0.0, value=1.0, **rest) if label == 1 or number == 1 else None
    if number is not None:
        return LoggedEvent(score=score, value=number, **rest)
    if label is not None:
        return LoggedEvent(score=score, label=float(label), value=float(label), **rest)
    return LoggedEvent(score=f"{score}:{str(value).strip()}", value=1.0, **rest)


def _number(value: Any) -> float | None:
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d+(\.\d*)?\s*", value):
        value = float(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


class Scores:
    """Events whose number waits for its scale, on a shelf, alone or with the impression that they are about."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._values: dict[str, set[float]] = {}

    def add(self, event: LoggedEvent) -> None:
        """Let an event of its own row wait."""
        self.see(event)
        self._shelf.put("event", "", content_of(event))

    def rate(self, impression: LoggedImpression, events: Sequence[LoggedEvent]) -> Iterator[LoggedImpression]:
        """`impression` with its events at once, or, where one of them is a score without a label, at the end."""
        impression = dataclasses.replace(impression, events=events)
        for event in events:
            self.see(event)
        if all(event.score is None or event.label is not None for event in events):
            yield impression
            return
        self._shelf.put("rated", "", content_of(impression))

    def see(self, event: LoggedEvent) -> None:
        """Remember the value of an event that waits elsewhere, or of a vote in words: they show what a 0 is."""
        if event.score is not None and event.value is not None:
            values = self._values.setdefault(event.score, set())
            if len(values) < _KEPT_VALUES:
                values.add(event.value)

    def finish(self) -> Iterator[LoggedImpression | LoggedEvent]:
        """All that waited, with labels where the scale of the score is one of votes."""
        for fields in self._shelf.scan("rated"):
            impression = unpacked_impression(fields)
            yield dataclasses.replace(impression, events=[self.labelled(event) for event in impression.events])
        for fields in self._shelf.scan("event"):
            yield self.labelled(unpacked_event(fields))

    def labelled(self, event: LoggedEvent) -> LoggedEvent:
        """An event, with its label if all values of its score together are votes: 0 and 1, or -1 and 1. A score that is always
        0 is none."""
        if event.label is not None or event.score is None or event.value is None or ":" in event.score:
            return event
        values = self._values.get(event.score, set()) | {event.value}
        scale = next((scale for scale in _SCALES if values <= scale.keys() and values != {0.0}), None)
        return event if scale is None else dataclasses.replace(event, label=float(scale[event.value]))
