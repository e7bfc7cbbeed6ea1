"""Import of a log kept elsewhere into the feedback log: every row is imported, known already, or quarantined with its reason.

source --LogSource--> RawRow --Format.read--> Logged{Impression, Event} --> Impression, FeedbackEvent --batches--> FeedbackLog
                         |                         |                                    |
                         +--------- bad row -------+---------- conflicting id ----------+--------> quarantine JSONL
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from causalrm_ray.conversation import Conversation, ConversationError
from causalrm_ray.data.formats.base import LoggedEvent, LoggedImpression, content_of
from causalrm_ray.data.log.bulk import ConflictError
from causalrm_ray.data.log.labels import check_labels
from causalrm_ray.data.log.reactions import Reactions
from causalrm_ray.data.log.reading import AUTO, LogSource, Origin, Table
from causalrm_ray.data.log.schema import RETRACT, RecordError, event_row, impression_columns
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.data.log.values import Values
from causalrm_ray.data.rows import Quarantine, RawRow, RowError, SourceError, conversation
from causalrm_ray.truncation import TooLongError, Truncated, truncate
from causalrm_ray.types import FeedbackEvent, Truncation

_COUNTED = ("impressions", "duplicate_impressions", "events", "duplicate_events", "without_feedback")
_ROWS_PER_TRANSACTION = 4_000
_OBJECTS_PER_COLLECTION = 50_000
FAULTS = (RowError, RecordError, ConversationError, RecursionError)  # of a row; the last: values nested without end
Records = tuple[list[dict[str, Any]], list[dict[str, Any]]]  # rows of the log's tables, of one row of the source


@dataclass(frozen=True, slots=True)
class ImportReport:
    """Where every row of a source went.

    rows = impressions + duplicate_impressions + quarantined + forgotten    in a format with one answer a row, no rows of events

    `impressions` and `events` are new in the log, the duplicates were there already (or twice in the source).
    `without_feedback` are answers whose own row brought none.
    `ignored_columns` were in the source and mean nothing to the format, `ignored` are parts of the others, and feedback of
    signals that are left out, by name: how often. `warnings` are about the whole source: what was converted, how files were
    read, what the format says. `formats` are those that were given or recognised. `forgotten` are impressions that were removed
    from the log for ever: they, and events about them, stay out.
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
    formats: tuple[str, ...] = ()
    forgotten: int = 0


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """Refuses rows that `encode(prompt, response)` makes longer than `longest`, with "oldest" only those that stay so without all
    of their earlier turns (see causalrm_ray.truncation). The log keeps every row as it came.

    `at_most` is a bound of the length that is quick to find, None where there is none: most rows need nothing else.
    """

    encode: Callable[[Conversation, str], Sequence[Any]]
    longest: int
    at_most: Callable[[Conversation, str], int | None] | None = None
    truncation: Truncation = "refuse"

    def truncate(self, prompt: Conversation, response: str) -> Truncated[Sequence[Any]] | None:
        """What is read of a row; None for one that is short enough by its bound. Raises RowError for one that is too long."""
        bound = self.at_most(prompt, response) if self.at_most else None
        if bound is not None and bound <= self.longest:
            return None
        try:
            return truncate(prompt, lambda kept: self.encode(kept, response), self.longest, self.truncation)
        except TooLongError as error:
            raise RowError(f"prompt and response must have a length of at most {self.longest}{error}") from error


def import_log(
    source: str | Sequence[str] | Origin,
    log: FeedbackLog,
    quarantine_path: str | Path,
    *,
    format: str = AUTO,
    limit: LengthLimit | None = None,
    split: str = "train",
    default_time: float = 0.0,
) -> ImportReport:
    """Import every row of `source` and report where each went; importing it again changes nothing.

    `source` is what `sources.parts` reads, or an Origin, which has all other options of reading too, `format` and `split` among
    them. `default_time` is the time of rows without one.
    Rows that break a rule go to `quarantine_path`, replaced each time, as {source, row, reason, raw}.
    Raises SourceError if the source is unreadable, empty, of no known format or scale of labels, or has no good row; but for the
    last, nothing was imported then. Raises InputError for a format that is unknown.
    """
    origin = source if isinstance(source, Origin) else Origin(source, format, split=split)
    quarantine = Path(quarantine_path)
    for named in origin.paths():
        if named.resolve() in (quarantine.resolve(), *quarantine.resolve().parents):
            raise SourceError(f"quarantine_path must lie outside the source {origin}, got {quarantine}")
    rows = LogSource(origin, log.signals, log.left_out)
    check_labels(rows, log.signals, log.left_out)
    quarantine.parent.mkdir(parents=True, exist_ok=True)
    with quarantine.open("w", encoding="utf-8") as file:
        refused = Quarantine(file)
        run = _Import(log, rows, refused, limit, default_time)
        with _rare_collections():
            for row, table in rows.rows():
                run.take(row, table)
            run.finish()
            run.flush()
    report = run.report()
    if report.rows == 0:
        raise SourceError(f"{origin} must hold rows, got 0{rows.why_empty()}")
    if report.quarantined == report.rows:
        raise SourceError(
            f"{origin} must hold at least one good row, got {report.rows} bad rows of {report.rows}, listed in {quarantine};"
            f" the first: {refused.first_fault}"
        )
    return report


