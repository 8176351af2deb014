"""Cluster: facts about a job's machines. No choice is made here, no environment is read unasked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from syncwright.document import Node, read
from syncwright.errors import ClusterError
from syncwright.typed import Amount, Count, Index, check_fields, decode

Device = Literal["cpu", "cuda"]
HOSTS = "SYNCWRIGHT_HOSTS"
BANDWIDTH_GBPS, LATENCY_US = 10.0, 50.0
_KEYS = ("trainers", "servers", "hosts", "device", "bandwidth_gbps", "latency_us")


@dataclass(frozen=True, slots=True)
class Host:
    """A machine, and the numbers of the trainers and servers on it."""

    name: str
    trainers: tuple[Index, ...] = ()
    servers: tuple[Index, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, ClusterError)


@dataclass(frozen=True, slots=True)
class Cluster:
    """The machines of a job.

    trainers, servers  how many of each
    hosts              where each of them lies; every trainer and server on exactly one host
    device             what trainers compute on
    bandwidth_gbps     of the link between two hosts, gigabits (10**9 bits) per second
    latency_us         of that link, microseconds one way
    """

    trainers: Count
    servers: Index
    hosts: tuple[Host, ...]
    device: Device = "cpu"
    bandwidth_gbps: Annotated[float, msgspec.Meta(gt=0)] = BANDWIDTH_GBPS
    latency_us: Amount = LATENCY_US

    def __post_init__(self) -> None:
        check_fields(self, ClusterError)
        names = [host.name for host in self.hosts]
        if len(set(names)) < len(names):
            raise ClusterError(f"hosts: found {', '.join(names)}, expected each name once. Rename or join them.")
        for role, count in (("trainers", self.trainers), ("servers", self.servers)):
            placed = sorted(index for host in self.hosts for index in getattr(host, role))
            if placed != list(range(count)):
                raise ClusterError(
                    f"hosts: found the {role} {placed}, expected each of the {count} {role}, which "
                    f"count from 0, on exactly one host. Correct the lists, or use Cluster.of."
                )

    @classmethod
    def of(
        cls,
        trainers: int,
        servers: int = 0,
        hosts: Sequence[str] = ("localhost",),
        device: Device = "cpu",
        bandwidth_gbps: float = BANDWIDTH_GBPS,
        latency_us: float = LATENCY_US,
    ) -> Cluster:
        """A cluster with trainers and servers spread evenly over the hosts, in order.

        Cluster.of(3, 1, hosts=("a", "b")): host a has trainers 0 and 1 and server 0, host b has trainer 2.
        """
        if not hosts:
            raise ClusterError("hosts: found none, expected at least one name. Name one, such as localhost.")
        share = _evenly(trainers, len(hosts))
        served = _evenly(servers, len(hosts))
        return cls._counted(list(zip(hosts, share, served, strict=True)), device, bandwidth_gbps, latency_us)

    @classmethod
    def _counted(
        cls, counts: Sequence[tuple[str, int, int]], device: Any, bandwidth_gbps: float, latency_us: float
    ) -> Cluster:
        """From (host, how many trainers, how many servers), numbered in order."""
        hosts, trainers, servers = [], 0, 0
        for name, here, served in counts:
            numbers = tuple(range(trainers, trainers + here)), tuple(range(servers, servers + served))
            hosts.append(Host(name, *numbers))
            trainers, servers = trainers + here, servers + served
        return cls(trainers, servers, tuple(hosts), device, bandwidth_gbps, latency_us)

    @classmethod
    def from_yaml(cls, source: str | Path) -> Cluster:
        """A cluster from a file (a `Path`, or a name that ends in .yaml or .yml) or from YAML text.

        hosts:                                     or, on one host:
          node0: {trainers: 2, servers: 1}            trainers: 2
          node1: {trainers: 2}                        servers: 1
        device: cuda
        bandwidth_gbps: 100
        latency_us: 5
        """
        top = read(source, "cluster", ClusterError)
        nodes = top.record(_KEYS, "Write `trainers: 2`, or `hosts:` with the trainers of each host.")
        facts: dict[str, Any] = {
            "device": decode(nodes["device"], Device) if "device" in nodes else "cpu",
            "bandwidth_gbps": _number(nodes, "bandwidth_gbps", BANDWIDTH_GBPS),
            "latency_us": _number(nodes, "latency_us", LATENCY_US),
        }
        try:
            return cls._counted(_host_counts(top, nodes), **facts)
        except ClusterError as fault:
            raise ClusterError(str(fault) if top.source in str(fault) else f"{top.source}: {fault}") from None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], device: Device = "cpu") -> Cluster:
        """A cluster from what torchrun and Syncwright's launcher tell a process.

        WORLD_SIZE, LOCAL_WORLD_SIZE, RANK and GROUP_RANK are torchrun's: trainers, trainers per host, this
        trainer, this host. SYNCWRIGHT_TRAINERS and SYNCWRIGHT_SERVERS are our launcher's; SYNCWRIGHT_HOSTS says how
        many trainers each host has. With none of them: one trainer and no server.
        """
        trainers = _count(environment, "SYNCWRIGHT_TRAINERS", least=1)
        world = _count(environment, "WORLD_SIZE", least=1)
        if trainers is not None and world is not None and trainers != world:
            raise ClusterError(
                f"SYNCWRIGHT_TRAINERS: found {trainers}, expected {world} as WORLD_SIZE says. Unset one."
            )
        total, servers = trainers or world or 1, _count(environment, "SYNCWRIGHT_SERVERS", least=0) or 0
        if HOSTS in environment:
            counts = trainers_by_host(environment, total)
            served = _evenly(servers, len(counts))
            told = [(f"node{host}", *each) for host, each in enumerate(zip(counts, served, strict=True))]
            return cls._counted(told, device, BANDWIDTH_GBPS, LATENCY_US)
        return cls.of(total, servers, _host_names(environment, total), device)

    def host_of_trainer(self, trainer: int) -> str:
        return self._host_of("trainer", trainer, self.trainers)

    def host_of_server(self, server: int) -> str:
        return self._host_of("server", server, self.servers)

    def _host_of(self, role: Literal["trainer", "server"], number: int, count: int) -> str:
        for host in self.hosts:
            if number in (host.trainers if role == "trainer" else host.servers):
                return host.name
        raise ClusterError(f"{role}: found {number}, expected one of the {count}, which count from 0.")


def trainers_by_host(environment: Mapping[str, str], trainers: int) -> tuple[int, ...]:
    """How many trainers each host has, in the order of their numbers; () where the environment does not tell.

    SYNCWRIGHT_HOSTS says it ("2,2"); else torchrun's LOCAL_WORLD_SIZE, where all hosts have as many.
    """
    if HOSTS in environment:
        words = [word.strip() for word in environment[HOSTS].split(",")]
        counts = tuple(int(word) if word.isascii() and word.isdigit() else 0 for word in words)
        if 0 in counts or sum(counts) != trainers:
            raise ClusterError(
                f"{HOSTS}: found {environment[HOSTS]!r}, expected the number of trainers of each host, {trainers} together, such "
                "as 2,2. Correct it for all roles, or unset it."
            )
        return counts
    here = _count(environment, "LOCAL_WORLD_SIZE", least=1)
    return (here,) * (trainers // here) if here is not None and trainers % here == 0 else ()


def _evenly(total: int, hosts: int) -> list[int]:
    size, larger = divmod(total, hosts)
    return [size + (host < larger) for host in range(hosts)]


def _number(nodes: Mapping[str, Node], key: str, default: float) -> float:
    return decode(nodes[key], float, f"Correct it, or leave `{key}` out.") if key in nodes else default


def _host_counts(top: Node, nodes: Mapping[str, Node]) -> list[tuple[str, int, int]]:
    do = "Write for example `node0: {trainers: 2, servers: 1}`."
    if "hosts" not in nodes:
        if "trainers" not in nodes:
            raise top.error("`trainers`, or `hosts`", "Add a line such as `trainers: 2`.", found="neither")
        return [("localhost", *_roles(nodes))]
    for key in ("trainers", "servers"):
        if key in nodes:
            advice = "Take this line out: the hosts say how many there are."
            raise nodes[key].error(f"no `{key}` beside `hosts`", advice, found=f"`{key}`")
    hosts = nodes["hosts"].mapping("a mapping from host names to their trainers and servers", do)
    return [(name, *_roles(node.record(("trainers", "servers"), do))) for name, node in hosts.items()]


def _roles(nodes: Mapping[str, Node]) -> tuple[int, int]:
    trainers, servers = (decode(nodes[key], Index) if key in nodes else 0 for key in ("trainers", "servers"))
    return trainers, servers


def _count(environment: Mapping[str, str], key: str, least: int) -> int | None:
    text = environment.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise ClusterError(f"{key}: found {text!r}, expected a whole number of at least {least}. Correct it.")
    return int(text)


def _host_names(environment: Mapping[str, str], trainers: int) -> tuple[str, ...]:
    """node0, node1, ... as many as torchrun's numbers tell; `localhost` where it is one."""
    here = _count(environment, "LOCAL_WORLD_SIZE", least=1) or trainers
    if trainers % here:
        raise ClusterError(
            f"LOCAL_WORLD_SIZE: found {here}, expected a divisor of the {trainers} trainers: with uneven "
            f"hosts the environment does not tell which trainer lies where. Write a cluster file."
        )
    hosts = trainers // here
    for key, count in (("RANK", trainers), ("GROUP_RANK", hosts)):
        number = _count(environment, key, least=0)
        if number is not None and number >= count:
            raise ClusterError(f"{key}: found {number}, expected less than {count}. Correct it or WORLD_SIZE.")
    return tuple(f"node{host}" for host in range(hosts)) if hosts > 1 else ("localhost",)
