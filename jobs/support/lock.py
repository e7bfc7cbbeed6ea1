"""One process at a time in a run's folder."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from causalrm_ray.config.base import RunFolder
from causalrm_ray.errors import InputError


@contextlib.contextmanager
def run_lock(run: RunFolder) -> Iterator[None]:
    """Keep this machine's other processes out of a run's folder while the block lasts; a killed process holds no lock."""
    lock = lock_of(run)
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"run.name: another process works in {run.path}: wait until it ends, or choose another name") from None
    try:
        yield
    finally:
        lock.release()


def lock_of(run: RunFolder) -> FileLock:
    """The lock of a run's folder, a file in the cache."""
    name = hashlib.sha256(str(run.path).encode()).hexdigest()[:16]
    return FileLock(run.cache.expanduser() / "locks" / f"{name}.lock")
