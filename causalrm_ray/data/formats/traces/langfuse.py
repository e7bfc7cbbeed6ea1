"""Langfuse's exports: observations and scores, as its API and its interface give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from causalrm_ray.data.formats.base import LoggedImpression
from causalrm_ray.data.formats.parts.values import mapping, must, name, parsed, seconds
from causalrm_ray.data.formats.traces.assembly import Span, Traces

_SPAN = ("id", "traceId", "parentObservationId", "type", "startTime", "input", "output", "userId", "sessionId")
_MODELS = ("providedModelName", "model", "modelId")
_SCORE = ("name", "value", "stringValue", "dataType", "observationId", "subject", "source", "comment", "createdAt", "updatedAt")
_TRACE = ("timestamp", "scores", "observations")
_SUBJECTS = {"trace": "traceId", "observation": "observationId", "session": "sessionId", "experiment": "experimentId"}
_JUDGES = ("EVAL",)


class Langfuse(Traces):
    """Rows of observations (input, output, model) and of scores, in one file or several; pages of the API under `data`.

    A score is about its observation, else its trace. Scores of an evaluator (source EVAL) are no user's, texts and corrections
    no labels: they are counted. So are scores of a session, which are about no one answer.
    """

    columns = frozenset([*_SPAN, *_MODELS, *_SCORE, *_TRACE, "data", "meta"])

    def read(self, fields: Mapping[str, Any]) -> Sequence[LoggedImpression]:
        """Nothing yet: a score may come before its trace. Raises RowError."""
        pages = parsed(fields.get("data"))
        for row in map(mapping, pages) if isinstance(pages, list) else [fields]:
            if _is_score(row):
                self._score(row)
            else:
                self._span(row)
        return []

    def _span(self, row: Mapping[str, Any]) -> None:
        identity = must(name(row, "id"), "id")
        trace = name(row, "traceId") or identity  # a trace is the first of its own spans
        self.span(
            Span(
                id=identity,
                trace=trace,
                given=row.get("input"),
                gave=row.get("output"),
                is_llm=str(row.get("type")).upper() == "GENERATION",
                parent=name(row, "parentObservationId") or (trace if trace != identity else None),
                time=seconds(row.get("startTime", row.get("timestamp")), "startTime"),
                user=name(row, "userId"),
                session=name(row, "sessionId"),
                model=name(row, *_MODELS),
            )
        )
        for part in map(mapping, _list(row.get("observations"))):
            self._span({"traceId": trace, **part})
        for part in map(mapping, _list(row.get("scores"))):
            self._score({"traceId": trace, **part})

    def _score(self, row: Mapping[str, Any]) -> None:
        subject = mapping(row.get("subject"))
        row = {**row, **({_SUBJECTS[subject["kind"]]: subject.get("id")} if subject.get("kind") in _SUBJECTS else {})}
        score, kind = must(name(row, "name"), "name"), str(row.get("dataType"))
        trace = name(row, "traceId") or name(subject, "traceId")
        target = name(row, "observationId") or trace
        value = row.get("value")
        if kind in ("CATEGORICAL", "BOOLEAN") and row.get("stringValue") not in (None, ""):
            value = row["stringValue"]
        elif kind == "BOOLEAN" and value in (0, 1, "0", "1"):
            value = bool(int(value))
        self.ignore("scores.comment", row.get("comment"))
        if kind in ("TEXT", "CORRECTION"):
            self.ignore(f"scores of type {kind}")
        elif row.get("source") in _JUDGES:
            self.ignore(f"scores by a judge: {score}")
        elif target is None:
            self.ignore("scores of a session or experiment")
        elif value is None:
            self.ignore("scores without a value")
        else:
            time = seconds(row.get("updatedAt") or row.get("timestamp") or row.get("createdAt"))
            self.score(target, trace, score, value, id=name(row, "id"), time=time)

    @classmethod
    def matches(cls, columns: frozenset[str], rows: Sequence[Mapping[str, Any]]) -> float:
        """Langfuse's names of an observation's parts or of a score's."""
        pages = [mapping(part) for row in rows if isinstance(page := parsed(row.get("data")), list) for part in page[:3]]
        names = [columns, *(frozenset(page) for page in pages)]
        if any("traceId" in found and found & {"startTime", "parentObservationId"} for found in names):
            return 1.0
        if any(
            "name" in found and found & {"value", "stringValue"} and found & {"traceId", "dataType", "subject"} for found in names
        ):
            return 1.0
        return 0.9 if {"timestamp", "input", "output"} <= columns and columns & {"sessionId", "observations", "scores"} else 0.0


def _is_score(row: Mapping[str, Any]) -> bool:
    return "name" in row and bool({"value", "stringValue"} & row.keys()) and not {"input", "output", "startTime"} & row.keys()


def _list(value: Any) -> list[Any]:
    found = parsed(value)
    return found if isinstance(found, list) else []
