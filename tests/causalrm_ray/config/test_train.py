"""The configuration refuses what cannot run, by name, and round-trips through its own file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from causalrm_ray.config.options import dump_config, load_config, options
from causalrm_ray.config.train import Config
from causalrm_ray.errors import ConfigError
from causalrm_ray.estimators.core.task import load_method
from causalrm_ray.registry import ESTIMATORS
from causalrm_ray.types import Sampling


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rewrd.method=naive", ["rewrd: unknown key", "did you mean reward"]),
        ("reward.mehtod=naive", ["reward.mehtod: unknown key", "did you mean reward.method"]),
        ("learner.kl.coeficient=1", ["learner.kl.coeficient: unknown key", "did you mean learner.kl.coefficient"]),
        ("loop.steps=many", ["loop.steps", "integer", "'many'"]),
        ("loop.steps=0", ["loop.steps", "greater than or equal to 1", "0"]),
        ("learner.kl.coefficient=-1", ["learner.kl.coefficient", "greater than or equal to 0", "-1"]),
        ("world.users=nobody", ["world.users", "'protocol'", "'nobody'"]),
        ("rollout.temperature=.nan", ["rollout.temperature", "nan"]),
        ("feedback.signals.share=2", ["feedback.signals.share", "0 or 1", "2"]),
        ("run.name=../elsewhere", ["run.name", "pattern", "../elsewhere"]),
        ("run.name=..", ["run.name", "pattern", ".."]),
        ("steps", ["key=value", "'steps'"]),
        ("coefficients=1", ["coefficients: unknown key"]),
        ("lr=1", ["lr", "reward.lr", "learner.lr"]),
        ("rollout.max_new_tokens=500", ["rollout.max_new_tokens", "model.max_length", "500"]),
        ("learner.algorithm=a2c", ["learner.algorithm", "grpo", "'a2c'"]),
        ("learner.kl.stop=0", ["learner.kl.stop", "greater than 0", "0"]),
        ("reward.method=causalrm", ["reward.method", "causalrm_dr", "'causalrm'"]),
        ("reward.rho=[0.6,0.5]", ["reward.rho", "below 1", "0.6"]),
        ("reward={method: naive, caution: 1}", ["reward.caution needs", "such as auto", "got naive"]),
        ("rollout.engine=sglang", ["rollout.engine", "vllm, hf, or an import path", "'sglang'"]),
        ("rollout.temperature=0", ["rollout.temperature", "greater than or equal to 0.01", "got 0"]),
        ("rollout.temperature=2.5", ["rollout.temperature", "less than or equal to 2", "2.5"]),
        ("rollout.evaluation.temperature=-1", ["rollout.evaluation.temperature", "greater than or equal to 0", "-1"]),
        ("rollout.stop=['']", ["rollout.stop", "at least 1 character"]),
        ("rollout.stop=[-3]", ["rollout.stop", "token ids >= 0", "-3"]),
        ("learner.truncation=-1", ["learner.truncation", "greater than or equal to 0", "-1"]),
        ("learner.truncation=drop", ["learner.truncation", "'mask'", "'drop'"]),
        ("learner.save_memory=[offload]", ["learner.zero_stage must be at least 1 with learner.save_memory=offload, got 0"]),
        ("learner.save_memory=[disk]", ["learner.save_memory", "'checkpointing' or 'offload'", "'disk'"]),
        ("learner.warmup=24", ["learner.warmup must be below loop.steps, got 24 >= 24"]),
        ("learner.schedule=sine", ["learner.schedule", "'cosine'", "'sine'"]),
        ("learner.max_grad_norm=-1", ["learner.max_grad_norm", "greater than or equal to 0", "-1"]),
        ("learner.lora=-1", ["learner.lora", "greater than or equal to 0", "-1"]),
        ("learner.lora_targets=[]", ["learner.lora_targets", "at least one value"]),
        ("learner.lora_targets=[q_proj]", ["learner.lora must be at least 1 with learner.lora_targets, got 0"]),
    ],
)
def test_a_wrong_option_is_refused_by_name_rule_and_value(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    for part in parts:
        assert part in str(caught.value)


def test_noise_rates_that_leave_no_information_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rho_01 \+ rho_10 must be below 1, .* got 1\.1000"):
        load_config(None, ["world.rho=[0.6,0.5]"])


def test_one_gpu_group_per_generator_is_vllms_only() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.tensor_parallel must be 1 with rollout\.engine=hf, got 2"):
        load_config(None, ["rollout.engine=hf", "rollout.tensor_parallel=2"])


def test_evaluations_sample_as_training_does_unless_they_have_options_of_their_own() -> None:
    same = load_config(None, ["rollout.temperature=0.8", "rollout.stop=[' END',7]"]).rollout
    assert same.sampling() == same.sampling(evaluation=True) == Sampling(40, 0.8, stop=(" END", 7))
    own = load_config(None, ["rollout.temperature=0.8", "rollout.evaluation.top_p=0.9", "rollout.stop=[7]"]).rollout
    assert own.sampling() == Sampling(40, 0.8, stop=(7,))
    assert own.sampling(evaluation=True) == Sampling(40, 1.0, top_p=0.9, stop=(7,))


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "gspo", "dapo", "dr_grpo", "cispo"])
def test_algorithms_that_compare_answers_need_two_to_a_prompt(algorithm: str) -> None:
    with pytest.raises(ConfigError, match=rf"samples_per_prompt must be at least 2 with learner\.algorithm={algorithm}, got 1"):
        load_config(None, [f"learner.algorithm={algorithm}", "rollout.samples_per_prompt=1"])
    load_config(None, [f"learner.algorithm={algorithm}"])
    load_config(None, ["learner.algorithm=reinforce_pp", "rollout.samples_per_prompt=1"])


def test_methods_that_can_be_cautious_are_those_fitted_as_ensembles() -> None:
    load_config(None, ["reward.method=latent", "reward.caution=0.5"])
    with pytest.raises(ConfigError, match=r"reward\.caution needs .* ensemble, such as auto, got causalrm_dr"):
        load_config(None, ["reward.method=causalrm_dr", "reward.caution=0.5"])


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["loop.steps=0", "learner.clip=-1"])
    assert "loop.steps" in str(caught.value)
    assert "learner.clip" in str(caught.value)


def test_a_key_may_leave_out_its_section_where_it_is_the_only_one_of_its_name() -> None:
    config = load_config(None, ["resume=true", "steps=7", "run.name=x"])
    assert (config.run.resume, config.loop.steps, config.run.name) == (True, 7, "x")


def test_signals_are_added_to_the_known_ones_and_null_leaves_one_out() -> None:
    signals = load_config(None, ["feedback.signals.share=1", "feedback.signals.click=null"]).feedback.signals
    assert signals == {"upvote": 1, "click": None, "copy": 1, "downvote": 0, "regenerate": 0, "edit": 0, "share": 1}


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("loop: {steps: 3, checkpoint_every: 2}\n", encoding="utf-8")
    config = load_config(file, ["loop.steps=5"])
    assert (config.loop.steps, config.loop.checkpoint_every) == (5, 2)
    assert config.learner == Config().learner


@pytest.mark.parametrize("text", ["- a\n- b\n", "loop: [1\n", "loop: 3\n"])
def test_a_malformed_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        load_config(file)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_the_resolved_copy_reads_back_as_the_same_configuration(tmp_path: Path) -> None:
    config = load_config(None, ["reward.rho=[0.1,0.2]", "learner.kl.target=null", "run.seed=3"])
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_a_user_meets_about_sixty_options_and_each_says_what_it_means() -> None:
    """Counted as a user meets them: each by the key that may be set, those of optional sections too."""
    known = {option.key: option for option in options()}
    assert len(known) == len(list(keys(Config().model_dump() | {"rollout": rollout_with_evaluation()}))) <= 83
    assert [key for key, option in known.items() if not option.meaning] == []


def rollout_with_evaluation() -> dict[str, Any]:
    return load_config(None, ["rollout.evaluation.top_p=0.9"]).rollout.model_dump()


def keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and name not in ("signals", "columns"):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_options_of_nested_and_of_optional_sections_are_listed_and_found_by_their_last_name() -> None:
    known = {option.key for option in options()}
    assert {"learner.kl.coefficient", "rollout.evaluation.top_p"} <= known
    assert "rollout.evaluation" not in known
    assert load_config(None, ["top_k=3"]).rollout.sampling(evaluation=True).top_k == 3


def test_a_choice_shows_the_names_of_its_registry_and_defaults_are_written_as_a_user_writes_them() -> None:
    known = {option.key: option for option in options()}
    assert known["reward.method"].kind == " | ".join((*ESTIMATORS.names(), "package.module:object"))
    assert known["reward.compare"].kind.endswith(" | oracle | package.module:object, ...]")
    assert (known["cluster.address"].default, known["run.resume"].default) == ("null", "false")
    assert (known["world.rho"].kind, known["world.rho"].default) == ("[float, float]", "[0.2, 0.1]")
    assert known["learner.kl.estimator"].kind == "k1 | k2 | k3 | null"


def test_a_signal_that_was_left_out_stays_out_when_the_configuration_is_read_again(tmp_path: Path) -> None:
    config = load_config(None, ["feedback.signals.click=null", "feedback.signals.share=1"])
    dump_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert again.feedback.signals["click"] is None
    assert again.feedback.signals["share"] == 1


def test_simulated_users_need_their_signals() -> None:
    with pytest.raises(ConfigError, match=r"feedback\.signals must label what simulated users send, got none for copy"):
        load_config(None, ["feedback.signals.copy=null"])
    load_config(None, ["feedback.signals.copy=null", "world.users=none"])


def test_every_estimator_can_be_named() -> None:
    for name in ESTIMATORS.names():
        assert load_config(None, [f"reward.method={name}"]).reward.method == name
        assert load_method(name).paper


def test_a_model_alone_is_both_models() -> None:
    config = load_config(None, ["model.max_length=64", "model=some/folder", "model.reward=other"])
    assert (config.model.policy, config.model.reward, config.model.max_length) == ("some/folder", "other", 64)
