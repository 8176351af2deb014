"""All pairs of choices in few cases."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

Pair = tuple[int, int, int, int]


def pairwise_cover(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Rows of choices such that any two choices of two factors stand together in some row; the same every time.

        pairwise_cover([2, 2, 2])     [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]

    Greedy: a row starts with the first pair that is left, then every factor takes the choice that covers most pairs.
    """
    left = dict.fromkeys(
        (i, a, j, b) for i, j in combinations(range(len(sizes)), 2) for a in range(sizes[i]) for b in range(sizes[j])
    )
    rows = []
    while left:
        row = _row(sizes, left)
        rows.append(row)
        for pair in pairs_of(row):
            left.pop(pair, None)
    return rows


def pairs_of(row: Sequence[int]) -> list[Pair]:
    return [(i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2)]


def _row(sizes: Sequence[int], left: dict[Pair, None]) -> tuple[int, ...]:
    i, a, j, b = next(iter(left))
    row = {i: a, j: b}
    for factor in range(len(sizes)):
        if factor not in row:
            row[factor] = max(range(sizes[factor]), key=lambda choice: _gain(factor, choice, row, left))
    return tuple(row[factor] for factor in range(len(sizes)))


def _gain(factor: int, choice: int, row: dict[int, int], left: dict[Pair, None]) -> int:
    pairs = [(factor, choice, o, c) if factor < o else (o, c, factor, choice) for o, c in row.items()]
    return sum(pair in left for pair in pairs)
