"""The training loop: determinism, early stopping, independence of the number of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from causalrm_ray.data.collate import FeatureRows, TokenRows
from causalrm_ray.estimators.core.training import FitReport, FitSettings, Objective, Shard, fit, mean_risk, predict
from causalrm_ray.losses.pointwise import bce
from causalrm_ray.models.scorers.heads import FeatureScorer

SETTINGS = FitSettings(epochs=3, lr=0.01, batch_size=7, patience=3, seed=4)


def problem(rows: int = 40) -> tuple[FeatureRows, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    return FeatureRows(features), (features[:, 0] + torch.randn(rows, generator=generator) > 0).double()


def head() -> FeatureScorer:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return FeatureScorer(3, (4,)).double()


def objectives(label: Tensor) -> tuple[Objective, Objective]:
    def risk(logit: Tensor, index: Tensor) -> Tensor:
        return bce(logit, label[index])

    return Objective(torch.arange(29), risk), Objective(torch.arange(29, len(label)), risk)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([value.detach().reshape(-1) for value in module.state_dict().values()])


def fit_on_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    inputs, label = problem()
    module, shard = head(), Shard(rank, world_size, DistributedDataParallel)
    report = fit(module, inputs, *objectives(label), SETTINGS, shard=shard)
    logit = predict(module, inputs, shard=shard)
    torch.save({"weights": weights(module), "logit": logit, "risk": report.best.validation_risk}, f"{folder}/{rank}.pt")
    dist.barrier()  # no rank may close its sockets while the other still reads
    dist.destroy_process_group()


def test_fit_is_invariant_to_data_parallel_split(tmp_path: Path) -> None:
    # batches of 7, 7, 7, 7 and 1 rows: slices of unequal length, and one rank without a row
    inputs, label = problem()
    alone = head()
    report = fit(alone, inputs, *objectives(label), SETTINGS)
    mp.spawn(fit_on_rank, args=(2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(shared["weights"], weights(alone), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(shared["logit"], predict(alone, inputs), rtol=1e-9, atol=1e-9)
        assert shared["risk"] == pytest.approx(report.best.validation_risk)


def test_fit_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    inputs, label = problem()
    first, second = head(), head()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    fit(first, inputs, *objectives(label), SETTINGS)
    assert torch.equal(torch.rand(1), expected)
    fit(second, inputs, *objectives(label), SETTINGS)
    assert torch.equal(weights(first), weights(second))


class Scripted(nn.Module):
    """A scorer whose one weight counts optimizer steps, so that its validation risk can follow a script."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Parameter(torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        return self.steps + 0 * features[:, 0]


def scripted_fit(script: list[float], patience: int, since: int = 1) -> tuple[Scripted, FitReport]:
    """One row and so one step an epoch; AdamW's steps on a constant gradient of -1 are of length lr = 1."""
    module = Scripted()
    train = Objective(torch.zeros(1, dtype=torch.long), lambda logit, index: -logit)
    validation = Objective(train.rows, lambda logit, index: torch.tensor([script[round(float(logit)) - 1]]), since=since)
    settings = FitSettings(epochs=len(script), lr=1.0, batch_size=1, patience=patience, weight_decay=0.0)
    report = fit(module, FeatureRows(torch.zeros(1, 1)), train, validation, settings)
    return module, report


def test_early_stopping_restores_the_best_epoch() -> None:
    module, report = scripted_fit([3.0, 1.0, 2.0, 1.5, 0.5], patience=2)
    assert [epoch.validation_risk for epoch in report.epochs] == [3.0, 1.0, 2.0, 1.5]  # the fifth, though best, is never reached
    assert report.best.number == 2
    assert round(float(module.steps.detach())) == 2


def test_patience_counts_from_the_best_epoch() -> None:
    _, report = scripted_fit([3.0, 1.0, 2.0, 0.5, 0.7], patience=2)
    assert (len(report.epochs), report.best.number) == (5, 4)


def test_epochs_before_the_first_that_counts_are_neither_best_nor_waited_for() -> None:
    module, report = scripted_fit([0.1, 2.0, 3.0, 2.5, 2.7], patience=1, since=3)
    assert (len(report.epochs), report.best.number, round(float(module.steps.detach()))) == (5, 4, 4)
    assert scripted_fit([3.0, 1.0, 2.0], patience=1, since=9)[1].best.number == 3  # fewer epochs than that: the last one


def test_an_objective_gets_the_number_of_each_epoch_before_it() -> None:
    inputs, label = problem()
    train, validation = objectives(label)
    calls: list[str | int] = []

    def judged(logit: Tensor, index: Tensor) -> Tensor:
        calls.append("end")
        return validation.risk(logit, index)

    fit(head(), inputs, replace(train, begin=calls.append), replace(validation, risk=judged), SETTINGS)
    assert calls == [1, "end", 2, "end", 3, "end"]


def test_a_risk_that_is_not_finite_stops_the_fit() -> None:
    with pytest.raises(FloatingPointError, match=r"risk must be finite, got Epoch.number=2, .*validation_risk=nan"):
        scripted_fit([1.0, float("nan")], patience=2)


def test_mean_risk_is_the_mean_over_its_rows() -> None:
    inputs, label = problem()
    module = head()
    _, validation = objectives(label)
    expected = (
        sum(float(bce(module(inputs.features[row : row + 1]), label[row : row + 1]).detach()) for row in range(29, 40)) / 11
    )
    assert mean_risk(module, inputs, validation, batch_size=4) == pytest.approx(expected)


def test_bad_settings_are_named() -> None:
    inputs, label = problem()
    train, validation = objectives(label)
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        FitSettings(0, 0.1, 1)
    with pytest.raises(ValueError, match=r"lr must be above 0, got -0.1"):
        FitSettings(1, -0.1, 1)
    with pytest.raises(ValueError, match="validation must hold at least one row, got none"):
        fit(head(), inputs, train, Objective(torch.arange(0), validation.risk), SETTINGS)
    with pytest.raises(ValueError, match=r"one output per row, got shape \(1, 7\) for 7 rows"):
        fit(Transposed(head()), inputs, train, validation, SETTINGS)


class Transposed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, features: Tensor) -> Tensor:
        return self.inner(features)[None]


def test_token_rows_pad_on_the_right() -> None:
    rows = TokenRows.of([[5], [6, 7, 8], [9, 1]], pad_id=0)
    batch = rows.batch(torch.tensor([2, 1, 0]))
    assert batch["input_ids"].tolist() == [[9, 1, 0], [6, 7, 8], [5, 0, 0]]
    assert batch["lengths"].tolist() == [2, 3, 1]
    assert rows.batch(torch.tensor([0]))["input_ids"].tolist() == [[5]]
    with pytest.raises(ValueError, match="at least one token, got none in row 1"):
        TokenRows.of([[5], []], pad_id=0)


def test_bfloat16_moves_a_fit_by_its_rounding_only() -> None:
    inputs, label = problem(400)
    inputs = FeatureRows(inputs.features.float())
    train, validation = objectives(label.float())
    modules = [head().float() for _ in range(2)]
    for module, bf16 in zip(modules, (False, True), strict=True):
        report = fit(module, inputs, train, validation, replace(SETTINGS, bf16=bf16))
        assert len(report.epochs) == 3
    exact, rounded = (predict(module, inputs) for module in modules)
    assert {value.dtype for value in modules[1].state_dict().values()} == {torch.float32}
    assert not torch.equal(exact, rounded)
    assert float((exact - rounded).abs().max()) < 0.02 * float(exact.abs().max())  # bfloat16 keeps 8 bits: 0.4 % a rounding
