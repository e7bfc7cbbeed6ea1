"""Token ids of answers and the states of a backbone at them, computed once: shards that are whole or absent, read by memory map.

{cache}/states/{what they depend on}/*.safetensors          key [n], impression [n], prompt_tokens, tokens, lost_turns,
                                                            lost_tokens [n], ids [T], and by name of a state [n, D] float16

A row is found by its key, a digest of impression, prompt and answer; what is forgotten, by the impression's. States are stored
divided by a power of two where float16 could not hold them otherwise.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from causalrm_ray.data.users.clusters import digest, mixed
from causalrm_ray.errors import InputError
from causalrm_ray.files import write_whole

SUFFIX = ".safetensors"
COUNTS = ("prompt_tokens", "tokens", "lost_turns", "lost_tokens")
LARGEST = 2.0**15  # of a number that is stored
IN_MEMORY = 2**28  # bytes; what is larger lies in a file that the kernel can drop from memory


@dataclass(frozen=True, eq=False)
class StateShard:
    """n rows: `key` [n] and `impression` [n] uint64, `counts` [n] by COUNTS, their `ids` end to end, `states` [n, D] by name."""

    key: np.ndarray
    impression: np.ndarray
    counts: dict[str, np.ndarray]
    ids: np.ndarray
    states: dict[str, np.ndarray]


def row_keys(impressions: Sequence[str], prompts: Sequence[str], responses: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Keys [n] of rows, and the digests [n] of their impressions."""
    impression = digest("impression_id", impressions)
    return row_key(mixed(digest("response", responses), digest("prompt", prompts)), impression), impression


def row_key(answer: np.ndarray, impression: np.ndarray) -> np.ndarray:
    """Keys [n] of rows by digests of their answers, each `mixed` with its prompt's, and of their impressions."""
    return mixed(answer, impression)


