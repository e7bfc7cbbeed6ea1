"""A snapshot of the log as the numbers that fits read: was feedback given, what it said, and where its states are.

snapshot --batches, once--> digests and feedback [N] -> rows to keep, sides --batches, again--> keys of states, traits, signals

Nothing is kept of a row but numbers, about a hundred bytes.
"""

from __future__ import annotations

import json
import operator
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from causalrm_ray.data.collate import TokenRows
from causalrm_ray.data.snapshots.table import check_counts, read_batches, read_columns, value_at
from causalrm_ray.data.states.cache import StateCache, row_key
from causalrm_ray.data.users.clusters import LEVELS, digest, mixed, split, who
from causalrm_ray.data.users.concentration import HEAVY, Share, cap, keep, largest_share
from causalrm_ray.errors import brief
from causalrm_ray.estimators.core.task import Observations
from causalrm_ray.estimators.diagnostics.groups import Groups, Signals
from causalrm_ray.estimators.nuisances.strata import length_buckets, merge_strata
from causalrm_ray.files import write_whole
from causalrm_ray.models.states.pooled import Row
from causalrm_ray.truncation import Cuts
from causalrm_ray.types import PerUser, StatesName

MOST_VALUES = 8  # of a trait; more, and it is an id
READ = ("response", "context", "signal", "label")


@dataclass(frozen=True, eq=False)
class SnapshotRows:
    """N impressions: `keys` [N] of their states and token ids in `cache`; `observations` o [N] and r [N].

    They are ordered by (time, id), whatever the snapshot's order is. `kept` [N] are their row numbers in the snapshot, which has
    more where a user's are thinned (see data.users.concentration).
    `heldout` are the row numbers that reward fits never train on: about a fifth, by a hash of the user, else the conversation,
    else the prompt, so that these stay on their side in every later snapshot, and a gate compares models on rows of which
    neither has seen any. `fold` [N] is likewise the propensity model that never trains on a row, 0 or 1, or that none does, -1.
    `split_by` is the column of that hash, and `warnings` are sentences (see data.users). `traits` groups the rows by what
    their contexts hold of few values, `lengths` by the answers' characters; `signals` names the signal that each got.
    """

    cache: StateCache
    keys: np.ndarray
    observations: Observations
    kept: Tensor
    heldout: Tensor
    fold: Tensor
    split_by: str
    warnings: tuple[str, ...]
    traits: Groups
    lengths: Groups
    signals: Signals

    def __len__(self) -> int:
        return len(self.kept)

    def states(self, name: StatesName, rows: Tensor | None = None) -> Tensor:
        """The states of this name [N, D], or of some rows [M, D]."""
        return self.cache.states(name, self.keys if rows is None else self.keys[rows.numpy()])

    def rows(self, index: Tensor) -> list[Row]:
        """Prompts and answers of the rows `index` [M], as token ids."""
        keys = self.keys[index.numpy()]
        ids, lengths = self.cache.tokens(keys)
        starts = self.cache.counts(keys)["prompt_tokens"].tolist()
        parts = ids.split(lengths.tolist())
        return [Row(part[:start].tolist(), part[start:].tolist()) for part, start in zip(parts, starts, strict=True)]

    def token_rows(self, pad_id: int) -> TokenRows:
        """Prompt, response and end of each row as token ids."""
        return TokenRows(*self.cache.tokens(self.keys), pad_id)


