"""Rows of CSV and TSV: every cell a text, an empty one null. What a column means, and so its type, is the format's business."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator

from causalrm_ray.data.readers.files import BUFFER, File, check_text, readable
from causalrm_ray.data.readers.part import Part
from causalrm_ray.data.rows import RawRow, SourceError

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


class CsvPart(Part):
    """A file whose first row names the columns; cells may hold line breaks in quotes. Rows are counted below the header."""

    def __init__(self, file: File) -> None:
        super().__init__(file.where)
        self._file = file
        self._usual = "\t" if file.kind == "tsv" else ","

    def rows(self) -> Iterator[RawRow]:
        csv.field_size_limit(sys.maxsize)  # of the process: the module has 128 KiB, and answers are longer
        with readable(self.where, "readable CSV"), self._file.open() as stream:
            head = stream.peek(BUFFER)
            check_text(self.where, head)
            lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
            reader = csv.reader(lines, delimiter=self._delimiter(head), strict=True)
            number = 0
            try:
                columns = self._columns(next(reader, []))
                for number, cells in enumerate(filter(None, reader), 1):
                    yield self._row(number, columns, cells)
            except csv.Error as error:
                raise SourceError(f"{self.where} must be CSV, but row {number + 1} below the header is not: {error}") from error

    def empty(self) -> str:
        """A header alone is no row."""
        return "the file is empty or holds a header alone"

    def _delimiter(self, head: bytes) -> str:
        """The usual one, unless only another one separates columns in the header."""
        header = next(iter(head.decode("utf-8-sig", errors="replace").splitlines()), "")
        found = [mark for mark in _DELIMITERS if len(next(csv.reader([header], delimiter=mark), [])) > 1]
        if self._usual in found or len(found) != 1:
            return self._usual
        note = f"{self.where}: columns are separated by {_DELIMITERS[found[0]]}"
        self.notes = [note]
        return found[0]

    def _columns(self, header: list[str]) -> list[str]:
        columns = [name.strip() or f"column {place}" for place, name in enumerate(header, 1)]
        if twice := sorted({name for name in columns if columns.count(name) > 1}):
            raise SourceError(f"{self.where} must name each column once, got {twice[0]!r} several times: rename one")
        return columns

    def _row(self, number: int, columns: list[str], cells: list[str]) -> RawRow:
        text = self._usual.join(cells)
        try:
            text.isascii() or text.encode()
        except UnicodeEncodeError as error:
            raw = text.encode(errors="surrogateescape")
            return RawRow(self.where, number, raw, None, f"row must be in UTF-8: invalid byte at character {error.start + 1}")
        if len(cells) != len(columns):
            fault = (
                f"row must have the {len(columns)} columns of the header, got {len(cells)}: is a quote or the delimiter wrong?"
            )
            return RawRow(self.where, number, text, None, fault)
        fields = {name: cell or None for name, cell in zip(columns, cells, strict=True)}
        return RawRow(self.where, number, None, {**fields, **self._file.partition})
