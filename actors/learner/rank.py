"""One rank of the learner. Every method is collective: all ranks are called with the same arguments at the same time.

    completions --prepare--> old logprobs, values, reference logprobs of this rank's rows (no gradient, as answers arrive)
    scored      --update---> rewards -> advantages -> epochs x minibatches optimizer steps -> metrics, version + 1
                --weights--> full policy weights on rank 0; --send_weights--> the same from there to the engines' workers

A completion must carry the learner's own version, or one at most `staleness` older: what an older version, or an engine of other
arithmetic, was more or less likely to say is corrected token by token by the importance weight. Losses are divided by the token
(or answer) count of the whole minibatch over all ranks, and a prompt's answers are compared over all ranks, so the gradient does
not depend on the number of ranks or micro-batches. There is no random state: shuffles are drawn from (seed, version, epoch).
A learner that `fills_old_logprobs_in_step` leaves the old logprobs to the step itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from actors.learner.deepspeed_engine import DeepSpeedEngine
from actors.learner.export import PolicyExport
from actors.learner.rank_metrics import Step, all_reduce_sum, rollout_metrics, step_metrics
from causalrm_ray.checks import check_finite
from causalrm_ray.config.train import LearnerConfig
from causalrm_ray.models.policy import ActorCritic, Reference, load_policy
from causalrm_ray.models.token_batch import make_batch
from causalrm_ray.registry import ALGORITHMS
from causalrm_ray.rl.batching import TOKEN_BUDGET, balance_lengths, of_rank
from causalrm_ray.rl.experience import (
    TRAINING,
    Answers,
    Experience,
    Objective,
    answer_metrics,
    check_answer,
    check_groups,
    groups_of,
    make_experience,
    stack_rows,
)
from causalrm_ray.rl.policy import Clip, adapt_kl_coefficient
from causalrm_ray.rl.reward_scaling import RunningMoments
from causalrm_ray.types import Completion, Prompt, Scored

KL_HORIZON = 5000  # answers over which the adaptive KL coefficient reacts
STATE = "learner.json"
PADDING_ROW = Completion(Prompt("", "", (0,)), "", (0,), (0.0,), "stop", 0)  # the row of a rank that has none left; its mask is 0


class Prepared(NamedTuple):
    """One answer as the policy saw it before the update (or, until it looks, the engine); tensors [R] over its tokens."""

    logprobs_R: torch.Tensor
    reference_logprobs_R: torch.Tensor
    values_R: torch.Tensor


class LearnerRank(PolicyExport):
    """Policy, critic (if the algorithm has one) and frozen reference of one rank under DeepSpeed."""

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
        max_new_tokens: int,
        tokens_per_micro_batch: int = TOKEN_BUDGET,
    ) -> None:
        """Load `model` (folder or hub id) and join the other ranks at `init_method` ("tcp://host:port").

        `temperature` > 0 is the engine's: log-probabilities are taken at it. `max_length` bounds prompt + answer in
        tokens, `max_new_tokens` the answer; rows of about one length go through the model together, at most
        `tokens_per_micro_batch` with pads.
        """
        policy = load_policy(model, dtype)
        self._parameters = policy.num_parameters()
        self._config = config
        self._temperature, self._seed, self._max_length = temperature, seed, max_length
        self._world_size = world_size
        self._budget = tokens_per_micro_batch
        self._objective = make_objective(config, max_new_tokens)
        self._algorithm = self._objective.algorithm
        self._fills_old_logprobs_in_step = self._objective.fills_old_logprobs_in_step(config.epochs * config.minibatches)
        self._kl_coefficient = config.kl.coefficient
        self._rewards_seen = RunningMoments()
        self._owners: dict[str, int] = {}  # id -> rank that prepared it, of all rows of the step
        self._prepared: dict[str, Prepared] = {}
        checkpointing = "checkpointing" in config.save_memory
        module = ActorCritic(policy, self._algorithm.critic, config.lora, seed, checkpointing)
        groups = [{"params": module.policy_parameters(), "lr": config.lr}]
        if self._algorithm.critic:
            groups.append({"params": module.critic_parameters(), "lr": config.critic_lr})
        # Under ZeRO-3 all ranks must call each layer alike, and one may have no prompt to share where another has.
        self._shares_prompts = module.shares_prompts and config.zero_stage < 3
        self._trained = sum(value.numel() for group in groups for value in group["params"])
        engine = DeepSpeedEngine(module, groups, config, dtype, rank, world_size, init_method)
        super().__init__(model, policy, module.policy, config.lora, engine, rank)
        self._reference = None if config.lora else Reference(load_policy(model, dtype)).to(self._engine.device)

    def prepare(self, completions: Sequence[Completion]) -> None:
        """Evaluate this rank's share of some answers, about as many tokens as the other ranks', under the current weights.

        Raises ValueError, naming the id, for an answer of another policy version, without tokens, too long, or known.
        """
        ids = [completion.prompt.id for completion in completions]
        for place, completion in enumerate(completions):
            check_answer(completion, self.version, self._config.staleness, self._max_length)
            if completion.prompt.id in self._owners or completion.prompt.id in ids[:place]:
                raise ValueError(f"ids must be unique within a step, got {completion.prompt.id!r} twice")
        lengths = [_length(completion) for completion in completions]
        owners = balance_lengths(lengths, self._world_size)
        self._owners.update(zip(ids, owners, strict=True))
        for places in of_rank(lengths, owners, self._rank, self._world_size, self._budget):
            rows = [completions[place] for place in places]
            fields = self._evaluate(rows or [PADDING_ROW])
            for row, completion in enumerate(rows):
                self._prepared[completion.prompt.id] = Prepared(*(field[row, : len(completion.token_ids)] for field in fields))

    def update(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Train on the whole step's answers, the same list in the same order on all ranks, and return metrics over ranks.

        Raises ValueError, naming the id, for an answer that was never prepared, comes twice, or is of another version.
        """
        self._check_step(scored)
        rewards_N, seen = self._rewards(scored)
        answers, experience = self._experience(scored, rewards_N)
        metrics = self._train(scored, experience)
        answers = answers._replace(logprobs_BR=experience.logprobs_BR[:-1])  # those of a learner that looked in the step
        metrics |= rollout_metrics(answers, len(scored)) | answer_metrics(scored, self.version) | seen
        metrics["kl_coefficient"] = self._kl_coefficient
        target = self._config.kl.target
        if target is not None:
            self._kl_coefficient = adapt_kl_coefficient(self._kl_coefficient, metrics["kl"], target, len(scored), KL_HORIZON)
        self._owners.clear()
        self._prepared.clear()
        self.version += 1
        return metrics

    def save(self, folder: Path) -> None:
        """Write the exact state under `folder`, which all ranks share: DeepSpeed's files of each rank, and JSON."""
        folder = Path(folder)
        self._engine.save(folder)
        if self._rank == 0:
            state = {
                "version": self.version,
                "algorithm": self._config.algorithm,
                "kl_coefficient": self._kl_coefficient,
                "rewards_seen": self._rewards_seen,
                "zero_stage": self._config.zero_stage,
                "lora": self._config.lora,
                "world_size": self._world_size,
            }
            (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Continue exactly from what `save` wrote under the same model, ZeRO stage and (for ZeRO 1-3) number of ranks.

        DeepSpeed's files are pickles, which can run code: the caller must have checked them against its manifest of hashes.
        """
        folder = Path(folder)
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if state["algorithm"] != self._config.algorithm:
            raise ValueError(f"{folder} was saved by {state['algorithm']}, the learner runs {self._config.algorithm}")
        if state["zero_stage"] != self._config.zero_stage:
            raise ValueError(
                f"{folder} was saved under ZeRO {state['zero_stage']}, the learner runs ZeRO {self._config.zero_stage}"
            )
        if state["lora"] != self._config.lora:
            raise ValueError(f"{folder} was saved with learner.lora={state['lora']}, the learner has {self._config.lora}")
        if self._config.zero_stage > 0 and state["world_size"] != self._world_size:
            raise ValueError(f"{folder} was saved by {state['world_size']} ranks under ZeRO, the learner has {self._world_size}")
        self._engine.load(folder)
        self.version, self._kl_coefficient = state["version"], state["kl_coefficient"]
        self._rewards_seen = RunningMoments(*state["rewards_seen"])
        self._owners.clear()
        self._prepared.clear()

    def info(self) -> dict[str, str | int]:
        """What the learner runs on; `parameters` counts the policy's, `trained` what the optimizer moves."""
        return {
            "name": "deepspeed",
            "version": self._engine.version,
            "zero_stage": self._config.zero_stage,
            "world_size": self._world_size,
            "device": str(self._engine.device),
            "parameters": self._parameters,
            "trained": self._trained,
        }

    def _check_step(self, scored: Sequence[Scored]) -> None:
        if len(scored) < self._config.minibatches:
            raise ValueError(f"update needs an answer per minibatch, got {len(scored)} answers for {self._config.minibatches}")
        seen: set[str] = set()
        for answer in scored:
            name = answer.completion.prompt.id
            check_answer(answer.completion, self.version, self._config.staleness, self._max_length)
            if name not in self._owners:
                raise ValueError(f"answer {name!r} was never prepared in this step")
            if name in seen:
                raise ValueError(f"ids must be unique within a step, got {name!r} twice")
            seen.add(name)
        if self._algorithm.grouped:
            check_groups(self._config.algorithm, [answer.completion for answer in scored])
        check_finite("reward", torch.tensor([answer.reward for answer in scored]))

    def _evaluate(self, completions: Sequence[Completion]) -> Prepared:
        """The fields [B, R] under the current weights; for a learner that looks once, as the engine saw them."""
        batch = make_batch(completions, self._engine.device, self._shares_prompts)
        with torch.no_grad():
            if self._reference is None:
                reference_BR = self._engine(batch, self._temperature, True).logprobs_BR
            else:
                reference_BR = self._reference(batch, self._temperature)
            if self._fills_old_logprobs_in_step:
                rollout = [torch.tensor(completion.logprobs) for completion in completions]
                logprobs_BR = stack_rows(rollout, reference_BR.shape[1], self._engine.device)
                return Prepared(logprobs_BR, reference_BR, torch.zeros_like(logprobs_BR))
            old = self._engine(batch, self._temperature)
        return Prepared(old.logprobs_BR, reference_BR, old.values_BR)

    def _rewards(self, scored: Sequence[Scored]) -> tuple[torch.Tensor, dict[str, float]]:
        """Rewards [N] of the whole step, normalised if so configured; and by what. Every rank computes the same."""
        rewards_N = torch.tensor([answer.reward for answer in scored], dtype=torch.float64)
        if not self._config.reward_normalisation:
            return rewards_N, {}
        self._rewards_seen = self._rewards_seen.with_values(rewards_N)
        seen = {"reward_seen_mean": self._rewards_seen.mean, "reward_seen_std": self._rewards_seen.variance**0.5}
        return self._rewards_seen.normalise(rewards_N), seen

    def _experience(self, scored: Sequence[Scored], rewards_N: torch.Tensor) -> tuple[Answers, Experience]:
        """This rank's rows in the order of `scored`; and what it trains on, with PADDING_ROW's row behind them."""
        device = self._engine.device
        completions = [answer.completion for answer in scored]
        places = self._mine(range(len(scored)), scored)
        mine = [completions[place] for place in places]
        rows = [self._prepared[answer.prompt.id] for answer in mine]
        width = max(len(answer.token_ids) for answer in completions)
        answers = Answers(
            mask_BR=stack_rows([torch.ones_like(row.logprobs_R) for row in rows], width, device),
            logprobs_BR=stack_rows([row.logprobs_R for row in rows], width, device),
            reference_logprobs_BR=stack_rows([row.reference_logprobs_R for row in rows], width, device),
            rollout_logprobs_BR=stack_rows([torch.tensor(answer.logprobs) for answer in mine], width, device),
            values_BR=stack_rows([row.values_R for row in rows], width, device),
            truncated_B=torch.tensor([float(answer.stop_reason == "length") for answer in mine], device=device),
            places_B=torch.tensor(places, dtype=torch.long, device=device),
        )
        groups_N, coefficient = groups_of(completions).to(device), self._kl_coefficient
        experience = make_experience(answers, rewards_N.to(device), groups_N, self._objective, coefficient, all_reduce_sum)
        return answers, experience.with_padding_row()

    def _train(self, scored: Sequence[Scored], experience: Experience) -> dict[str, float]:
        """All optimizer steps on a step's answers, up to where the KL stop ends them; metrics over ranks."""
        config = self._config
        mine = self._mine(range(len(scored)), scored)
        rows = {place: row for row, place in enumerate(mine)}
        completions = [*(scored[place].completion for place in mine), PADDING_ROW]
        steps, stopped = [], False
        for places in self._minibatches(scored):
            tokens = sum(len(scored[place].completion.token_ids) for place in places)
            size = self._objective.minibatch_size(len(places), tokens)
            micro_batches = self._micro_batches(places, scored, rows)
            steps.append(self._optimizer_step(micro_batches, completions, experience, size))
            if config.kl.stop is not None:
                kl = all_reduce_sum(steps[-1].figures[TRAINING.index("kl_step")].clone()) / tokens
                stopped = float(kl) > config.kl.stop
            if stopped:
                break
        counts = {"optimizer_steps": float(len(steps)), "kl_stopped": float(stopped)}
        return (step_metrics(steps, self._algorithm.critic) if steps else {}) | counts

    def _minibatches(self, scored: Sequence[Scored]) -> Iterator[list[int]]:
        """Places of the answers of each optimizer step; none is empty."""
        masks = self._config.truncation == "mask"
        places = [place for place, answer in enumerate(scored) if not (masks and answer.completion.stop_reason == "length")]
        for epoch in range(self._config.epochs):
            for minibatch in self._order(len(places), epoch).tensor_split(self._config.minibatches):
                if len(minibatch):
                    yield [places[number] for number in minibatch.tolist()]

    def _optimizer_step(
        self,
        micro_batches: Sequence[Sequence[int]],
        completions: Sequence[Completion],
        experience: Experience,
        size: float,
    ) -> Step:
        """One step on a minibatch of `size` tokens or answers over all ranks."""
        figures = []
        for number, rows in enumerate(micro_batches, start=1):
            batch = make_batch([completions[row] for row in rows], self._engine.device, self._shares_prompts)
            new = self._engine(batch, self._temperature)
            width = new.logprobs_BR.shape[1]
            old = experience.select(rows, width)
            if self._fills_old_logprobs_in_step:
                old = old.with_old_logprobs(new.logprobs_BR.detach())
                experience.logprobs_BR[list(rows), :width] = old.logprobs_BR
            loss, figure = self._objective.loss(new.logprobs_BR, new.entropy_BR, new.values_BR, old, size, self._kl_coefficient)
            self._engine.backward(loss * self._world_size, last=number == len(micro_batches))  # the engine averages over ranks
            figures.append(figure)
        norm = self._engine.step()
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm must be finite, got {norm} in the update of policy version {self.version}"
            )
        stacked = torch.stack(figures)
        return Step(torch.cat([stacked[:, :-1].sum(dim=0), stacked[:, -1:].amax(dim=0)]), norm)

    def _mine(self, places: Sequence[int], scored: Sequence[Scored]) -> list[int]:
        return [place for place in places if self._owners[scored[place].completion.prompt.id] == self._rank]

    def _micro_batches(self, places: Sequence[int], scored: Sequence[Scored], rows: Mapping[int, int]) -> list[list[int]]:
        """This rank's rows of a minibatch in as many micro-batches as the busiest rank needs; PADDING_ROW where none is left."""
        completions = [scored[place].completion for place in places]
        owners = [self._owners[completion.prompt.id] for completion in completions]
        lengths = [_length(completion) for completion in completions]
        batches = of_rank(lengths, owners, self._rank, self._world_size, self._budget)
        return [[rows[places[number]] for number in batch] or [len(rows)] for batch in batches]

    def _order(self, answers: int, epoch: int) -> torch.Tensor:
        """A permutation of the answers that depends on (seed, version, epoch) only."""
        entropy = np.random.SeedSequence([self._seed, self.version, epoch])
        return torch.from_numpy(np.random.default_rng(entropy).permutation(answers))


def make_objective(config: LearnerConfig, max_new_tokens: int) -> Objective:
    """The algorithm, and what the configuration chooses for it: its own clip and KL estimator where that names none."""
    algorithm = ALGORITHMS.load(config.algorithm)
    clip = Clip(config.clip or algorithm.clip.low, config.clip_high or config.clip or algorithm.clip.high)
    estimator = config.kl.estimator or algorithm.kl
    return Objective(algorithm, clip, estimator, config.lam, config.truncation, max_new_tokens)


def _length(completion: Completion) -> int:
    return len(completion.prompt.token_ids) + len(completion.token_ids)
