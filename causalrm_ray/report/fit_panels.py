"""Panels of report.html on a fit: rates, propensity, weights, calibration, mechanisms, and sensitivity of the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from causalrm_ray.estimators.diagnostics.advice import DRIVES
from causalrm_ray.report.pictures import BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Json = Mapping[str, Any]
Panel = Callable[["Axes"], None]
SMALL = 8  # font size inside a panel
POSSIBLE = {"preference": (0.0, 1.0), "risk": (0.0, math.inf)}  # outside, the log contradicts the rates


def fit_panels(summary: Json) -> tuple[list[Panel], list[Panel], list[Panel]]:
    """Rows of panels from a fit's summary: the fit itself, selection, sensitivity of the result."""
    found = summary["diagnostics"]
    fit = [
        partial(_draw_rates, rates=summary["noise_rates"]),
        partial(_draw_calibration, propensity=summary["propensity"]),
        partial(_draw_models, summary=summary),
    ]
    selection = [partial(_draw_overlap, found=found), partial(_draw_weights, weights=found["weights"])]
    if found["mechanisms"] is not None:
        selection.append(partial(_draw_mechanisms, found=found["mechanisms"]))
    by_trait = found["groups"]["traits"]["selection"]
    if by_trait is not None:
        selection.append(partial(_draw_strata, strata=by_trait))
    result = [
        partial(_draw_reward_calibration, curve=found["calibration"]),
        partial(_draw_rho, rho=found["rho"], name="preference", title="share liked under other rates", shades="Blues"),
        partial(_draw_rho, rho=found["rho"], name="risk", title="held-out risk under other rates", shades="Greys"),
        partial(_draw_gamma, found=found),
    ]
    return fit, selection, result


def ranking_sentence(ranking: Json | None) -> str:
    """How far held-out feedback supports the model's ranking, and the hidden selection that would explain it away."""
    if ranking is None:
        return "The model's ranking cannot be checked: one half of it has no held-out feedback."
    contrast = f"{ranking['contrast']:.2f} ± {ranking['stderr']:.2f}"
    start = f"On {ranking['rows']} held-out rows the better half by the model's score is liked more often by {contrast}."
    if ranking["gamma"] is None:
        return f"{start} No hidden selection up to a factor of 100 in the odds of feedback would explain this."
    if ranking["gamma"] == 1:
        return f"{start} So the log does not support the ranking."
    return f"{start} Hidden selection by a factor of {ranking['gamma']:.2f} in the odds of feedback would explain this."


def preference_sentence(found: Json) -> str | None:
    """The share of liked answers with its interval, and what it assumes; None for a fit that has none."""
    if (intervals := found.get("intervals")) is None:
        return None
    share, assumed = intervals["preference"], [DRIVES.get(name, name) for name in intervals["assumed"]]
    return (
        f"{share['estimate']:.0%} of all answers shown are liked (95 % interval {share['low']:.0%} to {share['high']:.0%}), if "
        f"what decides who gives feedback is {' or '.join(assumed)}; the interval does not allow for anything else."
    )


def level_sentence(summary: Json) -> str | None:
    """What judged rows said of the level of the model that serves, and what that changed; None where none were given."""
    level = ((summary.get("clean") or {}).get("level") or {}).get(summary["diagnostics"]["method"])
    if level is None:
        return None
    slope = "" if level["slope_stderr"] is None else f", scaled by {level['slope']:.2f} ± {level['slope_stderr']:.2f}"
    return (
        f"Of {level['rows']} judged rows {level['liked']:.3f} ± {level['liked_stderr']:.3f} are liked. The model said "
        f"{level['mean_before']:.3f}; at their level it says {level['mean_after']:.3f} of them, each from the others (logits"
        f" shifted by {level['shift']:+.2f} ± {level['shift_stderr']:.2f}{slope})."
    )


def states_sentence(summary: Json) -> str | None:
    """Which states of the backbone were read, and by how much held-out feedback is explained better by them than by others."""
    choice = summary["propensity"].get("choice")
    if not choice:
        return None
    name, losses = choice["states"], choice["losses"]
    if not losses:
        return f"All models read the states {name} of the backbone (model.states)."
    others = ", ".join(f"{other} {loss:.4f}" for other, loss in sorted(losses.items(), key=lambda one: one[1]) if other != name)
    return (
        f"All models read the states {name} of the backbone: they explain held-out feedback best, {losses[name]:.4f} nats a row "
        f"(of the others: {others})."
    )


def fit_sentences(summary: Json) -> list[str]:
    """A fit in a few sentences, its verdict first."""
    found = summary["diagnostics"]
    doubts = found["warnings"]
    known = [found["verdict"], ranking_sentence(found["ranking"]), level_sentence(summary), states_sentence(summary)]
    if doubts:
        known.append(f"{len(doubts)} warning{'s' * (len(doubts) > 1)}, the first: {doubts[0]}")
    return [sentence for sentence in known if sentence]


