"""Exports of chat products and request logs: every answer, its label and its columns are compared by value."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from causalrm_ray.config.train import Thresholds
from causalrm_ray.data.rows import SourceError
from tests.causalrm_ray.data.formats.garden import GARDEN, Rows, Shown, check_garden, imported, said, without_system

THUMBS = {True: "thumbs_up", False: "thumbs_down", None: None}
CALL = {"id": "t1", "type": "function", "function": {"name": "find", "arguments": '{"plant": "rose"}'}}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


def completion(shown: Shown, **more: Any) -> dict[str, Any]:
    return {
        "id": shown.id,
        "object": "chat.completion",
        "created": int(shown.time),
        "model": shown.model,
        "messages": list(shown.before),
        "choices": [{"index": 0, "message": said("assistant", shown.answer), "finish_reason": "stop"}],
        "metadata": {"user": shown.user, "conversation_id": shown.conversation, "surface": "web"},
        "rating": THUMBS[shown.liked],
        **more,
    }


def test_openai_requests_with_a_rating_of_words(tmp_path: Path) -> None:
    found = check_garden(tmp_path, {"requests.jsonl": [completion(shown) for shown in GARDEN]}, "openai")
    assert found.report.ignored_columns == ("object",)
    assert {row["context"] for row in found.rows.values()} == {'{"surface": "web"}'}


def test_openai_request_and_response_apart(tmp_path: Path) -> None:
    rows = []
    for shown in GARDEN:
        whole = completion(shown)
        request = {key: whole.pop(key) for key in ("messages", "metadata")}
        rows.append({"custom_id": "x", "request": {"body": request}, "response": {"body": whole}, "rating": whole.pop("rating")})
    check_garden(tmp_path, {"batch.jsonl": rows}, "openai")


@pytest.mark.parametrize(
    "votes", [{True: 1, False: -1}, {True: 1.0, False: 0.0}, {True: "1", False: "0"}, {True: True, False: False}]
)
def test_openai_ratings_of_votes_are_likes_and_dislikes(tmp_path: Path, votes: dict[bool, Any]) -> None:
    rows = [completion(shown, rating=None if shown.liked is None else votes[shown.liked]) for shown in GARDEN]
    check_garden(tmp_path, {"requests.jsonl": rows}, "openai")


def test_a_one_is_no_like_on_a_scale_of_stars(tmp_path: Path) -> None:
    stars = [1, 5, 1, None]
    rows = [completion(shown, rating=number) for shown, number in zip(GARDEN, stars, strict=True)]
    with pytest.raises(SourceError, match=r"the score 'rating', .* feedback\.signals\.rating='{low: LOW, high: HIGH}'"):
        imported(tmp_path, {"requests.jsonl": rows})
    found = imported(tmp_path, {"requests.jsonl": rows}, {"rating": Thresholds(low=2, high=4)})
    assert found.labels == {"a1": 0, "a2": 1, "a3": 0, "a4": None}


def test_openai_calls_of_tools_parts_and_choices(tmp_path: Path) -> None:
    asked = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Edible?"}, {"type": "text", "text": "The rose."}], "weight": 2},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "t1", "content": "yes"},
    ]
    answered = {
        "messages": asked,
        "tools": [TOOL],
        "choices": [{"message": said("assistant", "Yes.")}, {"message": said("assistant", "No.")}],
    }
    calling = {"messages": asked[:2], "choices": [{"message": {"role": "assistant", "content": None, "tool_calls": [CALL]}}]}
    found = imported(tmp_path, {"requests.jsonl": [{"id": "x", **answered}, {"id": "y", **calling}]})
    assert list(found.rows) == ["x"]
    assert found.messages("x") == [
        said("developer", "Be brief."),
        said("user", "Edible?\nThe rose."),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "t1", "content": "yes"},
    ]
    assert found.rows["x"]["prompt"].endswith(
        '"tools":[{"function":{"name":"find","parameters":{"type":"object"}},"type":"function"}]}'
    )
    assert found.report.ignored == {"answers that only call a tool": 1, "choices after the first": 1, "messages.weight": 1}


def test_openai_an_image_quarantines_its_row_alone(tmp_path: Path) -> None:
    image = [{"type": "image_url", "image_url": {"url": "data:"}}]
    bad = completion(dataclasses.replace(GARDEN[1], before=({"role": "user", "content": image},)))
    found = imported(tmp_path, {"requests.jsonl": [completion(GARDEN[0]), bad]})
    assert list(found.rows) == ["a1"]
    assert found.refused == ["message 1: content must be parts of text, got one of type 'image_url'"]


def librechat() -> Rows:
    """The garden's conversations as a collection of messages; LibreChat has no system messages."""
    rows: Rows = []
    for shown in without_system():
        question = f"{shown.id}-question"
        before = "a1" if shown.id == "a2" else "00000000-0000-0000-0000-000000000000"
        common = {"conversationId": shown.conversation, "user": shown.user, "__v": 0}
        date = {"$date": {"$numberLong": str(int(shown.time * 1000))}}
        rows.append(
            {
                "messageId": question,
                "parentMessageId": before,
                "isCreatedByUser": True,
                "text": shown.before[-1]["content"],
                **common,
            }
        )
        thought = {"type": "think", "think": "Hm."}
        content = [thought, {"type": "text", "text": shown.answer}]
        answer = {"messageId": shown.id, "parentMessageId": question, "isCreatedByUser": False, "text": "", "content": content}
        rating = {True: "thumbsUp", False: "thumbsDown", None: None}[shown.liked]
        feedback = {"feedback": {"rating": rating, "tag": "accurate"}} if rating else {}
        rows.append({**answer, "model": shown.model, "createdAt": date, **feedback, **common})
    return rows


