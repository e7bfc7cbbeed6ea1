"""Rows of JSON: one object a line, a list of objects, or objects one after the other over several lines each."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Iterator
from functools import partial
from io import BufferedReader

import orjson

from causalrm_ray.data.readers.files import BUFFER, File, check_text, readable
from causalrm_ray.data.readers.part import Part
from causalrm_ray.data.rows import RawRow, SourceError
from causalrm_ray.errors import brief

LONGEST_ROW = 1 << 26  # bytes
_BOM = b"\xef\xbb\xbf"
_SEVERAL_LINES = re.compile(rb'\{\s*\n\s*"')
_BETWEEN = re.compile(r"[\s,]*")
_FINE = {b"null", b"true", b"false", b"0", b"1"}


class JsonPart(Part):
    """A file of JSON."""

    def __init__(self, file: File) -> None:
        super().__init__(file.where)
        self._file = file

    def rows(self) -> Iterator[RawRow]:
        with readable(self.where, "readable JSON"), self._file.open() as stream:
            head = stream.peek(BUFFER).removeprefix(_BOM).lstrip()
            check_text(self.where, head)
            if _is_list(head):
                rows = _values(self.where, stream, listed=True)
            elif _SEVERAL_LINES.match(head):
                rows = _values(self.where, stream, listed=False)
            else:
                rows = (_row(self.where, number, line) for number, line in _lines(self.where, stream))
            for row in rows:
                if row.fields is not None and self._file.partition:
                    row = RawRow(row.where, row.number, row.raw, {**row.fields, **self._file.partition})
                yield row

    def empty(self) -> str:
        """A file of no bytes, or of an empty list."""
        return "the file, or what it packs, is empty"

    def suspects(self, columns: Collection[str]) -> Iterator[RawRow]:
        """By a search in the bytes where a row is a line: much faster than to parse each."""
        names = b"|".join(re.escape(name.encode()) for name in columns)
        values = re.compile(rb'"(?:%s)"\s*:\s*("[^"]*"|[^\s,}]*)' % names)
        with readable(self.where, "readable JSON"), self._file.open() as stream:
            head = stream.peek(BUFFER).removeprefix(_BOM).lstrip()
            if not _is_list(head) and not _SEVERAL_LINES.match(head):
                for number, line in _lines(self.where, stream):
                    if columns and not _FINE.issuperset(values.findall(line)):
                        yield _row(self.where, number, line)
                return
        yield from self.rows()


def _is_list(head: bytes) -> bool:
    """Whether the file is a list of rows, or several; a first line that is another list is a bad row of one object a line."""
    if not head.startswith(b"["):
        return False
    first, _, rest = head.partition(b"\n")
    try:
        found = json.loads(first)
    except (ValueError, RecursionError):
        return True
    return not rest.strip() or not found or any(isinstance(row, dict) for row in found)


def _lines(where: str, stream: BufferedReader) -> Iterator[tuple[int, bytes]]:
    """(number, line) of the lines that are not blank."""
    for number, line in enumerate(iter(partial(stream.readline, LONGEST_ROW), b""), 1):
        if len(line) == LONGEST_ROW:
            raise SourceError(f"{where} must have rows of at most {LONGEST_ROW} bytes, got a longer line {number}")
        row = line.removeprefix(_BOM) if number == 1 else line
        if row and not row.isspace():
            yield number, row


def _row(where: str, number: int, line: bytes) -> RawRow:
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError:
        return _slow_row(where, number, line)
    return _as_row(where, number, line, fields)


def _slow_row(where: str, number: int, line: bytes) -> RawRow:
    """What orjson refuses: NaN and numbers beyond 64 bits, which Python reads, and what is no JSON."""
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return RawRow(where, number, line, None, f"row must be JSON in UTF-8: {error.reason} (byte {error.start + 1})")
    except (ValueError, RecursionError) as error:
        return RawRow(where, number, line, None, f"row must be JSON in UTF-8: {error}")
    return _as_row(where, number, line, fields)


def _as_row(where: str, number: int, line: bytes, fields: object) -> RawRow:
    if not isinstance(fields, dict):
        return RawRow(where, number, line, None, f"row must be a JSON object, got {brief(fields)}")
    return RawRow(where, number, line, fields)


def _values(where: str, stream: BufferedReader, listed: bool) -> Iterator[RawRow]:
    """The objects of a list, or of a text of several, one at a time: never more than a buffer of the file is held.

    After an object that is no JSON nothing else can be read, so that it refuses the whole file.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    scan = json.JSONDecoder().raw_decode
    text, place, number, ended = "", 0, 0, False

    def more() -> str:
        nonlocal ended
        read = stream.read(max(BUFFER, len(text) - place))
        ended = not read
        return text[place:] + decode(read, ended)

    text = more().lstrip()
    place, inside = (1, True) if listed else (0, False)  # inside of a list
    while True:
        between = _BETWEEN.match(text, place)
        place = between.end() if between else place
        if place == len(text) and not ended:
            text, place = more(), 0
            continue
        mark = text[place : place + 1]
        if listed and mark == ("]" if inside else "["):
            place, inside = place + 1, not inside  # exports of several pages are several lists
            continue
        if place == len(text):
            if inside:
                raise SourceError(f"{where} must end its list with ']', but it ends after {number} rows: copy or export it again")
            return
        if listed and not inside:
            raise SourceError(f"{where} must hold lists of rows and nothing else, got more after the list of {number} rows")
        try:
            fields, end = scan(text, place)
        except (ValueError, RecursionError) as error:
            if not ended and len(text) - place < LONGEST_ROW:
                text, place = more(), 0
                continue
            reason = getattr(error, "msg", "too deep")
            raise SourceError(f"{where} must be JSON: its object {number + 1} cannot be read: {reason}") from error
        if end == len(text) and not ended and not isinstance(fields, dict):
            text, place = more(), 0  # a number may go on
            continue
        number += 1
        yield _object(where, number, text[place:end], fields)
        place = end


def _object(where: str, number: int, text: str, fields: object) -> RawRow:
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raw = text.encode(errors="surrogateescape")
        return RawRow(where, number, raw, None, f"row must be JSON in UTF-8: invalid byte at character {error.start + 1}")
    if not isinstance(fields, dict):
        return RawRow(where, number, text, None, f"row must be a JSON object, got {brief(fields)}")
    return RawRow(where, number, text, fields)
