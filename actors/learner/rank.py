"""One rank of the learner. Every method is collective: all ranks are called at the same time, each with its share (see shares).

    Share     --prepare--> old logprobs, values, reference logprobs of this rank's answers (no gradient, as answers arrive)
    StepShare --update---> rewards -> advantages -> epochs x minibatches optimizer steps -> metrics, version + 1
              --weights, send_weights, ...--> the policy (see export)

A completion must carry the learner's own version, or one at most `staleness` older: that an older version, or an engine of other
arithmetic, was more or less likely to write a token is corrected by the token's importance weight. Losses are divided by the
token or answer count of the whole minibatch over all ranks, and a prompt's answers are compared over all ranks, so the gradient
does not depend on the number of ranks or micro-batches. There is no random state: minibatches are drawn from (seed, version,
epoch), and the learning rate follows from the version.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from actors.learner.deepspeed_engine import DeepSpeedEngine, parameter_groups
from actors.learner.export import PolicyExport
from actors.learner.rank_metrics import Step, all_reduce_sum, rollout_metrics, step_metrics
from actors.learner.shares import Answer, Share, StepShare
from causalrm_ray.config.train import LearnerConfig
from causalrm_ray.models.policy import ActorCritic, Reference, load_policy
from causalrm_ray.models.token_batch import TokenRow, make_batch
from causalrm_ray.registry import ALGORITHMS
from causalrm_ray.rl.algorithms import KLEstimator, Reduction
from causalrm_ray.rl.experience import TRAINING, Answers, Experience, Objective, make_experience, stack_rows
from causalrm_ray.rl.policy_loss import Clip, adapt_kl_coefficient
from causalrm_ray.rl.reward_scaling import RunningMoments
from causalrm_ray.rl.schedule import learning_rate_factor

KL_HORIZON = 5000  # answers over which the adaptive KL coefficient reacts
STATE = "learner.json"
KEPT = {"algorithm", "zero_stage", "lora", "lora_targets", "weight_decay"}  # options that a saved state cannot be loaded without
NO_TOKEN = torch.zeros(1, dtype=torch.long)
PADDING_ROW = Answer(TokenRow(NO_TOKEN, NO_TOKEN), torch.zeros(1), False)  # of a rank that has no row left; its mask is 0


class Prepared(NamedTuple):
    """One answer, and tensors [R] over its tokens under the policy before the update; where the step fills its
    log-probabilities in, until then the engine's."""

    answer: Answer
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
        max_new_tokens: int,
        steps: int,
    ) -> None:
        """Load `model` (folder or hub id) and join the other ranks at `init_method` ("tcp://host:port").

        `temperature` > 0 is the engine's: log-probabilities are taken at it. `seed` is of adapters. An answer has at most
        `max_new_tokens`, the learning rate's schedule ends after `steps` policy steps.
        """
        policy = load_policy(model, dtype)
        self._parameters = policy.num_parameters()
        self._config, self._temperature, self._steps, self._world_size = config, temperature, steps, world_size
        self._objective = make_objective(config, max_new_tokens)
        self._optimizer_steps = config.epochs * config.minibatches
        self._fills_old_logprobs_in_step = self._objective.fills_old_logprobs_in_step(self._optimizer_steps)
        self._kl_coefficient = config.kl.coefficient
        self._rewards_seen = RunningMoments()
        self._prepared: dict[str, Prepared] = {}
        checkpointing, critic = "checkpointing" in config.save_memory, self._objective.algorithm.critic
        module = ActorCritic(policy, critic, config.lora, seed, checkpointing, config.lora_targets)
        groups = parameter_groups(module, config)
        # Under ZeRO-3 all ranks must call each layer alike, and one may have no prompt to share where another has.
        self._shares_prompts = module.shares_prompts and config.zero_stage < 3
        self._trained = sum(value.numel() for group in groups for value in group["params"])
        engine = DeepSpeedEngine(module, groups, config, dtype, rank, world_size, init_method)
        super().__init__(model, policy, module.policy, config.lora, engine, rank)
        self._reference = None if config.lora else Reference(load_policy(model, dtype)).to(engine.device)

    def prepare(self, share: Share) -> None:
        """Evaluate this rank's share of some answers under the current weights."""
        answers = share.answers()
        for batch in share.batches:
            fields = self._evaluate([answers[row] for row in batch] or [PADDING_ROW])
            for place, row in enumerate(batch):
                length = len(answers[row].logprobs_R)
                self._prepared[share.ids[row]] = Prepared(answers[row], *(field[place, :length] for field in fields))

    def gaps(self, share: Share) -> dict[str, float]:
        """Mean |difference| between the engine's log-probabilities of each answer's tokens and these weights', by id; the answers
        are kept for no update."""
        answers, found = share.answers(), {}
        for batch in share.batches:
            rows = [answers[row] for row in batch] or [PADDING_ROW]
            with torch.no_grad():
                tokens = make_batch([answer.row for answer in rows], self._engine.device, self._shares_prompts)
                logprobs_BR = self._engine(tokens, self._temperature).logprobs_BR.cpu()
            for place, row in enumerate(batch):
                engine_R = answers[row].logprobs_R
                found[share.ids[row]] = float((logprobs_BR[place, : len(engine_R)] - engine_R).abs().mean())
        return found

    def update(self, step: StepShare) -> dict[str, float]:
        """Train on a step whose answers were all prepared, and return metrics over ranks.

        Raises ValueError for the step of another version, and for an answer that was not prepared.
        """
        if step.version != self.version:
            raise ValueError(f"the step must be of the learner's version {self.version}, got {step.version}")
        missing = [name for name in step.ids if name not in self._prepared]
        if missing:
            raise ValueError(f"answer {missing[0]!r} was not prepared on rank {self._rank}, which owns it in this step")
        prepared = [self._prepared[name] for name in step.ids]
        rewards_N, seen = self._rewards(torch.tensor(step.rewards))
        answers, experience = self._experience(step, prepared, rewards_N)
        metrics = self._train(step, [*(row.answer.row for row in prepared), PADDING_ROW.row], experience)
        answers = answers._replace(logprobs_BR=experience.logprobs_BR[:-1])  # where the step filled them in
        metrics |= rollout_metrics(answers, len(rewards_N)) | seen
        metrics["kl_coefficient"] = self._kl_coefficient
        target = self._config.kl.target
        if target is not None:
            self._kl_coefficient = adapt_kl_coefficient(self._kl_coefficient, metrics["kl"], target, len(rewards_N), KL_HORIZON)
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
                "kl_coefficient": self._kl_coefficient,
                "rewards_seen": self._rewards_seen,
                "ranks": self._world_size,
                **self._config.model_dump(mode="json", include=KEPT),
            }
            (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")

    def load(self, folder: Path) -> int:
        """Continue exactly from what `save` wrote under the same model, ZeRO stage and (for ZeRO 1-3) number of ranks.

        Returns the version. DeepSpeed's files are pickles, which can run code: the caller must have checked them against its
        manifest of hashes.
        """
        folder, config = Path(folder), self._config
        state: dict[str, Any] = {
            "lora_targets": "auto",
            **json.loads((folder / STATE).read_text(encoding="utf-8")),
        }  # once the only choice
        own = config.model_dump(mode="json", include=KEPT) | ({"ranks": self._world_size} if config.zero_stage else {})
        for option, value in own.items():
            if option not in state:
                raise ValueError(f"{folder} was saved by an earlier version, without {option}: start a new run")
            if state[option] != value:
                raise ValueError(f"{folder} was saved with learner.{option}={state[option]}, the learner has {value}")
        self._engine.load(folder)
        self.version, self._kl_coefficient = state["version"], state["kl_coefficient"]
        self._rewards_seen = RunningMoments(*state["rewards_seen"])
        self._prepared.clear()
        return self.version

    def info(self) -> dict[str, str | int]:
        """What the learner runs on; `parameters` counts the policy's, `trained` those that the optimizer updates."""
        return {
            "name": "deepspeed",
            "version": self._engine.version,
            "zero_stage": self._config.zero_stage,
            "world_size": self._world_size,
            "device": str(self._engine.device),
            "parameters": self._parameters,
            "trained": self._trained,
        }

    def _evaluate(self, answers: Sequence[Answer]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(log-probabilities, the reference's, values) [B, R]; the engine's for the first where the step fills them in."""
        batch = make_batch([answer.row for answer in answers], self._engine.device, self._shares_prompts)
        with torch.no_grad():
            if self._reference is None:
                reference_BR = self._engine(batch, self._temperature, True).logprobs_BR
            else:
                reference_BR = self._reference(batch, self._temperature)
            if self._fills_old_logprobs_in_step:
                rollout = [answer.logprobs_R for answer in answers]
                logprobs_BR = stack_rows(rollout, reference_BR.shape[1], self._engine.device)
                return logprobs_BR, reference_BR, torch.zeros_like(logprobs_BR)
            old = self._engine(batch, self._temperature)
        return old.logprobs_BR, reference_BR, old.values_BR

    def _rewards(self, rewards_N: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """Rewards of the whole step, normalised if so configured; and by what. Every rank computes the same."""
        if not self._config.reward_normalisation:
            return rewards_N, {}
        self._rewards_seen = self._rewards_seen.with_values(rewards_N)
        seen = {"reward_seen_mean": self._rewards_seen.mean, "reward_seen_std": self._rewards_seen.variance**0.5}
        return self._rewards_seen.normalise(rewards_N), seen

    def _experience(self, step: StepShare, prepared: Sequence[Prepared], rewards_N: torch.Tensor) -> tuple[Answers, Experience]:
        """This rank's rows in the order of the step; and what it trains on, with PADDING_ROW's row behind them."""
        device, width = self._engine.device, step.longest
        answers = Answers(
            mask_BR=stack_rows([torch.ones_like(row.logprobs_R) for row in prepared], width, device),
            logprobs_BR=stack_rows([row.logprobs_R for row in prepared], width, device),
            reference_logprobs_BR=stack_rows([row.reference_logprobs_R for row in prepared], width, device),
            rollout_logprobs_BR=stack_rows([row.answer.logprobs_R for row in prepared], width, device),
            values_BR=stack_rows([row.values_R for row in prepared], width, device),
            truncated_B=torch.tensor([float(row.answer.truncated) for row in prepared], device=device),
            places_B=torch.tensor(step.places, device=device),
        )
        groups_N = torch.tensor(step.groups, device=device)
        coefficient = self._kl_coefficient
        experience = make_experience(answers, rewards_N.to(device), groups_N, self._objective, coefficient, all_reduce_sum)
        return answers, experience.with_padding_row()

    def _train(self, step: StepShare, rows: Sequence[TokenRow], experience: Experience) -> dict[str, float]:
        """All optimizer steps on a step's answers, up to where the KL stop ends them; metrics over ranks."""
        stop, steps, stopped = self._config.kl.stop, [], False
        for minibatch in step.minibatches:
            size = self._objective.minibatch_size(minibatch.answers, minibatch.tokens)
            micro_batches = [list(batch) or [len(rows) - 1] for batch in minibatch.batches]
            steps.append(self._optimizer_step(micro_batches, rows, experience, size, self._rate(len(steps))))
            if stop is not None:
                kl = all_reduce_sum(steps[-1].figures[TRAINING.index("kl_step")].clone()) / minibatch.tokens
                stopped = float(kl) > stop
            if stopped:
                break
        counts = {"optimizer_steps": float(len(steps)), "kl_stopped": float(stopped)}
        counts["learning_rate"] = self._rate(0) * self._config.lr
        return (step_metrics(steps, self._objective.algorithm.critic) if steps else {}) | counts

    def _rate(self, optimizer_step: int) -> float:
        """Share of the learning rate at an optimizer step of this policy step."""
        each, config = self._optimizer_steps, self._config
        position = self.version * each + optimizer_step
        return learning_rate_factor(position, config.warmup * each, self._steps * each, config.schedule)

    def _optimizer_step(
        self,
        micro_batches: Sequence[Sequence[int]],
        rows: Sequence[TokenRow],
        experience: Experience,
        size: float,
        rate: float,
    ) -> Step:
        """One step on a minibatch of `size` tokens or answers over all ranks, at the share `rate` of the learning rates."""
        figures = []
        for number, places in enumerate(micro_batches, start=1):
            batch = make_batch([rows[place] for place in places], self._engine.device, self._shares_prompts)
            new = self._engine(batch, self._temperature)
            width = new.logprobs_BR.shape[1]
            old = experience.select(places, width)
            if self._fills_old_logprobs_in_step:
                old = old.with_old_logprobs(new.logprobs_BR.detach())
                experience.logprobs_BR[list(places), :width] = old.logprobs_BR
            fields = (new.logprobs_BR, new.entropy_BR, new.values_BR)
            loss, figure = self._objective.loss(*fields, old, size, self._kl_coefficient)
            self._engine.backward(loss * self._world_size, last=number == len(micro_batches))  # the engine averages over ranks
            figures.append(figure)
        norm = self._engine.step(rate)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm must be finite, got {norm} in the update of policy version {self.version}"
            )
        stacked = torch.stack(figures)
        return Step(torch.cat([stacked[:, :-1].sum(dim=0), stacked[:, -1:].amax(dim=0)]), norm)


def make_objective(config: LearnerConfig, max_new_tokens: int) -> Objective:
    """The algorithm, and what the configuration chooses for it: its own clip and KL estimator where that names none.

    Raises ValueError for another package's algorithm whose reduction or KL estimator is unknown.
    """
    algorithm = ALGORITHMS.load(config.algorithm)
    for field, choices in (("reduction", get_args(Reduction)), ("kl", get_args(KLEstimator))):
        if (value := getattr(algorithm, field)) not in choices:
            raise ValueError(f"{field} of algorithm {config.algorithm!r} must be one of {', '.join(choices)}, got {value!r}")
    clip = Clip(config.clip or algorithm.clip.low, config.clip_high or config.clip or algorithm.clip.high)
    estimator = config.kl.estimator or algorithm.kl
    return Objective(algorithm, clip, estimator, config.lam, config.truncation, max_new_tokens)