def _draw_rates(panel: Axes, rates: Mapping[str, Json]) -> None:
    for place, (_, rate) in enumerate(sorted(rates.items())):
        first = place == 0
        low, high = rate["low"], rate["high"]
        if low is not None:
            label = "95 % interval" if first else None
            panel.plot([place, place], [low, high], color=BLUE, linewidth=6, alpha=0.35, label=label)
        label = "rate used" if low is not None else "rate used (no interval)"
        panel.plot(place, rate["estimate"], "o", color=BLUE, label=label if first else None)
        if rate["truth"] is not None:
            label = "truth" if first else None
            panel.plot(place, rate["truth"], "_", color=ORANGE, markersize=24, markeredgewidth=2, label=label)
    names = {"rho_01": "rho_01\ndisliked | liked", "rho_10": "rho_10\nliked | disliked"}
    panel.set(title="label noise: rates of flipped labels", ylabel="probability", xlim=(-0.6, len(rates) - 0.4))
    panel.set_xticks(range(len(rates)), [names[name] for name in sorted(rates)])
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False, fontsize=SMALL)


def _draw_calibration(panel: Axes, propensity: Json) -> None:
    points = [(point["predicted"], point["actual"]) for point in propensity["curve"]]
    top = max(max(point) for point in points) * 1.05
    panel.plot([0, top], [0, top], color=GREY, linewidth=1)
    panel.plot(*zip(*points, strict=True), "o-", color=BLUE)
    title = f"propensity: off by {propensity['ece']:.3f} on average"
    panel.set(title=title, xlabel="predicted share with feedback", ylabel="actual share")


def _draw_models(panel: Axes, summary: Json) -> None:
    if "reward_model" in summary:
        model = summary["reward_model"]
        bars = {model["method"]: model["r2"] or 0.0} | {
            key.removesuffix("_r2"): value or 0.0 for key, value in model.items() if key.endswith("_r2")
        }
        panel.set(title="reward models on fresh answers", ylabel="R² against true preference")
    else:
        bars = summary["reward_fit"]["heldout_risk"]
        panel.set(title="reward models on held-out rows", ylabel="corrected risk (lower is better)")
    names = list(bars)
    panel.bar(names, [bars[name] for name in names], color=[BLUE if place == 0 else GREY for place in range(len(names))])
    panel.axhline(0, color=GREY, linewidth=1)
    panel.tick_params(axis="x", rotation=15)


def _draw_overlap(panel: Axes, found: Json) -> None:
    overlap, clip = found["overlap"], found["propensity"]["clip"]
    groups = (("without_feedback", GREY, "rows without feedback"), ("with_feedback", BLUE, "rows with feedback"))
    for name, colour, label in groups:
        counts = overlap[name]
        panel.stairs([count / sum(counts) for count in counts], overlap["edges"], fill=True, color=colour, alpha=0.5, label=label)
    if found["propensity"]["clipped_share"] > 0:
        label = f"clip: {found['propensity']['clipped_share']:.0%} of rows lie below"
        panel.axvline(clip, color=ORANGE, linewidth=1, linestyle="--", label=label)
    if found["propensity"]["mean_weight"] is not None:
        panel.plot([], [], linestyle="none", label=f"weights average {found['propensity']['mean_weight']:.2f} (1 is right)")
    panel.set(title="overlap of rows with and without", xlabel="propensity: probability of feedback", ylabel="share of the group")
    panel.set_ylim(top=panel.get_ylim()[1] * 1.5)  # room for the legend
    panel.legend(frameon=False, fontsize=SMALL, loc="upper right")


def _draw_weights(panel: Axes, weights: Json) -> None:
    panel.stairs(weights["counts"], weights["edges"], fill=True, color=BLUE, alpha=0.7)
    title = f"{weights['rows']} rows count as {weights['ess']:.0f} ({weights['ess_fraction']:.0%})"
    panel.set(title=title, xlabel="weight of a row with feedback (mean 1)", ylabel="rows")
    text = f"the heaviest row carries {weights['largest_share']:.1%}"
    panel.text(0.97, 0.95, text, transform=panel.transAxes, ha="right", va="top", fontsize=SMALL)
    panel.set_ylim(top=panel.get_ylim()[1] * 1.15)


def _draw_mechanisms(panel: Axes, found: Json) -> None:
    names = sorted(found["weights"])
    panel.barh([DRIVES.get(name, name) for name in names], [found["weights"][name] for name in names], color=BLUE, height=0.5)
    for place, name in enumerate(names):
        text = f"{found['weights'][name]:.0%}"
        if name in found.get("adds", ()):
            text += f";  adds {found['adds'][name]:.1f} standard errors to the other"
        panel.text(0.02, place + 0.32, text, fontsize=SMALL, va="bottom")
    panel.set(title="what decides who gives feedback", xlabel="weight by what explains the labels", xlim=(0, 1))
    panel.set_ylim(-0.6, len(names) - 0.2)


