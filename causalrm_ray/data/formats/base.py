"""What a feedback format is: it reads the rows of a source as answers that were shown and as what users did about them.

source --read_rows--> RawRow.fields --Format.read--> LoggedImpression, LoggedEvent ... --import_log--> Impression, FeedbackEvent
                                         |                    +-- Format.finish, after the last row
                                         +-- RowError --> quarantine
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from causalrm_ray.conversation import Conversation
from causalrm_ray.errors import InputError
from causalrm_ray.registry import FORMATS

FIRST_ROWS = 100  # that a format is recognised by
LABEL_WORDS = {"1": 1, "1.0": 1, "true": 1, "yes": 1, "0": 0, "0.0": 0, "false": 0, "no": 0}  # in small letters


@dataclass(slots=True)  # not frozen: that takes three times as long to make, and an import makes millions
class LoggedEvent:
    """One thing that a user did about an answer. The import checks every field and fills in those that are None.

    impression_id   None: the LoggedImpression that holds the event; must be given for an event of its own row
    signal, label   a signal of the log, or a bare label in {0, 1}, or both, which must agree
    score           or the name of a score in the system that the log comes from: the signal of that name in feedback.signals says
                    what it means; where there is none, `label` does; without it, the import refuses the whole source
    value           the signal's strength: stars, seconds, a score; None: 1.0, of a signal that is only there or not
    id              None: a hash of impression, signal and time
    time            seconds since the epoch; None: the impression's, or the import's default for an event of its own row
    retracts        the id of the event that this one withdraws; signal and label are None then
    """

    signal: str | None = None
    label: float | None = None
    value: float | None = None
    id: str | None = None
    time: float | None = None
    retracts: str | None = None
    impression_id: str | None = None
    score: str | None = None


@dataclass(slots=True)
class LoggedImpression:
    """One answer that was shown, and what is known of it. The import checks every field and fills in those that are None.

    prompt          what the answer replies to: a text, which is one turn of a user, messages in OpenAI's form, or a Conversation
    id              None: a hash of the row and of how many equal rows precede it; equal rows are different impressions
    time            seconds since the epoch; None: the import's default
    events          what was done about it, in any order; other rows may bring more
    """

    prompt: str | Sequence[Mapping[str, Any]] | Conversation
    response: str
    id: str | None = None
    policy_version: int = 0
    time: float | None = None
    user: str | None = None
    context: Mapping[str, str] = field(default_factory=dict)
    conversation_id: str | None = None
    model: str | None = None
    logprob: float | None = None
    asked_for_feedback: bool | None = None
    events: Sequence[LoggedEvent] = ()


def content_of(logged: LoggedImpression | LoggedEvent) -> dict[str, Any]:
    """The fields of a record as values that JSON keeps."""
    found = {name: getattr(logged, name) for name in logged.__slots__}
    if isinstance(logged, LoggedImpression):
        if isinstance(logged.prompt, Conversation):
            found["prompt"] = {"json": logged.prompt.json}
        found["events"] = [content_of(event) for event in logged.events]
    return found


class Format(Protocol):
    """A format of logs. Its class is what `registry.FORMATS` holds; each import makes an instance, without arguments.

    `columns` are those that it reads: the import reports the others as ignored. One instance reads all files of an import that
    are of its format, so it may join answers in one file with feedback in another.

    More is optional:

    labels: Collection[str]
        its columns that hold labels in {0, 1}, or events with such. The import looks at these alone before it begins; a source in
        a format without `labels` is read twice, the first time to see whether all feedback has a meaning.
    ignored: Mapping[str, int]
        what else rows held that it did not keep, inside of its columns, by name: how often. The import reports it.
    warnings() -> Iterable[str]
        what its user should know about the source, asked for after `finish`; the import reports it.

    finish() -> Iterable[LoggedImpression | LoggedEvent | RowError]
        what it assembled over rows, once, after the last row of all files; a RowError that it yields refuses one such thing and
        goes to the quarantine. A format with `finish` may return nothing from `read`.
    matches(columns, rows) -> float                                                                        a classmethod
        how surely a file is of this format: 0 it is not, 1 no other format looks like this. `columns` are all names of columns
        in the first rows, `rows` those rows without their nulls, at most FIRST_ROWS, at least one. `feedback.format=auto` takes
        the format of the highest value above 0, refuses a tie, and never takes a format without `matches`.
    """

    columns: Container[str]

    def read(self, fields: Mapping[str, Any]) -> Iterable[LoggedImpression | LoggedEvent]:
        """What one row holds, at least one answer or event unless it has `finish`. `fields` are its `columns` that are not null.

        Raises `rows.RowError`, which names field, rule and value, to refuse the row: the whole row is quarantined with it.
        """
        ...


def load_format(name: str) -> Format:
    """An instance of the format of a name or import path. Raises InputError for what is none."""
    try:
        target = FORMATS.load(name)
    except ValueError as error:
        raise InputError(f"feedback.format: {error}") from error
    return target() if callable(target) else target
