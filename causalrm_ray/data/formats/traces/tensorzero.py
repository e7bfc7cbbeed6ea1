"""TensorZero's tables, of PostgreSQL or ClickHouse: inferences and feedback."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from causalrm_ray.data.formats.base import LoggedEvent, LoggedImpression, content_of
from causalrm_ray.data.formats.parts.exchange import conversation_of
from causalrm_ray.data.formats.parts.messages import content_text, turns
from causalrm_ray.data.formats.parts.reader import Found, Reader
from causalrm_ray.data.formats.parts.scores import scored
from causalrm_ray.data.formats.parts.shelf import unpacked_event
from causalrm_ray.data.formats.parts.values import dig, mapping, must, name, parsed, seconds, seconds_of_uuid
from causalrm_ray.data.rows import RowError
from causalrm_ray.errors import brief

_INFERENCE = ("id", "function_name", "variant_name", "episode_id", "input", "output", "tags", "created_at", "timestamp")
_FEEDBACK = ("target_id", "metric_name", "value", "inference_id", "target_type")
_USERS = ("user_id", "user")


class TensorZero(Reader):
    """Rows of inferences, and of Boolean and float metrics about an inference or an episode, in one file a table.

    Every inference whose output has text is an impression, its conversation the episode. A metric of an episode is about its last
    inference. Demonstrations and comments are no labels: they are counted.
    """

    columns = frozenset([*_INFERENCE, *_FEEDBACK, "tool_params", "dynamic_tools"])

    def read(self, fields: Mapping[str, Any]) -> Sequence[LoggedImpression]:
        """The answer of an inference; feedback waits. Raises RowError."""
        if "metric_name" in fields:
            self._metric(fields)
            return []
        if "inference_id" in fields or "target_id" in fields:
            self.ignore("demonstrations" if "inference_id" in fields else "comments")
            return []
        return self._inference(fields)

    def _inference(self, row: Mapping[str, Any]) -> Sequence[LoggedImpression]:
        identity, given = must(name(row, "id"), "id"), mapping(row.get("input"))
        messages = turns(given.get("messages"), self.ignored)
        if system := given.get("system"):
            messages = [{"role": "system", "content": content_text([{"type": "text", "value": system}])}, *messages]
        output = parsed(row.get("output"))
        raw = dig(output, "raw") if isinstance(output, Mapping) else None  # of a JSON function
        answer = turns([{"role": "assistant", "content": output if raw is None else raw}], self.ignored)[-1]
        if answer.get("tool_calls") or not answer["content"].strip():
            self.ignore("inferences that call a tool" if answer.get("tool_calls") else "inferences without text")
            return []
        time = seconds(row.get("created_at", row.get("timestamp")))
        time = seconds_of_uuid(identity) if time is None else time
        tags, episode = mapping(row.get("tags")), name(row, "episode_id")
        self.shelf.put("inference", identity, True)
        if episode is not None:
            self.shelf.put("episode", episode, {"id": identity, "time": time})
        return [
            LoggedImpression(
                prompt=conversation_of(messages, _tools(row)),
                response=answer["content"],
                id=identity,
                time=time,
                user=name(tags, *_USERS),
                conversation_id=episode,
                model=name(row, "variant_name"),
                context={key: str(value) for key, value in tags.items() if key not in _USERS},
            )
        ]

    def _metric(self, row: Mapping[str, Any]) -> None:
        metric, identity = must(name(row, "metric_name"), "metric_name"), name(row, "id")
        time = seconds(row.get("created_at", row.get("timestamp")))
        if row.get("value") is None:
            raise RowError(f"value of {brief(metric)} must be true, false or a number, got none")
        event = scored(metric, row["value"], id=identity, time=seconds_of_uuid(identity) if time is None else time)
        if event is None:
            self.ignore(f"signal {metric}")
            return
        self.scores.see(event)
        self.shelf.put("metric", must(name(row, "target_id"), "target_id"), content_of(event))

    def finish(self) -> Iterator[Found]:
        """The events of all metrics."""
        for target, rows in self.shelf.groups("metric"):
            answer = target
            if not self.shelf.has("inference", target) and (inferences := self.shelf.get("episode", target)):
                answer = max(inferences, key=lambda inference: inference["time"] or 0.0)["id"]
            for row in rows:
                event: LoggedEvent = self.scores.labelled(unpacked_event(row))
                yield dataclasses.replace(event, impression_id=answer)
        yield from super().finish()

    @classmethod
    def matches(cls, columns: frozenset[str], rows: Sequence[Mapping[str, Any]]) -> float:
        """TensorZero's names of an inference's parts or of a metric's."""
        if {"function_name", "variant_name", "input", "output"} <= columns or {"target_id", "metric_name", "value"} <= columns:
            return 1.0
        return 0.9 if {"inference_id", "value"} <= columns or {"target_id", "target_type", "value"} <= columns else 0.0


def _tools(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Schemas of the tools that the inference could call, in OpenAI's form."""
    given = parsed(dig(row, "tool_params", "tools_available")) or parsed(row.get("dynamic_tools")) or []
    names = ("name", "description", "parameters")
    tools = [{key: parsed(value) for key, value in mapping(tool).items() if key in names} for tool in given]
    return [{"type": "function", "function": tool} for tool in tools if "name" in tool]
