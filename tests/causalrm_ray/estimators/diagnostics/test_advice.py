"""Every weakness gets a warning with its value and a remedy; a sound fit has none."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from causalrm_ray.estimators.diagnostics.advice import advise, verdict

RATES: dict[str, Any] = {name: {"estimate": 0.15, "low": 0.1, "high": 0.2} for name in ("rho_01", "rho_10")}
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
        "gap": 0.02,
        "gap_stderr": None,
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
            ("where it says 0.90", "0.60 ± 0.05", "reward.epochs"),
        ),
        (
            {"calibration": [{"predicted": 0.1, "actual": -0.2, "stderr": 0.05}]},
            ("rho_10 looks too large", "-0.20 ± 0.05", "reward.rho"),
        ),
        (
            {"calibration": [{"predicted": 0.95, "actual": 1.3, "stderr": 0.1}]},
            ("rho_01 looks too large", "1.30 ± 0.10", "reward.rho"),
        ),
        ({"mechanisms": {"weights": {"features": 0.05, "label": 0.95}}}, ("Opinions decide who gives feedback", "reward.method")),
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


def test_warnings_of_the_propensity_come_first() -> None:
    warnings = advise(changed(ranking={"gamma": 1.1}), {"warnings": ["Poor overlap"]}, RATES)
    assert warnings[0] == "Poor overlap"
    assert len(warnings) == 2


def test_the_verdict_says_what_the_log_supports_and_how_surely() -> None:
    assert verdict(SOUND) == (
        "The log supports this: only what is seen, prompt and answer, decides who gives feedback (weight 95%); the outcomes are "
        "0.0200 nats a row more likely on held-out rows (standard error unknown) than otherwise."
    )
    leaning = changed(mechanisms={"weights": {"features": 0.3, "label": 0.7}, "gap": 0.05, "gap_stderr": 0.015})
    assert verdict(leaning).startswith("The log favours this: the opinion itself decides who gives feedback (weight 70%)")
    assert "0.0500 nats a row more likely on held-out rows (standard error 0.0150)" in verdict(leaning)
    assumed = changed(mechanisms={"weights": {"features": 0.1, "label": 0.9}, "gap": -0.01, "gap_stderr": 0.015})
    assert verdict(assumed).startswith("The log is not conclusive. Assumed: the opinion itself decides")
    assert "0.0100 nats a row less likely" in verdict(assumed)
    assert not any("Opinions decide who" in sentence for sentence in advise(assumed, PROPENSITY, RATES))
    alike = changed(mechanisms={"weights": {"features": 0.5, "label": 0.5}})
    assert verdict(alike).startswith("The log does not show what decides")
    assert "reward.method=auto" in verdict(changed(mechanisms=None, method="naive"))
    assert verdict(changed(mechanisms=None, method="naive")).startswith("naive assumes one selection mechanism")
