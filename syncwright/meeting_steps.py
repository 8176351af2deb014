"""What trainers that train alone do when they meet, each written as a user writes a training step.

`model` holds what was there after the last exchange (`base`), `latest` what a trainer has come to. A mean and an outer
optimizer are one step, with another optimizer: base - mean(base - latest) is base + mean(latest - base).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

Tensors = Mapping[str, torch.Tensor]
Returned = Mapping[str, Tensors]
"""By what it is, which is no module's name, by variable."""


def meet(model: nn.Module, optimizer: torch.optim.Optimizer, latest: Tensors) -> tuple:
    """One update by mean(base - latest); buffers become the latest."""
    optimizer.zero_grad()
    values = dict(model.named_parameters())
    torch.autograd.backward(list(values.values()), [v.detach() - latest[name] for name, v in values.items()])
    optimizer.step()
    for name, buffer in model.named_buffers():
        buffer.copy_(latest[name])
    return ()


def meet_at_servers(model: nn.Module, optimizer: torch.optim.Optimizer, latest: Tensors) -> Returned:
    """The same, and the new values: servers have them, and trainers go on from them."""
    meet(model, optimizer, latest)
    return {"new value": {name: value.detach().clone() for name, value in model.named_parameters()}}


def geo(trainers: int) -> Callable:
    """Each trainer's difference is added as it comes; the others' differences come back (Paddle's GEO).

    w is the server's value. difference = (latest - base) / trainers, w += difference, latest += w - (base + difference),
    base = w. 2 trainers, w and base 1.0, latest 1.6 and 0.8: trainer 0 leaves w 1.3 and goes on from 1.6, then trainer 1
    leaves w 1.2 and goes on from 1.1.
    """

    def meet(model: nn.Module, optimizer: torch.optim.Optimizer, latest: Tensors, base: Tensors) -> Returned:
        optimizer.zero_grad()
        values = dict(model.named_parameters())
        moved = {name: (latest[name] - base[name]) / trainers for name in values}
        torch.autograd.backward(list(values.values()), [-moved[name] for name in values])
        optimizer.step()
        now = {name: value.detach().clone() for name, value in values.items()}
        mine = {name: latest[name] + (now[name] - (base[name] + moved[name])) for name in values}
        return {"latest value": mine, "next base": now}

    return meet


def geo_of_rows(trainers: int) -> Callable:
    """`geo` for the rows `ids` of a table, which are distinct; `latest` and `base` are of these rows.

    The rows are pulled before the difference is pushed, and the trainer adds its own: one way there and back.
    """

    def meet(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ids: torch.Tensor,
        latest: torch.Tensor,
        base: torch.Tensor,
    ) -> Tensors:
        optimizer.zero_grad()
        (table,) = model.parameters()
        moved = (latest - base) / trainers
        rows = F.embedding(ids, table)
        torch.autograd.backward([rows], [-moved])
        optimizer.step()
        now = rows.detach() + moved
        return {"latest value": latest + (now - (base + moved)), "next base": now}

    return meet
