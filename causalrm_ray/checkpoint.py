"""Folders that are complete or absent: written under a temporary name with a manifest of hashes, renamed, verified on reading."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

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
    """What `write_json` wrote. Raises InputError for a file that is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} must be JSON: {error}") from error


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; on a clean exit it becomes `path`, with a manifest of hashes; on an error nothing is left."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in _files(partial):
            _flush(partial / file)
        write_json(partial / MANIFEST, {file: _sha256(partial / file) for file in _files(partial)})
        shutil.rmtree(path, ignore_errors=True)
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _flush(path.parent)


def verify_folder(path: Path) -> None:
    """Raise CheckpointError, naming the file, unless `path` holds exactly what its manifest says."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{path} has no {MANIFEST}: it was never completed")
    try:
        expected = read_json(manifest)
    except InputError as error:
        raise CheckpointError(str(error)) from error
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


def refresh_manifest(file: Path) -> None:
    """A file was changed on purpose: write its hash into the manifest of its folder, if there is one."""
    manifest = file.parent / MANIFEST
    if manifest.is_file():
        write_json(manifest, {**read_json(manifest), file.name: _sha256(file)})


def cached_folder(path: Path, fill: Callable[[Path], object]) -> Path:
    """`path`, filled by `fill` unless it is there and verifies; concurrent callers fill it once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        try:
            verify_folder(path)
        except CheckpointError:
            with atomic_folder(path) as draft:
                fill(draft)
    return path


def step_of(path: Path) -> int:
    """N of a folder `step-N`."""
    return int(path.name.removeprefix("step-"))


def steps(folder: Path) -> list[Path]:
    """Every `step-N` below `folder`, by N."""
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdigit()), key=step_of)


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest `step-N` below `folder` that verifies, and the fault of each newer one."""
    faults: list[str] = []
    for path in reversed(steps(folder)):
        try:
            verify_folder(path)
        except CheckpointError as error:
            faults.append(str(error))
        else:
            return path, faults
    return None, faults


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
