"""What the doctor says of libraries that cannot be imported, and what it tries to know it."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from causalrm_ray.config.options import load_config
from causalrm_ray.config.train import Config
from causalrm_ray.models.identity import with_template
from causalrm_ray.models.text import load_tokenizer, render
from causalrm_ray.registry import ENGINES
from causalrm_ray.world.grammar import train_prompts
from causalrm_ray.world.pretrain import CHAT_TEMPLATE, PretrainSettings, llama_config, train_tokenizer
from jobs import doctor
from jobs.__main__ import main
from jobs.support.prompts import find_models


def test_a_library_that_cannot_be_imported_is_named_with_the_reason() -> None:
    assert "No module named 'no_such_library'" in doctor._import_error("no_such_library")
    assert list(doctor.import_errors(["json", "no_such_library", "csv"])) == ["no_such_library"]


def test_the_engines_that_work_are_named() -> None:
    assert doctor.rollout_engines([], ENGINES.names()) == ["vllm", "hf"]
    assert doctor.rollout_engines(["vllm", "deepspeed"], ENGINES.names()) == ["hf"]
    assert doctor.rollout_engines(["transformers"], ENGINES.names()) == []


def test_a_broken_ray_is_a_finding_among_the_others(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "_import_error", lambda name: "broken" if name == "ray" else "")
    monkeypatch.setitem(sys.modules, "actors.cluster.runtime", None)
    assert doctor.run(Config()) == 1
    shown = capsys.readouterr()
    assert "rollout.engine" in shown.out
    assert "ray cannot be imported (broken)" in shown.err


def test_another_package_s_engine_that_cannot_be_imported_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "other-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[causalrm_ray.engines]\nlost = no_such_package:Engine\n")
    monkeypatch.syspath_prepend(tmp_path)
    broken = doctor.broken_engines(*ENGINES.names())
    assert broken == {"lost": "engine 'no_such_package:Engine' cannot be imported: No module named 'no_such_package'"}


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    settings = PretrainSettings(hidden=32, intermediate=32, layers=1, heads=1)
    tokenizer = train_tokenizer(train_prompts(), settings)
    tokenizer.save_pretrained(tmp_path / "model")
    LlamaForCausalLM(llama_config(tokenizer, settings)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_that_works_is_described_with_its_memory_by_role(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", f"model={sound}"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "model.policy llama," in shown
    assert "answers end at <|end|>" in shown
    assert [role for role in ("generator-1", "learner-1", "reward", "propensity") if role not in shown] == []


def test_models_that_do_not_go_together_and_layers_that_are_not_there_are_named(
    sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(sound, sound.parent / "other")
    (other / "chat_template.jinja").write_text(CHAT_TEMPLATE + "x")
    assert main(["doctor", f"model.policy={sound}", f"model.reward={other}"]) == 1
    assert "model.reward must share the policy's tokenizer and chat template" in capsys.readouterr().err
    assert main(["doctor", f"model.policy={sound}", "learner.lora=4", "learner.lora_targets=[nosuch]"]) == 1
    shown = capsys.readouterr()
    assert "got 'nosuch'" in shown.err
    assert "model.reward" not in shown.out


def test_a_template_is_put_before_a_model_by_several_at_once(sound: Path) -> None:
    template = sound.parent / "mine.jinja"
    template.write_text(CHAT_TEMPLATE)
    with ThreadPoolExecutor(8) as pool:
        found = {*pool.map(lambda _: with_template(str(sound), template, sound.parent / "cache"), range(64))}
    assert len(found) == 1
    assert {path.name for path in Path(found.pop()).iterdir()} >= {"config.json", "model.safetensors", "chat_template.jinja"}


def test_a_model_that_does_not_work_is_named_with_the_reason_once(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sound / "model.safetensors").unlink()
    assert main(["doctor", f"model={sound}"]) == 1
    shown = capsys.readouterr()
    assert shown.out.count("does not work") == 2
    assert shown.err == f"{sound} must hold weights, *.safetensors, got none\n"


def test_a_model_that_does_not_work_ends_a_job_before_anything_starts(
    sound: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.train_policy.ray_cluster", None)  # to call it would be another error
    (sound / "config.json").unlink()
    runs = sound.parent / "runs"
    assert main(["train-policy", f"model={sound}", "loop.max_failures=0", f"run.dir={runs}"]) == 2
    assert "must be a Hugging Face folder or hub id" in capsys.readouterr().err
    assert not (runs / "train-policy" / "checkpoints").exists()


def test_a_template_of_a_file_makes_a_base_model_usable(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sound / "chat_template.jinja").unlink()
    options = [f"model={sound}", f"run.cache={sound.parent / 'cache'}"]
    assert main(["doctor", *options]) == 1
    assert "chat_template" in capsys.readouterr().err
    template = sound.parent / "mine.jinja"
    template.write_text(CHAT_TEMPLATE.replace("<|", "(").replace("|>", ")"))
    config = load_config(None, [*options, f"model.chat_template={template}"])
    models = find_models(config)
    assert models.policy == models.reward
    tokenizer = load_tokenizer(models.policy)
    assert render(tokenizer, "hello") == "(user)hello(assistant)"
    weights = Path(models.policy) / "model.safetensors"
    assert weights.resolve() == sound / "model.safetensors"
    assert main(["doctor", *options, f"model.chat_template={sound}/none.jinja"]) == 1
    assert "chat_template: " in capsys.readouterr().err


@pytest.mark.parametrize("option", ["run.cache", "run.dir"])
def test_a_folder_that_cannot_be_written_is_named_by_its_option(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    places = {"run.cache": tmp_path / "cache", "run.dir": tmp_path / "runs"} | {option: tmp_path / "file" / "below"}
    assert main(["fit-reward", "feedback.source=x", *(f"{name}={path}" for name, path in places.items())]) == 2
    shown = capsys.readouterr().err
    assert f"{option}: {tmp_path / 'file' / 'below'} must be a folder that can be written" in shown
    assert f"choose another: {option}=FOLDER" in shown
