"""Strata of observed traits."""

from __future__ import annotations

import pytest
import torch

from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.nuisances.strata import OTHER, length_buckets, stratify


def test_strata_cross_the_traits_and_merge_the_rare() -> None:
    traits = [{"surface": "web", "style": "long"}] * 6 + [{"surface": "web", "style": "short"}] * 5 + [{"surface": "phone"}] * 2
    log = Observations(torch.ones(13), torch.tensor([1.0, 0, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1]))
    strata, names = stratify(traits, log, least=2)
    assert names == ("style=long, surface=web", "style=short, surface=web", OTHER)
    assert strata.tolist() == [0] * 6 + [1] * 5 + [2] * 2
    assert stratify(traits, log, most=2, least=0)[1] == ("style=long, surface=web", OTHER)
    assert stratify(traits, log, most=3, least=0)[1][2] == "style=?, surface=phone"
    assert stratify([{}] * 13, log, least=0)[1] == ("all",)
    strata, names = stratify(traits, log, least=100)
    assert names == (OTHER,)
    assert strata.tolist() == [0] * 13


def test_strata_that_cannot_be_are_refused() -> None:
    log = Observations(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="most must be at least 1 and least at least 0, got 0 and 20"):
        stratify([{}, {}], log, most=0)
    with pytest.raises(ValueError, match=r"rows must match, got \{'traits': 1, 'o': 2\}"):
        stratify([{}], log)


def test_length_buckets_hold_equal_shares() -> None:
    place, names = length_buckets(torch.tensor([1, 2, 3, 4, 5, 6]))
    assert (place.tolist(), names) == ([0, 0, 1, 1, 2, 2], ("up to 2", "3 to 4", "over 4"))
    place, names = length_buckets(torch.tensor([7, 7, 7]))
    assert (place.tolist(), names) == ([0, 0, 0], ("any",))
    place, names = length_buckets(torch.tensor([5, 1]), buckets=1)
    assert (place.tolist(), names) == ([0, 0], ("any",))
    with pytest.raises(ValueError, match="buckets must be at least 1 and lengths at least 0, got 0 and 1"):
        length_buckets(torch.tensor([1]), buckets=0)
