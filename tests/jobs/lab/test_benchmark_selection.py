"""The benchmark's further kinds of selection: their settings, tables, biases and pictures; the feedback rate; strata."""

from __future__ import annotations

import csv
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import Tensor

from actors.lab import benchmark_tasks
from actors.lab.benchmark_tasks import CellSpec, Setting, run_bias, run_cell
from causalrm_ray.config.benchmark import BenchmarkConfig, HeadConfig
from causalrm_ray.config.options import load_tree
from causalrm_ray.data.embeddings import GradedEmbeddings
from causalrm_ray.estimators.pipeline import RewardFits
from causalrm_ray.report.benchmark_figures import SELECTIONS, draw_bars, draw_rho_sensitivity
from causalrm_ray.types import NoiseRates, Selection
from jobs.__main__ import main
from jobs.lab import benchmark

HEAD = HeadConfig(hidden=(8,), dropout=0.0, epochs=6, lr=0.02, batch_size=64, patience=3)
ALL = "selection=[label,features,trait,popularity,mixed]"


def graded(rows: int, prompts: bool = True) -> GradedEmbeddings:
    """Levels 0..4, on which the first of three features depends; four answers a prompt."""
    generator = torch.Generator().manual_seed(rows)
    levels = torch.randint(0, 5, (rows,), generator=generator).float()
    features = torch.randn(rows, 3, generator=generator)
    features[:, 0] = features[:, 0] / 2 + levels
    return GradedEmbeddings(features.half(), levels, torch.arange(rows) // 4 if prompts else None)


def config(*overrides: str) -> BenchmarkConfig:
    return load_tree(BenchmarkConfig, None, ["train=a", "test=b", *overrides])


def alpha_of(selection: Selection) -> float | None:
    return None if selection in {"popularity", "mixed"} else 0.5


def test_every_kind_of_selection_can_be_chosen_and_has_a_title() -> None:
    assert config(ALL).selection == get_args(Selection) == tuple(SELECTIONS)


def test_a_selection_that_alpha_does_not_matter_for_has_one_setting() -> None:
    found = benchmark.settings(config(ALL, "alpha=[0.5,0.2]", "scenarios=[1]", "rho=[[0.05,0.1]]", "feedback_rate=0.1"))
    noise = (1, NoiseRates(0.05, 0.1))
    with_alpha = [(alpha, rates, kind) for alpha in (0.5, 0.2) for rates in noise for kind in ("label", "features", "trait")]
    without = [(None, rates, kind) for rates in noise for kind in ("popularity", "mixed")]
    assert {(one.alpha, one.scenario, one.selection) for one in found} == {*with_alpha, *without}
    assert len(found) == len(with_alpha) + len(without) == len({one.name for one in found})
    assert {one.feedback_rate for one in found} == {0.1}
    popular = Setting(None, 1, "popularity")
    assert popular.name == "scenario-1_popularity"
    assert popular.labels == {"alpha": "", "scenario": 1, "selection": "popularity", "rho_01": 0.2, "rho_10": 0.1}


def test_a_log_has_the_settings_feedback_rate_and_the_files_prompts() -> None:
    data = graded(2000)
    made = Setting(None, 1, "popularity", 0.1).log(data, 0)
    assert float(made.propensity.mean()) == pytest.approx(0.1)
    assert bool((made.propensity.reshape(-1, 4) == made.propensity[::4, None]).all())
    assert not torch.equal(Setting(None, 1, "popularity", 0.1).log(replace(data, prompts=None), 0).propensity, made.propensity)


@pytest.mark.parametrize("selection", get_args(Selection))
def test_strata_reach_the_methods_where_they_are_asked_for(selection: Selection, monkeypatch: pytest.MonkeyPatch) -> None:
    given, fit = [], benchmark_tasks.fit_reward_models

    def spy(*args: Any, strata: Tensor | None, **options: Any) -> RewardFits:
        given.append(strata)
        return fit(*args, strata=strata, **options)

    monkeypatch.setattr(benchmark_tasks, "fit_reward_models", spy)
    setting, splits = Setting(alpha_of(selection), 1, selection), (graded(1200), graded(300))
    threads = torch.get_num_threads()
    without, with_strata = (run_cell(CellSpec(setting, 3, ("naive",), HEAD, strata), splits) for strata in (False, True))
    torch.set_num_threads(threads)
    assert [replace(one, fit_s=None) for one in without] == [replace(one, fit_s=None) for one in with_strata]  # of one log
    assert without[0].fault is None
    rates, naive, *asked = given
    assert rates is naive is None
    expected = setting.log(splits[0], 3).strata
    assert len(asked) == 2
    assert all(strata is None if expected is None else torch.equal(strata, expected) for strata in asked)
    assert (expected is None) == (selection in {"label", "features"})


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("selection", get_args(Selection))
def test_the_true_propensity_leaves_no_bias(selection: Selection, prompts: bool) -> None:
    threads = torch.get_num_threads()
    found = run_bias(Setting(alpha_of(selection), 2, selection), (graded(1000, prompts), 40))
    torch.set_num_threads(threads)
    for bias in found:
        if bias.estimator in {"causalrm_ips", "causalrm_dr"}:
            assert abs(bias.relative) < 3 * bias.stderr + 1e-4, bias
    naive = [bias for bias in found if bias.estimator == "naive"]
    assert any(abs(bias.relative) > 5 * bias.stderr for bias in naive)


@pytest.mark.usefixtures("ray_cluster")
def test_a_benchmark_of_every_selection_shows_each_and_keeps_its_rate_and_strata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "ray_cluster", lambda *_: nullcontext())
    for name, rows in (("train", 800), ("test", 200)):
        data = graded(rows)
        assert data.prompts is not None
        tensors = {"embeddings": data.features, "labels": data.levels, "prompts": data.prompts}
        save_file(tensors, tmp_path / f"toy_{name}.safetensors")
    files = [f"{name}={tmp_path / f'toy_{name}.safetensors'}" for name in ("train", "test")]
    small = ["head.hidden=[8]", "head.dropout=0", "epochs=2", "lr=0.02", "patience=1", "bias_draws=2", "seeds=[0]"]
    given = [ALL, "alpha=[0.5,0.2]", "scenarios=[]", "rho=[[0.05,0.1]]", "methods=[naive]", "feedback_rate=0.3", "strata=true"]
    assert main(["benchmark", *files, f"run.dir={tmp_path}", "name=b", *small, *given]) == 0
    folder = tmp_path / "b"
    rows = list(csv.DictReader((folder / "results.csv").open(encoding="utf-8")))
    assert [(row["alpha"], row["selection"]) for row in rows] == [
        *(("0.5", kind) for kind in ("label", "features", "trait")),
        *(("", kind) for kind in ("popularity", "mixed")),
        *(("0.2", kind) for kind in ("label", "features", "trait")),
    ]
    assert len(list((folder / "cells").iterdir())) == len(list((folder / "bias").iterdir())) == len(rows) == 8
    for name in ("table.md", "bias.md"):
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        assert any(line.startswith("|  | rho 0.05/0.1 | popularity | naive |") for line in lines)
        assert any(line.startswith("| 0.2 | rho 0.05/0.1 | trait | naive |") for line in lines)
    assert "feedback rate 0.3, strata given" in (folder / "table.md").read_text(encoding="utf-8")
    assert set(pd.read_csv(folder / "bias.csv")["selection"]) == set(get_args(Selection))
    pictures = {"bars-alpha-0.5.png", "bars-alpha-0.2.png", "bars-no-alpha.png", "sensitivity.png", "sensitivity-rho.png"}
    assert {path.name for path in folder.glob("*.png")} == pictures

    for change in ("feedback_rate=0.2", "strata=false"):
        assert main(["benchmark", f"run.dir={tmp_path}", "name=b", "resume=true", change]) == 2
        refusal = " ".join(capsys.readouterr().err.split())
        assert f"{change.partition('=')[0]}: must stay as it was" in refusal


