"""Selection may depend on the opinion: likelihoods of the three outcomes of an impression.

r* ~ P(r* = 1 | x) = sigmoid(f)     o ~ P(o = 1 | x, r*)     r = r* with label noise where o = 1
outcome: MISSING (o = 0), DISLIKED (r = 0) or LIKED (r = 1), which every row of a log shows
"""

from __future__ import annotations

import torch
from torch import Tensor

from causalrm_ray.checks import check_propensity, check_same_length, check_unit_interval
from causalrm_ray.types import NoiseRates

MISSING, DISLIKED, LIKED = 0, 1, 2
GRADE = 1.0  # units of the logistic noise of a user's utility; beyond it an opinion is strong
FLOOR = 1e-7  # of a probability, so that its logarithm is finite


def outcomes(o: Tensor, r: Tensor) -> Tensor:
    """Outcome [N] of each row: MISSING, DISLIKED or LIKED. `r` [N] is read only where `o` [N] is 1."""
    check_same_length(o=o, r=r)
    return torch.where(o == 1, torch.where(r == 1, LIKED, DISLIKED), MISSING)


def graded_outcomes(f: Tensor, a: Tensor, c: Tensor, d: Tensor, rho_01: Tensor, rho_10: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Selection by the opinion: log-probabilities of the outcomes [..., 3], P(o=1, r*=1 | x) and P(o=1, r*=0 | x) [...].

    A user's utility is f + logistic noise; r* = 1 above 0, and opinions beyond +-GRADE are strong. With s = sigmoid,

        on1 = [s(f-1)] s(a+c+d/2) + [s(f) - s(f-1)] s(a+c-d/2)
        on0 = [s(f+1) - s(f)] s(a+d/2) + [1 - s(f+1)] s(a-d/2)
        P(LIKED | x) = on1 (1 - rho_01) + on0 rho_10      P(DISLIKED | x) = on1 rho_01 + on0 (1 - rho_10)

    c is how much likelier (in log-odds) a satisfied user gives feedback, d how much the better grade of each opinion is; d = 0
    is the model of two classes. All arguments broadcast; the rates lie in [0, 0.5). Ours.
    """
    s = torch.sigmoid
    strong, liked, mild = s(f - GRADE), s(f), s(f + GRADE)
    on1 = strong * s(a + c + d / 2) + (liked - strong) * s(a + c - d / 2)
    on0 = (mild - liked) * s(a + d / 2) + (1 - mild) * s(a - d / 2)
    disliked, liked = on1 * rho_01 + on0 * (1 - rho_10), on1 * (1 - rho_01) + on0 * rho_10
    return torch.stack([1 - on1 - on0, disliked, liked], dim=-1).clamp_min(FLOOR).log(), on1, on0


def class_weights(o: Tensor, r: Tensor, p1: Tensor, p0: Tensor, rates: NoiseRates) -> tuple[Tensor, Tensor]:
    """Weights (v_1, v_0) [N] of a row as one that is liked and as one that is not, with a propensity for each opinion.

        v_1 = o [(1 - rho_10) r - rho_10 (1 - r)] / (1 - rho_01 - rho_10) / p_1       E[v_1 | x] = P(r* = 1 | x)
        v_0 = o [(1 - rho_01) (1 - r) - rho_01 r] / (1 - rho_01 - rho_10) / p_0       E[v_0 | x] = P(r* = 0 | x)

    where p_k = P(o = 1 | x, r* = k) and the rates are right. `o`, `r` [N] in {0, 1}, `r` read only where `o` is 1; `p1`, `p0` [N]
    in (0, 1]. With p_1 = p_0 these are the weights of CausalRM-IPS (arXiv 2603.18736), l~ / p = v_1 l(s, 1) + v_0 l(s, 0). Ours.
    """
    check_same_length(o=o, r=r, p1=p1, p0=p0)
    check_propensity("p1", p1)
    check_propensity("p0", p0)
    scale = 1 - rates.rho_01 - rates.rho_10
    liked, disliked = o * torch.where(o == 1, r, 0.0), o * torch.where(o == 1, 1 - r, 0.0)
    v1 = ((1 - rates.rho_10) * liked - rates.rho_10 * disliked) / scale / p1
    v0 = ((1 - rates.rho_01) * disliked - rates.rho_01 * liked) / scale / p0
    return v1, v0


def class_wise_dr_label(m: Tensor, v1: Tensor, v0: Tensor) -> Tensor:
    """Doubly robust pseudo-label [N] from `class_weights`.

        y = m + [v_1 (1 - m) - v_0 m] / mean(v_1 + v_0)

    E[y | x] = P(r* = 1 | x) where p_k and the rates are right, whatever `m` [N] in [0, 1] is; or where m and the rates are right
    and both p_k are wrong by one factor. With p_1 = p_0, least squares on y is CausalRM-DR (arXiv 2603.18736) with squared error,
    self-normalised. The mean is 1 in expectation; below 0.5 it is taken as 0.5.
    """
    check_same_length(m=m, v1=v1, v0=v0)
    check_unit_interval("m", m)
    return m + (v1 * (1 - m) - v0 * m) / (v1 + v0).mean().clamp_min(0.5)
