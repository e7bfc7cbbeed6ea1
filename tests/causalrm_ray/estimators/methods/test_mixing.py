"""Mixed rows, the division of DivideMix, the doubts of SelectMix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from causalrm_ray.data.collate import FeatureRows, TokenRows
from causalrm_ray.estimators.core.task import FitTask, Nuisances, Observations
from causalrm_ray.estimators.core.training import FitSettings
from causalrm_ray.estimators.methods.mixing import Division, MixedRows, MixingNetworks, beta_draws, fit_dividemix, fit_selectmix
from causalrm_ray.losses.label_noise import balance_penalty, sharpen
from causalrm_ray.losses.pointwise import bce, mse
from causalrm_ray.models.scorers.heads import FeatureScorer

FEATURES = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def mixed_rows() -> MixedRows:
    rows = MixedRows(FeatureRows(FEATURES))
    rows.partner, rows.share = torch.tensor([5, 4, 3, 2, 1, 0]), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0, 0.6])
    return rows


def test_states_and_targets_are_mixed_by_the_same_shares() -> None:
    rows, scorer, index = mixed_rows(), FeatureScorer(3, (4,)), torch.tensor([1, 3, 5])
    share = rows.share[index][:, None]
    states = share * scorer.states(FEATURES[index]) + (1 - share) * scorer.states(FEATURES[rows.partner[index]])
    networks = MixingNetworks(scorer)
    torch.testing.assert_close(networks(**rows.batch(index))[:, 0], scorer.head(states)[:, 0])
    target = torch.tensor([0.0, 1.0, 0.0, 0.5, 0.0, 1.0])
    torch.testing.assert_close(rows.mixed(target, index), torch.tensor([0.75, 0.125, 0.6]))


def test_nothing_is_mixed_in_evaluation_and_before_partners_are_drawn() -> None:
    scorer, index = FeatureScorer(3, (4,)), torch.arange(6)
    networks = MixingNetworks(scorer)
    torch.testing.assert_close(networks(**MixedRows(FeatureRows(FEATURES)).batch(index))[:, 0], scorer(FEATURES))
    torch.testing.assert_close(networks.eval()(**mixed_rows().batch(index))[:, 0], scorer(FEATURES))


def test_partners_of_another_length_keep_their_own_padding() -> None:
    rows = MixedRows(TokenRows.of([[5], [6, 7, 8]], pad_id=0))
    rows.partner = torch.tensor([1, 1])
    batch = rows.batch(torch.tensor([0]))
    assert (batch["input_ids"].tolist(), batch["partner_input_ids"].tolist()) == ([[5]], [[6, 7, 8]])
    assert (batch["lengths"].tolist(), batch["partner_lengths"].tolist(), batch["share"].tolist()) == ([1], [3], [1.0])


def test_beta_draws_have_the_moments_of_beta() -> None:
    generator = torch.Generator().manual_seed(0)
    for concentration in (1, 4):
        draws = beta_draws(20_000, concentration, generator).double()
        variance = 1 / (4 * (2 * concentration + 1))
        assert float(draws.mean()) == pytest.approx(0.5, abs=3 * (variance / 20_000) ** 0.5)
        assert float(draws.var()) == pytest.approx(variance, rel=0.05)


def test_a_scorer_without_states_is_named() -> None:
    class Bare(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return features[:, 0]

    with pytest.raises(ValueError, match="must have states and a linear head, got Bare"):
        MixingNetworks(Bare())(**mixed_rows().batch(torch.arange(2)))


def labelled(rows: int = 400, wrong: int = 40) -> FitTask:
    """A world that a scorer solves at once, but for the first `wrong` labels."""
    x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(3))
    r = (x[:, 0] > 0).float()
    r[:wrong] = 1 - r[:wrong]
    return FitTask(
        lambda: FeatureScorer(2, ()),
        FeatureRows(x),
        Observations(torch.ones(rows), r),
        Nuisances(),
        torch.arange(300),
        torch.arange(300, rows),
        FitSettings(epochs=12, lr=0.1, batch_size=32, patience=12),
        bce,
    )


class Fixed(nn.Module):
    """A scorer of a given slope."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, features: Tensor) -> Tensor:
        return self.slope * features[:, 0]


def test_division_keeps_by_the_other_networks_losses_and_mixes_after_warm_up() -> None:
    task, rows = labelled(), torch.arange(300)
    division = Division(task, MixingNetworks(Fixed(-20.0), Fixed(20.0)), rows, warm_up=1)
    logit = torch.full((300, 2), 0.3)
    division.begin(1)
    torch.testing.assert_close(division.risk(logit, rows), 2 * bce(logit[:, 0], task.observations.r[rows]))
    assert division.kept_share == 1.0
    division.begin(2)
    assert division.kept_share > 0.85  # by the second, which is right
    assert float(division._kept[:40, 0].float().mean()) < 0.2
    assert float(division._kept[:40, 1].float().mean()) > 0.8  # by the first, which is wrong
    assert bool((division.inputs.share[rows] >= 0.5).all())
    guess = sharpen(torch.full((300,), 0.5), 0.5)  # the two contradict each other
    first = division.inputs.mixed(torch.where(division._kept[:, 0], division._target[:, 0], 0.5), rows)
    torch.testing.assert_close(division._target[:300][~division._kept[:300, 0], 0], guess[~division._kept[:300, 0]])
    alone = division._of(0, logit[:, 0], rows) - balance_penalty(torch.sigmoid(logit[:, 0]))
    expected = torch.where(division._kept[:300, 0], bce(logit[:, 0], first), mse(logit[:, 0], first))
    torch.testing.assert_close(alone, expected)


def test_methods_find_the_wrong_labels() -> None:
    task = labelled()
    doubted = fit_selectmix(task)
    assert doubted.figures["doubted_share"] == pytest.approx(40 / 300, abs=0.06)
    divided = fit_dividemix(task)
    assert divided.figures["kept_share"] == pytest.approx(260 / 300, abs=0.1)
