"""An engine: transformers, as `hf`, but each batch waits for the one before it, so that its memory is that of one batch."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from actors.rollout.engine import CompletionStream
from actors.rollout.hf_engine import HfEngine
from causalrm_ray.types import Completion, Request, Sampling


class PatientHfEngine(HfEngine):
    """HfEngine that serves one batch at a time. Its capabilities are those of its class, whose attributes it inherits."""

    _one_batch = threading.Lock()

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> CompletionStream:
        """Start a batch once the one before it has been read to its end, or closed."""
        self._one_batch.acquire()
        return _Turn(super().submit(requests, sampling), self._one_batch)


class _Turn:
    """A stream of answers that ends its turn once."""

    def __init__(self, answers: CompletionStream, turn: threading.Lock) -> None:
        self._answers, self._turn, self._open = answers, turn, True

    def __iter__(self) -> _Turn:
        return self

    def __next__(self) -> Completion:
        try:
            return next(self._answers)
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        """Give up what is not finished yet."""
        self._answers.close()
        self._end()

    def _end(self) -> None:
        if self._open:
            self._open = False
            self._turn.release()
