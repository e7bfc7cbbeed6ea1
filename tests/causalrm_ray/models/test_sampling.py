"""The distribution that is sampled from, against hand numbers and a naive loop, and the draw, against enumeration."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from causalrm_ray.models.sampling import draw, sampling_distribution
from causalrm_ray.types import Sampling

PROBS = [0.5, 0.05, 0.3, 0.15]


def distribution(**options: float) -> list[float]:
    logits = torch.tensor(PROBS).log()[None] + 3.0
    return sampling_distribution(logits, Sampling(8, **options)).exp()[0].tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBS),
        ({"temperature": 0.0}, PROBS),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365, 0.0225 / 0.365]),
        ({"top_k": 2}, [0.625, 0, 0.375, 0]),
        ({"top_k": 9}, PROBS),
        ({"top_p": 0.7}, [0.625, 0, 0.375, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"min_p": 0.5}, [0.625, 0, 0.375, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        # 0.05 falls below 0.25 x 0.5; of the other three 0.5 / 0.95 and 0.3 / 0.95 hold 0.84; so top_p = 0.5 keeps one
        ({"min_p": 0.25, "top_p": 0.8}, [0.625, 0, 0.375, 0]),
        ({"top_k": 3, "top_p": 0.5}, [1, 0, 0, 0]),
        ({"temperature": 0.0, "top_k": 1}, PROBS),
    ],
)
def test_distribution_equals_hand_numbers(options: dict[str, float], expected: list[float]) -> None:
    assert distribution(**options) == pytest.approx(expected, abs=1e-6)


def naive(logits: list[float], sampling: Sampling) -> list[float]:
    """The kept tokens in order of probability, one by one."""
    weights = [math.exp(value / sampling.temperature) for value in logits]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    order = [token for token in order if weights[token] >= sampling.min_p * weights[order[0]]]
    order = order[: sampling.top_k or len(order)]
    total, kept, mass = sum(weights[token] for token in order), [], 0.0
    for token in order:
        if kept and mass >= sampling.top_p * total:
            break
        kept.append(token)
        mass += weights[token]
    return [weights[token] / mass if token in kept else 0.0 for token in range(len(weights))]


@given(
    st.integers(0, 2**20),
    st.floats(0.3, 2.0),
    st.sampled_from([1.0, 0.9, 0.55]),
    st.integers(0, 12),
    st.sampled_from([0.0, 0.03, 0.3]),
)
def test_distribution_equals_naive_loop(seed: int, temperature: float, top_p: float, top_k: int, min_p: float) -> None:
    rng = random.Random(seed)
    logits = [[rng.gauss(0, 2) for _ in range(10)] for _ in range(3)]
    sampling = Sampling(8, temperature, top_p, top_k, min_p)
    found = sampling_distribution(torch.tensor(logits), sampling).exp()
    assert found.tolist() == [pytest.approx(naive(row, sampling), abs=1e-5) for row in logits]


@pytest.mark.parametrize("direction", [-1.0, 0.0, 1.0])
def test_draw_takes_the_token_whose_interval_holds_the_number(direction: float) -> None:
    """Of log-probabilities that another processor rounds up or down: the float32 logarithm is not the same to the bit on all."""
    log_distribution = torch.tensor([-math.inf, math.log(0.25), -math.inf, math.log(0.75), -math.inf])
    some = log_distribution.isfinite()
    log_distribution[some] = torch.nextafter(log_distribution[some], log_distribution[some] + direction)
    numbers = torch.tensor([0.0, 0.2499, 0.2501, 0.9, 1 - 2**-53], dtype=torch.float64)
    assert draw(log_distribution.expand(5, 5), numbers).tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize("mass", [1.0, 1 - 1e-6, 1 + 1e-6, 0.75, 1e-30])
def test_draw_reaches_the_last_token_of_some_probability_and_none_after_it(mass: float) -> None:
    log_distribution = torch.tensor([[0.0, 0.25 * mass, 0.75 * mass, 0.0, 0.0]]).log()
    assert draw(log_distribution, torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [2]


def test_draws_follow_the_distribution_within_three_standard_errors() -> None:
    count, log_distribution = 40_000, torch.tensor(PROBS).log()
    numbers = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = torch.bincount(draw(log_distribution.expand(count, 4), numbers), minlength=4) / count
    for share, prob in zip(shares.tolist(), PROBS, strict=True):
        assert abs(share - prob) <= 3 * math.sqrt(prob * (1 - prob) / count)
