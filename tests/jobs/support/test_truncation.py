"""model.truncation from the options on: import, check-log, fits and rollouts read the same tokens, and say what is left out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from actors.features.states import FeaturesActor
from actors.reward.snapshot_rows import load_rows
from causalrm_ray.config.options import load_config
from causalrm_ray.config.train import Config
from causalrm_ray.conversation import Conversation
from causalrm_ray.data.log.store import open_log
from causalrm_ray.data.snapshots.table import write_snapshot
from causalrm_ray.data.states.cache import StateCache
from causalrm_ray.errors import InputError
from causalrm_ray.models.text import encode_pair, encode_prompt, load_tokenizer, truncate_pair
from causalrm_ray.types import Truncation
from causalrm_ray.world.grammar import train_prompts
from causalrm_ray.world.pretrain import PretrainSettings, llama_config, train_tokenizer
from jobs.__main__ import main
from jobs.support.feedback import import_feedback
from jobs.support.prompts import Models, PromptSource

LONG, SHORT = "how do i repair the radios and the pumps? " * 3, "how do i clean lamps?"
ANSWER, LIMIT, NEW = "ask an expert first", 100, 40


def talk(earlier: int, text: str = LONG) -> list[dict[str, str]]:
    """`earlier` turns, and a last one that is short."""
    turn = [{"role": "user", "content": text}, {"role": "assistant", "content": "sure, go step by step"}]
    return [{"role": "system", "content": "be brief"}, *turn * earlier, {"role": "user", "content": SHORT}]


# 2 of 6 are cut, a liked one and one without feedback; one is too long however many turns are dropped
LOG = [
    {"id": "a", "prompt": talk(0), "signal": "upvote"},
    {"id": "b", "prompt": talk(4), "signal": "upvote"},
    {"id": "c", "prompt": talk(1), "signal": "downvote"},
    {"id": "d", "prompt": talk(9)},
    {"id": "e", "prompt": SHORT},
    {
        "id": "f",
        "prompt": [*talk(2), {"role": "assistant", "content": "no"}, {"role": "user", "content": LONG * 3}],
        "signal": "copy",
    },
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    settings = PretrainSettings(hidden=32, intermediate=32, layers=1, heads=1)
    tokenizer = train_tokenizer(train_prompts(), settings)
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(llama_config(tokenizer, settings)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., Config]:
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({**row, "response": ANSWER}) + "\n" for row in LOG))
    limits = ["world.users=none", f"model.max_length={LIMIT}", f"rollout.max_new_tokens={NEW}"]

    def make(*options: str) -> Config:
        return load_config(None, [f"run.dir={tmp_path / 'runs'}", f"feedback.source={tmp_path / 'log.jsonl'}", *limits, *options])

    return make


def states(model: str, snapshot: Path, truncation: Truncation) -> StateCache:
    folder = snapshot.with_suffix(".states")
    actor = FeaturesActor(model, folder, max_length=LIMIT, truncation=truncation)
    while (done := actor.advance(snapshot)).rows < done.missing:
        pass
    return StateCache(folder)


def test_a_fit_reads_what_the_import_let_through_and_both_say_what_was_cut(
    configured: Callable[..., Config], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, tokenizer = configured("model.truncation=oldest"), load_tokenizer(model)
    report = import_feedback(config, tokenizer)
    assert report is not None
    assert (report["impressions"], report["quarantined"]) == (5, 1)
    reason = json.loads((config.run.path / "quarantine.jsonl").read_text())["reason"]
    whole, least = (len(encode_pair(tokenizer, Conversation.of(LOG[5]["prompt"][first:]), ANSWER)) for first in (0, -1))
    least += len(tokenizer.encode("<|system|>be brief", add_special_tokens=False))
    limit = f"prompt and response must have a length of at most {LIMIT}"
    assert reason == f"{limit} even without earlier turns, got {least} without 3 of them and {whole} with them"

    log = open_log(config)
    snapshot = log.snapshot()
    log.close()
    stored = {row["impression_id"]: Conversation(row["prompt"]).messages for row in snapshot}
    assert stored == {row["id"]: talk(0)[1:] if row["id"] == "e" else row["prompt"] for row in LOG[:5]}  # whole
    write_snapshot(snapshot, tmp_path / "snapshot.parquet")
    rows = load_rows(tmp_path / "snapshot.parquet", states(model, tmp_path / "snapshot.parquet", "oldest"), LIMIT)
    order = [row["impression_id"] for row in snapshot]
    batch = rows.token_rows(0).batch(torch.arange(5))
    lengths = dict(zip(order, batch["lengths"].tolist(), strict=True))
    read = {name: tuple(batch["input_ids"][n, : lengths[name]].tolist()) for n, name in enumerate(order)}
    kept = {"a": 0, "b": 1, "c": 1, "d": 1}  # earlier turns
    assert {name: read[name] for name in kept} == {
        name: encode_pair(tokenizer, Conversation.of(talk(turns)), ANSWER) for name, turns in kept.items()
    }
    assert max(map(len, read.values())) <= LIMIT

    turn = (len(encode_pair(tokenizer, Conversation.of(talk(9)), ANSWER)) - len(read["a"])) // 9
    sentence = (
        f"2 of 5 impressions are longer than {LIMIT} tokens (model.max_length), and are read without their oldest turns "
        f"(model.truncation=oldest): 1 liked, 0 disliked, 1 without feedback; they lost a median of 5.5 turns (at most 8) "
        f"and {5.5 * turn:g} tokens (at most {8 * turn})."
    )
    assert sentence in rows.warnings
    assert sentence in capsys.readouterr().err


def test_check_log_counts_what_a_fit_would_cut(
    configured: Callable[..., Config], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"feedback.source={tmp_path / 'log.jsonl'}", f"model.reward={model}", f"model.max_length={LIMIT}"]
    configured()  # writes the log
    main(["check-log", *options, "json=true", "model.truncation=oldest", "rollout.max_new_tokens=40"])
    found = json.loads(capsys.readouterr().out)
    assert {name: found["truncated"][name] for name in ("liked", "disliked", "without feedback")} == {
        "liked": 1,
        "disliked": 0,
        "without feedback": 1,
    }
    assert found["quarantined_by_reason"] == {
        f"prompt and response must have a length of at most {LIMIT} even without earlier turns": 1
    }
    assert any("2 of 5 impressions are longer" in warning for warning in found["warnings"])
    main(["check-log", *options, "model.truncation=oldest", "rollout.max_new_tokens=40"])
    assert "without feedback: 1" in capsys.readouterr().out
    main(["check-log", *options, "json=true", "rollout.max_new_tokens=40"])
    found = json.loads(capsys.readouterr().out)
    assert found["truncated"] == {}
    advised = "(model.truncation=oldest would drop earlier turns until it does)"
    limit = f"prompt and response must have a length of at most {LIMIT}"
    assert found["quarantined_by_reason"] == {f"{limit} {advised}": 2, limit: 1}


def test_a_fit_refuses_what_is_too_long_by_its_id(configured: Callable[..., Config], model: str, tmp_path: Path) -> None:
    config = configured("model.max_length=4096", "model.truncation=oldest")
    import_feedback(config, load_tokenizer(model))
    log = open_log(config)
    write_snapshot(log.snapshot(), tmp_path / "snapshot.parquet")
    log.close()
    limit = rf"must have at most {LIMIT} tokens \(model.max_length\)"
    with pytest.raises(InputError, match=rf"impression 'b' {limit} \(model.truncation=oldest would"):
        states(model, tmp_path / "snapshot.parquet", "refuse")
    with pytest.raises(InputError, match=rf"impression 'f' {limit} even without earlier turns, got \d+ without 3 of them and"):
        states(model, tmp_path / "snapshot.parquet", "oldest")


def test_what_a_policy_was_asked_is_what_is_logged_and_fitted(
    configured: Callable[..., Config], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": talk(turns)}) + "\n" for turns in (0, 3)))
    options = [f"feedback.prompts={tmp_path / 'prompts.jsonl'}", "model.truncation=oldest", "rollout.prompts_per_step=2"]
    config = configured(*options)
    prompts, tokenizer = PromptSource(config, Models(model, model)), load_tokenizer(model)
    room = LIMIT - NEW - 1
    assert (
        f"1 of 2 prompts are longer than model.max_length - rollout.max_new_tokens - 1 = {room} tokens" in capsys.readouterr().err
    )
    asked = {len(request.prompt.conversation.messages): request.prompt for request in prompts.step_requests(0)}
    for prompt in asked.values():
        assert prompt.token_ids == encode_prompt(tokenizer, prompt.conversation)
        assert len(prompt.token_ids) <= room
        row = truncate_pair(tokenizer, prompt.conversation, ANSWER, LIMIT, "oldest").ids  # of a fit on what is logged
        assert row == encode_pair(tokenizer, prompt.conversation, ANSWER)
        assert row[: len(prompt.token_ids)] == prompt.token_ids
    assert asked.keys() == {2}  # no earlier turn leaves room for the longest answer; to a short one, a fit would add one
    assert truncate_pair(tokenizer, Conversation.of(talk(3)), ANSWER, LIMIT, "oldest").prompt == Conversation.of(talk(1))
    PromptSource(configured(*options, "model.truncation=refuse"), Models(model, model))
    shown = " ".join(capsys.readouterr().err.split())
    assert "1 of 2 prompts of" in shown
    assert "row 2: a prompt must have at most" in shown
    assert "tokens (model.truncation=oldest would drop earlier turns until it does)" in shown


def test_fit_reward_reads_long_conversations_and_reports_what_it_left_out(model: str, tmp_path: Path) -> None:
    rows = []
    for number in range(300):
        liked = number % 3 > 0
        row = {"id": str(number), "prompt": talk(4 if number % 10 == 0 else 0), "response": ANSWER if liked else "no"}
        rows.append(row | ({"signal": "upvote" if liked else "downvote"} if number % 2 else {}))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = ["cluster.address=in-process", "rollout.engine=hf", "rollout.generators=1", "learner.ranks=1", "reward.workers=0"]
    fit = ["reward.method=naive", "reward.compare=[]", "reward.epochs=1", "reward.rho=[0.1,0.1]"]
    limits = [f"model.reward={model}", f"model.max_length={LIMIT}", "rollout.max_new_tokens=40", "model.truncation=oldest"]
    given = [f"run.dir={tmp_path}", "run.name=long", f"feedback.source={tmp_path / 'log.jsonl'}", "world.users=none"]
    command = [sys.executable, "-m", "jobs", "fit-reward", *given, *alone, *fit, *limits]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    sentence = f"30 of 300 impressions are longer than {LIMIT} tokens"
    assert sentence in done.stderr
    warnings = json.loads((tmp_path / "long" / "summary.json").read_text())["diagnostics"]["warnings"]
    assert [warning for warning in warnings if sentence in warning and ": 0 liked, 0 disliked, 30 without feedback; " in warning]
