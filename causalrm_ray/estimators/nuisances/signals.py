"""What each feedback signal shows of the opinion behind it: the noise rates, split by signal.

P(signal = s | r*, o = 1) = P(r | r*, o = 1) P(signal = s | r*, r, o = 1):   the rates times a mixture within each label
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from causalrm_ray.checks import check_both_classes, check_same_length, check_unit_interval
from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.nuisances.noise_curve import RHO_01, RHO_10, fit_curves, rank_feedback, sureness

STEPS = 200  # of expectation-maximisation


@dataclass(frozen=True)
class SignalRate:
    """One signal: its `label` r in {0, 1}, the `rows` with it, and how often the liked, or disliked, with feedback give it.

    Summed over the signals of label 0 `liked` is rho_01; over those of label 1 `disliked` is rho_10. 95 % bootstrap intervals.
    """

    label: int
    rows: int
    liked: float
    disliked: float
    liked_interval: tuple[float, float]
    disliked_interval: tuple[float, float]


def signal_rates(
    prob: Tensor,
    signal: Tensor,
    names: Sequence[str],
    labels: Sequence[int],
    draws: int = 500,
    seed: int = 0,
    cluster: Tensor | None = None,
) -> dict[str, SignalRate]:
    """P(signal | r* = 1, o = 1) and P(signal | r* = 0, o = 1) of every signal in `names`.

    `signal` [N] is a place in `names`, or -1 without feedback; `labels` in {0, 1} is the r that each signal stands for; `prob`
    [N] ranks the rows, out of fold. The curve of `estimate_noise_rates` gives, per rank, who gave a label; within a label, the
    signals of the two kinds of users are a mixture with these known weights, fitted by expectation-maximisation. Curve and
    mixture are refitted to `draws` resamples, of rows or of whole clusters (`cluster` [N]). Right where signals depend on the
    opinion only, and where that estimate is.
    Raises ValueError for a signal without a name or a label not in {0, 1}, InputError where all feedback has one label.
    """
    check_same_length(prob=prob, signal=signal)
    check_unit_interval("prob", prob)
    if len(names) != len(labels) or not set(labels) <= {0, 1}:
        raise ValueError(f"labels must be 0 or 1, one for each of {len(names)} signals, got {list(labels)}")
    if len(signal) and not -1 <= int(signal.min()) <= int(signal.max()) < len(names):
        raise ValueError(f"signal must be in -1..{len(names) - 1}, got {int(signal.min())}..{int(signal.max())}")
    meaning = torch.tensor(labels)
    observations = Observations((signal >= 0).float(), meaning[signal.clamp_min(0)].float())
    check_both_classes("labels of the rows with feedback", observations.r[observations.o == 1])
    ranks = rank_feedback(prob, observations)
    counts = ranks.counts(signal[ranks.rows].long(), len(names))
    drawn = ranks.resample(signal[ranks.rows].long(), len(names), draws, seed, cluster)
    point = fit_curves(ranks.score, _labels(counts[None], meaning))
    theta = torch.cat([point, fit_curves(ranks.score, _labels(drawn, meaning), point)])
    share = _shares(theta, ranks.score, torch.cat([counts[None], drawn]), meaning)  # [1 + D, r*, K]
    low, high = torch.quantile(share[1:], torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    rows = counts.sum(0)
    return {
        name: SignalRate(
            labels[k],
            int(rows[k]),
            float(share[0, 1, k]),
            float(share[0, 0, k]),
            (float(low[1, k]), float(high[1, k])),
            (float(low[0, k]), float(high[0, k])),
        )
        for k, name in enumerate(names)
    }


def _labels(counts: Tensor, meaning: Tensor) -> Tensor:
    """Counts [D, B, 2] of labels 0 and 1 from those of signals [D, B, K]."""
    return torch.stack([counts[..., meaning == label].sum(-1) for label in (0, 1)], -1)


def _shares(theta: Tensor, score: Tensor, counts: Tensor, meaning: Tensor) -> Tensor:
    """P(signal | r*, o = 1) [D, 2, K] of curves `theta` [D, 6], for `counts` [D, B, K]."""
    sure = sureness(theta, score)
    rho_01, rho_10 = torch.sigmoid(theta[:, RHO_01]), torch.sigmoid(theta[:, RHO_10])
    share = torch.zeros(len(theta), 2, counts.shape[-1], dtype=torch.float64)
    for label, given_disliked, given_liked in ((0, 1 - rho_10, rho_01), (1, rho_10, 1 - rho_01)):
        if not bool((meaning == label).any()):
            continue
        liked, disliked = sure * given_liked[:, None], (1 - sure) * given_disliked[:, None]
        within = _mixture(liked / (liked + disliked).clamp_min(1e-12), counts[..., meaning == label])
        share[:, :, meaning == label] = within * torch.stack([given_disliked, given_liked], -1)[..., None]
    return share


def _mixture(weight: Tensor, counts: Tensor) -> Tensor:
    """Shares [D, 2, K] of components 0 and 1 whose mixture, by `weight` [D, B] of component 1, best fits `counts` [D, B, K]."""
    mixed = torch.stack([1 - weight, weight], 1)  # [D, 2, B]
    share = (counts.sum(1) + 0.5) / (counts.sum(1) + 0.5).sum(-1, keepdim=True)
    share = share[:, None].expand(-1, 2, -1)
    for _ in range(STEPS):
        expected = torch.einsum("dcb,dck->dbk", mixed, share).clamp_min(1e-12)
        mass = share * torch.einsum("dcb,dbk->dck", mixed, counts / expected)
        share = mass / mass.sum(-1, keepdim=True).clamp_min(1e-12)
    return share
