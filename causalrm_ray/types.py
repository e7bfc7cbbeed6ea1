"""The nouns of the system: frozen records, one per stage, complete at the stage where they are made.

Prompt -> Completion -> Scored           what the policy wrote and what the reward model thinks of it
Impression <- FeedbackEvent              what a user was shown and what the user did about it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

from causalrm_ray.conversation import Conversation

LABEL_SIGNALS: Mapping[str, int] = MappingProxyType({"liked": 1, "disliked": 0})  # stand for a bare label in an imported log
PerUser = int | Literal["auto"] | None  # rows with feedback that a user counts for at most: data.users.concentration.cap
Truncation = Literal["refuse", "oldest"]  # of what is too long for a model: causalrm_ray.truncation.truncate
LoraTargets = Literal["auto"] | tuple[str, ...]  # of adapters: causalrm_ray.models.lora.linear_layers
StopReason = Literal["stop", "length"]
NoiseEstimator = Literal["curve", "anchors"]  # of the noise rates: estimators.nuisances.noise_rates
RewardTuning = Literal["head", "full"]  # of a reward model's backbone: config.train.RewardConfig
HeadKind = Literal["mlp", "linear", "boosting"]  # of a model on features: config.benchmark.HeadConfig
StatesName = Literal["final-last", "final-mean", "middle-last", "middle-mean"]  # of a backbone: models.states.pooled
Selection = Literal["label", "features", "trait", "popularity", "mixed"]  # who gives feedback: data.simulate.simulate


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation to answer, ready for an engine.

    `token_ids` is the chat-formatted prompt up to and including the generation prompt.
    """

    id: str
    conversation: Conversation
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an engine samples. `temperature` >= 0, 0 takes the likeliest token; `max_new_tokens` >= 1.

    The tail of the distribution at that temperature is cut by, in this order: `min_p` in [0, 1], which keeps tokens of at
    least this share of the likeliest one's probability; `top_k` >= 0, the likeliest k (0: all); `top_p` in (0, 1], the
    likeliest ones that hold this mass. `stop` are texts (str) or token ids (int) that end an answer.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str | int, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to complete with a seed of its own, so that a repeated request repeats its answer."""

    prompt: Prompt
    seed: int


class Span(NamedTuple):
    """A number of tokens that one version of the weights wrote."""

    version: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer.

    `token_ids` [T] are the sampled tokens, the end-of-sequence token or what else stopped it included; `response` is their
    text up to the first stop. `logprobs` [T] are the natural-log probabilities under the distribution that was sampled from
    (after temperature, min_p, top_k and top_p; at temperature 0 under the plain softmax). `stop_reason` is "length" for an
    answer cut by the token limit. `policy_version` is the version of the weights that wrote the last token; `spans`, in order,
    how many tokens each version wrote, where it was more than one: weights may come while an answer is being written.
    """

    prompt: Prompt
    response: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_reason: StopReason
    policy_version: int
    spans: tuple[Span, ...] = ()

    @property
    def oldest_version(self) -> int:
        """Version of the weights that wrote the first token."""
        return self.spans[0].version if self.spans else self.policy_version

    @property
    def is_blank(self) -> bool:
        """Whether the answer has nothing but spaces: users are shown none of those."""
        return not self.response.strip()


@dataclass(frozen=True, slots=True)
class Scored:
    """A completion with the reward model's logit and the version of the model that gave it."""

    completion: Completion
    reward: float
    reward_version: int


@dataclass(frozen=True, slots=True)
class Impression:
    """One response shown to one user.

    `time` is in seconds since the epoch; `context` holds observed traits only. `conversation_id` is shared by the impressions of
    one conversation, `model` wrote the response, `logprob` <= 0 is the natural log of the probability with which it did, and
    `asked_for_feedback` is whether the product asked this user for feedback; None where it is not known.
    """

    id: str
    prompt: Conversation
    response: str
    policy_version: int
    time: float
    user: str | None = None
    context: Mapping[str, str] = field(default_factory=dict)
    conversation_id: str | None = None
    model: str | None = None
    logprob: float | None = None
    asked_for_feedback: bool | None = None


class Graded(Protocol):
    """A signal whose value says what it means: label 1 from `high` on, 0 up to `low`, no feedback between; None: never."""

    @property
    def low(self) -> float | None: ...

    @property
    def high(self) -> float | None: ...


Meaning = int | Graded  # of a signal: its label, or thresholds on its value


@dataclass(frozen=True, slots=True)
class FeedbackEvent:
    """One thing a user did about an impression.

    `signal` is what was logged (click, copy, upvote, downvote, regenerate, ...), `value` its strength. An event that
    withdraws an earlier one names it in `retracts`.
    """

    id: str
    impression_id: str
    signal: str
    value: float
    time: float
    retracts: str | None = None


@dataclass(frozen=True, slots=True)
class NoiseRates:
    """Label noise: rho_01 = P(r=0 | r*=1) and rho_10 = P(r=1 | r*=0), each in [0, 1), their sum below 1."""

    rho_01: float
    rho_10: float

    def __post_init__(self) -> None:
        for name in ("rho_01", "rho_10"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        if self.rho_01 + self.rho_10 >= 1.0:
            total = self.rho_01 + self.rho_10
            raise ValueError(f"rho_01 + rho_10 must be below 1, or feedback carries no information; got {total:.4f}")


# Label noise of the paper's two scenarios, arXiv 2603.18736.
SCENARIOS = {
    1: NoiseRates(rho_01=0.2, rho_10=0.1),
    2: NoiseRates(rho_01=0.1, rho_10=0.2),
}
FEEDBACK_RATE = 0.2  # their share of answers with feedback
