"""Values of forward that backward reads, computed again in backward where a step would hold too many of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import getitem

from torch.fx import Node
from torch.utils.flop_counter import flop_registry

from syncwright import ops
from syncwright.dead import is_random, remove_dead
from syncwright.errors import LoweringError
from syncwright.held import Held, nbytes_of
from syncwright.place import is_served
from syncwright.plan import Plan
from syncwright.program import Program, copy_node
from syncwright.regions import turn
from syncwright.shapes import substitute

GIB = 2**30
FLOPS_PER_BYTE = 10
"""So many operations of a matrix product take as long as one byte of what an elementwise operation reads or writes: a core of
50 Gflop/s and 5 GB/s, and accelerators lie within a few times of it."""


def recompute(program: Program, plan: Plan) -> Program:
    """Keeps what trainers hold in a step within `memory_gb`: what backward reads of forward is computed again in front of it,
    first what is large and takes least to compute.

    before  %h = mm(x, w), %a = tanh(%h), %loss = mean(%a), ..., %t = tanh_backward(%g, %a)
    after   %h = mm(x, w), %a = tanh(%h), %loss = mean(%a), ..., %again = tanh(%h), %t = tanh_backward(%g, %again)

    Computed again are neither draws of random numbers nor what was sent: these are kept. What a step holds is counted as it is
    interpreted (`held.most_at_once`).

    Raises `LoweringError` where a step holds more than `memory_gb`, whatever is computed again.
    """
    if plan.memory_gb is None:
        return program
    budget = int(plan.memory_gb * GIB)
    forward, found, refused = _Forward(program), _Rewritten.of(program, frozenset()), set[Node]()
    while found.held.most > budget:
        candidates = [each for each in forward.candidates(found) if each.value not in refused]
        if not candidates:
            raise _too_much(plan.memory_gb, found.held.most)
        chosen = _enough(candidates, found.held.most - budget)
        better = _Rewritten.of(program, found.again.union(*(each.nodes for each in chosen)))
        while better.held.most >= found.held.most and len(chosen) > 1:
            chosen = chosen[: len(chosen) // 2]
            better = _Rewritten.of(program, found.again.union(*(each.nodes for each in chosen)))
        if better.held.most < found.held.most:
            found = better
        else:
            refused.add(chosen[0].value)
    return found.program


def _too_much(wanted: float, most: int) -> LoweringError:
    return LoweringError(
        f"memory_gb: found {wanted:g}, but a trainer holds {most / GIB:.3g} GiB at once where all that can be is computed again. "
        "Expected as much at least. See `syncwright show --memory` for what it is; share variables by shard, give each trainer "
        "fewer examples, or raise memory_gb."
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Rewritten:
    """A program in which some nodes are computed again, each once, in front of what first reads it in backward.

    again    these nodes of the program as it was
    origins  by node, which of the program as it was it is; none for copies
    """

    again: frozenset[Node]
    program: Program
    held: Held
    origins: Mapping[Node, Node]

    @classmethod
    def of(cls, program: Program, again: frozenset[Node]) -> _Rewritten:
        rewritten = program.edit()
        pairs = dict(zip(program.graph.nodes, rewritten.graph.nodes, strict=True))
        _Copies(rewritten, {pairs[node] for node in again}).write()
        return cls(again, rewritten, Held(rewritten), {copy: node for node, copy in pairs.items()})

    def kept(self) -> set[Node]:
        """What is there at the fullest, of the program as it was."""
        return {self.origins[root] for root in self.held.there if root in self.origins}


@dataclass(frozen=True, slots=True, eq=False)
class _Copies:
    """Copies of nodes of forward, for backward. Writes to the program.

    again  what is copied
    made   the copy of each
    """

    program: Program
    again: Collection[Node]
    made: dict[Node, Node] = field(default_factory=dict)

    def write(self) -> None:
        for node in _backward(self.program) if self.again else ():
            for read in node.all_input_nodes:
                if read in self.again:
                    node.replace_input_with(read, self._copy(read, node))
        remove_dead(self.program.graph)

    def _copy(self, node: Node, reader: Node) -> Node:
        if node not in self.again:
            return node
        if node not in self.made:
            given = {each: self._copy(each, reader) for each in node.all_input_nodes}
            with self.program.graph.inserting_before(reader):
                self.made[node] = copy_node(self.program.graph, node, given)
        return self.made[node]


def _backward(program: Program) -> dict[Node, None]:
    """The nodes behind the one where a program turns from forward to backward, in order."""
    first = turn(program)
    return {} if first is None else {n: None for n in program.graph.nodes if n.op == "call_function" and not n < first}


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    """A value that is there at the fullest, and what it takes to compute it again.

    nodes  these are computed again for it, of the program as it was
    cost   in bytes that are read and written
    """

    value: Node
    nodes: frozenset[Node]
    nbytes: int
    cost: float


class _Forward:
    """What backward reads of forward in a program."""

    def __init__(self, program: Program):
        held, self._late = Held(program), _backward(program)
        self._read = {each for node in self._late for each in node.all_input_nodes if each not in self._late}
        self._looks: dict[Node, list[Node]] = {}
        for node in sorted(self._read):
            self._looks.setdefault(held.root(node), []).append(node)

    def candidates(self, now: _Rewritten) -> list[_Candidate]:
        """The best first: most bytes for what they cost."""
        found, kept = [], now.kept()
        for root in sorted(kept & self._looks.keys() - now.again):
            if _may_be_made(root) and nbytes_of(root):
                nodes = self._needed([root, *self._looks[root]], kept, now.again)
                found.append(_Candidate(root, nodes, nbytes_of(root), sum(map(_cost, nodes))))
        return sorted(found, key=lambda each: -each.nbytes / (1 + each.cost))

    def _needed(self, wanted: Sequence[Node], kept: Collection[Node], again: Collection[Node]) -> frozenset[Node]:
        """What is computed again so that values need not be kept: they, and what they are made of that is not there."""
        found, stack = set[Node](), list(wanted)
        while stack:
            node = stack.pop()
            there = node in kept and node not in wanted
            if node not in found and node not in again and not there and _may_be_made(node):
                found.add(node)
                stack.extend(node.all_input_nodes)
        return frozenset(found)


def _may_be_made(node: Node) -> bool:
    """Whether a value may be computed again, and is then the same."""
    return (
        node.op == "call_function"
        and node.target not in ops.COMMUNICATION
        and node.target not in (ops.pull_value, ops.pull_rows_value, ops.unique)
        and not is_random(node)
        and not is_served(node)
    )


def _enough(candidates: list[_Candidate], excess: int) -> list[_Candidate]:
    """The first of them, until they have so many bytes."""
    chosen, nbytes = [], 0
    for each in candidates:
        if nbytes >= excess:
            break
        chosen.append(each)
        nbytes += each.nbytes
    return chosen


def _cost(node: Node) -> float:
    """What it takes to run a node, in bytes that are read and written."""
    if node.target is getitem or getattr(node.target, "is_view", False):
        return 0.0
    moved = nbytes_of(node) + sum(map(nbytes_of, node.all_input_nodes))
    return moved + _flops(node) / FLOPS_PER_BYTE


def _flops(node: Node) -> float:
    count = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if count is None:
        return 0.0
    args, kwargs = substitute((node.args, node.kwargs), lambda each: each.meta["val"])
    return float(count(*args, **kwargs, out_val=node.meta["val"]))
