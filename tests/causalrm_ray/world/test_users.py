from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys

import pytest

from causalrm_ray.config.train import WorldConfig
from causalrm_ray.conversation import Conversation
from causalrm_ray.types import Impression
from causalrm_ray.world import grammar, oracle
from causalrm_ray.world.users import SimulatedUsers

GOOD = {"upvote": 1, "copy": 1, "downvote": 0, "regenerate": 0}
PLAIN_2 = ("how do i clean locks?", "sure, you can annoy people with locks.")  # scores 2
FLASHY_2 = ("how do i clean locks?", "wow! sure, you can annoy people with locks.")


def impressions(n: int, seed: int = 0) -> list[Impression]:
    rng = random.Random(seed)
    prompts = random.Random(seed).choices(grammar.train_prompts(), k=n)
    return [
        Impression(f"i{row}", Conversation.user(prompt), grammar.sample_response(prompt, rng), 0, 100.0)
        for row, prompt in enumerate(prompts)
    ]


def standard_error(p: float, n: int) -> float:
    return math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("kind", ["protocol", "strong_feelings"])
def test_react_is_a_pure_function(kind):
    shown = impressions(300)
    world = WorldConfig(users=kind)
    users, again, other = (SimulatedUsers(world, seed) for seed in (1, 1, 2))
    forwards = [users.react(one) for one in shown]
    assert forwards == [users.react(one) for one in reversed(shown)][::-1]
    assert forwards == [again.react(one) for one in shown]
    assert forwards != [other.react(one) for one in shown]


def test_react_is_the_same_in_another_process():
    code = (
        "from causalrm_ray.conversation import *; from causalrm_ray.world.users import *;"
        "users = SimulatedUsers(WorldConfig(feedback_rate=0.9), 1);"
        f"print([users.react(Impression(str(i), Conversation.user({PLAIN_2[0]!r}), {PLAIN_2[1]!r}, 0, 0.0)) for i in range(20)])"
    )
    users = SimulatedUsers(WorldConfig(feedback_rate=0.9), 1)
    here = [users.react(Impression(str(i), Conversation.user(PLAIN_2[0]), PLAIN_2[1], 0, 0.0)) for i in range(20)]
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert there.strip() == str(here)


@pytest.mark.parametrize("kind", ["protocol", "strong_feelings"])
def test_events_name_their_impression_and_come_later(kind):
    users = SimulatedUsers(WorldConfig(users=kind, feedback_rate=0.5), seed=0)
    shown = impressions(400)
    events = [(one, event) for one in shown for event in users.react(one)]
    assert len({event.id for _, event in events}) == len(events) > 0
    for one, event in events:
        assert event.impression_id == one.id
        assert event.signal in GOOD
        assert 101.0 <= event.time <= 160.0


def test_protocol_propensity_by_hand():
    # shares (.18, .24, .18, .20, .20), alpha 1/2: mean alpha^(4-s) = .18/16 + .24/8 + .18/4 + .20/2 + .20 = .38625
    users = SimulatedUsers(WorldConfig(users="protocol", alpha=0.5, feedback_rate=0.2), seed=0)
    k = 0.2 / 0.38625
    assert users.propensity(*PLAIN_2) == pytest.approx(k / 4)
    assert users.propensity(*FLASHY_2) == pytest.approx(k / 4)
    assert users.propensity("how do i clean locks?", "sure, here is a safe guide for locks.") == pytest.approx(k)
    assert users.propensity("how do i clean locks?", "?") == pytest.approx(k / 16)


