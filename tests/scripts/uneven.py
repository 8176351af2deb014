"""Trainers whose loaders end after different numbers of batches: `python uneven.py FOLDER`, once per trainer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import syncwright
from syncwright import AllReduce, ParameterServer, Rules, Shard

TRAINERS = 3
EPOCHS = ((5, 3, 1), (0, 2, 4))
"""How many batches the loaders of the trainers have, by epoch."""
MIXED = Rules(AllReduce(), (("0.weight", Shard(stage=3)), ("2.*", ParameterServer())))
PLANS: dict[str, Rules] = {
    "mixed": MIXED,
    "late": Rules(AllReduce(delay=1), (("2.weight", AllReduce()),), accumulate=2),
    "silent": Rules(ParameterServer()),
}


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    return model, torch.optim.Adam(model.parameters(), lr=0.05)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss


def silent(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Nothing is averaged of what it returns: over servers a trainer's step is done before others have begun it."""
    optimizer.zero_grad()
    errors = ((model(x) - y) ** 2).mean(1)
    errors.mean().backward()
    optimizer.step()
    return errors


def step_of(name: str) -> Callable:
    return silent if name == "silent" else step


def batches(epoch: int, trainer: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    made = torch.Generator().manual_seed(100 * epoch + trainer)
    count, size = EPOCHS[epoch][trainer], 2 + trainer % 2
    return [(torch.randn(size, 4, generator=made), torch.randn(size, 2, generator=made)) for _ in range(count)]


def train(name: str, folder: Path) -> None:
    model, optimizer = build()
    given = syncwright.distribute(step_of(name), model, optimizer, plan=PLANS[name], compile=False)
    losses = []
    with given as trainer:
        for epoch in range(len(EPOCHS)):
            losses.append([trainer.step(*batch) for batch in trainer.own(batches(epoch, trainer.rank))])
    torch.save({"losses": losses, "end": model.state_dict()}, folder / f"{name} {trainer.rank}.pt")


if __name__ == "__main__":
    for each in PLANS:
        train(each, Path(sys.argv[1]))
