"""DistributedDataParallel, as its documentation says: wrap, then compile the wrapped model."""

from __future__ import annotations

from collections.abc import Mapping

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
    model: Mapping[str, object] | None = None,
) -> Running:
    """Forward and backward compiled on request; the optimizer stays eager: torch's default, or fused.

    model: arguments of the workload's model.
    """
    join(seat)
    module = DistributedDataParallel(workload.model(**(model or {})), gradient_as_bucket_view=bucket_view)
    optimizer = workload.optimizer(module, fused)
    forward = torch.compile(module) if compile else module

    def step(*batch: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = forward(*batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Running(step, dist.destroy_process_group)
