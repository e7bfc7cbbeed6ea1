"""How far an engine's log-probabilities are from transformers', as loaded, after a sync of the same weights, and of others.

    python -m tests.families.engine_gaps ENGINE FOLDER CACHE

Prints a JSON object; one engine per process. The reference runs attention by its plain formula ("eager").
"""
# ruff: noqa: T201

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM

from actors.rollout.engine import EngineSettings
from actors.rollout.generator import Generator
from actors.weights.packing import pack
from causalrm_ray.conversation import Conversation
from causalrm_ray.models.lora import weights_of
from causalrm_ray.models.policy import load_policy
from causalrm_ray.registry import ENGINES
from causalrm_ray.types import Completion, Prompt, Request, Sampling
from tests.families.builder import VOCAB

LENGTH = 128


def requests(count: int = 6) -> list[Request]:
    ids = torch.randint(4, VOCAB, (count, 20), generator=torch.Generator().manual_seed(5)).tolist()
    return [Request(Prompt(f"p{row}", Conversation.user("hi"), tuple(ids[row])), seed=row) for row in range(count)]


@torch.no_grad()
def gap(model: torch.nn.Module, answers: Sequence[Completion]) -> float:
    """The largest |difference|, nats, over all tokens of the answers."""
    largest = 0.0
    for answer in answers:
        prompt = answer.prompt.token_ids
        logits = model(torch.tensor([prompt + answer.token_ids])).logits[0, len(prompt) - 1 : -1].double()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        largest = max(largest, float((expected - torch.tensor(answer.logprobs, dtype=torch.float64)).abs().max()))
    return largest


def main(engine: str, folder: str, cache: str) -> None:
    """Print the gaps."""
    os.environ.update(ENGINES.load(engine).process_env(folder, cache, gpu=False))
    generator = Generator(engine, EngineSettings(folder, LENGTH, "float32", cache, 300.0, 4), Sampling(max_new_tokens=24))
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    learner = load_policy(folder, torch.float32).eval()
    answers = list(generator.generate(requests()))
    found = {"learner": gap(learner, answers), "as loaded": gap(plain, answers)}
    for version, change in ((0, 0.0), (1, 0.02)):
        rng = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for own, other in zip(learner.parameters(), plain.parameters(), strict=True):
                noise = change * torch.randn(own.shape, generator=rng)
                own.add_(noise)
                other.add_(noise)
        generator.take_weights(pack(version, ((name, weight.value()) for name, weight in weights_of(learner, learner))))
        found[f"version {version}"] = gap(plain, list(generator.generate(requests())))
    generator.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
