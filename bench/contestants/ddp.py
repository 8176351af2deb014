"""DistributedDataParallel, as its documentation says: wrap, then compile the wrapped model."""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bench.contestants import Running, Seat
from bench.contestants.group import join
from bench.workloads import Workload


def start(
    workload: Workload,
    seat: Seat,
    compile: bool = False,
    fused: bool = False,
    bucket_view: bool = False,
) -> Running:
    """Forward and backward compiled on request; the optimizer stays eager: torch's default, or fused."""
    join(seat)
    model = DistributedDataParallel(workload.model(), gradient_as_bucket_view=bucket_view)
    optimizer = workload.optimizer(model, fused)
    forward = torch.compile(model) if compile else model

    def step(*batch: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = forward(*batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Running(step, dist.destroy_process_group)
