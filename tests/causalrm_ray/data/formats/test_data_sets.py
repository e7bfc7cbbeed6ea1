"""Data sets that people have: TRL, Argilla, conversations, pairs. Every answer, label and column is compared by value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from causalrm_ray.config.train import Thresholds
from causalrm_ray.data.rows import SourceError
from tests.causalrm_ray.data.formats.garden import GARDEN, Shown, check_garden, imported, said, without_system

STARS = {True: 5, False: 1}
NOBODY = ("user", "conversation_id", "model", "time")


def kto(shown: Shown) -> dict[str, Any]:
    completion = [said("assistant", shown.answer)]
    return {"id": shown.id, "prompt": list(shown.before), "completion": completion, "label": shown.liked}


def test_trl_messages(tmp_path: Path) -> None:
    check_garden(tmp_path, {"kto.jsonl": [kto(shown) for shown in GARDEN]}, "trl", unknown=NOBODY)


def test_trl_texts_and_labels_of_many_spellings(tmp_path: Path) -> None:
    labels = [True, "true", "1", 1, False, "False", "0", None]
    rows = [{"prompt": f"question {number}", "completion": "answer", "label": label} for number, label in enumerate(labels)]
    found = imported(tmp_path, {"kto.json": rows})
    assert [row["prompt"] for row in found.rows.values()]
    labels_by_prompt = {found.messages(name)[0]["content"]: label for name, label in found.labels.items()}
    assert labels_by_prompt == {f"question {number}": label for number, label in enumerate([1, 1, 1, 1, 0, 0, 0, None])}


def test_trl_equal_rows_are_different_impressions(tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "completion": "hello", "label": label} for label in (None, None, True)]
    assert sorted(map(str, imported(tmp_path, {"kto.jsonl": rows}).labels.values())) == ["1", "None", "None"]


def test_trl_completion_with_a_call_of_a_tool_before_the_answer(tmp_path: Path) -> None:
    call = {"id": "t1", "type": "function", "function": {"name": "find", "arguments": '{"plant": "rose"}'}}
    steps = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "t1", "content": "no"}]
    row = {"id": "x", "prompt": "Edible?", "completion": [*steps, said("assistant", "No.")], "label": True}
    found = imported(tmp_path, {"kto.jsonl": [row]})
    assert found.messages("x") == [said("user", "Edible?"), *steps]
    assert (found.rows["x"]["response"], found.labels["x"]) == ("No.", 1)


def annotated(shown: Shown, column: str = "rating") -> dict[str, Any]:
    given = [] if shown.liked is None else [shown]
    return {
        "id": shown.id,
        "status": "completed" if given else "pending",
        "prompt": list(shown.before),
        "response": shown.answer,
        f"{column}.responses": [STARS[bool(shown.liked)] for shown in given] or None,
        f"{column}.responses.users": [shown.user for shown in given] or None,
        f"{column}.responses.status": ["submitted" for _ in given] or None,
        f"{column}.suggestion": 4,
    }


def test_argilla_columns_with_thresholds(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist([annotated(shown) for shown in GARDEN]), tmp_path / "in" / "records.parquet")
    found = check_garden(tmp_path, {}, "argilla", unknown=NOBODY, signals={"rating": Thresholds(low=2, high=4)})
    assert found.report.ignored_columns == ("rating.suggestion",)


def test_argilla_stars_without_thresholds_refuse_the_file_and_name_the_option(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"the score 'rating', .* feedback\.signals\.rating='{low: LOW, high: HIGH}' reads"):
        imported(tmp_path, {"records.jsonl": [annotated(shown) for shown in GARDEN]})


def test_argilla_records_with_several_annotators_drafts_and_words(tmp_path: Path) -> None:
    def record(name: str, *responses: tuple[str, str, Any]) -> dict[str, Any]:
        given = [
            {"user_id": user, "status": status, "values": {"helpful": {"value": value}}} for user, status, value in responses
        ]
        return {"id": name, "fields": {"instruction": "hi", "output": name}, "responses": given, "suggestions": []}

    records = [
        record("liked", ("u1", "submitted", "yes")),
        record("changed", ("u1", "submitted", "yes"), ("u2", "submitted", "no")),
        record("draft", ("u1", "draft", "yes")),
        record("silent"),
    ]
    found = imported(tmp_path, {"records.json": records})
    assert found.report.formats == ("argilla",)
    assert {name: label for name, label in found.labels.items() if name != "changed"} == {
        "liked": 1,
        "draft": None,
        "silent": None,
    }
    assert (found.report.events, found.report.ignored) == (3, {"helpful: responses that are draft": 1})


def chats(garden: tuple[Shown, ...] = GARDEN) -> dict[str, list[Shown]]:
    """The answers of every conversation, in order."""
    found: dict[str, list[Shown]] = {}
    for shown in garden:
        found.setdefault(shown.conversation, []).append(shown)
    return found


def whole(answers: list[Shown], **more: Any) -> list[dict[str, Any]]:
    """A whole conversation: the last answer and all before it."""
    return [*answers[-1].before, {**said("assistant", answers[-1].answer), **more}]


def place(shown: Shown) -> str:
    return f"{shown.conversation}/{len(shown.before)}"


def test_wildchat_conversations_with_times_and_ratings_of_messages(tmp_path: Path) -> None:
    rows = []
    for name, answers in chats().items():
        messages: list[dict[str, Any]] = whole(answers)
        for shown in answers:
            rated = {"rating": 1 if shown.liked else -1} if shown.liked is not None else {}
            message = {**said("assistant", shown.answer), "timestamp": shown.iso, "toxic": False, **rated}
            messages[len(shown.before)] = message
        messages[1] = {**messages[1], "hashed_ip": answers[0].user, "country": "Chile"}
        rows.append({"conversation_hash": name, "model": answers[0].model, "conversation": messages, "turn": 2, "toxic": False})
    garden = tuple(Shown(**{**vars(shown), "model": "shop-a"}) for shown in GARDEN)  # one model a conversation
    found = check_garden(tmp_path, {"wild.jsonl": rows}, "wildchat", name=place, garden=garden)
    assert found.report.ignored_columns == ("toxic", "turn")
    assert found.report.ignored == {"messages.country": 3, "messages.toxic": 4}


def test_sharegpt_conversations_with_from_and_value(tmp_path: Path) -> None:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    rows = [
        {"id": name, "conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in whole(answers)]}
        for name, answers in chats().items()
    ]
    garden = tuple(Shown(**{**vars(shown), "liked": None}) for shown in GARDEN)
    check_garden(tmp_path, {"sharegpt.json": rows}, "wildchat", name=place, unknown=("user", "model", "time"), garden=garden)


def test_a_rating_of_a_conversation_is_about_its_last_answer(tmp_path: Path) -> None:
    messages = [said("user", "hi"), said("assistant", "hello"), said("user", "why?"), said("assistant", "because")]
    found = imported(
        tmp_path, {"chats.jsonl": [{"chat_id": "c", "messages": messages, "feedback": {"rating": "down", "comment": "x"}}]}
    )
    assert found.labels == {"c/1": None, "c/3": 0}
    assert found.report.ignored == {"feedback.comment": 1}


def test_messages_of_the_assistant_that_are_no_answers_are_counted(tmp_path: Path) -> None:
    call = [{"id": "t", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    messages = [
        said("assistant", "Welcome!"),
        said("user", "hi"),
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "9 degrees", "tool_call_id": "t"},
        said("assistant", "It is cold."),
        said("user", "and?"),
        said("assistant", " "),
    ]
    found = imported(tmp_path, {"chats.jsonl": [{"id": "c", "messages": messages}]})
    assert list(found.rows) == ["c/4"]
    assert [message["role"] for message in found.messages("c/4")] == ["assistant", "user", "assistant", "tool"]
    assert found.report.ignored == {
        "answers without text": 1,
        "messages of the assistant that reply to no message": 1,
        "messages that call a tool": 1,
    }


def battle(winner: Any, number: int) -> dict[str, Any]:
    sides = {f"conversation_{side}": [said("user", "hi"), said("assistant", f"I am {side}")] for side in "ab"}
    return {"question_id": f"q{number}", "model_a": "A", "model_b": "B", "winner": winner, "judge": "u", "tstamp": 1.7e9, **sides}


def test_arena_a_winner_is_a_like_and_a_dislike(tmp_path: Path) -> None:
    winners = ["model_a", "model_b", "tie", "tie (bothbad)"]
    found = imported(tmp_path, {"arena.jsonl": [battle(winner, number) for number, winner in enumerate(winners)]})
    assert found.report.formats == ("arena",)
    assert (found.report.impressions, found.report.events, found.report.ignored) == (8, 6, {"ties": 1})
    labels = [(found.labels[f"q{number}/a/1"], found.labels[f"q{number}/b/1"]) for number in range(4)]
    assert labels == [(1, 0), (0, 1), (None, None), (0, 0)]
    row = found.rows["q1/b/1"]
    assert (row["response"], row["model"], row["user"], row["conversation_id"], row["time"]) == ("I am b", "B", "u", "q1", 1.7e9)


def test_arena_of_kaggle_with_lists_of_texts(tmp_path: Path) -> None:
    row = {"id": 7, "model_a": "A", "model_b": "B", "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}
    texts = {"prompt": ["hi", "why?"], "response_a": ["hello", "so"], "response_b": ["hey", "because"]}
    found = imported(tmp_path, {"train.csv": csv_of([{**row, **{key: json.dumps(value) for key, value in texts.items()}}])})
    assert found.labels == {"7/a/1": None, "7/a/3": 0, "7/b/1": None, "7/b/3": 1}
    assert found.messages("7/b/3") == [said("user", "hi"), said("assistant", "hey"), said("user", "why?")]


def test_hh_texts_and_pairs_of_messages(tmp_path: Path) -> None:
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"
    found = imported(tmp_path, {"hh.jsonl": [{"chosen": f"{start} because", "rejected": f"{start} go away"}]})
    last = {row["response"]: row["label"] for row in found.rows.values()}
    assert last == {"hello": None, "because": 1, "go away": 0}
    pair = {"prompt": "hi", "chosen": [said("assistant", "hello")], "rejected": [said("assistant", "no")]}
    (tmp_path / "dpo").mkdir()
    dpo = imported(tmp_path / "dpo", {"dpo.jsonl": [pair]})
    assert {row["response"]: row["label"] for row in dpo.rows.values()} == {"hello": 1, "no": 0}


def test_oasst_trees(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    garden = without_system()
    for name, answers in chats(garden).items():
        before = None
        for number, turn in enumerate(whole(answers)):
            role = "prompter" if turn["role"] == "user" else "assistant"
            shown = next((shown for shown in answers if len(shown.before) == number and role == "assistant"), None)
            row = {"message_id": shown.id if shown else f"{name}-{number}", "parent_id": before, "message_tree_id": name}
            rows.append(
                {**row, "role": role, "text": turn["content"], "lang": "en", "created_date": shown.iso if shown else None}
            )
            before = row["message_id"]
    garden = tuple(Shown(**{**vars(shown), "liked": None}) for shown in garden)
    found = check_garden(tmp_path, {"trees.jsonl": rows[::-1]}, "oasst", unknown=("user", "model"), garden=garden)
    assert found.report.ignored_columns == ("lang",)


def csv_of(rows: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        return '"' + str("" if value is None else value).replace('"', '""') + '"'

    return "\n".join([",".join(rows[0]), *(",".join(cell(value) for value in row.values()) for row in rows)]) + "\n"
