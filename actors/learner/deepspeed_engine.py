"""DeepSpeed behind one class: the only module that imports it.

forward -> backward(loss, last) ... -> step() -> gradient norm
gathered(weights), whole(weights) -> full values, one at a time, also under ZeRO-3: copies on the CPU, or where they are
save(folder) / load(folder) -> exact state
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from causalrm_ray.config.train import LearnerConfig
from causalrm_ray.models.lora import Weight
from causalrm_ray.models.policy import ActorCritic

TAG = "engine"  # folder of the engine's files inside a checkpoint


def start_process_group(rank: int, world_size: int, init_method: str) -> Any:
    """Join the ranks at `init_method` ("tcp://host:port"), gloo on CPU and NCCL on GPU, and return the deepspeed module.

    DeepSpeed reads its place from the environment, so this process must be the rank's own. A group of the same rank and
    size that this process already joined is kept. Raises RuntimeError if deepspeed is missing or the group differs.
    """
    address = urlparse(init_method)
    if address.scheme != "tcp" or not address.hostname or not address.port:
        raise ValueError(f"init_method must look like tcp://host:port, got {init_method!r}")
    on_gpu = torch.cuda.is_available()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK="0",  # a rank sees one device, its own
        LOCAL_SIZE="1",
        MASTER_ADDR=address.hostname,
        MASTER_PORT=str(address.port),
    )
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
    except ImportError as error:
        raise RuntimeError(
            f"the learner needs deepspeed, which cannot be imported ({error}); pip install 'deepspeed>=0.19.8,<0.20'"
        ) from error
    # Its build takes 25 s, and a killed rank leaks 67 MB of /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo",
        auto_mpi_discovery=False,
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        verbose=False,
    )
    joined = (torch.distributed.get_rank(), torch.distributed.get_world_size())
    if joined != (rank, world_size):
        raise RuntimeError(
            f"this process is already rank {joined[0]} of {joined[1]}; it cannot become rank {rank} of {world_size}"
        )
    return deepspeed


class DeepSpeedEngine:
    """A module under ZeRO 0-3 with torch AdamW, gradients averaged over ranks and clipped to a largest norm as one vector.

    Collective: construction, forward under ZeRO-3, backward, step, gathered, whole, save and load must be called
    by all ranks alike.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict[str, Any]],
        config: LearnerConfig,
        dtype: torch.dtype,
        rank: int,
        world_size: int,
        init_method: str,
    ) -> None:
        self._deepspeed = start_process_group(rank, world_size, init_method)
        self._rank = rank
        self._zero_stage = config.zero_stage
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self._optimizer = optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)  # but for groups with their own
        self._rates = [group["lr"] for group in groups]
        self._engine, *_ = self._deepspeed.initialize(model=module, optimizer=optimizer, config=_settings(config, dtype))
        for state in optimizer.state.values():
            state["step"].zero_()  # bf16 under ZeRO 0 starts with a blank step, which would spoil Adam's bias correction

    @property
    def version(self) -> str:
        return self._deepspeed.__version__

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate the gradient of this rank's `loss` (ranks are averaged); `last` marks the step's last micro-batch."""
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        self._engine.backward(loss)
        if not last:
            self._engine.step()  # counts the micro-batch, updates nothing

    def step(self, rate: float = 1.0) -> float:
        """Update the weights at `rate` times the learning rates of their groups, and return the gradient's norm over all
        parameters and ranks, before clipping."""
        for group, full in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * full
        gradients = [parameter.grad for parameter in self._engine.module.parameters() if parameter.grad is not None]
        before = torch.nn.utils.get_total_norm(gradients) if gradients else None
        self._engine.step()
        reported = self._engine.get_global_grad_norm()
        norm = before if reported is None else reported
        if norm is None:
            raise RuntimeError("DeepSpeed reported no gradient norm and left no gradients to measure")
        return float(norm)

    def gathered(self, parts: Iterable[tuple[str, Weight]]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, value on the CPU, a copy) of each weight; every rank must exhaust the iterator, and only rank 0 gets items."""
        return ((name, value.cpu().clone()) for name, value in self.whole(parts))

    def whole(self, parts: Iterable[tuple[str, Weight]]) -> Iterator[tuple[str, torch.Tensor]]:
        """As `gathered`, but each value where it is, and only until the next is asked for.

        Under ZeRO-3 the parameters of one weight are gathered at a time.
        """
        for name, weight in parts:
            parameters = list(weight.parameters)
            with self._deepspeed.zero.GatheredParameters(parameters) if self._zero_stage == 3 else nullcontext():
                if self._rank == 0:
                    yield name, weight.value()

    def shapes(self, parts: Iterable[tuple[str, Weight]]) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, full shape) of each weight, without gathering it."""
        for name, weight in parts:
            parameter = weight.parameters[0]
            yield name, parameter.dtype, tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 empties what it splits

    def save(self, folder: Path) -> None:
        """Write the exact state (trained weights, moments, counters) under `folder`, a file or more per rank."""
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote. DeepSpeed's files are pickles: the caller must have checked their hashes first."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise FileNotFoundError(f"{folder} holds no DeepSpeed state for this rank and ZeRO stage")


def _settings(config: LearnerConfig, dtype: torch.dtype) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if "offload" in config.save_memory:
        host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero |= {"offload_optimizer": host} | ({"offload_param": host} if config.zero_stage == 3 else {})
    return {
        "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: the learner counts tokens itself
        "gradient_accumulation_steps": 1,  # the boundary is set by hand, for micro-batches vary in number
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own needs a compiler, and does not resume exactly
        "steps_per_print": 2**31,
    }


def parameter_groups(module: ActorCritic, config: LearnerConfig) -> list[dict[str, Any]]:
    """What the optimizer trains: policy and critic with a learning rate each; matrices decay, vectors (biases, norms) do not."""
    groups = []
    for parameters, lr in ((module.policy_parameters(), config.lr), (module.critic_parameters(), config.critic_lr)):
        matrices = [parameter for parameter in parameters if parameter.ndim > 1] if config.weight_decay else parameters
        vectors = [parameter for parameter in parameters if parameter.ndim <= 1] if config.weight_decay else []
        groups.append({"params": matrices, "lr": lr, "weight_decay": config.weight_decay})
        groups.append({"params": vectors, "lr": lr})
    return [group for group in groups if group["params"]]
