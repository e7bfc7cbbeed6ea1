"""Starts all roles that a job needs, and what the driver holds of them.

start_roles --> Roles: stream     (a rollout as it streams: actors/streaming)
                       refitter   (propensity and reward: actors/refitting)
                       learner    (its ranks as one: actors/learner/group)
                       generators, publisher: the learner's weights on their way to the engines
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from actors.allocated import Allocated
from actors.cluster.environment import compute_env
from actors.cluster.in_process import in_process
from actors.cluster.place import Placement, place, rendezvous, reserve
from actors.cluster.resources import gpu_bytes, ray_resources
from actors.cluster.telemetry import event, record
from actors.cluster.wait import resolve
from actors.learner.group import LearnerGroup
from actors.learner.rank import LearnerRank
from actors.learner.shares import Sharder
from actors.placement_plan import Plan, Transport, make_plan
from actors.refitting import Refitter
from actors.rollout.engine import DEVICE_SHARE, EngineSettings
from actors.rollout.generator import Generator
from actors.rollout.generator_pool import Generators
from actors.start_reward import start_reward
from actors.streaming import RolloutStream
from actors.users import UsersRole
from actors.weights.publish import ByBroadcast, ByIpc, ByObject, Publisher
from causalrm_ray.config.train import Config
from causalrm_ray.data.log.clean import clean_source
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.models.size import model_size
from causalrm_ray.registry import ENGINES
from causalrm_ray.types import Completion, Request

ALL_ROLES = frozenset(("log", "users", "reward", "generators", "learner"))


@dataclass(frozen=True, slots=True)
class Roles:
    """The running roles. Every wait has a time-out and names the phase.

    A generator that dies is replaced (see Generators); the log, users, reward and propensity roles are restarted by Ray, and
    restore what they served. A learner's rank cannot be replaced: its death, like too many others, raises RoleDiedError,
    after which the run can go on from its checkpoint. What was not started is None, or holds no handles.
    """

    plan: Plan
    stream: RolloutStream
    refitter: Refitter
    learner: LearnerGroup
    generators: Generators
    publisher: Publisher
    reward: Any
    propensity: Any
    users: Any
    log: Any
    engines: Mapping[str, Any]  # what generators, learner and reward fits run on
    timeout_s: float

    def score(self, completions: Sequence[Completion], model: str | Path | None = None) -> np.ndarray:
        """Logits [N] of the serving reward model, or of `model`: a folder or hub id."""
        rows = [(done.prompt.token_ids, done.token_ids) for done in completions]
        if model is None:
            return resolve(self.reward.score.remote(rows), "score", self.timeout_s)[0]
        return resolve(self.reward.score_with.remote(str(model), rows), "score", self.timeout_s)

    def publish(self) -> dict[str, float]:
        """Give the learner's weights to every generator. Raises RuntimeError unless every checksum agrees."""
        reports = self.generators.publish(self.publisher)
        slowest = max(reports.values(), key=lambda report: report.seconds)
        record("sync_seconds", "learner", slowest.seconds)
        for name in ("learner", *reports):
            record("version", name, slowest.version)
        event("sync", "learner", version=slowest.version, bytes=slowest.bytes, seconds=slowest.seconds)
        return {
            "sync_bytes": float(slowest.bytes),
            "sync_seconds": slowest.seconds,
            "sync_gb_per_s": slowest.bytes / slowest.seconds / 1e9,
            "sync_checksum_ok": float(all(report.checksum_ok for report in reports.values())),
        }

    def engine_gaps(self, requests: Sequence[Request]) -> dict[str, float]:
        """Mean |difference|, nats per token, between each generator's log-probabilities and the learner's, on its answers to some
        requests."""
        probes = self.stream.probe(requests)
        gaps = {name: fmean(self.learner.gaps(completions).values()) for name, completions in probes.items()}
        event("engines", "learner", gaps=gaps)
        return gaps

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the learner's exact state and the policy under `folder`, and return which reward and propensity models serve."""
        self.learner.save(folder)
        return self.refitter.state()

    def load(self, folder: Path, serving: Mapping[str, Any]) -> None:
        """Restore the state that `save` wrote and returned; the folder's hashes must have been verified."""
        self.learner.load(folder)
        self.refitter.load(serving)
        self.publish()


