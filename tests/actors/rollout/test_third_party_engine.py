"""An engine of another package, named by import path: what its class says of itself is all that we ask before it runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.placement_plan import make_plan
from actors.rollout.engine import EngineSettings
from actors.rollout.generator import Generator
from causalrm_ray.config.options import load_config
from causalrm_ray.conversation import Conversation
from causalrm_ray.errors import ConfigError
from causalrm_ray.models.size import ModelSize
from causalrm_ray.registry import ENGINES
from causalrm_ray.types import Prompt, Request
from jobs import doctor

ENGINE = """
import dataclasses
from actors.rollout.engine import Library
from actors.rollout.hf_engine import HfEngine
from actors.rollout.step_thread import StepThreadEngine

class Greedy(StepThreadEngine):
    tensor_parallel = True
    shares_process = True
    transports = frozenset({"object", "ipc"})
    process_bytes = 123_456
    requires = {"no_such_library": Library(("no-such-library",), "pip install no-such-library")}

    @staticmethod
    def process_env(model, cache, gpu):
        return {"GREEDY": "1"}

    def __init__(self, settings):
        from actors.rollout.hf_core import HfCore
        from causalrm_ray.models.text import load_tokenizer

        class Core(HfCore):
            def add(self, requests, sampling):
                super().add(requests, dataclasses.replace(sampling, temperature=0.0))

            def about(self):
                return {**super().about(), "name": "greedy"}

        tokenizer = load_tokenizer(settings.model)
        super().__init__("greedy", lambda: Core(settings, tokenizer), settings)
"""
SIZE = ModelSize(parameters=1000, backbone=800, layers=2, hidden=10, vocabulary=20, linear_widths=50, kv_width=6)
ALONE = ["cluster.address=in-process", "rollout.generators=1", "learner.ranks=1", "reward.workers=0"]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "their_engines.py").write_text(ENGINE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "their_engines:Greedy"
    sys.modules.pop("their_engines", None)


def test_a_generator_runs_on_it(engine: str, backbone: str, tmp_path: Path) -> None:
    config = load_config(None, [*ALONE, f"rollout.engine={engine}"])
    settings = EngineSettings(backbone, 64, "float32", tmp_path, timeout_s=60.0, buffer=8)
    generator = Generator(engine, settings, config.rollout.sampling())
    same = [Request(Prompt(f"p{seed}", Conversation.user("hi"), (3, 5, 7)), seed) for seed in range(4)]
    assert len({done.token_ids for done in generator.generate(same)}) == 1  # greedy, whatever the seed
    assert generator.info()["name"] == "greedy"
    generator.close()


def test_plan_and_configuration_ask_its_class(engine: str) -> None:
    chosen = f"rollout.engine={engine}"
    cpu = [make_plan(load_config(None, [name]), SIZE, SIZE, ("generators",), 0) for name in (chosen, "rollout.engine=hf")]
    mine, hf = (plan.allocations["generator-0"].bytes for plan in cpu)
    assert hf - mine == int(0.45 * 2**30) - 123_456
    parts = ("generators", "learner", "reward")
    own = make_plan(load_config(None, [chosen]), SIZE, SIZE, parts, 5)  # GPUs of their own: it receives no broadcast
    shared = make_plan(load_config(None, [chosen]), SIZE, SIZE, parts, 4)
    assert (own.transport, shared.transport) == ("object", "ipc")
    assert load_config(None, [chosen, "rollout.tensor_parallel=2"]).rollout.tensor_parallel == 2
    with pytest.raises(ConfigError, match=r"needs a rollout\.engine that can share a process, such as hf, got vllm"):
        load_config(None, [*ALONE, "rollout.engine=vllm"])


def test_doctor_says_what_it_needs(engine: str) -> None:
    assert doctor.engine_libraries(engine)["no_such_library"].remedy == "pip install no-such-library"


@pytest.mark.parametrize("name", ["vllm", "hf"])
def test_the_class_of_an_engine_is_read_without_torch(name: str) -> None:
    program = f"import sys; from causalrm_ray.registry import ENGINES; ENGINES.load({name!r}).process_bytes; "
    program += "print({'torch', 'transformers', 'vllm', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_our_engines_say_what_their_processes_need(tmp_path: Path) -> None:
    assert ENGINES.load("vllm").process_env("hub/model", tmp_path, gpu=True)["VLLM_CACHE_ROOT"] == str(tmp_path / "vllm")
    assert ENGINES.load("hf").process_env(str(tmp_path), tmp_path, gpu=False)["HF_HUB_OFFLINE"] == "1"
