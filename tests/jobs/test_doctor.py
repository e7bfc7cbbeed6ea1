"""What the doctor says of libraries that cannot be imported, and what it tries to know it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from causalrm_ray.config.train import Config
from causalrm_ray.registry import ENGINES
from jobs import doctor


def test_a_library_that_cannot_be_imported_is_named_with_the_reason() -> None:
    assert "No module named 'no_such_library'" in doctor._import_error("no_such_library")
    assert list(doctor.import_errors(["json", "no_such_library", "csv"])) == ["no_such_library"]


def test_the_engines_that_work_are_named() -> None:
    assert doctor.rollout_engines([], ENGINES.names()) == ["vllm", "hf"]
    assert doctor.rollout_engines(["vllm", "deepspeed"], ENGINES.names()) == ["hf"]
    assert doctor.rollout_engines(["transformers"], ENGINES.names()) == []


def test_a_broken_ray_is_a_finding_among_the_others(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "_import_error", lambda name: "broken" if name == "ray" else "")
    monkeypatch.setitem(sys.modules, "actors.cluster.runtime", None)
    assert doctor.run(Config()) == 1
    shown = capsys.readouterr()
    assert "rollout.engine" in shown.out
    assert "ray cannot be imported (broken)" in shown.err


def test_another_package_s_engine_that_cannot_be_imported_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "other-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[causalrm_ray.engines]\nlost = no_such_package:Engine\n")
    monkeypatch.syspath_prepend(tmp_path)
    broken = doctor.broken_engines(*ENGINES.names())
    assert broken == {"lost": "engine 'no_such_package:Engine' cannot be imported: No module named 'no_such_package'"}
