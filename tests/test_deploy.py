"""The files that start clusters: valid where their schema is at hand, closed to strangers, and right in what they run."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

from causalrm_ray.config.options import load_config
from jobs.catalog import JOBS

ROOT = Path(__file__).parents[1]
ROLES = ("generators", "learner", "reward")
# Fields of KubeRay 1.5 (ray-operator/apis/ray/v1) and of SkyPilot's task YAML that ours may use: a misspelt one is refused.
RAY_JOB = {
    "entrypoint",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "backoffLimit",
    "rayClusterSpec",
    "submissionMode",
}
RAY_CLUSTER = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"}
HEAD_GROUP = {"serviceType", "rayStartParams", "template"}
WORKER_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
SKY_TASK = {"name", "num_nodes", "workdir", "resources", "envs", "secrets", "setup", "run"}
SKY_RESOURCES = {"accelerators", "use_spot", "disk_size"}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    """cluster.yaml with Ray's defaults, as its launcher sees it."""
    return prepare_config(read("cluster.yaml"))


def test_the_cluster_file_passes_rays_own_schema_and_checks(cluster: dict[str, Any]) -> None:
    schema = json.loads((Path(str(ray.autoscaler.__file__)).parent / "ray-schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(read("cluster.yaml"), schema)
    validate_config(cluster)


def test_groups_grow_on_spot_nodes_around_a_head_that_is_none(cluster: dict[str, Any]) -> None:
    groups = dict(cluster["available_node_types"])
    head = groups.pop(cluster["head_node_type"])
    assert set(groups) == set(ROLES)
    assert "InstanceMarketOptions" not in head["node_config"]
    assert "GPU" not in head["resources"]
    for group in groups.values():
        assert group["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert 1 <= group["min_workers"] < group["max_workers"]
        assert group["resources"]["GPU"] >= 1
    assert sum(group["max_workers"] for group in groups.values()) <= cluster["max_workers"]
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_the_smallest_cluster_seats_a_default_run(cluster: dict[str, Any]) -> None:
    groups = [cluster["available_node_types"][role] for role in ROLES]
    config = load_config(None)
    needed = config.rollout.generators * config.rollout.tensor_parallel + config.learner.ranks + 1
    assert sum(group["min_workers"] * group["resources"]["GPU"] for group in groups) >= needed


def test_nothing_but_ssh_is_open_and_every_ray_process_asks_for_the_token(cluster: dict[str, Any]) -> None:
    assert "IpPermissions" not in cluster["provider"]["security_group"]
    start = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in start)
    assert any("ray start --head" in command and "--dashboard-host=127.0.0.1" in command for command in start)
    assert cluster["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert "0.0.0.0" not in (ROOT / "cluster.yaml").read_text(encoding="utf-8")


def test_nodes_install_what_the_file_mounts_bring(cluster: dict[str, Any]) -> None:
    home = "/home/ubuntu/causalrm_ray/"
    brought = {remote.removeprefix(home): local for remote, local in cluster["file_mounts"].items() if remote.startswith(home)}
    assert all(remote == local and (ROOT / local).exists() for remote, local in brought.items())
    assert {"pyproject.toml", "README.md", "causalrm_ray", "actors", "jobs"} == set(brought)
    for commands in (cluster["head_setup_commands"], cluster["worker_setup_commands"]):
        assert any("--python 3.12" in command for command in commands)
        assert any(f"-e '{home.rstrip('/')}[gpu]'" in command for command in commands)


def test_the_kubernetes_job_has_the_fields_of_its_kind() -> None:
    manifest = read("deploy/kuberay.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    job = manifest["spec"]
    cluster = job["rayClusterSpec"]
    assert set(job) <= RAY_JOB
    assert set(cluster) <= RAY_CLUSTER
    assert set(cluster["headGroupSpec"]) == HEAD_GROUP
    assert [group["groupName"] for group in cluster["workerGroupSpecs"]] == list(ROLES)
    for group in cluster["workerGroupSpecs"]:
        assert set(group) == WORKER_GROUP
        assert group["minReplicas"] <= group["replicas"] < group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] >= 1
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in group["template"]["spec"]["volumes"]}
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert all(isinstance(value, str) for value in cluster["headGroupSpec"]["rayStartParams"].values())


def test_what_is_deployed_runs_the_ray_that_is_tested() -> None:
    cluster = read("deploy/kuberay.yaml")["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    assert f"rayproject/ray:{ray.__version__}-py312" in (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")


def job_line(text: str) -> list[str]:
    """The words after `python -m jobs`."""
    return text.split("python -m jobs ")[1].split("\n")[0].split()


def test_the_kubernetes_job_runs_a_job_with_options_that_exist() -> None:
    name, *overrides = job_line(read("deploy/kuberay.yaml")["spec"]["entrypoint"])
    assert name in JOBS
    config = load_config(None, overrides)
    assert config.cluster.address == "auto"
    assert config.run.path.is_absolute()


def test_the_skypilot_task_has_documented_fields_and_scripts_that_parse() -> None:
    task = read("deploy/skypilot.yaml")
    assert set(task) == SKY_TASK
    assert set(task["resources"]) <= SKY_RESOURCES
    assert task["secrets"] == {"RAY_AUTH_TOKEN": None}  # none in the file: who launches must give it
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "RAY_AUTH_MODE=token RAY_DASHBOARD_HOST=127.0.0.1" in task["run"]
    assert "ray stop" not in task["run"]  # it would end SkyPilot's own


@pytest.mark.parametrize(("rank", "kept", "resumes"), [(0, False, False), (0, True, True), (1, False, False)])
def test_the_skypilot_task_runs_the_job_on_the_first_node_and_goes_on_from_a_checkpoint(
    rank: int, kept: bool, resumes: bool, tmp_path: Path
) -> None:
    task, shared = read("deploy/skypilot.yaml"), tmp_path / "shared"
    (shared / "runs" / "mine" / ("checkpoints" if kept else "")).mkdir(parents=True)
    calls = tmp_path / "calls"
    stub(tmp_path / "sky_templates" / "ray" / "start_cluster", f'echo "start_cluster $RAY_AUTH_MODE" >>{calls}')
    stub(tmp_path / ".venv" / "bin" / "python", f'echo "python $*" >>{calls}')
    (tmp_path / ".venv" / "bin" / "activate").write_text(f"PATH={tmp_path}/.venv/bin:$PATH\n", encoding="utf-8")
    env = {"HOME": str(tmp_path), "SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "RUN": "mine"}
    script = task["run"].replace("/shared", str(shared))
    subprocess.run(["bash", "-c", script], env=os.environ | env | {"JOB": task["envs"]["JOB"]}, cwd=tmp_path, check=True)
    first, *then = calls.read_text(encoding="utf-8").splitlines()
    assert first == "start_cluster token"
    assert len(then) == (rank == 0)
    if then:
        name, *overrides = then[0].removeprefix("python -m jobs ").split()
        assert name in JOBS
        config = load_config(None, overrides)
        assert (config.run.resume, config.cluster.address, config.run.name) == (resumes, "10.0.0.1:6379", "mine")


def stub(path: Path, body: str) -> None:
    """An executable in place of a program that only clusters have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.mark.parametrize("status", [0, 7])
def test_the_slurm_script_runs_the_job_on_one_cluster_of_its_nodes_and_ends_as_it_did(status: int, tmp_path: Path) -> None:
    calls, seen = tmp_path / "calls", tmp_path / "token"
    log = f"printf '%s\\n' $(basename $0) \"$@\" >>{calls}"
    stub(tmp_path / "bin" / "scontrol", f"{log}; printf 'node7\\nnode8\\n'")
    stub(tmp_path / "bin" / "srun", f"{log}; cp -p $RAY_AUTH_TOKEN_PATH {seen}; [ $RAY_AUTH_MODE = token ] && exit {status}")
    env = {
        "PATH": f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "41",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
    }
    script = str(ROOT / "deploy" / "slurm.sh")
    done = subprocess.run(["bash", script, "doctor", "run.name=a b"], env=env, check=False)
    assert done.returncode == status
    words = calls.read_text(encoding="utf-8").splitlines()
    assert words[:5] == ["scontrol", "show", "hostnames", "node[7-8]", "srun"]
    srun, job = words[5 : words.index("--")], words[words.index("--") + 1 :]
    assert job == ["python", "-m", "jobs", "doctor", "run.name=a b", "cluster.address=auto"]
    assert {"--nodes=2", "--ntasks=2"} <= set(srun)
    ray_words = srun[srun.index("ray") + 1 :]
    assert ray_words[:5] == ["symmetric-run", "--address", "node7:6379", "--min-nodes", "2"]
    assert curate_and_validate_ray_start_args(ray_words[1:]) == ["--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    assert len(seen.read_text(encoding="utf-8")) == 64
    assert stat.S_IMODE(seen.stat().st_mode) == 0o600
    assert list((tmp_path / ".ray").iterdir()) == []  # the token is gone


def test_the_slurm_script_needs_a_job(tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", str(ROOT / "deploy" / "slurm.sh")], env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "which job?" in done.stderr
