"""A tensor that is not made: its shape and dtype, and a record of what was done to it. Changes with every write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from syncwright.deferred.record import Applied, Away, Filled, Given, Record, drawn, taken, written
from syncwright.deferred.replay import Replay
from syncwright.errors import DeferredError

aten = torch.ops.aten

DRAWS = frozenset(
    {
        *(aten.uniform_.default, aten.normal_.default, aten.cauchy_.default, aten.log_normal_.default),
        *(aten.geometric_.default, aten.random_.default, aten.random_.to, getattr(aten.random_, "from")),
    }
)
"""Draws of which a whole one equals draws on chunks. (Others may draw in parallel, or by another library.)"""
FILLS: Mapping[Any, float] = {
    aten.empty_like.default: 0,
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.new_empty.default: 0,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
}
"""What makes another tensor of one number."""
FILLED_WITH: Mapping[Any, int] = {aten.full_like.default: 1, aten.new_full.default: 2}
"""The same, with the place of the number among the arguments."""
DRAWN: Mapping[Any, Any] = {
    aten.rand_like.default: aten.uniform_.default,
    aten.randn_like.default: aten.normal_.default,
}
"""What makes another tensor of random numbers, with how these are drawn."""
POINTWISE = frozenset({aten._to_copy.default, aten.masked_fill_.Scalar, aten.masked_fill.Scalar})
"""Element by element, but not tagged so."""
JOINED: Mapping[Any, Callable[[list[torch.Tensor]], torch.Tensor]] = {
    aten.any.default: lambda parts: torch.stack(parts).any(),
    aten.all.default: lambda parts: torch.stack(parts).all(),
}
"""What is computed at once, chunk by chunk, and how the chunks' results are joined: rejection samplers ask for it."""


@dataclass(slots=True, eq=False)
class Memory:
    """What stands for a tensor's memory. Changes with every write.

    above  tensors of more elements that are made from this one are not made either
    """

    record: Record
    above: int


class Deferred(torch.Tensor):
    """See above. Views of it share its memory: `look`, a tensor without values, says which part of it they show."""

    memory: Memory
    look: torch.Tensor

    @staticmethod
    def __new__(cls, memory: Memory, look: torch.Tensor) -> Deferred:
        made = torch.Tensor._make_wrapper_subclass(  # public: none
            cls,
            look.shape,
            strides=look.stride(),
            storage_offset=look.storage_offset(),
            dtype=look.dtype,
            device=torch.device("cpu"),
        )
        made.memory, made.look = memory, look
        return made

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"Deferred({list(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict) -> Deferred:
        if id(self) not in memo:
            copied = copied_record(self)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: object):
        raise DeferredError(
            f"a deferred tensor of shape {list(self.shape)} cannot be saved or sent to a process: it is not made. Build it "
            "first (syncwright.deferred.build(model)), or save what `trainer.state_dict(deferred=True)` or `trainer.rows` give."
        )

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():  # public: none
            if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
                return become(args[0], args[1].detach())
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})


def made(look: torch.Tensor, begin: Callable[[], Record], above: int) -> Deferred:
    """A new tensor that is not made, laid out in order."""
    return Deferred(Memory(begin(), above), torch.empty(look.shape, dtype=look.dtype, device="meta"))


def record_of(tensor: Deferred) -> Record:
    """What the elements of a tensor are made from, in the order of its indices."""
    look = tensor.look
    if not look.is_contiguous():
        raise DeferredError(
            f"a part of a deferred tensor (of shape {list(look.shape)}, strides {list(look.stride())}) is read or written that "
            "is no run of rows; such a part is not recorded. Set whole rows, or the whole tensor, or make the tensor outside of "
            "deferred()."
        )
    return taken(tensor.memory.record, int(look.storage_offset()), look.numel())


def copied_record(tensor: Deferred) -> Deferred:
    """Another tensor with the same elements, that later writes to the first do not reach."""
    return made(tensor.look, lambda: record_of(tensor), tensor.memory.above)


def real(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own: a deferred tensor is made here, in memory for it and a few chunks."""
    if not isinstance(tensor, Deferred):
        return tensor.detach().clone()
    return Replay(record_of(tensor)).fill(torch.empty(tensor.shape, dtype=tensor.dtype))


def become(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Makes the very object `tensor` another tensor: modules and optimizers that hold it hold that one from then on."""
    given: Any = nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else other
    mine: Any = tensor
    mine.__class__, given.__class__ = given.__class__, mine.__class__
    mine.__dict__, given.__dict__ = given.__dict__, mine.__dict__
    # Public: torch.utils.swap_tensors, which refuses what is referred to weakly (by nn.LSTM); the object stays the same one.
    torch._C._swap_tensor_impl(mine, given)


def put_away(tensor: Deferred, why: str) -> None:
    """Forgets the record: the elements are somewhere else; `why` says where, and how to get them."""
    record = tensor.memory.record
    tensor.memory.record = Away(why, record.dtype, record.numel)


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict) -> object:
    if func.is_view:
        return _view(func, args, kwargs)
    if func in DRAWS and isinstance(args[0], Deferred):
        generator = kwargs.get("generator")
        return _write(args[0], drawn(func, args[1:], generator, args[0].dtype, args[0].numel()))
    if func in (aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default) and isinstance(args[0], Deferred):
        number = 0 if func is aten.zero_.default else args[1]
        if not isinstance(number, Deferred):
            number = number.item() if isinstance(number, torch.Tensor) else number
            return _write(args[0], Filled(number, args[0].dtype, args[0].numel()))
    if func is aten.copy_.default and isinstance(args[0], Deferred):
        return _write(args[0], _copied(func, args[0], args[1]))
    if func in FILLS or func in FILLED_WITH or func in DRAWN:
        return _another(func, args, kwargs)
    if func in JOINED:
        return JOINED[func]([func(values) for values in Replay(record_of(args[0])).parts()])
    if func in POINTWISE or torch.Tag.pointwise in func.tags:
        return _pointwise(func, args, kwargs)
    raise _refused(func, args)


