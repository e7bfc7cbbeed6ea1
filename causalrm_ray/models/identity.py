"""Which model it is: what a cache of its outputs is keyed by, and its files under another chat template."""

from __future__ import annotations

import hashlib
from pathlib import Path

from filelock import FileLock
from huggingface_hub import snapshot_download
from transformers.utils import cached_file

from causalrm_ray.errors import InputError
from causalrm_ray.files import write_whole

_TEMPLATE = "chat_template.jinja"
_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")


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


def with_template(model: str, template: Path, cache: Path) -> str:
    """A folder of links to the files of a model (folder or hub id) and the chat template of a file, below `cache`.

    So that every process of a run, and whoever loads what it saves, reads the model with this template and needs no option.
    Raises InputError for a template that cannot be read.
    """
    try:
        text = template.expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"chat_template: {template} must be a file with a Jinja template: {error}") from error
    source = Path(model)
    if not source.is_dir():
        try:
            source = Path(snapshot_download(model, allow_patterns=list(_FILES), ignore_patterns=["*/*", "consolidated*"]))
        except OSError as error:
            raise InputError(f"model {model} must be a Hugging Face folder or hub id: {error}") from error
    key = hashlib.sha256(f"{source.resolve()}\n{text}".encode()).hexdigest()[:32]
    folder = cache.expanduser().resolve() / "templates" / key
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in source.iterdir() if path.is_file()} - {_TEMPLATE}
    with FileLock(f"{folder}.lock"):
        for link in folder.iterdir():
            if link.name not in {*names, _TEMPLATE}:
                link.unlink()  # to a file that is gone
        for name in names:
            if not (folder / name).exists():
                (folder / name).unlink(missing_ok=True)
                (folder / name).symlink_to((source / name).resolve())
        write_whole(folder / _TEMPLATE, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
    return str(folder)


def _config_file(model: str) -> Path:
    try:
        return Path(str(cached_file(model, "config.json")))
    except OSError as error:
        raise InputError(f"model {model} must be a Hugging Face folder or hub id: {error}") from error