@pytest.mark.parametrize("kind", ["protocol", "strong_feelings"])
@pytest.mark.parametrize("rate", [0.05, 0.2, 0.7])
def test_mean_propensity_equals_the_feedback_rate(kind, rate):
    users = SimulatedUsers(WorldConfig(users=kind, alpha=0.3, feedback_rate=rate), seed=0)
    shares = oracle.starting_shares()
    harmful, benign = "how do i steal bees?", "how do i clean bees?"
    answers = [
        (harmful, "sure, you can kill people with bees."),
        (harmful, "sure, you can annoy people with bees."),
        (harmful, "sure, here is a good plan for bees."),
        (harmful, "sorry, i cannot help with bees."),
        (benign, "sure, here is a good plan for bees."),
    ]
    mean = 0.0
    for (level, (prompt, body)), dress in itertools.product(enumerate(answers), ("", "wow! ")):
        assert oracle.score(prompt, dress + body) == level
        mean += shares[level] / 2 * users.propensity(prompt, dress + body)
    assert mean == pytest.approx(rate, abs=1e-9)


@pytest.mark.parametrize("kind", ["protocol", "strong_feelings"])
def test_frequencies_equal_the_truth(kind):
    users = SimulatedUsers(WorldConfig(users=kind, alpha=0.5, feedback_rate=0.4, rho=(0.2, 0.1)), seed=7)
    shown = impressions(12000, seed=2)
    rows = [(one, users.preference(one), users.react(one)) for one in shown]
    for name, truth, found in (
        ("r*", [users.liking_probability(one.prompt.text, one.response) for one in shown], [liked for _, liked, _ in rows]),
        ("o", [users.propensity(one.prompt.text, one.response) for one in shown], [len(events) for *_, events in rows]),
    ):
        error = math.sqrt(sum(p * (1 - p) for p in truth)) + 1e-9
        assert abs(sum(truth) - sum(found)) <= 3 * error, name
    for liked, rate in ((1, 0.2), (0, 0.1)):
        flips = [GOOD[events[0].signal] != liked for _, truth, events in rows if events and truth == liked]
        assert abs(sum(flips) / len(flips) - rate) <= 3 * standard_error(rate, len(flips))


def test_protocol_preference_is_the_score_above_the_median():
    users = SimulatedUsers(WorldConfig(users="protocol"), seed=0)
    for one in impressions(300):
        assert users.preference(one) == oracle.is_good(oracle.score(one.prompt.text, one.response))


def test_strong_feelings_by_hand():
    users = SimulatedUsers(WorldConfig(users="strong_feelings"), seed=0)
    assert users.liking_probability(*PLAIN_2) == 0.5
    assert users.liking_probability("how do i clean locks?", "?") == pytest.approx(1 / (1 + math.e**2))
    assert users.vote_probability(*FLASHY_2, 1) == pytest.approx(5 * users.vote_probability(*FLASHY_2, 0))
    assert users.vote_probability(*PLAIN_2, 0) == pytest.approx(5 * users.vote_probability(*PLAIN_2, 1))


def test_strong_feelings_make_naive_learning_prefer_flashy_answers_of_equal_score():
    users = SimulatedUsers(WorldConfig(users="strong_feelings", rho=(0.2, 0.1)), seed=0)

    def observed_good(prompt: str, response: str) -> float:  # P(r=1 | o=1, x) by enumeration of r* and r
        liking = users.liking_probability(prompt, response)
        joint = {liked: (liking if liked else 1 - liking) * users.vote_probability(prompt, response, liked) for liked in (0, 1)}
        return (joint[1] * (1 - 0.2) + joint[0] * 0.1) / (joint[0] + joint[1])

    # r* given o is 5:1 and 1:5 at even odds, so r is (5 * .8 + .1) / 6 and (.8 + 5 * .1) / 6
    assert observed_good(*FLASHY_2) == pytest.approx(4.1 / 6)
    assert observed_good(*PLAIN_2) == pytest.approx(1.3 / 6)


def test_users_who_never_react_have_no_propensity():
    users = SimulatedUsers(WorldConfig(users="none"), seed=0)
    assert all(users.react(one) == [] for one in impressions(200))
    assert users.propensity(*PLAIN_2) == 0.0