def _view(func: Any, args: tuple[Any, ...], kwargs: dict) -> object:
    base = args[0]
    shown = func(base.look, *args[1:], **kwargs)
    return pytree.tree_map_only(torch.Tensor, lambda look: Deferred(base.memory, look), shown)


def _write(tensor: Deferred, part: Record) -> Deferred:
    record_of(tensor)  # raises where it is no run of elements
    memory = tensor.memory
    memory.record = written(memory.record, int(tensor.look.storage_offset()), part)
    return tensor


def _another(func: Any, args: tuple[Any, ...], kwargs: dict) -> torch.Tensor:
    """A tensor made after another: not made either, if it is large."""
    if torch.device(kwargs.get("device") or "cpu").type != "cpu":
        raise _refused(func, args)
    look, above = func(args[0].look, *args[1:], **{**kwargs, "device": "meta"}), args[0].memory.above
    if func in DRAWN:
        return new(look, above, DRAWN[func])
    return new(look, above, number=FILLS[func] if func in FILLS else args[FILLED_WITH[func]])


def new(
    look: torch.Tensor,
    above: int,
    draw: Any = None,
    args: tuple[Any, ...] = (),
    generator: torch.Generator | None = None,
    number: Any = 0,
) -> torch.Tensor:
    """A tensor like `look`, of one number, or drawn; not made if it has more than `above` elements."""
    if look.numel() > above:
        if draw is not None:
            return made(look, lambda: drawn(draw, args, generator, look.dtype, look.numel()), above)
        return made(look, lambda: Filled(number, look.dtype, look.numel()), above)
    found = torch.full(look.shape, number, dtype=look.dtype)
    return found if draw is None else draw(found, *args, generator=generator)


def _copied(func: Any, tensor: Deferred, source: torch.Tensor) -> Record:
    if not isinstance(source, Deferred):
        return Given(source.detach().to("cpu", tensor.dtype).expand(tensor.shape).reshape(-1).clone())
    if source.shape != tensor.shape:
        raise _refused(func, (tensor, source))
    if source.dtype == tensor.dtype:
        return record_of(source)
    return Applied(aten._to_copy.default, (record_of(source),), {"dtype": tensor.dtype}, tensor.dtype, tensor.numel())


def _pointwise(func: Any, args: tuple[Any, ...], kwargs: dict) -> torch.Tensor:
    if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments[1:]):
        raise _refused(func, args)
    if torch.device(kwargs.get("device") or "cpu").type != "cpu":
        raise _refused(func, args)
    first = next(a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Deferred))
    look = func(*pytree.tree_map_only(torch.Tensor, _look, args), **pytree.tree_map_only(torch.Tensor, _look, kwargs))

    def argument(given: torch.Tensor) -> Record | torch.Tensor:
        if isinstance(given, Deferred) and given.shape == first.shape:
            return record_of(given)
        if isinstance(given, Deferred) or (given.shape != first.shape and given.dim()):
            raise _refused(func, args)
        return Given(given.detach().reshape(-1).clone()) if given.dim() else given.detach().clone()

    taken_args, taken_kwargs = pytree.tree_map_only(torch.Tensor, argument, (args, kwargs))
    record = Applied(func, taken_args, taken_kwargs, look.dtype, first.numel())
    if not func._schema.is_mutable:
        return made(look, lambda: record, first.memory.above)
    if not isinstance(args[0], Deferred):
        raise _refused(func, args)
    return _write(args[0], record)


def _look(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, Deferred):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return torch.empty_like(tensor, device="meta")


def _refused(func: Any, args: tuple[Any, ...]) -> DeferredError:
    records = [a.memory.record for a in pytree.tree_leaves(args) if isinstance(a, Deferred)]
    away = next((record for record in records if isinstance(record, Away)), None)
    if away is not None:
        return DeferredError(away.why)
    return DeferredError(
        f"{func} reads or writes a deferred tensor, which is not made yet: expected to fill it, to draw uniform, normal or "
        "integer random numbers into it, to change it element by element, or to set whole rows of it. Make what needs more "
        "outside of deferred(), give deferred(above=...) so many elements that this tensor is made at once, or make it now: "
        "syncwright.deferred.build(model)."
    )
