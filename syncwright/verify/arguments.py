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
    kinds = tuple([_kind(value) for value in node.args])
    fault = _fault(op, kinds, tuple([(name, _kind(value)) for name, value in node.kwargs.items()]))
    if fault is None:
        return
    about, (name, wanted) = f"%{node.name}", fault
    if name in (given := named_arguments(node, op)) and wanted:
        found = f"{_shown(given[name])} as the argument {name} of {op}"
        raise WrongArgument(about, found, wanted, "convert it, or use another overload")
    if not name:
        found = f"{len(node.args)} positional and {len(node.kwargs)} named arguments"
        raise WrongArgument(about, found, str(op._schema), "leave some out")
    if name in given:
        raise WrongArgument(about, f"the argument {name}", str(op._schema), "leave it out")
    raise WrongArgument(about, f"no argument {name}", str(op._schema), "give it")


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


@dataclass(frozen=True, slots=True)
class _Computed:
    """The kind of a node's value; of a constant, the kind is its type, of a list a tuple of kinds."""

    type: object


_TENSOR = _Computed(torch.Tensor)
Kind = object


def _kind(value: object) -> Kind:
    if isinstance(value, Node):
        val = value.meta["val"]
        return _TENSOR if isinstance(val, torch.Tensor) else _Computed(val if val in HOST_TYPES else type(val))
    return tuple([_kind(item) for item in value]) if isinstance(value, list | tuple) else type(value)


@functools.cache
def _fault(op: OpOverload, given: tuple[Kind, ...], named: tuple[tuple[str, Kind], ...]) -> tuple[str, str] | None:
    """The argument at fault and what its schema asks for, in words; no name where arguments are given twice."""
    declared = _declared(op)
    by_place = [name for name, argument in declared.items() if not argument.named_only]
    kinds = dict(zip(by_place, given, strict=False)) | dict(named)
    if len(kinds) < len(given) + len(named):
        return "", ""
    for name, argument in declared.items():
        if name not in kinds and not argument.optional:
            return name, ""
        if name in kinds and (wanted := _wanted(argument.kinds, kinds[name], op)):
            return name, wanted
    unknown = set(kinds) - set(declared)
    return (min(unknown), "") if unknown else None


def _wanted(kinds: tuple[str, ...], found: Kind, op: OpOverload) -> str | None:
    """What the schema asks for, in words, where `found` is not that."""
    kind = kinds[0]
    if kind == "OptionalType":
        return None if found in (type(None), _Computed(type(None))) else _wanted(kinds[1:], found, op)
    if kind == "ListType" and isinstance(found, tuple):
        return next((f"a list: {want}" for item in found if (want := _wanted(kinds[1:], item, op))), None)
    number = found.type if isinstance(found, _Computed) else found
    if kind == "TensorType" and found != _TENSOR and found is not torch.Tensor:
        takes_numbers = torch._C._should_allow_numbers_as_tensors(op._schema.name.split("::")[1])
        return None if takes_numbers and number in HOST_TYPES else "a tensor"
    if kind in _NUMBER_KINDS and isinstance(found, _Computed) and number not in HOST_TYPES:
        return "a host number"
    return None


def _shown(value: object) -> str:
    return f"%{value.name} of type {type_text(value.meta['val'])}" if isinstance(value, Node) else repr(value)
