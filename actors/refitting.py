"""A refit: snapshot of the log -> states of its rows -> propensities -> reward models -> the gate, and what serves since."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import numpy as np

from actors.cluster.telemetry import event, record
from actors.cluster.wait import resolve
from actors.features.states import StatesDone
from actors.reward.report import Refit
from actors.reward.snapshot_rows import write_clean_labels
from causalrm_ray.data.log.clean import CleanSource, match_clean


class Refitter:
    """Fits over handles on the log, propensity and reward roles; `folder` is the run's, which may move between attempts."""

    def __init__(
        self,
        log: Any,
        features: Mapping[str, Any],
        propensity: Any,
        reward: Any,
        folder: Path,
        timeout_s: float,
        clean: CleanSource | None = None,
    ) -> None:
        """`features` are handles by name; `clean` is read at each fit: it may grow between them."""
        self._log, self._features, self._propensity, self._reward = log, features, propensity, reward
        self._folder, self._timeout_s, self._clean = folder, timeout_s, clean
        self._propensity_folder: Path | None = None
        self._fitted_position = 0  # of the log, when it was last fitted

    def refit(
        self,
        name: str,
        as_of: float | None,
        methods: Sequence[str],
        clean_labels: Callable[[Path], np.ndarray] | None = None,
        on_states: Callable[[StatesDone], None] = lambda done: None,
    ) -> Refit:
        """Compute the states that are missing, fit propensity, noise rates and reward models on the log as of a time; promote the
        configured method's behind its gate.

        `name` names the snapshot and the candidate; `clean_labels` gives r* [N] of a snapshot to the method "oracle";
        `on_states` is called as states are written.
        """
        position = self._wait(self._log.position.remote(), "snapshot the log")
        snapshot = self._wait(self._log.seal.remote(self._folder, name, as_of), "snapshot the log")
        self._compute_states(snapshot, on_states)
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
        options = {"candidate": name, "clean_labels": labels, "judged": judged}
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

    def _compute_states(self, snapshot: Path, on_states: Callable[[StatesDone], None]) -> None:
        """Let the features roles compute what is missing: each answers every few seconds, and no answer may take too long."""
        began, done = time.perf_counter(), dict.fromkeys(self._features, StatesDone(0, 1, 0))
        while open := {name: role for name, role in self._features.items() if done[name].rows < done[name].missing}:
            refs = [role.advance.remote(snapshot) for role in open.values()]
            done |= zip(open, self._wait(refs, "compute states"), strict=True)
            on_states(StatesDone(*(sum(counts) for counts in zip(*map(astuple, done.values()), strict=True))))
        tokens = sum(one.tokens for one in done.values())
        if tokens:
            rows = sum(one.rows for one in done.values())
            event("states", "features", rows=rows, tokens=tokens, seconds=time.perf_counter() - began)

    def _wait(self, refs: Any, phase: str) -> Any:
        return resolve(refs, phase, self._timeout_s)
