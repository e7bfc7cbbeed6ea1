"""Erase a user, or one impression, from the log and from a run's folder, for ever.

log, folder --who and what--> copies in the folder erased --> rows of the log removed, hashes of their ids kept
The log goes last: until then it knows what the copies are of, so that an interrupted command can be given again.
"""

from __future__ import annotations

import time
from contextlib import closing

from rich.console import Console

from causalrm_ray.config.forget import ForgetConfig
from causalrm_ray.config.options import load_config
from causalrm_ray.data.erasure import Forgotten, erase_copies, find_copies
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.data.states.cache import forget_states
from causalrm_ray.errors import InputError


def run(config: ForgetConfig) -> int:
    """Run the job."""
    folder = config.run.path
    file = folder / "config.yaml"
    if config.url is None and not file.exists():
        raise InputError(f"run.name: {folder} holds no run; name one, or give the log's url")
    caches = {config.run.cache, *([load_config(file).run.cache] if file.exists() else [])}
    url = config.url or load_config(file).log_url
    with closing(FeedbackLog(url, {})) as log:
        found = log.find(config.user, config.impression)
        copies = find_copies(folder, config.user, found.ids)
        # Of other runs on the same log, what was forgotten before is known by its hash alone.
        forgotten = Forgotten(copies.ids | frozenset(found.ids), copies.prompts | found.prompts, config.user)
        erased = erase_copies(folder, forgotten)
        states = {cache: forget_states(cache, sorted(forgotten.ids)) for cache in sorted(caches)}
        impressions, events = log.forget(sorted(forgotten.ids), time.time())
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"forgotten: {impressions} impressions and {events} events of the log")
    for what, count in sorted(erased.items()):
        console.print(f"erased in {folder}: {count} {what}", markup=False)
    for cache, rows in states.items():
        console.print(f"erased in {cache}: {rows} rows of states", markup=False)
    if any(next(folder.rglob(f"{name}.safetensors"), None) for name in ("model", "head")):
        console.print("models that were fitted before still have learned from it: fit again to replace them")
    return 0