@contextmanager
def _rare_collections() -> Iterator[None]:
    """What a batch is made of lives until it is written: looked at as often as usual, it takes a quarter of an import's time."""
    usual = gc.get_threshold()
    gc.set_threshold(_OBJECTS_PER_COLLECTION, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


class _Import:
    """An import in progress: rows that wait for their transaction, and counts of all earlier ones."""

    def __init__(
        self, log: FeedbackLog, source: LogSource, quarantine: Quarantine, limit: LengthLimit | None, default_time: float
    ) -> None:
        self._log, self._source, self._quarantine = log, source, quarantine
        self._limit, self._default_time = limit, default_time
        self._values = Values(time.time())
        self._reactions = Reactions(log.signals, log.left_out, self._values)
        self._waiting: list[tuple[RawRow, Records]] = []
        self._occurrences: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._rows = 0

    def take(self, row: RawRow, table: Table) -> None:
        self._rows += 1
        try:
            self._waiting.append((row, self._records(*self._source.read(row, table))))
        except FAULTS as error:
            self._refuse(row, error)
        if len(self._waiting) == _ROWS_PER_TRANSACTION:
            self.flush()

    def finish(self) -> None:
        """Take what formats assembled over rows: row 0 of the source in the quarantine."""
        source = str(self._source.origin)
        for logged in self._source.finish():
            if isinstance(logged, RowError):
                self._refuse(RawRow(source, 0, "", None), logged)
            else:
                content = content_of(logged)
                row = RawRow(source, 0, None, content)
                try:
                    self._waiting.append((row, self._records([logged], content)))
                except FAULTS as error:
                    self._refuse(row, error)
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
            rows=self._rows,
            **{name: self._counts[name] for name in _COUNTED},
            quarantined=self._quarantine.count,
            ignored_columns=self._source.ignored_columns(),
            ignored=dict(sorted((self._reactions.ignored + Counter(self._source.ignored())).items())),
            warnings=(*self._source.notes(), *self._reactions.notes(), *self._values.notes()),
            formats=self._source.formats,
            forgotten=self._counts["forgotten"],
        )

    def _append(self, rows: Sequence[Records]) -> None:
        shown = [impression for impressions, _ in rows for impression in impressions]
        done = [event for _, events in rows for event in events]
        # A row an event repeats the answer at the event's time: the answer was shown when the first of them says.
        repeated = {impression["id"] for impressions, events in rows if events for impression in impressions}
        written = self._log.append_rows(shown, done, repeated)
        self._counts["impressions"] += written.impressions
        self._counts["duplicate_impressions"] += len(shown) - written.impressions - written.forgotten_impressions
        self._counts["events"] += written.events
        self._counts["duplicate_events"] += len(done) - written.events - written.forgotten_events
        self._counts["forgotten"] += written.forgotten_impressions
        without = 0
        for impressions, events in rows:
            reacted = {event["impression_id"] for event in events} if events else ()
            without += sum(impression["id"] not in reacted for impression in impressions) if reacted else len(impressions)
        self._counts["without_feedback"] += without

    def _refuse(self, row: RawRow, error: Exception) -> None:
        self._quarantine.refuse(row.where, row.number, str(error), row.text)

    def _records(self, found: Iterable[LoggedImpression | LoggedEvent], fields: Mapping[str, Any]) -> Records:
        """What the log keeps of what a format found in `fields`; raises RowError or RecordError."""
        shown: list[dict[str, Any]] = []
        done: list[dict[str, Any]] = []
        for logged in found:
            if isinstance(logged, LoggedImpression):
                impression = self._impression(logged, fields)
                shown.append(impression)
                if logged.events:
                    done += self._events(logged.events, impression["id"], impression["time"])
            elif logged.impression_id is None:
                raise RowError("an event of its own row must name its impression, got none")
            else:
                done += self._events([logged], logged.impression_id, self._default_time)
        return shown, done

    def _impression(self, logged: LoggedImpression, fields: Mapping[str, Any]) -> dict[str, Any]:
        prompt = logged.prompt if isinstance(logged.prompt, Conversation) else conversation(logged.prompt)
        row = impression_columns(
            self._row_id(fields) if logged.id is None else logged.id,
            prompt,
            logged.response,
            self._values.whole(logged.policy_version),
            self._default_time if logged.time is None else self._values.time(logged.time),
            logged.user,
            logged.context,
            logged.conversation_id,
            logged.model,
            self._values.number(logged.logprob),
            self._values.flag(logged.asked_for_feedback),
        )
        if self._limit:
            self._limit.truncate(prompt, logged.response)
        return row

    def _events(self, found: Iterable[LoggedEvent], impression_id: str, default_time: float) -> Iterator[dict[str, Any]]:
        """The events about one impression, without those of signals that are left out."""
        for logged in found:
            signal = self._reactions.signal(logged) if logged.retracts is None else RETRACT
            if signal is None:
                continue
            time = default_time if logged.time is None else self._values.time(logged.time)
            name = _event_id(impression_id, signal, time, logged.retracts) if logged.id is None else logged.id
            if logged.value is None and not isinstance(self._log.signals.get(signal, 1), int):
                raise RowError(f"value must be given with the signal {signal!r}, whose value says what it means, got none")
            value = 1.0 if logged.value is None else self._values.number(logged.value)
            yield event_row(FeedbackEvent(name, impression_id, signal, value, time, logged.retracts), self._log.signals)

    def _row_id(self, fields: Mapping[str, Any]) -> str:
        content = _digest(fields)
        self._occurrences[content] += 1
        return f"{content}-{self._occurrences[content]}"


def _event_id(*content: Any) -> str:
    """A hash of an event's impression, signal, time, and what it withdraws."""
    return hashlib.sha256("\x00".join(map(str, content)).encode(errors="surrogatepass")).hexdigest()[:32]


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
