"""What a source is made of: parts that are read row by row, each of one kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator

from causalrm_ray.data.rows import RawRow


class Part(ABC):
    """One file, table or split. `where` is what reports call it; `notes` say how it was read, where that is not obvious."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.notes: list[str] = []

    @abstractmethod
    def rows(self) -> Iterator[RawRow]:
        """All rows, in order, each time from the first. Raises SourceError where the part cannot be read."""

    def suspects(self, columns: Collection[str]) -> Iterator[RawRow]:
        """At least the rows that hold in one of `columns` anything but null, true, false, 0 or 1; read to the end of the part."""
        return self.rows()

    def empty(self) -> str:
        """What it is, where it has no row."""
        return ""
