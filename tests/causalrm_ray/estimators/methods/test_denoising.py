"""Every denoising method: what it may read, that it repeats itself and learns; and the parts that are its own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from causalrm_ray.data.collate import FeatureRows, TokenRows
from causalrm_ray.estimators.core.task import FitTask, Fitted, Nuisances, Observations
from causalrm_ray.estimators.core.training import FitSettings, predict
from causalrm_ray.estimators.methods.denoising import DENOISING, ilde_risk
from causalrm_ray.losses.label_noise import agreement_penalty, class_correlation, label_distribution
from causalrm_ray.losses.pointwise import bce, mse
from causalrm_ray.metrics import auroc
from causalrm_ray.models.scorers.heads import FeatureScorer
from causalrm_ray.types import NoiseRates

RATES = NoiseRates(0.2, 0.1)
SETTINGS = FitSettings(epochs=12, lr=0.02, batch_size=64, patience=4)
methods = pytest.mark.parametrize("name", DENOISING)


def world(rows: int = 800) -> tuple[Tensor, Observations, Tensor]:
    """Features, noisy observations, true labels; r* is a noisy linear function of x."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 3, generator=generator)
    clean = (x[:, 0] + 0.3 * torch.randn(rows, generator=generator) > 0).float()
    flip = torch.rand(rows, generator=generator) < torch.where(clean == 1, RATES.rho_01, RATES.rho_10)
    o = (torch.rand(rows, generator=generator) < 0.5).float()
    return x, Observations(o, torch.where(flip, 1 - clean, clean)), clean


def task(observations: Observations | None = None, **changes) -> FitTask:
    x, seen, _ = world()
    given = FitTask(
        lambda: FeatureScorer(3, (8,)),
        FeatureRows(x),
        seen if observations is None else observations,
        Nuisances(rates=RATES),
        torch.arange(600),
        torch.arange(600, 800),
        SETTINGS,
        bce,
    )
    return replace(given, **changes)


def weights(fitted: Fitted) -> Tensor:
    return torch.cat([value.detach().reshape(-1) for value in fitted.scorer.state_dict().values()])


@methods
def test_a_method_beats_chance_and_stays_finite(name: str) -> None:
    x, _, clean = world()
    fitted = DENOISING[name].fit(task())
    assert isinstance(fitted.scorer, FeatureScorer)
    assert auroc(predict(fitted.scorer, FeatureRows(x)), clean) > 0.8
    assert (
        min(epoch.train_risk for epoch in fitted.report.epochs) > -3 * 0.9
    )  # no risk falls without end; ILDE's penalty alone is below 0
    assert all(math.isfinite(figure) for figure in fitted.figures.values())


@methods
def test_feedback_that_was_not_given_is_never_read(name: str) -> None:
    _, observations, clean = world()
    given = DENOISING[name].fit(task())
    shuffled = clean[torch.randperm(len(clean), generator=torch.Generator().manual_seed(0))]
    for hidden in (clean, shuffled, torch.full_like(clean, math.nan)):
        unseen = Observations(observations.o, torch.where(observations.o == 1, observations.r, hidden))
        assert torch.equal(weights(DENOISING[name].fit(task(unseen))), weights(given))


@methods
def test_a_fit_is_deterministic_given_the_seed_and_leaves_the_global_generator_alone(name: str) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = DENOISING[name].fit(task())
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(weights(first), weights(DENOISING[name].fit(task())))
    assert not torch.equal(weights(first), weights(DENOISING[name].fit(task(settings=replace(SETTINGS, seed=1)))))


@methods
def test_a_method_reads_only_the_nuisances_it_needs(name: str) -> None:
    method, rows = DENOISING[name], 800
    assert method.paper
    mine = Nuisances(rates=RATES if "rates" in method.needs else NoiseRates(0.4, 0.4))
    other = replace(mine, propensity=torch.full((rows,), 0.01), imputation=torch.zeros(rows))
    assert torch.equal(weights(method.fit(task(nuisances=other))), weights(method.fit(task())))
    if "rates" in method.needs:
        with pytest.raises(ValueError, match=r"this method needs \['rates'\], got no rates"):
            method.fit(task(nuisances=Nuisances()))


@methods
def test_a_fit_without_any_feedback_names_what_is_missing(name: str) -> None:
    with pytest.raises(ValueError, match=r"must hold at least one row, got none|folds must be in"):
        DENOISING[name].fit(task(Observations(torch.zeros(800), torch.zeros(800))))


@methods
@pytest.mark.parametrize("r", [0.0, 1.0])
def test_a_fit_bears_feedback_of_one_kind_and_a_single_epoch(name: str, r: float) -> None:
    o = world()[1].o
    fitted = DENOISING[name].fit(task(Observations(o, torch.full_like(o, r)), settings=replace(SETTINGS, epochs=1), loss=mse))
    assert bool(torch.isfinite(weights(fitted)).all())


class TokenScorer(nn.Module):
    """A scorer of token ids under a zero head, so that every one starts alike, as a pretrained one does."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 1)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.arange(20.0).reshape(5, 4).sin())
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def states(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        inside = torch.arange(input_ids.shape[1]) < lengths[:, None]
        return (self.embedding(input_ids) * inside[..., None]).sum(dim=1)

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.states(input_ids, lengths)).squeeze(-1)


@methods
def test_a_method_works_on_token_ids_and_scorers_that_start_alike(name: str) -> None:
    x, _, clean = world()
    rows = TokenRows.of([[1, 2] if liked else [3] for liked in (x[:, 0] > 0).tolist()], pad_id=0)
    fitted = DENOISING[name].fit(task(make_scorer=TokenScorer, inputs=rows))
    assert auroc(predict(fitted.scorer, rows), clean) > 0.8


def test_ilde_risk_matches_a_loop_and_remembers() -> None:
    logit, r = torch.tensor([0.7, -0.4, -1.3]), torch.tensor([1.0, 0.0, 1.0])
    risk, rows, memory = ilde_risk(r), torch.arange(3), torch.zeros(3, 2)
    for _ in range(3):
        prob = torch.sigmoid(logit)
        matrix = class_correlation(prob)
        memory = 0.7 * memory + 0.3 * label_distribution(prob, matrix, 3.0)
        apart = matrix[0, 1] ** 2 + matrix[1, 0] ** 2
        expected = bce(logit, r) + 3.0 * agreement_penalty(prob, memory) + apart
        torch.testing.assert_close(risk(logit, rows), expected)
        logit = logit + 0.5
