"""A saved reward folder's chat template gives the ids that were trained on, for the kinds of templates that models have."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from causalrm_ray.conversation import Conversation, ConversationError
from causalrm_ray.models.text import answer_template, encode_pair, encode_prompt, load_tokenizer, render

CHATML = """{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}
{%- if tools %}{{ '<|im_start|>system\n# Tools\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{{- '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{%- set system_message = messages[0]['content'] %}
{%- else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant') }}{% endif %}
{%- if loop.index0 == 0 and system_message %}
{%- set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}
{%- else %}{% set content = message['content'] %}{% endif %}
{%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}
{%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}
{%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% else %}
{{- raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
PHI = """{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '<|end|>\n' }}
{%- elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '<|end|>\n' }}
{%- elif message['role'] == 'assistant' %}{{ '<|assistant|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
QWEN3 = """{% for message in messages %}{% set content = message.content %}
{%- if message.role == 'assistant' and '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{%- if message.role == 'assistant' and loop.last %}{% set content = '<think>\n\n</think>\n\n' + content %}{% endif %}
{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""


class Kind(NamedTuple):
    """A template with its special tokens, of which the first ends texts; how the tokenizer splits; what generation ends in."""

    template: str
    special: tuple[str, ...]
    bytes: bool
    stops: tuple[str, ...]


KINDS = {
    "chatml": Kind(CHATML, ("<|im_end|>", "<|im_start|>"), True, ("<|im_end|>",)),
    "llama2": Kind(LLAMA2, ("</s>", "<s>"), False, ("</s>",)),
    "llama3": Kind(
        LLAMA3,
        ("<|end_of_text|>", "<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        True,
        ("<|end_of_text|>", "<|eot_id|>"),
    ),
    "mistral": Kind(MISTRAL, ("</s>", "<s>", "[INST]", "[/INST]"), False, ("</s>",)),
    "gemma": Kind(GEMMA, ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), False, ("<eos>", "<end_of_turn>")),
    "phi": Kind(PHI, ("<|endoftext|>", "<|end|>", "<|user|>", "<|system|>", "<|assistant|>"), True, ("<|endoftext|>", "<|end|>")),
    "qwen3": Kind(QWEN3, ("<|im_end|>", "<|im_start|>", "<think>", "</think>"), True, ("<|im_end|>",)),
}
ENDS = {"chatml": "<|im_end|>", "llama2": "</s>", "llama3": "<|eot_id|>", "mistral": "</s>"}
ENDS |= {"gemma": "<end_of_turn>", "phi": "<|end|>", "qwen3": "<|im_end|>"}
BEGINNINGS = {"llama2": "<s>", "llama3": "<|begin_of_text|>", "mistral": "<s>", "gemma": "<bos>"}
LINES = ["Hello, how can I help you today?", "The capital of France is Paris.", "yes, 1 of them", "- a list\n- of things"] * 4
TURNS = [
    {"role": "user", "content": "Where is Paris?"},
    {"role": "assistant", "content": "In France."},
    {"role": "user", "content": "And  Rome?\n\n1. tell me\n"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def save(kind: Kind, folder: Path) -> str:
    """A folder with a small tokenizer of this kind, as a model's folder has it."""
    bpe = Tokenizer(models.BPE(byte_fallback=not kind.bytes, unk_token=None if kind.bytes else "<unk>"))
    if kind.bytes:
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
    else:
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        bpe.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
        )
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind.bytes else [chr(code) for code in range(32, 127)] + ["▁", "\n"]
    special = [*kind.special, "<unk>", *([] if kind.bytes else [f"<0x{code:02X}>" for code in range(256)])]
    bpe.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet))
    beginning = next((token for token in BEGINNINGS.values() if token in kind.special), None)
    if beginning:
        token = (beginning, bpe.token_to_id(beginning))
        bpe.post_processor = processors.TemplateProcessing(single=f"{beginning} $A", special_tokens=[token])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=kind.special[0],
        bos_token=beginning,
        unk_token="<unk>",
        additional_special_tokens=list(kind.special[1:]),
        chat_template=kind.template,
    )
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids(list(kind.stops))).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer(name: str, tmp_path: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(save(KINDS[name], tmp_path))


def natural(tokenizer: PreTrainedTokenizerBase, folder: Path, messages: list[dict[str, Any]], **more: Any) -> list[int]:
    """What another library gets of a saved folder: the chat template of its tokenizer, without anything of ours."""
    tokenizer.chat_template = answer_template(tokenizer)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=True, return_dict=False, **more)


@pytest.mark.parametrize("answer", ["Rome is in Italy.", "yes", "- a\n- b", "1", " - x", "Hello <|x|> é"])
def test_the_saved_template_gives_the_ids_that_were_trained_on(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, answer: str
) -> None:
    known = [TURNS] if name in ("mistral", "gemma") else [TURNS, [SYSTEM, *TURNS]]
    for messages in known:
        trained = encode_pair(tokenizer, Conversation.of(messages), answer)
        assert tokenizer.convert_ids_to_tokens(trained[-1]) == ENDS[name]
        if name in BEGINNINGS:
            assert trained.count(tokenizer.bos_token_id) == (2 if name == "llama2" else 1)
        asked = encode_prompt(tokenizer, Conversation.of(messages))
        assert trained[: len(asked)] == asked
        assert natural(tokenizer, tmp_path / "saved", [*messages, {"role": "assistant", "content": answer}]) == list(trained)
        own = load_tokenizer(str(tmp_path / "saved"))  # the saved folder is a backbone, too
        assert encode_pair(own, Conversation.of(messages), answer) == trained
        assert own.chat_template == KINDS[name].template.removesuffix("\n")
        tokenizer.chat_template = own.chat_template


def test_a_prompt_is_rendered_as_the_models_own_template_does(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    own = PreTrainedTokenizerFast.from_pretrained(save(KINDS[name], tmp_path))
    expected = own.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert list(encode_prompt(tokenizer, Conversation.of(TURNS))) == expected
    assert natural(tokenizer, tmp_path / "saved", TURNS, add_generation_prompt=True) == expected


@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_a_role_that_the_template_refuses_is_refused_by_name(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConversationError, match="the model's chat template refuses messages of system, user, assistant, user: "):
        encode_prompt(tokenizer, Conversation.of([SYSTEM, *TURNS]))


@pytest.mark.parametrize("name", ["phi"])
def test_what_the_template_leaves_out_is_refused_and_a_developer_is_a_system(tokenizer: PreTrainedTokenizerBase) -> None:
    developer = Conversation.of([{**SYSTEM, "role": "developer"}, *TURNS])
    assert render(tokenizer, developer) == render(tokenizer, Conversation.of([SYSTEM, *TURNS]))
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    with pytest.raises(ConversationError, match="leaves out tools"):
        render(tokenizer, Conversation.of(TURNS, [tool]))
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ConversationError, match="leaves out message 1, of the system"):
        render(tokenizer, Conversation.of([SYSTEM, *TURNS]))


@pytest.mark.parametrize("name", ["chatml"])
def test_arguments_of_calls_are_objects_for_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    call = {"type": "function", "function": {"name": "look_up", "arguments": '{"plant": "ivy"}'}}
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    turns = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "mildew"}]
    text = render(tokenizer, Conversation.of(turns, [tool]))
    assert '{"name": "look_up", "arguments": {"plant": "ivy"}}' in text
    assert '"parameters": {}' in text
