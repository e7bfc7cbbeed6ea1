"""vLLM's LLMEngine for the step thread, in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from actors.rollout.engine import MAX_SEQUENCES, EngineSettings
from actors.rollout.step_thread import Phase
from actors.weights.broadcast import BucketLayout, GroupRank
from actors.weights.ipc import SharedWeights
from actors.weights.packing import Weights
from causalrm_ray.checkpoint import cached_folder
from causalrm_ray.models.identity import model_digest
from causalrm_ray.models.kernels import is_part, text_config
from causalrm_ray.models.policy import load_policy
from causalrm_ray.models.size import kv_width
from causalrm_ray.models.text import decode_response, load_tokenizer
from causalrm_ray.types import Completion, Request, Sampling, Span

_MIB = 1 << 20


class VllmCore:
    """LLMEngine, for the step thread."""

    def __init__(self, settings: EngineSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        from vllm import EngineArgs, LLMEngine
        from vllm.config import WeightTransferConfig

        from actors.rollout.vllm_weights import BACKEND, register

        register()
        self._tokenizer, self._loaded = tokenizer, settings.version
        self._llm = LLMEngine.from_engine_args(
            EngineArgs(weight_transfer_config=WeightTransferConfig(backend=BACKEND), **_engine_arguments(settings))
        )
        self._llm.collective_rpc("init_weight_transfer_engine", args=({},))
        self._llm.set_weight_version(str(settings.version))
        if not torch.cuda.is_available():
            _end_lone_groups()

    def add(self, requests: Mapping[str, Request], sampling: Sampling) -> None:
        if not self._llm.has_unfinished_requests():
            # a hit changes the last bits of a prompt's logits: from a cold cache a batch repeats whatever came before it
            self._llm.reset_prefix_cache(reset_running_requests=True)
        for request_id, request in requests.items():
            prompt: Any = {"prompt_token_ids": list(request.prompt.token_ids)}
            self._llm.add_request(request_id, prompt, sampling_params(sampling, request.seed, self._tokenizer.eos_token_id))

    def step(self) -> list[tuple[str, Any]]:
        return [(output.request_id, output) for output in self._llm.step() if output.finished]

    def abort(self, request_ids: Sequence[str]) -> None:
        self._llm.abort_request(list(request_ids))

    def sync_phases(self, update: Weights | BucketLayout | SharedWeights, member: GroupRank | None = None) -> list[Phase]:
        from actors.rollout.vllm_weights import sync_phases  # imports vllm, which only an engine process may

        return sync_phases(self._llm, update, member, update.version == self._loaded)

    def completion(self, request: Request, sampling: Sampling, output: Any) -> Completion:
        answer = output.outputs[0]
        token_ids = tuple(answer.token_ids)
        spans = tuple(Span(int(span.version), span.end - span.start) for span in answer.weight_versions)
        return Completion(
            prompt=request.prompt,
            response=decode_response(self._tokenizer, token_ids, sampling.stop),
            token_ids=token_ids,
            logprobs=tuple(chances[token].logprob for token, chances in zip(token_ids, answer.logprobs, strict=True)),
            stop_reason=answer.finish_reason,
            policy_version=spans[-1].version,
            spans=spans if len(spans) > 1 else (),
        )

    def about(self) -> Mapping[str, str]:
        import vllm

        return {"name": "vllm", "version": vllm.__version__, "device": self._llm.vllm_config.device_config.device_type}

    def shutdown(self) -> None:
        self._llm.engine_core.shutdown()


def raw_engine(settings: EngineSettings) -> tuple[Any, int]:
    """(an LLMEngine with the arguments of ours, the end-of-sequence id), for comparison. The process must have `process_env`."""
    from vllm import EngineArgs, LLMEngine

    return LLMEngine.from_engine_args(EngineArgs(**_engine_arguments(settings))), load_tokenizer(settings.model).eos_token_id


def classifier_scores(model: str, rows: Sequence[Sequence[int]]) -> list[float]:
    """What vLLM's classifier makes of rows of token ids: the logit of each under a saved reward model, for comparison."""
    from vllm import LLM, PoolingParams

    longest = max(len(row) for row in rows)
    arguments = _engine_arguments(EngineSettings(model, longest, "float32", "", 0.0, 0)) | {"max_model_len": longest}
    del arguments["logprobs_mode"]
    llm = LLM(runner="pooling", **arguments)
    prompts: Any = [{"prompt_token_ids": list(row)} for row in rows]
    found = llm.classify(prompts, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
    return [output.outputs.probs[0] for output in found]


def _engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    model, max_length, dtype = _language_model(settings), settings.max_length, settings.dtype
    common = {
        "model": model,
        "dtype": dtype,
        "max_model_len": max_length,
        "trust_remote_code": False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "distributed_executor_backend": "uni",
    }
    if settings.tensor_parallel > 1:
        common |= {
            "tensor_parallel_size": settings.tensor_parallel,
            "distributed_executor_backend": "mp",
            "worker_extension_cls": "actors.rollout.vllm_weights.WorkerExtension",  # registers our transport in each worker
        }
    if torch.cuda.is_available():
        return common | {"gpu_memory_utilization": settings.gpu_memory}
    return common | {
        "enforce_eager": True,
        "block_size": 32,
        "max_num_seqs": MAX_SEQUENCES,
        "kv_cache_memory_bytes": _kv_cache_bytes(model, max_length, dtype),
        "enable_chunked_prefill": False,  # a seeded request crashes the CPU sampler when its prompt is split
        "max_num_batched_tokens": max(4096, max_length),
    }


def _language_model(settings: EngineSettings) -> str:
    """The folder to start from: the model's own, or one in the cache with the language model of one that also sees or hears.

    vLLM would run such a model whole, whose parts for images need libraries that a text needs not, and are not trained here.
    """
    model = settings.model
    if not is_part(model):
        return model

    def fill(folder: Path) -> None:
        load_policy(model, getattr(torch, settings.dtype)).save_pretrained(folder)
        load_tokenizer(model).save_pretrained(folder)

    name = f"{hashlib.sha256(model_digest(model).encode()).hexdigest()[:32]}-{settings.dtype}"
    return str(cached_folder(Path(settings.cache).expanduser().resolve() / "language-models" / name, fill))


def _end_lone_groups() -> None:
    """End vLLM's process groups of one process. It passes nothing through them, but each keeps two gloo threads that wake 100
    times a second, which takes 3 % from a step of two engines on two cores. Another engine cannot start in this process then."""
    from vllm.distributed import parallel_state

    found = (group for group in vars(parallel_state).values() if isinstance(group, parallel_state.GroupCoordinator))
    groups = {id(group): group for group in found}  # some are one under two names
    for group in groups.values():
        if group.world_size == 1:
            group.destroy()


def _kv_cache_bytes(model: str, max_length: int, dtype: str) -> int:
    """Room for a full batch of longest answers, between 64 MiB and 4 GiB."""
    config = text_config(model)
    per_token = config.num_hidden_layers * kv_width(config) * getattr(torch, dtype).itemsize
    return min(max(per_token * max_length * MAX_SEQUENCES, 64 * _MIB), 4096 * _MIB)


def sampling_params(sampling: Sampling, seed: int, eos_token_id: int) -> Any:
    """vLLM's parameters of a request: only a whole answer is of use, so nothing before it is put together."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    texts = [end for end in sampling.stop if isinstance(end, str)]
    return SamplingParams(
        seed=seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_tokens=sampling.max_new_tokens,
        logprobs=0,
        stop=texts,
        stop_token_ids=[eos_token_id, *(end for end in sampling.stop if isinstance(end, int))],
        detokenize=bool(texts),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