def start_roles(
    config: Config,
    policy: str,
    reward: str,
    parts: Collection[str] = ALL_ROLES,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    on_replacement: Callable[[str], None] = lambda message: None,
    transport: Transport | None = None,
) -> Roles:
    """Start the roles named in `parts` and wait until each answers. `policy` and `reward` are model folders or hub ids.

    `on_plan` gets where they will run before the first of them starts, `on_replacement` a message for every generator that was
    replaced; `transport` overrules the plan's. Raises ConfigError where they do not fit, ValueError for a broadcast to what
    cannot receive one.
    """
    if transport == "broadcast":
        _check_broadcast(config)
    plan = plan_roles(config, policy, reward, parts)
    plan = replace(plan, transport=transport or plan.transport)
    on_plan(plan)
    allocated = Allocated(plan, reserve(plan.bundles, config.cluster.timeout_s))
    timeout_s, restarts = config.cluster.timeout_s, config.loop.max_failures
    log = users = propensity_role = reward_role = None
    features: dict[str, Any] = {}
    if "log" in parts:
        beside_driver = Placement("log", beside_driver=True, restarts=restarts)
        log = place(FeedbackLog, beside_driver, config.log_url, dict(config.feedback.signals), config.feedback.order)
    if "users" in parts:
        users = place(UsersRole, Placement("users", restarts=restarts), config.world, config.run.seed)
    if "reward" in parts:
        features, propensity_role, reward_role = start_reward(config, policy, reward, allocated)
    start, handles = partial(_start_generator, config, policy, allocated), {}
    if "generators" in parts:
        handles = {name: start(name) for name in (f"generator-{number}" for number in range(config.rollout.generators))}
    generators = Generators(config, handles, start, on_replacement)
    ranks = _start_learner(config, policy, allocated) if "learner" in parts else ()
    sharder = Sharder(config.learner, ranks=config.learner.ranks, seed=config.run.seed, max_length=config.model.max_length)
    learner = LearnerGroup(ranks, sharder, timeout_s)
    by_object = ByObject(learner.ranks, config.learner.lora > 0, timeout_s)
    refresh = by_object if learner.ranks else None
    others = {"reward": reward_role, "users": users, "log": log}
    return Roles(
        plan=plan,
        stream=RolloutStream(config.rollout, generators, learner, **others, refresh=refresh, timeout_s=timeout_s),
        refitter=Refitter(log, features, propensity_role, reward_role, config.run.path, timeout_s, clean_source(config.feedback)),
        learner=learner,
        generators=generators,
        publisher=_publisher(config, allocated, learner, by_object),
        propensity=propensity_role,
        engines=_await_start(config, generators, learner, reward_role),
        timeout_s=timeout_s,
        **others,
    )


def plan_roles(config: Config, policy: str, reward: str, parts: Collection[str] = ALL_ROLES) -> Plan:
    """Where the roles named in `parts` will run on the cluster that is joined. Raises ConfigError where they do not fit."""
    cluster = ray_resources()
    plan = make_plan(
        config, model_size(policy, config.learner.lora_targets), model_size(reward), parts, int(cluster.get("GPU", 0))
    )
    plan.check_memory(cluster["memory"], gpu_bytes() if plan.bundles else 0)
    return plan


def _start_generator(config: Config, policy: str, allocated: Allocated, role: str) -> Any:
    rollout, gpus = config.rollout, allocated.plan.allocations[role].gpus
    settings = EngineSettings(
        model=policy,
        max_length=config.model.max_length,
        dtype=config.model.dtype,
        cache=config.run.cache,
        timeout_s=config.cluster.timeout_s,
        buffer=rollout.buffer,
        tensor_parallel=rollout.tensor_parallel,
        gpu_memory=DEVICE_SHARE * min(1.0, gpus),
    )
    env = ENGINES.load(rollout.engine).process_env(policy, config.run.cache, gpu=gpus > 0)
    placement = allocated.placement(role, env=env, concurrency=2)  # weights come while answers stream
    return place(Generator, placement, rollout.engine, settings, rollout.sampling())


def _start_learner(config: Config, policy: str, allocated: Allocated) -> list[Any]:
    address = rendezvous(allocated.bundle("learner-0"), config.cluster.timeout_s)
    env = compute_env(allocated.on_gpu)
    return [
        place(
            LearnerRank,
            allocated.placement(f"learner-{rank}", env=env, beside_driver=rank == 0 and not allocated.on_gpu),
            policy,
            config.learner,
            rank=rank,
            world_size=config.learner.ranks,
            init_method=address,
            max_new_tokens=config.rollout.max_new_tokens,
            steps=config.loop.steps,
            seed=config.run.seed,
            dtype=getattr(torch, config.model.dtype),
            temperature=config.rollout.temperature,
        )
        for rank in range(config.learner.ranks)
    ]


def _publisher(config: Config, allocated: Allocated, learner: LearnerGroup, by_object: ByObject) -> Publisher:
    plan, timeout_s = allocated.plan, config.cluster.timeout_s
    if plan.transport == "ipc":
        return ByIpc(learner.ranks, plan.partners, timeout_s)
    if plan.transport == "broadcast":
        return ByBroadcast(learner.ranks, config.rollout.tensor_parallel, allocated.bundle("learner-0"), timeout_s)
    return by_object


def _await_start(config: Config, generators: Generators, learner: LearnerGroup, reward: Any) -> dict[str, Any]:
    """Wait for the roles with heavy engines; what each runs on."""
    engines: dict[str, Any] = {}
    if generators.handles:
        engines["rollout"] = generators.info()[0]
    if learner.ranks:
        engines["learner"] = learner.info()
    if reward:
        resolve(reward.state.remote(), "start reward", config.cluster.timeout_s)
        engines["reward"] = {"name": "ray-train", "version": version("ray"), "workers": config.reward.workers}
    return engines


def _check_broadcast(config: Config) -> None:
    receives = "broadcast" in ENGINES.load(config.rollout.engine).transports
    needs = {"a cluster": not in_process(), "a rollout.engine that receives broadcasts, such as vllm,": receives}
    needs |= {"learner.lora=0": not config.learner.lora}
    missing = [need for need, there in needs.items() if not there]
    if missing:
        raise ValueError(f"transport=broadcast needs {' and '.join(missing)}")
