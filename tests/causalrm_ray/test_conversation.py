"""Conversations: one text for equal ones, and a clear refusal of what is none."""

from __future__ import annotations

from typing import Any

import pytest

from causalrm_ray.conversation import Conversation, ConversationError

USER = {"role": "user", "content": "hi"}
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def test_equal_conversations_are_equal_texts() -> None:
    parts = {"content": [{"type": "text", "text": "hi"}], "role": "user", "name": None, "id": "m7"}
    assert Conversation.of([parts]) == Conversation.user("hi") == Conversation('[{"content":"hi","role":"user"}]')
    assert Conversation.of([{"role": "user", "content": ["a", {"type": "text", "text": "b"}]}]).text == "a\nb"


def test_turns_and_tools_come_back_as_they_were() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "42 é", "tool_call_id": "c"},
    ]
    talk = Conversation.of(messages, [TOOL])
    assert talk.messages == [*messages[:2], {**messages[2], "content": ""}, messages[3]]
    assert (talk.tools, talk.text) == ([TOOL], "hi")
    assert Conversation(talk.json) == talk
    assert (Conversation.of([USER]).tools, Conversation.of([USER]) == talk) == ([], False)


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([], "must be a list of at least one message, got"),
        ("hi", "must be a list of at least one message, got a text of 2 characters"),
        (["hi"], "message 1 must be a JSON object with role and content, got a text of 2 characters"),
        ([{"content": "hi"}], "message 1: role must be one of system, developer, user, assistant, tool, got None"),
        ([USER, {"role": "human", "content": "hi"}], "message 2: role must be one of .*, got 'human'"),
        ([{"role": "user", "content": " "}], "message 1: content must be a text that is not empty, got a text of 1 characters"),
        ([{"role": "user", "content": 3}], "message 1: content must be text or parts of text, got 3"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "content must be text or parts of text"),
        (
            [USER, {"role": "assistant", "content": "hello"}],
            "last message must be a user's or a tool's, got one of the assistant",
        ),
        ([{"role": "user", "content": "\ud800"}], "must be valid Unicode"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, fault: str) -> None:
    with pytest.raises(ConversationError, match=fault):
        Conversation.of(messages)
