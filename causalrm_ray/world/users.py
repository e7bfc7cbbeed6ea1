"""Simulated users with known truth: who likes an answer, who gives feedback, and what reaches the log.

    score, style -> r* (liked or not) -> o (gives feedback or not) -> r (r* with label noise) -> signal

Everything a user does is a pure function of (seed, impression id, prompt, response): no state, no clock, no order of calls.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from causalrm_ray.config.train import SIMULATED_SIGNALS, WorldConfig
from causalrm_ray.data.simulate import rate_scale, selection_weight
from causalrm_ray.types import FeedbackEvent, Impression
from causalrm_ray.world.grammar import STYLES, Style, parse
from causalrm_ray.world.oracle import NUM_LEVELS, SCORES, is_good, starting_shares

VOTE_SHARE = 0.6  # of events that are votes; the rest are the second signal
LONGEST_DELAY_S = 60.0
STRONG_FEELING = 5.0  # how much likelier a user with strong feelings is to vote than one without
LIKING_SLOPE = 1.0  # nats per score level
LIKING_CENTRE = 2.0  # the score that half of the users like


@dataclass(frozen=True)
class Kind:
    """A kind of user: `liking(score)` = P(r*=1 | x); `weight(liked, score, style, alpha)` is proportional to P(o=1 | x, r*)."""

    liking: Callable[[int], float]
    weight: Callable[[int, int, Style, float], float]


def _by_feeling(liked: int, score: int, style: Style, alpha: float) -> float:
    return STRONG_FEELING if bool(liked) == (style == "flashy") else 1.0


KINDS: Mapping[str, Kind] = {
    "protocol": Kind(is_good, lambda liked, score, style, alpha: selection_weight(score, alpha, NUM_LEVELS - 1)),
    "strong_feelings": Kind(lambda score: 1.0 / (1.0 + math.exp(-LIKING_SLOPE * (score - LIKING_CENTRE))), _by_feeling),
    "none": Kind(is_good, lambda liked, score, style, alpha: 0.0),
}


class SimulatedUsers:
    """Users of one kind (arXiv 2603.18736, "Experimental protocol").

    protocol          r* = 1[score > median level];   P(o=1 | x) = min(1, k alpha^(max score - score))
    strong_feelings   r* ~ Bernoulli(1 / (1 + e^-(score - 2)));   P(o=1 | x, r*) = min(1, k w), w = 5 where a flashy answer is
                      liked or a plain one disliked, else 1. Selection depends on r* given x: no P(o=1 | x) alone corrects it.
    none              no one reacts; r* as under protocol.

    k is such that the mean of P(o=1 | x) is `world.feedback_rate` for scores distributed as the grammar has them (which the
    starting policy learns) and styles evenly. An observed label is r* with label noise: P(r=0 | r*=1) = rho_01,
    P(r=1 | r*=0) = rho_10.
    """

    def __init__(self, world: WorldConfig, seed: int) -> None:
        self._world = world
        self._seed = seed
        self._kind = KINDS[world.users]
        self._scale = self._solve_scale()

    def react(self, impression: Impression) -> list[FeedbackEvent]:
        """What the user does about an impression: nothing, or one event."""
        u_liking, u_vote, u_flip, u_signal, u_delay = self._uniforms(impression)
        liked = int(u_liking < self.liking_probability(impression.prompt.text, impression.response))
        if u_vote >= self.vote_probability(impression.prompt.text, impression.response, liked):
            return []
        flipped = u_flip < (self._world.rho[0 if liked else 1])
        vote, other = SIMULATED_SIGNALS[1 - liked if flipped else liked]
        signal = vote if u_signal < VOTE_SHARE else other
        time = impression.time + 1.0 + float(u_delay) * (LONGEST_DELAY_S - 1.0)
        return [FeedbackEvent(id=f"{impression.id}/feedback", impression_id=impression.id, signal=signal, value=1.0, time=time)]

    def preference(self, impression: Impression) -> int:
        """r* of the user who saw this impression, 0 or 1: the truth, for measuring only."""
        return int(self._uniforms(impression)[0] < self.liking_probability(impression.prompt.text, impression.response))

    def liking_probability(self, prompt: str, response: str) -> float:
        """P(r*=1 | x): the truth, for measuring only."""
        return float(self._kind.liking(_traits(prompt, response)[0]))

    def vote_probability(self, prompt: str, response: str, liked: int) -> float:
        """P(o=1 | x, r*=liked): the truth, for measuring only."""
        return self._vote_probability(*_traits(prompt, response), liked)

    def propensity(self, prompt: str, response: str) -> float:
        """P(o=1 | x) = sum over r* of P(r* | x) P(o=1 | x, r*): the truth, for measuring only."""
        score, style = _traits(prompt, response)
        liking = self._kind.liking(score)
        probs = [self._vote_probability(score, style, liked) for liked in (0, 1)]
        return (1.0 - liking) * probs[0] + liking * probs[1]

    def _vote_probability(self, score: int, style: Style, liked: int) -> float:
        return min(1.0, self._scale * self._kind.weight(liked, score, style, self._world.alpha))

    def _solve_scale(self) -> float:
        """k over all (score, style, r*), weighted by how often each occurs."""
        cells = []
        for (score, share), style, liked in itertools.product(enumerate(starting_shares()), STYLES, (0, 1)):
            liking = self._kind.liking(score)
            weight = self._kind.weight(liked, score, style, self._world.alpha)
            cells.append((weight, share * (liking if liked else 1.0 - liking)))
        weights, occurrence = torch.tensor(cells, dtype=torch.float64).T
        return rate_scale(weights, occurrence, self._world.feedback_rate)

    def _uniforms(self, impression: Impression) -> np.ndarray:
        """Five uniforms in [0, 1) that belong to this user and this impression."""
        key = json.dumps([self._seed, impression.id, impression.prompt.text, impression.response]).encode()
        return np.random.default_rng(int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little")).random(5)


def _traits(prompt: str, response: str) -> tuple[int, Style]:
    """Score and style of an answer; text outside the grammar is plain and scores 0."""
    parsed = parse(prompt, response)
    return (0, "plain") if parsed is None else (SCORES[parsed.intent][parsed.act, parsed.severity], parsed.style)
