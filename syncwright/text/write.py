"""From a program to its text."""

from __future__ import annotations

import torch
from torch.fx import Node

from syncwright.place import Everywhere, Owners, Place, Server, Trainers, place_of
from syncwright.program import Guard, Program, Role, Variable
from syncwright.selection import Selection
from syncwright.text.words import (
    HOST_DTYPES,
    HOST_TYPES,
    NAMESPACES,
    TextError,
    contiguous_strides,
    dtype_text,
    op_name,
    quote,
    target_text,
)


def to_text(program: Program) -> str:
    """The program as text, which `parse` turns back; raises TextError where something has no text."""
    variables = [_variable_text(name, variable) for name, variable in program.variables.items()]
    guards = [_guard_text(guard) for guard in program.guards]
    nodes = [node for node in program.graph.nodes if node.op != "output"]
    first = next((at for at, node in enumerate(nodes) if node.op != "placeholder"), len(nodes))
    lines = [_node_text(node) for node in nodes]
    writes = [_write_text(name, result) for name, result in program.results.items()]
    blocks = [["program"], variables + guards, lines[:first], lines[first:], writes]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def type_text(val: object) -> str:
    """A node's `meta["val"]` as a type: `f32[3,4]`, `i64[]`, `host float`, `(f32[3], None)`."""
    match val:
        case torch.Tensor():
            return _tensor_text(val)
        case None:
            return "None"
        case list() | tuple():
            return _sequence_text(val, [type_text(item) for item in val])
        case type() if val in HOST_TYPES.values():
            return f"host {val.__name__}"
    raise TextError(f"found the value {val!r}, expected a fake tensor, a host type or a tuple of them; trace it so")


def variable_type_text(variable: Variable) -> str:
    """A variable's shape and dtype as a type; a HYPER is a host number."""
    if variable.role is Role.HYPER and variable.shape == () and variable.dtype in HOST_DTYPES.values():
        return next(f"host {word}" for word, dtype in HOST_DTYPES.items() if dtype == variable.dtype)
    return f"{dtype_text(variable.dtype)}{_sizes_text(variable.shape)}"


def _variable_text(name: str, variable: Variable) -> str:
    if name != variable.name:
        raise TextError(f"{quote(variable.name)}: found under {quote(name)}, expected its own name; file it so")
    facts = [f"{variable.role.value:6} {quote(name)}: {variable_type_text(variable)}"]
    if variable.of is not None:
        facts.append(f"of {quote(variable.of)}")
    if variable.sparse:
        facts.append("sparse")
    if variable.lazy:
        facts.append("lazy")
    if variable.along:
        facts.append(f"along {variable.along}")
    if variable.aliases:
        facts.append(f"aliases [{', '.join(map(quote, variable.aliases))}]")
    if variable.selection is not None:
        facts.append(f"whole {quote(variable.selection.of)} {_selection_text(variable.selection)}".rstrip())
    if variable.kept:
        facts.append(f"kept [{', '.join(_selection_text(s) for s in variable.kept)}]")
    if variable.dynamic:
        facts.append(f"dynamic {_sizes_text(variable.dynamic)}")
    if variable.initial is not None:
        facts.append(f"initial {variable.initial!r}")
    if variable.unbounded is not None:
        facts.append(f"unbounded {quote(variable.unbounded.to_text())}")
    if variable.own is not None:
        own = variable.own
        kept = "" if own.keeper is None else f" with {own.keeper}"
        within = f" in {quote(own.group)}" if own.group else ""
        facts.append(f"own {quote(own.of)} {_sizes_text(own.shape)} among {own.trainers}{within}{kept}")
    return " ".join(facts)


def _selection_text(selection: Selection) -> str:
    """`rows [0,2] on server 1`, `shards [0,512] of 1024 on server 0`; nothing for all of what trainers keep."""
    bounds = "" if selection.bounds is None else f"{selection.along} {_sizes_text(selection.bounds)}"
    bounds += f" of {selection.shards}" if selection.shards else ""
    server = "" if selection.server is None else f"on server {selection.server}"
    return f"{bounds} {server}".strip()


