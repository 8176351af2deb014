"""DeepSpeed on CPU: ZeRO stages 0 to 3 over Gloo, with torch's own optimizer."""

from __future__ import annotations

import os

import torch
from torch import distributed as dist

from bench.contestants import NotAvailable, Running, Seat
from bench.contestants.group import join
from bench.workloads import Workload


def start(workload: Workload, seat: Seat, stage: int) -> Running:
    """`zero_force_ds_cpu_optimizer` off: the workload's optimizer is used, as everybody's is."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(seat.rank), "LOCAL_RANK": str(seat.rank)}
    os.environ |= {"WORLD_SIZE": str(seat.processes), "LOCAL_SIZE": str(seat.processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(seat.ports[-1])}
    try:
        import deepspeed
    except ImportError as error:
        raise NotAvailable(f"ImportError: {error}") from error
    join(seat)
    model = workload.model()
    settings = {
        "train_micro_batch_size_per_gpu": len(workload.batches(seat.rank)[0][0]),
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=workload.optimizer(model, False), config=settings)

    def step(*batch: torch.Tensor) -> torch.Tensor:
        loss = engine(*batch)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return Running(step, dist.destroy_process_group)
