"""JSON is streamed: whatever the shape and wherever a buffer ends, the rows are those that json.loads gives."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from causalrm_ray.data.readers import json_part
from causalrm_ray.data.readers.files import File
from causalrm_ray.data.readers.json_part import JsonPart
from causalrm_ray.data.rows import RawRow, SourceError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), VALUES, max_size=4), max_size=6)


def read(path: Path) -> list[RawRow]:
    return list(JsonPart(File(str(path), str(path))).rows())


@given(ROWS, st.sampled_from([None, 0, 3]), st.booleans(), st.integers(1, 40))
def test_a_list_is_read_as_json_reads_it_wherever_buffers_end(
    rows: list[Any], indent: int | None, ascii: bool, buffer: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_part, "BUFFER", buffer)
        path = Path(folder) / "log.json"
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii), encoding="utf-8")
        found = read(path)
    assert [row.fields for row in found] == rows
    assert [row.number for row in found] == list(range(1, len(rows) + 1))
    assert [json.loads(row.text) for row in found] == rows


def test_a_list_is_never_held_whole(tmp_path: Path) -> None:
    row = {"prompt": "p" * 500, "response": "r" * 500}
    path = tmp_path / "log.json"
    path.write_text(json.dumps([row] * 30_000, indent=1))
    tracemalloc.start()
    count = sum(1 for _ in JsonPart(File(str(path), str(path))).rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 30_000
    assert path.stat().st_size > 30_000_000
    assert peak < 16 << 20


def test_a_bad_line_is_one_row_and_a_first_line_that_is_a_list_too(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'[1]\n{"a": 1}\n\n{"a": \n{"a": "\xff"}\n3\n')
    found = read(path)
    assert [(row.number, row.fields) for row in found] == [(1, None), (2, {"a": 1}), (4, None), (5, None), (6, None)]
    assert found[0].fault == "row must be a JSON object, got a list of 1 items"
    assert found[3].fault == "row must be JSON in UTF-8: invalid start byte (byte 8)"
    assert found[4].fault == "row must be a JSON object, got 3"


@pytest.mark.parametrize("buffer", [1, 2, 3, 1000])
def test_lists_one_after_the_other_are_all_read(buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_part, "BUFFER", buffer)
    path = tmp_path / "log.json"
    path.write_text('[{"a": 1}, {"a": 2}]\n[]\n[{"a": 3}\n]\n')
    assert [row.fields for row in read(path)] == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_a_bad_byte_in_a_list_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_bytes(b'[{"a": "\xff"}, {"a": 1}, 7]')
    found = read(path)
    assert [row.fields for row in found] == [None, {"a": 1}, None]
    assert found[0].text == '{"a": "\\xff"}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": 2}', r"must end its list with '\]', but it ends after 2 rows: copy or export it again"),
        ('[{"a": 1}, {"a": 2', "must be JSON: its object 2 cannot be read: Expecting ',' delimiter"),
        ('[{"a": 1}, {a: 2}]', "must be JSON: its object 2 cannot be read"),
        ('[{"a": 1}] {"a": 2}', "must hold lists of rows and nothing else, got more after the list of 1 rows"),
        ("<!DOCTYPE html><html>", "got HTML or XML, often the page of a login or an error: download it again"),
        ("\ufeff  <html>", "got HTML or XML"),
    ],
)
def test_what_cannot_be_read_on_refuses_the_file(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SourceError, match=message):
        read(path)


def test_a_longer_row_than_any_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_part, "LONGEST_ROW", 50)
    monkeypatch.setattr(json_part, "BUFFER", 10)
    (tmp_path / "log.jsonl").write_text(json.dumps({"a": 1}) + "\n" + json.dumps({"a": "x" * 60}))
    with pytest.raises(SourceError, match="rows of at most 50 bytes, got a longer line 2"):
        read(tmp_path / "log.jsonl")
    (tmp_path / "log.json").write_text(json.dumps([{"a": "x" * 600}]))
    with pytest.raises(SourceError, match="object 1 cannot be read"):
        read(tmp_path / "log.json")


LABELS: list[Any] = [None, 0, 1, True, False, 2, 0.5, 1.0, "1", "up", [], {}]


@given(st.lists(st.fixed_dictionaries({"a": st.text(max_size=5)}, optional={"label": st.sampled_from(LABELS)}), max_size=8))
def test_no_row_of_an_unusual_label_is_missed_by_the_search_for_them(rows: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = [row.number for row in JsonPart(File(str(path), str(path))).suspects(["label"])]
    unusual = [number for number, row in enumerate(rows, 1) if repr(row.get("label")) not in ("None", "0", "1", "True", "False")]
    assert set(unusual) <= set(found)
    assert all("label" in rows[number - 1] for number in found)
