"""Tables of a job: means over repetitions, a CSV file that is whole or absent, Markdown, and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
from rich.console import Console
from rich.table import Table

from causalrm_ray.files import write_whole

SPREADS = {"sd": "std", "se": "sem"}  # suffix of a column -> pandas' name: standard deviation, standard error of the mean


def summarize(rows: pd.DataFrame, by: Sequence[str], figures: Sequence[str], spread: Literal["sd", "se"]) -> pd.DataFrame:
    """One line per group of `by`, in order of appearance: each figure's mean, and `<figure>_sd` or `<figure>_se`.

    Missing values are left out; without a value the mean is NaN, with fewer than two the spread.
    """
    values = rows.astype(dict.fromkeys(figures, float)).groupby(list(by), sort=False)[list(figures)]
    return values.mean().join(values.agg(SPREADS[spread]).add_suffix(f"_{spread}")).reset_index()


def with_spread(table: pd.DataFrame, figure: str, spread: Literal["sd", "se"], digits: int = 3) -> list[str]:
    """The texts "mean ± spread" of a figure of `summarize`; what is NaN is left out."""
    return [
        ("" if pd.isna(mean) else f"{mean:.{digits}f}") + ("" if pd.isna(width) else f" ± {width:.{digits}f}")
        for mean, width in zip(table[figure], table[f"{figure}_{spread}"], strict=True)
    ]


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a CSV file as RFC 4180 has it; missing values are blank. Whole or not at all."""
    write_whole(path, lambda unfinished: table.to_csv(unfinished, index=False, lineterminator="\r\n"))


def write_markdown(table: pd.DataFrame, path: Path, title: str | None = None) -> None:
    """Write a table of texts as Markdown, under a title if one is given."""
    header, *lines = ["| " + " | ".join(line) + " |" for line in (table.columns, *_texts(table))]
    above = [] if title is None else [title, ""]
    path.write_text("\n".join([*above, header, "|" + "---|" * len(table.columns), *lines]) + "\n", encoding="utf-8")


def show(table: pd.DataFrame, folder: Path) -> None:
    """Print a table of texts, and where the files are."""
    console = Console(width=max(100, Console().width), highlight=False)
    shown = Table(*table.columns, box=None)
    for line in _texts(table):
        shown.add_row(*line)
    console.print(shown)
    console.print(f"see {folder}", markup=False, soft_wrap=True)


def _texts(table: pd.DataFrame) -> list[list[str]]:
    return [[str(cell) for cell in line] for line in table.itertuples(index=False, name=None)]
