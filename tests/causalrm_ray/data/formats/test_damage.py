"""Values of the wrong kind anywhere in an export: a row, an answer or the source is refused; nothing else is ever raised."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from causalrm_ray.config.train import Thresholds
from causalrm_ray.data.log.import_log import import_log
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.errors import InputError
from causalrm_ray.registry import FORMATS
from tests.causalrm_ray.data.formats import test_chats as chats
from tests.causalrm_ray.data.formats import test_data_sets as sets
from tests.causalrm_ray.data.formats import test_traces as traces
from tests.causalrm_ray.data.formats.garden import GARDEN, Rows

RATED = [shown for shown in GARDEN if shown.liked is not None]
TREE = {"role": "prompter", "text": "hi", "created_date": GARDEN[0].iso}
EXPORTS: dict[str, Rows] = {
    "trl": list(map(sets.kto, GARDEN)),
    "argilla": list(map(sets.annotated, GARDEN)),
    "wildchat": [{"id": name, "messages": sets.whole(chat, rating=1), "user": "u"} for name, chat in sets.chats().items()],
    "arena": [sets.battle("model_a", 1), sets.battle("tie", 2)],
    "oasst": [
        {**TREE, "message_tree_id": tree, "message_id": f"{tree}{number}", "parent_id": before, "role": role}
        for tree in "xyz"
        for number, role, before in ((0, "prompter", None), (1, "assistant", f"{tree}0"))
    ],
    "openai": list(map(chats.completion, GARDEN)),
    "openwebui": [*chats.webui_feedback(), *chats.webui_chats(annotated=True)],
    "librechat": chats.librechat(),
    "langfuse": [*map(traces.observation, GARDEN), *map(traces.score, RATED)],
    "langsmith": [*map(traces.run, GARDEN), *map(traces.chain, GARDEN), {"id": "f", "run_id": "a1", "key": "k", "score": 1.0}],
    "tensorzero": [traces.inference(shown, as_text=False) for shown in GARDEN]
    + [{"id": "m", "target_id": "a1", "metric_name": "thumb", "value": True}],
    "phoenix": [*map(traces.openinference, GARDEN), *map(traces.annotation, RATED)],
    "mlflow": [traces.mlflow_trace(shown, [traces.assessment(shown)]) for shown in GARDEN],
    "opentelemetry": [
        {"context": {"trace_id": shown.id, "span_id": "s"}, "start_time": shown.iso, "attributes": traces.otel(shown)}
        for shown in GARDEN
    ]
    + [{"resourceLogs": [{"scopeLogs": [{"logRecords": [{"attributes": traces.typed(traces.verdict(GARDEN[0]))}]}]}]}],
}
JUNK: list[Any] = [
    *(None, 0, 3, -1.5, 1e300, True, float("inf"), 10**30),
    *("", "x", "[", '{"a":', "[1]", "null", "2026", "\x00", "\ud800"),
    *([], {}, [1], [None], [[]], [{}], {"a": 1}, {"text": 3}, {"role": 3, "content": 4}, [{"type": "image"}], {"$date": {}}),
]


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values inside of one."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*place, key)
        yield from places(inner, (*place, key))


def damaged(rows: Rows, draw: random.Random) -> Rows:
    """A copy with one to three values replaced or, in mappings, taken out."""
    rows = copy.deepcopy(rows)
    for _ in range(draw.randint(1, 3)):
        *above, last = draw.choice(list(places(rows)))
        inside: Any = rows
        try:
            for key in above:
                inside = inside[key]
            if isinstance(inside, dict) and draw.random() < 0.2:
                del inside[last]
            else:
                inside[last] = draw.choice(JUNK)
        except (KeyError, IndexError, TypeError):
            pass  # what an earlier damage took away
    return [row for row in rows if isinstance(row, dict)]


def test_every_format_is_damaged_here() -> None:
    assert set(EXPORTS) == set(FORMATS.names()) - {"native"}


@pytest.mark.parametrize("format", EXPORTS)
def test_damage_is_refused_and_never_a_crash(tmp_path: Path, format: str) -> None:
    draw, read = random.Random(format), 0
    for number in range(40):
        source = tmp_path / "in.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in damaged(EXPORTS[format], draw)))
        stars = {"rating": Thresholds(low=2, high=4)}
        with closing(FeedbackLog(f"sqlite:///{tmp_path}/{number}.db", stars)) as log, suppress(InputError):
            read += import_log(str(source), log, tmp_path / "bad.jsonl", format=format).impressions > 0
    assert read > 20  # most of the damage is in one row or answer, and refuses no other
