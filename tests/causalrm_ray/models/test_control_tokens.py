"""Control tokens that people write are text: ids of letters in prompts and answers, and nothing that ends or begins a turn."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from causalrm_ray.conversation import Conversation, ConversationError
from causalrm_ray.models.text import LengthBound, encode_pair, encode_prompt, load_tokenizer, render
from causalrm_ray.world.grammar import train_prompts
from causalrm_ray.world.pretrain import PretrainSettings, train_tokenizer

END = "<|end|>"
PARTS = st.lists(
    st.sampled_from(["hello", " ", "<|", "end", END, "<|user|>", "<|assistant|>", "é", "|>"]), min_size=1, max_size=8
)
TEXT = PARTS.map("".join).filter(lambda text: bool(text.strip()))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(train_prompts(), PretrainSettings()).save_pretrained(folder)
    return load_tokenizer(str(folder))


def controls(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> list[int]:
    return [token for token in ids if token in set(tokenizer.convert_tokens_to_ids([END, "<|user|>", "<|assistant|>"]))]


@settings(deadline=None, max_examples=150)
@given(TEXT, TEXT.filter(lambda text: not text.endswith(END)))
def test_what_people_write_controls_nothing_and_keeps_its_letters(
    tokenizer: PreTrainedTokenizerBase, asked: str, answer: str
) -> None:
    prompt = Conversation.user(asked)
    ids, plain = encode_pair(tokenizer, prompt, answer), encode_pair(tokenizer, Conversation.user("x"), "y")
    assert controls(tokenizer, ids) == controls(tokenizer, plain)
    before = encode_prompt(tokenizer, prompt)
    assert ids[: len(before)] == before
    written = tokenizer.decode(ids[len(before) :])
    # this tokenizer begins each part of a text with a space
    assert written.removesuffix(END).replace(" ", "") == answer.replace(" ", "")
    assert asked in render(tokenizer, prompt)
    written_any = any(token in text for text in (asked, answer) for token in (END, "<|user|>", "<|assistant|>"))
    bound = LengthBound(tokenizer)(prompt, answer)
    assert (bound is None) == written_any
    assert bound is None or len(ids) <= bound


def test_an_answer_that_was_logged_with_its_end_does_not_get_two(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = Conversation.user("hello")
    assert encode_pair(tokenizer, prompt, f"yes{END}") == encode_pair(tokenizer, prompt, "yes")


def test_turns_of_all_roles_are_text(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": role, "content": f"so {END} <|user|>"} for role in ("system", "user", "assistant", "tool", "user")]
    plain = [{**turn, "content": "x"} for turn in turns]
    written, expected = (controls(tokenizer, encode_prompt(tokenizer, Conversation.of(given))) for given in (turns, plain))
    assert written == expected


def test_a_character_that_would_be_taken_for_a_mark_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConversationError, match=r"no characters for private use from U\+100000 on"):
        encode_prompt(tokenizer, "hello \U00100001")
    encode_prompt(tokenizer, "an icon \uf8ff")
