"""A small made-up model's variables, and rules resolved for them: what tests of plans start from."""

from __future__ import annotations

import torch

from syncwright.plan import Plan, Rules, resolve
from syncwright.program import Role, Variable


def parameter(name: str, *shape: int, aliases: tuple[str, ...] = ()) -> Variable:
    return Variable(name, Role.PARAM, shape, torch.float32, aliases=aliases)


def buffer(name: str, dtype: torch.dtype = torch.float32) -> Variable:
    return Variable(name, Role.BUFFER, (8,), dtype)


EMBED = parameter("embed.weight", 100, 4, aliases=("decoder.weight",))
HEAD = parameter("head.weight", 10, 4)
SCALE = parameter("scale")
MEAN, STEPS = buffer("norm.running_mean"), buffer("norm.num_batches_tracked", torch.int64)
MODEL = (EMBED, HEAD, SCALE, MEAN, STEPS)


def planned(rules: Rules, variables=MODEL, servers: int = 2, **updates) -> Plan:
    every = {variable.name: "elementwise" for variable in variables if variable.role is Role.PARAM}
    return resolve(rules, variables, {**every, **updates}, trainers=2, servers=servers, digest="d1")
