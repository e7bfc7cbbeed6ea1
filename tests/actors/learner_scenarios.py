"""One rank of the learner in its own process, for test_learner.py: python learner_scenarios.py RANK WORLD PORT FOLDER NAME..."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actors.learner.rank import LearnerRank
from actors.learner.shares import Sharder, answer_metrics
from actors.weights.ipc import attach
from actors.weights.packing import checksum, unpack
from causalrm_ray.config.train import LearnerConfig
from causalrm_ray.conversation import Conversation
from causalrm_ray.types import Completion, Prompt, Scored, Span

VOCABULARY = 32
TEMPERATURE = 0.7
MAX_NEW_TOKENS = 8
STEPS = 5  # policy steps that a learning rate's schedule spans
BASE = {
    "epochs": 2,
    "minibatches": 2,
    "clip": 0.05,
    "truncation": 0.5,
    "max_grad_norm": 0.5,
    "reward_normalisation": False,
    "lr": 1e-3,
    "critic_lr": 2e-3,
}
ONE_STEP = BASE | {"epochs": 1, "minibatches": 1, "max_grad_norm": 0}
SLOW = ONE_STEP | {"lr": 2e-4}  # enough to leave the reference; Adam blows up rounding where a gradient is about 0
ALGORITHMS: dict[str, dict[str, object]] = {
    "grpo": {"truncation": "mask", "kl": {"coefficient": 0.3}},
    "rloo": {"reward_normalisation": True, "kl": {"coefficient": 0.3}},
    "reinforce_pp": {"kl": {"estimator": "k2", "coefficient": 0.3}},
}
SEVERAL_STEPS = ("gspo", "cispo", "dr_grpo")  # the others' losses are those of ALGORITHMS in other reductions
SCHEDULED = BASE | {"clip_high": 0.1, "warmup": 1, "schedule": "cosine", "weight_decay": 0.1}
NARROW = 36  # tokens per micro-batch: 3 rows of 12, or 12 of 3
ADAPTED = BASE | {"lora": 2, "lr": 5e-3, "critic_lr": 5e-3}
BOTH = ("checkpointing", "offload")
SAVING: dict[str, dict[str, object]] = {  # scenario -> options; each ends where the one after "saving-" does
    "saving-update-2": BASE | {"zero_stage": 2, "save_memory": BOTH},
    "saving-update-3": BASE | {"zero_stage": 3, "save_memory": BOTH},
    "saving-lora-3": ADAPTED | {"zero_stage": 3, "save_memory": BOTH},
}


def make_model(folder: Path) -> None:
    """A random tiny Llama and its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{number}": number for number in range(VOCABULARY - 2)} | {"<eos>": VOCABULARY - 2, "<pad>": VOCABULARY - 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)


def make_step(version: int, answers: int = 13) -> list[Scored]:
    """Answers of odd number and lengths, whose engine disagrees a little with the learner."""
    rng = np.random.default_rng(version)
    scored = []
    for number in range(answers):
        prompt = Prompt(
            f"{version}-{number}", Conversation.user("hi"), tuple(rng.integers(0, VOCABULARY, rng.integers(2, 6)).tolist())
        )
        tokens = tuple(rng.integers(0, VOCABULARY, rng.integers(1, 9)).tolist())
        logprobs = tuple(rng.normal(-3.0, 1.0, len(tokens)).tolist())
        reason = "length" if number % 4 == 0 else "stop"
        scored.append(Scored(Completion(prompt, "", tokens, logprobs, reason, version), float(rng.normal()), 0))
    return scored


