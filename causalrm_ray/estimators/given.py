"""What users of the Python API hand over beside features and feedback, as a fit reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from causalrm_ray.checks import check_propensity
from causalrm_ray.data.columns import as_vector, check_rows_match, plain
from causalrm_ray.errors import brief
from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.nuisances.propensity import calibrate, diagnose, lowest_weighted
from causalrm_ray.estimators.nuisances.strata import stratify
from causalrm_ray.estimators.pipeline import HELD_OUT
from causalrm_ray.losses.selection import outcomes


def strata_of(traits: Any, observations: Observations) -> tuple[Tensor | None, tuple[str, ...]]:
    """Strata [N] of the rows' traits and their names; None without traits. Raises ValueError for another number of rows."""
    if traits is None:
        return None, ()
    if not isinstance(traits, (pd.DataFrame, Mapping)):
        traits = {getattr(traits, "name", None) or "trait": traits}
    columns = {str(name): as_vector(f"traits[{name!r}]", column) for name, column in traits.items()}
    check_rows_match(X=len(observations), **{name: len(column) for name, column in columns.items()})
    rows = [
        {name: str(value) for name, value in zip(columns, row, strict=True) if not pd.isna(value)}
        for row in zip(*columns.values(), strict=True)
    ]
    return stratify(rows, observations)


def propensity_of(
    given: Any, o: Tensor, fit: Callable[[Tensor], tuple[Tensor, Any]], clip: float | None, seed: int
) -> tuple[Tensor, tuple[str, ...]]:
    """P(o = 1 | x) [N] in [clip, 1], given or fitted by `fit`(o), and warnings about it. ValueError for other values or rows."""
    if given is None and bool(o.all()):
        return torch.ones(len(o)), ("All rows have feedback, so selection is not corrected: add the answers without (y = nan).",)
    if given is None:
        found = calibrate(fit(o)[0], o, clip, seed=seed)
        return found.prob, found.report.warnings
    prob = torch.from_numpy(as_vector("propensity", given).astype(np.float32))
    check_rows_match(X=len(o), propensity=len(prob))
    check_propensity("propensity", prob)
    clip = lowest_weighted(clip, o)
    return prob.clamp(min=clip), () if bool(o.all()) else diagnose(prob, o, clip).warnings


def held_out(observations: Observations, seed: int) -> Tensor:
    """Rows that decide when a fit stops: a share HELD_OUT of the rows of each outcome, and one at least."""
    outcome = outcomes(observations.o, observations.r)
    order = torch.randperm(len(outcome), generator=torch.Generator().manual_seed(seed))
    groups = [order[outcome[order] == value] for value in outcome.unique()]
    return torch.cat([rows[: max(1, round(HELD_OUT * len(rows)))] for rows in groups]).sort().values


def judged_of(clean: Any, classes: np.ndarray, rows: int) -> Tensor | None:
    """r* [N] of the rows judged in `clean` [N], nan elsewhere, 1 for the greater of the two `classes`; None without.

    Raises ValueError for another number of rows, another label, or no label at all.
    """
    if clean is None:
        return None
    labels = as_vector("clean", clean)
    check_rows_match(X=rows, clean=len(labels))
    given = ~pd.isna(labels)
    known = plain(labels[given])
    if len(known) == 0:
        raise ValueError(f"clean must hold at least one label, got {rows} rows without: leave it out where no row was judged")
    strange = ~np.isin(known, classes)
    if strange.any():
        first = known[strange][0]
        value = brief(first.item() if isinstance(first, np.generic) else first)
        raise ValueError(f"clean must hold labels of y, {classes.tolist()}, and nan where no row was judged, got {value}")
    judged = np.full(rows, np.nan, dtype=np.float32)
    judged[given] = known == classes[1]
    return torch.from_numpy(judged)
