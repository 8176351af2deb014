"""A trainer's program run for all trainers at once, node by node: what the collectives give is made of what all gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from syncwright import ops
from syncwright.program import Program
from syncwright.runtime.own_parts import own_part, together
from syncwright.runtime.scatters import lay_out, parts_of
from syncwright.selection import Own
from syncwright.shapes import substitute

Results = list[dict[str, torch.Tensor]]


def run_together(program: Program, values: Sequence[Mapping[str, object]]) -> Results:
    """By trainer what the program writes, from its values."""
    trainers = len(values)
    env: dict = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            env[node] = [each[node.meta["variable"]] for each in values]
        elif node.op == "call_function":
            known = [lambda n, k=k: env[n][k] for k in range(trainers)]
            given = [substitute(node.args, each) for each in known]
            env[node] = _of_all(node, given, [substitute(node.kwargs, each) for each in known])
    return [{name: env[node][k] for name, node in program.results.items()} for k in range(trainers)]


def _of_all(node, given: list[tuple], named: list[dict]) -> list:
    trainers = len(given)
    match node.target:
        case ops.all_reduce | ops.gather_parts:
            return [args[0] for args in given]
        case ops.wait:
            return [sum(args[0] for args in given)] * trainers
        case ops.reduce_scatter:
            return [_laid_out(args[0], trainers) for args in given]
        case ops.reduce_to:
            return [torch.cat([x.reshape(-1) for x in args[0]]) for args in given]
        case ops.wait_own if node.args[0].target is ops.reduce_to:
            return [sum(args[0] for args in given)] * trainers
        case ops.give:
            return [given[node.args[2]][0]] * trainers
        case ops.wait_whole if node.args[0].target is ops.give:
            return [[x.reshape(-1) for x in given[0][0]]] * trainers
        case ops.wait_own:
            return list(sum(args[0] for args in given).chunk(trainers))  # type: ignore[union-attr]
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
