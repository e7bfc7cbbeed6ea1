"""Every part for real on a tiny case, but for TRL's; how fast anything is, is not judged here."""

from __future__ import annotations

import json
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import ray

from actors.cluster.place import Placement, place
from actors.cluster.wait import resolve
from actors.lab import perf_trl
from actors.lab.perf_baselines import TokenReward, paused, processes_of
from jobs.__main__ import main
from jobs.lab import perf

TINY = ("cases=[[0.94M,16,6]]", "pairs=2", "engine=hf", "memory_steps=21")


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.timeout(900)
def test_every_part_leaves_its_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(perf, "ray_cluster", lambda *_: nullcontext())
    parts = ["rollout", "learner", "sync", "driver", "memory"]
    options = [*TINY, f"parts=[{','.join(parts)}]", f"run.dir={tmp_path}", f"run.cache={tmp_path / 'cache'}"]
    assert main(["perf", *options]) == 0
    folder = tmp_path / "perf"
    figures = {found["name"]: found for found in json.loads((folder / "perf.json").read_text(encoding="utf-8"))["figures"]}
    assert list(figures) == parts
    assert [found["count"] for found in figures.values()] == [2, 2, 2, 2, 1]
    assert all(found["low"] <= found["value"] <= found["high"] for found in figures.values())
    assert figures["rollout"]["details"]["tokens"] <= 16 * 6
    assert 3.5 < figures["sync"]["details"]["mbytes"] < 4.0
    assert 0 < figures["driver"]["value"] < 1
    assert figures["learner"]["details"]["weights_differ"] < 1e-6
    assert "| driver | 0.94M 16x6 |" in (folder / "table.md").read_text(encoding="utf-8")
    assert (folder / "perf.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["perf", *options]) == 2
    assert "holds figures already" in " ".join(capsys.readouterr().err.split())


def refusal(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["perf", *options]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_without_the_right_trl_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(perf_trl, "TRL", "0.0.")
    message = refusal(capsys, "parts=[sync,trl]", f"run.dir={tmp_path}", f"run.cache={tmp_path}")
    assert "trl needs trl==0.0.*, got" in message
    assert "pip install 'causalrm-ray[perf]'" in message


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("cases=[[0.94M,12,64]]", "answers must be a multiple of 8"),
        ("cases=[[7B,8,64]]", "cases"),
        ("parts=[sync,sync]", "must not hold a value twice"),
        ("memory_steps=20", "memory_steps"),
    ],
)
def test_what_cannot_be_measured_is_refused(override: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert part in refusal(capsys, override, f"run.dir={tmp_path}")


@pytest.mark.usefixtures("ray_cluster")
def test_paused_processes_resume_after_an_error() -> None:
    role = place(TokenReward, Placement())
    (process,) = processes_of([role], 60.0)
    with suppress(KeyError), paused([process]):
        answer = role.score.remote([([7], [8])])
        assert ray.wait([answer], timeout=1.0) == ([], [answer])
        raise KeyError
    rewards, _ = resolve(answer, "score", 60.0)
    assert rewards.tolist() == pytest.approx([1 / 14])
