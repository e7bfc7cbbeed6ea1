"""The propensity role: learns who gives feedback, keeps what it wrote, refuses logs that say nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification

from actors.reward.propensity_actor import PropensityActor, read_propensities
from actors.reward.report import VersionedPropensity, to_json
from causalrm_ray.checkpoint import CheckpointError, write_json
from causalrm_ray.estimators.core.training import FitSettings
from causalrm_ray.models.text import encode_pair, load_tokenizer

SETTINGS, CLIP = FitSettings(12, 1e-2, 64), 0.05
ROWS = 1000


def make_actor(backbone: str, max_length: int = 64) -> PropensityActor:
    return PropensityActor(backbone, SETTINGS, CLIP, max_length=max_length)


def pairs(backbone: str) -> list[tuple[int, ...]]:
    tokenizer = load_tokenizer(backbone)
    return [encode_pair(tokenizer, "tell me about the river", f"stone lamp {word}") for word in ("certainly", "never")]


@pytest.fixture
def fitted(
    backbone: str, make_snapshot: Callable[..., Path], tmp_path: Path
) -> tuple[PropensityActor, Path, VersionedPropensity]:
    actor, folder = make_actor(backbone), tmp_path / "propensity"
    return actor, folder, actor.fit(make_snapshot(ROWS), folder)


def test_propensities_find_who_gives_feedback(fitted: tuple[PropensityActor, Path, VersionedPropensity], backbone: str):
    actor, folder, report = fitted
    out_of_fold = read_propensities(folder).numpy()
    assert out_of_fold.shape == (ROWS,)
    assert (out_of_fold >= CLIP).all()
    assert abs(out_of_fold[::2].mean() - 0.6) < 0.066  # 3 standard errors of 500 votes at 0.6
    assert abs(out_of_fold[1::2].mean() - 0.2) < 0.054
    liked, disliked = actor.predict(pairs(backbone))
    assert liked > disliked + 0.2
    assert report.version == actor.version == 1


def test_diagnostics_are_json_and_name_overlap_ess_and_ece(fitted: tuple[PropensityActor, Path, VersionedPropensity]):
    actor, _, report = fitted
    assert {"overlap", "ess", "ess_fraction", "ece", "clipped_share", "warnings"} <= set(json.loads(json.dumps(to_json(report))))
    assert actor.diagnostics() == report


def test_loaded_version_predicts_the_same_bits(fitted: tuple[PropensityActor, Path, VersionedPropensity], backbone: str):
    actor, folder, _ = fitted
    other = make_actor(backbone)
    assert other.load(folder) == 1
    assert np.array_equal(other.predict(pairs(backbone)), actor.predict(pairs(backbone)))
    AutoModelForSequenceClassification.from_pretrained(folder / "fold-1")


def test_repeated_fit_gives_the_same_bits(
    fitted: tuple[PropensityActor, Path, VersionedPropensity], backbone: str, tmp_path: Path
):
    _, folder, _ = fitted
    make_actor(backbone).fit(tmp_path / "snapshot.parquet", tmp_path / "again")
    for file in ("propensity.safetensors", "calibration.json", "fold-0/model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()


def test_unfinished_folder_is_refused(backbone: str, tmp_path: Path):
    with pytest.raises(CheckpointError, match="never completed"):
        make_actor(backbone).load(tmp_path)


def test_a_report_with_other_fields_is_refused_by_name(tmp_path: Path):
    write_json(tmp_path / "report.json", {"version": "first"})
    with pytest.raises(CheckpointError, match=r"report\.json must hold a VersionedPropensity(.|\n)*version"):
        VersionedPropensity.read(tmp_path)


def test_predicting_before_a_fit_is_refused(backbone: str):
    with pytest.raises(RuntimeError, match="call fit or load first"):
        make_actor(backbone).predict([[1, 2]])


def test_log_without_feedback_is_refused(backbone: str, make_snapshot: Callable[..., Path], tmp_path: Path):
    with pytest.raises(ValueError, match="got 0 observed of 40 rows"):
        make_actor(backbone).fit(make_snapshot(40, observe=lambda word: False), tmp_path / "p")


def test_log_with_feedback_on_every_row_is_refused(backbone: str, make_snapshot: Callable[..., Path], tmp_path: Path):
    with pytest.raises(ValueError, match="must hold what was shown without feedback too"):
        make_actor(backbone).fit(make_snapshot(40, observe=lambda word: True), tmp_path / "p")


def test_row_that_is_too_long_is_named(backbone: str, make_snapshot: Callable[..., Path], tmp_path: Path):
    snapshot = make_snapshot(40, tail=" stone" * 70)
    with pytest.raises(ValueError, match=r"impression 'impression-39' must have at most 64 tokens .*, got \d+"):
        make_actor(backbone).fit(snapshot, tmp_path / "p")


def test_a_refit_goes_on_from_the_models_that_serve(backbone: str, make_snapshot: Callable[..., Path], tmp_path: Path):
    grown = make_snapshot(600)
    fresh = PropensityActor(backbone, FitSettings(1, 1e-9, 64), 0.1, max_length=64)
    fresh.fit(grown, tmp_path / "fresh")
    warm = PropensityActor(backbone, FitSettings(1, 1e-9, 64), 0.1, max_length=64)
    warm.load(tmp_path / "fresh")
    trained = make_actor(backbone)
    trained.fit(grown, tmp_path / "trained")
    warm.load(tmp_path / "trained")
    assert warm.fit(grown, tmp_path / "warm").version == 2
    starts, warm_start, cold_start = (
        load_file(tmp_path / name / "fold-0" / "model.safetensors") for name in ("trained", "warm", "fresh")
    )
    for name, start in starts.items():  # a few steps of 1e-9 each
        np.testing.assert_allclose(warm_start[name], start, rtol=0, atol=1e-7)
    assert max(abs(cold_start[name] - start).max() for name, start in starts.items()) > 1e-3
