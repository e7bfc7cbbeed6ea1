"""Where each role will run and how much memory it will take, worked out before anything starts.

CPU cluster                  every role shares the cores
enough GPUs (disaggregated)  each generator has rollout.tensor_parallel of its own, each learner rank one, the reward roles one
fewer (colocated)            generators, ranks and reward roles share GPUs; never two ranks, which cannot talk on one device

Bytes are estimates: weights, optimizer state, caches and activations by formula, and on a CPU what a process takes by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from actors.reward.fit_spec import BATCH_SIZE
from actors.rollout.engine import DEVICE_SHARE, MAX_SEQUENCES, Transport
from actors.weights.buckets import BUCKET_BYTES, BUCKETS
from causalrm_ray.config.train import Config
from causalrm_ray.errors import ConfigError
from causalrm_ray.models.size import GROUP_TOKENS, KEPT_TOKENS, WIDTHS, ModelSize
from causalrm_ray.registry import ALGORITHMS, ENGINES
from causalrm_ray.rl.batching import TOKEN_BUDGET

GIB = 1 << 30
PROCESS_BYTES = 0.5 * GIB


@dataclass(frozen=True, slots=True)
class Allocation:
    """One process: its role, the group of GPUs (bundle) that it runs in, how many of them it has, and the bytes that it takes:
    there, or in the machine's memory where it has none."""

    role: str
    bytes: int
    bundle: int | None = None
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """All allocations by role (generator-0, learner-1, reward, ...), and the GPUs of each bundle.

    `fits_on_gpu`: there are GPUs to spare for the reward model's Ray Train workers. `transport` is how weights reach the
    generators (see actors/weights/publish).
    """

    allocations: Mapping[str, Allocation]
    bundles: Sequence[int] = ()
    fits_on_gpu: bool = False
    transport: Transport = "object"

    @property
    def colocated(self) -> bool:
        """Whether roles share a GPU."""
        return any(0 < process.gpus < 1 for process in self.allocations.values())

    @property
    def partners(self) -> dict[str, int]:
        """The learner rank on the GPU of a generator, by the generator's role, where they share one."""
        return _partners(self.allocations)

    @property
    def host_bytes(self) -> int:
        """Memory of all processes without a GPU."""
        return sum(process.bytes for process in self.allocations.values() if process.bundle is None)

    def check_memory(self, host_bytes: float, gpu_bytes: float) -> None:
        """Raise ConfigError, saying what to change, unless all fits into `host_bytes` over all nodes and `gpu_bytes` a GPU."""
        if self.host_bytes > host_bytes:
            on_host = [process for process in self.allocations.values() if process.bundle is None]
            most = max(on_host, key=lambda process: process.bytes)
            raise ConfigError(
                f"the roles need about {self.host_bytes / GIB:.1f} GiB of memory, the cluster has {host_bytes / GIB:.1f}, and "
                f"{most.role} alone takes {most.bytes / GIB:.1f}: lower rollout.generators, learner.ranks, reward.workers or "
                "model.max_length, set learner.lora or learner.save_memory=[checkpointing], take a smaller model, or add nodes"
            )
        for bundle, gpus in enumerate(self.bundles):
            inside = [process for process in self.allocations.values() if process.bundle == bundle]
            needed, room = sum(process.bytes for process in inside), gpus * DEVICE_SHARE * gpu_bytes
            if needed > room:
                raise ConfigError(
                    f"{', '.join(process.role for process in inside)} need about {needed / GIB:.1f} GiB on {gpus} GPU, where "
                    f"{room / GIB:.1f} can be planned with: raise learner.zero_stage, learner.ranks or "
                    "rollout.tensor_parallel, set learner.lora or learner.save_memory, or lower model.max_length"
                )


def make_plan(config: Config, policy: ModelSize, reward: ModelSize, parts: Collection[str], gpus: int) -> Plan:
    """The plan of the roles in `parts` (see `Roles`) for a cluster of `gpus` GPUs.

    Raises ConfigError, saying what to change, where there are too few GPUs.
    """
    sizes = _bytes(config, policy, reward, parts, gpus)
    generators = [role for role in sizes if role.startswith("generator")]
    ranks = [role for role in sizes if role.startswith("learner")]
    others = [*(role for role in sizes if role.startswith("features")), *(role for role in sizes if role == "reward")]
    workers = [role for role in sizes if role.startswith("reward worker")]
    if gpus == 0:
        return Plan({role: Allocation(role, size) for role, size in sizes.items()})
    spread = config.rollout.tensor_parallel
    bundles = [spread] * len(generators) + [1] * len(ranks) + [1] * bool(others)
    if gpus >= sum(bundles):
        indices = {role: index for index, role in enumerate([*generators, *ranks])}
    else:
        _check_can_share(len(generators), spread, len(ranks), sum(bundles), gpus)
        bundles = [1] * min(gpus, max(len(generators), len(ranks), 1))
        indices = {role: index % len(bundles) for part in (generators, ranks) for index, role in enumerate(part)}
    if not (generators or ranks):  # a fit alone: every GPU computes states, but those of workers that need their own
        bundles = [1] * max(1, len(others) - 1)
        indices |= {role: min(place, len(bundles) - 1) for place, role in enumerate(others)}
    else:
        indices |= dict.fromkeys(others, len(bundles) - 1)
    sharing = Counter(indices.values())
    allocations = {role: Allocation(role, sizes[role], index, bundles[index] / sharing[index]) for role, index in indices.items()}
    allocations |= {role: Allocation(role, sizes[role]) for role in sizes if role not in indices}
    ends = [process for role, process in allocations.items() if role.startswith("generator") or role == "learner-0"]
    transport = _transport(config, ends, _partners(allocations))
    if transport == "broadcast":
        largest = policy.vocabulary * policy.hidden * WIDTHS[config.model.dtype]  # a tensor is never cut
        buckets = BUCKETS * max(BUCKET_BYTES, largest)
        allocations |= {process.role: replace(process, bytes=process.bytes + int(buckets * process.gpus)) for process in ends}
    return Plan(allocations, bundles, bool(workers) and gpus - sum(bundles) >= len(workers), transport)


