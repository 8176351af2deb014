"""What a pass must not do to a program, and the error that names the pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch._ops import OpOverload
from torch.fx import Node

from syncwright.errors import ProgramError
from syncwright.program import Program
from syncwright.text import TextError, diff
from syncwright.verify.arguments import named_arguments
from syncwright.verify.causes import BrokenByPass, RandomOpsChanged
from syncwright.verify.program import never, verify


def verify_after(pass_name: str, before: Program, after: Program, may_write: Callable[[Node], bool] = never) -> None:
    """Verifies what a pass made; raises BrokenByPass from the cause, with the pass's diff as a note."""
    try:
        verify(after, may_write)
        _check_random_ops(before, after)
    except ProgramError as error:
        origin = "" if _legal(before, may_write) else " (the program was illegal before this pass)"
        broken = BrokenByPass(f"after pass {pass_name}: {error}{origin}")
        with contextlib.suppress(TextError):
            broken.add_note(diff(before, after))
        raise broken from error


def draws_random(node: Node) -> bool:
    """Whether the node takes numbers from a random generator (attention without dropout does not)."""
    op = node.target
    if not isinstance(op, OpOverload) or not _may_draw(op):
        return False
    defaults = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}
    return {**defaults, **named_arguments(node, op)}.get("dropout_p") != 0.0


@functools.cache
def _may_draw(op: OpOverload) -> bool:
    return torch.Tag.nondeterministic_seeded in op.tags


def _check_random_ops(before: Program, after: Program) -> None:
    """Random numbers come from one stream: as many draws, in one order, or a seed means something else."""
    old, new = ([str(n.target) for n in p.graph.nodes if draws_random(n)] for p in (before, after))
    if old != new:
        remedy = "keep each of them, once, in order"
        raise RandomOpsChanged("random ops", f"[{', '.join(new)}]", f"[{', '.join(old)}] as before", remedy)


def _legal(program: Program, may_write: Callable[[Node], bool]) -> bool:
    try:
        verify(program, may_write)
    except ProgramError:
        return False
    return True
