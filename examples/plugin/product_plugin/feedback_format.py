"""A feedback format: rows of question, answer and thumbs, as a help desk exports them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from causalrm_ray.data.formats.base import LoggedEvent, LoggedImpression
from causalrm_ray.data.rows import RowError
from causalrm_ray.errors import brief

EVENTS = {"up": [LoggedEvent("upvote")], "down": [LoggedEvent("downvote")], "": []}


class Thumbs:
    """`question`, `answer`, `ticket` (its id), `thumbs`: up, down, or empty."""

    columns = frozenset(["question", "answer", "ticket", "thumbs"])

    def read(self, fields: Mapping[str, Any]) -> list[LoggedImpression]:
        """The one answer of a row."""
        thumbs = fields.get("thumbs", "")
        if thumbs not in EVENTS:
            raise RowError(f"thumbs must be one of {', '.join(map(repr, EVENTS))}, got {brief(thumbs)}")
        return [
            LoggedImpression(
                prompt=fields.get("question", ""),
                response=fields.get("answer", ""),
                id=fields.get("ticket"),
                events=EVENTS[thumbs],
            )
        ]
