"""A step's answers, distributed over the learner's ranks by the driver: each rank gets its own share only, once, as arrays.

    completions --Sharder.split--> a Share per rank     --> LearnerRank.prepare   as answers arrive
    scored      --Sharder.step---> a StepShare per rank --> LearnerRank.update    ids, rewards, groups, global counts

All that must be the same on every rank is decided here: which rank owns an answer, the minibatches (drawn from seed, version and
epoch), and how many micro-batches each takes on the busiest rank.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from causalrm_ray.checks import check_finite
from causalrm_ray.config.train import LearnerConfig
from causalrm_ray.models.token_batch import TokenRow
from causalrm_ray.registry import ALGORITHMS
from causalrm_ray.rl.batching import TOKEN_BUDGET, balance_lengths, micro_batches
from causalrm_ray.types import Completion, Scored, Span

Batches = tuple[tuple[int, ...], ...]  # rows that go through the model together; as many on each rank, so some may be empty


class Answer(NamedTuple):
    """One answer of a rank: its tokens, the engine's log-probability of each, float32 [R], and whether the token limit cut it."""

    row: TokenRow
    logprobs_R: torch.Tensor
    truncated: bool


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """One rank's answers [B] among some completions. The arrays of all rows follow each other without pads."""

    ids: tuple[str, ...]
    tokens: np.ndarray  # int32: a row's prompt, then its answer
    logprobs: np.ndarray  # float32, of the answers' tokens
    prompt_lengths: np.ndarray  # int32 [B]
    answer_lengths: np.ndarray  # int32 [B]
    truncated: np.ndarray  # bool [B]
    batches: Batches

    def answers(self) -> list[Answer]:
        """The rows."""
        lengths = np.stack([self.prompt_lengths, self.answer_lengths], axis=1).ravel().tolist()
        parts = torch.from_numpy(self.tokens.astype(np.int64)).split(lengths)
        logprobs = torch.tensor(self.logprobs).split(self.answer_lengths.tolist())
        return list(map(Answer, map(TokenRow, parts[0::2], parts[1::2]), logprobs, self.truncated.tolist()))


@dataclass(frozen=True, slots=True)
class Minibatch:
    """One optimizer step: its answers and their tokens over all ranks, and this rank's rows of each micro-batch."""

    answers: int
    tokens: int
    batches: Batches


@dataclass(frozen=True, slots=True, eq=False)
class StepShare:
    """What a rank must know of a step of N answers, written for policy `version`: its own `ids` [B] in the step's order."""

    version: int
    ids: tuple[str, ...]
    places: np.ndarray  # int64 [B], of its own among the N
    rewards: np.ndarray  # float64 [N]
    groups: np.ndarray  # int64 [N]: answers to prompts of the same tokens share a number
    longest: int  # tokens of the longest of the N
    minibatches: tuple[Minibatch, ...]


