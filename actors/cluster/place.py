"""The one place that turns classes into Ray actors, and says where each runs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors.cluster.in_process import Handle, in_process
from actors.cluster.ports import free_port
from actors.cluster.wait import LABELS, resolve
from actors.errors import RoleTimeoutError

Bundle = tuple[PlacementGroup, int]  # a placement group and the index of a bundle in it
_placed = itertools.count()


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how the process of a role runs.

    label          its name in errors; empty: its class
    env            environment variables that it starts with
    gpus           GPUs, or a share of one, that it has
    concurrency    how many of its methods may run at once
    bundle         the bundle of a placement group that it runs in
    beside_driver  on the driver's node; without this or a bundle, roles without restarts go to the nodes in turn
    restarts       how often Ray may start it again after its death. Its pending calls are repeated then: its methods must
                   tolerate that, and its constructor restores what it served (see `restarted`)
    """

    label: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    gpus: float = 0.0
    concurrency: int = 1
    bundle: Bundle | None = None
    beside_driver: bool = False
    restarts: int = 0


def place(role: type, placement: Placement, *args: Any, **kwargs: Any) -> Any:
    """Start `role(*args, **kwargs)` as a Ray actor and return its handle."""
    if in_process():
        os.environ.update(placement.env)
        return Handle(role(*args, **kwargs))
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": placement.gpus, "max_concurrency": placement.concurrency}
    options |= {"max_restarts": placement.restarts, "max_task_retries": placement.restarts}
    if placement.env:
        options["runtime_env"] = {"env_vars": dict(placement.env)}
    if placement.bundle:
        group, index = placement.bundle
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, index, placement_group_capture_child_tasks=False)
    elif placement.beside_driver:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    elif not placement.restarts and (node := _next_node()):  # a role that Ray is to start again must not be bound to a node
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
    handle = ray.remote(role).options(**options).remote(*args, **kwargs)
    LABELS[handle._actor_id.hex()] = placement.label or role.__name__
    return handle


def _next_node() -> str | None:
    """Nodes with CPUs in turn; None if there is none now. Ray itself sends roles that reserve no CPU to nodes by chance."""
    nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
    return nodes[next(_placed) % len(nodes)] if nodes else None


def end(role: Any) -> None:
    """End the process behind a handle, if it still runs."""
    ray.kill(role)


def restarted() -> bool:
    """Whether this process is that of a role that had died."""
    context = ray.get_runtime_context() if ray.is_initialized() else None
    return context is not None and context.get_actor_id() is not None and bool(context.was_current_actor_reconstructed)


def rendezvous(bundle: Bundle | None, timeout_s: float) -> str:
    """Where processes can meet one that runs in `bundle`, or on the driver's node: "tcp://host:port", the port free now.

    Raises RoleTimeoutError where the bundle has no node any more.
    """
    if in_process():
        return _free_address("127.0.0.1")
    if bundle is None:
        return _free_address()
    strategy = PlacementGroupSchedulingStrategy(*bundle)
    asked = ray.remote(_free_address).options(num_cpus=0, scheduling_strategy=strategy).remote()
    return resolve(asked, "find a free port", timeout_s)


def _free_address(host: str | None = None) -> str:
    return f"tcp://{host or ray.util.get_node_ip_address()}:{free_port()}"


def reserve(bundles: Sequence[int], timeout_s: float) -> PlacementGroup | None:
    """A placement group with a bundle of each number of GPUs, every bundle on one node, packed on few; None if none is asked for.

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
