"""The generator role: answers requests with the newest weights it was given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from actors.engine import Engine
from actors.engine_vllm import VllmEngine
from actors.weight_sync import SyncReport, Weights
from causalrm_ray.types import Completion, Request, Sampling


class Generator:
    """Generates under one sampling setting. Several threads may call it: `take_weights` works while `generate` streams.

    `model` is a local Hugging Face folder or a hub id; `max_length` the longest prompt plus answer, tokens; `dtype`
    "float32" or "bfloat16"; `cache` the folder for what vLLM works out once; `timeout_s` the longest wait for any one phase;
    `buffer` the number of unread answers that holds generation back; `version` that of the weights in `model`.
    """

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        max_length: int,
        dtype: str,
        cache: str | Path,
        timeout_s: float,
        buffer: int,
        version: int = 0,
    ) -> None:
        self._sampling = sampling
        self._max_length = max_length
        self._engine: Engine = VllmEngine(
            model, max_length=max_length, dtype=dtype, cache=cache, timeout_s=timeout_s, buffer=buffer, version=version
        )

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Submit all requests at once and yield each answer as it finishes (a generator function, as Ray's streaming demands).

        Raises ValueError, before anything is submitted, for an empty prompt or one that leaves no room for the answer.
        """
        for request in requests:
            self._check_fits(request)
        stream = self._engine.submit(requests, self._sampling)
        try:
            yield from (completion for completion in stream)  # a generator throughout: Ray sends into what it streams from
        finally:
            stream.close()

    def take_weights(self, weights: Weights) -> SyncReport:
        """Switch to new weights between two engine steps."""
        return self._engine.load_weights(weights)

    def info(self) -> Mapping[str, str | int]:
        """`name` and `version` of the engine, `policy_version` and `device`."""
        return self._engine.versions()

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()

    def _check_fits(self, request: Request) -> None:
        prompt, answer = request.prompt, self._sampling.max_new_tokens
        if not prompt.token_ids:
            raise ValueError(f"prompt {prompt.id} must hold at least 1 token, got 0")
        if len(prompt.token_ids) + answer > self._max_length:
            raise ValueError(
                f"prompt {prompt.id} and its answer must fit model.max_length = {self._max_length} tokens, "
                f"got {len(prompt.token_ids)} + max_new_tokens {answer}"
            )
