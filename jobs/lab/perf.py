"""How fast every part of a step is, against the same work done without us: ratios within one run, ours and the other in turn.

rollout  our streamed tokens/s over raw vLLM's               sync    a whole publish against a plain copy of its bytes
learner  our update's speed over a plain torch loop's        driver  share of a step in which no role works
trl      a whole step's speed over TRL's GRPOTrainer         memory  growth of the driver over many steps
asynchronous  the speed of steps whose answers are written during the step before, over that of steps in turn

A reading is affected by whatever else the machine does; the load is noted with each. The tests never judge it.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from actors.cluster.environment import THREADS
from actors.cluster.place import Placement, place
from actors.cluster.runtime import ray_cluster
from actors.cluster.wait import resolve
from actors.lab.perf_baselines import (
    PlainLearner,
    RawVllm,
    TokenReward,
    processes_of,
    role_spans,
    standstill,
    timeline,
    token_reward,
)
from actors.lab.perf_trl import TrlTrainer, check_trl
from actors.rollout.engine import EngineSettings
from actors.rollout.generator import engine_env
from actors.system import Roles, start_roles
from actors.weights.packing import unpack
from causalrm_ray.checkpoint import atomic_folder, write_json
from causalrm_ray.config.options import dump_config, validate
from causalrm_ray.config.perf import SAMPLES, WARM_STEPS, Case, PerfConfig
from causalrm_ray.config.train import Config
from causalrm_ray.errors import InputError
from causalrm_ray.models.reward_model import SequenceScorer
from causalrm_ray.models.text import load_tokenizer
from causalrm_ray.report.speed import Figure, Pair, draw_figures, figure, speed, sync_figure, uncovered
from causalrm_ray.rl.batching import TOKEN_BUDGET
from causalrm_ray.types import Completion, Scored
from causalrm_ray.world.grammar import train_prompts
from causalrm_ray.world.random_models import ensure_random_model
from jobs.lab.benchmark import write_markdown
from jobs.support.oracle import Oracle
from jobs.support.progress import Progress
from jobs.support.prompts import Models, Task
from jobs.train_policy import policy_step

PROMPT_TOKENS = 32  # room for the longest prompt and the end
BLOCK = 6  # steps that are timed together where one reaches into the next
WARM = 2  # steps of each side before it is measured
SMALLEST: Case = ("0.94M", 32, 64)  # mostly what every call costs: here we must only not be slower than TRL
COLUMNS = ("figure", "case", "median", "least", "largest", "n", "target", "met", "details")


def run(config: PerfConfig) -> int:
    """Run the job."""
    folder = config.run.path
    if (folder / "perf.json").exists():
        raise InputError(f"{folder} holds figures already: remove it, or choose another run.name")
    if "trl" in config.parts:
        check_trl()
    dump_config(config, folder / "config.yaml")
    figures: list[Figure] = []
    with Progress() as progress, ray_cluster(config.cluster, config.run.cache):
        for number, case in enumerate(config.cases):
            bench = Bench(config, case, progress)
            for part in config.parts:
                if part != "memory" or number == 0:
                    gc.collect()  # the roles of the part before: a cycle holds them
                    progress.phase(f"{part}, {bench.name}, load {os.getloadavg()[0]:.1f}")
                    figures.append(MEASURES[part](bench))
                    write_json(folder / "perf.json", {"cores": os.cpu_count(), "figures": [_json(found) for found in figures]})
    _conclude(figures, config)
    return 0


class Bench:
    """What one case is measured with. Roles start when a part first needs them."""

    def __init__(self, config: PerfConfig, case: Case, progress: Progress) -> None:
        self.told, self.case, self.progress = config, case, progress
        size, self.answers, self.tokens = case
        self.name = f"{size} {self.answers}x{self.tokens}"
        self.model = str(ensure_random_model(config.run.cache, size))
        self.config = loop_config(config, self.answers, self.tokens, self.model, self.name.replace(" ", "-"))
        self.task = Task(self.config, Models(self.model, self.model))
        self.timeout_s = config.cluster.timeout_s

    @cached_property
    def loop(self) -> Roles:
        """All roles of the loop."""
        return self.start(self.config)

    def start(self, config: Config) -> Roles:
        """All roles of the loop under `config`, with a reward model that nobody fitted."""
        roles = start_roles(config, self.model, self.model)
        folder = self.config.run.path / "reward" / "blank"
        scorer = SequenceScorer.from_pretrained(self.model)
        torch.nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(0))
        with atomic_folder(folder) as aside:
            scorer.save_pretrained(aside / "scorer", load_tokenizer(self.model))
        resolve(roles.reward.load.remote(folder / "scorer", 1), "load reward", self.timeout_s)
        roles.publish()
        return roles

    def interleave(
        self,
        ours: Callable[[], float],
        other: Callable[[], float],
        warm: int = WARM,
        roles: tuple[Sequence[Any], Sequence[Any]] = ((), ()),
    ) -> list[Pair]:
        """Pairs of seconds; who comes first takes turns. While one side works, the other's `roles` (ours, other) stand still."""

        def undisturbed(work: Callable[[], float], own: Sequence[Any], others: Sequence[Any]) -> float:
            with standstill(processes_of(others, self.timeout_s)):
                processes_of(own, self.timeout_s)  # all have woken up
                return work()

        ours, other = partial(undisturbed, ours, *roles), partial(undisturbed, other, *reversed(roles))
        for _ in range(warm):
            ours(), other()
        self.progress.tasks(f"pairs of {self.name}", self.told.pairs)
        pairs = []
        for number in range(self.told.pairs):
            pairs.append(Pair(ours(), other()) if number % 2 == 0 else Pair(*reversed((other(), ours()))))
            self.progress.task(number + 1, f"ours {pairs[-1].ours_s:.3f} s, other {pairs[-1].other_s:.3f} s")
        return pairs


