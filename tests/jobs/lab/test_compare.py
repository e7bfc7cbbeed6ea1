"""The comparison's table, its files and its cells. Its runs themselves are the jobs that test_end_to_end.py runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from causalrm_ray.config.options import load_config
from causalrm_ray.report.page import draw_comparison
from jobs.__main__ import main
from jobs.lab.compare import METHODS, SEEDS, USERS, for_world, read_results, tabulate, write_results, write_table

ROWS = [
    {"users": users, "seed": seed, "method": method, "oracle_reward": place + 0.1 * seed, "flashy": 0.5, "r2": 0.9, "auroc": 1.0}
    for users in USERS
    for seed in range(SEEDS)
    for place, method in enumerate(METHODS)
]


def test_table_holds_means_and_standard_errors_over_seeds() -> None:
    table = tabulate(ROWS)
    assert [(line["users"], line["method"]) for line in table] == [(users, method) for users in USERS for method in METHODS]
    assert table[2]["oracle_reward"] == pytest.approx(2.1)  # mean of 2.0, 2.1, 2.2
    assert table[2]["oracle_reward_se"] == pytest.approx(0.1 / 3**0.5)
    assert table[2]["flashy_se"] == 0.0


def test_results_survive_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    assert read_results(path) == []
    write_results(path, ROWS)
    write_results(path, read_results(path))  # what a resumed comparison does
    assert read_results(path) == [{name: str(value) for name, value in row.items()} for row in ROWS]
    assert tabulate(read_results(path)) == tabulate(ROWS)
    assert [file.name for file in tmp_path.iterdir()] == ["results.csv"]


def test_table_and_picture_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tabulate(ROWS)
    write_table(table, tmp_path / "table.md")
    draw_comparison(table, tmp_path / "comparison.png")
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
    write_results(tmp_path / "compare" / "results.csv", ROWS)
    assert main(["compare", f"run.dir={tmp_path}"]) == 2
    assert "holds a comparison already" in " ".join(capsys.readouterr().err.split())