def make_groups(version: int) -> list[Scored]:
    """The same, three to a prompt and four to the last; in turn on one rank and the other."""
    scored = make_step(version)
    prompts = [scored[min(number // 3, 3) * 3].completion.prompt for number in range(len(scored))]
    return [
        replace(
            answer,
            completion=replace(answer.completion, prompt=replace(answer.completion.prompt, token_ids=prompt.token_ids)),
        )
        for answer, prompt in zip(scored, prompts, strict=True)
    ]


@dataclass
class Learner:
    """One rank, and the driver's part in front of it, which every process of a scenario plays alike."""

    rank: LearnerRank
    sharder: Sharder
    number: int

    def prepare(self, completions: Sequence[Completion]) -> None:
        self.rank.prepare(self.sharder.split(completions)[self.number])

    def update(self, scored: Sequence[Scored]) -> dict[str, float]:
        answers = answer_metrics(scored, self.sharder.version)
        return self.rank.update(self.sharder.step(scored)[self.number]) | answers

    def load(self, folder: Path) -> None:
        self.sharder.restart(self.rank.load(folder))


class Rank:
    """What a scenario needs to make learners and keep results."""

    def __init__(self, rank: int, world_size: int, port: int, folder: Path) -> None:
        self.rank, self.world_size, self.folder = rank, world_size, folder
        self.address = f"tcp://127.0.0.1:{port}"

    def learner(self, tokens: int = 8192, dtype: torch.dtype = torch.float32, **options: object) -> Learner:
        config = LearnerConfig(**options)
        learner = LearnerRank(
            str(self.folder / "model"),
            config,
            dtype=dtype,
            temperature=TEMPERATURE,
            seed=5,
            rank=self.rank,
            world_size=self.world_size,
            init_method=self.address,
            max_new_tokens=MAX_NEW_TOKENS,
            steps=STEPS,
        )
        shape = {"ranks": self.world_size, "seed": 5, "max_length": 32, "tokens_per_micro_batch": tokens}
        return Learner(learner, Sharder(config, **shape), self.rank)

    def keep(self, name: str, learner: Learner, metrics: list[dict[str, float]]) -> None:
        folder = self.folder / f"{name}-{self.world_size}"
        learner.rank.save_policy(folder)
        weights = learner.rank.weights()
        if (weights is None) != (self.rank > 0):
            raise AssertionError(f"weights must come from rank 0 alone, rank {self.rank} got {weights}")
        if weights is not None:
            (folder / "metrics.json").write_text(json.dumps(metrics))
            save_file({name: value.clone() for name, value in unpack(weights)}, folder / "weights.safetensors")
            (folder / "info.json").write_text(json.dumps(learner.rank.info() | {"policy_version": weights.version}))


def train(learner: Learner, steps: int, make: Callable[[int], list[Scored]] = make_step) -> list[dict[str, float]]:
    metrics = []
    for _ in range(steps):
        scored = make(learner.rank.version)
        for first in range(0, len(scored), 5):
            learner.prepare([answer.completion for answer in scored[first : first + 5]])
        metrics.append(learner.update(scored))
    return metrics


def check_shown(learner: Learner) -> None:
    """What a rank shows to engines on its device is what it would save."""
    shared, state = learner.rank.share_weights(), learner.rank._base.state_dict()
    for name, tensor in attach(shared):
        if not torch.equal(tensor, state[name]):
            raise AssertionError(f"{name} of version {shared.version} is shown otherwise than it is")
    if (
        shared.checksum != checksum(dict(learner.rank._base.named_parameters()).values())
        or shared.version != learner.rank.version
    ):
        raise AssertionError(f"version {shared.version} or its checksum is not the learner's")


def update(place: Rank) -> None:
    """Two updates: on one rank in one micro-batch; on more under each ZeRO stage, in narrow micro-batches."""
    for stage, tokens in [(0, 8192)] if place.world_size == 1 else [(0, NARROW), (1, NARROW), (2, NARROW), (3, NARROW)]:
        learner = place.learner(tokens, zero_stage=stage, **BASE)
        metrics = train(learner, 1)
        if stage < 3:
            check_shown(learner)
        place.keep(f"update-{stage}", learner, metrics + train(learner, 1))
        if stage < 3:
            check_shown(learner)  # the memory that was shown before is what the step wrote to


def gradient(place: Rank) -> None:
    """The gradient of one whole step, read off Adam's first moment."""
    for tokens in (8192, NARROW):
        learner = place.learner(tokens, zero_stage=0, **ONE_STEP, kl={"estimator": "k3", "coefficient": 0.3})
        train(learner, 1)
        save_moments(place, learner, f"gradient-{tokens}")


def save_moments(place: Rank, learner: Learner, name: str) -> None:
    module, state = learner.rank._engine._engine.module, learner.rank._engine._engine.optimizer.state
    if place.rank == 0:
        gradients = {key: state[value]["exp_avg"].clone() / 0.1 for key, value in module.named_parameters()}
        save_file(gradients, place.folder / f"{name}-{place.world_size}.safetensors")


def algorithms(place: Rank) -> None:
    """Two whole steps of each algorithm without a critic; the gradients, read off Adam's first moment, and the weights."""
    for name, options in ALGORITHMS.items():
        learner = place.learner(8192 if place.world_size == 1 else NARROW, algorithm=name, **SLOW | options)
        place.keep(name, learner, train(learner, 2, make_groups))
        save_moments(place, learner, f"moments-{name}")


def scheduled(place: Rank) -> None:
    """Two updates with every option of the optimizer."""
    learner = place.learner(**SCHEDULED)
    place.keep("scheduled", learner, train(learner, 2))


def several_steps(place: Rank) -> None:
    """One update in four optimizer steps, whose ratios leave 1."""
    for name in SEVERAL_STEPS:
        learner = place.learner(8192 if place.world_size == 1 else NARROW, algorithm=name, **BASE | {"kl": {"coefficient": 0.3}})
        place.keep(name, learner, train(learner, 1, make_groups))


def guarded(place: Rank) -> None:
    """REINFORCE++ under ZeRO-3 on two ranks, whose steps end early for their KL; and a step of truncated answers only."""
    options = BASE | {"algorithm": "reinforce_pp", "kl": {"stop": 1e-5}, "truncation": "mask"}
    learner = place.learner(NARROW, zero_stage=0 if place.world_size == 1 else 3, **options)
    metrics = train(learner, 2, make_groups)
    place.keep("guarded", learner, metrics)
    metrics = train(learner, 1, lambda version: [truncate(answer) for answer in make_groups(version)])
    place.keep("cut", learner, metrics)


def truncate(answer: Scored) -> Scored:
    return replace(answer, completion=replace(answer.completion, stop_reason="length"))


def still(place: Rank) -> None:
    """Learning rate 0, and an engine whose log-probabilities are exact: plain transformers, one answer at a time."""
    learner = place.learner(**BASE | {"lr": 0.0, "critic_lr": 0.0})
    model = AutoModelForCausalLM.from_pretrained(place.folder / "model")
    scored = [with_logprobs(model, answer) for answer in make_step(0)]
    learner.prepare([answer.completion for answer in scored])
    place.keep("still", learner, [learner.update(scored)])


def with_logprobs(model: LlamaForCausalLM, answer: Scored) -> Scored:
    row = answer.completion.prompt.token_ids + answer.completion.token_ids
    with torch.no_grad():
        distribution = torch.log_softmax(model(torch.tensor([row])).logits[0] / TEMPERATURE, dim=-1)
    offset = len(answer.completion.prompt.token_ids)
    logprobs = tuple(float(distribution[place - 1, row[place]]) for place in range(offset, len(row)))
    return replace(answer, completion=replace(answer.completion, logprobs=logprobs))


def resume(place: Rank) -> None:
    """Three updates, save, two more; and two from the saved state; with all that changes over steps."""
    for stage in (0,) if place.world_size == 1 else (3,):
        options = SCHEDULED | {"zero_stage": stage, "kl": {"target": 0.1}, "reward_normalisation": True}
        learner = place.learner(**options)
        train(learner, 3)
        state = place.folder / f"state-{stage}-{place.world_size}"
        learner.rank.save(state)
        place.keep(f"uninterrupted-{stage}", learner, train(learner, 2))
        other = place.learner(**options)
        other.load(state)
        place.keep(f"resumed-{stage}", other, train(other, 2))


def late(place: Rank) -> None:
    """Two updates on answers that the version before wrote, the first tokens of the others too."""
    learner = place.learner(NARROW, **BASE, staleness=1)
    train(learner, 1)
    place.keep("late", learner, train(learner, 1, lambda version: [written_late(answer) for answer in make_step(version)]))


def written_late(answer: Scored, lag: int = 1) -> Scored:
    """The same, its first token by the weights `lag` versions before."""
    done = answer.completion
    spans = (Span(done.policy_version - lag, 1), Span(done.policy_version, len(done.token_ids) - 1))
    spans = tuple(span for span in spans if span.tokens)
    return replace(answer, completion=replace(done, policy_version=spans[-1].version, spans=spans))


def lora(place: Rank) -> None:
    """Two updates of adapters, PPO's critic with one of its own; state saved; a third update, and that from the saved state."""
    for stage, tokens in [(0, 8192)] if place.world_size == 1 else [(2, NARROW), (3, NARROW)]:
        options = ADAPTED | {"zero_stage": stage}
        learner = place.learner(tokens, **options)
        place.keep(f"lora-{stage}", learner, train(learner, 2))
        learner.rank.save(place.folder / f"state-lora-{stage}")
        keep_adapter(place, learner, f"lora-{stage}")
        place.keep(f"uninterrupted-lora-{stage}", learner, train(learner, 1))
        if stage != 2:
            resumed = place.learner(tokens, **options)
            resumed.load(place.folder / f"state-lora-{stage}")
            place.keep(f"resumed-lora-{stage}", resumed, train(resumed, 1))


def keep_adapter(place: Rank, learner: Learner, name: str) -> None:
    """The published adapter, and what policy and reference say of an answer to come."""
    folder, answer = place.folder / f"{name}-{place.world_size}", make_step(learner.rank.version)[0].completion
    learner.prepare([answer])
    adapter = learner.rank.adapter()
    if (adapter is None) != (place.rank > 0):
        raise AssertionError(f"adapters must come from rank 0 alone, rank {place.rank} got {adapter}")
    if adapter is not None:
        prepared = learner.rank._prepared[answer.prompt.id]
        said = {"logprobs": prepared.logprobs_R, "reference": prepared.reference_logprobs_R}
        save_file(said, folder / "said.safetensors")
        save_file({name: value.clone() for name, value in unpack(adapter)}, folder / "published.safetensors")
    learner.rank._prepared.clear()
    learner.sharder.restart(learner.rank.version)


def memory(place: Rank) -> None:
    """The same updates in less memory."""
    for name, options in SAVING.items():
        learner = place.learner(NARROW, **options)
        optimizer = learner.rank._engine._engine.optimizer
        flags = (optimizer.offload_optimizer, optimizer.offload_param) if options["zero_stage"] == 3 else (optimizer.cpu_offload,)
        if not all(flags):
            raise AssertionError(f"{name} must offload, got {flags}")
        place.keep(name, learner, train(learner, 2))


def half(place: Rank) -> None:
    """Two updates in bfloat16."""
    for stage in (0, 2):
        learner = place.learner(NARROW, torch.bfloat16, zero_stage=stage, **BASE)
        place.keep(f"half-{stage}", learner, train(learner, 2))


def refusals(place: Rank) -> None:
    """Errors of a rank, by name of the fault."""
    learner = place.learner(**BASE)
    learner.rank.save(place.folder / "state-refused")
    place.learner(**ADAPTED).rank.save(place.folder / "state-adapted")
    step = learner.sharder.step(prepared(learner, make_step(0)))[0]
    late, strange = replace(step, version=1), replace(step, ids=("stranger", *step.ids[1:]))
    calls: dict[str, Callable[[], object]] = {
        "late": lambda: learner.rank.update(late),
        "strange": lambda: learner.rank.update(strange),
        "adapter": learner.rank.adapter,
        "lora": lambda: place.learner(**ADAPTED).load(place.folder / "state-refused"),
        "targets": lambda: place.learner(**ADAPTED, lora_targets=("q_proj",)).load(place.folder / "state-adapted"),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            messages[name] = str(error).removeprefix(str(place.folder))
    (place.folder / "refusals.json").write_text(json.dumps(messages))


def prepared(learner: Learner, scored: list[Scored]) -> list[Scored]:
    learner.prepare([answer.completion for answer in scored])
    return scored


SCENARIOS = {
    run.__name__: run
    for run in (
        update,
        gradient,
        algorithms,
        scheduled,
        several_steps,
        guarded,
        still,
        resume,
        late,
        lora,
        memory,
        half,
        refusals,
    )
}

if __name__ == "__main__":
    rank, world_size, port, folder, *names = sys.argv[1:]
    for name in names:
        SCENARIOS[name](Rank(int(rank), int(world_size), int(port), Path(folder)))
    torch.distributed.barrier()  # a group whose other rank has ended may abort this process when it is destroyed
    torch.distributed.destroy_process_group()
