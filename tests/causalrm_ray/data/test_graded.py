"""Graded data sets: small files of each schema, as JSONL, Parquet and a `datasets` folder; bad rows are reported by number."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from causalrm_ray.data.graded import SCHEMAS, read_graded, split_of
from causalrm_ray.data.rows import Quarantine, SourceError


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]


HELPSTEER = {"prompt": "p", "response": "r", "helpfulness": 3, "correctness": 4}
ULTRAFEEDBACK = {
    "prompt": "p",
    "chosen": turns("p", "good"),
    "rejected": turns("p", "bad"),
    "messages": turns("p", "good"),
    "score_chosen": 8.5,
    "score_rejected": 1.0,
}
SAFE_RLHF = {
    "prompt": "p",
    "response_0": "harm",
    "response_1": "none",
    "response_0_severity_level": 3,
    "response_1_severity_level": 0,
    "better_response_id": 1,
}
GENERIC = {"prompt": "p", "response": "r", "score": -0.5}
EXPECTED = {  # schema -> a row, its answers by hand
    "helpsteer": (HELPSTEER, [("p", "r", 3.0)]),
    "ultrafeedback": (ULTRAFEEDBACK, [("p", "good", 8.5), ("p", "bad", 1.0)]),
    "pku_safe_rlhf": (SAFE_RLHF, [("p", "harm", 0.0), ("p", "none", 3.0)]),
    "generic": (GENERIC, [("p", "r", -0.5)]),
}


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def parquet(path: Path, *rows: dict) -> str:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return str(path)


def saved(path: Path, *rows: dict) -> str:
    Dataset.from_list(list(rows)).save_to_disk(str(path))
    return str(path)


def read(source: str, **options: Any) -> tuple[list[tuple[str, str, str, float]], list[dict]]:
    """(split, prompt, response, level) of every answer, and what was quarantined."""
    file = io.StringIO()
    rows = [(row.split, row.prompt, row.response, row.level) for row in read_graded(source, Quarantine(file), **options)]
    return rows, [json.loads(line) for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("write", [jsonl, parquet, saved])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_each_schema_is_recognised_by_its_columns_and_gives_levels(schema: str, write, tmp_path: Path) -> None:
    row, expected = EXPECTED[schema]
    source = write(tmp_path / f"data.{'parquet' if write is parquet else 'jsonl'}", row, {**row, "prompt": "q"})
    rows, bad = read(source)
    assert [answer for _, *answer in rows] == [[*answer] for answer in expected] + [["q", *rest] for _, *rest in expected]
    assert bad == []
    assert read(source, format=schema) == (rows, bad)


CHAT = {**ULTRAFEEDBACK, "prompt": turns("old", "x", "now")}


def test_a_chat_is_asked_by_its_last_user_turn_and_answered_by_the_last_of_the_assistant(tmp_path: Path) -> None:
    row = {**CHAT, "chosen": turns("old", "x", "now", "last")}
    rows, _ = read(jsonl(tmp_path / "d.jsonl", row))
    assert [answer[1:3] for answer in rows] == [("now", "last"), ("now", "bad")]


BAD = [
    ("helpsteer", {"prompt": "p", "response": "r"}, "helpfulness must be a finite number, got None"),
    ("helpsteer", {**HELPSTEER, "helpfulness": float("nan")}, "helpfulness must be a finite number, got nan"),
    ("helpsteer", {**HELPSTEER, "helpfulness": "4"}, "helpfulness must be a finite number, got '4'"),
    ("helpsteer", {**HELPSTEER, "helpfulness": True}, "helpfulness must be a finite number, got True"),
    ("helpsteer", {**HELPSTEER, "helpfulness": 5}, "helpfulness must be in [0, 4], got 5"),
    ("helpsteer", {**HELPSTEER, "response": " "}, "response must be a text that is not empty, got a text of 1 characters"),
    ("helpsteer", {**HELPSTEER, "response": ["r"]}, "response must hold an assistant's turn"),
    ("helpsteer", {**HELPSTEER, "response": "\ud800"}, "response must be valid Unicode"),
    ("helpsteer", {**HELPSTEER, "prompt": None}, "prompt must be a text that is not empty"),
    ("helpsteer", "{no json", "row must be JSON in UTF-8"),
    ("ultrafeedback", {**ULTRAFEEDBACK, "rejected": turns("p")}, "rejected must hold an assistant's turn"),
    ("ultrafeedback", {**ULTRAFEEDBACK, "chosen": turns("p", "")}, "chosen must be a text that is not empty, got ''"),
    ("ultrafeedback", {**ULTRAFEEDBACK, "score_rejected": 0.5}, "score_rejected must be in [1, 10], got 0.5"),
    ("pku_safe_rlhf", {**SAFE_RLHF, "response_1_severity_level": 4}, "response_1_severity_level must be in [0, 3], got 4"),
    ("pku_safe_rlhf", {**SAFE_RLHF, "response_0_severity_level": None}, "response_0_severity_level must be a finite number"),
    ("generic", {**GENERIC, "score": 10**400}, "score must be in"),
    ("generic", '{"prompt": "p", "response": "r", "score": 1e999}', "score must be a finite number, got inf"),
]


@pytest.mark.parametrize(("schema", "bad", "reason"), BAD)
def test_a_bad_row_is_quarantined_whole_with_its_number_and_reason(schema: str, bad: Any, reason: str, tmp_path: Path) -> None:
    good, expected = EXPECTED[schema]
    source = jsonl(tmp_path / "d.jsonl", good, "", bad, good)
    rows, (entry,) = read(source)
    assert len(rows) == 2 * len(expected)
    assert (entry["source"], entry["row"]) == (source, 3)
    assert reason in entry["reason"]


def test_a_source_without_one_good_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"at least one good row, got 2 rows, all bad; the first: .*d.jsonl row 1: prompt must"):
        read(jsonl(tmp_path / "d.jsonl", {**GENERIC, "prompt": ""}, {**GENERIC, "response": ""}))


def test_an_unknown_schema_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"helpsteer: helpfulness, prompt, response.*got \['answer', 'question'\]"):
        read(jsonl(tmp_path / "d.jsonl", {"question": "q", "answer": "a"}))


def test_a_prompt_lies_on_one_side_and_a_fifth_of_them_is_for_testing(tmp_path: Path) -> None:
    rows = [{**GENERIC, "prompt": f"prompt {number}", "score": side} for number in range(2000) for side in (0, 1)]
    found, _ = read(parquet(tmp_path / "d.parquet", *rows))
    sides = {name: {prompt for split, prompt, *_ in found if split == name} for name in ("train", "test")}
    assert not sides["train"] & sides["test"]
    assert len(sides["train"] | sides["test"]) == 2000
    assert abs(len(sides["test"]) / 2000 - 0.2) < 3 * (0.2 * 0.8 / 2000) ** 0.5
    assert {split_of(prompt) for prompt in sides["test"]} == {"test"}


def labelled(name: str) -> dict:
    return {**GENERIC, "prompt": name}


def test_splits_of_a_data_sets_own_are_kept_and_further_ones_left_alone(tmp_path: Path) -> None:
    names = ("train_prefs", "test_prefs", "train_sft", "test_sft")
    DatasetDict({name: Dataset.from_list([labelled(name)]) for name in names}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "files" / "data").mkdir(parents=True)
    for name in names:
        parquet(tmp_path / "files" / "data" / f"{name}-00000-of-00001.parquet", labelled(name))
    for folder in ("saved", "files"):
        rows, _ = read(str(tmp_path / folder))
        assert [(split, prompt) for split, prompt, *_ in rows] == [("train", "train_prefs"), ("test", "test_prefs")]


def test_validation_rows_test_where_there_is_no_test_split(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        jsonl(tmp_path / f"{name}.jsonl", labelled(name))
    assert [row[:2] for row in read(str(tmp_path))[0]] == [("train", "train"), ("test", "validation")]


def test_what_only_the_datasets_library_reads_has_its_splits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "repository").mkdir()
    for name in ("train", "validation"):  # compressed, as HelpSteer's are
        with gzip.open(tmp_path / "repository" / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write(json.dumps({**HELPSTEER, "prompt": name}) + "\n")
    rows, _ = read(str(tmp_path / "repository"))
    assert rows == [("train", "train", "r", 3.0), ("test", "validation", "r", 3.0)]


def test_a_test_split_may_be_a_source_of_its_own(tmp_path: Path) -> None:
    first, second = jsonl(tmp_path / "a.jsonl", labelled("a")), parquet(tmp_path / "b.parquet", labelled("b"))
    assert [row[:2] for row in read(first, test=second)[0]] == [("train", "a"), ("test", "b")]


def test_a_source_without_a_split_to_train_on_is_refused(tmp_path: Path) -> None:
    jsonl(tmp_path / "test.jsonl", GENERIC)
    with pytest.raises(SourceError, match=r"must have a split among \['train_prefs', 'train'\], got \['test'\]"):
        read(str(tmp_path))
