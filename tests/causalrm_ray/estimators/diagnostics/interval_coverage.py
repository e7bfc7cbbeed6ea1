"""Coverage of the intervals of whole fits, which takes too long for a test.

    python -m tests.causalrm_ray.estimators.diagnostics.interval_coverage WORLD

    worlds drawn at random -> logs -> fits by auto -> intervals -> share of them that hold the truth

Worlds: "label", opinions of two grades decide who gives feedback, in two strata; "features", only features do; "shift", features
and opinions do, in two strata. Rates are drawn from the fits' prior, all else from narrower ones than those of
selection_posterior.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.core.training import FitSettings
from causalrm_ray.estimators.diagnostics.intervals import FitIntervals, StratumSelection, fit_intervals, selection_by_stratum
from causalrm_ray.estimators.diagnostics.selection_posterior import explained
from causalrm_ray.estimators.pipeline import fit_reward_models
from causalrm_ray.models.scorers.heads import FeatureScorer
from causalrm_ray.types import NoiseRates

WORLDS = ("label", "features", "shift")
WIDTH = 16
NAMES = ("web", "phone")


@dataclass(frozen=True, eq=False)
class World:
    """A log of N rows: features [N, WIDTH], observations, strata [N] in 0..1, and the truth: logits `f` of P(r* = 1 | x) [N],
    P(o = 1 | x, r* = k) `chances` [N], k = 1, 0, and the rates."""

    x: Tensor
    observations: Observations
    strata: Tensor
    f: Tensor
    chances: tuple[Tensor, Tensor]
    rates: NoiseRates

    @property
    def preference(self) -> float:
        """E[r*]."""
        return float(torch.sigmoid(self.f).mean())

    def on(self, stratum: int) -> tuple[float, float]:
        """P(o = 1 | r* = k) of a stratum, k = 1, 0."""
        among = self.strata == stratum
        shares = torch.sigmoid(self.f), torch.sigmoid(-self.f)
        on1, on0 = (float((p * e)[among].sum() / e[among].sum()) for p, e in zip(self.chances, shares, strict=True))
        return on1, on0


def draw_world(kind: str, rows: int, seed: int) -> World:
    """A world and its log; see the module."""
    generator = torch.Generator().manual_seed(seed)
    uniform, normal = partial(torch.rand, generator=generator), partial(torch.randn, generator=generator)
    rates = torch.sigmoid(math.log(0.3 / 0.7) + 0.1**0.5 * normal(2)) / 2
    x, strata = normal(rows, WIDTH), (uniform(rows) < 0.5).long()
    way, base = (direction / direction.norm() for direction in (normal(WIDTH), normal(WIDTH)))
    f = x @ way * (1 + 2 * uniform(1)) + 0.5 * normal(1)
    utility = f + torch.logit(uniform(rows).clamp(1e-6, 1 - 1e-6))
    if kind == "label":
        a, c, d = torch.logit(0.05 + 0.2 * uniform(2)), 0.7 * normal(2), 0.5**0.5 * normal(2)
        grades = [a[strata] + d[strata] * sign / 2 for sign in (1, -1)]
        strong, mild = (torch.sigmoid(grade + c[strata]) for grade in grades)
        high = torch.sigmoid(f - 1) / torch.sigmoid(f)
        bad = torch.sigmoid(-f - 1) / torch.sigmoid(-f)  # the share of the disliked with a strong opinion
        weak, strong0 = torch.sigmoid(grades[0]), torch.sigmoid(grades[1])
        chances = high * strong + (1 - high) * mild, (1 - bad) * weak + bad * strong0
        given = torch.where(utility > 0, torch.where(utility > 1, strong, mild), torch.where(utility > -1, weak, strong0))
    else:
        c = normal(1) if kind == "shift" else torch.zeros(1)
        level = x @ base * (0.3 + 0.7 * uniform(1)) - 1.5 + 0.8 * strata
        chances = torch.sigmoid(level + c), torch.sigmoid(level)
        given = torch.where(utility > 0, *chances)
    clean = utility > 0
    wrong = uniform(rows) < torch.where(clean, rates[0], rates[1])
    observations = Observations((uniform(rows) < given).float(), (clean ^ wrong).float())
    return World(x, observations, strata, f, chances, NoiseRates(*rates.double().tolist()))


def hits(found: FitIntervals, by_stratum: dict[str, StratumSelection], world: World) -> dict[str, float]:
    """Whether each interval holds the truth, 1 or 0."""
    assert found.rho_01 is not None
    assert found.rho_10 is not None
    ends = {
        "rho_01": (found.rho_01.low, world.rates.rho_01, found.rho_01.high),
        "rho_10": (found.rho_10.low, world.rates.rho_10, found.rho_10.high),
        "E[r*]": (found.preference.low, world.preference, found.preference.high),
    }
    for place, name in enumerate(NAMES):
        one, (on1, on0) = by_stratum[name], world.on(place)
        for figure, interval, truth in (
            ("liked", one.liked_interval, on1),
            ("disliked", one.disliked_interval, on0),
            ("ratio", one.ratio_interval, on1 / on0),
        ):
            ends[f"{figure} {name}"] = (interval[0], truth, interval[1])
    return {name: float(low <= truth <= high) for name, (low, truth, high) in ends.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("world", choices=WORLDS)
    parser.add_argument("--method", default="auto")
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--simulations", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for seed in range(given.seed, given.seed + given.simulations):
        world = draw_world(given.world, given.rows, seed)
        log, strata = world.observations, None if given.world == "features" else world.strata
        make = partial(FeatureScorer, WIDTH, (64,), 0.5)
        propensity, settings = torch.full((given.rows,), float(log.o.mean())), FitSettings(60, 5e-4, 512, 10, 0.1, seed)
        fits = fit_reward_models(make, FeatureRows(world.x), log, propensity, [given.method], settings, strata=strata)
        explanation = explained(fits, given.method)
        assert explanation is not None
        by_stratum = selection_by_stratum(explanation, log, world.strata, NAMES)
        found.append(hits(fit_intervals(explanation, log, strata), by_stratum, world))
    for name in found[0]:
        print(f"{given.world} {name}: {sum(one[name] for one in found) / len(found):.3f} of {len(found)}")


if __name__ == "__main__":
    main()
