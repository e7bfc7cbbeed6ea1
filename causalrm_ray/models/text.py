"""Text to token ids: the one path that training, evaluation and serving share."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from causalrm_ray.conversation import Conversation
from causalrm_ray.errors import InputError

_ONE_TURN = '"role":"user"}]'  # how the text of a conversation ends that is one turn of a user
_PLAIN_KEYS = {"role", "content"}


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or hub id. Raises InputError unless there is one that can chat and end."""
    try:
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(model))
    except (OSError, ValueError) as error:
        raise InputError(f"model {model} must be a Hugging Face folder or hub id with a tokenizer: {error}") from error
    if tokenizer.chat_template is None:
        raise InputError(f"the tokenizer of {model} has no chat template; prompts cannot be formatted without one")
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {model} has no end-of-sequence token; answers could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": str(tokenizer.unk_token or tokenizer.eos_token)})
    return tokenizer


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Conversation | str) -> tuple[int, ...]:
    """Ids of the chat-formatted prompt, up to and including the generation prompt. A plain text is one turn of a user."""
    asked = Conversation.user(prompt) if isinstance(prompt, str) else prompt
    tools: list[Any] | None = asked.tools or None
    text = tokenizer.apply_chat_template(asked.messages, tools=tools, add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: Conversation | str, response: str) -> tuple[int, ...]:
    """Ids of the chat-formatted prompt, the response and the end-of-sequence token, as an engine would have produced them."""
    answer = tokenizer.encode(response, add_special_tokens=False)
    return encode_prompt(tokenizer, prompt) + (*answer, tokenizer.eos_token_id)


def decode_response(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], stop: Sequence[str | int] = ()) -> str:
    """Text of sampled ids without special tokens, and without NUL, which no database keeps.

    It ends before a last token that is in `stop`, and before the first of the texts in `stop`.
    """
    written = list(token_ids[:-1] if token_ids and token_ids[-1] in stop else token_ids)
    text = cast(str, tokenizer.decode(written, skip_special_tokens=True))
    ends = [text.find(end) for end in stop if isinstance(end, str)]
    return text[: min((end for end in ends if end >= 0), default=len(text))].replace("\x00", "").strip()


class LengthBound:
    """`bound(prompt, response)` >= len(encode_pair(tokenizer, prompt, response)); None where no bound is known.

    A token of a text stands for at least one byte of it, or of its compatibility decomposition where a tokenizer normalises.
    What a chat template adds around messages depends on their roles alone, unless there are tools: it is measured once for each
    order of roles, in tokens, and two more a message for where texts and template meet.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._around = lru_cache(maxsize=4096)(self._measure)

    def __call__(self, prompt: Conversation, response: str) -> int | None:
        text = prompt.json
        if text.endswith(_ONE_TURN) and text.count('"role":') == 1:  # its JSON is longer than what it holds
            return _bytes(text) + _bytes(response) + self._around(("user",))
        messages = prompt.messages
        if prompt.tools or any(message.keys() - _PLAIN_KEYS for message in messages):
            return None
        around = self._around(tuple(message["role"] for message in messages))
        return sum(_bytes(message["content"]) for message in messages) + _bytes(response) + around

    def _measure(self, roles: tuple[str, ...]) -> int:
        probe = Conversation.of([{"role": role, "content": "x"} for role in roles])
        return len(encode_pair(self._tokenizer, probe, "x")) + 2 * len(roles) + 2


def _bytes(text: str) -> int:
    if text.isascii():
        return len(text)
    return max(len(text.encode()), len(unicodedata.normalize("NFKD", text).encode()))
