"""Environment variables that the process of a role must start with."""

from __future__ import annotations

import ctypes

THREADS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

# What torch frees on the CPU stays with the process, at the size of its largest moment. Otherwise each step gives it back to the
# system and takes it again page by page, 200,000 faults and a fifth of a step's time for a model of 26M parameters.
KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}  # of glibc; other C libraries ignore them


def compute_env(gpu: bool) -> dict[str, str]:
    """For a role that trains or scores. On a GPU it needs the host's memory only once, to load a model."""
    return THREADS if gpu else THREADS | KEEP_FREED


def give_back_freed() -> None:
    """Give what a fit has freed back to the system, under glibc: other roles need it long before the next fit does."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