def loop_config(config: PerfConfig, answers: int, tokens: int, model: str, name: str) -> Config:
    """The main tree for one case: GRPO with one optimizer step, and everything else as it comes."""
    tree: dict[str, Any] = {
        "run": {"name": name, "dir": str(config.run.path), "cache": str(config.run.cache)},
        "cluster": config.cluster.model_dump(),
        "model": {"policy": model, "reward": model, "max_length": tokens + PROMPT_TOKENS},
        "rollout": {
            "engine": config.engine,
            "generators": config.generators,
            "prompts_per_step": answers // SAMPLES,
            "samples_per_prompt": SAMPLES,
            "max_new_tokens": tokens,
        },
        "learner": {
            "algorithm": "grpo",
            "ranks": config.ranks,
            "epochs": 1,
            "minibatches": 1,
            "lr": 1e-6,
            "kl": {"coefficient": 0.04},
        },
    }
    return validate(tree)


def measure_rollout(bench: Bench) -> Figure:
    """Our generator actor streaming to the driver, against raw vLLM in a process of its own, on the same requests."""
    rollout, settings = bench.config.rollout, _engine_settings(bench)
    config = validate(_changed(bench.config, rollout={"engine": "vllm", "generators": 1}))
    roles = start_roles(config, bench.model, bench.model, parts=("generators",))
    raw = place(RawVllm, Placement(env=engine_env("vllm", bench.model, config.run.cache)), settings, rollout.sampling())
    requests = bench.task.step_requests(0)
    tokens: dict[str, list[tuple[int, ...]]] = {}

    def ours() -> float:
        began = time.perf_counter()
        done = roles.sample(requests)
        seconds = time.perf_counter() - began
        tokens["ours"] = [completion.token_ids for completion in done]
        return seconds

    def other() -> float:
        seconds, tokens["other"] = resolve(raw.generate.remote(requests), "generate with raw vLLM", bench.timeout_s)
        return seconds

    pairs = bench.interleave(ours, other, roles=(list(roles.generators.handles.values()), [raw]))
    if tokens["ours"] != tokens["other"]:
        raise RuntimeError("our generator and raw vLLM must write the same tokens for the same requests")
    count = sum(map(len, tokens["ours"]))
    found = speed("rollout", bench.name, pairs, 0.9, tokens=count)
    return replace(found, details=found.details | {"tokens_per_s": count / found.details["ours_s"]})


def measure_sync(bench: Bench) -> Figure:
    """A whole publish, from asking the learner to the last checksum, against a plain copy of as many bytes."""
    roles = bench.loop
    num_bytes = int(roles.publish()["sync_bytes"])
    source, target = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    pairs = bench.interleave(partial(_timed, roles.publish), partial(_timed, partial(np.copyto, target, source)))
    return sync_figure(bench.name, pairs, num_bytes)


