"""Which examples of the global batches are a trainer's: part k of `torch.tensor_split` of the batch axis."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

from syncwright.capture.examples import leading_size
from syncwright.capture.step import batch_variables
from syncwright.errors import BatchError
from syncwright.tree import tensors

ShareState = Callable[[torch.Tensor], torch.Tensor]
T = TypeVar("T")


def bounds(count: int, trainers: int, rank: int) -> tuple[int, int]:
    """[start, stop) of part `rank` of `count` examples: 5 on 2 gives [0, 3) and [3, 5)."""
    small, larger = divmod(count, trainers)
    start = rank * small + min(rank, larger)
    return start, start + small + (rank < larger)


def part_of(batch: object, trainers: int, rank: int, whole: Collection[str] = ()) -> object:
    """A trainer's part of a batch: tensors as long as the first that has axes are cut; the rest is given to all.

    whole  names of tensors that are given to all though they are as long: "batch.2" is the third, "batch.0.weights" one of
           a dict; for class weights where there may be as many classes as examples

    Raises `BatchError` for a name that no tensor of the batch has.
    """
    count = leading_size(batch)
    return batch if count is None else rows_of(batch, *bounds(count, trainers, rank), whole)


def rows_of(batch: object, start: int, stop: int, whole: Collection[str] = ()) -> object:
    """Examples [start, stop) of a batch; see `part_of`."""
    count = leading_size(batch)
    left = _given_whole(batch, whole) if whole else ()

    def cut(leaf: object) -> object:
        is_cut = isinstance(leaf, torch.Tensor) and leaf.shape[:1] == (count,) and id(leaf) not in left
        return leaf[start:stop] if is_cut else leaf  # type: ignore[index]

    return pytree.tree_map(cut, batch)


def _given_whole(batch: object, whole: Collection[str]) -> set[int]:
    """Which tensors of a batch, by `id`, have these names."""
    names = [v.name for v in batch_variables(tuple(batch) if isinstance(batch, tuple | list) else (batch,), {})]
    for name in whole:
        if name not in names:
            raise BatchError(
                f"whole: no tensor of the batch is called '{name}'; expected some of {', '.join(names)}. Correct the name."
            )
    return {id(leaf) for name, leaf in zip(names, tensors(batch), strict=True) if name in whole}


def shard(loader: Iterable, trainers: int, rank: int, share: ShareState, whole: Collection[str] = ()) -> Iterator:
    """This trainer's parts of the batches of `loader`, which yields the *global* batch as on one device.

    Of a map-style `DataLoader` only a trainer's own examples are loaded: all trainers draw the same indices (from
    trainer 0's random state, which `share` hands to all) and each keeps its part. Any other loader, or one over an
    `IterableDataset`, is read by every trainer, which cuts each batch. Each example is used once; the last batch may be
    ragged, and empty for some.
    """
    if trainers == 1:
        yield from loader
    elif isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        yield from _own_examples(loader, trainers, rank, share, whole)
    else:
        for batch in loader:
            yield part_of(batch, trainers, rank, whole)


def _own_examples(loader: DataLoader, trainers: int, rank: int, share: ShareState, whole: Collection[str]) -> Iterator:
    source = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    state = share(torch.get_rng_state())
    indices = _Indices(source, trainers, rank, state, loader.generator)
    own = _like(loader, indices)
    for batch in own:
        yield rows_of(batch, 0, 0, whole) if indices.was_empty() else batch


def _like(loader: DataLoader, indices: _Indices) -> DataLoader:
    """The user's loader over this trainer's indices."""
    how = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "prefetch_factor": loader.prefetch_factor,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": torch.Generator(),
    }
    if loader.batch_sampler is not None:
        return DataLoader(loader.dataset, batch_sampler=indices, **how)  # type: ignore[arg-type]
    return DataLoader(loader.dataset, sampler=indices, batch_size=None, **how)  # type: ignore[arg-type]


class _Indices:
    """A batch sampler that keeps one trainer's part of each batch of indices.

    An empty part loads the batch's first example instead (a collate function needs one), and `was_empty` says so in the
    order in which batches come out.
    """

    def __init__(
        self, source: Iterable, trainers: int, rank: int, state: torch.Tensor, generator: torch.Generator | None
    ):
        self._source, self._trainers, self._rank = source, trainers, rank
        self._state, self._generator = state, generator
        self._advance = rank == 0
        self._empty: list[bool] = []

    def __iter__(self) -> Iterator[Sequence[int]]:
        iterator = iter(self._source)
        # A DataLoader's own first draw, the seed of its workers: what is drawn then is what one device draws.
        self._drawn(lambda: torch.empty((), dtype=torch.int64).random_(generator=self._generator))
        while (batch := self._next(iterator)) is not None:
            start, stop = bounds(len(batch), self._trainers, self._rank)
            self._empty.append(start == stop)
            yield batch[start:stop] if start < stop else batch[:1]

    def __len__(self) -> int:
        return len(self._source)  # type: ignore[arg-type]

    def was_empty(self) -> bool:
        return self._empty.pop(0)

    def _next(self, iterator: Iterator) -> Sequence[int] | None:
        try:
            return self._drawn(lambda: next(iterator, None))
        finally:
            self._advance = False

    def _drawn(self, draw: Callable[[], T]) -> T:
        """Draws under the random state that all trainers share; trainer 0's own stream goes on from the first draws."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self._state)
        try:
            return draw()
        finally:
            self._state = torch.get_rng_state()
            torch.set_rng_state(self._state if self._advance else outside)
