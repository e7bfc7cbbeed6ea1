"""A source as an import reads it: every part with the format that it is of, known before anything is imported.

parts --first rows--> detect --> Table --rows--> RawRow --read--> LoggedImpression, LoggedEvent ...
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from causalrm_ray.data.formats.base import FIRST_ROWS, Format, LoggedEvent, LoggedImpression, load_format
from causalrm_ray.data.formats.detect import detect
from causalrm_ray.data.formats.native import seconds
from causalrm_ray.data.formats.parts.ratings import GRADES
from causalrm_ray.data.log.values import Values
from causalrm_ray.data.mapping import ColumnMap
from causalrm_ray.data.readers.part import Part
from causalrm_ray.data.readers.remote import without_secrets
from causalrm_ray.data.rows import RawRow, RowError, SourceError, row_fields
from causalrm_ray.data.sources import parts
from causalrm_ray.errors import InputError, brief
from causalrm_ray.types import Meaning

AUTO = "auto"
_SHAPE = ("prompt", "response", "impression_id")  # who maps one of these has a log of their own
_MOST_BAD_ROWS = 10_000  # that cannot be parsed before a format is recognised
_MEANINGS = "=1 liked, =0 disliked or ='{low: LOW, high: HIGH}' for its values"
Logged = LoggedImpression | LoggedEvent


@dataclass(frozen=True)
class Origin:
    """Where a log comes from and how it is read: the options of `feedback`.

    source     what `sources.parts` reads; several are one log
    events     another source, of events only; or, where `query` is given, another query on the same database
    format     a name in `registry.FORMATS`, an import path, or "auto": of each file the one that its first rows show
    columns    our name of a column -> theirs: see `ColumnMap`; a name of ours may also be a signal, whose value the column holds,
               as a column does that has the name of a signal with thresholds
    """

    source: str | Sequence[str]
    format: str = AUTO
    columns: Mapping[str, str] = field(default_factory=dict)
    events: str | Sequence[str] | None = None
    query: str | None = None
    split: str = "train"

    def paths(self) -> list[Path]:
        """What it names on this machine, as paths; names of other kinds are paths that are not there."""
        named = [[value] if isinstance(value, str) else list(value or ()) for value in (self.source, self.events)]
        return [Path(name) for name in itertools.chain(*named) if "://" not in name]

    def __str__(self) -> str:
        named = [self.source] if isinstance(self.source, str) else list(self.source)
        first = without_secrets(named[0]) if "://" in named[0] else named[0]
        return f"{first} and {len(named) - 1} more" if len(named) > 1 else first


@dataclass(frozen=True)
class Table:
    """One part of a source, the name of its format and the format; `events` where it must hold nothing but events."""

    part: Part
    name: str
    format: Format
    events: bool


class LogSource:
    """All parts of an origin. `signals` are those that feedback may be of.

    Raises SourceError, before any row is given out, for a part that is missing or of no known format, and for a mapped column
    that is in no row; InputError for a format or column of ours that is unknown.
    """

    def __init__(self, origin: Origin, signals: Mapping[str, Meaning], left_out: Collection[str] = ()) -> None:
        self.origin, self.map = origin, ColumnMap(origin.columns)
        self._signals, self._left_out = signals, left_out
        self._values = Values(0.0)  # of columns that are named like signals
        graded = [name for name, meaning in signals.items() if not isinstance(meaning, int)]
        self._columns_of_signals = tuple(dict.fromkeys((*graded, *(name for name in origin.columns if name in signals))))
        self._formats: dict[str, Format] = {}
        self._columns: dict[str, set[str]] = {}  # that rows had, by the name of their format
        found = [(part, False) for part in parts(origin.source, origin.split, origin.query)]
        found += [(part, True) for part in _events(origin)]
        heads = [(part, events, _head(part)) for part, events in found]
        self._check_mapped([part for part, _ in found], [head for *_, head in heads])
        self.tables = [self._table(part, events, head) for part, events, head in heads]
        self._check_names()
        self._check_ratings([head for *_, head in heads])

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the formats, each once."""
        return tuple(dict.fromkeys(table.name for table in self.tables))

    def why_empty(self) -> str:
        """What may be behind a source without a row."""
        return "; ".join(("", *(hint for table in self.tables[:1] if (hint := table.part.empty()))))

    def ignored_columns(self) -> tuple[str, ...]:
        """Columns that rows had so far and that mean nothing to their format."""
        known = {name: self._formats[name].columns for name in self._columns}
        return tuple(
            sorted({column for name, found in self._columns.items() for column in found if not self._reads(known[name], column)})
        )

    def notes(self) -> tuple[str, ...]:
        """How parts were read, where that is not obvious, and what formats say of the whole."""
        said = [note for table in self.tables for note in table.part.notes]
        said += [
            f"the column {column} is ignored: feedback.columns.{column}={column} reads it as a signal, {_MEANINGS}"
            for column in self.ignored_columns()
            if column in self._signals or (column in GRADES and column not in self._left_out)
        ]
        return (*said, *(note for made in self._formats.values() for note in getattr(made, "warnings", tuple)()))

    def ignored(self) -> dict[str, int]:
        """What formats did not keep of their own columns, by name."""
        found: dict[str, int] = {}
        for made in self._formats.values():
            for name, count in getattr(made, "ignored", {}).items():
                found[name] = found.get(name, 0) + count
        return found

    def rows(self) -> Iterator[tuple[RawRow, Table]]:
        """Every row, with the table that `read` is to be given."""
        for table in self.tables:
            columns = self._columns.setdefault(table.name, set())
            for row in table.part.rows():
                columns.update(row.fields or ())
                yield row, table

    def read(self, row: RawRow, table: Table) -> tuple[list[Logged], Mapping[str, Any]]:
        """What a row holds, and the fields that it was read from. Raises RowError."""
        return self.read_as(row, table, table.format)

    def finish(self) -> Iterator[Logged | RowError]:
        """What formats assembled over rows; once, after the last row."""
        for made in self._formats.values():
            yield from getattr(made, "finish", tuple)()

    def read_as(self, row: RawRow, table: Table, made: Format) -> tuple[list[Logged], Mapping[str, Any]]:
        """The same with another instance of the table's format."""
        mapped, columns = self.map(row_fields(row)), made.columns
        fields = {name: value for name, value in mapped.items() if value is not None and name in columns}
        scores: list[LoggedEvent] = []
        if not mapped.keys().isdisjoint(self._columns_of_signals):
            given = (name for name in self._columns_of_signals if name in mapped and name not in columns)
            scores = [score for name in given if (score := self._score(name, mapped[name])) is not None]
        alone = scores and "impression_id" in fields and not fields.keys() & {"prompt", "response", "signal", "label", "retracts"}
        found = [] if alone else _given(made, fields, row)
        if scores:
            found = _with_scores(found, scores, fields)
        if not found and not hasattr(made, "finish"):
            raise RowError("row must hold an answer that was shown, or an event, got none")
        if table.events and any(isinstance(logged, LoggedImpression) for logged in found):
            raise RowError("a row of feedback.events must be an event, got an answer that was shown")
        return found, fields

    def _score(self, signal: str, value: Any) -> LoggedEvent | None:
        """The event of a column named like a signal; None where it is not there: null, and false or 0 of a plain signal."""
        if value is None:
            return None
        if isinstance(self._signals.get(signal), int):
            return LoggedEvent(signal=signal) if self._values.label(value) else None
        number = self._values.number(value)
        if isinstance(number, bool) or not isinstance(number, int | float):
            column = self.origin.columns.get(signal, signal)
            raise RowError(f"{column} must be a number, the value of the signal {signal!r}, got {brief(value)}")
        return LoggedEvent(signal=signal, value=float(number))

    def _reads(self, columns: Any, column: str) -> bool:
        theirs = self.origin.columns.values()
        mapped = any(path == column or path.split(".")[0] == column for path in theirs)
        return column in columns or column in self._columns_of_signals or mapped

    def _table(self, part: Part, events: bool, head: Sequence[RawRow]) -> Table:
        rows = [self.map(row.fields) for row in head if row.fields is not None]
        name = self.origin.format
        if name == AUTO:
            columns = {column for row in rows for column in row}
            if not columns.isdisjoint(self._columns_of_signals):
                columns.add("signal")
            own = any(column in self.origin.columns for column in _SHAPE) or not rows
            plain = [{column: value for column, value in row.items() if value is not None} for row in rows]
            name = "native" if own else detect(part.where, sorted(columns), plain)
        if name not in self._formats:
            self._formats[name] = load_format(name)
        return Table(part, name, self._formats[name], events)

    def _check_mapped(self, found: Sequence[Part], heads: Sequence[Sequence[RawRow]]) -> None:
        """Every mapped column must be in some row: of the first ones, or else of all."""
        rows = [row.fields for head in heads for row in head if row.fields is not None]
        for ours, theirs in self.origin.columns.items():
            later = (row.fields for part in found for row in part.rows() if row.fields is not None)
            if not any(self.map.has(ours, fields) for fields in itertools.chain(rows, later)):
                names = sorted({name for fields in rows for name in fields})
                raise SourceError(
                    f"feedback.columns.{ours} must name a column, or a path into one, of {self.origin}: no row has {theirs!r};"
                    f" there are {', '.join(names[:20])}"
                )

    def _check_ratings(self, heads: Sequence[Sequence[RawRow]]) -> None:
        """A log in our own format with ratings under another name, and no feedback besides, would lose all of it."""
        rows = [self.map(row.fields) for head in heads for row in head if row.fields is not None]
        columns = {column: None for row in rows for column, value in row.items() if value is not None}
        known = {"label", "signal", "feedback", "events", "retracts", *self._columns_of_signals}
        rating = next((column for column in columns if column in GRADES and column not in self._left_out), None)
        if self.formats == ("native",) and rating is not None and known.isdisjoint({*columns, *self.origin.columns}):
            raise SourceError(
                f"{self.origin}: the column {rating} must be given a meaning, or its feedback is lost: feedback.signals.{rating}="
                f"'{{low: LOW, high: HIGH}}' reads its values, feedback.columns.label={rating} reads it as labels of 0 and 1,"
                f" feedback.signals.{rating}=null leaves it out"
            )

    def _check_names(self) -> None:
        """Each of our names must mean something: a column of a format, or a signal."""
        for ours in self.origin.columns:
            if ours not in self._signals and not any(ours in made.columns for made in self._formats.values()):
                raise InputError(
                    f"feedback.columns.{ours}: {ours!r} is neither a column of the format {' or '.join(self._formats)} nor one of"
                    f" feedback.signals; a signal of your own needs a meaning there, {_MEANINGS}"
                )


