"""What each role may be sent: of every channel, the shape and dtype that its tensors have in this job."""

from __future__ import annotations

import torch

from syncwright.job import Job, ServerPart
from syncwright.program import Variable
from syncwright.runtime.messages import Address, Kind
from syncwright.runtime.wire import Limit

Form = tuple[tuple[int | range, ...], torch.dtype]


def limit_of(job: Job, me: Address) -> Limit:
    """For a server what is pushed to it, asked of it and given to it; for a trainer what it pulls."""
    pulled = {name: _form(variable) for name, variable in job.held.items()}
    pulled |= {name: form for part in job.servers for name, form in _computed(part).items() if name not in pulled}
    pulled |= {name: _form(job.channels[name].variable) for name in job.owners if name in job.channels}
    pulled |= {name: (job.held[of].shape, dtype) for name, (of, dtype) in job.casts.items()}
    some = {piece for table in job.tables.values() for piece, _ in table.pieces}
    pulled |= {name: _some_rows(pulled[name]) for name in some & pulled.keys()}
    if me.kind is Kind.TRAINER:
        return {name: pulled[name] for name in job.owners}
    own = {name: _form(channel.sent) for name, channel in job.channels.items() if channel.server == me.rank}
    pushed = {name: _some_rows(form) if name in some else form for name, form in own.items()}
    given = {name for part in job.servers for name, others in part.exports.items() if me.rank in others}
    owned = {name for name, owner in job.owners.items() if owner == me.rank}
    return {name: pulled[name] for name in owned | given} | pushed


def _form(variable: Variable) -> Form:
    return variable.shape, variable.dtype


def _some_rows(form: Form) -> Form:
    """All rows of a piece of a table, or some."""
    (rows, *rest), dtype = form
    return (range(rows + 1) if isinstance(rows, int) else rows, *rest), dtype


def _computed(part: ServerPart) -> dict[str, Form]:
    """What a server's programs write; numbers on the host travel as float64."""
    found: dict[str, Form] = {}
    for program in part.programs:
        for name, node in program.results.items():
            val = node.meta["val"]
            found[name] = (tuple(val.shape), val.dtype) if isinstance(val, torch.Tensor) else ((), torch.float64)
    return found