def load_rows(snapshot: Path, cache: StateCache, max_length: int, per_user: PerUser = None) -> SnapshotRows:
    """Observations of a snapshot, no user of which counts for more than `per_user` rows with feedback (see
    data.users.concentration), and where in `cache` their states are. Rows were cut to `max_length` tokens, if they were.

    Raises SnapshotError for a snapshot that cannot be read or fitted (see data.snapshots.table), InputError for one of which the
    cache lacks states.
    """
    keys, observed, label, order = _scan(snapshot)
    check_counts(len(observed), int(np.count_nonzero(observed)), int(np.count_nonzero(label)))
    user = who(keys)
    most = cap(per_user, user, observed)
    kept = np.ones(len(observed), dtype=bool) if most is None else keep(user, keys["impression_id"], observed, most)
    warnings = _concentration(snapshot, keys, user, observed, kept, most, order)
    observed, label = observed[kept], label[kept]
    state_keys = row_key(keys["answer"], keys["impression_id"])[kept]
    sides = split({level: keys[level][kept] for level in LEVELS}, observed, label)
    cluster = None if sides.cluster is None else torch.from_numpy(sides.cluster)
    observations = Observations(torch.from_numpy(observed), torch.from_numpy(label), cluster)
    del keys, user
    rows, read = order[kept], np.empty_like(kept)
    read[order] = kept
    texts = _Texts()
    start = 0
    for batch in read_columns(snapshot, READ):
        texts.add(batch.filter(pa.array(read[start : start + batch.num_rows])))
        start += batch.num_rows
    place = (np.cumsum(read) - 1)[rows]  # of the rows among those that were read
    bucket, names = length_buckets(torch.from_numpy(np.concatenate(texts.lengths)[place]))
    cuts = _cuts(cache, state_keys, observed, label)
    return SnapshotRows(
        cache,
        state_keys,
        observations,
        torch.from_numpy(rows),
        torch.from_numpy(np.flatnonzero(sides.heldout)),
        torch.from_numpy(sides.fold),
        sides.by,
        (*warnings, *cuts.warnings(len(observed), f"{max_length} tokens (model.max_length)"), *sides.warnings),
        Groups(*merge_strata(*texts.traits.crossings(place), observations)),
        Groups(*merge_strata(bucket, [f"length={name}" for name in names], observations)),
        _signals(np.concatenate(texts.meaning)[place], list(texts.meanings)),
    )


def _cuts(cache: StateCache, keys: np.ndarray, observed: np.ndarray, label: np.ndarray) -> Cuts:
    """What the rows lost to be no longer than a model reads."""
    cuts, counts = Cuts(), cache.counts(keys)
    turns, tokens = counts["lost_turns"], counts["lost_tokens"]
    for row in np.flatnonzero(turns).tolist():
        cuts.count(int(turns[row]), int(tokens[row]), int(label[row]) if observed[row] else None)
    return cuts


def write_clean_labels(path: Path, labels: np.ndarray) -> None:
    """Write r* [N] of a snapshot's rows: of all, for the method "oracle", or of those that were judged, nan elsewhere."""
    write_whole(path, lambda unfinished: save_file({"labels": labels.astype(np.float32)}, unfinished))


def read_clean_labels(path: Path) -> torch.Tensor:
    """What `write_clean_labels` wrote."""
    return torch.from_numpy(load_file(path)["labels"])


def _scan(snapshot: Path) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Digests [N] by LEVELS, and of each "answer", was feedback given [N], and what it said [N], 0 where none was: by (time, id),
    and the rows [N] of the snapshot in this order."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*LEVELS, "answer", "observed", "label")}
    ordered, newest = True, (-1.0, "")
    for batch in read_batches(snapshot):
        found = {level: _digests(batch, level) for level in LEVELS}
        found["answer"] = mixed(_digests(batch, "response"), found["prompt"])
        found["observed"] = batch["observed"].to_numpy()
        found["label"] = batch["label"].fill_null(0).to_numpy()
        for name, values in found.items():
            parts[name].append(values)
        if ordered and batch.num_rows:
            moments = [newest, *zip(batch["time"].to_pylist(), batch["impression_id"].to_pylist(), strict=True)]
            ordered, newest = all(map(operator.lt, moments, moments[1:])), moments[-1]
    whole = {name: np.concatenate(parts.pop(name)) for name in list(parts)}
    order = np.arange(len(whole["observed"]))
    if not ordered:
        order = _order(snapshot)
        whole = {name: whole.pop(name)[order] for name in list(whole)}
    return whole, whole.pop("observed"), whole.pop("label"), order


def _order(snapshot: Path) -> np.ndarray:
    """The rows [N] of a snapshot by (time, id)."""
    moments = pa.Table.from_batches(read_columns(snapshot, ["time", "impression_id"]))
    keys = [("time", "ascending"), ("impression_id", "ascending")]
    return pc.call_function("sort_indices", [moments], pc.SortOptions(sort_keys=keys)).to_numpy().astype(np.int64)


def _digests(batch: pa.RecordBatch, column: str) -> np.ndarray:
    if batch[column].null_count == batch.num_rows:
        return np.zeros(batch.num_rows, dtype=np.uint64)
    return digest(column, batch[column].to_pylist())


class _Texts:
    """What is read of the rows' texts, batch by batch."""

    def __init__(self) -> None:
        self.traits = _Traits()
        self.lengths: list[np.ndarray] = []
        self.meanings: dict[tuple[str, int], int] = {}
        self.meaning: list[np.ndarray] = []

    def add(self, batch: pa.RecordBatch) -> None:
        """Read a batch of READ."""
        self.lengths.append(pc.call_function("utf8_length", [batch["response"]]).to_numpy())
        self.traits.add(batch["context"].to_pylist())
        given = zip(batch["signal"].to_pylist(), batch["label"].to_pylist(), strict=True)
        places = (
            -1 if label is None else self.meanings.setdefault((signal, label), len(self.meanings)) for signal, label in given
        )
        self.meaning.append(np.fromiter(places, dtype=np.int32))


