"""What the learner makes of its options: an algorithm, ours or another package's, with a clip and a KL estimator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actors.learner.rank import make_objective
from causalrm_ray.config.options import load_config
from causalrm_ray.config.train import LearnerConfig
from causalrm_ray.registry import ALGORITHMS


def test_the_kl_estimator_is_the_algorithm_s_own_unless_one_is_named() -> None:
    found = {name: make_objective(LearnerConfig(algorithm=name), 8).kl for name in ALGORITHMS.names()}
    assert found == dict.fromkeys(found, "k3") | {"ppo": "k1", "rloo": "k1", "reinforce_pp": "k1"}
    assert make_objective(LearnerConfig(algorithm="grpo", kl={"estimator": "k2"}), 8).kl == "k2"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"algorithm": "ppo"}, (0.2, 0.2)),
        ({"algorithm": "dapo"}, (0.2, 0.28)),
        ({"algorithm": "dapo", "clip": 0.1}, (0.1, 0.1)),
        ({"algorithm": "ppo", "clip_high": 0.3}, (0.2, 0.3)),
        ({"algorithm": "gspo", "clip": 0.1, "clip_high": 0.3}, (0.1, 0.3)),
    ],
)
def test_the_clip_is_the_algorithm_s_own_unless_one_is_given(options: dict, expected: tuple[float, float]) -> None:
    assert make_objective(LearnerConfig(**options), 8).clip == expected


def test_another_package_s_algorithm_brings_its_own_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vanilla.py").write_text(
        "from causalrm_ray.rl.algorithms import ALGORITHMS\n"
        "def loss(logprobs_BR, ratio_BR, advantages_BR, clip):\n"
        "    return -advantages_BR * logprobs_BR\n"
        "VANILLA = ALGORITHMS['rloo']._replace(loss=loss)\n"
        "WRONG = VANILLA._replace(reduction='mean')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"samples_per_prompt must be at least 2 with learner\.algorithm=vanilla:VANILLA"):
        load_config(None, ["learner.algorithm=vanilla:VANILLA", "rollout.samples_per_prompt=1"])
    objective = make_objective(load_config(None, ["learner.algorithm=vanilla:VANILLA"]).learner, 8)
    with pytest.raises(ValueError, match=r"reduction of algorithm 'vanilla:WRONG' must be one of token_mean, .*, got 'mean'"):
        make_objective(LearnerConfig(algorithm="vanilla:WRONG"), 8)
    one = torch.ones(1, 1)
    assert objective.algorithm.loss(-3 * one, one, 2 * one, objective.clip).tolist() == [[6.0]]


def test_what_is_no_algorithm_is_refused_by_what_it_lacks() -> None:
    with pytest.raises(
        ValueError, match=r"algorithm 'json:dumps' must have the attributes advantages, loss, ratio, .*, got <func"
    ):
        make_objective(LearnerConfig(algorithm="json:dumps"), 8)
