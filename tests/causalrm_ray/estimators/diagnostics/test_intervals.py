"""Intervals of what a fit says of a log: do they hold the truth, and do they say what is not known?"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from causalrm_ray.estimators.core.task import Fitted, Observations
from causalrm_ray.estimators.core.training import Epoch, FitReport
from causalrm_ray.estimators.diagnostics.intervals import draw_rates, fit_intervals, rate_ends, selection_by_stratum
from causalrm_ray.estimators.diagnostics.selection_posterior import Explained, explained
from causalrm_ray.estimators.nuisances.level import SLOPE_PRIOR
from causalrm_ray.estimators.nuisances.noise_rates import NoiseEstimate
from causalrm_ray.estimators.nuisances.opinion_shift import opinion_given
from causalrm_ray.estimators.pipeline import RewardFits
from causalrm_ray.losses.selection import graded_outcomes, outcomes
from causalrm_ray.types import NoiseRates
from tests.causalrm_ray.estimators.diagnostics.interval_coverage import NAMES, World, draw_world, hits

SIMULATIONS = 200
GUESS = NoiseRates(0.15, 0.15)  # what a fit found, which is not the truth


def explanation(world: World, mechanism: str, seed: int, shift_stderr: float = 0.0) -> Explained:
    """A log as a fit that ranks its rows rightly explains it, whose level, scale and rates are off as much as priors allow."""
    generator = torch.Generator().manual_seed(1000 + seed)
    level, scale = torch.randn(1, generator=generator), (SLOPE_PRIOR * torch.randn(1, generator=generator)).exp()
    opinion = torch.sigmoid(world.f.double())
    on1, on0 = (p.double() * e for p, e in zip(world.chances, (opinion, 1 - opinion), strict=True))
    feedback = on1 + on0
    if mechanism == "label":
        return Explained(torch.sigmoid(level + scale * world.f.double()), on1 / feedback, feedback, GUESS, False, {"label": 1.0})
    seen = torch.sigmoid(level + scale * torch.logit(on1 / feedback))
    shift = float(torch.logit(world.chances[0][0]) - torch.logit(world.chances[1][0]))
    found = shift + shift_stderr * float(torch.randn(1, generator=generator))
    return Explained(opinion_given(feedback, seen, found), seen, feedback, GUESS, False, {mechanism: 1.0}, found, shift_stderr)


@pytest.mark.parametrize(
    ("kind", "mechanism", "error"), [("label", "label", 0.0), ("features", "features", 0.0), ("shift", "features", 0.3)]
)
def test_intervals_hold_the_truth_as_often_as_they_claim(kind: str, mechanism: str, error: float) -> None:
    found = []
    for seed in range(SIMULATIONS):
        world = draw_world(kind, 3000, seed)
        log = explanation(world, mechanism, seed, error)
        strata = world.strata if kind != "features" else None
        by_stratum = selection_by_stratum(log, world.observations, world.strata, NAMES)
        found.append(hits(fit_intervals(log, world.observations, strata), by_stratum, world))
    shares = {name: sum(one[name] for one in found) / SIMULATIONS for name in found[0]}
    margin = 3 * math.sqrt(0.95 * 0.05 / SIMULATIONS)
    assert {name: share for name, share in shares.items() if share < 0.95 - margin} == {}
    # Intervals of one log are right or wrong together, but those of rates always hold the fit's own besides: these may be wider.
    others = [share for name, share in shares.items() if "rho" not in name]
    assert sum(others) / len(others) < 0.95 + margin / 2


def test_label_posterior_is_at_the_mode_of_the_rows_own_density() -> None:
    """The log-posterior, row by row in float64, has hardly a slope at the estimates, but for the bins."""
    world = draw_world("label", 8000, 1)
    log, outcome = explanation(world, "label", 1), outcomes(world.observations.o, world.observations.r).long()
    f = torch.logit(log.opinion)
    found = fit_intervals(log, world.observations)
    start = torch.tensor([0.0, 0.0, 0.0, 0.0, -1.5, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    spread = torch.tensor([1.0, SLOPE_PRIOR, 0.1**0.5, 0.1**0.5, 2.0, 1.0, 0.5**0.5], dtype=torch.float64)
    centre = torch.tensor([0, 0, math.log(0.3 / 0.7), math.log(0.3 / 0.7), 0, 0, 0], dtype=torch.float64)
    centre[4] = torch.logit(world.observations.o.double().mean())

    def density() -> Tensor:
        b, s, rho_01, rho_10, a, c, d = start
        rho_01, rho_10 = torch.sigmoid(rho_01) / 2, torch.sigmoid(rho_10) / 2
        logprob, _, _ = graded_outcomes(f.mean() + b + s.exp() * (f - f.mean()), a, c, d, rho_01, rho_10)
        return logprob.gather(1, outcome[:, None]).sum() - ((start - centre) / spread).square().sum() / 2

    optimiser = torch.optim.LBFGS([start], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-8)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -density()
        loss.backward()
        return loss

    optimiser.step(closure)
    b, s = start.detach()[:2]
    mean = float(torch.sigmoid(f.mean() + b + s.exp() * (f - f.mean())).mean())
    width = found.preference.high - found.preference.low
    assert abs(found.preference.estimate - mean) < 0.03 * width


def test_intervals_of_both_mechanisms_where_the_log_shows_neither() -> None:
    world = draw_world("shift", 4000, 3)
    log = explanation(world, "features", 3)
    label, features = (fit_intervals(replace(log, weights={name: 1.0}), world.observations) for name in ("label", "features"))
    both = fit_intervals(replace(log, weights={"label": 0.4, "features": 0.6}), world.observations)
    assert both.assumed == ("features", "label")
    assert both.preference.estimate == features.preference.estimate
    assert both.preference.low == min(label.preference.low, features.preference.low)
    assert both.preference.high == max(label.preference.high, features.preference.high)
    assert fit_intervals(replace(log, weights={"label": 0.05, "features": 0.95}), world.observations) == features


@pytest.mark.parametrize("mechanism", ["label", "features"])
def test_known_rates_have_no_interval_and_leave_less_open(mechanism: str) -> None:
    world = draw_world("label" if mechanism == "label" else "features", 4000, 5)
    log = explanation(world, mechanism, 5)
    found = fit_intervals(log, world.observations)
    known = fit_intervals(replace(log, rates=world.rates, known=True), world.observations)
    assert known.rho_01 is None
    assert known.rho_10 is None
    assert known.preference.high - known.preference.low < found.preference.high - found.preference.low


@pytest.mark.parametrize("mechanism", ["label", "features"])
def test_known_rates_of_a_half_or_more_and_feedback_on_all_rows_have_finite_intervals(mechanism: str) -> None:
    world = draw_world("label" if mechanism == "label" else "features", 2000, 5)
    given = Observations(torch.ones(2000), world.observations.r)
    log = replace(explanation(world, mechanism, 5), rates=NoiseRates(0.6, 0.1), known=True)
    for observations in (given, world.observations):
        found = fit_intervals(log, observations).preference
        assert 0 < found.low < found.estimate < found.high < 1
        assert all(math.isfinite(one.ratio) for one in selection_by_stratum(log, observations, world.strata, NAMES).values())


def test_the_rates_of_the_fit_lie_in_their_intervals() -> None:
    world = draw_world("features", 4000, 6)
    found = fit_intervals(replace(explanation(world, "features", 6), rates=NoiseRates(0.45, 0.01)), world.observations)
    assert found.rho_01 is not None
    assert found.rho_10 is not None
    assert (found.rho_01.estimate, found.rho_01.high) == (0.45, 0.45)
    assert (found.rho_10.estimate, found.rho_10.low) == (0.01, 0.01)


@pytest.mark.parametrize("mechanism", ["label", "features"])
def test_judged_rows_narrow_the_share_of_liked_answers(mechanism: str) -> None:
    world = draw_world("label" if mechanism == "label" else "features", 4000, 7)
    log = replace(explanation(world, mechanism, 7), opinion=torch.sigmoid(world.f.double()), weights={mechanism: 1.0})
    widths = [
        one.high - one.low
        for error in (0.2, 0.1, 0.02)
        for one in [fit_intervals(replace(log, level_stderr=error), world.observations).preference]
    ]
    assert widths == sorted(widths, reverse=True)
    opinion = torch.sigmoid(world.f.double())
    mean = float(opinion.mean())
    alone = 2 * 1.96 * 0.02 * float((opinion * (1 - opinion)).mean())  # a small error of the level moves E[r*] by its mean slope
    if mechanism == "features":
        assert widths[-1] == pytest.approx(alone, rel=1e-3)
    else:  # the scale of the opinions stays open there
        assert alone < widths[-1] < 2 * alone
    found = fit_intervals(replace(log, level_stderr=0.02), world.observations).preference
    assert found.low < mean < found.high


def test_rows_that_depend_on_one_another_widen_intervals() -> None:
    """Each row four times: the intervals are those of the rows once."""
    world = draw_world("features", 3000, 8)
    log = explanation(world, "features", 8)
    once = fit_intervals(log, world.observations).preference
    four = torch.arange(3000).repeat(4)
    repeated = replace(log, opinion=log.opinion[four], seen=log.seen[four], feedback=log.feedback[four])
    o, r = world.observations.o[four], world.observations.r[four]
    clustered = fit_intervals(repeated, Observations(o, r, four)).preference
    alone = fit_intervals(repeated, Observations(o, r)).preference
    assert clustered.low == pytest.approx(once.low, abs=0.002)
    assert clustered.high == pytest.approx(once.high, abs=0.002)
    assert alone.high - alone.low < 0.75 * (once.high - once.low)


def test_what_the_log_does_not_show_is_said() -> None:
    world = draw_world("label", 300, 2)
    log, o, r = explanation(world, "label", 2), world.observations.o, world.observations.r
    assert "interval too wide" in selection_by_stratum(log, world.observations, world.strata, NAMES)["phone"].warnings[0]
    silent = Observations(torch.where(world.strata == 1, 0.0, o), r)
    for mechanism in ("label", "features"):
        one = selection_by_stratum(replace(log, weights={mechanism: 1.0}), silent, world.strata, NAMES)["phone"]
        assert one.warnings == (f"no feedback on any of {int((world.strata == 1).sum())} rows: selection is unknown here",)
        assert not one.differ
        assert one.ratio_interval[0] < 0.2
        assert one.ratio_interval[1] > 5
    with pytest.raises(ValueError, match=r"strata must be in 0..0 and not empty, got \[0, 1\]"):
        selection_by_stratum(log, world.observations, world.strata, NAMES[:1])


@pytest.mark.parametrize("mechanism", ["label", "features"])
def test_an_empty_stratum_spoils_no_other(mechanism: str) -> None:
    world = draw_world("label" if mechanism == "label" else "features", 3000, 3)
    log = explanation(world, mechanism, 3)
    plain, more = (selection_by_stratum(log, world.observations, world.strata, names) for names in (NAMES, (*NAMES, "none")))
    assert more["none"].rows == 0
    assert math.isfinite(more["none"].ratio)
    for name in NAMES:
        assert more[name].ratio == pytest.approx(plain[name].ratio, rel=1e-3)
        assert more[name].ratio_interval == pytest.approx(plain[name].ratio_interval, rel=1e-3)


def test_a_fit_is_explained_by_what_it_found() -> None:
    world = draw_world("shift", 200, 4)
    report = FitReport((Epoch(1, 0.6, 0.6),), Epoch(1, 0.6, 0.6))
    figures = {"weight_features": 0.7, "weight_label": 0.3, "shift_used": 0.4, "shift_used_stderr": 0.7}
    on = torch.stack([torch.sigmoid(world.f) * world.chances[0], torch.sigmoid(-world.f) * world.chances[1]], 1)
    clipped = world.chances[0].clamp_min(0.9), world.chances[1].clamp_min(0.9)  # weights' clips are no part of it
    fitted = Fitted(torch.nn.Identity(), report, figures, world.f, GUESS, clipped, on)
    fits = RewardFits({"auto": fitted}, {}, GUESS, None, None, None, None, None, torch.arange(9))
    found = explained(fits, "auto")
    assert found is not None
    assert found.weights == {"label": 0.3, "features": 0.7}
    on1, on0 = on.T
    assert torch.allclose(found.feedback, (on1 + on0).double(), atol=1e-5)
    assert torch.allclose(found.seen, (on1 / (on1 + on0)).double(), atol=1e-5)
    assert (found.shift, found.shift_stderr) == (0.4, 0.7)
    alone = replace(fits, fits={"two_stage": replace(fitted, figures={})})
    assert (one := explained(alone, "two_stage")) is not None
    assert one.weights == {"features": 1.0}
    assert explained(replace(fits, fits={"naive": replace(fitted, figures={})}), "naive") is None


def test_rates_have_the_ends_of_their_estimate_or_of_the_fit() -> None:
    world = draw_world("features", 2000, 9)
    found = fit_intervals(explanation(world, "features", 9), world.observations)
    assert found.rho_01 is not None
    noise = NoiseEstimate(GUESS, (0.1, 0.2), (0.05, 0.3), 40, 40)
    assert rate_ends(GUESS, noise, found)["rho_01"] == {"estimate": 0.15, "low": 0.1, "high": 0.2}
    assert rate_ends(GUESS, None, found)["rho_01"] == {"estimate": 0.15, "low": found.rho_01.low, "high": found.rho_01.high}
    assert rate_ends(GUESS, None, None)["rho_10"] == {"estimate": 0.15, "low": None, "high": None}


def test_rates_are_drawn_from_their_intervals() -> None:
    generator = torch.Generator().manual_seed(0)
    ends = {"rho_01": {"low": 0.1, "high": 0.3}, "rho_10": {"low": None, "high": None}}
    drawn = draw_rates(NoiseRates(0.2, 0.1), ends, 20_000, generator)
    outside = sum(not 0.1 <= one.rho_01 <= 0.3 for one in drawn) / len(drawn)
    assert outside == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / 20_000))
    assert {one.rho_10 for one in drawn} == {0.1}
    wide = {name: {"low": 0.1, "high": 0.95} for name in ("rho_01", "rho_10")}
    assert all(one.rho_01 + one.rho_10 < 1 for one in draw_rates(NoiseRates(0.2, 0.1), wide, 1000, generator))
