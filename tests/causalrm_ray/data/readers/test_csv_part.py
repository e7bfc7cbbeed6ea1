"""CSV: cells are text, a bad row is one row, and what separates the columns is seen in the header."""

from __future__ import annotations

from pathlib import Path

import pytest

from causalrm_ray.data.readers.csv_part import CsvPart
from causalrm_ray.data.readers.files import File
from causalrm_ray.data.rows import RawRow, SourceError


def read(path: Path, data: str | bytes) -> tuple[list[RawRow], list[str]]:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    part = CsvPart(File(str(path), str(path)))
    return list(part.rows()), part.notes


def test_cells_are_text_and_empty_ones_are_null(tmp_path: Path) -> None:
    rows, notes = read(tmp_path / "a.csv", 'id,label,note\n007,1,"a ""b"",\nc"\n\n8,,""\n')
    assert [row.fields for row in rows] == [
        {"id": "007", "label": "1", "note": 'a "b",\nc'},
        {"id": "8", "label": None, "note": None},
    ]
    assert ([row.number for row in rows], notes) == ([1, 2], [])


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_another_delimiter_is_taken_where_the_header_shows_it(mark: str, name: str, tmp_path: Path) -> None:
    rows, notes = read(tmp_path / "a.csv", f'id{mark}text\n1{mark}"a, b"\n')
    assert [row.fields for row in rows] == [{"id": "1", "text": "a, b"}]
    assert notes == [f"{tmp_path}/a.csv: columns are separated by {name}"]


def test_a_row_of_another_length_or_of_bad_bytes_is_one_row(tmp_path: Path) -> None:
    rows, _ = read(tmp_path / "a.csv", b"id,text\n1;x\n2,y,z\n3,\xff\n4,w\n")
    assert [row.fields for row in rows] == [None, None, None, {"id": "4", "text": "w"}]
    assert rows[0].fault == "row must have the 2 columns of the header, got 1: is a quote or the delimiter wrong?"
    assert rows[2].fault == "row must be in UTF-8: invalid byte at character 3"
    assert rows[2].text == "3,\\xff"


def test_long_answers_are_read(tmp_path: Path) -> None:
    rows, _ = read(tmp_path / "a.csv", "id,text\n1," + "x" * 300_000 + "\n")
    assert len(rows[0].fields["text"]) == 300_000  # type: ignore[index]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("id,text,id\n1,2,3\n", "must name each column once, got 'id' several times: rename one"),
        ('id,text\n1,"never closed\n', "must be CSV, but row 1 below the header is not: unexpected end of data"),
        ("<html><body>", "got HTML or XML"),
        (b"\xff\xfei\0d\0", "got text in UTF-16: convert it with `iconv"),
        (b"PK\x03\x04xl", "got a ZIP archive, as .xlsx files are too: unpack it, or export the sheet as CSV"),
        (b"PAR1xxxx", "got Parquet: name it .parquet"),
    ],
)
def test_what_is_no_csv_is_refused_with_what_to_do(data: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message):
        read(tmp_path / "a.csv", data)
