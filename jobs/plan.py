"""Memory, time and cost of a training run before it starts; no role is started.

plan.json, plan.png, and a table: bytes of each role, seconds of each phase of a step, dollars, what is slowest and what to do.
With `measured`, a perf.json of the same hardware, measured rates replace assumed ones, and the times that they predict for the
whole steps in that file are shown beside the measured times.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from actors.placement_plan import Plan, make_plan
from actors.rollout.engine import MAX_SEQUENCES
from causalrm_ray.capacity import GPUS, Gpu, Rates, Work, bottleneck, calibrated, draw_plan, fit, llama_size, step
from causalrm_ray.checkpoint import read_json, write_json
from causalrm_ray.config.options import dump_config, validate
from causalrm_ray.config.plan import PlanConfig, ShapeConfig
from causalrm_ray.config.train import Config
from causalrm_ray.errors import ConfigError, InputError
from causalrm_ray.models.size import WIDTHS, ModelSize, model_size
from causalrm_ray.registry import ALGORITHMS
from causalrm_ray.rl.batching import TOKEN_BUDGET
from causalrm_ray.types import LoraTargets

ROLES = frozenset(("generators", "learner", "log", "reward"))
PERF_PROMPT_TOKENS = 12  # of the embedded world's prompts, which `perf` uses, on average


def run(config: PlanConfig) -> int:
    """Run the job."""
    folder = config.run.path
    policy, reward = size(config.model, config.shape, config.lora_targets), size(config.reward, config.reward_shape)
    gpu, rates = hardware(config)
    roles = make_plan(main_tree(config), policy, reward, ROLES, config.hardware.gpus)
    measured = read_measured(config.measured) if config.measured else {}
    rates = with_measured(rates, measured)
    work = planned_work(config, policy, reward, roles)
    found = step(work, rates)
    rows = config.log_rows or config.log_events
    tokens = config.prompt_tokens + config.answer_tokens
    epochs = config.reward_epochs if config.tune == "full" else 0
    # The first fit by itself, on every GPU; a refit beside generators and learner has one for states.
    fitted = fit(reward, rows, rows, tokens, epochs, (config.hardware.gpus, config.workers), rates)
    refitted = fit(reward, rows, config.new_rows * rows, tokens, epochs, (1, config.workers), rates)
    run_s = {name: seconds * config.steps for name, seconds in found.wall.items()}
    run_s |= {name: seconds + config.refits * refitted[name] for name, seconds in fitted.items()}
    dollars = sum(run_s.values()) / 3600 * config.hardware.gpus * gpu.price
    phase, share, change = bottleneck(run_s)
    plan = {
        "bytes": {name: role.bytes for name, role in roles.allocations.items()},
        "fits": check_fit(roles, config, gpu),
        "step": {"busy_s": found.busy, "wall_s": found.wall, "seconds": found.seconds},
        "fit_s": fitted,
        "refit_s": refitted,
        "run_s": run_s,
        "dollars": dollars,
        "bottleneck": {"phase": phase, "share": share, "change": change},
        "checked": checked(measured, rates),
    }
    dump_config(config, folder / "config.yaml")
    write_json(folder / "plan.json", plan)
    draw_plan(found, run_s, folder / "plan.png")
    show(plan, roles, config)
    return 0


def size(model: str | None, shape: ShapeConfig, targets: LoraTargets = "auto") -> ModelSize:
    """The size of a model that exists, for adapters at `targets`, or of one by its numbers. Raises InputError."""
    try:
        return llama_size(**shape.model_dump()) if model is None else model_size(model, targets)
    except (OSError, ValueError) as error:
        what = f"model {model} must be a Hugging Face folder or hub id: " if model else ""
        raise InputError(f"{what}{error}") from error


def hardware(config: PlanConfig) -> tuple[Gpu, Rates]:
    """The GPU's figures, and the rates that are assumed to be reached."""
    given, share = config.hardware, config.efficiency
    kind = GPUS[given.kind]
    scales = {"memory": (given.memory_gb, 1e9), "flops": (given.tflops, 1e12), "bandwidth": (given.hbm_gb_s, 1e9)}
    scales |= {"link": (given.link_gb_s, 1e9), "price": (given.price, 1.0)}
    gpu = kind._replace(**{name: value * scale for name, (value, scale) in scales.items() if value is not None})
    rates = Rates(
        training=gpu.flops * share.training,
        forward=gpu.flops * share.forward,
        decoding=gpu.bandwidth * share.decoding,
        link=gpu.link,
        sync=given.sync_gb_s * 1e9,
        factors={},
    )
    return gpu, rates


