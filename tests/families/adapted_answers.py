"""Answers of an engine as loaded, and after an adapter was synced: as JSON [[[prompt ids, ids, log-probabilities], ...], ...].

    python -m tests.families.adapted_answers ENGINE FOLDER ADAPTER CACHE

One vLLM a process; and none where transformers' models are to be run, since it changes their classes.
"""
# ruff: noqa: T201

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from safetensors.torch import load_file

from actors.rollout.engine import EngineSettings
from actors.rollout.generator import Generator
from actors.weights.packing import pack
from causalrm_ray.models.lora import FILE
from causalrm_ray.registry import ENGINES
from causalrm_ray.types import Sampling
from tests.families.engine_gaps import LENGTH, requests

Answer = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]


def answers(engine: str, folder: str, adapter: str, cache: str) -> list[list[Answer]]:
    """(prompt ids, ids, log-probabilities) of each answer, before and after."""
    generator = Generator(engine, EngineSettings(folder, LENGTH, "float32", cache, 300.0, 4), Sampling(max_new_tokens=24))
    found = [list(generator.generate(requests()))]
    generator.take_weights(pack(1, load_file(Path(adapter) / FILE).items()))
    found.append(list(generator.generate(requests())))
    generator.close()
    return [[(done.prompt.token_ids, done.token_ids, done.logprobs) for done in part] for part in found]


if __name__ == "__main__":
    os.environ.update(ENGINES.load(sys.argv[1]).process_env(sys.argv[2], sys.argv[4], gpu=False))
    print(json.dumps(answers(*sys.argv[1:])))
