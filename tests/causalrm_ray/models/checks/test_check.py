"""Folders of models that cannot work are refused with one sentence each; odd ones that can work are let through."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from causalrm_ray.errors import InputError
from causalrm_ray.models.checks.check import check_backbone, check_policy
from causalrm_ray.models.reward_model import SequenceScorer, score_rows
from causalrm_ray.models.text import encode_pair, load_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
POSITIONS = 256


def save_tokenizer(folder: Path, special: list[str], template: str | None) -> int:
    """A byte-level BPE whose special tokens come first; returns the number of its tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["user assistant system hello what is the answer of course"]
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[-1])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def llama(vocab: int, **changes: Any) -> LlamaConfig:
    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"eos_token_id": 2, "bos_token_id": None, "pad_token_id": 0}
    return LlamaConfig(vocab_size=vocab, max_position_embeddings=POSITIONS, **{**size, **ends, **changes})


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    vocab = save_tokenizer(folder, SPECIAL, CHATML)
    LlamaForCausalLM(llama(vocab)).save_pretrained(folder)
    return folder


def change_json(folder: Path, name: str, **changes: Any) -> None:
    file = folder / name
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**found, **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def replace_by(folder: Path, model: Any) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    model.save_pretrained(folder)


def add_token(folder: Path, token: str, special: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([token], special_tokens=special)
    tokenizer.save_pretrained(folder)


def as_pickle(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_eos(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)


def tiny_bert() -> BertLMHeadModel:
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    return BertLMHeadModel(BertConfig(vocab_size=300, is_decoder=True, **size))


def tiny_t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2))


