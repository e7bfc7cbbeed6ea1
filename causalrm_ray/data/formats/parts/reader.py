"""What formats of other systems have in common: a shelf for what waits, scores, and a count of what they do not keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from causalrm_ray.data.formats.base import LoggedEvent, LoggedImpression
from causalrm_ray.data.formats.parts.scores import Scores
from causalrm_ray.data.formats.parts.shelf import Shelf
from causalrm_ray.data.rows import RowError

Found = LoggedImpression | LoggedEvent | RowError


class Reader:
    """A format whose events may be numbers on a scale that is only known at the end."""

    columns: Container[str] = frozenset()

    def __init__(self) -> None:
        self.ignored: Counter[str] = Counter()
        self.shelf = Shelf()
        self.scores = Scores(self.shelf)

    def read(self, fields: Mapping[str, Any]) -> Iterable[LoggedImpression | LoggedEvent]:
        raise NotImplementedError

    def finish(self) -> Iterator[Found]:
        """Answers and events that waited."""
        yield from self.scores.finish()

    def ignore(self, what: str, value: Any = True) -> None:
        """Count a value that is not kept, if there is one."""
        if value not in (None, "", [], {}):
            self.ignored[what] += 1
