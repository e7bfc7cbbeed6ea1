"""A small log of a garden shop, whose truth is known, to be written in the shape of every system; and what an import of it finds.

Two conversations, four answers, one liked and one disliked; the first conversation has two turns and a system message.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from causalrm_ray.conversation import Conversation
from causalrm_ray.data.log.import_log import ImportReport, import_log
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.types import Meaning

START = 1_767_225_600.0  # 2026-01-01
Message = dict[str, Any]


@dataclass(frozen=True)
class Shown:
    """An answer that was shown, `before` are all messages before it; liked: True, False, or None where nobody said."""

    id: str
    conversation: str
    user: str
    model: str
    time: float
    before: tuple[Message, ...]
    answer: str
    liked: bool | None

    @property
    def iso(self) -> str:
        return datetime.fromtimestamp(self.time, UTC).isoformat().replace("+00:00", "Z")

    @property
    def number(self) -> int:
        """A number of its own."""
        return int(self.time - START)


def said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


SYSTEM = said("system", "You help in a garden shop.")
FIRST = (SYSTEM, said("user", "My lavender has mildew."))
SECOND = (*FIRST, said("assistant", "Cut off the sick parts."), said("user", "And then?"))
GARDEN = (
    Shown("a1", "c1", "u1", "shop-a", START + 10, FIRST, "Cut off the sick parts.", True),
    Shown("a2", "c1", "u1", "shop-b", START + 70, SECOND, "Give it air.", None),
    Shown("a3", "c2", "u2", "shop-a", START + 500, (SYSTEM, said("user", "Are roses edible?")), "Ask a gardener.", False),
    Shown("a4", "c3", "u1", "shop-a", START + 900, (SYSTEM, said("user", "How old do oaks get?")), "500 years, or more.", None),
)

KNOWN = ("user", "conversation_id", "model", "time")  # what may be missing in a format
Rows = list[dict[str, Any]]


def write(folder: Path, files: Mapping[str, Rows | str]) -> str:
    """A folder of files: `name.json` is an indented list, others have an object a line."""
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        if name.endswith(".json") and not isinstance(rows, str):
            text = json.dumps(rows, indent=2)
        (folder / name).write_text(text)
    return str(folder)


@dataclass(frozen=True)
class Imported:
    """What an import left in the log: columns of the snapshot by the impression's id."""

    report: ImportReport
    rows: dict[str, dict[str, Any]]
    refused: list[str]

    @property
    def labels(self) -> dict[str, int | None]:
        return {name: row["label"] for name, row in self.rows.items()}

    def messages(self, name: str) -> list[Message]:
        return Conversation(self.rows[name]["prompt"]).messages


def imported(folder: Path, files: Mapping[str, Rows | str], signals: Mapping[str, Meaning | None] | None = None) -> Imported:
    """Import files in the format that they are recognised as, twice: the second time must change nothing."""
    source, bad = write(folder / "in", files), folder / "bad.jsonl"
    with closing(FeedbackLog(f"sqlite:///{folder}/log.db", signals or {})) as log:
        report = import_log(source, log, bad)
        again = import_log(source, log, bad)
        rows = {row["impression_id"]: row for row in log.snapshot()}
    assert (again.impressions, again.events) == (0, 0)
    assert (again.duplicate_impressions, again.duplicate_events) == (report.impressions, report.events)
    refused = [json.loads(line)["reason"] for line in bad.read_text().splitlines()]
    return Imported(report, rows, refused)


def check_garden(
    folder: Path,
    files: Mapping[str, Rows | str],
    format: str,
    *,
    name: Callable[[Shown], str] = lambda shown: shown.id,
    unknown: tuple[str, ...] = (),
    garden: tuple[Shown, ...] = GARDEN,
    signals: Mapping[str, Meaning | None] | None = None,
) -> Imported:
    """Import the garden in a shape, and compare everything with the truth.

    `name` gives the ids that the impressions must have; `unknown` are columns that the shape has no place for.
    """
    found = imported(folder, files, signals)
    assert found.report.formats == (format,)
    assert (found.refused, found.report.quarantined) == ([], 0)
    assert found.report.impressions == len(garden)
    assert found.report.events == sum(shown.liked is not None for shown in garden)
    assert found.labels == {name(shown): None if shown.liked is None else int(shown.liked) for shown in garden}
    for shown in garden:
        row = found.rows[name(shown)]
        assert found.messages(name(shown)) == list(shown.before)
        assert row["response"] == shown.answer
        truth = {"user": shown.user, "conversation_id": shown.conversation, "model": shown.model, "time": shown.time}
        truth |= dict.fromkeys(unknown) | ({"time": 0.0} if "time" in unknown else {})
        assert {column: row[column] for column in KNOWN} == truth
    return found


def without_system(garden: tuple[Shown, ...] = GARDEN) -> tuple[Shown, ...]:
    """The garden without its system messages, for shapes that have none."""
    plain = (tuple(message for message in shown.before if message["role"] != "system") for shown in garden)
    return tuple(dataclasses.replace(shown, before=before) for shown, before in zip(garden, plain, strict=True))
