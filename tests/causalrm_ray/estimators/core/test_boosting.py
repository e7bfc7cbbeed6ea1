"""Boosted members: each is asked of what it did not learn from, weights are the risk's, and a log chooses the better heads."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import Tensor

from causalrm_ray.api import RewardEstimator
from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.errors import InputError
from causalrm_ray.estimators.core.boosting import LabelModel, fit_members
from causalrm_ray.estimators.core.members import Folds
from causalrm_ray.estimators.core.task import FitTask, Nuisances, Observations, load_method
from causalrm_ray.estimators.core.training import FitSettings, predict
from causalrm_ray.losses.pointwise import bce, mse
from causalrm_ray.metrics import auroc
from causalrm_ray.models.scorers.trees import BoostedScorer
from causalrm_ray.types import NoiseRates

ROWS, TRAIN, HELD_OUT = 2400, torch.arange(1900), torch.arange(1900, 2400)


def table(seed: int = 0) -> tuple[Tensor, Observations, Tensor]:
    """Features [N, 6] of which the signs of two decide together, as cells of a table do; feedback on half; P(r* = 1 | x) [N]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 6, generator=generator)
    liking = torch.where(x[:, 0] * x[:, 1] > 0, 0.85, 0.15)
    clean = (torch.rand(ROWS, generator=generator) < liking).float()
    return x, Observations((torch.rand(ROWS, generator=generator) < 0.5).float(), clean), liking


def task(**given) -> FitTask:
    x, observations, _ = table()
    settings, head = FitSettings(5, 0.01, 128, seed=3), given.pop("head", "boosting")
    make = lambda: None  # noqa: E731  # trees need none
    nuisances = given.pop("nuisances", Nuisances())
    return FitTask(make, FeatureRows(x), observations, nuisances, TRAIN, HELD_OUT, settings, given.pop("loss", bce), head=head)


RATES = NoiseRates(0.1, 0.05)


def members(given: FitTask, rival: Tensor | None = None, rates: NoiseRates = RATES) -> tuple[Folds, LabelModel | None]:
    folds, rows = Folds(given, 3), torch.arange(ROWS)
    return folds, fit_members(given, folds, (given.observations.o == 1).nonzero()[:, 0], rows, rates, rival)


def test_each_member_is_asked_of_what_it_did_not_learn_from() -> None:
    given = task()
    folds, found = members(given)
    own = folds.unseen(torch.arange(ROWS))
    assert own.sum(1).tolist() == [1] * ROWS
    opinion = torch.sigmoid(found.scorer.opinions(given.inputs.features).logits_BK)[own]
    torch.testing.assert_close(found.opinion, opinion, atol=1e-6, rtol=1e-4)
    assert auroc(found.opinion, (table()[2] > 0.5).float()) > 0.95
    said = (0.05 + 0.85 * opinion)[given.observations.o == 1].double()  # what feedback says lies within the noise channel
    labels = given.observations.r[given.observations.o == 1]
    torch.testing.assert_close(found.risk.double(), -torch.where(labels == 1, said, 1 - said).log(), atol=1e-5, rtol=1e-4)


def test_a_member_keeps_as_many_trees_as_suit_its_fold_best() -> None:
    _, found = members(task())
    kept = (found.scorer.value != 0).flatten(2).any(2).sum(1).tolist()
    assert max(kept) == found.scorer.value.shape[1] < 400
    risks = [epoch.validation_risk for epoch in found.report.epochs]
    assert [epoch.number for epoch in found.report.epochs] == list(range(1, len(risks) + 1))
    assert found.report.best.validation_risk == min(risks) < math.log(2)
    assert len(risks) >= min(kept)


@pytest.mark.parametrize(("better", "found"), [(-0.2, False), (0.0, False), (0.2, True)])
def test_trees_are_chosen_only_where_they_are_surely_better(better: float, found: bool) -> None:
    """Against heads of which the risk is theirs plus `better` nats in each row, give or take a nat."""
    own = members(task())[1].risk
    noise = torch.randn(len(own), generator=torch.Generator().manual_seed(2))
    assert (members(task(), own + better + noise - noise.mean())[1] is not None) == found


def test_folds_without_feedback_are_refused_with_what_helps() -> None:
    few = task()
    r = torch.zeros(ROWS)
    r[(few.observations.o == 1).nonzero()[0, 0]] = 1.0
    with pytest.raises(InputError, match=r"both kinds in any others, got \d+ labels, 1 of them positive: use kind mlp"):
        members(replace(few, observations=Observations(few.observations.o, r)))


