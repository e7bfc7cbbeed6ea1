"""Sentences of the program and of the documentation name only options, and files, that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from causalrm_ray.config.benchmark import BenchmarkConfig, NoiseStudyConfig
from causalrm_ray.config.chaos import ChaosConfig
from causalrm_ray.config.embed import EmbedConfig
from causalrm_ray.config.forget import ForgetConfig
from causalrm_ray.config.options import options
from causalrm_ray.config.perf import PerfConfig
from causalrm_ray.config.plan import PlanConfig
from causalrm_ray.config.submit import SubmitConfig, SubmittedConfig
from causalrm_ray.config.train import Config

ROOT = Path(__file__).parents[1]
FLOORS = ("causalrm_ray", "actors", "jobs")
TREES = (
    *(Config, BenchmarkConfig, NoiseStudyConfig, ChaosConfig, EmbedConfig),
    *(ForgetConfig, PerfConfig, PlanConfig, SubmitConfig, SubmittedConfig),
)
DOTTED = re.compile(r"(?<![\w./-])[a-z]\w*(?:\.[a-z]\w*)+(?![\w/(])")
FILES = re.compile(r"\.(csv|db|html|json|jsonl|log|md|parquet|png|safetensors|txt|yaml)$")
OPEN = ("feedback.signals.", "feedback.columns.")  # options whose keys a user makes up
MODULES = {*FLOORS, "ray", "base_model", "score", "package"}  # and names of weights: no options begin so
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
OPTION = re.compile(r"`((?:\w+)(?:\.\w+)+)(?:=[^`]*)?`|(?<=\s)((?:[a-z_]+\.)+[a-z_]+)=\S")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
FILE = re.compile(r"`((?:causalrm_ray|actors|jobs|tests|docs|deploy|examples)/[\w./-]+)`")


def known_options() -> set[str]:
    keys = {key for tree in TREES for key, *_ in options(tree)}
    return keys | {".".join(parts[:end]) for parts in (key.split(".") for key in keys) for end in range(1, len(parts))}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every string with a space but docstrings; what an f-string inserts is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "{}".join(part.value for part in node.values if isinstance(part, ast.Constant))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def unknown_options(path: Path, known: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for line, text in texts(path)
        if " " in text.strip()
        for name in DOTTED.findall(text)
        if name not in known and not name.startswith(OPEN) and not FILES.search(name) and name.split(".")[0] not in MODULES
    ]


def test_advice_and_errors_name_existing_options_only() -> None:
    known = known_options()
    assert {"reward.clip", "learner.kl.stop", "loop.steps", "learner.kl"} <= known
    assert [
        fault for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py")) for fault in unknown_options(path, known)
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_documentation_exist(page: Path) -> None:
    named = {one or other for one, other in OPTION.findall(page.read_text(encoding="utf-8"))}
    known = known_options()
    sections = {name.split(".")[0] for name in known}
    options = {name for name in named if name.split(".")[0] in sections and not FILES.search(name) and name[-3:] != ".py"}
    unknown = {name for name in options if name not in known and not name.startswith(OPEN)}
    assert unknown == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_in_the_documentation_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in LINK.findall(text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in FILE.findall(text) if not (ROOT / path).exists()]
    assert missing == []
