"""What an optimizer keeps for the rows of a table: found, saved and begun anew."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.optim import Optimizer

from syncwright.errors import TableError
from syncwright.tables.lazily import zeros
from syncwright.tables.saved import Saved


def row_state(optimizer: Optimizer | None, weight: Tensor) -> dict[str, Tensor]:
    """The state with a row for each row of `weight`, by name; not copied. Raises `TableError` where it is sparse."""
    held = {} if optimizer is None else optimizer.state.get(weight, {})
    found = {n: t for n, t in held.items() if isinstance(t, Tensor) and t.dim() and len(t) == len(weight)}
    for name, tensor in found.items():
        if tensor.is_sparse:
            raise TableError(
                f"'{name}' of {type(optimizer).__name__} is a sparse tensor; expected state with a row for each row of the "
                "table. Use SGD without momentum, Adagrad, SparseAdam or RowWiseAdagrad."
            )
    return found


def numbers(optimizer: Optimizer | None, weight: Tensor) -> dict[str, Tensor]:
    """The state that all rows have together (a count of steps), as tensors without axes."""
    held = {} if optimizer is None else optimizer.state.get(weight, {})
    found = {n: torch.as_tensor(v).detach() for n, v in held.items() if isinstance(v, int | float | Tensor)}
    return {n: t.clone() for n, t in found.items() if not t.dim()}


def begin_state(optimizer: Optimizer, weight: Tensor, saved: Saved, own: Collection[str]) -> None:
    """The optimizer has the state that was saved beside the table's `own` columns; what it lacked begins."""
    state = optimizer.state[weight]
    for name, column in saved.rows.columns.items():
        if name not in own and name not in state:
            state[name] = zeros((len(weight), *column.shape[1:]), column.dtype, weight.device)
            if begin := initial(optimizer, weight, name):
                state[name].fill_(begin)


def restore_numbers(optimizer: Optimizer, weight: Tensor, saved: Saved) -> None:
    """The inverse of `numbers`."""
    for name, number in saved.numbers.items():
        optimizer.state[weight][name] = number.clone() if number.is_floating_point() else number.item()


def initial(optimizer: Optimizer | None, weight: Tensor, name: str) -> float:
    """What state begins with: the sums of Adagrad and RowWiseAdagrad as they are told, all else at zero."""
    groups = [] if optimizer is None or name != "sum" else optimizer.param_groups
    mine = [group for group in groups if any(p is weight for p in group["params"])]
    return mine[0].get("initial_accumulator_value", 0.0) if mine else 0.0
