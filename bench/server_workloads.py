"""What bench/servers.py sends through servers: variables of mixed sizes, or the MLP of bench/workloads.py in training.

Importing this needs no torch: not every peer has it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from bench.workloads import Batch

SEED = 20_240_302
MEGABYTE = 1_000_000
SIZES = (1, 10, 100)
BATCHES = 8


def counts(nbytes: int) -> tuple[int, ...]:
    """Elements of float32 variables of mixed sizes, `nbytes` together: a half, a quarter, an eighth, ... and 16 small.

    counts(1024) == (128, 64, 32, 16, 1 x 15, 1)
    """
    total = nbytes // 4
    large = [total // 2, total // 4, total // 8, total // 16]
    rest = total - sum(large)
    small = [rest // 16] * 15
    return (*large, *small, rest - sum(small))


def shares(sizes: Sequence[int], servers: int) -> list[list[int]]:
    """Which variables each server keeps: every one goes to the server with the least so far.

    shares([8, 4, 2, 2], 2) == [[0], [1, 2, 3]]
    """
    found: list[list[int]] = [[] for _ in range(servers)]
    loads = [0] * servers
    for place, size in enumerate(sizes):
        least = loads.index(min(loads))
        found[least].append(place)
        loads[least] += size
    return found


@dataclass(frozen=True, slots=True)
class Transfer:
    """A step that computes next to nothing: every variable is pulled, and its gradient pushed."""

    name: str
    nbytes: int

    def counts(self) -> tuple[int, ...]:
        return counts(self.nbytes)

    def model(self) -> torch.nn.Module:
        from bench.server_models import Variables

        return Variables(self.counts())

    def optimizer(self, model: torch.nn.Module, fused: bool = False) -> torch.optim.Optimizer:
        return self.optimizer_of(model.parameters())

    def optimizer_of(self, parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(parameters, lr=0.1, foreach=False)

    def batches(self, rank: int) -> list[Batch]:
        import torch

        return [(torch.full((4,), 1.0 + rank + place),) for place in range(BATCHES)]

    def learner(self, rank: int) -> Callable[[Sequence[torch.Tensor]], tuple[float, list[torch.Tensor]]]:
        """From a model's values to a loss and gradients, here always the same: what a bare server is asked for."""
        import torch

        gradients = [torch.full((count,), 1.0) for count in self.counts()]
        return lambda values: (0.0, gradients)


@dataclass(frozen=True, slots=True)
class Training:
    """A workload of bench/workloads.py, trained over servers."""

    name: str
    sizes: tuple[int, ...]
    batch: int
    lr: float

    def model(self) -> torch.nn.Module:
        return self._workload().model()

    def optimizer(self, model: torch.nn.Module, fused: bool = False) -> torch.optim.Optimizer:
        return self._workload().optimizer(model, fused)

    def optimizer_of(self, parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.Adam(parameters, lr=self.lr)

    def batches(self, rank: int) -> list[Batch]:
        return self._workload().batches(rank)

    def learner(self, rank: int) -> Callable[[Sequence[torch.Tensor]], tuple[float, list[torch.Tensor]]]:
        """From a model's values to a loss and gradients on this trainer's batches in turn."""
        from bench.server_models import learner

        return learner(self.model(), itertools.cycle(self.batches(rank)))

    def _workload(self):
        from bench.workloads import WORKLOADS

        return WORKLOADS[self.name]

    # --- for who has no torch: the same sizes, values and examples of its own ---

    def layers(self) -> list[tuple[np.ndarray, np.ndarray]]:
        source = np.random.default_rng(SEED)
        return [
            ((source.random((after, before), np.float32) - 0.5) * np.float32(2 * before**-0.5), np.zeros(after, "f4"))
            for before, after in itertools.pairwise(self.sizes)
        ]

    def arrays(self, rank: int) -> list[tuple[np.ndarray, np.ndarray]]:
        teacher = np.random.default_rng(SEED).standard_normal((self.sizes[0], self.sizes[-1]))
        source = np.random.default_rng([SEED, 1, rank])
        examples = [source.standard_normal((self.batch, self.sizes[0]), np.float32) for _ in range(BATCHES)]
        return [(x, (x @ teacher).argmax(axis=1)) for x in examples]


WORKLOADS = {f"transfer-{size}": Transfer(f"transfer-{size}", size * MEGABYTE) for size in SIZES} | {
    "mlp": Training("mlp", (256, 1024, 1024, 1024, 10), 64, 1e-3)
}
