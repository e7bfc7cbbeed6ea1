"""Conversations to token ids: the one path that training, scoring, serving and rollouts share.

Conversation --chat template--> text up to the answer --tokenizer--> ids of a prompt, for engines
             + answer + end of turn --------------------tokenizer--> ids of a row, for reward and propensity models
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, cast

from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from causalrm_ray.conversation import Conversation, ConversationError
from causalrm_ray.errors import InputError
from causalrm_ray.models.control_tokens import control_tokens
from causalrm_ray.models.kernels import text_config
from causalrm_ray.truncation import Truncated, truncate
from causalrm_ray.types import Truncation

_ONE_TURN = '"role":"user"}]'  # how the text of a conversation ends that is one turn of a user
_PLAIN_KEYS = {"role", "content"}
_PROBES = ("Hello", "yes, 1 of them", "- a", "sure")  # answers as they begin
# What a saved template is made of: the model's own one renders what the answer replies to, the answer and its end come after.
_BEFORE = "{% macro render_before(messages, add_generation_prompt) %}"
_AFTER = "{% endmacro %}"
_ANSWER = (
    "{% if add_generation_prompt or not messages or messages[-1]['role'] != 'assistant' %}"
    "{{ render_before(messages, add_generation_prompt) }}{% else %}"
    "{{ render_before(messages[:-1], true) + SEPARATOR + messages[-1]['content'] + END }}{% endif %}"
)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or hub id. Raises InputError unless there is one that can chat and end.

    Its end-of-sequence token is the one that ends a turn in its chat template, where the model's generation stops at that one
    too: `<|im_end|>`, `<end_of_turn>`. A template that `answer_template` made is the one that it was made of.
    """
    try:
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(model, trust_remote_code=False))
    except Exception as error:  # tokenizers raises nothing more precise for a file that it cannot read
        raise InputError(f"model {model} must be a Hugging Face folder or hub id with a tokenizer: {error}") from error
    if isinstance(tokenizer.chat_template, dict):  # several by name
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not isinstance(tokenizer.chat_template, str):
        raise InputError(
            f"the tokenizer of {model} has no chat template, without which prompts cannot be formatted: give it one, a file, by "
            "the option chat_template"
        )
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {model} has no end-of-sequence token; answers could not end")
    tokenizer.chat_template = _own_template(tokenizer.chat_template)
    if (end := _turn_end(tokenizer, model)) is not None:
        tokenizer.eos_token = end
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": str(tokenizer.unk_token or tokenizer.eos_token)})
    return tokenizer


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Conversation | str) -> tuple[int, ...]:
    """Ids of the chat-formatted prompt, up to and including the generation prompt. A plain text is one turn of a user.

    Raises ConversationError where the chat template refuses the conversation, or leaves a part of it out.
    """
    return _ids(tokenizer, _render(tokenizer, prompt))


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: Conversation | str, response: str) -> tuple[int, ...]:
    """Ids of the chat-formatted prompt, the response and the end of its turn: what an engine would have produced, and what the
    template of `answer_template` gives. Raises ConversationError as `encode_prompt` does.
    """
    end = str(tokenizer.eos_token)
    answer = control_tokens(tokenizer).mark(response.removesuffix(end))  # some logs keep the end
    return _ids(tokenizer, _render(tokenizer, prompt) + _separator(tokenizer) + answer + end)


def truncate_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: Conversation, response: str, longest: int, truncation: Truncation
) -> Truncated[tuple[int, ...]]:
    """`encode_pair` in at most `longest` tokens, with "oldest" of the latest turns only. Raises TooLongError for what does not
    fit, ConversationError as `encode_prompt` does."""
    return truncate(prompt, lambda kept: encode_pair(tokenizer, kept, response), longest, truncation)


def render(tokenizer: PreTrainedTokenizerBase, prompt: Conversation | str) -> str:
    """The chat-formatted text of a prompt, up to and including the generation prompt.

    Calls of tools have their arguments as objects, as templates expect; a developer's message is a system's where the template
    knows no developers. Raises ConversationError where the chat template refuses it, or leaves a part of it out.
    """
    return control_tokens(tokenizer).unmark(_render(tokenizer, prompt))