def _partners(allocations: Mapping[str, Allocation]) -> dict[str, int]:
    """The learner rank on the one GPU of a generator, by the generator's role, where there is one."""
    ranks = {found.bundle: int(role.rpartition("-")[2]) for role, found in allocations.items() if role.startswith("learner")}
    shared = {role: found.bundle for role, found in allocations.items() if role.startswith("generator") and found.gpus < 1}
    return {role: ranks[bundle] for role, bundle in shared.items() if bundle is not None and bundle in ranks}


def _transport(config: Config, ends: Sequence[Allocation], partners: Mapping[str, int]) -> Transport:
    """From GPU to GPU where the generators and learner rank 0, the `ends`, have theirs to themselves: two processes on one
    cannot talk by NCCL. Within the GPU where each generator shares one with a rank that has whole weights. Adapters are small,
    and some engines take objects only."""
    generators = [process for process in ends if process.role != "learner-0"]
    if not generators or len(generators) == len(ends) or config.learner.lora:
        return "object"
    if all(process.gpus >= 1 for process in ends):
        found: Transport = "broadcast"
    else:
        found = "ipc" if len(partners) == len(generators) and config.learner.zero_stage < 3 else "object"
    return found if found in ENGINES.load(config.rollout.engine).transports else "object"


def _check_can_share(generators: int, spread: int, ranks: int, wanted: int, gpus: int) -> None:
    if spread > 1:
        raise ConfigError(
            f"rollout.tensor_parallel={spread} with rollout.generators={generators} and learner.ranks={ranks} needs {wanted} "
            f"GPUs (one for the reward roles), the cluster has {gpus}: lower one of them; with tensor_parallel=1 roles share GPUs"
        )
    if ranks > gpus:
        raise ConfigError(
            f"learner.ranks must be at most the cluster's {gpus} GPUs, got {ranks}: two ranks cannot talk on one GPU"
        )


def _bytes(config: Config, policy: ModelSize, reward: ModelSize, parts: Collection[str], gpus: int) -> dict[str, int]:
    """Bytes of each process, by role."""
    on_gpu = gpus > 0
    width, longest = WIDTHS[config.model.dtype], config.model.max_length
    rollout, learner, critic = config.rollout, config.learner, ALGORITHMS.load(config.learner.algorithm).critic
    answers = -(-rollout.prompts_per_step * rollout.samples_per_prompt // rollout.generators)  # of one generator in a step
    single = WIDTHS["float32"]
    states = WIDTHS["bfloat16"] if on_gpu else width
    scoring = reward.weight_bytes(states) + reward.activation_bytes(states, max(GROUP_TOKENS, longest), training=False)
    sizes: dict[str, float] = {}
    if "generators" in parts:
        cache = policy.cache_bytes(width, longest * min(MAX_SEQUENCES, answers))
        size = policy.weight_bytes(width) + cache + ENGINES.load(rollout.engine).process_bytes * (not on_gpu)
        sizes |= {f"generator-{number}": size for number in range(rollout.generators)}
    if "learner" in parts:
        offload, checkpointing = ("offload" in learner.save_memory and on_gpu), "checkpointing" in learner.save_memory
        size = policy.training_bytes(width, learner.ranks, learner.zero_stage, critic, learner.lora, offload)
        most = -(-rollout.prompts_per_step * rollout.samples_per_prompt // learner.ranks) * longest  # tokens of a rank in a step
        size += policy.activation_bytes(width, max(min(TOKEN_BUDGET, most), longest), critic, checkpointing)
        sizes |= {f"learner-{number}": size + PROCESS_BYTES * (not on_gpu) for number in range(learner.ranks)}
    if "reward" in parts:
        worker, spared = 0, 0
        if config.reward.tune == "full":
            tokens = min(BATCH_SIZE * longest, KEPT_TOKENS + max(GROUP_TOKENS, longest))
            # The one that serves, the one that learns; a scorer has no vocabulary.
            worker = reward.weight_bytes(single) + reward.training_bytes(single, 1, 0, critic=False)
            worker += replace(reward, vocabulary=0).activation_bytes(single, tokens)
            spared = config.reward.workers
        computing = 1 if "generators" in parts or "learner" in parts else max(1, gpus - spared)
        sizes |= {"reward": scoring + PROCESS_BYTES * (not on_gpu)}
        if "log" in parts:  # there is something to fit
            sizes |= {f"features-{number}": scoring + PROCESS_BYTES * (not on_gpu) for number in range(computing)}
            sizes |= {"propensity": PROCESS_BYTES}
            sizes |= {f"reward worker {number}": worker + PROCESS_BYTES for number in range(config.reward.workers)}
    return {role: int(size) for role, size in sizes.items()}
