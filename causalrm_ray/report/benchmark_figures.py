"""Pictures of the tables of `benchmark` and `compare`, as PNG.

A table has a line per setting and method, with columns "alpha" (a number, or "" where it does not matter), "scenario" (a
number, or text that gives other noise rates), "selection", "method", the true "rho_01" and "rho_10", and of each figure the mean
over seeds and "<figure>_sd" (NaN: unknown).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from causalrm_ray.estimators.methods.reweighting import ABLATIONS
from causalrm_ray.report.pictures import BLUE, GREY, ORANGE
from causalrm_ray.types import Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLOOR = -1.0  # bars and lines of R2 are cut here: a worse model is useless, and its bar would dwarf all others
SELECTIONS: Mapping[Selection, str] = {
    "label": "selection by the label",
    "features": "selection by features",
    "trait": "selection by trait and label",
    "popularity": "selection by popularity",
    "mixed": "selection by popularity and label",
}
MARKS = "osD^v<>pPX*hd"
COLOURS = 10  # with more curves than these only ours, the worst and the best method have one
ENDS = ("naive", "oracle")
PALE = "#cbd5e0"
PART = ": "  # between a method and its part in an ablation
PARTS = ("only reweighting", "only surrogate")  # in the order of ABLATIONS


def draw_bars(table: pd.DataFrame, path: Path) -> None:
    """R2 and AUROC of every method, a row of panels per setting, with standard deviations over seeds. One alpha a picture."""
    from matplotlib.figure import Figure

    groups = table.groupby(["scenario", "selection"], sort=False)
    height = 0.9 + len(groups) * (0.8 + 0.27 * table["method"].nunique())
    figure = Figure(figsize=(11, height), layout="constrained")
    grid = figure.subplots(len(groups), 2, squeeze=False, sharex="col")
    for panels, ((scenario, selection), lines) in zip(grid, groups, strict=True):
        _draw_bars(panels[0], lines, "r2", "R² against true preference", 0.0)
        _draw_bars(panels[1], lines, "auroc", "AUROC", 0.5)
        title = ", ".join([_noise(scenario), *_selected(selection, lines["alpha"].iloc[0])])
        panels[0].set_title(title, loc="left", fontsize=10)
        panels[1].set_yticklabels([])
    figure.savefig(path, dpi=110)


def ablation_lines(table: pd.DataFrame) -> pd.DataFrame:
    """The lines of an ablation, each method followed by its parts, which are named so; of methods whose parts are all there."""
    known = set(table["method"])
    names = {}
    for method, parts in ABLATIONS.items():
        if known >= {method, *parts}:
            names |= {method: method} | {other: f"{method}{PART}{part}" for part, other in zip(PARTS, parts, strict=True)}
    order = list(names)
    chosen = table[table["method"].isin(order)].sort_values("method", key=lambda column: column.map(order.index), kind="stable")
    return chosen.assign(method=chosen["method"].map(names))


def draw_sensitivity(table: pd.DataFrame, path: Path) -> None:
    """R2 of every method over alpha, a number in each line, a panel per scenario and selection, with standard deviations over
    seeds."""
    titles = table["scenario"].map(_noise) + ", " + table["selection"].map(SELECTIONS)
    ticks = {alpha: f"{alpha:g}" for alpha in sorted(set(table["alpha"]))}
    _draw_lines(table.assign(title=titles, x=table["alpha"]), ticks, "alpha (smaller selects more strongly)", path, xscale="log")


def draw_rho_sensitivity(table: pd.DataFrame, path: Path) -> None:
    """R2 of every method over the noise rates, the least noise first, a panel per alpha and selection, as `draw_sensitivity`."""
    pairs = list(zip(table["rho_01"], table["rho_10"], strict=True))
    place = {pair: number for number, pair in enumerate(sorted(set(pairs), key=lambda pair: (sum(pair), pair)))}
    titles = [", ".join(_selected(*pair)) for pair in zip(table["selection"], table["alpha"], strict=True)]
    ticks = {float(number): f"{rho_01:g}\n{rho_10:g}" for (rho_01, rho_10), number in place.items()}
    points = table.assign(title=titles, x=[place[pair] for pair in pairs])
    _draw_lines(points, ticks, "true rho_01 (above) and rho_10 (below)", path, xscale="linear")


def draw_comparison(table: pd.DataFrame, path: Path) -> None:
    """Bars of "oracle_reward" by "users" and "method", with standard errors over seeds ("oracle_reward_se")."""
    from matplotlib.figure import Figure

    groups = table.groupby("users", sort=False)
    figure = Figure(figsize=(4.5 * len(groups), 3.4), layout="constrained")
    for panel, (users, rows) in zip(figure.subplots(1, len(groups), sharey=True), groups, strict=True):
        colours = [ORANGE if method == "oracle" else BLUE for method in rows["method"]]
        panel.bar(rows["method"], rows["oracle_reward"], yerr=rows["oracle_reward_se"], color=colours, capsize=4)
        panel.set(title=f"{users} users", ylabel="oracle reward, 0 to 4")
        panel.tick_params(axis="x", rotation=15)
    figure.savefig(path, dpi=110)


def _draw_lines(table: pd.DataFrame, ticks: Mapping[float, str], xlabel: str, path: Path, *, xscale: str) -> None:
    """A panel for each "title" with R2 over "x": a curve per method, in the same colours throughout."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panels, methods = table.groupby("title", sort=False), list(table["method"].unique())
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
    for place, (panel, (title, points)) in enumerate(zip(grid, panels, strict=False)):
        for number, method in enumerate(methods):
            curve = points[points["method"] == method].sort_values("x")
            if not curve.empty:
                y = curve["r2"].clip(lower=FLOOR)  # NaN leaves a gap
                spread = curve["r2_sd"].where(curve["r2"] >= FLOOR).fillna(0.0)
                look = {"color": colours[method], "marker": MARKS[number % len(MARKS)], "zorder": 3 if method in coloured else 2}
                handles[method] = panel.errorbar(curve["x"], y, spread, markersize=4, linewidth=1, capsize=3, **look)
        panel.axhline(0, color=GREY, linewidth=1)
        panel.set(title=title, xscale=xscale, xlabel=xlabel, ylabel=f"R² (cut at {FLOOR:g})")
        panel.title.set_fontsize(10)
        panel.set_xticks(list(ticks), list(ticks.values()))
        panel.minorticks_off()
        panel.label_outer()
        if place + columns >= len(panels):  # the lowest of its column, also above a place that is left empty
            panel.set_xlabel(xlabel)
            panel.tick_params(labelbottom=True)
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _is_ours(method: str) -> bool:
    """Whether it is CausalRM or the default; the parts of an ablation are not."""
    return method == "auto" or (method.startswith("causalrm") and PART not in method)


