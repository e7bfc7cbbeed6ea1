"""The mechanisms of selection, and the choice between them, on worlds of which the truth is known."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.estimators.core.task import FitTask, Nuisances, Observations
from causalrm_ray.estimators.core.training import Calling, FitSettings, predict
from causalrm_ray.estimators.methods import mechanisms
from causalrm_ray.estimators.methods.class_wise import CLASS_WISE, weighted_risk
from causalrm_ray.estimators.methods.mechanisms import _offsets, _selection_start, fit_label, likely_odds
from causalrm_ray.estimators.methods.selection import SELECTION, Averaged, fit_mechanisms
from causalrm_ray.estimators.methods.two_stage import fit_features
from causalrm_ray.estimators.nuisances.opinion_shift import opinion_given
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.losses.selection import class_weights
from causalrm_ray.metrics import r2
from causalrm_ray.models.scorers.heads import Corrected, EnsembleScorer
from causalrm_ray.types import NoiseRates

RATES = NoiseRates(0.2, 0.1)
ROWS, TRAIN, HELD_OUT, FRESH = 6000, torch.arange(4000), torch.arange(4000, 4800), torch.arange(4800, 6000)


@functools.cache
def world(selection: str) -> tuple[Tensor, Observations, Tensor, Tensor]:
    """Features [N, 4], observations, P(r* = 1 | x) [N], and a trait [N] in {0, 1} within which selection may differ."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 4, generator=generator)
    liking = torch.sigmoid(4 * x[:, 0])
    clean = (torch.rand(ROWS, generator=generator) < liking).float()
    trait = (x[:, 3] > 0).long()
    propensity = {
        "label": torch.where(clean == 1, 0.65, 0.15),
        "features": torch.sigmoid(1.5 * x[:, 1] - 0.5),
        "mirrored": torch.where(clean == 1, 0.15, 0.65),
        "trait": torch.where(clean == trait, 0.5, 0.1),
    }[selection]
    wrong = torch.where(clean == 1, RATES.rho_01, RATES.rho_10)
    r = torch.where(torch.rand(ROWS, generator=generator) < wrong, 1 - clean, clean)
    return x, Observations((torch.rand(ROWS, generator=generator) < propensity).float(), r), liking, trait


def task(selection: str, **given) -> FitTask:
    x, observations, _, _ = world(selection)
    make = given.pop("make_scorer", lambda: EnsembleScorer(x, members=3, hidden=4))
    return FitTask(make, FeatureRows(x), observations, Nuisances(), TRAIN, HELD_OUT, FitSettings(20, 0.02, 256), bce, **given)


@functools.cache
def found(selection: str) -> Averaged:
    return fit_mechanisms(task(selection))


def explained(scorer: nn.Module, selection: str) -> float:
    """R2 of P(r* = 1 | x) on rows that nothing saw."""
    x, _, liking, _ = world(selection)
    return r2(torch.sigmoid(predict(scorer, FeatureRows(x), FRESH)), liking[FRESH])


@pytest.mark.parametrize(("right", "wrong"), [("label", "features"), ("features", "label")])
def test_each_mechanism_explains_its_own_world_and_auto_finds_it(right: str, wrong: str) -> None:
    auto = found(right)
    score = {name: explained(one.scorer, right) for name, one in auto.mechanisms.items()}
    assert score[right] > 0.85
    assert score[right] > score[wrong] + 0.02
    assert explained(auto.scorer(), right) > score[right] - 0.02
    assert auto.figures()[f"weight_{right}"] > 0.9
    assert float(auto.weights.sum()) == pytest.approx(1)


def test_rates_are_recovered_where_the_mechanism_is_right() -> None:
    for name in ("label", "features"):
        one = found(name).mechanisms[name]
        # 600 disliked answers and a prior at 0.15: 0.08 is four standard errors and the prior's pull
        assert abs(one.rates.rho_01 - RATES.rho_01) < 0.08, name
        assert abs(one.rates.rho_10 - RATES.rho_10) < 0.08, name


