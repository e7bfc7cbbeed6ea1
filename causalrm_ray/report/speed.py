"""Figures of speed: medians of ratios of seconds, each with its range and its target; and their picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from causalrm_ray.report.pictures import BLUE, GREY, ORANGE

SYNC_FACTOR, SYNC_SLACK_S = 1.3, 0.5  # a weight sync may take this multiple of a plain copy, and these seconds in addition


class Pair(NamedTuple):
    """Seconds of the same work, done by us and by the other, one right after the other."""

    ours_s: float
    other_s: float


@dataclass(frozen=True)
class Figure:
    """The median over repeated measurements, between the least and the largest; `target` is a bound from below or above."""

    name: str
    case: str
    value: float
    low: float
    high: float
    count: int
    target: float
    at_least: bool
    details: dict[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether the median keeps to the target."""
        return self.value >= self.target if self.at_least else self.value <= self.target


def figure(name: str, case: str, values: Sequence[float], target: float, at_least: bool, **details: float) -> Figure:
    """The figure of one or more measurements."""
    if not values:
        raise ValueError(f"{name} must have at least one measurement, got none")
    return Figure(name, case, statistics.median(values), min(values), max(values), len(values), target, at_least, details)


def speed(name: str, case: str, pairs: Sequence[Pair], target: float, **details: float) -> Figure:
    """How fast we are, as a multiple of the other's speed: the median over pairs of other's seconds / ours."""
    ours_s, other_s = map(statistics.median, zip(*pairs, strict=True))
    ratios = [pair.other_s / pair.ours_s for pair in pairs]
    return figure(name, case, ratios, target, True, ours_s=ours_s, other_s=other_s, **details)


def sync_figure(case: str, pairs: Sequence[Pair], num_bytes: float) -> Figure:
    """Seconds of a weight sync as a share of what it may take, 1.3 x a plain copy of its bytes (the pair's other) + 0.5 s."""
    values = [pair.ours_s / (SYNC_FACTOR * pair.other_s + SYNC_SLACK_S) for pair in pairs]
    ours_s, copy_s = map(statistics.median, zip(*pairs, strict=True))
    rates = {"gb_per_s": num_bytes / ours_s / 1e9, "copy_gb_per_s": num_bytes / copy_s / 1e9, "copies": ours_s / copy_s}
    return figure("sync", case, values, 1.0, False, ours_s=ours_s, other_s=copy_s, mbytes=num_bytes / 1e6, **rates)


def uncovered(spans: Iterable[tuple[float, float]], begin: float, end: float) -> float:
    """Share of [begin, end] that lies in none of the spans (begin, end), in [0, 1]; spans may overlap and reach beyond it."""
    if not end > begin:
        raise ValueError(f"end must be after begin = {begin}, got {end}")
    covered, reached = 0.0, begin
    for first, last in sorted(spans):
        first, last = max(first, reached), min(last, end)
        if last > first:
            covered += last - first
            reached = last
    return 1.0 - covered / (end - begin)


def draw_figures(figures: Sequence[Figure], path: Path) -> None:
    """Every figure and its range over the target, inverted for an upper bound, so that 1 and more meets it."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import FuncFormatter, LogLocator

    canvas = Canvas(figsize=(8, 0.9 + 0.3 * len(figures)), layout="constrained")
    axes = canvas.subplots()
    for place, found in enumerate(figures):
        shares = [_share(found, value) for value in (found.value, found.low, found.high)]
        middle, low, high = shares[0], min(shares), max(shares)
        spread = [[middle - low], [high - middle]]
        axes.errorbar(middle, place, xerr=spread, fmt="o", markersize=5, capsize=3, color=BLUE if found.met else ORANGE)
        axes.annotate(f"{found.value:.3g}", (high, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(1.0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(figures)), [f"{found.name}  {found.case}" for found in figures], fontsize=8)
    axes.set(xscale="log", xlabel="share of the target that is reached: 1 and more meets it")
    axes.margins(x=0.15)
    axes.set_ylim(len(figures) - 0.5, -0.5)  # the first on top
    left, right = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if right > 5 * left else range(1, 10)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    canvas.savefig(path, dpi=110)


def _share(found: Figure, value: float) -> float:
    """A value against the target, larger is better, in [0.01, 100]: a share of 0 or less would leave the picture."""
    share = value / found.target if found.at_least else found.target / max(value, found.target / 100)
    return min(max(share, 0.01), 100.0)
