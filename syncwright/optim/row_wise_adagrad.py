"""Adagrad with one number of state per row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class RowWiseAdagrad(Optimizer):
    """Adagrad whose squared gradients are summed per row, as their mean over the row.

        sum[r] += mean(g[r] ** 2)
        w[r]   -= lr * g[r] / (sqrt(sum[r]) + eps)

    A row is what one index along axis 0 selects; in a parameter with one axis it is one number, which gives Adagrad. The
    state `sum`, made by the first update, has the parameter's shape with 1 along every axis but the first. `eps` is added
    to the root, as in `torch.optim.Adagrad` and in FBGEMM's exact row-wise Adagrad. Rows of which no gradient is given, or
    a gradient of zero, keep their values and their state; with a sparse gradient (`nn.Embedding(sparse=True)`) the cost is
    that of its rows. Both kinds give the same bits.

    lr                         learning rate
    eps                        added to the root, so that nothing is divided by 0
    initial_accumulator_value  what `sum` begins with
    maximize                   goes up instead of down
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        eps: float = 1e-8,
        initial_accumulator_value: float = 0.0,
        *,
        maximize: bool = False,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("initial_accumulator_value", initial_accumulator_value)):
            if not value >= 0:
                raise ValueError(f"RowWiseAdagrad: found {name}={value}; expected a number of at least 0.")
        kept = {"lr": lr, "eps": eps, "initial_accumulator_value": initial_accumulator_value, "maximize": maximize}
        super().__init__(params, kept)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update. `closure` computes the loss again and returns it; so does `step` then."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradient = -parameter.grad if group["maximize"] else parameter.grad
                    _update(parameter, gradient, self._sum(parameter, group), group["lr"], group["eps"])
        return loss

    def _sum(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The state of a parameter; made by its first update."""
        state = self.state[parameter]
        if "sum" not in state:
            shape = [size if axis == 0 else 1 for axis, size in enumerate(parameter.shape)]
            begin = group["initial_accumulator_value"]
            state["sum"] = torch.full(shape, begin, dtype=parameter.dtype, device=parameter.device)
        return state["sum"]


def _update(parameter: Tensor, gradient: Tensor, total: Tensor, lr: float, eps: float) -> None:
    if not gradient.is_sparse:
        _update_rows(parameter, gradient, total, lr, eps)
        return
    gradient = gradient.coalesce()
    if gradient.sparse_dim() != 1:
        raise ValueError(
            f"RowWiseAdagrad: found a gradient that is sparse along {gradient.sparse_dim()} axes; expected one that is "
            "sparse along the first, as lookups give. Use its dense form: gradient.to_dense()."
        )
    ids = gradient.indices()[0]
    rows, sums = parameter[ids], total[ids]
    _update_rows(rows, gradient.values(), sums, lr, eps)
    parameter.index_copy_(0, ids, rows)
    total.index_copy_(0, ids, sums)


def _update_rows(rows: Tensor, gradient: Tensor, total: Tensor, lr: float, eps: float) -> None:
    squared, inside = gradient.square(), list(range(1, gradient.dim()))
    total.add_(squared.mean(inside, keepdim=True) if inside else squared)
    rows.addcdiv_(gradient, total.sqrt().add_(eps), value=-lr)
