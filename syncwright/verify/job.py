"""The rules of a whole job: every push has its pull, nobody waits for what never comes.

Nothing runs: programs are lists of sends and waits, servers are tables of what is kept, merged and computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.job import BETWEEN, FIRST, IDLE, IDLE_BETWEEN, IDLE_FIRST, LAST, STEP, Job, ServerPart
from syncwright.program import Program, Role, Variable
from syncwright.schema import argument
from syncwright.text import quote, type_text, variable_type_text
from syncwright.verify.causes import (
    BadGroup,
    BadWait,
    Deadlock,
    HeldTwice,
    NeverPushed,
    NoSuchServer,
    OtherSequence,
    PulledFromNobody,
    PulledTooEarly,
    PushedTwice,
    ReducedTwice,
    UnfedRead,
    UnknownChannel,
    WrittenTwice,
    WrongPull,
    WrongPush,
)
from syncwright.verify.program import verify
from syncwright.verify.server import verify_server


def verify_job(job: Job) -> None:
    """Raises the error of the first rule that `job` breaks: of its programs one by one, then of all together."""
    for program in job.trainer.values():
        verify(program)
    for part in job.servers:
        owned = {v.name for v in part.holds}
        for program in part.programs:
            verify_server(program, owned)
    _check_servers(job)
    for phase, program in job.trainer.items():
        _check_sends(job, phase, program)
        _check_reductions(phase, program)
        _check_groups(job, phase, program)
    _check_late(job)
    _check_sequences(job)
    _check_writers(job)
    tables = {part.rank: _table(job, part) for part in job.servers}
    _import(job, tables)
    for part in job.servers:
        _check_reads(part, tables[part.rank])
    for phase, program in job.trainer.items():
        _check_pulls(job, phase, program, tables)
        _check_order(job, phase, program, tables)


@dataclass(frozen=True, slots=True)
class _Table:
    """Where a server's values come from.

    held      variables that it keeps, also as trainers pull them in another dtype
    merged    channels that it merges
    hypers    hyper-parameters that arrive with pushes, with those channels
    made      global values that its programs compute, with the program
    imported  global values that other servers send it, with those servers
    """

    held: Mapping[str, Variable]
    merged: Mapping[str, Variable]
    hypers: Mapping[str, tuple[str, ...]]
    made: Mapping[str, Program]
    imported: dict[str, int]

    def value(self, name: str) -> Variable | None:
        """The variable of a value that the server can give to trainers."""
        if name in self.made:
            return self.made[name].variables[name]
        return self.held.get(name) or self.merged.get(name)

    def has(self, name: str) -> bool:
        return any(name in part for part in (self.held, self.merged, self.hypers, self.made, self.imported))


def _table(job: Job, part: ServerPart) -> _Table:
    held = {v.name: v for v in part.holds}
    casts = [(name, of, dtype) for name, (of, dtype) in job.casts.items() if of in held]
    held |= {name: replace(held[of], name=name, dtype=dtype) for name, of, dtype in casts}
    own = [channel for channel in job.channels.values() if channel.server == part.rank]
    hypers: dict[str, tuple[str, ...]] = {}
    for channel in own:
        for name in channel.hypers:
            hypers[name] = (*hypers.get(name, ()), channel.variable.name)
    made = {name: program for program in part.programs for name in program.writes if name not in held}
    return _Table(held, {c.variable.name: c.variable for c in own}, hypers, made, {})


def _import(job: Job, tables: Mapping[int, _Table]) -> None:
    """Notes on each server what others compute and export to it."""
    for part in job.servers:
        for name, readers in part.exports.items():
            if name in tables[part.rank].made:
                for reader in readers:
                    tables[reader].imported[name] = part.rank


def _check_servers(job: Job) -> None:
    ranks = {part.rank for part in job.servers}
    named = [(f"channel {quote(name)}", channel.server) for name, channel in job.channels.items()]
    named += [(f"the owner of {quote(name)}", rank) for name, rank in job.owners.items()]
    for part in job.servers:
        named += [(f"the export of {quote(name)}", rank) for name, to in part.exports.items() for rank in to]
    for about, rank in named:
        if rank not in ranks:
            found, expected = f"server {rank}", f"one of the job's {len(ranks)} servers"
            raise NoSuchServer(about, found, expected, "name one of them")


def _check_sends(job: Job, phase: str, program: Program) -> None:
    pushed: dict[str, Node] = {}
    for name, node in _sends(job, program, ops.push, ops.push_rows):
        about = f"{phase}: %{node.name}"
        channel = job.channels.get(name)
        if channel is None:
            raise UnknownChannel(about, f"a push to {quote(name)}", "a channel of the job", "give it a channel")
        if name in pushed:
            found = f"a push to {quote(name)}, as %{pushed[name].name} is"
            raise PushedTwice(about, found, "one push to each channel", "push the sum, or use two channels")
        if not _carries(node, node.args[0].meta["val"], channel.sent):  # type: ignore[union-attr]
            found = f"{_type_of(node.args[0])} pushed to {quote(name)}"
            raise WrongPush(about, found, variable_type_text(channel.sent), "push what the channel carries")
        pushed[name] = node
    for name, channel in job.channels.items() if phase not in _PARTIAL else ():
        if name not in pushed:
            found = f"no push in {phase}, and server {channel.server} waits for one from every trainer"
            raise NeverPushed(f"channel {quote(name)}", found, "one push", "push it, or take the channel out")


def _check_reductions(phase: str, program: Program) -> None:
    started: dict[str, Node] = {}
    for node in _calls(program, *_ENDING):
        name, ending = _channel(node), _ENDING[node.target]  # type: ignore[index]
        if name in started:
            found, expected = f"{quote(name)}, as %{started[name].name} reduces", "a channel of its own"
            raise ReducedTwice(f"{phase}: %{node.name}", found, expected, "name each reduction once")
        started[name] = node
        waits = [user for user in node.users if user.target is ending]
        if len(waits) != 1 or len(node.users) != 1 or _channel(waits[0]) != name:
            found = ", ".join(f"%{user.name}" for user in node.users) or "nobody"
            expected = f"one wait for {quote(name)} and no other use"
            raise BadWait(f"{phase}: %{node.name}", f"it used by {found}", expected, "wait for it once")
    for node in _calls(program, *ops.WAITS):
        source = node.args[0]
        if not isinstance(source, Node) or _ENDING.get(source.target) is not node.target:  # type: ignore[call-overload]
            found, expected = f"a wait for {_shown(source)}", _BEGINNING[node.target]  # type: ignore[index]
            raise BadWait(f"{phase}: %{node.name}", found, expected, "wait for what was started")


_PARTIAL = (BETWEEN, IDLE_BETWEEN, LAST)
"""Phases in which trainers do not push all that servers wait for in a step."""
_PAIRS = ((STEP, IDLE), (STEP, FIRST), (FIRST, IDLE_FIRST), (BETWEEN, IDLE_BETWEEN))
"""Phases that send the same."""


def _check_late(job: Job) -> None:
    """What a step begins for the next one, that one waits for, once; so does what follows the last step. Nothing is before the
    first."""
    begun = {_channel(n): n.args[0].meta["val"] for n in _calls(job.trainer[STEP], ops.all_reduce_later)}  # type: ignore[union-attr]
    for phase, program in job.trainer.items():
        waits = _calls(program, ops.wait_before)
        names = [str(node.args[0]) for node in waits]
        expected = sorted(begun) if phase in (STEP, IDLE, LAST) else []
        if sorted(names) != expected:
            found = f"waits for {', '.join(map(quote, sorted(names))) or 'nothing'} of the step before"
            wanted = f"one for each of {', '.join(map(quote, expected)) or 'nothing'}"
            raise BadWait(phase, found, wanted, "wait once for all that the step before has begun")
        for node, name in zip(waits, names, strict=True):
            if type_text(node.meta["val"]) != type_text(begun[name]):
                found = f"a wait for {type_text(node.meta['val'])} of {quote(name)}"
                raise BadWait(f"{phase}: %{node.name}", found, type_text(begun[name]), "wait for what was begun")


_ENDING = {
    ops.all_reduce: ops.wait,
    ops.reduce_scatter: ops.wait_own,
    ops.reduce_to: ops.wait_own,
    ops.gather_parts: ops.wait_whole,
    ops.give: ops.wait_whole,
    ops.gather_rows: ops.wait_rows,
    ops.sum_on_host: ops.wait_on_host,
}
"""What starts a collective, and what waits for it."""
_BEGINNING = {
    ops.wait: "an all_reduce",
    ops.wait_own: "a reduce_scatter or reduce_to",
    ops.wait_whole: "a gather_parts or give",
    ops.wait_rows: "a gather_rows",
    ops.wait_on_host: "a sum_on_host",
}


def _check_groups(job: Job, phase: str, program: Program) -> None:
    """Trainers make the groups of the plan when they start."""
    groups = job.plan.groups
    known = groups.needed(sharing.sync for sharing in job.plan.sharings)
    for node in [node for node in _calls(program, *_ENDING) if argument(node, "group")]:
        about, name = f"{phase}: %{node.name}", str(argument(node, "group"))
        if name not in known:
            remedy = "name one of these, or share a variable so that there is one"
            expected = f"a group of the plan: {', '.join(map(quote, known)) or 'none'}"
            raise BadGroup(about, f"the group {quote(name)}", expected, remedy)
        size = groups.size(name)
        smallest = min(map(len, groups.members(name)))
        if node.target in (ops.reduce_scatter, ops.gather_parts) and node.args[2] != size:
            found = f"parts for {node.args[2]} trainers of {quote(name)}"
            raise BadGroup(about, found, f"{size if size is not None else 'groups of one size'}", "cut it among these")
        if node.target in (ops.reduce_to, ops.give) and int(node.args[2]) >= smallest:  # type: ignore[arg-type]
            found = f"trainer {node.args[2]} of {quote(name)}, of which one has {smallest}"
            raise BadGroup(about, found, "one that each has: they count from 0", "name a lower one")


def _check_sequences(job: Job) -> None:
    """Peers meet at the n-th communication: every phase must send the same."""
    sent = {phase: [_sent(n) for n in _calls(program, *ops.SENDS)] for phase, program in job.trainer.items()}
    pairs = [(first, phase) for first, phase in _PAIRS if phase in sent]
    for first, phase in pairs:
        if sent[phase] != sent[first]:
            place, here, there = _difference(sent[phase], sent[first])
            about = f"{phase}: communication {place}"
            raise OtherSequence(about, here, f"{there} as in {first}", "send the same, in the same order")
    copied = {phase: list(map(_channel, _copies(program))) for phase, program in job.trainer.items()}
    for first, phase in pairs:
        if copied[phase] != copied[first]:
            found, expected = (", ".join(map(quote, names)) or "none" for names in (copied[phase], copied[first]))
            remedy = "pull the same together, in the same order"
            raise OtherSequence(f"{phase}: pulls for a whole host", found, f"{expected} as in {first}", remedy)


def _copies(program: Program) -> list[Node]:
    """Pulls whose value the first trainer of a host gives to the others."""
    return [node for node in _calls(program, ops.pull) if argument(node, "on_host")]


def _check_writers(job: Job) -> None:
    keepers: dict[str, int] = {}
    for part in job.servers:
        for variable in part.holds:
            if variable.name in keepers:
                found = f"it on servers {keepers[variable.name]} and {part.rank}"
                raise HeldTwice(quote(variable.name), found, "one server", "keep it where its owner is")
            keepers[variable.name] = part.rank
    writers: dict[str, str] = {}
    programs = [(f"server {part.rank}", program) for part in job.servers for program in part.programs]
    for where, program in programs:
        for name in program.writes:
            if name in writers:
                found = f"programs of {writers[name]} and {where} that write it"
                raise WrittenTwice(quote(name), found, "one writer", "write it once, where it is kept")
            writers[name] = where
    for phase, program in job.trainer.items():
        for name in program.writes:
            if name in keepers:
                found = f"{phase} writing it, and server {keepers[name]} that keeps it"
                raise WrittenTwice(quote(name), found, "one writer", "leave it to the server")


def _check_reads(part: ServerPart, table: _Table) -> None:
    for program in part.programs:
        for name in program.reads:
            if not table.has(name) and not _is_pulled(program.variables[name], table):
                about = f"server {part.rank}: the program of {', '.join(map(quote, program.writes))}"
                found = f"a read of {quote(name)}, which is neither kept, pushed, computed nor exported there"
                raise UnfedRead(about, found, "reads that are fed", "push it to this server, or export it")


def _is_pulled(variable: Variable, table: _Table) -> bool:
    """The value of a variable that a trainer has pulled last: its server knows it."""
    return variable.role is Role.GLOBAL and variable.of in table.held


def _check_pulls(job: Job, phase: str, program: Program, tables: Mapping[int, _Table]) -> None:
    for name, node in _sends(job, program, ops.pull, ops.pull_rows):
        about = f"{phase}: %{node.name}"
        owner = job.owners.get(name)
        if owner is None:
            raise PulledFromNobody(about, f"a pull of {quote(name)}", "a value with an owner", "name its owner")
        variable = tables[owner].value(name)
        if variable is None:
            found = f"a pull of {quote(name)} from server {owner}, which neither keeps nor computes it"
            raise PulledFromNobody(about, found, "an owner that has it", "name the server that has it")
        if not _carries(node, node.meta["val"], variable):
            found = f"a pull of {quote(name)} as {type_text(node.meta['val'])}"
            raise WrongPull(about, found, variable_type_text(variable), "pull it as it is kept")
        if (node.target is ops.pull_rows or not node.args[0]) and name not in tables[owner].held:
            found = f"a pull of {quote(name)} that waits for no push"
            remedy = "give it the tokens of those pushes"
            raise PulledTooEarly(about, found, "it after pushes that the value is made of", remedy)


def _check_order(job: Job, phase: str, program: Program, tables: Mapping[int, _Table]) -> None:
    """A trainer's step is a line, the servers' programs hang from it: no pull may stand above what it needs."""
    places = {node: place for place, node in enumerate(program.graph.nodes)}
    pushes = dict(_sends(job, program, ops.push, ops.push_rows))
    ready = _Readiness(job, tables, {name: places[node] for name, node in pushes.items()})
    for node in _calls(program, ops.pull):
        if not node.args[0]:
            continue
        name = _channel(node)
        place, last = ready.of(name, job.owners[name])
        if place > places[node]:
            found = f"a wait for {quote(name)}, which is made from the push of {quote(last)} below it"
            raise Deadlock(f"{phase}: %{node.name}", found, "the push above", "pull behind that push")
    for rank, table in tables.items() if phase not in _PARTIAL else ():
        for name in table.made:
            ready.of(name, rank)


class _Readiness:
    """After which push of a trainer each value of the step can be computed. Changes as it learns."""

    def __init__(self, job: Job, tables: Mapping[int, _Table], pushed: Mapping[str, int]):
        self.tables, self.pushed = tables, pushed
        self.known: dict[tuple[str, int], tuple[int, str]] = {}
        self.under_way: list[tuple[str, int]] = []
        self.writers = {
            (name, part.rank): program for part in job.servers for program in part.programs for name in program.writes
        }

    def of(self, name: str, rank: int) -> tuple[int, str]:
        """The place of the last push that the value `name` of server `rank` needs, and that push's channel."""
        key = (name, rank)
        if key not in self.known:
            if key in self.under_way:
                ring = [*self.under_way[self.under_way.index(key) :], key]
                shown = " <- ".join(f"{quote(n)} (server {r})" for n, r in ring)
                expected = "values that do not need themselves"
                raise Deadlock(quote(name), f"a circle: {shown}", expected, "break it where it crosses servers")
            self.under_way.append(key)
            self.known[key] = self._find(name, rank)
            self.under_way.pop()
        return self.known[key]

    def _find(self, name: str, rank: int) -> tuple[int, str]:
        table = self.tables[rank]
        if name in table.merged:
            return self.pushed[name], name
        if name in table.hypers:
            return min((self.pushed[channel], channel) for channel in table.hypers[name])
        if name in table.imported:
            return self.of(name, table.imported[name])
        program = self.writers.get((name, rank))
        reads = program.reads if program is not None else ()
        return max((self.of(read, rank) for read in reads if read not in table.held), default=(-1, ""))