def test_pictures_have_a_panel_for_each_selection_and_numbers_under_each_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = config(ALL, "scenarios=[1]", "rho=[[0.05,0.1]]")
    rows = [
        {"dataset": "d", **setting.labels, "method": "naive", "seed": 0, **dict.fromkeys(benchmark.FIGURES, 0.5)}
        for setting in benchmark.settings(chosen)
    ]
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    table = benchmark.tabulate(pd.DataFrame(rows))
    draw_rho_sensitivity(table, tmp_path / "rho.png")
    panels = [panel for panel in drawn[0].axes if panel.get_visible()]
    labels = [f"{SELECTIONS[kind]}{'' if alpha_of(kind) is None else ', alpha 0.5'}" for kind in get_args(Selection)]
    assert [panel.get_title() for panel in panels] == labels
    assert [bool(panel.get_xlabel()) for panel in panels] == [False] * 3 + [True] * 2  # two columns
    shown = [any(tick.get_visible() and tick.get_text() for tick in panel.get_xticklabels()) for panel in panels]
    assert shown == [False] * 3 + [True] * 2
    draw_bars(table[table["alpha"] == ""], tmp_path / "bars.png")
    titles = [panel.get_title(loc="left") for panel in drawn[1].axes]
    expected = [f"{noise}, {SELECTIONS[kind]}" for noise in ("scenario 1", "rho 0.05/0.1") for kind in chosen.selection[3:]]
    assert titles[::2] == expected


@pytest.mark.parametrize("rate", ["0", "1", "1.5"])
def test_a_feedback_rate_outside_its_range_is_refused(rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "train=a", "test=b", f"feedback_rate={rate}"]) == 2
    assert "feedback_rate: Input should be" in " ".join(capsys.readouterr().err.split())
