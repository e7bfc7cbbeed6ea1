"""Fitted scorers at the level that judged rows show: exact where a scorer has a bias or can be wrapped, nearly so elsewhere.

Fitted, judged [N] --honest rows--> fit_level --> Level --> Fitted: scorer, opinion and propensities at this level
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from causalrm_ray.checks import check_binary, check_same_length
from causalrm_ray.errors import InputError
from causalrm_ray.estimators.core.task import FitTask, Fitted
from causalrm_ray.estimators.core.training import Calling, Inputs, Shard, device_of, predict
from causalrm_ray.estimators.nuisances.level import Level, LevelReport, fit_level
from causalrm_ray.models.scorers.heads import Levelled, fold_level

RIDGE = 1e-6  # of the states' mean square: what keeps a direction that they hardly have from being used
SAMPLE = 20_000  # rows whose states say in which direction they are most alike
UNEVEN = 0.05  # logits by which a shift may differ between rows before a warning says so


def check_judged(judged: Tensor, rows: int) -> None:
    """Raise ValueError unless `judged` has `rows` entries, each 0, 1 or nan, InputError if all are nan."""
    check_same_length(inputs=torch.empty(rows), judged=judged)
    given = judged[~judged.isnan()]
    check_binary("judged where it is not nan", given)
    if len(given) == 0:
        raise InputError(f"judged must hold at least one label (feedback.clean), got {rows} rows of nan")


def learn_level(fitted: Fitted, judged: Tensor, task: FitTask) -> tuple[Level, LevelReport]:
    """The level of a fit from `judged` [N], r* of rows that were drawn at random, nan elsewhere.

    An ensemble's out-of-fold opinion is honest about every row. Any other scorer learned from the feedback of its training rows,
    and only there: all judged rows without feedback are used, and of those with feedback the held-out ones, which stand for the
    others by a weight, so that what is used is a random sample still.
    """
    rows = (~judged.isnan()).nonzero()[:, 0]
    weight, doubts = torch.ones(len(rows)), ()
    if fitted.opinion is None:
        seen = task.observations.o[rows] == 1
        learned = seen & ~torch.isin(rows, task.heldout)
        honest = int(seen.sum()) - int(learned.sum())
        if honest:
            weight[seen] = float(seen.sum()) / honest
            rows, weight = rows[~learned], weight[~learned]
        elif bool(seen.any()):  # without them the sample would not be random: the lesser evil
            doubts = (
                f"All {int(seen.sum())} judged rows with feedback are rows that the model learned from, which may hide a part of "
                "what it is off: have more rows judged, or use a method that fits an ensemble, such as auto.",
            )
    logit = predict(fitted.scorer, task.inputs, rows, shard=task.shard) if fitted.opinion is None else fitted.opinion[rows]
    level, report = fit_level(logit, judged[rows], weight, task.observations.clusters(rows), task.settings.seed)
    return level, replace(report, warnings=(*report.warnings, *doubts))


def level_opinion(fitted: Fitted, level: Level, report: LevelReport) -> Fitted:
    """The fit with its out-of-fold opinion m at the level m', its figures, and propensities of opinions that agree with m'.

    What a log shows of P(o = 1, r* = k | x) is as before. So P(o = 1 | x, r* = k) becomes m / m' of what it was for k = 1, and
    (1 - m) / (1 - m') for k = 0. Held-out risks then judge the model by the selection that it implies.
    """
    found = {"rows": float(report.rows), "liked": report.liked, "before": report.mean_before, "after": report.mean_after}
    found |= {"shift": report.shift, "slope": report.slope}
    figures = {**fitted.figures, **{f"level_{name}": value for name, value in found.items()}}
    if fitted.opinion is None:
        return replace(fitted, figures=figures)
    before, after, propensities = fitted.opinion, level(fitted.opinion), fitted.propensities
    if propensities is not None:
        liked = (nn.functional.logsigmoid(before) - nn.functional.logsigmoid(after)).exp()
        disliked = (nn.functional.logsigmoid(-before) - nn.functional.logsigmoid(-after)).exp()
        p1, p0 = propensities
        clip = float(torch.minimum(p1, p0).min())  # that of the method
        propensities = (p1 * liked).clamp(clip, 1), (p0 * disliked).clamp(clip, 1)
    return replace(fitted, figures=figures, opinion=after, propensities=propensities)


def level_scorer(scorer: nn.Module, level: Level, inputs: Inputs, shard: Shard) -> tuple[nn.Module, float]:
    """A scorer at the level, and by how many logits (root mean square over the rows) its shift differs from row to row.

    A linear head takes the level in, in place; what has none is wrapped. Both are exact. A head without a bias, as Hugging Face's
    classifiers have it, gets the shift through the direction u of its states h in which they are most alike:

        u = argmin over u of  mean (h . u - 1)^2        w <- e^b w + a u
    """
    head = getattr(scorer, "head", None)
    if not (isinstance(head, nn.Linear) and hasattr(scorer, "states")):
        return Levelled(scorer, level.shift, level.slope).to(device_of(scorer)), 0.0
    if fold_level(head, level.shift, level.slope):
        return scorer, 0.0
    some = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[:SAMPLE]
    states = predict(Calling(scorer, "states"), inputs, some, shard=shard).double()
    gram = states.T @ states / len(states)
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    constant = torch.linalg.solve(gram + ridge, states.mean(0))
    with torch.no_grad():
        head.weight += (level.shift * constant).to(head.weight)
    return scorer, abs(level.shift) * float((states @ constant - 1).square().mean().sqrt())


def levelled(fitted: Fitted, judged: Tensor, task: FitTask) -> tuple[Fitted, LevelReport]:
    """A fit with its scorer at the level of `judged` [N] (see `learn_level`), and the report on it."""
    level, report = learn_level(fitted, judged, task)
    scorer, uneven = level_scorer(fitted.scorer, level, task.inputs, task.shard)
    if uneven > UNEVEN:
        text = (
            f"The model's head has no bias: its shift of {level.shift:+.2f} differs by {uneven:.2f} from row to row. A method"
            " that is distilled, such as auto, learns the level with the rest."
        )
        report = replace(report, warnings=(*report.warnings, text))
    return level_opinion(replace(fitted, scorer=scorer), level, report), report
