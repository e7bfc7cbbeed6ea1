"""The propensity role: learns who gives feedback, keeps what it wrote, refuses logs that say nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.reward.propensity_actor import PropensityActor, read_propensities
from actors.reward.report import VersionedPropensity, to_json
from causalrm_ray.checkpoint import CheckpointError, write_json
from causalrm_ray.conversation import Conversation
from causalrm_ray.errors import InputError
from causalrm_ray.models.states.pooled import STATES, PooledBackbone, pooled_states
from causalrm_ray.models.states.rows import RowReader
from causalrm_ray.models.text import load_tokenizer
from causalrm_ray.types import StatesName

CLIP = 0.05
ROWS = 1000


def make_actor(states: Path, choice: StatesName | None = None) -> PropensityActor:
    return PropensityActor(states, CLIP, seed=0, max_length=64, choice=choice)


def fresh_states(backbone: str, name: StatesName) -> torch.Tensor:
    """States of two answers that no log has, which differ in whether they are liked."""
    reader, prompt = RowReader(load_tokenizer(backbone), 64, "refuse"), Conversation.user("tell me about the river").json
    rows = [reader.read("fresh", prompt, f"stone lamp {word}").row for word in ("certainly", "never")]
    return pooled_states(PooledBackbone.from_pretrained(backbone), rows)[:, STATES.index(name)]


@pytest.fixture
def fitted(
    make_snapshot: Callable[..., Path], features: Callable[[Path], Path], tmp_path: Path
) -> tuple[PropensityActor, Path, VersionedPropensity]:
    snapshot, folder = make_snapshot(ROWS), tmp_path / "propensity"
    actor = make_actor(features(snapshot))
    return actor, folder, actor.fit(snapshot, folder)


def test_propensities_find_who_gives_feedback(fitted: tuple[PropensityActor, Path, VersionedPropensity], backbone: str):
    actor, folder, report = fitted
    out_of_fold = read_propensities(folder).numpy()
    assert out_of_fold.shape == (ROWS,)
    assert (out_of_fold >= CLIP).all()
    assert abs(out_of_fold[::2].mean() - 0.6) < 0.066  # 3 standard errors of 500 votes at 0.6
    assert abs(out_of_fold[1::2].mean() - 0.2) < 0.054
    assert report.choice is not None
    assert report.choice.losses[report.choice.states] == min(report.choice.losses.values())
    liked, disliked = actor.predict(fresh_states(backbone, report.choice.states))
    assert liked > disliked + 0.2
    assert report.version == actor.version == 1


def test_diagnostics_are_json_and_name_overlap_ess_and_ece(fitted: tuple[PropensityActor, Path, VersionedPropensity]):
    actor, _, report = fitted
    assert {"overlap", "ess", "ess_fraction", "ece", "clipped_share", "warnings"} <= set(json.loads(json.dumps(to_json(report))))
    assert actor.diagnostics() == report


def test_loaded_version_predicts_the_same_bits(fitted: tuple[PropensityActor, Path, VersionedPropensity], backbone: str):
    actor, folder, report = fitted
    other = make_actor(folder)
    assert other.load(folder) == 1
    assert report.choice is not None
    fresh = fresh_states(backbone, report.choice.states)
    assert np.array_equal(other.predict(fresh), actor.predict(fresh))


def test_repeated_fit_gives_the_same_bits(fitted: tuple[PropensityActor, Path, VersionedPropensity], tmp_path: Path):
    _, folder, _ = fitted
    make_actor(tmp_path / "states").fit(tmp_path / "snapshot.parquet", tmp_path / "again")
    for file in ("propensity.safetensors", "calibration.json", "fold-0.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()


def test_unfinished_folder_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="never completed"):
        make_actor(tmp_path).load(tmp_path)


def test_a_report_with_other_fields_is_refused_by_name(tmp_path: Path):
    write_json(tmp_path / "report.json", {"version": "first"})
    with pytest.raises(CheckpointError, match=r"report\.json must hold a VersionedPropensity(.|\n)*version"):
        VersionedPropensity.read(tmp_path)


def test_predicting_before_a_fit_is_refused(tmp_path: Path):
    with pytest.raises(RuntimeError, match="call fit or load first"):
        make_actor(tmp_path).predict(torch.zeros(1, 32))


def test_log_without_feedback_is_refused(make_snapshot: Callable[..., Path], tmp_path: Path):
    with pytest.raises(ValueError, match="got 0 observed of 40 rows"):
        make_actor(tmp_path).fit(make_snapshot(40, observe=lambda word: False), tmp_path / "p")


def test_log_with_feedback_on_every_row_is_refused(make_snapshot: Callable[..., Path], tmp_path: Path):
    with pytest.raises(ValueError, match="must hold what was shown without feedback too"):
        make_actor(tmp_path).fit(make_snapshot(40, observe=lambda word: True), tmp_path / "p")


def test_row_that_is_too_long_is_named(make_snapshot: Callable[..., Path], features: Callable[[Path], Path]):
    with pytest.raises(InputError, match=r"impression 'impression-39' must have at most 64 tokens .*, got \d+"):
        features(make_snapshot(40, tail=" stone" * 70))


def test_rows_without_states_are_refused(make_snapshot: Callable[..., Path], tmp_path: Path):
    with pytest.raises(InputError, match=r"must hold states of all 400 rows, got 0: give the command again"):
        make_actor(tmp_path / "states").fit(make_snapshot(400), tmp_path / "p")


def test_a_refit_reads_the_states_of_the_version_that_serves(
    make_snapshot: Callable[..., Path], features: Callable[[Path], Path], tmp_path: Path
):
    snapshot = make_snapshot(600)
    states = features(snapshot)
    make_actor(states, "middle-last").fit(snapshot, tmp_path / "first")
    later = make_actor(states)
    later.load(tmp_path / "first")
    again = later.fit(snapshot, tmp_path / "again")
    assert again.version == 2
    assert again.choice is not None
    assert (again.choice.states, again.choice.losses) == ("middle-last", {})
