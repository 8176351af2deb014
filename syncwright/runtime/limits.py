"""What each role may be sent, and by whom: of every channel, the shape and dtype that its tensors have in this job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from syncwright.job import Job, ServerPart
from syncwright.program import Variable
from syncwright.runtime.messages import (
    Accepted,
    Address,
    Failure,
    Go,
    Header,
    Hello,
    Kind,
    Leave,
    Message,
    Offer,
    Order,
    Part,
    Pull,
    PullRows,
    Push,
    Resume,
    Rows,
    Start,
    Taken,
    Tick,
    Value,
)
from syncwright.runtime.wire import CHUNK_NBYTES, PACKED_NBYTES, Find, Limit, WireError, decode

Form = tuple[tuple[int | range, ...], torch.dtype]

FIRST = Address(Kind.TRAINER, 0)
MOST_ROWS = 2**24
"""Of a table of any ids, the most rows in one message: nobody knows how many a batch looks up."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one role may be sent. What depends on how far a job is (a step, a version) is not known here.

    forms   of every channel, the shape and the dtype that its tensors have
    pushed  what is pushed to it, with the hyper-parameters that travel along
    pulled  what it is asked for
    tables  the tables of any ids that it keeps, or that are kept for it
    given   whose values it takes, by channel
    serves  whether it is a server, to which trainers come and from which they go
    exchanges  the same for each exchange of the job
    """

    forms: Limit
    pushed: Mapping[str, frozenset[str]] = field(default_factory=dict)
    pulled: frozenset[str] = frozenset()
    given: Mapping[str, frozenset[Address]] = field(default_factory=dict)
    serves: bool = False
    exchanges: tuple[Limits, ...] = ()
    tables: frozenset[str] = frozenset()

    @property
    def frames(self) -> int:
        """The most frames of a message: a header and the chunks of the largest tensor."""
        forms = [form for each in (self, *self.exchanges) for form in each.forms.values()]
        sizes = [PACKED_NBYTES if self.tables else 0, *(_most_nbytes(shape, dtype) for shape, dtype in forms)]
        return 1 + -(-max(sizes, default=0) // CHUNK_NBYTES)

    def read(self, frames: Sequence[bytes | memoryview], *, given: bool = False, find: Find | None = None) -> Message:
        """The message that these frames are; `WireError` where no role may send it to this one. The rest: `wire.decode`'s."""
        return decode(frames, self.forms, exchanges=[each.forms for each in self.exchanges], given=given, find=find)

    def check(self, sender: Address, header: Header, job: int = 0) -> None:
        """`WireError` if `sender` has no business to send this, of the steps' job or of that of an exchange."""
        if job:
            return self.exchanges[job - 1].check(sender, header)
        by_trainer = sender.kind is Kind.TRAINER
        match header:
            case Push(channel=channel, hypers=hypers):
                self._check(sender, header, by_trainer and channel in self.pushed)
                if hypers.keys() != self.pushed[channel]:
                    found, wanted = (
                        ", ".join(sorted(hypers)) or "none",
                        ", ".join(sorted(self.pushed[channel])) or "none",
                    )
                    raise WireError(f"Push of {channel!r}: its hypers are {found[:200]}; expected {wanted}")
            case Pull(channel=channel) | PullRows(channel=channel):
                self._check(sender, header, by_trainer and channel in self.pulled)
            case Order(channel=channel, act=act):
                sets = act == "set" and sender != FIRST
                self._check(sender, header, by_trainer and self.serves and channel in self.tables and not sets)
            case Part(channel=channel):
                self._check(sender, header, channel in self.tables and sender in self.given.get(channel, ()))
            case Taken() | Go():
                self._check(sender, header, not by_trainer and not self.serves)
            case Value(channel=channel) | Rows(channel=channel) | Start(channel=channel):
                self._check(sender, header, sender in self.given.get(channel, ()))
            case Resume():
                self._check(sender, header, sender == FIRST and self.serves)
            case Hello() | Leave() | Tick():
                self._check(sender, header, by_trainer and self.serves)
            case Failure() | Offer() | Accepted():
                pass

    def _check(self, sender: Address, header: Header, allowed: bool) -> None:
        if not allowed:
            about = (
                f" of {header.channel!r}"
                if isinstance(header, Push | Pull | PullRows | Rows | Order | Part | Value | Start)
                else ""
            )
            raise WireError(f"a {type(header).__name__}{about}, which {sender} does not send to this role")


