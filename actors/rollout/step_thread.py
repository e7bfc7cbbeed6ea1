"""One thread owns an engine, everyone else posts commands to it: what the engines share.

    caller --submit/load_weights--> commands --> step thread: run all commands, then one engine step, again and again
    caller <------ stream.__next__ ------------- finished answers

The step thread consumes commands, produces finished answers, and waits while there is nothing to do or while some caller
leaves `buffer` answers unread; a new command, an answer taken or a stream closed unblocks it. At most `buffer` plus one
step's answers wait in a stream. A batch is added between two steps, so one caller at a time sees bit-identical answers.
An error in the step thread marks the engine dead and is raised to every caller that waits or comes later.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from actors.errors import EngineDeadError, StrandedError, WrongWeightsError
from actors.rollout.engine import Engine, EngineSettings
from causalrm_ray.types import Completion, Request, Sampling

if TYPE_CHECKING:  # an engine's class is read where torch is not loaded
    from actors.weights.broadcast import BucketLayout, GroupRank
    from actors.weights.ipc import SharedWeights
    from actors.weights.packing import SyncReport, Weights

    Update = Weights | BucketLayout | SharedWeights  # one policy version: here, on its way, or in another process's memory
Phase = tuple[str, Callable[[], object]]


class Core(Protocol):
    """An engine that one thread owns; `sync_phases`, `completion` and `about` may be called by any."""

    def add(self, requests: Mapping[str, Request], sampling: Sampling) -> None:
        """Add requests by id; the next step sees all of them."""
        ...

    def step(self) -> list[tuple[str, Any]]:
        """One token for every running request; (id, output) of those that finished with it."""
        ...

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop these requests."""
        ...

    def sync_phases(self, update: Update, member: GroupRank | None = None) -> list[Phase]:
        """The steps of a weight sync, named and in order; a layout's buckets are broadcast to its first worker, `member`.

        Raises ValueError, with nothing changed, if it cannot succeed.
        """
        ...

    def completion(self, request: Request, sampling: Sampling, output: Any) -> Completion:
        """The answer in an `output` of `step`."""
        ...

    def about(self) -> Mapping[str, str]:
        """`name` and `version` of the engine, and its `device`."""
        ...

    def shutdown(self) -> None:
        """Free what the engine holds."""
        ...


