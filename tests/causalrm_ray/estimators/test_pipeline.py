"""One whole fit: what it may read, what it gives, and that correcting helps where the theory says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.estimators.core.task import Nuisances, Observations
from causalrm_ray.estimators.core.training import FitSettings, predict
from causalrm_ray.estimators.nuisances.noise_rates import anchors
from causalrm_ray.estimators.pipeline import RewardFits, fit_reward_models, heldout_objective
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.metrics import auroc, r2
from causalrm_ray.models.scorers.heads import FeatureScorer
from causalrm_ray.registry import ESTIMATORS
from causalrm_ray.types import NoiseRates

SETTINGS = FitSettings(epochs=10, lr=0.03, batch_size=128, patience=3)
RATES = NoiseRates(0.25, 0.1)


def world(rows: int = 3000) -> tuple[FeatureRows, Observations, Tensor, Tensor]:
    """Inputs, observations, true propensity, true labels; missing at random, noisy, and r* a sharp function of x."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, 2, generator=generator)
    clean = (x[:, 0] > 0).float()
    propensity = torch.sigmoid(1.5 * x[:, 1] - 0.5)
    wrong = torch.where(clean == 1, RATES.rho_01, RATES.rho_10)
    r = torch.where(torch.rand(rows, generator=generator) < wrong, 1 - clean, clean)
    return FeatureRows(x), Observations((torch.rand(rows, generator=generator) < propensity).float(), r), propensity, clean


def fitted(
    observations: Observations, clean: Tensor | None = None, methods: tuple[str, ...] = ESTIMATORS.names(), seed: int = 0, **given
) -> RewardFits:
    inputs, _, propensity, _ = world()
    names, settings = (*methods, "oracle") if clean is not None else methods, replace(SETTINGS, seed=seed)
    return fit_reward_models(
        lambda: FeatureScorer(2, (8,)),
        inputs,
        observations,
        propensity,
        names,
        settings,
        clean_labels=clean,
        **given,
    )


def weights(module: nn.Module) -> Tensor:
    return torch.cat([value.detach().reshape(-1) for value in module.state_dict().values()])


def test_fit_never_reads_oracle_labels() -> None:
    _, observations, _, clean = world()
    shuffled = clean[torch.randperm(len(clean), generator=torch.Generator().manual_seed(0))]
    unseen = Observations(observations.o, torch.where(observations.o == 1, observations.r, shuffled))
    honest, blind = fitted(observations, clean), fitted(unseen, shuffled)
    for name in ESTIMATORS.names():
        assert torch.equal(weights(honest.fits[name].scorer), weights(blind.fits[name].scorer)), name
        assert honest.risks[name] == blind.risks[name]
    assert honest.noise == blind.noise
    assert not torch.equal(weights(honest.fits["oracle"].scorer), weights(blind.fits["oracle"].scorer))


def test_correcting_beats_naive_and_recovers_the_rates() -> None:
    inputs, observations, _, clean = world()
    fits = fitted(observations, methods=("naive", "causalrm_dr"))
    score = {name: r2(torch.sigmoid(predict(fit.scorer, inputs)), clean) for name, fit in fits.fits.items()}
    assert score["causalrm_dr"] > score["naive"] + 0.1
    assert fits.noise is not None
    assert abs(fits.rates.rho_01 - RATES.rho_01) < 0.1
    assert abs(fits.rates.rho_10 - RATES.rho_10) < 0.1
    assert fits.risks["causalrm_dr"] < fits.risks["naive"]


def test_fit_is_deterministic_given_the_seed() -> None:
    _, observations, _, _ = world()
    first, second = (fitted(observations, methods=("causalrm_dr",), seed=3) for _ in range(2))
    assert torch.equal(weights(first.fits["causalrm_dr"].scorer), weights(second.fits["causalrm_dr"].scorer))
    other = fitted(observations, methods=("causalrm_dr",), seed=4)
    assert not torch.equal(weights(first.fits["causalrm_dr"].scorer), weights(other.fits["causalrm_dr"].scorer))


def test_known_rates_are_used_and_nothing_needless_is_fitted() -> None:
    _, observations, _, _ = world()
    fits = fitted(observations, methods=("causalrm_ips",), rates=RATES)
    assert (fits.rates, fits.noise, fits.proxy, fits.imputation) == (RATES, None, None, None)
    assert fits.fits.keys() == {"causalrm_ips"}


def test_a_fit_has_one_set_of_nuisances_that_of_its_first_method() -> None:
    """Rates and propensities that `auto` finds itself judge all methods; the labels' curve serves the others alone."""
    _, observations, _, _ = world()
    both = fitted(observations, methods=("auto", "causalrm_ips"))
    own = both.fits["auto"]
    assert (both.rates, both.noise) == (own.rates, None)
    assert both.selection is own.propensities is not None
    curve = fitted(observations, methods=("causalrm_ips",))
    assert torch.equal(weights(curve.fits["causalrm_ips"].scorer), weights(both.fits["causalrm_ips"].scorer))
    assert curve.noise is not None
    assert curve.rates == curve.noise.rates != both.rates
    assert curve.selection is None