def main_tree(config: PlanConfig) -> Config:
    """The options of the main job, for the arithmetic of memory that it does itself."""
    return validate(
        {
            "model": {"dtype": config.dtype, "max_length": config.prompt_tokens + config.answer_tokens + 1},
            "rollout": {
                **config.model_dump(include={"generators", "tensor_parallel"}),
                "prompts_per_step": config.prompts,
                "samples_per_prompt": config.samples,
                "max_new_tokens": config.answer_tokens,
            },
            "learner": {
                **config.model_dump(include={"algorithm", "ranks", "zero_stage", "lora", "lora_targets"}),
                "save_memory": ["checkpointing"] if config.checkpointing else [],
            },
            "reward": {"workers": config.workers, "tune": config.tune},
        }
    )


def planned_work(config: PlanConfig, policy: ModelSize, reward: ModelSize, roles: Plan) -> Work:
    """The step that the options describe."""
    names = {"prompts", "samples", "prompt_tokens", "answer_tokens", "generators", "tensor_parallel", "ranks", "lora"}
    names |= {"zero_stage", "checkpointing", "epochs", "staleness"}
    return Work(
        policy=policy,
        reward=reward,
        width=WIDTHS[config.dtype],
        critic=ALGORITHMS.load(config.algorithm).critic,
        sequences=MAX_SEQUENCES,
        budget=TOKEN_BUDGET,
        shared=any(0 < role.gpus < 1 for name, role in roles.allocations.items() if name.startswith(("generator", "learner"))),
        **config.model_dump(include=names),
    )


def check_fit(roles: Plan, config: PlanConfig, gpu: Gpu) -> str:
    """Empty if the roles fit into memory, else what to change."""
    try:
        roles.check_memory(config.hardware.host_gb * 1e9, gpu.memory)
    except ConfigError as error:
        return str(error)
    return ""


def read_measured(path: Path) -> dict[str, list[tuple[Work, Mapping[str, float]]]]:
    """The figures of a perf.json by name: the work of each case and its details. Raises InputError for another file."""
    try:
        figures = [(row["name"], row["case"], {"value": row["value"], **row["details"]}) for row in read_json(path)["figures"]]
        found: dict[str, list[tuple[Work, Mapping[str, float]]]] = {}
        for name, case, details in figures:
            if any(not isinstance(value, int | float) for value in details.values()):
                raise TypeError(f"{name} must hold numbers")
            found.setdefault(name, []).append((perf_work(case, details), details))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"measured: {path} must be a perf.json that `perf` wrote: {error!r}") from error
    return {name: sorted(pairs, key=lambda pair: pair[0].policy.parameters * pair[0].tokens) for name, pairs in found.items()}


def perf_work(case: str, details: Mapping[str, float]) -> Work:
    """The step of a case of `perf`: GRPO in float32, one generator, one rank, all on the same cores."""
    from causalrm_ray.world.random_models import SIZES  # which loads torch and transformers

    parts = re.fullmatch(r"(\S+) (\d+)x(\d+)", case)
    if parts is None or parts[1] not in SIZES:
        raise ValueError(f"case must be like '26M 32x64', got {case!r}")
    shape, answers, tokens = SIZES[parts[1]], int(parts[2]), int(parts[3])
    parameters = shape.vocab * shape.hidden + shape.layers * (4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate)
    model = llama_size(parameters, shape.layers, shape.hidden, shape.vocab, 2 * shape.hidden, True)
    written = round(details["tokens"] / answers) if "tokens" in details else tokens
    samples = min(8, answers)
    return Work(
        policy=model,
        reward=model,
        width=4,
        prompts=answers // samples,
        samples=samples,
        prompt_tokens=PERF_PROMPT_TOKENS,
        answer_tokens=max(1, written),
        sequences=MAX_SEQUENCES,
        budget=TOKEN_BUDGET,
        shared=True,
    )


