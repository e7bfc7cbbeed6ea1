"""Which of a backbone's states tell most of feedback, by feedback alone: no label is needed that a log lacks.

states [N, D] by name --softmax regression, 5 folds--> held-out log loss of (none, disliked, liked) --> the least

A loss of the outcome is that of whether feedback was given, and of what it said: both models of a fit read these states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from causalrm_ray.estimators.core.folds import fold_of
from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.models.states.backbone import STATES
from causalrm_ray.types import StatesName

FOLDS = 5
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # of the mean square of the weights on standardised states, per row
MOST = 2_500  # rows with feedback, and as many without
ITERATIONS = 40


@dataclass(frozen=True)
class StateChoice:
    """The `states` that are read, and the held-out `losses` (nats per row) by which they were chosen from all (empty: set)."""

    states: StatesName
    losses: Mapping[StatesName, float] = field(default_factory=dict)


def choose_states(
    states: Callable[[StatesName, Tensor], Tensor],
    observations: Observations,
    heldout: Tensor,
    seed: int,
    names: Sequence[StatesName] = STATES,
) -> StateChoice:
    """The states by which outcomes of rows are explained best that were not learned from; `states(name, rows)` gives those of
    some rows [M, D]. Rows numbered in `heldout` are not read: models are judged by them later."""
    rows = _sample(observations, heldout, seed)
    outcome = (observations.o * (1 + observations.r)).long()[rows]  # 0 none, 1 disliked, 2 liked
    fold = fold_of(len(rows), FOLDS, seed, observations.clusters(rows), observations.o[rows] == 1)
    losses = {name: held_out_loss(states(name, rows), outcome, fold) for name in names}
    return StateChoice(min(losses, key=losses.__getitem__), losses)


def held_out_loss(features: Tensor, outcome: Tensor, fold: Tensor) -> float:
    """Log loss, nats per row, of `outcome` [M] in {0, 1, 2} by softmax regression on `features` [M, D], each row by the one that
    did not learn from its `fold` [M]; under the best of PENALTIES."""
    x = features.float()
    x = (x - x.mean(0)) / x.var(0, unbiased=False).sqrt().clamp_min(1e-6)
    x = x / x.shape[1] ** 0.5  # so that a penalty means the same at every width
    totals = []
    for penalty in PENALTIES:
        total = 0.0
        for number in fold.unique().tolist():
            out = fold == number
            weight, bias = _softmax_regression(x[~out], outcome[~out], penalty)
            total += float(nn.functional.cross_entropy(x[out] @ weight + bias, outcome[out], reduction="sum"))
        totals.append(total / len(outcome))
    return min(totals)


def _softmax_regression(x: Tensor, outcome: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights [D, 3] and biases [3] of least mean log loss plus `penalty` / D times the weights' square."""
    weight = torch.zeros(x.shape[1], 3, requires_grad=True)
    share = torch.bincount(outcome, minlength=3).float().clamp_min(0.5)
    bias = (share / share.sum()).log().requires_grad_(True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(x @ weight + bias, outcome) + penalty / x.shape[1] * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyrefly: ignore  # torch's stub asks for a float
    return weight.detach(), bias.detach()


def _sample(observations: Observations, heldout: Tensor, seed: int) -> Tensor:
    """At most MOST rows with feedback and MOST without, none of `heldout`, in ascending order."""
    generator = torch.Generator().manual_seed(seed)
    parts, free = [], torch.ones(len(observations), dtype=torch.bool)
    free[heldout] = False
    for given in (0, 1):
        rows = ((observations.o == given) & free).nonzero()[:, 0]
        parts.append(rows[torch.randperm(len(rows), generator=generator)[:MOST]])
    return torch.cat(parts).sort().values
