"""What a cut reads of a whole program's crossings."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from syncwright import ops
from syncwright.place import Owners, Server, place_of
from syncwright.program import Program
from syncwright.split import piece_name


def ranks(node: Node, program: Program) -> tuple[int, ...]:
    """The servers that run a node: one, or one for each piece of a variable."""
    match place_of(node):
        case Server(rank):
            return (rank,)
        case Owners(variable):
            return tuple(int(part.server or 0) for part in program.variables[variable].kept)
    return ()


def calls(program: Program, *targets: Callable) -> list[Node]:
    found = [node for t in targets for node in program.graph.find_nodes(op="call_function", target=t)]
    return sorted(found) if len(targets) > 1 else found


def channel_of(node: Node) -> str:
    return str(node.args[1])


def source_of(node: Node) -> Node:
    assert isinstance(node.args[0], Node), f"{node.name} crosses between roles with a node"
    return node.args[0]


def senders(node: Node, program: Program) -> tuple[int, ...]:
    """The servers that send: of one value the first of its owners, of parts each."""
    return ranks(source_of(node), program)[: None if node.target is ops.gather else 1]


def part_name(node: Node, index: int) -> str:
    return piece_name(channel_of(node), index) if node.target is ops.gather else channel_of(node)
