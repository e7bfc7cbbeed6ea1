"""Answers to embeddings, shard by shard, over a pool of actors under Ray Data. A finished shard is whole or absent, and is kept.

rows/train-00000.parquet --Embedder--> states/train-00000.parquet        (one line for each row of the shard)
prompt, response, level                embedding [D], fault

Shards are on storage that all nodes share; only their names are sent.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow.parquet as pq
import ray.data
import torch
from ray.exceptions import GetTimeoutError, RayActorError

from actors.cluster.resources import ray_resources
from actors.errors import RoleDiedError, RoleTimeoutError
from causalrm_ray.data.shards import write_states
from causalrm_ray.models.reward_model import SequenceScorer, row_states
from causalrm_ray.models.text import encode_pair, load_tokenizer


@dataclass(frozen=True, slots=True)
class Backbone:
    """A frozen model, and how it is run. `model` is a folder or hub id, `max_length` in tokens, `gpus` per actor."""

    model: str
    dtype: Literal["float32", "bfloat16", "float16"]
    max_length: int
    batch_size: int
    precision: Literal["float16", "float32"]
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard of rows, and where its states go."""

    rows: Path
    states: Path


class Embedder:
    """Holds the backbone; called with shards by Ray Data."""

    def __init__(self, backbone: Backbone) -> None:
        torch.set_num_threads(1)  # actors share the cores, and sums in one order repeat their bits
        self._backbone = backbone
        self._tokenizer = load_tokenizer(backbone.model)
        dtype = cast(torch.dtype, getattr(torch, backbone.dtype))
        self._scorer = SequenceScorer.from_pretrained(backbone.model, dtype).to("cuda" if backbone.gpus else "cpu").eval()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Embed the shards of a batch of {rows, states} (paths); returns their names and how many rows each holds."""
        shards = [Shard(Path(rows), Path(states)) for rows, states in zip(batch["rows"], batch["states"], strict=True)]
        return {"name": [shard.states.name for shard in shards], "count": [self.embed(shard) for shard in shards]}

    def embed(self, shard: Shard) -> int:
        """Write the states of a shard's rows, whole or not at all; returns how many rows it holds.

        A row of too many tokens, or whose state overflows the precision, has zeros and a fault.
        """
        table = pq.read_table(shard.rows, columns=["prompt", "response"])
        pairs = zip(table["prompt"].to_pylist(), table["response"].to_pylist(), strict=True)
        token_rows = [encode_pair(self._tokenizer, prompt, response) for prompt, response in pairs]
        longest, rule = self._backbone.max_length, "prompt and response must have at most {} tokens, got {}"
        fits = [number for number, row in enumerate(token_rows) if len(row) <= longest]
        faults = ["" if len(row) <= longest else rule.format(longest, len(row)) for row in token_rows]
        states = np.zeros((len(token_rows), self._scorer.head.in_features), self._backbone.precision)
        if fits:
            found = row_states(self._scorer, [token_rows[number] for number in fits], self._backbone.batch_size).numpy()
            with np.errstate(over="ignore"):  # reported as a fault below
                states[fits] = found.astype(states.dtype)
        for number in np.flatnonzero(~np.isfinite(states).all(1)).tolist():
            faults[number] = f"the state must be finite in {self._backbone.precision}, got inf or nan"
            states[number] = 0
        write_states(shard.states, states, faults)
        return len(token_rows)


def embed_shards(shards: Sequence[Shard], backbone: Backbone, actors: int, timeout_s: int) -> Iterator[tuple[str, int]]:
    """(name, rows) of each shard as its states are written; Ray must be up.

    What an actor raises is raised here; RoleDiedError if one cannot start, RoleTimeoutError if they take longer than `timeout_s`.
    """
    actors = min(actors, len(shards))
    context = ray.data.DataContext.get_current()
    context.wait_for_min_actors_s = timeout_s
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors come here as exceptions
    items = [{"rows": str(shard.rows), "states": str(shard.states)} for shard in shards]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Embedder,
        fn_constructor_args=(backbone,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=1,
        num_gpus=backbone.gpus,
    )
    try:
        for row in dataset.iter_rows():
            yield row["name"], int(row["count"])
    except GetTimeoutError as error:
        raise RoleTimeoutError(
            f"embedding: {actors} actors of 1 CPU and {backbone.gpus:g} GPU did not start within cluster.timeout_s={timeout_s} s"
            f" on a cluster of {ray_resources()}"
        ) from error
    except RayActorError as error:
        raise RoleDiedError(f"embedding: an actor's process died: {error}") from error
