"""The comparison's table, its files and its cells. Its runs themselves are the jobs that test_end_to_end.py runs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from causalrm_ray.config.options import load_config
from causalrm_ray.report.benchmark_figures import draw_comparison
from jobs.__main__ import main
from jobs.lab.compare import COLUMNS, METHODS, SEEDS, USERS, for_world, read_results, table_texts, tabulate
from jobs.lab.tables import show, write_csv, write_markdown

ROWS = pd.DataFrame(
    [
        (users, seed, method, place + 0.1 * seed, 0.5, 0.9 if seed else None, 1.0)
        for users in USERS
        for seed in range(SEEDS)
        for place, method in enumerate(METHODS)
    ],
    columns=COLUMNS,
)


def test_table_holds_means_and_standard_errors_over_seeds() -> None:
    table = tabulate(ROWS)
    assert list(zip(table["users"], table["method"], strict=True)) == [(users, method) for users in USERS for method in METHODS]
    assert table["oracle_reward"][2] == pytest.approx(2.1)  # mean of 2.0, 2.1, 2.2
    assert table["oracle_reward_se"][2] == pytest.approx(0.1 / 3**0.5)
    assert table["flashy_se"][2] == 0.0
    assert table["r2"][2] == 0.9  # of the two seeds that have one


def test_results_survive_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    assert read_results(path).empty
    write_csv(ROWS, path)
    written = path.read_bytes()
    write_csv(read_results(path), path)  # what a resumed comparison does
    assert path.read_bytes() == written
    assert written.splitlines()[8] == b"protocol,1,oracle,3.1,0.5,0.9,1.0"
    assert tabulate(read_results(path)).equals(tabulate(ROWS))
    assert [file.name for file in tmp_path.iterdir()] == ["results.csv"]


def test_table_and_picture_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tabulate(ROWS)
    write_markdown(table_texts(table), tmp_path / "table.md")
    draw_comparison(table, tmp_path / "comparison.png")
    show(table_texts(table), tmp_path)
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[4] == "| protocol | auto | 2.100 ± 0.058 | 0.500 ± 0.000 | 0.900 ± 0.000 | 1.000 ± 0.000 |"
    assert "causalrm_dr" in capsys.readouterr().out
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_each_cell_has_a_world_a_seed_and_a_folder_of_its_own(tmp_path: Path) -> None:
    config = load_config(None, [f"run.dir={tmp_path}", "run.name=c", "run.resume=true", "feedback.url=sqlite:///elsewhere.db"])
    cells = [for_world(config, users, seed) for users in USERS for seed in range(SEEDS)]
    assert {(cell.world.users, cell.run.seed) for cell in cells} == {(users, seed) for users in USERS for seed in range(SEEDS)}
    assert len({cell.run.path for cell in cells}) == len({cell.log_url for cell in cells}) == len(cells)
    assert all(cell.run.path.parent == tmp_path / "c" and not cell.run.resume for cell in cells)
    assert all((cell.reward.method, *cell.reward.compare) == METHODS for cell in cells)


def test_a_comparison_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "compare").mkdir()
    write_csv(ROWS, tmp_path / "compare" / "results.csv")
    assert main(["compare", f"run.dir={tmp_path}"]) == 2
    assert "holds a comparison already" in " ".join(capsys.readouterr().err.split())
