"""Processes that write a log, to be killed: `python -m tests.log_writers 20` kills 20 appends and 20 imports on each database.

After each kill the log must hold every batch that was reported, at most one more, none in part; done again, each row once.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from causalrm_ray.conversation import Conversation
from causalrm_ray.data.log.import_log import import_log
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.types import FeedbackEvent, Impression

SIGNALS = {"upvote": 1}
ROWS_PER_TRANSACTION = 1_000  # of an import, at most


def batch(name: str, number: int, size: int) -> tuple[list[Impression], list[FeedbackEvent]]:
    """A batch of a writer: its impressions, each with a vote."""
    ids = [f"{name}-{number}-{place}" for place in range(size)]
    shown = [Impression(key, Conversation.user("p"), "r", 0, 0.0) for key in ids]
    return shown, [FeedbackEvent(key, key, "upvote", 1.0, 1.0) for key in ids]


def append_forever(url: str, name: str, batches: int, size: int) -> None:
    """Append batches, and report each on standard output when it is in the log."""
    sys.stdin.readline()
    with closing(FeedbackLog(url, SIGNALS)) as log:
        for number in range(batches):
            log.append(*batch(name, number, size))
            sys.stdout.write(f"{number}\n")
            sys.stdout.flush()


def import_file(url: str, source: str, quarantine: str) -> None:
    """Import a file."""
    sys.stdin.readline()
    with closing(FeedbackLog(url, SIGNALS)) as log:
        sys.stdout.write("begins\n")
        sys.stdout.flush()
        import_log(source, log, quarantine)


def start(verb: str, *words: object) -> subprocess.Popen[str]:
    """A process that does `verb` as soon as it is given a line."""
    command = [sys.executable, "-m", "tests.log_writers", verb, *map(str, words)]  # of this checkout, whatever is installed
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])


def go(process: subprocess.Popen[str]) -> None:
    """Let it begin."""
    process.stdin.write("go\n")
    process.stdin.flush()


def kill_an_append(url: str, name: str, after_s: float, size: int = 50) -> tuple[int, int]:
    """Kill a writer that long after its first batch; returns how many batches it reported, and how many the log held."""
    writer = start("append", url, name, 1_000_000, size)
    go(writer)
    reported = [writer.stdout.readline()]
    assert reported[0], "the writer could not begin"
    time.sleep(after_s)
    writer.kill()
    reported += writer.stdout.readlines()
    writer.communicate(timeout=60)
    with closing(FeedbackLog(url, SIGNALS)) as log:
        own = [row["impression_id"] for row in log.snapshot() if row["impression_id"].startswith(f"{name}-")]
        done = [event.id for _, event in log.stream() if event.id.startswith(f"{name}-")]
        held = len(own) // size
        expected = {record.id for number in range(held) for record in batch(name, number, size)[0]}
        assert len(own) == len(done) == len(expected), "a batch is there in part, or twice"
        assert set(own) == set(done) == expected
        assert len(reported) <= held <= len(reported) + 1, "a reported batch is lost"
        before = log.position()
        new = sum(log.append(*batch(name, number, size)).impressions for number in range(held + 1))
        assert (new, log.position()) == (size, before + 2 * size), "delivered again, a row counts twice"
    return len(reported), held


def kill_an_import(url: str, source: Path, rows: int, after_s: float) -> int:
    """Kill an import that long after its start, import again, and return how many impressions were there in between."""
    process = start("import", url, source, source.with_suffix(".bad.jsonl"))
    go(process)
    assert process.stdout.readline(), "the import could not begin"
    time.sleep(after_s)
    process.kill()
    process.communicate(timeout=60)
    with closing(FeedbackLog(url, SIGNALS)) as log:
        counts = log.counts()
        assert counts.impressions == counts.events, "a row is there without its event"
        assert counts.impressions in (*range(0, rows, ROWS_PER_TRANSACTION), rows), "a transaction is there in part"
        report = import_log(str(source), log, source.with_suffix(".bad.jsonl"))
        assert (report.impressions, report.duplicate_impressions) == (rows - counts.impressions, counts.impressions)
        assert (log.counts().impressions, log.counts().events, log.position()) == (rows, rows, 2 * rows)
        assert len(log.snapshot()) == rows
    return counts.impressions


def write_source(path: Path, rows: int) -> Path:
    """A file of `rows` liked answers."""
    lines = [
        {"id": f"i{n}", "prompt": "p" * 200, "response": "r" * 300, "signal": "upvote", "time": float(n)} for n in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _kill_many(kills: int) -> None:
    from tests.postgres_server import PostgresServer

    rng, rows = random.Random(0), 20_000
    server = PostgresServer()
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = write_source(Path(folder) / "log.jsonl", rows)
            new = {"sqlite": lambda: f"sqlite:///{tempfile.mkdtemp(dir=folder)}/log.db", "postgresql": server.new_database}
            for kind, new_url in new.items():
                url = new_url()
                found = [kill_an_append(url, f"w{number}", rng.uniform(0, 0.3)) for number in range(kills)]
                reported, held = map(sum, zip(*found, strict=True))
                sys.stdout.write(f"{kind}: {kills} kills of appends: {reported} batches reported, {held} in the log\n")
                between = [kill_an_import(new_url(), source, rows, rng.uniform(0.0, 1.5)) for _ in range(kills)]
                sys.stdout.write(f"{kind}: {kills} kills of imports of {rows} rows, which left {sorted(between)}\n")
    finally:
        server.close()


if __name__ == "__main__":
    if sys.argv[1] == "append":
        append_forever(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    elif sys.argv[1] == "import":
        import_file(*sys.argv[2:5])
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("kills", type=int)
        _kill_many(parser.parse_args().kills)
