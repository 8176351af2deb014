"""Parameters of which trainers keep parts of their own: reduced, updated and gathered part by part (ZeRO)."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from operator import getitem

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.dead import remove_dead
from syncwright.errors import LoweringError
from syncwright.meaning import Cut, Free, is_partial
from syncwright.passes.average import Mean, averaged, read_means, scaled
from syncwright.passes.compress import compressed
from syncwright.passes.insert import before_first_use, behind, first_call, in_group, read_rank, times_number
from syncwright.passes.keep_whole import keep_whole, reduced_among
from syncwright.passes.read_gathered import read_gathered
from syncwright.passes.share_globals import combined
from syncwright.plan import BY_NODE, NODE, Plan, Shard
from syncwright.program import Program, Role, Variable, new_placeholder, set_results
from syncwright.selection import Own
from syncwright.shapes import Inference, mode_of, substitute
from syncwright.split import own_name
from syncwright.update import Updates, find_updates

aten = torch.ops.aten


def shard_parameters(program: Program, plan: Plan) -> Program:
    """Lets every trainer update its own part of the parameters that are shared by `Shard`.

    before  w = placeholder f32[3,2], %y = mm(%x, w), %g = gradient(%mm, "w"), %new = sub(w, %g), output({"w": %new})
    after   (stage 3, on two trainers) w[own] = placeholder f32[3], %p = gather_parts([w[own]], "w"),
            %y = mm(%x, view(wait_whole(%p)[0], [3, 2])), %s = reduce_scatter([mul(%g, share)], "w.grad"),
            %m = div(wait_own(%s), %total), %new = sub(w[own], %m), output({"w[own]": %new})
    after   (stages 1, 2) w is read as before; %p = gather_parts([%new], "w"),
            output({"w[own]": %new, "w": view(wait_whole(%p)[0], [3, 2])})

    What stage 3 reads only as a narrower type, as under autocast, is cast before it is gathered: half the bytes.
    State that is aligned with the parameter is kept in parts like it, and so is a buffer that follows it. A reduction of a
    part to one number (a norm) is made of the parts' own on all trainers. Within a node, parts are those of its trainers, and
    gradients are reduced by node (see `reduce_by_node`). What cannot be cut one trainer keeps (see
    `keep_whole`).
    """
    syncs = {s.variable: s.sync for s in plan.sharings if isinstance(s.sync, Shard)}
    keepers = {s.variable: s.keeper for s in plan.sharings if s.keeper is not None}
    if plan.trainers == 1 or not syncs:
        return program
    program = program.edit()
    updates = find_updates(program)
    syncs = {name: sync for name, sync in syncs.items() if name in updates.by_parameter}
    program, means = read_means(program, plan, syncs)
    known = Inference(mode_of(program.graph))
    for name, sync in syncs.items():
        group = plan.groups.of(sync)
        own = Own(name, (), plan.groups.cut_among(sync), keepers.get(name), NODE if group == BY_NODE else group)
        if name in keepers:
            program = keep_whole(program, updates, own, sync, means.get(name), known)
        else:
            program = _Sharding(program, updates, own, sync, means.get(name), known).rewrite()
    remove_dead(program.graph)
    for node in [node for node in program.placeholders.values() if not node.users]:
        program.graph.erase_node(node)
    return program


@dataclass(slots=True, eq=False)
class _Sharding:
    """Rewrites one parameter. Changes with every node.

    among    whose parts make up a variable; the parameter's
    readers  of every node of which each trainer computes its own part, in order: who reads it
    parts    by such a node its own part
    """

    program: Program
    updates: Updates
    among: Own
    sync: Shard
    mean: Mean | None
    known: Inference
    readers: dict[Node, list[Node]] = field(init=False)
    parts: dict[Node, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        aligned = [node for node, meaning in self.updates.meanings.items() if meaning == Cut(self.name)]
        inside = {*aligned, self.program.output}
        self.readers = {node: [user for user in node.users if user not in inside] for node in aligned}

    def rewrite(self) -> Program:
        """The program with the parameter in parts."""
        for node in self.readers:
            self.parts[node] = self._part(node)
        for node, readers in self.readers.items():
            partial = [reader for reader in readers if self._is_partial(node, reader)]
            for reader in partial:
                self._combine(node, reader)
            rest = [reader for reader in readers if reader not in partial]
            if not self._is_parameter(node):
                self._read_whole(node, rest)
            elif self.sync.stage == 3:
                read_gathered(self.program, node, self.parts[node], rest, self.sync.keep, self._whole, self.known)
        return self._written()

    @property
    def name(self) -> str:
        return self.among.of

    @property
    def _own(self) -> Own:
        return replace(self.among, shape=self.program.variables[self.name].shape)

    def _is_parameter(self, node: Node) -> bool:
        return node.op == "placeholder" and node.meta["variable"] == self.name

    def _part(self, node: Node) -> Node:
        if node.op == "placeholder":
            part = self._variable(node.meta["variable"])
            with self.program.graph.inserting_before(first_call(self.program.graph)):
                return new_placeholder(self.program.graph, part, self.known.fake_of(part))
        if node is self.updates.marks[self.name]:
            return self._reduced(node)
        if tuple(node.meta["val"].shape) != self._own.shape:
            raise LoweringError(
                f"the update of '{self.name}' makes {list(node.meta['val'].shape)} of {list(self._own.shape)} at {node.name}, so "
                "it cannot be cut anywhere. Expected an update element by element. Share it by: all_reduce."
            )
        with self.program.graph.inserting_before(node):
            args, kwargs = substitute((node.args, node.kwargs), self._given)
        with behind(node):
            return self.known.call(self.program.graph, node.target, *args, **kwargs)

    def _given(self, node: Node) -> Node:
        """What stands for an argument of the update: a part, or a number for all elements; a constant made for as many."""
        if node in self.parts:
            return self.parts[node]
        val, shape = node.meta["val"], self._own.shape
        if not isinstance(val, torch.Tensor) or val.dim() == 0:
            return node
        sizes = [at for at, given in enumerate(node.args) if isinstance(given, list | tuple) and tuple(given) == shape]
        if not isinstance(self.updates.meanings.get(node), Free) or node.all_input_nodes or len(sizes) != 1:
            raise LoweringError(
                f"the update of '{self.name}' reads {node.name} of shape {list(val.shape)}, of which nobody knows what belongs "
                "to a part. Expected tensors made from the gradient, the parameter or its state (zeros_like), and numbers. "
                "Make it so, or share the variable by: all_reduce."
            )
        args = [[self._own.count] if at == sizes[0] else given for at, given in enumerate(node.args)]
        return self.known.call(self.program.graph, node.target, *args, **node.kwargs)

    def _variable(self, name: str) -> Variable:
        """The variable of which a trainer keeps its own part; known to the program from now on."""
        whole, own = self.program.variables[name], replace(self._own, of=name)
        part = Variable(own_name(name), whole.role, (own.count,), whole.dtype, whole.of, initial=whole.initial, own=own)
        self.program = replace(self.program, variables={**self.program.variables, part.name: part})
        return part

    def _reduced(self, mark: Node) -> Node:
        """This trainer's part of the mean of all gradients: reduced behind the mark, waited for where it is first read."""
        graph, mean = self.program.graph, self.mean
        users = list(mark.users)
        sent = scaled(mark, mean, self.known)
        self.program, sent = compressed(self.program, sent, self.name, self.sync.compress, self.known)
        channel = f"{self.name}.grad"
        with behind(sent):
            started = self.known.call(graph, ops.reduce_scatter, [sent], channel, *reduced_among(self.among))
        with before_first_use(users):
            return averaged(self.known.call(graph, ops.wait_own, started, channel), mark, mean, self.known)

    def _is_partial(self, node: Node, reader: Node) -> bool:
        """Whether trainers put a number together that is made of all of a value. Of what they have whole they need not."""
        return is_partial(reader) and not (self.sync.stage < 3 and self._is_parameter(node))

    def _combine(self, node: Node, reduction: Node) -> None:
        """A number made of all of a value, from the numbers that are made of its parts."""
        graph, readers = self.program.graph, list(reduction.users)
        with graph.inserting_before(reduction):
            part = self._without_padding(node, reduction)
            own = self.known.call(graph, reduction.target, part, *reduction.args[1:], **reduction.kwargs)
            flat = self.known.call(graph, aten.reshape.default, own, [1])
            started = self._started(flat, f"global.{reduction.name}")
        with before_first_use(readers):
            whole = combined(reduction, self._waited(started, self.among.trainers), self.known)
        reduction.replace_all_uses_with(whole)

    def _without_padding(self, node: Node, reduction: Node) -> Node:
        """A part in which nothing that is behind the variable's end changes a reduction. (Behind a gradient's are zeros, also
        of one that is multiplied by a number.)"""
        part, own, neutral = self.parts[node], self._own, _neutral(reduction)
        if not own.is_padded or (neutral == 0 and times_number(node) is self.updates.marks[self.name]):
            return part
        graph = self.program.graph
        self.program, rank = read_rank(self.program)
        if own.group:
            rank = self.known.call(graph, operator.mod, rank, own.trainers)
        first = self.known.call(
            graph, aten.mul.Tensor, self.known.call(graph, aten.full.default, [own.count], own.count), rank
        )
        places = self.known.call(graph, aten.add.Tensor, self.known.call(graph, aten.arange.default, own.count), first)
        there = self.known.call(graph, aten.lt.Scalar, places, own.numel)
        return self.known.call(graph, aten.where.ScalarOther, there, part, neutral)

    def _started(self, part: Node, channel: str) -> Node:
        among = self.among.trainers, *in_group(self.among.group)
        return self.known.call(self.program.graph, ops.gather_parts, [part], channel, *among)

    def _waited(self, started: Node, size: int) -> Node:
        """All trainers' parts of one value, flat."""
        waited = self.known.call(self.program.graph, ops.wait_whole, started, started.args[1], [size])
        return self.known.call(self.program.graph, getitem, waited, 0)

    def _whole(self, part: Node, channel: str) -> Node:
        """A value in the variable's own shape, gathered at the insertion point."""
        flat = self._waited(self._started(part, channel), self._own.numel)
        return self.known.call(self.program.graph, aten.view.default, flat, list(self._own.shape))

    def _read_whole(self, node: Node, readers: list[Node]) -> None:
        """What else is made of a value of the update is made of all of it."""
        if readers:
            with before_first_use(readers):
                whole = self._whole(self.parts[node], f"global.{node.name}")
            for reader in readers:
                reader.replace_input_with(node, whole)

    def _written(self) -> Program:
        """Results in parts; in stages 1 and 2 also the parameter, gathered."""
        results: dict[str, Node] = {}
        for name, node in self.program.results.items():
            variable = self.program.variables[name]
            mine = self.name in (name, variable.of)
            if node not in self.parts or not (mine or variable.role is Role.BUFFER):
                if mine and variable.shape and variable.initial is None:  # else it is what a trainer has not sent
                    raise LoweringError(
                        f"'{name}' goes in parts with '{self.name}', but what the step writes to it (at {node.name}) is not made "
                        "element by element. Expected an update element by element. Share it by: all_reduce."
                    )
                results[name] = node
                continue
            if own_name(name) not in self.program.variables:
                self._variable(name)
            results[own_name(name)] = self.parts[node]
            if name == self.name and self.sync.stage < 3:
                with self.program.graph.inserting_before(self.program.output):
                    results[name] = self._whole(self.parts[node], name)
        set_results(self.program, results)
        variables = self.program.variables
        left = {n: v for n, v in variables.items() if own_name(n) not in variables or n in results}
        return replace(self.program, variables=left)


def _neutral(reduction: Node) -> float:
    """What changes nothing in a reduction."""
    order = reduction.args[1] if len(reduction.args) > 1 else 2
    match reduction.target:
        case aten.amax.default:
            return float("-inf")
        case aten.amin.default:
            return float("inf")
        case aten.linalg_vector_norm.default if float(order) < 0:  # type: ignore[arg-type]
            return float("inf")
    return 0.0
