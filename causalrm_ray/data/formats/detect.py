"""Which format a file is of: that whose `matches` is surest of its columns and first rows."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from causalrm_ray.data.rows import SourceError
from causalrm_ray.errors import InputError
from causalrm_ray.registry import FORMATS


def detect(where: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """The name of the format of a file. Raises SourceError if there is none or if two are as sure, with what to do."""
    surety: dict[str, float] = {}
    for name in FORMATS.names():
        try:
            matches = getattr(FORMATS.load(name), "matches", None)
        except ValueError as error:
            raise InputError(f"feedback.format: {error}") from error
        if matches is not None:
            surety[name] = float(matches(frozenset(columns), rows))
    best = [name for name, sure in surety.items() if sure > 0 and sure == max(surety.values())]
    if len(best) == 1:
        return best[0]
    if best:
        raise SourceError(f"{where} looks like several formats, {' and '.join(best)}: feedback.format={best[0]} chooses one")
    raise SourceError(
        f"{where} must have the columns of a known format, got {_listed(columns)}; {_advice(columns, rows)}"
        f" (formats tried: {', '.join(surety)})"
    )


def _advice(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    for row in rows[:1]:
        inner = next((name for name, value in row.items() if isinstance(value, list) and _objects(value)), None)
        if len(rows) == 1 and inner is not None:
            return f"are the rows in {inner}? then make a file of them: `jq -c '.{inner}[]' FILE > rows.jsonl`"
    missing = [name for name in ("prompt", "response") if name not in columns]
    if len(missing) == 1:
        nearest = difflib.get_close_matches(missing[0], columns, n=1, cutoff=0.5)
        return f"no row has {missing[0]}: feedback.columns.{missing[0]}={nearest[0] if nearest else 'COLUMN'} names its column"
    return "name its own: feedback.columns.prompt=COLUMN feedback.columns.response=COLUMN"


def _objects(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, Mapping) for value in values) and "role" not in values[0]


def _listed(columns: Sequence[str]) -> str:
    shown = sorted(columns)
    return f"the columns {', '.join(shown[:20])}{', ...' if len(shown) > 20 else ''}" if shown else "none"
