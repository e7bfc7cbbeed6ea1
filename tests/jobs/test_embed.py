"""Embedding for real, on Ray: states are those of each answer alone, and a killed run goes on where it stopped."""

from __future__ import annotations

import io
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from actors.errors import RoleTimeoutError
from actors.features.embed import Backbone, Embedder, Shard, embed_shards
from causalrm_ray.config.embed import EmbedConfig
from causalrm_ray.config.options import load_tree
from causalrm_ray.data.embeddings import load_pair
from causalrm_ray.data.graded import GradedRow, read_graded
from causalrm_ray.data.rows import Quarantine
from causalrm_ray.data.shards import read_states, write_rows
from causalrm_ray.models.identity import model_digest
from causalrm_ray.models.text import encode_pair, load_tokenizer
from causalrm_ray.world.pretrain import PretrainSettings, train_tokenizer
from jobs import embed
from jobs.__main__ import main

WORDS = ("the", "garden", "river", "stone", "lamp", "winter")
POSITIONS = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama with its tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([*WORDS, "talk about"], PretrainSettings(vocab=300))
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": POSITIONS, "initializer_range": 0.2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """HelpSteer's schema: 40 answers on 20 prompts, one of which is too long, and a row without a score."""
    path = tmp_path_factory.mktemp("source") / "toy.jsonl"
    rows = [
        {"prompt": f"talk about {WORDS[n % 6]} {n // 2}", "response": " ".join(WORDS[: 1 + n % 5]), "helpfulness": n % 5}
        for n in range(40)
    ]
    rows[7]["response"] = "stone " * POSITIONS
    rows.insert(3, {"prompt": "p", "response": "r"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def arguments(model: str, source: str, folder: Path, *more: str) -> list[str]:
    small = ["max_length=64", "shard_rows=9", "batch_size=4", "precision=float32", "name=e"]
    return ["embed", f"source={source}", f"model={model}", f"run.dir={folder}", f"run.cache={folder / 'cache'}", *small, *more]


def _uninterrupted(config: EmbedConfig, folder: Path) -> dict[Path, bytes]:
    """The shards of states that a run is to leave, made here without Ray; none is left in their place."""
    shards = write_rows(read_graded(config.source, Quarantine(io.StringIO())), folder, config.shard_rows)
    states, embedder = embed.states_folder(config, config.model, shards), Embedder(embed.backbone_of(config, config.model))
    for name in shards.names:
        embedder.embed(Shard(folder / name, states / name))
    found = {path: path.read_bytes() for path in sorted(states.iterdir())}
    for path in found:
        path.unlink()
    return found


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_run_goes_on_and_its_answers_become_embeddings(
    model: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embed, "ray_cluster", lambda *_: nullcontext())
    threads = torch.get_num_threads()
    expected = _uninterrupted(load_tree(EmbedConfig, None, arguments(model, source, tmp_path)[1:]), tmp_path / "rows")
    torch.set_num_threads(threads)
    done, cut, *_ = expected
    assert len(expected) >= 5
    done.write_bytes(expected[done])  # as if killed after the first shard, in the middle of the second
    cut.with_name(f".{cut.name}.1").write_bytes(expected[cut][:100])
    written = done.stat()
    assert main(arguments(model, source, tmp_path)) == 0
    assert (done.stat().st_ino, done.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    assert {path: path.read_bytes() for path in expected} == expected

    folder = tmp_path / "e"
    names = {"config.yaml", "quarantine.jsonl", "rows.parquet", "summary.json", "test.safetensors", "train.safetensors"}
    assert {path.name for path in folder.iterdir()} == names
    _check_against_the_model(model, folder)
    rows = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["row"], row["reason"].rpartition(",")[0]) for row in rows] == [
        (4, "helpfulness must be a finite number"),
        (9, "prompt and response must have at most 64 tokens"),
    ]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert (summary["train"] + summary["test"], summary["quarantined"]) == (39, 2)

    whole = (folder / "train.safetensors").read_bytes()
    (folder / "summary.json").unlink()  # as if killed at the end; what is left to do needs no Ray
    assert main(arguments(model, source, tmp_path)) == 0
    assert (folder / "train.safetensors").read_bytes() == whole
    assert main(arguments(model, source, tmp_path)) == 2
    assert "holds embeddings already" in " ".join(capsys.readouterr().err.split())


def _check_against_the_model(model: str, folder: Path) -> None:
    """Every embedding is the last hidden state of its row, run by stock code alone and without padding."""
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    tokenizer, stock = load_tokenizer(model), AutoModelForCausalLM.from_pretrained(model).eval()
    for split in ("train", "test"):
        own = [row for row in rows if row["split"] == split]
        tensors = load_file(folder / f"{split}.safetensors")
        assert len(own) == len(tensors["labels"]) > 0
        pairs = set(zip((row["prompt"] for row in own), tensors["prompts"].tolist(), strict=True))
        assert len(pairs) == len(dict(pairs)) == len({number for _, number in pairs})  # one number a prompt
        for row, state, level in zip(own, tensors["embeddings"], tensors["labels"], strict=True):
            tokens = torch.tensor([encode_pair(tokenizer, row["prompt"], row["response"])])
            with torch.inference_mode():
                alone = stock(tokens, output_hidden_states=True).hidden_states[-1][0, -1]
            # states are of order 1; padded batches sum in another order, which float32 shows at 1e-6
            torch.testing.assert_close(state, alone, atol=1e-5, rtol=0)
            assert level == row["level"]
    train, test = load_pair(folder / "train.safetensors", folder / "test.safetensors")
    assert train.features.std(0).min() > 0.01
    prompts = [{row["prompt"] for row in rows if row["split"] == split} for split in ("train", "test")]
    assert not prompts[0] & prompts[1]
    assert len(test) > 0


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("source=none.jsonl", "none.jsonl"),
        ("model=/nowhere/at/all", "/nowhere/at/all must be a folder or hub id, and there is no such folder"),
        ("max_length=65", "max_length must be at most the 64 positions of"),
        ("actors=0", "actors: Input should be greater than or equal to 1, got 0"),
        ("format=csv", "format: Input should be 'auto', 'helpsteer'"),
        ("precison=float16", "did you mean precision?"),
        ("format=pku_safe_rlhf", "must hold at least one good row, got 41 rows, all bad"),
    ],
)
def test_what_cannot_be_embedded_is_refused_before_ray_starts(
    override: str, part: str, model: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none.jsonl").touch()
    override = override.replace("none.jsonl", str(tmp_path / "none.jsonl"))
    assert main(arguments(model, source, tmp_path, override)) == 2
    assert part in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("ray_cluster")
def test_actors_that_find_no_room_are_named(model: str, tmp_path: Path) -> None:
    backbone = Backbone(model, "float32", POSITIONS, 4, "float32", gpus=1)
    shards = [Shard(tmp_path / "rows.parquet", tmp_path / "states.parquet")]
    with pytest.raises(RoleTimeoutError, match=r"1 actors of 1 CPU and 1 GPU did not start within cluster.timeout_s=1 s"):
        list(embed_shards(shards, backbone, actors=3, timeout_s=1))


def test_a_model_is_known_by_its_files(model: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in Path(model).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert model_digest(str(copy)) == model_digest(model)
    (copy / "config.json").write_text("{}", encoding="utf-8")
    assert model_digest(str(copy)) != model_digest(model)


def _shard(folder: Path) -> Shard:
    rows = [GradedRow(split, f"p{n}", " ".join(WORDS[:n]), n, "s", n) for split in ("train", "test") for n in (1, 2)]
    shards = write_rows(rows, folder / "rows", 9)
    return Shard(folder / "rows" / shards.names[0], folder / "states.parquet")


def _embedded(shard: Shard, model: str, **changes: Any) -> tuple[np.ndarray, list[str]]:
    threads = torch.get_num_threads()
    given: dict[str, Any] = {"dtype": "float32", "max_length": 64, "batch_size": 4, "precision": "float32", **changes}
    Embedder(Backbone(model, **given)).embed(shard)
    torch.set_num_threads(threads)
    return read_states(shard.states)


def test_a_backbone_of_half_precision_gives_nearly_the_same_states(model: str, tmp_path: Path) -> None:
    shard = _shard(tmp_path)
    states, _ = _embedded(shard, model)
    half, faults = _embedded(shard, model, dtype="bfloat16", precision="float16")
    assert half.dtype == np.float16
    assert faults == ["", ""]
    # bfloat16 has 8 bits: roundings of 0.4 % add up over two layers
    assert 0 < np.abs(half - states).max() < 0.05 * np.abs(states).max()


def test_states_that_overflow_the_precision_are_faults(model: str, tmp_path: Path) -> None:
    loud = LlamaForCausalLM.from_pretrained(model)
    loud.model.norm.weight.data *= 1e6
    for file in Path(model).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    loud.save_pretrained(tmp_path)
    shard = _shard(tmp_path)
    states, faults = _embedded(shard, str(tmp_path), precision="float16")
    assert faults == ["the state must be finite in float16, got inf or nan"] * 2
    assert not states.any()
    assert _embedded(shard, str(tmp_path))[1] == ["", ""]
