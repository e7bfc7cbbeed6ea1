"""Graded data sets: rows (prompt, response, level), a higher level for a better answer, in the schema that their columns show.

source --splits--> read_rows --Schema--> GradedRow, one or two a row
                                 +-- bad row --> Quarantine

A split of a data set's own is kept; where it has none, rows go to the test split by a hash of their prompt.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import get_dataset_split_names
from datasets.exceptions import DatasetNotFoundError

from causalrm_ray.data.rows import Quarantine, RowError, SourceError, row_fields, turn_text
from causalrm_ray.data.sources import check_exists, data_files, read_rows
from causalrm_ray.errors import brief

Split = Literal["train", "test"]
SCHEMA_ROWS = 100  # rows whose columns show the schema
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
class Schema:
    """A `prompt`, and the columns of each answer and of its score, in [low, high]; of `harm` the level is high - score."""

    answers: tuple[tuple[str, str], ...]
    low: float
    high: float
    harm: bool = False

    @property
    def columns(self) -> set[str]:
        """The columns that a data set of this schema has."""
        return {"prompt", *itertools.chain.from_iterable(self.answers)}

    def read(self, fields: Mapping[str, Any]) -> list[tuple[str, str, float]]:
        """(prompt, response, level) of the answers of a row. Raises RowError."""
        prompt = turn_text(fields, "prompt", "user")
        found = []
        for answer, score in self.answers:
            response, number = turn_text(fields, answer, "assistant"), _number(fields, score, self.low, self.high)
            found.append((prompt, response, self.high - number if self.harm else number))
        return found


SCHEMAS = {  # those with the most specific columns first
    # UltraFeedback (arXiv 2310.01377), binarized. Scores are not rounded: that would make equal what the judge did not.
    "ultrafeedback": Schema((("chosen", "score_chosen"), ("rejected", "score_rejected")), 1, 10),
    # PKU-SafeRLHF (arXiv 2406.15513): severity levels of harm
    "pku_safe_rlhf": Schema(tuple((f"response_{n}", f"response_{n}_severity_level") for n in (0, 1)), 0, 3, harm=True),
    "helpsteer": Schema((("response", "helpfulness"),), 0, 4),  # HelpSteer (arXiv 2311.09528)
    "generic": Schema((("response", "score"),), -_LARGEST, _LARGEST),
}


def read_graded(source: str, quarantine: Quarantine, *, format: str = "auto", test: str | None = None) -> Iterator[GradedRow]:
    """The answers of `source` (see `sources.read_rows`), as they are read: training rows first where splits are the source's own.

    `format` is a key of SCHEMAS, or "auto": the first whose columns are there. `test` is a source of its own for the test split;
    None takes the data set's (`SPLITS`; other splits are ignored), or, where it has none, one prompt in TEST_ONE_IN by a hash of
    the prompt. A row that breaks a rule goes to `quarantine`, whole.
    Raises SourceError where a source is unreadable, its schema unknown, or no row good.
    """
    found = splits(source)
    own = {name: _first(found, SPLITS[name]) for name in SPLITS}
    if not own["train"]:
        raise SourceError(f"{source} must have a split among {list(SPLITS['train'])}, got {sorted(found)}")
    if test is not None:
        named = splits(test)
        own["test"] = _first(named, SPLITS["test"]) or _first(named, SPLITS["train"])
    schema = SCHEMAS[_find_schema(source, own["train"]) if format == "auto" else format]
    rows = good = 0
    for split, parts in own.items():
        for row in itertools.chain.from_iterable(itertools.starmap(read_rows, parts)):
            rows += 1
            try:
                answers = schema.read(row_fields(row))
            except RowError as error:
                quarantine.refuse(row.where, row.number, str(error), row.text)
                continue
            for prompt, response, level in answers:
                good += 1
                side = split if own["test"] else split_of(prompt)
                yield GradedRow(side, prompt, response, level, row.where, row.number)
    if not good:
        first = f"; the first: {quarantine.first_fault}" if rows else ""
        raise SourceError(f"{source} must hold at least one good row, got {rows} rows, all bad{first}")


def split_of(prompt: str) -> Split:
    """Where the rows of a prompt go if their data set has no test split: by a hash, so that no prompt is on both sides."""
    return "test" if zlib.crc32(prompt.encode()) % TEST_ONE_IN == 0 else "train"


def splits(source: str) -> dict[str, list[tuple[str, str]]]:
    """What `read_rows` is to be given for each split, by name. A single file, or files named after no split, are "train"."""
    path = Path(source)
    if path.is_file() or (path / "state.json").is_file():
        return {"train": [(source, "train")]}
    check_exists(source)
    if (path / "dataset_dict.json").is_file():
        try:
            names = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            return {name: [(source, name)] for name in names}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise SourceError(f"{path / 'dataset_dict.json'} must be JSON that lists `splits`: {error!r}") from error
    found: dict[str, list[tuple[str, str]]] = {}
    for file in data_files(path):
        name = _SPLIT_NAME.search(file.name.lower())
        found.setdefault(name[0] if name else "train", []).append((str(file), "train"))
    if found:
        return found
    try:
        return {name: [(source, name)] for name in get_dataset_split_names(source)}
    except (OSError, ValueError, DatasetNotFoundError) as error:
        raise SourceError(
            f"source {source} must be a JSONL or Parquet file, a folder of them, a `datasets` folder or a hub id:"
            f" {type(error).__name__}: {error}"
        ) from error


def _find_schema(source: str, parts: Sequence[tuple[str, str]]) -> str:
    """The key of SCHEMAS whose columns the first rows have. Raises SourceError."""
    rows = itertools.islice(itertools.chain.from_iterable(itertools.starmap(read_rows, parts)), SCHEMA_ROWS)
    columns = {name for row in rows for name in row.fields or ()}
    for name, schema in SCHEMAS.items():
        if schema.columns <= columns:
            return name
    known = "; ".join(f"{name}: {', '.join(sorted(schema.columns))}" for name, schema in SCHEMAS.items())
    raise SourceError(f"{source} must have the columns of a known format ({known}), got {sorted(columns)}")


def _first(found: Mapping[str, list[tuple[str, str]]], names: Sequence[str]) -> list[tuple[str, str]]:
    return next((found[name] for name in names if name in found), [])


def _number(fields: Mapping[str, Any], column: str, low: float, high: float) -> float:
    value = fields.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise RowError(f"{column} must be a finite number, got {brief(value)}")
    if not low <= value <= high:
        raise RowError(f"{column} must be in [{low:g}, {high:g}], got {brief(value)}")
    return float(value)
