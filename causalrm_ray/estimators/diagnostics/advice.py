"""Warnings about a fit, from its diagnostics: sentences, each with a value and a remedy that names existing options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

WIDE = 0.2  # of a rate's interval
SMALL_STRAIN = 1.0  # nats of noise rates not worth a word
MOVED = 0.1  # of the mean preference, by rates that the log allows
FRAGILE = 1.25  # strength of hidden selection that is easily there
HEAVY = 0.05  # share of all weight on one row
SIGNIFICANT = 2.0  # standard errors
SURE = 0.9  # weight of a mechanism that a log supports
SMALL_SHIFT = 0.1  # log-odds: a tenth more or less readily
DRIVES = {"label": "the opinion itself", "features": "prompt and answer"}
JUDGE = "A few hundred impressions drawn at random and judged with care would set the level: give them as feedback.clean."
MORE = "Have more rows judged (feedback.clean)."


def advise(
    diagnostics: Mapping[str, Any], propensity: Mapping[str, Any], rates: Mapping[str, Mapping[str, Any]], levelled: bool = False
) -> list[str]:
    """Warnings about a fit, most basic first; empty for a sound one.

    `diagnostics` is FitDiagnostics as JSON, `propensity` PropensityReport as JSON, whose own warnings come first, after those
    about the log that it was fitted on (`log_warnings`, if it knows one); `rates` maps
    rho_01 and rho_10 to "estimate", "low" and "high" (None where the rates were given, or found without an interval); `levelled`:
    judged rows set the level already.
    """
    parts = (_weights, partial(_rates, rates=rates), partial(_preference, levelled=levelled), _model, _selection)
    return [
        *propensity.get("log_warnings", ()),
        *propensity["warnings"],
        *(sentence for part in parts for sentence in part(diagnostics)),
    ]


def verdict(diagnostics: Mapping[str, Any], levelled: bool = False) -> str:
    """The selection mechanism that the log supports, in a few sentences; `levelled`: judged rows set the level already.

    Selection by the opinion alone is a restriction, which a log may support or rule out. Selection by features is none: it fits
    any log, so it is never confirmed, only assumed where the restriction is ruled out.
    """
    found = diagnostics["mechanisms"]
    if found is None:
        return (
            f"{diagnostics['method']} assumes one selection mechanism and compares no others: fit with reward.method=auto "
            "to compare them on the log."
        )
    weights, adds = found["weights"], found.get("adds")
    best = max(weights, key=weights.__getitem__)
    if weights[best] < SURE:
        shares = ", ".join(f"{DRIVES.get(name, name)} {weight:.0%}" for name, weight in sorted(weights.items()))
        return _advised(f"The log does not show what decides who gives feedback; predictions are averaged ({shares}).", levelled)
    if not adds:
        return f"The log favours {DRIVES.get(best, best)} (weight {weights[best]:.0%}) as what decides who gives feedback."
    if best == "label":
        start = "The log supports" if _leans_to_opinion(found) else "The log does not rule out, and the fit assumes,"
        return (
            f"{start} selection by the opinion itself (weight {weights[best]:.0%}): one opinion explains who gives feedback and "
            f"what it says. It adds {adds['label']:.1f} standard errors to what prompt and answer say of the labels; these add "
            f"{adds['features']:.1f} to it."
        )
    further = f", and held-out outcomes are {found['gain']:.0f} nats likelier by them" if found.get("gain") else ""
    if (strain := found.get("strain") or 0.0) > SMALL_STRAIN:
        further += f", and by it more feedback would be noise, at rates {strain:.0f} nats less likely"
    return _advised(
        "The log rules out that the opinion alone decides who gives feedback: prompt and answer add "
        f"{adds['features']:.1f} standard errors to what it says of the labels{further}. They are taken to decide (weight "
        f"{weights[best]:.0%}). {_besides(found, levelled)}",
        levelled,
    )


def _advised(text: str, levelled: bool) -> str:
    return text if levelled else f"{text} {JUDGE}"


def _besides(found: Mapping[str, Any], levelled: bool) -> str:
    """What opinions are taken to do besides features."""
    if levelled:
        return "What opinions do to the level besides is what the judged rows say."
    if abs(found["shift"]) < SMALL_SHIFT:
        return "Whether opinions play a part besides cannot be read from any log; none is assumed."
    times, seen = math.exp(found["shift"]), math.exp(found["shift_found"])
    return (
        f"Besides, the odds that the pleased give feedback are taken to be {times:.2f} times those of others (the log suggests "
        f"{seen:.2f}, if all else that drives feedback has nothing to do with opinions)."
    )


def _leans_to_opinion(found: Mapping[str, Any]) -> bool:
    """Whether a log supports selection by the opinion, and by evidence rather than for want of it."""
    adds = found.get("adds", {})
    return found["weights"].get("label", 0) >= SURE and adds.get("label", 0.0) - adds.get("features", 0.0) > SIGNIFICANT


def _weights(diagnostics: Mapping[str, Any]) -> list[str]:
    weights = diagnostics["weights"]
    if weights["largest_share"] <= HEAVY:
        return []
    return [f"One row carries {weights['largest_share']:.0%} of all weight: raise reward.clip, or collect more feedback."]


def _rates(diagnostics: Mapping[str, Any], rates: Mapping[str, Mapping[str, Any]]) -> list[str]:
    sentences = []
    for name, rate in sorted(rates.items()):
        if rate["low"] is not None and rate["high"] - rate["low"] > WIDE:
            sentences.append(
                f"{name} is known only to lie in {rate['low']:.2f} to {rate['high']:.2f}: collect more feedback, or ask some "
                "users twice and give the rates as reward.rho."
            )
    rho = diagnostics["rho"]
    mean = rho["estimate"]["preference"]
    if not 0 <= mean <= 1:
        sentences.append(
            f"The rates contradict the log: under them the share of liked answers would be {mean:.2f}. At least one of them "
            "is too large: give lower ones as reward.rho."
        )
    ends = [point["preference"] for point in rho["corners"]]
    moved = max((abs(end - mean) for end in ends), default=0.0)
    if moved > MOVED:
        sentences.append(
            f"The share of liked answers, {mean:.2f}, moves by {moved:.2f} within the intervals of the rates "
            f"({min(ends):.2f} to {max(ends):.2f}): do not rely on it until the rates are better known."
        )
    return sentences


def _preference(diagnostics: Mapping[str, Any], levelled: bool) -> list[str]:
    """Of a share of liked answers that the log leaves open."""
    share = (diagnostics.get("intervals") or {}).get("preference")
    if share is None or share["high"] - share["low"] <= WIDE:
        return []
    remedy = MORE if levelled else JUDGE
    return [f"The share of liked answers is known only to lie in {share['low']:.2f} to {share['high']:.2f}. {remedy}"]


def _model(diagnostics: Mapping[str, Any]) -> list[str]:
    curve = diagnostics["calibration"]
    sentences = []
    lowest, highest = curve[0], curve[-1]
    for part, name, beyond, end in (
        (lowest, "rho_10", -lowest["actual"], "worst"),
        (highest, "rho_01", highest["actual"] - 1, "best"),
    ):
        if beyond > SIGNIFICANT * part["stderr"]:
            sentences.append(
                f"{name} looks too large: under it the rows that the model ranks {end} would have a share of liked answers of "
                f"{part['actual']:.2f} ± {part['stderr']:.2f}. Give a lower one as reward.rho."
            )
    gaps = [abs(part["predicted"] - min(max(part["actual"], 0.0), 1.0)) for part in curve]
    far = [gap if gap > max(MOVED, SIGNIFICANT * part["stderr"]) else 0.0 for gap, part in zip(gaps, curve, strict=True)]
    if any(far):
        part = curve[far.index(max(far))]
        sentences.append(
            f"The model's probabilities are off: where it says {part['predicted']:.2f}, corrected feedback says "
            f"{part['actual']:.2f} ± {part['stderr']:.2f}. Use its ranking, not its probabilities, or "
            "set its level by feedback.clean."
        )
    return sentences


def _selection(diagnostics: Mapping[str, Any]) -> list[str]:
    sentences = []
    found, ranking = diagnostics["mechanisms"], diagnostics["ranking"]
    if found is not None and _leans_to_opinion(found):
        sentences.append(
            "Opinions decide who gives feedback, so figures that rest on propensities alone (calibration, ranking, hidden "
            "selection) are biased, and so are methods that do: use one that models this (reward.method=auto)."
        )
    if ranking is None:
        sentences.append(
            "No held-out feedback on one half of the model's ranking: the ranking cannot be checked. Collect more feedback."
        )
    elif ranking["contrast"] < SIGNIFICANT * ranking["stderr"]:
        sentences.append(
            f"Held-out feedback does not confirm the model's ranking: its better half is liked more by {ranking['contrast']:.2f} "
            f"± {ranking['stderr']:.2f} ({ranking['rows']} rows). Collect more feedback before tuning a policy on it."
        )
    elif ranking["gamma"] is not None and ranking["gamma"] < FRAGILE:
        sentences.append(
            f"Little hidden selection would overturn the model's ranking: odds of feedback off by a factor of "
            f"{ranking['gamma']:.2f} are enough. Ask a random sample of users for feedback and compare."
        )
    return sentences
