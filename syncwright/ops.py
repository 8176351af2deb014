"""Our operations in a graph: signature and shape rule of each. How they act is the executor's business.

gradient(x, name)                      identity; here the gradient of parameter `name` is complete
all_reduce(x, channel)                 starts the sum of x over all trainers
wait(x)                                its result
push(x, weight, channel, hypers)       sends x to the owner of `channel`; a token (an empty tensor) that orders
pull(after, channel, shape, dtype)     the owner's present value of `channel`, once what `after` sent is in it
"""

from __future__ import annotations

import torch

NAMESPACE = "syncwright"
_library = torch.library.Library(NAMESPACE, "DEF")

_library.define("gradient(Tensor x, str name) -> Tensor")
_library.define("all_reduce(Tensor x, str channel) -> Tensor")
_library.define("wait(Tensor x, str channel) -> Tensor")
_library.define("push(Tensor x, str channel) -> Tensor")
_library.define("pull(Tensor[] after, str channel, int[] shape, ScalarType dtype) -> Tensor")


def _same(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


torch.library.register_fake(f"{NAMESPACE}::gradient", _same, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::all_reduce", _same, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::wait", _same, lib=_library)


@torch.library.register_fake(f"{NAMESPACE}::push", lib=_library)
def _push(x: torch.Tensor, channel: str) -> torch.Tensor:
    return torch.empty(0)


@torch.library.register_fake(f"{NAMESPACE}::pull", lib=_library)
def _pull(after: list[torch.Tensor], channel: str, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


_library.impl("gradient", lambda x, name: x, "CompositeExplicitAutograd")

gradient = torch.ops.syncwright.gradient.default
all_reduce = torch.ops.syncwright.all_reduce.default
wait = torch.ops.syncwright.wait.default
push = torch.ops.syncwright.push.default
pull = torch.ops.syncwright.pull.default

COMMUNICATION = frozenset({all_reduce, wait, push, pull})
SENDS = frozenset({all_reduce, push})
