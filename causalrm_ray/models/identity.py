"""Which model it is: what a cache of its outputs is keyed by, and how long its rows may be."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.utils import cached_file

from causalrm_ray.errors import InputError


def model_digest(model: str) -> str:
    """A digest of every file of a local folder; of a hub id, its name and commit. Raises InputError for neither."""
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{_config_file(model).parent.name}"
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        with file.open("rb") as stream:
            digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def check_length(model: str, max_length: int) -> None:
    """Raise InputError if rows of `max_length` tokens are longer than the model has positions for."""
    positions = getattr(AutoConfig.from_pretrained(_config_file(model).parent).get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise InputError(f"max_length must be at most the {positions} positions of {model}, got {max_length}")


def check_weights(model: str) -> None:
    """Raise InputError for a local folder whose .safetensors files are cut short or no such files; a hub id is not checked.

    Whether their bits are those that were saved cannot be checked: the weights of others come without a hash.
    """
    for file in sorted(Path(model).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} must be a readable .safetensors file: {error}") from error


def _config_file(model: str) -> Path:
    try:
        return Path(str(cached_file(model, "config.json")))
    except OSError as error:
        raise InputError(f"model {model} must be a Hugging Face folder or hub id: {error}") from error
