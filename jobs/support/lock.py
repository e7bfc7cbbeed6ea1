"""One process at a time in a run's folder."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from causalrm_ray.config.base import RunFolder
from causalrm_ray.errors import InputError


@contextlib.contextmanager
def run_lock(run: RunFolder) -> Iterator[None]:
    """Keep this machine's other processes out of a run's folder while the block lasts; a killed process holds no lock.

    Raises InputError where another holds it, or where nothing can be written into the folders of the run.
    """
    check_writable("run.cache", run.cache)
    check_writable("run.dir", run.dir)
    lock = lock_of(run)
    Path(lock.lock_file).parent.mkdir(exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"run.name: another process works in {run.path}: wait until it ends, or choose another name") from None
    try:
        yield
    finally:
        lock.release()


def check_writable(option: str, folder: Path) -> None:
    """Raise InputError, naming the option, unless a file can be written into a folder, which is made where it is missing."""
    try:
        path = folder.expanduser()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: a ~ of a user without a home
        raise InputError(
            f"{option}: {folder} must be a folder that can be written: {error}; choose another: {option}=FOLDER"
        ) from error


def lock_of(run: RunFolder) -> FileLock:
    """The lock of a run's folder, a file in the cache."""
    name = hashlib.sha256(str(run.path).encode()).hexdigest()[:16]
    return FileLock(run.cache.expanduser() / "locks" / f"{name}.lock")
