"""A tiny benchmark for real, on Ray; what it refuses; and its table by hand."""

from __future__ import annotations

import csv
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from actors.cluster import wait
from actors.lab.benchmark_tasks import CellSpec, MethodResult, Setting, run_bias, run_cell
from causalrm_ray.config.benchmark import BenchmarkConfig, HeadConfig
from causalrm_ray.config.options import load_tree, options
from causalrm_ray.data.embeddings import GradedEmbeddings
from causalrm_ray.errors import ConfigError, InputError
from causalrm_ray.estimators.studies import semisynthetic
from causalrm_ray.registry import ESTIMATORS
from causalrm_ray.report.benchmark_figures import ablation_lines, draw_bars, draw_rho_sensitivity, draw_sensitivity
from causalrm_ray.types import NoiseRates
from jobs.__main__ import main
from jobs.lab import benchmark
from jobs.lab.tables import write_markdown

HEAD = HeadConfig(hidden=(8,), dropout=0.0, epochs=12, lr=0.02, batch_size=64, patience=3)
NOISE = ("scenario", "rho_01", "rho_10")
SMALL = ["head.hidden=[8]", "head.dropout=0", "epochs=2", "lr=0.02", "patience=1", "bias_draws=2"]


def graded(rows: int, seed: int) -> GradedEmbeddings:
    """Levels 0..4, on which the first of three features depends."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 5, (rows,), generator=generator).float()
    features = torch.randn(rows, 3, generator=generator)
    features[:, 0] = features[:, 0] / 2 + levels
    return GradedEmbeddings(features.half(), levels)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A train and a test split on disk."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("train", 1200), ("test", 300)):
        data = graded(rows, seed=rows)
        save_file({"embeddings": data.features, "labels": data.levels}, folder / f"toy_{name}.safetensors")
    return folder / "toy_train.safetensors", folder / "toy_test.safetensors"


def arguments(files: tuple[Path, Path], folder: Path, *more: str) -> list[str]:
    return [f"train={files[0]}", f"test={files[1]}", f"run.dir={folder}", *SMALL, *more]


@pytest.fixture(scope="module")
def results() -> dict[str, MethodResult]:
    """The results of one cell with feedback at random given x, fitted without Ray."""
    threads = torch.get_num_threads()
    spec = CellSpec(Setting(0.5, 1, "features"), 0, ("naive", "causalrm_dr", "oracle"), HEAD)
    found = run_cell(spec, (graded(3000, 0), graded(500, 1)))
    torch.set_num_threads(threads)
    return {result.method: result for result in found}


def test_a_cell_measures_every_method_against_the_truth(results: dict[str, MethodResult]) -> None:
    assert list(results) == ["naive", "causalrm_dr", "oracle"]
    for result in results.values():
        assert result.fault is None
        assert (result.fit_s or 0) > 0
    naive, oracle = results["naive"].r2 or 0, results["oracle"].r2 or 0
    assert oracle > max(naive, 0.75)
    assert (results["oracle"].auroc or 0) > 0.97


def test_a_result_has_the_rates_that_its_method_read(results: dict[str, MethodResult]) -> None:
    assert results["naive"].rho_01_hat is None
    assert results["oracle"].rho_10_hat is None
    assert 0 < (results["causalrm_dr"].rho_01_hat or 0) < 0.5
    assert 0 < (results["causalrm_dr"].rho_10_hat or 0) < 0.5


def test_a_cell_repeats_and_reads_no_label_of_the_test_split() -> None:
    data, fresh = graded(1500, 0), graded(200, 1)
    shuffled = GradedEmbeddings(fresh.features, fresh.levels.flip(0))
    spec = CellSpec(Setting(0.5, 2, "features"), 1, ("causalrm_ips",), HEAD)
    threads = torch.get_num_threads()
    first, repeated, other = (run_cell(spec, (data, test))[0] for test in (fresh, fresh, shuffled))
    torch.set_num_threads(threads)
    assert replace(first, fit_s=0) == replace(repeated, fit_s=0)
    assert first.rho_01_hat == other.rho_01_hat is not None
    assert first.auroc != other.auroc


def test_a_method_that_cannot_be_fitted_says_why_and_the_others_go_on() -> None:
    levels = torch.arange(120).float() % 5
    few = GradedEmbeddings(torch.randn(120, 2, generator=torch.Generator().manual_seed(0)), levels)  # 24 labels: no anchors
    threads = torch.get_num_threads()
    naive, causalrm = run_cell(CellSpec(Setting(0.5, 2, "features"), 0, ("naive", "causalrm_dr"), HEAD), (few, few))
    torch.set_num_threads(threads)
    assert naive.r2 is not None
    assert causalrm.r2 is None
    assert "anchors" in str(causalrm.fault)


def test_biases_come_with_every_estimator() -> None:
    threads = torch.get_num_threads()
    biases = run_bias(Setting(0.5, 1, "label"), (graded(200, 0), 2))
    torch.set_num_threads(threads)
    assert {(bias.prediction, bias.estimator) for bias in biases} == {
        (kind, name) for kind in semisynthetic.PREDICTIONS for name in semisynthetic.ESTIMATORS
    }


@pytest.mark.usefixtures("ray_cluster")
def test_a_benchmark_runs_and_goes_on_with_what_is_missing(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "ray_cluster", lambda *_: nullcontext())
    given = ["alpha=[0.5,0.2]", "scenarios=[1]", "selection=[features]", "methods=[naive]", "seeds=[0]", "name=b", "rho=[]"]
    assert main(["benchmark", *arguments(files, tmp_path, *given)]) == 0
    folder = tmp_path / "b"
    first = (folder / "cells" / "alpha-0.5_scenario-1_features_seed-0.json").read_text(encoding="utf-8")
    (folder / "cells" / "alpha-0.2_scenario-1_features_seed-0.json").unlink()  # as if killed before it

    assert main(["benchmark", f"run.dir={tmp_path}", "name=b", "resume=true", "methods=[naive,oracle]", "rho=[[0.05,0.0]]"]) == 0
    table = list(csv.DictReader((folder / "results.csv").open(encoding="utf-8")))
    noise = (("1", "0.2", "0.1"), ("rho 0.05/0", "0.05", "0.0"))
    assert [tuple(row[name] for name in ("dataset", "alpha", *NOISE, "method", "seed")) for row in table] == [
        ("toy", alpha, *rates, method, "0") for alpha in ("0.5", "0.2") for rates in noise for method in ("naive", "oracle")
    ]
    assert all(row["r2"] and row["pearson"] and not row["rho_01_hat"] for row in table)
    kept = json.loads((folder / "cells" / "alpha-0.5_scenario-1_features_seed-0.json").read_text(encoding="utf-8"))
    assert kept[:1] == json.loads(first)
    files_left = {path.name for path in folder.iterdir()}
    pictures = {"bars-alpha-0.5.png", "bars-alpha-0.2.png", "sensitivity.png", "sensitivity-rho.png"}
    assert files_left == {"config.yaml", "cells", "bias", "results.csv", "table.md", "bias.csv", "bias.md", *pictures}
    assert "ROTATE" in (folder / "bias.md").read_text(encoding="utf-8")

    assert main(["benchmark", *arguments(files, tmp_path, "name=b")]) == 2
    assert main(["benchmark", f"run.dir={tmp_path}", "name=b", "resume=true", "lr=0.1"]) == 2
    refusals = " ".join(capsys.readouterr().err.split())
    assert "holds a benchmark already" in refusals
    assert "head: must stay as it was" in refusals


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_task_raises_comes_back_by_its_own_name() -> None:
    assert dict(wait.run_tasks(_divide, {"a": 1, "b": 2}, 10, "halves", 60)) == {"a": 10.0, "b": 5.0}
    with pytest.raises(InputError, match="nothing divides by 0"):
        dict(wait.run_tasks(_divide, {"a": 0}, 10, "halves", 60))


def _divide(by: int, value: int) -> float:
    if by == 0:
        raise InputError("nothing divides by 0")
    return value / by


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("alhpa=[0.5]", "alhpa: unknown key; did you mean alpha?"),
        ("alpha=[0.5,0]", "benchmark: alpha.1: Input should be greater than 0, got 0"),
        ("seeds=[-1]", "benchmark: seeds.0: Input should be greater than or equal to 0, got -1"),
        ("head.hidden=[0]", "head.hidden.0: Input should be greater than 0, got 0"),
        ("seeds=[0,0]", "seeds: must not hold a value twice, got [0, 0]"),
        ("scenarios=[3]", "scenarios.0: Input should be 1 or 2, got 3"),
        ("selection=[luck]", "selection.0: Input should be 'label', 'features', 'trait', 'popularity' or 'mixed', got 'luck'"),
        ("methods=[causalrm]", "got 'causalrm'; did you mean 'causalrm_"),
        ("rho=[[0.6,0.5]]", "rho.0: rho_01 + rho_10 must be below 1"),
        ("rho=[[0.2,0.1]]", "rho: must not repeat a scenario, got (0.2, 0.1)"),
        ("alpha=[]", "alpha: must hold at least one value, got []"),
        ("methods=[none:such]", "estimator 'none:such' cannot be imported"),
        ("scenarios=[]", "scenarios: must hold one where rho holds none, got []"),
        ("bias_draws=1", "bias_draws: must be 0 or at least 2, got 1"),
        ("train=none.safetensors", "none.safetensors: no such file"),
        ("resume=true", "holds no run"),
    ],
)
def test_a_wrong_option_is_refused_before_ray_starts(
    override: str, part: str, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", *arguments(files, tmp_path, override)]) == 2
    assert part in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_both_files_must_be_given() -> None:
    with pytest.raises(ConfigError, match="train: must be given\ntest: must be given"):
        load_tree(BenchmarkConfig, None)
    assert [key for key, _, _, meaning in options(BenchmarkConfig) if not meaning] == []


def test_every_method_is_asked_by_default(files: tuple[Path, Path]) -> None:
    config = load_tree(BenchmarkConfig, None, [f"train={files[0]}", f"test={files[1]}"])
    assert benchmark.wanted_methods(config) == (*ESTIMATORS.names(), "oracle")


ROWS = pd.DataFrame(
    [
        {"dataset": "d", **Setting(alpha, 1, "label").labels, "method": method, "seed": seed}
        | dict.fromkeys(benchmark.FIGURES, 1.0 + seed if method == "naive" or seed else None)
        for alpha in (0.5, 0.2)
        for method in ("naive", "causalrm_dr")
        for seed in (0, 1, 2)
    ]
)
NAIVE, FAILED = ROWS.iloc[[0]], ROWS.iloc[[3]]


def test_table_holds_means_and_deviations_over_seeds_of_what_was_fitted(tmp_path: Path) -> None:
    table = benchmark.tabulate(ROWS)
    assert list(table[["alpha", "method", "seeds", "fitted"]].itertuples(index=False, name=None)) == [
        (0.5, "naive", 3, 3),
        (0.5, "causalrm_dr", 3, 2),
        (0.2, "naive", 3, 3),
        (0.2, "causalrm_dr", 3, 2),
    ]
    assert (table["r2"][0], table["r2_sd"][0]) == (2.0, 1.0)  # of 1, 2, 3
    assert (table["r2"][1], table["r2_sd"][1]) == (2.5, pytest.approx(0.5**0.5))  # of 2, 3
    write_markdown(benchmark.table_texts(table), tmp_path / "table.md", "means")
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["means", ""]
    assert lines[4].startswith("| 0.5 | 1 | label | naive | 2.000 ± 1.000 |")
    assert lines[5].endswith("| 2.5 ± 0.7 | 2 of 3 |")


def test_a_single_seed_has_no_deviation_and_a_failed_method_no_figure() -> None:
    texts = benchmark.table_texts(benchmark.tabulate(pd.concat([NAIVE, FAILED])))
    assert list(texts["r2"]) == ["1.000", ""]
    assert list(texts["fitted"]) == ["1 of 1", "0 of 1"]


def test_biases_have_a_column_for_each_prediction() -> None:
    rows = [
        {**setting.labels, "prediction": kind, "estimator": name, "relative": 0.1, "stderr": 0.02}
        for setting in (Setting(0.5, 1, "label"), Setting(0.5, NoiseRates(0.05, 0.1), "label"))
        for kind in ("ROTATE", "ONE")
        for name in ("naive", "ips")
    ]
    texts = benchmark.bias_texts(pd.DataFrame(rows))
    assert list(texts.columns) == ["alpha", "scenario", "selection", "estimator", "ROTATE", "ONE"]
    scenarios = (1, "rho 0.05/0.1")
    expected = [
        (0.5, scenario, "label", name, "+10.0% ± 2.0%", "+10.0% ± 2.0%") for scenario in scenarios for name in ("naive", "ips")
    ]
    assert list(texts.itertuples(index=False, name=None)) == expected


def test_a_setting_is_named_by_its_scenario_or_its_rates() -> None:
    one, other = Setting(0.5, 1, "label"), Setting(0.5, NoiseRates(0.05, 0.1), "label")
    assert (one.name, other.name) == ("alpha-0.5_scenario-1_label", "alpha-0.5_rho-0.05-0.1_label")
    assert one.labels == {"alpha": 0.5, "scenario": 1, "selection": "label", "rho_01": 0.2, "rho_10": 0.1}
    assert other.labels == {**one.labels, "scenario": "rho 0.05/0.1", "rho_01": 0.05}
    data = graded(300, 0)
    assert other.log(data, 0).rates == other.rates == NoiseRates(0.05, 0.1)


FULL = pd.concat(
    NAIVE.assign(method=name) for name in ("dr", "oracle", "causalrm_dr_surrogate", "ips", "causalrm_dr", "causalrm_ips")
)


def test_an_ablation_shows_each_method_whole_and_in_parts_where_all_are_there() -> None:
    found = ablation_lines(benchmark.tabulate(FULL))
    assert list(found["method"]) == ["causalrm_dr", "causalrm_dr: only reweighting", "causalrm_dr: only surrogate"]
    assert ablation_lines(benchmark.tabulate(FULL[:2])).empty


def test_pictures_are_drawn_with_what_there_is(tmp_path: Path) -> None:
    table = benchmark.tabulate(pd.concat([ROWS, FAILED.assign(method="failed")]))
    draw_bars(table[table["alpha"] == 0.5], tmp_path / "bars.png")
    draw_sensitivity(table, tmp_path / "sensitivity.png")
    other = NAIVE.assign(**Setting(0.5, NoiseRates(0.05, 0.1), "label").labels)
    draw_rho_sensitivity(benchmark.tabulate(pd.concat([ROWS, other, FULL])), tmp_path / "rho.png")
    for picture in tmp_path.iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 3
