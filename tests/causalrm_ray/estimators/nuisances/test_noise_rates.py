"""Noise rates: right where sure rows exist, with honest intervals, and a warning or an error where nothing can be learned."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.nuisances.noise_rates import anchors, estimate_noise_rates, noise_rates_by, shrink
from causalrm_ray.estimators.studies.noise_study import simulate_feedback, study
from causalrm_ray.types import NoiseRates

TRUTH = NoiseRates(0.2, 0.1)


def world(seed: int, rows: int = 6000) -> tuple[Tensor, Observations]:
    """P(r = 1 | x) of rows of which a quarter are surely liked and a quarter surely disliked, and feedback on a fifth of them."""
    generator = torch.Generator().manual_seed(seed)
    liked = (torch.rand(rows, generator=generator) * 2 - 0.5).clamp(0, 1)
    prob = liked * (1 - TRUTH.rho_01) + (1 - liked) * TRUTH.rho_10
    jitter = 1e-4 * torch.rand(rows, generator=generator)
    r = (torch.rand(rows, generator=generator) < prob).float()
    return (prob + jitter).double(), Observations((torch.rand(rows, generator=generator) < 0.2).float(), r)


def test_published_anchors_are_quantiles() -> None:
    rates = anchors(torch.linspace(0.1, 0.8, 101))
    assert rates.rho_01 == pytest.approx(1 - (0.8 - 0.03 * 0.7))
    assert rates.rho_10 == pytest.approx(0.1 + 0.03 * 0.7)


def test_both_recover_the_rates_where_anchors_exist() -> None:
    prob, observations = world(0)
    published = anchors(prob)
    assert published.rho_01 == pytest.approx(TRUTH.rho_01, abs=1e-3)
    assert published.rho_10 == pytest.approx(TRUTH.rho_10, abs=1e-3)
    estimate = estimate_noise_rates(prob, observations)
    for rate, truth, rows in (
        (estimate.rates.rho_01, TRUTH.rho_01, estimate.rho_01_anchors),
        (estimate.rates.rho_10, TRUTH.rho_10, estimate.rho_10_anchors),
    ):
        assert abs(rate - truth) < 3 * math.sqrt(truth * (1 - truth) / rows)


def test_estimates_are_close_and_intervals_cover_the_truth_with_a_noisy_out_of_fold_proxy() -> None:
    """A binomial over both rates of all simulations: 3 standard errors around 95 %; the errors' means within what 0.03 allows."""
    simulations = 50
    found = [study("features", 6000, rates, simulations, draws=150) for rates in (TRUTH, NoiseRates(0.1, 0.2))]
    hits = [share for result in found for share in result.coverage]
    assert abs(sum(hits) / len(hits) - 0.95) < 3 * math.sqrt(0.95 * 0.05 / (len(hits) * simulations))
    assert max(error for result in found for error in result.mean_error) < 0.03
    for result in found:
        for bias, width in zip(result.bias, result.width, strict=True):
            assert abs(bias) < 3 * (width / 2 / 1.96) / math.sqrt(simulations) + 0.003


def test_a_curve_beats_the_plain_share_of_contradictions_among_the_extremes() -> None:
    squares = torch.zeros(2)
    for seed in range(15):
        prob, log = simulate_feedback("features", 6000, TRUTH, seed)
        tenth = prob >= torch.quantile(prob, 0.9)
        plain = 1 - float(log.r[tenth & (log.o == 1)].mean())
        ours = estimate_noise_rates(prob, log, draws=10).rates.rho_01
        squares += torch.tensor([ours - TRUTH.rho_01, plain - TRUTH.rho_01]).square()
    assert squares[0] < squares[1] / 2


def test_warnings_where_labels_never_settle_and_none_where_they_do() -> None:
    good = [estimate_noise_rates(*simulate_feedback("features", 20000, TRUTH, seed), draws=100) for seed in range(5)]
    assert [estimate.warnings for estimate in good] == [()] * 5
    weak = [estimate_noise_rates(*simulate_feedback("weak", 20000, TRUTH, seed), draws=100) for seed in range(5)]
    texts = [" ".join(estimate.warnings) for estimate in weak]
    assert sum("end labels need not have settled" in text for text in texts) >= 4
    few = estimate_noise_rates(*simulate_feedback("features", 1200, TRUTH, 0), draws=100)
    assert any("too few rows" in text for text in few.warnings)


def test_an_underconfident_proxy_inflates_published_anchors_and_not_ours() -> None:
    prob, observations = world(1)
    shy = 0.5 + 0.25 * (prob - 0.5)
    assert anchors(shy).rho_01 > TRUTH.rho_01 + 0.1
    assert anchors(shy).rho_10 > TRUTH.rho_10 + 0.1
    assert estimate_noise_rates(shy, observations) == estimate_noise_rates(prob, observations)


def grouped(sizes: dict[str, tuple[int, NoiseRates]]) -> tuple[Tensor, Observations, Tensor]:
    """A log of "ramp" rows whose rates depend on the group."""
    parts = [simulate_feedback("ramp", rows, rates, seed) for seed, (rows, rates) in enumerate(sizes.values())]
    o, r = (torch.cat([getattr(log, name) for _, log in parts]) for name in ("o", "r"))
    groups = torch.cat([torch.full((rows,), number) for number, (rows, _) in enumerate(sizes.values())])
    return torch.cat([prob for prob, _ in parts]), Observations(o, r), groups


