"""What was found of the families, as a table: largest |differences|, `refused` or `failed`, and the reasons below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import pandas as pd

from causalrm_ray.config.families import FamiliesConfig, FamilyName
from jobs.lab.tables import show, write_markdown

TOLERANCE = 1e-5  # in float32: other orders of sums; 5e-6 was measured
BITWISE = ("resumed", "saved weights")
REFUSED, FAILED = "refused", "failed"
ENGINE = ("as loaded", "same weights", "other weights", "adapter")
NAMES = {
    "reward": ("transformers", "vLLM", "rollout, log", "chat, log"),
    "learner": ("saved weights", "saved log-probabilities", "resumed"),
}
TITLE = "Largest |difference| in float32; `refused` and `failed` are explained below."


@dataclass
class Findings:
    """Of one family: figures by part and name, and where a part gave none the reason, which begins with REFUSED or FAILED."""

    family: str
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def passed(self) -> bool:
        """Whether all figures are as small as they must be, and what gave none was refused."""
        right = all(value <= bound(name) for part in self.figures.values() for name, value in part.items())
        return right and all(reason.startswith(REFUSED) for reason in self.reasons.values())


def bound(name: str) -> float:
    """The largest difference that a figure may be."""
    return 0.0 if name in BITWISE else TOLERANCE


def conclude(found: Sequence[Findings], config: FamiliesConfig, folder: Path) -> None:
    """The table as Markdown, and printed with the largest figure of each part."""
    found = sorted(found, key=lambda each: get_args(FamilyName).index(each.family))
    parts = [part for part in (*config.engines, *NAMES) if any(part in each.figures or part in each.reasons for each in found)]
    lines = [{"family": each.family} | {key: text for part in parts for key, text in _cells(each, part)} for each in found]
    write_markdown(pd.DataFrame(lines), folder / "families.md", TITLE)
    reasons = [f"{each.family}, {part}: {reason}" for each in found for part, reason in each.reasons.items()]
    with (folder / "families.md").open("a", encoding="utf-8") as file:
        file.writelines(f"\n* {reason.replace(chr(10), ' ')}\n" for reason in reasons)
    worst = [{part: max(each.figures[part].values()) for part in parts if part in each.figures} for each in found]
    short = [
        {"family": each.family, **{part: _text(each, part, figures.get(part)) for part in parts}, "right": _verdict(each)}
        for each, figures in zip(found, worst, strict=True)
    ]
    show(pd.DataFrame(short), folder)


def _cells(found: Findings, part: str) -> list[tuple[str, str]]:
    figures = found.figures.get(part, {})
    return [(f"{part}: {name}", _text(found, part, figures.get(name))) for name in NAMES.get(part, ENGINE)]


def _text(found: Findings, part: str, value: float | None) -> str:
    if part in found.reasons:
        return found.reasons[part].partition(":")[0]
    return "" if value is None else f"{value:.0e}" if value else "0"


def _verdict(found: Findings) -> str:
    return "yes" if found.passed() else "no"
