"""Tables of any ids of the user's model, whole: out of the module and its optimizer, and into them."""

from __future__ import annotations

from dataclasses import replace

import torch

from syncwright.capture.state import Binding
from syncwright.errors import TableError
from syncwright.program import Role
from syncwright.tables import Saved


def out_of(binding: Binding, name: str) -> tuple[Saved, dict[str, torch.Tensor]]:
    """What a module holds, with its optimizer's state per row; and what state of a new row begins with, by its name."""
    table, values = binding.tables[name].opened(), binding.values()
    saved, slots = table.snapshot(), table.rows.index.slots()
    state = {key: values[full].detach() for key, full in _state(binding, name).items()}
    rows = {key: value for key, value in state.items() if value.dim()}
    columns = {**saved.rows.columns, **{key: value.index_select(0, slots).cpu() for key, value in rows.items()}}
    numbers = {key: value for key, value in state.items() if not value.dim()}
    begin = {key: _one_number(f"{name}.{key}", value[-1]) for key, value in rows.items()}
    return replace(saved, rows=replace(saved.rows, columns=columns), numbers=numbers), begin


def into(binding: Binding, name: str, saved: Saved) -> None:
    """The module holds what was saved, and its optimizer the state per row. Raises `TableFull` where it does not fit.

    State that all rows have together goes the way of other variables (`Binding.write`).
    """
    module = binding.tables[name]
    owner = next(
        (
            each
            for each in binding.optimizers.values()
            for g in each.param_groups
            for p in g["params"]
            if p is module.weight
        ),
        None,
    )
    module.restore(replace(saved, numbers={}), owner)


def as_its_own(binding: Binding, name: str, saved: Saved) -> Saved:
    """Numbers as the optimizer itself keeps them: counts that are Python's are whole."""
    counted = {key for key, full in _state(binding, name).items() if binding.is_whole(full)}
    numbers = {key: value.long() if key in counted else value for key, value in saved.numbers.items()}
    return replace(saved, numbers=numbers)


def _state(binding: Binding, name: str) -> dict[str, str]:
    """The full names of what an optimizer keeps for a table, by what it calls it."""
    return {
        slot.key: full
        for full, slot in binding.states.items()
        if binding.variables[full].role is Role.STATE and binding.variables[full].of == name
    }


def _one_number(name: str, row: torch.Tensor) -> torch.Tensor:
    """What a new row begins with: the same number everywhere, as in the row that no id has."""
    first = row.reshape(-1)[0].double()
    if not bool((row == first.to(row.dtype)).all()):
        raise TableError(
            f"'{name}' begins with different numbers in one row; expected one number everywhere, as servers make rows. Use SGD, "
            "Adagrad, RowWiseAdagrad, Adam or SparseAdam."
        )
    return first.cpu()