def test_librechat_messages_in_any_order(tmp_path: Path) -> None:
    found = check_garden(tmp_path, {"messages.jsonl": librechat()[::-1]}, "librechat", garden=without_system())
    assert found.report.ignored == {"feedback.tag": 2, "thoughts in messages": 4}
    assert found.report.ignored_columns == ("__v",)


def test_librechat_an_export_of_one_conversation_and_what_is_no_answer(tmp_path: Path) -> None:
    def message(name: str, before: str | None, by_user: bool, text: str, **more: Any) -> dict[str, Any]:
        return {"messageId": name, "parentMessageId": before, "isCreatedByUser": by_user, "text": text, **more}

    messages = [
        message("q", None, True, "hi", files=["x"]),
        message("a", "q", False, "hello"),
        message("b", "q", False, "hello again", feedback={"rating": "thumbsDown"}),
        message("c", "q", False, "Something went wrong", error=True),
        message("d", "gone", False, "the answer to a question that was deleted"),
    ]
    found = imported(tmp_path, {"chat.json": [{"conversationId": "c1", "title": "x", "messages": messages}]})
    assert found.report.formats == ("librechat",)
    assert found.labels == {"a": None, "b": 0}
    assert found.messages("b") == [said("user", "hi")]  # what was regenerated replies to the same
    assert found.report.ignored == {
        "errors in the place of answers": 1,
        "messages before one that is missing": 1,
        "messages of the assistant that reply to no message": 1,
        "messages.files": 1,
    }


def history(answers: list[Shown], annotated: bool = False) -> dict[str, Any]:
    """Open WebUI's tree of a chat."""
    messages: dict[str, Any] = {}
    before = None
    for number, turn in enumerate([*answers[-1].before, said("assistant", answers[-1].answer)]):
        shown = next((shown for shown in answers if len(shown.before) == number and turn["role"] == "assistant"), None)
        name = shown.id if shown else f"{answers[0].conversation}-{number}"
        messages[name] = {"id": name, "parentId": before, "childrenIds": [], **turn}
        if shown:
            rating = {"annotation": {"rating": 1 if shown.liked else -1}} if annotated and shown.liked is not None else {}
            messages[name] |= {"model": shown.model, "timestamp": int(shown.time), "done": True, "usage": {"total": 9}, **rating}
        before = name
    return {"models": ["shop-a"], "history": {"messages": messages, "currentId": before}, "messages": list(messages.values())}


def webui_chats(annotated: bool = False) -> Rows:
    conversations = {name: [shown for shown in GARDEN if shown.conversation == name] for name in ("c1", "c2", "c3")}
    return [
        {"id": name, "user_id": answers[0].user, "title": "x", "chat": history(answers, annotated), "updated_at": 1767300000}
        for name, answers in conversations.items()
    ]


def webui_feedback() -> Rows:
    rated = [shown for shown in GARDEN if shown.liked is not None]
    return [
        {
            "id": f"f-{shown.id}",
            "user_id": shown.user,
            "type": "rating",
            "data": {"rating": 1 if shown.liked else -1, "model_id": shown.model, "reason": "clear", "comment": "", "tags": []},
            "meta": {"chat_id": shown.conversation, "message_id": shown.id, "arena": False},
            "snapshot": {"chat": {"id": shown.conversation, "chat": history([shown])}},
            "created_at": int(shown.time) + 5,
            "updated_at": int(shown.time) + 9,
        }
        for shown in rated
    ]


def chat_and_message(shown: Shown) -> str:
    return f"{shown.conversation}/{shown.id}"


def test_openwebui_feedback_joined_with_all_chats(tmp_path: Path) -> None:
    files = {"feedbacks.json": webui_feedback(), "chats.json": webui_chats(annotated=True)}
    found = check_garden(tmp_path, files, "openwebui", name=chat_and_message)
    assert found.report.warnings == ()
    assert found.report.ignored == {"data.reason": 2, "messages.usage": 4}


def test_openwebui_chats_alone_have_ratings_of_their_own(tmp_path: Path) -> None:
    found = check_garden(tmp_path, {"chats.json": webui_chats(annotated=True)}, "openwebui", name=chat_and_message)
    assert found.report.warnings == ()


def test_openwebui_feedback_alone_is_read_with_a_warning(tmp_path: Path) -> None:
    found = imported(tmp_path, {"feedbacks.json": webui_feedback()})
    assert found.labels == {"c1/a1": 1, "c2/a3": 0}
    assert found.messages("c1/a1") == list(GARDEN[0].before)
    [warning] = found.report.warnings
    assert "rated messages only" in warning
    assert "export of all chats" in warning


def test_openwebui_a_changed_vote_counts_as_it_is_now(tmp_path: Path) -> None:
    before, after = webui_feedback()[0], webui_feedback()[0]
    after["data"]["rating"], after["updated_at"] = -1, after["updated_at"] + 60
    found = imported(tmp_path, {"chats.json": webui_chats(), "a.json": [before], "b.json": [after]})
    assert (found.labels["c1/a1"], found.report.events) == (0, 2)


def test_openwebui_a_rating_that_is_no_vote_is_refused(tmp_path: Path) -> None:
    row = webui_feedback()[0]
    row["data"]["rating"] = 7
    found = imported(tmp_path, {"chats.json": webui_chats(), "feedbacks.json": [row]})
    assert found.refused == ["rating in data must be 1 or -1, got 7"]