def test_the_gate_judges_by_the_held_out_rows_with_feedback() -> None:
    inputs, observations, propensity, _ = world()
    fits = fitted(observations, methods=("causalrm_ips",), rates=RATES)
    nuisances = Nuisances(propensity, fits.rates, fits.imputation)
    gate = heldout_objective(observations, nuisances, bce, fits.heldout, fits.selection)
    logit = predict(fits.fits["causalrm_ips"].scorer, inputs, gate.rows)
    assert float(gate.risk(logit, gate.rows).mean()) == pytest.approx(fits.risks["causalrm_ips"])
    assert torch.equal(gate.rows, fits.heldout[observations.o[fits.heldout] == 1])
    assert len(fits.heldout) == 600


def test_bad_requests_are_named() -> None:
    inputs, observations, propensity, clean = world()

    def request(observations: Observations, propensity: Tensor, methods: tuple[str, ...], **given) -> RewardFits:
        return fit_reward_models(lambda: FeatureScorer(2, ()), inputs, observations, propensity, methods, SETTINGS, **given)

    with pytest.raises(ValueError, match=r"method must be one of .*causalrm_dr, .*, got 'causal'; did you mean 'causalrm_"):
        request(observations, propensity, ("causal",))
    with pytest.raises(ValueError, match="clean_labels go with the method 'oracle'"):
        request(observations, propensity, ("oracle",))
    with pytest.raises(ValueError, match="clean_labels go with the method 'oracle'"):
        request(observations, propensity, ("naive",), clean_labels=clean)
    with pytest.raises(ValueError, match=r"loss must be one of \['bce', 'mse'\], got 'hinge'"):
        request(observations, propensity, ("naive",), loss="hinge")
    with pytest.raises(ValueError, match=r"propensity must be in \(0, 1\], got min=0"):
        request(observations, torch.zeros_like(propensity), ("naive",))
    with pytest.raises(ValueError, match="rows must match"):
        request(observations, propensity[:-1], ("naive",))
    for o, label in ((torch.zeros(3000), 0.0), (torch.ones(3000), 1.0)):
        with pytest.raises(ValueError, match="r of the training rows with feedback must hold both classes"):
            request(Observations(o, torch.full((3000,), label)), propensity, ("naive",))


def test_the_papers_anchors_are_an_option() -> None:
    _, observations, _, _ = world()
    fits = fitted(observations, methods=(), noise_rates="anchors")
    assert fits.proxy is not None
    assert fits.noise is not None
    assert fits.rates == fits.noise.rates == anchors(fits.proxy)
    assert fits.noise.rho_01_interval[0] <= fits.rates.rho_01 <= fits.noise.rho_01_interval[1]
    assert fits.noise.rho_10_interval[0] <= fits.rates.rho_10 <= fits.noise.rho_10_interval[1]
    assert 0 < fits.noise.rho_01_anchors < 0.2 * len(fits.proxy)


THIRD_PARTY = """
from causalrm_ray.estimators.core.task import Fitted
from causalrm_ray.estimators.core.training import Objective

class LogisticIps:
    paper = "-"
    needs = frozenset({"propensity"})

    def fit(self, task):
        scorer, o, r, p = task.scorer(), task.observations.o, task.observations.r, task.nuisances.propensity
        objective = lambda rows: Objective(rows, lambda logit, index: (o / p)[index] * task.loss(logit, r[index]))
        return Fitted(scorer, task.minimise(scorer, objective), {"mine": 1.0})

METHODS = {"ips": LogisticIps()}
"""


def test_an_estimator_of_another_package_is_fitted_by_its_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "third_party.py").write_text(THIRD_PARTY)
    monkeypatch.syspath_prepend(tmp_path)
    inputs, observations, _, clean = world()
    names = ("third_party:LogisticIps", "third_party:METHODS.ips", "ips")
    fits = fitted(observations, methods=names).fits
    theirs, instance, ours = (torch.sigmoid(predict(fits[name].scorer, inputs)) for name in names)
    assert fits[names[0]].figures == {"mine": 1.0}
    assert torch.equal(theirs, instance)
    assert auroc(theirs, clean) > 0.9
    torch.testing.assert_close(theirs, ours, atol=0.1, rtol=0)
    with pytest.raises(ValueError, match="estimator 'third_party:THIRD' cannot be imported"):
        fitted(observations, methods=("third_party:THIRD",))
    with pytest.raises(ValueError, match=r"method estimator 'third_party:METHODS' must have the attributes paper, needs, fit"):
        fitted(observations, methods=("third_party:METHODS",))