class StateCache:
    """The rows in a folder, as they were when it was opened, and those that were added through it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: list[Path] = []
        self._keys: list[np.ndarray] = []
        self._index: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            self._note(path, _read(path, "key"))

    def add(self, shard: StateShard) -> None:
        """Write a shard. Raises InputError for a state that is not finite."""
        largest = 0.0
        for name, values in shard.states.items():
            if not np.isfinite(values).all():
                row = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
                raise InputError(f"states must be finite, got {name} of row {row} of {len(values)} with inf or nan")
            largest = max(largest, float(np.abs(values).max(initial=0.0)))
        exponent = max(0, int(np.ceil(np.log2(largest / LARGEST)))) if largest else 0
        tensors = {"key": shard.key, "impression": shard.impression, "ids": shard.ids.astype(np.int32)}
        tensors |= {name: shard.counts[name].astype(np.int32) for name in COUNTS}
        tensors |= {name: (values / 2.0**exponent).astype(np.float16) for name, values in shard.states.items()}
        path = self.folder / f"{secrets.token_hex(8)}{SUFFIX}"
        write_whole(path, lambda unfinished: save_file(tensors, unfinished, metadata={"exponent": str(exponent)}))
        self._note(path, shard.key)

    def __contains__(self, keys: np.ndarray) -> bool:
        return bool(self.has(keys).all())

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Which of `keys` [N] are there."""
        known, _, _ = self._sorted()
        place = np.searchsorted(known, keys).clip(max=max(len(known) - 1, 0))
        return known[place] == keys if len(known) else np.zeros(len(keys), dtype=bool)

    def states(self, name: str, keys: np.ndarray) -> Tensor:
        """State `name` [N, D] (float32) of the rows `keys` [N]. Raises InputError for a row that is not there."""
        found: np.ndarray | None = None
        for path, rows, places in self._by_shard(keys):
            values = _read(path, name).astype(np.float32) * np.float32(2.0 ** _exponent(path))
            if found is None:
                found = _room((len(keys), values.shape[1]), self.folder)
            found[rows] = values[places]
        return torch.zeros(0, 0) if found is None else torch.from_numpy(found)

    def counts(self, keys: np.ndarray) -> dict[str, np.ndarray]:
        """COUNTS [N] of the rows `keys` [N]."""
        found = {name: np.zeros(len(keys), dtype=np.int32) for name in COUNTS}
        for path, rows, places in self._by_shard(keys):
            for name, values in found.items():
                values[rows] = _read(path, name)[places]
        return found

    def tokens(self, keys: np.ndarray) -> tuple[Tensor, Tensor]:
        """Ids [T] of the rows `keys` [N], end to end in their order, and their numbers of tokens [N]."""
        lengths = self.counts(keys)["tokens"].astype(np.int64)
        starts = lengths.cumsum() - lengths
        ids = np.empty(int(lengths.sum()), dtype=np.int32)
        for path, rows, places in self._by_shard(keys):
            own = _read(path, "tokens").astype(np.int64)
            begin, values = own.cumsum() - own, _read(path, "ids")
            for row, place in zip(rows.tolist(), places.tolist(), strict=True):
                ids[starts[row] : starts[row] + lengths[row]] = values[begin[place] : begin[place] + own[place]]
        return torch.from_numpy(ids), torch.from_numpy(lengths)

    def _note(self, path: Path, keys: np.ndarray) -> None:
        self._shards.append(path)
        self._keys.append(keys)
        self._index = None

    def _sorted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All keys in ascending order, and of each its shard and its place there."""
        if self._index is None:
            keys = np.concatenate([np.zeros(0, np.uint64), *self._keys])
            shard = np.repeat(np.arange(len(self._keys)), [len(own) for own in self._keys])
            place = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(own)) for own in self._keys)])
            order = np.argsort(keys, kind="stable")
            self._index = keys[order], shard[order], place[order]
        return self._index

    def _by_shard(self, keys: np.ndarray) -> list[tuple[Path, np.ndarray, np.ndarray]]:
        """(file, which of `keys` [N] it holds, where) of each shard that holds any."""
        if keys not in self:
            raise InputError(
                f"{self.folder} must hold states of all {len(keys)} rows, got {int(self.has(keys).sum())}: give the command"
                " again, and they are computed"
            )
        known, shard, place = self._sorted()
        at = np.searchsorted(known, keys)
        shards, places = shard[at], place[at]
        order = np.argsort(shards, kind="stable")
        cuts = np.flatnonzero(np.diff(shards[order])) + 1
        return [(self._shards[shards[rows[0]]], rows, places[rows]) for rows in np.split(order, cuts) if len(rows)]


def forget_states(cache: Path, impressions: Sequence[str]) -> int:
    """Remove the rows of some impressions from all states below a run's `cache`; returns how many rows.

    A shard that changes gets another name: a fit that has it open fails instead of reading other rows in their place.
    """
    gone, count, folder = digest("impression_id", impressions), 0, cache.expanduser() / "states"
    for unfinished in folder.glob("*/.*.tmp"):  # of a process that was killed while it wrote
        unfinished.unlink()
    for path in sorted(folder.glob(f"*/*{SUFFIX}")):
        keep = ~np.isin(_read(path, "impression"), gone)
        if keep.all():
            continue
        count += int((~keep).sum())
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata()
        tokens = np.repeat(keep, tensors["tokens"])
        kept = {name: values[tokens if name == "ids" else keep] for name, values in tensors.items()}
        if keep.any():
            write_whole(path.with_name(f"{secrets.token_hex(8)}{SUFFIX}"), partial(_save, kept, metadata))
        path.unlink()
    return count


def _save(tensors: dict[str, np.ndarray], metadata: dict[str, str], path: Path) -> None:
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, path, metadata=metadata)


def _read(path: Path, name: str) -> np.ndarray:
    with _open(path) as file:
        return cast(np.ndarray, file.get_tensor(name))


def _exponent(path: Path) -> int:
    with _open(path) as file:
        return int(file.metadata()["exponent"])


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError as error:
        raise InputError(f"{path}: rows were forgotten meanwhile; give the command again") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} must be readable states: {error}; remove it, and it is made again") from error


def _room(shape: tuple[int, int], folder: Path) -> np.ndarray:
    """Room for float32 numbers: in memory, or where they are many in a file without a name, which ends with its last reader."""
    if 4 * shape[0] * shape[1] <= IN_MEMORY:
        return np.empty(shape, dtype=np.float32)
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, 4 * shape[0] * shape[1])  # a full disk is an error now, not a signal later
        return np.memmap(cast(Any, file), dtype=np.float32, mode="r+", shape=shape)
