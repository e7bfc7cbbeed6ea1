"""Pictures of a benchmark's table, as PNG.

A table is a sequence of lines, one per setting and method: "alpha", "scenario" (a number, or words that tell other rates),
"selection", "method", the true "rho_01" and "rho_10", and of each figure the mean over seeds and "<figure>_sd", either of which
may be None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from causalrm_ray.estimators.methods.reweighting import ABLATIONS
from causalrm_ray.report.pictures import BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = Mapping[str, Any]
FLOOR = -1.0  # bars and lines of R2 are cut here: below, a model is useless, and one would dwarf all others
SELECTIONS = {"label": "selection by the label", "features": "selection by features"}
MARKS = "osD^v<>pPX*hd"
COLOURS = 10  # more curves than these, and only what stands out has a colour: ours and both ends
ENDS = ("naive", "oracle")
PALE = "#cbd5e0"
PART = ": "  # between a method and what is left of it
PARTS = ("only reweighting", "only surrogate")  # in the order of ABLATIONS


def draw_bars(table: Sequence[Line], path: Path) -> None:
    """R2 and AUROC of every method, a row of panels per setting, with standard deviations over seeds. One alpha a picture."""
    from matplotlib.figure import Figure

    settings = _settings(table)
    methods = list(dict.fromkeys(line["method"] for line in table))
    height = 0.9 + len(settings) * (0.8 + 0.27 * len(methods))
    figure = Figure(figsize=(11, height), layout="constrained")
    grid = figure.subplots(len(settings), 2, squeeze=False, sharex="col")
    for row, (scenario, selection) in enumerate(settings):
        lines = [line for line in table if (line["scenario"], line["selection"]) == (scenario, selection)]
        _draw_bars(grid[row, 0], lines, "r2", "R² against true preference", 0.0)
        _draw_bars(grid[row, 1], lines, "auroc", "AUROC", 0.5)
        grid[row, 0].set_title(
            f"{_slips(lines[0])}, {SELECTIONS[selection]}, alpha {lines[0]['alpha']:g}", loc="left", fontsize=10
        )
        grid[row, 1].set_yticklabels([])
    figure.savefig(path, dpi=110)


def ablation_lines(table: Sequence[Line]) -> list[Line]:
    """The lines of an ablation, each method followed by its parts, which are named so; of methods whose parts are all there."""
    known = {line["method"] for line in table}
    names = {}
    for method, parts in ABLATIONS.items():
        if known >= {method, *parts}:
            names |= {method: method} | {other: f"{method}{PART}{part}" for part, other in zip(PARTS, parts, strict=True)}
    order = list(names)
    chosen = [line for line in table if line["method"] in names]
    return [{**line, "method": names[line["method"]]} for line in sorted(chosen, key=lambda line: order.index(line["method"]))]


def draw_sensitivity(table: Sequence[Line], path: Path) -> None:
    """R2 of every method over alpha, a panel per scenario and selection, with standard deviations over seeds."""
    panels: dict[str, list[tuple[float, Line]]] = {}
    for line in table:
        title = f"{_slips(line)}, {SELECTIONS[line['selection']]}"
        panels.setdefault(title, []).append((line["alpha"], line))
    ticks = {alpha: f"{alpha:g}" for alpha in sorted({line["alpha"] for line in table})}
    _draw_lines(panels, ticks, "alpha (smaller selects more strongly)", path, xscale="log")


def draw_rho_sensitivity(table: Sequence[Line], path: Path) -> None:
    """R2 of every method over the rates of slips, the fewest first, a panel per alpha and selection, as `draw_sensitivity`."""
    pairs = {(line["rho_01"], line["rho_10"]) for line in table}
    place = {pair: number for number, pair in enumerate(sorted(pairs, key=lambda pair: (sum(pair), pair)))}
    panels: dict[str, list[tuple[float, Line]]] = {}
    for line in table:
        title = f"alpha {line['alpha']:g}, {SELECTIONS[line['selection']]}"
        panels.setdefault(title, []).append((place[line["rho_01"], line["rho_10"]], line))
    ticks = {float(number): f"{rho_01:g}\n{rho_10:g}" for (rho_01, rho_10), number in place.items()}
    _draw_lines(panels, ticks, "true rho_01 (above) and rho_10 (below)", path, xscale="linear")


def _draw_lines(
    panels: Mapping[str, Sequence[tuple[float, Line]]], ticks: Mapping[float, str], xlabel: str, path: Path, *, xscale: str
) -> None:
    """A panel for each title, with R2 of its (place on the x-axis, line)s: a curve per method, in the same colours throughout."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(line["method"] for points in panels.values() for _, line in points))
    coloured = methods if len(methods) <= COLOURS else [name for name in methods if _is_ours(name) or name in ENDS]
    colours = {name: colormaps["tab10"](coloured.index(name) % COLOURS) if name in coloured else PALE for name in methods}
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    height = max(3.4 * rows, 0.6 + 0.19 * len(methods))
    figure = Figure(figsize=(5.2 * columns + 1.8, height), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for panel in grid[len(panels) :]:
        panel.set_visible(False)
    handles = {}
    for panel, (title, points) in zip(grid, panels.items(), strict=False):
        for number, method in enumerate(methods):
            places = sorted((x, *_cut(line)) for x, line in points if line["method"] == method)
            if places:
                x, y, spread = zip(*places, strict=True)
                look = {"color": colours[method], "marker": MARKS[number % len(MARKS)], "zorder": 3 if method in coloured else 2}
                handles[method] = panel.errorbar(x, y, spread, markersize=4, linewidth=1, capsize=3, **look)
        panel.axhline(0, color=GREY, linewidth=1)
        panel.set(title=title, xscale=xscale, xlabel=xlabel, ylabel=f"R² (cut at {FLOOR:g})")
        panel.title.set_fontsize(10)
        panel.set_xticks(list(ticks), list(ticks.values()))
        panel.minorticks_off()
        panel.label_outer()
    shown = [method for method in methods if method in handles]
    figure.legend([handles[method] for method in shown], shown, loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _cut(line: Line) -> tuple[float, float]:
    """R2 and its deviation, cut at the floor; not a number where it could not be measured, which leaves a gap."""
    if line["r2"] is None:
        return math.nan, 0.0
    return max(line["r2"], FLOOR), line["r2_sd"] if line["r2_sd"] and line["r2"] >= FLOOR else 0.0


def _is_ours(method: str) -> bool:
    """Whether it is CausalRM or the default; the parts of an ablation are not."""
    return method == "auto" or (method.startswith("causalrm") and PART not in method)


def _slips(line: Line) -> str:
    return f"scenario {line['scenario']}" if isinstance(line["scenario"], int) else str(line["scenario"])


def _draw_bars(panel: Axes, lines: Sequence[Line], name: str, title: str, chance: float) -> None:
    """Bars from `chance`, the value of knowing nothing; each with its number, as some are cut."""
    for place, line in enumerate(lines):
        value = line[name]
        if value is None:
            panel.text(chance, place, " failed", va="center", fontsize=8, color=GREY)
            continue
        shown = max(value, FLOOR)
        spread = line[f"{name}_sd"] or 0.0
        colour = GREY if line["method"] == "oracle" else ORANGE if _is_ours(line["method"]) else BLUE
        panel.barh(place, shown - chance, left=chance, color=colour, height=0.7)
        if spread and shown == value:
            panel.errorbar(shown, place, xerr=spread, color="black", capsize=2, linewidth=1)
        # The number stands on the free side of the bar's start, beyond the whisker if that reaches over it.
        over = max(0.0, spread - abs(shown - chance))
        panel.annotate(
            f"{value:.3f}",
            (chance - over if value >= chance else chance + over, place),
            xytext=(-3 if value >= chance else 3, 0),
            textcoords="offset points",
            ha="right" if value >= chance else "left",
            va="center",
            fontsize=7,
        )
    panel.axvline(chance, color=GREY, linewidth=1)
    panel.set_yticks(range(len(lines)), [line["method"] for line in lines], fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.set_xlabel(title)


def _settings(table: Sequence[Line]) -> list[tuple[int | str, str]]:
    return list(dict.fromkeys((line["scenario"], line["selection"]) for line in table))
