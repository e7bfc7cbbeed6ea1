"""Formulas of learning from noisy labels: hand numbers, naive float64 loops, and what must hold whatever the numbers are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from causalrm_ray.losses import label_noise
from causalrm_ray.losses.pointwise import bce, mse
from causalrm_ray.types import NoiseRates

LOGIT = torch.tensor([0.7, -0.4, -1.3, 2.0], dtype=torch.float64)
R = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
PROB = torch.sigmoid(LOGIT)
RATES = NoiseRates(0.2, 0.1)


def naive(row_of) -> Tensor:
    """`row_of(p, r)` of each row in Python floats."""
    return torch.tensor([row_of(1 / (1 + math.exp(-s)), r) for s, r in zip(LOGIT.tolist(), R.tolist(), strict=True)]).double()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-6, atol=1e-7)


def test_forward_logit_is_the_noise_channel() -> None:
    close(torch.sigmoid(label_noise.forward_logit(LOGIT, RATES)), naive(lambda p, r: 0.8 * p + 0.1 * (1 - p)))


def test_forward_logit_is_the_logit_itself_if_noise_free_and_finite_at_the_ends() -> None:
    extreme = torch.tensor([-80.0, 0.0, 80.0], requires_grad=True)
    close(label_noise.forward_logit(extreme, NoiseRates(0.0, 0.0)), extreme)
    for rates in (NoiseRates(0.0, 0.0), NoiseRates(0.3, 0.0), RATES):
        (gradient,) = torch.autograd.grad(label_noise.forward_logit(extreme, rates).sum(), extreme)
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("loss", [bce, mse], ids=lambda loss: loss.__name__)
def test_forward_corrected_loss_is_least_at_the_true_probability(loss) -> None:
    logit = torch.linspace(-4, 4, 801, dtype=torch.float64)
    liked = 0.8 * 0.3 + 0.1 * 0.7  # P(r = 1) where P(r* = 1) is 0.3
    corrected = label_noise.forward_logit(logit, RATES)
    expected = liked * loss(corrected, torch.ones_like(logit)) + (1 - liked) * loss(corrected, torch.zeros_like(logit))
    assert float(torch.sigmoid(logit[expected.argmin()])) == pytest.approx(0.3, abs=0.002)


def test_noise_level_is_the_share_of_flips() -> None:
    liked = 0.77 * 0.8 + 0.23 * 0.1  # of labels, 77 % of which were likes before the flips
    assert label_noise.noise_level(liked, RATES) == pytest.approx(0.77 * 0.2 + 0.23 * 0.1)
    assert label_noise.noise_level(0.0, RATES) == pytest.approx(0.1)  # cut: no clean share below 0
    assert label_noise.noise_level(1.0, RATES) == pytest.approx(0.2)


def test_forget_rate_rises_in_a_line_and_stays() -> None:
    assert [label_noise.forget_rate(epoch, 0.2, 4) for epoch in (1, 2, 4, 9)] == pytest.approx([0.05, 0.1, 0.2, 0.2])


def test_small_loss_keeps_the_lowest_and_at_least_one() -> None:
    score = torch.tensor([3.0, 1.0, 1.0, 2.0, 5.0])
    assert label_noise.small_loss(score, 0.4).tolist() == [0, 1, 1, 1, 0]
    assert label_noise.small_loss(score, 0.0).tolist() == [1] * 5
    assert label_noise.small_loss(score, 0.99).tolist() == [0, 1, 0, 0, 0]  # of equal ones the earlier
    assert int(label_noise.small_loss(torch.arange(10.0), 0.3).sum()) == 7  # 0.7 * 10 in floats is below 7


def test_jensen_shannon_is_half_the_divergences_from_the_middle() -> None:
    def kl(a: float, b: float) -> float:
        return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))

    other = LOGIT.flip(0)
    pairs = zip(torch.sigmoid(LOGIT).tolist(), torch.sigmoid(other).tolist(), strict=True)
    expected = [(kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2 for p, q in pairs]
    close(label_noise.jensen_shannon(LOGIT, other), torch.tensor(expected))
    ends = label_noise.jensen_shannon(torch.tensor([200.0, 1.0]), torch.tensor([-200.0, 1.0]))
    close(ends, torch.tensor([math.log(2), 0.0]))


def test_fluctuation_counts_changes_of_the_predicted_class() -> None:
    predicted = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    close(label_noise.fluctuation(predicted), torch.tensor([1 / 3, 1.0, 0.0]))


def test_eps_cross_entropy_draws_to_the_larger_class() -> None:
    def row(p: float, r: float) -> float:
        both = [1 - p, p]
        both[int(p > 0.5)] += 9.0
        return -math.log(both[int(r)] / 10.0)

    close(label_noise.eps_cross_entropy(LOGIT, R, 9.0), naive(row))
    close(label_noise.eps_cross_entropy(LOGIT, R, 0.0), bce(LOGIT, R))
    zero = torch.zeros(2, dtype=torch.float64)  # a tie goes to class 0; of log(10) - log(9.5) float32 keeps six digits only
    expected = torch.tensor([-math.log(0.95), -math.log(0.05)], dtype=torch.float64)
    close(label_noise.eps_cross_entropy(zero, torch.tensor([0.0, 1.0]), 9.0), expected)


def test_absolute_error_is_symmetric() -> None:
    close(label_noise.absolute_error(LOGIT, R), naive(lambda p, r: 1 - p if r else p))
    close(label_noise.absolute_error(LOGIT, R) + label_noise.absolute_error(LOGIT, 1 - R), torch.ones(4))


def test_class_correlation_and_label_distribution_match_a_loop() -> None:
    both = [[1 - p, p] for p in PROB.tolist()]
    matrix = [[sum(row[j] * row[k] for row in both) for k in range(2)] for j in range(2)]
    matrix = [[value / sum(line) for value in line] for line in matrix]
    correlation = label_noise.class_correlation(PROB)
    close(correlation, torch.tensor(matrix))
    raised = [[math.exp(sum(matrix[j][k] * row[k] for k in range(2)) / 3.0) for j in range(2)] for row in both]
    expected = torch.tensor([[value / sum(line) for value in line] for line in raised])
    close(label_noise.label_distribution(PROB, correlation, 3.0), expected)


def test_agreement_penalty_is_the_log_of_disagreement() -> None:
    distribution = torch.tensor([[0.4, 0.6]]).repeat(4, 1).double()
    close(label_noise.agreement_penalty(PROB, distribution), naive(lambda p, r: math.log(1 - 0.4 * (1 - p) - 0.6 * p)))


def test_clean_posterior_separates_two_heaps() -> None:
    generator = torch.Generator().manual_seed(0)
    low, high = 0.3 + 0.05 * torch.randn(300, generator=generator), 1.6 + 0.1 * torch.randn(100, generator=generator)
    clean = label_noise.clean_posterior(torch.cat([high, low]))
    assert bool((clean[:100] < 0.01).all())
    assert bool((clean[100:] > 0.99).all())
    assert label_noise.clean_posterior(torch.full((3,), 0.7)).tolist() == [1, 1, 1]
    assert label_noise.clean_posterior(torch.tensor([0.7])).tolist() == [1]


def test_clean_posterior_is_invariant_to_the_unit_of_loss() -> None:
    loss = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    close(label_noise.clean_posterior(7 * loss + 3), label_noise.clean_posterior(loss))


def test_sharpen_and_co_refined_by_hand() -> None:
    close(label_noise.sharpen(torch.tensor([0.8, 0.5, 0.0]), 0.5), torch.tensor([0.64 / 0.68, 0.5, 0.0]))
    r, prob, clean = torch.tensor([1.0, 1.0]), torch.tensor([0.2, 0.2]), torch.tensor([1.0, 0.75])
    close(label_noise.co_refined(r, prob, clean, 1.0), torch.tensor([1.0, 0.8]))
    close(label_noise.co_refined(r, prob, clean, 0.5), torch.tensor([1.0, 0.64 / 0.68]))


def test_balance_penalty_is_zero_where_both_classes_are_predicted_alike() -> None:
    close(label_noise.balance_penalty(torch.tensor([0.9, 0.1])), torch.tensor(0.0))
    close(
        label_noise.balance_penalty(torch.tensor([0.8, 0.7])),
        torch.tensor(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)),
    )
    assert bool(torch.isfinite(label_noise.balance_penalty(torch.ones(3))))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"liked must be in \[0, 1\], got 1.5"):
        label_noise.noise_level(1.5, RATES)
    with pytest.raises(ValueError, match=r"epoch and ramp must be at least 1 and level in .* got 0, 3 and 0.1"):
        label_noise.forget_rate(0, 0.1, 3)
    with pytest.raises(ValueError, match=r"dropped must be in \[0, 1\), got 1.0"):
        label_noise.small_loss(torch.ones(2), 1.0)
    with pytest.raises(ValueError, match="score must be finite, got nan at position 1"):
        label_noise.small_loss(torch.tensor([0.0, math.nan]), 0.1)
    with pytest.raises(ValueError, match=r"two epochs or more, got shape \(1, 3\)"):
        label_noise.fluctuation(torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="m must be at least 0, got -1"):
        label_noise.eps_cross_entropy(LOGIT, R, -1)
    with pytest.raises(ValueError, match=r"r must be 0 or 1, got 0.5 at position 0"):
        label_noise.absolute_error(torch.zeros(1), torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"temperature must be in \(0, 1\], got 2"):
        label_noise.sharpen(PROB, 2)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        label_noise.label_distribution(PROB, torch.eye(2).double(), 0)
    with pytest.raises(ValueError, match=r"clean must be in \[0, 1\]"):
        label_noise.co_refined(R, PROB, 2 * torch.ones(4), 0.5)
    with pytest.raises(ValueError, match="rows must match"):
        label_noise.jensen_shannon(LOGIT, LOGIT[:2])
