"""What each role may be sent, and by whom: of every channel, the shape and dtype that its tensors have in this job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from syncwright.job import Job, ServerPart
from syncwright.program import Variable
from syncwright.runtime.messages import Address, Failure, Header, Hello, Kind, Leave, Pull, Push, Resume, Value
from syncwright.runtime.wire import CHUNK_NBYTES, Limit, WireError

Form = tuple[tuple[int, ...], torch.dtype]

FIRST = Address(Kind.TRAINER, 0)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one role may be sent. What depends on how far a job is (a step, a version) is not known here.

    forms   of every channel, the shape and the dtype that its tensors have
    pushed  what is pushed to it, with the hyper-parameters that travel along
    pulled  what it is asked for
    given   whose values it takes, by channel
    serves  whether it is a server, to which trainers come and from which they go
    """

    forms: Limit
    pushed: Mapping[str, frozenset[str]] = field(default_factory=dict)
    pulled: frozenset[str] = frozenset()
    given: Mapping[str, frozenset[Address]] = field(default_factory=dict)
    serves: bool = False

    @property
    def frames(self) -> int:
        """The most frames of a message: a header and the chunks of the largest tensor."""
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.forms.values()]
        return 1 + -(-max(sizes, default=0) // CHUNK_NBYTES)

    def check(self, sender: Address, header: Header) -> None:
        """`WireError` if `sender` has no business to send this."""
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
            case Pull(channel=channel):
                self._check(sender, header, by_trainer and channel in self.pulled)
            case Value(channel=channel):
                self._check(sender, header, sender in self.given.get(channel, ()))
            case Resume():
                self._check(sender, header, sender == FIRST and self.serves)
            case Hello() | Leave():
                self._check(sender, header, by_trainer and self.serves)
            case Failure():
                pass

    def _check(self, sender: Address, header: Header, allowed: bool) -> None:
        if not allowed:
            about = f" of {header.channel!r}" if isinstance(header, Push | Pull | Value) else ""
            raise WireError(f"a {type(header).__name__}{about}, which {sender} does not send to this role")


def limits_of(job: Job, me: Address) -> Limits:
    """What `me` may be sent in `job`."""
    forms = limit_of(job, me)
    if me.kind is Kind.TRAINER:
        owners = {name: frozenset({Address(Kind.SERVER, owner)}) for name, owner in job.owners.items()}
        return Limits(forms, given=owners)
    held = {variable.name for variable in job.servers[me.rank].holds}
    exporters = {
        name: frozenset({Address(Kind.SERVER, part.rank)})
        for part in job.servers
        for name, others in part.exports.items()
        if me.rank in others
    }
    return Limits(
        forms,
        pushed={name: frozenset(c.hypers) for name, c in job.channels.items() if c.server == me.rank},
        pulled=frozenset(name for name, owner in job.owners.items() if owner == me.rank),
        given=exporters | {name: frozenset({FIRST}) for name in held},
        serves=True,
    )


def limit_of(job: Job, me: Address) -> Limit:
    """For a server what is pushed to it, asked of it and given to it; for a trainer what it pulls."""
    pulled = {name: _form(variable) for name, variable in job.held.items()}
    pulled |= {name: form for part in job.servers for name, form in _computed(part).items() if name not in pulled}
    pulled |= {name: _form(job.channels[name].variable) for name in job.owners if name in job.channels}
    if me.kind is Kind.TRAINER:
        return {name: pulled[name] for name in job.owners}
    pushed = {name: _form(channel.variable) for name, channel in job.channels.items() if channel.server == me.rank}
    given = {name for part in job.servers for name, others in part.exports.items() if me.rank in others}
    owned = {name for name, owner in job.owners.items() if owner == me.rank}
    return {name: pulled[name] for name in owned | given} | pushed


def _form(variable: Variable) -> Form:
    return variable.shape, variable.dtype


def _computed(part: ServerPart) -> dict[str, Form]:
    """What a server's programs write; numbers on the host travel as float64."""
    found: dict[str, Form] = {}
    for program in part.programs:
        for name, node in program.results.items():
            val = node.meta["val"]
            found[name] = (tuple(val.shape), val.dtype) if isinstance(val, torch.Tensor) else ((), torch.float64)
    return found
