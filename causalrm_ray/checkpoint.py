"""Folders that are whole or absent: written aside, hashed into a manifest, flushed, renamed into place, verified on reading."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from causalrm_ray.errors import InputError
from causalrm_ray.files import write_whole

MANIFEST = "manifest.json"


class CheckpointError(InputError):
    """A folder that is missing, incomplete or altered."""


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON so that a reader sees the old file or the new one, never a part."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """What `write_json` wrote. Raises InputError for a file that is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} must be JSON: {error}") from error


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; on a clean exit it becomes `path`, with a manifest of hashes; on an error nothing is left."""
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in _files(aside):
            _flush(aside / file)
        write_json(aside / MANIFEST, {file: _sha256(aside / file) for file in _files(aside)})
        shutil.rmtree(path, ignore_errors=True)
        aside.replace(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _flush(path.parent)


def verify_folder(path: Path) -> None:
    """Raise CheckpointError, naming the file, unless `path` holds exactly what its manifest says."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{path} has no {MANIFEST}: it was never completed")
    try:
        expected = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{manifest} is not JSON: {error}") from error
    if not isinstance(expected, dict):
        raise CheckpointError(f"{manifest} must map files to hashes, got {type(expected).__name__}")
    found = set(_files(path)) - {MANIFEST}
    if found != set(expected):
        raise CheckpointError(f"{path}: files differ from the manifest: {sorted(found ^ set(expected))}")
    for file, digest in expected.items():
        try:
            found_digest = _sha256(path / file)
        except OSError as error:
            raise CheckpointError(f"{path / file} cannot be read: {error}") from error
        if found_digest != digest:
            raise CheckpointError(f"{path / file} does not match its hash in {MANIFEST}")


def is_whole(path: Path) -> bool:
    """Whether `path` is there and verifies."""
    try:
        verify_folder(path)
    except CheckpointError:
        return False
    return True


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest `step-N` below `folder` that verifies, and why each newer one was passed over."""
    passed_over: list[str] = []
    steps = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    for path in sorted(steps, key=lambda path: int(path.name[5:]), reverse=True):
        try:
            verify_folder(path)
        except CheckpointError as error:
            passed_over.append(str(error))
        else:
            return path, passed_over
    return None, passed_over


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