BOTH = (check_policy, check_backbone)
BAD: dict[str, tuple[Callable[[Path], object], tuple[Callable[..., object], ...], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), BOTH, "must be a Hugging Face folder or hub id"),
    "config cut short": (lambda folder: cut_short(folder / "config.json"), BOTH, "not a valid JSON"),
    "unknown family": (lambda folder: change_json(folder, "config.json", model_type="llama9"), BOTH, "knows, got 'llama9'"),
    "code of its own": (
        lambda folder: change_json(folder, "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        BOTH,
        r"code of its own \(auto_map\), which is never run",
    ),
    "quantised": (
        lambda folder: change_json(folder, "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        BOTH,
        "must not be quantised, got gptq",
    ),
    "numbers that contradict": (
        lambda folder: change_json(folder, "config.json", num_attention_heads=5),
        BOTH,
        "config.json must describe a llama|those that config.json describes",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), BOTH, r"must hold weights, \*.safetensors, got none"),
    "pickled weights": (as_pickle, BOTH, "got pytorch_model.bin, a pickle"),
    "weights cut short": (lambda folder: cut_short(folder / "model.safetensors"), BOTH, "must be a readable .safetensors file"),
    "a missing shard": (
        lambda folder: change_json(
            folder, "model.safetensors.index.json", weight_map={"a": "model.safetensors", "b": "model-2.safetensors"}
        ),
        BOTH,
        "all of its 2 files of weights, 1 are missing, such as model-2.safetensors",
    ),
    "a missing layer": (
        lambda folder: change_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        BOTH,
        "1 are missing, such as model.layers.1.mlp.up_proj.weight",
    ),
    "weights of another size": (
        lambda folder: change_json(folder, "config.json", intermediate_size=128),
        BOTH,
        r"must be \[.*128.*\], as config.json describes it, got \[.*64.*\]",
    ),
    "weights of 8 bits": (
        lambda folder: change_weights(
            folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(300, 32, dtype=torch.int8)})
        ),
        BOTH,
        "got lm_head.weight as I8",
    ),
    "an encoder": (lambda folder: replace_by(folder, tiny_bert()), (check_backbone,), "a backbone must be a decoder.*got a bert"),
    "encoder and decoder": (lambda folder: replace_by(folder, tiny_t5()), BOTH, "must be a decoder .*got a t5"),
    "a classifier": (
        lambda folder: replace_by(folder, LlamaForSequenceClassification(llama(300, num_labels=1))),
        (check_policy,),
        "got the architecture LlamaForSequenceClassification",
    ),
    "a classifier of three": (
        lambda folder: replace_by(folder, LlamaForSequenceClassification(llama(300, num_labels=3))),
        (check_backbone,),
        r"score.weight must be \[1, 32\], as config.json describes it, got \[3, 32\]",
    ),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("*token*")],
        BOTH,
        "a Hugging Face folder or hub id with a tokenizer",
    ),
    "a broken tokenizer": (lambda folder: cut_short(folder / "tokenizer.json"), BOTH, "hub id with a tokenizer"),
    "no template": (
        lambda folder: (folder / "chat_template.jinja").unlink(),
        BOTH,
        "has no chat template.* by the option chat_template",
    ),
    "a template with a fault": (
        lambda folder: (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}"),
        BOTH,
        "the model's chat template refuses messages of user",
    ),
    "a template without the message": (
        lambda folder: (folder / "chat_template.jinja").write_text("<|im_start|>assistant\n"),
        BOTH,
        "chat template leaves out message 1, of the user",
    ),
    "no end": (without_eos, BOTH, "has no end-of-sequence token"),
    "more tokens than rows": (
        lambda folder: add_token(folder, "<tool>", special=False),
        BOTH,
        "1 of the tokenizer are beyond its 300 rows, such as '<tool>', 300: resize it",
    ),
    "an end beyond the rows": (
        lambda folder: change_json(folder, "generation_config.json", eos_token_id=[2, 300]),
        BOTH,
        "eos_token_id must be ids of the 300 rows of the embedding, got 300",
    ),
    "generation settings that contradict": (
        lambda folder: change_json(folder, "generation_config.json", do_sample=False, temperature=0.7),
        (check_policy,),
        "generation_config.json must be one that transformers saves.*temperature",
    ),
    "generation settings cut short": (
        lambda folder: (folder / "generation_config.json").write_text("{"),
        BOTH,
        "generation_config.json",
    ),
    "a pad beyond the rows": (
        lambda folder: change_json(folder, "config.json", pad_token_id=300),
        BOTH,
        "pad_token_id.*300",
    ),
    "fewer layers than its files": (
        lambda folder: change_json(folder, "config.json", num_hidden_layers=1),
        BOTH,
        "must describe all layers of its files, got 1, and model.layers.1",
    ),
    "rows longer than its positions": (
        lambda folder: change_json(folder, "config.json", max_position_embeddings=32),
        BOTH,
        "max_length must be at most the 32 positions of .*, got 64",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_refused_with_one_sentence(name: str, sound: Path, tmp_path: Path) -> None:
    spoil, checks, sentence = BAD[name]
    folder = shutil.copytree(sound, tmp_path / "model")
    spoil(folder)
    for check in checks:
        with pytest.raises(InputError, match=sentence) as refused:
            check(str(folder), 64)
        assert len(str(refused.value)) < 700


def test_a_sound_folder_is_described(sound: Path) -> None:
    facts = check_policy(str(sound), POSITIONS)
    assert (facts.family, facts.rows, facts.ends) == ("llama", 300, ("<|im_end|>",))
    assert facts.parameters == sum(tensor.numel() for tensor in load_file(sound / "model.safetensors").values())
    assert check_backbone(str(sound), POSITIONS).parameters == facts.parameters - 300 * 32 + 32


def test_special_tokens_beyond_the_rows_are_let_through_where_nothing_produces_them(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    add_token(folder, "<image>", special=True)
    check_policy(str(folder), 64)
    check_backbone(str(folder), 64)
    tokenizer = load_tokenizer(str(folder))
    assert max(encode_pair(tokenizer, "an <image> of it", "<image>")) < 300


def test_nothing_is_quantised_where_the_configuration_says_so(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    change_json(folder, "config.json", quantization_config=None)
    check_policy(str(folder), 64)


def test_a_model_of_a_hub_is_checked_without_its_weights(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--team--tiny"
    shutil.copytree(sound, repository / "snapshots" / ("0" * 40), ignore=shutil.ignore_patterns("*.safetensors"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    program = (
        "from causalrm_ray.models.checks.check import check_backbone, check_policy\n"
        "print(check_policy('team/tiny', 64).rows, check_backbone('team/tiny', 64).rows)"
    )
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["300", "300"], done.stderr[-2000:]


def test_a_template_by_name_among_several_is_the_default_one(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    templates = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": PLAIN}]
    change_json(folder, "tokenizer_config.json", chat_template=templates)
    check_policy(str(folder), 64)
    assert load_tokenizer(str(folder)).chat_template == CHATML


def test_a_tokenizer_with_one_special_token_gets_one_to_pad_with(tmp_path: Path) -> None:
    vocab = save_tokenizer(tmp_path / "model", ["<|endoftext|>"], PLAIN)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=vocab, **size, eos_token_id=0, bos_token_id=0)).save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    check_policy(model, 64)
    check_backbone(model, 64)
    tokenizer, scorer = load_tokenizer(model), SequenceScorer.from_pretrained(model)
    torch.nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(1))
    rows = [encode_pair(tokenizer, "hello", answer) for answer in ("of course", "the answer is what it is, of course it is")]
    expected = score_rows(scorer, rows)
    scorer.save_pretrained(tmp_path / "saved", tokenizer)
    torch.testing.assert_close(score_rows(scorer, rows), expected)
    stock: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.pad_token_id == vocab == stock.config.pad_token_id
    batch = saved.pad({"input_ids": [list(row) for row in rows]}, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(stock(**batch).logits[:, 0], expected, rtol=0, atol=1e-6)
