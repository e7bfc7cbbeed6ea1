"""What `perf` measures: a function per part, each from a bench to a figure.

PART -> measure(bench) -> Figure: the median of ratios, with its target
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import psutil

from actors.cluster.environment import THREADS
from actors.cluster.place import Placement, place
from actors.cluster.wait import resolve
from actors.lab.perf_baselines import PlainLearner, RawVllm, TokenReward, role_spans, timeline
from actors.lab.perf_trl import TrlTrainer
from actors.rollout.engine import EngineSettings
from actors.rollout.vllm_engine import VllmEngine
from actors.system import start_roles
from actors.weights.packing import unpack
from causalrm_ray.checkpoint import write_json
from causalrm_ray.config.perf import SAMPLES, WARM_STEPS, Case
from causalrm_ray.report.speed import Figure, figure, speed, sync_figure, uncovered
from causalrm_ray.rl.batching import TOKEN_BUDGET
from causalrm_ray.world.grammar import train_prompts
from jobs.lab.perf_bench import WARM, Bench

BLOCK = 6  # steps that are timed together where consecutive ones overlap
SMALLEST: Case = ("0.94M", 32, 64)  # mostly fixed costs per call: here we must only not be slower than TRL


def measure_rollout(bench: Bench) -> Figure:
    """Our generator actor streaming to the driver, against raw vLLM in a process of its own, on the same requests."""
    config = bench.with_options("rollout", engine="vllm", generators=1)
    roles = start_roles(config, bench.model, bench.model, parts=("generators",))
    settings = EngineSettings(
        model=bench.model,
        max_length=config.model.max_length,
        dtype=config.model.dtype,
        cache=config.run.cache,
        timeout_s=bench.timeout_s,
        buffer=config.rollout.buffer,
    )
    env = VllmEngine.process_env(bench.model, config.run.cache, gpu=False)
    raw = place(RawVllm, Placement(env=env), settings, config.rollout.sampling())
    requests = bench.task.step_requests(0)
    tokens: dict[str, list[tuple[int, ...]]] = {}

    def ours() -> float:
        began = time.perf_counter()
        done = roles.stream.sample(requests)
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
    return replace(found, details={**found.details, "tokens_per_s": count / found.details["ours_s"]})


def measure_sync(bench: Bench) -> Figure:
    """A whole publish, from asking the learner to the last checksum, against a plain copy of as many bytes."""
    roles = bench.loop
    num_bytes = int(roles.publish()["sync_bytes"])
    source, target = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    pairs = bench.interleave(partial(_timed, roles.publish), partial(_timed, partial(np.copyto, target, source)))
    return sync_figure(bench.name, pairs, num_bytes)


def measure_learner(bench: Bench) -> Figure:
    """One rank under DeepSpeed, called by the driver, against a plain torch loop, both on one thread and the same answers."""
    config = bench.with_options("learner", ranks=1)
    roles = start_roles(config, bench.model, bench.model, parts=("learner",))
    rollout, rows = config.rollout, max(1, TOKEN_BUDGET // config.model.max_length)
    arguments = (bench.model, config.learner, rollout.temperature, rollout.max_new_tokens, rows)
    plain = place(PlainLearner, Placement(env=THREADS), *arguments)
    scored = bench.random_answers()
    steps = iter(range(10**6))

    def ours() -> float:
        version = next(steps)
        now = [replace(answer, completion=replace(answer.completion, policy_version=version)) for answer in scored]
        began = time.perf_counter()
        roles.learner.prepare_step(now, config.rollout.micro_batch)
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


def measure_driver(bench: Bench) -> Figure:
    """Share of a step's wall time in which no method of any role runs: the driver's own work, and Ray's overhead.

    A step is the real loop's: answers stream to the reward model, the learner and the users, who react into the log; update;
    publish. A role works while Ray executes one of its methods, not while it reads arguments or stores results.
    The last step's trace goes to timeline.json of the case's folder, for chrome://tracing or Perfetto.
    """
    roles, windows, walls = bench.loop, [], []
    bench.progress.tasks(f"steps of {bench.name}", bench.options.pairs)
    began = time.time()
    for number in range(WARM + bench.options.pairs):
        first = time.time()
        walls.append(bench.step(roles, number))
        windows.append((first, time.time()))
        bench.progress.task(max(0, number + 1 - WARM), f"{walls[-1]:.3f} s")
    generators = bench.options.generators
    batches = generators * -(-bench.answers // (generators * bench.config.rollout.micro_batch))
    methods = generators * 2 + bench.options.ranks * (batches + 2) + batches * 3
    spans = role_spans(began, time.time(), len(windows) * methods)
    write_json(bench.config.run.path / "timeline.json", timeline(*windows[-1]))
    shares = [uncovered(spans, *window) for window in windows[WARM:]]
    return figure("driver", bench.name, shares, 0.05, False, step_s=float(np.median(walls[WARM:])))


def measure_trl(bench: Bench) -> Figure:
    """A whole step, generation, reward, update and sync, against TRL's; the same trivial reward for both, users see nothing."""
    roles = bench.loop
    rewards, roles.stream.reward = roles.reward, place(TokenReward, Placement())
    others = [roles.log, roles.users, roles.propensity, rewards]
    handles = [*others, roles.stream.reward, *roles.learner.ranks, *roles.generators.handles.values()]
    options = {"answers": bench.answers, "samples": SAMPLES, "tokens": bench.tokens, "threads": bench.options.trl_threads}
    threads = {**THREADS, "OMP_NUM_THREADS": str(bench.options.trl_threads), "HF_HUB_OFFLINE": "1"}
    folder = bench.config.run.path / "trl"
    trl = place(TrlTrainer, Placement(env=threads), bench.model, train_prompts()[:64], str(folder), **options)
    steps = iter(range(10**6, 2 * 10**6))

    def ours() -> float:
        return bench.step(roles, next(steps), shown=False)

    def other() -> float:
        return resolve(trl.step.remote(), "a step of TRL", bench.timeout_s)

    try:
        pairs = bench.interleave(ours, other, roles=(handles, [trl]))
        return speed("trl", bench.name, pairs, 1.0 if bench.case == SMALLEST else 2.0)
    finally:
        roles.stream.reward = rewards


