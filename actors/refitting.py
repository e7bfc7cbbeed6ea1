"""A refit: snapshot of the log -> propensities -> reward models -> the gate, and what serves since."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from actors.cluster.telemetry import event, record
from actors.cluster.wait import resolve
from actors.reward.report import Refit
from actors.reward.snapshot_rows import write_clean_labels
from causalrm_ray.data.log.clean import CleanSource, match_clean


class Refitter:
    """Fits over handles on the log, propensity and reward roles; `folder` is the run's, which may move between attempts."""

    def __init__(
        self, log: Any, propensity: Any, reward: Any, folder: Path, timeout_s: float, clean: CleanSource | None = None
    ) -> None:
        """`clean` is read at each fit: it may grow between them."""
        self._log, self._propensity, self._reward = log, propensity, reward
        self._folder, self._timeout_s, self._clean = folder, timeout_s, clean
        self._propensity_folder: Path | None = None
        self._fitted_position = 0  # of the log, when it was last fitted

    def refit(
        self,
        name: str,
        as_of: float | None,
        methods: Sequence[str],
        clean_labels: Callable[[Path], np.ndarray] | None = None,
    ) -> Refit:
        """Fit propensity, noise rates and reward models on the log as of a time; promote the configured method's behind its gate.

        `name` names the snapshot and the candidate; `clean_labels` gives r* [N] of a snapshot to the method "oracle". A refit
        starts from models that serve where these pass on no label (see the roles).
        """
        position = self._wait(self._log.position.remote(), "snapshot the log")
        snapshot = self._wait(self._log.seal.remote(self._folder, name, as_of), "snapshot the log")
        folder = self._folder / "propensity" / name
        began = time.perf_counter()
        propensity = self._wait(self._propensity.fit.remote(snapshot, folder), "fit propensity")
        record("fit_seconds", "propensity", time.perf_counter() - began)
        record("version", "propensity", propensity.version)
        labels = None
        if clean_labels is not None:
            labels = snapshot.with_suffix(".labels.safetensors")
            write_clean_labels(labels, clean_labels(snapshot))
        judged = counts = None
        if self._clean is not None:
            judged = snapshot.with_suffix(".judged.safetensors")
            found, counts = match_clean(self._clean.read(), snapshot)
            write_clean_labels(judged, found)
        self._propensity_folder, self._fitted_position = folder, position
        options = {"candidate": name, "start": folder / "fold-0", "clean_labels": labels, "judged": judged}
        fit = self._wait(self._reward.fit.remote(snapshot, folder, list(methods), **options), "fit reward")
        promotion = self._wait(self._reward.promote.remote(name), "promote reward")
        record("fit_seconds", "reward", fit.seconds)
        record("version", "reward", promotion.version)
        event("refit", "reward", candidate=name, seconds=fit.seconds, log_position=position)
        event("gate", "reward", candidate=name, **asdict(promotion))
        folders = {method: str((fit.folder / method).relative_to(self._folder)) for method in methods}
        return Refit(propensity, fit.report, folders, fit.seconds, fit.train_seconds, promotion, counts)

    def end_fits(self) -> None:
        """End the processes that wait for the reward model's next fit; a later fit starts new ones."""
        self._wait(self._reward.end_fits.remote(), "end the workers of fits")

    def log_has_grown(self) -> bool:
        """Whether the log has grown since it was last fitted."""
        return self._wait(self._log.position.remote(), "read the log") > self._fitted_position

    def state(self) -> dict[str, Any]:
        """Which reward and propensity models serve, as JSON; folders are relative to the run's, which may move."""
        reward = self._wait(self._reward.state.remote(), "save")
        return {
            "reward": {**reward, "folder": str(Path(reward["folder"]).relative_to(self._folder))},
            "propensity": str(self._propensity_folder.relative_to(self._folder)) if self._propensity_folder else None,
            "log_position": self._fitted_position,
        }

    def load(self, serving: Mapping[str, Any]) -> None:
        """Serve what `state` returned."""
        self._propensity_folder, self._fitted_position = self._folder / serving["propensity"], serving["log_position"]
        reward = {**serving["reward"], "folder": self._folder / serving["reward"]["folder"]}
        loading = [self._reward.load.remote(**reward), self._propensity.load.remote(self._propensity_folder)]
        self._wait(loading, "load reward and propensity")

    def _wait(self, refs: Any, phase: str) -> Any:
        return resolve(refs, phase, self._timeout_s)
