"""One step of the learner under ZeRO 3 in this process, a checkpoint, and the policy that it saves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from actors.cluster.ports import free_port
from actors.learner.rank import LearnerRank
from actors.learner.shares import Sharder
from actors.weights.packing import unpack
from causalrm_ray.config.train import LearnerConfig
from causalrm_ray.models.text import as_logged, encode_prompt, end_tokens, load_tokenizer
from causalrm_ray.types import Completion, Prompt, Scored
from jobs.lab.families.builder import LENGTH
from jobs.lab.families.chats import CHATS
from jobs.lab.families.engines import TOKENS, answer_logprobs

CONFIG = LearnerConfig(algorithm="ppo", ranks=1, zero_stage=3, epochs=1, minibatches=1, lr=1e-3)


class Learner:
    """One rank, and the driver's part in front of it."""

    def __init__(self, model: str) -> None:
        address = f"tcp://127.0.0.1:{free_port('127.0.0.1')}"
        common = {"temperature": 1.0, "seed": 0, "rank": 0, "world_size": 1, "max_new_tokens": TOKENS, "steps": 10}
        self.rank = LearnerRank(model, CONFIG, dtype=torch.float32, init_method=address, **common)
        self.sharder = Sharder(CONFIG, ranks=1, seed=0, max_length=LENGTH, tokens_per_micro_batch=4096)

    def step(self, scored: Sequence[Scored]) -> None:
        """Learn from answers that this version is said to have written."""
        answers = [dataclasses.replace(each.completion, policy_version=self.rank.version) for each in scored]
        self.rank.prepare(self.sharder.split(answers)[0])
        step = [dataclasses.replace(each, completion=answer) for each, answer in zip(scored, answers, strict=True)]
        self.rank.update(self.sharder.step(step)[0])

    def weights(self) -> dict[str, torch.Tensor]:
        """The policy's, by name."""
        weights = self.rank.weights()
        assert weights is not None, "rank 0 has them all"
        return {name: tensor.clone() for name, tensor in unpack(weights)}


def check_learner(model: str, folder: Path) -> dict[str, float]:
    """Largest |differences|, by name.

    saved weights             the saved policy's, loaded by transformers, to the learner's
    saved log-probabilities   what it gives to what the learner gives, nats, mean over an answer's tokens
    resumed                   weights of a rank that went on from the checkpoint to those of the one that wrote it
    """
    scored, first = _scored(model), Learner(model)
    before = first.weights()
    first.step(scored)
    first.rank.save(folder / "state")
    first.rank.save_policy(folder / "policy")
    saved = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32, attn_implementation="eager").eval()
    weights = first.weights()
    if _largest(before, weights) == 0:
        raise ValueError("a step must change weights, got the same")
    found = {
        "saved weights": _largest(dict(saved.named_parameters()), weights),
        "saved log-probabilities": _gap(first, saved, scored),
    }
    first.step(scored)
    again = Learner(model)
    again.sharder.restart(again.rank.load(folder / "state"))
    again.step(scored)
    return found | {"resumed": _largest(again.weights(), first.weights())}


def _scored(model: str) -> list[Scored]:
    tokenizer, rng = load_tokenizer(model), np.random.default_rng(0)
    ends, scored = end_tokens(tokenizer, model), []
    for number, (chat, text) in enumerate(CHATS):
        written = tokenizer.encode(text, add_special_tokens=False)[: TOKENS - 1]
        ids = as_logged(written, ends, tokenizer.eos_token_id)
        logprobs = tuple(rng.normal(-5.0, 1.0, len(ids)).tolist())
        prompt = Prompt(f"p{number}", chat, encode_prompt(tokenizer, chat))
        scored.append(Scored(Completion(prompt, text, ids, logprobs, "stop", 0), float(rng.normal()), 0))
    return scored


def _gap(learner: Learner, saved: torch.nn.Module, scored: Sequence[Scored]) -> float:
    answers = []
    for each in scored:
        logprobs = tuple(answer_logprobs(saved, each.completion).tolist())
        answers.append(dataclasses.replace(each.completion, logprobs=logprobs, policy_version=learner.rank.version))
    return max(learner.rank.gaps(learner.sharder.split_apart(answers)[0]).values())


def _largest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    if missing := expected.keys() - found.keys():
        raise ValueError(f"weights must hold {sorted(missing)[0]}, got {len(found)} others")
    return max(float((found[name].double() - tensor.double()).abs().max()) for name, tensor in expected.items())
