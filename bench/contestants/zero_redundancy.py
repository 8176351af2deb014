"""ZeroRedundancyOptimizer over DistributedDataParallel: each rank keeps the optimizer's state of some parameters."""

from __future__ import annotations

import inspect

import torch
from torch import distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from bench.contestants import Running, Seat
from bench.contestants.group import join
from bench.workloads import Workload


def start(workload: Workload, seat: Seat) -> Running:
    """Eager, as its documentation shows it; the workload's own optimizer and its numbers, per rank."""
    join(seat)
    module = DistributedDataParallel(workload.model())
    inner = workload.optimizer(module, False)
    taken = inspect.signature(type(inner)).parameters
    numbers = {key: value for key, value in inner.defaults.items() if key in taken}
    optimizer = ZeroRedundancyOptimizer(module.parameters(), optimizer_class=type(inner), **numbers)

    def step(*batch: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = module(*batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Running(step, dist.destroy_process_group)
