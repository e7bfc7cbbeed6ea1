"""Methods that fit the selection mechanism together with the opinion, and let held-out outcomes choose between mechanisms.

    latent      selection depends on the opinion              (mechanisms.fit_label)
    two_stage   selection depends on the features only        (mechanisms.fit_features)
    auto        both, their probabilities averaged by how likely each makes the outcomes of rows that it did not learn from

Only what a log shows is read: no propensity, rates or label from outside. Ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from causalrm_ray.estimators.core.clusters import summed
from causalrm_ray.estimators.core.task import FitTask, Fitted, FunctionMethod, Need, Observations
from causalrm_ray.estimators.methods.mechanisms import Mechanism, fit_features, fit_label, to_logits
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.models.heads import Mixture
from causalrm_ray.types import NoiseRates

REJECTED = 2.576  # standard errors: a two-sided test at 1 %
MIN_SIGNAL = 2.0  # standard errors by which P(o | x) must beat a constant, for a likelihood of o to distinguish mechanisms


def mechanism_weights(features: Tensor, label: Tensor, cluster: Tensor | None = None) -> Tensor:
    """Weights [2] of `features` and `label` from their negative log-likelihoods [M] of the same held-out rows.

        w_features = Phi(z - 2.576),   z = mean(label - features) over its standard error

    A test of a restricted model against a saturated one: two free stages can mimic any outcomes, selection by the opinion among
    them, while one function of x that explains both whether feedback is given and what it says can be as likely only if it is so.
    The restricted model therefore stands until a test at 1 % rejects it (z = 0: 0.5 % for the features, 1: 6 %, 4: 92 %). That it
    stands is no proof of it.
    """
    free = torch.special.ndtr(_in_standard_errors(label - features, cluster) - REJECTED)
    return torch.stack([free, 1 - free])


def propensity_signal(nll: Tensor, o: Tensor, cluster: Tensor | None = None) -> float:
    """Standard errors by which P(o | x), of held-out negative log-likelihood `nll` [M], beats the mean of `o` [M]."""
    share = o.mean()
    return float(_in_standard_errors(bce(torch.logit(share).expand_as(o), o) - nll, cluster))


def _in_standard_errors(value: Tensor, cluster: Tensor | None) -> Tensor:
    """The mean of `value` [M] over its standard error."""
    return value.mean() / _stderr(value, cluster).clamp_min(1e-12)


def _stderr(value: Tensor, cluster: Tensor | None) -> Tensor:
    """The standard error of the mean of `value` [M]; the rows of one `cluster` [M] depend on one another."""
    if cluster is None:
        return value.std() / math.sqrt(len(value))
    total = summed(value - value.mean(), cluster)
    return total.square().sum().sqrt() / len(value) * math.sqrt(len(total) / max(len(total) - 1, 1))


@dataclass(frozen=True, eq=False)
class Averaged:
    """Mechanisms and their average, weighted by held-out outcomes.

    `opinion` [M], P(r* = 1 | x), is out of fold, of the rows `best.rows` [M]; `gap_stderr` is the standard error of
    the difference of their mean likelihoods.
    """

    mechanisms: Mapping[str, Mechanism]
    weights: Tensor
    signal: float
    gap_stderr: float

    @property
    def best(self) -> Mechanism:
        """The mechanism of the greatest weight."""
        return list(self.mechanisms.values())[int(self.weights.argmax())]

    @property
    def opinion(self) -> Tensor:
        """P(r* = 1 | x) [M]."""
        return torch.stack([one.opinion for one in self.mechanisms.values()], dim=1) @ self.weights

    @property
    def rates(self) -> NoiseRates:
        """Their rates, averaged."""
        return NoiseRates(*(self.weights @ torch.tensor([astuple(one.rates) for one in self.mechanisms.values()])).tolist())

    def class_weights(self, observations: Observations) -> tuple[Tensor, Tensor]:
        """(v_1, v_0) [N] of losses.selection.class_weights under each mechanism, averaged; all nuisances are out of fold."""
        pairs = [one.class_weights(observations) for one in self.mechanisms.values()]
        v1, v0 = (torch.stack(weights, dim=1) @ self.weights for weights in zip(*pairs, strict=True))
        return v1, v0

    def scorer(self) -> nn.Module:
        """The mixture of their scorers."""
        return Mixture([one.scorer for one in self.mechanisms.values()], self.weights.tolist())

    def figures(self) -> dict[str, float]:
        """Weights, held-out likelihoods and the standard error of their difference, the signal, and the rates."""
        found = {f"weight_{name}": float(weight) for name, weight in zip(self.mechanisms, self.weights, strict=True)}
        found |= {f"heldout_{name}": float(one.heldout.mean()) for name, one in self.mechanisms.items()}
        return found | {"gap_stderr": self.gap_stderr, "signal": self.signal} | asdict(self.rates)


def fit_mechanisms(task: FitTask) -> Averaged:
    """Both mechanisms, weighed by held-out likelihood; with equal weights where the log does not distinguish them."""
    features, feedback_nll = fit_features(task)
    found = {"features": features, "label": fit_label(task)}
    cluster, nll = task.observations.clusters(features.rows), [one.heldout for one in found.values()]
    signal = propensity_signal(feedback_nll, task.observations.o[features.rows], cluster)
    weights = mechanism_weights(nll[0], nll[1], cluster) if signal >= MIN_SIGNAL else torch.full((2,), 0.5)
    return Averaged(found, weights, signal, float(_stderr(nll[1] - nll[0], cluster)))


def _fit_one(mechanism: Callable[[FitTask], Mechanism], task: FitTask) -> Fitted:
    found = mechanism(task)
    figures = asdict(found.rates) | {"heldout": float(found.heldout.mean())}
    opinion = to_logits(found.opinion, found.rows, len(task.inputs))
    return Fitted(found.scorer, found.report, figures, opinion, found.class_weights(task.observations))


def fit_auto(task: FitTask) -> Fitted:
    """Both mechanisms averaged."""
    found = fit_mechanisms(task)
    opinion = to_logits(found.opinion, found.best.rows, len(task.inputs))
    return Fitted(found.scorer(), found.best.report, found.figures(), opinion, found.class_weights(task.observations))


_OURS = "ours"
_STATES: frozenset[Need] = frozenset({"states"})
SELECTION = {
    "latent": FunctionMethod(partial(_fit_one, fit_label), _OURS, _STATES),
    "two_stage": FunctionMethod(partial(_fit_one, lambda task: fit_features(task)[0]), _OURS, _STATES),
    "auto": FunctionMethod(fit_auto, _OURS, _STATES),
}
