"""A table of rows by id, with state per row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from syncwright.errors import TableError
from syncwright.tables.admission import ScoreDecay, ShowClick, admitted, unwanted
from syncwright.tables.initial import rows as initial_rows
from syncwright.tables.saved import Saved
from syncwright.tables.settings import Settings
from syncwright.tables.store import CHANGED, Column, Store

ROWS, SEEN, COUNTS, SHOWS, CLICKS = "rows", "seen", "counts", "shows", "clicks"
"""Columns: the rows; the last step that saw an id; how many steps have; what `observe` has told."""

NOW, MARK, DECAYS = 0, 1, 2
"""Items of the clock: steps; exports; how often scores have been decayed."""

_SEEN = {SEEN: Column((), -1, torch.int64), CHANGED: Column((), 0, torch.int64)}
_SCORED = {SHOWS: Column((), 0, torch.float64), CLICKS: Column((), 0, torch.float64)}


class Removed(NamedTuple):
    """Ids whose rows went, and the slots that are free now."""

    ids: Tensor
    slots: Tensor


class Table:
    """Rows by id, created as ids are first seen in training. Changes with use.

        table = Table(Settings(width=8), {"sum": Column((1,))})
        table.advance()                             a step begins
        rows = table.pull(ids, create=True)         ids that have no row get one, or wait for admission and read zeros
        slots = table.slots(ids, create=False)      -1 where an id has no row
        table.scatter("rows", slots, rows - 0.1)    slots of -1 are left out
        table.gather("sum", slots)

    A step sees an id once, however often it looks it up: with several trainers in one step an id counts as with one. The
    order of ids in a call, and of calls in a step, changes slots and nothing else.
    """

    def __init__(
        self,
        settings: Settings,
        columns: Mapping[str, Column] | None = None,
        *,
        capacity: int = 1024,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ):
        """Empty and growing.

        columns   state per row, beside the rows
        capacity  rows before it first grows
        dtype     of the rows
        device    of the rows, and of floating columns that have a shape; others are on the host
        """
        own, more = row_columns(settings, dtype), columns or {}
        for name in own.keys() & more.keys():
            raise TableError(f"column '{name}': found one of the table's own; expected another name.")
        self.settings, self.clock = settings, torch.zeros(3, dtype=torch.int64)
        self.rows = Store.growing({**own, **more}, capacity, device)
        self.candidates = Store.growing(candidate_columns(settings), capacity) if settings.waits else None

    @classmethod
    def over(cls, settings: Settings, rows: Store, candidates: Store | None, clock: Tensor) -> Table:
        """Over memory that is somebody else's, which it writes to."""
        table = cls.__new__(cls)
        table.settings, table.rows, table.candidates, table.clock = settings, rows, candidates, clock
        return table

    def __len__(self) -> int:
        return len(self.rows)

    def advance(self) -> None:
        """A step begins."""
        self.clock[NOW] += 1

    def pull(self, ids: Tensor, create: bool) -> Tensor:
        """The rows of `ids`, of shape (*ids.shape, width); zeros where there is none.

        create  training: the step has seen these ids, and those that are admitted get a row. Else nothing changes.
        """
        return self.gather(ROWS, self.slots(ids, create))

    def slots(self, ids: Tensor, create: bool) -> Tensor:
        """The slot of each id, -1 where it has no row; as `pull`. Int64 on the host, of the shape of `ids`."""
        flat = ids.detach().cpu().reshape(-1)
        slots = self.rows.index.find(flat)
        if create:
            missing = slots < 0
            if bool(missing.any()):
                self._create(self._admit(self.rows.index.new(self._real(flat[missing]))))
                slots[missing] = self.rows.index.find(flat[missing])
            self._stamp(self.rows, slots[slots >= 0])
        return slots.view(ids.shape)

    def gather(self, name: str, slots: Tensor) -> Tensor:
        """What the column `name` holds at `slots`; zeros for -1. "rows" is a column too."""
        return self.rows.gather(self._known(name), slots)

    def scatter(self, name: str, slots: Tensor, values: Tensor) -> None:
        """Writes `values` (*slots.shape, ...) to a column; slots of -1 are left out, others must not repeat."""
        slots, column = slots.reshape(-1).cpu(), self.rows.columns[self._known(name)]
        values, real = values.reshape(len(slots), *column.shape[1:]), slots >= 0
        self.rows.write(name, slots[real], values[real.to(values.device)])
        self.rows.write(CHANGED, slots[real], self._mark)

    def observe(self, ids: Tensor, shows: Tensor, clicks: Tensor) -> None:
        """Adds to the shows and clicks of `ids`, which may repeat. Ids that no step has seen are left out."""
        stores = [store for store in (self.rows, self.candidates) if store is not None and SHOWS in store.columns]
        if not stores:
            raise TableError(
                f"found admission={self.settings.admission} and eviction={self.settings.eviction}, which use no shows and "
                "clicks. Expected ShowClick(...) or ScoreDecay(...). Leave observe() out, or use one of them."
            )
        for store in stores:
            slots = store.index.find(ids.reshape(-1))
            real = slots >= 0
            for name, told in ((SHOWS, shows), (CLICKS, clicks)):
                store.columns[name].index_add_(0, slots[real], told.detach().cpu().double().reshape(-1)[real])
            store.write(CHANGED, slots[real], self._mark)

    def shrink(self) -> Removed:
        """Decays scores and removes rows, as `eviction` says; ids that wait for admission likewise."""
        if isinstance(self.settings.eviction, ScoreDecay):
            self._decay(1)
        if self.candidates is not None:
            self._evict(self.candidates)
        return self._evict(self.rows)

    def export(self, since: int | None = None) -> Saved:
        """All rows, or what changed or went since the export with the mark `since`; copied.

        Marks from before the last whole export are forgotten, and asking for them raises `TableError`.
        """
        if since is not None and not self.rows.removals.since <= since <= self._mark:
            raise TableError(
                f"found since={since}; expected the mark of the last whole export or of a later one "
                f"({self.rows.removals.since} to {self._mark}). Take a whole export: export()."
            )
        found = self._saved(since)
        self.clock[MARK] += 1
        if since is None:
            self._forget()
        return replace(found, mark=self._mark)

    def snapshot(self) -> Saved:
        """All rows, copied, as a whole export has them; it is no export: later ones do not count from it."""
        return self._saved(None)

    def restore(self, saved: Saved) -> None:
        """Holds what was saved; of what changed, on top of what is there.

        Raises `TableError` where what changed does not follow on what this table was restored from.
        """
        whole = saved.since is None
        if not whole and not saved.since <= self._mark <= saved.mark:  # type: ignore[operator]
            raise TableError(
                f"found what changed since mark {saved.since}, and a table at mark {self._mark}. Expected the exports in "
                "the order in which they were made, from a whole one on. Restore the missing ones first."
            )
        if (saved.candidates is None) != (self.candidates is None):
            raise TableError(
                f"found {'no ' if saved.candidates is None else ''}ids that wait for admission in what was saved, and a "
                f"table with admission={self.settings.admission}. Expected both to admit at once, or both to let ids wait."
            )
        pairs = [(self.rows, saved.rows), (self.candidates, saved.candidates)]
        known = [(store, part) for store, part in pairs if store is not None and part is not None]
        for store, part in known:
            store.check(part, whole=whole)
        if not whole:
            self._decay(saved.decays - int(self.clock[DECAYS]))
        for store, part in known:
            store.restore(part, whole=whole)
        self.clock.copy_(torch.tensor([saved.now, saved.mark, saved.decays]))
        self._forget()

    def _saved(self, since: int | None) -> Saved:
        candidates = None if self.candidates is None else self.candidates.part(since)
        now, mark, decays = (int(self.clock[item]) for item in (NOW, MARK, DECAYS))
        return Saved(since, mark, now, decays, self.rows.part(since), candidates)

    @property
    def _mark(self) -> int:
        return int(self.clock[MARK])

    def _forget(self) -> None:
        for store in (self.rows, self.candidates):
            if store is not None:
                store.removals.forget(self._mark)

    def _known(self, name: str) -> str:
        if name not in self.rows.columns:
            raise TableError(f"found no column '{name}'; expected one of {', '.join(self.rows.columns)}.")
        return name

    def _real(self, ids: Tensor) -> Tensor:
        return ids if self.settings.padding_id is None else ids[ids != self.settings.padding_id]

    def _admit(self, ids: Tensor) -> Tensor:
        """Of new, different ids those that get a row; the others wait."""
        store = self.candidates
        if store is None or not len(ids):
            return ids
        slots = store.insert(ids)
        first = store.columns[SEEN][slots] != self.clock[NOW]
        store.columns[COUNTS][slots] += first.long()
        self._stamp(store, slots)
        return ids[admitted(self.settings.admission, self.settings.seed, ids, _held(store, slots))]

    def _create(self, ids: Tensor) -> None:
        slots = self.rows.insert(ids)
        rows = self.rows.columns[ROWS]
        made = initial_rows(self.settings.initial, self.settings.seed, ids, self.settings.width, rows.dtype)
        self.rows.write(ROWS, slots, made)
        if self.candidates is not None and len(ids):
            waited = self.candidates.index.find(ids)
            for name in {SHOWS, CLICKS} & self.rows.columns.keys() & self.candidates.columns.keys():
                self.rows.write(name, slots, self.candidates.gather(name, waited))
            self.candidates.remove(ids, self._mark)

    def _stamp(self, store: Store, slots: Tensor) -> None:
        store.write(SEEN, slots, int(self.clock[NOW]))
        store.write(CHANGED, slots, self._mark)

    def _decay(self, times: int) -> None:
        """Once after the other, as `shrink` does, so that it gives the same numbers."""
        match self.settings.eviction:
            case ScoreDecay(decay=decay):
                for store in (self.rows, self.candidates):
                    for name in () if store is None else {SHOWS, CLICKS} & store.columns.keys():
                        for _ in range(times):
                            store.columns[name].mul_(decay)  # type: ignore[union-attr]
                self.clock[DECAYS] += times

    def _evict(self, store: Store) -> Removed:
        slots = store.index.slots()
        gone = unwanted(self.settings.eviction, int(self.clock[NOW]), _held(store, slots))
        ids = store.index.ids()[gone]
        return Removed(ids, store.remove(ids, self._mark))


def _held(store: Store, slots: Tensor) -> dict[str, Tensor]:
    return {n: store.columns[n][slots] for n in (SEEN, COUNTS, SHOWS, CLICKS) if n in store.columns}


def row_columns(settings: Settings, dtype: torch.dtype) -> dict[str, Column]:
    """The columns of ids that have a row."""
    scored = _SCORED if isinstance(settings.eviction, ScoreDecay) else {}
    return {ROWS: Column((settings.width,), 0, dtype), **_SEEN, **scored}


def candidate_columns(settings: Settings) -> dict[str, Column]:
    """The columns of ids that wait for admission."""
    scored = _SCORED if isinstance(settings.admission, ShowClick) else {}
    return {COUNTS: Column((), 0, torch.int64), **_SEEN, **scored}
