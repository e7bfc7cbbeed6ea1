"""What a fit says of parts of a log: noise rates and selection by observed group, and noise by feedback signal."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from causalrm_ray.errors import InputError
from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.diagnostics.intervals import StratumSelection, selection_by_stratum
from causalrm_ray.estimators.diagnostics.selection_posterior import Explained
from causalrm_ray.estimators.nuisances.noise_rates import NoiseEstimate, noise_rates_by
from causalrm_ray.estimators.nuisances.signals import SignalRate, signal_rates


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows by an observed trait: `number` [N] of each row's group, and the groups' `names`."""

    number: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Signals:
    """Feedback by signal: `place` [N] in `names`, -1 without feedback, and the label r in {0, 1} that each stands for."""

    place: Tensor
    names: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class GroupReport:
    """By group: noise rates, and P(o = 1 | r*); either may be None, and `fault` says why, where the log does not identify it."""

    rates: dict[str, NoiseEstimate] | None
    selection: dict[str, StratumSelection] | None
    fault: str | None = None


def diagnose_groups(
    ranking: Tensor | None, log: Explained | None, observations: Observations, groups: Groups, seed: int = 0
) -> GroupReport:
    """Rates by `ranking` [N] (see noise_rates_by), and selection as a fit explains the `log` (see selection_by_stratum).

    What lacks its ranking or explanation is None.
    """
    found = selection = fault = None
    try:
        if ranking is not None:
            found = noise_rates_by(ranking, observations, groups.number, groups.names, seed=seed)
    except InputError as error:
        fault = str(error)
    if log is not None:
        selection = selection_by_stratum(log, observations, groups.number, groups.names)
    return GroupReport(found, selection, fault)


def diagnose_signals(
    ranking: Tensor | None, signals: Signals, seed: int = 0, cluster: Tensor | None = None
) -> dict[str, SignalRate] | None:
    """P(signal | r*, o = 1) of each signal; None without a ranking [N]. `cluster` [N] as that of Observations."""
    if ranking is None:
        return None
    return signal_rates(ranking, signals.place, signals.names, signals.labels, seed=seed, cluster=cluster)
