"""Parameters on servers: their updates run there; what crosses between roles is pushed, pulled and sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.dead import remove_dead
from syncwright.errors import LoweringError
from syncwright.meaning import Joined, Scalar
from syncwright.passes.insert import CALL, behind, read_share, read_weight
from syncwright.place import EVERYWHERE, TRAINERS, Owners, Place, Server, put
from syncwright.plan import ParameterServer, Plan
from syncwright.program import Program, Role, Variable, set_results
from syncwright.shapes import Inference, is_host, mode_of
from syncwright.split import Split, global_variable, grad_variable, kept, places, split
from syncwright.update import find_updates

aten = torch.ops.aten

_WHEN = {
    (True, False, False): (),
    (True, True, False): ("before",),
    (False, False, False): ("now",),
    (False, False, True): ("latest",),
}
"""As of when trainers pull: in step or not, staged, with pushes merged in the background."""


def serve_parameters(program: Program, plan: Plan) -> Program:
    """Says which servers run which updates, and lets what crosses between roles cross.

    before  w = placeholder, %y = mm(%x, w), %g = gradient(%mm, "w"), %new = sub(w, %g), output({"w": %new})
    after   w = placeholder at owners "w", %p = pull.value(w, "w"), %y = mm(%x, %p), %g = gradient(%mm, "w"),
            %m = push.merged(mul(%g, share), "w.grad", "mean") at owners "w", %new = sub(w, %m) at owners "w"

    Global values that several owners have a part in are made at the reducer:
    %s = send(norm(%m), "global.norm") at server 0, %c = clamp(...) at server 0, send(%c, "global.clamp") at owners "w".
    See ParameterServer in `SEMANTICS`: one update per step, when all live trainers have pushed; or, asynchronous, one for
    every push (`take` 1) or so many, unscaled, and values as they are now.
    """
    syncs = {s.variable: s.sync for s in plan.sharings if isinstance(s.sync, ParameterServer)}
    if not syncs:
        return program
    program, weight = program.edit(), None
    parts = split(program, find_updates(program), plan)
    if plan.trainers > 1 and any(sync.in_step and sync.reduce == "mean" for sync in syncs.values()):
        program, weight = read_weight(program)
    share = read_share(weight, plan.trainers) if weight is not None else None
    rows = {s.variable: s.rows for s in plan.sharings if s.rows}
    of_rows = share
    if plan.accumulate > 1 and any(name in rows and sync.reduce == "mean" for name, sync in syncs.items()):
        program, weight = read_weight(program, CALL)
        of_rows = read_share(weight, plan.trainers)
    crossing = _Crossing(parts, places(parts), syncs, rows, share, of_rows, Inference(mode_of(program.graph)))
    return crossing.rewrite(program)


@dataclass(slots=True, eq=False)
class _Crossing:
    """Carries values to where they are read. Changes with every value that it carries.

    rows      of tables whose rows travel: those that their updates write
    share     what a trainer's contribution to a mean is multiplied by; None on one trainer
    of_rows   likewise of rows, which servers add up over calls
    marks     of gradients that servers need, with their parameters
    named     nodes that are the value of a variable that servers keep
    partials  reductions that each owner of a piece makes of its piece
    parameter  with which each variable goes that servers keep
    origin    the node that a crossing brings, also over two crossings
    """

    parts: Split
    places: dict[Node, Place]
    syncs: Mapping[str, ParameterServer]
    rows: Mapping[str, str]
    share: Node | None
    of_rows: Node | None
    known: Inference
    made: dict[tuple[Node, Place], Node] = field(default_factory=dict)
    channels: dict[str, Variable] = field(default_factory=dict)
    marks: dict[Node, str] = field(init=False)
    named: dict[Node, str] = field(init=False)
    partials: set[Node] = field(init=False)
    parameter: dict[str, str] = field(init=False)
    origin: dict[Node, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        program = self.parts.program
        self.parameter = {name: parameter for parameter, names in self.parts.owned.items() for name in names}
        self.marks = {mark: name for name, mark in self.parts.updates.marks.items() if name in self.parts.pieces}
        values = [*program.placeholders.items(), *program.results.items()]
        self.named = {node: name for name, node in reversed(values) if name in self.parameter}
        partials = [pair for join in self.parts.updates.joins for pair in join.partials.items()]
        meanings, pieces = self.parts.updates.meanings, self.parts.pieces
        self.partials = {n for n, p in partials if len(pieces.get(p, ())) > 1 and isinstance(meanings[n], Joined)}

    def rewrite(self, program: Program) -> Program:
        """Gives every node what it reads where it runs, and says where that is."""
        for node in list(program.graph.nodes):
            if node.op == "call_function":
                place = self.places.get(node, TRAINERS)
                if node.target is ops.take_rows and place == TRAINERS and self._is_served(node.args[0]):
                    self._pull_rows(node)
                    continue
                for source in node.all_input_nodes:
                    if (carried := self._carry(source, place, node)) is not source:
                        node.replace_input_with(source, carried)
        owners = {name: Owners(parameter) for name, parameter in self.parameter.items()}
        results = {n: self._carry(r, owners.get(n, TRAINERS), program.output) for n, r in program.results.items()}
        set_results(program, results)
        for node, place in self.places.items():
            put(node, place)
        remove_dead(program.graph)
        return replace(program, variables={**program.variables, **self._kept(), **self.channels})

    def _kept(self) -> dict[str, Variable]:
        """The variables that servers keep, with their parts."""
        return {name: self._kept_variable(name) for name in self.parameter}

    def _kept_variable(self, name: str) -> Variable:
        parameter = self.parameter[name]
        of = None if name == parameter else parameter
        return replace(self.parts.program.variables[name], of=of, kept=kept(self.parts, name, parameter))

    def _carry(self, node: Node, place: Place, reader: Node) -> Node:
        """What stands for `node` at `place`, made in front of its first reader where it crosses."""
        source = self.places.get(node, TRAINERS)
        if source == EVERYWHERE or (source == place and node not in self.partials):
            return node
        if (node, place) not in self.made:
            self.made[node, place] = self._cross(node, source, place, reader)
        return self.made[node, place]

    def _cross(self, node: Node, source: Place, place: Place, reader: Node) -> Node:
        over = self._stop_over(node, source, place)
        if over is not None:
            return self._carry(self._carry(node, over, reader), place, reader)
        if node in self.marks:
            return self._push_gradient(node, self.marks[node])
        if source == TRAINERS:
            with behind(node):
                sent = self._as_tensor(node, source)
            with behind(sent):
                crossed = self._call(place, ops.push_merged, sent, self._channel(node), "first")
            self.origin[crossed] = node
            return self._as_it_was(node, crossed, place)
        with node.graph.inserting_before(reader):
            if place == TRAINERS and node in self.named:
                return self._pulled(node, self.named[node])
            op = ops.pull_value if place == TRAINERS else ops.send
            if op is ops.pull_value:
                self._check_whole(node, source, reader)
            crossed = self._call(place, op, self._as_tensor(node, source), self._channel(node))
            self.origin[crossed] = self.origin.get(node, node)
            return self._as_it_was(node, crossed, place)

    def _stop_over(self, node: Node, source: Place, place: Place) -> Place | None:
        """Gradients are merged at their owners before anything is made of them; what several roles make, or trainers
        make for servers, is put together at the reducer."""
        if node in self.marks:
            owners = Owners(self.marks[node])
            return None if place == owners else owners
        reducer = Server(self.parts.reducer)
        through = node in self.partials or (source == TRAINERS and isinstance(place, Owners))
        return reducer if through and place != reducer else None

    def _push_gradient(self, mark: Node, parameter: str) -> Node:
        """The trainers' gradients, scaled where they are averaged in step, and merged at the parameter's owners."""
        sync, grad = self.syncs[parameter], grad_variable(self.parts.program, parameter)
        parts = tuple(replace(s, of=grad.name) for s in kept(self.parts, parameter, parameter))
        self.channels[grad.name] = replace(grad, kept=parts)
        rows = mark.all_input_nodes[0] if mark.all_input_nodes[0].target is ops.dense_rows else None
        sent = mark if rows is None else rows.args[0]
        assert isinstance(sent, Node), "gradients are computed"
        share = self.share if rows is None else self.of_rows
        if share is not None and sync.in_step and sync.reduce == "mean":
            with behind(sent):
                sent = self._call(TRAINERS, aten.mul.Tensor, sent, share)
        options: dict[str, object] = {} if sync.push is None else {"dtype": mark.meta["val"].dtype}
        if sync.push is not None:
            with behind(sent):
                sent = self._call(TRAINERS, aten._to_copy.default, sent, dtype=getattr(torch, sync.push))
        take = () if sync.in_step else (sync.take,) if sync.merge == 1 else (sync.take, sync.merge)
        owners = Owners(parameter)
        with behind(sent):
            if rows is None:
                return self._call(owners, ops.push_merged, sent, grad.name, sync.reduce, *take, **options)
            _, ids, length, *skip = rows.args
            written, counted = self.rows[parameter], (*(skip or [0]), *take)
            return self._call(
                *(owners, ops.push_rows_merged, sent, grad.name, ids, sync.reduce, length, written),
                *(counted if any(counted) else ()),
                **options,
            )

    def _is_served(self, node: object) -> bool:
        return isinstance(node, Node) and node in self.named

    def _pull_rows(self, taken: Node) -> None:
        """Trainers ask for the rows that they look up."""
        table, ids = taken.args
        with taken.graph.inserting_before(taken):
            pulled = self._pulled(table, self.named[table], ids)  # type: ignore[arg-type, index]
        taken.replace_all_uses_with(pulled)

    def _pulled(self, node: Node, name: str, *ids: Node) -> Node:
        """The value, or rows, of a variable that servers keep, for trainers: of this step, the one before, or now."""
        variable = self.parts.program.variables[name]
        sync, target = self.syncs[self.parameter[name]], ops.pull_rows_value if ids else ops.pull_value
        when = _WHEN[sync.in_step, sync.staged, sync.merge > 1]
        dtype = None if sync.pull is None else getattr(torch, sync.pull)
        if dtype in (None, variable.dtype) or not variable.dtype.is_floating_point or not variable.shape:
            return self._call(TRAINERS, target, node, name, *ids, *when)
        channel = replace(self._kept_variable(name), name=f"{name} as {sync.pull}", role=Role.GLOBAL, dtype=dtype)
        self.channels[channel.name] = replace(channel, aliases=())
        pulled = self._call(TRAINERS, target, node, channel.name, *ids, *when, dtype=dtype)
        with behind(pulled):
            return self._call(TRAINERS, aten._to_copy.default, pulled, dtype=variable.dtype)

    def _check_whole(self, node: Node, source: Place, reader: Node) -> None:
        """A trainer cannot read what is made piece by piece, but for variables and numbers that every piece knows."""
        meaning = self.parts.updates.meanings[node]
        if (
            isinstance(source, Owners)
            and len(self.parts.pieces[source.variable]) > 1
            and not isinstance(meaning, Scalar)
        ):
            raise LoweringError(
                f"'{source.variable}' is cut into {len(self.parts.pieces[source.variable])} pieces, and {reader.name} reads "
                f"{node.name}, a value on the way to its update, outside of that update. Expected the step to read the "
                "parameter, its state or global values. Keep the variable whole: partition: whole."
            )

    def _channel(self, node: Node) -> str:
        variable = global_variable(self.origin.get(node, node))
        self.channels[variable.name] = variable
        return variable.name

    def _call(self, place: Place, target, *args, **kwargs) -> Node:
        node = self.known.call(self.parts.program.graph, target, *args, **kwargs)
        self.places[node] = place
        return node

    def _as_tensor(self, node: Node, place: Place) -> Node:
        """Numbers of the host travel as tensors, in doubles."""
        if not is_host(node.meta["val"]):
            return node
        return self._call(place, aten.scalar_tensor.default, node, dtype=torch.float64)

    def _as_it_was(self, node: Node, crossed: Node, place: Place) -> Node:
        if not is_host(node.meta["val"]):
            return crossed
        with behind(crossed):
            return self._call(place, aten._local_scalar_dense.default, crossed)