def _render(tokenizer: PreTrainedTokenizerBase, prompt: Conversation | str) -> str:
    """The same, but for marks where people wrote control tokens."""
    asked, control = Conversation.user(prompt) if isinstance(prompt, str) else prompt, control_tokens(tokenizer)
    written, tools = asked.parse()
    if control.found_in(asked.json) or not asked.json.isascii():
        written, tools = control.mark_all(written), control.mark_all(tools)
    messages = [_with_objects(message) for message in written]
    try:
        return _complete(tokenizer, messages, tools)
    except ConversationError:
        if all(message["role"] != "developer" for message in messages):
            raise
    known = [{**message, "role": "system"} if message["role"] == "developer" else message for message in messages]
    return _complete(tokenizer, known, tools)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Ids of a text; what is marked in it becomes the ids of its letters."""
    ids: list[int] = []
    for part, control in control_tokens(tokenizer).parts(text):
        ids += tokenizer.encode(part, add_special_tokens=False, **({"split_special_tokens": True} if control else {}))
    return tuple(ids)


def answer_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template that renders [..., answer of the assistant] to the very text whose ids are `encode_pair`'s.

    So that the natural call, `apply_chat_template(messages)`, gives a saved reward model the rows that it was trained on, in
    whatever library; what ends in another message is rendered as the model's own template does.
    """
    own = _own_template(str(tokenizer.chat_template))
    answer = _ANSWER.replace("SEPARATOR", json.dumps(_separator(tokenizer))).replace("END", json.dumps(str(tokenizer.eos_token)))
    first = "\n" if own.startswith("\n") else ""  # the first line break after a tag is dropped
    return _BEFORE + first + own + _AFTER + answer


def _own_template(template: str) -> str:
    """The template that `answer_template` was made of; one that it did not make as it is, but for a last line break, which
    means nothing at the end of a template."""
    if template.startswith(_BEFORE):
        own = template[len(_BEFORE) :].rpartition(_AFTER)[0]
        return own[1:] if own.startswith("\n") else own
    return template.removesuffix("\n")


def _complete(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[Any]) -> str:
    try:
        text = cast(str, tokenizer.apply_chat_template(messages, tools=tools or None, add_generation_prompt=True, tokenize=False))
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ConversationError(f"the model's chat template refuses messages of {roles}: {error}") from error
    for number, message in enumerate(messages, 1):
        if message["role"] not in ("assistant", "tool") and message["content"].strip() not in text:
            raise ConversationError(f"the model's chat template leaves out message {number}, of the {message['role']}")
        for name in (call["function"]["name"] for call in message.get("tool_calls", ()) if "function" in call):
            if name not in text:
                raise ConversationError(f"the model's chat template leaves out calls of tools, in message {number}")
    for name in (tool["function"]["name"] for tool in tools if "function" in tool):
        if name not in text:
            raise ConversationError("the model's chat template leaves out tools: they would not be seen")
    return text


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls have their arguments as objects: as JSON texts, templates would write them as texts of texts."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            with suppress(ValueError):  # a model wrote it, and may have written no JSON
                call = {**call, "function": {**function, "arguments": json.loads(function["arguments"] or "{}")}}
        calls.append(call)
    return {**message, "tool_calls": calls}


