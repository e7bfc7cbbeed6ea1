"""What a method says of who gives feedback, from the figures of its fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SCALARS = {"signal": "signal", "shift": "shift_used", "shift_found": "shift_found", "gain": "gain", "strain": "strain"}


@dataclass(frozen=True)
class Mechanisms:
    """Who gives feedback, by a method: `weights` of the mechanisms, their held-out negative log-likelihood in nats a row.

    `adds` are the standard errors by which each one's account of what feedback says adds to the others' (empty: the method does
    not ask); `signal` the standard errors by which P(o | x) beats a constant; `gain` and `strain` the nats for features in
    held-out outcomes and in the prior of the noise rates; `shift` the log-odds by which the pleased are taken to give feedback
    more readily besides, of the `shift_found` in the log.
    """

    weights: Mapping[str, float]
    heldout: Mapping[str, float]
    adds: Mapping[str, float] = field(default_factory=dict)  # an earlier version did not save these
    signal: float | None = None
    shift: float | None = None
    shift_found: float | None = None
    gain: float | None = None
    strain: float | None = None


def mechanisms(figures: Mapping[str, float]) -> Mechanisms | None:
    """Those of a method's `figures` ("weight_NAME", "heldout_NAME", "adds_NAME", and SCALARS); None if it has no weights."""
    weights, heldout, adds = (
        {name.removeprefix(kind): value for name, value in figures.items() if name.startswith(kind)}
        for kind in ("weight_", "heldout_", "adds_")
    )
    if not weights:
        return None
    return Mechanisms(weights, heldout, adds, **{name: figures.get(figure) for name, figure in SCALARS.items()})
