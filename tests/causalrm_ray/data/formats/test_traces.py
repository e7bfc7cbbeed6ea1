"""Exports of systems that trace, answers and feedback in two files: every answer, label and column is compared by value."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from causalrm_ray.config.train import Thresholds
from causalrm_ray.data.rows import SourceError
from tests.causalrm_ray.data.formats.garden import GARDEN, Rows, Shown, check_garden, imported, said

RATED = [shown for shown in GARDEN if shown.liked is not None]


def observation(shown: Shown) -> dict[str, Any]:
    return {
        "id": f"{shown.id}-generation",
        "traceId": shown.id,
        "parentObservationId": None,
        "type": "GENERATION",
        "name": "chat",
        "startTime": shown.iso,
        "input": list(shown.before),
        "output": said("assistant", shown.answer),
        "providedModelName": shown.model,
        "userId": shown.user,
        "sessionId": shown.conversation,
        "level": "DEFAULT",
    }


def score(shown: Shown, **more: Any) -> dict[str, Any]:
    known = {"id": f"s-{shown.id}", "traceId": shown.id, "observationId": None, "sessionId": None, "name": "thumb"}
    return {**known, "value": int(bool(shown.liked)), "dataType": "NUMERIC", "comment": "x", "createdAt": shown.iso, **more}


def test_langfuse_observations_and_scores_of_traces_in_two_files(tmp_path: Path) -> None:
    files = {"a-scores.json": [score(shown) for shown in RATED], "b-observations.json": [observation(shown) for shown in GARDEN]}
    found = check_garden(tmp_path, files, "langfuse")
    assert found.report.ignored == {"scores.comment": 2}
    assert found.report.ignored_columns == ("level",)


@pytest.mark.parametrize(
    "kind",
    [
        lambda shown: {"dataType": "BOOLEAN", "value": int(shown.liked), "stringValue": str(shown.liked)},
        lambda shown: {"dataType": "BOOLEAN", "value": shown.liked},
        lambda shown: {"dataType": "CATEGORICAL", "value": None, "stringValue": "thumbs-up" if shown.liked else "thumbs-down"},
        lambda shown: {"dataType": "CATEGORICAL", "value": "good" if shown.liked else "bad"},
        lambda shown: {"observationId": f"{shown.id}-generation"},
        lambda shown: {"traceId": None, "subject": {"kind": "observation", "id": f"{shown.id}-generation", "traceId": shown.id}},
        lambda shown: {"traceId": None, "subject": {"kind": "trace", "id": shown.id}},
    ],
)
def test_langfuse_scores_of_every_kind_in_one_list(tmp_path: Path, kind: Any) -> None:
    rows = [*(score(shown, **kind(shown)) for shown in RATED), *map(observation, GARDEN)]
    check_garden(tmp_path, {"export.json": rows}, "langfuse")


def test_langfuse_pages_of_the_api(tmp_path: Path) -> None:
    pages = [
        {"data": [observation(shown) for shown in GARDEN], "meta": {"cursor": "x"}},
        {"data": [score(shown) for shown in RATED]},
    ]
    check_garden(tmp_path, {"pages.jsonl": pages}, "langfuse")


def test_langfuse_traces_that_hold_their_observations_and_scores(tmp_path: Path) -> None:
    rows = [
        {
            "id": shown.id,
            "timestamp": shown.iso,
            "userId": shown.user,
            "sessionId": shown.conversation,
            "input": shown.before[-1]["content"],
            "output": shown.answer,
            "observations": [observation(shown)],
            "scores": [score(shown)] if shown in RATED else [],
        }
        for shown in GARDEN
    ]
    check_garden(tmp_path, {"traces.json": rows}, "langfuse")


def test_langfuse_scores_that_are_no_users_votes_are_counted(tmp_path: Path) -> None:
    scores = [
        score(GARDEN[1], id="1", source="EVAL", name="judge"),
        score(GARDEN[1], id="2", dataType="TEXT", value="wrong"),
        score(GARDEN[1], id="3", dataType="CORRECTION", value="Prune it."),
        score(GARDEN[1], id="4", traceId=None, sessionId="c1"),
    ]
    found = imported(tmp_path, {"a.json": [*scores, *map(observation, GARDEN)]})
    assert set(found.labels.values()) == {None}
    assert found.report.ignored == {
        "scores by a judge: judge": 1,
        "scores of a session or experiment": 1,
        "scores of type CORRECTION": 1,
        "scores of type TEXT": 1,
        "scores.comment": 4,
    }


def test_a_changed_score_counts_as_it_is_now_also_when_it_is_imported_later(tmp_path: Path) -> None:
    changed = score(GARDEN[0], value=0, updatedAt="2026-02-01T00:00:00Z")
    found = imported(tmp_path, {"a.json": [*map(observation, GARDEN), changed, score(GARDEN[0])]})
    assert (found.labels["a1"], found.report.events) == (0, 1)


def test_a_score_of_stars_refuses_the_file_and_thresholds_read_it(tmp_path: Path) -> None:
    rows = [*map(observation, GARDEN), score(GARDEN[0], value=1), score(GARDEN[2], value=4.5)]
    with pytest.raises(SourceError, match=r"the score 'thumb', .* feedback\.signals\.thumb='{low: LOW, high: HIGH}'"):
        imported(tmp_path, {"a.json": rows})
    found = imported(tmp_path, {"a.json": rows}, {"thumb": Thresholds(low=2, high=4)})
    assert found.labels == {"a1": 0, "a2": None, "a3": 1, "a4": None}


def test_a_category_has_the_meaning_of_its_signal(tmp_path: Path) -> None:
    rows = [*map(observation, GARDEN), score(GARDEN[0], dataType="CATEGORICAL", value="rude", name="tone")]
    with pytest.raises(SourceError, match=r"feedback\.signals\.tone:rude=1 reads it as liked"):
        imported(tmp_path, {"a.json": rows})
    assert imported(tmp_path, {"a.json": rows}, {"tone:rude": 0}).labels["a1"] == 0


def test_the_answer_of_a_trace_is_what_its_first_span_gave_and_steps_are_counted(tmp_path: Path) -> None:
    def step(name: str, kind: str, given: Any, gave: Any, second: int, parent: str | None = "root") -> dict[str, Any]:
        time = f"2026-01-01T00:00:0{second}Z"
        ids = {"id": name, "traceId": "t", "parentObservationId": parent, "type": kind}
        return {**ids, "startTime": time, "input": given, "output": gave, "model": f"m-{name}"}

    question = [said("system", "Rules."), said("user", "hi")]
    rows = [
        step("root", "SPAN", {"question": "hi"}, {"answer": "hello", "sources": ["x", "y"]}, 0, None),
        step("rewrite", "GENERATION", "hi", "greeting", 1),
        step("find", "SPAN", "greeting", [{"page": 1}], 2),
        step("write", "GENERATION", question, "hello", 3),
        step("title", "GENERATION", "name this chat", "Greetings", 4),
        score(GARDEN[0], traceId="t", value=1),
    ]
    found = imported(tmp_path, {"a.json": rows})
    assert found.labels == {"t": 1}
    assert (found.messages("t"), found.rows["t"]["response"], found.rows["t"]["model"]) == (question, "hello", "m-write")
    assert found.report.ignored["calls of models inside of a trace that are not its answer"] == 2


def test_an_answer_that_is_json_stays_the_text_that_it_is(tmp_path: Path) -> None:
    rows = [
        {**observation(GARDEN[0]), "input": '{"plant": "rose"}', "output": '{"edible": true}'},
        {**observation(GARDEN[1]), "input": "[1, 2]", "output": '{"answer": "two"}'},
        {**observation(GARDEN[2]), "input": json.dumps([said("user", "hi")]), "output": json.dumps(said("assistant", "hello"))},
    ]
    found = imported(tmp_path, {"a.json": rows})
    texts = {name: (found.messages(name), row["response"]) for name, row in found.rows.items()}
    assert texts == {
        "a1": ([said("user", '{"plant": "rose"}')], '{"edible": true}'),
        "a2": ([said("user", "[1, 2]")], '{"answer": "two"}'),
        "a3": ([said("user", "hi")], "hello"),
    }


def test_turns_inside_of_one_trace_that_later_ones_quote_were_shown(tmp_path: Path) -> None:
    first, second = observation(GARDEN[0]), observation(GARDEN[1])
    second["traceId"] = "a1"
    votes = [score(GARDEN[0], observationId="a1-generation"), score(GARDEN[1], traceId="a1", id="other", value=0)]
    found = imported(tmp_path, {"a.json": [second, first, *votes]})
    assert found.labels == {"a1-generation": 1, "a1": 0}
    assert found.messages("a1") == list(GARDEN[1].before)
    assert {row["conversation_id"] for row in found.rows.values()} == {"c1"}


def test_a_score_may_come_in_an_import_before_its_trace(tmp_path: Path) -> None:
    """The score waits in the log for the impression, which has the trace's id."""
    early = imported(tmp_path, {"a-scores.json": [score(shown) for shown in RATED]})
    waiting = "scores about answers that are not in these files, which wait for them"
    assert (early.rows, early.report.events, early.report.ignored[waiting]) == ({}, 2, 2)
    (tmp_path / "in" / "a-scores.json").unlink()
    late = imported(tmp_path, {"b.json": [observation(shown) for shown in GARDEN]})
    assert late.labels == {"a1": 1, "a2": None, "a3": 0, "a4": None}


