"""Import of a log kept elsewhere into the feedback log: every row is imported, known already, or quarantined with its reason.

source --read_rows--> RawRow --Format.read--> Logged{Impression, Event} --> Impression, FeedbackEvent --batches--> FeedbackLog
                         |                         |                                    |
                         +--------- bad row -------+---------- conflicting id ----------+--------> quarantine JSONL
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from causalrm_ray.conversation import Conversation
from causalrm_ray.data.formats.base import Format, LoggedEvent, LoggedImpression, load_format
from causalrm_ray.data.log.schema import RETRACT, RecordError, event_row, impression_row
from causalrm_ray.data.log.store import ConflictError, FeedbackLog
from causalrm_ray.data.rows import Quarantine, RawRow, RowError, SourceError, conversation, row_fields
from causalrm_ray.data.sources import read_rows
from causalrm_ray.errors import brief
from causalrm_ray.types import LABEL_SIGNALS, FeedbackEvent, Impression, Meaning

_COUNTED = ("rows", "impressions", "duplicate_impressions", "events", "duplicate_events", "without_feedback")
_ROWS_PER_TRANSACTION = 1_000
_BARE_LABELS = {label: signal for signal, label in LABEL_SIGNALS.items()}
Records = tuple[list[Impression], list[FeedbackEvent]]  # of one row


@dataclass(frozen=True, slots=True)
class ImportReport:
    """Where every row of a source went.

    rows = impressions + duplicate_impressions + quarantined        in a format with one answer a row and no rows of events

    `impressions` and `events` are new in the log, the duplicates were there already (or twice in the source).
    `without_feedback` are answers whose own row brought none.
    `ignored_columns` were in the source and mean nothing to the format, `ignored` are parts of the others, and feedback of
    signals that are left out, by name: how often. `warnings` are the format's about the whole source.
    """

    rows: int
    impressions: int
    duplicate_impressions: int
    events: int
    duplicate_events: int
    without_feedback: int
    quarantined: int
    ignored_columns: tuple[str, ...]
    ignored: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """Refuses rows with `length_of(prompt, response)` above `longest` (tokens, or what `length_of` counts)."""

    length_of: Callable[[Conversation, str], int]
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
        run.finish(source)
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
        self._waiting: list[tuple[RawRow, Records]] = []
        self._occurrences: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._columns: set[str] = set()
        self._ignored: Counter[str] = Counter()

    def take(self, row: RawRow) -> None:
        self._counts["rows"] += 1
        self._columns.update(row.fields or ())
        self._keep(row, lambda: self._read(row))

    def finish(self, source: str) -> None:
        """Take what the format assembled over the rows of `source`: row 0 of it in the quarantine."""
        for logged in getattr(self._format, "finish", tuple)():
            if isinstance(logged, RowError):
                self._refuse(RawRow(source, 0, "", None), logged)
            else:
                content = dataclasses.asdict(logged)
                row = RawRow(source, 0, None, content)
                self._keep(row, lambda logged=logged, content=content: self._records([logged], content))

    def _keep(self, row: RawRow, records: Callable[[], Records]) -> None:
        try:
            self._waiting.append((row, records()))
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
            self._append([records for _, records in waiting])
        except ConflictError:
            for row, records in waiting:
                try:
                    self._append([records])
                except ConflictError as error:
                    self._refuse(row, error)

    def report(self) -> ImportReport:
        return ImportReport(
            **{name: self._counts[name] for name in _COUNTED},
            quarantined=self._quarantine.count,
            ignored_columns=tuple(sorted(column for column in self._columns if column not in self._format.columns)),
            ignored=dict(sorted((self._ignored + Counter(getattr(self._format, "ignored", {}))).items())),
            warnings=tuple(getattr(self._format, "warnings", tuple)()),
        )

    def _append(self, rows: Sequence[Records]) -> None:
        shown = [impression for impressions, _ in rows for impression in impressions]
        done = [event for _, events in rows for event in events]
        written = self._log.append(shown, done)
        self._counts["impressions"] += written.impressions
        self._counts["duplicate_impressions"] += len(shown) - written.impressions
        self._counts["events"] += written.events
        self._counts["duplicate_events"] += len(done) - written.events
        for impressions, events in rows:
            reacted = {event.impression_id for event in events}
            self._counts["without_feedback"] += sum(impression.id not in reacted for impression in impressions)

    def _refuse(self, row: RawRow, error: Exception) -> None:
        self._quarantine.refuse(row.where, row.number, str(error), row.text)

    def _read(self, row: RawRow) -> Records:
        """What the log keeps of a row; raises RowError or RecordError."""
        columns = self._format.columns
        fields = {name: value for name, value in row_fields(row).items() if value is not None and name in columns}
        shown, done = self._records(self._format.read(fields), fields)
        if not shown and not done and not hasattr(self._format, "finish"):
            raise RowError("row must hold an answer that was shown, or an event, got none")
        return shown, done

    def _records(self, found: Iterable[LoggedImpression | LoggedEvent], fields: Mapping[str, Any]) -> Records:
        """What the log keeps of what a format found in `fields`; raises RowError or RecordError."""
        shown: list[Impression] = []
        done: list[FeedbackEvent] = []
        for logged in found:
            if isinstance(logged, LoggedImpression):
                impression = self._impression(logged, fields)
                shown.append(impression)
                done += self._events(logged.events, impression.id, impression.time)
            elif logged.impression_id is None:
                raise RowError("an event of its own row must name its impression, got none")
            else:
                done += self._events([logged], logged.impression_id, self._default_time)
        return shown, done

    def _impression(self, logged: LoggedImpression, fields: Mapping[str, Any]) -> Impression:
        given = {field.name: getattr(logged, field.name) for field in dataclasses.fields(Impression)}
        given["id"] = self._row_id(fields) if logged.id is None else logged.id
        given["time"] = self._default_time if logged.time is None else logged.time
        prompt = logged.prompt
        given["prompt"] = prompt if isinstance(prompt, Conversation) else conversation(prompt)
        impression = Impression(**given)
        impression_row(impression)
        if self._limit and (length := self._limit.length_of(impression.prompt, impression.response)) > self._limit.longest:
            raise RowError(f"prompt and response must have a length of at most {self._limit.longest}, got {length}")
        return impression

    def _events(self, found: Iterable[LoggedEvent], impression_id: str, default_time: float) -> Iterator[FeedbackEvent]:
        """The events about one impression, without those of signals that are left out."""
        for logged in found:
            signal = self._signal(logged) if logged.retracts is None else RETRACT
            if signal is None:
                continue
            time = default_time if logged.time is None else logged.time
            name = _digest([impression_id, signal, time, logged.retracts]) if logged.id is None else logged.id
            if logged.value is None and not isinstance(self._log.signals.get(signal, 1), int):
                raise RowError(f"value must be given with the signal {signal!r}, whose value says what it means, got none")
            value = 1.0 if logged.value is None else logged.value
            event = FeedbackEvent(name, impression_id, signal, value, time, logged.retracts)
            event_row(event, self._log.signals)
            yield event

    def _signal(self, logged: LoggedEvent) -> str | None:
        """The signal that feedback is logged as; None for feedback that is left out. Raises RowError, SourceError."""
        name = str(logged.signal if logged.score is None else logged.score)
        if name in self._log.left_out or name.partition(":")[0] in self._log.left_out:
            signal = None
        elif logged.score is None:
            return _signal(logged.signal, logged.label, self._log.signals)
        else:
            signal = _score(logged, self._log.signals)
        if signal is None:
            self._ignored[f"signal {name}"] += 1
        return signal

    def _row_id(self, fields: Mapping[str, Any]) -> str:
        content = _digest(fields)
        self._occurrences[content] += 1
        return f"{content}-{self._occurrences[content]}"


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _signal(signal: Any, label: Any, signals: Mapping[str, Meaning]) -> str:
    """The signal that feedback is logged as, given by name or by label. Raises RowError."""
    if signal is not None and (not isinstance(signal, str) or signal not in signals):
        raise RowError(f"signal must be one of {sorted(signals)}, got {brief(signal)}")
    if label is None:
        if signal is None:
            raise RowError("an event must have a signal or a label, got neither")
        return signal
    if not isinstance(label, int | float) or label not in (0, 1):
        raise RowError(f"label must be 0 or 1, got {brief(label)}")
    if signal is None:
        return _BARE_LABELS[int(label)]
    if not isinstance(signals[signal], int):
        raise RowError(f"label must not be given with the signal {signal!r}, whose value says what it means, got {label!r}")
    if signals[signal] != label:
        raise RowError(f"label must be that of the signal {signal!r}, {signals[signal]}, got {label!r}")
    return signal


def _score(logged: LoggedEvent, signals: Mapping[str, Meaning]) -> str | None:
    """The signal that a score is logged as: its own, or that of a bare label; None for a score that says that a signal is not
    there: a copy that is false. Raises SourceError where nothing says what it means."""
    score = str(logged.score)
    meaning = signals.get(score)
    if isinstance(meaning, int):
        return None if logged.label == 0 else score
    if meaning is not None:
        return score
    if logged.label is not None:
        return _signal(None, logged.label, signals)
    option = f"feedback.signals.{score}"
    if ":" in score:
        rule = f"{option}=1 reads it as liked, =0 as disliked"
    else:
        rule = f"{option}='{{low: LOW, high: HIGH}}' reads values up to LOW as disliked and from HIGH on as liked"
    raise SourceError(
        f"the score {score!r}, with values such as {logged.value!r:.80}, must be given a meaning: {rule}, =null leaves it out"
    )
