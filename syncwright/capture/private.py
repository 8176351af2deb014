"""Every private interface of torch that Syncwright touches, each with the public thing that would replace it."""

from __future__ import annotations

import operator
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import sympy
import torch
from torch._guards import Source
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.amp.grad_scaler import GradScaler, OptState, _refresh_per_optimizer_state
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils._sympy.printers import PythonPrinter

__all__ = [
    "DATA_DEPENDENT",
    "FakeTensor",
    "FakeTensorMode",
    "ShapeEnv",
    "changed_scaling",
    "compiling",
    "dynamic_tensor",
    "fake_mode",
    "guards_of",
    "host_number",
    "is_between_steps",
    "is_unscaled",
    "make_fx",
    "newest_call",
    "no_printing",
    "plain_size",
    "scaler_number",
    "set_scaler_number",
    "size_symbol",
    "skipping",
    "specialised",
    "symbol_of",
    "symbolic_extremes",
    "unscale_anew",
    "without_own_scaling",
]

DATA_DEPENDENT = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)


def fake_mode(where: Callable[[], str]) -> FakeTensorMode:
    """Fake tensors with static shapes whose `.item()` is a symbol. Public: none (`torch.export` hides its own).

    where  says what the step is doing when a symbol gets fixed
    """
    return FakeTensorMode(shape_env=_Env(where), static_shapes=True)


