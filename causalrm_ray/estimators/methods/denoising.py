"""Methods that denoise labels and ignore selection: each trains on the rows with feedback.

DENOISING["f_correction"].fit(task) -> Fitted
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from causalrm_ray.estimators.core.task import FitTask, Fitted, FunctionMethod, Need
from causalrm_ray.estimators.core.training import Objective, Risk
from causalrm_ray.estimators.methods.mixing import fit_dividemix, fit_selectmix
from causalrm_ray.estimators.methods.observed import cool, minimise, observed, plain_risk
from causalrm_ray.estimators.methods.reweighting import FORWARD_CORRECTION, Reweighting
from causalrm_ray.estimators.methods.small_loss import fit_small_loss
from causalrm_ray.losses.label_noise import (
    absolute_error,
    agreement_penalty,
    class_correlation,
    eps_cross_entropy,
    fluctuation,
    label_distribution,
)
from causalrm_ray.losses.pointwise import bce

M, CROSS_ENTROPY, ABSOLUTE = 1e3, 0.02, 5.0  # of eps-softmax: its released code's, for class-dependent flips on CIFAR-10
ALPHA, BETA, TEMPERATURE, DELTA = 3.0, 0.7, 3.0, 1.0  # of ILDE: its released code's
WINDOW = 3  # epochs that Label Wave averages


def fit_eps_softmax(task: FitTask) -> Fitted:
    """CROSS_ENTROPY * eps-softmax cross-entropy of M + ABSOLUTE * absolute error, at its minimum.

    Stopped by the same risk: the plain loss, which this one drives up, would stop it before it has begun. Absolute errors are
    least where every answer is certain, so the scorer that they leave ranks rows but is not calibrated; a temperature fitted on
    held-out feedback (ours) calibrates it.
    """
    scorer = task.scorer()

    def risk(logit: Tensor, index: Tensor) -> Tensor:
        r = task.observations.r[index]
        return CROSS_ENTROPY * eps_cross_entropy(logit, r, M) + ABSOLUTE * absolute_error(logit, r)

    report = task.minimise(scorer, lambda rows: Objective(observed(task, rows), risk))
    return Fitted(scorer, report, {"temperature": cool(task, scorer)})


def fit_ilde(task: FitTask) -> Fitted:
    """Instance-dependent label-distribution estimation, stopped by the plain loss."""
    scorer = task.scorer()
    return Fitted(scorer, minimise(task, scorer, Objective(observed(task, task.train), ilde_risk(task.observations.r))))


def ilde_risk(r: Tensor) -> Risk:
    """Risk of `r` [N], with a memory of its own: each call moves the distributions of its rows.

        cross-entropy + ALPHA log(1 - <t_i, P_i>) + DELTA * sum over j != k of M_jk^2
        t_i <- BETA t_i + (1 - BETA) softmax(M P_i / TEMPERATURE)

    M is the batch's class correlation, t_i the row's running distribution, which starts at 0; probabilities stay 1e-4 from the
    ends, so the penalty has a floor of log(1 - 0.59). Over several processes M is of a process's slice and t of the rows it saw.
    """
    memory = torch.zeros(len(r), 2)

    def risk(logit: Tensor, index: Tensor) -> Tensor:
        prob = torch.sigmoid(logit).clamp(1e-4, 1 - 1e-4)
        correlation = class_correlation(prob)
        estimate = label_distribution(prob.detach(), correlation.detach(), TEMPERATURE)
        memory[index] = BETA * memory[index] + (1 - BETA) * estimate.to(memory.dtype)
        confusion = correlation[0, 1].square() + correlation[1, 0].square()
        penalty = ALPHA * agreement_penalty(prob, memory[index].to(prob.dtype)) + DELTA * confusion
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


def fit_labelwave(task: FitTask) -> Fitted:
    """The plain loss on rows with feedback, stopped at the first minimum of the moving average of prediction changes.

    A minimum is one that the settings' patience does not undercut. Only training rows are watched and the held-out rows are not
    read, though they are not trained on either.
    """
    scorer, rows = task.scorer(), observed(task, task.train)
    report = minimise(task, scorer, Objective(rows, plain_risk(task)), Objective(rows, PredictionChanges(WINDOW)))
    return Fitted(scorer, report, {"changes": report.best.validation_risk})


_RATES: frozenset[Need] = frozenset({"rates"})
DENOISING: dict[str, FunctionMethod | Reweighting] = {
    "f_correction": FORWARD_CORRECTION,
    "co_teaching": FunctionMethod(fit_small_loss, "Han et al. 2018, arXiv 1804.06872", _RATES),
    "codis": FunctionMethod(partial(fit_small_loss, discrepancy=0.1), "Xia et al. 2023, ICCV", _RATES),
    "labelwave": FunctionMethod(fit_labelwave, "Yuan et al. 2024, arXiv 2502.07551"),
    "eps_softmax": FunctionMethod(fit_eps_softmax, "Wang et al. 2024, NeurIPS (epsilon-softmax)"),
    "robust_dividemix": FunctionMethod(fit_dividemix, "Li et al. 2020, arXiv 2002.07394"),
    "selectmix": FunctionMethod(fit_selectmix, "Liu et al. 2025, arXiv 2509.11265"),
    "ilde": FunctionMethod(fit_ilde, "Liao et al. 2024, IJCV, arXiv 2212.08380"),
}