def test_a_trace_with_a_score_and_no_text_is_quarantined_others_are_counted(tmp_path: Path) -> None:
    empty = {**observation(GARDEN[0]), "output": None}
    found = imported(
        tmp_path, {"a.json": [empty, score(GARDEN[0]), {**observation(GARDEN[1]), "output": ""}, observation(GARDEN[2])]}
    )
    assert list(found.rows) == ["a3"]
    assert found.refused == ["trace 'a1' must hold a prompt and an answer in text, since it has scores, got none"]
    assert found.report.ignored["traces without an answer in text"] == 1


def run(shown: Shown) -> dict[str, Any]:
    kinds = {"system": "SystemMessage", "user": "HumanMessage", "assistant": "AIMessage"}
    messages = [
        {"lc": 1, "type": "constructor", "id": ["langchain", kinds[turn["role"]]], "kwargs": {"content": turn["content"]}}
        for turn in shown.before
    ]
    return {
        "id": f"{shown.id}-llm",
        "run_type": "llm",
        "start_time": shown.iso,
        "inputs": {"messages": [messages]},
        "outputs": {"generations": [[{"text": shown.answer, "message": {"kwargs": {"content": shown.answer, "type": "ai"}}}]]},
        "extra": {"metadata": {"user_id": shown.user, "thread_id": shown.conversation, "ls_model_name": shown.model}},
        "trace_id": shown.id,
        "parent_run_id": shown.id,
    }


