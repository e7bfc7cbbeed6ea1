"""Jobs that a cluster runs: what is asked of it, and a real one of three nodes, behind a token, that does it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from causalrm_ray.errors import ConfigError
from jobs.__main__ import main
from jobs.submit import read_request

ROOT = Path(__file__).parents[2]


def test_a_submitted_job_joins_the_cluster_that_it_runs_in_unless_its_options_name_another() -> None:
    assert read_request(None, ["doctor"]).command == ["python", "-m", "jobs", "doctor", "cluster.address=auto"]
    for given in ("cluster.address=10.0.0.1:6379", "address=10.0.0.1:6379"):
        assert read_request(None, ["doctor", given]).command == ["python", "-m", "jobs", "doctor", given]


def test_options_of_submit_and_of_the_job_are_separated(tmp_path: Path) -> None:
    words = ["submit.env=[HF_TOKEN]", "train-policy", f"run.dir={tmp_path}", "submit.follow=false", "steps=3"]
    asked = read_request(None, words)
    assert asked.command == ["python", "-m", "jobs", "train-policy", f"run.dir={tmp_path}", "steps=3", "cluster.address=auto"]
    assert (asked.options.env, asked.options.follow) == (("HF_TOKEN",), False)
    assert asked.facts == {"job": "train-policy", "run": f"{tmp_path}/train-policy"}


def test_a_run_that_goes_on_is_not_checked_against_the_options_in_its_folder(tmp_path: Path) -> None:
    words = ["train-policy", f"run.dir={tmp_path}", "resume=true", "learner.save_memory=[offload]"]  # needs zero_stage >= 1
    assert read_request(None, words).command[-1] == "cluster.address=auto"
    with pytest.raises(ConfigError, match="zero_stage"):
        read_request(None, [word for word in words if word != "resume=true"])


def test_a_folder_with_a_module_named_jobs_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "jobs.py").touch()
    with pytest.raises(ConfigError, match=r"submit\.working_dir: .*jobs\.py has the name of a package"):
        read_request(None, ["doctor", f"submit.working_dir={tmp_path}"])


def test_the_configuration_file_is_found_in_the_folder_that_is_sent(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs" / "mine.yaml"
    file.write_text(f"run: {{dir: {tmp_path}}}\ncluster: {{address: 'ray:6379'}}\n", encoding="utf-8")
    asked = read_request(file, ["train-policy", f"submit.working_dir={tmp_path}"])
    assert asked.command == ["python", "-m", "jobs", "train-policy", "--config", "configs/mine.yaml"]
    with pytest.raises(ConfigError, match=r"must lie in submit\.working_dir"):
        read_request(file, ["train-policy", f"submit.working_dir={tmp_path / 'configs' / 'deeper'}"])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "submit needs a job"),
        (["submit"], "submit needs a job"),
        (["train-polcy"], "submit needs a job"),
        (["train-policy"], "run.dir must be an absolute folder on storage that all nodes share, got runs"),
        (["doctor", "reward.metod=naive"], "did you mean reward.method?"),
        (["doctor", "submit.adress=http://x"], "did you mean submit.address?"),
        (["doctor", "submit.address=10.0.0.1:8265"], "submit.address"),
        (["doctor", "submit.env=[NO_SUCH_VARIABLE]"], "submit.env: not set here: NO_SUCH_VARIABLE"),
    ],
)
def test_what_cannot_run_is_refused_before_a_cluster_is_asked(
    words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", *words]) == 2
    assert part in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "part"), [(["stop=true"], "id: must be given"), (["id=a", "follow=true", "stop=true"], "exclude")]
)
def test_a_submission_must_be_named(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submitted", *words]) == 2
    assert part in capsys.readouterr().err


class Cluster(NamedTuple):
    """A cluster of this machine alone: its dashboard, and the environment of who has its token."""

    address: str
    env: dict[str, str]


@contextlib.contextmanager
def ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """End the process with all that it started, by id."""
    try:
        yield process
    finally:
        everyone: list[psutil.Process] = []
        if process.poll() is None:
            everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(everyone, timeout=30)
        process.wait()


def wait_for(process: subprocess.Popen, text: str) -> str:
    """What the process printed until, and with, the line that holds `text`."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"ended without {text!r}: {''.join(lines)}")


