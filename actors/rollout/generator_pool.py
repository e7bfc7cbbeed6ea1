"""All generators: each answers its share of the requests; one that dies is replaced, and its replacement continues."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from actors.cluster.place import end
from actors.cluster.telemetry import record
from actors.cluster.wait import resolve, resolve_all, stream
from actors.errors import RoleDiedError
from actors.weights.packing import SyncReport
from actors.weights.publish import Publisher
from causalrm_ray.config.train import Config
from causalrm_ray.types import Completion, Request, Sampling


class Call(NamedTuple):
    """What a generator, by its handle, was asked, and the stream of its micro-batches."""

    generator: Any
    requests: Sequence[Request]
    sampling: Sampling | None
    answers: Any


class Generators:
    """Handles on the generators by name, generator-0 and on.

    `start` starts a replacement, by name, for one that died; `on_replacement` gets a message for each. After
    loop.max_failures of them the next RoleDiedError passes.
    """

    def __init__(
        self, config: Config, handles: dict[str, Any], start: Callable[[str], Any], on_replacement: Callable[[str], None]
    ) -> None:
        self._config, self._start, self._on_replacement = config, start, on_replacement
        self._timeout_s = config.cluster.timeout_s
        self._failures = 0
        self.handles = handles

    def info(self) -> list[dict[str, Any]]:
        """What each runs on, once all have started."""
        return resolve([handle.info.remote() for handle in self.handles.values()], "start generators", self._timeout_s)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling | None = None, names: Collection[str] | None = None
    ) -> dict[str, Call]:
        """Ask every generator, or those of these names, for its share."""
        asked = self.handles if names is None else names
        shares = zip(asked, _even_shares(requests, len(asked)), strict=True)
        return {name: self._ask(name, share, sampling) for name, share in shares if share}

    def micro_batches(self, calls: Mapping[str, Call], publisher: Publisher | None) -> Iterator[list[Completion]]:
        """Micro-batches as they come, every request answered once: what a generator that dies had not sent is asked again.

        Another generator takes the newest weights from `publisher` before it serves; without one, it serves those that it
        starts with.
        """
        answered: set[str] = set()
        lost: list[str] = []
        while calls:
            try:
                self._replace(lost)
                if lost and publisher:
                    _check(publisher.publish({name: self.handles[name] for name in lost}))
                calls = self._with_current_generators(calls, answered)
                for name, chunk in stream({name: call.answers for name, call in calls.items()}, "generate", self._timeout_s):
                    record("generated_tokens", name, sum(len(done.token_ids) for done in chunk))
                    answered.update(completion.prompt.id for completion in chunk)
                    yield chunk
                return
            except RoleDiedError as error:
                lost = self._lost(error)

    def _with_current_generators(self, calls: Mapping[str, Call], answered: Collection[str]) -> dict[str, Call]:
        """The same calls, but what a generator that was replaced had not answered is asked of its replacement."""
        current = {}
        for name, call in calls.items():
            left = [request for request in call.requests if request.prompt.id not in answered]
            if call.generator is self.handles[name]:
                current[name] = call
            elif left:
                current[name] = self._ask(name, left, call.sampling)
        return current

    def publish(self, publisher: Publisher) -> dict[str, SyncReport]:
        """Give the same weights to every generator, and each one's report. Raises RuntimeError unless every checksum agrees.

        Where one dies on the way, those that failed with it are replaced too, and all take the weights again.
        """
        lost: list[str] = []
        while True:
            try:
                self._replace(lost)
                return _check(publisher.publish(self.handles))
            except RoleDiedError as error:
                lost = self._lost(error)

    def _ask(self, name: str, requests: Sequence[Request], sampling: Sampling | None) -> Call:
        size, buffer = self._config.rollout.micro_batch, self._config.rollout.buffer
        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": buffer // size}
        generator = self.handles[name]
        answers = generator.micro_batches.options(**options).remote(requests, size, sampling)
        return Call(generator, requests, sampling, answers)

    def _lost(self, error: RoleDiedError) -> list[str]:
        """The generator that died, first, and those that failed with it. Raises the error if another role died, or too many."""
        lost = [name for name in error.roles if name in self.handles]
        if not lost or lost[0] != error.roles[0] or self._failures == self._config.loop.max_failures:
            raise error
        self._failures += 1
        also = f"; {', '.join(lost[1:])} failed with it" if lost[1:] else ""
        number = f"({self._failures} of loop.max_failures)"
        self._on_replacement(f"{lost[0]} died; another one takes its place {number}{also}")
        return lost

    def _replace(self, names: Sequence[str]) -> None:
        """Start another generator of each name."""
        for name in names:
            end(self.handles[name])
            self.handles[name] = self._start(name)
        started = {name: self.handles[name].info.remote() for name in names}
        resolve_all(started, "start again", self._timeout_s)


def _check(reports: dict[str, SyncReport]) -> dict[str, SyncReport]:
    for name, report in reports.items():
        if not report.checksum_ok:
            raise RuntimeError(f"{name}: weights of version {report.version} do not match the learner's checksum")
    return reports


def _even_shares(requests: Sequence[Request], parts: int) -> list[Sequence[Request]]:
    """Contiguous shares: samples of one prompt stay with one generator, whose prefix cache then serves them."""
    bounds = np.linspace(0, len(requests), parts + 1).astype(int)
    return [requests[first:last] for first, last in itertools.pairwise(bounds)]
