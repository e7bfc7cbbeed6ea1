"""Snapshots for refits of a log of a million impressions, of which a hundredth is new.

    python -m tests.causalrm_ray.data.log.refit_speed FOLDER [ROWS] [URL]

Prints seconds and the peak memory of each part, each in a process of its own: the log filled, its first snapshot, a hundredth
more with late events, the snapshot for a refit, the same without segments.
"""
# ruff: noqa: T201

from __future__ import annotations

import resource
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

from causalrm_ray.conversation import Conversation
from causalrm_ray.data.log.schema import event_row, impression_row
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.types import FeedbackEvent, Impression

BATCH = 10_000
SIGNALS = {"upvote": 1, "downvote": 0}


def fill(log: FeedbackLog, first: int, rows: int) -> None:
    """Impressions of about 500 characters; a fifth of them gets an event at once, and of those before one in 500 a late one."""
    for start in range(first, first + rows, BATCH):
        numbers = range(start, min(start + BATCH, first + rows))
        shown = [
            Impression(
                f"impression-{n}", Conversation.user(f"question {n} " * 12), f"answer {n} " * 22, 0, float(n), f"user-{n % 5000}"
            )
            for n in numbers
        ]
        done = [
            FeedbackEvent(f"event-{n}", f"impression-{n}", ("upvote", "downvote")[n % 3 == 0], 1.0, float(n))
            for n in numbers[::5]
        ]
        late = [FeedbackEvent(f"late-{n}", f"impression-{n - 1}", "downvote", 1.0, float(n)) for n in numbers[1::500]]
        log.append_rows([impression_row(one) for one in shown], [event_row(one, log.signals) for one in done + late])


def part(name: str, folder: Path, rows: int, url: str) -> None:
    """One part, timed."""
    with closing(FeedbackLog(url, SIGNALS)) as log:
        log.position()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started, cpu = time.perf_counter(), time.process_time()
        if name == "filled":
            fill(log, 0, rows)
        elif name == "a hundredth more":
            fill(log, rows, rows // 100)
            late = [FeedbackEvent(f"x-{n}", f"impression-{n}", "upvote", 1.0, 1e9) for n in range(0, rows, 200)]
            log.append_rows([], [event_row(one, log.signals) for one in late])
        elif name == "without segments":
            log.export(folder / "whole.parquet")
        else:
            log.seal(folder, name.replace(" ", "-"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    took = f"{time.perf_counter() - started:7.2f} s, {time.process_time() - cpu:7.2f} s of CPU"
    print(f"{name:<20} {took}, peak {peak / 1024:.0f} MiB ({before / 1024:.0f} before)", flush=True)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 10**6
    database = sys.argv[3] if len(sys.argv) > 3 else f"sqlite:///{where / 'log.db'}"
    if len(sys.argv) > 4:
        part(sys.argv[4], where, count, database)
    else:
        for step in ("filled", "first", "a hundredth more", "refit", "refit again", "without segments"):
            subprocess.run([sys.executable, "-m", __spec__.name, str(where), str(count), database, step], check=True)
