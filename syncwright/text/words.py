"""The words of program text: ops, dtypes, layouts, host types, and how each is spelled."""

from __future__ import annotations

import functools
import json
import math
import operator
import re
from collections.abc import Callable, Hashable

import torch
from torch._ops import OpOverload, OpOverloadPacket

from syncwright.errors import ProgramError

NAMESPACES = ("aten", "prims", "syncwright", "_c10d_functional", "profiler")
HOST_TYPES: dict[str, type] = {"float": float, "int": int, "bool": bool}
HOST_DTYPES = {"float": torch.float64, "int": torch.int64, "bool": torch.bool}

_SHORT_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint64: "u64", torch.uint32: "u32", torch.uint16: "u16", torch.uint8: "u8",
    torch.complex128: "c128", torch.complex64: "c64",
}  # fmt: skip


def dtype_text(dtype: torch.dtype) -> str:
    """`f32`, `bf16`, `i64`, `bool`; torch's own name for the rare ones."""
    return _SHORT_DTYPES.get(dtype) or str(dtype).removeprefix("torch.")


_TORCH_CONSTANTS = [v for v in vars(torch).values() if isinstance(v, torch.layout | torch.memory_format)]
_TORCH_DTYPES = [v for v in vars(torch).values() if isinstance(v, torch.dtype)]
DTYPES: dict[str, torch.dtype] = {dtype_text(dtype): dtype for dtype in _TORCH_DTYPES}
CONSTANTS: dict[str, object] = {
    **DTYPES,
    **{str(constant).removeprefix("torch."): constant for constant in _TORCH_CONSTANTS},
    **{"None": None, "True": True, "False": False, "inf": math.inf, "nan": math.nan},
}

_OPERATORS = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs", "eq", "ne", "lt", "le",
    "gt", "ge", "and_", "or_", "xor", "not_", "invert", "lshift", "rshift", "is_", "is_not", "truth", "index",
    "getitem",
)  # fmt: skip
HOST_OPS: dict[str, Callable[..., object]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS},
    **{f"math.{name}": op for name, op in vars(math).items() if callable(op) and not name.startswith("_")},
    **{f"torch.{name}": op for name, op in vars(torch).items() if re.match("_?sym_", name)},
}
_HOST_NAMES = {op: name for name, op in HOST_OPS.items()}


class TextError(ProgramError):
    """Text that is not a program, or a program that has no text."""


@functools.cache
def op_name(target: Hashable) -> str | None:
    """How a node's target is written ("aten.mm.default"); None where a program may not call it."""
    if isinstance(target, OpOverload):
        return str(target) if target.namespace in NAMESPACES else None
    return _HOST_NAMES.get(target) if callable(target) else None


def target_text(target: object) -> str:
    """Any target, also one that programs may not call, for messages: no addresses."""
    return str(target) if isinstance(target, str | OpOverload | OpOverloadPacket) else torch.typename(target)


def find_op(name: str) -> Callable[..., object] | None:
    """The op that is written `name`; None if there is none, or it is not yet registered."""
    if name in HOST_OPS:
        return HOST_OPS[name]
    namespace, packet, overload = [*name.split("."), "", ""][:3]
    if namespace not in NAMESPACES or name.count(".") != 2:
        return None
    try:
        op = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except AttributeError:
        return None
    return op if isinstance(op, OpOverload) else None


def quote(name: str) -> str:
    """A variable's name, or any string, as text and messages show it: JSON, escaped where unseen."""
    plain = json.dumps(name, ensure_ascii=False)
    return plain if plain.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in plain)


def contiguous_strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor: (3, 4) has (4, 1)."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
