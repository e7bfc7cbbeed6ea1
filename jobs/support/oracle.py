"""The embedded world's ground truth, true scores and preferences: for evaluation, and for the comparison model "oracle"."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from causalrm_ray.config.train import Config
from causalrm_ray.conversation import Conversation
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.data.snapshots.table import read_snapshot
from causalrm_ray.metrics import auroc, r2
from causalrm_ray.types import Completion, Impression, Scored
from causalrm_ray.world.grammar import parse
from causalrm_ray.world.oracle import score
from causalrm_ray.world.users import SimulatedUsers


class Oracle:
    """Oracle of a run in the embedded world; for a user's own prompts `known` is False and metrics are empty."""

    def __init__(self, config: Config) -> None:
        self.known = config.has_truth
        self._users = SimulatedUsers(config.world, config.run.seed)
        self._own = f"{config.run.name}/"  # how the ids of the run's impressions begin

    def scores(self, completions: Sequence[Completion]) -> np.ndarray:
        """True scores [N], 0 to 4."""
        return np.array([score(done.prompt.conversation.text, done.response) for done in completions], dtype=np.float64)

    def flashy(self, completions: Sequence[Completion]) -> float:
        """Share of the answers in the flashy style; style has no part in the true score."""
        parsed = [parse(done.prompt.conversation.text, done.response) for done in completions]
        return float(np.mean([answer is not None and answer.style == "flashy" for answer in parsed]))

    def rollout_metrics(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Mean true score of a step's answers, and the number shown to users."""
        if not self.known:
            return {}
        completions = [answer.completion for answer in scored]
        return {
            "oracle_mean": float(self.scores(completions).mean()),
            "shown": float(sum(not done.is_blank for done in completions)),
        }

    def preferences(self, snapshot: Path) -> np.ndarray:
        """r* [N] of a snapshot's impressions."""
        return np.array(
            [self._users.preference(impression) for impression in _impressions(read_snapshot(snapshot))], dtype=np.float32
        )

    def judge(self, logits: np.ndarray, impressions: Sequence[Impression]) -> dict[str, float | None]:
        """R2 of the probability and AUROC of a reward model's logits [N] against r*; None where all r* are equal."""
        liked = torch.tensor([float(self._users.preference(impression)) for impression in impressions])
        if len(liked.unique()) < 2:
            return {"r2": None, "auroc": None}
        logit = torch.tensor(logits, dtype=torch.float64)
        return {"r2": r2(torch.sigmoid(logit), liked), "auroc": auroc(logit, liked)}

    def reactions(self, log: FeedbackLog) -> tuple[list[Impression], Counter[str], Counter[str]]:
        """The run's impressions in the log, the ids of the events that they lead to (simulated users react the same way again),
        and those that are there."""
        impressions = [row for row in _impressions(log.snapshot()) if row.id.startswith(self._own)]
        expected = Counter(event.id for impression in impressions for event in self._users.react(impression))
        return impressions, expected, Counter(event.id for _, event in log.stream() if event.impression_id.startswith(self._own))

    def audit(self, log: FeedbackLog, shown: int) -> dict[str, int]:
        """The log compared with the feedback that `shown` impressions lead to: "lost" and "duplicated" must be 0."""
        impressions, expected, found = self.reactions(log)
        lost = max(0, shown - len(impressions)) + (expected - found).total()
        extra = max(0, len(impressions) - shown) + (found - expected).total()
        return {"impressions": len(impressions), "events": found.total(), "lost": lost, "duplicated": extra}


def _impressions(rows: Iterable[Any]) -> list[Impression]:
    same = ("response", "policy_version", "time", "user")
    return [
        Impression(
            row["impression_id"],
            Conversation(row["prompt"]),
            **{name: row[name] for name in same},
            context=json.loads(row["context"] or "{}"),
        )
        for row in rows
    ]
