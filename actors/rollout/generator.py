"""The generator role: answers requests with the newest weights it was given."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch

from actors.rollout.engine import Engine, EngineSettings
from actors.weights.broadcast import BucketLayout, GroupRank
from actors.weights.ipc import SharedWeights
from actors.weights.lora_merge import Merger, is_adapter
from actors.weights.packing import SyncReport, Weights
from causalrm_ray.registry import ENGINES
from causalrm_ray.types import Completion, Request, Sampling


class Generator:
    """Generates on an `engine`, by name or import path, with `sampling` where a call gives none.

    Several threads may call it: weights may be taken, received and mapped while `generate` streams.
    """

    def __init__(self, engine: str, settings: EngineSettings, sampling: Sampling) -> None:
        self._sampling = sampling
        self._settings = settings
        self._merger: Merger | None = None
        self._max_length = settings.max_length
        self._engine: Engine = ENGINES.load(engine)(settings)

    def generate(self, requests: Sequence[Request], sampling: Sampling | None = None) -> Iterator[Completion]:
        """Submit all requests at once and yield each answer as it finishes (a generator function, as Ray's streaming demands).

        Raises ValueError, before anything is submitted, for an empty prompt or one that leaves no room for the answer.
        """
        sampling = sampling or self._sampling
        for request in requests:
            self._check_fits(request, sampling.max_new_tokens)
        stream = self._engine.submit(requests, sampling)
        try:
            yield from (completion for completion in stream)  # a generator throughout: Ray sends into what it streams from
        finally:
            stream.close()

    def micro_batches(
        self, requests: Sequence[Request], size: int, sampling: Sampling | None = None
    ) -> Iterator[list[Completion]]:
        """As `generate`, but `size` answers at a time (the last time what is left): each is one object for Ray to pass on."""
        answers = self.generate(requests, sampling)
        while batch := list(itertools.islice(answers, size)):
            yield batch

    def take_weights(self, weights: Weights) -> SyncReport:
        """Switch to new weights between two engine steps: whole ones, or an adapter, which is merged here.

        The report's bytes are those that came.
        """
        if not is_adapter(weights):
            return self._engine.load_weights(weights)
        if self._merger is None:
            self._merger = Merger(self._settings.model, getattr(torch, self._settings.dtype), weights)
        report = self._engine.load_weights(self._merger.merge(weights))
        return dataclasses.replace(report, bytes=weights.num_bytes)

    def receive_weights(self, layout: BucketLayout, member: GroupRank) -> SyncReport:
        """Switch to the weights that the learner is about to broadcast."""
        return self._engine.receive_weights(layout, member)

    def map_weights(self, shared: SharedWeights) -> SyncReport:
        """Switch to weights that a rank on the same device shares."""
        return self._engine.map_weights(shared)

    def info(self) -> Mapping[str, str | int]:
        """`name` and `version` of the engine, `policy_version` and `device`."""
        return self._engine.versions()

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()

    def _check_fits(self, request: Request, answer: int) -> None:
        prompt = request.prompt
        if not prompt.token_ids:
            raise ValueError(f"prompt {prompt.id} must hold at least 1 token, got 0")
        if len(prompt.token_ids) + answer > self._max_length:
            raise ValueError(
                f"prompt {prompt.id} and its answer must fit model.max_length = {self._max_length} tokens, "
                f"got {len(prompt.token_ids)} + max_new_tokens {answer}"
            )
