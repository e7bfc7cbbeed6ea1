"""What the cluster has: cores, GPUs, memory."""

from __future__ import annotations

import os

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster.in_process import in_process


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
    import torch  # not at the top: a driver on a cluster does not need it

    return torch.cuda.get_device_properties(0).total_memory


def ray_resources() -> dict[str, float]:
    """What the cluster has: CPU, GPU, memory (bytes), nodes."""
    if in_process():
        import torch

        machine = {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count(), "memory": psutil.virtual_memory().total}
        return {**{key: float(value) for key, value in machine.items()}, "nodes": 1.0}
    totals = {key: value for key, value in ray.cluster_resources().items() if key in ("CPU", "GPU", "memory")}
    return {**totals, "nodes": float(len(ray.nodes()))}
