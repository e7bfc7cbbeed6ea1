"""Copies of what users wrote, in the folder of a run, without those that are to be forgotten.

folder, what to forget --> its snapshots, their segments and rollouts deleted, other Parquet, quarantine and answers in the
                           summary rewritten

A fit reads a snapshot row by row beside other files, and a replay needs every row of a step: these go as a whole. Each file is
replaced or deleted at once; after an interruption the same call finds what is left. Weights of fitted models stay: fit again.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from causalrm_ray.checkpoint import read_json, refresh_manifest, write_json
from causalrm_ray.conversation import Conversation
from causalrm_ray.data.parquet import PARQUET_FAULTS, write_batches_as
from causalrm_ray.data.snapshots.segments import SEGMENTS, drop_snapshot, drop_unused
from causalrm_ray.errors import InputError
from causalrm_ray.files import write_whole

_QUOTED = re.compile("'([^']*)'")  # how warnings name a user or an impression
_NUMBERS_THAT_NAME = re.compile("user|id$", re.IGNORECASE)  # keys; a number under another one is a label, a time, ...


@dataclass(frozen=True)
class Forgotten:
    """What to forget: impressions by their ids, what they replied to (Conversation.json), and a user."""

    ids: frozenset[str]
    prompts: frozenset[str]
    user: str | None

    @cached_property
    def names(self) -> frozenset[str]:
        """Texts that stand for what is to be forgotten."""
        return self.ids if self.user is None else self.ids | {self.user}

    @cached_property
    def asked(self) -> frozenset[str]:
        """The prompts, and all that model.truncation may have left of them: a policy was asked one or the other."""
        talks = [Conversation(prompt) for prompt in self.prompts]
        return frozenset(talk.latest(turns).json for talk in talks for turns in range(1, talk.num_turns)) | self.prompts

    @cached_property
    def questions(self) -> frozenset[str]:
        """The last turns of the prompts."""
        return frozenset(Conversation(prompt).text for prompt in self.prompts)

    def named_in(self, value: Any, key: str = "") -> bool:
        """Whether a value of a row, or one inside of it, is one of the names."""
        if isinstance(value, Mapping):
            return any(self.named_in(inner, str(name)) for name, inner in value.items())
        if isinstance(value, list):
            return any(self.named_in(inner, key) for inner in value)
        if isinstance(value, int) and _NUMBERS_THAT_NAME.search(key):
            return str(value) in self.names
        return isinstance(value, str) and value in self.names


def find_copies(folder: Path, user: str | None, ids: Collection[str]) -> Forgotten:
    """What the Parquet files of a run say of a user, and of impressions: after the log forgot them they are the last to know."""
    found, prompts = set(ids), set()
    for path in _parquet_files(folder):
        for batch in _batches(path, ("impression_id", "user", "prompt")):
            for row in batch.to_pylist() if "impression_id" in batch.schema.names else ():
                if row["impression_id"] in found or (user is not None and row.get("user") == user):
                    found.add(row["impression_id"])
                    prompts |= {row["prompt"]} if "prompt" in row else set()
    return Forgotten(frozenset(found), frozenset(prompts), user)


def erase_copies(folder: Path, forgotten: Forgotten, running: bool = False) -> dict[str, int]:
    """Erase what is to be forgotten from the run's files; returns how many rows and files went, by what they were.

    A run that is `running` goes on writing files beside this.
    """
    counts: Counter[str] = Counter()
    for unfinished in [] if running else folder.rglob(".*.tmp"):  # of a process that was killed while it wrote
        unfinished.unlink()
        counts["unfinished files"] += 1
    for path in _parquet_files(folder):
        _erase_parquet(path, forgotten, counts)
    counts["snapshots"] += drop_unused(folder)
    quarantine = folder / "quarantine.jsonl"
    if quarantine.exists():
        lines = quarantine.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if not _quarantined(line, forgotten)]
        if len(kept) < len(lines):
            write_whole(quarantine, lambda unfinished: unfinished.write_text("".join(kept), encoding="utf-8"))
            counts["rows of the quarantine"] += len(lines) - len(kept)
    _erase_answers(folder, forgotten, counts)
    _erase_warnings(folder, forgotten, counts)
    return {what: count for what, count in counts.items() if count}


def _erase_parquet(path: Path, forgotten: Forgotten, counts: Counter[str]) -> None:
    gone = sum(sum(_rows_gone(batch, forgotten)) for batch in _batches(path, ("impression_id", "user", "prompt")))
    if gone == 0:
        return
    if path.parent.name in ("snapshots", SEGMENTS, "rollouts"):
        drop_snapshot(path)
        counts[path.parent.name] += 1
    else:
        kept = (batch.filter(pa.array([not row for row in _rows_gone(batch, forgotten)])) for batch in _batches(path))
        write_batches_as(kept, pq.read_schema(path), path)
        counts[f"rows of {path.name}"] += gone


def _rows_gone(batch: pa.RecordBatch, forgotten: Forgotten) -> list[bool]:
    """Which rows are of the user or of one of the impressions; where there are no ids, which reply to one of the prompts."""
    names = batch.schema.names
    if "impression_id" in names:
        users = batch["user"].to_pylist() if "user" in names and forgotten.user is not None else [None] * len(batch)
        ids = batch["impression_id"].to_pylist()
        return [
            key in forgotten.ids or (user is not None and user == forgotten.user) for key, user in zip(ids, users, strict=True)
        ]
    return [prompt in forgotten.asked for prompt in batch["prompt"].to_pylist()] if "prompt" in names else [False] * len(batch)


def _parquet_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.parquet"))


def _batches(path: Path, columns: Iterable[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of a file, or some of its columns where it has them. Raises InputError for one that cannot be read."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            chosen = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
            yield from file.iter_batches(columns=chosen)
    except PARQUET_FAULTS as error:
        raise InputError(f"{path} must be readable, or be removed, to forget what it holds: {error}") from error


def _quarantined(line: str, forgotten: Forgotten) -> bool:
    """Whether a quarantined row may be theirs. Of one that could not be parsed, anything that holds a name may be."""
    try:
        raw = json.loads(line)["raw"]
    except (ValueError, KeyError, TypeError):  # cut short by a kill
        raw = line
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict | list):
        return forgotten.named_in(content)
    return any(name in raw for name in forgotten.names)


def _erase_answers(folder: Path, forgotten: Forgotten, counts: Counter[str]) -> None:
    """The answers that a summary shows, and the page that shows the summary."""
    path = folder / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    answers = summary.get("answers", [])
    kept = [answer for answer in answers if answer["prompt"] not in forgotten.questions]
    if len(kept) < len(answers):
        text = json.dumps({**summary, "answers": kept}, indent=2, sort_keys=True) + "\n"
        write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
        (folder / "report.html").unlink(missing_ok=True)
        counts["answers of the summary"] += len(answers) - len(kept)


def _erase_warnings(folder: Path, forgotten: Forgotten, counts: Counter[str]) -> None:
    """Warnings that name the user or an impression, in reports and the log of events."""

    def without(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: without(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [without(inner) for inner in value if not (isinstance(inner, str) and names(inner))]
        return value

    def names(text: str) -> bool:
        return not forgotten.names.isdisjoint(_QUOTED.findall(text))

    before = counts["warnings"]
    for path in [*folder.rglob("report.json"), folder / "summary.json", folder / "diagnostics.json"]:
        found = read_json(path) if path.exists() else None
        kept = without(found)
        if kept != found:
            write_json(path, kept)
            refresh_manifest(path)
            counts["warnings"] += 1
    events = folder / "log.jsonl"
    if events.exists():
        lines = events.read_text(encoding="utf-8").splitlines(keepends=True)
        others = [line for line in lines if not names(line)]
        if len(others) < len(lines):
            write_whole(events, lambda unfinished: unfinished.write_text("".join(others), encoding="utf-8"))
            counts["warnings"] += len(lines) - len(others)
    if counts["warnings"] > before:
        (folder / "report.html").unlink(missing_ok=True)
