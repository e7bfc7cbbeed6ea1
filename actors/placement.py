"""The one place that turns classes and functions into Ray actors and tasks, starts Ray, and waits with a time-out by name."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
import transformers
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError, WorkerCrashedError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors.in_process import Handle
from actors.in_process import stream as stream_here
from causalrm_ray.checks import InputError
from causalrm_ray.config import IN_PROCESS, ClusterConfig

OBJECT_STORE_BYTES = 512 * 2**20  # of a local cluster: weights and completions of tiny models; a real cluster brings its own
QUIET = {"RAY_DEDUP_LOGS": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


_in_process: ContextVar[bool] = ContextVar("in_process", default=False)


class RoleDiedError(RuntimeError):
    """A role's process ended; the message names the role and what it was doing."""


class RoleTimeoutError(TimeoutError):
    """A role did not answer in time; the message names the role and the phase."""


@contextlib.contextmanager
def ray_cluster(config: ClusterConfig, cache: Path) -> Iterator[None]:
    """Join the cluster at `config.address`, or run one on this machine's loopback, with a token, while the block lasts.

    "in-process": no cluster at all; roles that are placed live in this process.
    """
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    logging.getLogger("ray").setLevel(logging.ERROR)
    if config.address == IN_PROCESS:
        previous = _in_process.set(True)
        transformers.utils.logging.disable_progress_bar()  # a bar per model: elsewhere they end in the roles' own logs
        try:
            yield
        finally:
            _in_process.reset(previous)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        return
    if config.address is None:
        _own_token(cache)
        ray.init(
            address="local",
            logging_level=logging.ERROR,
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            log_to_driver=False,  # what roles print stays in Ray's session folder; what they raise comes here
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
        )
    else:
        ray.init(address=config.address)
    try:
        yield
    finally:
        ray.shutdown()


def in_process() -> bool:
    """Whether roles live in this process, without Ray."""
    return _in_process.get()


def place(
    role: type,
    *args: Any,
    env: Mapping[str, str] | None = None,
    gpus: float = 0.0,
    concurrency: int = 1,
    beside_driver: bool = False,
    bundle: tuple[PlacementGroup, int] | None = None,
    **kwargs: Any,
) -> Any:
    """Start `role(*args, **kwargs)` as a Ray actor and return its handle.

    `concurrency` is the number of its methods that may run at once; `beside_driver` pins it to the driver's node; `bundle`
    seats it in that bundle of a placement group.
    """
    if in_process():
        os.environ.update(env or {})
        return Handle(role(*args, **kwargs))
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": gpus, "max_concurrency": concurrency}
    if env:
        options["runtime_env"] = {"env_vars": dict(env)}
    if beside_driver:
        node = ray.get_runtime_context().get_node_id()
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
    if bundle:
        group, index = bundle
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, index, placement_group_capture_child_tasks=False)
    return ray.remote(role).options(**options).remote(*args, **kwargs)


def resolve(refs: Any, phase: str, timeout_s: float) -> Any:
    """The value (or list of values) behind `refs`.

    Raises RoleTimeoutError or RoleDiedError that names the phase. A role's own error passes, an InputError in its plain form.
    """
    if in_process():
        return refs
    try:
        return ray.get(refs, timeout=timeout_s)
    except GetTimeoutError as error:
        raise RoleTimeoutError(f"{phase}: no answer within cluster.timeout_s={timeout_s:g} s") from error
    except (RayActorError, WorkerCrashedError) as error:
        raise RoleDiedError(f"{phase}: the role's process died: {error}") from error
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise


def resolve_all(refs: Mapping[str, Any], phase: str, timeout_s: float) -> dict[str, Any]:
    """The value behind each of `refs`, by the name of its role, within `timeout_s` for all; not in process.

    Where one role fails, those that work with it fail too, so all are heard: RoleDiedError if a process died, RoleTimeoutError
    if one is silent, else RuntimeError, each naming all that failed, the dead first.
    """
    until = time.monotonic() + timeout_s
    found: dict[str, Any] = {}
    died, late, failed = [], [], []
    for name, ref in refs.items():
        try:
            found[name] = resolve(ref, f"{phase} ({name})", max(0.0, until - time.monotonic()))
        except RoleDiedError as error:
            died.append(str(error))
        except RoleTimeoutError:
            late.append(f"{phase} ({name}): no answer within {timeout_s:g} s")
        except RayTaskError as error:
            failed.append(f"{phase} ({name}): {error.cause!r}")
    if died or late or failed:
        kind = RoleDiedError if died else RoleTimeoutError if late else RuntimeError
        raise kind("\n".join([*died, *late, *failed]))
    return found


