"""Plain PyTorch without any peer: one process, or several that know nothing of each other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch

from bench.contestants import Running, Seat
from bench.workloads import Workload


def start(
    workload: Workload,
    seat: Seat,
    compile: bool = False,
    fused: bool = False,
    model: Mapping[str, object] | None = None,
    trainers: int | None = None,
) -> Running:
    """
    model     arguments of the workload's model
    trainers  the batch is the one of so many trainers together; None: of one
    """
    module = workload.model(**(model or {}))
    optimizer = workload.optimizer(module, fused)
    forward = torch.compile(module) if compile else module

    def step(*batch: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = forward(*batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    batches = None if trainers is None else itertools.cycle(whole_batches(workload, trainers))
    return Running(step, lambda: None, batches)


def whole_batches(workload: Workload, trainers: int) -> list[tuple[torch.Tensor, ...]]:
    """The batches of all trainers together, trainer 0's examples first."""
    of_trainers = [workload.batches(rank) for rank in range(trainers)]
    return [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*of_trainers, strict=True)]
