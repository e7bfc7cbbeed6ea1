"""A tiny backbone and logs with a signal that it can learn: what the tests of roles share."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from actors.features.states import FeaturesActor
from causalrm_ray.conversation import Conversation
from causalrm_ray.data.snapshots.table import SNAPSHOT_SCHEMA, write_snapshot
from causalrm_ray.world.pretrain import PretrainSettings, train_tokenizer

sys.path.insert(0, str(Path(__file__).parent))  # the helpers of the tests of the learner

GOOD, BAD, FILLER = "certainly", "never", ("the", "garden", "river", "stone", "lamp", "winter")
OBSERVED_SHARE = {GOOD: 0.6, BAD: 0.2}  # users give more feedback on what they like


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama with its tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("backbone")
    tokenizer = train_tokenizer(["tell me about", GOOD, BAD, *FILLER], PretrainSettings(vocab=320))
    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "initializer_range": 0.1,
    }
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_snapshot(tmp_path: Path) -> Callable[..., Path]:
    """Writes a snapshot of `rows` impressions: every second answer says GOOD and is liked, the others say BAD and are not.

    A tenth of the labels is flipped; `observe` and `label` put other rules in the place of these.
    """

    def make(rows: int = 400, observe: Callable[[str], bool] | None = None, label: int | None = None, tail: str = "") -> Path:
        rng = random.Random(0)
        table: dict[str, list] = {name: [] for name in SNAPSHOT_SCHEMA.names}
        for number in range(rows):
            word = (GOOD, BAD)[number % 2]
            observed = rng.random() < OBSERVED_SHARE[word] if observe is None else observe(word)
            liked = int((word == GOOD) != (rng.random() < 0.1)) if label is None else label
            row = {
                "impression_id": f"impression-{number}",
                "prompt": Conversation.user(f"tell me about the {rng.choice(FILLER)}").json,
                "response": f"{rng.choice(FILLER)} {rng.choice(FILLER)} {word}" + (tail if number == rows - 1 else ""),
                "observed": int(observed),
                "label": liked if observed else None,
                "signal": ("downvote", "upvote")[liked] if observed else None,
                "policy_version": 0,
                "time": float(number),
                "context": "{}",
            }
            for name, values in table.items():
                values.append(row.get(name))
        columns = {field.name: pa.array(table[field.name], field.type) for field in SNAPSHOT_SCHEMA}
        path = tmp_path / "snapshot.parquet"
        write_snapshot(Dataset(pa.table(columns)), path)
        return path

    return make


@pytest.fixture
def features(backbone: str, tmp_path: Path) -> Callable[[Path], Path]:
    """Computes the states of a snapshot's rows; returns the folder that holds them."""
    folder = tmp_path / "states"
    actor = FeaturesActor(backbone, folder, max_length=64)

    def compute(snapshot: Path) -> Path:
        while (done := actor.advance(snapshot)).rows < done.missing:
            pass
        return folder

    return compute


@pytest.fixture(scope="session")
def learner_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every scenario on one rank and on two, each rank a process."""
    from learner_runs import start
    from learner_scenarios import make_model

    folder = tmp_path_factory.mktemp("learner")
    make_model(folder / "model")
    ranks = [
        *start(
            1,
            folder,
            ["update", "gradient", "algorithms", "scheduled", "several_steps", "guarded", "still", "resume", "lora", "refusals"],
        ),
        *start(
            2,
            folder,
            ["update", "gradient", "algorithms", "several_steps", "guarded", "resume", "late", "lora", "memory", "half"],
        ),
    ]
    try:
        codes = [rank.wait(timeout=600) for rank in ranks]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
    logs = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("log-*.txt")))
    assert codes == [0, 0, 0], logs
    return folder
