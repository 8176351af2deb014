"""The recommenders of bench/sparse.py: sizes, initial values, batches, in NumPy alone: not every peer has torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from bench.must_move import bytes_per_step

if TYPE_CHECKING:
    import torch

SEED = 20_240_301
BATCHES = 8  # different batches per trainer, used in turn
DENSE = 13  # numbers beside the ids of every example

Layer = tuple[np.ndarray, np.ndarray]  # weight (out, in), bias


@dataclass(frozen=True, slots=True)
class Recommender:
    """Tables of rows, looked up and joined with what comes of the dense features, into one number per example.

    rows       of each table
    width      of a row
    ids        per example and table; more than one: the sum of their rows
    power      ids are drawn with frequencies rank**-power; None: uniformly
    bottom     widths of the layers that the dense features go through first; the last must be `width`, or none
    dots       joined by the dot products of all pairs of vectors (tables' and bottom's); otherwise side by side
    top        widths of the layers behind, before the last, which gives one number
    batch      examples per trainer
    optimizer  "sgd" or "adagrad"
    """

    name: str
    rows: tuple[int, ...]
    width: int
    ids: int
    power: float | None
    bottom: tuple[int, ...]
    dots: bool
    top: tuple[int, ...]
    batch: int
    optimizer_name: str
    lr: float

    # --- values ---

    def tables(self) -> list[np.ndarray]:
        source = np.random.default_rng(SEED)
        return [(source.random((rows, self.width), np.float32) - 0.5) * 0.1 for rows in self.rows]

    def layers(self) -> tuple[list[Layer], list[Layer]]:
        """The bottom's and the top's."""
        source = np.random.default_rng(SEED + 1)
        bottom = [layer(source, *sizes) for sizes in pairwise((DENSE, *self.bottom))]
        top = [layer(source, *sizes) for sizes in pairwise((self.joined, *self.top, 1))]
        return bottom, top

    @property
    def joined(self) -> int:
        """The width of what the top gets."""
        if not self.dots:
            return len(self.rows) * self.width + (self.bottom or (DENSE,))[-1]
        vectors = len(self.rows) + 1
        return self.width + vectors * (vectors - 1) // 2

    # --- batches ---

    def arrays(self, rank: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """A trainer's batches: dense (batch, 13), ids (batch, tables * ids), labels (batch,)."""
        source = np.random.default_rng([SEED, 2, rank])
        found = []
        for _ in range(BATCHES):
            dense = source.standard_normal((self.batch, DENSE), np.float32)
            ids = [self._draw(source, rows) for rows in self.rows]
            label = (dense[:, 0] + dense[:, 1] > 0).astype(np.float32)
            found.append((dense, np.concatenate(ids, axis=1), label))
        return found

    def _draw(self, source: np.random.Generator, rows: int) -> np.ndarray:
        if self.power is None:
            return source.integers(rows, size=(self.batch, self.ids))
        uniform = source.random((self.batch, self.ids))
        return scattered(power_law(uniform, rows, self.power), rows)

    def batches(self, rank: int) -> list[tuple[torch.Tensor, ...]]:
        import torch

        return [tuple(map(torch.from_numpy, batch)) for batch in self.arrays(rank)]

    def must_move(self, trainers: int) -> float:
        """Bytes that a synchronous step of so many trainers must move, mean over the batches."""
        layers = [part for group in self.layers() for weights in group for part in weights]
        return bytes_per_step(
            [[self.unique_rows(ids) for _, ids, _ in self.arrays(rank)] for rank in range(trainers)],
            row_nbytes=4 * self.width,
            dense_nbytes=sum(part.nbytes for part in layers),
        )

    def unique_rows(self, ids: np.ndarray) -> int:
        """Different rows of all tables in one batch."""
        return sum(len(np.unique(table)) for table in np.split(ids, len(self.rows), axis=1))

    # --- in torch ---

    def model(self, sparse: bool = False) -> torch.nn.Module:
        from bench.sparse_models import RecommenderModel

        return RecommenderModel(self, sparse)

    def optimizer(self, model: torch.nn.Module, fused: bool = False) -> torch.optim.Optimizer:
        return self.optimizer_of(model.parameters(), fused)

    def optimizer_of(self, parameters: Iterable[torch.Tensor], fused: bool = False) -> torch.optim.Optimizer:
        import torch

        kind = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}[self.optimizer_name]
        return kind(parameters, lr=self.lr, fused=True if fused else None)


def layer(source: np.random.Generator, before: int, after: int) -> Layer:
    scale = np.float32(2 * before**-0.5)
    return (source.random((after, before), np.float32) - 0.5) * scale, np.zeros(after, np.float32)


def power_law(uniform: np.ndarray, rows: int, power: float) -> np.ndarray:
    """Ranks 0 to rows - 1 with frequencies near (rank + 1)**-power, from uniform draws of [0, 1)."""
    exponent = 1.0 - power
    reach = (rows + 1.0) ** exponent
    ranks = (1.0 + uniform * (reach - 1.0)) ** (1.0 / exponent)
    return np.minimum(ranks.astype(np.int64), rows) - 1


def scattered(ranks: np.ndarray, rows: int) -> np.ndarray:
    """Another order of the rows, so that frequent ones do not lie together."""
    return ranks * 2_654_435_761 % rows


def log_spaced(least: int, most: int, count: int) -> tuple[int, ...]:
    return tuple(int(rows) for rows in np.geomspace(least, most, count).round())


def bag(optimizer_name: str, lr: float) -> Recommender:
    return Recommender(f"bag-{optimizer_name}", (200_000,), 32, 8, None, (), False, (64,), 512, optimizer_name, lr)


def dlrm(optimizer_name: str, lr: float) -> Recommender:
    rows = log_spaced(1_000, 2_000_000, 26)
    return Recommender(f"dlrm-{optimizer_name}", rows, 16, 1, 1.05, (64, 16), True, (64,), 1024, optimizer_name, lr)


WORKLOADS = {
    workload.name: workload
    for workload in (bag("sgd", 0.1), bag("adagrad", 0.01), dlrm("sgd", 0.1), dlrm("adagrad", 0.01))
}
