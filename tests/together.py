"""A trainer's program run for all trainers at once, node by node: what the collectives give is made of what all gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from syncwright import ops
from syncwright.plan import Groups
from syncwright.program import Program
from syncwright.runtime.own_parts import own_part, together
from syncwright.runtime.scatters import lay_out, parts_of
from syncwright.schema import argument
from syncwright.selection import Own
from syncwright.shapes import substitute

Results = list[dict[str, torch.Tensor]]


def run_together(program: Program, values: Sequence[Mapping[str, object]], groups: Groups | None = None) -> Results:
    """By trainer what the program writes, from its values."""
    trainers = len(values)
    groups = groups or Groups(trainers)
    env: dict = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            env[node] = [each[node.meta["variable"]] for each in values]
        elif node.op == "call_function":
            known = [lambda n, k=k: env[n][k] for k in range(trainers)]
            given = [substitute(node.args, each) for each in known]
            named = [substitute(node.kwargs, each) for each in known]
            env[node] = [None] * trainers
            for members in groups.members(_group(node)):
                found = _of_all(node, [given[k] for k in members], [named[k] for k in members])
                for k, value in zip(members, found, strict=True):
                    env[node][k] = value
    return [{name: env[node][k] for name, node in program.results.items()} for k in range(trainers)]


def _group(node) -> str:
    """In which trainers do what a node says; a wait's is that of what is waited for."""
    source = node.args[0] if node.target in ops.WAITS else node
    return str(argument(source, "group") or "") if source.target in ops.SENDS else ""


def _of_all(node, given: list[tuple], named: list[dict]) -> list:
    trainers = len(given)
    match node.target:
        case ops.all_reduce | ops.gather_parts:
            return [args[0] for args in given]
        case ops.wait:
            return [sum(args[0] for args in given)] * trainers
        case ops.reduce_scatter:
            return [_laid_out(args[0], args[2]) for args in given]
        case ops.reduce_to:
            return [torch.cat([x.reshape(-1) for x in args[0]]) for args in given]
        case ops.wait_own if node.args[0].target is ops.reduce_to:
            return [sum(args[0] for args in given)] * trainers
        case ops.give:
            return [given[node.args[2]][0]] * trainers
        case ops.wait_whole if node.args[0].target is ops.give:
            return [[x.reshape(-1) for x in given[0][0]]] * trainers
        case ops.wait_own:
            parts = sum(args[0] for args in given).chunk(node.args[0].args[2])  # type: ignore[union-attr]
            return [parts[k % len(parts)] for k in range(trainers)]  # by node every host has all parts
        case ops.wait_whole:
            columns = zip(*(args[0] for args in given), strict=True)
            whole = [together(Own("", (n,), trainers), parts) for n, parts in zip(given[0][2], columns, strict=True)]
            return [whole] * trainers
    return [node.target(*args, **kwargs) for args, kwargs in zip(given, named, strict=True)]


def _laid_out(tensors: Sequence[torch.Tensor], trainers: int) -> torch.Tensor:
    whole = tensors[0].new_empty(trainers * sum(own.count for own in parts_of(tensors, trainers)))
    lay_out(whole, tensors, trainers)
    return whole


def cut_values(program: Program, values: Mapping[str, object], trainers: int) -> list[dict[str, object]]:
    """For every trainer the values that a program reads: of what it keeps in parts, its own."""
    found: list[dict[str, object]] = [{**values, "trainer.rank": k} for k in range(trainers)]
    for name, variable in program.variables.items():
        if variable.own is not None and variable.own.of in values:
            for k, each in enumerate(found):
                each[name] = own_part(values[variable.own.of], variable.own, k)  # type: ignore[arg-type]
    return found


def real_part(value: torch.Tensor, own: Own, trainer: int) -> torch.Tensor:
    """Without what stands behind the variable's end."""
    start, stop = own.bounds(trainer)
    return value[: stop - start]
