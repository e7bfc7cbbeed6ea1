"""The quick bound of a row's length is never below it; a text that was sampled has the ids again that it was sampled as."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from causalrm_ray.conversation import Conversation
from causalrm_ray.models.text import LengthBound, decode_response, encode_pair, encode_prompt, load_tokenizer
from causalrm_ray.world.grammar import train_prompts
from causalrm_ray.world.pretrain import PretrainSettings, train_tokenizer
from jobs.lab.families import templates, tokenizers

# control tokens have no bound: see test_control_tokens
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60).filter(lambda text: bool(text.strip()) and "<|" not in text)
TURNS = st.lists(st.sampled_from(["user", "assistant", "system"]), max_size=4).map(lambda roles: [*roles, "user"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(train_prompts(), PretrainSettings()).save_pretrained(folder)
    return load_tokenizer(str(folder))


@settings(deadline=None, max_examples=400)
@given(TURNS.flatmap(lambda roles: st.tuples(st.just(roles), st.lists(TEXT, min_size=len(roles), max_size=len(roles)))), TEXT)
def test_a_row_has_at_most_as_many_tokens_as_the_bound(tokenizer: PreTrainedTokenizerBase, turns: tuple, response: str) -> None:
    talk = Conversation.of([{"role": role, "content": text} for role, text in zip(*turns, strict=True)])
    bound = LengthBound(tokenizer)(talk, response)
    assert bound is not None
    assert len(encode_pair(tokenizer, talk, response)) <= bound


def test_tools_have_no_bound(tokenizer: PreTrainedTokenizerBase) -> None:
    assert LengthBound(tokenizer)(Conversation.of([{"role": "user", "content": "hi"}], [{"type": "function"}]), "hi") is None


@pytest.mark.parametrize("blank", [True, False])
@pytest.mark.parametrize("answer", ["so it is", " so it is", "so it is \n", "\n\n  so , it is .", "do n't ! "])
def test_the_text_of_an_answer_keeps_the_blanks_of_its_ids(tokenizer: PreTrainedTokenizerBase, answer: str, blank: bool) -> None:
    given: Any = copy.deepcopy(tokenizer)
    given.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=blank)
    given.clean_up_tokenization_spaces = True  # as many published tokenizers have it
    prompt, sampled = encode_prompt(given, "hello"), (*given.encode(answer, add_special_tokens=False), given.eos_token_id)
    response = decode_response(given, sampled, [given.eos_token_id])
    assert response == (answer.removeprefix(" ") if blank else answer)
    assert encode_pair(given, "hello", response) == prompt + sampled


@pytest.mark.parametrize("written", ["two", " two", "    return x"])
def test_a_decoder_that_drops_the_first_blank_keeps_the_second(written: str, tmp_path: Path) -> None:
    tokenizer = tokenizers.llama_2()
    tokenizer.chat_template = templates.LLAMA_2
    tokenizer.save_pretrained(tmp_path)
    given = load_tokenizer(str(tmp_path))
    row = encode_pair(given, "hello", written)
    sampled = row[len(encode_prompt(given, "hello")) : -1]
    assert encode_pair(given, "hello", decode_response(given, sampled)) == row
    assert decode_response(given, sampled) == written