class StepThreadEngine(Engine):
    """An `Engine` around a `Core` that is built, stepped and shut down in a thread of its own.

    `label` is how errors call it. `settings.timeout_s` bounds each wait: start, next answer, each phase of a weight sync.
    """

    def __init__(self, label: str, build: Callable[[], Core], settings: EngineSettings) -> None:
        self._label = label
        self._timeout_s, self._buffer, self._version = settings.timeout_s, settings.buffer, settings.version
        self._wake = threading.Condition()  # guards everything below
        self._commands: deque[Callable[[], object]] = deque()
        self._streams: dict[str, _Stream] = {}  # request id -> who waits for it
        self._failure: BaseException | None = None
        self._refused = False  # it is dead by the weights that it was given
        self._batches = itertools.count()
        self._core: Any = None
        self._thread = threading.Thread(target=self._run, args=(build,), name=f"{label}-step", daemon=True)
        self._thread.start()
        self._wait("start", lambda: self._core is not None)

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> _Stream:
        """Start a batch as a whole and stream its answers as they finish."""
        batch = next(self._batches)
        by_id = {f"{batch}-{row}": request for row, request in enumerate(requests)}
        stream = _Stream(self, by_id, sampling)
        with self._wake:
            self._check_alive()
            self._commands.append(lambda: self._add(stream))
            self._wake.notify_all()
        return stream

    def load_weights(self, weights: Weights) -> SyncReport:
        """Verify, load between two steps, verify again. Requests in flight go on with the new weights.

        A corrupt bucket raises ValueError and leaves the engine as it was; a fault after loading began leaves it dead.
        """
        from actors.weights.packing import verify

        verify(weights)
        return self._switch(weights, self._core.sync_phases(weights), "object")

    def receive_weights(self, layout: BucketLayout, member: GroupRank) -> SyncReport:
        """Receive, load and verify between two steps. Requests in flight go on with the new weights. Any fault leaves it dead."""
        return self._switch(layout, self._core.sync_phases(layout, member), "broadcast")

    def map_weights(self, shared: SharedWeights) -> SyncReport:
        """Map, load and verify between two steps. Requests in flight go on with the new weights. Any fault leaves it dead."""
        return self._switch(shared, self._core.sync_phases(shared), "ipc")

    def versions(self) -> Mapping[str, str | int]:
        """Engine name and version, version of the weights, device. Raises EngineDeadError."""
        self._check_alive()
        return {**self._core.about(), "policy_version": self._version}

    def close(self) -> None:
        """End the step thread. Callers that still wait get EngineDeadError."""
        with self._wake:
            self._failure = self._failure or EngineDeadError("the engine was closed")
            self._wake.notify_all()
        self._thread.join(self._timeout_s)

    def _switch(self, update: Update, phases: Sequence[Phase], transport: str) -> SyncReport:
        from actors.weights.packing import SyncReport

        began = time.perf_counter()
        done: dict[str, float] = {}
        phases = [("wait", lambda: None), *phases]
        with self._wake:
            self._check_alive()
            self._commands.append(lambda: self._sync(update.version, phases, began, done))
            self._wake.notify_all()
        for phase, _ in phases:
            self._wait(f"weight sync, {phase}", lambda phase=phase: phase in done)
        return SyncReport(update.version, update.num_bytes, time.perf_counter() - began, True, done, transport)

    # ---- called with or without the lock by any thread

    def _check_alive(self) -> None:
        if self._failure is not None:
            kind = StrandedError if isinstance(self._failure, ConnectionError) else EngineDeadError
            kind = WrongWeightsError if self._refused else kind
            raise kind(f"the {self._label} engine is dead: {self._failure!r}") from self._failure

    def _wait(self, phase: str, ready: Callable[[], object]) -> None:
        with self._wake:
            in_time = self._wake.wait_for(lambda: self._failure is not None or ready(), self._timeout_s)
            if ready():
                return
            self._check_alive()
            if not in_time:
                error = TimeoutError(f"{self._label} phase '{phase}' must end within timeout_s={self._timeout_s} s, and did not")
                self._failure = error  # the step thread hangs: nobody else should wait for it
                self._wake.notify_all()
                raise error

    # ---- the step thread

    def _run(self, build: Callable[[], Core]) -> None:
        try:
            core = build()
            with self._wake:
                self._core = core
                self._wake.notify_all()
            while self._turn():
                pass
            core.shutdown()
        except BaseException as error:  # noqa: BLE001 - this thread has no caller: the error goes to all who wait on it
            with self._wake:
                self._failure = error
                self._wake.notify_all()

    def _turn(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._failure is not None or self._commands or self._may_step())
            if self._failure is not None:
                return False
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        with self._wake:
            if not self._may_step():
                return True
        outputs = self._core.step()
        with self._wake:
            for request_id, output in outputs:
                stream = self._streams.pop(request_id, None)
                if stream is not None:
                    stream.finished.append((request_id, output))
            if outputs:
                self._wake.notify_all()
        return True

    def _may_step(self) -> bool:
        if not self._streams:
            return False
        return all(len(stream.finished) < self._buffer for stream in set(self._streams.values()))

    def _add(self, stream: _Stream) -> None:
        if stream.closed:
            return
        self._core.add(stream.requests, stream.sampling)
        with self._wake:
            self._streams.update(dict.fromkeys(stream.requests, stream))

    def _abort(self, stream: _Stream) -> None:
        with self._wake:
            unfinished = [request_id for request_id in stream.requests if self._streams.pop(request_id, None) is not None]
        self._core.abort(unfinished)

    def _sync(self, version: int, phases: Sequence[Phase], began: float, done: dict[str, float]) -> None:
        import torch

        for phase, act in phases:
            try:
                act()
            except (torch.OutOfMemoryError, TimeoutError, ConnectionError):
                raise
            except Exception:
                self._refused = True  # another engine would fail of the same weights
                raise
            with self._wake:
                ended = time.perf_counter()
                done[phase], began = ended - began, ended
                if phase == phases[-1][0]:
                    self._version = version
                self._wake.notify_all()


class _Stream:
    """The answers to one batch, each as it finishes. One thread reads it."""

    def __init__(self, engine: StepThreadEngine, requests: Mapping[str, Request], sampling: Sampling) -> None:
        self._engine = engine
        self.requests = requests
        self.sampling = sampling
        self.finished: deque[tuple[str, Any]] = deque()
        self.closed = False
        self._unread = len(requests)

    def __iter__(self) -> _Stream:
        return self

    def __next__(self) -> Completion:
        engine = self._engine
        if self._unread == 0 or self.closed:
            raise StopIteration
        engine._wait("generate", lambda: self.finished)
        with engine._wake:
            request_id, output = self.finished.popleft()
            self._unread -= 1
            engine._wake.notify_all()
        return engine._core.completion(self.requests[request_id], self.sampling, output)

    def close(self) -> None:
        """Abort what is not finished yet."""
        engine = self._engine
        with engine._wake:
            if self.closed or self._unread == 0 or engine._failure is not None:
                return
            self.closed = True
            self.finished.clear()
            engine._commands.append(lambda: engine._abort(self))
            engine._wake.notify_all()
