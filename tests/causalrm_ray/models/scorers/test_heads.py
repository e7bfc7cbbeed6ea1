"""Ensembles on features against loops over members."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from causalrm_ray.models.scorers.heads import Cautious, Corrected, EnsembleScorer, Mixture, lower_logit

X = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)) * 2 + 1


def ensemble(members: int = 4) -> EnsembleScorer:
    scorer = EnsembleScorer(X, members, hidden=5).eval()
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return scorer


def naive(scorer: EnsembleScorer, x: Tensor, k: int) -> Tensor:
    """f_k(x) = b + w . x + v . leaky_relu(W x + u), of standardised features."""
    x = (x - X.mean(0)) / (X - X.mean(0)).square().mean().sqrt()
    hidden = nn.functional.leaky_relu(scorer.inner[k] @ x + scorer.inner_bias[k])
    return scorer.bias[k] + scorer.linear[k] @ x + scorer.outer[k] @ hidden


def test_members_are_what_the_formula_says_and_their_first_axis_is_the_members() -> None:
    scorer = ensemble()
    expected = torch.stack([torch.stack([naive(scorer, x, k) for k in range(4)]) for x in X])
    torch.testing.assert_close(scorer.members(X), expected)
    torch.testing.assert_close(torch.sigmoid(scorer(X)), torch.sigmoid(expected).mean(1))
    assert {parameter.shape[0] for parameter in scorer.parameters()} == {4}


def test_a_fresh_ensemble_says_the_same_of_every_row() -> None:
    scorer = EnsembleScorer(X).eval()
    scorer.start_at(-0.7)
    torch.testing.assert_close(scorer(X), torch.full((7,), -0.7))
    scorer.start_at(torch.arange(5.0))
    torch.testing.assert_close(scorer.members(X), torch.arange(5.0).expand(7, 5))


def test_mixtures_average_probabilities_and_corrections_add_logits() -> None:
    first, second = ensemble(2), ensemble(3)
    mixed = Mixture([first, second], [0.25, 0.75])
    torch.testing.assert_close(torch.sigmoid(mixed(features=X)), 0.25 * torch.sigmoid(first(X)) + 0.75 * torch.sigmoid(second(X)))
    corrected = Corrected(first, second)
    expected = torch.sigmoid(first(X)[:, None] + second.members(X)).mean(1).clamp(1e-5, 1 - 1e-5)
    torch.testing.assert_close(torch.sigmoid(corrected(features=X)), expected)
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert all(parameter.requires_grad for parameter in second.parameters())


def test_a_cautious_ensemble_says_less_of_what_its_members_do_not_agree_on() -> None:
    logits, weights = torch.tensor([[0.0, 0.0, 0.0], [2.0, -1.0, 0.5]]), torch.tensor([0.5, 0.25, 0.25])
    found = lower_logit(logits, weights, 1.5)
    p = [1 / (1 + math.exp(-value)) for value in (2.0, -1.0, 0.5)]
    mean = 0.5 * p[0] + 0.25 * p[1] + 0.25 * p[2]
    deviation = math.sqrt(0.5 * (p[0] - mean) ** 2 + 0.25 * (p[1] - mean) ** 2 + 0.25 * (p[2] - mean) ** 2)
    lower = mean - 1.5 * deviation
    assert found.tolist() == pytest.approx([0.0, math.log(lower / (1 - lower))], rel=1e-5)
    mixed = Mixture([ensemble(2), Corrected(ensemble(2), ensemble(3))], [0.25, 0.75])
    torch.testing.assert_close(Cautious(mixed, 0.0)(features=X), mixed(features=X))
    assert bool((Cautious(mixed, 1.0)(features=X) < mixed(features=X)).all())
    opinions = mixed.opinions(features=X)
    assert opinions.weights_K.tolist() == pytest.approx([0.125, 0.125, 0.25, 0.25, 0.25])
