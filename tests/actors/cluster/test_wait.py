"""A role that hangs or dies is named, with the phase, within its time-out; those that answered are not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.cluster.place import Placement, place
from actors.cluster.runtime import object_store_bytes
from actors.cluster.wait import resolve, resolve_all, stream
from actors.errors import EngineDeadError, RoleDiedError, RoleTimeoutError, StrandedError


class Worker:
    """Answers, hangs, fails or dies, as it is asked."""

    def fail(self, error: Exception) -> None:
        raise error

    def answer(self) -> int:
        return 7

    def hang(self) -> None:
        threading.Event().wait()

    def die(self) -> None:
        os._exit(1)

    def parts(self, hangs: bool) -> Iterator[int]:
        yield 1
        if hangs:
            threading.Event().wait()


@pytest.fixture
def workers(ray_cluster: None) -> Iterator[dict[str, Any]]:
    """Three roles, started."""
    found = {name: place(Worker, Placement(name)) for name in ("generator-0", "generator-1", "reward")}
    resolve([worker.answer.remote() for worker in found.values()], "start", 60.0)
    yield found
    for worker in found.values():
        ray.kill(worker)


def test_a_role_that_hangs_is_named_and_the_others_are_not(workers: dict[str, Any]) -> None:
    refs = [workers["generator-0"].answer.remote(), workers["reward"].hang.remote(), workers["generator-1"].hang.remote()]
    resolve(refs[0], "answer", 60.0)
    with pytest.raises(RoleTimeoutError, match=r"^score: no answer from reward, generator-1 within cluster.timeout_s=0\.5 s$"):
        resolve(refs, "score", 0.5)
    with pytest.raises(RoleTimeoutError, match=r"^load: no answer from reward within"):
        resolve(refs[1], "load", 0.5)


def test_a_stream_that_stands_still_is_named(workers: dict[str, Any]) -> None:
    calls = {
        name: workers[name].parts.options(num_returns="streaming").remote(name == "generator-1")
        for name in ("generator-0", "generator-1")
    }
    items = stream(calls, "generate", 5.0)
    assert sorted([next(items), next(items)]) == [("generator-0", 1), ("generator-1", 1)]
    with pytest.raises(RoleTimeoutError, match=r"^generate: no answer from generator-1 within"):
        next(items)


def test_a_role_that_dies_is_named(workers: dict[str, Any]) -> None:
    with pytest.raises(RoleDiedError, match=r"^update policy: the process of generator-1 died"):
        resolve([workers["generator-0"].answer.remote(), workers["generator-1"].die.remote()], "update policy", 60.0)


def test_of_all_who_failed_together_the_dead_are_named_first(workers: dict[str, Any]) -> None:
    first, second, reward = workers.values()
    lost = second.fail.remote(ConnectionResetError("peer gone"))
    with pytest.raises(RoleTimeoutError, match=r"^sync \(generator-1\): ConnectionResetError: peer gone$"):
        resolve_all({"generator-0": first.answer.remote(), "generator-1": lost}, "sync", 60.0)
    with pytest.raises(RuntimeError, match=r"^sync \(reward\): ValueError: damaged$") as damaged:
        resolve_all({"reward": reward.fail.remote(ValueError("damaged")), "generator-0": first.answer.remote()}, "sync", 60.0)
    assert "in fail" in str(damaged.value.__cause__)  # where it was raised
    stranded = second.fail.remote(StrandedError("peer gone"))
    with pytest.raises(RuntimeError, match=r"^sync \(reward\): ValueError: damaged\nsync \(generator-1\): peer gone$") as own:
        resolve_all({"generator-1": stranded, "reward": reward.fail.remote(ValueError("damaged"))}, "sync", 60.0)
    assert not isinstance(own.value, RoleDiedError)
    with pytest.raises(RoleTimeoutError, match="peer gone"):
        resolve_all({"generator-1": stranded}, "sync", 60.0)
    dead = first.fail.remote(EngineDeadError("out of memory"))
    with pytest.raises(RoleDiedError, match="out of memory") as engine:
        resolve_all({"generator-1": stranded, "generator-0": dead}, "sync", 60.0)
    assert engine.value.roles == ("generator-0", "generator-1")
    calls = {"reward": reward.hang.remote(), "generator-1": lost, "generator-0": first.die.remote()}
    with pytest.raises(RoleDiedError, match=r"^sync \(generator-0\): the process of generator-0 died") as died:
        resolve_all(calls, "sync", 5.0)
    assert died.value.roles == ("generator-0", "reward", "generator-1")
    assert "no answer from reward" in str(died.value)


ON_THREE_NODES = """
import pathlib, sys
import ray
from actors.cluster.local_cluster import LocalCluster
from actors.cluster.place import Placement, place
from actors.cluster.runtime import ray_cluster
from actors.cluster.wait import resolve
from causalrm_ray.config.base import ClusterConfig

class Where:
    def node(self):
        return ray.get_runtime_context().get_node_id()

cache = pathlib.Path(sys.argv[1])
with LocalCluster(3, cache) as cluster, ray_cluster(ClusterConfig(address=cluster.address), cache):
    anywhere = resolve([place(Where, Placement()).node.remote() for number in range(3)], "ask", 60.0)
    beside = resolve([place(Where, Placement(beside_driver=True)).node.remote() for number in range(2)], "ask", 60.0)
    print(len(set(anywhere)), set(beside) == {ray.get_runtime_context().get_node_id()})
"""


def test_roles_go_to_the_nodes_in_turn(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ON_THREE_NODES, str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.split()) == (0, ["3", "True"]), done.stderr[-2000:]


@pytest.mark.parametrize(
    ("memory_gib", "shared_gib", "store_gib"),
    [
        (80, 40, 8),  # a tenth of the memory
        (80, 6, 3),  # half of what is free in /dev/shm: a container that was given some
        (80, 1 / 16, 0.5),  # one that was not, which has 64 MiB: never less than the least
        (4, 2, 0.5),
    ],
)
def test_the_object_store_grows_with_the_machine(memory_gib: float, shared_gib: float, store_gib: float) -> None:
    assert object_store_bytes(int(memory_gib * 2**30), int(shared_gib * 2**30)) == int(store_gib * 2**30)
