"""What decides who gives feedback: the opinion itself, or the features only? A joint model of a log's outcomes for either.

    label      P(o=1 | x, r*) depends on the opinion: one likelihood of MISSING, DISLIKED, LIKED      (losses.selection)
    features   P(o=1 | x) and P(r=1 | x, o=1) apart, the latter through the noise channel

Only what a log shows is read: no propensity, rates or label from outside. Ours; the noise channel is
that of arXiv 2603.18736.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from causalrm_ray.estimators.core.frozen import with_settings
from causalrm_ray.estimators.core.members import Folds, cross_fit_members
from causalrm_ray.estimators.core.task import FitTask, Observations
from causalrm_ray.estimators.core.training import FitReport, Inputs, predict
from causalrm_ray.estimators.nuisances.propensity import lowest_weighted
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.losses.selection import class_weights, graded_outcomes, outcomes
from causalrm_ray.models.heads import EnsembleScorer, to_logit
from causalrm_ray.types import NoiseRates

CENTRE, STRENGTH = 0.15, 5.0  # prior of the noise rates: a Gaussian on logit(2 rho), worth a few rows
HIGHEST_CLIP = 0.05  # lowest propensity of an opinion used in a weight, unless feedback is rare
START_GRADE = 0.1  # log-odds by which a strong opinion is assumed to matter at first
START_ODDS = 2.0  # log-odds by which feedback of the satisfied exceeds that of others at the members' start, to either side of 0
FEW_LABELS = 250  # beyond these they assume FEW_LABELS / labels of it
SPEED = 10.0  # how much faster the few scalars learn than the weights


class ScalarParameters(nn.Module):
    """A few numbers of each member that start at given values [K, ...] and learn SPEED times as fast as weights do."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start)
        self.moved = nn.Parameter(torch.zeros_like(start))

    def forward(self) -> Tensor:
        """Their values, in the shape of `start`."""
        return cast(Tensor, self.start) + SPEED * self.moved


class LabelNoise(nn.Module):
    """rho_01 and rho_10 in (0, 0.5) of each of K members, learned under a prior."""

    def __init__(self, members: int) -> None:
        super().__init__()
        self.logits = ScalarParameters(torch.full((members, 2), _logit(2 * CENTRE)))

    def forward(self) -> tuple[Tensor, ...]:
        """The rates (rho_01 [K], rho_10 [K])."""
        return (torch.sigmoid(self.logits()) / 2).unbind(1)

    def penalty(self) -> Tensor:
        """Minus the log-prior, up to a constant, in nats; the mean over members."""
        return STRENGTH * (self.logits() - _logit(2 * CENTRE)).square().sum(1).mean()

    def means(self) -> NoiseRates:
        """The rates, means over members."""
        return NoiseRates(*(float(rate.detach().mean()) for rate in self()))


class LabelSelection(nn.Module):
    """Outcomes where selection depends on the opinion: log-probabilities [B, K, 3] of K members (see losses.selection)."""

    def __init__(self, scorer: EnsembleScorer, start: Tensor) -> None:
        """`start` [K, S, 3] are each member's (a, c, d) of each stratum at first."""
        super().__init__()
        self.scorer = scorer
        self.selection = ScalarParameters(start)
        self.noise = LabelNoise(len(start))

    def forward(self, stratum: Tensor, **batch: Tensor) -> Tensor:
        """Per row and member [B, K, 6]: the three log-probabilities, P(r*=1 | x), and P(o=1, r*=k | x), k = 1, 0.

        The rows of the batch lie in `stratum` [B].
        """
        f = self.scorer.members(**batch)
        a, c, d = self.selection()[:, stratum].permute(2, 1, 0)
        logprob, on1, on0 = graded_outcomes(f, a, c, d, *self.noise())
        return torch.cat([logprob, torch.stack([torch.sigmoid(f), on1, on0], dim=2)], dim=2)

    def penalty(self) -> Tensor:
        """Minus the log-prior of the scalars: that of the label noise, and a standard normal for each grade effect."""
        return self.noise.penalty() + self.selection()[:, :, 2].square().sum(1).mean()


