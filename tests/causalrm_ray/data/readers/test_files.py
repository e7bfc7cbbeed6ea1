"""Files of every kind and packing give the same rows; a folder is read whole or refused; what is missing is named at once."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from causalrm_ray.data.rows import SourceError
from causalrm_ray.data.sources import looks_like_hub_id, parts, read_rows

ROWS = [
    {"id": "a", "prompt": 'say "hi",\nthen é', "response": "r" * 2000},
    {"id": "b", "prompt": "x", "response": "1"},
    {"id": "c", "prompt": "y\r\nz", "response": "true"},
]


def _csv(delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def _parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    return file.getvalue()


def _zst(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


KINDS: dict[str, Callable[[], bytes]] = {
    ".jsonl": lambda: "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    ".ndjson": lambda: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode(),
    " a line.json": lambda: "\n".join(json.dumps(row) for row in ROWS).encode(),
    " list.json": lambda: json.dumps(ROWS).encode(),
    " indented.json": lambda: b"\xef\xbb\xbf\n" + json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    " several lines.json": lambda: "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    ".csv": lambda: b"\xef\xbb\xbf" + _csv(","),
    ".tsv": lambda: _csv("\t"),
    " semicolons.csv": lambda: _csv(";"),
    ".parquet": _parquet,
}
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": _zst,
}


def fields(source: str | list[str]) -> list[Any]:
    return [row.fields for row in read_rows(source)]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_packing_gives_the_same_rows(kind: str, packing: str, tmp_path: Path) -> None:
    path = tmp_path / f"log{kind}{packing}"
    path.write_bytes(PACKINGS[packing](KINDS[kind]()))
    assert fields(str(path)) == ROWS


def test_packed_members_one_after_the_other_are_all_read(tmp_path: Path) -> None:
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    for name, pack in list(PACKINGS.items())[1:]:
        path = tmp_path / f"log.jsonl{name}"
        path.write_bytes(b"".join(pack(line) for line in lines))
        assert fields(str(path)) == ROWS, name


def test_what_is_packed_without_saying_so_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(gzip.compress(KINDS[".jsonl"]()))
    assert fields(str(tmp_path / "log.jsonl")) == ROWS


def test_a_folder_holds_files_of_several_kinds_and_packings_and_each_is_read(tmp_path: Path) -> None:
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (tmp_path / "1.jsonl").write_text(lines[0])
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "2.jsonl.gz").write_bytes(gzip.compress(lines[1].encode()))
    pq.write_table(pa.Table.from_pylist(ROWS[2:]), tmp_path / "deep" / "3.parquet")
    (tmp_path / "README.md").write_text("a log")
    assert fields(str(tmp_path)) == ROWS
    assert fields([str(tmp_path / "1.jsonl"), str(tmp_path / "deep")]) == ROWS


def test_a_folder_of_spark_keeps_its_partitions_as_columns(tmp_path: Path) -> None:
    for day, row in zip(("2026-01-01", "a%2Fb", "__HIVE_DEFAULT_PARTITION__"), ROWS, strict=True):
        folder = tmp_path / f"day={day}" / "kind=x"
        folder.mkdir(parents=True)
        (folder / ".part-00000.crc").write_bytes(b"\0")
        if day == "a%2Fb":
            (folder / "part-00000-4f.c000.json.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
        else:
            pq.write_table(pa.Table.from_pylist([row]), folder / "part-00000-4f.c000.snappy.parquet")
    for name in ("_SUCCESS", "_committed_123", "_started_123", "._SUCCESS.crc"):
        (tmp_path / name).write_bytes(b"")
    days = [None, "2026-01-01", "a/b"]
    expected = [{**row, "day": day, "kind": "x"} for day, row in zip(days, (ROWS[2], ROWS[0], ROWS[1]), strict=True)]
    found = sorted(fields(str(tmp_path)), key=lambda row: str(row["day"]))
    assert sorted(expected, key=lambda row: str(row["day"])) == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("2.docx", r"must hold only files of rows .*, got 2\.docx: move it out of the folder, or convert it"),
        ("part-00001", r"got part-00001: move it"),
        ("_temporary/0/part-0.jsonl", r"got _temporary/0/part-0\.jsonl: move it"),
        ("_old.jsonl", r"got _old\.jsonl: move it"),
        ("_delta_log/0.json", "got a Delta table"),
    ],
)
def test_a_folder_with_a_file_that_cannot_be_read_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_text("{}\n")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceError, match=message):
        parts(str(tmp_path))


def test_an_empty_folder_and_a_file_named_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"must hold files of rows .* got none"):
        parts(str(tmp_path))
    with pytest.raises(SourceError, match="must name a source, got none"):
        parts([])
    (tmp_path / "1.jsonl").write_text("{}\n")
    with pytest.raises(SourceError, match=r"must name each file once, got .*1\.jsonl several times"):
        parts([str(tmp_path), str(tmp_path / "1.jsonl")])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("logs/feedbak.jsonl", r"no such file or folder; did you mean .*logs/feedback\.jsonl\?"),
        ("logs/zzz", "logs/zzz: no such file or folder$"),
        ("lgos/feedback.jsonl", "no such file or folder; the folder .*lgos is missing"),
        ("nowhere/feedback.parquet", "no such file or folder"),
        ("imdb", "imdb: no such file or folder"),
    ],
)
def test_what_is_missing_is_named_and_no_hub_is_asked(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "feedback.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    for asked in ("load_dataset", "load_from_disk"):
        monkeypatch.setattr(f"causalrm_ray.data.readers.parquet_part.{asked}", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(SourceError, match=message):
        list(read_rows(name))
    with pytest.raises(SourceError, match=message):
        list(read_rows(str(tmp_path / name) if name != "imdb" else name))


def test_a_hub_id_is_owner_and_name_and_nothing_that_could_be_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert looks_like_hub_id("allenai/WildChat-1M")
    for path in ("imdb", "/a/b", "./a", "../a/b", "~/a", "a/b/c", "here/log", "owner/log.jsonl", "owner/log.csv.gz", "s3://a/b"):
        assert not looks_like_hub_id(path), path


def test_a_hub_id_is_read_by_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, split: str) -> Dataset:
        asked.append((name, split))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("causalrm_ray.data.readers.parquet_part.load_dataset", load)
    assert fields("owner/name") == ROWS
    assert asked == [("owner/name", "train")]


def test_values_of_parquet_are_as_json_has_them(tmp_path: Path) -> None:
    columns = {
        "stars": pa.array([Decimal("4.5")], pa.decimal128(5, 2)),
        "day": pa.array([date(2026, 1, 2)]),
        "time": pa.array([datetime(2026, 1, 2)], pa.timestamp("us")),
        "context": pa.array([[("device", "tv")]], pa.map_(pa.string(), pa.string())),
        "id": pa.array([b"a"]),
        "kind": pa.array(["k"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    assert fields(str(tmp_path / "log.parquet")) == [
        {"stars": 4.5, "day": "2026-01-02", "time": datetime(2026, 1, 2), "context": {"device": "tv"}, "id": "a", "kind": "k"}
    ]
