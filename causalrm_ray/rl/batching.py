"""Which rows go through a model together: short ones with short ones, as many as a budget of padded tokens holds.

lengths --balance_lengths--> rank of each row --micro_batches--> those of every rank, as many on each
"""

from __future__ import annotations

from collections.abc import Sequence

TOKEN_BUDGET = 8192  # tokens, pads included, that go through a policy together in training


def balance_lengths(lengths: Sequence[int], ranks: int) -> list[int]:
    """The rank of each row, so that ranks get about as many tokens: the longest row left goes to the rank with the fewest.

    Of ranks with equally many, the one with the fewest rows and then the first. Graham 1969: the busiest rank has at most 4/3 of
    the tokens that it has in the best distribution.
    """
    loads = [(0, 0, rank) for rank in range(ranks)]
    owners = [0] * len(lengths)
    for place in _longest_first(lengths):
        tokens, rows, rank = min(loads)
        loads[loads.index((tokens, rows, rank))] = (tokens + lengths[place], rows + 1, rank)
        owners[place] = rank
    return owners


def cut(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Places of the rows of each micro-batch, longest first: rows x longest row <= `budget` tokens, and at least one row."""
    batches: list[list[int]] = []
    for place in _longest_first(lengths):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def micro_batches(lengths: Sequence[int], owners: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Places of the rows of each micro-batch of each rank; all ranks have as many as the busiest, some of them without a row."""
    batches = []
    for rank in range(ranks):
        places = [place for place, owner in enumerate(owners) if owner == rank]
        batches.append([[places[row] for row in batch] for batch in cut([lengths[place] for place in places], budget)])
    most = max(map(len, batches))
    return [own + [[]] * (most - len(own)) for own in batches]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda place: -lengths[place])
