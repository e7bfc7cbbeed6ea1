"""Snapshots beyond the limits of 32 bits, through a fit's data path.

    python -m tests.actors.reward.large_snapshots rows|bytes FOLDER

rows    2^24 + 1 impressions of tiny texts: written, read, split, capped, their states gathered; propensities, rates and selection
        estimated
bytes   3 GiB of answers: written, read as batches and as a dataset, selected
Each prints seconds and the most memory that it took. The folder is left as it was.
"""
# ruff: noqa: T201

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from actors.reward.snapshot_rows import SnapshotRows, load_rows
from causalrm_ray.data.snapshots.table import SNAPSHOT_SCHEMA, read_columns, read_snapshot, write_batches, write_snapshot
from causalrm_ray.data.states.cache import StateCache, StateShard, row_keys
from causalrm_ray.estimators.diagnostics.groups import diagnose_groups, diagnose_signals
from causalrm_ray.estimators.diagnostics.selection_posterior import MECHANISMS, Explained
from causalrm_ray.estimators.nuisances.noise_rates import estimate_by_anchors, estimate_noise_rates
from causalrm_ray.estimators.nuisances.propensity import calibrate

BATCH = 2**16
PROMPT = '[{{"content":"{}","role":"user"}}]'


def write_states(path: Path, folder: Path) -> StateCache:
    """States of a snapshot as a backbone would leave them: whether the answer begins with a g, and its last letter."""
    cache = StateCache(folder)
    for batch in read_columns(path, ("impression_id", "prompt", "response")):
        texts = [batch[name].to_pylist() for name in batch.schema.names]
        key, impression = row_keys(*texts)
        states = np.array([[response[0] == "g", ord(response[-1])] for response in texts[2]], dtype=np.float32)
        counts = {"prompt_tokens": 1, "tokens": 2, "lost_turns": 0, "lost_tokens": 0}
        filled = {name: np.full(len(key), value) for name, value in counts.items()}
        cache.add(StateShard(key, impression, filled, np.ones(2 * len(key), np.int32), {"final-last": states}))
    return cache


def load(path: Path, max_length: int) -> SnapshotRows:
    """The snapshot as a fit loads it, beside its states."""
    cache = timed("states written", lambda: write_states(path, path.with_suffix(".states")))
    return timed("loaded for a fit", lambda: load_rows(path, cache, max_length, "auto"))


def batches(rows: int, answer: Callable[[int], str]) -> Iterator[pa.RecordBatch]:
    """Impressions of a million users, of whom one gave a hundredth of the feedback; the liked are likelier to say so."""
    rng = np.random.default_rng(0)
    for start in range(0, rows, BATCH):
        number = np.arange(start, min(start + BATCH, rows))
        liked = rng.random(len(number)) < 0.5
        observed = rng.random(len(number)) < np.where(liked, 0.3, 0.1)
        label = np.where(rng.random(len(number)) < 0.1, ~liked, liked)
        user = np.where(observed & (rng.random(len(number)) < 0.01), 0, rng.integers(1, 2**20, len(number)))
        columns: dict[str, Any] = {
            "impression_id": [f"i{one}" for one in number],
            "prompt": [PROMPT.format(one % 1000) for one in number],
            "response": [("good" if one else "bad") + answer(int(row)) for row, one in zip(number, liked, strict=True)],
            "observed": observed.astype(np.int8),
            "label": pa.array(label.astype(np.int8), pa.int8(), mask=~observed),
            "signal": pa.array(np.where(label, "upvote", "downvote"), pa.string(), mask=~observed),
            "policy_version": np.zeros(len(number), np.int64),
            "time": number.astype(np.float64),
            "user": [f"u{one}" for one in user],
            "context": np.where(number % 2 == 0, '{"surface":"web"}', '{"surface":"phone"}'),
        }
        arrays = [
            pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(len(number), field.type)
            for field in SNAPSHOT_SCHEMA
        ]
        yield pa.RecordBatch.from_arrays(arrays, schema=SNAPSHOT_SCHEMA)


def timed(name: str, work: Callable[[], Any]) -> Any:
    """What `work` returns; its seconds and the most memory so far are printed."""
    started = time.perf_counter()
    found = work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name:<40} {time.perf_counter() - started:8.1f} s   peak {peak:6.2f} GiB", flush=True)
    return found


def estimate(log: SnapshotRows) -> None:
    """What a fit computes on all rows besides its models."""
    observations = log.observations
    rng = torch.Generator().manual_seed(0)
    good = timed("states gathered", lambda: log.states("final-last"))[:, 0].clone()
    noise = 0.2 * torch.rand(len(log), generator=rng)
    found = timed(
        "propensities calibrated, diagnosed",
        lambda: calibrate(0.1 + 0.2 * good + noise, observations.o, 0.05, cluster=observations.cluster),
    )
    print(found.report.warnings, found.report.overlap)
    ranking = 0.1 + 0.7 * good + noise
    rates = timed("noise rates by the curve", lambda: estimate_noise_rates(ranking, observations))
    print(rates.rates, rates.rho_01_interval, rates.rho_10_interval)
    timed("noise rates by anchors", lambda: estimate_by_anchors(ranking, observations))
    opinion, feedback = (0.05 + 0.9 * good).double(), torch.full((len(log),), float(observations.o.mean()), dtype=torch.float64)
    for name in MECHANISMS:
        explained = Explained(opinion, opinion, feedback, rates.rates, False, {name: 1.0})
        timed(f"rates and selection by trait, {name}", lambda e=explained: diagnose_groups(ranking, e, observations, log.traits))
    timed("rates by signal", lambda: diagnose_signals(ranking, log.signals, cluster=observations.cluster))


def many_rows(path: Path) -> None:
    """2^24 + 1 impressions."""
    rows = 2**24 + 1
    timed("written", lambda: write_batches(batches(rows, lambda _: ""), path))
    print(f"{path.stat().st_size / 2**30:.2f} GiB on disk")
    log = load(path, 64)
    print(
        len(log),
        "rows kept,",
        log.split_by,
        len(log.heldout),
        "held out",
        log.traits.names,
        log.signals.names,
        *log.warnings,
        sep="\n  ",
    )
    assert rows - 40_000 < len(log) < rows
    estimate(log)


def many_bytes(path: Path) -> None:
    """A million answers, 3 GiB of them."""
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 4096)))
    rows = 2**20
    timed("written", lambda: write_batches(batches(rows, lambda row: text[row % 1000 : row % 1000 + 3072]), path))
    print(f"{path.stat().st_size / 2**30:.2f} GiB on disk")
    log = load(path, 128)
    print(len(log), "rows kept")
    dataset = timed("read as a dataset", lambda: read_snapshot(path))
    assert sum(len(part) for part in dataset.data.column("response").chunks) == rows
    chosen = timed("all but one row selected", lambda: dataset.select(range(1, rows)))
    timed("the selection written", lambda: write_snapshot(chosen, path.with_suffix(".again")))
    path.with_suffix(".again").unlink()


if __name__ == "__main__":
    kind, folder = sys.argv[1:]
    file = Path(folder) / "large.parquet"
    try:
        {"rows": many_rows, "bytes": many_bytes}[kind](file)
    finally:
        file.unlink(missing_ok=True)
        shutil.rmtree(file.with_suffix(".states"), ignore_errors=True)
