"""MLflow's traces, as objects or as the table of `search_traces`, and their assessments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from causalrm_ray.data.formats.base import LoggedImpression
from causalrm_ray.data.formats.parts.values import dig, mapping, must, name, parsed, seconds
from causalrm_ray.data.formats.traces.assembly import Span, Traces
from causalrm_ray.data.formats.traces.attributes import attributes

_TRACE = ("trace", "info", "data", "trace_id", "request_id", "request", "response", "request_time", "timestamp_ms", "spans")
_INFO = ("trace_metadata", "request_metadata", "tags", "assessments", "traces", "request_preview", "response_preview")
_ASSESSMENT = ("assessment_id", "assessment_name", "name", "value", "feedback", "expectation", "rationale", "source", "span_id")
_ASSESSED = ("create_time", "create_time_ms", "last_update_time", "last_update_time_ms", "valid", "overrides", "error")
_MODELS = ("model", "model_name", "gen_ai.request.model", "ai.model.name", "mlflow.llm.model")


class MlFlow(Traces):
    """A trace a row, with its spans and assessments; assessments may also be rows of their own.

    The answer is the trace's response, or that of its last call of a model. Feedback of a person (source HUMAN) is an event; that
    of judges and programs, expectations and rationales are counted.
    """

    columns = frozenset([*_TRACE, *_INFO, *_ASSESSMENT, *_ASSESSED])

    def read(self, fields: Mapping[str, Any]) -> Sequence[LoggedImpression]:
        """Nothing yet: an assessment may come before its trace. Raises RowError."""
        listed = parsed(fields.get("traces"))
        for row in map(mapping, listed) if isinstance(listed, list) else [fields]:
            whole = mapping(row.get("trace"))
            if _is_assessment(row):
                self._assessment(row, must(name(row, "trace_id", "request_id"), "trace_id"))
            else:
                self._trace({**whole, **row}, {**row, **mapping(whole.get("info")), **mapping(row.get("info"))})
        return []

    def _trace(self, row: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        trace = must(name(info, "trace_id", "request_id"), "trace_id")
        known = {**mapping(info.get("request_metadata")), **mapping(info.get("trace_metadata"))}
        tags, data = mapping(info.get("tags")), mapping(row.get("data"))
        first = Span(  # the trace itself: its request and response are those of its first span
            id=trace,
            trace=trace,
            given=parsed(_first(row, data, "request") or known.get("mlflow.traceInputs") or info.get("request_preview")),
            gave=parsed(_first(row, data, "response") or known.get("mlflow.traceOutputs") or info.get("response_preview")),
            is_llm=False,
            time=seconds(next((info[key] for key in ("request_time", "timestamp_ms") if info.get(key) is not None), None)),
            user=name(known, "mlflow.trace.user") or name(tags, "user_id", "user"),
            session=name(known, "mlflow.trace.session") or name(tags, "session_id"),
            model=name(known, "mlflow.modelId"),
        )
        spans = parsed(data.get("spans") or row.get("spans"))
        self.span(first)
        for span in map(mapping, spans if isinstance(spans, list) else []):
            self._span(trace, span)
        assessments = parsed(info.get("assessments"))
        for assessment in map(mapping, assessments if isinstance(assessments, list) else []):
            self._assessment(assessment, trace)

    def _span(self, trace: str, span: Mapping[str, Any]) -> None:
        flat = {key: parsed(value) for key, value in attributes(span.get("attributes")).items()}
        identity = must(name(span, "span_id") or name(mapping(span.get("context")), "span_id"), "span_id")
        times = [span[key] for key in ("start_time_unix_nano", "start_time", "start_time_ns") if span.get(key) is not None]
        self.span(
            Span(
                id=identity,
                trace=trace,
                given=flat.get("mlflow.spanInputs", span.get("inputs")),
                gave=flat.get("mlflow.spanOutputs", span.get("outputs")),
                is_llm=str(flat.get("mlflow.spanType", span.get("span_type"))).upper() in ("LLM", "CHAT_MODEL"),
                parent=name(span, "parent_span_id", "parent_id") or trace,
                time=seconds(times[0]) if times else None,
                model=name({**mapping(flat.get("mlflow.spanInputs")), **flat}, *_MODELS),
                tools=flat.get("mlflow.chat.tools"),
            )
        )

    def _assessment(self, row: Mapping[str, Any], trace: str) -> None:
        score = must(name(row, "assessment_name", "name"), "name")
        source = str(dig(row, "source", "source_type") or row.get("source") or "HUMAN").upper()
        value = parsed(dig(row, "feedback", "value") if "feedback" in row else row.get("value"))
        self.ignore("assessments.rationale", row.get("rationale"))
        if "expectation" in row:
            self.ignore("expectations")
        elif source != "HUMAN":
            self.ignore(f"assessments by {source}: {score}")
        elif row.get("valid") is False:
            self.ignore("assessments that others override")
        elif value is None or isinstance(value, list | Mapping):
            self.ignore("assessments without a value")
        else:
            columns = ("last_update_time", "last_update_time_ms", "create_time", "create_time_ms")
            time = next((seconds(row[key], key) for key in columns if row.get(key) is not None), None)
            self.score(name(row, "span_id") or trace, trace, score, value, id=name(row, "assessment_id"), time=time)

    @classmethod
    def matches(cls, columns: frozenset[str], rows: Sequence[Mapping[str, Any]]) -> float:
        """A trace's information, the table of traces, or an assessment."""
        for row in rows:
            listed = parsed(row.get("traces"))
            info = mapping(row.get("info")) or mapping(dig(listed[0] if isinstance(listed, list) and listed else None, "info"))
            if info.keys() & {"trace_id", "request_id"} or _is_assessment(row):
                return 1.0
        table = columns & {"trace_metadata", "assessments", "request_metadata", "execution_duration"}
        return 1.0 if {"request", "response"} <= columns and columns & {"trace_id", "request_id"} and table else 0.0


def _is_assessment(row: Mapping[str, Any]) -> bool:
    named = row.keys() & {"assessment_id", "assessment_name"} or {"trace_id", "name", "value"} <= row.keys()
    return bool(named) and bool(row.keys() & {"rationale", "source", "feedback", "expectation"})


def _first(row: Mapping[str, Any], data: Mapping[str, Any], key: str) -> Any:
    return data.get(key) if data.get(key) is not None else row.get(key)
