"""The recommenders of bench/sparse_workloads.py in torch. The forward returns the loss."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from bench.sparse_workloads import Layer, Recommender


def linear(values: Layer) -> nn.Linear:
    weight, bias = (torch.from_numpy(part) for part in values)
    module = nn.Linear(weight.shape[1], weight.shape[0])
    module.weight, module.bias = nn.Parameter(weight), nn.Parameter(bias)
    return module


def table(values: np.ndarray, ids: int, sparse: bool) -> nn.Module:
    weight = torch.from_numpy(values)
    if ids == 1:
        return nn.Embedding.from_pretrained(weight, freeze=False, sparse=sparse)
    return nn.EmbeddingBag.from_pretrained(weight, freeze=False, mode="sum", sparse=sparse)


class Dense(nn.Module):
    """All of a recommender but its tables: from dense features and the tables' vectors to the loss."""

    def __init__(self, recommender: Recommender) -> None:
        super().__init__()
        bottom, top = recommender.layers()
        self.bottom = nn.ModuleList(map(linear, bottom))
        self.top = nn.ModuleList(map(linear, top))
        self.dots = recommender.dots
        vectors = len(recommender.rows) + 1
        row, column = torch.tril_indices(vectors, vectors, offset=-1)
        self.register_buffer("pairs", row * vectors + column, persistent=False)

    def forward(self, dense: torch.Tensor, vectors: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """`vectors`: (examples, tables, width)."""
        for layer in self.bottom:
            dense = F.relu(layer(dense))
        x = self._dots(dense, vectors) if self.dots else torch.cat([vectors.flatten(1), dense], dim=1)
        for layer in self.top[:-1]:
            x = F.relu(layer(x))
        return F.binary_cross_entropy_with_logits(self.top[-1](x).squeeze(1), label)

    def _dots(self, dense: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        everyone = torch.cat([dense.unsqueeze(1), vectors], dim=1)
        products = torch.bmm(everyone, everyone.transpose(1, 2)).flatten(1)
        return torch.cat([dense, products.index_select(1, self.pairs)], dim=1)


class RecommenderModel(nn.Module):
    """The whole recommender. `sparse`: torch's own argument, of every table."""

    def __init__(self, recommender: Recommender, sparse: bool) -> None:
        super().__init__()
        self.tables = nn.ModuleList(table(values, recommender.ids, sparse) for values in recommender.tables())
        self.dense = Dense(recommender)
        self.ids = recommender.ids

    def forward(self, dense: torch.Tensor, ids: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        columns = ids.split(self.ids, dim=1)
        found = [
            table(part.squeeze(1) if self.ids == 1 else part) for table, part in zip(self.tables, columns, strict=True)
        ]
        return self.dense(dense, torch.stack(found, dim=1), label)
