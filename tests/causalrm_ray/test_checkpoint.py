"""A folder is whole or absent, and an altered one is never read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from causalrm_ray.checkpoint import MANIFEST, CheckpointError, atomic_folder, newest_complete, verify_folder


def fill(path: Path, content: str = "weights") -> Path:
    with atomic_folder(path) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "a.txt").write_text(content, encoding="utf-8")
        (folder / "b.bin").write_bytes(bytes(range(256)))
    return path


def test_a_finished_folder_verifies(tmp_path: Path) -> None:
    verify_folder(fill(tmp_path / "step-1"))


def test_an_error_while_filling_leaves_nothing_and_keeps_the_old_folder(tmp_path: Path) -> None:
    path = fill(tmp_path / "step-1", "old")
    with pytest.raises(IsADirectoryError), atomic_folder(path) as folder:  # noqa: PT012 - the block is what is tested
        (folder / "a.txt").write_text("new", encoding="utf-8")
        folder.write_text("fails", encoding="utf-8")
    verify_folder(path)
    assert (path / "part" / "a.txt").read_text(encoding="utf-8") == "old"
    assert [child.name for child in tmp_path.iterdir()] == ["step-1"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "b.bin").write_bytes(bytes(range(255)) + b"\x00"),
        lambda path: (path / "b.bin").write_bytes(b""),
        lambda path: (path / "b.bin").unlink(),
        lambda path: (path / "extra").write_text("x", encoding="utf-8"),
        lambda path: (path / MANIFEST).unlink(),
        lambda path: (path / MANIFEST).write_text("{", encoding="utf-8"),
        lambda path: (path / MANIFEST).write_text("[]", encoding="utf-8"),
    ],
)
def test_a_damaged_folder_is_refused_and_the_newest_whole_one_found(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    whole, broken = fill(tmp_path / "step-2"), fill(tmp_path / "step-10")
    damage(broken)
    with pytest.raises(CheckpointError, match="step-10"):
        verify_folder(broken)
    found, passed_over = newest_complete(tmp_path)
    assert found == whole
    assert len(passed_over) == 1
    assert "step-10" in passed_over[0]


def test_a_folder_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    (tmp_path / "step-x").mkdir()
    assert newest_complete(tmp_path) == (None, [])
