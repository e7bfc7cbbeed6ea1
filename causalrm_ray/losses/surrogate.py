"""Losses corrected for label noise: their mean over the noise is the loss on the true label."""

from __future__ import annotations

import torch
from torch import Tensor

from causalrm_ray.checks import check_binary, check_same_length
from causalrm_ray.losses.pointwise import Loss
from causalrm_ray.types import NoiseRates


def surrogate(loss: Loss, logit: Tensor, r: Tensor, rates: NoiseRates) -> Tensor:
    """The noise-aware surrogate of a pointwise loss.

        l~(s, 1) = [(1 - rho_10) l(s, 1) - rho_01 l(s, 0)] / (1 - rho_01 - rho_10)
        l~(s, 0) = [(1 - rho_01) l(s, 0) - rho_10 l(s, 1)] / (1 - rho_01 - rho_10)

    Unbiased where the rates are right: E[l~(s, r) | r*] = l(s, r*). Not bounded below, so a fit on it needs early stopping.
    `logit` [N]; `r` [N] in {0, 1}, the noisy feedback. Returns [N]. arXiv 2603.18736, after Natarajan et al. 2013, lemma 1.
    Raises ValueError for other rows or labels; NoiseRates itself refuses rates that sum to 1 or more.
    """
    check_same_length(logit=logit, r=r)
    check_binary("r", r)
    like, dislike = loss(logit, torch.ones_like(logit)), loss(logit, torch.zeros_like(logit))
    if_one = (1 - rates.rho_10) * like - rates.rho_01 * dislike
    if_zero = (1 - rates.rho_01) * dislike - rates.rho_10 * like
    return torch.where(r == 1, if_one, if_zero) / (1 - rates.rho_01 - rates.rho_10)


def denoise(prob: Tensor, rates: NoiseRates) -> Tensor:
    """P(r*=1 | x) from P(r=1 | x): the noise channel inverted, cut to [0, 1].

        m = (P(r=1 | x) - rho_10) / (1 - rho_01 - rho_10)

    `prob` [N] in [0, 1]. Returns [N] in [0, 1].
    """
    return invert(prob, rates).clamp(0, 1)


def invert(value: Tensor, rates: NoiseRates) -> Tensor:
    """The noise channel inverted, (value - rho_10) / (1 - rho_01 - rho_10), of probabilities or labels; may leave [0, 1]."""
    return (value - rates.rho_10) / (1 - rates.rho_01 - rates.rho_10)