def host_number(mode: FakeTensorMode, value: float, label: str) -> torch.SymFloat:
    """A traced Python float that stands at `value`: a branch on it becomes a guard. Public: none."""
    env = mode.shape_env
    assert env is not None, "fake_mode() gives every mode a shape environment"
    source = _source(label)
    symbol = env.create_unspecified_symbol(value, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    number = env.create_symfloatnode(symbol, hint=value, source=source)
    assert isinstance(number, torch.SymFloat)
    return number


class Specialised(NamedTuple):
    """A symbol of `symbols` that the trace has fixed at a number, and what it was doing then."""

    symbol: str
    size: int
    where: str


def _source(label: str) -> Source:
    """What messages call a symbol. Imported where a step is captured: what only launches or looks at jobs needs no Dynamo."""
    from torch._dynamo.source import ConstantSource

    return ConstantSource(label)


class _Env(ShapeEnv):
    """Notes where the trace fixes a symbol. Changes while a step is traced."""

    def __init__(self, where: Callable[[], str]):
        super().__init__(allow_scalar_outputs=True)
        self.where = where
        self.fixed_at: dict[str, str] = {}

    def _set_replacement(self, a, tgt, msg):
        if tgt.is_number:
            self.fixed_at.setdefault(str(a), self.where())
        super()._set_replacement(a, tgt, msg)


def dynamic_tensor(mode: FakeTensorMode, value: torch.Tensor, axes: Sequence[int], label: str) -> FakeTensor:
    """A fake tensor whose sizes along `axes` are symbols that stand at those of `value`. Public: `torch.export`."""
    sizes = [DimDynamic.DYNAMIC if axis in axes else DimDynamic.STATIC for axis in range(value.dim())]
    context = StatelessSymbolicContext(dynamic_sizes=sizes, constraint_sizes=[None] * value.dim())  # type: ignore[arg-type]
    whole = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    fake = mode.from_tensor(whole, static_shapes=False, source=_source(label), symbolic_context=context)
    if value.is_contiguous():
        return fake
    with mode:
        return torch.empty_strided(fake.shape, value.stride(), dtype=value.dtype, device=value.device)  # type: ignore[return-value]


def size_symbol(tensor: FakeTensor, axis: int) -> str:
    size: Any = tensor.shape[axis]
    return str(size.node.expr)


def specialised(mode: FakeTensorMode, symbols: Collection[str]) -> list[Specialised]:
    """Those of `symbols` that are numbers by now."""
    env: Any = mode.shape_env
    fixed = {str(symbol): target for symbol, target in env.replacements.items() if target.is_number}
    return [Specialised(s, int(fixed[s]), env.fixed_at[s]) for s in symbols if s in fixed]


def plain_size(size: object) -> int:
    """The example's size where a symbol stands for it."""
    return size.node.hint if isinstance(size, torch.SymInt) else int(size)  # type: ignore[call-overload]


def newest_call() -> Node | None:
    """The last call in the graph of the trace under way, if there is one; not an item of its result. Public: none."""
    mode = get_proxy_mode()
    nodes = [] if mode is None else reversed(mode.tracer.graph.nodes)
    return next((node for node in nodes if node.target is not operator.getitem), None)


def symbol_of(number: torch.SymFloat) -> str:
    return str(number.node.expr)


def guards_of(mode: FakeTensorMode) -> list[tuple[str, tuple[str, ...]]]:
    """The branches taken on host numbers, as Python expressions and the symbols in them."""
    env = mode.shape_env
    assert env is not None, "fake_mode() gives every mode a shape environment"
    found: dict[str, tuple[str, ...]] = {}
    for guard in env.guards:
        expression = guard.expr
        if expression is sympy.true:
            continue
        symbols = tuple(sorted(str(s) for s in expression.free_symbols))
        found[PythonPrinter().doprint(expression)] = symbols
    return list(found.items())


@contextmanager
def compiling() -> Iterator[None]:
    """Makes `torch.compiler.is_compiling()` true, as optimizers want it for `capturable` on any device."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


@contextmanager
def symbolic_extremes(scopes: list[dict]) -> Iterator[None]:
    """`min` and `max` of two traced host numbers stay in the graph where the globals are `scopes` (optimizers')."""

    def extreme(symbolic: Callable, plain: Callable) -> Callable:
        def choose(*args, **kwargs):
            if len(args) == 2 and not kwargs and any(isinstance(a, torch.SymFloat) for a in args):
                return symbolic(*args)
            return plain(*args, **kwargs)

        return choose

    replaced = {"min": extreme(torch.sym_min, min), "max": extreme(torch.sym_max, max)}
    changed = [(scope, name) for scope in scopes for name in replaced if name not in scope]
    for scope, name in changed:
        scope[name] = replaced[name]
    try:
        yield
    finally:
        for scope, name in changed:
            scope.pop(name, None)


_NUMBERS = {"scale": torch.float32, "growth_tracker": torch.int32}


def scaler_number(scaler: GradScaler, key: str) -> torch.Tensor:
    """A scaler's `scale` or `growth_tracker`, of no axes; its own tensor once it has one. Public: `state_dict()`, a copy."""
    held = vars(scaler)
    own = held[f"_{key}"]
    return torch.full((), held[f"_init_{key}"], dtype=_NUMBERS[key], device=held["_device"]) if own is None else own


def set_scaler_number(scaler: GradScaler, key: str, value: object) -> object:
    """Puts another tensor there, or none; gives the one that was there. Public: `load_state_dict`, of numbers."""
    before = vars(scaler)[f"_{key}"]
    setattr(scaler, f"_{key}", value)
    return before


@contextmanager
def skipping(scaler: GradScaler, step: Callable) -> Iterator[None]:
    """While open, no optimizer has been unscaled or stepped, and `step(optimizer, {"found_inf_per_device": ...}, ...)` is
    what steps one. Public: none; `GradScaler.step` asks for values."""
    before = scaler._per_optimizer_states
    scaler._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)
    scaler._maybe_opt_step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        del scaler._maybe_opt_step
        scaler._per_optimizer_states = before


def is_between_steps(scaler: GradScaler) -> bool:
    """Whether no optimizer has been unscaled or stepped since the last `update()`. Public: none."""
    return all(state["stage"] is OptState.READY for state in scaler._per_optimizer_states.values())


def is_unscaled(scaler: GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's gradients have been unscaled since the last `update()`. Public: none."""
    return scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.UNSCALED


def unscale_anew(scaler: GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """`unscale_`, of which only the last call counts. Public: `unscale_`, once between two updates."""
    scaler._per_optimizer_states[id(optimizer)] = _refresh_per_optimizer_state()
    scaler.unscale_(optimizer)


def changed_scaling(kind: type[GradScaler]) -> list[str]:
    """What a class does otherwise than torch's. Public: none."""
    names = ("unscale_", "step", "update", "_unscale_grads_", "_maybe_opt_step")
    return [name for name in names if getattr(kind, name) is not getattr(GradScaler, name)]


@contextmanager
def without_own_scaling(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While open, a fused optimizer leaves it to the scaler to unscale and to skip. Public: `fused=False`, from the beginning."""
    held, key = vars(optimizer), "_step_supports_amp_scaling"
    before = held.get(key)
    held[key] = False
    try:
        yield
    finally:
        held[key] = before
        if before is None:
            del held[key]


@contextmanager
def no_printing(refuse: Callable[[], str]) -> Iterator[None]:
    """`print(loss)` or `print(loss.item())` inside a step would print once, at capture, and never again: it is refused.

    Torch itself may put a tensor into its messages.
    """
    kinds = (FakeTensor, torch.SymFloat, torch.SymInt, torch.SymBool)
    before = [(kind, kind.__repr__) for kind in kinds]

    def refusing(original: Callable) -> Callable:
        return lambda self, **options: original(self, **options) if _torch_asks() else refuse()

    for kind, original in before:
        kind.__repr__ = refusing(original)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind, original in before:
            kind.__repr__ = original  # type: ignore[method-assign]


def _torch_asks() -> bool:
    """Whether the text of a tensor is wanted by torch and not, through `Tensor.__format__`, by who uses it."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in _ASKING:
        frame = frame.f_back
    file = "" if frame is None else frame.f_code.co_filename
    return file.startswith(_TORCH) or "/sympy/" in file


_ASKING = frozenset({"__repr__", "__str__", "__format__", "__torch_function__", "handle_torch_function"})
_TORCH = torch.__file__.rsplit("/", 1)[0] + "/"
