"""What decides who gives feedback: the opinion itself, or the features only? A joint model of a log's outcomes for either.

    label      P(o=1 | x, r*) depends on the opinion: one likelihood of MISSING, DISLIKED, LIKED      (here, losses.selection)
    features   P(o=1 | x) and P(r=1 | x, o=1) apart, the latter through the noise channel             (two_stage)

Only what a log shows is read, and rates of the noise if they are known: no propensity or label from outside. Ours; the noise
channel is that of arXiv 2603.18736.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from causalrm_ray.estimators.core.clusters import stderr
from causalrm_ray.estimators.core.frozen import with_settings
from causalrm_ray.estimators.core.linear_start import start_linear
from causalrm_ray.estimators.core.members import Folds, cross_fit_members
from causalrm_ray.estimators.core.task import FitTask, Observations, Propensities
from causalrm_ray.estimators.core.training import FitReport, Inputs, predict
from causalrm_ray.estimators.methods.outcome_models import CENTRE, LabelSelection, logit
from causalrm_ray.estimators.nuisances.opinion_shift import opinion_given
from causalrm_ray.estimators.nuisances.propensity import lowest_weighted
from causalrm_ray.losses.selection import FLOOR, outcomes
from causalrm_ray.models.scorers.heads import EnsembleScorer, to_logit
from causalrm_ray.models.scorers.trees import BoostedScorer
from causalrm_ray.types import NoiseRates

HIGHEST_CLIP = 0.05  # lowest propensity of an opinion used in a weight, unless feedback is rare
START_GRADE = 0.1  # log-odds by which a strong opinion is assumed to matter at first
WIDEST = 2.0  # standard deviations of the prior between which starts compete
WIDEST_OFFSET = 2.0  # log-odds to either side of the likely ones at which members begin
FEW_LABELS = 250  # beyond these labels FEW_LABELS / labels of it


@dataclass(frozen=True, eq=False)
class WithStrata:
    """Inputs whose batches also hold the stratum [B] of each row."""

    inputs: Inputs
    strata: Tensor

    def __len__(self) -> int:
        return len(self.strata)

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """The inputs' batch and {"stratum": [B]}."""
        return {**self.inputs.batch(index), "stratum": self.strata[index]}


@dataclass(frozen=True, eq=False)
class Mechanism:
    """One fitted explanation: its scorer and its rates; and its out-of-fold predictions for the rows `rows` [M] that measure it.

    `heldout` [M] is the negative log-likelihood of their outcomes, `opinion` [M] P(r* = 1 | x), and `joint` [M, 2]
    P(o = 1, r* = k | x), k = 1, 0.
    """

    scorer: nn.Module
    rates: NoiseRates
    rows: Tensor
    heldout: Tensor
    opinion: Tensor
    joint: Tensor
    report: FitReport

    def label_logit(self) -> Tensor:
        """logit P(r = 1 | x, o = 1) [M]."""
        liked, disliked = self.joint.double().unbind(1)
        rho_01, rho_10 = self.rates.rho_01, self.rates.rho_10
        says_liked, says_disliked = liked * (1 - rho_01) + disliked * rho_10, liked * rho_01 + disliked * (1 - rho_10)
        return says_liked.clamp_min(FLOOR).log() - says_disliked.clamp_min(FLOOR).log()

    def shifted(self, log_odds: float, features: Tensor) -> Mechanism:
        """The same outcomes where the pleased give feedback more readily by `log_odds` at the same x (see `opinion_given`).

        The scorer is changed in place, by what best follows the change of the opinion's logit: a linear function of `features`
        [N, D], or a constant where it has no linear part.
        """
        feedback = self.joint.sum(1).double().clamp(FLOOR, 1 - FLOOR)
        opinion = opinion_given(feedback, self.opinion.double().clamp(FLOOR, 1 - FLOOR), log_odds).to(self.opinion.dtype)
        added = to_logit(opinion) - to_logit(self.opinion)
        cast(EnsembleScorer | BoostedScorer, self.scorer).add(features[self.rows], added)
        return replace(self, opinion=opinion)

    def propensities(self, observations: Observations) -> Propensities:
        """P(o = 1 | x, r* = k) = joint_k / P(r* = k | x), k = 1, 0."""
        return opinion_propensities(self.joint, self.opinion, self.rows, observations)


