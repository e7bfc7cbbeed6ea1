"""The propensity role: P(feedback is given | prompt, response), from every impression of the log.

    states of the snapshot -> cross_fit (2 folds of small heads) -> calibrate -> clip -> folder

A version's folder:  fold-K.json   fold-K.safetensors   calibration.json   report.json   propensity.safetensors ("propensity" [N],
out of fold, one per row of `load_rows`, in its order)   manifest.json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from actors.cluster.environment import give_back_freed
from actors.cluster.place import restarted
from actors.reward.report import VersionedPropensity
from actors.reward.snapshot_rows import SnapshotRows, load_rows
from causalrm_ray.checkpoint import CheckpointError, atomic_folder, read_json, verify_folder, write_json
from causalrm_ray.data.collate import FeatureRows
from causalrm_ray.data.states.cache import StateCache
from causalrm_ray.data.users.clusters import FOLDS
from causalrm_ray.estimators.core.frozen import head_settings, make_head
from causalrm_ray.estimators.core.training import predict
from causalrm_ray.estimators.nuisances.calibration import Calibration
from causalrm_ray.estimators.nuisances.propensity import Propensity, calibrate, cross_fit
from causalrm_ray.estimators.nuisances.state_choice import StateChoice, choose_states
from causalrm_ray.models.scorers.saved_heads import read_scorer, write_scorer
from causalrm_ray.types import PerUser, StatesName

PROPENSITIES = "propensity.safetensors"


@dataclass(frozen=True, eq=False)
class _Serving:
    """What predicts: the fold's heads, the calibration of their mean, the report with the version."""

    heads: Sequence[nn.Module]
    calibration: Calibration
    clip: float
    report: VersionedPropensity


class PropensityActor:
    """Fits, serves and diagnoses propensities. Versions count fits, from 1; 0: no fit yet."""

    def __init__(
        self,
        states: Path,
        clip: float | None,
        *,
        seed: int,
        max_length: int,
        choice: StatesName | None = None,
        per_user: PerUser = None,
        memory: Path | None = None,
    ) -> None:
        """`states` is the folder of the backbone's states of all rows, cut to `max_length` tokens (see data.states.cache); of
        these `choice` is read, or where that is None what explains held-out feedback best at the first fit; `clip` in (0, 1) is
        the lowest propensity used in a weight, None one that suits the log (`lowest_weighted`); `per_user` rows with feedback
        are what a user counts for at most (see `load_rows`).
        The file `memory` records what is served, for a role that restarts."""
        torch.set_num_threads(1)  # sums in one order, so that a repeated fit repeats its bits
        self._states, self._clip, self._seed, self._choice = states, clip, seed, choice
        self._max_length, self._per_user = max_length, per_user
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

        A refit reads the same states as the version that serves. Raises InputError for a log that cannot be fitted (see
        `load_rows`).
        """
        log = load_rows(snapshot, StateCache(self._states), self._max_length, self._per_user)
        choice = self._choose(log)
        features, o = log.states(choice.states), log.observations.o
        settings = head_settings(len(log), self._seed)
        raw, heads = cross_fit(make_head(features), FeatureRows(features), o, settings, FOLDS, fold=log.fold)
        propensity = calibrate(raw, o, self._clip, seed=self._seed, cluster=log.observations.cluster)
        report = VersionedPropensity(
            **vars(propensity.report),
            version=self.version + 1,
            split_by=log.split_by,
            log_warnings=log.warnings,
            choice=choice,
        )
        self._save(folder, heads, propensity, report)
        self.load(folder)
        give_back_freed()
        return self.diagnostics()

    def predict(self, states: Tensor) -> np.ndarray:
        """Propensity [B] in [clip, 1] of answers by their states [B, D]: the heads' mean probability, calibrated and clipped.

        Raises RuntimeError before the first fit.
        """
        serving, rows = self._require(), FeatureRows(states)
        raw = torch.stack([torch.sigmoid(predict(head, rows)) for head in serving.heads]).mean(0)
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

    def _choose(self, log: SnapshotRows) -> StateChoice:
        if self._serving is not None and self._serving.report.choice is not None:
            return self._serving.report.choice
        return StateChoice(self._choice) if self._choice else choose_states(log.states, log.observations, log.heldout, self._seed)

    def _save(self, folder: Path, heads: Sequence[nn.Module], propensity: Propensity, report: VersionedPropensity) -> None:
        with atomic_folder(folder) as temporary:
            for number, head in enumerate(heads):
                write_scorer(temporary / f"fold-{number}", head)
            write_json(temporary / "calibration.json", {**asdict(propensity.calibration), "clip": propensity.clip})
            report.write(temporary)
            save_file({"propensity": propensity.prob.numpy().astype(np.float32)}, temporary / PROPENSITIES)

    def _read(self, folder: Path) -> _Serving:
        if (folder / "fold-0").is_dir():
            raise CheckpointError(f"{folder} is of a version that tuned whole propensity models: start a run of another name")
        calibration = read_json(folder / "calibration.json")
        clip = calibration.pop("clip")
        return _Serving(
            [read_scorer(folder / f"fold-{number}") for number in range(FOLDS)],
            Calibration(**{name: tuple(values) for name, values in calibration.items()}),
            clip,
            VersionedPropensity.read(folder),
        )


def read_propensities(folder: Path) -> Tensor:
    """Out-of-fold propensities [N] of the rows (`load_rows`) that the version in `folder` was fitted on, in their order."""
    return torch.from_numpy(load_file(folder / PROPENSITIES)["propensity"])
