"""OpenTelemetry's spans of models (gen_ai.*) and the events that evaluate them, in OTLP's JSON or an exporter's rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from causalrm_ray.data.formats.base import LoggedImpression
from causalrm_ray.data.formats.parts.exchange import prompt_of
from causalrm_ray.data.formats.parts.scores import vote
from causalrm_ray.data.formats.parts.values import dig, mapping, must, name, parsed, seconds
from causalrm_ray.data.formats.traces.assembly import Span, Traces
from causalrm_ray.data.formats.traces.attributes import attributes, nested, unread

_OTLP = ("resourceSpans", "resourceLogs", "resource_spans", "resource_logs")
_SCOPES = (
    *(("scopeSpans", "spans"), ("scope_spans", "spans")),
    *(("scopeLogs", "logRecords"), ("scope_logs", "log_records")),
)
_IDS = (
    "traceId",
    "trace_id",
    "TraceId",
    "spanId",
    "span_id",
    "SpanId",
    "parentSpanId",
    "parent_span_id",
    "ParentSpanId",
    "parent_id",
)
_TIMES = ("startTimeUnixNano", "start_time_unix_nano", "start_time", "Timestamp", "timestamp", "timeUnixNano", "time_unix_nano")
_MORE = (
    "observedTimeUnixNano",
    "observed_timestamp",
    "context",
    "events",
    "Events",
    "name",
    "SpanName",
    "eventName",
    "event_name",
)
_ATTRIBUTES = ("attributes", "SpanAttributes", "LogAttributes")
_RESULT, _DETAILS = "gen_ai.evaluation.result", "gen_ai.client.inference.operation.details"
_READ = (
    *(
        "gen_ai.input",
        "gen_ai.output",
        "gen_ai.system_instructions",
        "gen_ai.prompt",
        "gen_ai.completion",
        "gen_ai.tool.definitions",
    ),
    *("gen_ai.conversation.id", "gen_ai.response.id", "gen_ai.response.model", "gen_ai.request.model", "gen_ai.operation.name"),
    *("gen_ai.evaluation", "user.id", "enduser.id", "session.id", "event.name"),
)
_CALLS = ("chat", "text_completion", "generate_content", "completion")


class OpenTelemetry(Traces):
    """Spans with `gen_ai.input.messages` and `gen_ai.output.messages`, and events `gen_ai.evaluation.result` of a span or in
    rows of their own, in one file or several.

    An evaluation is about the span that it belongs to, or that has its `gen_ai.response.id`. Its label is its meaning where that
    is a vote (thumbs_up), else its value; explanations are counted.
    """

    columns = frozenset([*_OTLP, *_IDS, *_TIMES, *_MORE, *_ATTRIBUTES])

    def read(self, fields: Mapping[str, Any]) -> Sequence[LoggedImpression]:
        """Nothing yet: an evaluation may come before its span. Raises RowError."""
        for row in _rows(fields):
            flat = _flat(row)
            if (name(row, "eventName", "event_name") or flat.get("event.name") or row.get("name")) == _RESULT:
                self._evaluation(row, flat, None)
                continue
            events = [(event, _flat(event)) for event in _events(row)]
            for event, inner in events:
                if event.get("name", event.get("Name")) == _RESULT:
                    self._evaluation(event, inner, row)
            details = [inner for event, inner in events if event.get("name", event.get("Name")) == _DETAILS]
            self._span(row, {key: value for part in (*details, flat) for key, value in part.items()})
        return []

    def _span(self, row: Mapping[str, Any], flat: Mapping[str, Any]) -> None:
        self.ignored.update(unread(flat, _READ))
        tree = nested(flat)
        calls = mapping(tree.get("gen_ai"))
        given = parsed(dig(calls, "input", "messages")) or dig(calls, "prompt")
        system = parsed(dig(calls, "system_instructions"))
        if given and system:
            given = [{"role": "system", "content": system}, *(prompt_of(given) or [])]
        identity = must(_id(row, "span"), "span_id")
        response = name(mapping(calls.get("response")), "id")
        self.span(
            Span(
                id=identity,
                trace=_id(row, "trace") or identity,
                given=given,
                gave=parsed(dig(calls, "output", "messages")) or dig(calls, "completion"),
                is_llm=bool(given) and dig(calls, "operation", "name") in (None, *_CALLS),
                parent=name(row, "parentSpanId", "parent_span_id", "ParentSpanId", "parent_id"),
                time=_time(row),
                user=name(flat, "user.id", "enduser.id"),
                session=name(flat, "gen_ai.conversation.id", "session.id"),
                model=name(flat, "gen_ai.response.model", "gen_ai.request.model"),
                tools=parsed(dig(calls, "tool", "definitions")),
                aliases=[response] if response else [],
            )
        )

    def _evaluation(self, row: Mapping[str, Any], flat: Mapping[str, Any], span: Mapping[str, Any] | None) -> None:
        score = must(name(flat, "gen_ai.evaluation.name"), "gen_ai.evaluation.name")
        label, number = flat.get("gen_ai.evaluation.score.label"), flat.get("gen_ai.evaluation.score.value")
        self.ignore("gen_ai.evaluation.explanation", flat.get("gen_ai.evaluation.explanation"))
        owner = row if span is None else span
        response = name(flat, "gen_ai.response.id")
        target, trace = response or _id(owner, "span"), _id(owner, "trace")
        if number is None and not label:
            self.ignore("evaluations without a label or value")
            return
        value = number if number is not None and vote(label) is None else label
        self.score(must(target or trace, "span_id"), trace, score, value, time=_time(row))

    @classmethod
    def matches(cls, columns: frozenset[str], rows: Sequence[Mapping[str, Any]]) -> float:
        """OTLP's envelopes, or spans and events with attributes of gen_ai."""
        if columns & set(_OTLP):
            return 1.0
        named = (name for row in rows for name in (*_flat(row), *(key for event in _events(row) for key in _flat(event))))
        return 1.0 if any(name.startswith("gen_ai.") for name in named) else 0.0


def _rows(fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Spans and log records of OTLP's envelopes, or the row itself."""
    envelopes = [part for key in _OTLP for part in _objects(fields.get(key))]
    if not envelopes:
        yield fields
    for envelope in envelopes:
        for key, inner in _SCOPES:
            for scope in _objects(envelope.get(key)):
                yield from _objects(scope.get(inner))


def _objects(value: Any) -> list[Mapping[str, Any]]:
    """The objects in a list, or in its JSON text."""
    value = parsed(value)
    return [part for part in map(parsed, value) if isinstance(part, Mapping)] if isinstance(value, list) else []


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for column in (*_ATTRIBUTES, "Attributes") for key, value in attributes(row.get(column)).items()}


def _events(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return _objects(row.get("events", row.get("Events")))


def _id(row: Mapping[str, Any], what: str) -> str | None:
    """The id of a span or trace; consoles write it with 0x."""
    found = name(row, f"{what}Id", f"{what}_id", f"{what.capitalize()}Id") or name(mapping(row.get("context")), f"{what}_id")
    return found and found.removeprefix("0x")


def _time(row: Mapping[str, Any]) -> float | None:
    given = (
        row[key] for key in (*_TIMES, "observedTimeUnixNano", "observed_timestamp") if row.get(key) not in (None, "", 0, "0")
    )
    return seconds(next(given, None))
