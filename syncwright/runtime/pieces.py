"""What servers keep of a trainer's values: sliced on the way there, joined on the way back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from syncwright.deferred.tensor import Deferred, real
from syncwright.job import Job
from syncwright.program import Variable
from syncwright.runtime.client import Client
from syncwright.runtime.flat_values import apart, equal, laid_flat
from syncwright.runtime.records import NO_RECORDS, Records
from syncwright.selection import Selection
from syncwright.tables.mixing import ids_in

UNTIL_ALL_LEFT = "the end of all trainers"
"""Where a trainer waits that has left before others."""


def give(client: Client, values: Mapping[str, object], version: int, records: Records = NO_RECORDS) -> None:
    """Sends servers all that they keep of `values`, by the user's variables; state that is not among them as it begins.
    (Of tables of any ids only what is no row: rows have been sent before.)

    What servers can make themselves does not travel: one number everywhere, and what `records` has of what was deferred.
    """
    by_id = client.job.by_id
    for name, variable in [pair for pair in client.job.addressed.items() if pair[0] not in by_id]:
        value = _kept(client.job, variable, values)
        tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
        begin = records.start_of(variable, values.get(variable.whole or name), tensor)
        if begin is not None:
            client.give_start(name, version, *begin)
        else:
            client.give(name, version, real(tensor) if isinstance(tensor, Deferred) else tensor)
    client.resume(version)


def _kept(job: Job, variable: Variable, values: Mapping[str, object]) -> object:
    """The value of a variable, or piece of one, that a server keeps; of one that stands for several, of all of them."""
    parts = job.joined.get(variable.name)
    if parts is not None:
        its = {part.name: values[part.name] if part.name in values else begun(part) for part in parts}
        return laid_flat(variable, parts, its) if variable.shape else equal(parts, its)
    whole = variable.whole or variable.name
    if variable.initial is not None and whole not in values:
        return begun(variable)
    value, part = values[whole], variable.selection
    if part is not None and part.along == "shards":
        assert isinstance(value, torch.Tensor), "tables are tensors"
        if not any(value.stride()):
            return value[: variable.shape[0]]  # one number everywhere
        return value.index_select(0, ids_in(len(value), part.shards, part.start, part.stop))
    return value[slice(*variable.part)] if variable.part is not None else value  # type: ignore[index]


def begun(variable: Variable, device: torch.device | None = None) -> torch.Tensor:
    """State that the user's objects do not hold, as it begins."""
    assert variable.initial is not None, f"'{variable.name}' is the user's"
    return torch.full(variable.shape, variable.initial, dtype=variable.dtype, device=device)


def joined(job: Job, found: Iterable[tuple[Variable, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The user's variables from what servers keep of them; of what every piece has whole (a step count), the first."""
    parts: dict[str, list[tuple[Selection, torch.Tensor]]] = {}
    for variable, value in found:
        whole = variable.whole or variable.name
        parts.setdefault(whole, []).append((variable.selection or Selection(whole), value))
    return apart({name: _joined(its) for name, its in parts.items()}, job.joined)


def _joined(parts: list[tuple[Selection, torch.Tensor]]) -> torch.Tensor:
    first, value = parts[0]
    if first.bounds is None:
        return value
    tensors = [tensor for _, tensor in sorted(parts, key=lambda part: part[0].start)]
    rows = torch.cat(tensors)
    if first.along != "shards":
        return rows
    selections = sorted((selection for selection, _ in parts), key=lambda selection: selection.start)
    ids = torch.cat([ids_in(len(rows), each.shards, each.start, each.stop) for each in selections])
    return torch.empty_like(rows).index_copy_(0, ids, rows)
