"""Our transports as a backend of vLLM's weight-transfer interface: tensors come as an object, mapped, or in broadcast buckets.

    start_weight_update   layers go back to the form they are loaded in
    update_weights        the model's own load_weights fuses and pads; each layer is summed before its kernel packs it
    finish_weight_update  layers are put back, the output head is packed again, and the sum is compared with the sender's

Imports vllm at the top: only an engine process may import this module. The interface changes between vLLM versions
(0.27-0.29, 0.32), so all use of it is here.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm import LLMEngine
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size, get_tp_group
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.utils.nccl import unpinned_nccl_env

from actors.weights.broadcast import BroadcastGroup, BucketLayout, GroupRank, join_group, receive
from actors.weights.checkpoint_names import as_in_checkpoints
from actors.weights.ipc import SharedWeights, attach
from actors.weights.packing import Weights, checksum, unpack

BACKEND = "causalrm_ray"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Which rank this engine's first worker has in the group that a broadcast needs; an object needs none."""

    member: GroupRank | None = None


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One whole policy version, handles on one, or the layout of one that is about to be broadcast."""

    update: Weights | BucketLayout | SharedWeights


class TransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads one policy version into a vLLM model and proves that it arrived."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    _group: BroadcastGroup | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Join the group, if one is named, and give transformers its classes back.

        Raises ValueError for a model that keeps key-value heads twice, which no sum could tell, and LostPeerError where not all
        members come.
        """
        for layer in self.model.modules():
            if isinstance(layer, QKVParallelLinear) and layer.num_kv_head_replicas > 1:
                raise ValueError(
                    f"rollout.tensor_parallel must be at most the model's {layer.total_num_kv_heads} key-value heads"
                )
        _give_back_classes()
        if init_info.member is not None:
            member = replace(init_info.member, rank=init_info.member.rank + get_tensor_model_parallel_rank())
            with unpinned_nccl_env():  # the learner does not set the variables that vLLM sets for its own groups
                self._group = join_group(self._group, member, self.device)

    def start_weight_update(self) -> None:
        """Put the layers back into the form they are loaded in, and watch what each of them gets."""
        with self._group.close_on_error() if self._group else contextlib.nullcontext():
            initialize_layerwise_reload(self.model)
            self._received: dict[nn.Module, int] = {}
            self._version, self._expected = 0, 0
            for _, method in self._packed_layers():
                self._sum_before_packing(method)

    def update_weights(self, update_info: dict) -> None:
        """Load one version. Overrides the base class, whose accelerator synchronisation fails without an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load what came, or each bucket as it comes. Raises LostPeerError if the sender is lost."""
        update = update_info.update
        self._version = update.version
        if isinstance(update, Weights):
            self._load(unpack(update))
            self._expected = update.checksum
        elif isinstance(update, SharedWeights):
            self._load(attach(update))
            self._expected = update.checksum
        else:
            assert self._group is not None, "the phase before this one joins"
            self._expected = receive(self._group, update, self._load)

    def finish_weight_update(self) -> None:
        """Put the layers back, pack the output head again, and compare sums.

        Raises ValueError on a difference: weights were lost, or the model transforms them as it loads, and then nothing
        can be said about them.
        """
        finalize_layerwise_reload(self.model, self.model_config)
        for layer, method in self._packed_layers():
            vars(method).pop("process_weights_after_loading", None)
            if self.device.type == "cpu" and isinstance(layer, ParallelLMHead):
                # a head tied to the embedding is not loaded by itself, so its packed copy would stay the old one
                method.process_weights_after_loading(layer)
        found = _sum_over_ranks(sum(self._received.values()) + checksum(self._unpacked_parameters()))
        self._received = {}
        if found != self._expected:
            expected = f"{self._expected:#018x} for version {self._version}"
            raise ValueError(f"vLLM's parameters must sum to the sender's {expected}, got {found:#018x}")

    def shutdown(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.close()

    def _load(self, named_tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        model: Any = self.model
        model.load_weights(as_in_checkpoints(self.model_config.model, self._of_own_dtype(named_tensors)))

    def _of_own_dtype(self, named_tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in named_tensors:
            if tensor.dtype != self.model_config.dtype:  # a cast would make the sums incomparable
                raise ValueError(f"dtype of {name} must be the engine's {self.model_config.dtype}, got {tensor.dtype}")
            yield name, tensor

    def _packed_layers(self) -> Iterator[tuple[nn.Module, QuantizeMethodBase]]:
        for layer in self.model.modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, QuantizeMethodBase):
                yield layer, method

    def _sum_before_packing(self, method: QuantizeMethodBase) -> None:
        # CPU kernels keep a packed copy and empty the parameter, so the sum is taken on what they are about to pack
        pack_layer = method.process_weights_after_loading

        def sum_and_pack(layer: nn.Module) -> None:
            self._received[layer] = checksum(_own_parameters(layer))
            if self.device.type == "cpu" and isinstance(method, FusedMoEMethodBase):
                method.moe_kernel = None  # vLLM packs experts when it makes a kernel only
            pack_layer(layer)

        vars(method)["process_weights_after_loading"] = sum_and_pack

    def _unpacked_parameters(self) -> Iterator[torch.Tensor]:
        seen = {id(parameter) for layer in self._received for parameter in layer.parameters(recurse=False)}
        for layer in self.model.modules():
            for parameter in _own_parameters(layer):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter


def _give_back_classes() -> None:
    """Let this process build transformers' models as it could before: vLLM serves those that it has no code of its own for
    (GPT-NeoX) in transformers' classes, into which it puts an `__init__` that works only while vLLM builds one."""
    for kind in TorchCompileWithNoGuardsWrapper.__subclasses__():
        replaced = inspect.getclosurevars(kind.__init__).nonlocals
        if "old_init" in replaced and not kind.__module__.startswith("vllm."):
            kind.__init__ = replaced["old_init"]


def _own_parameters(layer: nn.Module) -> Iterator[torch.Tensor]:
    """The parameters of a layer that this rank counts: its shards, and on rank 0 what every rank holds whole."""
    first = get_tensor_model_parallel_rank() == 0
    sharded = isinstance(layer, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding)
    for name, parameter in layer.named_parameters(recurse=False):
        if first or (sharded and not (name == "bias" and isinstance(layer, RowParallelLinear))):
            yield parameter


def _sum_over_ranks(own: int) -> int:
    """The sum of all tensor-parallel ranks' checksums, modulo 2^64."""
    if get_tensor_model_parallel_world_size() == 1:
        return own % (1 << 64)
    total = torch.tensor(np.uint64(own % (1 << 64)).view(np.int64))  # signed addition wraps the same way
    torch.distributed.all_reduce(total, group=get_tp_group().cpu_group)
    return int(total) % (1 << 64)


class WorkerExtension:
    """Importing it in a worker process of vLLM registers our transport there; it adds no methods."""


def register() -> None:
    """Make `WeightTransferConfig(backend=BACKEND)` known to vLLM, once per process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, TransferEngine)


def sync_phases(
    engine: LLMEngine, update: Weights | BucketLayout | SharedWeights, member: GroupRank | None
) -> list[tuple[str, Callable[[], object]]]:
    """The steps of one weight sync, in order; a group that it is a `member` of is joined first.

    The prefix cache belongs to the old weights, so requests in flight redo theirs.
    """
    rpc = engine.collective_rpc
    join = ("join", lambda: rpc("init_weight_transfer_engine", args=({"member": member},)))
    return [
        *([join] if member else []),
        ("start", lambda: rpc("start_weight_update")),
        ("receive", lambda: rpc("update_weights", args=({"update": update},))),
        ("finish", lambda: rpc("finish_weight_update")),
        ("reset_prefix_cache", lambda: engine.reset_prefix_cache(reset_running_requests=True)),
        ("set_version", lambda: engine.set_weight_version(str(update.version))),
    ]


register()
