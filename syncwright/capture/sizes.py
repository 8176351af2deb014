"""A program that takes any size, for one size: constants where it computed with sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.fx import Node

from syncwright.program import Program, Role
from syncwright.shapes import infer, mode_of, size_of, substitute


def with_sizes(program: Program, shapes: Mapping[str, tuple[int, ...]]) -> Program:
    """`program` for inputs of `shapes`, without dynamic axes; what the step does is not traced again.

    before  input "batch.0": f32[4,3] dynamic [0]       %n = sym_size.int(%v_batch_0, 0), %e = expand(%g, [%n, 3])
    after   input "batch.0": f32[7,3]                   %e = expand(%g, [7, 3])
    """
    edited = program.edit()
    mode, variables = mode_of(edited.graph), dict(edited.variables)
    for name, node in edited.placeholders.items():
        if name in shapes and variables[name].role is Role.INPUT:
            variables[name] = replace(variables[name], shape=shapes[name], dynamic=())
            node.meta["val"] = _resized(node.meta["val"], shapes[name])
    sizes: list[Node] = []
    for node in edited.graph.nodes:
        if node.op != "call_function":
            continue
        if (size := size_of(node)) is not None:
            _fold(node, size)
            sizes.append(node)
        else:
            infer(node, mode)
    for node in reversed(sizes):
        edited.graph.erase_node(node)
    for name, node in edited.results.items():
        if variables[name].role is Role.OUTPUT and isinstance(val := node.meta["val"], torch.Tensor):
            variables[name] = replace(variables[name], shape=tuple(val.shape))
    guards = tuple(g for g in edited.guards if not any(axis is not None for axis in g.axes))
    return replace(edited, variables=variables, guards=guards)


def _fold(node: Node, size: int) -> None:
    """Users take the number itself."""
    for user in list(node.users):
        if user.op == "call_function" and size_of(user) is None:
            user.args = substitute(user.args, lambda n: size if n is node else n)
            user.kwargs = substitute(user.kwargs, lambda n: size if n is node else n)


def _resized(val: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Strided like the example where that is not contiguous."""
    with val.fake_mode:  # type: ignore[attr-defined]
        if val.is_contiguous():
            return torch.empty(shape, dtype=val.dtype, device=val.device)
        return torch.empty_strided(shape, val.stride(), dtype=val.dtype, device=val.device)
