"""What a feedback format is: it reads the fields of a source's row as the answers that were shown, with the feedback on each.

source --read_rows--> RawRow.fields --Format.read--> LoggedImpression ... --import_log--> Impression (+ FeedbackEvent)
                                         +-- RowError --> quarantine
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from causalrm_ray.errors import InputError
from causalrm_ray.registry import FORMATS


@dataclass(frozen=True, slots=True)
class LoggedImpression:
    """One answer that was shown, and what is known of it. The import checks every field and fills in those that are None.

    id              None: a hash of the row and of how many equal rows precede it; equal rows are different impressions
    time            seconds since the epoch; None: the import's default
    signal, label   the feedback: a signal of the log, or a bare label in {0, 1}, or both, which must agree; None: no feedback
    value           the signal's strength
    event_id        None: a hash of the impression's id and time
    """

    prompt: str
    response: str
    id: str | None = None
    policy_version: int = 0
    time: float | None = None
    user: str | None = None
    context: Mapping[str, str] = field(default_factory=dict)
    signal: str | None = None
    label: float | None = None
    value: float = 1.0
    event_id: str | None = None


class Format(Protocol):
    """A format of logs. Its class is what `registry.FORMATS` holds; each import makes an instance, without arguments.

    `columns` are those that it reads: the import reports the others as ignored.
    """

    columns: frozenset[str]

    def read(self, fields: Mapping[str, Any]) -> Iterable[LoggedImpression]:
        """The answers of one row, at least one. `fields` are its `columns` whose value is not null.

        Raises `sources.RowError`, which names field, rule and value, to refuse the row: the whole row is quarantined with it.
        """
        ...


def load_format(name: str) -> Format:
    """An instance of the format of a name or import path. Raises InputError for what is none."""
    try:
        target = FORMATS.load(name)
    except ValueError as error:
        raise InputError(f"feedback.format: {error}") from error
    return target() if callable(target) else target