class _Traits:
    """Of all contexts (JSON) what has few values over all rows: a style or a surface, not a session's id."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, int]] = {}
        self._given: dict[str, tuple[array[int], array[int]]] = {}  # rows that have it, and their values' places
        self._rows = 0

    def add(self, contexts: Iterable[str]) -> None:
        """The contexts of further rows."""
        read: dict[str, dict[str, str]] = {}
        for number, text in enumerate(contexts, self._rows):
            if text not in read:
                read[text] = json.loads(text)
            for key, value in read[text].items():
                values = self._values.setdefault(key, {})
                if len(values) > MOST_VALUES:
                    continue
                place = values.setdefault(value, len(values))
                rows, places = self._given.setdefault(key, (array("q"), array("b")))
                rows.append(number)
                places.append(place)
                if len(values) > MOST_VALUES:
                    del self._given[key]
            self._rows = number + 1

    def crossings(self, order: np.ndarray) -> tuple[Tensor, list[str]]:
        """The crossing of traits [N] of the rows `order` [N], numbered as they come, and their names."""
        crossing, names = np.zeros(len(order), dtype=np.int64), [""]
        for key in sorted(self._given):
            value = np.full(len(order), -1, dtype=np.int64)
            given, places = self._given[key]
            value[np.frombuffer(given, dtype=np.int64)] = np.frombuffer(places, dtype=np.int8)
            found, crossing = np.unique(crossing * (MOST_VALUES + 1) + value + 1, return_inverse=True)
            texts = ["?", *self._values[key]]
            pairs = (divmod(int(one), MOST_VALUES + 1) for one in found)
            names = [f"{names[before]}{', ' * bool(names[before])}{key}={texts[place]}" for before, place in pairs]
        _, first, crossing = np.unique(crossing[order], return_index=True, return_inverse=True)
        coming = np.argsort(first)  # numbers of crossings in the order in which they come
        place = np.empty_like(coming)
        place[coming] = np.arange(len(coming))
        return torch.from_numpy(place[crossing]), [names[number] or "all" for number in coming]


def _signals(meaning: np.ndarray, meanings: Sequence[tuple[str, int]]) -> Signals:
    """Each signal with its label; a graded one has both, and is two. `meaning` [N] is a place in `meanings`, or -1."""
    ranked = sorted(meanings)
    graded = {signal for signal, label in ranked if (signal, 1 - label) in ranked}
    names = tuple(f"{signal}, {('low', 'high')[label]}" if signal in graded else signal for signal, label in ranked)
    places = np.array([*(ranked.index(one) for one in meanings), -1])  # the last is that of -1
    return Signals(torch.from_numpy(places[meaning]), names, tuple(label for _, label in ranked))


def _concentration(
    snapshot: Path,
    keys: dict[str, np.ndarray],
    user: np.ndarray,
    observed: np.ndarray,
    kept: np.ndarray,
    limit: int | None,
    order: np.ndarray,
) -> list[str]:
    """Warnings about a user or an answer with much of the feedback, and about rows that are left out."""
    sentences = []
    most = largest_share(user, observed)
    if most is not None and most.share > HEAVY:
        named = "user" if keys["user"][most.row] else "conversation_id"
        counted = int(observed[kept & (user == user[most.row])].sum())
        rule = "feedback.per_user caps this" if limit is None else f"by feedback.per_user, {counted} of them count"
        sentences.append(f"{named} {brief(value_at(snapshot, named, order[most.row]))} gave {_figures(most)}: {rule}.")
    if not kept.all():
        sentences.append(
            f"{int((~kept).sum())} of {len(kept)} impressions, {int(observed[~kept].sum())} of them with feedback, are left out: "
            f"no user counts for more than {limit} with feedback (feedback.per_user)."
        )
    answer = largest_share(np.where(kept, keys["answer"], 0), observed * kept)
    if answer is not None and answer.share > HEAVY:
        name = brief(value_at(snapshot, "impression_id", order[answer.row]))
        sentences.append(
            f"One answer, that of impression {name}, has {_figures(answer)}: what is learned rests on it. If few users gave it, "
            "lower feedback.per_user, and log user where it is missing."
        )
    return sentences


def _figures(most: Share) -> str:
    return f"{most.rows} of {most.total} reactions ({most.share:.0%})"
