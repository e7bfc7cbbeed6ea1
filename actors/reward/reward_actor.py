"""The reward role: fits reward models through Ray Train, lets one serve behind a gate, and scores token ids with it.

    states of a snapshot + propensities -> fit (W workers) -> FOLDER/CANDIDATE/METHOD -> promote (gate) -> score

One fit makes all methods that are asked for; `config.method` is the one that may serve, the others for reports.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.cluster.environment import give_back_freed
from actors.cluster.place import restarted
from actors.reward.fit_spec import FitSpec
from actors.reward.promotion import Promotion, judge
from actors.reward.report import CandidateFit, RewardReport, VersionedPropensity
from actors.reward.trainer import RewardTrainer
from causalrm_ray.checkpoint import atomic_folder, read_json, verify_folder, write_json
from causalrm_ray.config.train import RewardConfig
from causalrm_ray.data.snapshots.table import check_snapshot
from causalrm_ray.estimators.core.training import Shard
from causalrm_ray.models.states.backbone import Backbone
from causalrm_ray.models.states.pooled import Row
from causalrm_ray.models.states.scorer import Backbones, RowScorer, load_scorer
from causalrm_ray.models.text import as_logged, end_tokens, load_tokenizer
from causalrm_ray.types import PerUser

SERVING = "serving.json"
SCRATCH = ".ray_train"  # Ray Train's own, in the role's folder


class RewardActor:
    """Fits, gates and serves reward models. `version` counts promotions, from 1; 0: no model serves."""

    def __init__(
        self,
        backbone: Backbone,
        config: RewardConfig,
        *,
        cache: Path,
        max_length: int,
        seed: int,
        folder: Path,
        timeout_s: float,
        per_user: PerUser = None,
        stops: Sequence[int] = (),
        use_gpu: bool = False,
        device: str = "cpu",
    ) -> None:
        """`backbone` is a causal model with its tokenizer; `folder` and `cache`, where its states of all rows are, must be shared
        by all nodes.

        `max_length` in tokens; `per_user` rows with feedback are what a user counts for at most (see `load_rows`); `stops` are
        ids that end the policy's answers, besides the backbone's own;
        `timeout_s` bounds the start of the workers and each exchange between them; `use_gpu` gives each worker a GPU; `device` is
        where the serving model lies.
        """
        torch.set_num_threads(1)  # sums in one order, so that a repeated score repeats its bits
        self._backbone, self._cache = backbone, cache
        self._config = config
        self._max_length, self._per_user = max_length, per_user
        self._seed = seed
        self._folder = folder.resolve()
        self._trainer = RewardTrainer(config.workers, self._folder / SCRATCH, use_gpu=use_gpu, timeout_s=timeout_s)
        self._device = device
        self._scorers: dict[str, RowScorer] = {}
        self._backbones = Backbones(device, {backbone.model: backbone.digest})
        self._serving: Path | None = None
        self.version = 0
        tokenizer = load_tokenizer(backbone.model)
        self._ends, self._end = end_tokens(tokenizer, backbone.model) | set(stops), tokenizer.eos_token_id
        if restarted() and (self._folder / SERVING).exists():
            self.load(**read_json(self._folder / SERVING))

    def fit(
        self,
        snapshot: Path,
        propensities: Path,
        methods: Sequence[str],
        *,
        candidate: str,
        clean_labels: Path | None = None,
        judged: Path | None = None,
    ) -> CandidateFit:
        """Fit `methods` on `snapshot` and write them to `folder`/`candidate`, whole or not at all; nothing is promoted.

        `propensities` is the folder of the propensity model's version that was fitted on `snapshot`; `clean_labels` a file of
        `write_clean_labels`, for the method "oracle" only, `judged` another, of the few rows that were judged (`feedback.clean`).
        Heads read the states that the propensity model reads. The serving model's risk is measured on the same held-out rows.
        Raises InputError for a log that cannot be fitted, ValueError for other bad input, WorkerGroupError if a worker dies.
        """
        check_snapshot(snapshot)
        spec = FitSpec(
            snapshot=Path(snapshot).resolve(),
            cache=self._cache,
            propensities=Path(propensities).resolve(),
            clean_labels=clean_labels and Path(clean_labels).resolve(),
            judged=judged and Path(judged).resolve(),
            backbone=self._backbone,
            serving=str(self._serving) if self._serving else None,
            serving_version=self.version,
            methods=tuple(methods),
            config=self._config,
            max_length=self._max_length,
            per_user=self._per_user,
            seed=self._seed,
        )
        choice = VersionedPropensity.read(spec.propensities).choice
        if choice is None:
            raise ValueError(f"{propensities} must say which states its model read: fit it again")
        spec = replace(spec, backbone=replace(self._backbone, states=choice.states))
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

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[np.ndarray, int]:
        """Logits [B] (float32) of prompts and their answers, token ids, and the version that gave them.

        Each is read at the end that rows of a log have, whichever the engine stopped at, and where the token limit cut it (see
        `as_logged`).
        Raises RuntimeError before the first promotion, ValueError for a row of more than `max_length` tokens.
        """
        if self._serving is None:
            raise RuntimeError("no reward model serves yet: call fit and promote, or load, first")
        return self.score_with(str(self._serving), rows), self.version

    def score_with(self, model: str, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> np.ndarray:
        """Logits [B] by another model, a folder or hub id, for reports: that of another method, or of another version."""
        read = [Row(tuple(prompt), as_logged(answer, self._ends, self._end)) for prompt, answer in rows]
        for number, row in enumerate(read):
            if row.tokens > self._max_length:
                raise ValueError(
                    f"row {number} must have at most {self._max_length} tokens (model.max_length) with its end, got {row.tokens}"
                )
        if model not in self._scorers:
            self._scorers[model] = load_scorer(model, self._device, self._backbones)
        return self._scorers[model].score(read).numpy()

    def state(self) -> dict[str, Any]:
        """Which model serves, as JSON: {"folder", "version"}, the arguments of `load`."""
        return {"folder": str(self._serving) if self._serving else None, "version": self.version}

    def load(self, folder: str | Path, version: int) -> None:
        """Serve the model saved in `folder` (of one method) as `version`; recorded for a role that restarts."""
        verify_folder(Path(folder).resolve().parent)
        self._scorers.clear()
        self._serving, self.version = Path(folder).resolve(), version
        self._scorers[str(self._serving)] = load_scorer(self._serving, self._device, self._backbones)
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
