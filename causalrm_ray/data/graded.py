"""Graded data sets: rows (prompt, response, level), of which a higher level is the better answer, told apart by their columns.

source --splits--> read_rows --Format.parse--> GradedRow, one or two a row
                                  +-- bad row --> Quarantine

A split of a data set's own is kept; where it has none, rows go to the test split by a hash of their prompt.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import get_dataset_split_names
from datasets.exceptions import DatasetNotFoundError

from causalrm_ray.data.sources import (
    Quarantine,
    RawRow,
    RowError,
    SourceError,
    data_files,
    prompt_text,
    read_rows,
    row_fields,
    turn_text,
)

Split = Literal["train", "test"]
Answer = tuple[str, str, float]  # prompt, response, level
FORMAT_ROWS = 100  # rows whose columns tell the format
TEST_ONE_IN = 5
SPLITS: dict[Split, tuple[str, ...]] = {"train": ("train_prefs", "train"), "test": ("test_prefs", "test", "validation")}
_LARGEST = float(np.finfo(np.float32).max)  # levels are float32 where they are read
_SPLIT_NAME = re.compile(r"(?<![a-z])(train|test|validation)(_[a-z]+)?(?![a-z])")


@dataclass(frozen=True, slots=True)
class GradedRow:
    """An answer and how good it is. `where` and `number` are those of the row that it came from."""

    split: Split
    prompt: str
    response: str
    level: float
    where: str
    number: int


@dataclass(frozen=True, slots=True)
class Format:
    """A data set's schema: the columns that tell it, and what becomes of a row. `parse` raises RowError."""

    columns: frozenset[str]
    parse: Callable[[RawRow], list[Answer]]


def read_graded(source: str, quarantine: Quarantine, *, format: str = "auto", test: str | None = None) -> Iterator[GradedRow]:
    """The answers of `source` (see `sources.read_rows`), as they are read: training rows first where splits are the source's own.

    `test` is a source of its own for the test split; none takes the data set's (`SPLITS`; other splits are left alone), or, where
    it has none, one prompt in TEST_ONE_IN by a hash of the prompt. A row that breaks a rule goes to `quarantine`, whole.
    Raises SourceError where a source is unreadable, its format unknown, or no row good.
    """
    found = splits(source)
    own = {name: _first(found, SPLITS[name]) for name in SPLITS}
    if not own["train"]:
        raise SourceError(f"{source} must have a split among {list(SPLITS['train'])}, got {sorted(found)}")
    if test is not None:
        named = splits(test)
        own["test"] = _first(named, SPLITS["test"]) or _first(named, SPLITS["train"])
    schema = FORMATS[find_format(source, own["train"]) if format == "auto" else format]
    rows = good = 0
    for split, parts in own.items():
        for row in itertools.chain.from_iterable(itertools.starmap(read_rows, parts)):
            rows += 1
            try:
                answers = [_checked(answer) for answer in schema.parse(row)]
            except RowError as error:
                quarantine.refuse(row.where, row.number, str(error), row.text)
                continue
            for prompt, response, level in answers:
                good += 1
                side = split if own["test"] else split_of(prompt)
                yield GradedRow(side, prompt, response, level, row.where, row.number)
    if not good:
        told = f"; the first: {quarantine.first_fault}" if rows else ""
        raise SourceError(f"{source} must hold at least one good row, got {rows} rows, all bad{told}")


def split_of(prompt: str) -> Split:
    """Where the rows of a prompt go if their data set has no test split: by a hash, so that no prompt is on both sides."""
    return "test" if zlib.crc32(prompt.encode()) % TEST_ONE_IN == 0 else "train"


def splits(source: str) -> dict[str, list[tuple[str, str]]]:
    """What `read_rows` is to be given for each split, by name. A single file, or file names that tell nothing, are "train"."""
    path = Path(source)
    if path.is_file() or (path / "state.json").is_file():
        return {"train": [(source, "train")]}
    if (path / "dataset_dict.json").is_file():
        try:
            names = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            return {name: [(source, name)] for name in names}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise SourceError(f"{path / 'dataset_dict.json'} must be JSON that lists `splits`: {error!r}") from error
    found: dict[str, list[tuple[str, str]]] = {}
    for file in data_files(path):
        told = _SPLIT_NAME.search(file.name.lower())
        found.setdefault(told[0] if told else "train", []).append((str(file), "train"))
    if found:
        return found
    try:
        return {name: [(source, name)] for name in get_dataset_split_names(source)}
    except (OSError, ValueError, DatasetNotFoundError) as error:
        raise SourceError(
            f"source {source} must be a JSONL or Parquet file, a folder of them, a `datasets` folder or a hub id:"
            f" {type(error).__name__}: {error}"
        ) from error


