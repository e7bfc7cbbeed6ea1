"""States of a backbone: what transformers computes of each row alone, pooled by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from causalrm_ray.models.states.pooled import STATES, PooledBackbone, Row, middle, pooled_states
from causalrm_ray.types import StatesName

ROWS = [Row([5, 6, 7], [8, 9]), Row([5], [10]), Row([3, 4, 5, 6, 7, 8], [9, 11, 12, 13]), Row([7, 7], [1, 2, 3, 4, 5, 6])]
SIZE = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZE, head_dim=16)),
}


@pytest.fixture(params=MODELS)
def backbone(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    torch.manual_seed(0)
    MODELS[request.param]().save_pretrained(tmp_path)
    return str(tmp_path)


@torch.inference_mode()
def by_hand(backbone: str, row: Row) -> dict[StatesName, torch.Tensor]:
    """The four states of a row that is read alone, in double precision."""
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float64, attn_implementation="eager")
    hidden = model(torch.tensor([[*row.prompt, *row.answer]]), output_hidden_states=True).hidden_states
    answer = {"final": hidden[-1][0, len(row.prompt) :], "middle": hidden[3][0, len(row.prompt) :]}  # 3 of 5 layers
    return {f"{depth}-{name}": how for depth, h in answer.items() for name, how in (("last", h[-1]), ("mean", h.mean(0)))}


def test_states_are_those_of_each_row_alone(backbone: str) -> None:
    found = pooled_states(PooledBackbone.from_pretrained(backbone), ROWS)
    assert found.shape == (4, 4, 32)
    for row, states in zip(ROWS, found, strict=True):
        expected = by_hand(backbone, row)
        for place, name in enumerate(STATES):
            torch.testing.assert_close(states[place].double(), expected[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("names", [("middle-mean",), ("middle-last", "middle-mean"), ("final-mean",)])
def test_some_states_are_the_same_by_fewer_layers(backbone: str, names: tuple[StatesName, ...]) -> None:
    whole, some = PooledBackbone.from_pretrained(backbone), PooledBackbone.from_pretrained(backbone, names)
    expected = pooled_states(whole, ROWS)[:, [STATES.index(name) for name in names]]
    torch.testing.assert_close(pooled_states(some, ROWS), expected, atol=1e-6, rtol=1e-5)
    layers = [len(list(one.backbone.layers)) for one in (whole, some)]
    assert layers == [5, 5 if names == ("final-mean",) else 3]


def test_the_order_of_rows_changes_no_bit(backbone: str) -> None:
    model = PooledBackbone.from_pretrained(backbone)
    assert torch.equal(pooled_states(model, ROWS[::-1]), pooled_states(model, ROWS).flip(0))


def test_two_thirds_of_the_layers_are_counted_by_hand() -> None:
    assert [middle(layers) for layers in (1, 2, 3, 5, 24, 30, 32)] == [1, 1, 2, 3, 16, 20, 21]


def test_a_row_without_an_answer_is_named(backbone: str) -> None:
    with pytest.raises(ValueError, match="row 1 must hold a prompt and an answer, got 2 and 0 tokens"):
        pooled_states(PooledBackbone.from_pretrained(backbone), [ROWS[0], Row([1, 2], [])])