def chain(shown: Shown) -> dict[str, Any]:
    common = {"id": shown.id, "trace_id": shown.id, "parent_run_id": None, "run_type": "chain", "start_time": shown.iso}
    return {**common, "inputs": {"question": shown.before[-1]["content"]}, "outputs": {"output": shown.answer}}


def test_langsmith_runs_and_feedback_in_two_files(tmp_path: Path) -> None:
    feedback = [
        {
            "id": f"f-{shown.id}",
            "run_id": shown.id,
            "key": "user_score",
            "score": float(bool(shown.liked)),
            "created_at": shown.iso,
        }
        for shown in RATED
    ]
    feedback += [{"id": "j", "run_id": "a2", "key": "judge", "score": 0.3, "feedback_source": {"type": "model"}}]
    feedback += [{"id": "n", "run_id": "a2", "key": "note", "comment": "fine", "correction": {"answer": "x"}}]
    files = {"feedback.jsonl": feedback, "runs.jsonl": [part for shown in GARDEN for part in (run(shown), chain(shown))]}
    found = check_garden(tmp_path, files, "langsmith")
    assert found.report.ignored == {
        "feedback by a model: judge": 1,
        "feedback without a score": 1,
        "feedback.comment": 1,
        "feedback.correction": 1,
    }


def inference(shown: Shown, as_text: bool) -> dict[str, Any]:
    blocks = [
        {"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]}
        for turn in shown.before
        if turn["role"] != "system"
    ]
    given = {"system": shown.before[0]["content"], "messages": blocks}
    gave = [{"type": "thought", "text": "Hm."}, {"type": "text", "text": shown.answer}]
    return {
        "id": shown.id,
        "function_name": "shop",
        "variant_name": shown.model,
        "episode_id": shown.conversation,
        "input": json.dumps(given) if as_text else given,
        "output": json.dumps(gave) if as_text else gave,
        "tags": {"user_id": shown.user, "surface": "web"},
        "created_at" if as_text else "timestamp": shown.iso,
    }


@pytest.mark.parametrize("as_text", [True, False])
def test_tensorzero_tables(tmp_path: Path, as_text: bool) -> None:
    metrics = [{"id": f"m-{shown.id}", "target_id": shown.id, "metric_name": "thumb", "value": shown.liked} for shown in RATED]
    files: dict[str, Rows] = {
        "ChatInference.jsonl": [inference(shown, as_text) for shown in GARDEN],
        "BooleanMetricFeedback.jsonl": metrics,
        "DemonstrationFeedback.jsonl": [{"id": "d", "inference_id": "a3", "value": '[{"type": "text", "text": "Yes."}]'}],
        "CommentFeedback.jsonl": [{"id": "c", "target_id": "a3", "target_type": "inference", "value": "rude"}],
    }
    found = check_garden(tmp_path, files, "tensorzero")
    assert found.report.ignored == {"comments": 1, "demonstrations": 1, "thoughts in messages": 4}
    assert found.rows["a1"]["context"] == '{"surface": "web"}'


def test_tensorzero_a_metric_of_an_episode_is_about_its_last_inference(tmp_path: Path) -> None:
    metrics = [{"id": "m", "target_id": "c1", "metric_name": "rating", "value": 4.5}]
    metrics += [{"id": "n", "target_id": "a3", "metric_name": "rating", "value": 1.0}]
    files = {"inferences.jsonl": [inference(shown, True) for shown in GARDEN], "float_metric_feedback.jsonl": metrics}
    with pytest.raises(SourceError, match=r"the score 'rating', .* feedback\.signals\.rating="):
        imported(tmp_path, files)
    assert imported(tmp_path, files, {"rating": Thresholds(low=2, high=4)}).labels == {"a1": None, "a2": 1, "a3": 0, "a4": None}


def test_tensorzero_calls_of_tools_and_times_in_ids(tmp_path: Path) -> None:
    blocks = [{"type": "tool_call", "id": "t1", "name": "find", "arguments": '{"plant": "rose"}'}]
    result = [{"type": "tool_result", "id": "t1", "name": "find", "result": "yes"}]
    asked = [
        {"role": "user", "content": "Edible?"},
        {"role": "assistant", "content": blocks},
        {"role": "user", "content": result},
    ]
    row = {
        "id": "01941f29-7c00-7000-8000-000000000001",
        "input": {"messages": asked},
        "output": [{"type": "text", "text": "Yes."}],
    }
    tools = {"tool_params": {"tools_available": [{"name": "find", "parameters": {"type": "object"}}]}}
    calling = {**row, "id": "y", "output": blocks}
    rows = [{"function_name": "f", "variant_name": "v", **row, **tools}, {"function_name": "f", "variant_name": "v", **calling}]
    found = imported(tmp_path, {"inferences.jsonl": rows})
    assert list(found.rows) == [row["id"]]
    call = {"id": "t1", "type": "function", "function": {"name": "find", "arguments": '{"plant": "rose"}'}}
    assert found.messages(str(row["id"])) == [
        said("user", "Edible?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "yes", "tool_call_id": "t1"},
    ]
    assert found.rows[str(row["id"])]["time"] == 1_735_689_600.0
    assert found.report.ignored == {"inferences that call a tool": 1}


def openinference(shown: Shown) -> dict[str, Any]:
    flat: dict[str, Any] = {"openinference.span.kind": "LLM", "llm.model_name": shown.model, "llm.token_count.prompt": 9}
    for number, turn in enumerate(shown.before):
        flat |= {f"llm.input_messages.{number}.message.{key}": value for key, value in turn.items()}
    flat |= {"llm.output_messages.0.message.role": "assistant", "llm.output_messages.0.message.content": shown.answer}
    flat |= {"user.id": shown.user, "session.id": shown.conversation}
    context = {"trace_id": f"{shown.id}-trace", "span_id": f"{shown.id}-span"}
    return {"id": "U3Bhbjox", "name": "chat", "context": context, "span_kind": "LLM", "start_time": shown.iso, "attributes": flat}


def annotation(shown: Shown, **more: Any) -> dict[str, Any]:
    result = {"label": "thumbs-up" if shown.liked else "thumbs-down", "score": int(bool(shown.liked)), "explanation": "x"}
    common = {"span_id": f"{shown.id}-span", "name": "user feedback", "annotator_kind": "HUMAN", "identifier": "app"}
    return {"id": f"n-{shown.id}", **common, "result": result, "created_at": shown.iso, "updated_at": shown.iso, **more}


def by_trace(shown: Shown) -> str:
    return f"{shown.id}-trace"


def test_phoenix_spans_and_annotations_of_people(tmp_path: Path) -> None:
    judged = annotation(GARDEN[1], annotator_kind="LLM", name="correctness")
    files = {"annotations.jsonl": [*map(annotation, RATED), judged], "spans.json": [openinference(shown) for shown in GARDEN]}
    found = check_garden(tmp_path, files, "phoenix", name=by_trace)
    assert found.report.ignored == {
        "annotations by LLM: correctness": 1,
        "annotations.explanation": 3,
        "attributes.llm.token_count.prompt": 4,
        "attributes.openinference.span.kind": 4,
    }


def test_phoenix_an_annotation_of_the_same_name_and_identifier_replaces_the_one_before(tmp_path: Path) -> None:
    first = annotation(GARDEN[0], updated_at="2026-01-01T00:01:00Z")
    second = annotation(GARDEN[0], result={"label": None, "score": 0}, updated_at="2026-01-01T00:02:00Z", id="other")
    other = annotation(GARDEN[2], identifier="b")
    found = imported(tmp_path, {"a.jsonl": [second, first, other, *map(openinference, GARDEN)]})
    assert found.labels == {"a1-trace": 0, "a2-trace": None, "a3-trace": 0, "a4-trace": None}
    assert found.report.events == 2


def test_phoenix_a_table_of_spans_with_columns_of_attributes(tmp_path: Path) -> None:
    rows = []
    for shown in GARDEN:
        messages = [{f"message.{key}": value for key, value in turn.items()} for turn in shown.before]
        row = {
            "context.span_id": f"{shown.id}-span",
            "context.trace_id": f"{shown.id}-trace",
            "parent_id": None,
            "span_kind": "LLM",
        }
        row |= {"start_time": shown.iso, "attributes.llm.input_messages": messages, "attributes.llm.model_name": shown.model}
        row |= {"attributes.llm.output_messages": [{"message.role": "assistant", "message.content": shown.answer}]}
        rows.append({**row, "attributes.user.id": shown.user, "attributes.session.id": shown.conversation})
    files = {"annotations.json": [annotation(shown) for shown in RATED], "spans.json": rows}
    check_garden(tmp_path, files, "phoenix", name=by_trace)


def assessment(shown: Shown, **more: Any) -> dict[str, Any]:
    return {
        "assessment_id": f"x-{shown.id}",
        "assessment_name": "user_satisfaction",
        "trace_id": shown.id,
        "source": {"source_type": "HUMAN", "source_id": shown.user},
        "create_time": shown.iso,
        "last_update_time": shown.iso,
        "feedback": {"value": shown.liked},
        "rationale": "x",
        **more,
    }


def mlflow_trace(shown: Shown, assessments: Rows) -> dict[str, Any]:
    attributes = {
        "mlflow.spanType": '"CHAT_MODEL"',
        "mlflow.spanInputs": json.dumps({"messages": shown.before, "model": shown.model}),
        "mlflow.spanOutputs": json.dumps({"choices": [{"message": said("assistant", shown.answer)}]}),
    }
    span = {
        "span_id": base64.b64encode(shown.id.encode()).decode(),
        "name": "chat",
        "attributes": attributes,
        "parent_span_id": None,
    }
    metadata = {"mlflow.trace.user": shown.user, "mlflow.trace.session": shown.conversation}
    info = {
        "trace_id": shown.id,
        "request_time": shown.iso,
        "state": "OK",
        "trace_metadata": metadata,
        "assessments": assessments,
    }
    return {"info": info, "data": {"spans": [{**span, "start_time_unix_nano": int((shown.time + 1) * 1e9)}]}}


def test_mlflow_traces_with_assessments(tmp_path: Path) -> None:
    judged = assessment(GARDEN[1], source={"source_type": "LLM_JUDGE"}, feedback={"value": 0.2}, assessment_name="safety")
    expected = {**assessment(GARDEN[1], expectation={"value": "x"})}
    own = {shown.id: [assessment(shown)] for shown in RATED} | {"a2": [judged, expected]}
    rows = [mlflow_trace(shown, own.get(shown.id, [])) for shown in GARDEN]
    garden = tuple(Shown(**{**vars(shown), "time": shown.time + 1}) for shown in GARDEN)  # of the call that the answer is from
    found = check_garden(tmp_path, {"traces.jsonl": rows}, "mlflow", garden=garden)
    assert found.report.ignored == {"assessments by LLM_JUDGE: safety": 1, "assessments.rationale": 4, "expectations": 1}


def test_mlflow_a_table_of_traces_and_assessments_apart(tmp_path: Path) -> None:
    rows = [
        {
            "trace_id": shown.id,
            "request_time": int(shown.time * 1000),
            "request": json.dumps({"messages": shown.before}),
            "response": json.dumps({"choices": [{"message": said("assistant", shown.answer)}]}),
            "trace_metadata": {"mlflow.trace.user": shown.user, "mlflow.trace.session": shown.conversation},
            "execution_duration": 9,
        }
        for shown in GARDEN
    ]
    votes = [assessment(shown) for shown in RATED]
    overridden = assessment(GARDEN[0], assessment_id="old", feedback={"value": False}, valid=False)
    found = check_garden(tmp_path, {"traces.json": rows, "votes.jsonl": [*votes, overridden]}, "mlflow", unknown=("model",))
    assert found.report.ignored["assessments that others override"] == 1


def otel(shown: Shown) -> dict[str, Any]:
    def message(turn: dict[str, Any]) -> dict[str, Any]:
        return {"role": turn["role"], "parts": [{"type": "text", "content": turn["content"]}]}

    gave = [{**message(said("assistant", shown.answer)), "finish_reason": "stop"}]
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": shown.model,
        "gen_ai.response.id": f"{shown.id}-response",
        "gen_ai.conversation.id": shown.conversation,
        "user.id": shown.user,
        "gen_ai.system_instructions": json.dumps([{"type": "text", "content": shown.before[0]["content"]}]),
        "gen_ai.input.messages": json.dumps([message(turn) for turn in shown.before[1:]]),
        "gen_ai.output.messages": json.dumps(gave),
        "gen_ai.usage.input_tokens": 9,
    }


def verdict(shown: Shown) -> dict[str, Any]:
    return {
        "event.name": "gen_ai.evaluation.result",
        "gen_ai.evaluation.name": "thumb",
        "gen_ai.evaluation.score.label": "thumbs_up" if shown.liked else "thumbs_down",
        "gen_ai.evaluation.explanation": "x",
        "gen_ai.response.id": f"{shown.id}-response",
    }


def typed(values: dict[str, Any]) -> Rows:
    kinds = {str: "stringValue", int: "intValue", float: "doubleValue"}
    return [
        {"key": key, "value": {kinds[type(value)]: str(value) if isinstance(value, int) else value}}
        for key, value in values.items()
    ]


def test_opentelemetry_otlp_spans_and_log_records(tmp_path: Path) -> None:
    spans = [
        {
            "traceId": shown.id,
            "spanId": f"{shown.id}-span",
            "name": "chat",
            "startTimeUnixNano": str(int(shown.time * 1e9)),
            "attributes": typed(otel(shown)),
        }
        for shown in GARDEN
    ]
    logs = [{"timeUnixNano": str(int(shown.time * 1e9)), "attributes": typed(verdict(shown))} for shown in RATED]
    files: dict[str, Rows] = {
        "logs.jsonl": [{"resourceLogs": [{"scopeLogs": [{"logRecords": logs}]}]}],
        "traces.jsonl": [{"resourceSpans": [{"resource": {}, "scopeSpans": [{"spans": spans}]}]}],
    }
    found = check_garden(tmp_path, files, "opentelemetry")
    assert found.report.ignored == {
        "attributes.gen_ai.usage.input_tokens": 4,
        "gen_ai.evaluation.explanation": 2,
        "messages.finish_reason": 4,
    }


def test_opentelemetry_rows_of_an_exporter_with_events_in_spans(tmp_path: Path) -> None:
    rows = []
    for shown in GARDEN:
        score = {"gen_ai.evaluation.name": "thumb", "gen_ai.evaluation.score.value": int(bool(shown.liked))}
        events = [{"name": "gen_ai.evaluation.result", "timestamp": shown.iso, "attributes": score}] if shown in RATED else []
        context = {"trace_id": f"0x{shown.id}", "span_id": f"0x{shown.id}-span"}
        rows.append({"name": "chat", "context": context, "start_time": shown.iso, "attributes": otel(shown), "events": events})
    check_garden(tmp_path, {"spans.json": rows}, "opentelemetry")


def test_scores_of_several_names_are_a_warning_that_names_them(tmp_path: Path) -> None:
    rows = [*map(observation, GARDEN), *(score(shown) for shown in RATED), score(GARDEN[1], id="v", name="valid_json", value=1)]
    [warning] = imported(tmp_path, {"a.json": rows}).report.warnings
    assert "thumb (2) and valid_json (1)" in warning
    assert "feedback.signals.NAME=null" in warning
