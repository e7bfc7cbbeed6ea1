"""What a log holds, in figures that a person can check: how many, of what, by whom, and what was not read."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from causalrm_ray.conversation import Conversation
from causalrm_ray.data.formats.parts.ratings import GRADES, RATINGS
from causalrm_ray.data.snapshots.table import read_batches, value_at
from causalrm_ray.data.users.clusters import digest, mixed
from causalrm_ray.data.users.concentration import HEAVY, largest_share
from causalrm_ray.errors import brief

_HASHED = ("user", "conversation_id", "prompt", "response")
_FEEDBACK = ("signal", "label", *dict.fromkeys((*RATINGS, *GRADES)), "value", "events", "retracts")  # the first of these is shown
_VALUES = re.compile(r", got .*|^(impression|event) '[^']*': ", re.DOTALL)  # what differs from row to row


@dataclass(frozen=True)
class LogSummary:
    """Figures of a snapshot.

    `turns` counts users' messages over all impressions, `max_turns` those of the longest conversation; `reactions` counts the
    deciding events by signal and label; `users` and `conversations` are distinct ones, 0 where none is logged. `concentration`
    are sentences about a user or an answer with more than 5 % of the feedback.
    """

    impressions: int
    observed: int
    liked: int
    distinct_prompts: int
    conversations: int
    turns: int
    max_turns: int
    users: int
    reactions: Mapping[str, int]
    concentration: tuple[str, ...]


def summarise_log(snapshot: Path) -> LogSummary:
    """Read a snapshot in batches; kept are numbers of each row, no texts. Raises SnapshotError as read_batches does."""
    reactions = Counter[str]()
    found: dict[str, list[np.ndarray]] = {name: [] for name in (*_HASHED, "turns", "observed", "label")}
    for batch in read_batches(snapshot):
        for name in _HASHED:
            found[name].append(digest(name, batch[name].to_pylist()))
        found["turns"].append(np.fromiter(map(_turns, batch["prompt"].to_pylist()), dtype=np.int64))
        found["observed"].append(batch["observed"].to_numpy())
        found["label"].append(batch["label"].fill_null(0).to_numpy())
        events = zip(batch["signal"].to_pylist(), batch["label"].to_pylist(), strict=True)
        reactions.update(f"{signal} ({('disliked', 'liked')[label]})" for signal, label in events if label is not None)
    rows = {name: np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64) for name, parts in found.items()}
    return LogSummary(
        impressions=len(rows["observed"]),
        observed=int((rows["observed"] == 1).sum()),
        liked=int(rows["label"].sum()),
        distinct_prompts=_distinct(rows["prompt"]),
        conversations=_distinct(rows["conversation_id"]),
        turns=int(rows["turns"].sum()),
        max_turns=int(rows["turns"].max(initial=0)),
        users=_distinct(rows["user"]),
        reactions=dict(sorted(reactions.items())),
        concentration=tuple(_concentration(snapshot, rows)),
    )


@dataclass(frozen=True)
class Refused:
    """What a quarantine holds: rows by reason, without their values, and the labels or signals of those that were reactions."""

    reactions: int
    reasons: Mapping[str, int]
    labels: Mapping[str, int]


def summarise_quarantine(path: Path) -> Refused:
    """Count the rows of a quarantine that an import wrote. A row is a reaction if it holds a value in a column of feedback."""
    reasons, labels, reactions = Counter[str](), Counter[str](), 0
    with path.open(encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            reasons[_VALUES.sub("", entry["reason"])] += 1
            try:
                fields = json.loads(entry["raw"])
            except ValueError:
                fields = None
            given = [fields[name] for name in _FEEDBACK if fields.get(name) is not None] if isinstance(fields, dict) else []
            if given:
                reactions += 1
                labels[str(given[0])[:40] if isinstance(given[0], str | int | float) else "other"] += 1
    return Refused(reactions, dict(reasons.most_common()), dict(labels.most_common()))


def _turns(prompt: str) -> int:
    return sum(message["role"] == "user" for message in Conversation(prompt).messages)


def _distinct(hashes: np.ndarray) -> int:
    return len(np.unique(hashes[hashes != 0]))


def _concentration(snapshot: Path, rows: Mapping[str, np.ndarray]) -> Iterator[str]:
    for key, what in ((rows["user"], "user"), (mixed(rows["response"], rows["prompt"]), "impression_id")):
        most = largest_share(key, rows["observed"]) if len(key) else None
        if most is not None and most.share > HEAVY:
            name = brief(value_at(snapshot, what, most.row))
            thing = f"user {name}" if what == "user" else f"the answer of impression {name}"
            yield f"{thing} has {most.rows} of {most.total} reactions, {most.share:.0%}"