def _calls(program: Program, *targets: Callable) -> list[Node]:
    found = [node for t in targets for node in program.graph.find_nodes(op="call_function", target=t)]
    return sorted(found) if len(targets) > 1 else found


def _sends(job: Job, program: Program, *targets: Callable) -> Iterator[tuple[str, Node]]:
    """Pushes, or pulls, with their channels: of rows with the channel of every piece of the table."""
    for node in _calls(program, *targets):
        name = _channel(node)
        if node.target in (ops.push_rows, ops.pull_rows) and name in job.tables:
            yield from ((piece, node) for piece, _ in job.tables[name].pieces)
        else:
            yield name, node


def _carries(node: Node, val: object, variable: Variable) -> bool:
    """Whether a value is what a channel carries: all of it, or some of its rows."""
    if node.target not in (ops.push_rows, ops.pull_rows):
        return _looks_like(val, variable)
    return isinstance(val, torch.Tensor) and (val.shape[1:], val.dtype) == (variable.shape[1:], variable.dtype)


def _channel(node: Node) -> str:
    return str(node.args[1])


def _sent(node: Node) -> tuple[str, str, str]:
    group = argument(node, "group")
    return str(node.target), _channel(node) + (f" in {group}" if group else ""), _type_of(node.args[0])


def _difference(sent: Sequence[tuple], expected: Sequence[tuple]) -> tuple[int, str, str]:
    """The first place where two lists differ, with what stands there."""
    longest = max(len(sent), len(expected))
    shown = [[*map(_sent_text, each), *["nothing"] * (longest - len(each))] for each in (sent, expected)]
    place = next(at for at, (a, b) in enumerate(zip(*shown, strict=True)) if a != b)
    return place, shown[0][place], shown[1][place]


def _sent_text(sent: tuple[str, str, str]) -> str:
    op, channel, kind = sent
    return f"{op.split('.')[1]} of {kind} to {quote(channel)}"


def _looks_like(val: object, variable: Variable) -> bool:
    return isinstance(val, torch.Tensor) and (tuple(val.shape), val.dtype) == (variable.shape, variable.dtype)


def _type_of(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_type_of, value))}]"
    return type_text(value.meta["val"]) if isinstance(value, Node) else repr(value)


def _shown(value: object) -> str:
    return f"%{value.name}" if isinstance(value, Node) else repr(value)
