"""How a job ends for a known reason: with one line that names it in place of a traceback, and without a half-made run."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator

from rich.console import Console

from causalrm_ray.config.base import RunFolder
from causalrm_ray.config.train import Config
from causalrm_ray.errors import ConfigError, InputError

REFUSED = 2  # exit status: options or input that cannot be used; trying again would not help
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WORDS = (  # with which libraries report it: the system's own, SQLite, torch's writer of archives
    *map(os.strerror, FULL),
    "database or disk is full",
    "PytorchStreamWriter failed writing",
    "unexpected pos",
)


def refuse(job: str, why: object) -> int:
    """Print why; returns the exit status."""
    Console(stderr=True).print(f"{job}: {why}", style="red", highlight=False, markup=False, soft_wrap=True)
    return REFUSED


@contextlib.contextmanager
def naming_full_disks(run: RunFolder) -> Iterator[None]:
    """Raise InputError for an error that a full disk, or a quota, caused in any process; every other error passes."""
    try:
        yield
    except Exception as error:  # each library has a class of its own for it: OSError, torch's, safetensors', SQLAlchemy's, Ray's
        for cause in _causes(error):
            if getattr(cause, "errno", None) in FULL or any(word in str(cause) for word in WORDS):
                raise InputError(
                    f"no room to write, most likely under {run.path}: {cause}\nNothing half-written will be read. Make room, "
                    "then continue with resume=true, or start again if there is no checkpoint yet"
                ) from error
        raise


@contextlib.contextmanager
def discarding_refused_import(config: Config) -> Iterator[None]:
    """Delete the run's own log, if this block began it, where the block ends in a refusal before a checkpoint or summary.

    The corrected command then finds no run under the name, and imports `feedback.source` again. What simulated users wrote is
    kept, and so is any log that was there before or is elsewhere. The run must be locked.
    """
    run = config.run.path
    names = ("feedback.db", "config.yaml", "snapshots", "segments") if config.feedback.source else ()
    began = [run / name for name in names if not (run / name).exists()]
    if run / "feedback.db" in began:
        began += [run / "feedback.db-wal", run / "feedback.db-shm"]
    try:
        yield
    except (ConfigError, InputError):
        if not any((run / mark).exists() for mark in ("checkpoints", "summary.json")):
            for path in began:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # quarantine.jsonl, or what a user put there, stays
                run.rmdir()
        raise


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error and its causes, the innermost first; Ray keeps what a role raised as the `cause` of an error of its own."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return found[::-1]