def test_groups_have_rates_of_their_own_and_small_ones_borrow() -> None:
    sizes = {
        "web": (12000, NoiseRates(0.1, 0.3)),
        "phone": (12000, NoiseRates(0.3, 0.1)),
        "mail": (12000, NoiseRates(0.2, 0.05)),
        "watch": (100, NoiseRates(0.2, 0.1)),
    }
    found = noise_rates_by(*grouped(sizes), list(sizes), draws=200)
    assert list(found) == list(sizes)
    for name, (_, truth) in list(sizes.items())[:3]:
        estimate = found[name]
        assert abs(estimate.rates.rho_01 - truth.rho_01) < 3 * math.sqrt(truth.rho_01 * (1 - truth.rho_01) / 500)
        assert abs(estimate.rates.rho_10 - truth.rho_10) < 3 * math.sqrt(truth.rho_10 * (1 - truth.rho_10) / 500)
        assert estimate.warnings == ()
    own = [found[name].rates.rho_01 for name in ("web", "phone", "mail")]
    assert min(own) < found["watch"].rates.rho_01 < max(own)
    assert found["watch"].warnings[0].startswith("too few rows for rates of its own (")
    low, high = found["watch"].rho_01_interval
    assert low < min(own)  # as wide as the groups differ
    assert high > max(own)


def test_groups_that_do_not_differ_share_what_they_know_and_say_so() -> None:
    sizes = dict.fromkeys("abcd", (1500, TRUTH))
    prob, log, groups = grouped(sizes)
    found = noise_rates_by(prob, log, groups, list(sizes), draws=200)
    alone = estimate_noise_rates(prob[groups == 0], Observations(log.o[groups == 0], log.r[groups == 0]), draws=200)
    for name in ("rho_01_interval", "rho_10_interval"):
        (low, high), (low_alone, high_alone) = getattr(found["a"], name), getattr(alone, name)
        assert high - low < 0.9 * (high_alone - low_alone)
    assert any("from the group's own" in text for text in found["a"].warnings)


def test_shrinkage_is_the_posterior_by_plain_quadrature() -> None:
    """Sums over a grid of (t, mean); given both, a group's posterior is that of two normal opinions."""
    values, errors = [-1.6, -1.0, -2.2], [0.2, 0.4, 0.3]
    total = first = second = 0.0
    for t in (1.5 * (k + 0.5) / 60 for k in range(60)):
        for mean in (-4 + 6 * (k + 0.5) / 240 for k in range(240)):
            weight = 1.0
            for value, error in zip(values, errors, strict=True):
                variance = error**2 + t**2
                weight *= math.exp(-((value - mean) ** 2) / variance / 2) / math.sqrt(variance)
            precision = 1 / errors[1] ** 2 + 1 / t**2
            centre = (values[1] / errors[1] ** 2 + mean / t**2) / precision
            total, first = total + weight, first + weight * centre
            second += weight * (1 / precision + centre**2)
    columns = [torch.tensor(numbers, dtype=torch.float64)[:, None] for numbers in (values, errors)]
    value, error, own, mean, unknown = shrink(*columns)
    assert float(value[1]) == pytest.approx(first / total, abs=0.005)
    assert float(error[1]) == pytest.approx(math.sqrt(second / total - (first / total) ** 2), abs=0.005)
    assert own[0] > own[2] > own[1]  # the surer, the more its own
    assert float(unknown) > float(error.max())
    assert min(values) < float(mean) < max(values)


def test_estimate_is_deterministic_given_the_seed() -> None:
    prob, observations = world(2)
    assert estimate_noise_rates(prob, observations, seed=1) == estimate_noise_rates(prob, observations, seed=1)


def test_what_cannot_be_estimated_is_named() -> None:
    prob, observations = world(3)
    with pytest.raises(ValueError, match=r"rho_01 \+ rho_10 must be below 1, got estimates of 0.5000 \+ 0.5000: .* reward.rho="):
        anchors(torch.full((50,), 0.5))
    with pytest.raises(ValueError, match=r"^noise rates: rho_01 \+ rho_10 must be below 1, got .* \(reward.noise_rates="):
        estimate_noise_rates(torch.full_like(prob, 0.5), observations)
    few = Observations((torch.arange(len(prob)) < 20).float(), observations.r)
    with pytest.raises(ValueError, match=r"anchors: the (top|bottom) 30% must hold 10 rows with feedback, got"):
        estimate_noise_rates(prob, few)
    with pytest.raises(ValueError, match="draws must be at least 2, got 1"):
        estimate_noise_rates(prob, observations, draws=1)
    with pytest.raises(ValueError, match=r"groups must be in 0..0, got 0..1"):
        noise_rates_by(prob, observations, torch.arange(len(prob)) % 2, ["only"])
    with pytest.raises(ValueError, match="prob must be finite, got nan at position 0"):
        anchors(torch.tensor([math.nan, 0.5]))


def test_a_rate_of_zero_has_an_interval_and_groups_bear_it() -> None:
    generator = torch.Generator().manual_seed(0)
    prob = torch.linspace(0.01, 0.99, 4000)
    liked = (prob > 0.5).float()
    flipped = liked * (torch.rand(4000, generator=generator) < 0.2)
    observations = Observations(torch.ones(4000), liked - flipped)
    whole = estimate_noise_rates(prob, observations)
    low, high = whole.rho_10_interval
    assert 0 <= low < whole.rates.rho_10 < 0.003 < high < 0.05  # none in 2,000 leaves 0.0018 possible
    groups = noise_rates_by(prob, observations, torch.arange(4000) % 2, ("a", "b"))
    assert all(math.isfinite(end) for one in groups.values() for end in (*one.rho_10_interval, one.rates.rho_10))
