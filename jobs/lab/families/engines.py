"""How far an engine's log-probabilities are from those of transformers, run by its plain formulas ("eager") in float32.

as loaded                                the folder's own weights
same weights, other weights, adapter     after a sync of each
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import torch

from actors.rollout.engine import EngineSettings
from actors.rollout.generator import Generator
from actors.weights.packing import Weights, pack
from causalrm_ray.models.lora import FACTORS, adapter_of, weights_of, with_adapter
from causalrm_ray.models.policy import load_policy
from causalrm_ray.models.text import encode_prompt, load_tokenizer
from causalrm_ray.types import Completion, Prompt, Request, Sampling
from jobs.lab.families.chats import CHATS
from jobs.lab.families.processes import alone

TOKENS = 24  # of an answer
CHANGE = 0.02  # standard deviation of what is added to each weight
RANK = 2


def check_engine(engine: str, settings: EngineSettings) -> dict[str, float]:
    """The largest |difference|, nats, over all tokens of the answers that the engine gives, by what it was given; without
    "adapter" where LoRA refuses the model."""
    tokenizer = load_tokenizer(settings.model)
    prompts = [Prompt(f"p{number}", chat, encode_prompt(tokenizer, chat)) for number, (chat, _) in enumerate(CHATS)]
    requests = [Request(prompt, seed=number) for number, prompt in enumerate(prompts)]
    learner = load_policy(settings.model, torch.float32)
    plain = copy.deepcopy(learner).eval()
    plain.set_attn_implementation("eager")
    changed, same = copy.deepcopy(plain), pack(1, _named(learner, learner))
    _disturb(changed.parameters(), seed=2)
    _disturb(learner.parameters(), seed=2)
    updates, models = (
        [same, pack(2, _named(learner, learner))],
        {"as loaded": plain, "same weights": plain, "other weights": changed},
    )
    with contextlib.suppress(ValueError):
        adapted = with_adapter(copy.deepcopy(plain), RANK, seed=0)
        _disturb([parameter for name, parameter in adapted.named_parameters() if f".{FACTORS[1]}." in name], seed=3)
        updates.append(pack(3, ((name, weight.value()) for name, weight in adapter_of(adapted))))
        models["adapter"] = adapted
    call = (engine, settings, requests, updates)
    found = alone(answers, *call) if engine != "hf" else answers(*call)
    return {name: gap(model, given) for (name, model), given in zip(models.items(), found, strict=True)}


def answers(
    engine: str, settings: EngineSettings, requests: Sequence[Request], updates: Sequence[Weights]
) -> list[list[Completion]]:
    """The engine's answers as it was loaded, and after each of `updates`."""
    torch.set_num_threads(1)
    generator = Generator(engine, settings, Sampling(max_new_tokens=TOKENS))
    try:
        found = [list(generator.generate(requests))]
        for weights in updates:
            generator.take_weights(weights)
            found.append(list(generator.generate(requests)))
        return found
    finally:
        generator.close()


def gap(model: Any, answers: Sequence[Completion]) -> float:
    """The largest |difference| between the answers' log-probabilities and the model's, nats."""
    gaps = [answer_logprobs(model, answer) - torch.tensor(answer.logprobs, dtype=torch.float64) for answer in answers]
    return max(float(found.abs().max()) for found in gaps)


@torch.no_grad()
def answer_logprobs(model: Any, answer: Completion) -> torch.Tensor:
    """What a transformers model makes of the tokens of an answer: their log-probabilities [T], nats, float64."""
    prompt = answer.prompt.token_ids
    logits = model(input_ids=torch.tensor([prompt + answer.token_ids])).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]


def _named(plain: Any, adapted: Any) -> Any:
    return ((name, weight.value()) for name, weight in weights_of(plain, adapted))


@torch.no_grad()
def _disturb(parameters: Any, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(CHANGE * torch.randn(parameter.shape, generator=rng))
