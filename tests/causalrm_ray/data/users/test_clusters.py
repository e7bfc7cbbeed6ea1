"""Splits keep what depends on one another together: users, conversations, prompts; and say where there are too few."""

from __future__ import annotations

import numpy as np
import pytest

from causalrm_ray.data.users.clusters import LEVELS, Split, digest, split, who
from causalrm_ray.errors import InputError

RNG = np.random.default_rng(0)
TURNS = 4
DIGEST_OF_ANN = 17_605_744_033_496_573_596


def keys(rows: int, **columns: list[str | None]) -> dict[str, np.ndarray]:
    given = {"impression_id": [f"i{row}" for row in range(rows)], "prompt": [f"p{row}" for row in range(rows)], **columns}
    return {level: digest(level, given.get(level, [None] * rows)) for level in LEVELS}


def feedback(rows: int) -> tuple[np.ndarray, np.ndarray]:
    return RNG.integers(0, 2, rows), RNG.integers(0, 2, rows)


def sides_of(found: Split, names: list[str | None]) -> dict[str | None, set[tuple[bool, int]]]:
    sides: dict[str | None, set[tuple[bool, int]]] = {}
    for name, heldout, fold in zip(names, found.heldout.tolist(), found.fold.tolist(), strict=True):
        sides.setdefault(name, set()).add((heldout, fold))
    return sides


def test_no_user_conversation_or_prompt_is_on_two_sides() -> None:
    rows = 3000
    users = [f"u{row % 300}" if row % 3 else None for row in range(rows)]
    conversations = [f"c{row // TURNS}" if row % 2 else None for row in range(rows)]
    prompts = [f"p{row % 700}" for row in range(rows)]
    given = keys(rows, user=users, conversation_id=conversations, prompt=prompts)
    found = split(given, *feedback(rows))
    assert (found.by, found.warnings) == ("user", ())
    assert all(len(side) == 1 for user, side in sides_of(found, users).items() if user is not None)
    alone = [row for row in range(rows) if users[row] is None and conversations[row] is None]
    of_prompt = sides_of(Split(None, found.heldout[alone], found.fold[alone], "", ()), [prompts[row] for row in alone])
    assert all(len(side) == 1 for side in of_prompt.values())
    assert set(np.unique(found.fold)) == {-1, 0, 1}
    assert 0.1 < found.heldout.mean() < 0.3
    assert found.cluster is not None


def test_a_conversation_of_one_user_never_leaks_even_if_only_one_turn_names_the_user() -> None:
    rows = 1200
    users = [f"u{row // 12}" if row % TURNS == 0 else None for row in range(rows)]  # three conversations each
    conversations = [f"c{row // TURNS}" for row in range(rows)]
    given = keys(rows, user=users, conversation_id=conversations)
    found = split(given, *feedback(rows))
    everyone = sides_of(found, [f"u{row // 12}" for row in range(rows)])
    assert len(everyone) == 100
    assert all(len(side) == 1 for side in everyone.values())
    assert len(np.unique(who(given))) == 100


def test_sides_stay_as_the_log_grows() -> None:
    users = [f"u{RNG.integers(400)}" for _ in range(4000)]
    o, r = feedback(4000)
    small = split(keys(1500, user=users[:1500]), o[:1500], r[:1500])
    large = split(keys(4000, user=users), o, r)
    assert np.array_equal(small.heldout, large.heldout[:1500])
    assert np.array_equal(small.fold, large.fold[:1500])
    # The digest is part of what a run keeps: sides must be the same in every version.
    assert digest("user", ["ann", None]).tolist() == [DIGEST_OF_ANN, 0]


def test_too_few_users_are_said_and_the_next_level_splits() -> None:
    rows = 2000
    o, r = feedback(rows)
    found = split(keys(rows, user=["anonymous"] * rows, conversation_id=[f"c{row // TURNS}" for row in range(rows)]), o, r)
    assert found.by == "conversation_id"
    assert found.warnings[0].startswith("Training and held-out rows are not split by user (1 over 2000 rows), but by conv")
    assert all(len(side) == 1 for side in sides_of(found, [f"c{row // TURNS}" for row in range(rows)]).values())
    few = split(keys(rows, user=[f"u{row % 30}" for row in range(rows)]), o, r)
    assert few.by == "prompt"
    assert "30 gave feedback, fewer than 50" in few.warnings[0]
    assert few.cluster is None  # every prompt once
    one_prompt = split(keys(rows, prompt=["hello"] * rows), o, r)
    assert one_prompt.by == "impression_id"
    assert one_prompt.cluster is None
    with pytest.raises(InputError, match="enough impressions to split them"):
        split(keys(3), np.array([1, 0, 1]), np.array([1, 0, 0]))


def test_a_user_with_most_of_the_feedback_does_not_make_a_side() -> None:
    rows = 3000
    users = ["u0" if row % 3 else f"u{row % 301}" for row in range(rows)]
    for name in (f"flood{number}" for number in range(30)):  # some of these would be held out
        found = split(keys(rows, user=[name if user == "u0" else user for user in users]), *feedback(rows))
        share = found.heldout.mean()
        assert 0.05 < share < 0.5
