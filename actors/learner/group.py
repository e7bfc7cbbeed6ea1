"""All ranks of the learner as one. Their methods are collective: every call goes to every rank."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.cluster.telemetry import DRIVER, record
from actors.cluster.wait import resolve
from actors.learner.shares import Sharder, answer_metrics
from causalrm_ray.types import Completion, Scored


class LearnerGroup:
    """Handles on the `ranks`, each on a process; `sharder` splits answers over as many, `timeout_s` bounds each wait."""

    def __init__(self, ranks: Sequence[Any], sharder: Sharder, timeout_s: float) -> None:
        self.ranks = tuple(ranks)
        self._sharder, self._timeout_s = sharder, timeout_s
        self._preparing: list[Any] = []  # answers that the next update waits for

    def info(self) -> dict[str, Any]:
        """What the learner runs on, once every rank has started."""
        return self._wait([rank.info.remote() for rank in self.ranks], "start learner")[0]

    def prepare(self, completions: Sequence[Completion]) -> list[Any]:
        """Let each rank evaluate its share of some answers, before an update on them. Returns what to wait for.

        Raises ValueError, naming the id, for an answer that must not be trained on.
        """
        shares = self._sharder.split(completions) if self.ranks else ()
        return [rank.prepare.remote(share) for rank, share in zip(self.ranks, shares, strict=True)]

    def gaps(self, completions: Sequence[Completion]) -> dict[str, float]:
        """Mean |difference| between the engine's log-probabilities of each answer's tokens and the learner's, by its prompt's id.

        Raises ValueError, naming the id, for an answer that could not be trained on.
        """
        shares = self._sharder.split_apart(completions)
        found = [rank.gaps.remote(share) for rank, share in zip(self.ranks, shares, strict=True)]
        return {name: gap for gaps in self._wait(found, "compare engine and learner") for name, gap in gaps.items()}

    def await_before_update(self, prepared: Sequence[Any]) -> None:
        """Let the next update wait for what `prepare` returned, in place of the caller."""
        self._preparing += prepared

    def prepare_step(self, scored: Sequence[Scored], micro_batch: int) -> None:
        """Let the ranks evaluate answers that no rollout brought, in micro-batches, before an update on them."""
        completions = [answer.completion for answer in scored]
        for first in range(0, len(completions), micro_batch):
            self._wait(self.prepare(completions[first : first + micro_batch]), "prepare answers")

    def update(self, scored: Sequence[Scored]) -> dict[str, float]:
        """One update on a whole step; metrics over all ranks, and the version of the reward that they rest on.

        Raises ValueError, naming the id where there is one, for answers that must not be trained on (see Sharder.step).
        """
        version, shares = self._sharder.version, self._sharder.step(scored)
        updates = [rank.update.remote(share) for rank, share in zip(self.ranks, shares, strict=True)]
        preparing, self._preparing = self._preparing, []
        self._wait(preparing, "prepare answers")  # first: after an error in it, or a death, the update fails of that
        record("queue_rows", DRIVER, 0)
        began = time.perf_counter()
        metrics = self._wait(updates, "update policy")[0]
        record("update_seconds", "learner", time.perf_counter() - began)
        return {**metrics, **answer_metrics(scored, version), "reward_version": float(scored[0].reward_version)}

    def save(self, folder: Path) -> None:
        """Write the exact state to `folder`/learner and the policy, as a Hugging Face folder, to `folder`/policy."""
        self._wait([rank.save.remote(folder / "learner") for rank in self.ranks], "save learner")
        self.save_policy(folder / "policy")

    def save_policy(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        self._wait([rank.save_policy.remote(folder) for rank in self.ranks], "save policy")

    def load(self, folder: Path) -> None:
        """Restore the state that `save` wrote under `folder`, whose hashes must have been verified."""
        versions = self._wait([rank.load.remote(folder / "learner") for rank in self.ranks], "load learner")
        self._sharder.restart(versions[0])

    def _wait(self, refs: Any, phase: str) -> Any:
        return resolve(refs, phase, self._timeout_s)
