"""Three deaths of a real run on three raylets: of a generator, of the driver and of a node. The job itself kills more."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from jobs.chaos import differences


@pytest.mark.timeout(1200)
def test_killed_roles_nodes_and_drivers_lose_and_double_nothing(tmp_path: Path) -> None:
    told = ["victims=[generator,driver,node]", "kills=3", "steps=10", "engine=hf", "train_workers=0", f"run.dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-m", "jobs", "chaos", *told], stdout=subprocess.PIPE, text=True)
    found = json.loads((tmp_path / "chaos" / "chaos.json").read_text(encoding="utf-8"))
    assert found["faults"] == []
    assert done.returncode == 0
    assert sorted(kill["victim"] for kill in found["kills"]) == ["driver", "generator", "node"]
    assert all(kill["seconds"] > 0 for kill in found["kills"])


def test_what_is_lost_and_what_is_there_twice_is_told() -> None:
    assert differences("prompts", Counter("ab"), Counter("ab")) == []
    found = differences("prompts", Counter("abcd"), Counter("bbd"))
    assert found == ["2 prompts lost, such as a", "1 prompts too many, such as b"]
