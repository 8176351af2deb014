"""`nn.Embedding(sparse=True)` in a trace: dense gradients, and for lazy updates a column that says which rows count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam

from syncwright import ops
from syncwright.errors import CaptureError
from syncwright.optim import RowWiseAdagrad

aten = torch.ops.aten


class SparseLookups:
    """Makes the gradients of lookups with `sparse=True` dense, and marks gradients where they are complete.

        before  %g = sparse_coo_tensor(%ids, %rows, [6, 3])
        after   %d = embedding_dense_backward(%rows, %ids, 6), %t = embedding_dense_backward(%ones, %ids, 6)
                %g = gradient(cat([%d, %t], 1), "table.weight"), %grad = slice(%g, 1, 0, 3), %touched = slice(%g, 1, 3)

    A graph holds no sparse tensors. A dense gradient gives SGD, Adagrad and RowWiseAdagrad the same result: a row that
    is not looked up gets zero. SparseAdam leaves such a row and its state as they are, whatever their values: its
    parameters (`lazy`) get one more column, how often a row was looked up. It travels and is reduced with the gradient,
    so that a row counts as touched when any trainer has touched it. Rows of `padding_idx` are never touched.

    Changes while the step is traced: `touched` is what a lazy update reads, by parameter.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], lazy: frozenset[str], line: Callable[[], str]):
        self._tensors, self.lazy, self._line = tensors, lazy, line
        self.lines: dict[str, str] = {}
        self.touched: dict[str, torch.Tensor] = {}
        self._counts: dict[str, list[torch.Tensor]] = {}
        self._kept: dict[str, torch.Tensor] = {}

    def install(self, undo: ExitStack) -> None:
        """Until `undo`, torch's lookups are these, and complete gradients are marked."""
        for name in ("embedding", "embedding_bag"):
            undo.callback(setattr, torch, name, getattr(torch, name))
        torch.embedding = self._embedding(torch.embedding)
        torch.embedding_bag = self._embedding_bag(torch.embedding_bag)
        for name, tensor in self._tensors.items():
            if name in self.lazy:
                undo.callback(tensor.register_hook(self._begin(name)).remove)
            undo.callback(tensor.register_post_accumulate_grad_hook(self._mark(name)).remove)

    def check(self, optimizer: Optimizer) -> None:
        """Raises `CaptureError` for an optimizer that takes no sparse gradients."""
        for group in optimizer.param_groups:
            for name in [n for n in self.lines if any(self._tensors[n] is p for p in group["params"])]:
                self._check(name, optimizer, group)

    def _check(self, name: str, optimizer: Optimizer, group: Mapping) -> None:
        kind = type(optimizer).__name__
        if not isinstance(optimizer, SGD | Adagrad | SparseAdam | RowWiseAdagrad):
            raise CaptureError(
                f"{self.lines[name]}: '{name}' is looked up with sparse=True, but {kind} takes no sparse gradients. "
                "Expected SGD, Adagrad, RowWiseAdagrad or SparseAdam. Use one of them for this table, or leave sparse=True out."
            )
        if isinstance(optimizer, SGD | Adagrad) and group["weight_decay"] != 0:
            raise CaptureError(
                f"{self.lines[name]}: '{name}' is looked up with sparse=True, but its {kind} decays weights, which "
                "changes rows that no lookup touches. Expected weight_decay=0 for a sparse gradient. Give the table a "
                "group of parameters without weight decay, or leave sparse=True out."
            )

    def _embedding(self, original: Callable) -> Callable:
        def embedding(weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
            found = original(weight, indices, padding_idx, scale_grad_by_freq, False)
            return self._noted(found, found, weight, indices, padding_idx) if sparse else found

        return embedding

    def _embedding_bag(self, original: Callable) -> Callable:
        def embedding_bag(
            weight, indices, offsets, scale_grad_by_freq=False, mode=0, sparse=False, per_sample_weights=None,
            include_last_offset=False, padding_idx=None,
        ):  # fmt: skip
            rest = (per_sample_weights, include_last_offset, padding_idx)
            found = original(weight, indices, offsets, scale_grad_by_freq, mode, False, *rest)
            padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
            return self._noted(found, found[0], weight, indices, padding) if sparse else found

        return embedding_bag

    def _noted(
        self, found: object, rows: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, padding: int
    ) -> object:
        """The lookup's result; its rows count as touched when their gradient is known."""
        name = next((n for n, tensor in self._tensors.items() if tensor is weight), None)
        if name is None or not rows.requires_grad:
            return found
        self.lines.setdefault(name, self._line())
        if name in self.lazy:
            rows.register_hook(lambda gradient: self._count(name, gradient, ids, padding))
        return found

    @torch.no_grad()
    def _count(self, name: str, gradient: torch.Tensor, ids: torch.Tensor, padding: int) -> None:
        ones = gradient.new_ones((*ids.shape, 1))
        counts = aten.embedding_dense_backward.default(ones, ids, self._tensors[name].shape[0], padding, False)
        self._counts.setdefault(name, []).append(counts)

    def _begin(self, name: str) -> Callable[[torch.Tensor], None]:
        """Before a gradient is added to what there is: rows of a backward pass before zero_grad() count no more."""

        def hook(gradient: torch.Tensor) -> None:
            if name in self._kept and self._tensors[name].grad is self._kept[name]:
                self._counts.setdefault(name, []).append(self.touched[name])

        return hook

    def _mark(self, name: str) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None, "a post-accumulate hook runs after accumulation"
            if gradient.is_sparse:
                raise CaptureError(
                    f"{self._line()}: the gradient of '{name}' is a sparse tensor, which no graph holds. Expected sparse "
                    "gradients of nn.Embedding and nn.EmbeddingBag only. Use the dense form of the operation."
                )
            counts = self._counts.pop(name, [])
            parameter.grad = self._marked_lazy(name, gradient, counts) if counts else ops.gradient(gradient, name)

        return hook

    def _marked_lazy(self, name: str, gradient: torch.Tensor, counts: list[torch.Tensor]) -> torch.Tensor:
        touched = counts[0]
        for further in counts[1:]:
            touched = touched + further
        marked, width = ops.gradient(torch.cat([gradient, touched], 1), name), gradient.shape[1]
        self.touched[name] = marked[:, width:]
        self._kept[name] = marked[:, :width].clone()
        return self._kept[name]
