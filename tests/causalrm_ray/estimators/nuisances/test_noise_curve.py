"""The curve of labels along ranks: its derivatives, its maximum, its bins."""

from __future__ import annotations

import torch

from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.nuisances.noise_curve import (
    BINS,
    BUNCHES,
    CENTRE,
    PRECISION,
    evidence_of_flat_ends,
    fit_curves,
    log_likelihood,
    rank_feedback,
    resample,
    sureness,
)

THETA = torch.tensor([[-2.2, -1.4, 0.3, 1.0, 1.4, 0.2]], dtype=torch.float64)  # rho_10 0.1, rho_01 0.2


def expected_counts(theta: torch.Tensor, rows: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal scores [B], and the counts [1, B, 2] that the curve expects in bins of `rows` rows."""
    score = torch.special.ndtri((torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS)
    low, high = torch.sigmoid(theta[:, :1]), 1 - torch.sigmoid(theta[:, 1:2])
    liked = rows * (low + (high - low) * sureness(theta, score))
    return score, torch.stack([rows - liked, liked], -1)


def test_the_fitted_curve_is_the_maximum() -> None:
    """By autograd of the likelihood and prior, at the fit: no derivative of its own formulas is used."""
    score, counts = expected_counts(THETA, 100.0)
    theta = fit_curves(score, counts).requires_grad_()
    value = log_likelihood(theta, score, counts) - ((theta - CENTRE).square() * PRECISION).sum(1) / 2
    (gradient,) = torch.autograd.grad(value.sum(), theta)
    assert gradient.abs().max() < 1e-3


def test_much_data_bring_back_the_curve_that_made_them() -> None:
    score, counts = expected_counts(THETA, 1e5)
    torch.testing.assert_close(fit_curves(score, counts), THETA, atol=0.01, rtol=0.0)


def test_many_fits_at_once_equal_each_alone() -> None:
    score, counts = expected_counts(THETA, 30.0)
    drawn = resample(counts[0], 5, seed=0)
    together = fit_curves(score, drawn, THETA)
    alone = torch.cat([fit_curves(score, one[None], THETA) for one in drawn])
    torch.testing.assert_close(together, alone)


def test_resamples_are_poisson_counts() -> None:
    drawn = resample(torch.tensor([4.0, 100.0], dtype=torch.float64), 20000, seed=0)
    standard_error = torch.tensor([4.0, 100.0], dtype=torch.float64).sqrt() / 20000**0.5
    assert ((drawn.mean(0) - torch.tensor([4.0, 100.0])).abs() < 3 * standard_error).all()
    # Var of a sample variance of Poisson(m) is about (m + 2 m^2) / n.
    m = torch.tensor([4.0, 100.0], dtype=torch.float64)
    assert ((drawn.var(0) - m).abs() < 3 * ((m + 2 * m * m) / 20000).sqrt()).all()


def test_resamples_of_clusters_vary_as_the_clusters_are_many() -> None:
    """Each row five times, as a cluster: a share varies as that of a fifth of the rows; also where bunches of them are drawn."""
    for number in (400, 5 * BUNCHES):
        cell = (torch.arange(number) % 4 == 0).long().repeat_interleave(5)
        cluster = torch.arange(number).repeat_interleave(5) * 31
        counts = torch.bincount(cell).double()
        drawn = resample(counts, 4000, 0, cell, cluster)
        assert drawn.shape == (4000, 2)
        share = drawn[:, 1] / drawn.sum(1)
        variance = 0.25 * 0.75 / number
        assert abs(float(share.mean()) - 0.25) < 4 * (variance / 4000) ** 0.5
        assert abs(float(share.var()) / variance - 1) < 0.15
        assert abs(float(drawn.sum(1).mean()) / float(counts.sum()) - 1) < 0.01


def test_ends_that_still_rise_have_no_evidence_of_being_flat() -> None:
    rising = torch.tensor([[-2.2, -1.4, 0.0, -0.5, -0.5, 0.0]], dtype=torch.float64)
    for theta, flat in ((THETA, True), (rising, False)):
        score, counts = expected_counts(theta, 50.0)
        top, bottom = evidence_of_flat_ends(fit_curves(score, counts), score, counts)
        assert (top > 2) is flat
        assert (bottom > 2) is flat


def test_ranks_are_of_rows_with_feedback_and_ties_stay_together() -> None:
    prob = torch.tensor([0.9, 0.1, 0.5, 0.5, 0.7, 0.2])
    log = Observations(torch.tensor([1.0, 1, 1, 1, 0, 1]), torch.tensor([1.0, 0, 1, 0, 0, 0]))
    ranks = rank_feedback(prob, log)
    assert ranks.rows.tolist() == [0, 1, 2, 3, 5]
    assert ranks.bins.tolist() == [3, 0, 2, 2, 1]
    torch.testing.assert_close(torch.special.ndtr(ranks.score), torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64))
    assert ranks.counts(log.r[ranks.rows].long(), 2).tolist() == [[1, 0], [1, 0], [1, 1], [0, 1]]
