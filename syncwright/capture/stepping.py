"""Optimizers while they are traced: step counts as they are or in float64, first updates apart, no closures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from syncwright.capture import private
from syncwright.capture.initial import BEGUN
from syncwright.capture.lines import current_line
from syncwright.capture.sparse import SparseLookups
from syncwright.capture.sparse_adam import is_sparse_adam
from syncwright.capture.sparse_adam import update as sparse_adam_update
from syncwright.capture.state import Binding
from syncwright.errors import CaptureError


class BranchOnState(Exception):
    """The optimizer branched on a number that it keeps in its state."""


def wrap_optimizers(
    binding: Binding, lookups: SparseLookups, given: Mapping[str, object], on_tensors: bool, undo: ExitStack
) -> None:
    """Until `undo` closes, `step` of every optimizer is one that can be traced.

    on_tensors  step counts are float64 tensors, as for `capturable=True`
    """
    scopes = [inspect.unwrap(type(o).step).__globals__ for o in binding.optimizers.values()]
    undo.enter_context(private.symbolic_extremes(scopes))
    for each in binding.optimizers.values():
        undo.callback(restore, each, "step", each.__dict__.get("step"))
        original = each.step
        if is_sparse_adam(each):
            names = {id(given[name]): name for name in binding.modules}
            original = partial(sparse_adam_update, each, names, lookups.touched)
        each.step = _stepper(each, original, lookups, on_tensors)  # type: ignore[method-assign]
        undo.enter_context(private.without_own_scaling(each))


def _stepper(each: torch.optim.Optimizer, original: Callable, lookups: SparseLookups, on_tensors: bool) -> Callable:
    def step(closure=None):
        if closure is not None:
            raise CaptureError(
                f"{current_line()}: {type(each).__name__}.step(closure) evaluates the loss as often as it likes; expected "
                "optimizer.step() without a closure. Use an optimizer that needs none."
            )
        lookups.check(each)
        with _first_updates(each):
            if not on_tensors:
                try:
                    return original()
                except private.DATA_DEPENDENT as error:
                    raise BranchOnState from error
            with private.compiling(), _steps_as_float64(each):
                return original()

    return step


def restore(owner: object, key: str, before: object) -> None:
    """An attribute of the instance is what it was; None: there was none."""
    if before is None:
        vars(owner).pop(key, None)
    else:
        setattr(owner, key, before)


@contextmanager
def _steps_as_float64(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Floating 0-d state becomes float64 while the optimizer steps, so that bias corrections keep their digits."""
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    before = [group["capturable"] for group in groups]
    narrow = []
    for held in optimizer.state.values():
        for key, value in held.items():
            if isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point():
                narrow.append((held, key, value))
                held[key] = value.double()
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for held, key, value in narrow:
            held[key] = held[key].to(value.dtype)
        for group, was in zip(groups, before, strict=True):
            group["capturable"] = was


@contextmanager
def _first_updates(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While open, a parameter whose state says whether its first update is made is alone in its group, and `dampening`
    there is 0 until it is."""
    groups = optimizer.param_groups
    apart = [(group, each) for group in groups for each in _one_by_one(group, optimizer.state)]
    optimizer.param_groups = [each for _, each in apart]
    try:
        yield
    finally:
        optimizer.param_groups = groups
        for group, each in apart:
            group.update({key: value for key, value in each.items() if key not in ("params", "dampening")})
    for _, each in apart:
        for parameter in each["params"]:
            begun = optimizer.state.get(parameter, {}).get(BEGUN)
            if begun is not None and parameter.grad is not None and each["momentum"] != 0:
                begun.clamp_(min=1.0)


def _one_by_one(group: dict, state: Mapping[torch.Tensor, Mapping[str, Any]]) -> list[dict]:
    begun = {id(p): state[p][BEGUN] for p in group["params"] if BEGUN in state.get(p, {})}
    if not begun:
        return [group]
    return [
        {
            **group,
            "params": [p],
            "dampening": group["dampening"] * begun[id(p)].item() if id(p) in begun else group["dampening"],
        }
        for p in group["params"]
    ]
