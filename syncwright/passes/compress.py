"""Gradients compressed before trainers reduce them: what is sent, and what is kept of what is not."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from syncwright.passes.insert import behind, read_variable
from syncwright.plan.compression import Cast, Compression, ErrorFeedback, Int8, PowerSGD, TopK
from syncwright.program import Program, Role, Variable, set_results
from syncwright.shapes import Inference

aten = torch.ops.aten


def compressed(
    program: Program, sent: Node, parameter: str, by: Compression | None, known: Inference
) -> tuple[Program, Node]:
    """What is sent of a trainer's share of a gradient, behind it.

    before  %s
    after   (cast) %c = to_copy(%s, f16)
    after   (error feedback of a cast) w.residual = placeholder, %t = add(%s, w.residual), %c = to_copy(%t, f16),
            output({"w.residual": sub(%t, to_copy(%c, f32))})
    """
    match by:
        case None | PowerSGD() | TopK() | Int8() | ErrorFeedback(TopK() | Int8()):  # what other passes leave
            return program, sent
        case Cast(dtype):
            with behind(sent):
                return program, known.call(program.graph, aten._to_copy.default, sent, dtype=getattr(torch, dtype))
        case ErrorFeedback(inner):
            val = sent.meta["val"]
            residual = Variable(
                residual_name(parameter), Role.STATE, tuple(val.shape), val.dtype, parameter, initial=0.0
            )
            program, left = read_variable(program, residual, val.new_empty(val.shape))
            with behind(sent):
                total = known.call(program.graph, aten.add.Tensor, sent, left)
            program, narrow = compressed(program, total, parameter, inner, known)
            with behind(narrow):
                wide = known.call(program.graph, aten._to_copy.default, narrow, dtype=val.dtype)
            with behind(wide):
                kept = known.call(program.graph, aten.sub.Tensor, total, wide)
            set_results(program, {**program.results, residual.name: kept})
            return replace(program, variables={**program.variables, residual.name: residual}), narrow


def residual_name(parameter: str) -> str:
    """Under which a trainer keeps what it has not sent."""
    return f"{parameter}.residual"