def _draw_strata(panel: Axes, strata: Json) -> None:
    """Probability of feedback of liked and of disliked answers, by stratum, with 95 % intervals."""
    for place, group in enumerate(strata.values()):
        for name, colour, shift in (("liked", BLUE, 0.12), ("disliked", ORANGE, -0.12)):
            low, high = group[f"{name}_interval"]
            panel.plot([low, high], [place + shift] * 2, color=colour, linewidth=4, alpha=0.35)
            panel.plot(group[name], place + shift, "o", color=colour, label=f"{name} answers" if place == 0 else None)
    panel.set_yticks(range(len(strata)), list(strata), fontsize=SMALL)
    panel.set(title="who gives feedback, by trait", xlabel="probability of feedback", ylim=(-0.6, len(strata) + 0.3))
    panel.set_xlim(left=0)
    panel.legend(frameon=False, fontsize=SMALL, loc="upper right")


def _draw_reward_calibration(panel: Axes, curve: list[Json]) -> None:
    x, y = [part["predicted"] for part in curve], [part["actual"] for part in curve]
    panel.plot([0, 1], [0, 1], color=GREY, linewidth=1)
    panel.errorbar(x, y, [2 * part["stderr"] for part in curve], fmt="o-", color=BLUE, capsize=3, label="± 2 standard errors")
    panel.axhspan(1, 10, color=GREY, alpha=0.15, linewidth=0)
    panel.axhspan(-10, 0, color=GREY, alpha=0.15, linewidth=0)
    ends = [part["actual"] + sign * 2 * part["stderr"] for part in curve for sign in (-1, 1)]
    panel.set(title="reward model on held-out feedback", xlabel="predicted probability of being liked", xlim=(-0.03, 1.03))
    panel.set(ylabel="share liked, by corrected feedback", ylim=(min(-0.05, *ends) - 0.02, max(1.05, *ends) + 0.02))
    panel.legend(frameon=False, fontsize=SMALL, loc="upper left")


def _draw_rho(panel: Axes, rho: Json, name: str, title: str, shades: str) -> None:
    """A cell per pair of rates with the figure `name` under them; on top the estimated rates and their intervals."""
    ticks = sorted({point["rho_01"] for point in rho["grid"]})
    half = (ticks[1] - ticks[0]) / 2
    floor, ceiling = POSSIBLE[name]
    values = {(point["rho_01"], point["rho_10"]): point[name] for point in rho["grid"]}
    cut = {rates: min(max(value, floor), ceiling) for rates, value in values.items()}
    low, high = min(cut.values()), max(cut.values())
    extent = (ticks[0] - half, ticks[-1] + half, ticks[0] - half, ticks[-1] + half)
    table = [[cut[column, row] for column in ticks] for row in ticks]
    brightest = high + (high - low) + 1e-9  # dark cells would hide their numbers
    panel.imshow(table, origin="lower", extent=extent, cmap=shades, vmin=low, vmax=brightest, aspect="auto")
    for (rho_01, rho_10), value in values.items():
        text = f"{value:.2f}" if floor <= value <= ceiling else "–"
        panel.text(rho_01, rho_10, text, ha="center", va="center", fontsize=SMALL)
    x, y = rho["estimate"]["rho_01"], rho["estimate"]["rho_10"]
    if rho["corners"]:
        across, up = ([point[rate] for point in rho["corners"]] for rate in ("rho_01", "rho_10"))
        panel.plot([min(across), max(across)], [y, y], color=ORANGE, linewidth=2)
        panel.plot([x, x], [min(up), max(up)], color=ORANGE, linewidth=2)
    panel.plot(x, y, "o", color=ORANGE, markersize=5)
    panel.set(title=title, xlabel="rho_01 (orange: as estimated)", ylabel="rho_10", xticks=ticks, yticks=ticks)
    panel.set(xlim=extent[:2], ylim=extent[2:])


def _draw_gamma(panel: Axes, found: Json) -> None:
    points, ranking = found["gamma"], found["ranking"]
    gamma = [point["gamma"] for point in points]
    for low, high, alpha, label in (("low_95", "high_95", 0.2, "95 % interval"), ("low", "high", 0.5, "exact bounds")):
        bottom, top = ([min(max(point[name], 0), 1) for point in points] for name in (low, high))
        panel.fill_between(gamma, bottom, top, color=BLUE, alpha=alpha, linewidth=0, label=label)
    panel.axhline(points[0]["low"], color=GREY, linewidth=1)
    if ranking is not None and ranking["gamma"] is not None and 1 < ranking["gamma"] <= gamma[-1]:
        panel.vlines(ranking["gamma"], 0, 1, color=ORANGE, linestyle="--", label="beyond, it explains the ranking")
    panel.set(title="share liked under hidden selection", xlabel="Gamma: factor in the odds of feedback", ylabel="share liked")
    panel.set(ylim=(0, 1.4), xlim=(gamma[0], gamma[-1]), yticks=[0, 0.25, 0.5, 0.75, 1])
    panel.legend(frameon=False, fontsize=SMALL, loc="upper left")
