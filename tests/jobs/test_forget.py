"""The job `forget`: a person leaves the log and every file of a run; others stay."""

from __future__ import annotations

import json
import shutil
from contextlib import closing, nullcontext
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from causalrm_ray.checkpoint import atomic_folder, verify_folder, write_json
from causalrm_ray.config.options import dump_config, load_config
from causalrm_ray.conversation import Conversation
from causalrm_ray.data.log.store import FeedbackLog
from causalrm_ray.data.rollouts import kept_steps, rollout_path, write_rollout
from causalrm_ray.data.snapshots.table import read_snapshot, write_snapshot
from causalrm_ray.types import Completion, FeedbackEvent, Impression, Prompt, Scored
from jobs.__main__ import main
from jobs.replay import find_rollouts

SECRET = "my landlord is Zebediah"
SIGNALS = {"upvote": 1}


def answer(text: str) -> Scored:
    prompt = Prompt(f"p/{len(text)}", Conversation.user(text), (1,))
    return Scored(Completion(prompt, "so", (3,), (-0.5,), "stop", 0), 0.1, 1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose log, copies and summary hold what ann and bob wrote."""
    folder = tmp_path / "runs" / "mine"
    dump_config(load_config(None, [f"run.dir={tmp_path / 'runs'}", "run.name=mine"]), folder / "config.yaml")
    with closing(FeedbackLog(f"sqlite:///{folder / 'feedback.db'}", SIGNALS)) as log:
        log.append(
            [
                Impression("a", Conversation.user(SECRET), "Hello Zebediah", 0, 1.0, "ann"),
                Impression("b", Conversation.user("why?"), "so", 0, 2.0, "bob"),
            ],
            [FeedbackEvent("x", "a", "upvote", 1.0, 3.0), FeedbackEvent("y", "b", "upvote", 1.0, 3.0)],
        )
        log.seal(folder, "log")
        write_snapshot(log.snapshot().filter(lambda row: row["user"] == "bob"), folder / "snapshots" / "bob.parquet")
        write_snapshot(log.snapshot(), folder / "feedback.parquet")
    (folder / "snapshots" / "log.labels.safetensors").touch()
    for step, text in enumerate(("why?", SECRET, "why not?")):
        write_rollout([answer("when?"), answer(text)], rollout_path(folder, step))
    raws = [
        json.dumps({"user": "ann", "prompt": "Zebediah", "response": ""}),
        json.dumps({"user": "bob", "prompt": "ok", "response": "", "label": 1}),
        json.dumps({"rows": [{"meta": {"who": "ann"}, "text": "Zebediah"}]}),
        '{"user": "ann", "prompt": "Zebediah',
    ]
    lines = [json.dumps({"source": "s", "row": n, "reason": "r", "raw": raw}) + "\n" for n, raw in enumerate(raws, 1)]
    (folder / "quarantine.jsonl").write_text("".join(lines), encoding="utf-8")
    shown = [{"prompt": SECRET, "response": "x"}, {"prompt": "why?", "response": "y"}]
    (folder / "summary.json").write_text(json.dumps({"answers": shown, "figure": 1}), encoding="utf-8")
    (folder / "report.html").write_text(SECRET, encoding="utf-8")
    (folder / ".log.parquet.77.tmp").write_text(SECRET, encoding="utf-8")
    return folder


def forget(run: Path, *options: str) -> int:
    return main(["forget", f"run.dir={run.parent}", f"run.name={run.name}", f"run.cache={run.parent / 'cache'}", *options])


@pytest.mark.parametrize("whom", ["user=ann", "impression=a"])
def test_a_person_is_in_no_file_afterwards(run: Path, whom: str, capsys: pytest.CaptureFixture[str]) -> None:
    if whom == "impression=a":  # by its id alone a quarantined row of the user cannot be found
        (run / "quarantine.jsonl").write_text(json.dumps({"raw": '{"id": "a", "x": "Zebediah"}'}) + "\n", encoding="utf-8")
    assert forget(run, whom) == 0
    printed = capsys.readouterr().out
    assert "forgotten: 1 impressions and 1 events of the log" in printed
    assert "1 snapshots" in printed
    assert "1 rollouts" in printed
    assert "1 rows of feedback.parquet" in printed
    assert "Zebediah" not in printed
    left = [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and b"Zebediah" in path.read_bytes()]
    assert left == []
    for path in run.rglob("*.parquet"):  # whose pages are compressed
        assert "Zebediah" not in str(pq.read_table(path).to_pylist())


def test_warnings_that_name_a_person_go_and_others_stay(run: Path) -> None:
    warnings = ["user 'ann' gave 60 of 100 reactions (60%): feedback.per_user caps this.", "Entropy fell."]
    for path in ("propensity/log/report.json", "diagnostics.json"):
        with atomic_folder(run / "propensity" / "log") if "/" in path else nullcontext(run) as folder:
            write_json(folder / Path(path).name, {"warnings": warnings})
    lines = [json.dumps({"event": "warning", "text": text}) + "\n" for text in warnings]
    (run / "log.jsonl").write_text("".join(lines), encoding="utf-8")
    assert forget(run, "user=ann") == 0
    for path in ("propensity/log/report.json", "diagnostics.json"):
        assert json.loads((run / path).read_text())["warnings"] == warnings[1:]
    verify_folder(run / "propensity" / "log")
    assert (run / "log.jsonl").read_text() == lines[1]
    assert not (run / "report.html").exists()


def test_others_stay(run: Path) -> None:
    assert forget(run, "user=ann") == 0
    assert read_snapshot(run / "feedback.parquet")["impression_id"][:] == ["b"]
    assert sorted(path.name for path in (run / "snapshots").iterdir()) == ["bob.parquet"]
    assert kept_steps(run) == [0, 2]
    assert [json.loads(line)["row"] for line in (run / "quarantine.jsonl").read_text().splitlines()] == [2]
    assert json.loads((run / "summary.json").read_text()) == {"answers": [{"prompt": "why?", "response": "y"}], "figure": 1}
    with closing(FeedbackLog(f"sqlite:///{run / 'feedback.db'}", SIGNALS)) as log:
        assert log.snapshot()["impression_id"][:] == ["b"]


def test_what_replies_to_a_part_of_a_conversation_goes_too(run: Path) -> None:
    """The part that model.truncation leaves, of which no log knows."""
    turns = [("user", SECRET), ("assistant", "so?"), ("user", SECRET + "!"), ("assistant", "so?"), ("user", "and now?")]
    talk = [{"role": role, "content": text} for role, text in turns]
    with closing(FeedbackLog(f"sqlite:///{run / 'feedback.db'}", SIGNALS)) as log:
        log.append([Impression("c", Conversation.of(talk), "so", 0, 1.0, "ann")])
    prompt = Prompt("p", Conversation.of(talk[2:]), (1,))
    write_rollout([Scored(Completion(prompt, "so", (3,), (-0.5,), "stop", 0), 0.1, 1)], rollout_path(run, 3))
    assert forget(run, "user=ann") == 0
    assert kept_steps(run) == [0, 2]


def test_again_it_changes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert forget(run, "user=ann") == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and not path.name.startswith("feedback.db")}
    capsys.readouterr()
    assert forget(run, "user=ann") == 0
    assert "forgotten: 0 impressions and 0 events" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before


def test_copies_of_another_run_on_the_same_log_are_found_by_what_they_hold(run: Path) -> None:
    log = f"sqlite:///{run / 'feedback.db'}"
    other = run.parent / "other"
    dump_config(load_config(None, [f"run.dir={run.parent}", "run.name=other", f"feedback.url={log}"]), other / "config.yaml")
    for kind in ("snapshots", "segments"):
        shutil.copytree(run / kind, other / kind, ignore=shutil.ignore_patterns("bob.*"))
    write_rollout([answer(SECRET)], rollout_path(other, 0))
    assert forget(run, "user=ann") == 0
    assert forget(other, "user=ann") == 0
    assert list(other.rglob("*.parquet")) == []


def test_a_replay_ends_before_a_step_that_was_forgotten(run: Path) -> None:
    with atomic_folder(run / "checkpoints" / "step-0") as draft:
        write_json(draft / "facts.json", {})
    assert find_rollouts(run)[1] == [0, 1, 2]
    assert forget(run, "user=ann") == 0
    assert find_rollouts(run)[1] == [0]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "user or impression: exactly one must be given"),
        (["user=ann", "impression=a"], "exactly one"),
        (["user=007"], "must be text: put a number in quotes"),
        (["user=ann", "run.name=nowhere"], "holds no run"),
    ],
)
def test_what_cannot_be_done_is_refused(run: Path, options: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert forget(run, *options) == 2
    assert part in " ".join(capsys.readouterr().err.split())


def test_a_log_without_a_run_is_named_by_its_url(log_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(FeedbackLog(log_url, SIGNALS)) as log:
        log.append([Impression("a", Conversation.user("p"), "r", 0, 1.0, "007")])
        assert main(["forget", f"run.dir={tmp_path}", f"url={log_url}", 'user="007"']) == 0
        assert "forgotten: 1 impressions" in capsys.readouterr().out
        assert log.counts().impressions == 0
