"""The reward role: one real fit by two Ray Train workers; the gate, scoring and refusals without Ray."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from actors.reward.promotion import GATE_TOLERANCE
from actors.reward.propensity_actor import PROPENSITIES
from actors.reward.report import LogDiagnostics, MethodReport, RewardReport, VersionedPropensity
from actors.reward.reward_actor import RewardActor
from causalrm_ray.checkpoint import CheckpointError, atomic_folder, write_json
from causalrm_ray.config.train import RewardConfig
from causalrm_ray.conversation import Conversation
from causalrm_ray.estimators.diagnostics.diagnose import GammaBounds, LabelBin, Overlap, RhoPoint, RhoSensitivity, WeightSpread
from causalrm_ray.estimators.nuisances.propensity import diagnose
from causalrm_ray.estimators.nuisances.state_choice import StateChoice
from causalrm_ray.metrics import auroc
from causalrm_ray.models.identity import model_digest
from causalrm_ray.models.reward_model import SequenceScorer
from causalrm_ray.models.states.backbone import Backbone
from causalrm_ray.models.states.pooled import Row
from causalrm_ray.models.states.rows import RowReader
from causalrm_ray.models.text import load_tokenizer
from causalrm_ray.types import NoiseRates

CONFIG = RewardConfig(method="causalrm_dr", tune="full", epochs=8, lr=1e-2, workers=2, rho=(0.1, 0.1))
FILLER = ("garden", "stone", "winter", "lamp")


def make_actor(
    backbone: str,
    folder: Path,
    max_length: int = 64,
    stops: Sequence[int] = (),
    config: RewardConfig = CONFIG,
) -> RewardActor:
    """A role beside whose `folder` the states are."""
    return RewardActor(
        Backbone(backbone, model_digest(backbone), "final-last", "float32"),
        config,
        cache=folder.parent / "states",
        max_length=max_length,
        seed=0,
        folder=folder,
        timeout_s=120,
        stops=stops,
    )


@pytest.fixture
def propensities(tmp_path: Path) -> Path:
    """What a propensity model leaves of the snapshot's 400 rows: its folder, with propensities of 0.6 and 0.2 in turn."""
    folder = tmp_path / "propensities"
    folder.mkdir()
    prob = np.tile(np.array([0.6, 0.2], dtype=np.float32), 200)
    save_file({"propensity": prob}, folder / PROPENSITIES)
    found = diagnose(torch.from_numpy(prob), torch.arange(400) % 2, 0.1)
    VersionedPropensity(**vars(found), version=1, choice=StateChoice("final-last")).write(folder)
    return folder


def fresh_pairs(backbone: str) -> tuple[list[Row], torch.Tensor]:
    """New pairs and whether they are liked."""
    tokenizer = load_tokenizer(backbone)
    pairs = [(word, left, right) for word in ("certainly", "never") for left in FILLER for right in FILLER]
    reader, prompt = RowReader(tokenizer, 64, "refuse"), Conversation.user("tell me about the river").json
    rows = [reader.read("fresh", prompt, f"{left} {right} {word}").row for word, left, right in pairs]
    return rows, torch.tensor([float(word == "certainly") for word, _, _ in pairs])


def write_candidate(
    actor_folder: Path, backbone: str, name: str, risk: float, serving_risk: float | None, serving_version: int, head: float = 0.0
) -> None:
    """A candidate as a fit leaves it, with a constant head and the given figures."""
    scorer = SequenceScorer.from_pretrained(backbone)
    torch.nn.init.constant_(scorer.head.weight, head)
    point = RhoPoint(0.1, 0.1, 0.5, risk)
    weights = WeightSpread(1, (1.0,), (0.0, 1.0), (1,), 1.0, 1.0, 1.0)
    diagnostics = LogDiagnostics(
        method=CONFIG.method,
        overlap=Overlap((0.0, 1.0), (1,), (1,), 0.1, 0.9),
        weights=weights,
        calibration=(LabelBin(0.5, 0.5, 0.1, 1),),
        rho=RhoSensitivity(point, (), (point,)),
        gamma=(GammaBounds(1.0, 0.5, 0.5, 0.4, 0.6),),
        ranking=None,
        mechanisms=None,
        groups={},
        signals=None,
    )
    methods = {CONFIG.method: MethodReport(risk, 1)}
    report = RewardReport(methods, diagnostics, NoiseRates(0.1, 0.1), None, 1, serving_risk, serving_version)
    with atomic_folder(actor_folder / name) as temporary:
        scorer.save_pretrained(temporary / CONFIG.method, load_tokenizer(backbone))
        report.write(temporary)
    assert RewardReport.read(actor_folder / name) == report


