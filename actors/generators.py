"""All generators: each works off its share of the requests; for one that dies another takes its place, and goes on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from actors.placement import RoleDiedError, resolve, stream
from actors.telemetry import record
from actors.weight_sync import SyncReport
from causalrm_ray.config import Config
from causalrm_ray.types import Completion, Request, Sampling


class Call(NamedTuple):
    """What a generator was asked, and the stream of its micro-batches."""

    requests: Sequence[Request]
    sampling: Sampling | None
    answers: Any


class Generators:
    """Handles on the generators by name, generator-0 and on.

    `start` starts the one of a name; `tell` hears of each replacement, of which there may be loop.max_failures: then the
    RoleDiedError of the next one passes.
    """

    def __init__(self, config: Config, start: Callable[[str], Any], tell: Callable[[str], None]) -> None:
        self._config, self._start, self._tell = config, start, tell
        self._timeout_s = config.cluster.timeout_s
        self._failures = 0
        self.handles = {f"generator-{number}": start(f"generator-{number}") for number in range(config.rollout.generators)}

    def info(self) -> list[dict[str, Any]]:
        """What each runs on, once all have started."""
        return resolve([handle.info.remote() for handle in self.handles.values()], "start generators", self._timeout_s)

    def generate(self, requests: Sequence[Request], sampling: Sampling | None = None) -> dict[str, Call]:
        """Set every generator to its share."""
        shares = zip(self.handles, _even_shares(requests, len(self.handles)), strict=True)
        return {name: self._ask(name, share, sampling) for name, share in shares if share}

    def micro_batches(self, calls: dict[str, Call], weights: Callable[[], Any] | None) -> Iterator[list[Completion]]:
        """Micro-batches as they come, every request answered once: what a generator that dies had not sent is asked again.

        `weights` gives the newest ones, which another generator takes before it serves; none: those that it starts with.
        """
        answered: set[str] = set()
        while calls:
            try:
                for name, chunk in stream({name: call.answers for name, call in calls.items()}, "generate", self._timeout_s):
                    record("generated_tokens", name, sum(len(done.token_ids) for done in chunk))
                    answered.update(completion.prompt.id for completion in chunk)
                    yield chunk
                return
            except RoleDiedError as error:
                if error.role not in calls:
                    raise
                lost = calls.pop(error.role)
                self._replace(error.role, error)
                if weights:
                    self.take_weights(error.role, weights)
                left = [request for request in lost.requests if request.prompt.id not in answered]
                if left:
                    calls[error.role] = self._ask(error.role, left, lost.sampling)

    def publish(self, weights: Callable[[], Any]) -> list[SyncReport]:
        """Give the same weights to every generator. Raises RuntimeError unless every checksum agrees."""
        same = weights()
        calls = {name: handle.take_weights.remote(same) for name, handle in self.handles.items()}
        reports = []
        for name, call in calls.items():
            try:
                reports.append(self._report(name, call))
            except RoleDiedError as error:
                self._replace(name, error)
                reports.append(self.take_weights(name, weights))
        return reports

    def take_weights(self, name: str, weights: Callable[[], Any]) -> SyncReport:
        """Give weights to one generator."""
        return self._report(name, self.handles[name].take_weights.remote(weights()))

    def _report(self, name: str, call: Any) -> SyncReport:
        report: SyncReport = resolve(call, f"sync weights ({name})", self._timeout_s)
        if not report.checksum_ok:
            raise RuntimeError(f"{name}: weights of version {report.version} do not match the learner's checksum")
        return report

    def _ask(self, name: str, requests: Sequence[Request], sampling: Sampling | None) -> Call:
        size, buffer = self._config.rollout.micro_batch, self._config.rollout.buffer
        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": buffer // size}
        answers = self.handles[name].micro_batches.options(**options).remote(requests, size, sampling)
        return Call(requests, sampling, answers)

    def _replace(self, name: str, error: RoleDiedError) -> None:
        self._failures += 1
        if self._failures > self._config.loop.max_failures:
            raise error
        self._tell(f"{name} died; another one takes its place ({self._failures} of loop.max_failures)")
        self.handles[name] = self._start(name)
        resolve(self.handles[name].info.remote(), f"start {name} again", self._timeout_s)


def _even_shares(requests: Sequence[Request], parts: int) -> list[Sequence[Request]]:
    """Contiguous shares: samples of one prompt stay with one generator, whose prefix cache then serves them."""
    bounds = np.linspace(0, len(requests), parts + 1).astype(int)
    return [requests[first:last] for first, last in itertools.pairwise(bounds)]
