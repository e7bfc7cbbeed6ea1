"""The engine on transformers alone: what it owes to nobody else's batch, and how it fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from actors.errors import EngineDeadError
from actors.rollout import hf_batch
from actors.rollout.engine import EngineSettings
from actors.rollout.hf_engine import HfEngine
from actors.weights.packing import pack
from causalrm_ray.conversation import Conversation
from causalrm_ray.models.policy import load_policy
from causalrm_ray.types import Completion, Prompt, Request, Sampling

SAMPLING = Sampling(max_new_tokens=12)


def requests(count: int, first: int = 0) -> list[Request]:
    """Prompts of 1 to 30 tokens."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(5, 300, (1 + 7 * row % 30,), generator=generator).tolist() for row in range(count)]
    return [Request(Prompt(f"p{row:03d}", Conversation.user("hi"), tuple(ids)), 50 + row) for row, ids in enumerate(rows)][first:]


def settings(model: str, dtype: str = "float32", **options: int) -> EngineSettings:
    return EngineSettings(model, max_length=64, dtype=dtype, cache="", timeout_s=60.0, buffer=1000, **options)


@pytest.fixture
def engine(backbone: str) -> Iterator[HfEngine]:
    made = HfEngine(settings(backbone))
    yield made
    made.close()


def answers(engine: HfEngine, batch: Sequence[Request], sampling: Sampling = SAMPLING) -> dict[str, Completion]:
    return {done.prompt.id: done for done in engine.submit(batch, sampling)}


def check_same(found: Completion, expected: Completion) -> None:
    assert (found.token_ids, found.stop_reason) == (expected.token_ids, expected.stop_reason)
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_an_answer_does_not_depend_on_the_batch_around_it(engine: HfEngine) -> None:
    together = answers(engine, requests(300))  # more than run at once: rows join others that are further on
    assert len(together) == 300
    for request in requests(300)[::23]:
        check_same(answers(engine, [request])[request.prompt.id], together[request.prompt.id])


def test_a_batch_repeats_to_the_bit_whatever_others_submit(engine: HfEngine) -> None:
    alone = answers(engine, requests(20))
    others = [engine.submit(requests(60, first=first), SAMPLING) for first in (20, 40)]
    assert answers(engine, requests(20)) == alone
    assert [len(list(stream)) for stream in others] == [40, 20]


def test_a_prompt_read_in_parts_gives_the_same_answers(engine: HfEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answers(engine, requests(20))
    monkeypatch.setattr(hf_batch, "PREFILL_TOKENS", 70)
    for name, done in answers(engine, requests(20)).items():
        check_same(done, whole[name])


def test_rows_that_others_abandon_leave_the_rest_alone(engine: HfEngine) -> None:
    alone = answers(engine, requests(20))
    abandoned = engine.submit(requests(300), SAMPLING)
    next(abandoned)
    abandoned.close()
    assert list(abandoned) == []
    assert answers(engine, requests(20)) == alone


def test_weights_that_do_not_fit_are_refused_by_name_and_change_nothing(engine: HfEngine, backbone: str) -> None:
    expected = answers(engine, requests(5))
    named = dict(load_policy(backbone, torch.float32).named_parameters())
    norm = "model.norm.weight"
    for wrong, part in (
        ({**named, norm: torch.ones(7)}, r"\(7,\)"),
        ({**named, norm: named[norm].bfloat16()}, "bfloat16"),
        ({**named, "extra": torch.ones(3)}, "first extra: the engine's absent"),
    ):
        with pytest.raises(ValueError, match=part):
            engine.load_weights(pack(1, wrong.items()))
    assert answers(engine, requests(5)) == expected
    report = engine.load_weights(pack(4, named.items()))
    assert (report.version, report.checksum_ok, engine.versions()["policy_version"]) == (4, True, 4)


def test_half_precision_sums_and_samples(backbone: str) -> None:
    engine = HfEngine(settings(backbone, "bfloat16"))
    named = load_policy(backbone, torch.bfloat16).named_parameters()
    assert engine.load_weights(pack(2, named)).checksum_ok
    assert {done.policy_version for done in answers(engine, requests(9)).values()} == {2}
    engine.close()


def test_an_error_in_a_step_kills_the_engine_by_name_for_all_who_wait(engine: HfEngine) -> None:
    waiting = engine.submit(requests(3000), SAMPLING)
    broken = engine.submit([Request(Prompt("bad", Conversation.user("hi"), (10_000,)), 0)], SAMPLING)  # no such token
    with pytest.raises(EngineDeadError, match="the hf engine is dead: IndexError"):
        list(broken)
    with pytest.raises(EngineDeadError, match="the hf engine is dead: IndexError"):
        list(waiting)
    with pytest.raises(EngineDeadError):
        engine.submit(requests(1), SAMPLING)


def test_a_closed_engine_serves_no_more(engine: HfEngine) -> None:
    waiting = engine.submit(requests(3000), SAMPLING)
    engine.close()
    with pytest.raises(EngineDeadError, match="the engine was closed"):
        list(waiting)
