"""How fast a log is imported, first and again, as ratios to the bare tools within one run.

    python -m tests.causalrm_ray.data.log.import_speed FOLDER [ROWS] [LONGEST]

A native JSONL file of ROWS rows (default 100,000) of 500 characters, a quarter of them with a vote, goes into a new SQLite and a
new PostgreSQL log, with the length check at LONGEST tokens (default 512), and then again; the same impressions go by a plain COPY
into a bare table of that PostgreSQL, and the file into DuckDB, where it is installed. Each in a process of its own, three times:
the best wall time counts. CPU time is that of the process and its children, not of a server. The folder is left as it was.
"""
# ruff: noqa: T201

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.postgres_server import PostgresServer

ROWS, CHARACTERS, LONGEST, REPEATS = 100_000, 500, 512, 3
WORDS = ["the", "model", "said", "that", "a", "good", "answer", "is", "short", "and", "names", "what", "it", "does", "not"]


def write_rows(path: Path, rows: int) -> None:
    """`rows` lines of 500 characters, each an answer of its own."""
    rng = random.Random(0)
    with path.open("w", encoding="ascii") as file:
        for number in range(rows):
            row: dict[str, Any] = {
                "id": f"impression-{number:09}",
                "prompt": " ".join(rng.choices(WORDS, k=20)),
                "response": "",
                "time": 1.7e9 + number,
                "user": f"user-{rng.randrange(10_000):05}",
                "policy_version": 3,
            }
            if rng.random() < 0.25:
                row["signal"] = rng.choice(["upvote", "downvote"])
            row["response"] = " ".join(rng.choices(WORDS, k=80))[: CHARACTERS - 1 - len(json.dumps(row))]
            file.write(json.dumps(row) + "\n")


def import_rows(path: str, url: str, longest: str) -> Callable[[], None]:
    """The import, as a job does it."""
    from causalrm_ray.data.log.import_log import LengthLimit, import_log
    from causalrm_ray.data.log.store import FeedbackLog
    from causalrm_ray.models.text import LengthBound, encode_pair
    from causalrm_ray.world.pretrain import PretrainSettings, train_tokenizer

    tokenizer = train_tokenizer(WORDS, PretrainSettings())
    limit = LengthLimit(lambda *pair: len(encode_pair(tokenizer, *pair)), int(longest), LengthBound(tokenizer))

    def work() -> None:
        with closing(FeedbackLog(url, {"upvote": 1, "downvote": 0})) as log, tempfile.TemporaryDirectory() as folder:
            report = import_log(path, log, Path(folder) / "bad.jsonl", limit=limit)
        assert report.rows == report.impressions + report.duplicate_impressions, report

    return work


def copy_rows(path: str, url: str) -> Callable[[], None]:
    """A plain COPY of the rows that the log holds into a table without keys, rules or digests."""
    import psycopg

    def work() -> None:
        with open(path, "rb") as file, psycopg.connect(url) as connection:
            connection.execute("DROP TABLE IF EXISTS bare")
            connection.execute("CREATE TABLE bare (id text, prompt text, response text, version bigint, time float8, who text)")
            with connection.cursor().copy("COPY bare FROM STDIN") as copy:
                for line in file:
                    row = json.loads(line)
                    copy.write_row([row["id"], row["prompt"], row["response"], row["policy_version"], row["time"], row["user"]])

    return work


def duckdb_rows(path: str, database: str) -> Callable[[], None]:
    """DuckDB's own reader into a table of its own."""
    import duckdb

    def work() -> None:
        Path(database).unlink(missing_ok=True)
        with duckdb.connect(database) as connection:
            connection.execute("CREATE TABLE bare AS SELECT * FROM read_json(?)", [path])

    return work


WORK: dict[str, Callable[..., Callable[[], None]]] = {"import": import_rows, "copy": copy_rows, "duckdb": duckdb_rows}


def measure(*words: str) -> None:
    """Do one piece of work and print its seconds, those of the CPU, and the most memory of a process, in MiB."""
    work = WORK[words[0]](*words[1:])
    started, before = time.perf_counter(), os.times()
    work()
    wall, after = time.perf_counter() - started, os.times()
    used = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"wall": wall, "cpu": sum(after[:4]) - sum(before[:4]), "peak": used}))


def run(*words: object) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "tests.causalrm_ray.data.log.import_speed", "--measure", *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder: Path, rows: int, longest: int) -> None:
    """Print rows a second, CPU time, memory, and what share of a plain COPY's and of DuckDB's speed that is."""
    source, server = folder / "rows.jsonl", PostgresServer()
    write_rows(source, rows)
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        for number in range(REPEATS):
            for kind, url in (("SQLite", f"sqlite:///{folder}/{number}.db"), ("PostgreSQL", server.new_database())):
                for when in ("first", "again"):
                    found.setdefault(f"{kind}, {when}", []).append(run("import", source, url, longest))
            found.setdefault("plain COPY", []).append(run("copy", source, server.url()))
            try:
                found.setdefault("DuckDB", []).append(run("duckdb", source, folder / "bare.duckdb"))
            except subprocess.CalledProcessError:
                print("DuckDB is not compared: install duckdb for it", file=sys.stderr)
    finally:
        server.close()
    best = {name: min(runs, key=lambda run: run["wall"]) for name, runs in found.items() if runs}
    print(f"{rows} rows of {CHARACTERS} characters, longest {longest} tokens, best of {REPEATS}")
    for name, run_ in best.items():
        ratios = [
            f"{best[other]['wall'] / run_['wall']:5.2f} of {other}"
            for other in ("plain COPY", "DuckDB")
            if other in best and other != name
        ]
        speed, cpu = rows / run_["wall"], 1e6 * run_["cpu"] / rows
        peak = " + ".join(f"{used:.0f}" for used in run_["peak"] if used)
        print(f"{name:<18} {speed:9,.0f} rows/s   CPU {cpu:5.1f} us/row   peak {peak} MiB   {', '.join(ratios)}", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        measure(*sys.argv[2:])
    else:
        rows, longest, *_ = [*map(int, sys.argv[2:]), *(ROWS, LONGEST)[len(sys.argv) - 2 :]]
        with tempfile.TemporaryDirectory(dir=sys.argv[1]) as place:
            compare(Path(place), rows, longest)
