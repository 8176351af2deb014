"""A program on one piece of a parameter: the rows of all that is aligned with it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from syncwright.errors import LoweringError
from syncwright.program import Program
from syncwright.shapes import Inference
from syncwright.split import piece_of


def specialise(program: Program, parameter: str, index: int, known: Inference) -> Program:
    """The same program on the piece `index` of the parameter, and of every variable that is kept in pieces with it.

    before  reads w, w.grad (f32[4,2]); %n = sub(w, w.grad); output({"w": %n})
    after   reads w[0], w.grad[0] (f32[3,2]); %n = sub(w[0], w.grad[0]); output({"w[0]": %n})
    """
    renamed = {name: piece_of(v, index) for name, v in program.variables.items() if v.kept}
    if all(len(program.variables[name].kept) == 1 for name in renamed):
        return replace(program, variables={n: renamed.get(n, v) for n, v in program.variables.items()})
    program = program.edit()
    sized = _rows_of(program)
    for name, node in program.placeholders.items():
        if name in renamed:
            node.meta = {"variable": renamed[name].name, "val": known.fake_of(renamed[name])}
    for node, argument in sized.items():
        sizes = list(node.args[argument])  # type: ignore[arg-type]
        part = next(v for v in renamed.values() if v.selection is not None and v.selection.bounds is not None)
        node.update_arg(argument, [part.shape[0], *sizes[1:]])
    known.propagate(program)
    variables = {renamed.get(n, v).name: renamed.get(n, v) for n, v in program.variables.items()}
    program.output.args = ({renamed[n].name if n in renamed else n: r for n, r in program.results.items()},)
    program = replace(program, variables=variables)
    _check(program, parameter)
    return program


def _rows_of(program: Program) -> dict[Node, int]:
    """Constants that the update makes with the sizes of the parameter (`full([10, 4])`), and the argument that says so:
    those that meet what is aligned with it, axis by axis."""
    made = [node for node in program.graph.nodes if _is_made(node)]
    if not made:
        return {}
    aligned = _aligned(program)
    results = {n for name, n in program.results.items() if program.variables[name].kept}
    needed: set[Node] = set()
    for node in reversed(program.graph.nodes):
        if node in aligned or not _has_axis(node):
            continue
        meets = [u for u in node.users if u.op != "output" and (u in aligned or u in needed) and _same_rows(node, u)]
        if meets or node in results:
            needed.add(node)
    for node in made:
        others = [u for u in node.users if u.op != "output" and u not in aligned and u not in needed]
        if node in needed and others:
            raise LoweringError(
                f"{node.name} has the sizes of a parameter that is cut, and is used with it and also alone, in "
                f"{others[0].name}: nothing says which sizes it has for a piece. Keep the variable whole: partition: whole."
            )
    return {node: _sizes_at(node) for node in made if node in needed}


def _is_made(node: Node) -> bool:
    """A tensor made of sizes and numbers."""
    return node.op == "call_function" and _has_axis(node) and not any(_is_tensor(n) for n in node.all_input_nodes)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor)


def _has_axis(node: Node) -> bool:
    return node.op != "output" and _is_tensor(node) and node.meta["val"].dim() > 0


def _aligned(program: Program) -> set[Node]:
    """What is made from the rows of variables that are kept in pieces."""
    found: set[Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            kept = program.variables[node.meta["variable"]].kept
            if len(kept) > 1 and kept[0].bounds is not None:
                found.add(node)
        elif _has_axis(node) and any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _same_rows(node: Node, user: Node) -> bool:
    mine, theirs = node.meta["val"].shape, user.meta["val"].shape
    return len(mine) == len(theirs) and mine[0] == theirs[0]


def _sizes_at(node: Node) -> int:
    shape = tuple(node.meta["val"].shape)
    places = [i for i, a in enumerate(node.args) if isinstance(a, list | tuple) and tuple(a) == shape]
    if not places:
        raise LoweringError(
            f"{node.name} ({node.target}) makes a tensor of the sizes {list(shape)} of a parameter that is cut, "
            "in a way that does not say its sizes. Keep the variable whole: partition: whole."
        )
    return places[0]


def _check(program: Program, parameter: str) -> None:
    for name, node in program.results.items():
        val, variable = node.meta["val"], program.variables[name]
        if isinstance(val, torch.Tensor) and tuple(val.shape) != variable.shape:
            raise LoweringError(
                f"'{parameter}' cannot be cut: from a piece of it '{name}' comes out as {tuple(val.shape)}, expected "
                f"{variable.shape} (at {node.name}). Keep the variable whole: partition: whole."
            )
