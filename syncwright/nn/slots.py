"""Lookups of ids in a table whose memory is a module's own tensors, as operations of a graph.

    table_slots(ids, weight, state, settings)   the step sees the ids: rows are made, clocks and counts go on
    table_find(ids, weight, state, settings)    the same without any change

Both give the row of `weight` for each id. Ids without a row get the last one, which is zeros and stays so.

weight    float (capacity + 1, width)
state     what `new_state` makes, in its order
settings  `Settings.to_text()`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from syncwright.tables.index import IdIndex
from syncwright.tables.lazily import zeros
from syncwright.tables.settings import Settings, from_text
from syncwright.tables.store import Column, Removals, Store
from syncwright.tables.table import ROWS, Table, candidate_columns, row_columns

_INDEX = ("buckets", "keys", "free", "sizes")
_WAITING = "waiting_"
_CLOCK = "clock"


def new_state(settings: Settings, capacity: int, waiting: int) -> dict[str, Tensor]:
    """The tensors of an empty table, but its rows; on the host, most of them untouched.

    before  capacity 4
    after   clock int64[3], buckets int32[16], keys int64[4], free int32[4], sizes int64[3], seen int64[4], changed int64[4],
            with an eviction by score also shows, clicks: float64[4]; with an admission that lets ids wait, the same of up
            to `waiting` ids that do, named waiting_...
    """
    found = {_CLOCK: torch.zeros(3, dtype=torch.int64), **_new_store(row_columns(settings, torch.float32), capacity)}
    if settings.waits:
        found |= {f"{_WAITING}{n}": t for n, t in _new_store(candidate_columns(settings), waiting).items()}
    return found


def _new_store(columns: Mapping[str, Column], capacity: int) -> dict[str, Tensor]:
    held = {n: zeros((capacity, *kind.shape), kind.dtype) for n, kind in columns.items() if n != ROWS}
    return {**IdIndex.fixed(capacity), **held}


def open_table(
    settings: Settings,
    weight: Tensor,
    state: Sequence[Tensor],
    more: Mapping[str, Tensor] | None = None,
    removals: Sequence[Removals] = (),
) -> Table:
    """The table whose memory is `weight` and `state`.

    more      further columns, as long as `weight`
    removals  of rows, and of ids that wait
    """
    weight = weight.detach()
    clock, *rest = state
    extra = {name: Column(tuple(held.shape[1:]), 0, held.dtype) for name, held in (more or {}).items()}
    kinds = {**row_columns(settings, weight.dtype), **extra}
    own = [name for name in kinds if name != ROWS and name not in extra]
    count = len(_INDEX) + len(own)
    rows = _open_store(kinds, own, rest[:count], {ROWS: weight, **(more or {})}, *removals[:1])
    if not settings.waits:
        return Table.over(settings, rows, None, clock)
    kinds = candidate_columns(settings)
    return Table.over(settings, rows, _open_store(kinds, list(kinds), rest[count:], {}, *removals[1:]), clock)


def _open_store(kinds, own: list[str], tensors: Sequence[Tensor], more: Mapping[str, Tensor], *removals) -> Store:
    index = IdIndex(dict(zip(_INDEX, tensors, strict=False)))
    return Store(kinds, index, {**dict(zip(own, tensors[len(_INDEX) :], strict=True)), **more}, *removals)


@torch.library.custom_op("syncwright::table_slots", mutates_args=("weight", "state"))
def table_slots(ids: Tensor, weight: Tensor, state: list[Tensor], settings: str) -> Tensor:
    table = open_table(from_text(settings), weight, state)
    table.advance()
    return _or_last(table.slots(ids, create=True), weight)


@torch.library.custom_op("syncwright::table_find", mutates_args=())
def table_find(ids: Tensor, weight: Tensor, state: list[Tensor], settings: str) -> Tensor:
    return _or_last(open_table(from_text(settings), weight, state).slots(ids, create=False), weight)


@table_slots.register_fake
@table_find.register_fake
def _fake(ids: Tensor, weight: Tensor, state: list[Tensor], settings: str) -> Tensor:
    return torch.empty(ids.shape, dtype=torch.int64, device=weight.device)


def _or_last(slots: Tensor, weight: Tensor) -> Tensor:
    return slots.masked_fill_(slots < 0, len(weight) - 1).to(weight.device)
