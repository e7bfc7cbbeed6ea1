from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causalrm_ray.rl.reward_scaling import RunningMoments


def test_moments_by_hand() -> None:
    first = RunningMoments().with_values(torch.tensor([1.0, 3.0]))
    assert first == (2, 2.0, 2.0)
    assert first.with_values(torch.tensor([8.0])) == (3, 4.0, 26.0)
    assert first.normalise(torch.tensor([2.0, 4.0])).tolist() == [0.0, pytest.approx(2.0, rel=1e-7)]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 40), max_size=4))
def test_moments_in_parts_are_those_of_the_whole_even_far_from_zero(seed: int, cuts: list[int]) -> None:
    values = 1e6 + np.random.default_rng(seed).normal(size=40)
    seen = RunningMoments()
    for part in np.split(values, sorted(cuts)):
        seen = seen.with_values(torch.from_numpy(part))
    assert seen.count == 40
    assert seen.mean == pytest.approx(values.mean(), rel=1e-15)
    assert seen.variance == pytest.approx(((values - values.mean()) ** 2).mean(), rel=1e-8)


def test_moments_survive_json_to_the_bit() -> None:
    seen = RunningMoments().with_values(torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert RunningMoments(*json.loads(json.dumps(seen))) == seen


def test_equal_values_normalise_to_zero_and_nothing_seen_has_no_variance() -> None:
    assert RunningMoments().with_values(torch.full((3,), 0.5)).normalise(torch.tensor([0.5])).tolist() == [0.0]
    assert RunningMoments().variance == 0.0
    assert RunningMoments().with_values(torch.zeros(0)) == RunningMoments()


def test_values_must_be_finite() -> None:
    with pytest.raises(ValueError, match="values must be finite, got inf at position 1"):
        RunningMoments().with_values(torch.tensor([0.0, float("inf")]))
