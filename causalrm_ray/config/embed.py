"""Options of embedding a graded data set."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from causalrm_ray.config.base import RunFolder, Section


class EmbedCluster(Section):
    """The Ray cluster."""

    address: str | None = Field(
        None, description="address of a running Ray cluster ('auto' finds it); null starts one on this machine"
    )
    timeout_s: int = Field(600, ge=1, description="longest wait for all actors to start, seconds")


class EmbedConfig(Section):
    """A graded data set through a frozen backbone: the last-token state of every answer."""

    source: str = Field(description="graded data set: JSON, CSV or Parquet file, a folder of them, `datasets` folder or hub id")
    test: str | None = Field(None, description="source of the test split; null: the data set's own, or a fifth of the prompts")
    format: Literal["auto", "helpsteer", "ultrafeedback", "pku_safe_rlhf", "generic"] = Field(
        "auto", description="schema of the source; auto: recognised by its columns (generic: prompt, response, score)"
    )
    model: str = Field(description="frozen backbone: folder or hub id of a causal model with a chat template, or 'embedded'")
    chat_template: Path | None = Field(None, description="file with a Jinja chat template for it; null: its own")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="precision of the backbone's weights")
    max_length: int = Field(2048, ge=8, description="longest prompt + response, tokens; longer ones are quarantined")
    batch_size: int = Field(16, ge=1, description="answers that go through the backbone at a time")
    shard_rows: int = Field(2048, ge=1, description="answers per shard, the unit of work that a killed actor loses")
    actors: int = Field(1, ge=1, description="number of actors, each with a copy of the backbone and a core")
    gpus: float = Field(0.0, ge=0, description="GPUs per actor, or a part of one; 0 computes on the CPU")
    precision: Literal["float16", "float32"] = Field("float16", description="of the embeddings that are kept")
    run: RunFolder = RunFolder()
    cluster: EmbedCluster = EmbedCluster()