class Sharder:
    """Distributes answers over ranks; knows who owns which answer of the step that is under way, and the learner's `version`."""

    def __init__(
        self, config: LearnerConfig, *, ranks: int, seed: int, max_length: int, tokens_per_micro_batch: int = TOKEN_BUDGET
    ) -> None:
        """`max_length` bounds prompt + answer, tokens; a micro-batch has at most `tokens_per_micro_batch` tokens with pads."""
        self._config, self._ranks, self._seed = config, ranks, seed
        self._max_length, self._budget = max_length, tokens_per_micro_batch
        self._owners: dict[str, int] = {}
        self.version = 0

    def restart(self, version: int) -> None:
        """Forget the step that was under way: the learner has loaded the weights of `version`."""
        self._owners.clear()
        self.version = version

    def split(self, completions: Sequence[Completion]) -> list[Share]:
        """The share of each rank of some answers of the step, about as many tokens to each.

        Raises ValueError, naming the id, for an answer of another policy version, without tokens, too long, or known.
        """
        return self._split(completions, self._owners)

    def split_apart(self, completions: Sequence[Completion]) -> list[Share]:
        """The same of answers that belong to no step."""
        return self._split(completions, {})

    def _split(self, completions: Sequence[Completion], known: dict[str, int]) -> list[Share]:
        """The shares; who owns which is added to `known`."""
        ids = [completion.prompt.id for completion in completions]
        for completion in completions:
            check_answer(completion, self.version, self._config.staleness, self._max_length)
        check_unique([*known, *ids])
        lengths = [_length(completion) for completion in completions]
        owners = balance_lengths(lengths, self._ranks)
        known.update(zip(ids, owners, strict=True))
        rows, shares = _rows(owners), []
        for rank, batches in enumerate(micro_batches(lengths, owners, self._ranks, self._budget)):
            own = [done for done, owner in zip(completions, owners, strict=True) if owner == rank]
            shares.append(_share(own, _renumber(batches, rows)))
        return shares

    def step(self, scored: Sequence[Scored]) -> list[StepShare]:
        """What each rank gets for the update on a whole step, whose answers were all split before; ends the step.

        Raises ValueError, naming the id, for an answer that was never split, comes twice, or is of another version.
        """
        self._check(scored)
        completions = [answer.completion for answer in scored]
        owners = [self._owners[completion.prompt.id] for completion in completions]
        lengths, rows = [_length(completion) for completion in completions], _rows(owners)
        minibatches: list[list[Minibatch]] = [[] for _ in range(self._ranks)]
        for places in self._minibatches(completions):
            tokens = sum(len(completions[place].token_ids) for place in places)
            chosen = [lengths[place] for place in places], [owners[place] for place in places]
            for own, batches in zip(minibatches, micro_batches(*chosen, self._ranks, self._budget), strict=True):
                own.append(Minibatch(len(places), tokens, _renumber(batches, [rows[place] for place in places])))
        rewards = np.array([answer.reward for answer in scored], dtype=np.float64)
        groups, longest = groups_of(completions), max(len(completion.token_ids) for completion in completions)
        shares = []
        for rank, own in enumerate(minibatches):
            places = np.flatnonzero(np.array(owners) == rank)
            ids = tuple(completions[place].prompt.id for place in places)
            shares.append(StepShare(self.version, ids, places, rewards, groups, longest, tuple(own)))
        self.restart(self.version + 1)
        return shares

    def _check(self, scored: Sequence[Scored]) -> None:
        if len(scored) < self._config.minibatches:
            raise ValueError(f"update needs an answer per minibatch, got {len(scored)} answers for {self._config.minibatches}")
        for answer in scored:
            check_answer(answer.completion, self.version, self._config.staleness, self._max_length)
            if answer.completion.prompt.id not in self._owners:
                raise ValueError(f"answer {answer.completion.prompt.id!r} was never prepared in this step")
        check_unique([answer.completion.prompt.id for answer in scored])
        if ALGORITHMS.load(self._config.algorithm).grouped:
            check_groups(self._config.algorithm, [answer.completion for answer in scored])
        check_finite("reward", torch.tensor([answer.reward for answer in scored]))

    def _minibatches(self, completions: Sequence[Completion]) -> Iterator[list[int]]:
        """Places of the answers of each optimizer step; none is empty."""
        masks = self._config.truncation == "mask"
        places = [place for place, done in enumerate(completions) if not (masks and done.stop_reason == "length")]
        for epoch in range(self._config.epochs):
            order = np.random.default_rng(np.random.SeedSequence([self._seed, self.version, epoch])).permutation(len(places))
            for numbers in np.array_split(order, self._config.minibatches):
                if len(numbers):
                    yield [places[number] for number in numbers.tolist()]


def _share(own: Sequence[Completion], batches: Batches) -> Share:
    return Share(
        ids=tuple(done.prompt.id for done in own),
        tokens=np.array([token for done in own for token in (*done.prompt.token_ids, *done.token_ids)], dtype=np.int32),
        logprobs=np.array([logprob for done in own for logprob in done.logprobs], dtype=np.float32),
        prompt_lengths=np.array([len(done.prompt.token_ids) for done in own], dtype=np.int32),
        answer_lengths=np.array([len(done.token_ids) for done in own], dtype=np.int32),
        truncated=np.array([done.stop_reason == "length" for done in own], dtype=bool),
        batches=batches,
    )


