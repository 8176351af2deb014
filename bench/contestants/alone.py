"""Plain PyTorch without any peer: one process, or several that know nothing of each other."""

from __future__ import annotations

import torch

from bench.contestants import Running, Seat
from bench.workloads import Workload


def start(workload: Workload, seat: Seat, compile: bool = False, fused: bool = False) -> Running:
    model = workload.model()
    optimizer = workload.optimizer(model, fused)
    forward = torch.compile(model) if compile else model

    def step(*batch: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = forward(*batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Running(step, lambda: None)
