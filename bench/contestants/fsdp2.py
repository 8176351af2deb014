"""FSDP2 (`fully_shard`): each layer is a group of its own, then the root."""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bench.contestants import Running, Seat
from bench.contestants.group import join
from bench.workloads import Workload


def start(workload: Workload, seat: Seat, compile: bool = False, reshard: bool = True) -> Running:
    """Compiled layer by layer before sharding, as torchtitan does: the gathers stay outside the graphs.

    reshard  what forward has gathered is let go, and gathered again in backward (stage 3); else it is kept (stage 2)
    """
    join(seat)
    mesh = init_device_mesh("cpu", (seat.processes,))
    model = workload.model()
    for layer in workload.layers(model):
        if compile:
            layer.compile()
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    optimizer = workload.optimizer(model, False)

    def step(*batch: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(*batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Running(step, dist.destroy_process_group)
