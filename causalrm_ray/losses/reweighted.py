"""Risk over all impressions from the few with feedback: per-row vectors [N] whose mean is the estimate.

Everywhere `loss` [N] is each row's loss, read only where o = 1; `o` [N] in {0, 1} says where feedback was given; `propensity`
[N] in (0, 1] is P(o = 1 | x). All raise ValueError that names argument, rule and value. With losses.noise.surrogate as the
loss, `ips` is CausalRM-IPS and `dr` is CausalRM-DR. The `_weights` functions hold the normalisers, which are global: a fit takes
its weights from all rows once, and its mini-batches multiply.
"""

from __future__ import annotations

import torch
from torch import Tensor

from causalrm_ray.checks import check_binary, check_finite, check_propensity, check_same_length


def naive_weights(o: Tensor) -> Tensor:
    """w_i = o_i N / |O|, [N]: unbiased only if feedback is given at random. Raises ValueError if no row has feedback."""
    check_binary("o", o)
    return o * (len(o) / _count(o))


def ips_weights(o: Tensor, propensity: Tensor) -> Tensor:
    """w_i = o_i / p_i, [N]."""
    check_same_length(o=o, propensity=propensity)
    check_binary("o", o)
    check_propensity("propensity", propensity)
    return o / propensity


def snips_weights(o: Tensor, propensity: Tensor) -> Tensor:
    """w_i = (o_i / p_i) / mean over D of (o_j / p_j), [N], of mean 1. Raises ValueError if no row has feedback."""
    weight = ips_weights(o, propensity)
    _count(o)
    return weight / weight.mean()


def ips(loss: Tensor, o: Tensor, propensity: Tensor) -> Tensor:
    """Inverse propensity scoring.

        L = mean over D of o_i / p_i * l_i

    Unbiased if the propensity is right (arXiv 2603.18736, theorem 1); its variance grows as 1 / p.
    """
    return _weigh(ips_weights(o, propensity), loss)


def snips(loss: Tensor, o: Tensor, propensity: Tensor) -> Tensor:
    """Self-normalised inverse propensity scoring.

        L = sum over D of w_i l_i / sum over D of w_i,   w_i = o_i / p_i

    Consistent if the propensity is right up to a factor, and unchanged by that factor (Swaminathan and Joachims 2015).
    """
    return _weigh(snips_weights(o, propensity), loss)


def dr(loss: Tensor, o: Tensor, propensity: Tensor, imputed: Tensor) -> Tensor:
    """Doubly robust: an imputed loss everywhere, corrected where there is feedback.

        L = mean over D of e_i + o_i / p_i * (l_i - e_i)

    `imputed` [N] is e. Unbiased if the propensity OR the imputed loss is right (arXiv 2603.18736, theorem 2). Equals `ips` if the
    imputed loss is zero.
    """
    check_same_length(o=o, imputed=imputed)
    check_finite("imputed", imputed)
    return imputed + _weigh(ips_weights(o, propensity), loss - imputed)


def _weigh(weight: Tensor, loss: Tensor) -> Tensor:
    check_same_length(o=weight, loss=loss)
    check_finite("loss where o = 1", loss[weight > 0])
    return weight * torch.where(weight > 0, loss, torch.zeros_like(loss))


def _count(o: Tensor) -> int:
    count = int(o.sum())
    if count == 0:
        raise ValueError(f"o must hold at least one row with feedback, got none in {len(o)} rows")
    return count
