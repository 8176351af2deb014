"""Plan: the rules resolved against one program, complete: nothing is left to decide after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from syncwright.document import Node, read, write
from syncwright.errors import PlanError
from syncwright.near import did_you_mean
from syncwright.plan.groups import Groups, fault
from syncwright.plan.partition import Hashed
from syncwright.plan.precision import Dynamic
from syncwright.plan.rules import BufferPolicy, Clip
from syncwright.plan.sync import AllGather, Shard, Sync, asks_for_hosts, not_accumulated, served_by
from syncwright.typed import Count, Index, Size, check_fields, decode, encode

VERSION = 1
_KEYS = ("version", "digest", "trainers", "servers", "reducer", "variables", "buffers", "notes")
_RARE = ("clip", "sync_batch_norm", "memory_gb", "accumulate", "loss_scale", "hosts")
Travelling = Literal["", "touched", "all"]
_HEADER = "# How each variable is shared, complete. Made for the program with this digest; may be edited by hand.\n"


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [start, stop) of a variable, and the server that owns them; None: trainers keep them.

    shards  the number of virtual shards, where [start, stop) are such
    """

    variable: str
    index: int
    start: int
    stop: int
    owner: int | None
    shards: int = 0


@dataclass(frozen=True, slots=True)
class Sharing:
    """How one variable is shared.

    sizes   of its pieces along `axis`, in order; one piece is the whole (a 0-d variable has size 1). In virtual shards,
            where it is kept by these
    owners  the server of each piece; () where servers keep nothing of the variable
    keeper  under `shard`, of a variable that cannot be cut: the trainer that keeps it whole
    rows    of a table of which only those rows travel that a batch looks up (or, where trainers train alone, some batches):
            "touched" or "all", the rows that an update writes; "" where the whole variable travels
    """

    variable: str
    sync: Sync
    sizes: tuple[Index, ...]
    owners: tuple[Index, ...] = ()
    axis: Literal[0] = 0
    rows: Travelling = ""
    keeper: Index | None = None

    def __post_init__(self) -> None:
        check_fields(self, PlanError)
        if self.keeper is not None and not isinstance(self.sync, Shard):
            self._refuse(
                f"keeper: {self.keeper}", "none: no one trainer keeps it", "Take it out, or share it by shard."
            )
        served = served_by(self.sync) is not None
        if not self.sizes or (len(self.sizes) > 1 and 0 in self.sizes):
            self._refuse(f"sizes {list(self.sizes)}", "at least one piece and none empty", "Correct the sizes.")
        if served and len(self.owners) != len(self.sizes):
            found = f"{len(self.sizes)} sizes and {len(self.owners)} owners"
            self._refuse(found, "one owner for each piece", "Give both lists the same length.")
        gathered = isinstance(self.sync, AllGather)
        if not (served or gathered) and self.rows:
            do = "Take it out, or share it by parameter_server or all_gather."
            self._refuse(f"rows: {self.rows}", "none: all of it travels, or nothing", do)
        if gathered and not self.rows:
            self._refuse("all_gather without rows", "rows: touched or rows: all", "Say which rows an update writes.")
        if not served and (self.owners or len(self.sizes) > 1):
            found = f"sizes {list(self.sizes)} and owners {list(self.owners)}"
            self._refuse(found, "one size and no owner: trainers keep it whole", "Take the rest out.")

    @property
    def shards(self) -> int:
        """How many virtual shards it is kept by; 0: none."""
        served = served_by(self.sync)
        return served.partition.shards if served is not None and isinstance(served.partition, Hashed) else 0

    def _refuse(self, found: str, expected: str, do: str) -> None:
        raise PlanError(f"variable {self.variable!r}: found {found}, expected {expected}. {do}")

    @property
    def pieces(self) -> tuple[Piece, ...]:
        stops = tuple(accumulate(self.sizes))
        owners = self.owners or (None,)
        return tuple(
            Piece(self.variable, index, stop - size, stop, owner, self.shards)
            for index, (size, stop, owner) in enumerate(zip(self.sizes, stops, owners, strict=True))
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """How every variable of one program is shared.

    digest    of the program that the plan was made for
    trainers  how many trainers take part
    servers   how many servers take part; more may run, fewer may not
    reducer   the server that combines global values such as the clip norm; None: all is on trainers
    sharings  one per parameter, in registration order
    buffers   (name, policy) for every buffer that the step writes
    notes     sentences about what a reader of the rules would not expect
    clip      what a norm of several gradients is of: merged gradients, or each trainer's own, before they are merged
    hosts     how many trainers each host has, in the order of their numbers, where it matters who shares a host
    sync_batch_norm  whether batch norm in train mode normalises by the examples of all trainers, and not each by its own
    memory_gb  gigabytes (2**30 bytes) that a trainer may hold at once in a step; None: as many as it takes
    accumulate  so many calls of a step make one update, of the gradient of all their batches together
    loss_scale  by what the loss of a step without a GradScaler is scaled; None: by nothing
    """

    digest: str
    trainers: Count
    servers: Index
    reducer: Index | None
    sharings: tuple[Sharing, ...]
    buffers: tuple[tuple[str, BufferPolicy], ...] = ()
    notes: tuple[str, ...] = ()
    clip: Clip = "global"
    hosts: tuple[Count, ...] = ()
    sync_batch_norm: bool = False
    memory_gb: Size | None = None
    accumulate: Count = 1
    loss_scale: Dynamic | None = None

    def __post_init__(self) -> None:
        check_fields(self, PlanError)
        self._check_hosts()
        self._check_accumulated()
        for sharing in self.sharings:
            for owner in sharing.owners:
                self._check_server(owner, f"variable {sharing.variable!r}: found owner")
            if (wrong := fault(sharing.sync, self.groups)) is not None:
                raise PlanError(f"variable {sharing.variable!r}: found {wrong[0]}, expected {wrong[1]}. {wrong[2]}")
            if self.sync_batch_norm and len(self.groups.members(self.groups.of(sharing.sync))) > 1:
                raise PlanError(
                    f"variable {sharing.variable!r}: found it reduced over some trainers with sync_batch_norm: true, expected "
                    "gradients of all, whose examples are normalised together. Leave over or sync_batch_norm out."
                )
            if isinstance(sharing.sync, Shard) and sharing.keeper is not None:
                self._check_keeper(sharing.variable, sharing.keeper, self.groups.cut_among(sharing.sync))
        used = any(sharing.owners for sharing in self.sharings)
        if self.reducer is not None:
            self._check_server(self.reducer, "reducer: found server")
        if used and self.reducer is None:
            raise PlanError("reducer: found none, expected a server, as servers own variables. Name one.")
        for names in ([sharing.variable for sharing in self.sharings], [name for name, _ in self.buffers]):
            _refuse_repeated(names)

    def _check_server(self, server: int, found: str) -> None:
        if server >= self.servers:
            raise PlanError(
                f"{found} {server}, expected one of the plan's {self.servers} servers, which count from 0. "
                f"Raise `servers` or name a lower one."
            )

    def _check_keeper(self, variable: str, keeper: int, among: int) -> None:
        if keeper >= among:
            whose = "the plan's" if among == self.trainers else "a host's"
            raise PlanError(
                f"variable {variable!r}: found keeper {keeper}, expected one of {whose} {among} trainers, which count from 0. "
                "Raise `trainers` or name a lower one."
            )

    def _check_hosts(self) -> None:
        joined = next(((s.variable, by) for s in self.sharings if (by := asks_for_hosts(s.sync))), None)
        if (self.hosts or joined is not None) and sum(self.hosts) != self.trainers:
            about = "" if joined is None else f", as {joined[0]!r} is shared with {joined[1]}"
            raise PlanError(
                f"hosts: found {list(self.hosts)}, expected the number of trainers of each host, {self.trainers} together"
                f"{about}. Correct `hosts`."
            )

    @property
    def groups(self) -> Groups:
        """Which trainers communicate with each other."""
        return Groups(self.trainers, self.hosts)

    def _check_accumulated(self) -> None:
        for sharing in self.sharings if self.accumulate > 1 else ():
            if (why := not_accumulated(sharing.sync, bool(sharing.rows))) is not None:
                raise PlanError(
                    f"accumulate: found {self.accumulate} with variable {sharing.variable!r}, {why}. Leave accumulate out, or "
                    "share the variable otherwise."
                )

    def sharing(self, name: str) -> Sharing:
        """How the variable of this name is shared."""
        for sharing in self.sharings:
            if sharing.variable == name:
                return sharing
        known = [sharing.variable for sharing in self.sharings]
        advice = did_you_mean(name, known, f"The plan has {len(known)} variables.")
        raise PlanError(f"variable {name!r}: found nothing of this name in the plan. {advice}")

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """The pieces of the variable of this name, in order along its axis."""
        return self.sharing(name).pieces

    def all_pieces(self) -> Iterator[Piece]:
        """Every piece of every variable, in registration order."""
        for sharing in self.sharings:
            yield from sharing.pieces

    def to_yaml(self) -> str:
        """The plan as text that a person reads, edits and diffs; `Plan.from_yaml` gives it back, equal."""
        document = {
            "version": VERSION,
            "digest": self.digest,
            "trainers": self.trainers,
            "servers": self.servers,
            "reducer": self.reducer,
            "variables": {sharing.variable: _written(sharing) for sharing in self.sharings},
            "buffers": dict(self.buffers),
            "notes": self.notes,
            **({"clip": self.clip} if self.clip != "global" else {}),
            **({"sync_batch_norm": True} if self.sync_batch_norm else {}),
            **({"memory_gb": self.memory_gb} if self.memory_gb is not None else {}),
            **({"accumulate": self.accumulate} if self.accumulate > 1 else {}),
            **({"loss_scale": encode(self.loss_scale, complete=True)} if self.loss_scale is not None else {}),
            **({"hosts": self.hosts} if self.hosts else {}),
        }
        return _HEADER + write(document, flow=("sync",))

    @classmethod
    def from_yaml(cls, source: str | Path) -> Plan:
        """A plan from a file (a `Path`, or a name that ends in .yaml or .yml) or from YAML text."""
        top = read(source, "plan", PlanError)
        nodes = _complete_record(top)
        if decode(nodes["version"], int) != VERSION:
            raise nodes["version"].error(str(VERSION), "Make the plan anew from its rules.")
        variables = nodes["variables"].mapping("a mapping from variables to sharings", "Correct it.")
        buffers = nodes["buffers"].mapping("a mapping from buffers to policies", "Correct it.")
        values: dict[str, Any] = {
            "digest": decode(nodes["digest"], str),
            "trainers": decode(nodes["trainers"], Count),
            "servers": decode(nodes["servers"], Index),
            "reducer": decode(nodes["reducer"], Index | None),
            "sharings": tuple(_read_sharing(name, node) for name, node in variables.items()),
            "buffers": tuple((name, decode(node, BufferPolicy)) for name, node in buffers.items()),
            "notes": decode(nodes["notes"], tuple[str, ...]),
            "clip": decode(nodes["clip"], Clip) if "clip" in nodes else "global",
            "sync_batch_norm": decode(nodes["sync_batch_norm"], bool) if "sync_batch_norm" in nodes else False,
            "memory_gb": decode(nodes["memory_gb"], Size) if "memory_gb" in nodes else None,
            "accumulate": decode(nodes["accumulate"], Count) if "accumulate" in nodes else 1,
            "loss_scale": decode(nodes["loss_scale"], Dynamic | None) if "loss_scale" in nodes else None,
            "hosts": decode(nodes["hosts"], tuple[Count, ...]) if "hosts" in nodes else (),
        }
        try:
            return cls(**values)
        except PlanError as fault:
            raise PlanError(f"{top.source}: {fault}") from None


def _refuse_repeated(names: list[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise PlanError(f"{name!r}: found {count} times in one plan, expected once. Keep one.")


def _written(sharing: Sharing) -> dict[str, Any]:
    return {
        "sync": encode(sharing.sync, complete=True),
        "axis": sharing.axis,
        "sizes": sharing.sizes,
        "owners": sharing.owners,
        **({"rows": sharing.rows} if sharing.rows else {}),
        **({"keeper": sharing.keeper} if sharing.keeper is not None else {}),
    }


def _complete_record(top: Node) -> dict[str, Node]:
    if isinstance(top.value, dict) and "default" in top.value:
        raise top.error("a complete plan", "Read them with Rules.from_yaml and resolve them.", found="rules")
    return _all_of(top, _KEYS, "Write every part; a plan is complete.", _RARE)


def _all_of(node: Node, keys: tuple[str, ...], do: str, rare: tuple[str, ...] = ()) -> dict[str, Node]:
    nodes = node.record((*keys, *rare), do)
    for key in keys:
        if key not in nodes:
            raise node.error(", ".join(keys), do, found=f"no `{key}`")
    return nodes


def _read_sharing(name: str, node: Node) -> Sharing:
    rare = ("rows", "keeper")
    nodes = _all_of(node, ("sync", "axis", "sizes", "owners"), "Write all four; a plan is complete.", rare)
    sync = decode(nodes["sync"], Sync, "Write one of them.")
    sizes = decode(nodes["sizes"], tuple[Index, ...])
    owners = decode(nodes["owners"], tuple[Index, ...])
    axis = decode(nodes["axis"], Literal[0])
    rows = decode(nodes["rows"], Travelling) if "rows" in nodes else ""
    keeper = decode(nodes["keeper"], Index) if "keeper" in nodes else None
    try:
        return Sharing(name, sync, sizes, owners, axis, rows, keeper)
    except PlanError as fault:
        raise PlanError(f"{node.where}: {fault}") from None
