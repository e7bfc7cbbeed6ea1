"""How far an estimate over all impressions moves if what it takes for granted is wrong: the rates, the propensity.

Everything here is about the self-normalised mean of a label over the rows with feedback, sum w y / sum w with w = 1 / p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from causalrm_ray.checks import check_binary, check_finite, check_propensity, check_same_length
from causalrm_ray.losses.surrogate import invert
from causalrm_ray.types import NoiseRates


def corrected_label(r: Tensor, rates: NoiseRates) -> Tensor:
    """Feedback whose mean over the label noise is the preference.

        y = (r - rho_10) / (1 - rho_01 - rho_10),   E[y | r*] = r*

    `r` [N] in {0, 1}. Returns [N] in double precision, outside [0, 1] wherever a rate is above 0; a mean of it that is outside
    contradicts the rates. Natarajan et al. 2013 (lemma 1, for the loss l(s, r) = r).
    """
    check_binary("r", r)
    return invert(r.double(), rates)


def hidden_selection_weights(propensity: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest weight 1 / P(o=1 | x, r*) of each row, [G, N], where an opinion may move the odds of feedback.

        1 + (1/p - 1) / Gamma  <=  w  <=  1 + (1/p - 1) Gamma

    The true odds lie within a factor [1/Gamma, Gamma] of those of `propensity` [N] in (0, 1]; `gamma` [G] >= 1, and 1 is no
    hidden selection. Marginal sensitivity model, Tan 2006; Zhao, Small and Bhattacharya 2019 (J. R. Stat. Soc. B 81).
    """
    check_propensity("propensity", propensity)
    check_finite("gamma", gamma)
    if bool((gamma < 1).any()):
        raise ValueError(f"gamma must be at least 1, got {gamma.min().item():.6g}")
    odds = 1 / propensity.double() - 1
    factor = gamma.double().unsqueeze(-1)
    return 1 + odds / factor, 1 + odds * factor


def largest_mean(label: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Largest sum w y / sum w over all weights low <= w <= high, [...], exactly.

    A ratio of linear functions is largest at a corner, and there at one that gives `high` to all labels above some level and
    `low` to the rest: so N + 1 corners of 2^N are tried, by sums along the sorted labels. `label` [N], `low` and `high` [..., N]
    >= 0 with a positive sum; rows of one label may be given as one, with the sums of their bounds. The smallest mean is
    -largest_mean(-label, low, high).
    """
    check_same_length(label=label, low=low.movedim(-1, 0), high=high.movedim(-1, 0))
    check_finite("label", label)
    order = label.argsort(descending=True)
    y, low, high = label.double()[order], low[..., order], high[..., order]
    raised = high - low
    total = low.sum(-1, keepdim=True) + raised.cumsum(-1)
    summed = (low * y).sum(-1, keepdim=True) + (raised * y).cumsum(-1)
    none_raised = (low * y).sum(-1) / low.sum(-1)
    return torch.maximum((summed / total).amax(-1), none_raised)


def hidden_selection_bounds(label: Tensor, propensity: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds (low [G], high [G]) of the mean of `label` [N] over all impressions under hidden selection of strength `gamma` [G].

    All rows have feedback; `propensity` [N] as fitted. Exact for the self-normalised estimate (see largest_mean); at gamma = 1
    both are losses.reweighted.snips. Zhao et al. 2019, section 4.
    """
    check_same_length(label=label, propensity=propensity)
    if len(label) == 0:
        raise ValueError("label must hold at least one row with feedback, got none")
    low, high = hidden_selection_weights(propensity, gamma)
    return -largest_mean(-label, low, high), largest_mean(label, low, high)


def sign_change(label: Tensor, propensity: Tensor, top: Tensor, most: float = 100.0) -> float | None:
    """Gamma from which the mean of `label` over the rows `top` need no longer be above that over the others.

    The least strength of hidden selection that could have made the contrast: 1 if there is none, None if not even `most` could.
    `label`, `propensity`, `top` (a mask) [N]; all rows have feedback, and both groups hold some (else ValueError). To 1e-6 of it.
    """
    check_same_length(label=label, propensity=propensity, top=top)
    if not bool(top.any()) or bool(top.all()):
        raise ValueError(f"top must hold some rows and leave some, got {int(top.sum())} of {len(top)}")

    def supported(gamma: float) -> bool:
        factor = torch.tensor([gamma])
        least, _ = hidden_selection_bounds(label[top], propensity[top], factor)
        _, most_below = hidden_selection_bounds(label[~top], propensity[~top], factor)
        return bool(least > most_below)

    if not supported(1.0):
        return 1.0
    if supported(most):
        return None
    low, high = 1.0, most
    while high / low > 1 + 1e-6:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if supported(middle) else (low, middle)
    return high
