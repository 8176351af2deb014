"""Placement: which server keeps each piece of the variables that servers keep.

Pieces are placed in the order in which variables were registered, each variable's pieces in order; the
tallies that rules keep (a counter, the load per server) run over all of them, never per variable.

    nn.Linear(1000, 1000), Blocks(), RoundRobin(), 2 servers:  weight[0] -> 0, weight[1] -> 1, bias -> 0
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from syncwright.errors import PlanError
from syncwright.program import Variable
from syncwright.typed import Index, check_fields

ROWS_PER_STEP = 1024
"""Rows of a sparse variable that a step is taken to touch, for its traffic: a plan knows no batch."""


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """Server 0, 1, 2, ... in turn; one counter for all pieces placed this way."""


@dataclass(frozen=True, slots=True)
class Hash:
    """blake2b-64 of `name/piece`, big-endian, modulo servers: a place depends on no other variable."""


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """The server with the fewest bytes placed on it so far, by any rule; the lowest of equals.

    A sparse variable weighs as much as its traffic in a step, not as much as its table.
    """


@dataclass(frozen=True, slots=True)
class Small:
    """Variables with fewer than `below` elements to server `place`, larger ones to the least loaded.

    Load is counted in elements, of the larger ones only.
    """

    below: Index = 65536
    place: Index = 0

    def __post_init__(self) -> None:
        check_fields(self, PlanError)


@dataclass(frozen=True, slots=True)
class On:
    """The given server."""

    server: Index

    def __post_init__(self) -> None:
        check_fields(self, PlanError)


Placement = RoundRobin | Hash | LeastLoaded | Small | On


@dataclass(slots=True)
class _Tally:
    """Changes while pieces are placed: what was placed where so far."""

    nbytes: list[int]
    large_elements: list[int]
    turns: int = field(default=0)


def place(cuts: Iterable[tuple[Variable, tuple[int, ...], Placement]], servers: int) -> list[tuple[int, ...]]:
    """The owners of every variable's pieces, for variables in registration order with their pieces' sizes."""
    tally = _Tally([0] * servers, [0] * servers)
    return [
        tuple(_place_piece(variable, piece, sizes[piece], rule, tally) for piece in range(len(sizes)))
        for variable, sizes, rule in cuts
    ]


def least_loaded(sizes: Iterable[int], trainers: int) -> list[int]:
    """The trainer that keeps each whole variable: the one with the fewest elements so far, the lowest of equals.

    [4, 3, 2, 2, 1] on 2: [0, 1, 1, 0, 1]
    """
    loads, found = [0] * trainers, []
    for size in sizes:
        found.append(_least(loads))
        loads[found[-1]] += size
    return found


def in_order(sizes: Sequence[int], trainers: int) -> list[int]:
    """The trainer that keeps each whole variable, of variables in order of first use: the next one as soon as those before
    have more than their share of all elements.

    [1, 1, 1, 1] on 2: [0, 0, 0, 1]. [90, 5, 5] on 4: [0, 1, 2]
    """
    found, placed, trainer = [], 0, 0
    for size in sizes:
        if placed * trainers > sum(sizes) * (trainer + 1):
            trainer += 1
        found.append(trainer)
        placed += size
    return found


def _place_piece(variable: Variable, piece: int, rows: int, rule: Placement, tally: _Tally) -> int:
    elements = rows * _row_elements(variable)
    server = _choose(variable, piece, rule, tally)
    tally.nbytes[server] += _traffic(variable, rows) if variable.sparse else elements * variable.dtype.itemsize
    if isinstance(rule, RoundRobin):
        tally.turns += 1
    if isinstance(rule, Small) and variable.numel >= rule.below:
        tally.large_elements[server] += elements
    return server


def _choose(variable: Variable, piece: int, rule: Placement, tally: _Tally) -> int:
    servers = len(tally.nbytes)
    match rule:
        case RoundRobin():
            return tally.turns % servers
        case Hash():
            digest = hashlib.blake2b(f"{variable.name}/{piece}".encode(), digest_size=8).digest()
            return int.from_bytes(digest, "big") % servers
        case LeastLoaded():
            return _least(tally.nbytes)
        case Small(below, server) if variable.numel < below:
            return _given(variable, server, servers)
        case Small():
            return _least(tally.large_elements)
        case On(server):
            return _given(variable, server, servers)


def _least(loads: list[int]) -> int:
    return loads.index(min(loads))


def _given(variable: Variable, server: int, servers: int) -> int:
    if server < servers:
        return server
    raise PlanError(
        f"variable {variable.name!r}: found a place on server {server}, expected one of the {servers} "
        f"servers, which count from 0. Name a lower one, or start at least {server + 1} servers."
    )


def _row_elements(variable: Variable) -> int:
    elements = 1
    for size in variable.shape[1:]:
        elements *= size
    return elements


def _traffic(variable: Variable, rows: int) -> int:
    """Bytes per step of a piece of a sparse variable: its share of the rows that a step touches."""
    length = max(1, variable.shape[0] if variable.shape else 1)
    touched = min(length, ROWS_PER_STEP)
    return -(-touched * rows // length) * _row_elements(variable) * variable.dtype.itemsize