def workers() -> set[int]:
    """Process ids of the Ray Train workers."""
    found = set()
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            if "RayTrainWorker" in "".join(one.cmdline()):
                found.add(one.pid)
    return found


@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_fit_a_model_that_ranks_is_repeatable_and_loads_anywhere(
    backbone: str, make_snapshot: Callable[..., Path], features: Callable[[Path], Path], propensities: Path, tmp_path: Path
):
    actor = make_actor(backbone, tmp_path / "reward")
    rows, liked = fresh_pairs(backbone)
    snapshot = make_snapshot()
    features(snapshot)
    first = actor.fit(snapshot, propensities, ["causalrm_dr", "naive", "auto"], candidate="first")
    assert set(first.report.methods) == {"causalrm_dr", "naive", "auto"}
    assert first.report.rates == NoiseRates(0.1, 0.1)
    assert actor.promote("first").version == 1
    logits, version = actor.score(rows)
    assert version == 1
    assert auroc(torch.from_numpy(logits), liked) > 0.95
    learned = torch.from_numpy(actor.score_with(str(first.folder / "auto"), rows))  # by two ranks, from heads on frozen states
    assert auroc(learned, liked) > 0.95

    stock = AutoModelForSequenceClassification.from_pretrained(first.folder / "causalrm_dr")
    padded = AutoTokenizer.from_pretrained(first.folder / "causalrm_dr").pad(
        {"input_ids": [[*row.prompt, *row.answer] for row in rows]}, return_tensors="pt"
    )
    with torch.inference_mode():
        np.testing.assert_allclose(stock(**padded).logits.squeeze(-1).numpy(), logits, atol=1e-5)

    first_workers = workers()
    assert len(first_workers) == 2
    methods = ["causalrm_dr", "naive"]
    again = actor.fit(tmp_path / "snapshot.parquet", propensities, methods, candidate="again")
    first_risk, naive_risk = (first.report.methods[name].heldout_risk for name in methods)
    assert again.report.methods["naive"].heldout_risk == naive_risk
    risk = again.report.methods["causalrm_dr"].heldout_risk
    assert risk == pytest.approx(first_risk, abs=0.01)  # it went on from the one that serves
    found = again.report.diagnostics
    assert found.method == "causalrm_dr"
    assert found.weights.rows == sum(found.overlap.with_feedback)
    assert sum(found.overlap.with_feedback + found.overlap.without_feedback) == 400
    assert found.rho.estimate.risk == pytest.approx(risk, abs=1e-6)
    assert found.ranking is not None
    assert found.ranking.contrast > 3 * found.ranking.stderr
    assert found.overlap == first.report.diagnostics.overlap
    assert again.report.serving_risk == pytest.approx(first_risk, abs=1e-6)
    weights = [load_file(folder / "naive" / "model.safetensors") for folder in (first.folder, again.folder)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert actor.promote("again").version == 2
    assert workers() == first_workers

    os.kill(min(first_workers), signal.SIGKILL)  # one that died at rest is missed by the next fit, which starts new ones
    third = actor.fit(tmp_path / "snapshot.parquet", propensities, methods, candidate="third")
    assert third.report.methods["naive"].heldout_risk == naive_risk
    assert len(workers()) == 2
    assert not workers() & first_workers
    ending = [psutil.Process(pid) for pid in workers()]
    actor.end_fits()
    assert psutil.wait_procs(ending, timeout=60)[1] == []  # none is alive; Ray ends their processes after it has answered


def test_first_candidate_serves_and_a_worse_one_does_not(backbone: str, tmp_path: Path):
    actor, (rows, _) = make_actor(backbone, tmp_path), fresh_pairs(backbone)
    write_candidate(tmp_path, backbone, "a", 0.60, None, 0, head=0.1)
    write_candidate(tmp_path, backbone, "b", 0.60 + 2 * GATE_TOLERANCE, 0.60, 1, head=0.2)
    write_candidate(tmp_path, backbone, "c", 0.60 + GATE_TOLERANCE / 2, 0.60, 1, head=0.3)
    assert actor.promote("a").promoted
    served, _ = actor.score(rows)
    refused = actor.promote("b")
    assert (refused.promoted, refused.reason, refused.version) == (False, "held-out risk 0.6200 > 0.6100", 1)
    np.testing.assert_array_equal(actor.score(rows)[0], served)
    assert actor.promote("c").version == 2
    assert not np.array_equal(actor.score(rows)[0], served)


def test_a_report_with_other_fields_is_refused_by_name(tmp_path: Path):
    write_json(tmp_path / "report.json", {"methods": {"auto": {"heldout_risk": "low"}}})
    with pytest.raises(CheckpointError, match=r"report\.json must hold a RewardReport(.|\n)*heldout_risk"):
        RewardReport.read(tmp_path)


def test_candidate_measured_against_another_version_is_refused(backbone: str, tmp_path: Path):
    actor = make_actor(backbone, tmp_path)
    write_candidate(tmp_path, backbone, "a", 0.6, 0.6, 3)
    with pytest.raises(ValueError, match="a must have been measured against serving version 0, got 3"):
        actor.promote("a")


def test_loaded_state_serves_the_same_bits(backbone: str, tmp_path: Path):
    actor, other, (rows, _) = make_actor(backbone, tmp_path), make_actor(backbone, tmp_path), fresh_pairs(backbone)
    write_candidate(tmp_path, backbone, "a", 0.6, None, 0, head=0.1)
    actor.promote("a")
    other.load(**actor.state())
    assert other.version == 1
    np.testing.assert_array_equal(other.score(rows)[0], actor.score(rows)[0])
    np.testing.assert_array_equal(other.score_with(str(tmp_path / "a" / CONFIG.method), rows), actor.score(rows)[0])


def test_an_answer_is_scored_at_the_end_that_a_log_gives_it(backbone: str, tmp_path: Path):
    """However it ended: at the tokenizer's end, at another that generation stops at, at one of rollout.stop, or cut."""
    tokenizer, (rows, _) = load_tokenizer(backbone), fresh_pairs(backbone)
    other, stop = rows[0].prompt[0], rows[1].prompt[1]
    model = tmp_path / "model"
    shutil.copytree(backbone, model)
    GenerationConfig(eos_token_id=[tokenizer.eos_token_id, other]).save_pretrained(model)
    actor = make_actor(str(model), tmp_path, stops=[stop])
    write_candidate(tmp_path, backbone, "a", 0.6, None, 0, head=0.1)
    actor.promote("a")
    logged = [row for row in rows if row.answer[-2] not in (other, stop)]
    assert {row.answer[-1] for row in logged} == {tokenizer.eos_token_id}
    expected = actor.score(logged)[0]
    for end in ((other,), (stop,), ()):
        np.testing.assert_array_equal(actor.score([(row.prompt, (*row.answer[:-1], *end)) for row in logged])[0], expected)
    assert len(np.unique(expected)) > 1


def test_scoring_before_a_promotion_is_refused(backbone: str, tmp_path: Path):
    with pytest.raises(RuntimeError, match="no reward model serves yet"):
        make_actor(backbone, tmp_path).score([([1], [2])])


def test_scoring_a_row_that_is_too_long_names_it(backbone: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"row 1 must have at most 4 tokens .* with its end, got 6"):
        make_actor(backbone, tmp_path, max_length=4).score_with(str(tmp_path), [([1], []), ([1, 2], [3, 4, 5])])


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ({"observe": lambda word: False}, "got 0 observed of 40 rows"),
        ({"label": 1}, "feedback must hold both labels"),
        ({"label": 0}, "feedback must hold both labels, got 0 of label 1"),
    ],
    ids=["unobserved", "only_liked", "only_disliked"],
)
def test_log_that_cannot_be_fitted_is_refused_before_any_worker_starts(
    backbone: str, make_snapshot: Callable[..., Path], tmp_path: Path, log: dict, message: str
):
    with pytest.raises(ValueError, match=message):
        make_actor(backbone, tmp_path).fit(make_snapshot(40, **log), tmp_path, ["causalrm_dr"], candidate="a")


def test_fit_without_the_serving_method_is_refused(backbone: str, make_snapshot: Callable[..., Path], tmp_path: Path):
    actor, snapshot = make_actor(backbone, tmp_path / "reward"), make_snapshot()
    with pytest.raises(ValueError, match=r"methods must include the one that serves, 'causalrm_dr', got \['naive'\]"):
        actor.fit(snapshot, tmp_path, ["naive"], candidate="a")


def test_path_that_does_not_exist_is_refused_before_any_worker_starts(
    backbone: str, make_snapshot: Callable[..., Path], tmp_path: Path
):
    (tmp_path / "states").mkdir()
    with pytest.raises(ValueError, match=r"propensities must be a path that exists, got .*missing"):
        make_actor(backbone, tmp_path / "reward").fit(make_snapshot(), tmp_path / "missing", ["causalrm_dr"], candidate="a")
