"""How long a training step and the fits before it take, from counts of operations and bytes: no model is loaded.

    Work (of a step) + Rates (of the hardware) -> busy seconds of each phase -> wall seconds of a step

Operations follow Kaplan et al. 2020 (arXiv 2001.08361), section 2.1: 2 per parameter and token forward, 4 backward; attention's
square is left out. Decoding reads all weights and the caches of all running answers once per token (memory-bound), or computes
(2 per parameter and answer), whichever takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from causalrm_ray.models.size import ModelSize
from causalrm_ray.report.pictures import BLUE, GREY, ORANGE

COLOURS = (BLUE, ORANGE, GREY, "#38a169", "#805ad5", "#d69e2e", "#b83280", "#00a3c4", "#e53e3e")


class Gpu(NamedTuple):
    """One GPU: bytes, dense bfloat16 FLOP/s, bytes/s of its memory and to a neighbour, dollars an hour."""

    memory: float
    flops: float
    bandwidth: float
    link: float
    price: float


# Heads on states: ensembles that `auto` fits, with the propensity's; passes over many rows; weights per hidden unit; FLOP/s.
HEAD_FITS, HEAD_EPOCHS, HEAD_WEIGHTS, CPU_FLOPS = 8, 10, 5 * 33, 1e11

# Vendors' figures of the SXM modules (L4: PCIe); prices of one large cloud on demand, rounded, of late 2025: give your own.
GPUS = {
    "A100": Gpu(80e9, 312e12, 2039e9, 300e9, 4.1),
    "H100": Gpu(80e9, 989e12, 3350e9, 450e9, 6.9),
    "H200": Gpu(141e9, 989e12, 4800e9, 450e9, 7.9),
    "L4": Gpu(24e9, 121e12, 300e9, 32e9, 0.8),
}


@dataclass(frozen=True)
class Work:
    """One policy step. `width` in bytes of a weight; `sequences` that a generator decodes at once; `budget` tokens of a
    micro-batch; `shared`: roles share GPUs (or cores), so that nothing overlaps."""

    policy: ModelSize
    reward: ModelSize
    width: int
    prompts: int
    samples: int
    prompt_tokens: int
    answer_tokens: int
    sequences: int
    budget: int
    shared: bool
    generators: int = 1
    tensor_parallel: int = 1
    ranks: int = 1
    critic: bool = False
    lora: int = 0
    zero_stage: int = 0
    checkpointing: bool = False
    epochs: int = 1
    staleness: int = 0

    @property
    def answers(self) -> int:
        """Answers of a step."""
        return self.prompts * self.samples

    @property
    def tokens(self) -> int:
        """Tokens of a step's prompts and answers, the prompt once for each answer."""
        return self.answers * (self.prompt_tokens + self.answer_tokens)


@dataclass(frozen=True)
class Rates:
    """Achieved FLOP/s and bytes/s of one GPU, or of a CPU in its place. `factors` scale phases to measured seconds; a sync takes
    `sync_s` for `sync_bytes`, and its rate for further bytes; the driver adds `driver_share` of a step."""

    training: float
    forward: float
    decoding: float
    link: float
    sync: float
    factors: Mapping[str, float]
    sync_s: float = 0.0
    sync_bytes: float = 0.0
    driver_share: float = 0.0


def generation_s(work: Work, rates: Rates) -> float:
    """Seconds of a generator: each prompt once (its samples share it), then token by token, in waves of `sequences`."""
    devices, mine = work.tensor_parallel, math.ceil(work.answers / work.generators)
    parameters = work.policy.parameters
    prefill = 2 * parameters * math.ceil(mine / work.samples) * work.prompt_tokens / (devices * rates.forward)
    decode = 0.0
    cached = (work.prompt_tokens + work.answer_tokens / 2) * work.policy.layers * work.policy.kv_width * work.width
    for first in range(0, mine, work.sequences):
        running = min(mine - first, work.sequences)
        moved = (parameters * work.width + running * cached) / (devices * rates.decoding)
        computed = 2 * parameters * running / (devices * rates.forward)
        decode += work.answer_tokens * max(moved, computed)
    return (prefill + decode) * rates.factors.get("generation", 1.0)


