"""Phoenix's exports: spans with OpenInference's attributes, and annotations."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from causalrm_ray.data.formats.base import LoggedImpression
from causalrm_ray.data.formats.parts.scores import vote
from causalrm_ray.data.formats.parts.values import dig, mapping, must, name, parsed, seconds
from causalrm_ray.data.formats.traces.assembly import Span, Traces
from causalrm_ray.data.formats.traces.attributes import attributes, nested, unread

_SPAN = ("id", "context", "context.span_id", "context.trace_id", "span_id", "trace_id", "parent_id", "span_kind", "start_time")
_NOTE = ("name", "annotation_name", "annotator_kind", "result", "label", "score", "explanation", "identifier", "metadata")
_NOTED = ("created_at", "updated_at", "session_id", "user_id", "result.label", "result.score", "result.explanation")
_READ = ("input.", "output.", "llm.input_messages", "llm.output_messages", "llm.model_name", "llm.tools", "user.", "session.")


class _Columns(Container[str]):
    """The columns that are read: attributes of spans are a mapping or columns of their own."""

    def __contains__(self, column: object) -> bool:
        return column in (*_SPAN, *_NOTE, *_NOTED, "attributes", "data") or str(column).startswith("attributes.")


class Phoenix(Traces):
    """Rows of spans and of annotations, in one file or several; pages of the API under `data`.

    Annotations are about a span, else a trace. Those of a person (annotator_kind HUMAN) are events, of several with the same name
    and identifier about a span the newest; those of a model or program, and explanations, are counted.
    """

    columns = _Columns()

    def read(self, fields: Mapping[str, Any]) -> Sequence[LoggedImpression]:
        """Nothing yet: an annotation may come before its span. Raises RowError."""
        pages = parsed(fields.get("data"))
        for row in map(mapping, pages) if isinstance(pages, list) else [fields]:
            if "annotator_kind" in row:
                self._annotation(row)
            else:
                self._span(row)
        return []

    def _span(self, row: Mapping[str, Any]) -> None:
        columns = {column.removeprefix("attributes."): value for column, value in row.items() if column.startswith("attributes.")}
        flat = {**attributes(row.get("attributes")), **{column: parsed(value) for column, value in columns.items()}}
        self.ignored.update(unread(flat, _READ))
        tree = nested(flat)
        identity = must(
            name(row, "context.span_id", "span_id") or name(mapping(row.get("context")), "span_id"), "context.span_id"
        )
        trace = name(row, "context.trace_id", "trace_id") or name(mapping(row.get("context")), "trace_id")
        kind = row.get("span_kind") or dig(tree, "openinference", "span", "kind")
        tools = [parsed(dig(tool, "tool", "json_schema") or dig(tool, "json_schema")) for tool in dig(tree, "llm", "tools") or []]
        self.span(
            Span(
                id=identity,
                trace=trace or identity,
                given=dig(tree, "llm", "input_messages") or dig(tree, "input", "value"),
                gave=dig(tree, "llm", "output_messages") or dig(tree, "output", "value"),
                is_llm=str(kind).upper() == "LLM",
                parent=name(row, "parent_id"),
                time=seconds(row.get("start_time"), "start_time"),
                user=name(mapping(dig(tree, "user")), "id"),
                session=name(mapping(dig(tree, "session")), "id"),
                model=name(mapping(dig(tree, "llm")), "model_name"),
                tools=[tool for tool in tools if tool] or None,
            )
        )

    def _annotation(self, row: Mapping[str, Any]) -> None:
        score = must(name(row, "name", "annotation_name"), "name")
        result = mapping(row.get("result")) or {key: row.get(f"result.{key}", row.get(key)) for key in ("label", "score")}
        self.ignore("annotations.explanation", result.get("explanation") or row.get("explanation"))
        target, trace = name(row, "span_id", "context.span_id"), name(row, "trace_id", "context.trace_id")
        label, number = result.get("label"), result.get("score")
        if row.get("annotator_kind") != "HUMAN":
            self.ignore(f"annotations by {row.get('annotator_kind')}: {score}")
        elif target is None and trace is None:
            self.ignore("annotations of a session")
        elif number is None and not label:
            self.ignore("annotations without a label or score")
        else:
            key = "/".join([must(target or trace, "span_id"), score, name(row, "identifier") or ""])
            value = number if number is not None and vote(label) is None else label
            time = seconds(row.get("updated_at") or row.get("created_at"))
            self.score(target or str(trace), trace, score, value, id=key, time=time)

    @classmethod
    def matches(cls, columns: frozenset[str], rows: Sequence[Mapping[str, Any]]) -> float:
        """Attributes of OpenInference, or annotations with a kind of annotator."""
        pages = [mapping(part) for row in rows if isinstance(page := parsed(row.get("data")), list) for part in page[:3]]
        for row in [*rows, *pages]:
            if {"annotator_kind", "span_id"} <= row.keys():
                return 1.0
            flat = [*attributes(row.get("attributes")), *(column.removeprefix("attributes.") for column in row)]
            if any(key.startswith(("openinference.", "llm.input_messages", "llm.output_messages")) for key in flat):
                return 1.0
            if {"context.span_id", "span_kind"} <= row.keys() or dig(row, "attributes", "llm", "input_messages"):
                return 1.0
        return 0.0
