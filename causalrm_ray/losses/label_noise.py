"""Formulas of the methods that learn from noisy labels of two classes: per-row vectors [N], the logit being that of class 1.

Everywhere `logit` [N] is a row's score, `prob` [N] in [0, 1] its P(class 1), `r` [N] in {0, 1} its noisy label. All raise
ValueError that names argument, rule and value. Nothing here subtracts an unbounded loss, so no risk made of these can fall
without end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from causalrm_ray.checks import check_binary, check_finite, check_same_length, check_unit_interval
from causalrm_ray.types import NoiseRates

VARIANCE_FLOOR = 5e-4  # of a mixture's component, on losses scaled to [0, 1]
EM_STEPS = 50


def forward_logit(logit: Tensor, rates: NoiseRates) -> Tensor:
    """The logit of P(r = 1 | x) that a logit of P(r* = 1 | x) implies, [N].

        q = (1 - rho_01) p + rho_10 (1 - p)

    Any loss of it on r is the forward correction; a proper one is least, in expectation over the noise, at the true p if the
    rates are right. Patrini et al. 2017 (arXiv 1609.03683), theorem 2.
    """
    log_p, log_not_p = functional.logsigmoid(logit), functional.logsigmoid(-logit)
    one = torch.logaddexp(log_p + math.log(1 - rates.rho_01), log_not_p + _log(rates.rho_10))
    zero = torch.logaddexp(log_p + _log(rates.rho_01), log_not_p + math.log(1 - rates.rho_10))
    return one - zero


def noise_level(liked: float, rates: NoiseRates) -> float:
    """Share of flipped labels where a share `liked` in [0, 1] of the noisy labels is 1.

    rho_01 q + rho_10 (1 - q),   q = (liked - rho_10) / (1 - rho_01 - rho_10), cut to [0, 1]
    """
    if not 0 <= liked <= 1:
        raise ValueError(f"liked must be in [0, 1], got {liked}")
    share = min(max((liked - rates.rho_10) / (1 - rates.rho_01 - rates.rho_10), 0.0), 1.0)
    return rates.rho_01 * share + rates.rho_10 * (1 - share)


def forget_rate(epoch: int, level: float, ramp: int) -> float:
    """Share of a batch's rows that co-teaching drops in an epoch, in [0, level].

        level min(epoch / ramp, 1)

    `epoch` >= 1; `level` in [0, 1), the share of wrong labels; `ramp` >= 1, the epochs until all of them are dropped. Han et al.
    2018 (arXiv 1804.06872).
    """
    if epoch < 1 or ramp < 1 or not 0 <= level < 1:
        raise ValueError(f"epoch and ramp must be at least 1 and level in [0, 1), got {epoch}, {ramp} and {level}")
    return level * min(epoch / ramp, 1.0)


def small_loss(score: Tensor, dropped: float) -> Tensor:
    """1 for the rows of lowest `score` [N] and 0 for a share `dropped` in [0, 1) of them, [N]; one row at least is kept.

    Of equal scores the earlier rows are kept. Han et al. 2018, algorithm 1.
    """
    if not 0 <= dropped < 1:
        raise ValueError(f"dropped must be in [0, 1), got {dropped}")
    check_finite("score", score)
    kept = max(1, math.floor((1 - dropped) * len(score) + 1e-9))
    mask = torch.zeros_like(score)
    mask[score.argsort(stable=True)[:kept]] = 1
    return mask


def jensen_shannon(logit: Tensor, other: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two predictions of two classes, nats, [N] in [0, ln 2].

        H((p + q) / 2) - (H(p) + H(q)) / 2

    The discrepancy of CoDis: rows are chosen by low loss - weight * divergence. Xia et al. 2023 (ICCV).
    """
    check_same_length(logit=logit, other=other)
    p, q = torch.sigmoid(logit), torch.sigmoid(other)
    return (_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2).clamp(0, math.log(2))


def fluctuation(predicted_TN: Tensor) -> Tensor:
    """Share of the last T - 1 epochs in which a row's predicted class changed, [N] in [0, 1].

    `predicted_TN` [T, N] bool, T >= 2, an epoch a line. Its mean over the rows is the moving average of Label Wave's prediction
    changes, as a share of the rows. Yuan et al. 2024 (arXiv 2502.07551).
    """
    if predicted_TN.ndim != 2 or len(predicted_TN) < 2:
        raise ValueError(f"predicted must be [T, N] of two epochs or more, got shape {tuple(predicted_TN.shape)}")
    return (predicted_TN[1:] != predicted_TN[:-1]).float().mean(dim=0)


def eps_cross_entropy(logit: Tensor, r: Tensor, m: float) -> Tensor:
    """Cross-entropy of a softmax drawn to a corner, [N] >= 0.

        -log u_r,   u = (p + m e_top) / (1 + m)

    p are the two classes' probabilities, e_top is 1 at the larger (class 0 where they are equal); `m` >= 0 is how far it is
    drawn; at 0 this is cross-entropy. Wang et al. 2024 (NeurIPS), "epsilon-softmax: approximating one-hot vectors for mitigating
    label noise".
    """
    check_same_length(logit=logit, r=r)
    check_binary("r", r)
    if m < 0:
        raise ValueError(f"m must be at least 0, got {m}")
    log_p = functional.logsigmoid(torch.where(r == 1, logit, -logit))
    right = (logit > 0) == (r == 1)
    return math.log1p(m) - torch.where(right, (log_p.exp() + m).log(), log_p) if m > 0 else -log_p


