"""Import of a log kept elsewhere into the feedback log: every row is imported, known already, or quarantined with its reason.

source --read_rows--> RawRow --Format.read--> LoggedImpression --> Impression (+ FeedbackEvent) --batches--> FeedbackLog
                         |                         |                                               |
                         +--------- bad row -------+------------------ conflicting id -------------+-------> quarantine JSONL
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causalrm_ray.data.formats.base import Format, LoggedImpression, load_format
from causalrm_ray.data.log.schema import LABEL_SIGNALS, RecordError, event_row, impression_row
from causalrm_ray.data.log.store import ConflictError, FeedbackLog
from causalrm_ray.data.sources import Quarantine, RawRow, RowError, SourceError, read_rows, row_fields
from causalrm_ray.types import FeedbackEvent, Impression

_COUNTED = ("rows", "impressions", "duplicate_impressions", "events", "duplicate_events", "without_feedback")
_ROWS_PER_TRANSACTION = 1_000
_BARE_LABELS = {label: signal for signal, label in LABEL_SIGNALS.items()}
_Records = list[tuple[Impression, FeedbackEvent | None]]


@dataclass(frozen=True, slots=True)
class ImportReport:
    """Where every row of a source went.

    rows = impressions + duplicate_impressions + quarantined        in a format with one answer a row, such as `native`
    impressions + duplicate_impressions = events + duplicate_events + without_feedback

    `impressions` and `events` are new in the log, the duplicates were there already (or twice in the source).
    `ignored_columns` were in the source and mean nothing to the format.
    """

    rows: int
    impressions: int
    duplicate_impressions: int
    events: int
    duplicate_events: int
    without_feedback: int
    quarantined: int
    ignored_columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """Refuses rows with `length_of(prompt, response)` above `longest` (tokens, or what `length_of` counts)."""

    length_of: Callable[[str, str], int]
    longest: int


def import_log(
    source: str,
    log: FeedbackLog,
    quarantine_path: str | Path,
    *,
    format: str = "native",
    limit: LengthLimit | None = None,
    split: str = "train",
    default_time: float = 0.0,
) -> ImportReport:
    """Import every row of `source` (see `sources.read_rows`) and report where each went; importing it again changes nothing.

    `format` is a name in `registry.FORMATS` or an import path; `default_time` is that of rows without one.
    Rows that break a rule go to `quarantine_path`, replaced each time, as {source, row, reason, raw}.
    Raises SourceError if the source is unreadable, empty, or has no good row, InputError for a format that is unknown.
    """
    reader = load_format(format)
    quarantine = Path(quarantine_path)
    here = Path(source).resolve()
    if here in (quarantine.resolve(), *quarantine.resolve().parents):
        raise SourceError(f"quarantine_path must lie outside the source {source}, got {quarantine}")
    quarantine.parent.mkdir(parents=True, exist_ok=True)
    with quarantine.open("w", encoding="utf-8") as file:
        refused = Quarantine(file)
        run = _Import(log, reader, refused, limit, default_time)
        for row in read_rows(source, split):
            run.take(row)
        run.flush()
    report = run.report()
    if report.rows == 0:
        raise SourceError(f"{source} must hold rows, got 0")
    if report.quarantined == report.rows:
        raise SourceError(
            f"{source} must hold at least one good row, got {report.rows} bad rows of {report.rows}, listed in {quarantine};"
            f" the first: {refused.first_fault}"
        )
    return report


class _Import:
    """An import in progress: rows that wait for their transaction, and counts of all earlier ones."""

    def __init__(
        self, log: FeedbackLog, format: Format, quarantine: Quarantine, limit: LengthLimit | None, default_time: float
    ) -> None:
        self._log, self._format, self._quarantine = log, format, quarantine
        self._limit, self._default_time = limit, default_time
        self._waiting: list[tuple[RawRow, _Records]] = []
        self._occurrences: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._columns: set[str] = set()

    def take(self, row: RawRow) -> None:
        self._counts["rows"] += 1
        self._columns.update(row.fields or ())
        try:
            self._waiting.append((row, self._records(row)))
        except (RowError, RecordError, RecursionError) as error:  # the last: values nested without end
            self._refuse(row, error)
        except Exception as error:
            error.add_note(f"in {row.where} row {row.number}, read as {type(self._format).__qualname__}")
            raise
        if len(self._waiting) == _ROWS_PER_TRANSACTION:
            self.flush()

    def flush(self) -> None:
        """Log the rows that wait; where one of them conflicts, one by one, so that only those that do are refused."""
        waiting, self._waiting = self._waiting, []
        try:
            self._append([record for _, records in waiting for record in records])
        except ConflictError:
            for row, records in waiting:
                try:
                    self._append(records)
                except ConflictError as error:
                    self._refuse(row, error)

    def report(self) -> ImportReport:
        ignored = tuple(sorted(self._columns - self._format.columns))
        counts = {name: self._counts[name] for name in _COUNTED}
        return ImportReport(ignored_columns=ignored, quarantined=self._quarantine.count, **counts)

    def _append(self, records: _Records) -> None:
        shown = [impression for impression, _ in records]
        done = [event for _, event in records if event is not None]
        written = self._log.append(shown, done)
        self._counts["impressions"] += written.impressions
        self._counts["duplicate_impressions"] += len(shown) - written.impressions
        self._counts["events"] += written.events
        self._counts["duplicate_events"] += len(done) - written.events
        self._counts["without_feedback"] += len(shown) - len(done)

    def _refuse(self, row: RawRow, error: Exception) -> None:
        self._quarantine.refuse(row.where, row.number, str(error), row.text)

    def _records(self, row: RawRow) -> _Records:
        """What the log keeps of a row; raises RowError or RecordError."""
        columns = self._format.columns
        fields = {name: value for name, value in row_fields(row).items() if value is not None and name in columns}
        records = [self._record(logged, fields) for logged in self._format.read(fields)]
        if not records:
            raise RowError("row must hold an answer that was shown, got none")
        return records

    def _record(self, logged: LoggedImpression, fields: Mapping[str, Any]) -> tuple[Impression, FeedbackEvent | None]:
        signal = _signal(logged.signal, logged.label, self._log.signals)
        impression = Impression(
            id=self._row_id({**fields, "prompt": logged.prompt}) if logged.id is None else logged.id,
            prompt=logged.prompt,
            response=logged.response,
            policy_version=logged.policy_version,
            time=self._default_time if logged.time is None else logged.time,
            user=logged.user,
            context=logged.context,
        )
        impression_row(impression)
        if self._limit and (length := self._limit.length_of(logged.prompt, logged.response)) > self._limit.longest:
            raise RowError(f"prompt and response must have a length of at most {self._limit.longest}, got {length}")
        if signal is None:
            return impression, None
        event_id = _digest([impression.id, impression.time]) if logged.event_id is None else logged.event_id
        event = FeedbackEvent(event_id, impression.id, signal, logged.value, impression.time)
        event_row(event, self._log.signals)
        return impression, event

    def _row_id(self, fields: Mapping[str, Any]) -> str:
        content = _digest(fields)
        self._occurrences[content] += 1
        return f"{content}-{self._occurrences[content]}"


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _signal(signal: Any, label: Any, signals: Mapping[str, int]) -> str | None:
    """The signal that feedback is logged as, given by name or by label; None where there is no feedback. Raises RowError."""
    if signal is not None and (not isinstance(signal, str) or signal not in signals):
        raise RowError(f"signal must be one of {sorted(signals)}, got {signal!r:.80}")
    if label is None:
        return signal
    if not isinstance(label, int | float) or label not in (0, 1):
        raise RowError(f"label must be 0 or 1, got {label!r:.80}")
    if signal is None:
        return _BARE_LABELS[int(label)]
    if signals[signal] != label:
        raise RowError(f"label must be that of the signal {signal!r}, {signals[signal]}, got {label!r}")
    return signal
