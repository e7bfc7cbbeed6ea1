"""The checks of one model for one role, in seconds: what would otherwise end a job after its work, or be wrong without a word."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from causalrm_ray.conversation import Conversation
from causalrm_ray.errors import InputError
from causalrm_ray.models.checks.files import check_config, check_length, check_weights, refusing
from causalrm_ray.models.checks.skeleton import backbone_skeleton, policy_skeleton
from causalrm_ray.models.checks.tokens import check_tokens
from causalrm_ray.models.kernels import text_config
from causalrm_ray.models.reward_model import SequenceScorer, embedding_rows
from causalrm_ray.models.text import encode_pair, end_tokens, generation_config, load_tokenizer
from causalrm_ray.registry import ENGINES

_ASKED, _ANSWER = "What is 2 + 2?", "Four, of course."


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a check found: the family's name in transformers, the number of parameters, the rows of the embedding, and the tokens
    that end an answer, the one that rows of a log end in first."""

    family: str
    parameters: int
    rows: int
    ends: tuple[str, ...]

    def summary(self) -> str:
        """The same in a line."""
        ends = " or ".join(self.ends)
        return f"{self.family}, {self.parameters:,} parameters, {self.rows:,} rows of embedding, answers end at {ends}"


def check_engine(engine: str, model: str) -> None:
    """Raise InputError for a model that an engine cannot take new weights of."""
    kind = text_config(model).model_type
    if reason := ENGINES.load(engine).unsupported.get(kind):
        raise InputError(
            f"rollout.engine={engine} cannot take new weights of {model}, a model of type {kind}: {reason}. Take "
            "rollout.engine=hf, or another model.policy"
        )


def check_policy(model: str, max_length: int | None = None, engine: str | None = None) -> ModelFacts:
    """What a folder or hub id is. Raises InputError, naming what is wrong, unless it can be tuned on rows of at most `max_length`
    tokens, written with by an `engine`, saved and read again."""
    config = _check_files(model, max_length)
    if engine is not None:
        check_engine(engine, model)
    tokenizer, skeleton = load_tokenizer(model), policy_skeleton(model, config)
    facts = _facts(model, tokenizer, skeleton)
    with tempfile.TemporaryDirectory(prefix="check-model-") as folder:
        with refusing(
            f"{model}: generation_config.json must be one that transformers saves; where it is refused for how it samples, "
            '"do_sample": true in it, or no such settings, makes it one'
        ):
            (generation_config(model) or GenerationConfig.from_model_config(skeleton.config)).save_pretrained(folder)
        with refusing(f"{model}: configuration and tokenizer must be those that transformers reads again once saved"):
            skeleton.config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            with torch.device("meta"):
                AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        _check_same_ids(model, encode_pair(load_tokenizer(folder), _ASKED, _ANSWER), tokenizer)
    return facts


def check_backbone(model: str, max_length: int | None = None) -> ModelFacts:
    """The same of a backbone of reward and propensity: can a head be put on it, and is the saved reward model read again?"""
    config = _check_files(model, max_length)
    tokenizer, skeleton = load_tokenizer(model), backbone_skeleton(model, config)
    facts = _facts(model, tokenizer, skeleton)
    with tempfile.TemporaryDirectory(prefix="check-model-") as folder:
        with refusing(f"{model}: a reward model on it must be one that transformers reads again once saved"):
            SequenceScorer(skeleton).save_settings(folder, tokenizer)
            with torch.device("meta"):
                AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
            saved: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            messages = [*Conversation.user(_ASKED).parse()[0], {"role": "assistant", "content": _ANSWER}]
            ids = saved.apply_chat_template(messages, tokenize=True, return_dict=False)
        _check_same_ids(model, tuple(ids), tokenizer)
    return facts


def _check_files(model: str, max_length: int | None) -> PreTrainedConfig:
    config = check_config(model)
    check_weights(model)
    if max_length is not None:
        check_length(model, config, max_length)
    return config


def _facts(model: str, tokenizer: PreTrainedTokenizerBase, skeleton: PreTrainedModel) -> ModelFacts:
    rows = embedding_rows(skeleton)
    check_tokens(model, tokenizer, rows)
    end = tokenizer.eos_token_id
    others = sorted(end_tokens(tokenizer, model) - {end})
    names = tuple(str(tokenizer.convert_ids_to_tokens(token)) for token in (end, *others))
    return ModelFacts(skeleton.config.model_type, skeleton.num_parameters(), rows, names)


def _check_same_ids(model: str, found: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> None:
    expected = encode_pair(tokenizer, _ASKED, _ANSWER)
    if found != expected:
        raise InputError(
            f"{model}: a saved model's chat template must give the {len(expected)} ids that it was trained on, got {len(found)} "
            "others: its tokenizer does not give a text the ids of its parts"
        )
