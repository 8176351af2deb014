"""One trainer's communications: what it pushed, asked for and got. Changes with every message."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Literal

import torch

from syncwright import ops
from syncwright.errors import JobError, SyncwrightError
from syncwright.job import Job
from syncwright.passes.bucket import INSIDE
from syncwright.runtime.executor import Form
from syncwright.runtime.gathered import Gathering, merged
from syncwright.runtime.merging import together
from syncwright.runtime.messages import (
    Act,
    Address,
    Failure,
    Go,
    Hello,
    Kind,
    Leave,
    Message,
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
from syncwright.runtime.own_parts import OwnParts
from syncwright.runtime.parcels import LARGEST_NBYTES
from syncwright.runtime.rendezvous import cannot_go_on
from syncwright.runtime.row_client import NEVER, RowClient
from syncwright.runtime.table_client import TableClient
from syncwright.runtime.transport import HostWork, Outlet, Work

Key = tuple[str, int]
"""A channel, and the version or (from `LATEST` down) the number by which its value is asked for."""
LATEST = -2
"""By this number stands the latest value that has come; -1 is the version before the first, which is the first."""
When = Literal["now", "end"]


class Client:
    """The port of a trainer's running program (see `executor.Port`), over a transport. `step` is the one that runs."""

    def __init__(self, job: Job, transport: Outlet):
        self.job, self.transport = job, transport
        self.step, self._weight, self._hypers = 0, 1.0, {}
        self.call, self._weight_of_call, self._in_every_call = 0, 1.0, job.pushed_between
        self._held: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._asked: set[Key] = set()
        self._got: dict[Key, torch.Tensor] = {}
        self._order: dict[str, deque[Key]] = {}
        self._fresh = LATEST
        self._refreshed: dict[str, int] = {}
        self._works: dict[str, tuple[Work, torch.Tensor]] = {}
        self._later: dict[str, deque[tuple[Work, torch.Tensor]]] = {}
        self._sums: dict[str, tuple[HostWork, torch.Tensor]] = {}
        self._speaks, self._copied = True, job.copied
        self._gatherings: dict[str, Gathering] = {}
        self._left: dict[Key, int] = {}
        self._notes = _notes(job)
        self._parts = OwnParts(transport, self._notes)
        self._fixed, self._base, self._settings = job.fixed, 0, 1
        self._now = job.arriving | {name for name, (of, _) in job.casts.items() if of in job.arriving}
        self._waiting: dict[str, list[tuple[float, torch.Tensor]]] = {}
        self._under_way: set[str] = set()
        self._released = -1
        self._training = True
        self._rows = RowClient(job, self._send)
        self.tables = TableClient(job, self._send)
        self._known: Mapping[str, list[torch.Tensor]] = {}
        self._after: Mapping[str, str] = {}

    def hello(self) -> None:
        for part in self.job.servers:
            self._send(part.rank, Message(Hello(self.job.digest)))

    def begin(
        self,
        step: int,
        weight: float,
        hypers: Mapping[str, float],
        uses: Mapping[tuple[str, int], int] = MappingProxyType({}),
        training: bool = True,
        after: Mapping[str, str] = MappingProxyType({}),
        call: tuple[int, float] | None = None,
    ) -> None:
        """What belongs to all pushes of the step that begins.

        uses  how often each channel will be pulled in this step, as of how many steps later (-1: before): after the last
              time it is forgotten
        training  whether gradients of the rows that are asked for will be pushed
        after     by channel, what is asked for as of the next step when it has been pushed: so its answer does not wait behind
                  larger pushes
        call      the number and the weight of this call, where several make a step and something is pushed in each; None: the
                  step's own
        """
        self._after = after
        self.call, self._weight_of_call = call or (step, weight)
        self.step, self._weight, self._hypers, self._training = step, weight, dict(hypers), training
        self._rows.begin(self.call if training else NEVER)
        self._known = {}
        self._left = {}
        for (channel, at), count in uses.items():
            key = self._key(channel, self._number(channel) + at)
            self._left[key] = self._left.get(key, 0) + count
        self._got = {key: value for key, value in self._got.items() if self._is_wanted(key)}
        self._asked = {key for key in self._asked if self._is_wanted(key)}
        self.transport.progress(step, "begin")

    def _number(self, channel: str) -> int:
        """Of this step, or of this call where something is pushed in each."""
        return self.call if channel in self._in_every_call else self.step

    def _is_wanted(self, key: Key) -> bool:
        return key in self._left or key[1] >= self.step or key[1] == LATEST or key[0] in self._fixed

    def push(self, channel: str, tensor: torch.Tensor, weight: torch.Tensor | None = None) -> bool:
        """Sends a contribution, or keeps it until an earlier one is taken, to be sent with others as their mean.

        False where as many are kept as may be: it has to be given again. With a `weight`, the first trainer of this host sends
        it for all.
        """
        known = self.job.channels[channel]
        self.transport.progress(self.step, f"push {channel}")
        if known.up_to == 1:
            if weight is None or self._speaks:
                own = self._weight_of_call if channel in self._in_every_call else self._weight
                self._push(channel, own if weight is None else float(weight), tensor)
            if channel in self._after:
                self.ask([(self._after[channel], 0)], self.step + 1)
            return True
        waiting = self._waiting.setdefault(channel, [])
        if len(waiting) == known.up_to:
            return False
        waiting.append((self._weight, tensor.detach().clone()))
        if channel not in self._under_way:
            self._push_waiting(channel)
        return True

    def _push(self, channel: str, weight: float, tensor: torch.Tensor) -> None:
        known = self.job.channels[channel]
        hypers = {name: self._hypers[name] for name in known.travelling}
        header = Push(channel, self._number(channel), weight, hypers)
        self._send(known.server, Message(header, tensor.detach().contiguous()))

    def _push_waiting(self, channel: str) -> None:
        waiting = self._waiting.pop(channel, [])
        if waiting:
            self._under_way.add(channel)
            weight = sum(weight for weight, _ in waiting)
            wire = self.job.channels[channel].sent.dtype
            self._push(channel, weight, together(self.job.channels[channel], waiting).to(wire))

    def pull(self, channel: str, later: bool, when: str = "step", on_host: Form | None = None) -> torch.Tensor | None:
        """The value as it is in this step, after it (`later`), as it was before it, or the latest that has come.

        `on_host`: pulled by the first trainer of this host, who gives it to the others; its shape and dtype.
        """
        if on_host is None:
            return self._pull(channel, later, when)
        if not self.transport.is_first_on_host():
            self.transport.progress(self.step, f"copy {channel}")
            value = self.transport.take_on_host(*on_host, channel)
            if value is not None or not self.transport.is_first_on_host():
                return value
        value = self._pull(channel, later, when)  # the first, or the next after it has left
        if value is not None:
            self.transport.give_on_host(value, channel)
        return value

    def _pull(self, channel: str, later: bool, when: str) -> torch.Tensor | None:
        if when == "latest":
            return self._latest(channel)
        key = self._key(channel, self._number(channel) + int(later) - int(when == "before"))
        value = self.fetch(*key)
        if value is not None and key in self._left:
            self._left[key] -= 1
            if self._left[key] == 0:
                self._forget(key)
        return value

    def push_rows(self, channel: str, tensor: torch.Tensor, ids: torch.Tensor, skip: int) -> bool:
        """Sends a contribution to the rows that were asked for in this step, without the first `skip`."""
        self.transport.progress(self.step, f"push {channel}")
        for name, rows, left in self._rows.parts(channel, self.call, tensor, skip):
            known = self.job.channels[name]
            hypers = {hyper: self._hypers[hyper] for hyper in known.travelling}
            header = Push(name, self.call, self._weight_of_call, hypers, left)
            self._send(known.server, Message(header, rows.detach().contiguous()))
        return True

    def pull_rows(self, channel: str, ids: torch.Tensor, when: str) -> torch.Tensor | None:
        """The rows of these ids as they are in this step, or now."""
        return self._rows.pull(channel, ids, self._as_of(self.call if self._training else NEVER))

    def rows_of(self, name: str, ids: torch.Tensor) -> torch.Tensor | None:
        """These rows of what one server keeps, as of the steps done; asks the first time, None while they are not there."""
        return self._rows.of_piece(name, ids, self._as_of(NEVER))

    def ask_rows(self, channel: str, ids: torch.Tensor, call: int) -> None:
        """Asks for the rows of a call, before it needs them."""
        self._rows.pull(channel, ids, self._as_of(call))

    def _as_of(self, call: int) -> Callable[[str], PullRows]:
        """Asks for rows as of the step of a call, in which their gradient will be pushed; or never."""
        step = self.step if call == NEVER else max(self._base, call // self.job.plan.accumulate)

        def header(channel: str) -> PullRows:
            if channel in self._now:
                return PullRows(channel, self._settings, "now", 0, call)
            return PullRows(channel, step, "step", 0, call)

        return header

    def know(self, found: Mapping[str, list[torch.Tensor]]) -> None:
        """What nodes of this step's program give was computed ahead."""
        self._known = found

    def ahead(self, node: str) -> list[torch.Tensor] | None:
        """See `executor.Port`."""
        return self._known.get(node)

    def _latest(self, channel: str) -> torch.Tensor | None:
        """The value that has come last; once in a step the next is asked for, and comes in its time."""
        if (channel, LATEST) not in self._asked and self._refreshed.get(channel) != self.step:
            self._refreshed[channel] = self.step
            self._ask(channel, (channel, LATEST), "now")
        return self._got.get((channel, LATEST))

    def fetch(self, channel: str, version: int, when: When = "now") -> torch.Tensor | None:
        """The value once `version` steps are in it; asks for it the first time, None while it is not there.

        when  of what is updated as contributions come: as it is "now", or at the "end", when all trainers have left
        """
        key = self._key(channel, version)
        if key not in self._got:
            self.transport.progress(self.step, f"pull {channel}")
            if key not in self._asked:
                self._ask(channel, key, when)
        return self._got.get(key)

    def collect(self, channel: str, version: int, when: When) -> torch.Tensor | None:
        """Like `fetch`, of what is kept or given to the user: nobody else has its memory."""
        value = self.fetch(channel, version, when)
        return value if value is None or value.nbytes > LARGEST_NBYTES else value.clone()

    def fresh(self) -> int:
        """A number to fetch values by that no earlier answer stands for."""
        self._fresh -= 1
        return self._fresh

    def release(self) -> None:
        """Forgets all values that have come: whoever needs one asks again."""
        for key in [key for key in self._got if key[1] != LATEST]:
            self._forget(key)

    def _forget(self, key: Key) -> None:
        del self._got[key]
        self._asked.discard(key)

    def ask(self, channels: Sequence[tuple[str, int]], version: int, when: When = "now") -> None:
        """Asks ahead, each channel as of so many steps later: a server answers as soon as the version is there.

        What is pulled for a whole host only its first trainer asks for.
        """
        for channel, at in channels:
            key = self._key(channel, version + at)
            ours = channel not in self._copied or self.transport.is_first_on_host()
            if ours and key not in self._asked:
                self._ask(channel, key, when)

    def _ask(self, channel: str, key: Key, when: When) -> None:
        self._asked.add(key)
        pull = Pull(*key)
        if channel in self._now:
            self._order.setdefault(channel, deque()).append(key)
            pull = Pull(channel, self._settings, when)
        self._send(self.job.owners[channel], Message(pull))

    def _key(self, channel: str, version: int) -> Key:
        """What no update writes is asked for as of when all values were last set: at no later version is it another.

        Nor is there an older one than that.
        """
        if version < LATEST:
            return channel, version
        return channel, self._base if channel in self._fixed else max(self._base, version)

    def give(self, channel: str, version: int, tensor: torch.Tensor) -> None:
        """Sets a value on its server: at the start, or when a checkpoint is loaded."""
        self._send(self.job.owners[channel], Message(Value(channel, version), tensor.detach().contiguous()))

    def give_start(self, channel: str, version: int, record: str = "", number: float = 0.0) -> None:
        """Sets a value on its server, which makes it: from a record of this digest, or all of one number."""
        self._send(self.job.owners[channel], Message(Start(channel, version, record, number)))

    def start(self, channel: str, tensor: torch.Tensor, group: str = "") -> None:
        self.transport.progress(self.step, f"all-reduce {channel}")
        self._works[channel] = (self.transport.all_reduce(tensor, self._notes.get(channel, channel), group), tensor)

    def start_later(self, channel: str, tensor: torch.Tensor) -> None:
        self.transport.progress(self.step, f"all-reduce {channel}")
        work = self.transport.all_reduce(tensor, self._notes.get(channel, channel))
        self._later.setdefault(channel, deque()).append((work, tensor))

    def finish_before(self, channel: str, shape: list[int]) -> torch.Tensor | None:
        self.transport.progress(self.step, f"wait {channel}")
        begun = self._later.get(channel)
        if not begun or list(begun[0][1].shape) != shape:
            found = list(begun[0][1].shape) if begun else "nothing"
            raise JobError(
                f"'{channel}' of the step before has the shape {found}, expected {shape}: this step joins other gradients than "
                "that one, as its batch is of another shape or a setting has changed. Say bucket_mb: 0 with delay: 1."
            )
        if not begun[0][0].done():
            return None
        return begun.popleft()[1]

    @property
    def has_begun_later(self) -> bool:
        """Whether sums are under way that the next step waits for."""
        return any(self._later.values())

    def drop_later(self) -> None:
        """Forgets sums that are under way, once they are done: all trainers have begun them."""
        for work, _ in [each for begun in self._later.values() for each in begun]:
            while not work.done():
                pass
        self._later = {}

    def start_on_host(self, channel: str, tensor: torch.Tensor) -> None:
        self.transport.progress(self.step, f"sum {channel}")
        self._sums[channel] = (self.transport.sum_on_host(tensor, channel), tensor)

    def finish_on_host(self, channel: str) -> torch.Tensor | None:
        """Who is first then pushes for the others: nobody leaves within a step."""
        work, tensor = self._sums[channel]
        self.transport.progress(self.step, f"wait {channel}")
        if not work.done():
            return None
        self._speaks = work.is_first
        del self._sums[channel]
        return tensor

    def finish(self, channel: str) -> torch.Tensor | None:
        work, tensor = self._works[channel]
        self.transport.progress(self.step, f"wait {channel}")
        if not work.done():
            return None
        del self._works[channel]
        return tensor

    def start_parts(self, channel: str, tensors: Sequence[torch.Tensor], group: str = "") -> None:
        self.transport.progress(self.step, f"reduce-scatter {channel}")
        self._parts.reduce(channel, tensors, group)

    def finish_own(self, channel: str) -> torch.Tensor | None:
        self.transport.progress(self.step, f"wait {channel}")
        return self._parts.own(channel)

    def start_whole(self, channel: str, parts: Sequence[torch.Tensor], group: str = "") -> None:
        self.transport.progress(self.step, f"gather {channel}")
        self._parts.gather(channel, parts, group)

    def start_sum(self, channel: str, tensors: Sequence[torch.Tensor], keeper: int, group: str = "") -> None:
        self.transport.progress(self.step, f"reduce {channel}")
        self._parts.reduce_to(channel, tensors, keeper, group)

    def start_given(self, channel: str, values: Sequence[torch.Tensor], keeper: int, group: str = "") -> None:
        self.transport.progress(self.step, f"broadcast {channel}")
        self._parts.give(channel, values, keeper, group)

    def finish_whole(
        self, channel: str, sizes: Sequence[int], places: Sequence[torch.Tensor | None] = ()
    ) -> list[torch.Tensor] | None:
        self.transport.progress(self.step, f"wait {channel}")
        return self._parts.whole(channel, sizes, places)

    def start_rows(self, channel: str, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Gives all trainers rows of a gradient, of distinct ids."""
        self.transport.progress(self.step, f"gather {channel}")
        if channel not in self._gatherings:
            self._gatherings[channel] = Gathering(channel, self.transport.gather)
        held = self._held.pop(channel, [])
        self._gatherings[channel].start(*(merged([*held, (ids, rows)], "sum") if held else (ids, rows)))

    def hold_rows(self, channel: str, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Keeps rows of a gradient, of distinct ids, until the next are gathered."""
        self._held.setdefault(channel, []).append((ids.to(torch.int64), rows.detach()))

    def finish_rows(self, channel: str, merge: str) -> list[torch.Tensor] | None:
        """The ids and merged rows of all trainers, or None while they are not there."""
        self.transport.progress(self.step, f"wait {channel}")
        return self._gatherings[channel].finish(merge)

    def order(self, piece: str, act: Act, step: int, given: Mapping, number: int = -1, at_end: bool = False) -> int:
        """Has a server do something with its part of a table of any ids, as of so many steps (see `TableClient`)."""
        self.transport.progress(self.step, f"{act} {piece}")
        arriving = piece in self._now
        version = self._settings if arriving and act == "read" else step
        when = "step" if not arriving else "end" if at_end else "now"
        return self.tables.order(piece, act, version, when, given, number)

    def resume(self, step: int) -> None:
        """All values have been given: servers go on at `step`."""
        for part in self.job.servers:
            self._send(part.rank, Message(Resume(step)))

    def restart(self, step: int) -> None:
        """All values are being set anew, to be those of `step`: what came before is old."""
        self._base = step
        self._settings += 1
        self._got, self._asked, self._refreshed, self._held = {}, set(), {}, {}
        self.drop_later()

    def tick(self, clock: int, staleness: int) -> None:
        """Says that so many steps have been pushed, to who keeps the clocks."""
        self._send(self.job.plan.reducer or 0, Message(Tick(clock, staleness)))

    def is_free(self, clock: int) -> bool:
        """Whether no other trainer is too far behind one that has pushed so many steps."""
        return self._released >= clock

    def flush(self) -> None:
        """Sends what is kept back."""
        for channel in list(self._waiting):
            self._push_waiting(channel)

    def leave(self, step: int) -> None:
        self.flush()
        if self.job.joins_hosts:
            self.transport.leave_host()
        for part in self.job.servers:
            self._send(part.rank, Message(Leave(step)))

    def fail(self, reason: str) -> None:
        """Tells servers that this trainer ends early; best effort, they may be gone too."""
        for part in self.job.servers:
            with suppress(SyncwrightError):
                self._send(part.rank, Message(Failure(reason)))

    def take(self, sender: Address, message: Message) -> None:
        """What a server sent."""
        match message.header:
            case Value(channel=channel, version=version) if message.tensor is not None:
                key = self._order[channel].popleft() if channel in self._now else (channel, version)
                self._got[key] = message.tensor
                if key[1] == LATEST:
                    self._asked.discard(key)
            case Rows() as rows if message.tensor is not None:
                self._rows.take(rows, message.tensor)
            case Part() as part if message.tensor is not None:
                self.tables.take(part, message.tensor)
            case Taken(channel=channel):
                self._under_way.discard(channel)
                self._push_waiting(channel)
            case Go(clock=clock):
                self._released = max(self._released, clock)
            case Failure(reason=reason):
                raise cannot_go_on(self.transport.me, reason)
            case other:
                raise JobError(f"{sender} sent a {type(other).__name__}, which trainers do not take.")

    def _send(self, server: int, message: Message) -> None:
        self.transport.send(Address(Kind.SERVER, server), message)


def _notes(job: Job) -> dict[str, str]:
    """What errors call a collective: "bucket.0 (weight.grad, bias.grad and 3 more)"."""
    programs = [each.trainer["step"] for each in (*(span.job for span in job.spans), job)]
    joined = (ops.all_reduce, ops.all_reduce_later, ops.reduce_scatter, ops.reduce_to, ops.gather_parts, ops.give)
    nodes = [n for p in programs for op in joined for n in p.graph.find_nodes(op="call_function", target=op)]
    inside = {str(n.args[1]): n.meta.get(INSIDE, ()) for n in nodes}
    return {name: f"{name} ({_listed(values)})" for name, values in inside.items() if values}


def _listed(names: tuple[str, ...], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
