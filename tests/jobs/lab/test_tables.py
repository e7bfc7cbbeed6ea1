"""Tables by hand values."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from jobs.lab.tables import summarize, with_spread, write_csv, write_markdown

ROWS = pd.DataFrame(
    [("b", 1, 2.0), ("b", 2, 4.0), ("a", 1, None), ("b", 3, None), ("c", 1, 0.125)], columns=["method", "seed", "score"]
)


def test_means_leave_out_what_is_missing_in_order_of_appearance() -> None:
    table = summarize(ROWS, ["method"], ["score"], "se")
    assert list(table["method"]) == ["b", "a", "c"]
    assert list(table["score"])[::2] == [3.0, 0.125]
    assert table["score_se"][0] == pytest.approx(1.0)  # standard deviation sqrt(2) over sqrt(2)
    assert with_spread(table, "score", "se", digits=2) == ["3.00 ± 1.00", "", "0.12"]
    assert summarize(ROWS, ["method"], ["score"], "sd")["score_sd"][0] == pytest.approx(2**0.5)


def test_files_hold_the_columns_in_order_and_blanks_for_what_is_missing(tmp_path: Path) -> None:
    write_csv(ROWS[1:3], tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_bytes() == b"method,seed,score\r\nb,2,4.0\r\na,1,\r\n"
    write_markdown(ROWS[["method", "seed"]][:1], tmp_path / "rows.md")
    assert (tmp_path / "rows.md").read_text(encoding="utf-8") == "| method | seed |\n|---|---|\n| b | 1 |\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "rows.md"]
