"""Lookups of tables of any 64-bit ids in a trace: by the ids themselves, or in the rows that a table has."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from syncwright.capture.lines import current_line
from syncwright.capture.state import Binding
from syncwright.errors import CaptureError
from syncwright.nn.hash_embedding import HashTable
from syncwright.nn.slots import table_find
from syncwright.program import Variable


class Unbounded:
    """Which tables a step looks up by ids. Changes while it is traced.

        before  %s = table_slots(ids, weight, ...), %y = embedding(weight, %s, 1000)          (and with it, rows are made)
        after   %y = embedding(weight, ids)

    So no slot is in the graph, and none is made in it: who keeps the table does that. A table in evaluation mode is read as
    it is: %s = table_find(...).

    remote  in an evaluation, the tables that are kept elsewhere: they are looked up by ids in any mode, others never; None
            in a training step
    """

    def __init__(self, binding: Binding, remote: Collection[str] | None = None):
        self._names = {id(table): name for name, table in binding.tables.items()}
        self._lazy, self._remote = binding.lazy, remote
        self.settings = {name: table.settings for name, table in binding.tables.items()}
        self.found: set[str] = set()

    @contextmanager
    def traced(self) -> Iterator[None]:
        """While open, lookups are those."""
        places, slots = HashTable.places, HashTable.slots
        HashTable.places = self._places()  # type: ignore[method-assign]
        HashTable.slots = self._slots(slots)  # type: ignore[method-assign]
        try:
            yield
        finally:
            HashTable.places, HashTable.slots = places, slots  # type: ignore[method-assign]

    def marked(self, variable: Variable) -> Variable:
        """A table that a training step looks up by ids says so."""
        if variable.name not in self.found or self._remote is not None:
            return variable
        return replace(variable, unbounded=self.settings[variable.name])

    def _slots(self, own: Callable):
        def slots(table: HashTable, ids: Tensor) -> Tensor:
            if table.training:
                raise CaptureError(
                    f"{current_line()}: slots() of a {type(table).__name__} that trains; they are known only where its rows are "
                    "kept. Expected lookups of rows. Call the module, or rows(ids)."
                )
            return own(table, ids)

        return slots

    def _places(self):
        def places(table: HashTable, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
            name = self._names[id(table)]
            if table.training if self._remote is None else name in self._remote:
                self.found.add(name)
                return ids.long(), {"padding_idx": None, "sparse": name in self._lazy}
            slots = table_find(ids, table.weight.detach(), table.tensors(), table.settings.to_text())
            return slots, {"padding_idx": table.capacity, "sparse": True}

        return places
