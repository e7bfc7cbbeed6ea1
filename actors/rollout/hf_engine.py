"""transformers alone, under a step thread: no other engine needed."""

from __future__ import annotations

from pathlib import Path

from actors.cluster.environment import compute_env
from actors.rollout.engine import EngineSettings
from actors.rollout.step_thread import StepThreadEngine


class HfEngine(StepThreadEngine):
    """An `Engine` on transformers: on a GPU where torch sees one, else on the CPU."""

    shares_process = True
    process_bytes = int(0.45 * 2**30)

    @staticmethod
    def process_env(model: str, cache: str | Path, gpu: bool) -> dict[str, str]:
        """See Engine."""
        return compute_env(gpu) | ({"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {})

    def __init__(self, settings: EngineSettings) -> None:
        from actors.rollout.hf_core import HfCore
        from causalrm_ray.models.text import load_tokenizer

        tokenizer = load_tokenizer(settings.model)
        super().__init__("hf", lambda: HfCore(settings, tokenizer), settings)
