"""Membership: this process's place in the job, read from the environment that a launcher set."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from syncwright.cluster import trainers_by_host
from syncwright.errors import ClusterError
from syncwright.runtime.messages import Address, Kind

_START = "Start all roles with `syncwright run` or torchrun, which set these variables."


DISABLED_PASSES = "SYNCWRIGHT_DISABLE_PASSES"
METRICS = "SYNCWRIGHT_METRICS"


class Host(StrEnum):
    """Who listens where the store is."""

    NOBODY = "nobody"
    """There is one process: the store is in its memory."""
    OTHER = "other"
    """The launcher, or torchrun's agent."""
    TRAINER_0 = "trainer 0"
    """Started by hand with torchrun's variables and no agent."""


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Where the job's key-value store listens."""

    host: str
    port: int
    hosted_by: Host

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


IN_MEMORY = StoreAddress("", 0, Host.NOBODY)


@dataclass(frozen=True, slots=True)
class Membership:
    """This process's place in the job.

    me           the role of this process; the server threads that it may also run are in `hosted`
    trainers     how many processes are trainers
    servers      how many processes are servers; 0: servers are threads of the trainers' processes
    host         this host's name, for people and to tell hosts apart
    local_rank   number of this trainer on its host (picks its device); of this server among servers
    one_host     all processes are on this host
    store        where the job's store listens
    address      by which other hosts reach this one, where SYNCWRIGHT_HOST says so; None: found by trial
    attempt      tells a restarted job from the one before, on the same store
    sockets      a private folder that outlives this process and is removed by its owner; None: make one
    metrics      whether every role serves its numbers over HTTP
    hosts        how many trainers each host has, in the order of their numbers; () where nobody knows
    """

    me: Address
    trainers: int
    servers: int
    host: str
    local_rank: int
    one_host: bool
    store: StoreAddress
    address: str | None = None
    attempt: str = "0"
    sockets: Path | None = None
    metrics: bool = False
    hosts: tuple[int, ...] = ()

    @property
    def alone(self) -> bool:
        """One process is the whole job: servers are embedded in it."""
        return self.trainers == 1 and self.servers == 0

    def everyone(self, servers: int) -> list[Address]:
        """All roles of a job whose plan names `servers` servers."""
        trainers = [Address(Kind.TRAINER, rank) for rank in range(self.trainers)]
        return trainers + [Address(Kind.SERVER, rank) for rank in range(servers)]

    def hosted(self, servers: int) -> list[Address]:
        """Which of the plan's `servers` servers run in this process.

        2 trainers, no server processes, 3 servers: trainer 0 hosts servers 0 and 2, trainer 1 server 1.
        """
        if self.servers and servers > self.servers:
            raise ClusterError(
                f"servers: found {self.servers} in the job, expected at least {servers}, as the plan names. "
                f"Start the job with --servers {servers}, or make the plan for {self.servers}."
            )
        if self.servers:
            return [self.me] if self.me.kind is Kind.SERVER and self.me.rank < servers else []
        return [Address(Kind.SERVER, rank) for rank in range(self.me.rank, servers, self.trainers)]


def membership(environment: Mapping[str, str], metrics: bool | None = None) -> Membership:
    """This process's place, from what `syncwright run` or torchrun set; alone if neither did.

    metrics: whether roles serve their numbers; None: as the environment says.
    """
    asked = environment.get(METRICS) == "1" if metrics is None else metrics
    return replace(_place(environment), metrics=asked)


def _place(environment: Mapping[str, str]) -> Membership:
    if "SYNCWRIGHT_ROLE" in environment:
        return _from_launcher(environment)
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _from_torchrun(environment)
    host = socket.gethostname()
    return Membership(Address(Kind.TRAINER, 0), 1, 0, host, 0, one_host=True, store=IN_MEMORY, hosts=(1,))


def disabled_passes(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The passes that `syncwright run --disable-passes a,b` leaves out of every role's lowering."""
    return tuple(name.strip() for name in environment.get(DISABLED_PASSES, "").split(",") if name.strip())


def _from_launcher(environment: Mapping[str, str]) -> Membership:
    role = _text(environment, "SYNCWRIGHT_ROLE")
    if role not in {*Kind}:
        raise ClusterError(f"SYNCWRIGHT_ROLE is {role!r}; expected trainer or server. {_START}")
    trainers = _number(environment, "SYNCWRIGHT_TRAINERS", at_least=1)
    servers = _number(environment, "SYNCWRIGHT_SERVERS")
    me = Address(Kind(role), _number(environment, "SYNCWRIGHT_RANK"))
    _check_rank(me, trainers if me.kind is Kind.TRAINER else servers)
    host, _, port = _text(environment, "SYNCWRIGHT_STORE").rpartition(":")
    if not host or not port.isdecimal():
        raise ClusterError(f"SYNCWRIGHT_STORE is {environment['SYNCWRIGHT_STORE']!r}; expected host:port. {_START}")
    return Membership(
        me,
        trainers,
        servers,
        socket.gethostname(),
        me.rank,
        one_host=_is_loopback(host),
        store=StoreAddress(host, int(port), Host.OTHER),
        address=environment.get("SYNCWRIGHT_HOST"),
        sockets=Path(environment["SYNCWRIGHT_SOCKETS"]) if "SYNCWRIGHT_SOCKETS" in environment else None,
        hosts=trainers_by_host(environment, trainers) or (trainers,),
    )


def _from_torchrun(environment: Mapping[str, str]) -> Membership:
    trainers = _number(environment, "WORLD_SIZE", at_least=1)
    me = Address(Kind.TRAINER, _number(environment, "RANK"))
    _check_rank(me, trainers)
    local = _number(environment, "LOCAL_WORLD_SIZE", at_least=1) if "LOCAL_WORLD_SIZE" in environment else 0
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    one_host = trainers in (1, local) or _is_loopback(_text(environment, "MASTER_ADDR"))
    return Membership(
        me,
        trainers,
        0,
        socket.gethostname(),
        _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else me.rank,
        one_host=one_host,
        store=StoreAddress(
            _text(environment, "MASTER_ADDR"),
            _number(environment, "MASTER_PORT"),
            Host.OTHER if agent else Host.TRAINER_0,
        ),
        address=environment.get("SYNCWRIGHT_HOST"),
        attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
        hosts=trainers_by_host(environment, trainers) or ((trainers,) if one_host else ()),
    )


def _check_rank(me: Address, count: int) -> None:
    if me.rank >= count:
        raise ClusterError(
            f"this process is {me}, but the job has {count} {me.kind}s; expected a number below {count}. {_START}"
        )


def _text(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise ClusterError(f"{name} is not set; expected it beside the other variables of a launcher. {_START}")
    return environment[name]


def _number(environment: Mapping[str, str], name: str, at_least: int = 0) -> int:
    text = _text(environment, name)
    if not text.isdecimal() or int(text) < at_least:
        raise ClusterError(f"{name} is {text!r}; expected a whole number, at least {at_least}. {_START}")
    return int(text)


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")
