"""What leaves the learner: the policy's weights for engines, and its folder for everyone else.

weights, adapter   packed on the CPU of rank 0          save_policy   a Hugging Face folder
send_weights       broadcast to a group, by buckets     share_weights handles for an engine on the same device
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from actors.learner.deepspeed_engine import DeepSpeedEngine
from actors.weights.broadcast import BroadcastGroup, BucketLayout, GroupRank, join_group, make_layout, send
from actors.weights.ipc import Known, SharedWeights, share
from actors.weights.packing import Weights, pack
from causalrm_ray.models.lora import Weight, adapter_of, save_adapter, weights_of
from causalrm_ray.models.text import load_tokenizer


class PolicyExport:
    """What a rank exports. All methods but `bucket_layout` and `share_weights` are collective: ZeRO-3 gathers weights."""

    version = 0  # of the weights: optimizer updates of whole policy steps

    def __init__(self, model: str, base: PreTrainedModel, policy: Any, lora: int, engine: DeepSpeedEngine, rank: int) -> None:
        """`policy` is `base`, which was loaded from `model`, or with LoRA `base` with an adapter."""
        self._model, self._base, self._policy, self._lora = model, base, policy, lora
        self._engine, self._rank = engine, rank
        self._group: BroadcastGroup | None = None
        self._shared: Known = {}

    def weights(self) -> Weights | None:
        """The policy's full weights, an adapter merged in, under their Hugging Face names on rank 0, None elsewhere."""
        return self._packed(weights_of(self._base, self._policy))

    def adapter(self) -> Weights | None:
        """The adapter's tensors alone, under the names of peft's files, on rank 0, None elsewhere. ValueError without LoRA."""
        if not self._lora:
            raise ValueError(f"learner.lora must be at least 1 for an adapter, got {self._lora}")
        return self._packed(adapter_of(self._policy))

    def bucket_layout(self, bucket_bytes: int) -> BucketLayout:
        """What `send_weights` will send, in buckets of that size."""
        return make_layout(self.version, self._engine.shapes(weights_of(self._base, self._policy)), bucket_bytes)

    def send_weights(self, layout: BucketLayout, member: GroupRank) -> None:
        """Broadcast `weights` from rank 0 as a member of a group, bucket by bucket, to whoever receives `layout` meanwhile."""
        whole = self._engine.whole(weights_of(self._base, self._policy))
        try:
            if self._rank == 0:
                self._group = join_group(self._group, member, self._engine.device)
                send(self._group, layout, whole, self.version)
        finally:
            deque(whole, maxlen=0)  # takes part in the gathering, also where a receiver was lost

    def share_weights(self) -> SharedWeights:
        """Handles on this rank's whole weights, until the next update, for an engine on the same device. Not under ZeRO-3."""
        named = ((name, weight.value()) for name, weight in weights_of(self._base, self._policy))
        return share(self.version, named, self._shared)

    def save_policy(self, folder: Path) -> None:
        """Write the policy and its tokenizer as a Hugging Face folder that AutoModelForCausalLM loads.

        With LoRA its weights are merged, and `adapter/` in it holds the adapter as peft loads it onto the first model.
        """
        named = dict(self._engine.gathered(weights_of(self._base, self._policy)))
        factors = dict(self._engine.gathered(adapter_of(self._policy))) if self._lora else {}
        if self._rank == 0:
            self._base.save_pretrained(folder, state_dict=named)
            load_tokenizer(self._model).save_pretrained(folder)
            if self._lora:
                save_adapter(Path(folder) / "adapter", self._policy, factors)

    def _packed(self, parts: Iterable[tuple[str, Weight]]) -> Weights | None:
        named = self._engine.gathered(parts)
        if self._rank == 0:
            return pack(self.version, named)
        deque(named, maxlen=0)  # takes part in the gathering
        return None
