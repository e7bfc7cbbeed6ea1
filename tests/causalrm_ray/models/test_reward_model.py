"""Scorers: the true last token decides, whatever padding is; what is saved is what stock transformers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from causalrm_ray.models import reward_model
from causalrm_ray.models.reward_model import SequenceScorer, group_sizes, row_states, score_rows

WORDS = ["</s>", "<s>", "<unk>", "<pad>", *(f"w{number}" for number in range(28))]
EOS, PAD = 0, 3
TEXTS = ["w1 w2 w3 </s>", "w4 </s>", "w5 w6 w7 w8 w9 w10 </s>", "w11 </s> w12 </s>"]


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **special)


TOKENIZERS = {
    "own_pad": {"pad_token": "<pad>", "unk_token": "<unk>"},
    "pad_is_eos": {"pad_token": "</s>", "bos_token": "<s>"},
    "no_pad": {"unk_token": "<unk>"},
}
ARCHITECTURES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


def make_backbone(folder: Path, architecture: str = "llama") -> str:
    config_class, model_class = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config = config_class(vocab_size=len(WORDS), **size, eos_token_id=EOS, pad_token_id=None)
    model_class(config).save_pretrained(folder)
    return str(folder)


def make_scorer(folder: Path, architecture: str = "llama") -> SequenceScorer:
    scorer = SequenceScorer.from_pretrained(make_backbone(folder / "backbone", architecture))
    torch.nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(1))
    return scorer.eval()


def stock_logits(folder: Path, texts: list[str], padding_side: str) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side=padding_side)  # AutoTokenizer: by architecture
    with torch.inference_mode():
        return model(**tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)).logits.squeeze(-1)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("special", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_scorer_equals_stock_sequence_classification(tmp_path: Path, architecture: str, special: dict, padding_side: str):
    scorer, tokenizer = make_scorer(tmp_path, architecture), make_tokenizer(**special)
    ours = score_rows(scorer, [tokenizer.encode(text) for text in TEXTS])
    scorer.save_pretrained(tmp_path / "saved", tokenizer)
    assert ours.std() > 0.1
    torch.testing.assert_close(stock_logits(tmp_path / "saved", TEXTS, padding_side), ours, atol=1e-5, rtol=0)


def test_saving_leaves_scorer_and_tokenizer_as_they_were(tmp_path: Path):
    scorer, tokenizer = make_scorer(tmp_path), make_tokenizer(**TOKENIZERS["pad_is_eos"])
    scorer.save_pretrained(tmp_path / "saved", tokenizer)
    assert tokenizer.pad_token == "</s>"
    assert scorer.model.config.pad_token_id is None


def test_reloaded_scorer_gives_the_same_bits(tmp_path: Path):
    scorer, rows = make_scorer(tmp_path), [[4, 5, EOS], [6, EOS]]
    scorer.save_pretrained(tmp_path / "saved", make_tokenizer(**TOKENIZERS["own_pad"]))
    assert torch.equal(score_rows(SequenceScorer.from_pretrained(tmp_path / "saved"), rows), score_rows(scorer, rows))


@pytest.mark.parametrize("filler", [EOS, PAD, 7])
def test_logit_does_not_depend_on_what_fills_the_padding(tmp_path: Path, filler: int):
    scorer = make_scorer(tmp_path)
    alone = scorer(torch.tensor([[4, 5, EOS]]), torch.tensor([3]))
    padded = scorer(torch.tensor([[4, 5, EOS, filler, filler]]), torch.tensor([3]))
    torch.testing.assert_close(padded, alone, atol=1e-6, rtol=1e-5)


def test_last_token_counts_even_where_it_is_the_padding_id(tmp_path: Path):
    scorer = make_scorer(tmp_path)
    ended, cut = score_rows(scorer, [[4, 5, EOS], [4, 5]])
    naive = scorer.model.base_model(input_ids=torch.tensor([[4, 5, EOS]])).last_hidden_state[0, -1] @ scorer.head.weight[0]
    assert ended == pytest.approx(naive.item(), abs=1e-5)
    assert abs(ended - cut) > 1e-3


def test_training_forward_equals_serving_scores(tmp_path: Path):
    scorer, rows = make_scorer(tmp_path), [[4, 5, 6, EOS], [7, EOS], [8, 9, EOS]]
    input_ids = torch.tensor([row + [EOS] * (4 - len(row)) for row in rows])
    trained = scorer.train()(input_ids, torch.tensor([4, 2, 3])).detach()
    torch.testing.assert_close(score_rows(scorer, rows, batch_size=2), trained, atol=1e-6, rtol=1e-5)
    assert scorer.training


def test_scores_follow_their_rows_in_any_order(tmp_path: Path):
    scorer = make_scorer(tmp_path)
    rows = [[4, 5, 6, EOS], [7, EOS], [8, 9, EOS], [10, EOS], [4, 5, EOS]]
    assert torch.equal(score_rows(scorer, rows[::-1], batch_size=2).flip(0), score_rows(scorer, rows, batch_size=2))


def test_new_head_starts_at_zero_and_draws_nothing(tmp_path: Path):
    backbone = make_backbone(tmp_path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    scorer = SequenceScorer.from_pretrained(backbone)
    assert torch.equal(torch.get_rng_state(), before)
    assert score_rows(scorer, [[4, EOS], [5, 6, EOS]]).tolist() == [0.0, 0.0]


def test_head_and_backbone_both_learn(tmp_path: Path):
    scorer = SequenceScorer.from_pretrained(make_backbone(tmp_path))
    optimizer = torch.optim.SGD(scorer.parameters(), lr=0.1)
    before = scorer.model.base_model.layers[0].mlp.up_proj.weight.clone()
    for _ in range(2):
        loss = torch.nn.functional.softplus(-scorer(torch.tensor([[4, 5, EOS]]), torch.tensor([3]))).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.69
    assert not torch.equal(scorer.model.base_model.layers[0].mlp.up_proj.weight, before)


def test_empty_row_is_refused_by_number(tmp_path: Path):
    with pytest.raises(ValueError, match="got none in row 1"):
        score_rows(make_scorer(tmp_path), [[4], []])


def test_architecture_without_linear_score_is_refused(tmp_path: Path):
    config = BertConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_labels=1
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="linear head `score` with one output, got BertForSequenceClassification"):
        SequenceScorer.from_pretrained(tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_are_those_of_each_row_alone_and_without_padding(tmp_path: Path, architecture: str):
    scorer, rows = make_scorer(tmp_path, architecture), [[4, 5, 6, 7, 8, EOS], [9, EOS], [4, 5, EOS], [10, 11, 12, EOS]]
    with torch.inference_mode():
        alone = [scorer.model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    for batch_size in (1, 3, 8):
        # sums over other shapes round otherwise: some 1e-7 of states of order 1
        torch.testing.assert_close(row_states(scorer, rows, batch_size), torch.stack(alone), atol=1e-6, rtol=1e-5)
    assert torch.stack(alone).std(0).min() > 1e-2


def test_states_do_not_depend_on_the_order_of_rows(tmp_path: Path):
    scorer, rows = make_scorer(tmp_path), [[4, 5, EOS], [6, EOS], [7, 8, 9, EOS]]
    assert torch.equal(row_states(scorer, rows[::-1], 2).flip(0), row_states(scorer, rows, 2))


def test_groups_bound_rows_and_tokens_by_hand():
    assert group_sizes([1, 1, 1, 2, 3, 7, 9], 3, 6) == [3, 2, 1, 1]
    assert group_sizes([5] * 40, 16, 2048) == [16, 16, 8]


def test_long_rows_are_computed_again_with_the_same_gradients_and_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scorer = make_scorer(tmp_path).train()
    lengths = torch.tensor([9, 2, 12, 5, 7, 12, 3, 10])
    input_ids = torch.randint(4, 32, (8, 12), generator=torch.Generator().manual_seed(2))

    def step(kept_tokens: int) -> tuple[torch.Tensor, list[torch.Tensor], int]:
        monkeypatch.setattr(reward_model, "KEPT_TOKENS", kept_tokens)
        scorer.zero_grad()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value.nbytes) or value, lambda value: value):
            logit = scorer.head(scorer.states(input_ids, lengths, group=2)).squeeze(-1)
        torch.nn.functional.softplus(logit).sum().backward()
        return logit.detach(), [value.grad.clone() for value in scorer.parameters() if value.grad is not None], sum(kept)

    whole, again = step(10_000), step(24)
    assert torch.equal(whole[0], again[0])
    torch.testing.assert_close(again[1], whole[1])
    assert again[2] < whole[2] / 2
