"""What a user types: help, faults of the configuration and of the input, all before Ray or a model starts."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from causalrm_ray.checkpoint import atomic_folder
from causalrm_ray.config.base import RunFolder
from causalrm_ray.config.options import load_config, options
from causalrm_ray.config.train import Config
from causalrm_ray.conversation import Conversation
from causalrm_ray.errors import InputError
from causalrm_ray.types import Completion, Prompt
from jobs.__main__ import main
from jobs.catalog import JOBS
from jobs.support.errors import discarding_refused_import
from jobs.support.lock import lock_of
from jobs.support.prompts import PromptSource, describe_adapters, find_models
from jobs.support.run_folder import Run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("job", JOBS)
def test_every_job_lists_every_option(job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main([job, "--help"]) == 0
    shown = capsys.readouterr().out
    assert [option.key for option in options(JOBS[job].options()) if option.key not in shown] == []


HEAVY = ("torch", "ray", "transformers", "pandas", "datasets", "sklearn", "numpy", "vllm", "deepspeed")


def alone(*words: str, cwd: Path = ROOT) -> tuple[int, str, list[str]]:
    """Exit status, output and heavy modules loaded, of a command in a process of its own."""
    program = f"import sys; from jobs.__main__ import main; status = main({list(words)!r}); "
    program += f"print([name for name in {HEAVY!r} if name in sys.modules]); sys.exit(status)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=cwd)
    shown, _, loaded = done.stdout.rstrip().rpartition("\n")
    return done.returncode, shown + done.stderr, ast.literal_eval(loaded)


@pytest.mark.parametrize("words", [(), ("-h",), ("--help",)], ids=["nothing", "-h", "--help"])
def test_the_command_alone_lists_the_jobs_at_once(words: tuple[str, ...]) -> None:
    status, shown, loaded = alone(*words)
    assert (status, loaded) == (0, [])
    assert [name for name in JOBS if name not in shown] == []


@pytest.mark.parametrize("job", ["train-policy", "benchmark", "plan", "submit"])
def test_the_help_of_a_job_is_as_light(job: str) -> None:
    status, shown, loaded = alone(job, "--help")
    assert (status, loaded) == (0, [])
    assert JOBS[job].meaning.split()[0] in shown


def test_a_job_lists_its_own_sections_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit-reward", "-h"]) == 0
    shown = capsys.readouterr().out
    places = [shown.index(f"\n{section}: ") for section in ("run", "feedback", "model", "reward", "rollout", "learner")]
    assert places == sorted(places)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"causalrm-ray {version('causalrm-ray')}\n"


def test_an_unknown_job_is_refused_with_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian-policy"]) == 2
    assert "Did you mean 'train-policy'?" in capsys.readouterr().err


def test_a_plan_loads_no_engine(tmp_path: Path) -> None:
    status, _, loaded = alone("plan", f"run.dir={tmp_path}")
    assert status == 0
    assert set(loaded) <= {"torch", "numpy"}  # of the algorithm's table, and of the picture


def test_options_may_stand_on_either_side_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("loop: {steps: 0}\n", encoding="utf-8")
    assert main(["train-policy", "run.seed=1", "--config", str(file), "run.seed=2"]) == 2
    assert "loop.steps" in capsys.readouterr().err


def refusal(capsys: pytest.CaptureFixture[str], job: str, *overrides: str) -> str:
    assert main([job, *overrides]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_wrong_key_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean reward.method?" in refusal(capsys, "train-policy", "reward.metod=naive")


@pytest.mark.parametrize(
    ("job", "overrides", "part"),
    [
        ("fit-reward", [], "feedback.source or feedback.url"),
        ("simulate-feedback", ["world.users=none"], "world.users"),
        ("evaluate", ["world.users=none"], "embedded oracle"),
        ("compare", ["world.users=none"], "embedded oracle"),
        ("train-policy", ["feedback.source=log.jsonl"], "simulated users know the embedded world only"),
        ("train-policy", ["run.resume=true"], "holds no run"),
    ],
)
def test_a_job_says_what_it_lacks(
    job: str, overrides: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in refusal(capsys, job, f"run.dir={tmp_path}", *overrides)


def test_a_log_that_a_stopped_run_left_is_never_mixed_with_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "feedback.db").touch()
    shown = refusal(capsys, "simulate-feedback", f"run.dir={tmp_path}", "run.name=mine")
    assert "holds a run already: remove it, or choose another run.name" in shown


def test_two_processes_never_write_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ("simulate-feedback", f"run.dir={tmp_path}", "run.name=mine", "world.users=none", f"run.cache={tmp_path / 'cache'}")
    lock = lock_of(RunFolder(name="mine", dir=tmp_path, cache=tmp_path / "cache"))
    (tmp_path / "cache" / "locks").mkdir(parents=True)
    with lock:
        assert f"another process works in {tmp_path / 'mine'}" in refusal(capsys, *job)
    assert "world.users" in refusal(capsys, *job)


@pytest.mark.parametrize("url", ["nonsense", "sqlite:///:memory:", "oracle://user:secret@nowhere/db"])
def test_a_log_that_cannot_be_opened_is_named_without_its_password(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = refusal(capsys, "fit-reward", f"feedback.url={url}", f"run.dir={tmp_path}")
    assert "feedback.url" in shown
    assert "secret" not in shown


def test_a_model_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = refusal(capsys, "train-policy", "loop.max_failures=0", f"model.policy={tmp_path / 'nowhere'}", f"run.dir={tmp_path}")
    assert "nowhere must be a folder or hub id, and there is no such folder" in shown


def test_layers_for_adapters_that_are_not_there_are_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("loop.max_failures=0", "learner.lora=4", "learner.lora_targets=[q_proj,query]", f"run.dir={tmp_path}")
    shown = " ".join(refusal(capsys, "train-policy", *options).split())
    assert "model.policy=embedded: learner.lora_targets must name linear layers of the language model" in shown
    assert "(q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj), got 'query'" in shown


def test_a_run_says_which_layers_get_adapters_and_which_stay_frozen() -> None:
    config = load_config(None, ["learner.lora=4", "learner.lora_targets=[v_proj,q_proj]"])
    found = describe_adapters(config, find_models(config))
    assert re.fullmatch(r"LoRA 4 on q_proj, v_proj \(\d+ of each\); frozen: .*down_proj.*", found)
    assert describe_adapters(load_config(None, []), find_models(config)) == ""


def test_a_run_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(load_config(None, [f"run.dir={tmp_path}", "run.name=mine"])).summarise({})
    assert "holds a run already" in refusal(capsys, "train-policy", "loop.max_failures=0", f"run.dir={tmp_path}", "run.name=mine")


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([], "rows"),
        ([{"prompt": "p", "response": "r", "label": 1}, {"prompt": "p", "response": "s", "label": None}], "both labels"),
        ([{"prompt": "p", "response": "r", "label": None}], "feedback"),
        ([{"prompt": "", "response": "r", "label": 1}], "bad rows"),
    ],
)
def test_a_log_that_cannot_be_fitted_is_refused_before_ray_starts(
    rows: list[dict], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert part in refusal(capsys, "fit-reward", f"feedback.source={log}", f"run.dir={tmp_path / 'runs'}")


LIKED, DISLIKED, SILENT = ({"prompt": "p", "response": str(label), "label": label} for label in (1, 0, None))


@pytest.mark.parametrize(
    "rows", [None, [{"prompt": "", "response": "r", "label": 1}], [LIKED]], ids=["missing", "bad", "one label"]
)
@pytest.mark.parametrize("job", ["fit-reward", "train-policy"])
def test_a_refused_import_leaves_no_run_behind(
    job: str, rows: list[dict] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log.jsonl"
    if rows is not None:
        log.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = [f"feedback.source={log}", f"run.dir={tmp_path / 'runs'}", "loop.max_failures=0", "world.users=none"]
    refusal(capsys, job, *options)
    left = tmp_path / "runs" / job
    assert {path.name for path in left.rglob("*")} <= {"quarantine.jsonl", "log.jsonl"}

    log.write_text("".join(json.dumps(row) + "\n" for row in (LIKED, DISLIKED, SILENT)), encoding="utf-8")

    def reached(*_: object) -> None:
        raise InputError("the import is through")

    monkeypatch.setattr(f"jobs.{job.replace('-', '_')}.ray_cluster", reached)
    assert "the import is through" in refusal(capsys, job, *options)
    assert not (left / "feedback.db").exists(), "refused by what came after the import, before the work"


def test_a_driver_of_its_own_refuses_as_this_process_would(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = [f"feedback.source={tmp_path / 'missing.jsonl'}", f"run.dir={tmp_path}", "world.users=none"]
    assert main(["train-policy", *options]) == 2
    assert "missing.jsonl" in capfd.readouterr().err
    assert not (tmp_path / "train-policy" / "feedback.db").exists()


def refused(config: Config) -> None:
    for name in ("feedback.db", "feedback.db-wal"):  # which SQLite makes when the log is written to again
        (config.run.path / name).write_text("mine", encoding="utf-8")
    raise InputError("no")


@pytest.mark.parametrize("case", ["a log that was there", "a checkpoint", "a log of simulated users"])
def test_a_refusal_deletes_nothing_but_an_import_that_it_ends(case: str, tmp_path: Path) -> None:
    source = [] if case == "a log of simulated users" else ["feedback.source=log.jsonl"]
    config = load_config(None, [f"run.dir={tmp_path}", *source])
    config.run.path.mkdir()
    if case == "a log that was there":
        (config.run.path / "feedback.db").touch()
    elif case == "a checkpoint":
        (config.run.path / "checkpoints").mkdir()
    with pytest.raises(InputError), discarding_refused_import(config):
        refused(config)
    for name in ("feedback.db", "feedback.db-wal"):
        assert (config.run.path / name).read_text(encoding="utf-8") == "mine"


def test_over_long_prompts_are_left_out_and_listed_by_their_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    texts = ["word " * 200, "ok", "", "fine", "word " * 300]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" if text else "\n" for text in texts), encoding="utf-8")
    config = load_config(None, [f"feedback.prompts={prompts}", "world.users=none", f"run.dir={tmp_path}", "run.name=r"])
    task = PromptSource(config, find_models(config))
    asked = {request.prompt.conversation.text for request in task.step_requests(0) + task.evaluation_requests()}
    assert asked == {"ok", "fine"}
    shown = capsys.readouterr().err
    assert f"2 of 4 prompts of {prompts} cannot be asked and are left out, the first in {prompts} row 1: a prompt must" in shown
    listed = [json.loads(line) for line in (tmp_path / "r" / "quarantine-prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["row"] for row in listed] == [1, 5]
    assert all("at most model.max_length - rollout.max_new_tokens - 1 = 87 tokens" in row["reason"] for row in listed)


def test_prompts_of_which_none_can_be_asked_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "word " * 200}) + "\n", encoding="utf-8")
    shown = refusal(
        capsys,
        "train-policy",
        "loop.max_failures=0",
        f"feedback.prompts={prompts}",
        "world.users=none",
        f"run.dir={tmp_path / 'runs'}",
    )
    assert "no prompt can be asked" in shown
    assert "row 1: a prompt must have at most model.max_length - rollout.max_new_tokens - 1 = 87 tokens" in shown


@pytest.fixture(scope="module")
def task() -> PromptSource:
    config = load_config(None, ["run.name=t"])
    return PromptSource(config, find_models(config))


def test_the_requests_of_a_step_are_a_function_of_seed_and_step(task: PromptSource) -> None:
    assert task.step_requests(3) == task.step_requests(3)
    assert [r.prompt.conversation for r in task.step_requests(3)] != [r.prompt.conversation for r in task.step_requests(4)]
    ids = [request.prompt.id for step in range(3) for request in task.step_requests(step)]
    assert len(set(ids)) == len(ids) == 3 * 64 * 2


def test_samples_of_one_prompt_have_seeds_of_their_own(task: PromptSource) -> None:
    first, second = task.step_requests(0)[:2]
    assert first.prompt.conversation == second.prompt.conversation
    assert first.seed != second.seed


def test_an_empty_answer_is_not_shown_and_nobody_sees_anything_without_users(task: PromptSource) -> None:
    prompt = Prompt("t/1", Conversation.user("hello"), (1,))
    answers = [Completion(prompt, text, (1,), (0.0,), "stop", 0) for text in ("", "hi")]
    assert [impression.response for impression in task.impressions(answers, 0.0)] == ["hi"]


def test_a_repeated_answer_is_the_same_impression_and_another_answer_another(task: PromptSource) -> None:
    prompt = Prompt("t/1", Conversation.user("hello"), (1,))
    answers = [Completion(prompt, text, (1,), (0.0,), "stop", 0) for text in ("hi", "hi", "ho")]
    ids = [impression.id for impression in task.impressions(answers, 0.0)]
    assert ids[0] == ids[1] != ids[2]
    assert all(name.startswith("t/1/") for name in ids)


def test_metrics_of_steps_that_will_be_repeated_are_dropped(tmp_path: Path) -> None:
    config = load_config(None, [f"run.dir={tmp_path}", "run.name=r"])
    run = Run(config)
    for step in range(4):
        run.log(step, {"value": float(step)})
    with (run.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "val')  # the kill came in the middle of a line
    with atomic_folder(run.path / "checkpoints" / "step-2"):
        pass
    resumed = Run(load_config(None, [f"run.dir={tmp_path}", "run.name=r", "resume=true"]))
    resumed.log(2, {"value": 9.0})
    assert [(row["step"], row["value"]) for row in Run.read_metrics(run.path)] == [(0, 0.0), (1, 1.0), (2, 9.0)]