def test_what_is_said_out_of_fold_is_of_every_row_and_right() -> None:
    _, observations, liking, _ = world("label")
    auto = found("label")
    assert auto.best.rows.tolist() == [*TRAIN.tolist(), *HELD_OUT.tolist()]
    assert r2(auto.opinion, liking[auto.best.rows]) > 0.8
    label = auto.mechanisms["label"]
    assert float(label.joint.sum(1).mean()) == pytest.approx(float(observations.o[auto.best.rows].mean()), abs=0.02)
    speaking = label.joint.sum(0) / torch.stack([label.opinion, 1 - label.opinion], dim=1).sum(0)
    # The level of P(r* = 1) is the least known: a fit stops short on its way from equal odds to the true log-odds of 2.4.
    torch.testing.assert_close(speaking, torch.tensor([0.65, 0.15]), atol=0.12, rtol=0)


def test_selection_by_a_trait_alone_is_not_taken_for_selection_by_the_opinion() -> None:
    x, _, liking, _ = world("features")
    generator = torch.Generator().manual_seed(7)
    hidden = (torch.rand(ROWS, generator=generator) < 0.5).long()  # a surface, say, that the answer does not tell
    propensity = torch.sigmoid(1.5 * x[:, 1] + 2 * hidden - 1.5)
    o = (torch.rand(ROWS, generator=generator) < propensity).float()
    clean = (torch.rand(ROWS, generator=generator) < liking).float()
    given = replace(task("features", strata=hidden), observations=Observations(o, clean))
    assert fit_mechanisms(given).weights[0] > 0.9


def test_selection_that_hangs_on_a_trait_needs_its_strata() -> None:
    _, _, _, trait = world("trait")
    blind, sighted = (explained(fit_label(task("trait", strata=strata)).scorer, "trait") for strata in (None, trait))
    assert sighted > max(0.8, blind + 0.1)


