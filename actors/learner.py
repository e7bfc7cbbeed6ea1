"""One rank of the PPO learner. Every method is collective: all ranks are called with the same arguments at the same time.

    completions --prepare--> old logprobs, values, reference logprobs of this rank's rows (no gradient, as answers arrive)
    scored      --update---> rewards -> GAE -> whitening -> epochs x minibatches optimizer steps -> metrics, version + 1
                --weights--> full policy weights on rank 0

Strictly on-policy: a completion must carry the learner's own version. Losses are divided by the token count of the whole
minibatch over all ranks, so the gradient does not depend on the number of ranks or micro-batches. There is no random
state: shuffles are drawn from (seed, version, epoch).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from actors.engine_deepspeed import DeepSpeedEngine
from actors.weight_sync import Weights, pack
from causalrm_ray.checks import check_finite
from causalrm_ray.config import LearnerConfig
from causalrm_ray.losses.advantage import gae, moments, token_rewards, whiten
from causalrm_ray.losses.policy import adapt_kl_coefficient, importance_weight, kl_k1, kl_k3, masked_mean, ppo_clip, value_loss
from causalrm_ray.models.policy import ActorCritic, Reference, TokenOutputs, load_policy
from causalrm_ray.models.text import load_tokenizer
from causalrm_ray.types import Completion, Prompt, Scored

KL_HORIZON = 5000  # answers over which the adaptive KL coefficient reacts
STATE = "learner.json"
TRAINING = ("policy_loss", "value_loss", "entropy", "ratio_mean", "clip_fraction")  # means over trained tokens, in this order
BLANK = Completion(Prompt("", "", (0,)), "", (0,), (0.0,), "stop", 0)  # the row of a rank that has none left; its mask is 0


class Prepared(NamedTuple):
    """One answer as the policy saw it before the update; tensors [R] over its tokens."""

    completion: Completion
    logprobs_R: torch.Tensor
    values_R: torch.Tensor
    reference_logprobs_R: torch.Tensor


class Experience(NamedTuple):
    """What a rank trains on, [rows, R] over answer tokens, 0 where the mask is; the last row is BLANK's, all 0."""

    mask_BR: torch.Tensor
    logprobs_BR: torch.Tensor
    values_BR: torch.Tensor
    reference_logprobs_BR: torch.Tensor
    weights_BR: torch.Tensor
    advantages_BR: torch.Tensor
    returns_BR: torch.Tensor

    def select(self, rows: Sequence[int], width: int) -> Experience:
        return Experience(*(field[list(rows), :width] for field in self))


