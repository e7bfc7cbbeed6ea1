"""Scorers at the level of judged rows: exact for each kind, honest about rows that a scorer learned from, and used by fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.errors import InputError
from causalrm_ray.estimators.core.task import FitTask, Fitted, Nuisances, Observations
from causalrm_ray.estimators.core.training import SINGLE, FitReport, FitSettings, predict
from causalrm_ray.estimators.levelling import check_judged, learn_level, level_opinion, level_scorer
from causalrm_ray.estimators.nuisances.level import Level
from causalrm_ray.estimators.pipeline import RewardFits, fit_reward_models
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.models.scorers.heads import Corrected, EnsembleScorer, FeatureScorer, Levelled, Mixture
from causalrm_ray.models.scorers.saved_heads import describe, rebuild
from causalrm_ray.models.scorers.wrapped import cautious

LEVEL = Level(-0.7, 1.3)
X = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))


def ensemble(seed: int) -> EnsembleScorer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        scorer = EnsembleScorer(X, 4, 8)
        with torch.no_grad():
            for parameter in scorer.parameters():
                parameter.normal_()
    return scorer


def scorers() -> dict[str, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = FeatureScorer(3, (8,))
    return {
        "plain": plain,
        "ensemble": ensemble(0),
        "mixture": Mixture([ensemble(1), ensemble(2)], [0.3, 0.7]),
        "corrected": Corrected(FeatureScorer(3, ()), ensemble(3)),
    }


@pytest.mark.parametrize("kind", ["plain", "ensemble", "mixture", "corrected"])
def test_every_scorer_of_features_is_levelled_exactly_and_saved(kind: str) -> None:
    scorer = scorers()[kind].eval()
    before = predict(scorer, FeatureRows(X))
    found, uneven = level_scorer(scorer, LEVEL, FeatureRows(X), SINGLE)
    after = predict(found, FeatureRows(X))
    torch.testing.assert_close(after, -0.7 + 1.3 * before, atol=2e-6, rtol=1e-6)
    assert uneven == 0
    assert isinstance(found, Levelled) == (kind != "plain")
    again = rebuild(describe(found))
    again.load_state_dict(found.state_dict())
    assert torch.equal(predict(again, FeatureRows(X)), after)


class Headed(nn.Module):
    """A scorer of states as those of language models: far from 0 in one direction, under a head without a bias."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.head = nn.Linear(3, 1, bias=False)
        self.spread = spread

    def states(self, features: Tensor) -> Tensor:
        return features * torch.tensor([1.0, 1.0, self.spread]) + torch.tensor([0.0, 0.0, 2.0])

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.states(features)).squeeze(-1)


@pytest.mark.parametrize("spread", [0.0, 0.2])
def test_a_head_without_a_bias_is_shifted_through_its_most_constant_states(spread: float) -> None:
    scorer = Headed(spread)
    before = predict(scorer, FeatureRows(X))
    found, uneven = level_scorer(scorer, LEVEL, FeatureRows(X), SINGLE)
    gap = predict(found, FeatureRows(X)) - LEVEL(before)
    assert uneven == pytest.approx(float(gap.square().mean().sqrt()), abs=1e-4)
    # Of h = 2 + spread z, least squares leaves 1 - h u with a mean square of spread^2 / (4 + spread^2).
    assert uneven == pytest.approx(0.7 * (spread**2 / (4 + spread**2)) ** 0.5, abs=0.01)


def task(o: Tensor, heldout: Tensor) -> FitTask:
    rows = torch.arange(len(o))
    train = rows[~torch.isin(rows, heldout)]
    settings = FitSettings(1, 1e-3, 64)
    return FitTask(nn.Identity, FeatureRows(X), Observations(o, torch.zeros(len(o))), Nuisances(), train, heldout, settings, bce)


class Remembers(nn.Module):
    """Knows the rows that it learned from by heart, and says 0 of all others."""

    def __init__(self, learned: Tensor) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
        self.logit = torch.where(learned, 20.0, 0.0)

    def forward(self, features: Tensor) -> Tensor:
        return self.logit[(features.unsqueeze(1) == X).all(2).int().argmax(1)]


def test_rows_that_a_scorer_learned_from_do_not_judge_it_and_others_stand_for_them() -> None:
    o, rows = (torch.arange(500) % 5 == 0).float(), torch.arange(500)
    heldout = rows[rows % 20 == 0]
    learned = (o == 1) & ~torch.isin(rows, heldout)
    given = task(o, heldout)
    judged = torch.where(o == 1, 1.0, 0.0)  # those who give feedback like it: a fifth of all
    fitted = Fitted(Remembers(learned), FitReport((), None))
    _, report = learn_level(fitted, judged, given)
    assert report.rows == 400 + 25
    assert report.liked == pytest.approx(0.2)
    assert report.mean_before == 0.5
    assert report.effective_rows == pytest.approx(500**2 / (400 + 25 * 16))
    none_left = torch.where(torch.isin(rows, heldout), torch.nan, judged)
    _, report = learn_level(fitted, none_left, given)
    assert report.rows == 475
    assert "All 75 judged rows with feedback are rows that the model learned from" in report.warnings[-1]
    _, report = learn_level(replace(fitted, opinion=torch.zeros(500)), judged, given)
    assert report.rows == 500


