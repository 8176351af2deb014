"""Ids with named columns: row `slot` of each column is about the id in that slot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from syncwright.errors import TableError
from syncwright.tables.index import IdIndex
from syncwright.tables.lazily import zeros
from syncwright.tables.saved import Part

CHANGED = "changed"
"""The column that every store has: the mark under which a row was last written."""


@dataclass(frozen=True, slots=True)
class Column:
    """What a column holds for each id: `shape` numbers that begin at `initial`."""

    shape: tuple[int, ...] = ()
    initial: float = 0.0
    dtype: torch.dtype = torch.float32


@dataclass(slots=True)
class Removals:
    """Which ids went under which mark, from the mark `since` on, which is that of an export. Changes with use."""

    since: int = 1
    entries: list[tuple[int, Tensor]] = field(default_factory=list)

    def add(self, mark: int, ids: Tensor) -> None:
        if mark >= self.since and len(ids):
            self.entries.append((mark, ids))

    def after(self, since: int) -> Tensor:
        found = [ids for mark, ids in self.entries if mark >= since]
        return torch.cat(found).unique() if found else torch.empty(0, dtype=torch.int64)

    def forget(self, mark: int) -> None:
        """Exports from before `mark` are no longer asked for."""
        self.since, self.entries = mark, []


class Store:
    """An `IdIndex` and columns that grow with it, by half. Changes with use."""

    def __init__(
        self, columns: Mapping[str, Column], index: IdIndex, held: dict[str, Tensor], removals: Removals | None = None
    ):
        """`held`: the columns' memory; grown here unless the index is of a fixed size."""
        self.kinds, self.index, self.columns = columns, index, held
        self.removals = Removals() if removals is None else removals

    @staticmethod
    def growing(columns: Mapping[str, Column], capacity: int, device: torch.device | None = None) -> Store:
        """Empty, with room for `capacity` ids before it first grows. `device`: of the columns of floats."""
        held = {name: _zeros(kind, max(1, capacity), device) for name, kind in columns.items()}
        return Store(columns, IdIndex(), held)

    def __len__(self) -> int:
        return len(self.index)

    def insert(self, ids: Tensor) -> Tensor:
        """The slots of `ids`; new ones begin with the columns' initial values."""
        new = self.index.new(ids)
        made = self.index.insert(new)
        self._grow(self.index.end)
        for name, kind in self.kinds.items():
            self.columns[name].index_fill_(0, made.to(self.columns[name].device), kind.initial)
        return self.index.insert(ids)

    def gather(self, name: str, slots: Tensor) -> Tensor:
        """Rows of a column; zeros for slots of -1."""
        column = self.columns[name]
        slots = slots.to(column.device)
        found = column.index_select(0, slots.reshape(-1).clamp(min=0)).view(*slots.shape, *column.shape[1:])
        unknown = (slots < 0).view(*slots.shape, *[1] * (column.dim() - 1))
        return found.masked_fill_(unknown, 0) if bool(unknown.any()) else found

    def write(self, name: str, slots: Tensor, values: Tensor | float) -> None:
        """Writes rows of a column. Slots must be in use."""
        column = self.columns[name]
        slots = slots.to(column.device)
        if isinstance(values, Tensor):
            column.index_copy_(0, slots, values.to(column.device, column.dtype))
        else:
            column.index_fill_(0, slots, values)

    def remove(self, ids: Tensor, mark: int) -> Tensor:
        """Forgets ids; the slots that this frees."""
        self.removals.add(mark, ids)
        return self.index.remove(ids)

    def part(self, since: int | None) -> Part:
        """All ids, or those that were written to under the mark `since` or a later one; copied, on the host."""
        slots = self.index.slots()
        ids, removed = self.index.ids(), torch.empty(0, dtype=torch.int64)
        if since is not None:
            changed = self.gather(CHANGED, slots) >= since
            slots, ids, removed = slots[changed], ids[changed], self.removals.after(since)
        return Part(ids, {name: self.gather(name, slots).cpu() for name in self.kinds if name != CHANGED}, removed)

    def restore(self, part: Part, *, whole: bool) -> None:
        """Holds what `part` says; with `whole`, nothing else. `check` comes first."""
        if whole:
            self.index.clear()
        else:
            self.index.remove(part.removed)
        slots = self.insert(part.ids)
        for name, column in part.columns.items():
            self.write(name, slots, column)
        self.columns[CHANGED].zero_()

    def check(self, part: Part, *, whole: bool) -> None:
        """Raises `TableError` where `part` has other columns, and `TableFull` where it does not fit."""
        if whole:
            self.index.check_room(len(part.ids))
        expected = {n: (len(part.ids), *k.shape) for n, k in self.kinds.items() if n != CHANGED}
        found = {n: tuple(c.shape) for n, c in part.columns.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise TableError(
                    f"column '{name}': found {found.get(name, 'none')} in what was saved, expected "
                    f"{expected.get(name, 'none')}, as the table holds it. Restore into a table with the same columns "
                    "(width, admission, eviction, state of an optimizer)."
                )

    def _grow(self, end: int) -> None:
        for name, kind in self.kinds.items():
            column = self.columns[name]
            if end > len(column):
                longer = _zeros(kind, max(end, len(column) * 3 // 2), column.device)
                longer[: len(column)] = column
                self.columns[name] = longer


def _zeros(kind: Column, length: int, device: torch.device | None) -> Tensor:
    return zeros((length, *kind.shape), kind.dtype, device if kind.dtype.is_floating_point and kind.shape else None)
