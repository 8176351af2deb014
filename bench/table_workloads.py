"""The recommender of bench/tables.py: one table of any number of rows, which is deferred where it is ours."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

SEED = 20_240_401
BATCHES = 256  # different batches per trainer, used in turn: what they look up is more than a cache holds
DENSE, WIDTH, IDS, BATCH, INSIDE = 13, 16, 8, 512, 64
LEARNING_RATE = 0.01
OPTIMIZERS = ("sgd", "adagrad", "rowwise-adagrad", "lazy-adam")


class Recommender(nn.Module):
    """The sum of a bag's rows beside dense features, two layers; the forward returns the loss."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(rows, WIDTH, mode="sum")
        self.first = nn.Linear(WIDTH + DENSE, INSIDE)
        self.last = nn.Linear(INSIDE, 1)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        inside = F.relu(self.first(torch.cat([self.table(ids), dense], 1)))
        return F.binary_cross_entropy_with_logits(self.last(inside).squeeze(1), label)


@dataclass(frozen=True, slots=True)
class OneTable:
    """A table of `rows` rows; ids are uniform: nothing of it stays in a cache."""

    optimizer_name: str
    rows: int = 100_000

    def model(self) -> nn.Module:
        """Built under `syncwright.deferred()`, from one seed."""
        torch.manual_seed(SEED)
        with deferring():
            return Recommender(self.rows)

    def optimizer(self, model: nn.Module, fused: bool = False) -> torch.optim.Optimizer:
        from syncwright.optim import RowWiseAdagrad

        kinds: dict[str, Callable] = {
            "sgd": torch.optim.SGD,
            "adagrad": torch.optim.Adagrad,
            "rowwise-adagrad": RowWiseAdagrad,
            "lazy-adam": torch.optim.Adam,
        }
        return kinds[self.optimizer_name](model.parameters(), lr=LEARNING_RATE)

    def batches(self, rank: int) -> list[tuple[torch.Tensor, ...]]:
        generator = torch.Generator().manual_seed(SEED + 1 + rank)
        return [
            (
                torch.randn(BATCH, DENSE, generator=generator),
                torch.randint(0, self.rows, (BATCH, IDS), generator=generator),
                torch.randint(0, 2, (BATCH,), generator=generator).float(),
            )
            for _ in range(BATCHES)
        ]


def deferring() -> AbstractContextManager:
    """`syncwright.deferred()`, where the workload's own process has it."""
    try:
        import syncwright
    except ImportError:
        return nullcontext()
    return syncwright.deferred(above=2**20)


WORKLOADS = {name: OneTable(name) for name in OPTIMIZERS}
