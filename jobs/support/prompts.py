"""Prompts of a run, and impressions made of answers: pure functions of (seed, step), so that a resumed run repeats them."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from causalrm_ray.config.embed import EmbedConfig
from causalrm_ray.config.train import EMBEDDED, Config
from causalrm_ray.conversation import Conversation, ConversationError
from causalrm_ray.data.rows import Quarantine
from causalrm_ray.data.sources import PromptRow, read_prompts
from causalrm_ray.errors import InputError
from causalrm_ray.models.checks.check import check_backbone, check_policy
from causalrm_ray.models.identity import with_template
from causalrm_ray.models.lora import describe, with_adapter
from causalrm_ray.models.size import skeleton
from causalrm_ray.models.states.scorer import backbone_of, is_head
from causalrm_ray.models.text import encode_prompt, load_tokenizer
from causalrm_ray.truncation import Cuts, TooLongError, truncate
from causalrm_ray.types import Completion, Impression, Prompt, Request
from causalrm_ray.world.grammar import evaluation_prompts, style_of, train_prompts
from causalrm_ray.world.pretrain import Progress, ensure_policy
from jobs.support.log import warn

EPOCH_S = 1_767_225_600.0  # the simulated clock's zero and the time of the first log's impressions: 2026-01-01
STEP_S = 30.0  # simulated seconds between policy steps; users react within 60, so some feedback arrives after a refit
LOG_S = 60.0  # simulated seconds from the first log's impressions to the first fit, by which all feedback has arrived
MAX_SEED = 2**31
HELD_OUT_ONE_IN = 10  # of a user's own prompts, by a hash of their text


@dataclass(frozen=True)
class Models:
    """The models of a run: local folders or hub ids."""

    policy: str
    reward: str


def find_models(config: Config, on_progress: Progress | None = None, fitted: bool = False) -> Models:
    """The configured models, local folders as absolute paths; 'embedded' ones are trained on first use and cached. With `fitted`,
    model.reward may be a reward model that was fitted, of heads on the states of a backbone.

    Raises InputError, naming what is wrong, for a model that cannot be tuned, scored with, saved or read again.
    """
    names, longest = config.model, config.model.max_length
    policy = find_model(config, names.policy, on_progress, names.chat_template)
    models = Models(policy, find_model(config, names.reward, on_progress, names.chat_template, fitted))
    check_policy(models.policy, longest, config.rollout.engine)
    check_backbone(backbone_of(models.reward) if fitted else models.reward, longest)
    return models


def find_backbone(config: Config | EmbedConfig, name: str, max_length: int, on_progress: Progress | None = None) -> str:
    """The same of the one model that a job reads rows with."""
    template = config.model.chat_template if isinstance(config, Config) else config.chat_template
    model = find_model(config, name, on_progress, template)
    check_backbone(model, max_length)
    return model


def find_model(
    config: Config | EmbedConfig,
    name: str,
    on_progress: Progress | None = None,
    template: Path | None = None,
    fitted: bool = False,
) -> str:
    """Where one model is, by name: 'embedded', a folder or a hub id; not checked, but that only with `fitted` it may be heads on
    the states of a backbone."""
    if name == EMBEDDED and template:
        raise InputError(f"chat_template goes with models of your own, got {template} and an embedded one")
    if name == EMBEDDED:
        return str(ensure_policy(config.run.cache, seed=0, on_progress=on_progress))
    folder = Path(name).expanduser()
    if not folder.exists() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise InputError(f"model {name} must be a folder or hub id, and there is no such folder")
    model = str(folder.resolve()) if folder.exists() else name
    if is_head(model) and not fitted:
        raise InputError(f"model {name} holds heads on the states of a backbone: name the backbone, {backbone_of(model)}")
    return with_template(model, template, config.run.cache) if template else model


def describe_adapters(config: Config, models: Models) -> str:
    """What LoRA will adapt and what it leaves as it is; empty without LoRA. Raises InputError for targets that are not there."""
    learner = config.learner
    if not learner.lora:
        return ""
    try:
        blank = skeleton(models.policy)
        return f"LoRA {learner.lora} on {describe(blank, with_adapter(blank, learner.lora, 0, learner.lora_targets))}"
    except (OSError, ValueError) as error:
        raise InputError(f"model.policy={config.model.policy}: {error}") from error


class PromptSource:
    """Prompts of a run for training, the first log and evaluation; tokenized and checked before anything heavy starts."""

    def __init__(self, config: Config, models: Models) -> None:
        self._config = config
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(models.policy)
        check_same_tokens(models, self.tokenizer)
        if own := config.feedback.prompts:
            prompts = self._encode(read_prompts(own), own)
            held_out = [found for found in prompts if _held_out(found[0])]
            if 0 < len(held_out) < len(prompts):
                prompts = [found for found in prompts if not _held_out(found[0])]
        else:
            prompts, held_out = self._encode(_rows(train_prompts())), self._encode(_rows(evaluation_prompts()))
        self._prompts, self._held_out = prompts, held_out or prompts

    def step_requests(self, step: int) -> list[Request]:
        """The requests of a policy step: `prompts_per_step` prompts, each `samples_per_prompt` times with its own seed."""
        rollout = self._config.rollout
        return self._requests(f"step-{step:06d}", self._prompts, rollout.prompts_per_step, rollout.samples_per_prompt)

    def log_requests(self) -> list[Request]:
        """The requests behind the embedded world's first log."""
        return self._requests("log", self._prompts, self._config.world.impressions)

    def evaluation_requests(self) -> list[Request]:
        """Requests on held-out topics, the same before and after tuning."""
        return self._requests("evaluation", self._held_out, self._config.loop.evaluation_prompts)

    def impressions(self, completions: Sequence[Completion], time: float) -> list[Impression]:
        """Impressions of `completions` shown at `time`; a blank answer is not shown, and without users none is.

        The id includes a hash of the answer: a resumed step that repeats its answers repeats their ids, and one that samples
        others (on a GPU) shows new impressions.
        """
        if self._config.world.users == "none":
            return []
        return [
            Impression(
                f"{done.prompt.id}/{hashlib.blake2b(done.response.encode(), digest_size=4).hexdigest()}",
                done.prompt.conversation,
                done.response,
                done.policy_version,
                time,
                context={"style": style_of(done.response)},
            )
            for done in completions
            if not done.is_blank
        ]

    def _requests(
        self, name: str, prompts: Sequence[tuple[Conversation, tuple[int, ...]]], count: int, samples: int = 1
    ) -> list[Request]:
        rng = np.random.default_rng([self._config.run.seed, zlib.crc32(name.encode())])
        picks = np.concatenate([rng.permutation(len(prompts)) for _ in range(-(-count // len(prompts)))])[:count]
        seeds = rng.integers(MAX_SEED, size=count * samples).tolist()
        chosen = [prompts[pick] for pick in np.repeat(picks, samples).tolist()]
        identity = f"{self._config.run.name}/{name}"
        return [
            Request(Prompt(f"{identity}/{number:06d}", prompt, token_ids), seed)
            for number, ((prompt, token_ids), seed) in enumerate(zip(chosen, seeds, strict=True))
        ]

    def _encode(self, rows: Sequence[PromptRow], source: str = "") -> list[tuple[Conversation, tuple[int, ...]]]:
        """Each prompt as the policy reads it, with its ids: what was dropped of it is in no record of its answers either, so that
        fits read the ids that were sampled from and scored, however short the answer.

        Those of a `source` that do not fit, or that the chat template refuses, are left out and listed in the run's folder.
        Raises InputError where none is left.
        """
        room = self._config.model.max_length - self._config.rollout.max_new_tokens - 1  # the log appends an end token
        limit = f"model.max_length - rollout.max_new_tokens - 1 = {room} tokens"
        encoded, cuts, refused = [], Cuts(), list[tuple[PromptRow, str]]()
        for row in rows:
            try:
                found = truncate(row.prompt, partial(encode_prompt, self.tokenizer), room, self._config.model.truncation)
            except TooLongError as error:
                refused.append((row, f"a prompt must have at most {limit}{error}"))
            except ConversationError as error:
                refused.append((row, str(error)))
            else:
                cuts.add(found)
                encoded.append((found.prompt, found.ids))
        if refused:
            self._quarantine(refused, len(rows), source)
        for note in cuts.warnings(len(rows), limit, "prompts"):
            warn(note)
        return encoded

    def _quarantine(self, refused: Sequence[tuple[PromptRow, str]], rows: int, source: str) -> None:
        first, reason = refused[0]
        if not source or len(refused) == rows:
            raise InputError(
                f"{source or 'the embedded world'}: no prompt can be asked; {first.where} row {first.number}: {reason}"
            )
        path = self._config.run.path / "quarantine-prompts.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            quarantine = Quarantine(file)
            for row, why in refused:
                quarantine.refuse(row.where, row.number, why, raw="")
        warn(
            f"{len(refused)} of {rows} prompts of {source} cannot be asked and are left out, the first in "
            f"{quarantine.first_fault}; see {path}"
        )

    def clock(self, step: int) -> float:
        """Simulated time at which the answers of `step` are shown, seconds since the epoch."""
        return EPOCH_S + LOG_S + (step + 1) * STEP_S

    def as_of(self, step: int) -> float | None:
        """Time of the snapshot that a refit before `step` reads; None, the whole log, for real users."""
        return self.clock(step - 1) if self._config.world.users != "none" else None


def _rows(texts: Sequence[str]) -> list[PromptRow]:
    return [PromptRow("the embedded world", number, Conversation.user(text)) for number, text in enumerate(texts, 1)]


def _held_out(prompt: Conversation) -> bool:
    return zlib.crc32(prompt.json.encode()) % HELD_OUT_ONE_IN == 0


def check_same_tokens(models: Models, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError unless both models share a tokenizer: the reward model scores the ids that the policy sampled.

    It may know more tokens, as a saved one does that needed another to pad with.
    """
    if models.policy == models.reward:
        return
    other = load_tokenizer(models.reward)
    if not tokenizer.get_vocab().items() <= other.get_vocab().items() or other.chat_template != tokenizer.chat_template:
        raise InputError(
            f"model.reward must share the policy's tokenizer and chat template, got {models.reward} with {models.policy}"
        )
