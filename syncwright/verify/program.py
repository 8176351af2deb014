"""The rules that every program keeps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._ops import OpOverload
from torch.fx import Node

from syncwright.program import Program, Role, Variable
from syncwright.text import op_name, quote, target_text, type_text, variable_type_text
from syncwright.verify.arguments import check_arguments, check_host_arguments
from syncwright.verify.causes import (
    BadOutput,
    BrokenGraph,
    MissingValue,
    MutatingOp,
    ReadTooLate,
    ReadTwice,
    UnknownOp,
    UnknownVariable,
    UnreadableRole,
    UsedTooEarly,
    WrongRead,
    WrongResult,
)
from syncwright.verify.placed import check_places

HOST_ROLES = (Role.HYPER, Role.INPUT, Role.OUTPUT, Role.GLOBAL)


def never(node: Node) -> bool:
    """No op may write to its inputs: the rule for programs that are not yet lowered."""
    return False


def verify(program: Program, may_write: Callable[[Node], bool] = never) -> None:
    """Raises the error of the first rule that `program` breaks; `may_write` excepts nodes from MutatingOp."""
    _check_output(program)
    _check_order(program)
    for node in program.graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            expected = "a fake tensor, a tuple of them or a host type"
            raise MissingValue(f"%{node.name}", 'no meta["val"]', expected, "set it where the node is made")
    _check_reads(program)
    _check_writes(program)
    _check_guards(program)
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "output"):
            _check_call(node, may_write)
    check_places(program)


def _check_output(program: Program) -> None:
    outputs = [node for node in program.graph.nodes if node.op == "output"]
    if len(outputs) != 1 or program.output is not outputs[0]:
        found = f"{len(outputs)} with %{program.output.name} as the last node"
        raise BadOutput("outputs", found, "one, as the last node", "end the graph with graph.output")
    results = outputs[0].args[0]
    if not isinstance(results, dict):
        raise BadOutput("output", repr(results), "a dict from variables' names to nodes", "use set_results")
    for name, node in results.items():
        if not isinstance(node, Node):
            raise BadOutput(quote(str(name)), f"the result {node!r}", "a node", "write the value of a node")


def _check_order(program: Program) -> None:
    graph, seen = program.graph, set()
    for node in graph.nodes:
        for source in node.all_input_nodes:
            if source.graph is not graph:
                found, remedy = f"%{source.name} of another graph", "copy it to this one"
                raise UsedTooEarly(f"%{node.name}", found, "nodes of this graph", remedy)
            if source not in seen:
                raise UsedTooEarly(f"%{node.name}", f"%{source.name} below it", "it above", "move it up")
        seen.add(node)
    if len({node.name for node in seen}) == len(seen):
        return  # all else that lint looks at has been seen above
    try:
        program.graph.lint()
    except (RuntimeError, AssertionError) as error:
        raise BrokenGraph("graph", str(error), "one that passes graph.lint()", "mend the graph") from error


def _check_reads(program: Program) -> None:
    readers: dict[str, Node] = {}
    computing: Node | None = None
    for node in program.graph.nodes:
        if node.op != "placeholder":
            computing = computing or node
            continue
        variable = _variable_read(program, node)
        about = f"%{node.name}, which reads {quote(variable.name)}"
        if variable.name in readers:
            found = f"%{readers[variable.name].name} reading it too"
            raise ReadTwice(about, found, "one placeholder for each variable", "use that one")
        if computing:
            raise ReadTooLate(about, f"it behind %{computing.name}", "placeholders first", "insert it above")
        if variable.role is Role.OUTPUT:
            remedy = "use the node that computes it"
            raise UnreadableRole(about, "the role output", "a role that exists before the step", remedy)
        if not _fits(variable, node.meta["val"]):
            found = type_text(node.meta["val"])
            raise WrongRead(about, found, _expected(variable), "make the placeholder with new_placeholder")
        readers[variable.name] = node


def _variable_read(program: Program, node: Node) -> Variable:
    name = node.meta.get("variable")
    if not isinstance(name, str):
        remedy = "make the placeholder with new_placeholder"
        raise UnknownVariable(f"%{node.name}", 'no meta["variable"]', "a variable's name", remedy)
    return _known(program, name, f"%{node.name}")


def _known(program: Program, name: str, about: str) -> Variable:
    variable = program.variables.get(name)
    if variable is None or variable.name != name:
        filed = f"{quote(variable.name)} filed under {quote(name)}" if variable else ""
        found = filed or f"the unknown variable {quote(name)}"
        raise UnknownVariable(about, found, "one of the program's variables", "add it to Program.variables")
    return variable


def _check_writes(program: Program) -> None:
    for name, node in program.results.items():
        variable = _known(program, name, f"the result %{node.name}")
        if not _fits(variable, node.meta["val"]):
            about, found = f"{quote(name)}, written with %{node.name}", type_text(node.meta["val"])
            raise WrongResult(about, found, _expected(variable), "cast or reshape the value")


def _check_guards(program: Program) -> None:
    for guard in program.guards:
        for name in guard.reads:
            _known(program, name, f"guard {quote(guard.expression)}")


def _check_call(node: Node, may_write: Callable[[Node], bool]) -> None:
    name = op_name(node.target)
    if node.op != "call_function" or name is None:
        expected = "an aten, prims, syncwright or _c10d_functional op, or one of host numbers"
        raise UnknownOp(
            f"%{node.name}",
            f"{node.op} of {target_text(node.target)}",
            expected,
            "decompose it while tracing",
        )
    if not isinstance(node.target, OpOverload):
        check_host_arguments(node, name)
        return
    schema = node.target._schema
    if schema.is_mutable and not may_write(node):
        written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        found = f"{name}, which writes to its argument {', '.join(written)}"
        raise MutatingOp(f"%{node.name}", found, "an op that only reads", "use its functional form")
    check_arguments(node, node.target)


def _fits(variable: Variable, val: object) -> bool:
    if isinstance(val, torch.Tensor):
        return variable.role is not Role.HYPER and (val.shape, val.dtype) == (variable.shape, variable.dtype)
    return variable.role in HOST_ROLES and variable.shape == () and val is _host_type(variable.dtype)


def _host_type(dtype: torch.dtype) -> type:
    if dtype is torch.bool:
        return bool
    return float if dtype.is_floating_point else int


def _expected(variable: Variable) -> str:
    if variable.role is Role.HYPER:
        return f"host {_host_type(variable.dtype).__name__}"
    return variable_type_text(variable)
