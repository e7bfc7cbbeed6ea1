"""The files of a model: its configuration, and what the headers of its .safetensors files say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from causalrm_ray.errors import InputError

_QUANTISED = ("F8", "F6", "F4", "I8")  # how the types of quantised numbers begin; masks of old files are U8 and BOOL
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Raise InputError, of `what` and the reason, for whatever a library raises over files that other people wrote."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what}: {reason[:400]}") from error


def check_config(model: str) -> PreTrainedConfig:
    """The configuration of a folder or hub id. Raises InputError unless transformers itself computes such a model."""
    with refusing(f"model {model} must be a Hugging Face folder or hub id"):
        raw: dict[str, Any] = PreTrainedConfig.get_config_dict(model)[0]
    kind, release = raw.get("model_type"), f"transformers {transformers.__version__}"
    if not raw:
        raise InputError(f"model {model} must be a Hugging Face folder or hub id with a config.json, got none")
    if kind not in CONFIG_MAPPING:
        if "auto_map" in raw:
            raise InputError(
                f"{model}: config.json asks for code of its own (auto_map), which is never run, and {release} knows no {kind!r}"
            )
        raise InputError(f"{model}: model_type in config.json must be one that {release} knows, got {kind!r}")
    if quantised := raw.get("quantization_config"):
        how = quantised.get("quant_method", "unknown")
        raise InputError(
            f"{model}: weights must not be quantised, got {how}: no gradient trains them. Give a dequantised copy, such as "
            "in bfloat16"
        )
    with refusing(f"{model}: config.json must describe a {kind}"):
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    text = config.get_text_config()
    padding, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if padding is not None and rows is not None and padding >= rows:
        raise InputError(f"{model}: pad_token_id in config.json must be below its vocab_size of {rows}, got {padding}")
    if (file := Path(model) / "generation_config.json").exists():  # else the ends that it names would be unknown
        with refusing(f"{file} must be readable"):
            GenerationConfig.from_pretrained(model)
    return config


def check_length(model: str, config: PreTrainedConfig, max_length: int) -> None:
    """Raise InputError if rows of `max_length` tokens are longer than the model has positions for."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise InputError(f"max_length must be at most the {positions} positions of {model}, got {max_length}")


def check_weights(model: str) -> None:
    """Raise InputError for a local folder whose weights are pickled, missing, cut short or quantised; a hub id is not checked.

    Whether their bits are those that were saved cannot be checked: the weights of others come without a hash.
    """
    folder = Path(model)
    files = sorted(folder.glob("*.safetensors"))
    if not files and folder.is_dir():
        pickled = next((path.name for pattern in _PICKLED for path in sorted(folder.glob(pattern))), None)
        if pickled is None:
            raise InputError(f"{model} must hold weights, *.safetensors, got none")
        raise InputError(
            f"{model}: weights must be .safetensors files, got {pickled}, a pickle, which could run code as it is read: have "
            "whoever gave it to you save it with save_pretrained, or convert it where you trust it"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                found = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} must be a readable .safetensors file: {error}") from error
        if other := next((name for name, dtype in found.items() if dtype.startswith(_QUANTISED)), None):
            raise InputError(f"{file}: weights must not be quantised, got {other} as {found[other]}: give a dequantised copy")
    _check_index(folder, {file.name for file in files})


def _check_index(folder: Path, present: set[str]) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return
    with refusing(f"{index} must be an index of weights"):
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if missing := sorted(listed - present):
        raise InputError(
            f"{folder} must hold all of its {len(listed)} files of weights, {len(missing)} are missing, such as {missing[0]}"
        )
