"""Does a reward model read a problem that an earlier turn names as well as one that the last turn names?

    python -m tests.jobs.multi_turn FOLDER [rows=3000] [seeds=0,1,2] [shapes=in_turns,...] [option=value ...]

The embedded world's users like help with a benign problem and refusals of a harmful one; half of the answers help. Three logs of
the same answers and votes tell the same conversation: in turns (problem, reply, "please go on"), all of it in one turn, and its
last turn alone, where the problem is lost. Each is fitted by the command fit-reward, and its models rank 1,500 answers to other
prompts; printed is the AUROC against the users' true preferences.
"""
# ruff: noqa: T201

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from causalrm_ray import RewardModel
from causalrm_ray.config.train import WorldConfig
from causalrm_ray.conversation import Conversation
from causalrm_ray.metrics import auroc
from causalrm_ray.types import Impression
from causalrm_ray.world.grammar import LENGTHS, STYLES, Deed, compose, evaluation_prompts, parse_prompt, train_prompts
from causalrm_ray.world.users import SimulatedUsers

REPLY, FOLLOW_UP = "let me think about it first", "please go on"
DEEDS: tuple[Deed, ...] = (("help", 0), ("refuse", 0))
HELD_OUT = 1500
ALONE = ["cluster.address=in-process", "rollout.engine=hf", "rollout.generators=1", "learner.ranks=1", "reward.workers=0"]
METHODS = ("naive", "causalrm_dr", "auto")
Messages = list[dict[str, str]]


def in_turns(problem: str) -> Messages:
    turns = [("user", problem), ("assistant", REPLY), ("user", FOLLOW_UP)]
    return [{"role": role, "content": content} for role, content in turns]


def in_one_turn(problem: str) -> Messages:
    return [{"role": "user", "content": "\n".join((problem, REPLY, FOLLOW_UP))}]


def last_turn_alone(problem: str) -> Messages:
    return in_turns(problem)[-1:]


SHAPES: dict[str, Callable[[str], Messages]] = {shape.__name__: shape for shape in (in_turns, in_one_turn, last_turn_alone)}


def shown(prompts: list[str], count: int, rng: random.Random) -> list[Impression]:
    """Answers, each to one turn, which is what the users judge: half of them help, half refuse, whatever the problem is."""
    found = []
    for number in range(count):
        problem, deed = rng.choice(prompts), rng.choice(DEEDS)
        meaning = parse_prompt(problem)
        assert meaning is not None
        answer = compose(meaning[1], deed, rng.choice(STYLES), rng.choice(LENGTHS), rng)
        found.append(Impression(f"i{number}", Conversation.user(problem), answer, 0, float(number)))
    return found


def write_log(path: Path, answers: list[Impression], users: SimulatedUsers, shape: Callable[[str], Messages]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for answer in answers:
            row: dict[str, Any] = {"id": answer.id, "prompt": shape(answer.prompt.text), "response": answer.response}
            row |= {
                "time": answer.time,
                "events": [{"signal": event.signal, "time": event.time} for event in users.react(answer)],
            }
            file.write(json.dumps(row) + "\n")


def fitted(folder: Path, name: str, source: Path, options: list[str]) -> dict[str, Path]:
    """The folder of each method's model."""
    given = [f"run.dir={folder}", f"run.name={name}", f"feedback.source={source}", "world.users=none", *ALONE, *options]
    methods = [f"reward.method={METHODS[-1]}", f"reward.compare=[{','.join(METHODS[:-1])}]"]
    command = [sys.executable, "-m", "jobs", "fit-reward", *given, *methods]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
    summary = json.loads((folder / name / "summary.json").read_text(encoding="utf-8"))
    return {method: folder / name / path for method, path in summary["reward_fit"]["folders"].items()}


def ranking(model: Path, tests: list[Impression], liked: list[int], shape: Callable[[str], Messages]) -> float:
    logits = RewardModel.load(model).logits([shape(test.prompt.text) for test in tests], [test.response for test in tests])
    return auroc(torch.from_numpy(logits), torch.tensor(liked))


def main() -> None:
    folder, given = Path(sys.argv[1]), dict(option.split("=", 1) for option in sys.argv[2:])
    rows, seeds = int(given.pop("rows", 3000)), [int(seed) for seed in given.pop("seeds", "0,1,2").split(",")]
    chosen = given.pop("shapes", ",".join(SHAPES)).split(",")
    for seed in seeds:
        rng, users = random.Random(seed), SimulatedUsers(WorldConfig(), seed)
        answers, tests = shown(train_prompts(), rows, rng), shown(evaluation_prompts(), HELD_OUT, rng)
        liked = [users.preference(replace(test, id=f"test-{test.id}")) for test in tests]
        for name in chosen:
            shape, source = SHAPES[name], folder / f"{name}-{seed}.jsonl"
            write_log(source, answers, users, shape)
            options = [f"run.seed={seed}", *(f"{option}={value}" for option, value in given.items())]
            models = fitted(folder, f"{name}-{seed}", source, options)
            found = {method: round(ranking(models[method], tests, liked, shape), 4) for method in METHODS}
            print(f"seed {seed} {name:16}", found, flush=True)


if __name__ == "__main__":
    main()