def _events(origin: Origin) -> list[Part]:
    if origin.events is None:
        return []
    if origin.query is None:
        return parts(origin.events, origin.split)
    if not isinstance(origin.events, str):
        raise SourceError("feedback.events must be one query where feedback.query is given, got several")
    return parts(origin.source, query=origin.events, option="feedback.events")


def _head(part: Part) -> list[RawRow]:
    """The first rows, as many as show the format. Raises SourceError for text in another encoding."""
    head: list[RawRow] = []
    parsed = 0
    for row in itertools.islice(part.rows(), _MOST_BAD_ROWS):
        head.append(row)
        parsed += row.fields is not None
        if parsed == FIRST_ROWS:
            break
    coded = [row for row in head if "UTF-8: invalid" in row.fault]
    if len(coded) > 1 and all(row.text.isascii() for row in head if row.fields is not None):
        raise SourceError(
            f"{part.where} must be text in UTF-8, but {len(coded)} of its first {len(head)} rows are not, the first of them row"
            f" {coded[0].number}: convert the file, from Latin-1 with `iconv -f LATIN1 -t UTF-8`"
        )
    return head


def _given(made: Format, fields: Mapping[str, Any], row: RawRow) -> list[Logged]:
    try:
        return list(made.read(fields))
    except (RowError, SourceError, RecursionError):  # the last: values nested without end
        raise
    except Exception as error:
        error.add_note(f"in {row.where} row {row.number}, read as {type(made).__qualname__}")
        raise


def _with_scores(found: list[Logged], scores: Sequence[LoggedEvent], fields: Mapping[str, Any]) -> list[Logged]:
    """`found` with the events of columns that are named like signals: of the row's one answer, or of the impression it names."""
    shown = [logged for logged in found if isinstance(logged, LoggedImpression)]
    if len(shown) == 1:
        one = dataclasses.replace(shown[0], events=[*shown[0].events, *scores])
        return [one if logged is shown[0] else logged for logged in found]
    if not shown and "impression_id" in fields:
        name, time = str(fields["impression_id"]), seconds(fields.get("time"))
        return [*found, *(dataclasses.replace(score, impression_id=name, time=time) for score in scores)]
    raise RowError(f"a column of a signal must stand beside one answer, got {len(shown)}")