THREE_NODES = """
import sys
from ray.cluster_utils import Cluster

node = {"node_ip_address": "127.0.0.2", "num_cpus": 2, "object_store_memory": 100_000_000}
dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_agent_listen_port": None}  # any free one
cluster = Cluster(initialize_head=True, head_node_args=node | dashboard)
for number in range(2):  # each unpacks what is sent in a folder of its own, as on a machine of its own
    cluster.add_node(**node, runtime_env_dir_name=f"runtime_resources_{number}")
cluster.wait_for_nodes()
print("up at", cluster.head_node.webui_url, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes on loopback, dashboard included, that ask for a token. They are the children of one process."""
    token = tmp_path_factory.mktemp("token") / "auth_token"
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:  # short: sockets lie in it
        env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        env |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": folder,  # where `auto` finds this cluster, whatever others the machine runs
            "OMP_NUM_THREADS": "1",
        }
        nodes = subprocess.Popen(
            [sys.executable, "-c", THREE_NODES],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        with ended(nodes):
            address = wait_for(nodes, "up at").split()[-1]
            yield Cluster(f"http://{address}", env)


@pytest.fixture
def token(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> str:
    """The cluster's token, which this process has from here on."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", cluster.env["RAY_AUTH_TOKEN_PATH"])
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", cluster.address)
    monkeypatch.chdir(ROOT)
    return Path(cluster.env["RAY_AUTH_TOKEN_PATH"]).read_text(encoding="utf-8")


def test_the_cluster_has_three_nodes_and_answers_nobody_without_its_token(cluster: Cluster, token: str) -> None:
    url = f"{cluster.address}/nodes?view=summary"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(url, timeout=60)
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert len(json.load(answer)["data"]["summary"]) == 3


@pytest.mark.usefixtures("token")
def test_a_wrong_token_is_refused_by_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    assert main(["submit", "doctor"]) == 2
    assert "RAY_AUTH_TOKEN: the cluster at" in capsys.readouterr().err


@pytest.mark.usefixtures("token")
def test_ctrl_c_leaves_the_job_running_and_its_artefacts_are_found_later(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ["simulate-feedback", f"run.dir={tmp_path}", "run.name=mine", "world.impressions=200"]
    job += ["rollout.engine=hf", "rollout.generators=1"]
    command = [sys.executable, "-m", "jobs", "submit", f"submit.address={cluster.address}", "submit.id=first", *job]
    submitting = subprocess.Popen(
        command,
        env=cluster.env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which tests in the background are started without
    )
    with ended(submitting):
        wait_for(submitting, "Running entrypoint")
        submitting.send_signal(signal.SIGINT)
        shown = wait_for(submitting, "goes on")
        assert submitting.wait() == 130
    assert f"submitted address={cluster.address} id=first follow=true" in shown
    assert main(["submitted", "id=first", "follow=true"]) == 0
    assert "200 impressions" in capsys.readouterr().out
    assert main(["submitted", "id=first"]) == 0
    shown = capsys.readouterr().out
    assert "first succeeded, exit status 0" in shown
    assert f"run: {tmp_path / 'mine'}" in shown
    assert "feedback.parquet" in shown
    assert (tmp_path / "mine" / "feedback.parquet").exists()


@pytest.mark.usefixtures("token")
def test_a_job_that_fails_ends_the_following_with_its_own_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "fit-reward", f"run.dir={tmp_path}", "submit.id=second"]) == 2  # of the job: it lacks a log
    assert "feedback.source or feedback.url" in capsys.readouterr().out
    assert main(["submitted"]) == 0
    listed = capsys.readouterr().out
    assert "second" in listed
    assert "failed" in listed


@pytest.mark.usefixtures("token")
def test_a_submission_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submitted", "id=nobody"]) == 2
    assert "nobody does not exist" in capsys.readouterr().err