def scoring_s(work: Work, rates: Rates) -> float:
    """Seconds of the reward role."""
    return 2 * work.reward.parameters * work.tokens / rates.forward * rates.factors.get("scoring", 1.0)


def prepare_s(work: Work, rates: Rates) -> float:
    """Seconds of the learner before its update: old and reference log-probabilities, old values."""
    parameters = 2 * work.policy.parameters + (work.policy.backbone if work.critic else 0)
    passes = 2 * parameters * work.tokens / (work.ranks * rates.forward)
    return passes * rates.factors.get("learner", 1.0) + _gathers_s(work, rates, 2)


def update_s(work: Work, rates: Rates) -> float:
    """Seconds of the passes over a step's answers. Adapters need the backward pass through, not to, the frozen weights."""
    parameters = work.policy.parameters + (work.policy.backbone if work.critic else 0)
    operations = 2 + (2 if work.lora else 4) + (2 if work.checkpointing else 0)
    passes = operations * parameters * work.tokens * work.epochs / (work.ranks * rates.training)
    gathers = _gathers_s(work, rates, work.epochs * (3 + int(work.checkpointing)))
    return passes * rates.factors.get("learner", 1.0) + gathers


def _gathers_s(work: Work, rates: Rates, times: int) -> float:
    """Seconds of ZeRO-3's gathers of the weights, `times` for each micro-batch of a rank."""
    if work.zero_stage < 3 or work.ranks == 1:
        return 0.0
    batches = math.ceil(work.tokens / work.ranks / work.budget)
    return times * batches * work.policy.parameters * work.width * (work.ranks - 1) / work.ranks / rates.link


def sync_s(work: Work, rates: Rates) -> float:
    """Seconds until every generator has the learner's weights; with LoRA, the adapter alone."""
    moved = (work.lora * work.policy.linear_widths if work.lora else work.policy.parameters) * work.width
    return rates.sync_s + max(0.0, moved - rates.sync_bytes) / rates.sync


class Step(NamedTuple):
    """Busy seconds of each phase, and the phases that make up a step's wall time; the others overlap with them."""

    busy: dict[str, float]
    wall: dict[str, float]

    @property
    def seconds(self) -> float:
        """Wall time of a step."""
        return sum(self.wall.values())


def step(work: Work, rates: Rates) -> Step:
    """The phases of a step. On GPUs of their own, scoring and preparing overlap with generation, and with `staleness` the next
    generation with the update; on shared GPUs all phases are sequential."""
    busy = {
        "generation": generation_s(work, rates),
        "scoring": scoring_s(work, rates),
        "preparing": prepare_s(work, rates),
        "update": update_s(work, rates),
        "sync": sync_s(work, rates),
    }
    hidden: set[str] = set()
    if not work.shared:
        rollout = {name: busy[name] for name in ("generation", "scoring")}
        slowest = max(rollout, key=rollout.__getitem__)
        if rollout[slowest] < busy["preparing"] + (busy["update"] if work.staleness else 0.0):
            hidden = set(rollout)
        else:
            hidden = {*rollout, "preparing", *(["update"] if work.staleness else [])} - {slowest}
    wall = {name: seconds for name, seconds in busy.items() if name not in hidden}
    if rates.driver_share:
        wall["driver"] = sum(wall.values()) * rates.driver_share / (1 - rates.driver_share)
    return Step(busy, wall)


