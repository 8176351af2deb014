"""Whether a node gives its op what the op's schema asks for: tensors, host numbers, nothing missing."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch._ops import OpOverload
from torch.fx import Node

from syncwright.text import type_text
from syncwright.verify.causes import WrongArgument

HOST_TYPES = (float, int, bool)
_NUMBER_KINDS = ("NumberType", "FloatType", "IntType", "BoolType", "SymIntType")


def check_arguments(node: Node, op: OpOverload) -> None:
    """Raises WrongArgument where `node` does not fit the schema of its op."""
    declared, given, about = _declared(op), named_arguments(node, op), f"%{node.name}"
    if len(given) < len(node.args) + len(node.kwargs):
        found = f"{len(node.args)} positional and {len(node.kwargs)} named arguments"
        raise WrongArgument(about, found, str(op._schema), "leave some out")
    for name, argument in declared.items():
        if name in given:
            _check_argument(node, op, argument, given[name])
        elif not argument.optional:
            raise WrongArgument(about, f"no argument {name}", str(op._schema), "give it")
    unknown = set(given) - set(declared)
    if unknown:
        raise WrongArgument(about, f"the argument {min(unknown)}", str(op._schema), "leave it out")


def check_host_arguments(node: Node, name: str) -> None:
    """Raises WrongArgument where Python's op is given tensors; getitem takes an op's several results."""
    for source in node.all_input_nodes:
        val = source.meta["val"]
        picks = name == "operator.getitem" and isinstance(val, list | tuple)
        if not picks and val not in HOST_TYPES:
            found = f"{_shown(source)} as an argument of {name}"
            wanted = "several values to choose from" if name == "operator.getitem" else "a host number"
            raise WrongArgument(f"%{node.name}", found, wanted, "use an aten op for tensors")


def named_arguments(node: Node, op: OpOverload) -> Mapping[str, object]:
    """What the node gives, by the names in the op's schema; defaults are left out."""
    names = [name for name, argument in _declared(op).items() if not argument.named_only]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


@dataclass(frozen=True, slots=True)
class _Argument:
    """An argument of a schema; `kinds` from the outside in: ("OptionalType", "ListType", "TensorType")."""

    kinds: tuple[str, ...]
    optional: bool
    named_only: bool


@functools.cache
def _declared(op: OpOverload) -> Mapping[str, _Argument]:
    """The arguments in an op's schema, by name; torch builds new objects each time that it is asked."""
    return {a.name: _Argument(_kinds(a.type), a.has_default_value(), a.kwarg_only) for a in op._schema.arguments}


def _kinds(type_: torch.JitType) -> tuple[str, ...]:
    kind = type_.kind()
    inner = _kinds(type_.getElementType()) if kind in ("OptionalType", "ListType") else ()  # type: ignore[attr-defined]
    return (kind, *inner)


def _check_argument(node: Node, op: OpOverload, argument: _Argument, value: object) -> None:
    wanted = _wanted(argument.kinds, value, op)
    if wanted:
        name = next(name for name, each in _declared(op).items() if each is argument)
        found = f"{_shown(value)} as the argument {name} of {op}"
        raise WrongArgument(f"%{node.name}", found, wanted, "convert it, or use another overload")


def _wanted(kinds: tuple[str, ...], value: object, op: OpOverload) -> str | None:
    """What the schema asks for, in words, where `value` is not that."""
    kind, val = kinds[0], _val(value)
    if kind == "OptionalType":
        return None if val is None else _wanted(kinds[1:], value, op)
    if kind == "ListType" and isinstance(value, list | tuple):
        return next((f"a list: {want}" for item in value if (want := _wanted(kinds[1:], item, op))), None)
    if kind == "TensorType" and not isinstance(val, torch.Tensor):
        takes_numbers = torch._C._should_allow_numbers_as_tensors(op._schema.name.split("::")[1])
        is_number = val in HOST_TYPES or isinstance(value, HOST_TYPES)
        return None if takes_numbers and is_number else "a tensor"
    if kind in _NUMBER_KINDS and isinstance(value, Node) and val not in HOST_TYPES:
        return "a host number"
    return None


def _val(value: object) -> object:
    return value.meta["val"] if isinstance(value, Node) else value


def _shown(value: object) -> str:
    return f"%{value.name} of type {type_text(value.meta['val'])}" if isinstance(value, Node) else repr(value)
