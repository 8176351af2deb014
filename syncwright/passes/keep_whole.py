"""Parameters that one trainer keeps, as their updates need the whole tensor: reduced to it, updated there, given to all."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from operator import getitem

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.errors import LoweringError
from syncwright.meaning import Cut, Rows, Whole
from syncwright.passes.average import Mean, averaged, scaled
from syncwright.passes.compress import compressed
from syncwright.passes.insert import before_first_use, behind, first_call, in_group
from syncwright.passes.read_gathered import read_gathered
from syncwright.plan import ALL, BY_NODE, Shard
from syncwright.program import Program, Role, Variable, new_placeholder, set_results
from syncwright.selection import Own
from syncwright.shapes import Inference
from syncwright.split import own_name
from syncwright.update import Updates

aten = torch.ops.aten


def keep_whole(
    program: Program, updates: Updates, own: Own, sync: Shard, mean: Mean | None, known: Inference
) -> Program:
    """Lets one trainer update a parameter, and keep its state. Rewrites a program that may be edited.

    before  w = placeholder, m = placeholder, %y = mm(%x, w), %g = gradient(%mm, "w"), %n = norm(%g),
            %k = mul(m, 0.9), %new = sub(w, orthogonal(add(%k, %g))), output({"w": %new, "m": %k})
    after   (stage 3, trainer 1) w[own] = placeholder, m[own] = placeholder, %p = give([w[own]], "w", 1),
            %y = mm(%x, wait_whole(%p)), %s = reduce_to([mul(%g, share)], "w.grad", 1), %m = div(wait_own(%s), %total),
            %n = wait_whole(give([norm(%m)], "global.n", 1)), ..., output({"w[own]": %new, "m[own]": %k})
    after   (stages 1, 2) w is read as before, output({"w": wait_whole(give([%new], "w", 1)), "m[own]": %k})

    Programs of all trainers are this one, but for `cut.of_trainer`: what only the keeper needs the others do not run.
    """
    if updates.by_parameter[own.of].kind == "foreign":
        raise LoweringError(
            f"the update of '{own.of}' reads the batch or what forward made of it, and trainer {own.keeper} has its own "
            "part only. Expected an update made from the gradient, the parameter and its state. Share it by: local."
        )
    return _Keeping(program, updates, own, sync, mean, known).rewrite()


def reduced_among(own: Own) -> tuple[int | str | None, ...]:
    """The last arguments of the reduction of a gradient: for which trainer, or how many; and by node, where these are its."""
    return own.trainers if own.keeper is None else own.keeper, *in_group(BY_NODE if own.group else ALL)


@dataclass(slots=True, eq=False)
class _Keeping:
    """Rewrites one parameter. Changes with every node.

    kept  the nodes of the update that the keeper alone runs, in graph order
    owns  by such a node, what the keeper reads in its place
    """

    program: Program
    updates: Updates
    own: Own
    sync: Shard
    mean: Mean | None
    known: Inference
    kept: list[Node] = field(init=False)
    owns: dict[Node, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name, found = self.own.of, set[Node]()
        results = self.program.results
        for node, meaning in self.updates.meanings.items():
            if isinstance(meaning, Cut | Rows | Whole) and meaning.of == name:
                found.add(node)
        for join in self.updates.joins:
            alone = join.nodes if set(join.parameters) == {name} else ()  # a norm that no other update reads
            for node in sorted([*(n for n, of in join.partials.items() if of == name), *alone]):
                if not found.isdisjoint(node.all_input_nodes):
                    found.add(node)
        for state in self.program.of_role(Role.STATE):
            node = self.program.placeholders.get(state.name)
            if state.of == name and node is not None and results.get(state.name) in found:
                found.add(node)
        self.kept = [node for node in self.program.graph.nodes if node in found]

    def rewrite(self) -> Program:
        """The program in which one trainer keeps the parameter."""
        inside = set(self.kept)
        outside = {node: [u for u in node.users if u not in inside and u.op != "output"] for node in self.kept}
        for node in self.kept:
            self.owns[node] = own = self._own_of(node, [user for user in node.users if user in inside])
            if node.op == "placeholder" and node.meta["variable"] == self.own.of:
                if self.sync.stage == 3:
                    read_gathered(self.program, node, own, outside[node], self.sync.keep, self._given, self.known)
            elif outside[node]:
                with before_first_use(outside[node]):
                    given = self._given(own, f"global.{node.name}")
                for reader in outside[node]:
                    reader.replace_input_with(node, given)
        return self._written()

    def _own_of(self, node: Node, users: list[Node]) -> Node:
        """What the keeper reads in place of a node."""
        if node is self.updates.marks[self.own.of]:
            own = self._reduced(node)
        elif node.op == "placeholder" and not (self.sync.stage < 3 and node.meta["variable"] == self.own.of):
            variable = self._variable(node.meta["variable"])
            with self.program.graph.inserting_before(first_call(self.program.graph)):
                own = new_placeholder(self.program.graph, variable, self.known.fake_of(variable))
        else:
            return node
        for user in users:
            user.replace_input_with(node, own)
        return own

    def _variable(self, name: str) -> Variable:
        """The variable that the keeper has for all; known to the program from now on."""
        whole = self.program.variables[name]
        own = replace(self.own, of=name, shape=whole.shape)
        kept = Variable(own_name(name), whole.role, whole.shape, whole.dtype, whole.of, initial=whole.initial, own=own)
        self.program = replace(self.program, variables={**self.program.variables, kept.name: kept})
        return kept

    def _reduced(self, mark: Node) -> Node:
        """The mean of all gradients, on the keeper: reduced behind the mark, waited for where it is first read."""
        graph, users = self.program.graph, list(mark.users)
        sent = scaled(mark, self.mean, self.known)
        self.program, sent = compressed(self.program, sent, self.own.of, self.sync.compress, self.known)
        channel = f"{self.own.of}.grad"
        with behind(sent):
            started = self.known.call(graph, ops.reduce_to, [sent], channel, *reduced_among(self.own))
        with before_first_use(users):
            flat = averaged(self.known.call(graph, ops.wait_own, started, channel), mark, self.mean, self.known)
            return self.known.call(graph, aten.view.default, flat, list(mark.meta["val"].shape))

    def _given(self, own: Node, channel: str) -> Node:
        """A value of the keeper's, at the insertion point."""
        graph, val = self.program.graph, own.meta["val"]
        started = self.known.call(graph, ops.give, [own], channel, self.own.keeper, *in_group(self.own.group))
        waited = self.known.call(graph, ops.wait_whole, started, channel, [val.numel()])
        flat = self.known.call(graph, getitem, waited, 0)
        return self.known.call(graph, aten.view.default, flat, list(val.shape))

    def _written(self) -> Program:
        """The keeper writes what only it has; of the parameter in stages 1 and 2, and of what the step returns, it gives all."""
        results: dict[str, Node] = {}
        for name, node in self.program.results.items():
            variable = self.program.variables[name]
            if node not in self.owns:
                results[name] = node
            elif variable.role is Role.OUTPUT or (name == self.own.of and self.sync.stage < 3):
                with self.program.graph.inserting_before(self.program.output):
                    results[name] = self._given(self.owns[node], name)
            else:
                if own_name(name) not in self.program.variables:
                    self._variable(name)
                results[own_name(name)] = self.owns[node]
        set_results(self.program, results)
        variables = self.program.variables
        left = {n: v for n, v in variables.items() if own_name(n) not in variables or n in results}
        return replace(self.program, variables=left)
