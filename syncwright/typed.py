"""Frozen dataclasses whose fields hold what their annotations say, in Python and in YAML.

A choice is a union of dataclasses. In YAML the class name in snake case is its tag:

    Whole()              whole
    Even(k=3)            {even: 3}                       one field without a default: its value alone
    Blocks(8192)         {blocks: {min_elements: 8192}}  in a saved plan; in rules `blocks`, the default

Pairs of a name and a value, tuple[tuple[str, float], ...], are a mapping: (("lr", 0.7),) is {lr: 0.7}.

So a new way of sharing, cutting or placing is one dataclass more, and nothing here changes.
"""

from __future__ import annotations

import re
import types
from dataclasses import MISSING, Field, fields
from dataclasses import replace as changed
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from syncwright.document import Node
from syncwright.errors import SyncwrightError
from syncwright.near import did_you_mean

T = TypeVar("T")

Count = Annotated[int, msgspec.Meta(ge=1)]
Index = Annotated[int, msgspec.Meta(ge=0)]
Amount = Annotated[float, msgspec.Meta(ge=0)]
Size = Annotated[float, msgspec.Meta(gt=0)]
Ratio = Annotated[float, msgspec.Meta(gt=0, le=1)]
Factor = Annotated[float, msgspec.Meta(ge=0, lt=1)]

RARE = {"rare": True}
"""The metadata of a field that is written only where it does not hold its default, also in a saved plan."""