class FeedbackByFeatures(nn.Module):
    """Logits [B, K] of P(o = 1 | x, stratum): an ensemble on x, and a level for each stratum that x may not show."""

    def __init__(self, scorer: EnsembleScorer, strata: int) -> None:
        super().__init__()
        self.scorer = scorer
        self.level = ScalarParameters(torch.zeros(len(scorer.bias), strata))

    def forward(self, stratum: Tensor, **batch: Tensor) -> Tensor:
        """Logits [B, K] of a batch whose rows lie in `stratum` [B]."""
        return self.scorer.members(**batch) + self.level()[:, stratum].T

    def penalty(self) -> Tensor:
        """Minus the log-prior of the levels, a standard normal for each."""
        return self.level().square().sum(1).mean() / 2


class NoisyLabel(nn.Module):
    """The opinion e = P(r* = 1 | x), and P(r = 1 | x, o = 1) = rho_10 + (1 - rho_01 - rho_10) e, its noisy label."""

    def __init__(self, scorer: EnsembleScorer) -> None:
        super().__init__()
        self.scorer = scorer
        self.noise = LabelNoise(len(scorer.bias))

    def forward(self, **batch: Tensor) -> Tensor:
        """P(r = 1 | x, o = 1) and P(r* = 1 | x) of a batch."""
        rho_01, rho_10 = self.noise()
        opinion = torch.sigmoid(self.scorer.members(**batch))
        return torch.stack([rho_10 + (1 - rho_01 - rho_10) * opinion, opinion], dim=2)


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

    def class_weights(self, observations: Observations) -> tuple[Tensor, Tensor]:
        """(v_1, v_0) [N] of losses.selection.class_weights; P(o = 1 | x, r* = k) = joint_k / P(r* = k | x), clipped at
        HIGHEST_CLIP or `lowest_weighted`."""
        clip = min(HIGHEST_CLIP, lowest_weighted(None, observations.o))
        m = spread(self.opinion, self.rows, len(observations), 0.5)
        shares = torch.stack([m, 1 - m], dim=1)
        p1, p0 = (spread(self.joint, self.rows, len(observations), 0.0) / shares.clamp_min(1e-6)).clamp(clip, 1).T
        return class_weights(observations.o, observations.r, p1, p0, self.rates)


def spread(value: Tensor, rows: Tensor, number: int, elsewhere: float) -> Tensor:
    """`value` [M, ...] of the rows numbered in `rows` [M] among all `number` rows, and `elsewhere` of the others."""
    everyone = torch.full((number, *value.shape[1:]), elsewhere)
    everyone[rows] = value
    return everyone


def to_logits(opinion: Tensor, rows: Tensor, number: int) -> Tensor:
    """Logits of the probabilities `opinion` [M] of the `rows` [M] among `number` rows; 0 for the others."""
    return to_logit(spread(opinion, rows, number, 0.5))


def fit_label(task: FitTask) -> Mechanism:
    """Maximum likelihood of all rows' outcomes, selection depending on the opinion, in each stratum in its own way."""
    strata = _strata(task)
    outcome = outcomes(task.observations.o, task.observations.r)
    scorer, liked = _scorer(task)
    folds = Folds(task, len(scorer.bias))
    assumed = _logit(liked) - _start_odds(float(task.observations.o[folds.learn].sum()), folds.members)
    scorer.start_at(assumed)
    starts = [_selection_start(task, strata, folds.learn, float(share)) for share in torch.sigmoid(assumed)]
    module = LabelSelection(scorer, torch.stack(starts))
    task = with_settings(replace(task, inputs=WithStrata(task.inputs, strata)), len(folds.learn))

    def nll(output: Tensor, index: Tensor) -> Tensor:
        return -output.gather(2, outcome[index][:, None, None].expand(-1, output.shape[1], 1)).squeeze(2)

    everyone = torch.arange(len(outcome))
    fitted = cross_fit_members(task, module, nll, folds, everyone, lambda: module.penalty().cpu() / len(folds.learn))
    found = folds.out_of_fold(fitted.output, fitted.rows)
    return Mechanism(scorer, module.noise.means(), fitted.rows, fitted.risk, found[:, 3], found[:, 4:], fitted.report)


