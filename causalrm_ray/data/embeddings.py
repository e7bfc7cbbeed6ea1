"""Ready-made embeddings of graded answers, from a .safetensors file: "embeddings" [N, D], "labels" [N], maybe "prompts" [N].

They are the last-token states of any frozen backbone, so that estimators can be compared without running one. Files that we
write carry a hash of all three, which is compared on reading; others are taken as they are.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from causalrm_ray.checks import check_finite
from causalrm_ray.errors import InputError
from causalrm_ray.files import write_whole

EMBEDDINGS, LABELS, PROMPTS = "embeddings", "labels", "prompts"
HASH = "sha256"  # its name in the file's metadata
_EMBEDDING_TYPES = (torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class GradedEmbeddings:
    """N graded answers: `features` [N, D] as stored (float16 or float32), `levels` [N] float32, higher is better.

    `prompts` [N] int64 numbers the prompt of each, equal where the prompt is (None: unknown).
    """

    features: Tensor
    levels: Tensor
    prompts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.levels)


def load_embeddings(path: Path) -> GradedEmbeddings:
    """Read graded embeddings; further tensors of the file are ignored.

    Raises InputError that names the file, the tensor, the rule and the value.
    """
    features, levels, prompts = _read(path)
    _require(features.ndim == 2, path, EMBEDDINGS, "must be [N, D]", f"shape {list(features.shape)}")
    _require(min(features.shape) > 0, path, EMBEDDINGS, "must hold rows and columns", f"shape {list(features.shape)}")
    _require(features.dtype in _EMBEDDING_TYPES, path, EMBEDDINGS, "must be float16 or float32", str(features.dtype))
    one_each = f"must be [N], one for each of the {len(features)} rows of {EMBEDDINGS!r}"
    _require(levels.shape == features.shape[:1], path, LABELS, one_each, f"shape {list(levels.shape)}")
    _require(levels.dtype != torch.bool and not levels.is_complex(), path, LABELS, "must be numbers", str(levels.dtype))
    if prompts is not None:
        _require(prompts.dtype == torch.int64, path, PROMPTS, "must be int64", str(prompts.dtype))
        _require(prompts.shape == features.shape[:1], path, PROMPTS, one_each, f"shape {list(prompts.shape)}")
    levels = levels.to(torch.float32)
    for name, tensor in ((EMBEDDINGS, features), (LABELS, levels)):
        try:
            check_finite(name, tensor)
        except ValueError as error:
            raise InputError(f"{path}: tensor {error}") from None
    known = levels.unique()
    _require(len(known) > 1, path, LABELS, "must hold at least two levels", f"{known.tolist()} in all {len(levels)} rows")
    return GradedEmbeddings(features, levels, prompts)


def write_embeddings(path: Path, features: np.ndarray, levels: np.ndarray, prompts: np.ndarray | None = None) -> None:
    """Write `features` [N, D], `levels` [N] and numbers of `prompts` [N], int64, as `load_embeddings` reads them: whole or not at
    all, with their hash."""
    tensors = {EMBEDDINGS: features, LABELS: levels} | ({} if prompts is None else {PROMPTS: prompts})
    metadata = {HASH: _sha256(*tensors.values())}
    write_whole(path, lambda unfinished: save_file(tensors, unfinished, metadata=metadata))


def load_pair(train: Path, test: Path) -> tuple[GradedEmbeddings, GradedEmbeddings]:
    """The two splits of one data set. Raises InputError if a file is faulty or their widths differ."""
    first, second = load_embeddings(train), load_embeddings(test)
    width = first.features.shape[1]
    found = second.features.shape[1]
    _require(found == width, test, EMBEDDINGS, f"must have the {width} columns of {train}", str(found))
    return first, second


def _read(path: Path) -> tuple[Tensor, Tensor, Tensor | None]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            found = sorted(file.keys())
            for name in (EMBEDDINGS, LABELS):
                _require(name in found, path, name, "must be there", f"only {found}")
            features, levels = file.get_tensor(EMBEDDINGS), file.get_tensor(LABELS)
            prompts = file.get_tensor(PROMPTS) if PROMPTS in found else None
            expected = (file.metadata() or {}).get(HASH)
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: must be a readable .safetensors file: {error}") from error
    hashed = [tensor.numpy() for tensor in (features, levels, prompts) if tensor is not None]
    if expected is not None and expected != _sha256(*hashed):
        raise InputError(f"{path}: its tensors must match the {HASH} in its metadata: the file was damaged or altered")
    return features, levels, prompts


def _sha256(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _require(holds: bool, path: Path, tensor: str, rule: str, got: str) -> None:
    if not holds:
        raise InputError(f"{path}: tensor {tensor!r} {rule}, got {got}")