def opinion_propensities(joint: Tensor, opinion: Tensor, rows: Tensor, observations: Observations) -> Propensities:
    """P(o = 1 | x, r* = k) [N], k = 1, 0, of `joint` [M, 2] and `opinion` [M] of the `rows` [M], clipped at HIGHEST_CLIP or
    `lowest_weighted`; of the other rows the clip. P(r* = k | x) below 1e-6 counts as that."""
    clip = min(HIGHEST_CLIP, lowest_weighted(None, observations.o))
    shares = torch.stack([opinion, 1 - opinion], dim=1).clamp_min(1e-6)
    p1, p0 = among_all(joint / shares, rows, len(observations), 0.0).clamp(clip, 1).T
    return p1, p0


def among_all(value: Tensor, rows: Tensor, number: int, elsewhere: float) -> Tensor:
    """`value` [M, ...] of the rows numbered in `rows` [M] among all `number` rows, and `elsewhere` of the others."""
    everyone = torch.full((number, *value.shape[1:]), elsewhere)
    everyone[rows] = value
    return everyone


def to_logits(opinion: Tensor, rows: Tensor, number: int) -> Tensor:
    """Logits of the probabilities `opinion` [M] of the `rows` [M] among `number` rows; 0 for the others."""
    return to_logit(among_all(opinion, rows, number, 0.5))


def fit_label(task: FitTask) -> Mechanism:
    """Maximum likelihood of all rows' outcomes, selection depending on the opinion, in each stratum in its own way.

    The likelihood has an optimum also where the pleased are taken for the displeased, and it hardly identifies the level of
    P(r* = 1), which trades off against the odds. So members begin about the `likely_odds`, and stop early.
    """
    number = len(starting_scorer(task)[0].bias)
    folds = Folds(task, number)
    labels = float(task.observations.o[folds.learn].sum())
    likely = likely_odds(task) if labels >= FEW_LABELS else 0.0  # few labels tell nothing of it: members start all over the range
    model = _LabelModel(task, folds.learn, likely + _offsets(labels, number))
    everyone = torch.arange(len(task.inputs))
    fitted = cross_fit_members(model.task, model.module, model.nll, folds, everyone, model.penalty, "start")
    found = folds.out_of_fold(fitted.output, fitted.rows)
    rates = model.module.noise.means()
    return Mechanism(model.module.scorer, rates, fitted.rows, fitted.risk, found[:, 3], found[:, 4:], fitted.report)


def likely_odds(task: FitTask) -> float:
    """logit P(o=1 | r*=1) - logit P(o=1 | r*=0) that a fit begins with: the mean of what prior and held-out rows leave likely.

        odds ~ N(0, 1),   logit P(r* = 1) = logit(liked) - odds ~ N(0, 1),   liked = P(r* = 1 | o = 1)

    The two are one Gaussian about logit(liked) / 2. From starts within two of its standard deviations linear members are fitted
    on training rows, and weighed by prior and likelihood of the held-out rows, these counted as if they were as many independent
    ones.
    """
    scorer, liked = starting_scorer(task)
    steps = torch.linspace(-WIDEST, WIDEST, len(scorer.bias))
    odds = logit(liked) / 2 + steps * 0.5**0.5
    model = _LabelModel(task, task.train, odds)

    def taught(rows: Tensor) -> Tensor:
        return torch.ones(len(rows), len(odds))

    start_linear(model.module, model.task.inputs, model.nll, task.train, taught, model.penalty, task.settings.seed)
    nll = model.nll(predict(model.module, model.task.inputs, task.heldout), task.heldout)
    worse = nll - nll[:, [int(nll.mean(0).argmin())]]
    alone, together = (stderr(worse, cluster) + 1e-12 for cluster in (None, task.observations.clusters(task.heldout)))
    independent = (alone / together).square().clamp(max=1)
    return float(torch.softmax(-worse.sum(0) * independent - steps.square() / 2, 0) @ odds)


