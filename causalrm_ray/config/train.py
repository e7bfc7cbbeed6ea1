"""The one configuration tree: typed, frozen, validated before anything heavy starts. Every default lives here and only here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from causalrm_ray.config.base import (
    IN_PROCESS,
    AlgorithmName,
    ClusterConfig,
    ComparedName,
    EngineName,
    EstimatorName,
    FormatName,
    LoraTargetNames,
    RatePair,
    RunConfig,
    Section,
    TrackerName,
)
from causalrm_ray.registry import ALGORITHMS, ENGINES, ESTIMATORS
from causalrm_ray.types import LABEL_SIGNALS, NoiseEstimator, RewardTuning, Sampling, StatesName, Truncation

LOWEST_TEMPERATURE = 0.01  # vLLM raises those between 0 and this one to it, and the learner would not know
EMBEDDED = "embedded"  # the model or log that the embedded world makes, where no path or hub id is given


class Thresholds(Section):
    """What the values of a graded signal mean: stars, seconds, a score, an edit distance."""

    low: float | None = Field(None, description="values up to this one are label 0")
    high: float | None = Field(None, description="values from this one on are label 1")

    @model_validator(mode="after")
    def _labels_are_apart(self) -> Thresholds:
        if self.low is None and self.high is None:
            raise ValueError("a graded signal must have a threshold, low or high, got neither")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low} >= {self.high}")
        return self


SIGNALS: dict[str, Literal[0, 1] | Thresholds | None] = {
    "upvote": 1,
    "click": 1,
    "copy": 1,
    "downvote": 0,
    "regenerate": 0,
    "edit": 0,
}

SIMULATED_SIGNALS = (("downvote", "regenerate"), ("upvote", "copy"))  # what simulated users send of a bad and of a good label


def check_order(order: Sequence[Sequence[str]], signals: Iterable[str]) -> None:
    """Raise ValueError unless each signal of `order` is one of `signals`, or stands for a bare label, and comes once."""
    known = {*LABEL_SIGNALS, *signals}
    for rank in order:
        for name in rank:
            if name not in known:
                raise ValueError(f"feedback.order must name signals of feedback.signals, got {name!r}")
            known.remove(name)  # a second time, it is unknown


class ModelConfig(Section):
    """The models to start from: a local Hugging Face folder, a hub id, or the embedded tiny Llama; model=PATH sets both."""

    policy: str = Field(EMBEDDED, description="causal language model to tune: folder, hub id or 'embedded'")
    reward: str = Field(EMBEDDED, description="backbone of the reward and propensity models: folder, hub id or 'embedded'")
    chat_template: Path | None = Field(
        None, description="file with a Jinja chat template for both, such as for base models; null: their own"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="precision of policy and engine weights, and of states on a CPU; those on a GPU are in bfloat16"
    )
    max_length: int = Field(128, ge=8, description="longest prompt + response, tokens; longer ones: see truncation")
    truncation: Truncation = Field(
        "refuse", description="what is too long is refused or quarantined, or read without as many oldest turns as needed"
    )
    states: StatesName | None = Field(
        None,
        description="what reward and propensity models read of the frozen backbone: its state at the last token of an answer, or "
        "the mean over it, at the final layer or at two thirds of the depth; if not given, what predicts held-out feedback best",
    )


class WorldConfig(Section):
    """The embedded world: its simulated users stand where live ones would."""

    users: Literal["protocol", "strong_feelings", "none"] = Field(
        "protocol", description="who reacts to what is shown; none: nobody"
    )
    alpha: float = Field(0.5, gt=0, le=1, description="selection strength of `protocol` users; 1 is none, smaller is stronger")
    feedback_rate: float = Field(0.2, gt=0, lt=1, description="mean share of impressions that get feedback")
    rho: RatePair = Field(
        (0.2, 0.1), description="true label noise (rho_01, rho_10): P(r=0 | r*=1), a liked answer voted down, and P(r=1 | r*=0)"
    )
    impressions: int = Field(5000, ge=200, description="impressions logged before the loop starts")


class FeedbackConfig(Section):
    """The feedback log: where it is, what to import into it, and what its signals mean."""

    url: str | None = Field(None, description="SQLAlchemy URL of the log; null keeps an SQLite file in the run's folder")
    source: str | tuple[str, ...] | None = Field(
        None,
        description="log to import first: JSON, CSV or Parquet file, a folder of them, a list of both, a `datasets` folder, a "
        "hub id, a URL such as s3://, or the SQLAlchemy URL of a database that `query` reads",
    )
    events: str | tuple[str, ...] | None = Field(
        None, description="a second source, of events about the answers in `source`; a second query where `query` is given"
    )
    clean: str | tuple[str, ...] | None = Field(
        None,
        description="source of columns impression and label, 0 or 1: 100 to 400 impressions that were drawn at random and judged "
        "with care; they set the level of the reward model, at every fit",
    )
    query: str | None = Field(None, description="SELECT that gives the rows of `source`, a database, which is only read")
    format: FormatName = Field(
        "auto", description="how the rows of `source` are read, by name or import path; auto: as the first rows of each file show"
    )
    columns: dict[str, str] = Field(
        {},
        description="columns of a log of your own by our names, {prompt: question, response: choices.0.text}, by name "
        "or path; a signal of `signals` may stand for a name of ours: the column then holds its value",
    )
    prompts: str | None = Field(
        None, description="file or other source with a `prompt` column to tune on; null: the embedded prompts"
    )
    signals: dict[str, Literal[0, 1] | Thresholds | None] = Field(
        SIGNALS,
        description="label of each signal, 1 liked or 0 disliked, or thresholds on its value, {low: 2, high: 4}, between which "
        "it is no feedback; yours are added to these, and null leaves one out",
    )
    order: tuple[tuple[str, ...], ...] = Field(
        (),
        description="signals by rank, [[upvote, downvote], [copy]]: an impression's label is that of its newest event of the "
        "first of these that it has any of; signals not named come last, together",
    )

    per_user: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        "auto",
        description="rows with feedback that one user counts for in a fit, at most; auto: five times what the median user gave, "
        "and 20 at least; null: no limit",
    )

    @field_validator("signals", mode="before")
    @classmethod
    def _add_to_defaults(cls, given: Any) -> Any:
        return {**SIGNALS, **given} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _what_reads_a_source_has_one(self) -> FeedbackConfig:
        for name in ("query", "events", "columns", "clean"):
            if getattr(self, name) and not self.source:
                raise ValueError(f"feedback.{name} needs feedback.source, the log that it belongs to, got none")
        return self

    @model_validator(mode="after")
    def _order_is_of_known_signals(self) -> FeedbackConfig:
        check_order(self.order, [signal for signal, meaning in self.signals.items() if meaning is not None])
        return self


class RewardConfig(Section):
    """The reward model and how it is fitted (arXiv 2603.18736)."""

    method: EstimatorName = Field("auto", description="estimator whose model rewards the policy")
    compare: tuple[ComparedName, ...] = Field(
        ("naive", "oracle"), description="further estimators fitted once, for the report only; oracle: on true preferences"
    )
    tune: RewardTuning = Field(
        "head",
        description="head: small heads on the frozen backbone's states; full: these heads, distilled into the whole backbone, "
        "which other libraries load as a classifier",
    )
    epochs: int = Field(4, ge=1, description="most passes over the log of tune=full")
    lr: float = Field(1e-3, gt=0, description="learning rate of tune=full; heads have schedules of their own")
    clip: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="lowest propensity of feedback used in a weight; if not given, a quarter of the share of impressions with "
        "feedback, and 0.1 at most",
    )
    workers: int = Field(2, ge=0, description="Ray Train workers; 0: the reward role fits by itself")
    caution: float = Field(
        0.0, ge=0, description="standard deviations of its ensemble that the reward model stays below their mean; 0: the mean"
    )
    rho: RatePair | None = Field(None, description="known (rho_01, rho_10); null estimates them from the log")
    noise_rates: NoiseEstimator = Field(
        "curve", description="how they are estimated: curve, of the labels along a proxy's ranks; anchors, the paper's quantiles"
    )
    refit_every: int = Field(12, ge=0, description="policy steps between refits of propensity and reward; 0 never")

    @model_validator(mode="after")
    def _caution_needs_members(self) -> RewardConfig:
        if self.caution and "states" not in ESTIMATORS.load(self.method).needs:
            raise ValueError(f"reward.caution needs a reward.method that fits an ensemble, such as auto, got {self.method}")
        return self


class SamplingConfig(Section):
    """How evaluations sample."""

    temperature: float = Field(1.0, ge=0, le=2, description="sampling temperature; 0: the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="only the likeliest tokens that hold this mass")
    top_k: int = Field(0, ge=0, description="only the likeliest k tokens; 0 all")
    min_p: float = Field(0.0, ge=0, le=1, description="only tokens of at least this share of the likeliest one's probability")


class RolloutConfig(Section):
    """Generation.

    Training samples from the whole distribution: of one that is cut, the engine's probabilities are of what is left, and their
    ratio to the learner's is no importance weight.
    """

    temperature: float = Field(1.0, ge=LOWEST_TEMPERATURE, le=2, description="sampling temperature")
    engine: EngineName = Field("vllm", description="inference engine: vLLM, or transformers alone")
    tensor_parallel: int = Field(1, ge=1, description="GPUs that one generator spreads the model over; vllm only")
    generators: int = Field(2, ge=1, description="number of generator actors")
    prompts_per_step: int = Field(64, ge=1, description="prompts per policy step, over all generators")
    samples_per_prompt: int = Field(2, ge=1, description="answers per prompt")
    max_new_tokens: int = Field(40, ge=1, description="longest answer, tokens")
    stop: tuple[str | int, ...] = Field((), description="texts and token ids that end an answer, besides the model's own end")
    evaluation: SamplingConfig | None = Field(
        None, description="temperature, top_p, top_k, min_p of evaluations; null: as training samples"
    )

    @model_validator(mode="after")
    def _engine_can(self) -> RolloutConfig:
        if any(end == "" or (isinstance(end, int) and end < 0) for end in self.stop):
            raise ValueError(f"rollout.stop must hold texts of at least 1 character and token ids >= 0, got {list(self.stop)}")
        if self.tensor_parallel > 1 and not ENGINES.load(self.engine).tensor_parallel:
            raise ValueError(f"rollout.tensor_parallel must be 1 with rollout.engine={self.engine}, got {self.tensor_parallel}")
        return self

    def sampling(self, evaluation: bool = False) -> Sampling:
        """How training samples, or evaluations: answers as long, ended by the same stops."""
        if evaluation and self.evaluation is not None:
            return Sampling(self.max_new_tokens, **self.evaluation.model_dump(), stop=self.stop)
        return Sampling(self.max_new_tokens, self.temperature, stop=self.stop)

    @property
    def micro_batch(self) -> int:
        """Answers that are scored and prepared together: of a generator's share of a step a quarter, and from 8 to 32.

        With fewer, calls and small matrix products cost more than what is done while others are still written saves.
        """
        share = self.prompts_per_step * self.samples_per_prompt // self.generators
        return min(32, max(8, share // 4))

    @property
    def buffer(self) -> int:
        """Most completions that wait between two stages: a full buffer holds generation back."""
        return 8 * self.micro_batch


class KLConfig(Section):
    """Penalty for leaving the reference policy."""

    coefficient: float = Field(0.02, ge=0, description="starting weight of the penalty")
    estimator: Literal["k1", "k2", "k3"] | None = Field(
        None, description="k1: in the reward; k2, k3: in the loss; if not given, k1 for ppo, rloo and reinforce_pp, else k3"
    )
    target: float | None = Field(
        None, gt=0, description="KL per answer, nats, that the adaptive coefficient steers to; null keeps it fixed"
    )
    stop: float | None = Field(
        None,
        gt=0,
        description="KL(before the step || now), nats per token, at which the step ends after this minibatch; null: never",
    )


class LearnerConfig(Section):
    """Policy gradients under DeepSpeed."""

    algorithm: AlgorithmName = Field(
        "ppo", description="ppo trains a critic, too; rloo and *grpo, gspo, dapo and cispo compare answers to one prompt"
    )
    ranks: int = Field(2, ge=1, description="DeepSpeed ranks")
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="ZeRO stage")
    lora: int = Field(
        0,
        ge=0,
        description="rank of the adapter trained in place of the weights (LoRA, alpha twice that); 0: full tuning",
    )
    lora_targets: LoraTargetNames = Field(
        "auto", description="linear layers with an adapter by name, [q_proj, v_proj]; auto: all of the language model's"
    )
    save_memory: tuple[Literal["checkpointing", "offload"], ...] = Field(
        (),
        description="checkpointing: activations computed twice; offload: optimizer (ZeRO 3: and weights) in CPU memory",
    )
    lr: float = Field(3e-4, ge=0, description="policy learning rate")
    critic_lr: float = Field(1e-3, ge=0, description="critic learning rate (ppo)")
    warmup: int = Field(0, ge=0, description="policy steps over which learning rates rise to their full value")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rates after warm-up: constant, or falling to 0 at loop.steps"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay, of matrices only")
    max_grad_norm: float = Field(1.0, ge=0, description="norm that the gradient over all weights is clipped to; 0: never")
    epochs: int = Field(2, ge=1, description="passes over a step's answers")
    minibatches: int = Field(2, ge=1, description="optimizer steps per pass")
    clip: float | None = Field(
        None, gt=0, description="clip of the ratio (and of ppo's value step); if not given, the algorithm's, 0.2 for most of them"
    )
    clip_high: float | None = Field(
        None, gt=0, description="clip of the ratio above 1; if not given, as clip, or where that is not given the algorithm's"
    )
    staleness: Literal[0, 1] = Field(
        0, description="versions that answers may lag behind; 1: the next step's are generated while the learner trains"
    )
    lam: float = Field(0.95, ge=0, le=1, description="GAE lambda (ppo)")
    reward_normalisation: bool = Field(
        True,
        description="rewards in units of the mean and standard deviation of all that the run has seen: a reward model's logits "
        "have no scale of their own, and the sharper it is, the less a KL penalty would weigh",
    )
    truncation: Annotated[float, Field(ge=0)] | Literal["mask"] = Field(
        1.0,
        description="answers cut by the token limit: what is subtracted from their reward; mask: they are left out of the loss",
    )
    kl: KLConfig = Field(KLConfig(), description="penalty for leaving the reference policy")

    @model_validator(mode="after")
    def _can_offload(self) -> LearnerConfig:
        if "offload" in self.save_memory and self.zero_stage == 0:
            raise ValueError("learner.zero_stage must be at least 1 with learner.save_memory=offload, got 0")
        return self

    @model_validator(mode="after")
    def _targets_are_of_an_adapter(self) -> LearnerConfig:
        if self.lora_targets != "auto" and not self.lora:
            raise ValueError("learner.lora must be at least 1 with learner.lora_targets, got 0")
        return self


class LoopConfig(Section):
    """The main loop."""

    steps: int = Field(24, ge=1, description="policy steps")
    checkpoint_every: int = Field(8, ge=0, description="steps between checkpoints; 0 only at the end")
    keep: Annotated[int, Field(ge=1)] | None = Field(
        2, description="checkpoints that are kept, with the snapshots and models of the refits that they need; null: all"
    )
    max_failures: int = Field(
        3, ge=0, description="deaths that are tolerated: of generators, and of the whole job, which continues from its checkpoint"
    )
    evaluation_prompts: int = Field(240, ge=20, description="held-out prompts of the oracle evaluation")
    trackers: tuple[TrackerName, ...] = Field(
        ("tensorboard",), description="where metrics are tracked: tensorboard, wandb, mlflow, or import paths of your own"
    )


class Config(Section):
    """All options of the jobs that learn from feedback."""

    run: RunConfig = RunConfig()
    cluster: ClusterConfig = ClusterConfig()
    model: ModelConfig = ModelConfig()
    world: WorldConfig = WorldConfig()
    feedback: FeedbackConfig = FeedbackConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    learner: LearnerConfig = LearnerConfig()
    loop: LoopConfig = LoopConfig()

    @property
    def log_url(self) -> str:
        """SQLAlchemy URL of the feedback log."""
        return self.feedback.url or f"sqlite:///{self.run.path / 'feedback.db'}"

    @property
    def has_truth(self) -> bool:
        """Whether the embedded world's oracle knows the answers: its own prompts are asked and its users react."""
        return self.world.users != "none" and self.feedback.prompts is None and self.feedback.source is None

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        sent = {*SIMULATED_SIGNALS[0], *SIMULATED_SIGNALS[1]} if self.world.users != "none" else set()
        missing = sorted(signal for signal in sent if self.feedback.signals.get(signal) is None)
        if missing:
            raise ValueError(f"feedback.signals must label what simulated users send, got none for {', '.join(missing)}")
        samples, algorithm = self.rollout.samples_per_prompt, self.learner.algorithm
        if samples < 2 and ALGORITHMS.load(algorithm).grouped:
            raise ValueError(f"rollout.samples_per_prompt must be at least 2 with learner.algorithm={algorithm}, got {samples}")
        if self.learner.warmup and self.learner.warmup >= self.loop.steps:
            raise ValueError(f"learner.warmup must be below loop.steps, got {self.learner.warmup} >= {self.loop.steps}")
        if self.rollout.max_new_tokens >= self.model.max_length:
            lengths = f"{self.rollout.max_new_tokens} >= {self.model.max_length}"
            raise ValueError(f"rollout.max_new_tokens must be below model.max_length, got {lengths}")
        return self

    @model_validator(mode="after")
    def _one_process_is_enough(self) -> Config:
        if self.cluster.address != IN_PROCESS:
            return self
        found = {
            "rollout.generators=1": self.rollout.generators,
            "learner.ranks=1": self.learner.ranks,
            "learner.staleness=0": self.learner.staleness,
            "reward.workers=0": self.reward.workers,
        }
        wrong = [f"{needed}, got {value}" for needed, value in found.items() if needed.rpartition("=")[2] != str(value)]
        if not ENGINES.load(self.rollout.engine).shares_process:
            wrong.insert(0, f"a rollout.engine that can share a process, such as hf, got {self.rollout.engine}")
        if wrong:
            raise ValueError(f"cluster.address={IN_PROCESS} needs {'; '.join(wrong)}")
        return self
