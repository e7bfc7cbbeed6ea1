"""Conversations that are too long for a model: refused, or without their oldest turns, and counted.

Conversation --encode--> ids that fit, or --oldest turns dropped, encoded again--> ids that fit, or TooLongError
"""

from __future__ import annotations

import statistics
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from causalrm_ray.conversation import Conversation
from causalrm_ray.types import Truncation

Encoded = TypeVar("Encoded", bound=Sequence[Any])
LABELS = {1: "liked", 0: "disliked", None: "without feedback"}


class TooLongError(ValueError):
    """A conversation that does not fit; the text goes on after "... must have at most N tokens"."""


@dataclass(frozen=True, slots=True)
class Truncated(Generic[Encoded]):
    """What a model reads of a conversation: `prompt`, encoded as `ids`, without the `turns` oldest ones, of `tokens` tokens."""

    prompt: Conversation
    ids: Encoded
    turns: int = 0
    tokens: int = 0


def truncate(
    prompt: Conversation, encode: Callable[[Conversation], Encoded], longest: int, truncation: Truncation
) -> Truncated[Encoded]:
    """The ids of a conversation, at most `longest`; with "oldest" as few of its oldest turns are dropped as that needs.

    What `Conversation.latest` keeps is never dropped, nor cut. The number of turns is found by bisection: a few encodings.
    Raises TooLongError for what does not fit.
    """
    ids = encode(prompt)
    if len(ids) <= longest:
        return Truncated(prompt, ids)
    whole, turns = len(ids), prompt.num_turns
    if turns == 1:
        raise TooLongError(f", got {whole}")
    fits, too_few = turns - 1, 0  # numbers of turns to drop
    kept = prompt.latest(1)
    if len(found := encode(kept)) > longest:
        if truncation == "refuse":
            raise TooLongError(f", got {whole}")
        raise TooLongError(f" even without earlier turns, got {len(found)} without {fits} of them and {whole} with them")
    if truncation == "refuse":
        raise TooLongError(f" (model.truncation=oldest would drop earlier turns until it does), got {whole}")
    while fits - too_few > 1:
        middle = (fits + too_few) // 2
        shorter = prompt.latest(turns - middle)
        if len(ids := encode(shorter)) <= longest:
            fits, kept, found = middle, shorter, ids
        else:
            too_few = middle
    return Truncated(kept, found, fits, whole - len(found))


class Cuts:
    """Counts what lost turns, by label, and by how much."""

    def __init__(self) -> None:
        self._labels: Counter[str] = Counter()
        self._turns, self._tokens = array("q"), array("q")

    def add(self, found: Truncated[Any], label: int | None = None) -> None:
        """Count a row if it lost turns; `label` is None where no feedback was given."""
        if found.turns:
            self.count(found.turns, found.tokens, label)

    def count(self, turns: int, tokens: int, label: int | None) -> None:
        """Count a row that lost `turns` >= 1 turns of `tokens` tokens."""
        self._labels[LABELS[label]] += 1
        self._turns.append(turns)
        self._tokens.append(tokens)

    def __len__(self) -> int:
        return len(self._turns)

    def figures(self) -> dict[str, int | float]:
        """How many by label, and median and largest number of turns and tokens that they lost; empty if none did."""
        if not self:
            return {}
        lost = {"turns": self._turns, "tokens": self._tokens}
        sizes = {"median": statistics.median, "largest": max}
        by_size = {f"{which}_{name}": of(values) for name, values in lost.items() for which, of in sizes.items()}
        return {label: self._labels[label] for label in LABELS.values()} | by_size

    def warnings(self, rows: int, limit: str, what: str = "impressions") -> list[str]:
        """A sentence, if any of `rows` lost turns; `limit` is what they were longer than."""
        if not self:
            return []
        found = self.figures()
        by_label = "" if what == "prompts" else f": {', '.join(f'{found[label]} {label}' for label in LABELS.values())}"
        turns, tokens = (
            f"{found[f'median_{name}']:g} {name} (at most {found[f'largest_{name}']})" for name in ("turns", "tokens")
        )
        return [
            f"{len(self)} of {rows} {what} are longer than {limit}, and are read without their oldest turns "
            f"(model.truncation=oldest){by_label}; they lost a median of {turns} and {tokens}."
        ]
