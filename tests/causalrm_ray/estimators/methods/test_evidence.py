"""What one model's predictions add to another's: against scikit-learn, against simulation, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor

from causalrm_ray.estimators.methods.evidence import (
    added_information,
    evidence,
    likelihood_gain,
    mechanism_weights,
    propensity_signal,
)
from causalrm_ray.losses.pointwise import bce


def labels(logit: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(len(logit), generator=generator) < torch.sigmoid(logit)).float()


def test_the_regression_is_that_of_scikit_learn_with_a_sandwich_of_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 500, generator=generator)
    label, cluster = labels(first + 0.3 * second, 1), torch.arange(500) // 5
    model = LogisticRegression(C=1e12, tol=1e-10).fit(torch.stack([first, second], 1).numpy(), label.numpy())
    design = np.column_stack([np.ones(500), first, second])
    prob = model.predict_proba(design[:, 1:])[:, 1]
    whole = -log_loss(label, prob, normalize=False)
    alone = (LogisticRegression(C=1e12, tol=1e-10).fit(design[:, [k]], label).predict_proba(design[:, [k]]) for k in (2, 1))
    bound = np.sqrt([2 * (whole + log_loss(label, one, normalize=False)) for one in alone])  # of what each adds to the other
    bread = np.linalg.inv(sum(p * (1 - p) * np.outer(row, row) for p, row in zip(prob, design, strict=True)))
    for groups, members in ((None, np.arange(500)[:, None]), (cluster, np.arange(500).reshape(100, 5))):
        meat = np.zeros((3, 3))
        for rows in members:
            score = sum((label[i].item() - prob[i]) * design[i] for i in rows)
            meat += np.outer(score, score)
        variance = np.diag(bread @ meat @ bread)[1:] * len(members) / (len(members) - 1)
        expected = np.minimum(model.coef_[0] / np.sqrt(variance), bound)
        # Our ridge of 1e-3 beside about 100 nats of information moves the third digit at most.
        assert added_information(label, [first, second], groups) == pytest.approx(expected.tolist(), rel=1e-3)


def test_a_right_model_leaves_nothing_to_add_whatever_its_level_and_scale() -> None:
    generator = torch.Generator().manual_seed(2)
    truth = torch.randn(4000, generator=generator)
    other = 0.5 * truth + torch.randn(4000, generator=generator)
    drawn = torch.tensor([added_information(labels(truth, seed), [2 * truth + 1, other]) for seed in range(200)])
    assert float(drawn[:, 0].min()) > 10
    assert abs(float(drawn[:, 1].mean())) < 3 / math.sqrt(200)  # three standard errors of a mean of standard normals
    assert float(drawn[:, 1].std()) == pytest.approx(1, abs=3 / math.sqrt(400))


def test_a_prediction_that_never_varies_adds_nothing() -> None:
    truth = torch.randn(300, generator=torch.Generator().manual_seed(3))
    label = labels(truth, 4)
    alone = added_information(label, [truth])
    assert added_information(label, [truth, torch.full((300,), 0.7)]) == pytest.approx([*alone, 0.0])


def test_no_prediction_adds_more_than_its_likelihood() -> None:
    truth = torch.linspace(-1, 1, 200)
    (adds,) = added_information((truth > 0).float(), [truth])  # separated: a constant leaves log 2 a row to be explained
    assert 9 < adds <= math.sqrt(2 * 200 * math.log(2))
    label = labels(2 * truth, 5)
    assert added_information(label, [truth, truth]) == pytest.approx([0.0, 0.0], abs=0.01)
    assert (
        max(added_information(label, [truth], torch.arange(200) // 67)) <= added_information(label, [truth])[0] * 1.2
    )  # three users


def test_evidence_by_hand() -> None:
    assert evidence(4.0, 2.0) == 6.0
    assert evidence(-3.0, 2.0) == -2.0
    assert evidence(3.0, -5.0) == 4.5
    assert evidence(3.0, 5.0, 10.0) == 2.0
    assert evidence(3.0, 5.0, -10.0) == -8.0  # a likelier label mechanism is the simpler one: that says nothing
    assert evidence(3.0, 5.0, 10.0, 7.0) == 9.0
    assert evidence(3.0, 5.0, strain=-2.5) == -10.5


def test_held_out_likelihood_speaks_against_the_label_mechanism_only_and_only_if_sure() -> None:
    features = torch.zeros(400)
    label = torch.tensor([-0.9, 1.1]).repeat(200)  # 0.1 nats worse a row, 40 in all, with a deviation of 1: z = 2
    stderr = math.sqrt(400 / 399) / 20
    assert likelihood_gain(features, label) == pytest.approx(40 * max(0.0, 1 - (2 * stderr / 0.1) ** 2), abs=1e-6)
    sure = torch.tensor([-0.1, 0.3]).repeat(200)  # the same mean, a deviation of 0.2
    assert likelihood_gain(features, sure) == pytest.approx(40 * (1 - (2 * 0.2 * stderr / 0.1) ** 2), rel=1e-5)
    assert likelihood_gain(sure, features) == 0
    users = torch.arange(400) // 100  # four users, of whom two count against, two for it
    assert likelihood_gain(features, torch.tensor([0.3, -0.1]).repeat_interleave(200), users) == 0


@pytest.mark.parametrize(
    ("nats", "signal", "expected"),
    [
        (15.0, 9.0, 0.5),
        (9.0, 2.0, 0.00247262),
        (21.0, 2.0, 0.99752738),
        (3.75, 1.0, 0.5),  # a quarter of 15 nats
        (0.0, 0.0, 0.5),
        (2.0, -3.0, 0.88079708),
    ],
)
def test_weights_are_a_logistic_function_of_the_nats(nats: float, signal: float, expected: float) -> None:
    torch.testing.assert_close(mechanism_weights(nats, signal), torch.tensor([expected, 1 - expected]), rtol=1e-4, atol=1e-6)


def test_signal_counts_standard_errors_over_a_constant() -> None:
    o = torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(100)
    constant = bce(torch.logit(torch.tensor(0.25)).expand_as(o), o)
    assert propensity_signal(constant + 1e-6 * o, o) < 0
    informed = constant - torch.tensor([0.1, 0.3]).repeat(200)
    assert propensity_signal(informed, o) == pytest.approx(math.sqrt(160), rel=1e-4)  # 80 nats
    little = constant - torch.tensor([-0.9, 1.1]).repeat(200)
    assert propensity_signal(little, o) == pytest.approx(0.1 / (math.sqrt(400 / 399) / 20), rel=1e-4)


def test_a_tiny_gain_is_no_signal_however_steady() -> None:
    o = torch.tensor([1.0, 0.0]).repeat(200)
    constant = bce(torch.zeros(400), o)
    assert propensity_signal(constant - 1e-5, o) == pytest.approx(math.sqrt(2 * 400e-5), rel=1e-2)
