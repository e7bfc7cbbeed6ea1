"""A Ray cluster to work in: joined, started on this machine, or none at all."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import ray
from ray._common.utils import get_system_memory

from actors.cluster.in_process import enter_in_process
from actors.cluster.search_path import own_packages_first
from causalrm_ray.config.base import IN_PROCESS, ClusterConfig

OBJECT_STORE_BYTES = 512 * 2**20  # the least of a cluster of our own
QUIET = {"RAY_DEDUP_LOGS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@contextlib.contextmanager
def ray_cluster(config: ClusterConfig, cache: Path) -> Iterator[None]:
    """Join the cluster at `config.address`, or run one on this machine's loopback, with a token, while the block lasts.

    "in-process": no cluster at all; roles that are placed live in this process.
    """
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    logging.getLogger("ray").setLevel(logging.ERROR)
    if config.address == IN_PROCESS:
        import transformers  # not at the top: a driver on a cluster, and `doctor`, do not need it

        transformers.utils.logging.disable_progress_bar()  # a bar per model: elsewhere they end in the roles' own logs
        with enter_in_process():
            yield
        return
    if config.address is None:
        own_token(cache)
        ray.init(
            address="local",
            logging_level=logging.ERROR,
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            log_to_driver=False,  # what roles print stays in Ray's session folder; what they raise comes here
            object_store_memory=object_store_bytes(get_system_memory(), _shared_memory_bytes()),
            _node_ip_address="127.0.0.1",
            **own_packages_first(),
        )
    else:
        ray.init(address=config.address, logging_level=logging.ERROR, log_to_driver=False, **own_packages_first())
    try:
        yield
    finally:
        ray.shutdown()


def object_store_bytes(memory: int, shared: int) -> int:
    """Size of the object store on a machine (or in a container) with `memory` bytes, and `shared` free in /dev/shm.

    Weights pass through it, and a version is freed up to a second late. Above 70 % of it Ray collects garbage in all processes,
    half a second each time; what does not fit goes over the disk, 600 MB in seconds instead of tenths. Ray subtracts it from
    the memory that roles can be planned with, so it is no larger.
    """
    return max(OBJECT_STORE_BYTES, min(memory // 10, shared // 2))


def _shared_memory_bytes() -> int:
    folder = Path("/dev/shm")
    return psutil.disk_usage(str(folder)).free if folder.is_dir() else 0


def own_token(cache: Path) -> None:
    """Give the clusters that we start a token of their own: Ray would share ~/.ray/auth_token with all others."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    path = cache.expanduser().resolve() / "ray_auth_token"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent) as draft:  # readable by its owner only
        draft.write(secrets.token_hex(32))
        draft.flush()
        with contextlib.suppress(FileExistsError):
            os.link(draft.name, path)  # whole or not at all, and the first of several starters wins
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