def _start_odds(labels: float, members: int) -> Tensor:
    """logit P(o=1 | r*=1) - logit P(o=1 | r*=0) that each of K members assumes at first, [K].

    A few labels hardly identify how much selection differs between opinions, so members start all over the range and their mean
    allows for it; many labels identify it, and then a far start would only cost steps.
    """
    return torch.linspace(-1, 1, members) * START_ODDS * min(1, FEW_LABELS / labels)


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
        start.append([_logit(on0), _logit(on1) - _logit(on0), START_GRADE])
    return torch.tensor(start)


def fit_features(task: FitTask) -> tuple[Mechanism, Tensor]:
    """Two stages: P(o | x, stratum) on all rows, P(r | x, o = 1) on those with feedback; also the first's likelihood, [M]."""
    o, r = task.observations.o, task.observations.r
    propensity, _ = _scorer(task)
    scorer, _ = _scorer(task)
    folds = Folds(task, len(scorer.bias))
    propensity.start_at(_logit(float(o[folds.learn].mean())))

    def feedback_risk(output: Tensor, index: Tensor) -> Tensor:
        return bce(output, o[index].unsqueeze(1).expand_as(output))

    everyone = torch.arange(len(o))
    strata = _strata(task)
    with_strata = replace(with_settings(task, len(folds.learn)), inputs=WithStrata(task.inputs, strata))
    levels = FeedbackByFeatures(propensity, int(strata.max()) + 1)
    feedback = cross_fit_members(
        with_strata, levels, feedback_risk, folds, everyone, lambda: levels.penalty().cpu() / len(folds.learn)
    )
    module, seen = NoisyLabel(scorer), everyone[o == 1]

    def label_risk(output: Tensor, index: Tensor) -> Tensor:
        label = r[index].unsqueeze(1).expand(-1, output.shape[1])
        return o[index].unsqueeze(1) * nn.functional.binary_cross_entropy(output[:, :, 0], label, reduction="none")

    labelled = int(o[folds.learn].sum())
    on_labels = with_settings(task, labelled)
    labels = cross_fit_members(on_labels, module, label_risk, folds, seen, lambda: module.noise.penalty().cpu() / labelled)
    nll = feedback.risk.clone()
    nll[torch.isin(feedback.rows, labels.rows)] += labels.risk
    opinion = folds.out_of_fold(predict(module, task.inputs, feedback.rows, shard=task.shard), feedback.rows)[:, 1]
    share = folds.out_of_fold(torch.sigmoid(feedback.output), feedback.rows)
    joint = share.unsqueeze(1) * torch.stack([opinion, 1 - opinion], dim=1)
    return Mechanism(scorer, module.noise.means(), feedback.rows, nll, opinion, joint, labels.report), feedback.risk


def _strata(task: FitTask) -> Tensor:
    return torch.zeros(len(task.inputs), dtype=torch.long) if task.strata is None else task.strata


def _scorer(task: FitTask) -> tuple[EnsembleScorer, float]:
    """A fresh ensemble that starts at P(r* = 1) as if feedback were given at random: the share liked, denoised at CENTRE."""
    rows = task.train[task.observations.o[task.train] == 1]
    liked = _denoised(float(task.observations.r[rows].mean()))
    scorer = cast(EnsembleScorer, task.scorer())
    scorer.start_at(_logit(liked))
    return scorer, liked


def _denoised(share: float) -> float:
    """P(r* = 1 | o = 1) from the share of likes among feedback, at rates of CENTRE."""
    return min(max((share - CENTRE) / (1 - 2 * CENTRE), 0.05), 0.95)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
