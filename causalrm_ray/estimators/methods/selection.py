"""Methods that fit the selection mechanism together with the opinion, and let the log choose between mechanisms.

    latent      selection depends on the opinion              (mechanisms.fit_label)
    two_stage   selection depends on the features only        (two_stage.fit_features)
    auto        both, averaged by what each adds to the other's account of feedback on rows that it did not learn from, and by how
                likely outcomes are there; what opinions may do besides features is allowed for in the latter, within strata

Only what a log shows is read, and rates of the noise if they are known: no propensity or label from outside. Ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.estimators.core.task import FitTask, Fitted, FunctionMethod, Need, Observations, Propensities
from causalrm_ray.estimators.methods.evidence import (
    added_information,
    evidence,
    likelihood_gain,
    mechanism_weights,
    propensity_signal,
)
from causalrm_ray.estimators.methods.mechanisms import Mechanism, among_all, fit_label, opinion_propensities, to_logits
from causalrm_ray.estimators.methods.outcome_models import surprise
from causalrm_ray.estimators.methods.two_stage import fit_features
from causalrm_ray.estimators.nuisances.opinion_shift import OpinionShift, opinion_shift
from causalrm_ray.models.scorers.heads import Mixture
from causalrm_ray.types import NoiseRates


@dataclass(frozen=True, eq=False)
class Averaged:
    """Mechanisms and their average, weighted by how well either explains feedback (see `evidence`).

    `opinion` [M], P(r* = 1 | x), is out of fold, of the rows `best.rows` [M]; `adds` are the standard errors by which each one's
    predictions of labels add to the other's; `gain` the nats by which held-out outcomes are likelier under features; `signal`
    the standard errors by which P(o | x) beats a constant; `strain` the nats by which the label mechanism's noise rates are less
    likely before a log is seen than the other's; `shift` is what opinions are taken to do besides features.
    """

    mechanisms: Mapping[str, Mechanism]
    weights: Tensor
    adds: Mapping[str, float]
    gain: float
    signal: float
    strain: float
    shift: OpinionShift

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
        """Their rates, averaged; known ones as they are."""
        found = [one.rates for one in self.mechanisms.values()]
        if all(rates == found[0] for rates in found):
            return found[0]
        return NoiseRates(*(self.weights.double() @ torch.tensor([astuple(rates) for rates in found]).double()).tolist())

    @property
    def joint(self) -> Tensor:
        """P(o = 1, r* = k | x) [M, 2], k = 1, 0."""
        return torch.stack([one.joint for one in self.mechanisms.values()], dim=2) @ self.weights

    def propensities(self, observations: Observations) -> Propensities:
        """P(o = 1 | x, r* = k) [N], k = 1, 0, of the average, out of fold."""
        return opinion_propensities(self.joint, self.opinion, self.best.rows, observations)

    def scorer(self) -> nn.Module:
        """The mixture of their scorers."""
        return Mixture([one.scorer for one in self.mechanisms.values()], self.weights.tolist())

    def figures(self) -> dict[str, float]:
        """Weights, what either adds, held-out likelihoods, the signal, the opinion's part besides features, and the rates."""
        found = {f"weight_{name}": float(weight) for name, weight in zip(self.mechanisms, self.weights, strict=True)}
        found |= {f"adds_{name}": value for name, value in self.adds.items()}
        found |= {f"heldout_{name}": float(one.heldout.mean()) for name, one in self.mechanisms.items()}
        found |= {f"shift_{name}": value for name, value in asdict(self.shift).items()}
        return found | {"gain": self.gain, "signal": self.signal, "strain": self.strain} | asdict(self.rates)


def fit_mechanisms(task: FitTask) -> Averaged:
    """Both mechanisms, weighed by what either adds to the other's account of what feedback says, and by held-out outcomes; and
    what opinions may do besides features, allowed for in the former."""
    features, feedback_nll = fit_features(task)
    found = {"features": features, "label": fit_label(task)}
    rows, observations = features.rows, task.observations
    cluster = observations.clusters(rows)
    labelled = observations.o[rows] == 1
    predictions = [one.label_logit()[labelled] for one in found.values()]
    adds = added_information(observations.r[rows][labelled], predictions, None if cluster is None else cluster[labelled])
    signal = propensity_signal(feedback_nll, observations.o[rows], cluster)
    gain = likelihood_gain(features.heldout, found["label"].heldout, cluster)
    strain = 0.0 if task.nuisances.rates else surprise(found["label"].rates) - surprise(features.rates)
    weights = mechanism_weights(evidence(adds[0], adds[1], gain, strain), signal)
    strata = None if task.strata is None else task.strata[rows]
    units = None if cluster is None else len(cluster.unique())
    states = cast(FeatureRows, task.inputs).features
    shift = opinion_shift(observations.o[rows], features.joint.sum(1), features.opinion, states, rows, strata, units)
    if shift.used:
        found["features"] = features.shifted(shift.used, states)
    return Averaged(found, weights, dict(zip(found, adds, strict=True)), gain, signal, strain, shift)


def _fit_one(mechanism: Callable[[FitTask], Mechanism], task: FitTask) -> Fitted:
    found = mechanism(task)
    figures = asdict(found.rates) | {"heldout": float(found.heldout.mean())}
    opinion = to_logits(found.opinion, found.rows, len(task.inputs))
    joint = among_all(found.joint, found.rows, len(task.inputs), 0.0)
    return Fitted(found.scorer, found.report, figures, opinion, found.rates, found.propensities(task.observations), joint)


def fit_auto(task: FitTask) -> Fitted:
    """Both mechanisms averaged."""
    found = fit_mechanisms(task)
    opinion = to_logits(found.opinion, found.best.rows, len(task.inputs))
    joint = among_all(found.joint, found.best.rows, len(task.inputs), 0.0)
    nuisances = found.rates, found.propensities(task.observations), joint
    return Fitted(found.scorer(), found.best.report, found.figures(), opinion, *nuisances)


_OURS = "ours"
_STATES: frozenset[Need] = frozenset({"states"})
SELECTION = {
    "latent": FunctionMethod(partial(_fit_one, fit_label), _OURS, _STATES),
    "two_stage": FunctionMethod(partial(_fit_one, lambda task: fit_features(task)[0]), _OURS, _STATES),
    "auto": FunctionMethod(fit_auto, _OURS, _STATES),
}
