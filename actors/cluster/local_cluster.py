"""A Ray cluster of several raylets on this machine's loopback, whose processes can be found and killed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from actors.cluster.runtime import OBJECT_STORE_BYTES, own_token

LOOPBACK = "127.0.0.2"  # Ray's drivers replace 127.0.0.1 by the machine's outer address
TITLES = {  # how Ray names the process of a role
    "generator": "ray::Generator",
    "reward": "ray::RewardActor",
    "propensity": "ray::PropensityActor",
    "log": "ray::FeedbackLog",
    "users": "ray::UsersRole",
    "train worker": "ray::RayTrainWorker",
    "learner": "ray::LearnerRank",
}


class LocalCluster(contextlib.AbstractContextManager["LocalCluster"]):
    """`nodes` raylets, the first with the head, while the block lasts; a token keeps others out."""

    def __init__(self, nodes: int, cache: Path) -> None:
        own_token(cache)
        self._options = {"num_cpus": 2, "object_store_memory": OBJECT_STORE_BYTES, "node_ip_address": LOOPBACK}
        self._nodes = nodes
        self._cluster = self._start()

    def __exit__(self, *error: object) -> None:
        self._cluster.shutdown()

    def _start(self) -> Cluster:
        cluster = Cluster(initialize_head=True, head_node_args={**self._options, "include_dashboard": False})
        for _ in range(self._nodes - 1):
            cluster.add_node(**self._options)
        return cluster

    @property
    def address(self) -> str:
        """The address that a driver connects to."""
        return str(self._cluster.address)

    def processes(self, role: str) -> list[psutil.Process]:
        """Processes of a role, a key of TITLES, on this cluster's nodes."""
        found = []
        for raylet in self._raylets():
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [process for process in raylet.children() if _has_title(process, TITLES[role])]
        return found

    def lose_node(self) -> None:
        """Kill a node other than the head's, with its raylet and all roles on it, and start another."""
        node = sorted(self._cluster.worker_nodes, key=lambda node: node.node_id)[0]
        self._cluster.remove_node(node, allow_graceful=False)
        self._cluster.add_node(**self._options)

    def lose_all(self) -> None:
        """Kill every node, the head's too, and all roles, and start another cluster, at another address."""
        roles = [process for raylet in self._raylets() for process in raylet.children(recursive=True)]
        for node in self._all_nodes():
            self._cluster.remove_node(node, allow_graceful=False)
        for process in roles:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(roles)
        self._cluster.shutdown()
        self._cluster = self._start()

    def _all_nodes(self) -> list[Any]:
        return [*self._cluster.worker_nodes, self._cluster.head_node]

    def _raylets(self) -> Iterator[psutil.Process]:
        for node in self._all_nodes():
            for info in node.all_processes.get("raylet", []):
                with contextlib.suppress(psutil.NoSuchProcess):
                    yield psutil.Process(info.process.pid)


def _has_title(process: psutil.Process, title: str) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline()).startswith(title)
    return False
