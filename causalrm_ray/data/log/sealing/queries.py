"""The rule by which events become labels, as SQL: `FeedbackLog.snapshot` says it in words."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Integer, Select, Subquery, Table, and_, case, cast, exists, func, literal, select, union

from causalrm_ray.data.log.tables import LogTables
from causalrm_ray.types import Meaning


@dataclass(frozen=True)
class LabelRule:
    """What signals mean (0, 1 or thresholds on the value), and their ranks."""

    signals: Mapping[str, Meaning]
    order: Sequence[Sequence[str]]

    @property
    def digest(self) -> str:
        """Equal for equal rules."""
        meanings = {
            name: meaning if isinstance(meaning, int) else (meaning.low, meaning.high) for name, meaning in self.signals.items()
        }
        content = repr((sorted(meanings.items()), [sorted(rank) for rank in self.order]))
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Known:
    """What is known of a log: rows at positions up to `upto`, of times up to `as_of` (None: of any)."""

    upto: int
    as_of: float | None = None

    def __call__(self, table: Any) -> ColumnElement[bool]:
        """The condition on the rows of a table."""
        recorded = table.c.seq <= self.upto
        return recorded if self.as_of is None else and_(recorded, table.c.time <= self.as_of)


def snapshot_query(tables: LogTables, rule: LabelRule, known: Known) -> Select:
    """The rows of a snapshot, ordered by (time, id), their columns in the order of SNAPSHOT_SCHEMA."""
    ranked = _ranked(tables, rule, known)
    shown, signal, label = tables.impressions.c, ranked.c.signal, ranked.c.label
    observed = cast(signal.is_not(None), Integer)
    return (
        select(shown.id, shown.prompt, shown.response, observed, label, signal)
        .add_columns(shown.policy_version, shown.time, shown.user, shown.context)
        .add_columns(shown.conversation_id, shown.model, shown.logprob, shown.asked_for_feedback)
        .select_from(tables.impressions.outerjoin(ranked, and_(ranked.c.impression_id == shown.id, ranked.c.place == 1)))
        .where(known(tables.impressions))
        .order_by(shown.time, shown.id)
    )


def label_query(tables: LogTables, rule: LabelRule, known: Known) -> Select:
    """(position, label, signal) of all impressions with feedback."""
    ranked = _ranked(tables, rule, known)
    shown = tables.impressions
    joined = shown.join(ranked, and_(ranked.c.impression_id == shown.c.id, ranked.c.place == 1))
    return select(shown.c.seq, ranked.c.label, ranked.c.signal).select_from(joined).where(known(shown))


def new_label_query(tables: LogTables, rule: LabelRule, known: Known, after: int) -> Select:
    """The same of the impressions that rows after a position are about, those without feedback too: of them label and signal
    are NULL."""
    shown, events = tables.impressions, tables.events
    new_event = select(events.c.impression_id.label("id")).where(events.c.seq > after, known(events))
    touched = union(new_event, select(shown.c.id).where(shown.c.seq > after, known(shown))).subquery()
    ranked = _ranked(tables, rule, known, events.c.impression_id.in_(select(touched.c.id)))
    joined = shown.join(touched, touched.c.id == shown.c.id).outerjoin(
        ranked, and_(ranked.c.impression_id == shown.c.id, ranked.c.place == 1)
    )
    return select(shown.c.seq, ranked.c.label, ranked.c.signal).select_from(joined).where(known(shown))


def _ranked(tables: LogTables, rule: LabelRule, known: Known, *conditions: ColumnElement[bool]) -> Subquery:
    """The events that count, numbered for each impression: that of place 1 decides."""
    events = tables.events
    withdrawal = events.alias("withdrawal")
    withdrawn = exists().where(
        withdrawal.c.retracts == events.c.id, withdrawal.c.impression_id == events.c.impression_id, known(withdrawal)
    )
    first = (_rank(events, rule.order), events.c.time.desc(), events.c.id.desc())
    place, meant = func.row_number().over(partition_by=events.c.impression_id, order_by=first), _label(events, rule.signals)
    return (
        select(events.c.impression_id, events.c.signal, meant.label("label"), place.label("place"))
        .where(meant.is_not(None), known(events), ~withdrawn, *conditions)
        .subquery()
    )


def _label(events: Table, signals: Mapping[str, Meaning]) -> ColumnElement[int | None]:
    """The label that an event means; NULL for one of an unknown signal, or between its thresholds."""
    value, branches = events.c.value, []
    for name, meaning in signals.items():
        of_signal = events.c.signal == name
        if isinstance(meaning, int):
            branches.append((of_signal, meaning))
            continue
        if meaning.high is not None:
            branches.append((and_(of_signal, value >= meaning.high), 1))
        if meaning.low is not None:
            branches.append((and_(of_signal, value <= meaning.low), 0))
    return case(*branches, else_=None)


def _rank(events: Table, order: Sequence[Sequence[str]]) -> ColumnElement[int]:
    """The place of an event's signal in `order`, from 0."""
    ranks = {name: place for place, names in enumerate(order) for name in names}
    return case(ranks, value=events.c.signal, else_=len(order)) if ranks else literal(0)
