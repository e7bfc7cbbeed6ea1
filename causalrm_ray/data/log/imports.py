"""Import of a log kept elsewhere into the feedback log: every row is imported, known already, or quarantined with its reason.

source --read_rows--> RawRow --_parse--> Impression (+ FeedbackEvent) --batches--> FeedbackLog
                         |                    |                           |
                         +------ bad row -----+------- conflicting id ----+-------> quarantine JSONL
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from causalrm_ray.data.log.schema import LABEL_SIGNALS, RecordError, event_row, impression_row
from causalrm_ray.data.log.store import ConflictError, FeedbackLog
from causalrm_ray.data.sources import Quarantine, RawRow, RowError, SourceError, prompt_text, read_rows, row_fields
from causalrm_ray.types import FeedbackEvent, Impression

COLUMNS = frozenset(
    ["id", "impression_id", "prompt", "response", "user", "context", "time", "policy_version"]
    + ["signal", "label", "feedback", "value", "event_id"]
)
_COUNTED = ("rows", "impressions", "duplicate_impressions", "events", "duplicate_events", "without_feedback")
_ROWS_PER_TRANSACTION = 1_000
_BARE_LABELS = {label: signal for signal, label in LABEL_SIGNALS.items()}


@dataclass(frozen=True, slots=True)
class ImportReport:
    """Where every row of a source went.

    rows = impressions + duplicate_impressions + quarantined
    impressions + duplicate_impressions = events + duplicate_events + without_feedback

    `impressions` and `events` are new in the log, the duplicates were there already (or twice in the source).
    `ignored_columns` were in the source and mean nothing to the log.
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
    limit: LengthLimit | None = None,
    split: str = "train",
    default_time: float = 0.0,
) -> ImportReport:
    """Import every row of `source` (see `sources.read_rows`) and report where each went; importing it again changes nothing.

    A row holds `prompt` (text or chat messages), `response`, and optionally `id` (or `impression_id`; else a hash of the row and
    of how many equal rows precede it: equal rows are different impressions), `user`, `context` (mapping or JSON object), `time`
    (seconds, ISO text or timestamp; UTC where no zone is given; none: `default_time`), `policy_version` (none: 0), and
    the feedback: a `signal` of the log, or a bare `label` in {0, 1}, or either as `feedback`; all null or absent: none
    was given. `value` (none: 1.0) and `event_id` (none: a hash) belong to the feedback.

    Rows that break a rule go to `quarantine_path`, replaced each time, as {source, row, reason, raw}.
    Raises SourceError if the source is unreadable, empty, or has no good row.
    """
    quarantine = Path(quarantine_path)
    here = Path(source).resolve()
    if here in (quarantine.resolve(), *quarantine.resolve().parents):
        raise SourceError(f"quarantine_path must lie outside the source {source}, got {quarantine}")
    quarantine.parent.mkdir(parents=True, exist_ok=True)
    with quarantine.open("w", encoding="utf-8") as file:
        refused = Quarantine(file)
        run = _Import(log, refused, limit, default_time)
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
    """One import under way: rows that wait for their transaction, and the count of all that went before."""

    def __init__(self, log: FeedbackLog, quarantine: Quarantine, limit: LengthLimit | None, default_time: float) -> None:
        self._log = log
        self._quarantine = quarantine
        self._limit = limit
        self._default_time = default_time
        self._waiting: list[tuple[RawRow, Impression, FeedbackEvent | None]] = []
        self._occurrences: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._columns: set[str] = set()

    def take(self, row: RawRow) -> None:
        self._counts["rows"] += 1
        self._columns.update(row.fields or ())
        try:
            impression, event = self._parse(row)
        except (RowError, RecordError, RecursionError) as error:  # the last: values nested without end
            self._refuse(row, error)
            return
        self._waiting.append((row, impression, event))
        if len(self._waiting) == _ROWS_PER_TRANSACTION:
            self.flush()

    def flush(self) -> None:
        """Log the rows that wait; where one of them conflicts, one by one, so that only those that do are refused."""
        waiting, self._waiting = self._waiting, []
        try:
            self._append(waiting)
        except ConflictError:
            for item in waiting:
                try:
                    self._append([item])
                except ConflictError as error:
                    self._refuse(item[0], error)

    def report(self) -> ImportReport:
        ignored = tuple(sorted(self._columns - COLUMNS))
        counts = {name: self._counts[name] for name in _COUNTED}
        return ImportReport(ignored_columns=ignored, quarantined=self._quarantine.count, **counts)

    def _append(self, items: list[tuple[RawRow, Impression, FeedbackEvent | None]]) -> None:
        shown = [impression for _, impression, _ in items]
        done = [event for _, _, event in items if event is not None]
        written = self._log.append(shown, done)
        self._counts["impressions"] += written.impressions
        self._counts["duplicate_impressions"] += len(shown) - written.impressions
        self._counts["events"] += written.events
        self._counts["duplicate_events"] += len(done) - written.events
        self._counts["without_feedback"] += len(shown) - len(done)

    def _refuse(self, row: RawRow, error: Exception) -> None:
        self._quarantine.refuse(row.where, row.number, str(error), row.text)

    def _parse(self, row: RawRow) -> tuple[Impression, FeedbackEvent | None]:
        """The records of a row; raises RowError or RecordError."""
        fields = {name: value for name, value in row_fields(row).items() if value is not None and name in COLUMNS}
        prompt, signal = prompt_text(row), _signal(fields, self._log.signals)
        impression = Impression(
            id=_name(fields, "id", "impression_id") or self._row_id({**fields, "prompt": prompt}),
            prompt=prompt,
            response=fields.get("response", ""),
            policy_version=_whole(fields.get("policy_version", 0)),
            time=_seconds(fields.get("time", self._default_time)),
            user=_name(fields, "user"),
            context=_context(fields.get("context", {})),
        )
        impression_row(impression)
        if self._limit and (length := self._limit.length_of(prompt, impression.response)) > self._limit.longest:
            raise RowError(f"prompt and response must have a length of at most {self._limit.longest}, got {length}")
        if signal is None:
            return impression, None
        value = fields.get("value", 1.0)
        event_id = _name(fields, "event_id") or _digest([impression.id, impression.time])
        event = FeedbackEvent(event_id, impression.id, signal, value, impression.time)
        event_row(event, self._log.signals)
        return impression, event

    def _row_id(self, fields: Mapping[str, Any]) -> str:
        content = _digest(fields)
        self._occurrences[content] += 1
        return f"{content}-{self._occurrences[content]}"


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _name(fields: Mapping[str, Any], *columns: str) -> str | None:
    """The first of `columns` that is given, as text; none where none is."""
    for column in columns:
        if column in fields:
            name = fields[column]
            if not isinstance(name, str | int) or not str(name).strip():
                raise RowError(f"{column} must be a text or whole number that is not empty, got {name!r:.80}")
            return str(name)
    return None


