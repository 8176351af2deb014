"""deferred(): large tensors that are made in it are recorded instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from syncwright.deferred.tensor import Deferred, become, new, real

aten = torch.ops.aten
ABOVE = 2**22

FILLED: Mapping[Any, float] = {
    aten.empty.memory_format: 0,
    aten.new_empty.default: 0,
    aten.zeros.default: 0,
    aten.new_zeros.default: 0,
    aten.ones.default: 1,
    aten.new_ones.default: 1,
}
"""Factories of one number."""
FILLED_WITH: Mapping[Any, int] = {aten.full.default: 1, aten.new_full.default: 2}
"""The same, with the place of the number among the arguments."""
DRAWN: Mapping[Any, tuple[Any, slice]] = {
    aten.rand.default: (aten.uniform_.default, slice(0)),
    aten.rand.generator: (aten.uniform_.default, slice(0)),
    aten.randn.default: (aten.normal_.default, slice(0)),
    aten.randn.generator: (aten.normal_.default, slice(0)),
    aten.normal.float_float: (aten.normal_.default, slice(0, 2)),
    aten.randint.default: (aten.random_.to, slice(0, 1)),
    aten.randint.generator: (aten.random_.to, slice(0, 1)),
    aten.randint.low: (getattr(aten.random_, "from"), slice(0, 2)),
    aten.randint.low_generator: (getattr(aten.random_, "from"), slice(0, 2)),
}
"""Factories of random numbers: how these are drawn, and which arguments say from what."""


class deferred(TorchDispatchMode):
    """While open, tensors with more than `above` elements are not made: what is done to them is recorded.

        with syncwright.deferred():
            model = Recommender()                   # 50,000,000 x 16 take no memory
        optimizer = RowWiseAdagrad(model.parameters(), lr=0.1)
        trainer = syncwright.distribute(step, model, optimizer, plan="parallax")

    above  elements up to which a tensor is made as usual

    Tensors on the host that `torch.empty`, `zeros`, `ones`, `full`, `rand`, `randn`, `randint` and `normal` make, and so
    those of `nn.Embedding`, `nn.Linear` and their like with all of `torch.nn.init` that fills or draws. Random numbers are
    drawn, chunk by chunk, and dropped, so that all that is drawn later is what it would be. Who keeps a deferred parameter
    makes it from its record, with the same bits. What cannot be recorded raises `DeferredError`.
    """

    def __init__(self, above: int = ABOVE) -> None:
        if not isinstance(above, int) or above < 0:
            raise ValueError(f"deferred: found above={above!r}, expected a number of elements, at least 0.")
        super().__init__()
        self.above = above

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        makes = func in FILLED or func in FILLED_WITH or func in DRAWN
        if makes and self._is_plain(kwargs) and not any(isinstance(a, Deferred) for a in args):
            return self._factory(func, args, kwargs)
        return func(*args, **kwargs)

    def _is_plain(self, kwargs: Mapping[str, Any]) -> bool:
        on_host = torch.device(kwargs.get("device") or "cpu").type == "cpu"
        return on_host and not kwargs.get("pin_memory") and kwargs.get("layout") in (None, torch.strided)

    def _factory(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        generator = kwargs.get("generator")
        plain = {key: value for key, value in kwargs.items() if key != "generator"}
        if any(isinstance(a, torch.Tensor) for a in args) and args[0].device.type != "cpu":
            return func(*args, **kwargs)
        look = _without(func)(*args, **{**plain, "device": "meta"})
        if look.numel() <= self.above:
            return func(*args, **kwargs)
        if func in DRAWN:
            draw, given = DRAWN[func]
            return new(look, self.above, draw, args[given], generator)
        return new(look, self.above, number=FILLED[func] if func in FILLED else args[FILLED_WITH[func]])

    @staticmethod
    def build(*owners: nn.Module | Optimizer) -> None:
        """Makes every deferred tensor of modules and optimizers here and now. The very objects change: who holds a parameter
        holds the same one, with its values."""
        for owner in owners:
            if isinstance(owner, Optimizer):
                for state in owner.state.values():
                    state.update({key: real(value) for key, value in state.items() if isinstance(value, Deferred)})
                continue
            for tensor in (*owner.parameters(), *owner.buffers()):
                if isinstance(tensor, Deferred):
                    become(tensor, real(tensor))


def _without(func: Any) -> Any:
    """The form of a factory without a generator."""
    forms = {
        aten.rand.generator: aten.rand.default,
        aten.randn.generator: aten.randn.default,
        aten.randint.generator: aten.randint.default,
        aten.randint.low_generator: aten.randint.low,
    }
    return forms.get(func, func)
