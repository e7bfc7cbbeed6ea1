from __future__ import annotations

import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from causalrm_ray.config.base import RunConfig
from causalrm_ray.models.text import decode_response, encode_pair, encode_prompt, load_tokenizer
from causalrm_ray.world import grammar, oracle
from causalrm_ray.world.pretrain import PretrainSettings, ensure_policy, pretrain

SMALL = PretrainSettings(examples=512)


@pytest.fixture(scope="session")
def folder() -> Path:
    return ensure_policy(RunConfig().cache, seed=0)


@pytest.fixture(scope="session")
def tokenizer(folder):
    return load_tokenizer(str(folder))


@pytest.fixture(scope="session")
def model(folder) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder)


def sample_answers(model, tokenizer, prompts: list[str], seed: int) -> list[tuple[str, str]]:
    """One answer per prompt at temperature 1, prompts of one length together so that nothing is padded on the left."""
    groups = defaultdict(list)
    for prompt in prompts:
        groups[len(encode_prompt(tokenizer, prompt))].append(prompt)
    answers = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for group in groups.values():
            ids = torch.tensor([encode_prompt(tokenizer, prompt) for prompt in group])
            mask = torch.ones_like(ids)
            out = model.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=40)
            answers += [
                (prompt, decode_response(tokenizer, row.tolist()))
                for prompt, row in zip(group, out[:, ids.shape[1] :], strict=True)
            ]
    return answers


def sample_prompts(n, seed, split="train"):
    return random.Random(seed).choices(grammar.train_prompts() if split == "train" else grammar.evaluation_prompts(), k=n)


@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_sampled_answers_parse_and_reach_every_score(model, tokenizer, split):
    answers = sample_answers(model, tokenizer, sample_prompts(1000, seed=11, split=split), seed=12)
    assert sum(grammar.parse(*answer) is not None for answer in answers) >= 950
    counts = Counter(oracle.score(*answer) for answer in answers)
    assert min(counts[level] for level in range(5)) >= 30
    assert 1.6 <= sum(level * count for level, count in counts.items()) / 1000 <= 2.4


def test_state_at_the_end_of_an_answer_knows_what_was_asked_and_done(model, tokenizer):
    rng = random.Random(5)
    for prompt in sample_prompts(100, seed=6, split="evaluation"):
        response = grammar.sample_response(prompt, rng)
        words = grammar.describe(grammar.parse(prompt, response))
        with torch.no_grad():
            next_logit = model(torch.tensor([encode_pair(tokenizer, prompt, response)])).logits[0, -1]
        likeliest = {tokenizer.decode([token]).strip() for token in next_logit.topk(len(words)).indices.tolist()}
        assert likeliest == set(words), (prompt, response)


def test_text_round_trips_and_words_are_single_tokens(tokenizer):
    rng = random.Random(0)
    for prompt in sample_prompts(200, seed=0) + ["Ünïcode & <b>?  two  blanks"]:
        answer = grammar.sample_response(prompt, rng) if grammar.parse_prompt(prompt) else prompt
        ids = encode_pair(tokenizer, prompt, answer)[len(encode_prompt(tokenizer, prompt)) :]
        assert decode_response(tokenizer, ids) == answer
    for topic in grammar.TOPICS:
        assert len(tokenizer.encode(topic, add_special_tokens=False)) == 1


def test_prompts_and_answers_are_short(tokenizer):
    assert max(len(encode_prompt(tokenizer, prompt)) for prompt in grammar.train_prompts()) <= 14
    rng = random.Random(1)
    longest = 0
    for prompt in sample_prompts(2000, seed=1):
        answer = grammar.sample_response(prompt, rng)
        longest = max(longest, len(encode_pair(tokenizer, prompt, answer)) - len(encode_prompt(tokenizer, prompt)))
    assert longest <= 36


def test_policy_suits_the_engines(model, tokenizer):
    assert isinstance(model, LlamaForCausalLM)
    assert model.config.hidden_size // model.config.num_attention_heads >= 32
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, None}) == 3
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert sum(weight.numel() for weight in model.parameters()) < 600_000


def test_second_call_finds_the_same_folder_without_training(folder):
    steps = []
    assert ensure_policy(RunConfig().cache, seed=0, on_progress=lambda *progress: steps.append(progress)) == folder
    assert steps == []


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    steps = []
    _, first = pretrain(SMALL, seed=3, on_progress=lambda *progress: steps.append(progress))
    assert torch.equal(torch.get_rng_state(), state)
    _, second = pretrain(SMALL, seed=3)
    _, other = pretrain(SMALL, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert not torch.equal(first.lm_head.weight[:256], other.lm_head.weight[:256])
    assert [step for step, *_ in steps] == list(range(1, 17))
    assert steps[-1][1] == 16
    assert steps[-1][2] < steps[0][2]
