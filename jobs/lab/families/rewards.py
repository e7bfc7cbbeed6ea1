"""A saved reward model: do other libraries give its scores, and does an answer have one score by every path?

rollout   ids of a prompt and of an answer as an engine writes it, whichever token it stopped at
log       the answer's text, as a log has it
chat      the saved folder's own chat template
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from actors.rollout.vllm_core import classifier_scores
from causalrm_ray.conversation import Conversation
from causalrm_ray.models.kernels import text_config
from causalrm_ray.models.reward_model import SequenceScorer, score_rows
from causalrm_ray.models.text import as_logged, decode_response, encode_pair, encode_prompt, end_tokens, load_tokenizer
from jobs.lab.families.chats import CHATS
from jobs.lab.families.processes import alone

OTHERWISE_ON_CPU = frozenset({"deepseek_v3"})  # in vLLM 0.32, by whole nats, as it was loaded
Rows = Sequence[Sequence[int]]


def check_reward(model: str, folder: Path, vllm: bool) -> dict[str, float]:
    """The largest |difference| of scores: in transformers, in vLLM's classifier where it is to be tried, and by paths."""
    scorer, tokenizer = SequenceScorer.from_pretrained(model), load_tokenizer(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        scorer.head.weight.normal_(std=0.2)
    scorer.save_pretrained(folder, tokenizer)
    rows = [encode_pair(tokenizer, chat, answer) for chat, answer in CHATS]
    logged = score_rows(scorer, rows)
    found = {"transformers": _largest(_in_transformers(folder, rows), logged)}
    if vllm and (torch.cuda.is_available() or text_config(model).model_type not in OTHERWISE_ON_CPU):
        found["vLLM"] = _largest(torch.tensor(alone(classifier_scores, str(folder), rows)), logged)
    return found | {"rollout, log": _of_rollouts(model, scorer, logged), "chat, log": _of_chats(folder, scorer, logged)}


def _of_rollouts(model: str, scorer: SequenceScorer, logged: torch.Tensor) -> float:
    tokenizer = load_tokenizer(model)
    ends, largest = end_tokens(tokenizer, model), 0.0
    for number, (chat, answer) in enumerate(CHATS):
        prompt = encode_prompt(tokenizer, chat)
        written = _written(tokenizer, chat, answer)[len(prompt) :]
        for stop in ((), *((end,) for end in ends)):
            text = decode_response(tokenizer, [*written, *stop], tuple(ends))
            if text != answer:
                raise ValueError(f"the ids of {answer!r} must be decoded to it, got {text!r}")
            row = as_logged((*prompt, *written, *stop), ends, cast(int, tokenizer.eos_token_id))
            largest = max(largest, _largest(score_rows(scorer, [row]), logged[number : number + 1]))
    return largest


def _written(tokenizer: PreTrainedTokenizerBase, chat: Conversation, answer: str) -> list[int]:
    """Ids of a chat up to the end of its answer, as the model's own template writes it: what a model has learned to answer."""
    messages = [*chat.parse()[0], {"role": "assistant", "content": answer}]
    text = cast(str, tokenizer.apply_chat_template(messages, tokenize=False))
    return tokenizer.encode(text[: text.rindex(answer) + len(answer)], add_special_tokens=False)


def _of_chats(folder: Path, scorer: SequenceScorer, logged: torch.Tensor) -> float:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    rows = []
    for chat, answer in CHATS:
        messages = [*chat.parse()[0], {"role": "assistant", "content": answer}]
        rows.append(tokenizer.apply_chat_template(messages, return_dict=False))
    return _largest(score_rows(scorer, rows), logged)


@torch.inference_mode()
def _in_transformers(folder: Path, rows: Rows) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="right")
    return model(**tokenizer.pad({"input_ids": [list(row) for row in rows]}, return_tensors="pt")).logits[:, 0]


def _largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max())
