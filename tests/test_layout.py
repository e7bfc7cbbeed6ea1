"""House rules as tests: imports run downwards only, and the library stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"ray", "vllm", "deepspeed"}
FORBIDDEN = {  # floor -> what it must not import
    "causalrm_ray": {"actors", "jobs"} | HEAVY,
    "actors": {"jobs"},
    "jobs": HEAVY,
}
# From the ground up: a room may import only itself and what stands before it. Rooms on one line know nothing of each other.
ROOMS = (
    "causalrm_ray.errors",
    "causalrm_ray.conversation causalrm_ray.registry",
    "causalrm_ray.types",
    "causalrm_ray.files causalrm_ray.checks causalrm_ray.truncation",
    "causalrm_ray.checkpoint",
    "causalrm_ray.config causalrm_ray.metrics causalrm_ray.losses causalrm_ray.data",
    "causalrm_ray.data.log",
    "causalrm_ray.rl",
    "causalrm_ray.models",
    "causalrm_ray.reward causalrm_ray.world causalrm_ray.estimators.core",
    "causalrm_ray.estimators.nuisances",
    "causalrm_ray.estimators.methods",
    "causalrm_ray.estimators",
    "causalrm_ray.estimators.diagnostics causalrm_ray.estimators.studies",
    "causalrm_ray.api",
    "causalrm_ray.__init__",
    "causalrm_ray.report",
    "causalrm_ray.capacity",
    "actors.errors",
    "actors.cluster",
    "actors.weights",
    "actors.rollout actors.learner actors.reward actors.features actors.feedback actors.users",
    "actors.placement_plan actors.streaming actors.refitting",
    "actors.allocated",
    "actors.start_reward",
    "actors.system",
    "actors.lab",
    "jobs.support",
    "jobs.train_policy",
    "jobs.lab jobs.log jobs",
)

# The project's former dialect, which readers had to learn. Whole words, also inside snake_case, in upper and lower case.
BANNED = """
    told, tells, anew, aside, in its stead, made good, of no concern, nobody's concern, slip, slips, slipped, speaks up, speak up,
    what to mind, hear, heard
"""
LONGEST_FILE = 300  # lines
LARGEST_ROOM = 12  # files


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


def room_of(module: str) -> str:
    """The entry of ROOMS that a module belongs to: the longest that its name begins with."""
    rooms = [room for line in ROOMS for room in line.split() if f"{module}.".startswith(f"{room}.")]
    return max(rooms, key=len, default=module)


def test_every_room_imports_only_rooms_below_it() -> None:
    height = {room: number for number, line in enumerate(ROOMS) for room in line.split()}
    upward = set()
    for path in (path for floor in FORBIDDEN for path in (ROOT / floor).rglob("*.py")):
        own = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name in imports(path):
            room = room_of(name)
            if name.split(".")[0] not in FORBIDDEN or name in FORBIDDEN or room == own:
                continue
            if own not in height or room not in height or height[room] >= height[own]:
                upward.add(f"{path.relative_to(ROOT)} ({own}) imports {name} ({room})")
    assert sorted(upward) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for floor in FORBIDDEN
        for path in (ROOT / floor).rglob("*.py")
    }
    TopologicalSorter({name: imports(path) & files.keys() for name, path in files.items()}).prepare()  # raises CycleError


def test_engines_are_imported_in_one_place_each() -> None:
    homes = {
        "vllm": {"actors/rollout/vllm_core.py", "actors/rollout/vllm_weights.py"},
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


def texts() -> Iterator[tuple[Path, str]]:
    """Every file that people read, without what BANNED itself holds."""
    tops = [path for path in ROOT.iterdir() if not path.name.startswith(".") and path.name != "runs"]
    files = [file for top in tops for file in ([top] if top.is_file() else top.rglob("*"))]
    for path in files:
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".sh"} or path.name == "Makefile":
            yield path.relative_to(ROOT), path.read_text(encoding="utf-8").replace(BANNED, "\n" * BANNED.count("\n"))


def test_no_text_is_written_in_the_former_dialect() -> None:
    words = "|".join(re.escape(word.strip()) for word in BANNED.split(","))
    banned = re.compile(rf"(?<![a-z])({words})(?![a-z])", re.IGNORECASE)
    found = [
        f"{path}:{number} {match[1]!r}"
        for path, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        for match in banned.finditer(line)
    ]
    assert found == []


def shipped() -> list[Path]:
    return [path for floor in FORBIDDEN for path in (ROOT / floor).rglob("*.py")]


def test_no_shipped_file_is_longer_than_the_limit_but_the_configuration() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in shipped()}
    assert {path for path, lines in lengths.items() if lines > LONGEST_FILE} <= {"causalrm_ray/config/train.py"}


def test_no_room_holds_more_than_a_dozen_files() -> None:
    rooms: dict[str, list[str]] = {}
    for path in shipped():
        if path.name not in {"__init__.py", "__main__.py"}:
            rooms.setdefault(str(path.parent.relative_to(ROOT)), []).append(path.name)
    assert {room: names for room, names in rooms.items() if len(names) > LARGEST_ROOM} == {}
