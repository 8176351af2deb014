"""`torch.optim.SparseAdam` on a dense gradient and the rows that it touches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.optim import Optimizer, SparseAdam

from syncwright.errors import CaptureError


def is_sparse_adam(optimizer: Optimizer) -> bool:
    """Whether `update` stands for the optimizer's step: SparseAdam, or a subclass that changes nothing of it."""
    return isinstance(optimizer, SparseAdam) and type(optimizer).step is SparseAdam.step


@torch.no_grad()
def update(optimizer: Optimizer, names: Mapping[int, str], touched: Mapping[str, torch.Tensor]) -> None:
    """One step, in the arithmetic of `torch.optim._functional.sparse_adam`, which works on the touched rows alone.

    names    of the parameters, by id
    touched  (rows, 1), greater than 0 where a row counts
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                name = names[id(parameter)]
                if name not in touched:
                    raise CaptureError(
                        f"'{name}' has a dense gradient, and SparseAdam takes only sparse ones. Expected a table that is "
                        "read by lookups with sparse=True alone. Build nn.Embedding(..., sparse=True), or use Adam."
                    )
                _update(parameter, parameter.grad, touched[name] > 0, optimizer.state[parameter], group)


def _update(parameter: torch.Tensor, gradient: torch.Tensor, touched: torch.Tensor, state: dict, group: dict) -> None:
    beta1, beta2 = group["betas"]
    state["step"] += 1
    step = state["step"].item()
    gradient = -gradient if group["maximize"] else gradient
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    new_mean = gradient.sub(mean).mul(1 - beta1) + mean
    new_square = gradient.pow(2).sub(square).mul(1 - beta2) + square
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    step_size = group["lr"] * torch.sym_sqrt(correction2) / correction1
    change = -step_size * new_mean.div(new_square.sqrt().add(group["eps"]))
    parameter.copy_(torch.where(touched, parameter + change, parameter))
    mean.copy_(torch.where(touched, new_mean, mean))
    square.copy_(torch.where(touched, new_square, square))
