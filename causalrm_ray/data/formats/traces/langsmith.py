"""LangSmith's exports: runs and feedback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from causalrm_ray.data.formats.base import LoggedImpression
from causalrm_ray.data.formats.parts.values import dig, mapping, must, name, seconds
from causalrm_ray.data.formats.traces.assembly import Span, Traces

_RUN = ("id", "run_type", "inputs", "outputs", "trace_id", "parent_run_id", "start_time", "end_time", "extra")
_FEEDBACK = ("run_id", "key", "score", "value", "comment", "correction", "feedback_source", "created_at", "modified_at")
_SESSIONS = ("session_id", "thread_id", "conversation_id")


class LangSmith(Traces):
    """Rows of runs (inputs, outputs) and of feedback (run_id, key, score, value), in one file or several.

    Feedback is about its run's answer: that of the trace for its first run. `extra.metadata` may hold the user, the conversation
    and the model. Feedback of a model (feedback_source) is no user's, comments and corrections no labels: they are counted.
    """

    columns = frozenset([*_RUN, *_FEEDBACK])

    def read(self, fields: Mapping[str, Any]) -> Sequence[LoggedImpression]:
        """Nothing yet: feedback may come before its run. Raises RowError."""
        if "key" in fields and "inputs" not in fields:
            self._feedback(fields)
        else:
            self._run(fields)
        return []

    def _run(self, row: Mapping[str, Any]) -> None:
        identity = must(name(row, "id"), "id")
        metadata = mapping(dig(row, "extra", "metadata"))
        outputs = mapping(row.get("outputs"))
        self.span(
            Span(
                id=identity,
                trace=name(row, "trace_id") or identity,
                given=row.get("inputs"),
                gave=outputs or row.get("outputs"),
                is_llm=row.get("run_type") == "llm",
                parent=name(row, "parent_run_id"),
                time=seconds(row.get("start_time"), "start_time"),
                user=name(metadata, "user_id", "user"),
                session=name(metadata, *_SESSIONS),
                model=name(metadata, "ls_model_name")
                or name(mapping(dig(row, "extra", "invocation_params")), "model", "model_name"),
                tools=dig(row, "extra", "invocation_params", "tools"),
            )
        )

    def _feedback(self, row: Mapping[str, Any]) -> None:
        key, trace = must(name(row, "key"), "key"), name(row, "trace_id")
        target = name(row, "run_id") or trace
        for column in ("comment", "correction"):
            self.ignore(f"feedback.{column}", row.get(column))
        value = row.get("score") if row.get("score") is not None else row.get("value")
        if dig(row, "feedback_source", "type") == "model":
            self.ignore(f"feedback by a model: {key}")
        elif target is None:
            self.ignore("feedback of a session")
        elif value is None or isinstance(value, Mapping | list):
            self.ignore("feedback without a score")
        else:
            time = seconds(row.get("modified_at") or row.get("created_at"))
            self.score(target, trace, key, value, id=name(row, "id"), time=time)

    @classmethod
    def matches(cls, columns: frozenset[str], rows: Sequence[Mapping[str, Any]]) -> float:
        """LangSmith's names of a run's parts or of a feedback's."""
        if {"run_type", "inputs"} <= columns or ({"run_id", "key"} <= columns and columns & {"score", "value"}):
            return 1.0
        return 0.0
