"""A job whose gradients are compressed in every way, each in a bucket of its own.

argument: a folder, where each trainer writes what it ends with, and the losses: by memory that they share, then by sockets
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn

import syncwright
from syncwright import AllReduce, Rules
from syncwright.plan import Cast, ErrorFeedback, Int8, PowerSGD, TopK
from syncwright.plan.compression import Compression
from syncwright.runtime.deadlines import Deadlines

STEPS, WIDTH = 12, 24
SHARED = {"memory": "1", "sockets": "0"}
WAYS: tuple[Compression | None, ...] = (
    *(None, Cast("bfloat16"), ErrorFeedback(Cast("float16")), Int8(64), ErrorFeedback(Int8())),
    *(TopK(0.05), TopK(0.02, momentum=0.5, warmup_steps=4), PowerSGD(2, start_step=2), PowerSGD(1)),
)
PLAN = Rules.of(AllReduce(), {f"{2 * at}.*": AllReduce(0.0, compress=by) for at, by in enumerate(WAYS)})


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(5)
    layers = [each for _ in WAYS for each in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss


def batch(trainer: int, at: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * at + trainer)
    return torch.randn(8, WIDTH, generator=generator), torch.randn(8, 3, generator=generator)


def main(folder: Path, way: str) -> None:
    os.environ["SYNCWRIGHT_SHARED_MEMORY"] = SHARED[way]
    model, optimizer = build()
    with syncwright.distribute(
        step, model, optimizer, plan=PLAN, compile=False, deadlines=Deadlines(wait=60)
    ) as trainer:
        losses = [float(trainer.step(*batch(trainer.rank, at))) for at in range(STEPS)]  # type: ignore[arg-type]
    torch.save((model.state_dict(), losses), folder / f"{way}.{trainer.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for way in SHARED:
        main(Path(sys.argv[1]), way)
