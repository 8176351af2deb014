"""What our operations on rows and elements compute, on tensors (see `ops`)."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import numpy as np
import torch

from syncwright.items import read_rows

MOST_MARKS = 1 << 24
"""Ids below this are made distinct by marks, four bytes each, in a sixth of the time that sorting takes."""

_scratch = threading.local()


def join_ids(ids: list[torch.Tensor], rows: list[int], names: list[str]) -> torch.Tensor:
    flat = torch.cat([each.reshape(-1) for each in ids])
    sizes = tuple(each.numel() for each in ids)
    length, first = _stretched(tuple(rows), sizes, flat.dtype, flat.device)
    wrong = (flat < 0).logical_or_(flat >= length)
    if bool(wrong.any()):
        at = int(wrong.int().argmax())
        table = int(np.searchsorted(np.cumsum(sizes), at, side="right"))
        raise IndexError(
            f"'{names[table]}' is looked up by id {int(flat[at])}; expected ids from 0 to {rows[table] - 1}. Give the table more "
            "rows, or map the batch's ids into them."
        )
    return flat.add_(first)


@functools.lru_cache(maxsize=4)
def _stretched(
    rows: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each id of each table how many rows the table has, and where these begin."""
    each, counts = torch.tensor(rows), torch.tensor(sizes)
    found = each.repeat_interleave(counts), (each.cumsum(0) - each).repeat_interleave(counts)
    return found[0].to(device, dtype), found[1].to(device, dtype)


def join_offsets(offsets: list[torch.Tensor], ids: list[torch.Tensor]) -> torch.Tensor:
    first = 0
    found = []
    for each, of in zip(offsets, ids, strict=True):
        found.append(each.reshape(-1) + first)
        first += of.numel()
    return torch.cat(found)


def unique(ids: list[torch.Tensor], padding: int) -> list[torch.Tensor]:
    flat = torch.cat([each.reshape(-1) for each in ids]) if len(ids) > 1 else ids[0].reshape(-1)
    first = int(padding >= 0)
    given = torch.cat([flat.new_full([1], padding), flat]) if first else flat
    found, places = _by_marks(given) if _has_marks(given) else torch.unique(given, return_inverse=True)
    if first and int(found[0]) != padding:
        at = int(places[0])
        found = torch.cat([found[at : at + 1], found[:at], found[at + 1 :]])
        places = torch.where(places == at, 0, places + (places < at).to(places.dtype))
    unique = torch.empty([flat.numel() + first], dtype=torch.int64)
    unique[: len(found)] = found
    unique[len(found) :] = found[-1:]
    sizes = [each.numel() for each in ids]
    parts = zip(places[first:].split(sizes), ids, strict=True)
    return [unique, *[part.view(each.shape).to(each.dtype) for part, each in parts]]


def _has_marks(ids: torch.Tensor) -> bool:
    """Whether ids are small enough to have a mark each."""
    if ids.device.type != "cpu" or not len(ids):
        return False
    low, high = torch.aminmax(ids)
    return int(low) >= 0 and int(high) < MOST_MARKS


def marks_for(ids: Sequence[torch.Tensor]) -> np.ndarray | None:
    """A number of 32 bits for each id up to the largest, this thread's, in which anything may stand from 0 on; None where there
    are none so many."""
    return _marks() if all(not len(each) or _has_marks(each) for each in ids) else None


def _marks() -> np.ndarray:
    if not hasattr(_scratch, "marks"):
        _scratch.marks = np.zeros(MOST_MARKS, np.int32)  # takes memory where it is written
    return _scratch.marks


def _by_marks(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `torch.unique` with `return_inverse`, in the order in which ids come last: nothing is sorted.

    [7, 3, 7] gives [3, 7] and [1, 0, 1].
    """
    given = ids.numpy()
    marks, order = _marks(), np.arange(len(given), dtype=np.int32)
    marks[given] = order
    last = marks[given]
    chosen = last == order
    ranks = np.cumsum(chosen, dtype=np.int64) - 1
    return torch.from_numpy(given[chosen]), torch.from_numpy(ranks[last])


def distinct(ids: torch.Tensor) -> int:
    """How many ids `unique` has found: those behind them are the last one again."""
    return int((ids[1:] != ids[:-1]).sum()) + 1 if len(ids) else 0


def take_rows(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return read_rows(x, ids)


def add_rows(x: torch.Tensor, places: torch.Tensor, rows: int) -> torch.Tensor:
    inner = x.shape[places.dim() :]
    return x.new_zeros([rows, *inner]).index_add_(0, places.reshape(-1), x.reshape(places.numel(), *inner))


def largest(x: torch.Tensor, count: int) -> torch.Tensor:
    bits = x.reshape(-1).abs().float().view(torch.int32)  # of magnitudes they are in the same order
    first = _largest_but(bits, count - 1)
    above = (bits > first).nonzero().view(-1)
    equal = (bits == first).nonzero().view(-1)[: count - len(above)]
    return torch.cat([above, equal]).sort().values.to(torch.int32)


def _largest_but(numbers: torch.Tensor, others: int) -> int:
    """The largest but so many. On a host by NumPy, whose vectorised partition takes a tenth of `torch.kthvalue`'s time."""
    place = len(numbers) - 1 - others
    if numbers.device.type == "cpu":
        return int(np.partition(numbers.numpy(), place)[place])
    return int(torch.kthvalue(numbers, place + 1).values)


def add_elements(x: torch.Tensor, places: torch.Tensor, parts: int, count: int) -> torch.Tensor:
    total = x.new_zeros([count])
    for its, where in zip(x.chunk(parts), places.chunk(parts), strict=True):
        total.index_add_(0, where, its)
    return total


def dense_rows(x: torch.Tensor, ids: torch.Tensor, rows: int, skip: int = 0) -> torch.Tensor:
    count = distinct(ids)
    return x.new_zeros([rows, *x.shape[1:]]).index_add_(0, ids[skip:count], x[skip:count])


def own_rows(x: torch.Tensor, ids: torch.Tensor, skip: int = 0) -> list[torch.Tensor]:
    count = distinct(ids)
    return [ids[skip:count], x[skip:count]]


def put_rows(x: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return x.index_copy(0, ids, rows)