def find_format(source: str, parts: Sequence[tuple[str, str]]) -> str:
    """The key of FORMATS whose columns the first rows have. Raises SourceError."""
    rows = itertools.islice(itertools.chain.from_iterable(itertools.starmap(read_rows, parts)), FORMAT_ROWS)
    columns = {name for row in rows for name in row.fields or ()}
    for name, schema in FORMATS.items():
        if schema.columns <= columns:
            return name
    known = "; ".join(f"{name}: {', '.join(sorted(schema.columns))}" for name, schema in FORMATS.items())
    raise SourceError(f"{source} must have the columns of a known format ({known}), got {sorted(columns)}")


def _helpsteer(row: RawRow) -> list[Answer]:
    """HelpSteer (arXiv 2311.09528): `helpfulness` 0..4."""
    fields = row_fields(row)
    return [(prompt_text(row), turn_text(fields, "response", "assistant"), _number(fields, "helpfulness", 0, 4))]


def _ultrafeedback(row: RawRow) -> list[Answer]:
    """UltraFeedback (arXiv 2310.01377), binarized: `chosen` and `rejected`, chat messages, with scores of 1..10.

    The score is the level as it is: rounding would make equal what the judge told apart, and simulations rescale by themselves.
    """
    fields = row_fields(row)
    prompt = prompt_text(row)
    pairs = (("chosen", "score_chosen"), ("rejected", "score_rejected"))
    return [(prompt, turn_text(fields, answer, "assistant"), _number(fields, score, 1, 10)) for answer, score in pairs]


def _safe_rlhf(row: RawRow) -> list[Answer]:
    """PKU-SafeRLHF (arXiv 2406.15513): two answers with severity levels of harm 0..3; the level is 3 - severity."""
    fields = row_fields(row)
    prompt = prompt_text(row)
    return [
        (prompt, turn_text(fields, f"response_{side}", "assistant"), 3 - _number(fields, f"response_{side}_severity_level", 0, 3))
        for side in (0, 1)
    ]


def _generic(row: RawRow) -> list[Answer]:
    """Any finite `score`."""
    fields = row_fields(row)
    return [(prompt_text(row), turn_text(fields, "response", "assistant"), _number(fields, "score", -_LARGEST, _LARGEST))]


FORMATS = {  # those with the most telling columns first
    "ultrafeedback": Format(frozenset({"prompt", "chosen", "rejected", "score_chosen", "score_rejected"}), _ultrafeedback),
    "pku_safe_rlhf": Format(
        frozenset({"prompt", *(f"response_{side}{rest}" for side in (0, 1) for rest in ("", "_severity_level"))}), _safe_rlhf
    ),
    "helpsteer": Format(frozenset({"prompt", "response", "helpfulness"}), _helpsteer),
    "generic": Format(frozenset({"prompt", "response", "score"}), _generic),
}


def _first(found: Mapping[str, list[tuple[str, str]]], names: Sequence[str]) -> list[tuple[str, str]]:
    return next((found[name] for name in names if name in found), [])


def _number(fields: Mapping[str, Any], column: str, low: float, high: float) -> float:
    value = fields.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise RowError(f"{column} must be a finite number, got {value!r:.80}")
    if not low <= value <= high:
        raise RowError(f"{column} must be in [{low:g}, {high:g}], got {value!r:.80}")
    return float(value)


def _checked(answer: Answer) -> Answer:
    """What can be written to Parquet: no half of a surrogate pair, which JSON lets through."""
    for name, text in zip(("prompt", "response"), answer[:2], strict=True):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(f"{name} must be valid Unicode, got {text!r:.80}") from error
    return answer