def _selected(selection: Selection, alpha: float | str) -> list[str]:
    """The parts of a title that say how feedback is selected."""
    return [SELECTIONS[selection], *([] if alpha == "" else [f"alpha {alpha:g}"])]


def _noise(scenario: object) -> str:
    return scenario if isinstance(scenario, str) else f"scenario {scenario}"


def _draw_bars(panel: Axes, lines: pd.DataFrame, name: str, title: str, chance: float) -> None:
    """Bars from `chance`, the value of a model that knows nothing, cut at FLOOR; each with its number."""
    values, methods = lines[name], list(lines["method"])
    shown = values.clip(lower=FLOOR)
    spreads = lines[f"{name}_sd"].where(shown == values).fillna(0.0)
    colours = [GREY if method == "oracle" else ORANGE if _is_ours(method) else BLUE for method in methods]
    bars = panel.barh(
        range(len(lines)),
        shown.fillna(chance) - chance,
        left=chance,
        xerr=spreads if spreads.any() else None,
        color=colours,
        height=0.7,
        error_kw={"capsize": 2, "linewidth": 1},
    )
    labels = ["failed" if pd.isna(value) else f"{value:.3f}" for value in values]
    panel.bar_label(bars, labels, padding=3, fontsize=7)
    panel.axvline(chance, color=GREY, linewidth=1)
    panel.set_yticks(range(len(lines)), methods, fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.set_xlabel(title)
