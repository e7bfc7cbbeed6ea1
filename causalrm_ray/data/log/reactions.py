"""What an event of a format is logged as: the signal that its name, its score or its label stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from causalrm_ray.data.formats.base import LoggedEvent
from causalrm_ray.data.log.values import Values
from causalrm_ray.data.rows import RowError, SourceError
from causalrm_ray.errors import brief
from causalrm_ray.types import LABEL_SIGNALS, Meaning

_BARE_LABELS = {label: signal for signal, label in LABEL_SIGNALS.items()}


class Reactions:
    """Signals of events. `ignored` counts the feedback of signals that are left out, `votes` that of scores that only their
    label gives a meaning."""

    def __init__(self, signals: Mapping[str, Meaning], left_out: Collection[str], values: Values) -> None:
        self._signals, self._left_out, self._values = signals, left_out, values
        self.ignored: Counter[str] = Counter()
        self.votes: Counter[str] = Counter()

    def signal(self, logged: LoggedEvent) -> str | None:
        """The signal that feedback is logged as; None for feedback that is left out. Raises RowError, SourceError."""
        name = str(logged.signal if logged.score is None else logged.score)
        if name in self._left_out or name.partition(":")[0] in self._left_out:
            signal = None
        elif logged.score is None:
            return self._named(logged.signal, self._values.label(logged.label))
        else:
            signal = self._score(logged, str(logged.score))
        if signal is None:
            self.ignored[f"signal {name}"] += 1
        return signal

    def notes(self) -> Iterator[str]:
        """Says where labels come from, if it is from several scores: some may be no user's opinion."""
        if len(self.votes) > 1:
            names = " and ".join(f"{name} ({count})" for name, count in self.votes.most_common(10))
            yield (
                f"likes and dislikes come from the scores {names}, the newest of an answer decides: leave out those that are no"
                " user's opinion by feedback.signals.NAME=null"
            )

    def _named(self, signal: Any, label: int | None) -> str:
        if signal is not None and (not isinstance(signal, str) or signal not in self._signals):
            option = f"; feedback.signals.{signal} gives it a meaning" if brief(signal) == repr(signal) else ""
            raise RowError(f"signal must be one of {sorted(self._signals)}, got {brief(signal)}{option}")
        if label is None:
            if signal is None:
                raise RowError("an event must have a signal or a label, got neither")
            return signal
        if signal is None:
            return _BARE_LABELS[label]
        if not isinstance(self._signals[signal], int):
            raise RowError(f"label must not be given with the signal {signal!r}, whose value says what it means, got {label!r}")
        if self._signals[signal] != label:
            raise RowError(f"label must be that of the signal {signal!r}, {self._signals[signal]}, got {label!r}")
        return signal

    def _score(self, logged: LoggedEvent, score: str) -> str | None:
        """The signal that a score is logged as: its own, or that of a bare label; None for a score that says that a signal is not
        there: a copy that is false. Raises SourceError where nothing says what it means."""
        meaning = self._signals.get(score)
        if isinstance(meaning, int):
            return None if logged.label == 0 else score
        if meaning is not None:
            return score
        if logged.label is not None:
            self.votes[score] += 1
            return self._named(None, self._values.label(logged.label))
        option = f"feedback.signals.{score}"
        if ":" in score:
            rule = f"{option}=1 reads it as liked, =0 as disliked"
        else:
            rule = f"{option}='{{low: LOW, high: HIGH}}' reads values up to LOW as disliked and from HIGH on as liked"
        raise SourceError(
            f"the score {score!r}, with values such as {brief(logged.value)}, must be given a meaning: {rule}, =null leaves it"
            " out"
        )


def scale_error(where: str, column: str, values: Sequence[Any], rows: int, first: int) -> SourceError:
    """Labels of another scale than 0 and 1: says which options read them. `values` are all distinct labels."""
    texts = [value for value in values if isinstance(value, str)]
    shown = ", ".join(brief(value) for value in values)
    found = f"{where}: {column} must be 0 or 1, got {shown} in {rows} rows, first in row {first}"
    if texts:
        word = next((value for value in texts if brief(value) == repr(value)), "WORD")
        return SourceError(
            f"{found}; words are signals: feedback.columns.signal={column}, and each has a meaning, such as"
            f" feedback.signals.{word}=1 if it is liked, =0 if disliked"
        )
    low, high = (float(min(values)), float(max(values))) if len(values) > 1 else (0.0, float(values[0]))
    low, high = min(low, high), max(low, high)
    below, above = low + (high - low) / 4, high - (high - low) / 4
    return SourceError(
        f"{found}; a scale is a signal with thresholds: feedback.columns.grade={column}"
        f" feedback.signals.grade='{{low: {below:g}, high: {above:g}}}' reads values up to {below:g} as disliked and from"
        f" {above:g} on as liked"
    )