def _whole(number: Any) -> Any:
    """A whole number that a column with gaps turned into a float, as the whole number it was; anything else as it is."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _seconds(time: Any) -> float:
    """Seconds since the epoch of a number, an ISO text or a timestamp."""
    if isinstance(time, str):
        try:
            time = datetime.fromisoformat(time)
        except ValueError as error:
            raise RowError(f"time must be seconds or an ISO date and time, got {time!r:.80}") from error
    if isinstance(time, datetime):
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    return time


def _context(context: Any) -> dict[str, str]:
    """Traits by name; values other than text are kept as JSON, nulls are left out."""
    if isinstance(context, str):
        try:
            context = json.loads(context)
        except (ValueError, RecursionError) as error:
            raise RowError(f"context must be a mapping or a JSON object, got {context!r:.80}") from error
    if not isinstance(context, Mapping):
        raise RowError(f"context must be a mapping or a JSON object, got {context!r:.80}")
    return {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        for name, value in context.items()
        if value is not None
    }


def _signal(fields: Mapping[str, Any], signals: Mapping[str, int]) -> str | None:
    """The signal that a row gives by name or by label; none where it gives no feedback."""
    signal, label, feedback = (fields.get(column) for column in ("signal", "label", "feedback"))
    if isinstance(feedback, str):
        signal = _agreed("signal", signal, feedback)
    elif feedback is not None:
        label = _agreed("label", label, feedback)
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


def _agreed(column: str, value: Any, feedback: Any) -> Any:
    if value is not None and value != feedback:
        raise RowError(f"feedback must agree with {column} {value!r:.80}, got {feedback!r:.80}")
    return feedback
