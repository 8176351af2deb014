"""Named strategies that need no search: each turns a program's variables into rules and decides nothing else.

Variables whose update cannot be cut are kept whole where a strategy would cut them; the plan notes it.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from typing import Literal

from syncwright.errors import PlanError
from syncwright.plan import (
    AllReduce,
    Blocks,
    Geo,
    LeastLoaded,
    Local,
    LocalSteps,
    On,
    Optimizer,
    ParameterServer,
    RoundRobin,
    Rules,
    Shard,
    Sync,
    Uneven,
)
from syncwright.program import Role, Variable

Mode = Literal["sync", "async"]
Over = Literal["all_reduce", "parameter_server"]


def independent(variables: Sequence[Variable]) -> Rules:
    """Every trainer trains a copy of its own; nothing is exchanged."""
    return _rules("independent", Local())


def all_reduce(variables: Sequence[Variable], bucket_mb: float = 25.0) -> Rules:
    """Every gradient is all-reduced (PyTorch's DistributedDataParallel)."""
    return _rules("all_reduce", AllReduce(bucket_mb))


def partitioned_all_reduce(variables: Sequence[Variable], bucket_mb: float = 25.0, piece_mb: float = 4.0) -> Rules:
    """Large gradients are all-reduced in pieces, cut along their first axis, which spread over buckets (AutoDist:
    PartitionedAR)."""
    return _rules("partitioned_all_reduce", AllReduce(bucket_mb, piece_mb=piece_mb))


def parameter_server(variables: Sequence[Variable], mode: Mode = "sync", staleness: int | None = None) -> Rules:
    """Every variable is kept whole on server 0."""
    return _rules("parameter_server", ParameterServer(mode, place=On(0), staleness=staleness))


def parameter_server_balanced(
    variables: Sequence[Variable], mode: Mode = "sync", staleness: int | None = None
) -> Rules:
    """Every variable is kept whole on the server with the fewest bytes so far (AutoDist: PSLoadBalancing)."""
    return _rules("parameter_server_balanced", ParameterServer(mode, place=LeastLoaded(), staleness=staleness))


def parameter_server_partitioned(
    variables: Sequence[Variable], min_elements: int = 8192, mode: Mode = "sync", staleness: int | None = None
) -> Rules:
    """Variables are cut into blocks that go to the servers in turn (Paddle's DistributeTranspiler)."""
    sync = ParameterServer(mode, partition=Blocks(min_elements), place=RoundRobin(), staleness=staleness)
    return _rules("parameter_server_partitioned", sync)


def parameter_server_uneven(variables: Sequence[Variable], pieces: int = 2, mode: Mode = "sync") -> Rules:
    """Variables are cut into pieces of growing size that go to the servers in turn (AutoDist: UnevenPartitionedPS)."""
    return _rules("parameter_server_uneven", ParameterServer(mode, partition=Uneven(pieces), place=RoundRobin()))


def staged(variables: Sequence[Variable]) -> Rules:
    """Servers, with values that are one step old, so that no step waits for them (tf_cnn_benchmarks: staged variables).

    Rows of tables are those of the step: servers keep one version of a table.
    """
    return _rules("staged", ParameterServer(place=LeastLoaded(), staged=True), _tables(variables, LeastLoaded()))


def replicated_served(variables: Sequence[Variable], mode: Mode = "sync") -> Rules:
    """Servers update; every trainer keeps a copy that is refreshed at the end of each step (tf_cnn_benchmarks:
    distributed_replicated). Of tables rows travel, and no trainer keeps a copy."""
    sync = ParameterServer(mode, place=LeastLoaded(), replicated=True)
    return _rules("replicated_served", sync, _tables(variables, LeastLoaded(), mode))


def parallax(variables: Sequence[Variable], bucket_mb: float = 25.0, mode: Mode = "sync") -> Rules:
    """Rows of tables on servers, the other variables all-reduced (Parallax, EuroSys 2019)."""
    return _rules("parallax", AllReduce(bucket_mb), _tables(variables, LeastLoaded(), mode))


def _tables(variables: Sequence[Variable], place: LeastLoaded, mode: Mode = "sync") -> tuple[tuple[str, Sync], ...]:
    """A line for each variable with a sparse gradient: on servers."""
    sparse = [variable.name for variable in variables if variable.role is Role.PARAM and variable.sparse]
    return tuple((glob.escape(name), ParameterServer(mode, place=place)) for name in sparse)


def zero1(variables: Sequence[Variable], bucket_mb: float = 25.0) -> Rules:
    """Every trainer keeps its own part of the optimizer's state and updates its part of every variable (ZeRO stage 1)."""
    return _rules("zero1", Shard(1, bucket_mb))


def zero2(variables: Sequence[Variable], bucket_mb: float = 25.0) -> Rules:
    """Like `zero1`; of gradients that add up over several backward passes too it keeps its part (ZeRO stage 2)."""
    return _rules("zero2", Shard(2, bucket_mb))


def zero3(variables: Sequence[Variable], bucket_mb: float = 25.0, prefetch: int = 1, keep: bool = False) -> Rules:
    """Every trainer keeps its own part of every variable, and gathers the whole where it reads it (ZeRO stage 3, FSDP)."""
    return _rules("zero3", Shard(3, bucket_mb, prefetch, keep))


def hybrid(variables: Sequence[Variable], bucket_mb: float = 25.0, prefetch: int = 1, keep: bool = False) -> Rules:
    """The trainers of each host keep every variable in parts among them, and hosts reduce gradients among each other (FSDP's
    HYBRID_SHARD). On one host this is zero3, and all_reduce on hosts of one trainer each."""
    return _rules("hybrid", Shard(3, bucket_mb, prefetch, keep, within="node"))


def local_sgd(
    variables: Sequence[Variable], every: int = 8, start: int = 0, bucket_mb: float = 25.0, over: Over = "all_reduce"
) -> Rules:
    """Trainers train alone and take the mean every so many steps (Stich, ICLR 2019); with a `start`, after some steps
    of all_reduce (post-local SGD, Lin et al., ICLR 2020, who take 8 to 16 steps between means)."""
    return _rules("local_sgd", LocalSteps(every, start=start, over=_over(over, bucket_mb)))


def diloco(
    variables: Sequence[Variable],
    every: int = 500,
    lr: float = 0.7,
    momentum: float = 0.9,
    bucket_mb: float = 25.0,
    over: Over = "all_reduce",
) -> Rules:
    """Trainers train alone; every so many steps, what they have moved by goes to an outer SGD with Nesterov momentum
    (DiLoCo, arXiv 2311.08105, whose numbers these are)."""
    outer = Optimizer.of("SGD", lr=lr, momentum=momentum, nesterov=True)
    return _rules("diloco", LocalSteps(every, outer, over=_over(over, bucket_mb)))


def geo(variables: Sequence[Variable], every: int = 100, start: int = 0) -> Rules:
    """Trainers train alone; every so many steps of its own each adds what it has moved by to the servers' values, takes in
    what the others have added, and waits for nobody (Paddle's GEO-SGD, whose number this is)."""
    return _rules("geo", LocalSteps(every, Geo(), start, ParameterServer(place=LeastLoaded())))


def _over(over: Over, bucket_mb: float) -> AllReduce | ParameterServer:
    """How exchanges travel."""
    match over:
        case "all_reduce":
            return AllReduce(bucket_mb)
        case "parameter_server":
            return ParameterServer(place=LeastLoaded())
    raise PlanError(f"strategy: found over: {over!r}, expected all_reduce or parameter_server. Write one of these.")


def _rules(name: str, default: Sync, patterns: tuple[tuple[str, Sync], ...] = ()) -> Rules:
    return Rules(default, patterns, uncuttable="keep_whole", source=f"strategy {name}")
