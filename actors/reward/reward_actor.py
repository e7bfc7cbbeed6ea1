"""The reward role: fits reward models through Ray Train, lets one serve behind a gate, and scores token ids with it.

    snapshot + propensities -> fit (W workers, DDP) -> FOLDER/CANDIDATE/METHOD -> promote (gate) -> score

One fit makes all methods that are asked for; `config.method` is the one that may serve, the others for reports.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.cluster.environment import give_back_freed
from actors.cluster.place import restarted
from actors.reward.fit_spec import FitSpec
from actors.reward.promotion import Promotion, judge
from actors.reward.report import CandidateFit, RewardReport
from actors.reward.trainer import RewardTrainer
from causalrm_ray.checkpoint import atomic_folder, read_json, verify_folder, write_json
from causalrm_ray.config.train import RewardConfig
from causalrm_ray.data.snapshots.table import check_snapshot
from causalrm_ray.estimators.core.training import Shard
from causalrm_ray.models.reward_model import SequenceScorer, score_rows
from causalrm_ray.models.text import as_logged, end_tokens, load_tokenizer
from causalrm_ray.types import PerUser, Truncation

SERVING = "serving.json"
SCRATCH = ".ray_train"  # Ray Train's own, in the role's folder


class RewardActor:
    """Fits, gates and serves reward models. `version` counts promotions, from 1; 0: no model serves."""

    def __init__(
        self,
        backbone: str,
        config: RewardConfig,
        *,
        max_length: int,
        seed: int,
        folder: Path,
        timeout_s: float,
        per_user: PerUser = None,
        truncation: Truncation = "refuse",
        stops: Sequence[int] = (),
        use_gpu: bool = False,
        device: str = "cpu",
    ) -> None:
        """`backbone` is a folder or hub id of a causal model with its tokenizer; `folder` must be shared by all nodes.

        `max_length` in tokens; `per_user` rows with feedback are what a user counts for at most, and `truncation` says what
        becomes of longer rows (see `load_rows`); `stops` are ids that end the policy's answers, besides the backbone's own;
        `timeout_s` bounds the start of the workers and each exchange between them; `use_gpu` gives each worker a GPU; `device` is
        where the serving model lies.
        """
        torch.set_num_threads(1)  # sums in one order, so that a repeated score repeats its bits
        self._backbone = backbone
        self._config = config
        self._max_length, self._per_user, self._truncation = max_length, per_user, truncation
        self._seed = seed
        self._folder = folder.resolve()
        self._trainer = RewardTrainer(config.workers, self._folder / SCRATCH, use_gpu=use_gpu, timeout_s=timeout_s)
        self._device = device
        self._scorers: dict[str, SequenceScorer] = {}
        self._serving: Path | None = None
        self.version = 0
        tokenizer = load_tokenizer(backbone)
        self._ends, self._end = end_tokens(tokenizer, backbone) | set(stops), tokenizer.eos_token_id
        if restarted() and (self._folder / SERVING).exists():
            self.load(**read_json(self._folder / SERVING))

    def fit(
        self,
        snapshot: Path,
        propensities: Path,
        methods: Sequence[str],
        *,
        candidate: str,
        start: Path | None = None,
        clean_labels: Path | None = None,
        judged: Path | None = None,
    ) -> CandidateFit:
        """Fit `methods` on `snapshot` and write them to `folder`/`candidate`, whole or not at all; nothing is promoted.

        `propensities` is the folder of the propensity model's version that was fitted on `snapshot`; `clean_labels` a file of
        `write_clean_labels`, for the method "oracle" only, `judged` another, of the few rows that were judged (`feedback.clean`).
        Fits begin from the states of the model in `start` (None: the
        backbone) under a blank head. The propensity model is a good start: it has
        learned from all impressions what moves users, the labels only from a few. The serving model is none: its states have
        seen the labels. Only methods that fit heads on the backbone's own states and then distil them into a model go on from the
        one that serves, which learns from those heads only. The serving model's risk is measured on the same held-out rows.
        Raises InputError for a log that cannot be fitted, ValueError for other bad input, WorkerGroupError if a worker dies.
        """
        check_snapshot(snapshot)
        spec = FitSpec(
            snapshot=Path(snapshot).resolve(),
            propensities=Path(propensities).resolve(),
            clean_labels=clean_labels and Path(clean_labels).resolve(),
            judged=judged and Path(judged).resolve(),
            backbone=self._backbone,
            start=str(start or self._backbone),
            serving=str(self._serving) if self._serving else None,
            serving_version=self.version,
            methods=tuple(methods),
            config=self._config,
            max_length=self._max_length,
            per_user=self._per_user,
            truncation=self._truncation,
            seed=self._seed,
        )
        started = time.perf_counter()
        folder = self._folder / candidate
        train_seconds = self._trainer.fit(spec, folder) if self._config.workers else self._fit_here(spec, folder)
        return CandidateFit(folder, RewardReport.read(folder), time.perf_counter() - started, train_seconds)

    def promote(self, candidate: str) -> Promotion:
        """Let `candidate` serve if the gate lets it (see promotion).

        Raises ValueError if another model serves than the candidate was measured against.
        """
        folder = self._folder / candidate
        verify_folder(folder)
        report = RewardReport.read(folder)
        if self._serving == (folder / self._config.method).resolve():  # asked again after a restart
            return Promotion(True, "it serves already", self.version)
        if report.serving_version != self.version:
            raise ValueError(
                f"{candidate} must have been measured against serving version {self.version}, got {report.serving_version}"
            )
        promotion = judge(report.methods[self._config.method].heldout_risk, report.serving_risk, self.version)
        if promotion.promoted:
            self.load(folder / self._config.method, promotion.version)
        return promotion

    def score(self, sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, int]:
        """Logits [B] (float32) of rows of token ids, prompt + response, and the version that gave them.

        Each is read at the end that rows of a log have, whichever the engine stopped at, and where the token limit cut it (see
        `as_logged`).
        Raises RuntimeError before the first promotion, ValueError for a row of more than `max_length` tokens.
        """
        if self._serving is None:
            raise RuntimeError("no reward model serves yet: call fit and promote, or load, first")
        return self.score_with(str(self._serving), sequences), self.version

    def score_with(self, model: str, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits [B] by another model, a folder or hub id, for reports: that of another method, or of another version."""
        rows = [as_logged(row, self._ends, self._end) for row in sequences]
        for number, row in enumerate(rows):
            if len(row) > self._max_length:
                raise ValueError(
                    f"row {number} must have at most {self._max_length} tokens (model.max_length) with its end, got {len(row)}"
                )
        if model not in self._scorers:
            self._scorers[model] = SequenceScorer.from_pretrained(model).to(self._device)
        return score_rows(self._scorers[model], rows).numpy()

    def state(self) -> dict[str, Any]:
        """Which model serves, as JSON: {"folder", "version"}, the arguments of `load`."""
        return {"folder": str(self._serving) if self._serving else None, "version": self.version}

    def load(self, folder: str | Path, version: int) -> None:
        """Serve the model saved in `folder` (of one method) as `version`; recorded for a role that restarts."""
        verify_folder(Path(folder).resolve().parent)
        self._scorers.clear()
        self._serving, self.version = Path(folder).resolve(), version
        self._scorers[str(self._serving)] = SequenceScorer.from_pretrained(self._serving).to(self._device)
        write_json(self._folder / SERVING, self.state())

    def end_fits(self) -> None:
        """End the workers, which otherwise wait for the next fit until this process ends; a later fit starts new ones."""
        self._trainer.close()

    def _fit_here(self, spec: FitSpec, folder: Path) -> float:
        from actors.reward.workers import fit_into

        with atomic_folder(folder) as temporary:
            seconds = fit_into(temporary, spec, Shard(), torch.device(self._device))
        give_back_freed()
        return seconds