def with_measured(rates: Rates, measured: Mapping[str, list[tuple[Work, Mapping[str, float]]]]) -> Rates:
    """Rates under which the largest measured case of each part takes as long as it took."""
    largest = {name: pairs[-1] for name, pairs in measured.items()}
    phases = {"generation": "rollout", "learner": "learner"}
    seconds = {
        phase: (largest[name][0], largest[name][1]["ours_s"])
        for phase, name in phases.items()
        if name in largest and largest[name][1].get("ours_s", 0) > 0
    }
    rates = calibrated(rates, seconds)
    if "sync" in largest:
        details = largest["sync"][1]
        rates = replace(rates, sync_s=details.get("ours_s", 0.0), sync_bytes=details.get("mbytes", 0.0) * 1e6)
    if "driver" in largest:
        rates = replace(rates, driver_share=min(max(largest["driver"][1]["value"], 0.0), 0.9))
    return rates


def checked(measured: Mapping[str, list[tuple[Work, Mapping[str, float]]]], rates: Rates) -> list[dict[str, Any]]:
    """Predicted and measured times of the measured whole steps: with the reward model (driver) and without (trl)."""
    lines = []
    for name, key in (("driver", "step_s"), ("trl", "ours_s")):
        for work, details in measured.get(name, []):
            if key in details:
                wall = dict(step(work, rates).wall)
                predicted = sum(wall.values()) - (wall["scoring"] if name == "trl" else 0.0)
                case = f"{work.policy.parameters / 1e6:.3g}M {work.answers}x{work.answer_tokens}"
                lines.append({"step": name, "case": case, "predicted_s": predicted, "measured_s": details[key]})
    return lines


def show(plan: Mapping[str, Any], roles: Plan, config: PlanConfig) -> None:
    """The table, printed."""
    console = Console(highlight=False)
    memory = Table("role", "GPUs", "GB", box=None)
    for name, role in roles.allocations.items():
        memory.add_row(name, f"{role.gpus:.3g}" if role.gpus else "host", f"{role.bytes / 1e9:.1f}")
    times = Table("phase", "busy s", "of a step's wall time, s", box=None)
    for name in {**plan["step"]["busy_s"], **plan["step"]["wall_s"]}:
        busy, wall = (plan["step"][key].get(name) for key in ("busy_s", "wall_s"))
        times.add_row(name, "" if busy is None else f"{busy:.3g}", "hidden" if wall is None else f"{wall:.3g}")
    console.print(memory)
    console.print(times)
    hours = sum(plan["run_s"].values()) / 3600
    for name in ("fit", "refit"):
        parts = ", ".join(f"{phase} {seconds:.3g} s" for phase, seconds in plan[f"{name}_s"].items() if seconds)
        console.print(f"a {name} {sum(plan[f'{name}_s'].values()) / 3600:.3g} h: {parts}", soft_wrap=True)
    console.print(f"a step {plan['step']['seconds']:.3g} s, the run {hours:.3g} h, ${plan['dollars']:,.0f}")
    slow = plan["bottleneck"]
    console.print(f"slowest: {slow['phase']}, {slow['share']:.0%} of the run: {slow['change']}", soft_wrap=True)
    if plan["fits"]:
        console.print(f"does not fit: {plan['fits']}", style="red", soft_wrap=True)
    for line in plan["checked"]:
        apart = line["predicted_s"] / line["measured_s"] - 1
        console.print(
            f"a measured step ({line['step']}, {line['case']}): {line['predicted_s']:.3g} s by these rates, "
            f"{line['measured_s']:.3g} s measured, {apart:+.0%}",
            soft_wrap=True,
        )
    console.print(f"see {config.run.path}", markup=False)
