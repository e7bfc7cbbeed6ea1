"""What is chosen by name: ours, an import path, an entry point of another package, or what a program registered."""

from __future__ import annotations

from pathlib import Path

import pytest

from causalrm_ray.config.options import load_config
from causalrm_ray.errors import ConfigError
from causalrm_ray.registry import ALGORITHMS, ENGINES, ESTIMATORS, FORMATS, Registry


@pytest.mark.parametrize("registry", [ALGORITHMS, ENGINES, ESTIMATORS, FORMATS], ids=lambda registry: registry.kind)
def test_every_name_of_ours_leads_to_an_object(registry: Registry) -> None:
    assert registry.names()
    for name in registry.names():
        assert registry.load(registry.check(name)) is not None


def test_an_import_path_is_a_name() -> None:
    assert ESTIMATORS.load("causalrm_ray.estimators.methods.reweighting:REWEIGHTING.naive") is ESTIMATORS.load("naive")


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"an import path .*, got 'causalrm_rd'; did you mean 'causalrm_dr'"):
        ESTIMATORS.check("causalrm_rd")


@pytest.mark.parametrize("path", ["no_such_package:thing", "json:no_such_function", "causalrm_ray.rl.algorithms:ALGORITHMS.none"])
def test_an_import_path_that_leads_nowhere_says_so(path: str) -> None:
    with pytest.raises(ValueError, match=f"estimator '{path}' cannot be imported: "):
        ESTIMATORS.load(path)


def test_a_program_registers_a_name_once() -> None:
    registry = Registry("thing", "causalrm_ray.no_such_group", {"list": "builtins:list"})
    registry.register("tuple", tuple)
    registry.register("dict", "builtins:dict")
    assert [registry.load(name) for name in registry.names()] == [list, tuple, dict]
    with pytest.raises(ValueError, match="thing 'list' is registered already"):
        registry.register("list", dict)


def test_another_package_adds_by_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "other-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[causalrm_ray.estimators]\nours = other_package:method\n")
    (tmp_path / "other_package.py").write_text("class method:\n    paper, needs, fit = '', frozenset(), len\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "ours" in ESTIMATORS.names()
    assert ESTIMATORS.load(ESTIMATORS.check("ours")).fit is len


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("causalrm_ray.rl.algorithms:ALGORITHMS.ppo", "must have the attributes paper, needs, fit"),
        ("no_such_package:thing", "cannot be imported: No module named 'no_such_package'"),
        ("..relative:thing", "cannot be imported: "),
    ],
)
def test_what_is_no_estimator_is_refused_when_it_is_chosen(path: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rf"reward\.method: estimator '{path}' {rule}"):
        load_config(None, [f"reward.method={path}"])
