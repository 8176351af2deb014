"""Variables of which every trainer keeps a part of its own: cut, reduced to it, put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from syncwright.deferred.tensor import real
from syncwright.program import Program, Variable
from syncwright.runtime.gathers import rounded
from syncwright.runtime.transport import Gathered, Outlet, Scattered
from syncwright.selection import Own


def own_part(whole: torch.Tensor, own: Own, trainer: int) -> torch.Tensor:
    """A trainer's part of a value, in memory of its own; of a deferred one, that part alone is made."""
    if own.keeper is not None:
        return real(whole.detach())
    start, stop = own.bounds(trainer)
    part = real(whole.detach().reshape(-1)[start:stop])
    return part if len(part) == own.count else torch.cat([part, part.new_zeros(own.count - len(part))])


def together(own: Own, parts: Sequence[torch.Tensor], place: torch.Tensor | None = None) -> torch.Tensor:
    """The whole, flat, from all trainers' parts; in `place`, where that is given and lies in order."""
    whole = parts[0].new_empty(own.numel) if place is None or not place.is_contiguous() else place.view(-1)
    for trainer, part in enumerate(parts):
        start, stop = own.bounds(trainer)
        whole[start:stop].copy_(part[: stop - start])
    return whole


class OwnParts:
    """What one trainer reduces to parts and gathers of them, among a group's. Changes with every collective.

    notes  what errors call each
    """

    def __init__(self, transport: Outlet, notes: Mapping[str, str]):
        self._transport, self._notes = transport, notes
        self._scattered: dict[str, Scattered] = {}
        self._gathered: dict[str, tuple[Gathered, list[tuple[int, torch.Tensor]]]] = {}

    def reduce(self, channel: str, tensors: Sequence[torch.Tensor], group: str = "") -> None:
        """Starts the sums of tensors over all trainers."""
        self._end_all_but_the_last()
        self._scattered[channel] = self._transport.reduce_scatter(tensors, self._note(channel), group)

    def _end_all_but_the_last(self) -> None:
        """Of the sums that are under way: their memory serves the next."""
        for work in list(self._scattered.values())[:-1]:
            work.done()

    def own(self, channel: str) -> torch.Tensor | None:
        """This trainer's parts of the sums, one behind another; None while they are not there."""
        work = self._scattered[channel]
        if not work.done():
            return None
        del self._scattered[channel]
        return work.own

    def gather(self, channel: str, parts: Sequence[torch.Tensor], group: str = "") -> None:
        """Gives all trainers parts of this one's."""
        pieces, nbytes = _pieces(parts)
        self._gathered[channel] = self._transport.gather(nbytes, pieces, self._note(channel), group), pieces

    def reduce_to(self, channel: str, tensors: Sequence[torch.Tensor], keeper: int, group: str = "") -> None:
        """Starts the sums of tensors over all trainers, for one of them: `own` gives it them."""
        self._end_all_but_the_last()
        self._scattered[channel] = self._transport.reduce_to(tensors, keeper, self._note(channel), group)

    def give(self, channel: str, values: Sequence[torch.Tensor], keeper: int, group: str = "") -> None:
        """Gives all trainers values of one of them; those of the others say only what they are: `whole` gives them all."""
        pieces, nbytes = _pieces(values)
        self._gathered[channel] = self._transport.give(nbytes, pieces, keeper, self._note(channel), group), pieces

    def whole(
        self, channel: str, sizes: Sequence[int], places: Sequence[torch.Tensor | None] = ()
    ) -> list[torch.Tensor] | None:
        """Of each so many elements, from all trainers' parts; None while they are not there. `places`: memory for some."""
        work, pieces = self._gathered[channel]
        if not work.done():
            return None
        del self._gathered[channel]
        found = []
        for size, (at, part), place in zip(sizes, pieces, places or [None] * len(pieces), strict=True):
            theirs = [each[at : at + part.nbytes].view(part.dtype) for each in work.parts]
            found.append(together(Own("", (size,), len(theirs)), theirs, place))
        work.release()
        return found

    def _note(self, channel: str) -> str:
        return self._notes.get(channel, channel)


def _pieces(values: Sequence[torch.Tensor]) -> tuple[list[tuple[int, torch.Tensor]], int]:
    """Values with their places, one behind another, and the bytes of all."""
    pieces, at = [], 0
    for value in values:
        pieces.append((at, value.detach()))
        at = rounded(at + value.nbytes)
    return pieces, at


def apart_from(program: Program) -> list[Variable]:
    """The trainers' own parts of variables of which no trainer has the whole."""
    variables = program.variables
    return [v for v in variables.values() if v.own is not None and v.own.of not in variables]


def variables_of(variables: Mapping[str, Variable]) -> dict[str, Own]:
    """The variables of a program of which each trainer keeps its own part."""
    return {name: variable.own for name, variable in variables.items() if variable.own is not None}
