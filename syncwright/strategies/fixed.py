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
    LocalSteps,
    On,
    Optimizer,
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


def local_sgd(variables: Sequence[Variable], every: int = 8, start: int = 0, bucket_mb: float = 25.0) -> Rules:
    """Trainers train alone and take the mean every so many steps (Stich, ICLR 2019); with a `start`, after some steps
    of all_reduce (post-local SGD, Lin et al., ICLR 2020, who take 8 to 16 steps between means)."""
    return _rules("local_sgd", LocalSteps(every, start=start, over=AllReduce(bucket_mb)))


def diloco(
    variables: Sequence[Variable], every: int = 500, lr: float = 0.7, momentum: float = 0.9, bucket_mb: float = 25.0
) -> Rules:
    """Trainers train alone; every so many steps, what they have moved by goes to an outer SGD with Nesterov momentum
    (DiLoCo, arXiv 2311.08105, whose numbers these are)."""
    outer = Optimizer.of("SGD", lr=lr, momentum=momentum, nesterov=True)
    return _rules("diloco", LocalSteps(every, outer, over=AllReduce(bucket_mb)))


def _rules(name: str, default: Sync, patterns: tuple[tuple[str, Sync], ...] = ()) -> Rules:
    return Rules(default, patterns, uncuttable="keep_whole", source=f"strategy {name}")