class LearnerRank:
    """Policy, critic and frozen reference of one rank under DeepSpeed."""

    def __init__(
        self,
        model: str,
        config: LearnerConfig,
        *,
        dtype: torch.dtype,
        temperature: float,
        seed: int,
        rank: int,
        world_size: int,
        init_method: str,
        max_length: int,
        tokens_per_micro_batch: int = 8192,
    ) -> None:
        """Load `model` (folder or hub id) and join the other ranks at `init_method` ("tcp://host:port").

        `temperature` > 0 is the engine's: log-probabilities are taken at it. `max_length` bounds prompt + answer in
        tokens; `tokens_per_micro_batch` // `max_length` rows (at least 1) go through the model together.
        """
        policy = load_policy(model, dtype)
        self.version = 0
        self._model, self._config = model, config
        self._temperature, self._seed, self._max_length = temperature, seed, max_length
        self._rank, self._world_size = rank, world_size
        self._micro_rows = max(1, tokens_per_micro_batch // max_length)
        self._policy = policy
        self._parameters = policy.num_parameters()
        self._kl_coefficient = config.kl.coefficient
        self._owners: dict[str, int] = {}  # id -> rank that prepared it, of all rows of the step
        self._prepared: dict[str, Prepared] = {}
        module = ActorCritic(policy)
        groups = [
            {"params": list(policy.parameters()), "lr": config.lr},
            {"params": [*module.critic.parameters(), *module.value_head.parameters()], "lr": config.critic_lr},
        ]
        self._engine = DeepSpeedEngine(module, groups, config, dtype, rank, world_size, init_method)
        self._reference = Reference(load_policy(model, dtype)).to(self._engine.device)

    def prepare(self, completions: Sequence[Completion]) -> None:
        """Evaluate this rank's share (rows rank, rank + world size, ...) of a micro-batch under the current weights.

        Raises ValueError, naming the id, for an answer of another policy version, without tokens, too long, or known.
        """
        ids = [completion.prompt.id for completion in completions]
        for place, completion in enumerate(completions):
            self._check(completion)
            if completion.prompt.id in self._owners or completion.prompt.id in ids[:place]:
                raise ValueError(f"ids must be unique within a step, got {completion.prompt.id!r} twice")
        self._owners.update((name, place % self._world_size) for place, name in enumerate(ids))
        mine = list(completions[self._rank :: self._world_size])
        share = math.ceil(len(completions) / self._world_size)
        for first in range(0, share, self._micro_rows):
            rows = mine[first : first + self._micro_rows]
            for completion, *values in zip(rows, *self._evaluate(rows or [BLANK]), strict=False):
                width = len(completion.token_ids)
                self._prepared[completion.prompt.id] = Prepared(completion, *(value[:width] for value in values))

    def update(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Train on the whole step's answers, the same list in the same order on all ranks, and return metrics over ranks.

        Raises ValueError, naming the id, for an answer that was never prepared, comes twice, or is of another version.
        """
        self._check_step(scored)
        experience, metrics = self._experience(scored)
        mine = self._mine(range(len(scored)), scored)
        rows = {place: row for row, place in enumerate(mine)}
        completions = [*(scored[place].completion for place in mine), BLANK]
        steps = []
        for epoch in range(self._config.epochs):
            for minibatch in self._order(len(scored), epoch).tensor_split(self._config.minibatches):
                places = minibatch.tolist()
                tokens = sum(len(scored[place].completion.token_ids) for place in places)
                micro_batches = self._micro_batches(places, scored, rows)
                steps.append(self._optimizer_step(micro_batches, completions, experience, tokens))
        metrics |= self._reduce_steps(steps) | _answer_metrics(scored) | {"kl_coefficient": self._kl_coefficient}
        target = self._config.kl.target
        if target is not None:
            self._kl_coefficient = adapt_kl_coefficient(self._kl_coefficient, metrics["kl"], target, len(scored), KL_HORIZON)
        self._owners.clear()
        self._prepared.clear()
        self.version += 1
        return metrics

    def weights(self) -> Weights | None:
        """The policy's full weights under their Hugging Face names on rank 0, None elsewhere."""
        named = self._engine.gathered(self._policy)
        if self._rank == 0:
            return pack(self.version, named)
        return _exhaust(named)

    def save(self, folder: Path) -> None:
        """Write the exact state under `folder`, which all ranks share: DeepSpeed's files of each rank, and JSON."""
        folder = Path(folder)
        self._engine.save(folder)
        if self._rank == 0:
            state = {
                "version": self.version,
                "kl_coefficient": self._kl_coefficient,
                "zero_stage": self._config.zero_stage,
                "world_size": self._world_size,
            }
            (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Continue exactly from what `save` wrote under the same model, ZeRO stage and (for ZeRO 1-3) number of ranks.

        DeepSpeed's files are pickles, which can run code: the caller must have checked them against its manifest of hashes.
        """
        folder = Path(folder)
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if state["zero_stage"] != self._config.zero_stage:
            raise ValueError(
                f"{folder} was saved under ZeRO {state['zero_stage']}, the learner runs ZeRO {self._config.zero_stage}"
            )
        if self._config.zero_stage > 0 and state["world_size"] != self._world_size:
            raise ValueError(f"{folder} was saved by {state['world_size']} ranks under ZeRO, the learner has {self._world_size}")
        self._engine.load(folder)
        self.version, self._kl_coefficient = state["version"], state["kl_coefficient"]
        self._owners.clear()
        self._prepared.clear()

    def save_policy(self, folder: Path) -> None:
        """Write the policy and its tokenizer as a Hugging Face folder that AutoModelForCausalLM loads."""
        named = self._engine.gathered(self._policy)
        if self._rank == 0:
            self._policy.save_pretrained(folder, state_dict=dict(named))
            load_tokenizer(self._model).save_pretrained(folder)
        else:
            _exhaust(named)

    def info(self) -> dict[str, str | int]:
        """What the learner runs on; `parameters` counts the policy's."""
        return {
            "name": "deepspeed",
            "version": self._engine.version,
            "zero_stage": self._config.zero_stage,
            "world_size": self._world_size,
            "device": str(self._engine.device),
            "parameters": self._parameters,
        }

    def _check(self, completion: Completion) -> None:
        name, length = completion.prompt.id, len(completion.prompt.token_ids) + len(completion.token_ids)
        if completion.policy_version != self.version:
            raise ValueError(f"answer {name!r} must come from policy version {self.version}, got {completion.policy_version}")
        if not completion.token_ids or not completion.prompt.token_ids:
            raise ValueError(f"answer {name!r} and its prompt must have at least one token each")
        if len(completion.logprobs) != len(completion.token_ids):
            raise ValueError(
                f"answer {name!r} must have one logprob per token, got {len(completion.logprobs)} for {len(completion.token_ids)}"
            )
        if length > self._max_length:
            raise ValueError(f"answer {name!r} with its prompt must have at most {self._max_length} tokens, got {length}")

    def _check_step(self, scored: Sequence[Scored]) -> None:
        if len(scored) < self._config.minibatches:
            raise ValueError(f"update needs an answer per minibatch, got {len(scored)} answers for {self._config.minibatches}")
        seen: set[str] = set()
        for answer in scored:
            name = answer.completion.prompt.id
            self._check(answer.completion)
            if name not in self._owners:
                raise ValueError(f"answer {name!r} was never prepared in this step")
            if name in seen:
                raise ValueError(f"ids must be unique within a step, got {name!r} twice")
            seen.add(name)
        check_finite("reward", torch.tensor([answer.reward for answer in scored]))

    def _evaluate(self, completions: Sequence[Completion]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(logprobs, values, reference logprobs), each [B, R], under the current weights."""
        input_ids, start, positions_BR = _pad(completions, self._engine.device)
        with torch.no_grad():
            outputs = self._engine(input_ids, start, self._temperature)
            reference_BT = self._reference(input_ids, start, self._temperature)
        logprobs_BR, values_BR, reference_BR = (
            field.gather(1, positions_BR) for field in (outputs.logprobs_BT, outputs.values_BT, reference_BT)
        )
        return logprobs_BR, values_BR, reference_BR

    def _experience(self, scored: Sequence[Scored]) -> tuple[Experience, dict[str, float]]:
        """This rank's rows in the order of `scored`, then BLANK's; and the metrics of the rollout over all ranks."""
        config, device = self._config, self._engine.device
        mine = [scored[place] for place in self._mine(range(len(scored)), scored)]
        width = max(len(answer.completion.token_ids) for answer in scored)
        prepared = [self._prepared[answer.completion.prompt.id] for answer in mine]

        def stack(rows: Sequence[torch.Tensor]) -> torch.Tensor:
            padded = torch.zeros(len(rows), width, device=device)
            for place, row in enumerate(rows):
                padded[place, : row.shape[0]] = row
            return padded

        mask_BR = stack([torch.ones_like(row.logprobs_R) for row in prepared])
        logprobs_BR, values_BR = stack([row.logprobs_R for row in prepared]), stack([row.values_R for row in prepared])
        reference_BR = stack([row.reference_logprobs_R for row in prepared])
        rollout_BR = stack([torch.tensor(answer.completion.logprobs, device=device) for answer in mine])
        kl_BR = kl_k1(logprobs_BR, reference_BR)
        in_reward = self._kl_coefficient if config.kl.estimator == "k1" else 0.0
        rewards_BR = token_rewards(
            torch.tensor([answer.reward for answer in mine], device=device),
            torch.tensor([float(answer.completion.stop_reason == "length") for answer in mine], device=device),
            mask_BR,
            in_reward * kl_BR,
            config.truncation_penalty,
        )
        advantages_BR, returns_BR = gae(rewards_BR, values_BR, mask_BR, config.gamma, config.lam)
        total = moments(advantages_BR, mask_BR)
        torch.distributed.all_reduce(total)
        weights_BR = (
            mask_BR if config.importance_cap is None else importance_weight(logprobs_BR, rollout_BR, config.importance_cap)
        )
        fields = (mask_BR, logprobs_BR, values_BR, reference_BR, weights_BR, whiten(advantages_BR, mask_BR, total), returns_BR)
        experience = Experience(*(torch.nn.functional.pad(field, (0, 0, 0, 1)) for field in fields))
        return experience, self._rollout_metrics(kl_BR, logprobs_BR - rollout_BR, mask_BR, len(scored))

    def _optimizer_step(
        self, micro_batches: Sequence[Sequence[int]], completions: Sequence[Completion], experience: Experience, tokens: int
    ) -> tuple[torch.Tensor, float]:
        """One step on a minibatch of `tokens` tokens over all ranks: ([sums of TRAINING, largest ratio], gradient norm)."""
        figures = []
        for number, rows in enumerate(micro_batches, start=1):
            input_ids, start, positions_BR = _pad([completions[row] for row in rows], self._engine.device)
            outputs = self._engine(input_ids, start, self._temperature)
            outputs = TokenOutputs(*(field.gather(1, positions_BR) for field in outputs))
            loss, figure = self._loss(outputs, experience.select(rows, positions_BR.shape[1]), tokens)
            self._engine.backward(loss * self._world_size, last=number == len(micro_batches))  # the engine averages over ranks
            figures.append(figure)
        norm = self._engine.step()
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm must be finite, got {norm} in the update of policy version {self.version}"
            )
        stacked = torch.stack(figures)
        return torch.cat([stacked[:, :-1].sum(dim=0), stacked[:, -1:].amax(dim=0)]), norm

    def _loss(self, new: TokenOutputs, old: Experience, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(this micro-batch's share of the minibatch's loss, [sums of TRAINING over its tokens, largest ratio])."""
        clip, mask_BR = self._config.clip, old.mask_BR
        policy_BR = old.weights_BR * ppo_clip(new.logprobs_BT, old.logprobs_BR, old.advantages_BR, clip)
        value_BR = value_loss(new.values_BT, old.values_BR, old.returns_BR, clip)
        loss_BR = policy_BR + value_BR
        if self._config.kl.estimator == "k3":
            loss_BR = loss_BR + self._kl_coefficient * kl_k3(new.logprobs_BT, old.reference_logprobs_BR)
        with torch.no_grad():
            ratio_BR = torch.exp(new.logprobs_BT - old.logprobs_BR) * mask_BR
            clipped_BR = ((ratio_BR - 1).abs() > clip).float()
            fields = (policy_BR, value_BR, new.entropy_BT, ratio_BR, clipped_BR, mask_BR)
            figures = torch.stack([*((field * mask_BR).double().sum() for field in fields), ratio_BR.max().double()])
        return masked_mean(loss_BR, mask_BR, tokens), figures

    def _mine(self, places: Sequence[int], scored: Sequence[Scored]) -> list[int]:
        return [place for place in places if self._owners[scored[place].completion.prompt.id] == self._rank]

    def _micro_batches(self, places: Sequence[int], scored: Sequence[Scored], rows: Mapping[int, int]) -> list[list[int]]:
        """This rank's rows of a minibatch in as many micro-batches as the busiest rank needs; BLANK's row where none is left."""
        counts = Counter(self._owners[scored[place].completion.prompt.id] for place in places)
        mine = [rows[place] for place in places if place in rows]
        firsts = range(0, max(counts.values()), self._micro_rows)
        return [mine[first : first + self._micro_rows] or [len(rows)] for first in firsts]

    def _order(self, answers: int, epoch: int) -> torch.Tensor:
        """A permutation of the answers that depends on (seed, version, epoch) only."""
        entropy = np.random.SeedSequence([self._seed, self.version, epoch])
        return torch.from_numpy(np.random.default_rng(entropy).permutation(answers))

    def _rollout_metrics(
        self, kl_BR: torch.Tensor, mismatch_BR: torch.Tensor, mask_BR: torch.Tensor, answers: int
    ) -> dict[str, float]:
        kept = mismatch_BR[mask_BR != 0].double()
        ratio = kept.exp()
        total = torch.stack(
            [(kl_BR * mask_BR).double().sum(), kept.abs().sum(), ratio.sum(), ratio.square().sum(), mask_BR.double().sum()]
        )
        largest = torch.cat([kept.abs(), kept.new_zeros(1)]).max()
        torch.distributed.all_reduce(total)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        kl, absolute, weight, squared, tokens = total.tolist()
        return {
            "kl": kl / answers,
            "importance_weight_mean": weight / tokens,
            "importance_weight_ess": weight**2 / squared / tokens,
            "logprob_mismatch_mean_abs": absolute / tokens,
            "logprob_mismatch_max_abs": float(largest),
        }

    def _reduce_steps(self, steps: Sequence[tuple[torch.Tensor, float]]) -> dict[str, float]:
        figures = torch.stack([figure for figure, _ in steps])
        total, largest = figures[:, :-1].sum(dim=0), figures[:, -1].max()
        torch.distributed.all_reduce(total)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        *sums, tokens = total.tolist()
        means = {name: value / tokens for name, value in zip(TRAINING, sums, strict=True)}
        return means | {"ratio_max": float(largest), "grad_norm": sum(norm for _, norm in steps) / len(steps)}


def _pad(completions: Sequence[Completion], device: torch.device) -> tuple[torch.Tensor, int, torch.Tensor]:
    """(input ids [B, T] right-padded, first position needed, positions [B, R] of the answer tokens in the model's outputs)."""
    rows = [completion.prompt.token_ids + completion.token_ids for completion in completions]
    offsets_B = torch.tensor([len(completion.prompt.token_ids) - 1 for completion in completions])
    lengths_B = torch.tensor([len(completion.token_ids) for completion in completions])
    length = max(len(row) for row in rows)
    input_ids = torch.tensor([row + (0,) * (length - len(row)) for row in rows], device=device)
    start = int(offsets_B.min())
    steps_R = torch.arange(int(lengths_B.max()))
    positions_BR = (offsets_B - start)[:, None] + torch.minimum(steps_R, lengths_B[:, None] - 1)  # past the end: the last token
    return input_ids, start, positions_BR.to(device)


def _answer_metrics(scored: Sequence[Scored]) -> dict[str, float]:
    answers = len(scored)
    tokens = sum(len(answer.completion.token_ids) for answer in scored)
    return {
        "reward": sum(answer.reward for answer in scored) / answers,
        "response_length": tokens / answers,
        "truncated": sum(answer.completion.stop_reason == "length" for answer in scored) / answers,
        "tokens": float(tokens),
    }


def _exhaust(named: Iterator[object]) -> None:
    """Take part in the gathering on a rank that gets nothing from it."""
    for _ in named:
        pass
