"""Small tokenizers of the kinds that models have, trained on a few sentences.

byte level   every byte is a letter of the vocabulary, special tokens come after it: Llama 3, Qwen, GPT-2, GPT-NeoX, OPT, OLMo
metaspace    a blank is U+2581, what is unknown is bytes, special tokens come first: Llama 2, Mistral, Gemma, Phi-3
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.gemma.tokenization_gemma import GemmaTokenizer
from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer
from transformers.models.gpt_neox.tokenization_gpt_neox import GPTNeoXTokenizer
from transformers.models.llama.tokenization_llama import LlamaTokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

SENTENCES = (
    "The river is high after the rain, and the bridge is closed until Monday.",
    "Tell me how the old mill works; you can be brief, 2 or 3 sentences are enough.",
    "Sure! The wheel turns the shaft, the shaft turns the stone, and the stone grinds the grain.",
    "No, 12 of them were late: the train from the north had stopped twice.",
    "yes, 1 of them is here; the others went home.\n- first, open the gate\n- then close it again\n",
    "def area(width, height):\n    return width * height\n",
    "The answer to the question is that the water was cold, the stones were wet and the lamp was lit.",
)
PIECES = 160  # that are trained, above bytes or letters
Pieces = tuple[dict[str, int], Any]  # vocabulary; merges as pairs, which transformers takes, but declares as texts


def _train(pre_tokenizer: Any, alphabet: Sequence[str]) -> Pieces:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    size = len(set(alphabet) | set("".join(SENTENCES))) + PIECES
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=list(alphabet), show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


def byte_level(first: Sequence[str] = ()) -> Pieces:
    """Vocabulary and merges over bytes, with the special tokens that come `first`."""
    vocab, merges = _train(pre_tokenizers.ByteLevel(add_prefix_space=False), sorted(pre_tokenizers.ByteLevel.alphabet()))
    pieces = [*first, *sorted(vocab, key=vocab.__getitem__)]
    return {piece: number for number, piece in enumerate(pieces)}, merges


def metaspace(first: Sequence[str]) -> Pieces:
    """Vocabulary and merges over letters, below the special tokens that come `first` and the 256 bytes."""
    vocab, merges = _train(pre_tokenizers.Metaspace(), [])
    pieces = [*first, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(vocab, key=vocab.__getitem__)]
    return {piece: number for number, piece in enumerate(pieces)}, merges


def _special(*texts: str) -> dict[str, Any]:
    return {"additional_special_tokens": [AddedToken(text, special=True, normalized=False) for text in texts]}


def llama_2() -> PreTrainedTokenizerBase:
    """No padding token."""
    vocab, merges = metaspace(["<unk>", "<s>", "</s>"])
    return LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)


def mistral() -> PreTrainedTokenizerBase:
    """As Llama 2's, with the signs of turns as tokens."""
    vocab, merges = metaspace(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    return LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True, **_special("[INST]", "[/INST]"))


def phi_3() -> PreTrainedTokenizerBase:
    """A blank goes before each part between special tokens; those of turns swallow the blanks and line breaks after them."""
    vocab, merges = metaspace(["<unk>", "<s>", "</s>"])
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    turns = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False, rstrip=True) for text in turns])
    tokens = {"bos_token": "<s>", "eos_token": turns[0], "pad_token": turns[0], "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def gemma(*others: str) -> PreTrainedTokenizerBase:
    """All that a sentence may need; `others` are tokens besides those of turns."""
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", *others]
    vocab, merges = metaspace(first)
    return GemmaTokenizer(vocab=vocab, merges=merges, **_special(*first[5:]))


def llama_3() -> PreTrainedTokenizerBase:
    """No padding token; a row begins with <|begin_of_text|>, which the tokenizer itself adds."""
    vocab, merges = byte_level()
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    backend.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in names])
    begin = ("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin[0]} $A", pair=f"{begin[0]} $A $B", special_tokens=[begin]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def qwen() -> PreTrainedTokenizerBase:
    """No beginning of a row."""
    vocab, merges = byte_level()
    specials = _special("<|im_start|>", "<|im_end|>")
    return Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>", **specials)


def gpt_2(*turns: str) -> PreTrainedTokenizerBase:
    """One token begins, ends and is unknown; `turns` are those that users add to it."""
    vocab, merges = byte_level()
    vocab["<|endoftext|>"] = len(vocab)
    return GPT2Tokenizer(vocab=vocab, merges=merges, **(_special(*turns) if turns else {}))


def opt() -> PreTrainedTokenizerBase:
    """GPT-2's with other tokens, and </s> at the beginning of a row as well."""
    vocab, merges = byte_level(["<s>", "<pad>", "</s>", "<unk>"])
    tokens = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    return GPT2Tokenizer(vocab=vocab, merges=merges, add_bos_token=True, **tokens)


def gpt_neox() -> PreTrainedTokenizerBase:
    """One token begins, ends and is unknown; padding has one of its own."""
    vocab, merges = byte_level(["<|endoftext|>", "<|padding|>"])
    return GPTNeoXTokenizer(vocab=vocab, merges=merges)


def olmo_2() -> PreTrainedTokenizerBase:
    """GPT-2's with a padding token; turns are marked by text."""
    vocab, merges = byte_level()
    for text in ("<|endoftext|>", "<|pad|>"):
        vocab[text] = len(vocab)
    return GPT2Tokenizer(vocab=vocab, merges=merges, pad_token="<|pad|>")


def byte_level_with(end: str, pad: str, begin: str | None, *others: str) -> PreTrainedTokenizerBase:
    """A backend of bytes, as a folder without a tokenizer class of its own has it."""
    vocab, merges = byte_level()
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [text for text in (begin, end, pad, *others) if text is not None]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=begin, eos_token=end, pad_token=pad)
