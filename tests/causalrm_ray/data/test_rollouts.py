from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from causalrm_ray.conversation import Conversation
from causalrm_ray.data.rollouts import forget_rollouts, kept_steps, read_rollout, rollout_path, write_rollout
from causalrm_ray.errors import InputError
from causalrm_ray.types import Completion, Prompt, Scored, Span


def answers() -> list[Scored]:
    rng = np.random.default_rng(0)
    one = Completion(
        Prompt("a/0", Conversation.user("Why?"), (1, 2)), "Because é\n", (3, 4, 5), tuple(rng.normal(size=3).tolist()), "stop", 4
    )
    two = Completion(
        Prompt("a/1", Conversation.user("hi"), (2,)), "", (9,), (float(np.float32(-0.1)),), "length", 5, (Span(4, 1), Span(5, 0))
    )
    return [Scored(one, float(rng.normal()), 2), Scored(two, -0.1, 2)]


def test_answers_survive_the_disk_to_the_last_bit(tmp_path: Path) -> None:
    write_rollout(answers(), tmp_path / "rollouts" / "step-3.parquet")
    assert read_rollout(rollout_path(tmp_path, 3)) == answers()


def test_what_is_no_rollout_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("nothing", encoding="utf-8")
    with pytest.raises(InputError, match=r"text must be a rollout in Parquet"):
        read_rollout(tmp_path / "text")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "other")
    with pytest.raises(InputError, match=r"other must have the columns id, prompt, .*, got id"):
        read_rollout(tmp_path / "other")


def test_earlier_steps_are_forgotten(tmp_path: Path) -> None:
    for step in (2, 9, 10):
        write_rollout(answers(), rollout_path(tmp_path, step))
    (tmp_path / "rollouts" / "step-x.parquet").touch()
    assert kept_steps(tmp_path) == [2, 9, 10]
    forget_rollouts(tmp_path, before=9)
    assert kept_steps(tmp_path) == [9, 10]
