"""Traces: which of their spans is the answer that a user saw, and which answer a score is about.

rows in any order --span, score--> shelf --finish--> per trace: LoggedImpression(s), LoggedEvents
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from causalrm_ray.data.formats.base import LoggedEvent, LoggedImpression, content_of
from causalrm_ray.data.formats.parts.exchange import answer_of, conversation_of, prompt_of
from causalrm_ray.data.formats.parts.messages import Turn
from causalrm_ray.data.formats.parts.reader import Found, Reader
from causalrm_ray.data.formats.parts.scores import scored
from causalrm_ray.data.formats.parts.shelf import unpacked_event
from causalrm_ray.data.rows import RowError
from causalrm_ray.errors import brief


@dataclass(frozen=True, slots=True)
class Span:
    """One step of a trace: `given` and `gave` are its input and output in any shape, `is_llm` whether a model wrote the output.

    `aliases` are other ids by which scores may name it. `parent` is the id of the span that called it, None of the first.
    """

    id: str
    trace: str
    given: Any
    gave: Any
    is_llm: bool
    parent: str | None = None
    time: float | None = None
    user: str | None = None
    session: str | None = None
    model: str | None = None
    tools: Any = None
    aliases: Sequence[str] = ()
    context: dict[str, str] = dataclasses.field(default_factory=dict)


class Traces(Reader):
    """Spans and scores on a shelf, by trace, until the end.

    A trace is one request of a user to a product, so that it has one answer that was shown: the output of its first span,
    where that holds a text, else that of its last call of a model. Its impression has the trace's id. Calls of models whose
    answers later calls quote as messages of the assistant were shown too, and so were those that have a score of their own:
    these have their own ids. All others are steps, and counted.
    """

    def span(self, span: Span) -> None:
        """Keep a step of a trace."""
        self.shelf.put("span", span.trace, {name: getattr(span, name) for name in span.__slots__})
        for target in {span.id, span.trace, *span.aliases}:
            self.shelf.put("target", target, span.trace)

    def score(self, target: str, trace: str | None, name: str, value: Any, **rest: Any) -> None:
        """Keep a score about a span or trace: `value` as `scores.scored` takes it; `rest` are fields of the event.

        Its `id` is that of the score in its system: of several about a target with the same one, the newest counts.
        """
        event = scored(name, value, **rest)
        if event is None:
            self.ignore(f"signal {name}")
            return
        self.scores.see(event)
        self.shelf.put("score", target, {"trace": trace, "event": content_of(event)})
        if trace is not None:
            self.shelf.put("scored", trace, target)

    def finish(self) -> Iterator[Found]:
        """The answers of all traces with their events, then the events about what is not in these files."""
        for trace, rows in self.shelf.groups("span"):
            yield from _Trace(self, trace, [Span(**row) for row in rows]).found()
        for target, rows in self.shelf.groups("score"):
            trace = rows[0]["trace"]
            if not self.shelf.has("target", target) and (trace is None or not self.shelf.has("span", trace)):
                self.ignored["scores about answers that are not in these files, which wait for them"] += len(rows)
                for event in self.events(target):
                    yield dataclasses.replace(event, impression_id=trace or target)
        yield from super().finish()

    def events(self, target: str) -> list[LoggedEvent]:
        """The events of all scores about a target."""
        newest: dict[Any, LoggedEvent] = {}
        for number, row in enumerate(self.shelf.get("score", target)):
            event = self.scores.labelled(unpacked_event(row["event"]))
            key = number if event.id is None else event.id
            if key not in newest or (newest[key].time or 0.0) <= (event.time or 0.0):
                newest[key] = event
        return [_dated(event) for event in newest.values()]


def _dated(event: LoggedEvent) -> LoggedEvent:
    """An event with an id that a changed score does not share with what it was before."""
    return event if event.id is None or event.time is None else dataclasses.replace(event, id=f"{event.id}@{event.time:.0f}")


@dataclass(frozen=True, slots=True)
class _Answer:
    """A text that a span gave, and the messages before it."""

    span: Span
    prompt: list[Turn]
    text: str


class _Trace:
    """One trace with all of its spans."""

    def __init__(self, traces: Traces, name: str, spans: list[Span]) -> None:
        self._traces, self._name = traces, name
        self._spans = sorted({span.id: span for span in spans}.values(), key=lambda span: span.time or 0.0)
        self._faults: list[RowError] = []

    def found(self) -> Iterator[Found]:
        """The impressions of the trace with their events, or why there are none."""
        calls = [answer for span in self._spans if span.is_llm and (answer := self._answer(span))]
        shown = self._shown(calls)
        scores = {target: self._traces.events(target) for target in self._targets()}
        scores = {target: events for target, events in scores.items() if events}
        if shown is None:
            yield from self._nothing(sum(map(len, scores.values())))
            return
        said = {turn["content"] for call in calls for turn in call.prompt if turn["role"] == "assistant"}
        others = []
        for call in calls:
            own = [event for target in (call.span.id, *call.span.aliases) for event in scores.get(target, ())]
            if call.span.id != shown.span.id and (own or call.text in said):
                others.append((call, own))
                scores = {key: found for key, found in scores.items() if key not in (call.span.id, *call.span.aliases)}
            elif call.span.id != shown.span.id:
                self._traces.ignored["calls of models inside of a trace that are not its answer"] += 1
        steps = {span.id for span in self._spans if not span.is_llm and span.id not in (shown.span.id, self._first(), self._name)}
        for target in scores.keys() & steps:
            self._traces.ignored["scores about steps of a trace that are no answers"] += len(scores.pop(target))
        group = self._name if others else None
        for call, events in others:
            yield from self._impression(call, call.span.id, group, events)
        yield from self._impression(shown, self._name, group, [event for events in scores.values() for event in events])

    def _shown(self, calls: Sequence[_Answer]) -> _Answer | None:
        """The answer of the trace."""
        first = next((span for span in self._spans if span.id == self._first()), None)
        if first is None or first.is_llm:
            return calls[-1] if calls else None
        whole = self._answer(first)
        if whole is None:
            return calls[-1] if calls else None
        same = [call for call in calls if call.text.strip() == whole.text.strip()]
        if same:  # its prompt is all that the model saw
            return same[-1]
        model = calls[-1].span.model if calls else first.model
        return dataclasses.replace(whole, span=dataclasses.replace(first, model=model))

    def _first(self) -> str | None:
        """The id of the span that no other called; None where there are several."""
        ids = {span.id for span in self._spans}
        roots = [span.id for span in self._spans if span.parent is None or span.parent not in ids]
        return roots[0] if len(roots) == 1 else None

    def _answer(self, span: Span) -> _Answer | None:
        try:
            prompt, answer = prompt_of(span.given, self._traces.ignored), answer_of(span.gave, self._traces.ignored)
        except RowError as error:
            self._faults.append(error)
            return None
        if not prompt or answer is None or answer.get("tool_calls") or not answer["content"].strip():
            return None
        return _Answer(span, prompt, answer["content"])

    def _targets(self) -> set[str]:
        own = {name for span in self._spans for name in (span.id, *span.aliases)}
        return {self._name, *own, *self._traces.shelf.get("scored", self._name)}

    def _nothing(self, scores: int) -> Iterator[RowError]:
        if self._faults:
            yield RowError(f"trace {brief(self._name)}: {self._faults[-1]}")
        elif scores:
            yield RowError(f"trace {brief(self._name)} must hold a prompt and an answer in text, since it has scores, got none")
        else:
            self._traces.ignored["traces without an answer in text"] += 1

    def _impression(self, answer: _Answer, name: str, group: str | None, events: Sequence[LoggedEvent]) -> Iterator[Found]:
        span = answer.span
        try:
            yield LoggedImpression(
                prompt=conversation_of(answer.prompt, span.tools),
                response=answer.text,
                id=name,
                time=span.time,
                user=span.user or next((other.user for other in self._spans if other.user), None),
                conversation_id=span.session or next((other.session for other in self._spans if other.session), group),
                model=span.model,
                context=span.context,
                events=events,
            )
        except RowError as error:
            yield RowError(f"trace {brief(self._name)}: {error}")
