"""Operations on lists of tensors as operations on each: a list ties all its variables together, which no cut could part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch._ops import OpOverload

aten = torch.ops.aten
_BASES = (
    *(
        "abs",
        "add",
        "addcdiv",
        "addcmul",
        "ceil",
        "clamp_max",
        "clamp_min",
        "clone",
        "cos",
        "div",
        "erf",
        "exp",
        "expm1",
    ),
    *("floor", "frac", "lerp", "log", "log10", "log1p", "log2", "maximum", "minimum", "mul", "neg", "norm", "pow"),
    *("reciprocal", "round", "rsqrt", "sigmoid", "sign", "sin", "sqrt", "sub", "tan", "tanh", "trunc", "zero", "copy"),
)
_CALLED = {"norm": aten.linalg_vector_norm}
_BY_NUMBER = {"maximum": "clamp_min", "minimum": "clamp_max"}
"""What they are called where they compare with a number."""
_VALUED = frozenset({"addcdiv", "addcmul"})
"""Their numbers are named: `value`."""


@cache
def each_by_itself() -> Mapping[OpOverload, Callable]:
    """A decomposition table.

    before  %n = _foreach_norm([%g, %h], 2.0)
    after   %a = linalg_vector_norm(%g, 2.0), %b = linalg_vector_norm(%h, 2.0)
    """
    found: dict[OpOverload, Callable] = {}
    for base in _BASES:
        for suffix in ("", "_"):
            packet: Any = getattr(aten, f"_foreach_{base}{suffix}", None)
            called: Any = _CALLED.get(base) or getattr(aten, f"{base}{suffix}", None)
            for overload in packet.overloads() if packet and called else ():
                op = getattr(packet, overload)
                if not overload.endswith("out") and _is_known(op, base):
                    by_number = base in _BY_NUMBER and overload != "List"
                    own = getattr(aten, f"{_BY_NUMBER[base]}{suffix}") if by_number else called
                    found[op] = partial(_apart, op, own, base in _VALUED)
    return found


def _is_known(op: OpOverload, base: str) -> bool:
    """Numbers that stand in one tensor, one for each, are left as they are."""
    return base not in _VALUED or not any(
        a.name == "scalars" and "List" not in a.type.kind() for a in op._schema.arguments
    )


def _apart(op: OpOverload, called: Callable, is_valued: bool, *args: object, **kwargs: object) -> list | None:
    declared = op._schema.arguments
    given = [*zip(declared, args, strict=False), *((a, kwargs[a.name]) for a in declared if a.name in kwargs)]
    count = next(len(value) for a, value in given if a.type.kind() == "ListType")  # type: ignore[arg-type]
    results = []
    for index in range(count):
        plain, named = [], {}
        for argument, value in given:
            each = value[index] if argument.type.kind() == "ListType" else value  # type: ignore[index]
            if argument.kwarg_only or (is_valued and argument.name in ("value", "scalars")):
                named["value" if is_valued else argument.name] = each
            else:
                plain.append(each)
        results.append(called(*plain, **named))
    return None if op._schema.is_mutable else results