@pytest.mark.parametrize("name", ["naive", "ips"])
def test_a_weighted_risk_is_that_of_scikit_learn_with_its_weights(name: str) -> None:
    propensity = torch.rand(ROWS, generator=torch.Generator().manual_seed(5)) * 0.8 + 0.1
    given = task(nuisances=Nuisances(propensity))
    fitted = load_method(name).fit(given)
    assert isinstance(fitted.scorer, BoostedScorer)
    o, r, x = given.observations.o, given.observations.r, given.inputs.features.numpy()
    weight = 1 / propensity if name == "ips" else torch.ones(ROWS)
    learn, measure = (rows[o[rows] == 1] for rows in (TRAIN, HELD_OUT))
    # Weights matter up to a factor for the trees but for their ridge: those of the risk average over all rows.
    scale = [len(seen) / len(rows) for seen, rows in ((learn, TRAIN), (measure, HELD_OUT))]
    if name == "naive":
        scale = [1.0, 1.0]
    model = HistGradientBoostingClassifier(
        learning_rate=0.1, max_iter=400, max_leaf_nodes=16, l2_regularization=20.0, max_features=0.3,
        early_stopping=True, n_iter_no_change=10, random_state=3,
    )  # fmt: skip
    model.fit(
        x[learn], r[learn], (weight[learn] * scale[0]).numpy(),
        X_val=x[measure], y_val=r[measure].numpy(), sample_weight_val=(weight[measure] * scale[1]).numpy(),
    )  # fmt: skip
    best = int(model.validation_score_.argmax())  # trees: the first score is of none
    expected = torch.from_numpy(next(itertools.islice(model.staged_predict_proba(x), best - 1, None))[:, 1])
    torch.testing.assert_close(torch.sigmoid(predict(fitted.scorer, given.inputs)).double(), expected, atol=2e-5, rtol=0)
    assert (len(fitted.report.epochs), fitted.report.best.number) == (len(model.validation_score_) - 1, best)
    assert fitted.report.best.validation_risk == pytest.approx(-model.validation_score_.max())
    with pytest.raises(ValueError, match="loss='bce'"):
        load_method(name).fit(replace(given, loss=mse))


@pytest.mark.parametrize(("world", "kind"), [("table", "BoostedScorer"), ("smooth", "EnsembleScorer")])
def test_a_log_chooses_its_heads_by_what_it_holds_out(world: str, kind: str) -> None:
    x, observations, _ = table()
    if world == "smooth":
        generator = torch.Generator().manual_seed(1)
        clean = (torch.rand(ROWS, generator=generator) < torch.sigmoid(2 * x[:, 0] - x[:, 1])).float()
        observations = Observations(observations.o, clean)
    y = torch.where(observations.o == 1, observations.r, torch.nan).numpy()
    model = RewardEstimator("two_stage", epochs=2).fit(x.numpy(), y)
    assert type(model.scorer_).__name__ == kind


def test_kinds_of_heads_are_fitted_saved_and_refused(tmp_path) -> None:
    x, observations, liking = table()
    y = torch.where(observations.o == 1, observations.r, torch.nan).numpy()
    clean = np.where(
        np.arange(ROWS) % 12 == 0, (liking > 0.5).numpy().astype(float), np.nan
    )  # judged rows set the level of trees too
    for method, given in (("naive", None), ("two_stage", clean), ("auto", clean)):
        model = RewardEstimator(method, kind="boosting", epochs=2).fit(x.numpy(), y, clean=given)
        model.save(tmp_path / method)
        again = RewardEstimator.load(tmp_path / method)
        assert again.kind == "boosting"
        assert again.predict_proba(x.numpy()).tolist() == model.predict_proba(x.numpy()).tolist()
        assert auroc(torch.from_numpy(model.predict_proba(x.numpy())[:, 1]), (liking > 0.5).float()) > 0.95
    for method, layers in (("naive", {"body"}), ("two_stage", {"inner"})):
        model = RewardEstimator(method, kind="linear", epochs=2, rho=(0.1, 0.1)).fit(x.numpy(), y)  # no line ranks these rows
        hidden = [value for name, value in model.scorer_.named_parameters() if name.split(".")[0] in layers]
        assert sum(value.numel() for value in hidden) == 0
    with pytest.raises(ValueError, match="kind boosting fits naive, ips, snips, two_stage, auto, got method 'causalrm_dr': use"):
        RewardEstimator("causalrm_dr", kind="boosting").fit(x.numpy(), y)
    with pytest.raises(ValueError, match="kind"):
        RewardEstimator(kind="forest").fit(x.numpy(), y)
