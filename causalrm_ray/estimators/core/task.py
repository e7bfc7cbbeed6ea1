"""What every estimator is given, and what it gives back.

FitTask (rows, feedback, nuisances, settings) --Method.fit--> Fitted (a scorer of P(r* = 1 | x), and how it was trained)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

from causalrm_ray.checks import check_binary, check_propensity, check_same_length, check_unit_interval
from causalrm_ray.estimators.core.linear_start import fit_scorer
from causalrm_ray.estimators.core.training import SINGLE, FitReport, FitSettings, Inputs, Objective, Shard, seeded
from causalrm_ray.losses.pointwise import Loss
from causalrm_ray.registry import ESTIMATORS
from causalrm_ray.types import HeadKind, NoiseRates

NOISE_FREE = NoiseRates(0.0, 0.0)
Propensities = tuple[Tensor, Tensor]
Need = Literal["propensity", "rates", "imputation", "states"]


@dataclass(frozen=True, eq=False)
class Observations:
    """What a log holds of N impressions: `o` [N], was feedback given; `r` [N], the noisy feedback, read only where o = 1.

    Both in {0, 1}; `r` is stored as 0 where o = 0, so nothing hidden there (a NaN, a true label) can reach a fit.
    Rows of one `cluster` [N], whole numbers, depend on one another, as those of one user do: folds, held-out rows and resamples
    keep them together (None: every row is one of its own). Raises ValueError for other values or lengths.
    """

    o: Tensor
    r: Tensor
    cluster: Tensor | None = None

    def __post_init__(self) -> None:
        check_same_length(o=self.o, r=self.r, cluster=self.o if self.cluster is None else self.cluster)
        check_binary("o", self.o)
        check_binary("r where o = 1", self.r[self.o == 1])
        object.__setattr__(self, "r", torch.where(self.o == 1, self.r, torch.zeros_like(self.r)).to(torch.float32))
        object.__setattr__(self, "o", self.o.to(torch.float32))

    def __len__(self) -> int:
        return len(self.o)

    def clusters(self, rows: Tensor) -> Tensor | None:
        """Clusters of `rows`, their numbers [M] or a mask [N]; None where every row is one of its own."""
        return None if self.cluster is None else self.cluster[rows]


@dataclass(frozen=True, eq=False)
class Nuisances:
    """What a method needs to know besides the log; each is given, never fitted by a method.

    `propensity` [N] in (0, 1]; `rates` of the noise; `imputation` [N] in [0, 1], the guess of P(label = 1 | x).
    """

    propensity: Tensor | None = None
    rates: NoiseRates | None = None
    imputation: Tensor | None = None

    def __post_init__(self) -> None:
        if self.propensity is not None:
            check_propensity("propensity", self.propensity)
        if self.imputation is not None:
            check_unit_interval("imputation", self.imputation)


@dataclass(frozen=True, eq=False)
class FitTask:
    """One fit of one estimator.

    `make_scorer` returns a fresh scorer: a module whose forward gives a logit [B], and that can be given further heads
    (models.scorers.heads.WithHeads). Only the rows numbered in `train` are trained on; those in `heldout` decide when to stop. An
    ensemble that cross-fits trains on held-out rows as well, unless `spare_heldout`, and gives back their out-of-fold logits.
    `strata` [N] numbers from 0 the observed traits within which selection may work in its own way (None: all alike). `head` is
    the kind of model that `inputs`, if they are features, get; None leaves the choice of mlp or boosting to methods that can.
    """

    make_scorer: Callable[[], nn.Module]
    inputs: Inputs
    observations: Observations
    nuisances: Nuisances
    train: Tensor
    heldout: Tensor
    settings: FitSettings
    loss: Loss
    shard: Shard = SINGLE
    strata: Tensor | None = None
    spare_heldout: bool = False
    head: HeadKind | None = "mlp"

    def scorer(self, seed_offset: int = 0) -> nn.Module:
        """A scorer at its start; the same offset gives the same one."""
        return seeded(self.make_scorer, self.settings.seed + seed_offset)

    def minimise(self, module: nn.Module, objective: Callable[[Tensor], Objective]) -> FitReport:
        """Train `module` in place on `objective(train)`, early-stopped by `objective(heldout)`."""
        return fit_scorer(module, self.inputs, objective(self.train), objective(self.heldout), self.settings, self.shard)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A scorer whose logit is that of P(r* = 1 | x), how its training went, and what else was learned (JSON figures).

    `opinion` [N] are logits of all rows by those members of an ensemble that did not learn from them (None: no ensemble; the
    scorer learned from no held-out row, and what it says of these is honest). `rates`, and `propensities` P(o = 1 | x, r* = k)
    [N], k = 1, 0, clipped for weights, are nuisances that the method found itself (None: it took those that it was given);
    `joint` [N, 2] are its P(o = 1, r* = k | x), not clipped.
    """

    scorer: nn.Module
    report: FitReport
    figures: Mapping[str, float] = field(default_factory=dict)
    opinion: Tensor | None = None
    rates: NoiseRates | None = None
    propensities: Propensities | None = None
    joint: Tensor | None = None


class Method(Protocol):
    """An estimator: `paper` is its source, `needs` names the nuisances that it reads."""

    @property
    def paper(self) -> str:
        """Where the method comes from."""
        ...

    @property
    def needs(self) -> frozenset[Need]:
        """The nuisances that a fit reads; all others it must not."""
        ...

    def fit(self, task: FitTask, /) -> Fitted:
        """Fit a scorer of P(r* = 1 | x)."""
        ...


class FunctionMethod(NamedTuple):
    """A Method whose fit is a function."""

    fit: Callable[[FitTask], Fitted]
    paper: str
    needs: frozenset[Need] = frozenset()


def load_method(name: str) -> Method:
    """The estimator of this name or import path, "package.module:object" (see registry.ESTIMATORS); a class is instantiated.

    Raises ValueError for an unknown name, or for an object that is no Method.
    """
    try:
        found = ESTIMATORS.load(name)
    except ValueError as error:
        raise ValueError(f"method {error}") from error
    method = found() if isinstance(found, type) else found
    if not set(method.needs) <= set(get_args(Need)):
        raise ValueError(f"needs of method {name!r} must be a set of {', '.join(get_args(Need))}, got {method.needs!r}")
    return method
