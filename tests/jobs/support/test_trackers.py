"""Each tracker, by its real package without a network: metrics, options and summary arrive, and a resumed run is the same run."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from actors.errors import RoleDiedError
from causalrm_ray.config.options import load_config
from causalrm_ray.errors import ConfigError
from causalrm_ray.registry import TRACKERS
from jobs.__main__ import main
from jobs.support.run_folder import Run
from jobs.support.trackers import TrackedRun, Trackers

LOG_BLOCK, LOG_HEADER = 32768, 7  # of the record log (LevelDB's format) that W&B writes offline


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def attempt(tmp_path: Path, tracker: str, steps: range, *, ends: bool) -> None:
    """Steps of a run from its checkpoint before them, if there is one; one that `ends` has a summary."""
    options = [f"run.dir={tmp_path}", "run.name=mine", f"loop.trackers=[{tracker}]", f"run.resume={steps.start > 0}"]
    config = load_config(None, [*options, "feedback.url=postgresql://me:pass-word@host/db"])
    with Trackers(config.loop.trackers) as trackers:
        run = Run(config, fresh_start=True, trackers=trackers)
        run.start_tracking(config)
        for step in steps:
            run.log(step, {"reward": 0.5 * step})
        if ends:
            run.summarise({"steps": 4, "oracle_reward": {"after": 2.5}, "engines": {"rollout": {"name": "vllm"}}})


@pytest.fixture
def run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run that stopped after step 2 and goes on from its checkpoint before step 2."""

    def go(tracker: str) -> Path:
        attempt(tmp_path, tracker, range(3), ends=False)
        checkpoint = tmp_path / "mine" / "checkpoints" / "step-2"
        monkeypatch.setattr("jobs.support.run_folder.newest_complete", lambda folder: (checkpoint, []))
        attempt(tmp_path, tracker, range(2, 4), ends=True)
        return tmp_path / "mine"

    return go


def test_tensorboard_has_every_step_once_after_a_resume(run_twice: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_twice("tensorboard") / "tensorboard")).Reload()
    assert [(scalar.step, scalar.value) for scalar in events.Scalars("reward")] == [(step, 0.5 * step) for step in range(4)]


