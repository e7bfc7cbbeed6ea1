"""A Ray cluster of several raylets on this machine's loopback, and its processes as one who kills them sees them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from actors.cluster.runtime import OBJECT_STORE_BYTES, own_token

LOOPBACK = "127.0.0.2"  # for 127.0.0.1 Ray's drivers take the machine's outer address
TITLES = {  # how Ray names the process of a role
    "generator": "ray::Generator",
    "reward": "ray::RewardActor",
    "propensity": "ray::PropensityActor",
    "log": "ray::FeedbackRole",
    "users": "ray::UsersRole",
    "train worker": "ray::RayTrainWorker",
    "learner": "ray::LearnerRank",
}


class LocalCluster:
    """`nodes` raylets, the first with the head; a token keeps others out."""

    def __init__(self, nodes: int, cache: Path) -> None:
        own_token(cache)
        self._options = {"num_cpus": 2, "object_store_memory": OBJECT_STORE_BYTES, "node_ip_address": LOOPBACK}
        self._nodes = nodes
        self._cluster = self._start()

    def _start(self) -> Cluster:
        cluster = Cluster(initialize_head=True, head_node_args={**self._options, "include_dashboard": False})
        for _ in range(self._nodes - 1):
            cluster.add_node(**self._options)
        return cluster

    @property
    def address(self) -> str:
        """Where a driver joins."""
        return str(self._cluster.address)

    def processes(self, role: str) -> list[psutil.Process]:
        """Processes of a role, a key of TITLES, that live on this cluster's nodes."""
        found = []
        for raylet in self._raylets():
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [process for process in raylet.children() if _title(process).startswith(TITLES[role])]
        return found

    def lose_node(self) -> None:
        """Kill a node, its raylet and with it all roles on it, other than the head's; another one takes its place."""
        node = sorted(self._cluster.worker_nodes, key=lambda node: node.node_id)[0]
        self._cluster.remove_node(node, allow_graceful=False)
        self._cluster.add_node(**self._options)

    def lose_all(self) -> None:
        """Kill every node, the head's too, and all roles; another cluster takes its place, at another address."""
        roles = [process for raylet in self._raylets() for process in raylet.children(recursive=True)]
        for node in self._all_nodes():
            self._cluster.remove_node(node, allow_graceful=False)
        for process in roles:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(roles)
        self._cluster.shutdown()
        self._cluster = self._start()

    def shutdown(self) -> None:
        """End all that was started."""
        self._cluster.shutdown()

    def _all_nodes(self) -> list[Any]:
        return [*self._cluster.worker_nodes, self._cluster.head_node]

    def _raylets(self) -> Iterator[psutil.Process]:
        for node in self._all_nodes():
            for info in node.all_processes.get("raylet", []):
                with contextlib.suppress(psutil.NoSuchProcess):
                    yield psutil.Process(info.process.pid)


@contextlib.contextmanager
def local_cluster(nodes: int, cache: Path) -> Iterator[LocalCluster]:
    """A LocalCluster while the block lasts."""
    cluster = LocalCluster(nodes, cache)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
