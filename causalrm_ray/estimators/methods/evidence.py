"""Which mechanism explains what feedback says? Either one's out-of-fold predictions are asked what they add to the other's.

labels, predictions of two models -> what each adds to the other (J test) --+-> weights of the mechanisms
outcomes, likelihoods of the two  -> how much likelier under the freer one --+
P(o | x) against a constant       -> whether selection works on x at all
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from causalrm_ray.estimators.core.clusters import in_standard_errors, summed
from causalrm_ray.losses.pointwise import bce

PRIOR_NATS = 15.0  # for the mechanism that ties feedback to opinion: its predictions were ventured, those of two free stages not
WHOLE_SIGNAL = 2.0  # standard errors by which P(o | x) beats a constant where all that it predicts was ventured
RIDGE, STEPS = 1e-3, 30  # of the regression: a prior too weak to matter, and steps of Newton's method


def added_information(label: Tensor, predictions: Sequence[Tensor], cluster: Tensor | None = None) -> list[float]:
    """Standard errors by which each of `predictions`, logits [M], adds to the others in predicting `label` [M] in {0, 1}.

        P(label = 1) = sigmoid(b_0 + b_1 prediction_1 + b_2 prediction_2 + ...),   z_k = b_k / stderr(b_k)

    A model that is right leaves nothing to be added by another, whatever the other's levels and scale are; of two wrong ones
    each may add something. Davidson and MacKinnon 1981, the J test of models that do not contain each other. The standard errors
    hold where rows of a `cluster` [M] depend on one another. No z exceeds sqrt(2 nats) of what the prediction adds to the
    likelihood, so that separation, few clusters and predictions that are alike feign none. One that hardly varies adds 0.
    """
    columns = torch.stack([one.double() for one in predictions], dim=1)
    spread = columns.std(0)
    known = spread > 1e-6
    design = torch.cat([torch.ones(len(label), 1).double(), ((columns - columns.mean(0)) / spread.clamp_min(1e-6))[:, known]], 1)
    target = label.double()
    weight = _most_likely(design, target)
    scores = summed(design * (target - torch.sigmoid(design @ weight))[:, None], cluster)
    bread = torch.linalg.inv(_slope(design, target, weight)[1])
    variance = (bread @ scores.T @ scores @ bread).diagonal() * len(scores) / max(len(scores) - 1, 1)
    z = (weight / variance.sqrt().clamp_min(1e-12))[1:]
    whole = _log_likelihood(design, target, weight)
    for place in range(len(z)):
        others = torch.arange(design.shape[1]) != place + 1
        without = _log_likelihood(design[:, others], target, _most_likely(design[:, others], target))
        bound = math.sqrt(2 * max(whole - without, 0.0))
        z[place] = z[place].clamp(-bound, bound)
    found = torch.zeros(len(predictions), dtype=torch.float64)
    found[known] = z
    return found.tolist()


def _most_likely(design: Tensor, target: Tensor) -> Tensor:
    """Weights [P] of the logistic regression of `target` [M] on `design` [M, P], by Newton's method under the ridge."""
    weight = torch.zeros(design.shape[1], dtype=torch.float64)
    for _ in range(STEPS):
        gradient, information = _slope(design, target, weight)
        step = torch.linalg.solve(information, gradient).clamp(-2, 2)
        weight = weight + step
        if float(step.abs().max()) < 1e-9:
            break
    return weight


def _log_likelihood(design: Tensor, target: Tensor, weight: Tensor) -> float:
    return -float(bce(design @ weight, target).sum())


def _slope(design: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [P] and information [P, P] of the logistic log-likelihood, less the ridge, at `weight` [P]."""
    prob = torch.sigmoid(design @ weight)
    information = design.T @ ((prob * (1 - prob))[:, None] * design) + RIDGE * torch.eye(len(weight), dtype=design.dtype)
    return design.T @ (target - prob) - RIDGE * weight, information


def evidence(features_adds: float, label_adds: float, features_gain: float = 0.0, strain: float = 0.0) -> float:
    """Nats for `features` against `label`: what each one's predictions of labels add to the other's, in standard errors z, by how
    many nats held-out outcomes, missing ones too, are likelier under the former (see `likelihood_gain`), and by how many its
    noise rates are likelier before a log is seen (`strain`).

        z_features^2 / 2 - z_label^2 / 2 + max(gain, 0) + strain

    A predictor that adds z standard errors raises a maximal likelihood by z^2 / 2; one that would have to be turned round adds
    nothing. Two free stages contain nearly all that one opinion explains: to be less likely than they are speaks against
    `label`, but to be likelier does not speak for it, as the simpler model errs less. Where opinions do not select, one opinion
    can only explain who gives feedback by taking what feedback says for noise: its rates are strained. Labels count in all
    parts, so this is a scale on which logs were separated in simulation, and no exact Bayes factor.
    """
    labels = (max(features_adds, 0.0) ** 2 - max(label_adds, 0.0) ** 2) / 2
    return labels + max(features_gain, 0.0) + strain


def likelihood_gain(features_nll: Tensor, label_nll: Tensor, cluster: Tensor | None = None) -> float:
    """Nats by which held-out rows are likelier under `features`, from either one's negative log-likelihood [M]; 0 at least.

        sum of differences * max(0, 1 - (2 / z)^2)

    with z the standard errors of their mean, which allow for rows of one `cluster` [M]: nothing is concluded from a z below 2.
    """
    gain = label_nll.double() - features_nll.double()
    z = float(in_standard_errors(gain, cluster))
    return float(gain.sum()) * max(0.0, 1 - (2 / z) ** 2) if z > 0 else 0.0


def mechanism_weights(nats: float, signal: float) -> Tensor:
    """Weights [2] of `features` and `label`: posterior probabilities, from `evidence` for the first and `propensity_signal`.

        w_features = sigmoid(nats - PRIOR_NATS min(1, max(signal, 0) / WHOLE_SIGNAL)^2)

    Two free stages, P(o | x) and P(r | x, o = 1), can mimic any outcomes, selection by the opinion among them; a single function
    of x that explains both can only do so if it is true or next to it. So it has PRIOR_NATS in its favour (9 nats: 0.2 % for the
    features, 15: half, 21: 99.8 %), the less of them, the nearer P(o | x) is to a constant, which ventures nothing. PRIOR_NATS
    lies between what was found on 67 simulated logs of about 970 labels, where there is least evidence: 19 to 52 nats if
    features selected, -24 to 13 if opinions did.
    """
    ventured = min(1.0, max(signal, 0.0) / WHOLE_SIGNAL) ** 2
    free = torch.sigmoid(torch.tensor(nats - PRIOR_NATS * ventured))
    return torch.stack([free, 1 - free])


def propensity_signal(nll: Tensor, o: Tensor, cluster: Tensor | None = None) -> float:
    """Standard errors by which P(o | x), of held-out negative log-likelihood `nll` [M], beats the mean of `o` [M].

    At most sqrt(2 nats) of the rows' whole gain: tiny gains may be as steady as they are meaningless.
    """
    least = 0.5 / len(o)  # half a row: where all rows have feedback, or none has
    gain = bce(torch.logit(o.mean().clamp(least, 1 - least)).expand_as(o), o) - nll
    whole = float(gain.double().sum())
    return min(float(in_standard_errors(gain, cluster)), math.copysign(math.sqrt(2 * abs(whole)), whole))
