"""Embeddings come in as they were stored, and a faulty file is refused by file, tensor, rule and value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from causalrm_ray.data.embeddings import load_embeddings, load_pair, write_embeddings
from causalrm_ray.errors import InputError

GOOD = {"embeddings": torch.arange(6.0).reshape(3, 2), "labels": torch.tensor([0.0, 2.0, 4.0])}


def write(path: Path, **tensors: Tensor) -> Path:
    save_file({**GOOD, **tensors}, path)
    return path


@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
@pytest.mark.parametrize("labels", [torch.tensor([0.0, 2.0, 4.0]), torch.tensor([0, 2, 4])])
def test_tensors_come_in_as_stored(kind: torch.dtype, labels: Tensor, tmp_path: Path) -> None:
    data = load_embeddings(
        write(tmp_path / "a.safetensors", embeddings=GOOD["embeddings"].to(kind), labels=labels, score=torch.zeros(1))
    )
    assert len(data) == 3
    assert torch.equal(data.features, GOOD["embeddings"].to(kind))
    assert data.levels.dtype == torch.float32
    assert data.levels.tolist() == [0.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"embeddings": torch.zeros(3)}, r"tensor 'embeddings' must be \[N, D\], got shape \[3\]"),
        ({"embeddings": torch.zeros(0, 2)}, r"tensor 'embeddings' must hold rows and columns, got shape \[0, 2\]"),
        ({"embeddings": torch.zeros(3, 2).double()}, "tensor 'embeddings' must be float16 or float32, got torch.float64"),
        ({"embeddings": torch.full((3, 2), torch.nan)}, "tensor embeddings must be finite, got nan at position 0"),
        (
            {"labels": torch.zeros(2)},
            r"tensor 'labels' must be \[N\], one for each of the 3 rows of 'embeddings', got shape \[2\]",
        ),
        ({"labels": torch.zeros(3, 1)}, r"tensor 'labels' must be \[N\].*, got shape \[3, 1\]"),
        ({"labels": torch.tensor([True, False, True])}, "tensor 'labels' must be numbers, got torch.bool"),
        ({"labels": torch.tensor([0.0, torch.inf, 1.0])}, "tensor labels must be finite, got inf at position 1"),
        ({"labels": torch.ones(3)}, r"tensor 'labels' must hold at least two levels, got \[1.0\] in all 3 rows"),
        ({"prompts": torch.zeros(3)}, "tensor 'prompts' must be int64, got torch.float32"),
        (
            {"prompts": torch.tensor([0, 1])},
            r"tensor 'prompts' must be \[N\], one for each of the 3 rows of 'embeddings', got shape \[2\]",
        ),
    ],
)
def test_a_faulty_tensor_is_named_with_its_rule_and_value(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"bad\.safetensors: {message}"):
        load_embeddings(write(tmp_path / "bad.safetensors", **tensors))


def test_prompts_come_in_where_there_are_any_and_are_under_the_hash(tmp_path: Path) -> None:
    assert load_embeddings(write(tmp_path / "a.safetensors")).prompts is None
    features, levels, prompts = GOOD["embeddings"].numpy(), GOOD["labels"].numpy(), np.array([7, 0, 7])
    write_embeddings(tmp_path / "b.safetensors", features, levels, prompts)
    found = load_embeddings(tmp_path / "b.safetensors").prompts
    assert found is not None
    assert found.tolist() == [7, 0, 7]
    whole = (tmp_path / "b.safetensors").read_bytes()
    place = whole.index(prompts.tobytes())
    (tmp_path / "b.safetensors").write_bytes(whole[:place] + b"\x06" + whole[place + 1 :])  # 7 becomes 6
    with pytest.raises(InputError, match="its tensors must match the sha256 in its metadata"):
        load_embeddings(tmp_path / "b.safetensors")


def test_a_missing_tensor_is_named_with_what_is_there(tmp_path: Path) -> None:
    save_file({"features": torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"a\.safetensors: tensor 'embeddings' must be there, got only \['features'\]"):
        load_embeddings(tmp_path / "a.safetensors")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.safetensors: no such file"):
        load_embeddings(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello, this is no header", encoding="utf-8")
    with pytest.raises(InputError, match=r"text\.safetensors: must be a readable \.safetensors file"):
        load_embeddings(tmp_path / "text.safetensors")


def test_splits_of_unequal_width_are_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "train.safetensors")
    test = write(tmp_path / "test.safetensors", embeddings=torch.zeros(3, 4))
    with pytest.raises(InputError, match=r"test\.safetensors: .*must have the 2 columns of .*train\.safetensors, got 4"):
        load_pair(train, test)
    first, second = load_pair(train, train)
    assert torch.equal(first.features, second.features)
