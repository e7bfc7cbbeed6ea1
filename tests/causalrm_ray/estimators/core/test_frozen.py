"""Heads on frozen states, and the module that learns what they found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.estimators.core.frozen import FEW, MANY_MEMBERS, MEMBERS, distil, on_states
from causalrm_ray.estimators.core.task import FitTask, Fitted, Nuisances, Observations
from causalrm_ray.estimators.core.training import FitReport, FitSettings, Inputs, predict
from causalrm_ray.estimators.pipeline import fit_reward_models
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.metrics import r2
from causalrm_ray.models.scorers.heads import FeatureScorer

ROWS = 1200
HELD_OUT = torch.arange(1000, ROWS)


class Text:
    """Rows that are no features: what a module must read itself."""

    def __init__(self, x: Tensor, name: str = "x") -> None:
        self.x, self.name = x, name

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        return {self.name: self.x[index]}


class Reader(nn.Module):
    """A backbone that doubles its input, under a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = FeatureScorer(3, (16,))
        self.head = self.body.head

    def states(self, x: Tensor) -> Tensor:
        return self.body.states(2 * x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.states(x)).squeeze(-1)


def log() -> tuple[Tensor, Tensor, Observations]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 3, generator=generator)
    liking = torch.sigmoid(3 * x[:, 0])
    r = (torch.rand(ROWS, generator=generator) < liking).float()
    return x, liking, Observations((torch.rand(ROWS, generator=generator) < 0.5).float(), r)


def task(inputs: Inputs, observations: Observations) -> FitTask:
    train = torch.arange(1000)
    return FitTask(Reader, inputs, observations, Nuisances(), train, HELD_OUT, FitSettings(40, 0.02, 64), bce)


@pytest.mark.parametrize(("rows", "members"), [(FEW - 1, MANY_MEMBERS), (FEW, MEMBERS)])
def test_few_rows_are_shared_by_many_members(rows: int, members: int) -> None:
    x, _, observations = log()
    given = on_states(task(FeatureRows(x), observations), torch.zeros(rows, 2))
    assert len(given.scorer().bias) == members
    assert len(given.inputs) == rows


class Knows(nn.Module):
    """A teacher that is right: three times the first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(3.0))

    def forward(self, features: Tensor) -> Tensor:
        return self.slope * features[:, 0]


@pytest.mark.parametrize("warm", [False, True])
def test_a_student_learns_probabilities_not_labels(warm: bool) -> None:
    x, liking, observations = log()
    given = task(Text(x), observations)
    start = given.scorer(7) if warm else None
    before = None if start is None else [parameter.clone() for parameter in start.parameters()]
    teacher = Fitted(Knows(), FitReport((), None), {"rho_01": 0.1})
    fitted = distil(given, teacher, x, start)
    assert fitted.figures == teacher.figures
    assert r2(torch.sigmoid(predict(fitted.scorer, Text(x), HELD_OUT)), liking[HELD_OUT]) > 0.98
    if start is not None:
        assert all(torch.equal(*pair) for pair in zip(before, start.parameters(), strict=True))  # the model that serves stays


def test_a_method_on_states_says_so_if_there_are_none() -> None:
    x, _, observations = log()
    propensity = torch.full((ROWS,), 0.5)
    given = {"settings": FitSettings(20, 0.02, 64), "heldout": HELD_OUT}
    with pytest.raises(ValueError, match="two_stage is fitted on features, such as states of a frozen backbone, got tokens"):
        fit_reward_models(Reader, Text(x), observations, propensity, ("two_stage",), **given)


@pytest.mark.parametrize("states", [True, False])
def test_on_states_no_member_trains_on_a_held_out_row(states: bool) -> None:
    """All members judge these rows then, as they judge those of another fit, so that a gate compares like with like."""
    x, _, observations = log()
    settings, propensity = FitSettings(20, 0.02, 64), torch.full((ROWS,), 0.5)
    fits = fit_reward_models(
        lambda: FeatureScorer(3, (8,)),
        FeatureRows(x),
        observations,
        propensity,
        ("two_stage",),
        settings,
        heldout=HELD_OUT,
        states=states,
    )
    fitted = fits.fits["two_stage"]
    assert fitted.opinion is not None
    everyone, opinion = torch.sigmoid(predict(fitted.scorer, FeatureRows(x))), torch.sigmoid(fitted.opinion)
    assert torch.allclose(opinion[HELD_OUT], everyone[HELD_OUT], atol=1e-4) == states  # means of logits and of probabilities
    assert not torch.allclose(opinion[:1000], everyone[:1000], atol=1e-3)
