"""Our operations in a graph: signature and shape rule of each. How they act is the executor's business.

    gradient(x, name)                      identity; here the gradient of parameter `name` is complete

In a whole program, which holds what every role does (see `place`); each names its channel, runs where its result is
read, and its result is what is read there:

    push.merged(x, channel, merge, take, up_to, dtype)
                                           from trainers to servers: the trainers' contributions, merged, in `dtype`: one of
                                           each trainer (take 0), or so many as they come; up to so many of one trainer
                                           travel as one
    pull.value(x, channel, when, dtype)    from a server to every trainer, in `dtype`: as it is in this step ("step"), in the
                                           step before ("before"), "now", or as it came last, without waiting ("latest")
    send(x, channel)                       from a server to another: of several owners' values, the first
    gather(x, channel, parts)              from the owners of the pieces of a variable to a server: their values, stacked

In the program of a trainer:

    all_reduce(x, channel)                 starts the sum of x over all trainers
    wait(x, channel)                       its result
    push(x, channel)                       sends x to the owner of `channel`; a token (an empty tensor) that orders
    pull(after, channel, shape, dtype, when)
                                           the owner's value of `channel`, once what `after` sent is in it; or as `when` says
"""

from __future__ import annotations

import torch

NAMESPACE = "syncwright"
_library = torch.library.Library(NAMESPACE, "DEF")

_library.define("gradient(Tensor x, str name) -> Tensor")
_library.define("all_reduce(Tensor x, str channel) -> Tensor")
_library.define("wait(Tensor x, str channel) -> Tensor")
_library.define("push(Tensor x, str channel) -> Tensor")
_library.define(
    "push.merged(Tensor x, str channel, str merge, int take=0, int up_to=1, ScalarType? dtype=None) -> Tensor"
)
_library.define("pull.value(Tensor x, str channel, str when='step', ScalarType? dtype=None) -> Tensor")
_library.define("send(Tensor x, str channel) -> Tensor")
_library.define("gather(Tensor x, str channel, int parts) -> Tensor")
_library.define("pull(Tensor[] after, str channel, int[] shape, ScalarType dtype, str when='step') -> Tensor")


def _same(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


torch.library.register_fake(f"{NAMESPACE}::gradient", _same, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::all_reduce", _same, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::wait", _same, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::send", _same, lib=_library)


@torch.library.register_fake(f"{NAMESPACE}::push.merged", lib=_library)
def _push_merged(
    x: torch.Tensor, channel: str, merge: str, take: int = 0, up_to: int = 1, dtype: torch.dtype | None = None
) -> torch.Tensor:
    return torch.empty_like(x, dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::pull.value", lib=_library)
def _pull_value(x: torch.Tensor, channel: str, when: str = "step", dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty_like(x, dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::gather", lib=_library)
def _gather(x: torch.Tensor, channel: str, parts: int) -> torch.Tensor:
    return x.new_empty([parts, *x.shape])


@torch.library.register_fake(f"{NAMESPACE}::push", lib=_library)
def _push(x: torch.Tensor, channel: str) -> torch.Tensor:
    return torch.empty(0)


@torch.library.register_fake(f"{NAMESPACE}::pull", lib=_library)
def _pull(
    after: list[torch.Tensor], channel: str, shape: list[int], dtype: torch.dtype, when: str = "step"
) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


_library.impl("gradient", lambda x, name: x, "CompositeExplicitAutograd")

gradient = torch.ops.syncwright.gradient.default
all_reduce = torch.ops.syncwright.all_reduce.default
wait = torch.ops.syncwright.wait.default
push = torch.ops.syncwright.push.default
pull = torch.ops.syncwright.pull.default
push_merged = torch.ops.syncwright.push.merged
pull_value = torch.ops.syncwright.pull.value
send = torch.ops.syncwright.send.default
gather = torch.ops.syncwright.gather.default

COMMUNICATION = frozenset({all_reduce, wait, push, pull})
SENDS = frozenset({all_reduce, push})
CROSSINGS = frozenset({push_merged, pull_value, send, gather})