def measure_memory(bench: Bench) -> Figure:
    """Growth of the driver's resident memory from the end of the first steps to the last, as a share."""
    roles, steps, process, sizes = bench.loop, bench.options.memory_steps, psutil.Process(), []
    bench.progress.tasks(f"steps of {bench.name}", steps)
    for number in range(steps):
        bench.step(roles, 10**7 + number)
        sizes.append(process.memory_info().rss)
        bench.progress.task(number + 1, f"{sizes[-1] / 2**20:.1f} MiB")
    start, end = sizes[WARM_STEPS - 1], sizes[-1]
    details = {"steps": steps, "start_mib": start / 2**20, "end_mib": end / 2**20}
    return figure("memory", bench.name, [end / start - 1], 0.01, False, **details)


def measure_asynchronous(bench: Bench) -> Figure:
    """Steps whose answers are generated while the learner trains on the step before, against sequential steps of one loop.

    As in the middle of a long run: a step before those that are timed fills the pipeline, one after them empties it.
    """
    vars(bench).pop("loop", None)  # ends its roles: even idle ones take a tenth of two cores
    roles = bench.start(bench.with_options("learner", staleness=1))
    blocks = iter(range(10**6))

    def steps(ahead: bool) -> float:
        begin = next(blocks) * (BLOCK + 2)
        first, *timed, last = range(begin, begin + BLOCK + 2)
        bench.step(roles, first, shown=False, ahead=ahead)
        seconds = sum(bench.step(roles, number, shown=False, ahead=ahead) for number in timed)
        bench.step(roles, last, shown=False)
        return seconds

    pairs = bench.interleave(partial(steps, True), partial(steps, False), warm=1)
    return speed("asynchronous", bench.name, pairs, 1.3, steps=BLOCK)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


MEASURES: dict[str, Callable[[Bench], Figure]] = {
    "rollout": measure_rollout,
    "sync": measure_sync,
    "learner": measure_learner,
    "driver": measure_driver,
    "trl": measure_trl,
    "asynchronous": measure_asynchronous,
    "memory": measure_memory,
}
