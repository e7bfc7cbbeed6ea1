"""Models without memory for their weights: what they are made of, and whether their files hold all of it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from causalrm_ray.errors import InputError
from causalrm_ray.models.checks.files import refusing
from causalrm_ray.models.kernels import load
from causalrm_ray.models.reward_model import HEAD, quiet_transformers

_WRITES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # how architectures are called that write text
_LAYER = re.compile(r"\b(?:layers|h)\.(\d+)\.")


def policy_skeleton(model: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model of a folder or hub id. Raises InputError unless it is one and its files hold every weight."""
    text, kind, named = config.get_text_config(), f"a {config.model_type}", config.architectures or ()
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{model}: a policy must be a decoder that transformers loads as a causal language model, got {kind}")
    if named and not any(name.endswith(_WRITES) for name in named):
        raise InputError(f"{model}: a policy must be a causal language model, got the architecture {', '.join(named)}")
    found, missing = _load(model, text, AutoModelForCausalLM)
    _check_complete(model, found, missing)
    return found


def backbone_skeleton(model: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The same model with one output, for reward and propensity. Raises InputError unless transformers has it with a linear head
    `score` over causal attention."""
    text, kind = config.get_text_config(), f"a {config.model_type}"
    if type(text) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{model}: a backbone must be a decoder that transformers can put a classifier's head on, got {kind}")
    found, missing = _load(model, text, AutoModelForSequenceClassification, num_labels=1)
    head = getattr(found, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise InputError(f"{model}: a backbone must be a decoder, whose classifier has a linear head `score`, got {kind}")
    _check_complete(model, found, missing - HEAD)
    return found


def _load(model: str, text: PreTrainedConfig, kind: Any, **options: Any) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the names of weights that its files lack; of a hub id no file of weights is downloaded."""
    with quiet_transformers(), refusing(f"{model}: its weights must be those that config.json describes"):
        if not Path(model).is_dir():
            text = copy.deepcopy(text)
            for name, value in options.items():
                setattr(text, name, value)
            with torch.device("meta"):
                return kind.from_config(text, trust_remote_code=False), set()
        reading = {"device_map": "meta", "ignore_mismatched_sizes": True}
        found, loading = load(kind, model, torch.float32, reading, **options)
    for name, stored, expected in sorted(loading["mismatched_keys"]):
        raise InputError(f"{model}: {name} must be {list(expected)}, as config.json describes it, got {list(stored)}")
    layers = text.num_hidden_layers
    beyond = [name for name in loading["unexpected_keys"] if any(int(number) >= layers for number in _LAYER.findall(name))]
    if beyond:
        raise InputError(f"{model}: config.json must describe all layers of its files, got {layers}, and {min(beyond)}")
    return found, set(loading["missing_keys"])


def _check_complete(model: str, found: PreTrainedModel, missing: set[str]) -> None:
    if missing:
        raise InputError(
            f"{model}: its files must hold all weights of a {type(found).__name__}, {len(missing)} are missing, such as "
            f"{min(missing)}"
        )
