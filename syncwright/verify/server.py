"""The rules of a server's program: it updates what the server owns, and nothing else."""

from __future__ import annotations

from collections.abc import Set

from torch.fx import Node

from syncwright.program import Program, Role, Variable
from syncwright.text import quote
from syncwright.verify.causes import (
    ServerDrawsRandom,
    ServerReadsBatch,
    ServerReadsForeign,
    ServerRunsForward,
    ServerWritesForeign,
)
from syncwright.verify.passes import draws_random
from syncwright.verify.program import verify

OWNED_ROLES = (Role.PARAM, Role.BUFFER, Role.STATE, Role.GRAD)
MADE_BY_TRAINERS = (Role.GRAD, Role.OUTPUT, Role.INPUT)


def verify_server(program: Program, owned: Set[str]) -> None:
    """Raises where a server that owns `owned` holds what is a trainer's or another server's.

    A variable is owned if its name is, or the parameter that it is `of`, or the whole that it is a piece of.
    """
    verify(program)
    for name, node in program.placeholders.items():
        _check_read(program.variables[name], node, owned)
    for name, node in program.results.items():
        _check_write(program.variables[name], node, owned)
    for node in program.graph.nodes:
        if draws_random(node):
            found, remedy = f"{node.target}, which draws random numbers", "keep its variable on the trainers"
            raise ServerDrawsRandom(f"%{node.name}", found, "none on a server", remedy)


def _check_read(variable: Variable, node: Node, owned: Set[str]) -> None:
    users = ", ".join(f"%{user.name}" for user in node.users) or "no node"
    about = f"{quote(variable.name)}, read for {users}"
    if variable.role is Role.INPUT:
        remedy = "stop the slice at all gradients"
        raise ServerReadsBatch(about, "a batch input", "gradients, and what is owned", remedy)
    if variable.role in OWNED_ROLES and not _is_owned(variable, owned):
        found, remedy = f"the {variable.role.value} of another role", "place both together, or cut below it"
        raise ServerReadsForeign(about, found, f"what is owned: {_listed(owned)}", remedy)


def _check_write(variable: Variable, node: Node, owned: Set[str]) -> None:
    about = f"{quote(variable.name)}, written with %{node.name}"
    if variable.role in MADE_BY_TRAINERS:
        found = f"the role {variable.role.value}, which forward and backward compute"
        raise ServerRunsForward(about, found, "updates only", "leave it to the trainers")
    if variable.role in OWNED_ROLES and not _is_owned(variable, owned):
        found = f"the {variable.role.value} of another role"
        raise ServerWritesForeign(about, found, f"what is owned: {_listed(owned)}", "leave it to its owner")


def _is_owned(variable: Variable, owned: Set[str]) -> bool:
    return not owned.isdisjoint({variable.name, variable.of, variable.whole})


def _listed(owned: Set[str]) -> str:
    names = [quote(name) for name in sorted(owned)]
    return (", ".join(names[:4]) or "nothing") + (f" and {len(names) - 4} more" if len(names) > 4 else "")