def place_text(place: Place) -> str:
    """`at server 0`, `at owners "fc.weight"`, `at everyone`; nothing for trainers."""
    match place:
        case Trainers():
            return ""
        case Owners(variable):
            return f"at owners {quote(variable)}"
        case Server(rank):
            return f"at server {rank}"
        case Everywhere():
            return "at everyone"


def _guard_text(guard: Guard) -> str:
    if len(guard.symbols) != len(guard.reads) or not all(s.isidentifier() for s in guard.symbols):
        raise TextError(f"found {guard}, expected an identifier for each variable that it reads; pair them")
    axes = ["" if axis is None else f" axis {axis}" for axis in guard.axes or (None,) * len(guard.reads)]
    triples = zip(guard.symbols, guard.reads, axes, strict=True)
    pairs = [f" {symbol} = {quote(name)}{axis}" for symbol, name, axis in triples]
    return f"guard  {quote(guard.expression)}{''.join(pairs)}"


def _node_text(node: Node) -> str:
    try:
        type_ = f": {type_text(node.meta['val'])}" if "val" in node.meta else ""
        source = _read_text(node) if node.op == "placeholder" else _call_text(node)
    except TextError as error:
        raise TextError(f"%{node.name}: {error}") from None
    return f"%{node.name}{type_} = {source} {place_text(place_of(node))}".rstrip()


def _write_text(name: str, result: object) -> str:
    if not isinstance(result, Node):
        raise TextError(f"{quote(name)}: found the result {result!r}, expected a node; write the value of one")
    return f"write {quote(name)} = {_value_text(result)}"


def _read_text(node: Node) -> str:
    if "variable" not in node.meta:
        raise TextError('found a placeholder without meta["variable"], expected its variable; use new_placeholder')
    name = node.meta["variable"]
    return f"read {quote(name)}" + ("" if node.target == node.name else f" as {quote(str(node.target))}")


def _call_text(node: Node) -> str:
    name = op_name(node.target)
    if node.op != "call_function" or name is None:
        known = ", ".join(NAMESPACES)
        found = f"{node.op} of {target_text(node.target)}"
        raise TextError(f"found {found}, expected an op of {known} or of host numbers; trace it so")
    arguments = [_value_text(value) for value in node.args]
    arguments += [f"{key}={_value_text(value)}" for key, value in node.kwargs.items()]
    return f"{name}({', '.join(arguments)})"


def _value_text(value: object) -> str:
    match value:
        case Node():
            return f"%{value.name}"
        case str():
            return quote(value)
        case complex():
            return f"complex({value.real!r},{value.imag!r})"
        case None | bool():
            return repr(value)
        case int() | float():
            return int.__repr__(value) if isinstance(value, int) else float.__repr__(value)
        case torch.dtype():
            return dtype_text(value)
        case torch.device() | torch.layout() | torch.memory_format():
            return str(value).removeprefix("torch.")
        case list() | tuple():
            return _sequence_text(value, [_value_text(item) for item in value])
    raise TextError(f"found the argument {value!r}, expected a node, constant or list of them; give it as one")


def _sequence_text(sequence: list | tuple, items: list[str]) -> str:
    inside = ", ".join(items)
    if isinstance(sequence, list):
        return f"[{inside}]"
    return f"({inside},)" if len(items) == 1 else f"({inside})"


def _tensor_text(tensor: torch.Tensor) -> str:
    if tensor.layout != torch.strided or not all(type(size) is int for size in tensor.shape):
        found = f"a {tensor.layout} tensor of shape {tuple(tensor.shape)}"
        raise TextError(f"found {found}, expected a strided one of fixed sizes; trace it with fixed shapes")
    text = f"{dtype_text(tensor.dtype)}{_sizes_text(tensor.shape)}"
    if tensor.stride() != contiguous_strides(tensor.shape):
        text += f" strides {_sizes_text(tensor.stride())}"
    return text if tensor.device.type == "cpu" else f"{text} on {tensor.device}"


def _sizes_text(sizes: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, sizes))}]"
