"""A transformers model for the step thread, with the same answers to the last bits of fp32.

Each submitted batch runs by itself, so what others submit changes none of its bits. New weights make all keys and values stale:
they are recomputed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.rollout.engine import EngineSettings
from actors.rollout.hf_batch import Batch, Row
from actors.rollout.step_thread import Phase
from actors.weights.broadcast import BucketLayout, GroupRank
from actors.weights.ipc import SharedWeights
from actors.weights.packing import Weights, checksum, out_of_place, unpack
from causalrm_ray.models.policy import load_policy
from causalrm_ray.models.text import decode_response
from causalrm_ray.types import Completion, Request, Sampling, Span


class HfCore:
    """A transformers model and its batches, for the step thread."""

    def __init__(self, settings: EngineSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = load_policy(settings.model, getattr(torch, settings.dtype))
        self._model: PreTrainedModel = model.requires_grad_(False).eval().to(self._device)
        self._version = settings.version
        self._tokenizer = tokenizer
        ends = getattr(self._model.generation_config, "eos_token_id", None)  # chat models name several
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self._batches: list[Batch] = []

    def add(self, requests: Mapping[str, Request], sampling: Sampling) -> None:
        texts = any(isinstance(end, str) for end in sampling.stop)
        rows = []
        for name, request in requests.items():
            ids = request.prompt.token_ids
            stream = DecodeStream(ids=list(ids), skip_special_tokens=True) if texts else None
            rows.append(Row(name, ids, request.seed, stream))
        stop_ids = frozenset(self._ends | {end for end in sampling.stop if isinstance(end, int)})
        backend = self._tokenizer.backend_tokenizer if texts else None
        self._batches.append(Batch(rows, sampling, stop_ids, backend))

    @torch.inference_mode()
    def step(self) -> list[tuple[str, Row]]:
        self._batches = [batch for batch in self._batches if len(batch)]
        return [output for batch in self._batches for output in batch.step(self._model, self._version)]

    def abort(self, request_ids: Sequence[str]) -> None:
        for batch in self._batches:
            batch.abort(frozenset(request_ids))

    def sync_phases(self, update: Weights | BucketLayout | SharedWeights, member: GroupRank | None = None) -> list[Phase]:
        if not isinstance(update, Weights):
            raise ValueError(f"rollout.engine=hf takes weights as an object, got {type(update).__name__}")
        self._check_fits(update)
        return [
            ("receive", lambda: self._receive(update)),
            ("finish", lambda: self._check_sum(update)),
            ("reset_cache", self._forget_contexts),
            ("set_version", lambda: setattr(self, "_version", update.version)),
        ]

    def completion(self, request: Request, sampling: Sampling, output: Row) -> Completion:
        assert output.stop_reason is not None, "only finished rows leave `step`"
        spans = tuple(Span(version, count) for version, count in Counter(output.versions).items())
        return Completion(
            prompt=request.prompt,
            response=decode_response(self._tokenizer, output.token_ids, sampling.stop),
            token_ids=tuple(output.token_ids),
            logprobs=tuple(output.logprobs),
            stop_reason=output.stop_reason,
            policy_version=output.versions[-1],
            spans=spans if len(spans) > 1 else (),
        )

    def about(self) -> Mapping[str, str]:
        return {"name": "hf", "version": transformers.__version__, "device": self._device.type}

    def shutdown(self) -> None:
        self._batches = []

    def _check_fits(self, weights: Weights) -> None:
        mine = {name: (str(p.dtype).removeprefix("torch."), tuple(p.shape)) for name, p in self._model.named_parameters()}
        theirs = {entry.name: (entry.dtype, entry.shape) for entry in weights.index}
        wrong = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
        if wrong:
            name = wrong[0]
            raise ValueError(
                f"weights must be the engine's parameters, name by name; {len(wrong)} differ, "
                f"the first {name}: the engine's {mine.get(name, 'absent')}, got {theirs.get(name, 'absent')}"
            )

    @torch.no_grad()
    def _receive(self, weights: Weights) -> None:
        parameters = dict(self._model.named_parameters())
        if weights.version == self._version:
            for name, tensor in unpack(weights):
                if not torch.equal(parameters[name].cpu(), tensor):
                    raise out_of_place("hf", name, weights.version)
        for name, tensor in unpack(weights):
            parameters[name].copy_(tensor)

    def _check_sum(self, weights: Weights) -> None:
        found = checksum(self._model.parameters())
        if found != weights.checksum:
            raise ValueError(f"the model's parameters must sum to the sender's {weights.checksum:#018x}, got {found:#018x}")

    def _forget_contexts(self) -> None:
        for batch in self._batches:
            batch.forget_context()
