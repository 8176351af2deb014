"""Which rows of a table a server keeps, and where: by ids within a range, by the ids' virtual shards, or any ids of these."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from syncwright.program import Variable
from syncwright.tables.mixing import ids_in, shard_of


@dataclass(frozen=True, slots=True)
class Span:
    """The rows [start, stop), in order."""

    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many there are."""
        return self.stop - self.start

    def has(self, ids: torch.Tensor) -> bool:
        """Whether all these ids live here."""
        return not len(ids) or (self.start <= int(ids.min()) and int(ids.max()) < self.stop)

    def local(self, ids: torch.Tensor) -> torch.Tensor:
        """Where ids that live here stand in what is kept."""
        return ids - self.start

    def __str__(self) -> str:
        return f"of [{self.start}, {self.stop})"


@dataclass(frozen=True, slots=True)
class Below:
    """The rows of a table that lie below those of others: so many, and where the first of them stands."""

    first: int
    rows: int

    def has(self, ids: torch.Tensor) -> bool:
        """See `Span`."""
        return Span(0, self.rows).has(ids)

    def local(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Span`."""
        return ids + self.first

    def __str__(self) -> str:
        return str(Span(0, self.rows))


@dataclass(frozen=True, slots=True, eq=False)
class InShards:
    """Of a known vocabulary the rows of these ids, ascending: those of some virtual shards."""

    ids: torch.Tensor

    @property
    def rows(self) -> int:
        """See `Span`."""
        return len(self.ids)

    def has(self, ids: torch.Tensor) -> bool:
        """See `Span`."""
        if not len(ids) or not len(self.ids):
            return not len(ids)
        places = self.local(ids).clamp(max=len(self.ids) - 1)
        return bool((self.ids[places] == ids).all())

    def local(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Span`."""
        return torch.searchsorted(self.ids, ids)

    def __str__(self) -> str:
        return "in the virtual shards"


@dataclass(frozen=True, slots=True)
class AnyIds:
    """Any ids whose virtual shard, of `shards`, is in [start, stop); with 0 shards any at all. They stand where a table
    says."""

    start: int = 0
    stop: int = 0
    shards: int = 0

    def has(self, ids: torch.Tensor) -> bool:
        """See `Span`."""
        if not len(ids) or not self.shards:
            return True
        shard = shard_of(ids, self.shards)
        return self.start <= int(shard.min()) and int(shard.max()) < self.stop

    def local(self, ids: torch.Tensor) -> torch.Tensor:
        """The ids themselves."""
        return ids

    def __str__(self) -> str:
        return f"of virtual shards [{self.start}, {self.stop}) of {self.shards}"


Places = Span | Below | InShards | AnyIds


def places_of(variable: Variable, whole: int) -> Places:
    """Which rows of a table a variable, or a piece of one, holds. `whole`: the table's rows, where they are known."""
    part = variable.selection
    if variable.unbounded is not None:
        return AnyIds() if part is None or part.bounds is None else AnyIds(part.start, part.stop, part.shards)
    if part is None or part.bounds is None:
        return Span(0, variable.shape[0])
    if part.along == "shards":
        return InShards(ids_in(whole, part.shards, part.start, part.stop))
    return Span(part.start, part.stop)
