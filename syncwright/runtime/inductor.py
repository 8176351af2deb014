"""The only file that calls Inductor: a graph of tensor operations to one compiled function."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

import torch
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

_SETTINGS = {
    "fallback_random": True,
    "reorder_for_peak_memory": False,
}
"""Random operations draw as in eager, so masks are the same compiled and interpreted. The order of nodes is ours."""


def is_available() -> bool:
    """Whether there is a C++ compiler to compile for the CPU with."""
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def compile_graph(module: GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Sequence[object]]:
    """Compiles `module` for inputs of these shapes (fake tensors will do). Takes and gives flat lists."""
    with torch.no_grad(), config.patch(_SETTINGS):
        return compile_fx(module, list(inputs))  # type: ignore[return-value]
