"""A tokenizer whose tokens are words, so that a test can read what it made."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCAB = 200
WORDS = ["<pad>", "<eos>", "<user>", "<bot>"] + [f"w{number}" for number in range(VOCAB - 4)]
TEMPLATE = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}<bot>"


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of words."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
