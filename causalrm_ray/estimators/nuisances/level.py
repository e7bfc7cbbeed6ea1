"""The level of a model's predictions, from a small random sample of rows that were judged with care.

    logits f of rows that it did not learn from, clean labels --fit_level--> Level, LevelReport      f -> c + a + e^b (f - c)

Feedback alone says little of the mean of r*: how much likelier the satisfied are to give it is hardly identified. One number from
a hundred rows drawn at random corrects most of that, and leaves the ranking as it is. Ours; a recalibration after Cox 1958.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from causalrm_ray.checks import check_binary, check_finite, check_same_length
from causalrm_ray.errors import InputError
from causalrm_ray.estimators.core.clusters import stderr
from causalrm_ray.estimators.core.folds import fold_of
from causalrm_ray.estimators.core.scoring import maximise

# Standard deviations of a and b. Biases of a mean are seldom above half a logit, and 100 rows know it to 0.3 only: without the
# prior, a model of about the right level would lose more by their noise than it gains.
SHIFT_PRIOR, SLOPE_PRIOR = 0.5, 0.25
FOLDS = 5
FEW = 30  # rows, below which an estimate is hardly more than its prior


@dataclass(frozen=True)
class Level:
    """logit -> shift + slope * logit, slope > 0: the ranking stays."""

    shift: float = 0.0
    slope: float = 1.0

    def __call__(self, logit: Tensor) -> Tensor:
        """Levelled logits, in the shape of `logit`."""
        return self.shift + self.slope * logit


@dataclass(frozen=True)
class LevelReport:
    """What clean rows said of a model's level; `dataclasses.asdict` gives its JSON.

    `rows` were used, which weigh as much as `effective_rows` equal ones; the share `liked` of them, and its standard error. Means
    and log losses (nats per row) are of the predictions for these rows: `before` of the model as it was, `after` cross-fitted,
    each row's by a level from other rows. A logit f becomes `centre` + `shift` + `slope` (f - `centre`); `slope` is 1, without a
    standard error, where the shift alone predicts as well. `warnings` are sentences for the user.
    """

    rows: int
    effective_rows: float
    liked: float
    liked_stderr: float
    mean_before: float
    mean_after: float
    loss_before: float
    loss_after: float
    centre: float
    shift: float
    shift_stderr: float
    slope: float
    slope_stderr: float | None
    warnings: tuple[str, ...]

    @property
    def level(self) -> Level:
        """The level that the rows set."""
        return Level(self.centre + self.shift - self.slope * self.centre, self.slope)


def fit_level(
    logit: Tensor, label: Tensor, weight: Tensor | None = None, cluster: Tensor | None = None, seed: int = 0
) -> tuple[Level, LevelReport]:
    """The level under which clean `label` [M] in {0, 1} is likeliest, given predictions `logit` [M] that did not learn from it.

        maximise  sum_i w_i log P(y_i | sigmoid(c + a + e^b (f_i - c)))  -  a^2 / (2 * 0.5^2)  -  b^2 / (2 * 0.25^2)

    c is the mean of f: a scale about another place would move the mean, and the prior of a hold it back. b stays 0 unless it
    makes the cross-fitted log loss lower. `weight` [M] > 0 are scaled to their effective sample size, so that the priors weigh
    what the rows are worth. Rows of one `cluster` [M] share a fold, and standard errors of means allow for them.
    Raises InputError for fewer than two rows or clusters, ValueError for lengths that differ and labels other than 0 and 1.
    """
    weight = torch.ones_like(logit) if weight is None else weight
    check_same_length(logit=logit, label=label, weight=weight, cluster=logit if cluster is None else cluster)
    check_finite("logit", logit)
    check_binary("label", label)
    groups = len(label) if cluster is None else len(cluster.unique())
    if groups < 2:
        what = "rows" if cluster is None else "users, conversations or prompts"
        raise InputError(f"clean labels must be of at least 2 {what}, got {groups}: a level from less cannot be checked")
    f, y, w = logit.double(), label.double(), weight.double()
    w = w * w.sum() / w.square().sum()
    fold = fold_of(len(y), min(FOLDS, groups), seed, cluster)
    crossed = {slope: torch.empty_like(f) for slope in (False, True)}
    for number in range(int(fold.max()) + 1):
        out = fold == number
        for slope, found in crossed.items():
            found[out] = _maximise(f[~out], y[~out], w[~out], slope)[0](f[out])
    loss = {slope: _mean(_losses(found, y), w) for slope, found in crossed.items()}
    sloped = loss[True] < loss[False]
    level, errors = _maximise(f, y, w, sloped)
    centre = _mean(f, w)
    after, liked = torch.sigmoid(crossed[sloped]), _mean(y, w)
    report = LevelReport(
        rows=len(y),
        effective_rows=float(w.sum()),
        liked=liked,
        liked_stderr=_stderr(y - liked, w, cluster),
        mean_before=_mean(torch.sigmoid(f), w),
        mean_after=_mean(after, w),
        loss_before=_mean(_losses(f, y), w),
        loss_after=loss[sloped],
        centre=centre,
        shift=level.shift + (level.slope - 1) * centre,
        shift_stderr=errors[0],
        slope=level.slope,
        slope_stderr=level.slope * errors[1] if sloped else None,
        warnings=(),
    )
    return level, _warned(report, _stderr(y - after - _mean(y - after, w), w, cluster))


def _maximise(f: Tensor, y: Tensor, w: Tensor, sloped: bool) -> tuple[Level, list[float]]:
    """The level of greatest posterior density, and the standard errors of a and, if `sloped`, b by its expected curvature."""
    size = 1 + sloped
    prior = torch.tensor([SHIFT_PRIOR, SLOPE_PRIOR], dtype=torch.float64)[:size] ** -2
    centre = _mean(f, w)

    def level(at: Tensor) -> Level:
        slope = math.exp(at[1]) if sloped else 1.0
        return Level(float(at[0]) + (1 - slope) * centre, slope)

    def density(at: Tensor) -> float:
        return -float((w * _losses(level(at)(f), y)).sum() + (prior * at.square()).sum() / 2)

    def curvature(at: Tensor) -> tuple[Tensor, Tensor]:
        z = level(at)(f)
        s, x = torch.sigmoid(z), torch.stack([torch.ones_like(z), z - at[0] - centre], dim=1)[:, :size]
        return x.T @ (w * (y - s)) - prior * at, (x * (w * s * (1 - s)).unsqueeze(1)).T @ x + torch.diag(prior)

    at = maximise(density, curvature, torch.zeros(size, dtype=torch.float64))
    return level(at), torch.linalg.inv(curvature(at)[1]).diagonal().sqrt().tolist()


def _losses(logit: Tensor, label: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logit, label, reduction="none")


def _mean(value: Tensor, weight: Tensor) -> float:
    return float((value * weight).sum() / weight.sum())


def _stderr(residual: Tensor, weight: Tensor, cluster: Tensor | None) -> float:
    """The standard error of a weighted mean, from what each row differs from it."""
    return float(stderr(residual * weight / weight.mean(), cluster))


def _warned(report: LevelReport, gap_stderr: float) -> LevelReport:
    """The report with its warnings; `gap_stderr` is the standard error of what labels and levelled predictions differ by."""
    gap = report.liked - report.mean_after
    alike = report.liked in (0.0, 1.0)
    faults = (
        (
            report.rows < FEW,
            f"Only {report.rows} rows were judged: the level rests on its prior. Have {FEW} at least, better 100 to 400, judged.",
        ),
        (
            alike,
            f"All {report.rows} judged rows are {'liked' if report.liked else 'disliked'}: only the prior bounds the shift of "
            f"{report.shift:+.2f}. Have more rows judged, drawn at random from all that were shown.",
        ),
        (
            not report.loss_after < report.loss_before,
            f"The {report.rows} judged rows do not lower the model's log loss ({report.loss_before:.4f} before, "
            f"{report.loss_after:.4f} after, cross-fitted): its level was about right. The shift of {report.shift:+.2f} ± "
            f"{report.shift_stderr:.2f} is used anyway.",
        ),
        (
            not alike and abs(gap) > 2 * gap_stderr,
            f"Of the judged rows {report.liked:.3f} are liked, but the levelled model still says {report.mean_after:.3f}, more "
            f"than 2 standard errors ({gap_stderr:.3f}) off. Were the rows drawn at random? Have more of them judged.",
        ),
    )
    names = vars(report) | {"warnings": tuple(text for fault, text in faults if fault)}
    return LevelReport(**names)
