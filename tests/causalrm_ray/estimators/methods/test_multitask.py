"""Multi-task methods: what they read, that they repeat, that they learn, and that no one of them runs away."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from causalrm_ray.data.collate import FeatureRows, TokenRows
from causalrm_ray.estimators.core.task import FitTask, Fitted, Nuisances, Observations
from causalrm_ray.estimators.core.training import FitSettings, predict
from causalrm_ray.estimators.methods.multitask import MULTITASK, MultiTask, cvib_objective
from causalrm_ray.losses.pointwise import bce, bounded_bce, mse
from causalrm_ray.metrics import auroc
from causalrm_ray.models.reward_model import SequenceScorer
from causalrm_ray.models.scorers.heads import FeatureScorer
from causalrm_ray.types import NoiseRates

ROWS, WIDTH = 800, 6
SETTINGS = FitSettings(epochs=8, lr=0.01, batch_size=64, patience=3, seed=3)
methods = pytest.mark.parametrize("name", MULTITASK)


class World:
    """Rows whose liking and whose chance of feedback both depend on the features; one label in eight is flipped."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.features = torch.randn(ROWS, WIDTH, generator=generator)
        self.clean = (self.features[:, 0] + 0.5 * self.features[:, 1] > 0).float()
        chance = torch.sigmoid(self.features[:, 0] + self.features[:, 2] - 0.8)
        self.o = (torch.rand(ROWS, generator=generator) < chance).float()
        flipped = torch.rand(ROWS, generator=generator) < 0.125
        self.r = torch.where(flipped, 1 - self.clean, self.clean)

    def task(self, hidden: Tensor | float = 0.0, nuisances: Nuisances | None = None, **changes) -> FitTask:
        r = torch.where(self.o == 1, self.r, torch.as_tensor(hidden))
        rows = torch.arange(ROWS)
        settings = changes.pop("settings", SETTINGS)
        return FitTask(
            changes.pop("make_scorer", lambda: FeatureScorer(WIDTH, (8,))),
            changes.pop("inputs", FeatureRows(self.features)),
            Observations(self.o, r),
            nuisances or Nuisances(),
            rows[:600],
            rows[600:],
            settings,
            changes.pop("loss", bce),
            **changes,
        )


WORLD = World()


def weights(module: nn.Module) -> Tensor:
    return torch.cat([value.detach().reshape(-1) for value in module.state_dict().values()])


@pytest.fixture(scope="module")
def fits() -> dict[str, Fitted]:
    return {name: method.fit(WORLD.task()) for name, method in MULTITASK.items()}


@methods
def test_a_fit_beats_chance_on_the_true_labels(name: str, fits: dict[str, Fitted]) -> None:
    logit = predict(fits[name].scorer, FeatureRows(WORLD.features))
    assert auroc(logit, WORLD.clean) > 0.85


@methods
def test_what_is_fitted_is_the_scorer_alone(name: str, fits: dict[str, Fitted]) -> None:
    assert isinstance(fits[name].scorer, FeatureScorer)
    assert fits[name].report.best.validation_risk == min(epoch.validation_risk for epoch in fits[name].report.epochs)


@methods
def test_a_fit_repeats_itself(name: str, fits: dict[str, Fitted]) -> None:
    torch.manual_seed(77)  # of no effect
    assert torch.equal(weights(MULTITASK[name].fit(WORLD.task()).scorer), weights(fits[name].scorer))


@methods
def test_hidden_feedback_true_labels_and_nuisances_change_nothing(name: str, fits: dict[str, Fitted]) -> None:
    assert MULTITASK[name].needs == frozenset()
    permuted = WORLD.clean[torch.randperm(ROWS, generator=torch.Generator().manual_seed(9))]
    nuisances = Nuisances(torch.full((ROWS,), 0.3), NoiseRates(0.4, 0.3), torch.full((ROWS,), 0.9))
    for hidden in (WORLD.clean, permuted, math.nan):
        other = MULTITASK[name].fit(WORLD.task(hidden, nuisances))
        assert torch.equal(weights(other.scorer), weights(fits[name].scorer))


@methods
@pytest.mark.parametrize("loss", [bce, mse], ids=lambda loss: loss.__name__)
def test_no_risk_falls_without_end(name: str, loss) -> None:
    # few rows, labels by lot, large steps and no early stop: all that there is to learn is to fit noise
    lot = (torch.rand(ROWS, generator=torch.Generator().manual_seed(2)) < 0.5).float()
    task = WORLD.task(settings=FitSettings(epochs=60, lr=0.1, batch_size=64, patience=60, weight_decay=0.0), loss=loss)
    task = FitTask(
        task.make_scorer,
        task.inputs,
        Observations(WORLD.o, lot),
        task.nuisances,
        torch.arange(60),
        task.heldout,
        task.settings,
        loss,
    )
    report = MULTITASK[name].fit(task).report
    # the doubly robust term is at least -(1 / floor - 1) times the largest loss, 4.02
    assert all(-36.2 < epoch.train_risk < 400 for epoch in report.epochs)
    assert len(report.epochs) == 60


@pytest.mark.parametrize("name", ["mt_ips", "mt_dr", "sdr"])
def test_the_propensity_is_learned_beside_the_reward(name: str) -> None:
    method, seen = MULTITASK[name], []
    assert isinstance(method, MultiTask)

    def spy(loss, *given: Tensor, floor: float) -> Tensor:
        seen.append((given[1].detach(), given[-2]))
        return method.risk(loss, *given, floor=floor)

    MultiTask(spy, method.heads, method.paper, method.subtracts).fit(WORLD.task())
    first, _ = seen[0]
    share = float(WORLD.o[:600].mean())
    torch.testing.assert_close(torch.sigmoid(first), torch.full_like(first, share))  # it starts at the share with feedback
    propensity, o = (torch.cat(parts) for parts in zip(*seen[-10:], strict=True))  # the batches of the last epoch
    assert auroc(propensity, o) > 0.75


@methods
def test_methods_fit_token_rows_too(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 12, (ROWS, 5), generator=generator).tolist()
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_labels=1,
        pad_token_id=0,
    )
    task = WORLD.task(
        inputs=TokenRows.of(tokens, pad_id=0),
        make_scorer=lambda: SequenceScorer(LlamaForSequenceClassification(config)),
        settings=FitSettings(epochs=1, lr=0.01, batch_size=200),
    )
    fitted = MULTITASK[name].fit(task)
    assert isinstance(fitted.scorer, SequenceScorer)
    assert math.isfinite(fitted.report.best.validation_risk)


def test_only_the_method_that_subtracts_losses_bounds_them() -> None:
    bounded = {name for name in ("mt_ips", "mt_dr", "sdr") if MULTITASK[name].pointwise(bce) is bounded_bce}
    assert bounded == {"mt_dr"}
    assert MULTITASK["mt_dr"].pointwise(mse) is mse


@methods
def test_the_stop_is_decided_by_the_plain_loss_on_held_out_feedback(name: str, fits: dict[str, Fitted]) -> None:
    rows = torch.arange(600, ROWS)[WORLD.o[600:] == 1]
    logit = predict(fits[name].scorer, FeatureRows(WORLD.features), rows)
    assert fits[name].report.best.validation_risk == pytest.approx(float(bce(logit, WORLD.r[rows]).mean()), rel=1e-5)


@methods
def test_rows_without_any_feedback_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="at least one row with feedback, got none in 3 rows"):
        (cvib_objective if name == "cvib" else MULTITASK[name].objective)(
            Observations(torch.zeros(3), torch.zeros(3)), bce, torch.arange(3)
        )
