"""What an export of a table holds, and what of it is needed elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Ids with their columns, and ids that went.

    ids      int64 (n)
    columns  by name, each (n, ...)
    removed  int64: ids that are no longer there, unless they are among `ids` (they came back)
    """

    ids: Tensor
    columns: Mapping[str, Tensor]
    removed: Tensor

    def where(self, keep: Callable[[Tensor], Tensor]) -> Part:
        mask = keep(self.ids)
        return Part(self.ids[mask], {n: c[mask] for n, c in self.columns.items()}, self.removed[keep(self.removed)])


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """All of a table, or what changed in it.

    since       the mark after which rows changed; None: all rows are here
    mark        of this export: give it as `since` to the next
    now         the table's clock, in steps
    decays      how often scores have been decayed
    rows        ids that have a row: "rows" itself and every other column
    candidates  ids that have none yet
    numbers     what an optimizer keeps for all rows together (a count of steps): tensors without axes; whole ones are
                Python's numbers
    """

    since: int | None
    mark: int
    now: int
    decays: int
    rows: Part
    candidates: Part | None
    numbers: Mapping[str, Tensor] = field(default_factory=dict)

    def where(self, keep: Callable[[Tensor], Tensor]) -> Saved:
        """The ids for which `keep(ids)` is true: `saved.where(lambda ids: shard_of(ids, 64) < 32)`."""
        return replace(self, rows=self.rows.where(keep), candidates=self.candidates and self.candidates.where(keep))

    def to_dict(self) -> dict[str, Tensor]:
        """Plain tensors by name, for `torch.save`."""
        since = -1 if self.since is None else self.since
        found = {"clock": torch.tensor([since, self.mark, self.now, self.decays])}
        for name, part in (("rows", self.rows), ("candidates", self.candidates)):
            if part is not None:
                found |= {f"{name}.ids": part.ids, f"{name}.removed": part.removed}
                found |= {f"{name}.columns.{n}": c for n, c in part.columns.items()}
        return found | {f"numbers.{n}": t for n, t in self.numbers.items()}

    @staticmethod
    def from_dict(tensors: Mapping[str, Tensor]) -> Saved:
        """The inverse of `to_dict`."""
        since, mark, now, decays = tensors["clock"].tolist()
        rows = _part(tensors, "rows")
        candidates = _part(tensors, "candidates") if "candidates.ids" in tensors else None
        numbers = {n.removeprefix("numbers."): t for n, t in tensors.items() if n.startswith("numbers.")}
        return Saved(None if since < 0 else since, mark, now, decays, rows, candidates, numbers)


def joined(parts: Sequence[Saved]) -> Saved:
    """One export of the exports of parts of a table (other ids in each), taken together."""
    first = parts[0]
    candidates = [each.candidates for each in parts if each.candidates is not None]
    rows = _together([each.rows for each in parts])
    return replace(first, rows=rows, candidates=_together(candidates) if candidates else None)


def _together(parts: Sequence[Part]) -> Part:
    columns = {name: torch.cat([each.columns[name] for each in parts]) for name in parts[0].columns}
    return Part(torch.cat([p.ids for p in parts]), columns, torch.cat([p.removed for p in parts]))


def _part(tensors: Mapping[str, Tensor], name: str) -> Part:
    prefix = f"{name}.columns."
    columns = {n.removeprefix(prefix): c for n, c in tensors.items() if n.startswith(prefix)}
    return Part(tensors[f"{name}.ids"], columns, tensors[f"{name}.removed"])
