"""Syncwright through its public names only. `plan="independent"` is the limit: every variable Local."""

from __future__ import annotations

import os

import torch
from torch import nn

from bench.contestants import NotAvailable, Running, Seat
from bench.workloads import Workload


def step(model: nn.Module, optimizer: torch.optim.Optimizer, *batch: torch.Tensor) -> torch.Tensor:
    """The step as its user writes it, for one device."""
    optimizer.zero_grad()
    loss = model(*batch)
    loss.backward()
    optimizer.step()
    return loss


def start(workload: Workload, seat: Seat, plan: str, compile: bool, sockets: bool = False) -> Running:
    """The ranks find each other through torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    sockets  collectives go over TCP, as between hosts, and not through memory that trainers share
    """
    if sockets:
        os.environ["SYNCWRIGHT_SHARED_MEMORY"] = "0"
    try:
        from syncwright import distribute
    except ImportError as error:
        raise NotAvailable(f"ImportError: {error.msg}") from error
    model = workload.model()
    optimizer = workload.optimizer(model, False)
    trainer = distribute(step, model, optimizer, plan=plan, compile=compile)
    return Running(trainer.step, trainer.close)
