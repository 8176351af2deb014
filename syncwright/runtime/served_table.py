"""A server's part of a table of any ids, in the steps of a job; and how programs read and write it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from syncwright.program import Program
from syncwright.runtime.rows import RowGradient
from syncwright.tables import Table

Compute = Callable[[Program, Mapping[str, object]], Mapping[str, object]]


class ServedTable:
    """Changes with every step.

    In step, a step of the table is a step of the job: it begins with the first lookup and ends with the update, so an id is
    seen once in it, whoever looks it up. Where updates are made as contributions come, each lookup of a trainer's step begins
    one. Evaluations begin none, and make no rows.
    """

    def __init__(self, table: Table, in_step: bool):
        self.table, self._in_step = table, in_step
        self._begun = False

    def slots(self, ids: torch.Tensor, training: bool) -> torch.Tensor:
        """Where the rows of ids are, -1 where there is none. In training, rows are made of ids that are admitted."""
        if training:
            self._begin()
        return self.table.slots(ids, create=training)

    def end_step(self) -> None:
        """The update has run. A step in which nobody has looked anything up was one, too."""
        if self._in_step:
            self._begin()
        self._begun = False

    def _begin(self) -> None:
        if not self._begun:
            self.table.advance()
        self._begun = self._in_step


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """The value of a variable whose rows stand in a table: the table's rows, or state per row."""

    table: ServedTable
    name: str

    def at(self, slots: torch.Tensor) -> torch.Tensor:
        """Rows; zeros for slots of -1."""
        return self.table.table.gather(self.name, slots)

    def put(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        self.table.table.scatter(self.name, slots, rows)


def update_by_id(compute: Compute, program: Program, inputs: Mapping[str, object]) -> dict[str, object]:
    """Runs a row-wise update on the rows of its gradient alone, and writes them back in place.

    before  reads w, w.sum (columns of a table) and w.grad (rows of the ids 7 and -2**40)
    after   w and w.sum with the rows of these ids changed: the same columns

    Ids that have no row (they went since they were looked up) are left out.
    """
    columns = {name: value for name, value in inputs.items() if isinstance(value, Column)}
    gradient = next(value for value in inputs.values() if isinstance(value, RowGradient))
    table = next(iter(columns.values())).table
    slots = table.slots(gradient.ids, training=False)
    there = slots >= 0
    slots, rows = slots[there], gradient.rows[there]
    given = {name: rows if isinstance(value, RowGradient) else value for name, value in inputs.items()}
    given |= {name: column.at(slots) for name, column in columns.items()}
    results = dict(compute(program, given))
    for name in results.keys() & columns.keys():
        new = results[name]
        assert isinstance(new, torch.Tensor), "rows are tensors"
        columns[name].put(slots, new)
        results[name] = columns[name]
    table.end_step()
    return results
