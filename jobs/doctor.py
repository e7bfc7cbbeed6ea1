"""Versions, devices, Ray, engines, and what to install where something is missing; with model=PATH, whether a model works."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import psutil
from rich.console import Console
from rich.table import Table

from actors.rollout.engine import Library
from causalrm_ray.config.train import EMBEDDED, Config
from causalrm_ray.errors import ConfigError, InputError
from causalrm_ray.registry import ENGINES

LIBRARIES = {  # what must import, whatever the engine
    "torch": Library(("torch",), "pip install torch"),
    "transformers": Library(("transformers",), "pip install transformers"),
    "ray": Library(("ray",), "pip install 'ray[default,train]'"),
    "deepspeed": Library(("deepspeed",), "pip install deepspeed"),
    "datasets": Library(("datasets",), "pip install datasets"),
    "peft": Library(("peft",), "pip install peft"),
}
ROLES = {"policy": ("generators", "learner"), "reward": ("log", "reward")}  # that run each model
BREAKS_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")


def run(config: Config) -> int:
    """Print the findings; 0 if every library works that the configuration needs, 1 otherwise. Of a model that is given: the same
    of the roles that would run it, and nothing else."""
    if {config.model.policy, config.model.reward} != {EMBEDDED}:
        return check_models(config)
    table = Table("what", "found", "to do", box=None, pad_edge=False)
    memory_gib = psutil.virtual_memory().total / 2**30
    table.add_row("python", f"{platform.python_version()} on {platform.machine()}", "")
    table.add_row(
        "machine", f"{os.cpu_count()} cores, {memory_gib:.0f} GiB, {shutil.disk_usage('.').free / 2**30:.0f} GiB free disk", ""
    )
    table.add_row("accelerator", ", ".join(_gpus()) or "none: CPU engines", "")
    with ThreadPoolExecutor(1) as beside:
        broken = broken_engines(*ENGINES.names())  # not the one that is configured: it was imported with the configuration
        engines = [config.rollout.engine, *(name for name in ENGINES.names() if name not in broken)]
        libraries = {**LIBRARIES, **engine_libraries(*engines)}
        failing = beside.submit(import_errors, libraries)
        resources = _cluster_resources(config)
    reasons = failing.result()
    faults = {}
    for name, (distributions, remedy) in libraries.items():
        found = next((f"{item} {version(item)}" for item in distributions if _installed(item)), "missing")
        table.add_row(name, found, remedy if name in reasons else "")
        if name in reasons:
            faults[name] = f"{name} cannot be imported ({reasons[name]}); {remedy}"
    table.add_row("rollout.engine", ", ".join(rollout_engines(faults, engines)) or "none", "")
    for name, reason in broken.items():
        table.add_row("", name, reason)
    needed = LIBRARIES.keys() | engine_libraries(config.rollout.engine)
    faults = {name: fault for name, fault in faults.items() if name in needed}  # other engines' are not needed here
    faults |= _check_conflicts(table)
    if resources:
        table.add_row("ray cluster", ", ".join(f"{key} {value:g}" for key, value in sorted(resources.items())), "")
    Console().print(table)
    for fault in faults.values():
        Console(stderr=True).print(fault, style="red", markup=False)
    return 1 if faults else 0


def check_models(config: Config) -> int:
    """Print of each role of the models that are given whether they work, and the memory that it would take on this machine; 0 if
    all do, 1 otherwise."""
    from causalrm_ray.models.checks.check import check_backbone, check_policy
    from causalrm_ray.models.text import load_tokenizer
    from jobs.support.prompts import Models, check_same_tokens, describe_adapters, find_model

    given = {"policy": config.model.policy, "reward": config.model.reward}
    checks = {"policy": partial(check_policy, engine=config.rollout.engine), "reward": check_backbone}
    table, faults, found = Table("model", "what it is", box=None), [], {}
    for use, name in given.items():
        if name == EMBEDDED:
            continue
        try:
            found[use] = find_model(config, name, template=config.model.chat_template)
            table.add_row(f"model.{use}", checks[use](found[use], config.model.max_length).summary())
        except InputError as error:
            faults.append(str(error))
            table.add_row(f"model.{use}", "does not work: see below")
    Console().print(table)
    if not faults:
        try:
            models = Models(found.get("policy", ""), found.get("reward", ""))
            if len(found) == 2:
                check_same_tokens(models, load_tokenizer(models.policy))
            if models.policy and (adapters := describe_adapters(config, models)):
                Console().print(adapters, soft_wrap=True)
            _show_memory(config, found)
        except (ConfigError, InputError) as error:
            faults.append(str(error))
    for fault in dict.fromkeys(faults):
        Console(stderr=True).print(fault, style="red", markup=False, highlight=False, soft_wrap=True)
    return 1 if faults else 0


def _show_memory(config: Config, found: Mapping[str, str]) -> None:
    """Print what each role would take on this machine. Raises ConfigError, saying what to change, where it is too much."""
    import torch

    from actors.placement_plan import GIB, make_plan
    from causalrm_ray.models.size import model_size

    gpus = torch.cuda.device_count()
    parts = [part for use, roles in ROLES.items() if use in found for part in roles]
    sizes = {use: model_size(model, config.learner.lora_targets) for use, model in found.items()}
    size = next(iter(sizes.values()))
    plan = make_plan(config, sizes.get("policy", size), sizes.get("reward", size), parts, gpus)
    table = Table("role", "model", "GiB", "where", box=None)
    for role, taken in plan.allocations.items():
        use = "policy" if role.startswith(("generator", "learner")) else "reward"
        table.add_row(role, f"model.{use}", f"{taken.bytes / GIB:.1f}", "GPU" if taken.gpus else "host")
    Console().print(table)
    on_gpu = min((torch.cuda.get_device_properties(number).total_memory for number in range(gpus)), default=0)
    plan.check_memory(psutil.virtual_memory().total, on_gpu)


def engine_libraries(*engines: str) -> dict[str, Library]:
    """What these engines import besides LIBRARIES."""
    return {name: library for engine in engines for name, library in ENGINES.load(engine).requires.items()}


def broken_engines(*engines: str) -> dict[str, str]:
    """Those, of other packages, whose class cannot be imported, and why."""
    broken = {}
    for name in engines:
        try:
            ENGINES.load(name)
        except ValueError as error:
            broken[name] = str(error)
    return broken


def import_errors(libraries: Collection[str]) -> dict[str, str]:
    """Those of `libraries` that cannot be imported, each with the reason. Each is tried in a process of its own, side by side:
    importing vLLM's CPU build changes torch for the process that does it."""
    with ThreadPoolExecutor() as pool:
        return {name: reason for name, reason in zip(libraries, pool.map(_import_error, libraries), strict=True) if reason}


def _import_error(name: str) -> str:
    """Why a library cannot be imported; empty if it can."""
    command = [sys.executable, "-P", "-c", f"import {name}"]
    probe = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return "" if probe.returncode == 0 else next(iter(probe.stderr.strip().splitlines()[-1:]), f"exit status {probe.returncode}")


def rollout_engines(faults: Collection[str], engines: Iterable[str]) -> list[str]:
    """Those of `engines` that rollout.engine may be here."""
    return [name for name in dict.fromkeys(engines) if not {"torch", "transformers", *engine_libraries(name)} & set(faults)]


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False).stdout
    return [line.split(" (UUID")[0] for line in listed.splitlines() if line.startswith("GPU")]


def _cluster_resources(config: Config) -> dict[str, float]:
    """What the cluster has; nothing where Ray is missing or broken, which `import_errors` names."""
    try:
        from actors.cluster.resources import ray_resources
        from actors.cluster.runtime import ray_cluster
    except ImportError:
        return {}
    with ray_cluster(config.cluster, config.run.cache):
        return ray_resources()


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
