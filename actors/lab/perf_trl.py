"""TRL's GRPOTrainer in a process of its own, one step at a time: the other of the end-to-end measurement."""

from __future__ import annotations

import importlib
import importlib.util
import queue
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from actors.lab.perf_baselines import token_reward
from causalrm_ray.errors import InputError

TRL = "1.16."


def check_trl() -> None:
    """Raise InputError, naming what to install, unless the TRL that this was written for is there."""
    found = version("trl") if importlib.util.find_spec("trl") else "none"
    if not found.startswith(TRL):
        raise InputError(f"parts: trl needs trl=={TRL}*, got {found}: pip install 'causalrm-ray[perf]', or leave it out")


class TrlTrainer:
    """GRPO on the CPU in fp32, generation by transformers, one optimizer step a step; no checkpointing of activations."""

    def __init__(
        self, model: str, prompts: Sequence[str], folder: str, *, answers: int, samples: int, tokens: int, threads: int
    ) -> None:
        """`answers` per step, `samples` of them to each prompt, of up to `tokens`."""
        trl: Any = importlib.import_module("trl")
        torch.set_num_threads(threads)
        config = trl.GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            model_init_kwargs={"dtype": "float32"},
            gradient_checkpointing=False,
            per_device_train_batch_size=answers,
            num_generations=samples,
            max_completion_length=tokens,
            beta=0.04,
            loss_type="grpo",
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            max_steps=10**6,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        rows = Dataset.from_list([{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts])
        self._steps = _Steps()
        trainer = trl.GRPOTrainer(model, reward_funcs=_reward, args=config, train_dataset=rows, callbacks=[self._steps])
        threading.Thread(target=self._run, args=(trainer,), daemon=True).start()

    def step(self) -> float:
        """One whole step: generate, reward, learn. Seconds."""
        self._steps.go.release()
        seconds = self._steps.done.get()
        if isinstance(seconds, BaseException):
            raise seconds
        return seconds

    def _run(self, trainer: Any) -> None:
        try:
            trainer.train()
        except BaseException as error:  # noqa: BLE001 - this thread has no caller: `step` raises the error
            self._steps.done.put(error)


class _Steps(TrainerCallback):
    """Holds the trainer before each step until `go` is released, and times the step."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.done: queue.SimpleQueue[float | BaseException] = queue.SimpleQueue()
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.go.acquire()
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.done.put(time.perf_counter() - self._began)


def _reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    return [token_reward(row) for row in completion_ids]
