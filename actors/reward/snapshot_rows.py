"""A snapshot of the log as the numbers that fits read: token ids, was feedback given, what it said."""

from __future__ import annotations

import json
import zlib
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
from causalrm_ray.data.log.snapshot import check_log, read_snapshot
from causalrm_ray.errors import InputError
from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.diagnostics.groups import Groups, Signals
from causalrm_ray.estimators.nuisances.strata import length_buckets, stratify
from causalrm_ray.files import write_whole
from causalrm_ray.models.text import encode_pair

MOST_VALUES = 8  # of a trait; more, and it is an id
# Digits of a hash of the row's id, from the lowest: of 5, whether reward fits hold it out; of 10, whether it decides when a
# propensity model stops; of 2, its fold otherwise.
HELD_OUT_ONE_IN, STOPS_ONE_IN, FOLDS = 5, 10, 2


@dataclass(frozen=True, eq=False)
class SnapshotRows:
    """N impressions: `token_rows`, prompt, response and end of each; `observations` o [N] and r [N].

    `heldout` are the row numbers that reward fits never train on: about a fifth, by a hash of the impression's id, so that an
    impression stays on its side in every later snapshot, and a gate compares models on rows that neither has seen. `fold` [N]
    is likewise the propensity model that never trains on a row, 0 or 1, or that none does, -1. `traits` groups the rows by what
    their contexts hold of few values, `lengths` by the answers' characters; `signals` names the signal that each got.
    """

    token_rows: Sequence[tuple[int, ...]]
    observations: Observations
    heldout: torch.Tensor
    fold: torch.Tensor
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
    label = [0 if label is None else label for label in log["label"]]
    observations = Observations(torch.tensor(log["observed"][:]), torch.tensor(label))
    places = np.array([zlib.crc32(name.encode()) for name in log["impression_id"]])
    heldout, rest = places % HELD_OUT_ONE_IN == 0, places // HELD_OUT_ONE_IN
    fold = np.where(rest % STOPS_ONE_IN == 0, -1, rest // STOPS_ONE_IN % FOLDS)
    if heldout.all() or not heldout.any() or set(fold.tolist()) != {-1, 0, 1}:
        raise InputError(f"the log must hold enough impressions to split them into training and test rows, got {len(log)}")
    lengths = length_buckets(torch.tensor([len(response) for response in log["response"]]))
    return SnapshotRows(
        token_rows,
        observations,
        torch.from_numpy(np.flatnonzero(heldout)),
        torch.from_numpy(fold),
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
