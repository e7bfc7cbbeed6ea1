"""Where a log kept elsewhere is read from, and its rows, numbered.

file | folder | list of them | `datasets` folder | hub id | URL | database + query --parts--> Part --rows--> RawRow
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from causalrm_ray.conversation import Conversation
from causalrm_ray.data.readers.csv_part import CsvPart
from causalrm_ray.data.readers.files import File, kind_of_name, local_files, no_such_file
from causalrm_ray.data.readers.json_part import JsonPart
from causalrm_ray.data.readers.parquet_part import DatasetPart, ParquetPart
from causalrm_ray.data.readers.part import Part
from causalrm_ray.data.readers.remote import remote_files, without_secrets
from causalrm_ray.data.readers.sql_part import SqlPart, is_database
from causalrm_ray.data.rows import RawRow, RowError, SourceError, conversation, row_fields

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_KINDS = {"json": JsonPart, "csv": CsvPart, "tsv": CsvPart, "parquet": ParquetPart}
_SAVED = ("state.json", "dataset_dict.json")  # in a folder that `Dataset.save_to_disk` wrote


def parts(
    source: str | Sequence[str], split: str = "train", query: str | None = None, option: str = "feedback.query"
) -> list[Part]:
    """What `source`, or each of several, is made of; opens no file yet.

    A folder is one that `Dataset.save_to_disk` wrote, or holds files of rows, which are read in the order of their names; any
    other file refuses it. A name OWNER/NAME that is no path, in no folder OWNER here and without a file's ending is a data set
    on the hub; no other name is ever looked up there. `split` matters for `datasets` only. With `query`, which the option
    `option` gives, the source is the SQLAlchemy URL of a database, which is only read.
    Raises SourceError where a source is missing or holds what cannot be read.
    """
    if query is not None:
        if not isinstance(source, str) or not is_database(source):
            raise SourceError(f"{option} asks a database: feedback.source must be its SQLAlchemy URL, such as sqlite:///log.db")
        return [SqlPart(source, query, option)]
    if not source:
        raise SourceError("feedback.source must name a source, got none")
    found: list[Part] = []
    for name in [source] if isinstance(source, str) else source:
        found += _parts(name, split)
    if twice := [where for where, times in Counter(part.where for part in found).items() if times > 1]:
        raise SourceError(f"feedback.source must name each file once, got {twice[0]} several times")
    return found


def _parts(source: str, split: str) -> list[Part]:
    if is_database(source):
        raise SourceError(f"{without_secrets(source)} is a database: feedback.query must hold the SELECT that gives its rows")
    if "://" in source and not source.startswith("file://"):
        return [_part(file) for file in remote_files(source)]
    path = Path(source.removeprefix("file://")).expanduser()
    if any((path / name).is_file() for name in _SAVED):
        return [DatasetPart(str(path), split, saved=True)]
    if looks_like_hub_id(source):
        return [DatasetPart(source, split, saved=False)]
    return [_part(file) for file in local_files(path)]


def _part(file: File) -> Part:
    return _KINDS[file.kind](file)


def looks_like_hub_id(source: str) -> bool:
    """Whether a name is one of a data set on the hub: OWNER/NAME, not a path that is here or could be meant to be."""
    here = Path(source)
    named = _HUB_ID.fullmatch(source) is not None and kind_of_name(source) is None
    return named and not here.exists() and not here.parent.exists()


def read_rows(source: str | Sequence[str], split: str = "train") -> Iterator[RawRow]:
    """Every row of `source`: see `parts`. Raises SourceError where it is missing or unreadable as a whole."""
    for part in parts(source, split):
        yield from part.rows()


def data_files(folder: Path) -> list[Path]:
    """The files of rows below a folder, by name; empty if it is none. Raises SourceError for a file of another kind."""
    return [Path(file.path) for file in local_files(folder)] if folder.is_dir() else []


def check_exists(source: str) -> None:
    """Raise SourceError, with the nearest name, for a path that is not there; hub ids and URLs pass."""
    path = Path(source).expanduser()
    if "://" not in source and not path.exists() and not looks_like_hub_id(source):
        raise SourceError(no_such_file(path))


class PromptRow(NamedTuple):
    """A prompt, and the row of its file, from 1, that it stands in."""

    where: str
    number: int
    prompt: Conversation


def read_prompts(source: str) -> list[PromptRow]:
    """The `prompt` column of a source, texts or messages, in order.

    Raises SourceError that lists the faulty rows by number, or on no rows.
    """
    prompts, faults = [], []
    for row in read_rows(source):
        try:
            prompts.append(PromptRow(row.where, row.number, conversation(row_fields(row).get("prompt"))))
        except RowError as error:
            faults.append(f"{row.where} row {row.number}: {error}")
    if faults:
        raise SourceError(f"every row of {source} must hold a prompt, got {len(faults)} faulty rows:\n" + "\n".join(faults[:10]))
    if not prompts:
        raise SourceError(f"{source} must hold prompts, got 0 rows")
    return prompts
