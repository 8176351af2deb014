"""Rows of tables on their way: a gradient that is zero but for some rows, merged and applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from syncwright import kernels
from syncwright.items import read_rows, write_rows
from syncwright.job import Channel
from syncwright.program import Program, Role, Variable

Compute = Callable[[Program, Mapping[str, object]], Mapping[str, object]]


@dataclass(frozen=True, slots=True, eq=False)
class Parted:
    """One of several lists of ids: where it has new ones, and where some that a list before it has.

    places  where these stand among all ids, in the order in which they first come
    """

    new: torch.Tensor
    again: torch.Tensor
    places: torch.Tensor

    def to(self, device: torch.device) -> Parted:
        """On another device."""
        return Parted(self.new.to(device), self.again.to(device), self.places.to(device))


Parting = Callable[[Sequence[torch.Tensor]], list[Parted]]


@dataclass(frozen=True, slots=True, eq=False)
class RowGradient:
    """The rows of a gradient that may not be zero.

    ids   of the rows, within the piece of the table that a server keeps; distinct
    rows  of each id the gradient
    """

    ids: torch.Tensor
    rows: torch.Tensor

    def dense(self, rows: int) -> torch.Tensor:
        """The gradient of a piece of so many rows."""
        return self.rows.new_zeros((rows, *self.rows.shape[1:])).index_add_(0, self.ids, self.rows)


class Standing:
    """Of the rows of a piece of a table, which stand where among those that are being merged. Changes with every merge.

    Takes four bytes a row, in pages that take memory once they are touched: what is merged is found without sorting.
    """

    def __init__(self, rows: int | np.ndarray):
        """`rows`: how many, or memory of 32 bits for each: what stands in it does not matter."""
        self._at = np.zeros(rows, np.int32) if isinstance(rows, int) else rows

    def parted(self, ids: Sequence[torch.Tensor]) -> list[Parted]:
        """Lists of different ids, each parted into what no list before it has, and what one has.

        [5, 2] and [2, 7] give [5, 2] and nothing, [7] and [2], which stands at 1.
        """
        known = np.empty(sum(map(len, ids)), np.int64)
        count, found, none = 0, [], np.empty(0, np.int64)
        for number, each in enumerate((given.numpy() for given in ids), start=1):
            new, again, places = np.arange(len(each)), none, none
            if count:
                at = self._at[each]
                seen = (at < count) & (known[np.minimum(at, count - 1)] == each)
                new, again = np.flatnonzero(~seen), np.flatnonzero(seen)
                places = at[again].astype(np.int64)
            if number < len(ids):  # nobody asks for where the last list's stand
                fresh = each[new]
                known[count : count + len(fresh)] = fresh
                self._at[fresh] = np.arange(count, count + len(fresh), dtype=np.int32)
            count += len(new)
            found.append(Parted(*map(torch.from_numpy, (new, again, places))))
        return found


def standing_anywhere(ids: Sequence[torch.Tensor]) -> list[Parted]:
    """Like `Standing.parted`, of any ids on any device; by marks where there are such (see `kernels.marks_for`)."""
    if ids[0].device.type != "cpu":
        return [part.to(ids[0].device) for part in by_sorting([each.cpu() for each in ids])]
    marks = kernels.marks_for(ids)
    return by_sorting(ids) if marks is None else Standing(marks).parted(ids)


def by_sorting(ids: Sequence[torch.Tensor]) -> list[Parted]:
    """Like `Standing.parted`, of any ids."""
    inside, places = torch.unique(torch.cat(list(ids)), return_inverse=True)
    standing = Standing(len(inside))
    return standing.parted(places.split([len(each) for each in ids]))


def merge_rows(
    channel: Channel, given: Sequence[tuple[float, RowGradient]], parted: Parting = by_sorting
) -> RowGradient:
    """The sum of trainers' rows, id by id, added in the order of trainers; "mean_by_touch": over those who touched it.

    Ids [0, 1] with [2, 4] and ids [1, 2] with [6, 8] give [2, 10, 8]; by touch [2, 5, 8].
    """
    dtype = channel.variable.dtype
    touching = [gradient for _, gradient in given if len(gradient.ids)] or [given[0][1]]
    if len(touching) == 1:
        return RowGradient(touching[0].ids, touching[0].rows.to(dtype))
    parts = list(zip(touching, parted([each.ids for each in touching]), strict=True))
    ids = some([(each.ids, part.new) for each, part in parts])
    total = some([(each.rows, part.new) for each, part in parts]).to(dtype)
    for each, part in parts:
        total.index_add_(0, part.places, each.rows.index_select(0, part.again).to(dtype))
    if channel.merge == "mean_by_touch":
        counts = torch.ones(len(ids), dtype=dtype)
        for _, part in parts:
            counts[part.places] += 1
        total = total / counts.view(-1, *[1] * (total.dim() - 1))
    return RowGradient(ids, total)


def some(given: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Of several tensors of one form each the rows of some places (different ones, in order), one behind another."""
    first = given[0][0]
    whole = first.new_empty((sum(len(places) for _, places in given), *first.shape[1:]))
    at = 0
    for rows, places in given:
        part = whole[at : at + len(places)]
        if len(places) == len(rows):
            part.copy_(rows)
        else:
            torch.index_select(rows, 0, places, out=part)
        at += len(places)
    return whole


