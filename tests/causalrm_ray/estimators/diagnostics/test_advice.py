"""Every weakness gets a warning with its value and a remedy; a sound fit has none."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from causalrm_ray.estimators.diagnostics.advice import advise, verdict

RATES: dict[str, Any] = {name: {"estimate": 0.15, "low": 0.1, "high": 0.2} for name in ("rho_01", "rho_10")}
OPINION = {"weights": {"features": 0.05, "label": 0.95}}
PROPENSITY: dict[str, Any] = {"warnings": []}
SOUND: dict[str, Any] = {
    "method": "auto",
    "weights": {"largest_share": 0.01},
    "rho": {"estimate": {"preference": 0.5}, "corners": [{"preference": 0.45}, {"preference": 0.55}]},
    "calibration": [{"predicted": 0.5, "actual": 0.55, "stderr": 0.05}],
    "ranking": {"contrast": 0.3, "stderr": 0.05, "gamma": 2.5, "rows": 100},
    "mechanisms": {
        "weights": {"features": 0.95, "label": 0.05},
        "heldout": {"features": 0.5, "label": 0.52},
        "adds": {"features": 6.1, "label": 0.4},
        "signal": 9.0,
        "shift": 0.0,
        "shift_found": 0.3,
    },
}


def changed(**parts: Any) -> dict[str, Any]:
    found = copy.deepcopy(SOUND)
    for name, value in parts.items():
        found[name] = {**found[name], **value} if isinstance(value, dict) else value
    return found


def test_a_sound_fit_has_no_warnings() -> None:
    assert advise(SOUND, PROPENSITY, RATES) == []


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"weights": {"largest_share": 0.2}}, ("One row carries 20% of all weight", "raise reward.clip")),
        ({"rho": {"estimate": {"preference": 1.2}, "corners": []}}, ("The rates contradict the log", "1.20", "reward.rho")),
        (
            {"rho": {"estimate": {"preference": 0.5}, "corners": [{"preference": 0.3}, {"preference": 0.55}]}},
            ("0.50, moves by 0.20", "0.30 to 0.55"),
        ),
        (
            {"calibration": [{"predicted": 0.9, "actual": 0.6, "stderr": 0.05}]},
            ("where it says 0.90", "0.60 ± 0.05", "feedback.clean"),
        ),
        (
            {"calibration": [{"predicted": 0.1, "actual": -0.2, "stderr": 0.05}]},
            ("rho_10 looks too large", "-0.20 ± 0.05", "reward.rho"),
        ),
        (
            {"calibration": [{"predicted": 0.95, "actual": 1.3, "stderr": 0.1}]},
            ("rho_01 looks too large", "1.30 ± 0.10", "reward.rho"),
        ),
        (
            {"mechanisms": {**OPINION, "adds": {"features": 0.4, "label": 6.1}}},
            ("Opinions decide who gives feedback", "reward.method"),
        ),
        ({"ranking": None}, ("cannot be checked", "Collect more feedback")),
        ({"ranking": {"contrast": 0.05}}, ("liked more by 0.05 ± 0.05 (100 rows)", "Collect more feedback")),
        ({"ranking": {"gamma": 1.1}}, ("a factor of 1.10", "random sample")),
    ],
    ids=[
        "heavy_row",
        "impossible_rates",
        "rates_matter",
        "uncalibrated",
        "rho_10_too_big",
        "rho_01_too_big",
        "opinions",
        "unchecked",
        "unconfirmed",
        "fragile",
    ],
)
def test_each_weakness_gets_a_warning_with_its_value_and_a_remedy(parts: dict[str, Any], expected: tuple[str, ...]) -> None:
    (sentence,) = advise(changed(**parts), PROPENSITY, RATES)
    assert [part for part in expected if part not in sentence] == []


def test_a_wide_interval_gets_a_warning_and_given_rates_do_not() -> None:
    wide = {**RATES, "rho_10": {"estimate": 0.2, "low": 0.05, "high": 0.35}}
    (sentence,) = advise(SOUND, PROPENSITY, wide)
    assert sentence.startswith("rho_10 is known only to lie in 0.05 to 0.35: collect more feedback")
    given = {**RATES, "rho_10": {"estimate": 0.2, "low": None, "high": None}}
    assert advise(SOUND, PROPENSITY, given) == []


def test_a_share_of_liked_answers_that_the_log_leaves_open_gets_a_warning() -> None:
    known, open_ = ({"preference": {"estimate": 0.4, "low": low, "high": 0.5}} for low in (0.35, 0.2))
    assert advise({**SOUND, "intervals": known}, PROPENSITY, RATES) == []
    (sentence,) = advise({**SOUND, "intervals": open_}, PROPENSITY, RATES)
    assert sentence.startswith("The share of liked answers is known only to lie in 0.20 to 0.50. A few hundred impressions drawn")


def test_warnings_of_the_propensity_come_first() -> None:
    warnings = advise(changed(ranking={"gamma": 1.1}), {"warnings": ["Poor overlap"]}, RATES)
    assert warnings[0] == "Poor overlap"
    assert len(warnings) == 2


def test_the_verdict_says_what_the_log_supports_and_how_surely() -> None:
    assert verdict(SOUND) == (
        "The log rules out that the opinion alone decides who gives feedback: prompt and answer add 6.1 standard errors to what "
        "it says of the labels. They are taken to decide (weight 95%). Whether opinions play a part besides cannot be read from "
        "any log; none is assumed. A few hundred impressions drawn at random and judged with care would set the level: give "
        "them as feedback.clean."
    )
    gained = verdict(changed(mechanisms={"gain": 41.7}))
    assert "of the labels, and held-out outcomes are 42 nats likelier by them. They are taken to decide" in gained
    strained = verdict(changed(mechanisms={"strain": 14.2}))
    assert "of the labels, and by it more feedback would be noise, at rates 14 nats less likely. They are taken" in strained
    besides = verdict(changed(mechanisms={"shift": math.log(2), "shift_found": math.log(3)}))
    assert (
        "the odds that the pleased give feedback are taken to be 2.00 times those of others (the log suggests 3.00, if all else"
        in besides
    )
    opinion = changed(mechanisms={**OPINION, "adds": {"features": 0.4, "label": 6.1}})
    assert verdict(opinion) == (
        "The log supports selection by the opinion itself (weight 95%): one opinion explains who gives feedback and what it "
        "says. It adds 6.1 standard errors to what prompt and answer say of the labels; these add 0.4 to it."
    )
    assumed = changed(mechanisms={**OPINION, "adds": {"features": 0.4, "label": 0.5}})
    assert verdict(assumed).startswith(
        "The log does not rule out, and the fit assumes, selection by the opinion itself (weight 95%)"
    )
    assert not any("Opinions decide who" in sentence for sentence in advise(assumed, PROPENSITY, RATES))
    judged = verdict(SOUND, levelled=True)
    assert judged.endswith("(weight 95%). What opinions do to the level besides is what the judged rows say.")
    alike = changed(mechanisms={"weights": {"features": 0.4, "label": 0.6}})
    assert verdict(alike).startswith("The log does not show what decides who gives feedback")
    assert "(prompt and answer 40%, the opinion itself 60%)" in verdict(alike)
    others = changed(mechanisms={"weights": {"weather": 0.95, "label": 0.05}, "adds": {}})
    assert verdict(others) == "The log favours weather (weight 95%) as what decides who gives feedback."
    assert "reward.method=auto" in verdict(changed(mechanisms=None, method="naive"))
    assert verdict(changed(mechanisms=None, method="naive")).startswith("naive assumes one selection mechanism")