def test_propensities_follow_the_level() -> None:
    """With m' for m and P(o, r*) as the log has it, P(o = 1 | r* = k) is P(o, r* = k) over m'_k."""
    m, level = torch.tensor([0.3, 0.6]), Level(-0.5, 1.2)
    joint = torch.tensor([[0.1, 0.2], [0.05, 0.1]])
    o = torch.ones(2)
    given = joint[0] / m, joint[1] / (1 - m)
    fitted = Fitted(nn.Identity(), FitReport((), None), opinion=torch.logit(m), propensities=given)
    _, report = learn_level(
        replace(fitted, opinion=torch.zeros(500)), (torch.arange(500) % 3 == 0).float(), task(o, o.long()[:1])
    )
    found = level_opinion(fitted, level, report)
    assert found.opinion is not None
    assert found.propensities is not None
    now = torch.sigmoid(found.opinion)
    clip = min(float(one.min()) for one in given)  # no lower than what the method allowed
    for one, other in zip(found.propensities, (joint[0] / now, joint[1] / (1 - now)), strict=True):
        torch.testing.assert_close(one, other.clamp(clip, 1))
    assert found.figures["level_rows"] == 500


def selected(rows: int = 2600) -> tuple[Tensor, Tensor, Observations, Tensor]:
    """Features, r*, a log where the satisfied give feedback more often, and 300 rows judged at random."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 3, generator=generator)
    liked = (torch.rand(rows, generator=generator) < torch.sigmoid(2 * x[:, 0] - 1)).float()
    o = (torch.rand(rows, generator=generator) < torch.where(liked == 1, 0.4, 0.1)).float()
    judged = torch.full((rows,), torch.nan)
    drawn = torch.randperm(rows, generator=generator)[:300]
    judged[drawn] = liked[drawn]
    return x, liked, Observations(o, liked), judged


def fits(judged: Tensor | None) -> RewardFits:
    x, _, log, _ = selected()
    settings, prob = FitSettings(6, 0.02, 128), torch.full((len(x),), 0.2)
    return fit_reward_models(
        lambda: FeatureScorer(3, (8,)), FeatureRows(x), log, prob, ("naive", "two_stage"), settings, judged=judged
    )


def test_judged_rows_set_the_level_and_nothing_else() -> None:
    x, liked, _, judged = selected()
    plain, level = fits(None), fits(judged)
    assert plain.level == {}
    assert (plain.rates, plain.noise) == (level.rates, level.noise)
    for name, report in level.level.items():
        before, after = (predict(one.fits[name].scorer, FeatureRows(x)) for one in (plain, level))
        torch.testing.assert_close(after, report.level(before), atol=1e-4, rtol=1e-4)
        assert abs(float(torch.sigmoid(after).mean() - liked.mean())) < 3 * report.liked_stderr
        assert level.fits[name].figures["level_shift"] == report.shift
    assert level.level["naive"].mean_before > level.level["naive"].liked + 0.15
    opinions, report = [one.fits["two_stage"].opinion for one in (plain, level)], level.level["two_stage"]
    assert opinions[0] is not None
    assert opinions[1] is not None
    torch.testing.assert_close(opinions[1], report.level(opinions[0]))


def test_a_cautious_model_keeps_the_level_that_it_was_given() -> None:
    x, liked, log, judged = selected()
    settings, prob = FitSettings(30, 0.02, 128, patience=4), torch.full((len(x),), 0.2)
    found = fit_reward_models(
        lambda: FeatureScorer(3, (16,)), FeatureRows(x), log, prob, ("two_stage",), settings, judged=judged, states=True
    )
    report, fitted = found.level["two_stage"], found.fits["two_stage"]
    assert report.mean_before > report.liked + 0.1
    assert fitted.figures["level_liked"] == report.liked
    assert isinstance(fitted.scorer, Levelled)
    lower = predict(cautious(fitted.scorer, 0.5), FeatureRows(x))
    expected = report.level(predict(cautious(fitted.scorer.scorer, 0.5), FeatureRows(x)))
    torch.testing.assert_close(lower, expected, atol=1e-4, rtol=1e-4)
    assert bool((lower <= predict(fitted.scorer, FeatureRows(x)) + 1e-4).all())
    mean = float(torch.sigmoid(lower).mean())
    assert abs(mean - float(liked.mean())) < 0.05
    with pytest.raises(ValueError, match="caution needs an ensemble, got FeatureScorer"):
        cautious(FeatureScorer(3), 0.5)


def test_what_is_judged_must_be_labels_of_the_rows() -> None:
    check_judged(torch.tensor([torch.nan, 1.0]), 2)
    with pytest.raises(ValueError, match="rows must match"):
        check_judged(torch.ones(3), 2)
    with pytest.raises(ValueError, match=r"judged where it is not nan must be 0 or 1, got 0\.5 at position 0"):
        check_judged(torch.tensor([torch.nan, 0.5]), 2)
    with pytest.raises(InputError, match=r"judged must hold at least one label \(feedback\.clean\), got 2 rows of nan"):
        check_judged(torch.full((2,), torch.nan), 2)