def stream(calls: Mapping[str, Any], phase: str, timeout_s: float) -> Iterator[tuple[str, Any]]:
    """(name of the call, item) of several streaming calls, as each item becomes ready; within one call in its own order."""
    if in_process():
        yield from stream_here(calls)
        return
    names = {generator: name for name, generator in calls.items()}
    waiting: list[Any] = list(names)
    while waiting:
        found, waiting = ray.wait(waiting, num_returns=1, timeout=timeout_s)
        ready: list[Any] = found
        if not ready:
            raise RoleTimeoutError(f"{phase}: nothing new within cluster.timeout_s={timeout_s:g} s")
        generator = ready[0]
        reference = next(generator, None)
        if reference is not None:
            yield names[generator], resolve(reference, f"{phase} ({names[generator]})", timeout_s)
            waiting = [*waiting, generator]


def run_tasks(
    function: Callable[..., Any], calls: Mapping[str, Any], shared: Any, phase: str, timeout_s: float
) -> Iterator[tuple[str, Any]]:
    """(name of the call, function(argument, shared)) of every call, as each ends; as many run at once as the cluster has CPUs.

    `shared` is sent to each node once. What a task raises is raised here, as by `resolve`.
    """
    task = ray.remote(function).options(num_cpus=1)
    sent = ray.put(shared)
    names = {task.remote(argument, sent): name for name, argument in calls.items()}
    waiting = list(names)
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=timeout_s)
        if not ready:
            raise RoleTimeoutError(f"{phase}: nothing new within cluster.timeout_s={timeout_s:g} s")
        yield names[ready[0]], resolve(ready[0], f"{phase} ({names[ready[0]]})", timeout_s)


def rendezvous(bundle: tuple[PlacementGroup, int] | None) -> str:
    """Where processes can meet one that sits in `bundle`, or on the driver's node: "tcp://host:port", the port free now."""
    if in_process():
        return _meeting_point("127.0.0.1")
    if bundle is None:
        return _meeting_point()
    strategy = PlacementGroupSchedulingStrategy(*bundle)
    return ray.get(ray.remote(_meeting_point).options(num_cpus=0, scheduling_strategy=strategy).remote())


def _meeting_point(host: str | None = None) -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"tcp://{host or ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"


def _own_token(cache: Path) -> None:
    """Give the clusters that we start a token of their own: Ray would share ~/.ray/auth_token with all others."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    path = cache.expanduser().resolve() / "ray_auth_token"
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    with contextlib.suppress(FileExistsError):
        os.link(aside, path)  # whole or not at all, and the first of several starters wins
    aside.unlink()
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


def reserve(bundles: Sequence[int], timeout_s: float) -> PlacementGroup | None:
    """Groups of so many GPUs each, every group on one node, packed on few; none where none is asked for.

    Raises RoleTimeoutError where others hold them.
    """
    if not bundles or in_process():
        return None
    group = placement_group([{"GPU": gpus} for gpus in bundles], strategy="PACK")
    if not group.wait(timeout_s):
        raise RoleTimeoutError(
            f"reserve GPUs: groups of {list(bundles)} were not free within cluster.timeout_s={timeout_s:g} s; "
            "see what holds them with `ray status`"
        )
    return group


def gpu_bytes() -> int:
    """Memory of the cluster's smallest GPU, by asking one GPU of each node that has any."""
    if in_process():
        return _device_bytes()
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    asked = [
        ray.remote(_device_bytes).options(num_gpus=0.01, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        for node in nodes
    ]
    return min(ray.get([task.remote() for task in asked]))


def _device_bytes() -> int:
    return torch.cuda.get_device_properties(0).total_memory


def ray_resources() -> dict[str, float]:
    """What the cluster has: CPU, GPU, memory (bytes), nodes."""
    if in_process():
        machine = {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count(), "memory": psutil.virtual_memory().total}
        return {**{key: float(value) for key, value in machine.items()}, "nodes": 1.0}
    totals = {key: value for key, value in ray.cluster_resources().items() if key in ("CPU", "GPU", "memory")}
    return {**totals, "nodes": float(len(ray.nodes()))}
