"""One trainer's program run by itself, as if all trainers had its batch and servers answered with the truth."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Interpreter, Node

from syncwright import ops
from syncwright.plan import Plan
from syncwright.program import Program, Role, Variable
from syncwright.runtime.gathered import merged
from syncwright.shapes import is_host

Truth = Mapping[tuple[str, bool], torch.Tensor]


class Mirrored(Interpreter):
    """Sums are `trainers` times one's own, or one's own and what `peers` sent; `truth` has what is pulled.

    A whole program computes what one device computes: the first owner of a piece has all of it, the others nothing.

    hosts  how many there are, with as many trainers each
    truth  by name, and whether it is a later value
    sent   what was pushed or reduced, by channel, in order
    gathered  ids and rows that were given to all trainers, by channel
    parts  what every trainer has given a part of, by channel
    seen   the value of every node, by name
    """

    def __init__(
        self, program: Program, trainers: int, truth: Truth, peers: Mapping[str, torch.Tensor] | None, hosts: int = 1
    ):
        super().__init__(GraphModule({}, program.graph))
        self.trainers, self.truth, self.peers, self.hosts = trainers, truth, peers, hosts
        self.sent: dict[str, torch.Tensor] = {}
        self.gathered: dict[str, list[torch.Tensor]] = {}
        self.parts: dict[str, list[torch.Tensor]] = {}
        self.seen: dict[str, object] = {}

    def run_node(self, n: Node) -> object:
        self.seen[n.name] = super().run_node(n)
        return self.seen[n.name]

    def call_function(self, target, args, kwargs):
        match target:
            case ops.push:
                self.sent[args[1]] = args[0]
                return torch.empty(0)
            case ops.push_merged:
                self.sent[args[1]] = args[0]
                arriving = len(args) > 3 and args[3] > 0
                givers = self.hosts if "weight" in kwargs else self.trainers
                return args[0] if args[2] == "first" or arriving else args[0] * givers
            case ops.sum_on_host:
                return args[0]
            case ops.wait_on_host:
                return args[0] * (self.trainers // self.hosts)
            case ops.push_rows_merged:
                skip, take = (*args[6:8], 0, 0)[:2]
                self.sent[args[1]] = dense = ops.dense_rows(args[0], args[2], args[4], skip)
                return dense if take else dense * self.trainers
            case ops.pull_rows_value:
                return ops.take_rows(args[0], args[2])
            case ops.pull_value | ops.send:
                return args[0]
            case ops.gather:
                return torch.stack([args[0], *[torch.zeros_like(args[0])] * (args[2] - 1)])
            case ops.all_reduce:
                self.sent[args[1]] = args[0]
                return args[0]
            case ops.all_reduce_later:  # the step before had the same batch
                self.sent[args[1]] = args[0]
                return torch.empty(0)
            case ops.wait_before:
                return self.sent[args[0]] * self.trainers
            case ops.wait:
                return args[0] * self.trainers if self.peers is None else args[0] + self.peers[args[1]]
            case ops.gather_rows:
                self.gathered[args[1]] = ops.own_rows(args[0], args[2], *args[3:])
                return args[0]
            case ops.gather_parts:
                self.parts[args[1]] = args[0]
                return torch.empty(0)
            case ops.wait_whole:
                return [part.reshape(-1).repeat(self.trainers) for part in self.parts[args[1]]]
            case ops.wait_rows:
                return merged([self.gathered[args[1]]] * args[3], args[2])
            case ops.push_rows:
                self.sent[args[1]] = args[0]
                return torch.empty(0)
            case ops.pull_rows:
                return self.truth[args[1], False].to(args[3]).expand(args[2])
            case ops.pull:
                return self.truth[args[1], bool(args[0])].to(args[3]).expand(args[2])
        return super().call_function(target, args, kwargs)


def run_mirrored(
    program: Program,
    values: Mapping[str, object],
    trainers: int,
    truth: Truth,
    peers: Mapping[str, torch.Tensor] | None = None,
    hosts: int = 1,
) -> tuple[dict[str, torch.Tensor], Mirrored]:
    """What the program writes, and the run."""
    run = Mirrored(program, trainers, truth, peers, hosts)
    return dict(run.run(*(values[name] for name in program.reads))), run


def some_values(program: Program) -> dict[str, object]:
    """Values that fit what the program reads: the same for the same names, whatever else is read."""
    return {name: _some(program.variables[name], node) for name, node in program.placeholders.items()}


def _some(variable: Variable, node: Node) -> object:
    generator = torch.Generator().manual_seed(sum(variable.name.encode()))
    if variable.role is Role.HYPER or is_host(node.meta["val"]):
        return 1.0 if variable.name == "batch.weight" else 0.5
    if not variable.dtype.is_floating_point:
        return torch.arange(variable.numel).reshape(variable.shape).to(variable.dtype) % 2
    made = torch.randn(variable.shape, generator=generator, dtype=variable.dtype)
    return made.abs() if variable.role is Role.STATE else made


def truth_of(before: Program, plan: Plan, values: Mapping[str, object], written: Mapping, run: Mirrored) -> Truth:
    """What servers answer: pieces of what is read and of what is written, and global values by their nodes."""
    found = {(f"global.{name}", True): torch.as_tensor(v) for name, v in run.seen.items() if is_scalar(v)}
    found |= run.truth
    for later, held in ((False, values), (True, written)):
        for name, value in held.items():
            if isinstance(value, torch.Tensor):
                found[name, later] = value
                for piece, rows in rows_of(before, plan, name, value).items():
                    found[piece, later] = rows
    return found


def rows_of(program: Program, plan: Plan, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """The pieces of a value that goes where a parameter goes, by their names."""
    variable = program.variables.get(name)
    parameter = name if variable is None or variable.of is None else variable.of
    pieces = next((s.pieces for s in plan.sharings if s.variable == parameter), ())
    if len(pieces) < 2:
        return {}
    return {f"{name}[{p.index}]": value[p.start : p.stop] if value.dim() else value for p in pieces}


def is_scalar(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, torch.Tensor) and value.dim() == 0)


def known_pulls(program: Program) -> dict[tuple[str, bool], torch.Tensor]:
    """Any value for each pull that stands in a program already: before and after a pass they are the same."""
    pulls = program.graph.find_nodes(op="call_function", target=ops.pull)
    return {(str(n.args[1]), bool(n.args[0])): torch.full(n.args[2], 0.25, dtype=n.args[3]) for n in pulls}  # type: ignore[arg-type]