def limits_of(job: Job, me: Address) -> Limits:
    """What `me` may be sent in `job`."""
    exchanges = tuple(limits_of(each.job, me) for each in job.exchanges)
    unbounded = {name for name, variable in job.held.items() if variable.unbounded is not None}
    if me.kind is Kind.TRAINER:
        owners = {name: frozenset({Address(Kind.SERVER, owner)}) for name, owner in job.owners.items()}
        return Limits(limit_of(job, me), given=owners, exchanges=exchanges, tables=frozenset(unbounded))
    if not job.servers:
        return Limits({})
    forms = limit_of(job, me)
    held = {variable.name for variable in job.servers[me.rank].holds}
    given = held | {name for name, part in job.below.items() if part.whole in held}
    exporters = {
        name: frozenset({Address(Kind.SERVER, part.rank)})
        for part in job.servers
        for name, others in part.exports.items()
        if me.rank in others
    }
    return Limits(
        forms,
        pushed={name: frozenset(c.travelling) for name, c in job.channels.items() if c.server == me.rank},
        pulled=frozenset(name for name, owner in job.owners.items() if owner == me.rank),
        given=exporters | {name: frozenset({FIRST}) for name in given},
        serves=True,
        exchanges=exchanges,
        tables=frozenset(unbounded & held),
    )


def limit_of(job: Job, me: Address) -> Limit:
    """For a server what is pushed to it, asked of it and given to it; for a trainer what it pulls."""
    pulled = {name: _form(variable) for name, variable in (job.held | job.addressed).items()}
    pulled |= {name: form for part in job.servers for name, form in _computed(part).items() if name not in pulled}
    pulled |= {name: _form(job.channels[name].variable) for name in job.owners if name in job.channels}
    pulled |= {name: (job.held[of].shape, dtype) for name, (of, dtype) in job.casts.items()}
    some = {piece for table in job.tables.values() for piece, _ in table.pieces} | job.by_rows
    any_ids = _of_any_ids(job)
    pulled |= {name: _some_rows(pulled[name], name in any_ids) for name in some & pulled.keys()}
    if me.kind is Kind.TRAINER:
        return {name: pulled[name] for name in job.owners}
    own = {name: _form(channel.sent) for name, channel in job.channels.items() if channel.server == me.rank}
    pushed = {name: _some_rows(form, name in any_ids) if name in some else form for name, form in own.items()}
    given = {name for part in job.servers for name, others in part.exports.items() if me.rank in others}
    owned = {name for name, owner in job.owners.items() if owner == me.rank}
    return {name: pulled[name] for name in owned | given} | pushed


def _form(variable: Variable) -> Form:
    return variable.shape, variable.dtype


def _most_nbytes(shape: tuple[int | range, ...], dtype: torch.dtype) -> int:
    """The size of the largest tensor of a form; of some rows at least as much as their ids take."""
    sizes = [size[-1] if isinstance(size, range) else size for size in shape]
    ids = 8 * sizes[0] if shape and isinstance(shape[0], range) else 0
    return max(ids, torch.Size(sizes).numel() * dtype.itemsize)


def _of_any_ids(job: Job) -> set[str]:
    """What rows of tables of any ids are called on their way: theirs, and those of their gradients."""
    tables = {name for name, variable in job.held.items() if variable.unbounded is not None}
    pushed = {name for name, channel in job.channels.items() if channel.variable.of in tables}
    return tables | pushed | {name for name, (of, _) in job.casts.items() if of in tables}


def _some_rows(form: Form, any_ids: bool) -> Form:
    """All rows of a piece of a table, or some."""
    (rows, *rest), dtype = form
    if any_ids:
        return (range(MOST_ROWS + 1), *rest), dtype
    return (range(rows + 1) if isinstance(rows, int) else rows, *rest), dtype


def _computed(part: ServerPart) -> dict[str, Form]:
    """What a server's programs write; numbers on the host travel as float64."""
    found: dict[str, Form] = {}
    for program in part.programs:
        for name, node in program.results.items():
            val = node.meta["val"]
            found[name] = (tuple(val.shape), val.dtype) if isinstance(val, torch.Tensor) else ((), torch.float64)
    return found
