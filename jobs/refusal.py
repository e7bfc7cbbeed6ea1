"""How a job ends that cannot go on for a reason that we know: with one line that names it, in place of a traceback."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from rich.console import Console

from causalrm_ray.config import RunFolder

REFUSED = 2  # exit status: what was told or handed in cannot be used; trying again would not help
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WORDS = (  # of libraries that have words of their own for it: SQLite, torch's writer of archives
    *map(os.strerror, FULL),
    "database or disk is full",
    "PytorchStreamWriter failed writing",
    "unexpected pos",
)


def refuse(job: str, why: object) -> int:
    """Print why; returns the exit status."""
    Console(stderr=True).print(f"{job}: {why}", style="red", highlight=False, markup=False, soft_wrap=True)
    return REFUSED


def no_room(error: BaseException, run: RunFolder) -> str | None:
    """What to say where a full disk, or a quota, is behind an error, whoever met it and in whatever process; else none."""
    if not any(_is_full(cause) for cause in _causes(error)):
        return None
    return (
        f"no room to write, most likely under {run.path}: {error}\nNothing is half-written there. Make room, and go on with "
        "resume=true, or begin again if there is no checkpoint yet"
    )


def _is_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) in FULL or any(word in str(error) for word in WORDS)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__
