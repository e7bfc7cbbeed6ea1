"""Every method of the table: its objective's mean is its estimator, and it reads what it says it needs and no more."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from causalrm_ray.estimators.core.task import Nuisances, Observations
from causalrm_ray.estimators.core.training import Objective
from causalrm_ray.estimators.methods.reweighting import ABLATIONS, REWEIGHTING, oracle_objective
from causalrm_ray.losses import reweighted
from causalrm_ray.losses.pointwise import Loss, bce, bounded_bce, mse
from causalrm_ray.losses.surrogate import surrogate
from causalrm_ray.types import NoiseRates

O = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])  # noqa: E741 the symbol of the paper
R = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
P = torch.tensor([0.5, 0.1, 0.25, 0.8, 0.3, 0.9])
M = torch.tensor([0.9, 0.2, 0.4, 0.7, 0.5, 0.1])
LOGIT = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0, -0.2])
RATES = NoiseRates(0.2, 0.1)
ROWS = torch.arange(5)  # the objective covers a part of the log
NUISANCES = Nuisances(P, RATES, M)


def value(objective: Objective) -> Tensor:
    return objective.risk(LOGIT[objective.rows], objective.rows).mean()


def expected(name: str, loss: Loss) -> Tensor:
    o, r, p, m, s = O[ROWS], R[ROWS], P[ROWS], M[ROWS], LOGIT[ROWS]
    clean, corrected = loss(s, r), surrogate(loss, s, r, RATES)
    return {
        "naive": reweighted.naive_weights(o) * clean,
        "ips": reweighted.ips(clean, o, p),
        "snips": reweighted.snips(clean, o, p),
        "dr": reweighted.dr(clean, o, p, loss(s, m)),
        "causalrm_ips": reweighted.ips(corrected, o, p),
        "causalrm_snips": reweighted.snips(corrected, o, p),
        "causalrm_dr": reweighted.dr(corrected, o, p, loss(s, m)),
        "causalrm_ips_surrogate": reweighted.naive_weights(o) * corrected,
        "causalrm_dr_surrogate": reweighted.dr(corrected, o, torch.full_like(p, 3 / 5), loss(s, m)),
    }[name].mean()


@pytest.mark.parametrize("loss", [bce, bounded_bce, mse], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("name", REWEIGHTING)
def test_mean_of_an_objective_is_the_estimator(name: str, loss: Loss) -> None:
    objective = REWEIGHTING[name].build(Observations(O, R), NUISANCES, loss, ROWS)
    torch.testing.assert_close(value(objective), expected(name, loss))


@pytest.mark.parametrize("name", REWEIGHTING)
def test_risk_is_invariant_to_how_rows_are_split(name: str) -> None:
    objective = REWEIGHTING[name].build(Observations(O, R), NUISANCES, bce, ROWS)
    apart = [objective.risk(LOGIT[row : row + 1], torch.tensor([row])) for row in objective.rows.tolist()]
    torch.testing.assert_close(torch.cat(apart), objective.risk(LOGIT[objective.rows], objective.rows))


@pytest.mark.parametrize("name", REWEIGHTING)
def test_a_method_reads_only_the_nuisances_it_needs(name: str) -> None:
    method = REWEIGHTING[name]
    others = {"propensity": torch.full((6,), 0.01), "rates": NoiseRates(0.4, 0.4), "imputation": torch.zeros(6)}
    mine = {need: getattr(NUISANCES, need) for need in method.needs}
    torch.testing.assert_close(
        value(method.build(Observations(O, R), Nuisances(**{**others, **mine}), bce, ROWS)), expected(name, bce)
    )
    for need in method.needs:
        with pytest.raises(ValueError, match=f"needs .*got no {need}"):
            method.build(Observations(O, R), Nuisances(**{**mine, need: None}), bce, ROWS)


@pytest.mark.parametrize("name", REWEIGHTING)
def test_feedback_that_was_not_given_is_never_read(name: str) -> None:
    for hidden in (1.0, math.nan):
        observations = Observations(O, torch.where(O == 1, R, torch.full_like(R, hidden)))
        torch.testing.assert_close(value(REWEIGHTING[name].build(observations, NUISANCES, bce, ROWS)), expected(name, bce))


def test_nuisances_are_left_as_they_were() -> None:
    kept = Nuisances(P.double(), RATES, M.double())
    REWEIGHTING["causalrm_dr"].build(Observations(O.double(), R.double()), kept, bce, ROWS)
    assert torch.equal(kept.imputation, M.double())


def test_causalrm_methods_reduce_to_their_bases_if_noise_free() -> None:
    clean = Nuisances(P, NoiseRates(0.0, 0.0), M)
    for ours, base in (("causalrm_dr", "dr"), ("causalrm_ips", "ips"), ("causalrm_snips", "snips")):
        built = [REWEIGHTING[name].build(Observations(O, R), clean, mse, ROWS) for name in (ours, base)]
        torch.testing.assert_close(value(built[0]), value(built[1]))


def test_only_methods_that_subtract_losses_bound_them() -> None:
    bounded = {name for name, method in REWEIGHTING.items() if method.pointwise(bce) is bounded_bce}
    assert bounded == {name for name in REWEIGHTING if name.startswith("causalrm_")} | {"dr"}
    assert all(method.pointwise(mse) is mse for method in REWEIGHTING.values())


def test_ablations_read_one_half_of_what_the_full_method_reads() -> None:
    assert ABLATIONS.keys() == {"causalrm_ips", "causalrm_dr"}
    for full, (reweighting, only_surrogate) in ABLATIONS.items():
        assert REWEIGHTING[reweighting].needs == REWEIGHTING[full].needs - {"rates"}
        assert REWEIGHTING[only_surrogate].needs == REWEIGHTING[full].needs - {"propensity"}


def test_oracle_objective_is_the_ideal_risk() -> None:
    clean = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(value(oracle_objective(clean, bce, ROWS)), bce(LOGIT, clean)[ROWS].mean())


def test_bad_observations_and_nuisances_are_named() -> None:
    with pytest.raises(ValueError, match=r"o must be 0 or 1, got 2\.0 at position 0"):
        Observations(torch.tensor([2.0]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="r where o = 1 must be finite, got nan"):
        Observations(torch.tensor([1.0]), torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="rows must match"):
        Observations(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match=r"propensity must be in \(0, 1\]"):
        Nuisances(torch.zeros(2))
    with pytest.raises(ValueError, match=r"imputation must be in \[0, 1\], got min=2 max=2"):
        Nuisances(imputation=torch.full((2,), 2.0))
    with pytest.raises(ValueError, match="at least one row with feedback"):
        REWEIGHTING["naive"].build(Observations(torch.zeros(2), torch.zeros(2)), Nuisances(), bce, torch.arange(2))
    with pytest.raises(ValueError, match="rows must match"):
        REWEIGHTING["ips"].build(Observations(O, R), Nuisances(torch.ones(3)), bce, ROWS)
