"""Sums, means or maxima of rows for ids that nobody has counted."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from syncwright.errors import TableError
from syncwright.nn.hash_embedding import HashTable


class HashEmbeddingBag(HashTable):
    """`nn.EmbeddingBag` for any int64 or int32 ids, of a vocabulary that nobody has counted; see `HashEmbedding`.

        bag = HashEmbeddingBag(16, capacity=1_000_000, mode="mean")
        bag(torch.tensor([[4, 9], [4, 4]]))                                     (2, 16): every row is a bag
        bag(torch.tensor([4, 9, 4]), offsets=torch.tensor([0, 1]))              (2, 16): [4] and [9, 4]

    A mean and a maximum count ids that read zeros because they have no row, and leave `padding_id` out. Their cost is that
    of looking up every id of every bag; a sum never holds the single rows.
    """

    def __init__(
        self,
        dim: int,
        *,
        mode: Literal["sum", "mean", "max"] = "mean",
        include_last_offset: bool = False,
        **options: Any,
    ):
        """
        mode                 how the rows of a bag become one
        include_last_offset  the last offset is the end of the last bag, not the begin of one more
        options              as for `HashEmbedding`
        """
        if mode not in ("sum", "mean", "max"):
            raise TableError(f"HashEmbeddingBag: found mode={mode!r}; expected 'sum', 'mean' or 'max'.")
        super().__init__(dim, **options)
        self.mode, self.include_last_offset = mode, include_last_offset

    def forward(self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """One row for each bag. Bags are the rows of 2-d `ids`, or the stretches of 1-d `ids` that begin at `offsets`.

        per_sample_weights  of each id, with mode="sum" only; of the shape of `ids`
        """
        options = {"mode": self.mode, "include_last_offset": self.include_last_offset}
        if self.mode == "sum":
            places, how = self.places(ids)
            options |= {"per_sample_weights": per_sample_weights, **how}
            return F.embedding_bag(places, self.weight, offsets, **options)
        if per_sample_weights is not None:
            raise TableError(
                f"found per_sample_weights with mode='{self.mode}'; expected them with mode='sum' only, as torch's. Leave "
                "them out, or multiply what HashEmbedding gives."
            )
        rows = self.rows(ids.reshape(-1))
        rows = torch.cat([rows, rows.new_zeros(1, self.settings.width)])
        return F.embedding_bag(self._positions(ids), rows, offsets, padding_idx=ids.numel(), **options)

    def _positions(self, ids: Tensor) -> Tensor:
        """0, 1, 2, ... in the shape of `ids`; of padding, the number of ids."""
        positions = torch.arange(ids.numel(), device=self.weight.device).view(ids.shape)
        if self.settings.padding_id is None:
            return positions
        return positions.masked_fill((ids == self.settings.padding_id).to(self.weight.device), ids.numel())
