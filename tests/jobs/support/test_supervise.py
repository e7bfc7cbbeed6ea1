"""In which order attempts follow each other; what a real kill does to a real job, the job `chaos` shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from causalrm_ray.checkpoint import atomic_folder
from causalrm_ray.config.options import validate
from jobs.support import supervise


def script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ends: list[tuple[int, int | None]], failures: int = 2
) -> list[tuple[bool, bool]]:
    """What each attempt was started with, (resume, fresh_start); they end as `ends` says: (status, step of a new checkpoint)."""
    attempts: list[tuple[bool, bool]] = []
    script: Iterator[tuple[int, int | None]] = iter(ends)

    def drive(attempt: supervise.Attempt) -> int:
        config = attempt.config
        attempts.append((config.run.resume, attempt.fresh_start))
        status, step = next(script)
        if step is not None:
            with atomic_folder(config.run.path / "checkpoints" / f"step-{step}"):
                pass
        return status

    monkeypatch.setattr(supervise, "_drive", drive)
    run = {"dir": str(tmp_path), "cache": str(tmp_path / "cache")}
    status = supervise.run(validate({"run": run, "loop": {"max_failures": failures}}))
    return [*attempts, (bool(status), False)]


DONE, DIED = (False, False), (True, False)


@pytest.mark.parametrize(
    ("ends", "attempts"),
    [
        ([(0, 8)], [(False, False), DONE]),
        ([(-9, None), (0, 8)], [(False, False), (False, True), DONE]),
        ([(-9, 0), (supervise.LOST, None), (0, 8)], [(False, False), (True, False), (True, False), DONE]),
        ([(-9, 0), (-9, 2), (-9, 4)], [(False, False), (True, False), (True, False), DIED]),
        ([(1, 4), (1, None)], [(False, False), (True, False), DIED]),
        ([(2, None)], [(False, False), DIED]),
        ([(143, 4)], [(False, False), DIED]),
        ([(-15, 4)], [(False, False), DIED]),
    ],
    ids=[
        "nothing happens",
        "killed before a checkpoint: again from the start",
        "killed, and a role lost: from the checkpoint",
        "killed too often",
        "an error after a new checkpoint is tried again, but not without one",
        "a wrong configuration is refused once",
        "stopped and saved",
        "stopped",
    ],
)
def test_attempts_follow_deaths_and_nothing_else(
    ends: list[tuple[int, int | None]], attempts: list[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert script(monkeypatch, tmp_path, ends) == attempts


def test_an_attempt_crosses_to_its_driver_whole() -> None:
    config = validate({"run": {"name": "mine"}, "reward": {"rho": [0.1, 0.2]}, "feedback": {"signals": {"click": None}}})
    attempt = supervise.Attempt(config=config, fresh_start=True)
    assert supervise.Attempt.model_validate_json(attempt.model_dump_json()) == attempt
