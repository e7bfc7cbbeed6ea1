"""Where small heads begin to learn: at the optimum of what they are without a hidden layer, by quasi-Newton steps.

rows -> a sample -> L-BFGS on the linear part and the module's few scalars -> the module, whose hidden layer adds nothing yet
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from causalrm_ray.estimators.core.training import (
    SINGLE,
    FitReport,
    FitSettings,
    Inputs,
    Objective,
    Risk,
    Shard,
    fit,
    mean_risk,
    outputs,
)
from causalrm_ray.models.scorers.heads import EnsembleScorer

ROWS = 20_000  # as many show where to begin
STEPS, HISTORY = 30, 10  # of L-BFGS
SPREAD = 2.0  # prior variance of the linear part over the rows, in squared logits


def start_linear(
    module: nn.Module,
    inputs: Inputs,
    risk: Risk,
    rows: Tensor,
    taught: Callable[[Tensor], Tensor],
    prior: Callable[[], Tensor],
    seed: int,
) -> None:
    """Fit `module` in place, whose `scorer` is an EnsembleScorer, as if this had no hidden layer, which stays as it is.

        minimise  over each of K members  mean over its rows of risk_k + prior + D |w_k|^2 / (2 SPREAD M),    x in R^D

    `risk` maps outputs [B, K, ...] to each member's [B, K], `taught` row numbers [B] to the mask [B, K] of the members that learn
    from them; `prior` is a penalty per row. Of more `rows` than ROWS, M = ROWS are drawn by `seed`. x has mean square 1, so the
    ridge holds the variance of w . x near SPREAD or below, however many the features. L-BFGS: Liu and Nocedal 1989.
    Raises FloatingPointError for a risk that is not finite.
    """
    sample = _drawn(rows, seed)
    learns = taught(sample).float()
    share = learns / learns.sum(0).clamp_min(1)
    whole = cast(EnsembleScorer, module.scorer)
    linear = whole.without_hidden()
    ridge = linear.linear.shape[1] / (2 * SPREAD * len(sample))
    module.scorer = linear

    def total() -> Tensor:
        found = (risk(outputs(module, inputs, sample), sample) * share).sum()
        return found + share.shape[1] * prior() + ridge * linear.linear.square().sum().cpu()

    _minimise(module, total)
    module.scorer = whole
    whole.take_linear(linear)


def fit_scorer(
    module: nn.Module, inputs: Inputs, train: Objective, validation: Objective, settings: FitSettings, shard: Shard = SINGLE
) -> FitReport:
    """`fit`, which a module without hidden layers begins at its optimum, the ridge as in `start_linear`.

    A few hundred small steps would not get it there. A risk that changes from epoch to epoch has no such optimum.
    """
    if getattr(module, "is_linear", False) and train.begin is None and len(train.rows):
        sample, weights = (
            _drawn(train.rows, settings.seed),
            [parameter for parameter in module.parameters() if parameter.ndim > 1],
        )
        own, before = copy.deepcopy(module.state_dict()), mean_risk(module, inputs, validation, shard=shard)
        for parameter in module.parameters():
            nn.init.zeros_(parameter)

        def total() -> Tensor:
            found = train.risk(outputs(module, inputs, sample), sample).mean()
            return found + sum(weight.shape[1] * weight.square().sum().cpu() for weight in weights) / (2 * SPREAD * len(sample))

        _minimise(module, total)
        if not mean_risk(module, inputs, validation, shard=shard) < before:  # of a risk that is not convex, perhaps
            module.load_state_dict(own)
    return fit(module, inputs, train, validation, settings, shard)


def _drawn(rows: Tensor, seed: int) -> Tensor:
    """ROWS of the `rows`, or all in another order where they are fewer."""
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:ROWS]]


def _minimise(module: nn.Module, total: Callable[[], Tensor]) -> None:
    """The parameters of `module` at a minimum of `total`. Raises FloatingPointError where they are not finite."""
    optimizer = torch.optim.LBFGS(
        [parameter for parameter in module.parameters() if parameter.numel()],
        max_iter=STEPS,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad(set_to_none=True)
        found = total()
        found.backward()
        return float(found.detach())

    module.eval()
    optimizer.step(closure)
    module.train()
    if not all(bool(parameter.isfinite().all()) for parameter in module.parameters()):
        raise FloatingPointError("a linear start must be finite, and it is not")
