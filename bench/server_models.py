"""What bench/server_workloads.py needs of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn


class Variables(nn.Module):
    """Parameters of the given sizes; the loss reads one element of each, so that nearly nothing is computed."""

    def __init__(self, counts: Sequence[int]) -> None:
        super().__init__()
        self.values = nn.ParameterList(torch.zeros(count) for count in counts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.stack([value[0] for value in self.values]).sum() * x).mean()


def learner(
    model: nn.Module, batches: Iterator[tuple[torch.Tensor, ...]]
) -> Callable[[Sequence[torch.Tensor]], tuple[float, list[torch.Tensor]]]:
    """A trainer that keeps nothing but a model to compute with."""
    parameters = list(model.parameters())

    def learn(values: Sequence[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
        loss = model(*next(batches))
        return loss.item(), list(torch.autograd.grad(loss, parameters))

    return learn


class Shelf:
    """The variables that one server keeps. Changes with every push.

    parameters  the workload's, by place; `kept` are the places of this server's
    """

    def __init__(self, parameters: Sequence[torch.Tensor], kept: Sequence[int], optimizer: Callable) -> None:
        self.parameters = [parameters[place] for place in kept]
        self.optimizer = optimizer(self.parameters)

    def push(self, contributions: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """One update with the mean of what trainers gave; the new values."""
        for parameter, gradients in zip(self.parameters, zip(*contributions, strict=True), strict=True):
            parameter.grad = gradients[0] if len(gradients) == 1 else sum(gradients) / len(gradients)
        self.optimizer.step()
        return self.values()

    def values(self) -> list[torch.Tensor]:
        return [parameter.detach() for parameter in self.parameters]
