"""A tiny study for real, on Ray, and what it refuses."""

from __future__ import annotations

import csv
from contextlib import nullcontext
from pathlib import Path

import pytest

from causalrm_ray.estimators.studies.noise_study import study
from causalrm_ray.types import NoiseRates
from jobs.__main__ import main
from jobs.lab import noise_study


@pytest.mark.usefixtures("ray_cluster")
def test_a_study_writes_the_figures_of_its_simulations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(noise_study, "ray_cluster", lambda *_: nullcontext())
    options = ["settings=[ramp,features]", "rows=[600]", "rho=[[0.2,0.1]]", "simulations=2", "draws=20", f"run.dir={tmp_path}"]
    assert main(["noise-study", *options]) == 0
    with (tmp_path / "noise-study" / "noise.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["setting"] for row in rows] == ["ramp", "features"]
    expected = study("ramp", 600, NoiseRates(0.2, 0.1), simulations=2, draws=20)
    found = tuple(float(rows[0][f"mean_error_{rate}"]) for rate in ("01", "10"))
    assert found == pytest.approx(expected.mean_error)
    assert float(rows[0]["coverage_01"]) == expected.coverage[0]
    assert "| ramp | 600 | 0.200 | 0.100 |" in (tmp_path / "noise-study" / "noise.md").read_text(encoding="utf-8")
    assert main(["noise-study", *options]) == 2
    assert "holds a study already" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("rho=[[0.5,0.5]]", "rho_01 + rho_10 must be below 1"),
        ("rows=[10]", "rows.0: Input should be greater than or equal to 500, got 10"),
        ("settings=[far]", "settings"),
    ],
)
def test_a_study_of_nothing_is_refused(override: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["noise-study", f"run.dir={tmp_path}", override]) == 2
    assert part in " ".join(capsys.readouterr().err.split())