def tag(kind: type) -> str:
    """The name of a choice in YAML: tag(AllReduce) == "all_reduce", tag(PowerSGD) == "power_sgd"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", kind.__name__).lower()


def check_fields(value: Any, error: type[SyncwrightError]) -> None:
    """Raise `error` unless every field of a dataclass holds what its annotation says."""
    hints = get_type_hints(type(value), include_extras=True)
    for field in fields(value):
        found, hint = getattr(value, field.name), hints[field.name]
        if not _fits(found, hint):
            where = f"{type(value).__name__}.{field.name}"
            raise error(f"{where}: found {found!r}, expected {describe(hint, in_python=True)}.")


def _fits(found: Any, hint: Any) -> bool:
    if choices := _choices(hint):
        return isinstance(found, choices) or (found is None and _is_optional(hint))
    if get_origin(hint) is tuple:
        return isinstance(found, tuple) and _fits_tuple(found, get_args(hint))
    try:
        msgspec.convert(found, hint)
    except msgspec.ValidationError:
        return False
    return True


def _fits_tuple(found: tuple[Any, ...], hints: tuple[Any, ...]) -> bool:
    if hints[-1] is Ellipsis:
        return all(_fits(item, hints[0]) for item in found)
    return len(found) == len(hints) and all(map(_fits, found, hints))


def describe(hint: Any, in_python: bool = False) -> str:
    """What an annotation asks for, in words: describe(Count) == "a whole number of at least 1"."""
    if choices := _choices(hint):
        names = [f"{kind.__name__}()" if in_python else tag(kind) for kind in choices]
        return "one of " + ", ".join(names + (["None" if in_python else "null"] if _is_optional(hint) else []))
    match get_origin(hint):
        case origin if origin is Annotated:
            kind, meta = get_args(hint)
            bounds = [
                f"{word} {getattr(meta, name)}" for name, word in _BOUNDS.items() if getattr(meta, name) is not None
            ]
            return f"{describe(kind)} {' and '.join(bounds)}"
        case origin if origin is Literal:
            values = [str(value) for value in get_args(hint)]
            return f"one of {', '.join(values)}" if len(values) > 1 else values[0]
        case origin if origin in (Union, types.UnionType):
            return " or ".join(describe(kind, in_python) for kind in get_args(hint))
        case origin if origin is tuple and not in_python and _is_pairs(hint):
            return f"a mapping from names to values, each {describe(_value_of_pairs(hint))}"
        case origin if origin is tuple and in_python:
            return "a tuple of " + " and ".join(describe(kind, True) for kind in get_args(hint) if kind is not ...)
        case origin if origin is tuple:
            return f"a list, each item {describe(get_args(hint)[0])}"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


_BOUNDS = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def _choices(hint: Any) -> tuple[type, ...]:
    """The dataclasses that a union, also with None, is made of, or the only one; () for any other annotation."""
    if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
        return (hint,)
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    return kinds if kinds and all(hasattr(kind, "__dataclass_fields__") for kind in kinds) else ()


def _is_optional(hint: Any) -> bool:
    """Whether an annotation takes None beside others."""
    return type(None) in get_args(hint)


def _is_pairs(hint: Any) -> bool:
    """Whether an annotation asks for pairs of a name and a value."""
    args = get_args(hint)
    inner = get_args(args[0]) if get_origin(hint) is tuple and args[-1] is Ellipsis else ()
    return len(inner) == 2 and inner[0] is str


def _value_of_pairs(hint: Any) -> Any:
    return get_args(get_args(hint)[0])[1]


def decode(node: Node, hint: Any, do: str = "Correct it.") -> Any:
    """The value that a node of a YAML file spells, of the kind that `hint` asks for.

    {even: 3}, Partition  ->  Even(k=3)
    """
    if choices := _choices(hint):
        return None if node.value is None and _is_optional(hint) else _decode_choice(node, choices, do)
    if _is_pairs(hint):
        items = node.mapping(describe(hint), do).items()
        return tuple((name, decode(inner, _value_of_pairs(hint), do)) for name, inner in items)
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        return tuple(decode(item, kind, do) for item in node.items(describe(hint), do))
    try:
        return msgspec.convert(_plain(node), hint)
    except msgspec.ValidationError:
        raise node.error(describe(hint), do) from None


def _plain(node: Node) -> Any:
    return [_plain(item) for item in node.value] if isinstance(node.value, list) else node.value


def _decode_choice(node: Node, choices: tuple[type, ...], do: str) -> Any:
    tags = {tag(kind): kind for kind in choices}
    expected = describe(Union[choices])  # noqa: UP007 - the choices are known only here
    match node.value:
        case str() as name if name in tags:
            return decode_record(changed(node, value={}), tags[name])
        case str() as name:
            raise node.error(expected, did_you_mean(name, tags, do))
        case dict() as nodes if len(nodes) == 1:
            ((name, inner),) = nodes.items()
            if name not in tags:
                advice = did_you_mean(name, tags, do)
                raise inner.error(expected, advice, found=f"the key {name!r}")
            return decode_record(inner, tags[name])
    raise node.error(expected, do)


def decode_record(node: Node, kind: type[T]) -> T:
    """A dataclass from a mapping of its fields; one with a single field, also from that value alone."""
    hints = get_type_hints(kind, include_extras=True)
    known: dict[str, Field[Any]] = {field.name: field for field in fields(kind)}  # pyright: ignore[reportArgumentType]
    if len(known) == 1 and (not isinstance(node.value, dict) or _spells_choice(node, hints[next(iter(known))])):
        nodes = dict.fromkeys(known, node)
    else:
        nodes = node.record(tuple(known), f"Give the settings of {tag(kind)} by name.")
    for name, field in known.items():
        if _required(field) and name not in nodes:
            do = f"Write {{{tag(kind)}: ...}} with its value." if len(known) == 1 else f"Add `{name}: ...`."
            raise node.error(describe(hints[name]), do, found=f"no `{name}`")
    values = {name: decode(inner, hints[name], _advice(known[name])) for name, inner in nodes.items()}
    try:
        return kind(**values)
    except SyncwrightError as fault:
        raise node.kind(f"{node.where}: {fault}") from None


def _spells_choice(node: Node, hint: Any) -> bool:
    """Whether a mapping is a choice with its settings, and not fields by their names."""
    return any(tag(kind) in node.value for kind in _choices(hint))


def _advice(field: Field[Any]) -> str:
    if _required(field):
        return "Correct it."
    return f"Correct it, or leave `{field.name}` out: it is then {encode(field.default)}."


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def encode(value: Any, complete: bool = False) -> Any:
    """A choice as plain values for YAML; with `complete`, also the fields that hold their defaults.

    ParameterServer(place=On(1))  ->  {"parameter_server": {"place": {"on": 1}}}
    """
    if not hasattr(value, "__dataclass_fields__"):
        return value
    name = tag(type(value))
    known = fields(value)
    if len(known) == 1 and _required(known[0]):
        return {name: encode(getattr(value, known[0].name), complete)}
    hints = get_type_hints(type(value), include_extras=True)
    written = {
        field.name: _encode_field(getattr(value, field.name), hints[field.name], complete)
        for field in known
        if (complete and field.metadata != RARE) or getattr(value, field.name) != field.default
    }
    return {name: written} if written else name


def _encode_field(value: Any, hint: Any, complete: bool) -> Any:
    return dict(value) if _is_pairs(hint) else encode(value, complete)
