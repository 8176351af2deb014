"""Run by tests/distributed/test_deferred_processes.py: a deferred table on servers; what trainers took, and what came out."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import syncwright
from syncwright import ParameterServer, Rules
from syncwright.capture.private import FakeTensor
from syncwright.deferred.tensor import Deferred
from syncwright.plan import Even

ROWS, WIDTH, STEPS, AT_A_TIME = 300_000, 16, 4, 10_000
PLAN = Rules(ParameterServer(partition=Even(3)))


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(ROWS, WIDTH, mode="sum", padding_idx=7)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


class Largest(TorchDispatchMode):
    """The most bytes of one tensor that this process has made. Changes with every operation."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, Deferred | FakeTensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes() if tensor.device.type == "cpu" else 0)
        return made


def build(deferred: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(11)
    if not deferred:
        model: nn.Module = Bags()
    else:
        with syncwright.deferred(above=2**20):
            model = Bags()
    return model, torch.optim.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = (model(ids) - y).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randint(0, ROWS, (8, 5), generator=generator), torch.randn(8, 1, generator=generator))
        for _ in range(STEPS)
    ]


def said(losses: list[float], rows: torch.Tensor, state: torch.Tensor) -> str:
    """What the job comes to."""
    digest = hashlib.sha256(rows.numpy().tobytes() + state.numpy().tobytes()).hexdigest()
    return " ".join([*(loss.hex() for loss in losses), digest])


def main(folder: Path) -> None:
    with Largest() as largest:
        model, optimizer = build(deferred=True)
        with syncwright.distribute(step, model, optimizer, plan=PLAN, compile=False) as trainer:
            losses = [float(trainer.step(*batch)) for batch in trainer.shard(batches())]
            rows, state = (
                [rows.clone() for _, rows in trainer.rows(name, AT_A_TIME)]
                for name in ("table.weight", "table.weight.sum")
            )
            trainer.sync()
    assert isinstance(model.table.weight, Deferred)
    (folder / f"{trainer.rank}.nbytes").write_text(str(largest.nbytes))
    (folder / f"{trainer.rank}.said").write_text(said(losses, torch.cat(rows), torch.cat(state)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
