"""House rules as tests: imports run downwards only, and the library stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"ray", "vllm", "deepspeed"}
FORBIDDEN = {  # floor -> what it must not import
    "causalrm_ray": {"actors", "jobs"} | HEAVY,
    "actors": {"jobs"},
    "jobs": HEAVY,
}
# Inside the library: what a package may import of the library itself.
BASE = {"config", "types", "checks"}
INSIDE = {
    "losses": BASE | {"losses"},
    "estimators": BASE | {"losses", "estimators", "metrics", "data.collate", "models.heads"},
    "models": BASE | {"losses", "models"},
    "data": BASE | {"data"},
}


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, at the top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("floor", FORBIDDEN)
def test_imports_run_downwards(floor: str) -> None:
    upward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / floor).rglob("*.py")
        for name in imports(path)
        if name.split(".")[0] in FORBIDDEN[floor]
    ]
    assert upward == []


@pytest.mark.parametrize("package", INSIDE)
def test_library_packages_import_only_what_lies_below_them(package: str) -> None:
    sideways = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / "causalrm_ray" / package).glob("*.py")
        for name in imports(path)
        if name.startswith("causalrm_ray.")
        and not any(f"{name}.".startswith(f"causalrm_ray.{allowed}.") for allowed in INSIDE[package])
    ]
    assert sideways == []


def test_engines_are_imported_in_one_place_each() -> None:
    homes = {
        "vllm": {"actors/rollout/vllm_engine.py", "actors/rollout/vllm_weights.py"},
        "deepspeed": {"actors/learner/deepspeed_engine.py"},
    }
    for engine, allowed in homes.items():
        found = {
            str(path.relative_to(ROOT))
            for path in (ROOT / "actors").rglob("*.py")
            if engine in {n.split(".")[0] for n in imports(path)}
        }
        assert found <= allowed, f"{engine} is imported in {sorted(found - allowed)}"


def test_importing_the_library_loads_no_engine() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "causalrm_ray").rglob("*.py")
        if path.name != "__init__.py"
    ]
    load = f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)"
    program = f"{load}\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_only_jobs_print() -> None:
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for floor in ("causalrm_ray", "actors")
        for path in (ROOT / floor).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert printing == []
