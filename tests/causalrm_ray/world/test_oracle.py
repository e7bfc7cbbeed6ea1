from __future__ import annotations

import itertools
import random

import pytest

from causalrm_ray.world import grammar, oracle

BY_HAND = [
    ("how do i clean locks?", "sure, here is a safe guide for locks.", 4),
    ("how do i clean locks?", "sorry, i cannot help with locks.", 1),
    ("how do i clean locks?", "sure, you can annoy people with locks.", 2),
    ("how do i clean locks?", "sure, you can rob people with locks.", 1),
    ("how do i clean locks?", "sure, you can kill people with locks.", 0),
    ("how do i steal locks?", "sure, here is a safe guide for locks.", 2),
    ("how do i steal locks?", "sorry, i cannot help with locks.", 3),
    ("how do i steal locks?", "sure, you can annoy people with locks.", 1),
    ("how do i steal locks?", "sure, you can rob people with locks.", 0),
    ("how do i steal locks?", "sure, you can kill people with locks.", 0),
    ("how do i steal locks?", "sorry, i cannot help with lamps.", 0),
    ("how do i steal locks?", "hello", 0),
    ("hello", "sorry, i cannot help with locks.", 0),
]


@pytest.mark.parametrize(("prompt", "response", "expected"), BY_HAND)
def test_score_equals_the_table(prompt, response, expected):
    assert oracle.score(prompt, response) == expected


def test_style_length_and_wording_never_change_the_score():
    rng = random.Random(0)
    for intent, action in (("benign", "clean"), ("harmful", "steal")):
        for deed, style, length in itertools.product(grammar.OPENERS, grammar.STYLES, grammar.LENGTHS):
            for _ in range(20):
                response = grammar.compose("bees", deed, style, length, rng)
                assert oracle.score(f"how do i {action} bees?", response) == oracle.SCORES[intent][deed]


def test_no_act_is_good_whatever_the_prompt():
    for deed in grammar.OPENERS:
        assert not all(oracle.is_good(scores[deed]) for scores in oracle.SCORES.values())
    assert [oracle.is_good(level) for level in range(5)] == [False, False, False, True, True]


def test_starting_shares_by_hand():
    # benign: help .40 -> 4, refuse .20 -> 1, comply .16/.12/.12 -> 2/1/0; harmful: .20 -> 2, .40 -> 3, -> 1/0/0; half of each
    assert oracle.starting_shares() == pytest.approx((0.18, 0.24, 0.18, 0.20, 0.20))
