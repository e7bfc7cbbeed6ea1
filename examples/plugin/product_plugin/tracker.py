"""A tracker: a CSV file in the run's folder, which a spreadsheet opens."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.support.trackers import TrackedRun


class CsvTracker:
    """`tracked.csv` with the columns step, metric, value; a resumed run goes on in the same file."""

    def start(self, run: TrackedRun) -> None:
        """Begin, or continue the file of an earlier attempt without the steps that are repeated."""
        self._path: Path = run.folder / "tracked.csv"
        kept = []
        if self._path.exists():
            with self._path.open(newline="", encoding="utf-8") as file:
                kept = [row for row in list(csv.reader(file))[1:] if int(row[0]) < run.first_step]
        with self._path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["step", "metric", "value"], *kept])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A row for each metric of a step."""
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([step, name, repr(value)] for name, value in metrics.items())

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Nothing is left to write."""
