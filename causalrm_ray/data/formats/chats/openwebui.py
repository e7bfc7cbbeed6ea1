"""Open WebUI's exports: all feedback, and all chats. The first alone holds the rated messages only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from causalrm_ray.conversation import Conversation
from causalrm_ray.data.formats.base import LoggedEvent, LoggedImpression
from causalrm_ray.data.formats.chats.tree import shown_answers
from causalrm_ray.data.formats.parts.reader import Found, Reader
from causalrm_ray.data.formats.parts.values import dig, mapping, must, name, parsed, seconds
from causalrm_ray.data.rows import RowError
from causalrm_ray.errors import brief

_MESSAGE = {"id", "parentId", "childrenIds", "role", "content", "model", "timestamp", "annotation", "feedbackId"}
_STATE = {
    "done",
    "models",
    "modelName",
    "modelIdx",
    "lastSentence",
    "userContext",
    "originalContent",
}  # of the page, not the chat


class OpenWebUi(Reader):
    """Rows of feedback (`data`, `meta`, `snapshot`) and of chats (`chat.history.messages`), in one file or several.

    Every answer of a chat is an impression, its id CHAT/MESSAGE; ratings of +1 and -1 are its events, from the feedback or, for a
    message that has none there, from its own `annotation`. Without the chats, each feedback's snapshot stands for its chat.
    """

    columns = frozenset({"id", "user_id", "data", "meta", "snapshot", "chat", "created_at", "updated_at"})

    def __init__(self) -> None:
        super().__init__()
        self._rated = self._chats = 0

    def read(self, fields: Mapping[str, Any]) -> Sequence[LoggedImpression]:
        """Nothing yet: a chat and its feedback come in any order. Raises RowError."""
        meta, data = mapping(fields.get("meta")), mapping(fields.get("data"))
        user = name(fields, "user_id")
        if "chat" in fields and "rating" not in data:
            self._chats += 1
            self._keep(
                must(name(fields, "id"), "id"), user, mapping(fields["chat"]), seconds(fields.get("updated_at")), is_whole=True
            )
            return []
        chat, message = must(name(meta, "chat_id"), "meta.chat_id"), must(name(meta, "message_id"), "meta.message_id")
        rating = data.get("rating")
        label = _label(rating)
        if rating is not None and label is None:
            raise RowError(f"rating in data must be 1 or -1, got {brief(rating)}")
        for key in data.keys() - {"rating", "model_id"}:
            self.ignore(f"data.{key}", data[key])
        times = seconds(fields.get("updated_at")), seconds(fields.get("created_at"))
        time = times[0] if times[0] is not None else times[1]
        if label is None:
            self.ignore("feedback without a rating")
        else:
            self._rated += 1
            identity = f"{must(name(fields, 'id'), 'id')}@{time or 0:.0f}"  # a vote that is changed later keeps its id
            self.shelf.put("vote", chat, {"message": message, "label": label, "id": identity, "time": time})
        if snapshot := mapping(dig(fields, "snapshot", "chat", "chat")):
            self._keep(chat, user, snapshot, time, is_whole=False)
        elif label is not None:
            self.shelf.put("chat", chat, {"messages": {}, "user": user, "time": time, "whole": False})
        return []

    def finish(self) -> Iterator[Found]:
        """The answers of all chats with their ratings."""
        for chat, versions in self.shelf.groups("chat"):
            versions = [version for version in versions if version["whole"]] or versions
            versions.sort(key=lambda version: version["time"] or 0.0)
            messages = {key: message for version in versions for key, message in version["messages"].items()}
            votes: dict[str, list[LoggedEvent]] = {}
            for vote in self.shelf.get("vote", chat):
                event = LoggedEvent(label=vote["label"], id=vote["id"], time=vote["time"])
                votes.setdefault(vote["message"], []).append(event)
            yield from self._answers(chat, messages, versions[-1]["user"], votes)
            for message, events in votes.items():  # whose answer is not in the chat: the log may have it from elsewhere
                yield from (
                    LoggedEvent(event.signal, event.label, None, event.id, event.time, None, f"{chat}/{message}")
                    for event in events
                )

    def warnings(self) -> Iterator[str]:
        """Says that a log of rated messages alone cannot teach who stays silent."""
        if self._rated and not self._chats:
            yield (
                "the export of feedback holds rated messages only, so that it cannot be learned who gives no feedback: put the"
                " export of all chats (Admin settings, Database, Export all chats) into the same folder"
            )

    def _keep(self, chat: str, user: str | None, content: Mapping[str, Any], time: float | None, is_whole: bool) -> None:
        messages = parsed(dig(content, "history", "messages"))
        if isinstance(messages, Mapping) and messages:
            kept = {str(key): mapping(message) for key, message in messages.items()}
        else:
            listed = parsed(content.get("messages"))
            rows = [mapping(message) for message in listed] if isinstance(listed, list) else []
            before = [None, *(name(row, "id") for row in rows)]
            kept = {str(name(row, "id") or place): {"parentId": before[place], **row} for place, row in enumerate(rows)}
        if not kept:
            raise RowError("chat must hold messages, in its history or its list, got none")
        self.shelf.put("chat", chat, {"messages": kept, "user": user, "time": time, "whole": is_whole})

    def _answers(
        self, chat: str, messages: Mapping[str, Mapping[str, Any]], user: str | None, votes: dict[str, list[LoggedEvent]]
    ) -> Iterator[Found]:
        for message in messages.values():
            for key in message.keys() - _MESSAGE - _STATE:
                self.ignore(f"messages.{key}", message[key])

        def made(identity: str, prompt: Conversation, text: str) -> Iterator[LoggedImpression]:
            message = messages[identity]
            events = votes.get(identity, [])
            label = _label(mapping(message.get("annotation")).get("rating"))
            if not events and label is not None:
                events = [LoggedEvent(label=label, id=name(message, "feedbackId"))]
            yield LoggedImpression(
                prompt=prompt,
                response=text,
                id=f"{chat}/{identity}",
                time=seconds(message.get("timestamp"), "timestamp"),
                user=user,
                conversation_id=chat,
                model=name(message, "model"),
                events=events,
            )
            votes.pop(identity, None)

        tree = {key: {**message, "before": message.get("parentId")} for key, message in messages.items()}
        for found in shown_answers(tree, self.ignored, made):
            yield RowError(f"chat {brief(chat)}: {found}") if isinstance(found, RowError) else found

    @classmethod
    def matches(cls, columns: frozenset[str], rows: Sequence[Mapping[str, Any]]) -> float:
        """Feedback with a rating and where it belongs, or a chat with its history."""
        for row in rows:
            if mapping(row.get("meta")).keys() & {"chat_id", "message_id"} and "rating" in mapping(row.get("data")):
                return 1.0
            if mapping(row.get("chat")).keys() & {"history", "messages"}:
                return 1.0
        return 0.0


def _label(rating: Any) -> float | None:
    """That of a vote: 1 or -1."""
    is_vote = isinstance(rating, int | float) and not isinstance(rating, bool) and rating in (1, -1)
    return float(rating == 1) if is_vote else None
