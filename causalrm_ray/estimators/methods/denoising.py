"""Methods that denoise labels and ignore selection: each trains on the rows with feedback.

DENOISING["f_correction"].fit(task) -> Fitted
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from causalrm_ray.estimators.core.task import FitTask, Fitted, Need
from causalrm_ray.estimators.core.training import Objective, Risk
from causalrm_ray.estimators.methods.mixing import DivideMix, SelectMix
from causalrm_ray.estimators.methods.observed import cool, given_rates, minimise, observed, plain_risk
from causalrm_ray.estimators.methods.small_loss import SmallLoss
from causalrm_ray.losses.label_noise import (
    absolute_error,
    agreement_penalty,
    class_correlation,
    eps_cross_entropy,
    fluctuation,
    forward_logit,
    label_distribution,
)
from causalrm_ray.losses.pointwise import bce


@dataclass(frozen=True)
class ForwardCorrection:
    """The loss of the forward-corrected prediction, on held-out rows as well: a proper score of noisy labels."""

    paper: str = "Patrini et al. 2017, arXiv 1609.03683"
    needs: frozenset[Need] = frozenset({"rates"})

    def fit(self, task: FitTask) -> Fitted:
        """A scorer whose prediction, passed through the noise, fits the feedback."""
        rates, scorer = given_rates(task), task.scorer()

        def risk(logit: Tensor, index: Tensor) -> Tensor:
            return task.loss(forward_logit(logit, rates), task.observations.r[index])

        train = Objective(observed(task, task.train), risk)
        return Fitted(scorer, minimise(task, scorer, train, Objective(observed(task, task.heldout), risk)))


@dataclass(frozen=True)
class EpsSoftmax:
    """`cross_entropy` * eps-softmax cross-entropy + `absolute` * absolute error.

    The weights and `m` are those of the released code for class-dependent flips on CIFAR-10. Stopped by the same risk:
    the plain loss, which this one drives up, would stop it before it has begun. Absolute errors are least where every answer is
    certain, so the scorer that they leave ranks rows but is not calibrated; a temperature fitted on held-out feedback (ours)
    calibrates it.
    """

    paper: str = "Wang et al. 2024, NeurIPS (epsilon-softmax)"
    m: float = 1e3
    cross_entropy: float = 0.02
    absolute: float = 5.0
    needs: frozenset[Need] = frozenset()

    def fit(self, task: FitTask) -> Fitted:
        """A scorer at the minimum of the risk."""
        scorer = task.scorer()

        def risk(logit: Tensor, index: Tensor) -> Tensor:
            r = task.observations.r[index]
            return self.cross_entropy * eps_cross_entropy(logit, r, self.m) + self.absolute * absolute_error(logit, r)

        heldout = observed(task, task.heldout)
        report = minimise(task, scorer, Objective(observed(task, task.train), risk), Objective(heldout, risk))
        return Fitted(scorer, report, {"temperature": cool(task, scorer)})


@dataclass(frozen=True)
class LabelDistribution:
    """ILDE: instance-dependent label-distribution estimation, with the numbers of the released code.

        cross-entropy + `alpha` log(1 - <t_i, P_i>) + `delta` * sum over j != k of M_jk^2
        t_i <- `beta` t_i + (1 - `beta`) softmax(M P_i / `temperature`)

    M is the batch's class correlation, t_i the row's running distribution, which starts at 0; probabilities stay 1e-4 from the
    ends, so the penalty has a floor of log(1 - 0.59). Over several processes M is of a process's slice and t of the rows it saw.
    """

    paper: str = "Liao et al. 2024, IJCV, arXiv 2212.08380"
    alpha: float = 3.0
    beta: float = 0.7
    temperature: float = 3.0
    delta: float = 1.0
    needs: frozenset[Need] = frozenset()

    def fit(self, task: FitTask) -> Fitted:
        """A scorer at the minimum of the risk, stopped by the plain loss."""
        scorer = task.scorer()
        train = Objective(observed(task, task.train), self.risk(task.observations.r))
        return Fitted(scorer, minimise(task, scorer, train))

    def risk(self, r: Tensor) -> Risk:
        """Risk of `r` [N], with a memory of its own: each call moves the distributions of its rows."""
        memory = torch.zeros(len(r), 2)

        def risk(logit: Tensor, index: Tensor) -> Tensor:
            prob = torch.sigmoid(logit).clamp(1e-4, 1 - 1e-4)
            correlation = class_correlation(prob)
            estimate = label_distribution(prob.detach(), correlation.detach(), self.temperature)
            memory[index] = self.beta * memory[index] + (1 - self.beta) * estimate.to(memory.dtype)
            confusion = correlation[0, 1].square() + correlation[1, 0].square()
            penalty = self.alpha * agreement_penalty(prob, memory[index].to(prob.dtype)) + self.delta * confusion
            return bce(logit, r[index]) + penalty

        return risk


class PredictionChanges:
    """Share of the last `window` epochs in which each row's predicted class changed.

    A stopping risk: called once an epoch, on the same rows every time. In the first epoch all predictions count as changed.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._past: list[Tensor] = []

    def __call__(self, logit: Tensor, index: Tensor) -> Tensor:
        """Risk [M] of this epoch's `logit` [M]."""
        past = self._past or [logit <= 0]
        self._past = [*past, logit > 0][-self._window - 1 :]
        return fluctuation(torch.stack(self._past))


@dataclass(frozen=True)
class LabelWave:
    """The plain loss on rows with feedback, stopped at the first minimum of the moving average of prediction changes.

    A minimum is one that the settings' patience does not undercut. Only training rows are watched and the held-out rows are not
    read, though they are not trained on either. `window` epochs are averaged.
    """

    paper: str = "Yuan et al. 2024, arXiv 2502.07551"
    window: int = 3
    needs: frozenset[Need] = frozenset()

    def fit(self, task: FitTask) -> Fitted:
        """A scorer as it was when its predictions changed least."""
        scorer, rows = task.scorer(), observed(task, task.train)
        watch = Objective(rows, PredictionChanges(self.window))
        report = minimise(task, scorer, Objective(rows, plain_risk(task)), watch)
        return Fitted(scorer, report, {"changes": report.best.validation_risk})


DENOISING: dict[str, ForwardCorrection | SmallLoss | LabelWave | EpsSoftmax | DivideMix | SelectMix | LabelDistribution] = {
    "f_correction": ForwardCorrection(),
    "co_teaching": SmallLoss("Han et al. 2018, arXiv 1804.06872"),
    "codis": SmallLoss("Xia et al. 2023, ICCV", discrepancy=0.1),
    "labelwave": LabelWave(),
    "eps_softmax": EpsSoftmax(),
    "robust_dividemix": DivideMix(),
    "selectmix": SelectMix(),
    "ilde": LabelDistribution(),
}
