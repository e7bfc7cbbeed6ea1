"""What formats share: times, ids, votes, messages of many systems."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from causalrm_ray.data.formats.parts.exchange import answer_of, prompt_of
from causalrm_ray.data.formats.parts.messages import turns
from causalrm_ray.data.formats.parts.scores import scored, vote
from causalrm_ray.data.formats.parts.shelf import Shelf
from causalrm_ray.data.formats.parts.values import name, seconds, seconds_of_uuid
from causalrm_ray.data.rows import RowError
from tests.causalrm_ray.data.formats.garden import GARDEN, imported, said
from tests.causalrm_ray.data.formats.test_data_sets import csv_of
from tests.causalrm_ray.data.formats.test_traces import observation, score

NOON = 1_767_268_800.0  # 2026-01-01 12:00 UTC


@pytest.mark.parametrize(
    "time",
    [
        *("2026-01-01T12:00:00Z", "2026-01-01T13:00:00+01:00", "2026-01-01 12:00:00", "2026-01-01T12:00:00.000000000Z"),
        *("2026-01-01 12:00:00 UTC", NOON, int(NOON), str(NOON), int(NOON * 1e3), str(int(NOON * 1e3)), NOON * 1e6, NOON * 1e9),
        *({"$date": "2026-01-01T12:00:00Z"}, {"$date": int(NOON * 1e3)}, {"$date": {"$numberLong": str(int(NOON * 1e3))}}),
        *(datetime(2026, 1, 1, 12), datetime(2026, 1, 1, 12, tzinfo=UTC)),
    ],
)
def test_times_of_every_system_are_the_same_seconds(time: Any) -> None:
    assert seconds(time) == NOON


@pytest.mark.parametrize("time", ["yesterday", True, [], {"$date": []}, {"a": 1}])
def test_what_is_no_time_is_refused_by_its_column(time: Any) -> None:
    assert (seconds(None), seconds("")) == (None, None)
    with pytest.raises(RowError, match="createdAt must be a time"):
        seconds(time, "createdAt")


def test_ids_are_texts_numbers_and_object_ids() -> None:
    row = {"a": "", "b": 7, "c": {"$oid": "65f0"}, "d": 3.0, "e": True}
    assert [name(row, *columns) for columns in ("ab", "c", "d", "az")] == ["7", "65f0", "3", None]
    with pytest.raises(RowError, match="e must be a text or whole number, got True"):
        name(row, "e")
    assert seconds_of_uuid("01941f29-7c00-7000-8000-000000000001") == 1_735_689_600.0
    assert seconds_of_uuid("6ba7b810-9dad-11d1-80b4-00c04fd430c8") is None


def test_words_of_votes() -> None:
    liked = [True, "true", "thumbsUp", "thumbs-up", "THUMBS_UP", "up", "👍", "Like", "positive", "helpful"]
    disliked = [False, "no", "thumbsDown", "thumbs down", "downvote", "👎", "not helpful", "bad"]
    assert ({vote(word) for word in liked}, {vote(word) for word in disliked}) == ({1}, {0})
    assert {vote(word) for word in (1, 0, "1", "5", "maybe", None, "")} == {None}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (("thumb", True), ("thumb", 1.0, 1.0)),
        (("thumb", "down"), ("thumb", 0.0, 0.0)),
        (("stars", "4.5"), ("stars", None, 4.5)),
        (("stars", 1), ("stars", None, 1.0)),
        (("tone", "rude"), ("tone:rude", None, 1.0)),
        (("thumbs_down", True), ("thumbs_down", 0.0, 1.0)),
        (("dislike", 1), ("dislike", 0.0, 1.0)),
    ],
)
def test_a_score_is_an_event(given: tuple[str, Any], found: tuple[str, float | None, float]) -> None:
    event = scored(*given)
    assert event is not None
    assert (event.score, event.label, event.value) == found


def test_a_dislike_that_is_false_is_no_feedback() -> None:
    assert scored("thumbs_down", False) is None


def test_messages_of_many_systems_are_the_same_turns() -> None:
    ours = [said("system", "Rules."), said("user", "hi"), said("assistant", "hello")]
    openai = [said("system", "Rules."), said("user", [{"type": "input_text", "text": "hi"}]), said("assistant", "hello")]
    sharegpt = [{"from": "system", "value": "Rules."}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    langchain = [
        {"type": "system", "content": "Rules."},
        {"type": "human", "data": {"content": "hi"}},
        {"type": "ai", "content": "hello"},
    ]
    gemini = [
        {"role": "system", "content": "Rules."},
        *({"role": role, "parts": [{"text": text}]} for role, text in (("user", "hi"), ("model", "hello"))),
    ]
    inference = [
        {"message": {"role": turn["role"], "contents": [{"message_content": {"type": "text", "text": turn["content"]}}]}}
        for turn in ours
    ]
    for messages in (ours, openai, sharegpt, langchain, [langchain], gemini, inference):
        assert turns(messages) == ours


def test_calls_and_results_of_tools_of_many_systems_are_the_same() -> None:
    arguments = '{"plant": "rose"}'
    call = {"id": "t", "type": "function", "function": {"name": "find", "arguments": arguments}}
    ours = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "yes", "tool_call_id": "t"}]
    anthropic = [
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "find", "input": {"plant": "rose"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "yes"}]}]},
    ]
    responses = [
        {"type": "function_call", "call_id": "t", "name": "find", "arguments": arguments},
        {"type": "function_call_output", "call_id": "t", "output": "yes"},
    ]
    langchain = [
        {"type": "ai", "content": "", "tool_calls": [{"name": "find", "args": {"plant": "rose"}, "id": "t"}]},
        {"type": "tool", "content": "yes", "tool_call_id": "t"},
    ]
    for messages in (ours, anthropic, responses, langchain):
        assert turns(messages) == ours


def test_keys_of_messages_that_are_not_kept_are_counted_and_thoughts_too() -> None:
    ignored = Counter[str]()
    parts = [{"type": "reasoning", "text": "Hm."}, {"type": "text", "text": "hello"}]
    turns([{**said("user", "hi"), "mood": "good", "weight": None}, said("assistant", parts)], ignored)
    assert ignored == {"messages.mood": 1, "thoughts in messages": 1}


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ("hi", "messages must be a list, got a text of 2 characters"),
        ([3], "message 1 must be an object with a role and a content, got 3"),
        ([{"content": "hi"}], "message 1 must have a role"),
        ([said("user", "hi"), said("narrator", "x")], "message 2: role must be a role such as user or assistant, got 'narrator'"),
        ([said("user", [{"type": "image_url"}])], "message 1: content must be parts of text, got one of type 'image_url'"),
    ],
)
def test_what_is_no_message_is_refused_by_its_place(messages: Any, fault: str) -> None:
    with pytest.raises(RowError, match=fault):
        turns(messages)


@pytest.mark.parametrize(
    ("given", "gave"),
    [
        ("hi", "hello"),
        ([said("user", "hi")], [said("user", "hi"), said("assistant", "hello")]),
        ({"messages": [said("user", "hi")]}, {"choices": [{"message": said("assistant", "hello")}]}),
        ({"question": "hi"}, {"answer": "hello", "documents": [{"page": 1}]}),
        ({"chat_history": [], "input": "hi"}, {"generations": [[{"text": "hello"}]]}),
        ({"args": {"query": "hi"}}, {"messages": [said("assistant", "hello")]}),
        (
            {"messages": [[{"type": "human", "content": "hi"}]]},
            {"output": {"content": [{"type": "text", "text": "hello"}], "type": "ai"}},
        ),
    ],
)
def test_prompts_and_answers_are_found_in_what_functions_log(given: Any, gave: Any) -> None:
    assert prompt_of(given) == [said("user", "hi")]
    assert answer_of(gave) == said("assistant", "hello")


def test_a_shelf_gives_back_groups_in_order_and_holds_more_than_it_keeps_in_memory() -> None:
    shelf = Shelf()
    for number in range(2_500):
        shelf.put("a", f"k{number % 3}", number)
    shelf.put("b", "k0", {"é": None})
    assert [(key, len(values), values[:2]) for key, values in shelf.groups("a")] == [
        ("k0", 834, [0, 3]),
        ("k1", 833, [1, 4]),
        ("k2", 833, [2, 5]),
    ]
    assert shelf.get("b", "k0") == [{"é": None}]
    assert (shelf.has("b", "k0"), shelf.has("b", "k1"), list(shelf.scan("b"))) == (True, False, [{"é": None}])


def test_langfuse_tables_of_text_cells(tmp_path: Path) -> None:
    """The interface exports CSV: cells are text, messages are JSON in them."""
    observations = [{**observation(shown), "input": json.dumps(shown.before), "output": shown.answer} for shown in GARDEN]
    files = {"observations.csv": csv_of(observations), "scores.csv": csv_of([score(GARDEN[0]), score(GARDEN[2])])}
    found = imported(tmp_path, files)
    assert found.report.formats == ("langfuse",)
    assert found.labels == {"a1": 1, "a2": None, "a3": 0, "a4": None}
    assert found.messages("a2") == list(GARDEN[1].before)
