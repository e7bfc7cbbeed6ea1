"""A snapshot of the log as the numbers that fits read: token ids, was feedback given, what it said."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from causalrm_ray.conversation import Conversation
from causalrm_ray.data.clusters import LEVELS, digest, split
from causalrm_ray.data.log.snapshot import check_log, read_snapshot
from causalrm_ray.errors import InputError
from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.diagnostics.groups import Groups, Signals
from causalrm_ray.estimators.nuisances.strata import length_buckets, stratify
from causalrm_ray.files import write_whole
from causalrm_ray.models.text import encode_pair

MOST_VALUES = 8  # of a trait; more, and it is an id


@dataclass(frozen=True, eq=False)
class SnapshotRows:
    """N impressions: `token_rows`, prompt, response and end of each; `observations` o [N] and r [N].

    `heldout` are the row numbers that reward fits never train on: about a fifth, by a hash of the user, else the conversation,
    else the prompt, so that these stay on their side in every later snapshot, and a gate compares models on rows of which
    neither has seen any. `fold` [N] is likewise the propensity model that never trains on a row, 0 or 1, or that none does, -1.
    `split_by` is the column of that hash, and `warnings` are sentences (see data.clusters). `traits` groups the rows by
    what their contexts hold of few values, `lengths` by the answers' characters; `signals` names the signal that each got.
    """

    token_rows: Sequence[tuple[int, ...]]
    observations: Observations
    heldout: torch.Tensor
    fold: torch.Tensor
    split_by: str
    warnings: tuple[str, ...]
    traits: Groups
    lengths: Groups
    signals: Signals


def load_rows(snapshot: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> SnapshotRows:
    """Token rows and observations of a snapshot.

    Raises SnapshotError for a snapshot that cannot be read or fitted (see data.snapshot), InputError that names the
    impression for a row of more than `max_length` tokens.
    """
    log = read_snapshot(snapshot)
    check_log(log)
    token_rows = [encode_pair(tokenizer, *pair) for pair in zip(map(Conversation, log["prompt"]), log["response"], strict=True)]
    for number, row in enumerate(token_rows):
        if len(row) > max_length:
            name = log[number]["impression_id"]
            raise InputError(f"impression {name!r} must have at most {max_length} tokens (model.max_length), got {len(row)}")
    label = np.array([0 if label is None else label for label in log["label"]])
    observed = np.array(log["observed"][:])
    sides = split({column: digest(column, log[column]) for column in LEVELS}, observed, label)
    cluster = None if sides.cluster is None else torch.from_numpy(sides.cluster)
    observations = Observations(torch.from_numpy(observed), torch.from_numpy(label), cluster)
    lengths = length_buckets(torch.tensor([len(response) for response in log["response"]]))
    return SnapshotRows(
        token_rows,
        observations,
        torch.from_numpy(np.flatnonzero(sides.heldout)),
        torch.from_numpy(sides.fold),
        sides.by,
        sides.warnings,
        Groups(*stratify(_traits(log["context"]), observations)),
        Groups(*stratify([{"length": bucket} for bucket in lengths], observations)),
        _signals(log["signal"], log["label"]),
    )


def write_clean_labels(path: Path, labels: np.ndarray) -> None:
    """Write r* [N] of a snapshot's rows, for the method "oracle"."""
    write_whole(path, lambda unfinished: save_file({"labels": labels.astype(np.float32)}, unfinished))


def read_clean_labels(path: Path) -> torch.Tensor:
    """What `write_clean_labels` wrote."""
    return torch.from_numpy(load_file(path)["labels"])


def _traits(contexts: Sequence[str]) -> list[dict[str, str]]:
    """Of each context (JSON) what has few values over all rows: a style or a surface, not a session's id."""
    read = [json.loads(context) for context in contexts]
    values: dict[str, set[str]] = defaultdict(set)
    for context in read:
        for key, value in context.items():
            values[key].add(value)
    return [{key: value for key, value in context.items() if len(values[key]) <= MOST_VALUES} for context in read]


def _signals(signals: Sequence[str | None], labels: Sequence[int | None]) -> Signals:
    """Each signal with its label; a graded one has both, and is two."""
    given = list(zip(signals, labels, strict=True))
    meanings = sorted({(signal, label) for signal, label in given if signal is not None and label is not None})
    place: dict[Any, int] = {meaning: number for number, meaning in enumerate(meanings)}
    graded = {signal for signal, label in meanings if (signal, 1 - label) in place}
    names = tuple(f"{signal}, {('low', 'high')[label]}" if signal in graded else signal for signal, label in meanings)
    return Signals(torch.tensor([place.get(meaning, -1) for meaning in given]), names, tuple(label for _, label in meanings))
