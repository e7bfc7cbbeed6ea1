"""A rollout as it streams through the roles.

    requests -> generators ==========micro-batches as each is full==========+-> reward.score  ----------> rewards
               (one stream each, in its own order)                          +-> learner.prepare            |
                                                                            +-> users.react -> log.append  |
    answers in request order <-----------------------------------------------------------------------------+

A micro-batch holds completions of one generator in the order in which that generator finished them, which depends on its
requests alone: so scores and prepared values repeat to the bit, however the streams interleave. At most `rollout.buffer`
completions are between two stages; when that many wait, the driver stops reading the streams, and each generator stops at
its own bound.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from actors.cluster.telemetry import DRIVER, record
from actors.cluster.wait import resolve
from actors.learner.group import LearnerGroup
from actors.rollout.generator_pool import Call, Generators
from actors.weights.publish import Publisher
from causalrm_ray.config.train import RolloutConfig
from causalrm_ray.types import Completion, Impression, Request, Scored

PROBE_TOKENS = 16  # of an answer that engine and learner are compared on
Show = Callable[[Sequence[Completion]], list[Impression]]  # what users see of a micro-batch


class RolloutStream:
    """Streams over handles on the roles; those of the others that a job does not start may be None.

    `refresh` gives a generator that takes the place of another one the newest weights (None: it keeps those that it starts with).
    """

    def __init__(
        self,
        config: RolloutConfig,
        generators: Generators,
        learner: LearnerGroup,
        *,
        reward: Any = None,
        users: Any = None,
        log: Any = None,
        refresh: Publisher | None = None,
        timeout_s: float,
    ) -> None:
        self._config, self._generators, self._learner = config, generators, learner
        self.reward, self._users, self._log = reward, users, log
        self._refresh, self._timeout_s = refresh, timeout_s
        self._begun: tuple[str, dict[str, Call]] | None = None

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """Answers to `requests`, in their order, sampled as evaluations are."""
        sampling = self._config.sampling(evaluation=True)
        done = [
            completion for chunk in self._micro_batches(self._generators.generate(requests, sampling)) for completion in chunk
        ]
        return sorted(done, key=lambda completion: completion.prompt.id)

    def probe(self, requests: Sequence[Request]) -> dict[str, list[Completion]]:
        """Short answers of each generator to the same requests, sampled as training samples, by the generator's name."""
        sampling = replace(self._config.sampling(), max_new_tokens=min(PROBE_TOKENS, self._config.max_new_tokens))
        found = {}
        for name in self._generators.handles:
            calls = self._generators.generate(requests, sampling, [name])
            found[name] = [completion for chunk in self._micro_batches(calls) for completion in chunk]
        return found

    def begin(self, requests: Sequence[Request]) -> None:
        """Let the generators begin on `requests`, which must be those of the next `rollout`: under the weights that they have,
        and under those that come meanwhile."""
        self._begun = (requests[0].prompt.id, self._generators.generate(requests))

    def rollout(self, requests: Sequence[Request], show: Show) -> list[Scored]:
        """Generate, score, prepare for learning and show to users, all as answers finish; answers in request order.

        The learner may still prepare the last `rollout.buffer` answers: its update waits for that, and meanwhile generators may
        begin on the next step.
        """
        begun, self._begun = self._begun, None
        if begun and begun[0] != requests[0].prompt.id:
            raise RuntimeError(f"the rollout that was begun with {begun[0]} must come first, got {requests[0].prompt.id}")
        in_flight: deque[tuple[list[Completion], Any, list[Any], list[Any]]] = deque()
        scored: list[Scored] = []
        for chunk in self._micro_batches(begun[1] if begun else self._generators.generate(requests)):
            rewards = self.reward.score.remote([(done.prompt.token_ids, done.token_ids) for done in chunk])
            in_flight.append((chunk, rewards, self._learner.prepare(chunk), self._show(show(chunk))))
            record("queue_rows", DRIVER, sum(len(waiting) for waiting, *_ in in_flight))
            while sum(len(waiting) for waiting, *_ in in_flight) > self._config.buffer:
                chunk, rewards, prepared, shown = in_flight.popleft()
                scored += self._finish(chunk, rewards, [*prepared, *shown])
        for chunk, rewards, prepared, shown in in_flight:
            scored += self._finish(chunk, rewards, shown)
            self._learner.await_before_update(prepared)
        return sorted(scored, key=lambda answer: answer.completion.prompt.id)

    def fill_log(self, requests: Sequence[Request], show: Show) -> int:
        """Generate answers to `requests`, show them to users as they finish, and return how many were shown."""
        waiting: deque[Any] = deque()
        shown = 0
        for chunk in self._micro_batches(self._generators.generate(requests)):
            impressions = show(chunk)
            shown += len(impressions)
            waiting += self._show(impressions)
            if len(waiting) * self._config.micro_batch > self._config.buffer:
                resolve(waiting.popleft(), "log feedback", self._timeout_s)
        resolve(list(waiting), "log feedback", self._timeout_s)
        return shown

    def _micro_batches(self, calls: dict[str, Call]) -> Iterator[list[Completion]]:
        return self._generators.micro_batches(calls, self._refresh)

    def _show(self, impressions: Sequence[Impression]) -> list[Any]:
        """Show `impressions` to the users and log both; returns what to wait for: nothing where there is nothing to show."""
        if not impressions:
            return []
        record("feedback_rows", "log", len(impressions))
        return [self._log.append.remote(impressions, self._users.react_all.remote(impressions))]

    def _finish(self, chunk: Sequence[Completion], rewards: Any, effects: Sequence[Any]) -> list[Scored]:
        logits, version = resolve(rewards, "score", self._timeout_s)
        record("scored_rows", "reward", len(chunk))
        resolve(list(effects), "prepare answers and log feedback", self._timeout_s)
        return [Scored(done, float(logit), version) for done, logit in zip(chunk, logits, strict=True)]
