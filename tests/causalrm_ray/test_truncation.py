"""What is too long loses its oldest turns, as a naive search drops them, and is counted; what stays too long is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from causalrm_ray.conversation import Conversation
from causalrm_ray.truncation import Cuts, TooLongError, Truncated, truncate

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
Messages = list[dict[str, Any]]


def said(role: str, words: int) -> dict[str, Any]:
    return {"role": role, "content": " ".join(["word"] * words)}


def call(words: int) -> Messages:
    """A call of a tool, its result, and what the assistant makes of it."""
    calls = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    called = {"role": "assistant", "content": "", "tool_calls": calls}
    return [called, {"role": "tool", "content": "word " * words, "tool_call_id": "1"}, said("assistant", words)]


def joined(parts: Iterable[Messages]) -> Messages:
    return [message for part in parts for message in part]


WORDS = st.integers(1, 6)
TURN = st.tuples(
    WORDS.map(lambda words: [said("user", words)]),
    st.lists(WORDS.map(call) | WORDS.map(lambda words: [said("assistant", words)]), max_size=2).map(joined),
    WORDS.map(lambda words: [said("system", words)]) | st.just([]),
).map(joined)
TALKS = st.tuples(
    st.sampled_from([[], [said("system", 2)], [said("developer", 3)]]),
    st.sampled_from([[], [said("assistant", 4)]]),  # a greeting, before anything was asked
    st.lists(TURN, max_size=6).map(joined),
    WORDS.map(lambda words: [said("user", words)]),
    st.sampled_from([[], call(2)[:2]]),
).map(joined)


def words(talk: Conversation) -> list[str]:
    """A rendering: every message and tool, of as many parts as it has words, and one for its role."""
    return [part for message in talk.messages for part in [message["role"], *message["content"].split()]] + [str(talk.tools)]


def naive(messages: Messages, longest: int) -> Messages | None:
    """Drop one whole turn after another from the front; None where nothing is left to drop."""
    kept = list(messages)
    while len(words(Conversation.of(kept, TOOLS))) > longest:
        last_user = max((n for n, message in enumerate(kept) if message["role"] == "user"), default=0)
        droppable = [n for n, message in enumerate(kept) if message["role"] not in ("system", "developer") and n < last_user]
        if not droppable:
            return None
        gone = droppable[:1]
        for number in droppable[1:]:
            if kept[number]["role"] == "user":
                break
            gone.append(number)
        kept = [message for number, message in enumerate(kept) if number not in gone]
    return kept


@given(TALKS, st.integers(5, 80))
def test_what_is_dropped_is_what_a_naive_search_drops(messages: Messages, longest: int) -> None:
    talk, expected = Conversation.of(messages, TOOLS), naive(messages, longest)
    if expected is None:
        with pytest.raises(TooLongError):
            truncate(talk, words, longest, "oldest")
        return
    found = truncate(talk, words, longest, "oldest")
    assert found.prompt.messages == expected
    assert (found.prompt.tools, found.ids) == (TOOLS, words(found.prompt))
    assert found.tokens == len(words(talk)) - len(found.ids)
    assert (found.turns == 0) == (expected == messages)
    results = {message["tool_call_id"] for message in expected if message["role"] == "tool"}
    assert results <= {called["id"] for message in expected for called in message.get("tool_calls", ())}


def test_a_long_conversation_takes_few_encodings() -> None:
    talk = Conversation.of([*[said("user", 3), said("assistant", 3)] * 1000, said("user", 3)])
    lengths: list[int] = []

    def encode(kept: Conversation) -> list[str]:
        lengths.append(len(words(kept)))
        return words(kept)

    assert truncate(talk, encode, 100, "oldest").turns == 1000 - 11  # 12 turns of 8, but for the last one's answer, and the tools
    assert len(lengths) <= 12


EARLIER = [said("user", 20), said("assistant", 9), said("user", 5), said("assistant", 1)]


@pytest.mark.parametrize(
    ("messages", "truncation", "reason"),
    [
        ([said("user", 20)], "refuse", ", got 22"),
        ([said("user", 20)], "oldest", ", got 22"),
        ([*EARLIER, said("user", 11)], "refuse", ", got 52"),
        ([*EARLIER, said("user", 11)], "oldest", " even without earlier turns, got 13 without 2 of them and 52 with them"),
        ([*EARLIER, said("user", 8)], "refuse", " (model.truncation=oldest would drop earlier turns until it does), got 49"),
    ],
)
def test_a_refusal_says_what_would_help(messages: Messages, truncation: Any, reason: str) -> None:
    with pytest.raises(TooLongError, match=f"^{re.escape(reason)}$"):
        truncate(Conversation.of(messages), words, 12, truncation)


def test_what_was_cut_is_counted_by_label_and_length() -> None:
    cuts = Cuts()
    talk = Conversation.user("hi")
    assert cuts.figures() == {}
    assert cuts.warnings(9, "8 tokens") == []
    for label, turns, tokens in [(1, 1, 10), (1, 2, 30), (0, 5, 70), (None, 1, 20), (None, 0, 0), (1, 0, 0)]:
        cuts.add(Truncated(talk, [], turns, tokens), label)
    assert cuts.figures() == {
        "liked": 2,
        "disliked": 1,
        "without feedback": 1,
        "median_turns": 1.5,
        "largest_turns": 5,
        "median_tokens": 25.0,
        "largest_tokens": 70,
    }
    assert cuts.warnings(9, "8 tokens") == [
        "4 of 9 impressions are longer than 8 tokens, and are read without their oldest turns (model.truncation=oldest): "
        "2 liked, 1 disliked, 1 without feedback; they lost a median of 1.5 turns (at most 5) and 25 tokens (at most 70)."
    ]
    assert "(model.truncation=oldest); they lost" in cuts.warnings(9, "8 tokens", "prompts")[0]
