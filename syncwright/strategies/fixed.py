"""Named strategies that need no search: each turns a program's variables into rules and decides nothing else.

Variables whose update cannot be cut are kept whole where a strategy would cut them; the plan notes it.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence

from syncwright.plan import (
    AllReduce,
    Blocks,
    LeastLoaded,
    Local,
    On,
    ParameterServer,
    RoundRobin,
    Rules,
    Sync,
)
from syncwright.program import Role, Variable


def independent(variables: Sequence[Variable]) -> Rules:
    """Every trainer trains a copy of its own; nothing is exchanged."""
    return _rules("independent", Local())


def all_reduce(variables: Sequence[Variable], bucket_mb: float = 25.0) -> Rules:
    """Every gradient is all-reduced (PyTorch's DistributedDataParallel)."""
    return _rules("all_reduce", AllReduce(bucket_mb))


def parameter_server(variables: Sequence[Variable]) -> Rules:
    """Every variable is kept whole on server 0."""
    return _rules("parameter_server", ParameterServer(place=On(0)))


def parameter_server_balanced(variables: Sequence[Variable]) -> Rules:
    """Every variable is kept whole on the server with the fewest bytes so far (AutoDist: PSLoadBalancing)."""
    return _rules("parameter_server_balanced", ParameterServer(place=LeastLoaded()))


def parameter_server_partitioned(variables: Sequence[Variable], min_elements: int = 8192) -> Rules:
    """Variables are cut into blocks that go to the servers in turn (Paddle's DistributeTranspiler)."""
    sync = ParameterServer(partition=Blocks(min_elements), place=RoundRobin())
    return _rules("parameter_server_partitioned", sync)


def parallax(variables: Sequence[Variable], bucket_mb: float = 25.0) -> Rules:
    """Variables with sparse gradients whole on servers, the others all-reduced (Parallax, EuroSys 2019)."""
    served = ParameterServer(place=LeastLoaded())
    sparse = [variable.name for variable in variables if variable.role is Role.PARAM and variable.sparse]
    patterns = tuple((glob.escape(name), served) for name in sparse)
    return _rules("parallax", AllReduce(bucket_mb), patterns)


def _rules(name: str, default: Sync, patterns: tuple[tuple[str, Sync], ...] = ()) -> Rules:
    return Rules(default, patterns, uncuttable="keep_whole", source=f"strategy {name}")
