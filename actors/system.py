"""The running roles, and what the driver asks of them.

    requests -> generators ==========micro-batches as each is full==========+-> reward.score  ----------> rewards
               (one stream each, in its own order)                          +-> learner.prepare            |
                                                                            +-> users.react -> log.append  |
    update <- answers in request order <-------------------------------------------------------------------+

A micro-batch holds completions of one generator in the order in which that generator finished them, which depends on its
requests alone: so scores and prepared values repeat to the bit, however the streams interleave. At most `rollout.buffer`
completions are between two stages; when that many wait, the driver stops reading the streams, and each generator stops at
its own bound.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.cluster.environment import compute_env
from actors.cluster.placement import gpu_bytes, in_process, place, ray_resources, rendezvous, reserve, resolve
from actors.cluster.telemetry import DRIVER, event, record
from actors.feedback import FeedbackRole
from actors.learner.rank import LearnerRank
from actors.plan import Plan, Transport, make_plan
from actors.reward.fit_spec import BATCH_SIZE, PROPENSITY_EPOCHS
from actors.reward.propensity import PropensityActor, read_propensities
from actors.reward.role import RewardActor
from actors.rollout.engine import DEVICE_SHARE, EngineSettings
from actors.rollout.generator import Generator, engine_env
from actors.rollout.generators import Call, Generators
from actors.users import UsersRole
from actors.weights.publish import ByBroadcast, ByIpc, ByObject, Publisher
from causalrm_ray.config.train import Config
from causalrm_ray.estimators.core.training import FitSettings
from causalrm_ray.models.size import model_size
from causalrm_ray.types import Completion, Impression, Request, Scored

ALL_ROLES = frozenset(("log", "users", "reward", "generators", "learner"))

Show = Callable[[Sequence[Completion]], list[Impression]]


class Roles:
    """Handles on all running roles. Every wait has a time-out and names the phase.

    A generator that dies is replaced (see Generators); the log, users, reward and propensity roles are restarted by Ray, and
    find again what they served. A learner's rank cannot be replaced: its death, like too many others, raises RoleDiedError,
    after which the run can go on from its checkpoint.
    """

    def __init__(
        self,
        config: Config,
        policy: str,
        reward: str,
        parts: Collection[str] = ALL_ROLES,
        announce: Callable[[Plan], None] = lambda plan: None,
        tell: Callable[[str], None] = lambda event: None,
        transport: Transport | None = None,
    ) -> None:
        """Start the roles named in `parts` and wait until each answers. `policy` and `reward` are model folders or hub ids.

        `announce` is told where they will run before the first of them starts, `tell` of every role that was replaced;
        `transport` overrules the plan's. Raises ConfigError where they do not fit, ValueError for a broadcast to what cannot
        receive one.
        """
        if transport == "broadcast":
            _check_broadcast(config)
        self.plan = plan_roles(config, policy, reward, parts)
        self.plan = replace(self.plan, transport=transport or self.plan.transport)
        announce(self.plan)
        self._bundles = reserve(self.plan.bundles, config.cluster.timeout_s)
        self._config, self._policy = config, policy
        self._folder = config.run.path
        self._timeout_s = config.cluster.timeout_s
        self._propensity_folder: Path | None = None
        self._begun: tuple[str, dict[str, Call]] | None = None
        self._preparing: list[Any] = []  # what the learner has still to prepare of the last rollout
        self._fitted_position = 0  # of the log, when it was last fitted
        restarts: dict[str, Any] = {"restarts": config.loop.max_failures}
        common: dict[str, Any] = {"max_length": config.model.max_length, **restarts}
        if "log" in parts:
            signals = dict(config.feedback.signals)
            self.log = place(FeedbackRole, config.log_url, signals, beside_driver=True, label="log", **restarts)
        if "users" in parts:
            self.users = place(UsersRole, config.world, config.run.seed, label="users", **restarts)
        if "reward" in parts:
            gpu = bool(self.plan.bundles)
            common |= {"device": "cuda" if gpu else "cpu", "env": compute_env(gpu)}
            settings = FitSettings(PROPENSITY_EPOCHS, config.reward.lr, BATCH_SIZE, seed=config.run.seed)
            memory = self._folder / "propensity" / "serving.json"
            arguments = (reward, settings, config.reward.clip)
            self.propensity = place(PropensityActor, *arguments, memory=memory, **self._seat("propensity"), **common)
            common |= {
                "seed": config.run.seed,
                "folder": self._folder / "reward",
                "timeout_s": self._timeout_s,
                "use_gpu": self.plan.fits_on_gpu,
            }
            self.reward = place(RewardActor, reward, config.reward, **self._seat("reward"), **common)
        if "generators" in parts:
            self.generators = Generators(config, self._generator, tell)
        self.learners = self._learner_ranks(policy) if "learner" in parts else []
        self._by_object = ByObject(self.learners, config.learner.lora > 0, self._timeout_s)
        self.publisher = self._publisher()
        self.engines = self._start(parts)

    def _start(self, parts: Collection[str]) -> dict[str, Any]:
        """Wait for the roles with heavy engines; what each runs on."""
        engines: dict[str, Any] = {}
        if "generators" in parts:
            engines["rollout"] = self.generators.info()[0]
        if "learner" in parts:
            engines["learner"] = self._wait([role.info.remote() for role in self.learners], "start learner")[0]
        if "reward" in parts:
            self._wait(self.reward.state.remote(), "start reward")
            engines["reward"] = {"name": "ray-train", "version": version("ray"), "workers": self._config.reward.workers}
        return engines

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """Answers to `requests`, in their order, sampled as evaluations are."""
        sampling = self._config.rollout.sampling(evaluation=True)
        done = [completion for chunk in self._micro_batches(self.generators.generate(requests, sampling)) for completion in chunk]
        return sorted(done, key=lambda completion: completion.prompt.id)

    def begin_rollout(self, requests: Sequence[Request]) -> None:
        """Let the generators begin on `requests`, which `rollout` is asked for next: under the weights that they have, and
        under those that come meanwhile."""
        self._begun = (requests[0].prompt.id, self.generators.generate(requests))

    def rollout(self, requests: Sequence[Request], show: Show) -> list[Scored]:
        """Generate, score, prepare for learning and show to users, all as answers finish; answers in request order.

        `show` turns a micro-batch into the impressions that users react to. The learner may still prepare the last
        `rollout.buffer` answers: `update` waits for it, and meanwhile generators may begin on the next step.
        """
        begun, self._begun = self._begun, None
        if begun and begun[0] != requests[0].prompt.id:
            raise RuntimeError(f"the rollout that was begun with {begun[0]} must come first, got {requests[0].prompt.id}")
        in_flight: deque[tuple[list[Completion], Any, list[Any], list[Any]]] = deque()
        scored: list[Scored] = []
        for chunk in self._micro_batches(begun[1] if begun else self.generators.generate(requests)):
            rewards = self.reward.score.remote([done.prompt.token_ids + done.token_ids for done in chunk])
            prepared = [rank.prepare.remote(chunk) for rank in self.learners]
            in_flight.append((chunk, rewards, prepared, self.show(show(chunk))))
            record("queue_rows", DRIVER, sum(len(waiting) for waiting, *_ in in_flight))
            while sum(len(waiting) for waiting, *_ in in_flight) > self._config.rollout.buffer:
                chunk, rewards, prepared, shown = in_flight.popleft()
                scored += self._finish(chunk, rewards, [*prepared, *shown])
        for chunk, rewards, prepared, shown in in_flight:
            scored += self._finish(chunk, rewards, shown)
            self._preparing += prepared
        return sorted(scored, key=lambda answer: answer.completion.prompt.id)

    def show(self, impressions: Sequence[Impression]) -> list[Any]:
        """Show `impressions` to the users and log both; returns what to wait for: nothing where there is nothing to show."""
        if not impressions:
            return []
        record("feedback_rows", "log", len(impressions))
        return [self.log.append.remote(impressions, self.users.react_all.remote(impressions))]

    def fill_log(self, requests: Sequence[Request], show: Show) -> int:
        """Generate answers to `requests`, show them to users as they finish, and return how many were shown."""
        waiting: deque[Any] = deque()
        shown = 0
        for chunk in self._micro_batches(self.generators.generate(requests)):
            impressions = show(chunk)
            shown += len(impressions)
            waiting += self.show(impressions)
            if len(waiting) * self._config.rollout.micro_batch > self._config.rollout.buffer:
                self._wait(waiting.popleft(), "log feedback")
        self._wait(list(waiting), "log feedback")
        return shown

    def update(self, scored: Sequence[Scored]) -> dict[str, float]:
        """One learner update on a whole step; metrics over all ranks, and the version of the reward that they rest on."""
        updates = [rank.update.remote(scored) for rank in self.learners]
        preparing, self._preparing = self._preparing, []
        self._wait(preparing, "prepare answers")  # first: after an error in it, or a death, the update fails of that
        record("queue_rows", DRIVER, 0)
        began = time.perf_counter()
        metrics = self._wait(updates, "update policy")[0]
        record("update_seconds", "learner", time.perf_counter() - began)
        return {**metrics, "reward_version": float(scored[0].reward_version)}

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

    def refit(
        self,
        name: str,
        as_of: float | None,
        methods: Sequence[str],
        clean_labels: Callable[[Path], np.ndarray] | None = None,
    ) -> dict[str, Any]:
        """Fit propensity, noise rates and reward models on the log as of a time; promote the configured method's behind its gate.

        `name` names the snapshot and the candidate; `clean_labels` gives r* [N] of a snapshot to the method "oracle". A refit
        starts from models that serve where these hand on no label (see the roles). Returns the reports of both fits and of the
        gate, as JSON; folders are told from the run's.
        """
        position = self._wait(self.log.position.remote(), "snapshot the log")
        snapshot = self._folder / "snapshots" / f"{name}.parquet"
        self._wait(self.log.write_snapshot.remote(snapshot, as_of), "snapshot the log")
        folder = self._folder / "propensity" / name
        began = time.perf_counter()
        propensity = self._wait(self.propensity.fit.remote(snapshot, folder), "fit propensity")
        record("fit_seconds", "propensity", time.perf_counter() - began)
        record("version", "propensity", propensity["version"])
        labels = clean_labels(snapshot) if clean_labels else None
        self._propensity_folder, self._fitted_position = folder, position
        weights = read_propensities(folder).numpy()
        options = {"candidate": name, "start": folder / "fold-0", "clean_labels": labels}
        report = self._wait(self.reward.fit.remote(snapshot, weights, list(methods), **options), "fit reward")
        promotion = self._wait(self.reward.promote.remote(name), "promote reward")
        record("fit_seconds", "reward", report.seconds)
        record("version", "reward", promotion.version)
        event("refit", "reward", candidate=name, seconds=report.seconds, log_position=position)
        event("gate", "reward", candidate=name, **asdict(promotion))
        folders = {method: str((report.folder / method).relative_to(self._folder)) for method in methods}
        reward = {**report.figures, "folders": folders, "seconds": report.seconds, "train_seconds": report.train_seconds}
        return {"propensity": propensity, "reward": reward, "promotion": asdict(promotion)}

    def end_fits(self) -> None:
        """End the processes that wait for the reward model's next fit; one that comes all the same starts new ones."""
        self._wait(self.reward.end_fits.remote(), "end the workers of fits")

    def log_has_grown(self) -> bool:
        """Whether the log has grown since it was last fitted."""
        return self._wait(self.log.position.remote(), "read the log") > self._fitted_position

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the learner's exact state and the policy under `folder`, and return which reward and propensity models serve.

        Their folders are told from the run's folder, which may move.
        """
        self._wait([rank.save.remote(folder / "learner") for rank in self.learners], "save learner")
        self.save_policy(folder / "policy")
        reward = self._wait(self.reward.state.remote(), "save")
        return {
            "reward": {**reward, "folder": str(Path(reward["folder"]).relative_to(self._folder))},
            "propensity": str(self._propensity_folder.relative_to(self._folder)) if self._propensity_folder else None,
            "log_position": self._fitted_position,
        }

    def load(self, folder: Path, serving: Mapping[str, Any]) -> None:
        """Take up the state that `save` wrote and returned; the folder's hashes must have been verified."""
        self.load_learner(folder)
        self._propensity_folder, self._fitted_position = self._folder / serving["propensity"], serving["log_position"]
        reward = {**serving["reward"], "folder": self._folder / serving["reward"]["folder"]}
        loading = [self.reward.load.remote(**reward), self.propensity.load.remote(self._propensity_folder)]
        self._wait(loading, "load reward and propensity")
        self.publish()

    def load_learner(self, folder: Path) -> None:
        """Take up the learner's part of what `save` wrote; the folder's hashes must have been verified."""
        self._wait([rank.load.remote(folder / "learner") for rank in self.learners], "load learner")

    def prepare(self, scored: Sequence[Scored]) -> None:
        """Let the learner evaluate answers that no rollout of its own brought, before an update on them."""
        completions = [answer.completion for answer in scored]
        size = self._config.rollout.micro_batch
        for first in range(0, len(completions), size):
            chunk = completions[first : first + size]
            self._wait([rank.prepare.remote(chunk) for rank in self.learners], "prepare answers")

    def save_policy(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        self._wait([rank.save_policy.remote(folder) for rank in self.learners], "save policy")

    def score(self, completions: Sequence[Completion], model: str | Path | None = None) -> np.ndarray:
        """Logits [N] of the serving reward model, or of `model`: a folder or hub id."""
        rows = [done.prompt.token_ids + done.token_ids for done in completions]
        if model is None:
            return self._wait(self.reward.score.remote(rows), "score")[0]
        return self._wait(self.reward.score_with.remote(str(model), rows), "score")

    def _micro_batches(self, calls: dict[str, Call]) -> Iterator[list[Completion]]:
        return self.generators.micro_batches(calls, self._by_object if self.learners else None)

    def _finish(self, chunk: Sequence[Completion], rewards: Any, effects: Sequence[Any]) -> list[Scored]:
        logits, version = self._wait(rewards, "score")
        record("scored_rows", "reward", len(chunk))
        self._wait(list(effects), "prepare answers and log feedback")
        return [Scored(done, float(logit), version) for done, logit in zip(chunk, logits, strict=True)]

    def _seat(self, role: str) -> dict[str, Any]:
        """What `place` is told of a role's seat."""
        seat = self.plan.allocations[role]
        bundle = (self._bundles, seat.bundle) if self._bundles and seat.bundle is not None else None
        return {"gpus": seat.gpus, "bundle": bundle, "label": role}

    def _generator(self, role: str) -> Any:
        rollout, model, cache, seat = self._config.rollout, self._config.model, self._config.run.cache, self._seat(role)
        settings = EngineSettings(
            model=self._policy,
            max_length=model.max_length,
            dtype=model.dtype,
            cache=cache,
            timeout_s=self._timeout_s,
            buffer=rollout.buffer,
            tensor_parallel=rollout.tensor_parallel,
            gpu_memory=DEVICE_SHARE * min(1.0, seat["gpus"]),
        )
        env = engine_env(rollout.engine, self._policy, cache, gpu=seat["gpus"] > 0)
        return place(Generator, rollout.engine, settings, rollout.sampling(), env=env, concurrency=2, **seat)

    def _publisher(self) -> Publisher:
        if self.plan.transport == "ipc":
            return ByIpc(self.learners, self.plan.partners, self._timeout_s)
        if self.plan.transport == "broadcast":
            bundle = self._seat("learner-0")["bundle"]
            return ByBroadcast(self.learners, self._config.rollout.tensor_parallel, bundle, self._timeout_s)
        return self._by_object

    def _learner_ranks(self, policy: str) -> list[Any]:
        size = self._config.learner.ranks
        address = rendezvous(self._seat("learner-0")["bundle"], self._timeout_s)
        settings: dict[str, Any] = {
            "world_size": size,
            "init_method": address,
            "max_length": self._config.model.max_length,
            "max_new_tokens": self._config.rollout.max_new_tokens,
            "seed": self._config.run.seed,
        }
        settings |= {"dtype": getattr(torch, self._config.model.dtype), "temperature": self._config.rollout.temperature}
        return [
            place(
                LearnerRank,
                policy,
                self._config.learner,
                rank=rank,
                env=compute_env(gpu=bool(self.plan.bundles)),
                beside_driver=rank == 0 and not self.plan.bundles,
                **self._seat(f"learner-{rank}"),
                **settings,
            )
            for rank in range(size)
        ]

    def _wait(self, refs: Any, phase: str) -> Any:
        return resolve(refs, phase, self._timeout_s)


def _check_broadcast(config: Config) -> None:
    needs = {"a cluster": not in_process(), "rollout.engine=vllm": config.rollout.engine == "vllm"}
    needs |= {"learner.lora=0": not config.learner.lora}
    missing = [need for need, there in needs.items() if not there]
    if missing:
        raise ValueError(f"transport=broadcast needs {' and '.join(missing)}")


def plan_roles(config: Config, policy: str, reward: str, parts: Collection[str] = ALL_ROLES) -> Plan:
    """Where the roles named in `parts` will run on the cluster that is joined. Raises ConfigError where they do not fit."""
    cluster = ray_resources()
    plan = make_plan(config, model_size(policy), model_size(reward), parts, int(cluster.get("GPU", 0)))
    plan.check_memory(cluster["memory"], gpu_bytes() if plan.bundles else 0)
    return plan
