"""TRL's unpaired preferences (KTO): a prompt, its completion, and whether somebody liked it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from causalrm_ray.data.formats.base import LoggedImpression
from causalrm_ray.data.formats.parts.exchange import conversation_of
from causalrm_ray.data.formats.parts.messages import turns
from causalrm_ray.data.formats.parts.ratings import OURS, ratings
from causalrm_ray.data.formats.parts.reader import Reader
from causalrm_ray.data.formats.parts.values import name, parsed, seconds
from causalrm_ray.data.rows import RowError, conversation
from causalrm_ray.errors import kind_of


class Trl(Reader):
    """`prompt` and `completion`, texts or lists of messages, and `label`, true or false, null where nobody said.

    A completion of several messages is the answer that its last one is, to all before it. Kept where they are given: id, user,
    conversation_id, model, time, tools.
    """

    columns = frozenset({"prompt", "completion", "tools", "id", "user", "conversation_id", "model", "time", *OURS})

    def read(self, fields: Mapping[str, Any]) -> Iterator[LoggedImpression]:
        """The one answer of a row. Raises RowError."""
        prompt, completion = parsed_list(fields.get("prompt")), parsed_list(fields.get("completion"))
        if isinstance(completion, list):
            given = turns(completion, self.ignored)
            if not given or given[-1]["role"] != "assistant":
                raise RowError(f"completion must end with a message of the assistant, got {kind_of(completion)}")
            before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            prompt, completion = [*turns(before, self.ignored), *given[:-1]], given[-1]["content"]
        elif isinstance(prompt, list):
            prompt = turns(prompt, self.ignored)
        tools = fields.get("tools")
        impression = LoggedImpression(
            prompt=conversation_of(prompt, tools) if isinstance(prompt, list) else conversation(prompt, parsed(tools)),
            response=completion or "",
            id=name(fields, "id"),
            time=seconds(fields.get("time")),
            user=name(fields, "user"),
            conversation_id=name(fields, "conversation_id"),
            model=name(fields, "model"),
        )
        yield from self.scores.rate(impression, list(ratings(fields, self.ignored)))

    @classmethod
    def matches(cls, columns: frozenset[str], rows: Sequence[Mapping[str, Any]]) -> float:
        """`prompt` and `completion` are TRL's names."""
        return 1.0 if {"prompt", "completion"} <= columns else 0.0


def parsed_list(value: Any) -> Any:
    """The list of messages in a JSON text; other values, and texts that only look like JSON, as they are."""
    found = parsed(value)
    return found if isinstance(found, list) and all(isinstance(part, Mapping) for part in found) else value