def fit(
    reward: ModelSize, rows: float, new: float, tokens: float, epochs: int, gpus: tuple[int, int], rates: Rates
) -> dict[str, float]:
    """Seconds of the phases of one fit, which follow each other: states of the frozen backbone, heads on them, distillation.

    The log has `rows` impressions of `tokens` tokens, `new` of which have no states yet. Heads are fitted on a CPU: HEAD_FITS
    ensembles of HEAD_WEIGHTS weights per hidden unit, HEAD_EPOCHS passes each. With `epochs` >= 1 the heads are distilled into
    the whole backbone on all rows; 0: they serve. `gpus` compute states, and distil.
    """
    unit = reward.backbone * tokens
    return {
        "features": 2 * unit * new / (gpus[0] * rates.forward),
        "heads": 6 * HEAD_FITS * HEAD_EPOCHS * HEAD_WEIGHTS * reward.hidden * rows / CPU_FLOPS,
        "distillation": 6 * epochs * unit * rows / (gpus[1] * rates.training),
    }


def calibrated(rates: Rates, measured: Mapping[str, tuple[Work, float]]) -> Rates:
    """`rates` under which the phases "generation" and "learner" of measured work take the seconds that they took."""
    plain, factors = replace(rates, factors={}), dict(rates.factors)
    if "generation" in measured:
        work, seconds = measured["generation"]
        factors["generation"] = seconds / generation_s(work, plain)
    if "learner" in measured:
        work, seconds = measured["learner"]
        factors["learner"] = factors["scoring"] = seconds / (prepare_s(work, plain) + update_s(work, plain))
    return replace(rates, factors=factors)


ADVICE = {
    "generation": "add generators, lower answer_tokens, or set staleness=1 so that the learner works meanwhile",
    "scoring": "take a smaller reward model",
    "preparing": "add learner ranks, or take a smaller policy",
    "update": "add learner ranks, lower epochs, set lora, or turn checkpointing off if memory allows",
    "sync": "set lora, of which the adapter alone is sent, or use a faster link between hosts",
    "driver": "take larger steps: more prompts for each",
    "features": "add GPUs, set log_rows: a fit on a sample of the log; or take a smaller reward model",
    "heads": "set log_rows: a fit on a sample of the log",
    "distillation": "set tune=head, add workers, or set log_rows: a fit on a sample of the log",
}


def bottleneck(run: Mapping[str, float]) -> tuple[str, float, str]:
    """(phase, its share of all seconds, what to change) of the longest phase."""
    name = max(run, key=run.__getitem__)
    return name, run[name] / sum(run.values()), ADVICE[name]


def llama_size(parameters: float, layers: int, hidden: int, vocabulary: int, kv_width: int, tied: bool) -> ModelSize:
    """The size of a Llama-like model: the parameters besides attention and embeddings are three linear layers in each block.

    Raises ValueError where nothing is left.
    """
    backbone = parameters - (0 if tied else vocabulary * hidden)
    attention = 2 * hidden * hidden + hidden * kv_width
    intermediate = ((backbone - vocabulary * hidden) / layers - attention) / (3 * hidden)
    if intermediate < 1:
        raise ValueError(f"shape.parameters must exceed those of embeddings and attention, got {parameters:.3g}")
    widths = layers * (4 * hidden + 2 * hidden + kv_width + 3 * (hidden + intermediate))
    return ModelSize(int(parameters), int(backbone), layers, hidden, vocabulary, int(widths), kv_width)


def draw_plan(found: Step, run_s: Mapping[str, float], path: Path) -> None:
    """Two stacked bars: the wall seconds of a step by phase, and the hours of the whole run by phase."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(9, 3.4), layout="constrained")
    panels = (("a policy step", "seconds", found.wall, 1.0), ("the whole run", "hours", run_s, 3600.0))
    colours = dict(zip(dict.fromkeys((*found.busy, *run_s)), COLOURS, strict=False))
    for axes, (title, unit, parts, divisor) in zip(canvas.subplots(2, 1), panels, strict=True):
        left = 0.0
        for name, seconds in parts.items():
            width = seconds / divisor
            axes.barh([0], [width], left=left, color=colours[name], label=f"{name} {width:.3g}")
            left += width
        axes.set(title=f"{title}: {left:.3g} {unit}", xlabel=unit, yticks=[])
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05), fontsize=8, frameon=False)
    canvas.savefig(path, dpi=110)
