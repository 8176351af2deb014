"""Partition: the sizes that the semantics fix, and the rules that every cut keeps."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from syncwright.errors import PlanError
from syncwright.plan import Blocks, Even, Partition, Uneven, Whole, cut

PARTITIONS = st.one_of(
    st.just(Whole()),
    st.builds(Blocks, st.integers(1, 20_000)),
    st.builds(Even, st.integers(1, 50)),
    st.builds(Uneven, st.integers(1, 50)),
)
SHAPES = st.lists(st.integers(0, 300), max_size=3).map(tuple)


@pytest.mark.parametrize(
    ("partition", "shape", "servers", "sizes"),
    [
        (Blocks(8192), (10, 4096), 4, (3, 3, 3, 1)),
        (Blocks(8192), (7, 3000), 4, (4, 3)),
        (Blocks(8192), (7, 3000), 2, (4, 3)),
        (Blocks(8192), (5, 8192), 3, (2, 2, 1)),
        (Blocks(8192), (5, 8192), 4, (2, 2, 1)),
        (Blocks(8192), (100_000,), 3, (33334, 33334, 33332)),
        (Blocks(8192), (8191,), 4, (8191,)),
        (Blocks(8192), (1000, 1000), 2, (500, 500)),
        (Blocks(8192), (1000,), 2, (1000,)),
        (Blocks(1), (10,), 4, (3, 3, 3, 1)),
        (Even(3), (10,), 2, (4, 3, 3)),
        (Even(5), (3, 7), 2, (1, 1, 1)),
        (Uneven(4), (10,), 2, (1, 2, 3, 4)),
        (Uneven(3), (12, 2), 2, (2, 4, 6)),
        (Uneven(3), (10,), 2, (2, 3, 5)),
        (Uneven(9), (4,), 2, (1, 1, 1, 1)),
        (Whole(), (10, 4096), 4, (10,)),
        (Even(4), (), 4, (1,)),
        (Blocks(1), (), 4, (1,)),
        (Uneven(2), (0, 5), 4, (0,)),
        (Blocks(1), (5, 0), 4, (5,)),
    ],
)
def test_sizes(partition: Partition, shape: tuple[int, ...], servers: int, sizes: tuple[int, ...]):
    assert cut(partition, shape, servers) == sizes


@given(PARTITIONS, SHAPES, st.integers(1, 12))
def test_sizes_add_up_and_no_piece_is_empty(partition: Partition, shape: tuple[int, ...], servers: int):
    sizes = cut(partition, shape, servers)
    length = shape[0] if shape else 1
    assert sum(sizes) == length
    assert len(sizes) == 1 or all(size > 0 for size in sizes)


@given(st.integers(1, 400), st.integers(1, 40))
def test_even_is_torch_tensor_split(rows: int, k: int):
    expected = torch.empty(rows).tensor_split(min(k, rows))
    assert cut(Even(k), (rows,), 1) == tuple(len(piece) for piece in expected)


@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 20_000), st.integers(1, 12))
def test_blocks_are_never_more_than_the_servers(rows: int, columns: int, least: int, servers: int):
    sizes = cut(Blocks(least), (rows, columns), servers)
    assert len(sizes) <= servers
    assert len(set(sizes[:-1])) <= 1
    assert sizes[-1] <= sizes[0]


@given(st.integers(1, 12), st.integers(1, 30))
def test_uneven_is_exact_where_the_axis_allows(k: int, unit: int):
    rows = unit * k * (k + 1) // 2
    assert cut(Uneven(k), (rows,), 1) == tuple(unit * (piece + 1) for piece in range(k))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Even(0), "Even.k: found 0, expected a whole number of at least 1."),
        (lambda: Uneven(2.5), "Uneven.k: found 2.5, expected a whole number of at least 1."),
        (lambda: Blocks("many"), "Blocks.min_elements: found 'many', expected a whole number of at least 1."),
        (lambda: Even(True), "Even.k: found True, expected a whole number of at least 1."),
    ],
)
def test_what_cannot_be_meant_is_refused(make, message: str):
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        make()
