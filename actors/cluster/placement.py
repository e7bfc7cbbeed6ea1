"""The one place that turns classes and functions into Ray actors and tasks, starts Ray, and waits with a time-out by name."""

from __future__ import annotations

import contextlib
import itertools
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
from ray._common.utils import get_system_memory
from ray.exceptions import (
    ActorUnschedulableError,
    GetTimeoutError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors.cluster.in_process import Handle
from actors.cluster.in_process import stream as stream_here
from actors.cluster.search_path import own_packages_first
from actors.cluster.telemetry import event, record
from actors.errors import EngineDeadError, RoleDiedError, RoleTimeoutError, StrandedError, WrongWeightsError
from causalrm_ray.config.base import IN_PROCESS, ClusterConfig
from causalrm_ray.errors import InputError

OBJECT_STORE_BYTES = 512 * 2**20  # the least of a cluster of our own
QUIET = {"RAY_DEDUP_LOGS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


_in_process: ContextVar[bool] = ContextVar("in_process", default=False)
_placed = itertools.count()
_labels: dict[str, str] = {}  # actor id (hex) -> role, of all that this process placed


@contextlib.contextmanager
def ray_cluster(config: ClusterConfig, cache: Path) -> Iterator[None]:
    """Join the cluster at `config.address`, or run one on this machine's loopback, with a token, while the block lasts.

    "in-process": no cluster at all; roles that are placed live in this process.
    """
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    logging.getLogger("ray").setLevel(logging.ERROR)
    if config.address == IN_PROCESS:
        with _without_ray():
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


@contextlib.contextmanager
def _without_ray() -> Iterator[None]:
    """Roles that are placed while the block lasts live in this process."""
    import torch  # not at the top: a driver on a cluster, and `doctor`, do not need it
    import transformers

    previous = _in_process.set(True)
    transformers.utils.logging.disable_progress_bar()  # a bar per model: elsewhere they end in the roles' own logs
    try:
        yield
    finally:
        _in_process.reset(previous)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def object_store_bytes(memory: int, shared: int) -> int:
    """Size of the object store on a machine (or in a container) of so many bytes of memory, with `shared` free in /dev/shm.

    Weights pass through it, and a version is freed up to a second late. Above 70 % of it Ray collects garbage in all processes,
    half a second each time; what does not fit goes over the disk, 600 MB in seconds instead of tenths. Ray keeps it back from
    the memory that roles can be planned with, so it is no larger.
    """
    return max(OBJECT_STORE_BYTES, min(memory // 10, shared // 2))


def _shared_memory_bytes() -> int:
    folder = Path("/dev/shm")
    return psutil.disk_usage(str(folder)).free if folder.is_dir() else 0


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
    restarts: int = 0,
    label: str | None = None,
    **kwargs: Any,
) -> Any:
    """Start `role(*args, **kwargs)` as a Ray actor and return its handle.

    `concurrency` is the number of its methods that may run at once; `beside_driver` pins it to the driver's node; `bundle`
    places it in that bundle of a placement group; without either, roles without restarts go to the nodes in turn. `label` is the
    name in errors (none: its class). A role that dies is started again up to `restarts` times, and what it was asked is asked
    again: its methods must bear that, and its constructor find what it knew (see `restarted`).
    """
    if in_process():
        os.environ.update(env or {})
        return Handle(role(*args, **kwargs))
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": gpus, "max_concurrency": concurrency}
    options |= {"max_restarts": restarts, "max_task_retries": restarts}
    if env:
        options["runtime_env"] = {"env_vars": dict(env)}
    if bundle:
        group, index = bundle
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, index, placement_group_capture_child_tasks=False)
    elif beside_driver:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    elif not restarts and (node := _next_node()):  # a role that Ray is to start again must not be bound to a node
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
    handle = ray.remote(role).options(**options).remote(*args, **kwargs)
    _labels[handle._actor_id.hex()] = label or role.__name__
    return handle


def _next_node() -> str | None:
    """Nodes with CPUs in turn; none where there is none now. Ray itself sends roles that reserve no CPU to nodes by chance."""
    nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
    return nodes[next(_placed) % len(nodes)] if nodes else None


def end(role: Any) -> None:
    """End the process behind a handle, if it still runs."""
    ray.kill(role)


def restarted() -> bool:
    """Whether this process is that of a role that had died."""
    context = ray.get_runtime_context() if ray.is_initialized() else None
    return context is not None and context.get_actor_id() is not None and bool(context.was_current_actor_reconstructed)


def resolve(refs: Any, phase: str, timeout_s: float) -> Any:
    """The value (or list of values) behind `refs`.

    Raises RoleTimeoutError or RoleDiedError that names the phase and the roles that have not answered, or died, or whose engine
    did. A role's own error passes, an InputError in its plain form.
    """
    if in_process():
        return refs
    try:
        return ray.get(refs, timeout=timeout_s)
    except GetTimeoutError as error:
        raise _late(phase, _silent(refs), timeout_s) from error
    except ObjectLostError as error:  # of an argument, too: then it is a RayTaskError besides
        raise _death([], f"{phase}: what a role had made was lost with its node: {error}") from error
    except (ActorUnschedulableError, TaskUnschedulableError) as error:  # its node died before it could start there
        raise _death(_known(refs), f"{phase}: {error}") from error
    except (RayActorError, WorkerCrashedError) as error:
        role = _labels.get(getattr(error, "actor_id", None) or "")
        name = role or "a role"
        raise _death([role] if role else [], f"{phase}: the process of {name} died: {error}") from error
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        if isinstance(error.cause, EngineDeadError) and not isinstance(error.cause, WrongWeightsError):
            raise _death(_known(refs), f"{phase}: {error.cause}") from error
        raise


def resolve_all(refs: Mapping[str, Any], phase: str, timeout_s: float) -> dict[str, Any]:
    """The value behind each of `refs`, by the name of its role, within `timeout_s` for all.

    Where one role fails, those that work with it fail too, so all are heard: RoleDiedError if a process or an engine died,
    RuntimeError if a role failed otherwise, RoleTimeoutError if they are but silent, waited in vain or lost their peers; each
    names all, the dead first.
    """
    until = time.monotonic() + timeout_s
    found: dict[str, Any] = {}
    died, failed, late = {}, {}, {}
    first: Exception | None = None
    for name, ref in refs.items():
        try:
            found[name] = resolve(ref, f"{phase} ({name})", max(0.0, until - time.monotonic()))
        except RoleDiedError as error:
            stranded = isinstance(getattr(error.__cause__, "cause", None), StrandedError)
            (late if stranded else died)[error.roles[0] if error.roles else name] = str(error)
            first = first or error
        except RoleTimeoutError as error:
            late[name] = str(error)
            first = first or error
        except RayTaskError as error:
            kind = late if isinstance(error.cause, ConnectionError | TimeoutError) else failed
            kind[name] = f"{phase} ({name}): {type(error.cause).__name__}: {error.cause}"
            first = first or error
    unusable = {**died, **failed, **late}
    message = "\n".join(unusable.values())
    if died:
        raise RoleDiedError(message, [*died, *(name for name in refs if name in unusable and name not in died)]) from first
    if unusable:
        raise (RuntimeError if failed else RoleTimeoutError)(message) from first
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
            raise _late(phase, [names[generator] for generator in waiting], timeout_s)
        generator = ready[0]
        reference = next(generator, None)
        if reference is not None:
            name = names[generator]
            yield name, resolve(reference, f"{phase} ({name})", timeout_s)
            waiting = [*waiting, generator]


def _silent(refs: Any) -> list[str]:
    """The roles behind those of `refs` that are not there yet."""
    distinct = list(dict.fromkeys(refs if isinstance(refs, list) else [refs]))
    _, pending = ray.wait(distinct, num_returns=len(distinct), timeout=0)
    return list(dict.fromkeys(map(_label, pending)))


def _known(refs: Any) -> list[str]:
    """The role behind a single reference; which one of a list failed, Ray does not tell."""
    return [] if isinstance(refs, list) else [_label(refs)]


def _death(roles: Sequence[str], message: str) -> RoleDiedError:
    return RoleDiedError(_failed(roles or ["a role"], message), roles)


def _label(ref: Any) -> str:
    """The role whose method is behind a reference."""
    return _labels.get(ref.task_id().actor_id().hex(), "a task")


def _late(phase: str, roles: Sequence[str], timeout_s: float) -> Exception:
    shown = ", ".join(roles[:8]) + (f" and {len(roles) - 8} more" if len(roles) > 8 else "")
    return RoleTimeoutError(_failed(roles, f"{phase}: no answer from {shown} within cluster.timeout_s={timeout_s:g} s"))


def _failed(roles: Sequence[str], message: str) -> str:
    """The message, which is recorded, too."""
    for role in roles:
        record("failures", role, 1)
        event("failure", role, logging.ERROR, error=message)
    return message


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
            raise _late(phase, [names[reference] for reference in waiting], timeout_s)
        yield names[ready[0]], resolve(ready[0], f"{phase} ({names[ready[0]]})", timeout_s)


def rendezvous(bundle: tuple[PlacementGroup, int] | None, timeout_s: float) -> str:
    """Where processes can meet one that sits in `bundle`, or on the driver's node: "tcp://host:port", the port free now.

    Raises RoleTimeoutError where the bundle has no node any more.
    """
    if in_process():
        return _meeting_point("127.0.0.1")
    if bundle is None:
        return _meeting_point()
    strategy = PlacementGroupSchedulingStrategy(*bundle)
    asked = ray.remote(_meeting_point).options(num_cpus=0, scheduling_strategy=strategy).remote()
    return resolve(asked, "find a free port", timeout_s)


def _meeting_point(host: str | None = None) -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"tcp://{host or ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"


def own_token(cache: Path) -> None:
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
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def ray_resources() -> dict[str, float]:
    """What the cluster has: CPU, GPU, memory (bytes), nodes."""
    if in_process():
        import torch

        machine = {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count(), "memory": psutil.virtual_memory().total}
        return {**{key: float(value) for key, value in machine.items()}, "nodes": 1.0}
    totals = {key: value for key, value in ray.cluster_resources().items() if key in ("CPU", "GPU", "memory")}
    return {**totals, "nodes": float(len(ray.nodes()))}
