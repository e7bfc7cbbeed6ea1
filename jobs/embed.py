"""A graded data set through a frozen backbone: embeddings and levels of its answers, for the benchmark.

source -> rows (shards) --actors--> states (shards, cached under what they depend on) -> train, test.safetensors, rows.parquet
A run that was killed continues when the command is given again: finished shards are not computed twice.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import TextIO

from rich.console import Console

from actors.cluster.runtime import ray_cluster
from actors.features.embed import Backbone, Shard, embed_shards
from causalrm_ray.checkpoint import write_json
from causalrm_ray.config.base import ClusterConfig
from causalrm_ray.config.embed import EmbedConfig
from causalrm_ray.config.options import dump_config
from causalrm_ray.data.graded import read_graded
from causalrm_ray.data.rows import Quarantine
from causalrm_ray.data.shards import RowShards, conclude, write_rows
from causalrm_ray.errors import InputError
from causalrm_ray.models.identity import model_digest
from jobs.support.progress import Progress
from jobs.support.prompts import find_backbone

DONE = "summary.json"  # written last


def run(config: EmbedConfig) -> int:
    """Run the job."""
    folder = config.run.path
    if (folder / DONE).exists() and not config.run.resume:
        raise InputError(f"{folder} holds embeddings already: remove it, or choose another run.name")
    with Progress() as progress:
        model = find_backbone(config, config.model, config.max_length, progress.pretraining)
        dump_config(config, folder / "config.yaml")
        with (folder / "quarantine.jsonl").open("w", encoding="utf-8") as file:
            summary = _embed(config, model, file, progress)
    write_json(folder / DONE, summary)
    Console().print(
        f"{summary['train']} answers to train on, {summary['test']} to test on, {summary['quarantined']} rows quarantined:"
        f" see {folder}",
        soft_wrap=True,
        highlight=False,
    )
    return 0


def _embed(config: EmbedConfig, model: str, file: TextIO, progress: Progress) -> dict[str, float | str]:
    """From the source to the files of the run."""
    folder, quarantine = config.run.path, Quarantine(file)
    progress.phase(f"reading {config.source}")
    rows = read_graded(config.source, quarantine, format=config.format, test=config.test)
    shards = write_rows(rows, folder / "rows", config.shard_rows)
    states = states_folder(config, model, shards)
    missing = [Shard(shards.folder / name, states / name) for name in shards.names if not (states / name).exists()]
    answers = sum(shards.counts.values())
    progress.phase(
        f"{answers} answers in {len(shards.names)} shards, {len(shards.names) - len(missing)} of them embedded already"
    )
    began = time.perf_counter()
    if missing:
        backbone = backbone_of(config, model)
        progress.phase(f"starting {min(config.actors, len(missing))} actors")
        with ray_cluster(ClusterConfig(address=config.cluster.address), config.run.cache):
            progress.tasks("shards", len(missing))
            done = 0
            for count, (name, embedded) in enumerate(embed_shards(missing, backbone, config.actors, config.cluster.timeout_s), 1):
                done += embedded
                progress.task(count, f"{name}, {done / (time.perf_counter() - began):.0f} answers/s")
    seconds = time.perf_counter() - began
    kept = conclude(shards, states, folder, quarantine)
    shutil.rmtree(shards.folder)
    return {**kept, "quarantined": quarantine.count, "embed_s": seconds, "states": str(states)}


def backbone_of(config: EmbedConfig, model: str) -> Backbone:
    """The configured backbone, whose files are at `model`."""
    return Backbone(model, config.dtype, config.max_length, config.batch_size, config.precision, config.gpus)


def states_folder(config: EmbedConfig, model: str, shards: RowShards) -> Path:
    """Where the states of `shards` are cached: under a digest of all that they depend on."""
    parts = [shards.digest, config.shard_rows, model_digest(model), config.dtype, config.max_length, config.precision]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    return config.run.cache.expanduser().resolve() / "embeddings" / key
