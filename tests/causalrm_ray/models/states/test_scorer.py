"""A head on states, saved and read again, and the model that a user calls."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from causalrm_ray import RewardModel
from causalrm_ray.checkpoint import CheckpointError
from causalrm_ray.conversation import Conversation, ConversationError
from causalrm_ray.errors import InputError
from causalrm_ray.models.identity import model_digest
from causalrm_ray.models.reward_model import SequenceScorer
from causalrm_ray.models.scorers.heads import Cautious, EnsembleScorer, Levelled
from causalrm_ray.models.scorers.wrapped import Standardised
from causalrm_ray.models.states.backbone import Backbone
from causalrm_ray.models.states.pooled import PooledBackbone, Row, pooled_states
from causalrm_ray.models.states.scorer import backbone_of, is_head, load_scorer, read_head, save_head
from causalrm_ray.models.text import encode_pair, load_tokenizer
from causalrm_ray.world.pretrain import PretrainSettings, train_tokenizer

TURNS = [
    {"role": "user", "content": "tell me about the river"},
    {"role": "assistant", "content": "stone lamp"},
    {"role": "user", "content": "why"},
]


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    folder = tmp_path / "backbone"
    tokenizer = train_tokenizer(["tell me about the river", "stone lamp", "why"], PretrainSettings(vocab=320))
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1}
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **size, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def saved(backbone: str, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    head = EnsembleScorer(torch.randn(50, 32), members=3, hidden=8)
    torch.nn.init.normal_(head.outer)
    whole = Levelled(Cautious(Standardised(head, torch.randn(32), torch.tensor(2.0)).scorer, 0.5), 0.3, 1.2)
    module = Standardised(whole, torch.randn(32), torch.tensor(2.0))
    save_head(
        tmp_path / "head", module, Backbone(backbone, model_digest(backbone), "middle-mean", "float32"), load_tokenizer(backbone)
    )
    return tmp_path / "head"


def test_a_saved_head_scores_by_the_state_that_it_was_fitted_on(saved: Path, backbone: str) -> None:
    rows = [Row([5, 6, 7], [8, 9]), Row([5], [10, 3])]
    found, head = read_head(saved)
    assert (found.model, found.states) == (backbone, "middle-mean")
    states = pooled_states(PooledBackbone.from_pretrained(backbone), rows)[:, 3]
    scores = load_scorer(saved).score(rows)
    torch.testing.assert_close(scores, head(features=states))
    assert scores[0] != scores[1]
    assert load_scorer(saved).score([]).shape == (0,)
    assert (is_head(saved), is_head(backbone), backbone_of(saved), backbone_of(backbone)) == (True, False, backbone, backbone)


def test_a_head_is_not_read_with_another_backbone(saved: Path, backbone: str, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(backbone, moved)
    before = RewardModel.load(saved).score("why", "stone")
    (Path(backbone) / "extra.json").write_text("{}")
    with pytest.raises(CheckpointError, match="head must be read with its backbone, got another one at"):
        load_scorer(saved)
    shutil.rmtree(backbone)
    with pytest.raises(CheckpointError, match="head must be read with its backbone, which is no longer at"):
        load_scorer(saved)
    assert RewardModel.load(saved, backbone=str(moved)).score("why", "stone") == before
    shutil.rmtree(saved)
    saved.mkdir()
    (saved / "backbone.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"backbone\.json must name a backbone"):
        load_scorer(saved)


@pytest.mark.parametrize("whole", [False, True])
def test_a_reward_model_scores_messages_and_texts(saved: Path, backbone: str, tmp_path: Path, whole: bool) -> None:
    folder = saved
    if whole:
        folder, scorer = tmp_path / "whole", SequenceScorer.from_pretrained(backbone)
        torch.nn.init.normal_(scorer.head.weight)
        scorer.save_pretrained(folder, load_tokenizer(backbone))
    model = RewardModel.load(folder)
    one, two = model.score(TURNS, "stone lamp"), model.score("why", "the river")
    assert 0 < one < 1
    np.testing.assert_allclose(model.score_batch([TURNS, "why"], ["stone lamp", "the river"]), [one, two], rtol=1e-5)
    logits = model.logits([TURNS, "why"], ["stone lamp", "the river"])
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), [one, two], rtol=1e-5)
    assert one != two


def test_the_template_of_a_head_renders_an_answer_to_the_ids_that_it_reads(saved: Path, backbone: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved)
    asked = [{"role": "user", "content": "why"}]
    ids = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": "the river"}], return_dict=False)
    assert tuple(ids) == encode_pair(load_tokenizer(backbone), "why", "the river")


def test_what_cannot_be_scored_is_refused(saved: Path, backbone: str) -> None:
    model = RewardModel.load(saved)
    with pytest.raises(InputError, match=r"answer '0' must have at most 64 tokens \(max_length\), got"):
        model.score("why", "stone " * 80)
    limit = len(encode_pair(load_tokenizer(backbone), Conversation.of(TURNS), "stone")) - 1
    advice = rf"answer '0' must have at most {limit} tokens \(max_length\) \(truncation=oldest would drop"
    with pytest.raises(InputError, match=advice):
        RewardModel.load(saved, max_length=limit).score(TURNS, "stone")
    with pytest.raises(ConversationError):
        model.score([{"role": "assistant", "content": "why"}], "stone")
    assert 0 < RewardModel.load(saved, truncation="oldest", max_length=limit).score(TURNS, "stone") < 1
