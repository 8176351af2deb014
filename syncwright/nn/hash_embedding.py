"""Rows for ids that nobody has counted: any 64-bit number, on one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from syncwright.nn.row_state import begin_state, initial, numbers, restore_numbers, row_state
from syncwright.nn.slots import new_state, open_table, table_find, table_slots
from syncwright.tables import Admission, Always, Eviction, Forever, Initial, Normal, Saved, Settings, Table
from syncwright.tables.lazily import zeros
from syncwright.tables.store import Removals

_NORMAL, _ALWAYS, _FOREVER = Normal(), Always(), Forever()


class HashTable(nn.Module):
    """What `HashEmbedding` and `HashEmbeddingBag` share: a table of which all memory is parameters and buffers.

    `weight` (capacity + 1, dim) holds the rows in the order in which they were made; its last row is zeros, and is what
    ids without a row read. Which id is where is in buffers on the host, wherever the rows are. Memory is taken as rows
    are made, but for 8 to 16 bytes for each row of `capacity`. (Saving a `state_dict` writes all of it; `export` what is
    used.)
    """

    weight: nn.Parameter

    def __init__(
        self,
        dim: int,
        *,
        capacity: int,
        seed: int = 0,
        initial: Initial = _NORMAL,
        admission: Admission = _ALWAYS,
        eviction: Eviction = _FOREVER,
        padding_id: int | None = None,
        waiting_capacity: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        """
        dim               numbers in a row
        capacity          rows that fit; one more raises `TableFull`
        seed              what rows begin with is made from it, the id and `initial`, and from nothing else
        admission         which ids get a row
        eviction          which rows `shrink` removes
        padding_id        an id that reads zeros and never gets a row; a mean and a maximum leave it out
        waiting_capacity  ids that fit while they wait for admission; as many as rows, if it is not given
        """
        super().__init__()
        self.settings = Settings(dim, seed, initial, admission, eviction, padding_id)
        self.capacity = capacity
        state = new_state(self.settings, capacity, waiting_capacity or capacity)
        dtype = dtype or torch.get_default_dtype()
        self.weight = nn.Parameter(zeros((capacity + 1, dim), dtype, torch.device(device) if device else None))
        for name, tensor in state.items():
            self.register_buffer(name, tensor)
        self.state_names = tuple(state)
        self._removals = (Removals(), Removals())
        self.register_load_state_dict_post_hook(_begin_exports)

    def count(self) -> int:
        """How many ids have a row."""
        return len(self.opened())

    def slots(self, ids: Tensor) -> Tensor:
        """The rows of `weight` for `ids`; of the last one, `capacity`, for those without. In training, rows are made.

        Every call in training is one step of the table's clock, which `CountFilter` and `TimeToLive` count in.
        """
        find = table_slots if self.training else table_find
        return find(ids, self.weight.detach(), self.tensors(), self.settings.to_text())

    def places(self, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Where the rows of `ids` are, and how they are looked up there: the last row has no gradient."""
        return self.slots(ids), {"padding_idx": self.capacity, "sparse": True}

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of `ids`, of shape (*ids.shape, dim); their gradient is sparse."""
        places, how = self.places(ids)
        return F.embedding(places, self.weight, **how)

    def observe(self, ids: Tensor, shows: Tensor, clicks: Tensor) -> None:
        """Adds to the shows and clicks of ids, which `ShowClick` and `ScoreDecay` score; ids never seen are left out."""
        self.opened().observe(ids, shows, clicks)

    def shrink(self, optimizer: Optimizer | None) -> Tensor:
        """Removes rows as `eviction` says; the ids that had them.

        optimizer  the one that trains `weight`: its state of these rows begins anew, as other ids get their place. None
                   where nothing has been trained with state per row
        """
        row_state(optimizer, self.weight)  # refuses before anything has changed
        removed = self.opened().shrink()
        self._begin_anew(removed.slots, optimizer)
        return removed.ids

    def export(self, since: int | None = None, optimizer: Optimizer | None = None) -> Saved:
        """All rows, or those that a step has seen, and those that went, since the export with the mark `since`.

        optimizer  the one that trains `weight`: what it keeps for the rows is exported with them
        """
        return replace(self.opened(optimizer).export(since), numbers=numbers(optimizer, self.weight))

    def restore(self, saved: Saved, optimizer: Optimizer | None = None) -> None:
        """Holds what was exported; what changed goes on top of what is there.

        optimizer  one of the kind that was given to `export`, also one that has not made a step
        """
        table = self.opened()
        end = table.rows.index.end
        if optimizer is not None:
            begin_state(optimizer, self.weight, saved, table.rows.kinds)
        self.opened(optimizer).restore(saved)
        if optimizer is not None:
            restore_numbers(optimizer, self.weight, saved)
        spare = torch.ones(max(end, table.rows.index.end), dtype=torch.bool)
        spare[table.rows.index.slots()] = False
        self._begin_anew(spare.nonzero().flatten(), optimizer)

    def extra_repr(self) -> str:
        s = self.settings
        return f"{s.width}, capacity={self.capacity}, seed={s.seed}, {s.initial}, {s.admission}, {s.eviction}"

    def tensors(self) -> list[Tensor]:
        """All memory but the rows (see `slots.new_state`)."""
        return [self._buffers[name] for name in self.state_names]  # type: ignore[misc]

    def opened(self, optimizer: Optimizer | None = None) -> Table:
        """The table over this module's memory; with `optimizer`, also over its state per row."""
        more = row_state(optimizer, self.weight)
        return open_table(self.settings, self.weight, self.tensors(), more, self._removals)

    def _begin_anew(self, slots: Tensor, optimizer: Optimizer | None) -> None:
        """Free slots hold nothing that the next id there would find."""
        for name, held in row_state(optimizer, self.weight).items():
            held.index_fill_(0, slots.to(held.device), initial(optimizer, self.weight, name))
        self.weight.detach().index_fill_(0, slots.to(self.weight.device), 0)

    def _apply(self, fn: Callable, recurse: bool = True) -> HashTable:
        """Only rows move and change their dtype."""
        kept = {name: self._buffers.pop(name) for name in self.state_names}
        super()._apply(fn, recurse)
        self._buffers.update(kept)
        return self


class HashEmbedding(HashTable):
    """`nn.Embedding` for any int64 or int32 ids, of a vocabulary that nobody has counted.

        items = HashEmbedding(16, capacity=1_000_000, admission=CountFilter(3))
        rows = items(ids)                       (*ids.shape, 16)

    In training, an id that is seen first gets a row, made from (seed, id) alone, where `admission` lets it. In evaluation
    no row is made, and unknown ids read zeros. Gradients are sparse: train it with SGD (without momentum), Adagrad,
    SparseAdam or `syncwright.optim.RowWiseAdagrad`, which touch the rows that were looked up.
    """

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids)


def _begin_exports(table: HashTable, _: object) -> None:
    """What went before the state was loaded is not known: the next export is a whole one."""
    for each in table._removals:
        each.forget(int(table.get_buffer("clock")[1]) + 1)
