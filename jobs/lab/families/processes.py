"""A call in a process of its own: an engine that crashes ends its own process, and its memory goes with it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from causalrm_ray.registry import ENGINES

R = TypeVar("R")


def prepare(engine: str, folder: str, cache: str) -> None:
    """Set what the processes of `engine` must start with, once for all: they start from one that has imported vLLM already,
    which takes longer than a tiny model does."""
    os.environ.update(ENGINES.load(engine).process_env(folder, cache, gpu=False))
    if engine == "vllm":
        multiprocessing.set_forkserver_preload(["actors.rollout.vllm_core", "actors.rollout.vllm_weights"])


def alone(call: Callable[..., R], *arguments: Any) -> R:
    """What `call` returns, or the error that it raises. Raises BrokenProcessPool where its process died."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        return pool.submit(call, *arguments).result()
