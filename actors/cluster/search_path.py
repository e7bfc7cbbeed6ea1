"""Where Ray's workers look for our packages: beside this one first, whatever the driver's working folder holds.

Ray puts that folder in front of a worker's search path: a module of the user's named actors.py would take the place of ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ray.job_config import JobConfig

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("actors", "causalrm_ray", "jobs")


class _First(list[str]):
    """A search path whose own entries stay in front: Ray puts each entry, from the first on, in front of those before it."""

    def extend(self, entries: Iterable[str]) -> None:
        self[:0] = entries


def own_packages_first() -> dict[str, Any]:
    """Arguments of `ray.init` where the working folder holds modules with names of ours; none where it does not."""
    here = Path.cwd()
    if here == ROOT or not any((here / name).is_dir() or (here / f"{name}.py").is_file() for name in PACKAGES):
        return {}
    return {"job_config": JobConfig(_py_driver_sys_path=_First([str(ROOT)]))}
