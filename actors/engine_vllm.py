"""vLLM in this process: one thread owns the engine, everyone else posts commands to it.

    caller --submit/load_weights--> commands --> step thread: run all commands, then one engine step, again and again
    caller <------ stream.__next__ ------------- finished answers

The step thread consumes commands, produces finished answers, and waits while there is nothing to do or while some caller
leaves `buffer` answers unread; a new command, an answer taken or a stream closed unblocks it. At most `buffer` plus one
step's answers wait in a stream. A batch is added between two steps, so one caller at a time sees bit-identical answers.
An error in the step thread marks the engine dead and is raised to every caller that waits or comes later.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from actors.engine import EngineDeadError
from actors.weight_sync import SyncReport, Weights, verify
from causalrm_ray.models.text import decode_response, load_tokenizer
from causalrm_ray.types import Completion, Request, Sampling

# Set these before the engine's process starts (a Ray runtime environment), at the latest before it imports vllm.
ENGINE_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process: lighter, and weights pass as plain objects
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # it warns at each weight sync of layers that have no weights
    "TOKENIZERS_PARALLELISM": "false",
}
CPU_ENV = {
    "TORCH_COMPILE_DISABLE": "1",
    "OMP_NUM_THREADS": "1",  # more threads than idle cores are 15 times slower
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

Phase = tuple[str, Callable[[], object]]

_MIB = 1 << 20
_CPU_NUM_SEQS = 128


def engine_env(model: str, cache: str | Path, gpu: bool = False) -> dict[str, str]:
    """Environment variables of an engine process. `cache` keeps what vLLM works out once per architecture."""
    root = Path(cache).expanduser().resolve() / "vllm"
    offline = {"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {}
    return ENGINE_ENV | ({} if gpu else CPU_ENV) | offline | {"VLLM_CACHE_ROOT": str(root)}


class VllmEngine:
    """An `Engine` on vLLM's LLMEngine. `timeout_s` bounds each wait: start, next answer, each phase of a weight sync."""

    def __init__(
        self, model: str, *, max_length: int, dtype: str, cache: str | Path, timeout_s: float, buffer: int, version: int = 0
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ModuleNotFoundError("vllm is not installed: pip install 'causalrm-ray[cpu]', or [gpu] on a GPU machine")
        os.environ.update(engine_env(model, cache, gpu=torch.cuda.is_available()))
        self._tokenizer = load_tokenizer(model)
        self._timeout_s = timeout_s
        self._buffer = buffer
        self._version = version
        self._wake = threading.Condition()  # guards everything below
        self._commands: deque[Callable[[], object]] = deque()
        self._streams: dict[str, _Stream] = {}  # request id -> who waits for it
        self._failure: BaseException | None = None
        self._batches = itertools.count()
        self._llm: Any = None
        arguments = _engine_arguments(model, max_length, dtype)
        self._thread = threading.Thread(target=self._run, args=(arguments,), name="vllm-step", daemon=True)
        self._thread.start()
        self._wait("start", lambda: self._llm is not None)

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> _Stream:
        """Start a batch as a whole and stream its answers as they finish."""
        batch = next(self._batches)
        by_id = {f"{batch}-{row}": request for row, request in enumerate(requests)}
        stream = _Stream(self, by_id)
        with self._wake:
            self._check_alive()
            self._commands.append(lambda: self._add(stream, sampling))
            self._wake.notify_all()
        return stream

    def load_weights(self, weights: Weights) -> SyncReport:
        """Verify, load between two steps, verify again. Requests in flight go on with the new weights.

        A corrupt bucket raises ValueError and leaves the engine as it was; a fault after loading began leaves it dead.
        """
        verify(weights)
        began = time.perf_counter()
        done: dict[str, float] = {}
        from actors.vllm_weights import sync_phases  # imports vllm, which only an engine process may

        phases: list[Phase] = [("wait", lambda: None), *sync_phases(self._llm, weights)]
        with self._wake:
            self._check_alive()
            self._commands.append(lambda: self._sync(weights.version, phases, began, done))
            self._wake.notify_all()
        for phase, _ in phases:
            self._wait(f"weight sync, {phase}", lambda phase=phase: phase in done)
        return SyncReport(weights.version, weights.num_bytes, time.perf_counter() - began, True, done)

    def versions(self) -> Mapping[str, str | int]:
        """Engine name and version, version of the weights, device."""
        import vllm

        device = self._llm.vllm_config.device_config.device_type
        return {"name": "vllm", "version": vllm.__version__, "policy_version": self._version, "device": device}

    def close(self) -> None:
        """End the step thread. Callers that still wait get EngineDeadError."""
        with self._wake:
            self._failure = self._failure or EngineDeadError("the engine was closed")
            self._wake.notify_all()
        self._thread.join(self._timeout_s)

    # ---- called with or without the lock by any thread

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(f"the vLLM engine is dead: {self._failure!r}") from self._failure

    def _wait(self, phase: str, ready: Callable[[], object]) -> None:
        with self._wake:
            in_time = self._wake.wait_for(lambda: self._failure is not None or ready(), self._timeout_s)
            if ready():
                return
            self._check_alive()
            if not in_time:
                error = TimeoutError(f"vLLM phase '{phase}' must end within timeout_s={self._timeout_s} s, and did not")
                self._failure = error  # the step thread hangs: nobody else should wait for it
                self._wake.notify_all()
                raise error

    # ---- the step thread

    def _run(self, arguments: dict[str, Any]) -> None:
        try:
            llm = _build(arguments, self._version)
            with self._wake:
                self._llm = llm
                self._wake.notify_all()
            while self._turn():
                pass
            llm.engine_core.shutdown()
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
        outputs = [output for output in self._llm.step() if output.finished]
        with self._wake:
            for output in outputs:
                stream = self._streams.pop(output.request_id, None)
                if stream is not None:
                    stream.finished.append(output)
            if outputs:
                self._wake.notify_all()
        return True

    def _may_step(self) -> bool:
        if not self._streams:
            return False
        return all(len(stream.finished) < self._buffer for stream in set(self._streams.values()))

    def _add(self, stream: _Stream, sampling: Sampling) -> None:
        if stream.closed:
            return
        if not self._streams:
            # a hit changes the last bits of a prompt's logits: from a cold cache a batch repeats whatever came before it
            self._llm.reset_prefix_cache(reset_running_requests=True)
        for request_id, request in stream.requests.items():
            prompt = {"prompt_token_ids": list(request.prompt.token_ids)}
            self._llm.add_request(request_id, prompt, _sampling_params(sampling, request.seed, self._tokenizer.eos_token_id))
        with self._wake:
            self._streams.update(dict.fromkeys(stream.requests, stream))

    def _abort(self, stream: _Stream) -> None:
        with self._wake:
            unfinished = [request_id for request_id in stream.requests if self._streams.pop(request_id, None) is not None]
        self._llm.abort_request(unfinished)

    def _sync(self, version: int, phases: Sequence[Phase], began: float, done: dict[str, float]) -> None:
        for phase, act in phases:
            act()
            with self._wake:
                ended = time.perf_counter()
                done[phase], began = ended - began, ended
                if phase == phases[-1][0]:
                    self._version = version
                self._wake.notify_all()


class _Stream:
    """The answers to one batch, each as it finishes. One thread reads it."""

    def __init__(self, engine: VllmEngine, requests: Mapping[str, Request]) -> None:
        self._engine = engine
        self.requests = requests
        self.finished: deque[Any] = deque()
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
            output = self.finished.popleft()
            self._unread -= 1
            engine._wake.notify_all()
        return _completion(self.requests[output.request_id], output.outputs[0], engine._tokenizer)

    def close(self) -> None:
        """Give up what is not finished yet."""
        engine = self._engine
        with engine._wake:
            if self.closed or self._unread == 0 or engine._failure is not None:
                return
            self.closed = True
            self.finished.clear()
            engine._commands.append(lambda: engine._abort(self))
            engine._wake.notify_all()


def _build(arguments: dict[str, Any], version: int) -> Any:
    from vllm import EngineArgs, LLMEngine
    from vllm.config import WeightTransferConfig

    from actors.vllm_weights import BACKEND, register

    register()
    llm = LLMEngine.from_engine_args(EngineArgs(weight_transfer_config=WeightTransferConfig(backend=BACKEND), **arguments))
    llm.collective_rpc("init_weight_transfer_engine", args=({},))
    llm.set_weight_version(str(version))
    return llm


def _engine_arguments(model: str, max_length: int, dtype: str) -> dict[str, Any]:
    common = {
        "model": model,
        "dtype": dtype,
        "max_model_len": max_length,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "distributed_executor_backend": "uni",
    }
    if torch.cuda.is_available():
        return common
    return common | {
        "enforce_eager": True,
        "block_size": 32,
        "max_num_seqs": _CPU_NUM_SEQS,
        "kv_cache_memory_bytes": _kv_cache_bytes(model, max_length, dtype),
        "enable_chunked_prefill": False,  # a seeded request crashes the CPU sampler when its prompt is split
        "max_num_batched_tokens": max(4096, max_length),
    }


def _kv_cache_bytes(model: str, max_length: int, dtype: str) -> int:
    """Room for a full batch of longest answers, between 64 MiB and 4 GiB."""
    config = AutoConfig.from_pretrained(model).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * head_dim * getattr(torch, dtype).itemsize
    return min(max(per_token * max_length * _CPU_NUM_SEQS, 64 * _MIB), 4096 * _MIB)


def _sampling_params(sampling: Sampling, seed: int, eos_token_id: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        seed=seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_new_tokens,
        logprobs=0,
        stop_token_ids=[eos_token_id],
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _completion(request: Request, output: Any, tokenizer: Any) -> Completion:
    token_ids = tuple(output.token_ids)
    return Completion(
        prompt=request.prompt,
        response=decode_response(tokenizer, token_ids),
        token_ids=token_ids,
        logprobs=tuple(chances[token].logprob for token, chances in zip(token_ids, output.logprobs, strict=True)),
        stop_reason=output.finish_reason,
        policy_version=int(output.weight_versions[-1].version),
    )
