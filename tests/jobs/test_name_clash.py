"""Modules of the user's, in the working folder, with the names of our packages: ours are found, here and in Ray's workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROLE = """
import jobs
from pathlib import Path
from actors.cluster.place import Placement, place
from actors.cluster.runtime import ray_cluster
from actors.cluster.wait import resolve
from actors.users import UsersRole
from causalrm_ray.config.base import ClusterConfig
from causalrm_ray.config.train import WorldConfig

with ray_cluster(ClusterConfig(), Path("cache")):
    users = place(UsersRole, Placement(), WorldConfig(), 0)
    print(resolve([users.react_all.remote([])], "react", 60.0))
"""


def ended(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with a module of the user's."""
    (tmp_path / "actors.py").write_text("raise RuntimeError('the module of the user')\n", encoding="utf-8")
    return tmp_path


def test_a_job_runs_beside_a_module_with_the_name_of_a_package_of_ours(folder: Path) -> None:
    done = ended(folder, "-m", "jobs", "plan", "steps=1")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_runs_beside_a_module_named_jobs(folder: Path) -> None:
    (folder / "actors.py").rename(folder / "jobs.py")
    command = Path(sys.executable).with_name("causalrm-ray")
    done = subprocess.run([command, "plan", "steps=1"], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0


def test_a_module_that_took_the_place_of_a_package_of_ours_is_named(folder: Path) -> None:
    (folder / "actors.py").write_text("", encoding="utf-8")
    done = ended(folder, "-c", "import actors, jobs")
    assert f"{folder / 'actors.py'} has the name of a package of causalrm-ray" in done.stderr


def test_roles_run_beside_a_module_with_the_name_of_a_package_of_ours(folder: Path) -> None:
    done = ended(folder, "-c", ROLE)
    assert done.stdout.startswith("[[]]"), done.stderr


def test_a_module_in_the_working_folder_may_be_named_by_import_path(folder: Path) -> None:
    (folder / "mine.py").write_text("REDUCED = 1\n", encoding="utf-8")
    done = ended(
        folder, "-P", "-c", "import jobs; from causalrm_ray.registry import import_path; import_path('mine:REDUCED', 'x')"
    )
    assert (done.returncode, done.stderr) == (0, "")
