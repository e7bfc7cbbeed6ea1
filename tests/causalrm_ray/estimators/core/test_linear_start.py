"""Linear starts: against scikit-learn, member by member, and as the start or the rival of what training finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.estimators.core import linear_start
from causalrm_ray.estimators.core.linear_start import SPREAD, fit_scorer, start_linear
from causalrm_ray.estimators.core.members import Folds, cross_fit_members, mean_where
from causalrm_ray.estimators.core.task import FitTask, Nuisances, Observations
from causalrm_ray.estimators.core.training import FitSettings, Objective, predict
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.models.scorers.heads import EnsembleScorer, FeatureScorer, WithHeads

ROWS, WIDTH, MEMBERS = 400, 5, 3


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features [N, D] of mean square 1, and labels [N] by a hinge of the first: no linear model is right."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    x = (x - x.mean(0)) / (x - x.mean(0)).square().mean().sqrt()
    return x, (torch.rand(ROWS, generator=generator) < torch.sigmoid(4 * x[:, 0].clamp_min(0) - 1 + x[:, 1])).float()


class Members(nn.Module):
    """The members' logits, and numbers that learn beside them."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.scorer = EnsembleScorer(x, members=MEMBERS, hidden=8)
        self.level = nn.Parameter(torch.zeros(MEMBERS))

    def forward(self, features: Tensor) -> Tensor:
        return self.scorer.members(features) + self.level


def fitted(x: Tensor, y: Tensor, taught: Tensor) -> Members:
    module = Members(x)

    def risk(output: Tensor, index: Tensor) -> Tensor:
        return bce(output, y[index].unsqueeze(1).expand_as(output))

    start_linear(
        module, FeatureRows(x), risk, torch.arange(ROWS), lambda index: taught[index], lambda: module.level.square().mean(), 0
    )
    return module


def test_a_start_is_the_ridge_regression_of_the_rows_that_teach_each_member() -> None:
    x, y = data()
    taught = torch.arange(ROWS).unsqueeze(1) % MEMBERS != torch.arange(MEMBERS)
    module = fitted(x, y, taught)
    for member in range(MEMBERS):
        rows = taught[:, member]
        # Its mean loss bears ridge / 2 |w|^2; scikit-learn minimises C times the sum of losses + |w|^2 / 2.
        share = int(rows.sum()) / ROWS
        exact = LogisticRegression(C=SPREAD / WIDTH / share, tol=1e-10, max_iter=1000).fit(x[rows], y[rows])
        # 30 steps of L-BFGS for all members at once leave the weights, of about 1, right to a few thousandths.
        assert module.scorer.linear[member].tolist() == pytest.approx(exact.coef_[0].tolist(), abs=0.01)
        assert float((module.scorer.bias + module.level).detach()[member]) == pytest.approx(float(exact.intercept_[0]), abs=0.01)


def test_the_hidden_layer_stays_as_it_was_and_adds_nothing_yet() -> None:
    x, y = data()
    torch.manual_seed(0)
    before = Members(x).scorer.inner.detach().clone()
    torch.manual_seed(0)
    module = fitted(x, y, torch.ones(ROWS, MEMBERS, dtype=torch.bool))
    assert module.training
    assert torch.equal(module.scorer.inner, before)
    assert not module.scorer.outer.any()
    expected = x @ module.scorer.linear.T + module.scorer.bias + module.level
    torch.testing.assert_close(predict(module, FeatureRows(x)), expected.detach())


def test_a_sample_shows_where_to_begin_and_the_seed_draws_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_start, "ROWS", 50)
    x, y = data()
    seen = []
    for seed in (0, 0, 1):
        module, asked = Members(x), []

        def risk(output: Tensor, index: Tensor, asked: list[Tensor] = asked) -> Tensor:
            asked.append(index)
            return bce(output, y[index].unsqueeze(1).expand_as(output))

        everyone = torch.arange(ROWS)
        everywhere = lambda index: torch.ones(len(index), MEMBERS)  # noqa: E731
        start_linear(module, FeatureRows(x), risk, everyone, everywhere, lambda: torch.zeros(()), seed)
        assert all(torch.equal(index, asked[0]) for index in asked)
        seen.append((asked[0].tolist(), module.scorer.linear.tolist()))
    assert len(set(seen[0][0])) == 50
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]