class _LabelModel:
    """Outcomes of the rows `learn` [L] where selection depends on the opinion: members that start at `odds` [K], their risk."""

    def __init__(self, task: FitTask, learn: Tensor, odds: Tensor) -> None:
        strata = strata_of(task)
        scorer, liked = starting_scorer(task)
        assumed = logit(liked) - odds
        scorer.start_at(assumed)
        starts = [_selection_start(task, strata, learn, float(share)) for share in torch.sigmoid(assumed)]
        self.module = LabelSelection(scorer, torch.stack(starts), task.nuisances.rates)
        self.task = with_settings(replace(task, inputs=WithStrata(task.inputs, strata)), len(learn))
        self._outcome = outcomes(task.observations.o, task.observations.r)
        self._rows = len(learn)

    def nll(self, output: Tensor, index: Tensor) -> Tensor:
        """Negative log-likelihood [B, K] of the outcomes of the rows `index` [B]."""
        return -output.gather(2, self._outcome[index][:, None, None].expand(-1, output.shape[1], 1)).squeeze(2)

    def penalty(self) -> Tensor:
        """Minus the scalars' log-prior, per row."""
        return self.module.penalty().cpu() / self._rows


def _offsets(labels: float, members: int) -> Tensor:
    """How far from the odds that were found each of K members begins, [K].

    A few labels hardly identify how much selection differs between opinions, so members start all over the range and their mean
    allows for it; many labels identify it, and then a far start would only cost steps.
    """
    return torch.linspace(-1, 1, members) * WIDEST_OFFSET * min(1, FEW_LABELS / labels)


def _selection_start(task: FitTask, strata: Tensor, rows: Tensor, liked: float) -> Tensor:
    """(a, c, d) [S, 3] under which the strata differ in feedback rates, not in preferences: P(r* = 1) = `liked` in each.

        P(o=1 | r*=1, s) = P(o=1, r*=1 | s) / liked     P(o=1 | r*=0, s) = P(o=1, r*=0 | s) / (1 - liked)

    Equal odds in all strata at the start would attribute differences in feedback to preference, and the likelihood has a local
    optimum there.
    """
    start = []
    for stratum in range(int(strata.max()) + 1):
        among = rows[strata[rows] == stratum]
        among = among if len(among) else rows
        o = task.observations.o[among]
        labels = task.observations.r[among][o == 1]
        share = float(o.mean())
        satisfied = _denoised(float(labels.mean())) if len(labels) else 0.5
        on1, on0 = (min(max(on, 0.005), 0.95) for on in (share * satisfied / liked, share * (1 - satisfied) / (1 - liked)))
        start.append([logit(on0), logit(on1) - logit(on0), START_GRADE])
    return torch.tensor(start)


def strata_of(task: FitTask) -> Tensor:
    """Strata [N] of all rows; one where the task has none."""
    return torch.zeros(len(task.inputs), dtype=torch.long) if task.strata is None else task.strata


def starting_scorer(task: FitTask) -> tuple[EnsembleScorer, float]:
    """A fresh ensemble that starts at P(r* = 1) as if feedback were given at random: the share liked, denoised at CENTRE."""
    rows = task.train[task.observations.o[task.train] == 1]
    liked = _denoised(float(task.observations.r[rows].mean()))
    scorer = cast(EnsembleScorer, task.scorer())
    scorer.start_at(logit(liked))
    return scorer, liked


def _denoised(share: float) -> float:
    """P(r* = 1 | o = 1) from the share of likes among feedback, at rates of CENTRE."""
    return min(max((share - CENTRE) / (1 - 2 * CENTRE), 0.05), 0.95)