def _separator(tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands between a generation prompt and an answer so that the text of both has the ids of one after the other.

    Nothing for most tokenizers; a blank where the tokenizer marks the beginnings of words, and the generation prompt has none.
    """
    return _separator_of(tokenizer, str(tokenizer.chat_template), str(tokenizer.eos_token))


@lru_cache(maxsize=32)
def _separator_of(tokenizer: PreTrainedTokenizerBase, _template: str, end: str) -> str:
    before = render(tokenizer, "x")
    ids = tokenizer.encode(before, add_special_tokens=False)
    expected = [ids + tokenizer.encode(answer + end, add_special_tokens=False) for answer in _PROBES]
    for separator in ("", " "):
        if [tokenizer.encode(before + separator + answer + end, add_special_tokens=False) for answer in _PROBES] == expected:
            return separator
    return ""


def end_tokens(tokenizer: PreTrainedTokenizerBase, model: str) -> frozenset[int]:
    """The ids that end an answer of a model (folder or hub id): the tokenizer's, and those that its generation stops at."""
    return frozenset((cast(int, tokenizer.eos_token_id), *generation_stops(model)))


def as_logged(token_ids: Sequence[int], ends: Collection[int], end: int) -> tuple[int, ...]:
    """Ids of a prompt and a sampled answer as `encode_pair` ends them: in `end`, whichever of `ends` the engine stopped at, if it
    came to one before the token limit. A reward model has read no other end."""
    ids = tuple(token_ids)
    return (*(ids[:-1] if ids and ids[-1] in ends else ids), end)


def generation_config(model: str) -> GenerationConfig | None:
    """How a model (folder or hub id) generates, by its own file; None without one."""
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        return None


def generation_stops(model: str) -> tuple[int, ...]:
    """The ids that a model's generation stops at: by its own file, or without one by its configuration, as engines do."""
    found = generation_config(model)
    if found is None:
        try:
            found = text_config(model)
        except (OSError, ValueError):  # a tokenizer alone
            return ()
    stops = getattr(found, "eos_token_id", None)
    return tuple(stops) if isinstance(stops, list | tuple) else () if stops is None else (stops,)


def _turn_end(tokenizer: PreTrainedTokenizerBase, model: str) -> str | None:
    """The token that ends an answer in the chat template, if the model's generation stops at it; None if it is the usual one."""
    stops = generation_stops(model)
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Hello"}]
    try:
        text = cast(str, tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, TypeError, ValueError):
        return None
    after = tokenizer.encode(text.rpartition("Hello")[2], add_special_tokens=False)
    end = next((token for token in after if token in stops), None)
    return None if end is None or end == tokenizer.eos_token_id else str(tokenizer.convert_ids_to_tokens(end))


def decode_response(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], stop: Sequence[str | int] = ()) -> str:
    """Text of sampled ids without special tokens, and without NUL, which no database keeps; with all of its blanks, so that it
    has these ids again, but for a first one that the tokenizer puts before every text.

    It ends before a last token that is in `stop`, and before the first of the texts in `stop`.
    """
    written = list(token_ids[:-1] if token_ids and token_ids[-1] in stop else token_ids)
    text = cast(str, tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    if text.startswith(" ") and _puts_blank(tokenizer):
        text = text[1:]
    ends = [text.find(end) for end in stop if isinstance(end, str)]
    return text[: min((end for end in ends if end >= 0), default=len(text))].replace("\x00", "")


@lru_cache(maxsize=32)
def _puts_blank(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts a blank before a text, which its decoder leaves there."""
    ids = tokenizer.encode("x", add_special_tokens=False)
    return ids == tokenizer.encode(" x", add_special_tokens=False) and cast(str, tokenizer.decode(ids)).startswith(" ")


class LengthBound:
    """`bound(prompt, response)` >= len(encode_pair(tokenizer, prompt, response)); None where no bound is known.

    A token of a text stands for at least one byte of it, or of its compatibility decomposition where a tokenizer normalises.
    What a chat template adds around messages depends on their roles alone, unless there are tools: it is measured once for each
    order of roles, in tokens, and two more a message for where texts and template meet.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._control = tokenizer, control_tokens(tokenizer)
        self._around = lru_cache(maxsize=4096)(self._measure)

    def __call__(self, prompt: Conversation, response: str) -> int | None:
        text = prompt.json
        if self._control.found_in(text) or self._control.found_in(response):  # each may begin with a blank of its own
            return None
        if text.endswith(_ONE_TURN) and text.count('"role":') == 1:  # its JSON is longer than what it holds
            return _bytes(text) + _bytes(response) + self._around(("user",))
        messages, tools = prompt.parse()
        if tools or any(message.keys() - _PLAIN_KEYS for message in messages):
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
