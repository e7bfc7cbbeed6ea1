"""The propensity role: P(feedback is given | prompt, response), from every impression of the log.

    snapshot -> cross_fit (2 folds, backbone + head) -> calibrate -> clip -> folder

A version's folder:  fold-K/ (Hugging Face folders)   calibration.json   report.json   propensity.safetensors ("propensity" [N],
out of fold, one per row of `load_rows`, in its order)   manifest.json
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from actors.cluster.environment import give_back_freed
from actors.cluster.place import restarted
from actors.reward.report import VersionedPropensity
from actors.reward.snapshot_rows import load_rows
from causalrm_ray.checkpoint import atomic_folder, read_json, verify_folder, write_json
from causalrm_ray.data.users.clusters import FOLDS
from causalrm_ray.estimators.core.training import FitSettings
from causalrm_ray.estimators.nuisances.calibration import Calibration
from causalrm_ray.estimators.nuisances.propensity import Propensity, calibrate, cross_fit
from causalrm_ray.models.reward_model import SequenceScorer, score_rows
from causalrm_ray.models.text import load_tokenizer
from causalrm_ray.types import PerUser, Truncation

PROPENSITIES = "propensity.safetensors"


@dataclass(frozen=True, eq=False)
class _Serving:
    """What predicts: the fold models, the calibration of their mean, the report with the version."""

    models: Sequence[SequenceScorer]
    calibration: Calibration
    clip: float
    report: VersionedPropensity


class PropensityActor:
    """Fits, serves and diagnoses propensities. Versions count fits, from 1; 0: no fit yet."""

    def __init__(
        self,
        backbone: str,
        settings: FitSettings,
        clip: float | None,
        *,
        max_length: int,
        per_user: PerUser = None,
        truncation: Truncation = "refuse",
        device: str = "cpu",
        memory: Path | None = None,
    ) -> None:
        """`backbone` is a folder or hub id of a causal model with its tokenizer; `max_length` in tokens; `clip` in (0, 1) is the
        lowest propensity used in a weight, None one that suits the log (`lowest_weighted`); `per_user` rows with feedback are
        what a user counts for at most, and `truncation` says what becomes of longer rows (see `load_rows`).
        The file `memory` records what is served, for a role that restarts."""
        torch.set_num_threads(1)  # sums in one order, so that a repeated fit repeats its bits
        self._backbone = backbone
        self._settings, self._clip = settings, clip
        self._max_length, self._per_user, self._truncation = max_length, per_user, truncation
        self._device = device
        self._tokenizer = load_tokenizer(backbone)
        self._serving: _Serving | None = None
        self._memory = memory
        if memory and memory.exists() and restarted():
            self.load(Path(read_json(memory)["folder"]))

    @property
    def version(self) -> int:
        """Version that predicts now; 0 before the first fit."""
        return self._serving.report.version if self._serving else 0

    def fit(self, snapshot: Path, folder: Path) -> VersionedPropensity:
        """Cross-fit on all impressions of `snapshot`, write everything to `folder`, serve it, and return its diagnostics.

        A refit starts from the models that serve, if folds are split by the same column: a row then stays in its fold in every
        snapshot, so none of them has seen the rows whose propensity it predicts. Raises InputError for a log that cannot be
        fitted (see `load_rows`).
        """
        log = load_rows(snapshot, self._tokenizer, self._max_length, self._per_user, self._truncation)
        o = log.observations.o
        warm = self._serving is not None and self._serving.report.split_by == log.split_by
        starts = [partial(copy.deepcopy, model) for model in self._serving.models] if self._serving and warm else ()
        raw, models = cross_fit(self._fresh, log.token_rows, o, self._settings, FOLDS, fold=log.fold, starts=starts)
        propensity = calibrate(raw, o, self._clip, seed=self._settings.seed, cluster=log.observations.cluster)
        version = self.version + 1
        report = VersionedPropensity(**vars(propensity.report), version=version, split_by=log.split_by, log_warnings=log.warnings)
        self._save(folder, models, propensity, report)
        del models, starts
        self.load(folder)
        give_back_freed()
        return self.diagnostics()

    def predict(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Propensity [B] in [clip, 1] of rows of token ids: the fold models' mean probability, calibrated and clipped.

        Raises RuntimeError before the first fit.
        """
        serving = self._require()
        raw = torch.stack([torch.sigmoid(score_rows(model, sequences)) for model in serving.models]).mean(0)
        return serving.calibration(raw).clamp(min=serving.clip).numpy()

    def diagnostics(self) -> VersionedPropensity:
        """Overlap, effective sample size and calibration error of the serving version."""
        return self._require().report

    def load(self, folder: Path) -> int:
        """Serve the version in `folder` again. Returns its version; raises CheckpointError for an incomplete folder."""
        verify_folder(folder)
        self._serving = self._read(folder)
        if self._memory:
            write_json(self._memory, {"folder": str(folder.resolve())})
        return self.version

    def _require(self) -> _Serving:
        if self._serving is None:
            raise RuntimeError("no propensity model serves yet: call fit or load first")
        return self._serving

    def _fresh(self) -> SequenceScorer:
        return SequenceScorer.from_pretrained(self._backbone).to(self._device)

    def _save(self, folder: Path, models: Sequence[Any], propensity: Propensity, report: VersionedPropensity) -> None:
        with atomic_folder(folder) as temporary:
            for number, model in enumerate(models):
                model.save_pretrained(temporary / f"fold-{number}", self._tokenizer)
            write_json(temporary / "calibration.json", {**asdict(propensity.calibration), "clip": propensity.clip})
            report.write(temporary)
            save_file({"propensity": propensity.prob.numpy().astype(np.float32)}, temporary / PROPENSITIES)

    def _read(self, folder: Path) -> _Serving:
        calibration = read_json(folder / "calibration.json")
        models = [SequenceScorer.from_pretrained(folder / f"fold-{number}").to(self._device) for number in range(FOLDS)]
        clip = calibration.pop("clip")
        return _Serving(
            models,
            Calibration(**{name: tuple(values) for name, values in calibration.items()}),
            clip,
            VersionedPropensity.read(folder),
        )


def read_propensities(folder: Path) -> Tensor:
    """Out-of-fold propensities [N] of the rows (`load_rows`) that the version in `folder` was fitted on, in their order."""
    return torch.from_numpy(load_file(folder / PROPENSITIES)["propensity"])