def test_a_risk_that_is_not_finite_is_refused() -> None:
    x, _ = data()
    everywhere = lambda index: torch.ones(len(index), MEMBERS)  # noqa: E731
    given = torch.arange(ROWS), everywhere, lambda: torch.zeros(()), 0
    with pytest.raises(FloatingPointError, match="a linear start must be finite"):
        start_linear(Members(x), FeatureRows(x), lambda output, index: output * torch.nan, *given)


@pytest.mark.parametrize(("epochs", "lr"), [(1, 1e-6), (60, 0.01)])
def test_a_rival_is_what_members_become_where_training_does_no_better(epochs: int, lr: float) -> None:
    x, y = data()
    settings = FitSettings(epochs, lr, 64, 20, 0.0)
    observations = Observations(torch.ones(ROWS), y)
    train, heldout = torch.arange(300), torch.arange(300, ROWS)
    task = FitTask(lambda: Members(x), FeatureRows(x), observations, Nuisances(), train, heldout, settings, bce)

    def risk(output: Tensor, index: Tensor) -> Tensor:
        return bce(output, y[index].unsqueeze(1).expand_as(output))

    def heldout_risks(how: str, given: FitTask = task) -> Tensor:
        torch.manual_seed(1)
        module, folds = Members(x), Folds(given, MEMBERS)
        found = cross_fit_members(given, module, risk, folds, torch.arange(ROWS), linear=how)
        return mean_where(risk(found.output, found.rows).T.unsqueeze(2), folds.unseen(found.rows).T)[:, 0]

    alone, rival = heldout_risks("none"), heldout_risks("rival")
    linear = heldout_risks("start", replace(task, settings=FitSettings(1, 1e-9, 64)))
    torch.testing.assert_close(rival, torch.minimum(alone, linear), atol=1e-5, rtol=0)
    assert bool((alone < linear).any()) == (epochs > 1)


@pytest.mark.parametrize("heads", [0, 1])
def test_a_linear_scorer_is_at_scikit_learns_optimum_however_small_the_steps(heads: int) -> None:
    """Of a share of 5 %: from 0, the bias alone has further to go than a few epochs take it."""
    x, _ = data()
    y = (torch.arange(ROWS) % 20 == 0).float()
    y[x[:, 0] > 1.8] = 1
    scorer = FeatureScorer(WIDTH, ())
    module = WithHeads(scorer, heads) if heads else scorer

    def risk(logit: Tensor, index: Tensor) -> Tensor:
        return bce(logit, y[index]) if heads == 0 else bce(logit[:, 0], y[index]) + bce(logit[:, 1], 1 - y[index])

    objective = Objective(torch.arange(ROWS), risk)
    report = fit_scorer(module, FeatureRows(x), objective, objective, FitSettings(1, 1e-6, 64, weight_decay=0.0))
    best = LogisticRegression(C=SPREAD / WIDTH, tol=1e-8).fit(x.numpy(), y.numpy())
    logit = predict(scorer, FeatureRows(x))
    assert torch.allclose(logit, torch.from_numpy(best.decision_function(x.numpy())).float(), atol=2e-3)
    assert float(torch.sigmoid(logit).mean()) == pytest.approx(float(y.mean()), abs=1e-3)
    assert len(report.epochs) == 1


@pytest.mark.parametrize("make", [lambda x: FeatureScorer(WIDTH, (4,)), lambda x: EnsembleScorer(x, members=1)])
def test_a_scorer_with_a_hidden_layer_begins_as_before(make: Callable[[Tensor], nn.Module]) -> None:
    x, y = data()
    first, second = make(x), make(x)
    second.load_state_dict(first.state_dict())
    objective, settings = Objective(torch.arange(ROWS), lambda logit, index: bce(logit, y[index])), FitSettings(2, 1e-3, 64)
    linear_start.fit(first, FeatureRows(x), objective, objective, settings)
    fit_scorer(second, FeatureRows(x), objective, objective, settings)
    assert torch.equal(predict(first, FeatureRows(x)), predict(second, FeatureRows(x)))
