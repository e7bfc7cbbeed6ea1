"""The features role: a frozen backbone's states of a log's rows, into the cache that all fits read.

snapshot -> rows that the cache lacks -> token ids -> backbone -> shards of states        (each whole or absent)

The driver calls until nothing is missing: each answer is a sign of life, and what was killed goes on from the last shard.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from actors.cluster.environment import give_back_freed
from causalrm_ray.data.snapshots.table import read_columns
from causalrm_ray.data.states.cache import StateCache, StateShard, row_keys
from causalrm_ray.models.states.backbone import STATES
from causalrm_ray.models.states.pooled import PooledBackbone, in_order, pooled_batches
from causalrm_ray.models.states.rows import ReadRow, RowReader
from causalrm_ray.models.text import load_tokenizer
from causalrm_ray.types import Truncation

SHARD_ROWS, SHARD_TOKENS = 1024, 65_536  # of a shard, at most: what is lost if the process dies
HEARTBEAT_S = 2.0  # of work, after which a call answers
READ = ("impression_id", "prompt", "response")


@dataclass(frozen=True, slots=True)
class StatesDone:
    """Rows and tokens that were computed so far of a snapshot, and the rows that its states lacked at first."""

    rows: int
    missing: int
    tokens: int


@dataclass(frozen=True, eq=False)
class _Waiting:
    key: int
    impression: int
    read: ReadRow


class FeaturesActor:
    """Holds the backbone while there is something to compute."""

    def __init__(
        self,
        backbone: str,
        cache: Path,
        *,
        max_length: int,
        truncation: Truncation = "refuse",
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        part: int = 0,
        parts: int = 1,
    ) -> None:
        """`backbone` is a folder or hub id of a causal model with its tokenizer, `cache` a folder that all nodes share;
        `max_length` in tokens, and `truncation` says what becomes of longer rows. This is actor `part` of `parts`.
        States repeat their bits on as many cores."""
        self._backbone, self._dtype, self._device = backbone, dtype, device
        self._reader = RowReader(load_tokenizer(backbone), max_length, truncation)
        self._cache = cache
        self._part, self._parts = part, parts
        self._model: PooledBackbone | None = None
        self._snapshot: Path | None = None
        self._work: Iterator[StatesDone] = iter(())
        self._done = StatesDone(0, 0, 0)

    def advance(self, snapshot: Path) -> StatesDone:
        """Go on for HEARTBEAT_S with what the cache lacks of `snapshot`; nothing is missing once `rows` is `missing`.

        Raises InputError for a row that is too long, or that the chat template refuses.
        """
        if snapshot != self._snapshot:
            self._snapshot, self._work, self._done = snapshot, self._compute(snapshot), StatesDone(0, 0, 0)
        until, threads = time.monotonic() + HEARTBEAT_S, torch.get_num_threads()
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # nothing else runs while a fit waits for states
        try:
            for done in self._work:
                self._done = done
                if time.monotonic() > until:
                    break
        except BaseException:  # of whatever kind: a later call begins afresh
            self._rest()
            raise
        finally:
            torch.set_num_threads(threads)
        if self._done.rows == self._done.missing:
            self._rest()
        return self._done

    def _rest(self) -> None:
        """Nothing is to do: give the memory back."""
        self._snapshot, self._work, self._model = None, iter(()), None
        gc.collect()
        give_back_freed()
        if self._device != "cpu":
            torch.cuda.empty_cache()

    def _compute(self, snapshot: Path) -> Iterator[StatesDone]:
        cache = StateCache(self._cache)
        missing = sum(int(np.count_nonzero(wanted)) for *_, wanted in self._rows(snapshot, cache))
        done = StatesDone(0, missing, 0)
        yield done
        waiting: list[_Waiting] = []
        tokens = 0
        for texts, keys, impressions, wanted in self._rows(snapshot, cache):
            for number in np.flatnonzero(wanted).tolist():
                read = self._reader.read(*(column[number] for column in texts))
                waiting.append(_Waiting(int(keys[number]), int(impressions[number]), read))
                tokens += read.row.tokens
                if len(waiting) == SHARD_ROWS or tokens >= SHARD_TOKENS:
                    yield from self._write(cache, waiting, done)
                    done = StatesDone(done.rows + len(waiting), missing, done.tokens + tokens)
                    waiting, tokens = [], 0
                    yield done
        if waiting:
            yield from self._write(cache, waiting, done)
            yield StatesDone(done.rows + len(waiting), missing, done.tokens + tokens)

    def _rows(
        self, snapshot: Path, cache: StateCache
    ) -> Iterator[tuple[tuple[list[str], ...], np.ndarray, np.ndarray, np.ndarray]]:
        """Texts by READ, keys, digests of impressions, and which of the rows this actor must compute, batch by batch."""
        for batch in read_columns(snapshot, READ):
            texts = tuple(batch[name].to_pylist() for name in READ)
            keys, impressions = row_keys(*texts)
            yield texts, keys, impressions, ~cache.has(keys) & (keys % np.uint64(self._parts) == self._part)

    def _write(self, cache: StateCache, waiting: list[_Waiting], before: StatesDone) -> Iterator[StatesDone]:
        """Compute and write a shard; what is done besides `before` as it is computed, less the last row until it is written."""
        if self._model is None:
            self._model = PooledBackbone.from_pretrained(self._backbone, STATES, self._dtype).to(self._device)
        rows = [one.read.row for one in waiting]
        batches, done, tokens = [], 0, 0
        for part, found in pooled_batches(self._model, rows):
            batches.append((part, found))
            done += len(part)
            tokens += sum(rows[number].tokens for number in part)
            yield StatesDone(before.rows + min(done, len(rows) - 1), before.missing, before.tokens + tokens)
        states = in_order(batches).numpy()
        counts = {
            "prompt_tokens": np.array([len(row.prompt) for row in rows]),
            "tokens": np.array([row.tokens for row in rows]),
            "lost_turns": np.array([one.read.lost_turns for one in waiting]),
            "lost_tokens": np.array([one.read.lost_tokens for one in waiting]),
        }
        key, impression = (np.array([getattr(one, name) for one in waiting], dtype=np.uint64) for name in ("key", "impression"))
        ids = np.array([token for row in rows for token in row.ids], dtype=np.int32)
        cache.add(StateShard(key, impression, counts, ids, {name: states[:, place] for place, name in enumerate(STATES)}))