def test_mlflow_continues_the_same_run(run_twice: Any) -> None:
    import mlflow

    run_twice("mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    history = client.get_metric_history(run.info.run_id, "reward")
    assert sorted((metric.step, metric.value) for metric in history) == [(0, 0), (1, 0.5), (2, 1), (2, 1), (3, 1.5)]
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.metrics["summary/oracle_reward.after"] == 2.5
    assert run.data.params["learner.kl.coefficient"] == "0.02"
    assert run.data.params["feedback.url"] == "postgresql://***@host/db"


def offline_records(file: Path) -> list[Any]:
    """The records of W&B's offline file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, records = file.read_bytes(), LOG_HEADER, b"", []
    while at < len(data):
        if LOG_BLOCK - at % LOG_BLOCK < LOG_HEADER:
            at += LOG_BLOCK - at % LOG_BLOCK
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + LOG_HEADER : at + LOG_HEADER + size]
        at += LOG_HEADER + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


def items(found: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in found}


def test_wandb_continues_the_same_run(run_twice: Any) -> None:
    import wandb

    folder = run_twice("wandb")
    wandb.teardown()  # its service writes the files out
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    assert len(files) == 2
    rows, ids, configs, summary = [], set(), {}, {}
    for file in files:
        for record in offline_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add(record.run.run_id)
                configs |= items(record.run.config.update)
                assert (record.run.display_name, record.run.project) == ("mine", "causalrm-ray")
            elif kind == "config":
                configs |= items(record.config.update)
            elif kind == "history":
                rows.append({name: value for name, value in items(record.history.item).items() if not name.startswith("_")})
            elif kind == "summary":
                summary |= items(record.summary.update)
    assert ids == {(folder / "wandb_run_id").read_text(encoding="utf-8")}
    assert rows == [{"step": step, "reward": 0.5 * step} for step in (0, 1, 2, 2, 3)]
    assert summary["oracle_reward.after"] == 2.5
    assert configs["learner"]["kl"]["coefficient"] == 0.02
    assert configs["feedback"]["url"] == "postgresql://***@host/db"


class Memory:
    """A tracker of one's own."""

    calls: ClassVar[list[Any]] = []

    def start(self, run: TrackedRun) -> None:
        self.calls.append((run.name, run.first_step, run.config["loop"]["steps"]))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append((step, dict(metrics)))

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        self.calls.append(summary and summary["steps"])


def test_a_tracker_may_be_an_import_path(run_twice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    run_twice("'mine:Memory'")
    assert Memory.calls == [
        *[("mine", 0, 24), (0, {"reward": 0.0}), (1, {"reward": 0.5}), (2, {"reward": 1.0}), None],
        *[("mine", 2, 24), (2, {"reward": 1.0}), (3, {"reward": 1.5}), 4],
    ]


@pytest.mark.parametrize(
    ("tracker", "package", "words"),
    [
        ("wandb", "wandb", "wandb needs its package"),
        ("mlflow", "mlflow", "mlflow needs its package"),
        ("nowhere:Tracker", "nowhere", "'nowhere:Tracker' cannot be imported"),
    ],
)
def test_a_missing_package_is_named_before_anything_starts(
    tracker: str, package: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    options = [f"loop.trackers=['{tracker}']", "loop.max_failures=0", f"run.dir={tmp_path}", "run.name=mine"]
    assert main(["train-policy", *options]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert words in shown
    assert ("pip install 'causalrm-ray[tracking]'" in shown) == (package != "nowhere")
    assert not (tmp_path / "mine").exists()


def test_a_tracker_that_cannot_start_says_why_without_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nosuch://me:pass-word@host")
    with pytest.raises(ConfigError, match="mlflow cannot start") as raised:
        attempt(tmp_path, "mlflow", range(1), ends=False)
    assert "pass-word" not in str(raised.value)


def test_an_unknown_tracker_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        load_config(None, ["loop.trackers=[tensorbord]"])


class _Refusing:
    """A tracker whose server takes no run."""

    def start(self, run: TrackedRun) -> None:
        raise PermissionError("no entry with key-12345")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        raise AssertionError("it was never started")

    finish = log


def test_a_tracker_that_cannot_start_ends_a_new_run_but_not_one_that_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKER_API_KEY", "key-12345")
    monkeypatch.setattr(Memory, "calls", [])
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    refused = pytest.raises(ConfigError, match=r"mine:_Refusing cannot start: no entry with \*\*\*")
    with refused, Trackers(["mine:_Refusing", "mine:Memory"]) as trackers:
        trackers.start(TrackedRun("run", tmp_path, {}, 0))
    with Trackers(["mine:_Refusing", "mine:Memory"]) as trackers:
        trackers.start(TrackedRun("run", tmp_path, {"loop": {"steps": 4}}, 3))
        trackers.log(3, {"reward": 1.0})
    assert Memory.calls == [("run", 3, 4), (3, {"reward": 1.0}), None]
    shown = capsys.readouterr().err
    assert "mine:_Refusing cannot start: no entry with ***; the run continues without it" in shown


class _Unreachable:
    """A tracker whose server is gone when the run ends."""

    def start(self, run: TrackedRun) -> None:
        pass

    def log(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def finish(self, summary: object) -> None:
        raise ConnectionError("no server")


def test_a_tracker_that_cannot_finish_replaces_neither_the_end_of_a_run_nor_its_error(tmp_path: Path) -> None:
    TRACKERS.register("unreachable", _Unreachable)
    run = TrackedRun("run", tmp_path, {}, 0)
    with Trackers(["unreachable"]) as trackers:
        trackers.start(run)

    def die() -> None:
        with Trackers(["unreachable"]) as trackers:
            trackers.start(run)
            raise RoleDiedError("learner-0 died")

    with pytest.raises(RoleDiedError):
        die()