@pytest.mark.parametrize("spare", [True, False])
def test_the_gate_does_not_fall_for_what_was_learned_from_held_out_rows(spare: bool) -> None:
    """Where features are mostly marks of their rows, a fit predicts the label of a row better if it learned from it."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 300, generator=generator)
    coin = (3 * x[:, 0] + torch.randn(200, generator=generator) > 0).float()
    observations = Observations((torch.rand(200, generator=generator) < 0.9).float(), coin)
    make = lambda: EnsembleScorer(x, members=2, hidden=2, dropout=0.0)  # noqa: E731
    train, heldout = torch.arange(160), torch.arange(160, 200)
    given = FitTask(make, FeatureRows(x), observations, Nuisances(), train, heldout, FitSettings(1, 0.01, 32), bce)
    fit = SELECTION["latent"].fit(replace(given, spare_heldout=spare))
    seen = heldout[observations.o[heldout] == 1]
    own = float(bce(predict(fit.scorer, FeatureRows(x), seen), coin[seen]).mean())
    judged = float(bce(fit.opinion[seen], coin[seen]).mean())
    if spare:
        assert own == pytest.approx(judged, rel=0.05)
    else:
        assert judged > own + 0.02


def test_hidden_feedback_changes_nothing_and_seeds_repeat() -> None:
    x, observations, _, _ = world("label")
    scores = []
    for hidden in (0.0, 1.0):
        r = torch.where(observations.o == 1, observations.r, torch.full_like(observations.r, hidden))
        given = FitTask(
            lambda: EnsembleScorer(x, members=2, hidden=2),
            FeatureRows(x),
            Observations(observations.o, r),
            Nuisances(),
            TRAIN,
            HELD_OUT,
            FitSettings(2, 0.02, 256),
            bce,
        )
        scores.append(predict(SELECTION["auto"].fit(given).scorer, given.inputs))
    assert torch.equal(*scores)


def test_members_start_about_the_likely_odds_and_nearer_to_them_the_more_labels_there_are() -> None:
    torch.testing.assert_close(_offsets(100.0, 5), torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]))
    torch.testing.assert_close(_offsets(1000.0, 3), torch.tensor([-0.5, 0.0, 0.5]))
    given = task("label")
    start = _selection_start(given, torch.zeros(ROWS, dtype=torch.long), TRAIN, 0.5)[0]
    o, r = given.observations.o[TRAIN], given.observations.r[TRAIN]
    share, pleased = float(o.mean()), (float(r[o == 1].mean()) - 0.15) / 0.7
    on1, on0 = share * pleased / 0.5, share * (1 - pleased) / 0.5
    expected = [math.log(on0 / (1 - on0)), math.log(on1 / (1 - on1)) - math.log(on0 / (1 - on0)), 0.1]
    torch.testing.assert_close(start, torch.tensor(expected))


@pytest.mark.parametrize(("selection", "low", "high"), [("label", 0.3, 2.4), ("mirrored", -2.4, -0.3), ("features", -0.4, 0.2)])
def test_likely_odds_lean_to_who_gives_feedback(selection: str, low: float, high: float) -> None:
    """True log-odds are 2.4, -2.4 and 0: odds are drawn to equal ones, but not beyond."""
    assert low < likely_odds(task(selection)) < high


def test_likely_odds_are_the_mean_of_what_prior_and_held_out_rows_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    given = replace(task("label"), heldout=torch.arange(4))
    liked = 0.8
    risks = torch.tensor([[0.2, 0.1, 0.1], [0.5, 0.3, 0.6]]).repeat(2, 1)  # nats of four rows under each start
    monkeypatch.setattr(mechanisms, "starting_scorer", lambda task: (EnsembleScorer(world("label")[0], members=3), liked))
    monkeypatch.setattr(mechanisms, "start_linear", lambda *given: None)
    monkeypatch.setattr(mechanisms._LabelModel, "nll", lambda model, output, index: risks)
    odds = [math.log(4) / 2 + steps * math.sqrt(0.5) for steps in (-2, 0, 2)]

    def expected(counted: float) -> float:
        density = [
            math.exp(-counted * sum(nats) - steps**2 / 2) for nats, steps in zip(risks.T.tolist(), (-2, 0, 2), strict=True)
        ]
        return sum(w * o for w, o in zip(density, odds, strict=True)) / sum(density)

    assert likely_odds(given) == pytest.approx(expected(1), rel=1e-5)
    # Two clusters of two equal rows, a - m = m - b = d: the mean's error is d for clusters, and sqrt(4 / 3) d / 2 for rows.
    clusters = Observations(given.observations.o, given.observations.r, torch.arange(ROWS) % 2)
    assert likely_odds(replace(given, observations=clusters)) == pytest.approx(expected(1 / 3), rel=1e-5)


@pytest.mark.parametrize("name", ["latent", "auto"])
def test_a_method_says_how_its_feedback_is_to_be_weighed(name: str) -> None:
    given, rows = task("label"), torch.cat([TRAIN, HELD_OUT])
    fit = SELECTION[name].fit(given)
    v1, v0 = class_weights(given.observations.o, given.observations.r, *fit.propensities, fit.rates)
    assert set((v1 + v0)[given.observations.o == 0].tolist()) == {0.0}
    assert float((v1 + v0)[rows].mean()) == pytest.approx(1.0, abs=0.15)  # 1 where rates and selection are right


def test_propensities_of_opinions_are_the_joint_over_the_share() -> None:
    _, observations, _, _ = world("label")
    label = found("label").mechanisms["label"]
    p1, p0 = label.propensities(observations)
    liked, disliked = label.opinion.clamp_min(1e-6), (1 - label.opinion).clamp_min(1e-6)
    torch.testing.assert_close(p1[label.rows], (label.joint[:, 0] / liked).clamp(0.05, 1))
    torch.testing.assert_close(p0[label.rows], (label.joint[:, 1] / disliked).clamp(0.05, 1))
    torch.testing.assert_close(p1[FRESH], torch.full((len(FRESH),), 0.05))  # rows of no fold: the clip


def test_known_rates_are_taken_as_they_are() -> None:
    known = NoiseRates(0.3, 0.05)
    few = replace(task("label"), nuisances=Nuisances(rates=known), train=TRAIN[:400], heldout=HELD_OUT[:100])
    for name in ("latent", "two_stage"):
        fit = SELECTION[name].fit(few)
        assert fit.rates.rho_01 == pytest.approx(0.3)
        assert fit.rates.rho_10 == pytest.approx(0.05)


def test_a_shift_changes_opinions_and_not_outcomes() -> None:
    mechanism, _ = fit_features(replace(task("features"), train=TRAIN[:400], heldout=HELD_OUT[:100]))
    inputs = cast(FeatureRows, task("features").inputs)
    before, scored = mechanism.opinion, predict(Calling(mechanism.scorer, "members"), inputs)
    moved = mechanism.shifted(0.7, inputs.features)
    expected = opinion_given(mechanism.joint.sum(1), before, 0.7)
    torch.testing.assert_close(moved.opinion, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(moved.joint, mechanism.joint)
    torch.testing.assert_close(moved.label_logit(), mechanism.label_logit())
    # Every member moves by the linear function of the features that is nearest to the change, as numpy's least squares find it.
    design = np.column_stack([np.ones(len(moved.rows)), inputs.features[moved.rows].double()])
    change = (torch.logit(expected) - torch.logit(before)).double().numpy()
    weight = np.linalg.lstsq(design, change, rcond=None)[0]
    wanted = np.column_stack([np.ones(len(inputs)), inputs.features.double()]) @ weight
    added = predict(Calling(moved.scorer, "members"), inputs) - scored
    torch.testing.assert_close(added, torch.tensor(wanted).float()[:, None].expand_as(added), atol=0.02, rtol=0)


def test_noise_rates_are_strained_where_opinions_do_not_select_and_not_where_they_are_known() -> None:
    by_features, by_opinions = found("features"), found("label")
    for averaged in (by_features, by_opinions):
        label, features = averaged.mechanisms["label"].rates, averaged.mechanisms["features"].rates
        by_hand = [
            5 * sum((math.log(2 * rate / (1 - 2 * rate)) - math.log(0.3 / 0.7)) ** 2 for rate in (rates.rho_01, rates.rho_10))
            for rates in (label, features)
        ]
        assert averaged.strain == pytest.approx(by_hand[0] - by_hand[1], rel=1e-6)
    assert by_features.strain > 5 > by_opinions.strain
    known = replace(task("features"), nuisances=Nuisances(rates=NoiseRates(0.0, 0.1)), train=TRAIN[:400], heldout=HELD_OUT[:100])
    assert fit_mechanisms(known).strain == 0


def test_label_logits_are_those_of_the_noise_channel() -> None:
    mechanism = found("features").mechanisms["features"]
    joint = mechanism.joint.double()
    e, rates = joint[:, 0] / joint.sum(1), mechanism.rates
    says_liked = rates.rho_10 + (1 - rates.rho_01 - rates.rho_10) * e
    torch.testing.assert_close(torch.sigmoid(mechanism.label_logit()), says_liked, atol=1e-5, rtol=1e-4)


def test_weighted_risk_by_hand() -> None:
    v1, v0 = torch.tensor([2.0, -1.0]), torch.tensor([0.0, 3.0])  # of mean sum 2
    risk = weighted_risk(v1, v0)(torch.logit(torch.tensor([[0.25], [0.5]])), torch.tensor([0, 1]))
    torch.testing.assert_close(risk, torch.tensor([[2 * 0.75**2], [-(0.5**2) + 3 * 0.5**2]]) / 2)


@pytest.mark.parametrize("name", CLASS_WISE)
def test_stable_causalrm_holds_where_the_label_selects(name: str) -> None:
    fit = CLASS_WISE[name].fit(task("label"))
    assert explained(fit.scorer, "label") > 0.8
    assert fit.opinion is not None
    assert r2(torch.sigmoid(fit.opinion[HELD_OUT]), world("label")[2][HELD_OUT]) > 0.8
    assert isinstance(fit.scorer, Corrected) == (name == "causalrm_dr_stable")
