"""Labels of another scale than 0 and 1, found before anything is imported: whether a like was five stars cannot be seen later.

LogSource --label columns alone, in a format that names them--> SourceError, or nothing
          --a rehearsal: every row read once and dropped-----> SourceError, or nothing
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from causalrm_ray.data.formats.base import Format, LoggedEvent, LoggedImpression, load_format
from causalrm_ray.data.formats.native import parsed
from causalrm_ray.data.log.reactions import Reactions, scale_error
from causalrm_ray.data.log.reading import LogSource, Table
from causalrm_ray.data.log.values import ScaleError, Values
from causalrm_ray.data.rows import RowError, SourceError
from causalrm_ray.types import Meaning

_MOST_VALUES = 12  # that an error shows


def check_labels(source: LogSource, signals: Mapping[str, Meaning], left_out: Collection[str]) -> None:
    """Read the source once, to its end. Raises SourceError for labels of another scale, with the options that read them, for a
    score that has no meaning, and for a part that is not whole."""
    reactions = Reactions(signals, left_out, Values(float("inf")))
    rehearsed = {
        table.name: _Rehearsal(load_format(table.name), reactions) for table in source.tables if not _names_labels(table)
    }
    for table in source.tables:
        if _names_labels(table):
            _scan(source, table)
        else:
            rehearsed[table.name].read(source, table)
    for rehearsal in rehearsed.values():
        rehearsal.finish(source)


def _names_labels(table: Table) -> bool:
    return hasattr(table.format, "labels")


class _Rehearsal:
    """One format reads its tables, as it will in the import, and what it gives is dropped."""

    def __init__(self, made: Format, reactions: Reactions) -> None:
        self._made, self._reactions = made, reactions
        self._labels: dict[Any, None] = {}
        self._off: list[int] = []  # rows with labels of another scale

    def read(self, source: LogSource, table: Table) -> None:
        for row in table.part.rows():
            with suppress(RowError, RecursionError):  # the import quarantines it
                self._see(source.read_as(row, table, self._made)[0], row.number)
        self._check(table.part.where)

    def finish(self, source: LogSource) -> None:
        for logged in getattr(self._made, "finish", tuple)():
            if not isinstance(logged, RowError):
                self._see([logged], 0)
        self._check(str(source.origin))

    def _see(self, found: Iterable[LoggedImpression | LoggedEvent], row: int) -> None:
        for logged in found:
            for event in logged.events if isinstance(logged, LoggedImpression) else [logged]:
                if isinstance(event.label, str | int | float):
                    self._labels[event.label] = None
                try:
                    if event.retracts is None:
                        self._reactions.signal(event)
                except ScaleError:
                    self._off.append(row)

    def _check(self, where: str) -> None:
        if self._off:
            raise scale_error(where, "label", _shown(self._labels), len(set(self._off)), self._off[0])


def _scan(source: LogSource, table: Table) -> None:
    columns = {name for column in table.format.labels for name in source.map.sources(column)}  # type: ignore[attr-defined]
    for row in table.part.suspects(columns):
        if row.fields is not None and any(_off_scale(value) for _, value in _labels(source, row.fields)):
            raise _error(source, table)


def _labels(source: LogSource, fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(their column, label) of a row of the native format."""
    mapped, theirs = source.map(fields), source.origin.columns
    for column in ("label", "feedback"):
        value = mapped.get(column)
        if value is not None and not (column == "feedback" and isinstance(value, str)):  # which is a signal
            yield theirs.get(column, column), value
    events = parsed(mapped.get("events"))
    for event in events if isinstance(events, list) else ():
        if isinstance(event, Mapping) and event.get("label") is not None:
            yield "label in events", event["label"]


def _off_scale(value: Any) -> bool:
    try:
        Values(0.0).label(value)
    except ScaleError:
        return True
    except RowError:
        pass
    return False


def _error(source: LogSource, table: Table) -> SourceError:
    """With all labels of the table, those of the right scale too: together they show which one it is."""
    values: dict[Any, None] = {}
    rows, first, column = 0, 0, "label"
    for row in table.part.rows():
        found = list(_labels(source, row.fields or {}))
        values.update(dict.fromkeys(value for _, value in found if isinstance(value, str | int | float)))
        off = [name for name, value in found if _off_scale(value)]
        if off:
            rows, first, column = rows + 1, first or row.number, off[0]
    return scale_error(table.part.where, column, _shown(values), rows, first)


def _shown(values: Iterable[Any]) -> list[Any]:
    """Labels, numbers first and in order, without most of them where they are many."""
    found = list(values)
    shown = [
        *sorted(value for value in found if not isinstance(value, str)),
        *(value for value in found if isinstance(value, str)),
    ]
    return [*shown[: _MOST_VALUES - 1], shown[-1]] if len(shown) > _MOST_VALUES else shown