def measure_learner(bench: Bench) -> Figure:
    """One rank under DeepSpeed, called by the driver, against a plain torch loop, both on one thread and the same answers."""
    config = validate(_changed(bench.config, learner={"ranks": 1}))
    roles = start_roles(config, bench.model, bench.model, parts=("learner",))
    arguments = (bench.model, config.learner, config.rollout.temperature, max(1, TOKEN_BUDGET // config.model.max_length))
    plain = place(PlainLearner, Placement(env=THREADS), *arguments)
    scored = _random_answers(bench)
    steps = iter(range(10**6))

    def ours() -> float:
        version = next(steps)
        now = [replace(answer, completion=replace(answer.completion, policy_version=version)) for answer in scored]
        began = time.perf_counter()
        for first in range(0, len(now), config.rollout.micro_batch):
            chunk = [answer.completion for answer in now[first : first + config.rollout.micro_batch]]
            resolve([rank.prepare.remote(chunk) for rank in roles.learner.ranks], "prepare", bench.timeout_s)
        roles.learner.update(now)
        return time.perf_counter() - began

    def other() -> float:
        return resolve(plain.step.remote(scored), "plain step", bench.timeout_s)

    pairs = bench.interleave(ours, other, roles=(roles.learner.ranks, [plain]))
    weights, theirs = resolve(
        [roles.learner.ranks[0].weights.remote(), plain.weights.remote()], "compare weights", bench.timeout_s
    )
    apart = [float((tensor - theirs[name]).norm() / theirs[name].norm()) for name, tensor in unpack(weights)]
    return speed("learner", bench.name, pairs, 0.9, weights_differ=max(apart))


def _random_answers(bench: Bench) -> list[Scored]:
    """A step's answers of random tokens, all of the full length, as an engine that knows nothing would have drawn them."""
    rng, size = np.random.default_rng(0), len(load_tokenizer(bench.model))
    logprobs = (-math.log(size),) * bench.tokens
    answers = []
    for request in bench.task.step_requests(0):
        tokens = tuple(rng.integers(size, size=bench.tokens).tolist())
        answers.append(Scored(Completion(request.prompt, "", tokens, logprobs, "length", 0), token_reward(tokens), 1))
    return answers


def measure_driver(bench: Bench) -> Figure:
    """Share of a step's wall time in which no method of any role runs: the driver's own work, and what Ray needs to pass things.

    A step is the real loop's: answers stream to the reward model, the learner and the users, who react into the log; update;
    publish. A role works while Ray executes one of its methods; reading arguments and storing results is no work.
    The last step's trace goes to timeline.json of the case's folder, for chrome://tracing or Perfetto.
    """
    roles, truth, windows, walls = bench.loop, Oracle(bench.config), [], []
    bench.progress.tasks(f"steps of {bench.name}", bench.told.pairs)
    began = time.time()
    for number in range(WARM + bench.told.pairs):
        first, wall = time.time(), time.perf_counter()
        policy_step(bench.task, truth, roles, number)
        walls.append(time.perf_counter() - wall)
        windows.append((first, time.time()))
        bench.progress.task(max(0, number + 1 - WARM), f"{walls[-1]:.3f} s")
    generators = bench.told.generators
    batches = generators * -(-bench.answers // (generators * bench.config.rollout.micro_batch))
    methods = generators * 2 + bench.told.ranks * (batches + 2) + batches * 3
    spans = role_spans(began, time.time(), len(windows) * methods)
    write_json(bench.config.run.path / "timeline.json", timeline(*windows[-1]))
    shares = [uncovered(spans, *window) for window in windows[WARM:]]
    return figure("driver", bench.name, shares, 0.05, False, step_s=float(np.median(walls[WARM:])))


def measure_trl(bench: Bench) -> Figure:
    """A whole step, generation, reward, update and sync, against TRL's; the same trivial reward for both, users see nothing."""
    roles, truth = bench.loop, Oracle(bench.config)
    rewards, roles.stream.reward = roles.reward, place(TokenReward, Placement())
    others = [roles.log, roles.users, roles.propensity, rewards]
    handles = [*others, roles.stream.reward, *roles.learner.ranks, *roles.generators.handles.values()]
    options = {"answers": bench.answers, "samples": SAMPLES, "tokens": bench.tokens, "threads": bench.told.trl_threads}
    threads = {**THREADS, "OMP_NUM_THREADS": str(bench.told.trl_threads), "HF_HUB_OFFLINE": "1"}
    folder = bench.config.run.path / "trl"
    trl = place(TrlTrainer, Placement(env=threads), bench.model, train_prompts()[:64], str(folder), **options)
    steps = iter(range(10**6, 2 * 10**6))

    def ours() -> float:
        return policy_step(bench.task, truth, roles, next(steps), shown=False)["seconds"]

    def other() -> float:
        return resolve(trl.step.remote(), "a step of TRL", bench.timeout_s)

    try:
        pairs = bench.interleave(ours, other, roles=(handles, [trl]))
        return speed("trl", bench.name, pairs, 1.0 if bench.case == SMALLEST else 2.0)
    finally:
        roles.stream.reward = rewards


def measure_memory(bench: Bench) -> Figure:
    """Growth of the driver's resident memory from the end of the first steps to the last, as a share."""
    roles, truth, steps = bench.loop, Oracle(bench.config), bench.told.memory_steps
    process, sizes = psutil.Process(), []
    bench.progress.tasks(f"steps of {bench.name}", steps)
    for number in range(steps):
        policy_step(bench.task, truth, roles, 10**7 + number)
        sizes.append(process.memory_info().rss)
        bench.progress.task(number + 1, f"{sizes[-1] / 2**20:.1f} MiB")
    start = sizes[WARM_STEPS - 1]
    return figure(
        "memory",
        bench.name,
        [sizes[-1] / start - 1],
        0.01,
        False,
        steps=steps,
        start_mib=start / 2**20,
        end_mib=sizes[-1] / 2**20,
    )


def measure_asynchronous(bench: Bench) -> Figure:
    """Steps in which the next answers are written while the learner trains, against steps one after the other, of one loop.

    As in the middle of a long run: a step before those that are timed fills the pipeline, one after them empties it.
    """
    vars(bench).pop("loop", None)  # its roles end: at rest, too, they take a tenth of two cores
    gc.collect()
    roles, truth = bench.start(validate(_changed(bench.config, learner={"staleness": 1}))), Oracle(bench.config)
    blocks = iter(range(10**6))

    def steps(ahead: bool) -> float:
        begin = next(blocks) * (BLOCK + 2)
        first, *timed, last = range(begin, begin + BLOCK + 2)
        step = partial(policy_step, bench.task, truth, roles, shown=False)
        step(first, ahead=ahead)
        began = time.perf_counter()
        for number in timed:
            step(number, ahead=ahead)
        seconds = time.perf_counter() - began
        step(last)
        return seconds

    pairs = bench.interleave(partial(steps, True), partial(steps, False), warm=1)
    return speed("asynchronous", bench.name, pairs, 1.3, steps=BLOCK)


MEASURES: dict[str, Callable[[Bench], Figure]] = {
    "rollout": measure_rollout,
    "sync": measure_sync,
    "learner": measure_learner,
    "driver": measure_driver,
    "trl": measure_trl,
    "asynchronous": measure_asynchronous,
    "memory": measure_memory,
}


def _engine_settings(bench: Bench) -> EngineSettings:
    config = bench.config
    return EngineSettings(
        model=bench.model,
        max_length=config.model.max_length,
        dtype=config.model.dtype,
        cache=config.run.cache,
        timeout_s=bench.timeout_s,
        buffer=config.rollout.buffer,
    )


def _changed(config: Config, **sections: dict[str, Any]) -> dict[str, Any]:
    """The tree with some options of some sections changed."""
    tree = config.model_dump(mode="json")
    return tree | {name: tree[name] | changes for name, changes in sections.items()}


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _json(found: Figure) -> dict[str, Any]:
    return asdict(found) | {"met": found.met, "load": os.getloadavg()[0]}


def _conclude(figures: Sequence[Figure], config: PerfConfig) -> None:
    """The table, printed and as Markdown, and the picture."""
    folder, lines = config.run.path, []
    for found in figures:
        numbers = [f"{value:.3g}" for value in (found.value, found.low, found.high)]
        target = f"{'>=' if found.at_least else '<='} {found.target:g}"
        details = ", ".join(f"{name} {value:.3g}" for name, value in found.details.items())
        lines.append([found.name, found.case, *numbers, str(found.count), target, "yes" if found.met else "no", details])
    write_markdown("medians of ratios between what was least and largest", COLUMNS, lines, folder / "table.md")
    draw_figures(figures, folder / "perf.png")
    shown = Table(*COLUMNS[:-1], box=None)
    for line in lines:
        shown.add_row(*line[:-1])
    Console().print(shown)
    Console().print(f"see {folder}", markup=False, highlight=False)
