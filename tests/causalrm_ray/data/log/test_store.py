"""The feedback log: idempotent, atomic, safe under concurrent writers; snapshots against a naive Python reference."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causalrm_ray.config.train import Thresholds
from causalrm_ray.conversation import Conversation
from causalrm_ray.data.log.bulk import ConflictError
from causalrm_ray.data.log.schema import RETRACT, RecordError
from causalrm_ray.data.log.store import FeedbackLog, LogCounts, Written
from causalrm_ray.data.log.tables import row_digest
from causalrm_ray.types import FeedbackEvent, Impression

SIGNALS = {"upvote": 1, "copy": 1, "downvote": 0, "stars": Thresholds(low=2, high=4), "seconds": Thresholds(high=30)}
ORDER = [["upvote", "downvote"], ["stars"]]
SLOW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def shown(name: str, time: float = 1.0, **changes) -> Impression:
    return replace(
        Impression(name, Conversation.user(f"ask {name}"), f"answer {name}", 3, time, "u1", {"b": "2", "a": "1"}), **changes
    )


def did(name: str, impression: str, signal: str = "upvote", time: float = 2.0, retracts: str | None = None, value: float = 1.0):
    return FeedbackEvent(name, impression, signal, value, time, retracts)


@pytest.fixture
def log(log_url: str):
    with closing(FeedbackLog(log_url, SIGNALS, ORDER)) as log:
        yield log


def labels(log: FeedbackLog, **limits) -> dict[str, tuple]:
    rows = log.snapshot(**limits)
    return {row["impression_id"]: (row["observed"], row["label"], row["signal"]) for row in rows}


def meaning(event: FeedbackEvent) -> int | None:
    """The label that an event means, if it means one."""
    of_value = {"stars": {0.0: 0, 2.0: 0, 4.0: 1, 31.0: 1}, "seconds": {31.0: 1}}
    return of_value[event.signal].get(event.value) if event.signal in of_value else SIGNALS[event.signal]


def expected(impressions, events, as_of: float) -> list[tuple]:
    """The rule of `FeedbackLog.snapshot`, naively."""
    events = [event for event in events if event.time <= as_of]
    withdrawn = {(event.retracts, event.impression_id) for event in events if event.retracts}
    rows = []
    for impression in sorted((item for item in impressions if item.time <= as_of), key=lambda item: (item.time, item.id)):
        own = [event for event in events if event.impression_id == impression.id and not event.retracts]
        kept = [event for event in own if (event.id, event.impression_id) not in withdrawn and meaning(event) is not None]
        rank = {"upvote": 2, "downvote": 2, "stars": 1}
        last = max(kept, key=lambda event: (rank.get(event.signal, 0), event.time, event.id), default=None)
        rows.append((impression.id, int(last is not None), last and meaning(last), last and last.signal))
    return rows


@st.composite
def histories(draw):
    """Impressions and events of a few ids and times, so that ties, orphans, late and repeated withdrawals all happen."""
    time = st.sampled_from([0.0, 1.0, 2.0, 3.0])
    impressions = [shown(f"i{k}", draw(time)) for k in range(draw(st.integers(0, 5)))]
    events = []
    for k in range(draw(st.integers(0, 12))):
        target = draw(st.none() | st.sampled_from([f"e{other}" for other in range(12) if other != k]))
        signal = RETRACT if target else draw(st.sampled_from(sorted(SIGNALS)))
        events.append(
            did(
                f"e{k}",
                f"i{draw(st.integers(0, 6))}",
                signal,
                draw(time),
                target,
                draw(st.sampled_from([0.0, 2.0, 3.0, 4.0, 31.0])),
            )
        )
    return impressions, events


@SLOW
@given(histories(), st.randoms(use_true_random=False), st.sampled_from([0.0, 1.0, 2.5, 9.0]))
def test_snapshot_equals_naive_rule_under_any_redelivery_order_and_split(
    new_log_url: Callable[[], str], history, rng: random.Random, as_of: float
):
    impressions, events = history
    deliveries = [*impressions, *events]
    deliveries += rng.choices(deliveries, k=len(deliveries)) if deliveries else []
    rng.shuffle(deliveries)
    with closing(FeedbackLog(new_log_url(), SIGNALS, ORDER)) as log:
        while deliveries:
            size = rng.randint(1, len(deliveries))
            batch, deliveries = deliveries[:size], deliveries[size:]
            log.append(
                [item for item in batch if isinstance(item, Impression)],
                [item for item in batch if isinstance(item, FeedbackEvent)],
            )
        snapshot = log.snapshot(as_of=as_of)
        counts = log.counts()
    got = [(row["impression_id"], row["observed"], row["label"], row["signal"]) for row in snapshot]
    assert got == expected(impressions, events, as_of)
    assert (counts.impressions, counts.events) == (len(impressions), len(events))
    assert counts.redelivered == len(impressions) + len(events)
    names = {impression.id for impression in impressions}
    assert counts.orphans == sum(event.impression_id not in names for event in events)
    pairs = {(event.id, event.impression_id) for event in events}
    assert counts.dangling_retractions == sum((e.retracts, e.impression_id) not in pairs for e in events if e.retracts)


@SLOW
@given(histories(), st.integers(0, 10))
def test_snapshot_upto_a_position_never_changes(new_log_url: Callable[[], str], history, cut: int):
    impressions, events = history
    with closing(FeedbackLog(new_log_url(), SIGNALS, ORDER)) as log:
        log.append(impressions[:cut], events[:cut])
        position, before = log.position(), log.snapshot().to_list()
        log.append(impressions[cut:], events[cut:])
        assert log.snapshot(upto=position).to_list() == before
        assert log.position() == len(impressions) + len(events)


def test_snapshot_row_holds_the_impression_as_logged(log: FeedbackLog):
    log.append([shown("a", model="shop-a", logprob=-1.5, asked_for_feedback=False)], [did("e", "a", "copy")])
    assert log.snapshot().to_list() == [
        {
            "impression_id": "a",
            "prompt": '[{"content":"ask a","role":"user"}]',
            "response": "answer a",
            "observed": 1,
            "label": 1,
            "signal": "copy",
            "policy_version": 3,
            "time": 1.0,
            "user": "u1",
            "context": '{"a": "1", "b": "2"}',
            "conversation_id": None,
            "model": "shop-a",
            "logprob": -1.5,
            "asked_for_feedback": 0,
        }
    ]


def test_snapshot_of_an_empty_log_has_the_columns(log: FeedbackLog):
    assert len(log.snapshot()) == 0
    assert "label" in log.snapshot().column_names


def test_append_counts_only_what_is_new(log: FeedbackLog):
    assert log.append([shown("a"), shown("b"), shown("a")]).impressions == 2
    assert log.append([shown("a"), shown("c")]).impressions == 1
    assert log.append(events=[did("e", "a")]).events == 1
    assert log.append([shown("a")], [did("e", "a"), did("f", "b")]) == Written(0, 1)
    assert log.counts() == LogCounts(3, 2, 0, 0, 0, 0, redelivered=4, forgotten=0)


@pytest.mark.parametrize("delivered_together", [True, False])
def test_same_id_with_other_content_raises_and_names_both(log: FeedbackLog, delivered_together: bool):
    first, second = did("e", "a", "upvote"), did("e", "a", "downvote")
    batches = [[first, second]] if delivered_together else [[first], [did("new", "a"), second]]
    for batch in batches[:-1]:
        log.append(events=batch)
    before = log.counts(), log.position()
    with pytest.raises(ConflictError, match=r"events: id 'e' must keep its content, got signal='upvote' then 'downvote'"):
        log.append(events=batches[-1])
    assert (log.counts(), log.position()) == before
    log.append([shown("a")])
    with pytest.raises(
        ConflictError, match=r"impressions: id 'a' .* response=a text of 8 characters then a text of 5 characters"
    ):
        log.append([shown("a", response="other")])


def test_late_event_and_withdrawal_take_effect_by_their_own_time(log: FeedbackLog):
    log.append(events=[did("down", "a", "downvote", time=5.0), did("undo", "a", RETRACT, time=7.0, retracts="down")])
    log.append([shown("a", time=1.0)])
    log.append(events=[did("up", "a", "upvote", time=3.0)])
    assert labels(log, as_of=0.5) == {}
    assert labels(log, as_of=2.0) == {"a": (0, None, None)}
    assert labels(log, as_of=3.0) == {"a": (1, 1, "upvote")}
    assert labels(log, as_of=6.0) == {"a": (1, 0, "downvote")}
    assert labels(log) == {"a": (1, 1, "upvote")}


def test_tie_in_time_goes_to_the_higher_event_id(log: FeedbackLog):
    log.append([shown("a")], [did("e2", "a", "downvote"), did("e10", "a", "upvote"), did("E3", "a", "upvote")])
    assert labels(log) == {"a": (1, 0, "downvote")}


def test_orphans_and_foreign_withdrawals_are_counted_and_withdraw_nothing(log: FeedbackLog):
    log.append([shown("a")], [did("e", "a"), did("lost", "nowhere"), did("undo", "nowhere", RETRACT, retracts="e")])
    assert log.counts() == LogCounts(
        1, 3, orphans=2, retractions=1, dangling_retractions=1, unmapped=0, redelivered=0, forgotten=0
    )
    assert labels(log) == {"a": (1, 1, "upvote")}


def test_another_mapping_over_the_same_log_relabels_it(log_url: str):
    with closing(FeedbackLog(log_url, SIGNALS)) as log:
        log.append([shown("a")], [did("e", "a", "copy", time=2.0), did("f", "a", "upvote", time=3.0)])
    with closing(FeedbackLog(log_url, {"copy": 0})) as log:
        assert labels(log) == {"a": (1, 0, "copy")}
        assert log.counts().unmapped == 1


def test_stream_yields_events_in_order_of_arrival_from_any_position(log: FeedbackLog):
    log.append(events=[did("z", "a", time=9.0), did("m", "a", time=1.0)])
    log.append([shown("a")])
    log.append(events=[did("b", "a", RETRACT, 5.0, retracts="z")])
    assert [(seq, event.id) for seq, event in log.stream()] == [(1, "z"), (2, "m"), (4, "b")]
    assert [event for _, event in log.stream(after=2)] == [did("b", "a", RETRACT, 5.0, retracts="z")]
    assert [seq for seq, _ in log.stream(limit=2)] == [1, 2]
    assert list(log.stream(limit=0)) == list(log.stream(after=4)) == []


def test_strings_that_look_like_sql_are_just_strings(log: FeedbackLog):
    nasty = "'); DROP TABLE events; -- \" % :x ? \\ \u202e 💥\n"
    log.append(
        [shown(nasty, prompt=Conversation.user(nasty), response=nasty, user=nasty, context={nasty: nasty})], [did(nasty, nasty)]
    )
    assert log.append(events=[did(nasty, nasty)]).events == 0
    (row,) = log.snapshot()
    assert Conversation(row["prompt"]).text == row["response"] == row["user"] == row["impression_id"] == nasty
    assert row["label"] == 1


BAD_IMPRESSIONS = [
    ({"id": ""}, "impression id must not be empty, got ''"),
    ({"id": "x" * 256}, "impression id must have at most 255 characters, got 256"),
    ({"id": 7}, "impression id must be text, got 7"),
    ({"user": " \n"}, "user must not be empty"),
    ({"model": 7}, "model must be text, got 7"),
    ({"logprob": 0.5}, "logprob must be the log of a probability, at most 0, got 0.5"),
    ({"asked_for_feedback": 2}, "asked_for_feedback must be true or false, got 2"),
    ({"response": ""}, "response must not be empty, got ''"),
    ({"response": "a\x00b"}, "response must not hold a NUL"),
    ({"response": "\ud800"}, "response must be valid Unicode"),
    ({"time": float("nan")}, "time must be a finite number, got nan"),
    ({"time": float("inf")}, "time must be a finite number, got inf"),
    ({"time": -1.0}, "time must be at least 0 seconds, got -1.0"),
    ({"time": "1"}, "time must be a finite number, got '1'"),
    ({"policy_version": -1}, "policy_version must be a whole number"),
    ({"policy_version": 2**63}, "policy_version must be a whole number"),
    ({"context": {"a": 1}}, "context must map text to text"),
]
BAD_EVENTS = [
    ({"id": ""}, "event id must not be empty"),
    ({"impression_id": ""}, "impression_id must not be empty"),
    ({"signal": "dance"}, "signal must be one of .*upvote.*, got 'dance'"),
    ({"signal": RETRACT}, "signal must be one of"),
    ({"retracts": "other"}, "signal must be 'retract' where retracts is given, got 'upvote'"),
    ({"signal": RETRACT, "retracts": "e"}, "retracts must name another event"),
    ({"value": float("nan")}, "value must be a finite number, got nan"),
    ({"value": 10**400}, "value must be a finite number"),
    ({"time": -0.5}, "time must be at least 0 seconds"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_IMPRESSIONS)
def test_bad_impression_is_refused_with_its_whole_batch(log: FeedbackLog, changes: dict, message: str):
    with pytest.raises(RecordError, match=message):
        log.append([shown("good"), shown("bad", **changes)])
    assert log.counts().impressions == 0


@pytest.mark.parametrize(("changes", "message"), BAD_EVENTS)
def test_bad_event_is_refused_with_its_whole_batch(log: FeedbackLog, changes: dict, message: str):
    with pytest.raises(RecordError, match=message):
        log.append([shown("a")], [did("good", "a"), replace(did("e", "a"), **changes)])
    assert log.position() == 0


@pytest.mark.parametrize("signals", [{"x": 2}, {"x": float("nan")}, {"": 1}, {RETRACT: 0}, {"liked": 0}])
def test_bad_mapping_of_signals_is_refused(tmp_path: Path, signals: dict):
    with pytest.raises(ValueError, match="signal"):
        FeedbackLog(f"sqlite:///{tmp_path}/log.db", signals)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
def test_log_that_would_not_be_kept_is_refused(url: str):
    with pytest.raises(ValueError, match="must name a file"):
        FeedbackLog(url, SIGNALS)


def test_snapshot_limits_are_checked(log: FeedbackLog):
    with pytest.raises(ValueError, match=r"upto must be a position in \[0, 0\], got 1"):
        log.snapshot(upto=1)
    with pytest.raises(ValueError, match="as_of must be a time in seconds, got nan"):
        log.snapshot(as_of=float("nan"))


def test_a_rows_digest_is_what_older_logs_hold_and_knows_no_negative_zero():
    assert row_digest("say -0.0", -0.0, 0.5, 7, None) == row_digest("say -0.0", 0.0, 0.5, 7, None) == "46e105116fbe2ab3"
