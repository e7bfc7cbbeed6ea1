from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from causalrm_ray.rl.batching import balance_lengths, cut, micro_batches

LENGTHS = st.lists(st.integers(1, 40), max_size=30)


def test_rows_of_one_length_go_together_by_hand() -> None:
    assert cut([3, 10, 4, 9, 2], budget=20) == [[1, 3], [2, 0, 4]]  # 2 x 10 and 3 x 4
    assert cut([3, 10, 4, 9, 2], budget=12) == [[1], [3], [2, 0, 4]]
    assert cut([3, 10, 4, 9, 2], budget=1) == [[1], [3], [2], [0], [4]]


@given(LENGTHS, st.integers(1, 100))
@settings(max_examples=100, deadline=None)
def test_every_row_comes_once_within_the_budget_and_no_batch_would_hold_the_next_row(lengths: list[int], budget: int) -> None:
    batches = cut(lengths, budget)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= budget
    for batch, following in itertools.pairwise(batches):
        assert min(lengths[place] for place in batch) >= max(lengths[place] for place in following)
        assert (len(batch) + 1) * lengths[batch[0]] > budget


def test_tokens_are_distributed_evenly_by_hand() -> None:
    assert balance_lengths([10, 9, 8, 1], 2) == [0, 1, 1, 0]  # 11 and 17: the two rows of 9 and 8 met the emptier rank in turn
    assert balance_lengths([5, 5, 5, 5], 2) == [0, 1, 0, 1]
    assert balance_lengths([7], 3) == [0]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_the_busiest_rank_has_at_most_four_thirds_of_the_best_distribution(lengths: list[int], ranks: int) -> None:
    def busiest(owners: tuple[int, ...] | list[int]) -> int:
        return max(sum(length for length, owner in zip(lengths, owners, strict=True) if owner == rank) for rank in range(ranks))

    best = min(busiest(owners) for owners in itertools.product(range(ranks), repeat=len(lengths)))
    assert 3 * busiest(balance_lengths(lengths, ranks)) <= 4 * best


@given(LENGTHS, st.integers(1, 3), st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_ranks_share_all_rows_in_as_many_micro_batches(lengths: list[int], ranks: int, budget: int) -> None:
    owners = balance_lengths(lengths, ranks)
    batches = micro_batches(lengths, owners, ranks, budget)
    assert len({len(mine) for mine in batches}) == 1
    assert all(owners[place] == rank for rank, mine in enumerate(batches) for batch in mine for place in batch)
    assert sorted(itertools.chain(*itertools.chain(*batches))) == list(range(len(lengths)))
    busiest = max(len([batch for batch in mine if batch]) for mine in batches)
    assert all(len(mine) == busiest for mine in batches)