def _rows(owners: Sequence[int]) -> list[int]:
    """The number of each answer among those of its rank."""
    numbers: dict[int, Iterator[int]] = defaultdict(itertools.count)
    return [next(numbers[owner]) for owner in owners]


def _renumber(batches: Sequence[Sequence[int]], rows: Sequence[int]) -> Batches:
    return tuple(tuple(rows[place] for place in batch) for batch in batches)


def groups_of(completions: Sequence[Completion]) -> np.ndarray:
    """The number of each answer's group, int64 [N]: answers to prompts of the same tokens share one."""
    numbers: dict[tuple[int, ...], int] = {}
    return np.array([numbers.setdefault(answer.prompt.token_ids, len(numbers)) for answer in completions], dtype=np.int64)


def check_unique(ids: Sequence[str]) -> None:
    """Raise ValueError, naming it, for an id that comes twice."""
    for name, count in Counter(ids).items():
        if count > 1:
            raise ValueError(f"ids must be unique within a step, got {name!r} twice")


def check_groups(algorithm: str, completions: Sequence[Completion]) -> None:
    """Raise ValueError, naming the id, for a prompt with one answer only: `algorithm` compares answers to one prompt."""
    sizes = Counter(completion.prompt.token_ids for completion in completions)
    for completion in completions:
        if sizes[completion.prompt.token_ids] == 1:
            raise ValueError(f"{algorithm} needs at least 2 answers to each prompt, got 1 to that of {completion.prompt.id!r}")


def check_answer(completion: Completion, version: int, staleness: int, max_length: int) -> None:
    """Raise ValueError, naming the id, unless policy `version` may learn from it: written by weights at most `staleness` versions
    older, at most `max_length` tokens with its prompt, a log-probability for each of its own."""
    name, length = completion.prompt.id, len(completion.prompt.token_ids) + len(completion.token_ids)
    oldest, newest = completion.oldest_version, completion.policy_version
    if not version - staleness <= oldest <= newest <= version:
        allowed = f"{version - staleness} to {version}" if staleness else version
        got = newest if oldest == newest else f"{oldest} to {newest}"
        raise ValueError(f"answer {name!r} must come from policy version {allowed}, got {got}")
    if not completion.token_ids or not completion.prompt.token_ids:
        raise ValueError(f"answer {name!r} and its prompt must have at least one token each")
    if len(completion.logprobs) != len(completion.token_ids):
        raise ValueError(
            f"answer {name!r} must have one logprob per token, got {len(completion.logprobs)} for {len(completion.token_ids)}"
        )
    if length > max_length:
        raise ValueError(f"answer {name!r} with its prompt must have at most {max_length} tokens, got {length}")


def answer_metrics(scored: Sequence[Scored], version: int) -> dict[str, float]:
    """Means over a step's answers; `staleness` is that of the policy `version` over the weights that wrote a token."""
    answers = len(scored)
    tokens = sum(len(answer.completion.token_ids) for answer in scored)
    return {
        "reward": sum(answer.reward for answer in scored) / answers,
        "response_length": tokens / answers,
        "truncated": sum(answer.completion.stop_reason == "length" for answer in scored) / answers,
        "tokens": float(tokens),
        "staleness": sum(_lag(answer.completion, version) for answer in scored) / tokens,
    }


def _lag(completion: Completion, version: int) -> int:
    """Versions between `version` and the weights that wrote a token, summed over tokens."""
    spans = completion.spans or (Span(completion.policy_version, len(completion.token_ids)),)
    return sum((version - span.version) * span.tokens for span in spans)


def _length(completion: Completion) -> int:
    return len(completion.prompt.token_ids) + len(completion.token_ids)