def update_touched(compute: Compute, program: Program, inputs: Mapping[str, object]) -> dict[str, object]:
    """Runs a row-wise update on the rows of its gradient alone, and writes them back in place.

    before  reads w, w.sum (f32[1000,4]) and w.grad (rows 3 and 7)
    after   w and w.sum with rows 3 and 7 changed: the same tensors

    A program that makes a number of no rows (a norm) is given a row of zeros, as all other rows of a gradient are.
    """
    gradient = next(value for value in inputs.values() if isinstance(value, RowGradient))
    ids, kept = gradient.ids, {}
    given: dict[str, object] = {}
    for name, value in inputs.items():
        if isinstance(value, RowGradient):
            given[name] = value.rows
        elif isinstance(value, torch.Tensor) and has_rows(program.variables[name]):
            kept[name] = value
            given[name] = read_rows(value, ids)
        else:
            given[name] = value
    if not kept and not len(gradient.rows):
        empty = next(name for name, value in inputs.items() if isinstance(value, RowGradient))
        given[empty] = gradient.rows.new_zeros(1, *gradient.rows.shape[1:])
    results = dict(compute(program, given))
    for name in [name for name in results if name in kept]:
        rows = results[name]
        assert isinstance(rows, torch.Tensor), "rows are tensors"
        results[name] = write_rows(kept[name], ids, rows)
    return results


class Settled:
    """Which rows of a piece of a table the step that runs will not change: those that no trainer has asked for in it.

    Changes with every request: remembers in which step each row was asked for last.
    """

    def __init__(self, rows: int):
        # By step + 1, in pages that take memory once they are touched.
        self._asked = np.zeros(rows, np.int32)
        self._latest: dict[int, int] = {}

    def ask(
        self, trainer: int, ids: torch.Tensor, step: int, running: int | None, live: Sequence[int]
    ) -> torch.Tensor | None:
        """Notes that a trainer will change rows in a step. Of rows for the step behind the one that runs: which have the
        value that they will have then; None where that is not known, or they are not for that step."""
        places = ids.numpy()
        before = self._asked[places]
        self._asked[places] = np.maximum(before, step + 1)
        self._latest[trainer] = max(step, self._latest.get(trainer, step))
        if running is None or step != running + 1 or any(self._latest.get(k, -1) < running for k in live):
            return None
        return torch.from_numpy(before <= running)


def bits(mask: torch.Tensor) -> bytes:
    """A mask as bytes, eight to one."""
    return np.packbits(mask.numpy()).tobytes()


def from_bits(packed: bytes, count: int) -> torch.Tensor:
    """The first `count` bits, as a mask."""
    return torch.from_numpy(np.unpackbits(np.frombuffer(packed, np.uint8), count=count).astype(bool))


def where(mask: torch.Tensor) -> torch.Tensor:
    """The places of what is true."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def has_rows(variable: Variable) -> bool:
    """Whether a variable of a table's update goes with its rows: the table, and state that is no single number."""
    return bool(variable.shape) and variable.role in (Role.PARAM, Role.STATE, Role.BUFFER, Role.GLOBAL)