def absolute_error(logit: Tensor, r: Tensor) -> Tensor:
    """1 - p_r, half the L1 distance of the prediction to the label's corner, [N] in [0, 1]: symmetric, as Ghosh et al. 2017."""
    check_same_length(logit=logit, r=r)
    check_binary("r", r)
    return torch.sigmoid(torch.where(r == 1, -logit, logit))


def class_correlation(prob: Tensor) -> Tensor:
    """How far two classes are taken for one another in a batch, [2, 2], each line of sum 1.

        M_jk = sum over i of P_ij P_ik / sum over k,   P_i = (1 - p_i, p_i)

    ILDE's stand-in for the matrix of flips. Liao et al. 2024 (IJCV, arXiv 2212.08380).
    """
    check_unit_interval("prob", prob)
    both = torch.stack([1 - prob, prob], dim=1)
    return functional.normalize(both.T @ both, p=1, dim=1)


def label_distribution(prob: Tensor, correlation: Tensor, temperature: float) -> Tensor:
    """ILDE's estimate of each row's distribution over the classes, [N, 2], each line of sum 1.

        softmax(M P_i / temperature)

    `correlation` [2, 2] is M, of `class_correlation`; `temperature` > 0. Liao et al. 2024.
    """
    check_unit_interval("prob", prob)
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return torch.softmax(torch.stack([1 - prob, prob], dim=1) @ correlation.T / temperature, dim=1)


def agreement_penalty(prob: Tensor, distribution: Tensor) -> Tensor:
    """log(1 - <t_i, P_i>), [N] <= 0: the lower, the more a prediction leans to where its distribution does.

    `prob` [N] in [0, 1); `distribution` [N, 2] is t, each line >= 0 and of sum 1 or less, drawn to the middle so that the inner
    product stays below 1. Liu et al. 2020 (arXiv 2007.00151), as ILDE uses it.
    """
    check_same_length(prob=prob, distribution=distribution)
    inner = distribution[:, 0] * (1 - prob) + distribution[:, 1] * prob
    return torch.log1p(-inner)


def clean_posterior(loss: Tensor) -> Tensor:
    """Chance that a row's label is clean: that its loss is of the lower of two Gaussians fitted to all losses, [N] in [0, 1].

    Losses are scaled to [0, 1]; expectation-maximisation starts from their ends. Equal losses: all clean. `loss` [N]
    finite, N >= 1. Li et al. 2020 (DivideMix, arXiv 2002.07394).
    """
    check_finite("loss", loss)
    low, high = loss.min(), loss.max()
    if bool(high - low <= 0):
        return torch.ones_like(loss)
    x = ((loss - low) / (high - low)).double()[:, None]
    mean, share = x.new_tensor([0.0, 1.0]), x.new_tensor([0.5, 0.5])
    variance = x.var(correction=0).clamp(min=VARIANCE_FLOOR).repeat(2)
    posterior = x.new_zeros(len(x), 2)
    for _ in range(EM_STEPS):
        posterior = torch.softmax(share.log() - 0.5 * variance.log() - (x - mean).square() / (2 * variance), dim=1)
        mass = posterior.sum(dim=0).clamp(min=1e-9)
        share, mean = mass / mass.sum(), (posterior * x).sum(dim=0) / mass
        variance = ((posterior * (x - mean).square()).sum(dim=0) / mass).clamp(min=VARIANCE_FLOOR)
    return posterior[:, int(mean.argmin())].to(loss.dtype)


def sharpen(prob: Tensor, temperature: float) -> Tensor:
    """p^(1/T) / (p^(1/T) + (1 - p)^(1/T)), [N] in [0, 1]; T in (0, 1] draws from the middle. Li et al. 2020."""
    check_unit_interval("prob", prob)
    if not 0 < temperature <= 1:
        raise ValueError(f"temperature must be in (0, 1], got {temperature}")
    one, zero = prob ** (1 / temperature), (1 - prob) ** (1 / temperature)
    return one / (one + zero)


def co_refined(r: Tensor, prob: Tensor, clean: Tensor, temperature: float) -> Tensor:
    """Label of a row that is kept: sharpen(w r + (1 - w) p), [N] in [0, 1]; w = `clean` [N] in [0, 1]. Li et al. 2020."""
    check_same_length(r=r, prob=prob, clean=clean)
    check_unit_interval("clean", clean)
    return sharpen(clean * r + (1 - clean) * prob, temperature)


def balance_penalty(prob: Tensor) -> Tensor:
    """KL(uniform || mean prediction) of a batch [N], nats, a scalar >= 0: both classes are to be predicted. Li et al. 2020.

    `prob` in (0, 1); its mean is kept 1e-6 from the ends.
    """
    mean = prob.mean().clamp(1e-6, 1 - 1e-6)
    return -math.log(2) - (mean.log() + (1 - mean).log()) / 2


def _entropy(prob: Tensor) -> Tensor:
    return torch.special.entr(prob) + torch.special.entr(1 - prob)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
