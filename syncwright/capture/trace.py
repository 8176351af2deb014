"""The user's step as it runs (autograd and in-place updates included), then as pure functions: rewritten, or traced again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch.func import functionalize
from torch.fx import Graph, GraphModule, Interpreter
from torch.utils import _pytree as pytree

from syncwright.capture import private
from syncwright.capture.draws import Draws
from syncwright.capture.foreach import each_by_itself
from syncwright.capture.functional import NotCovered, without_writes
from syncwright.capture.lines import current_line
from syncwright.capture.means import Lines, partial_means
from syncwright.capture.refusals import check_after, explain, refusals
from syncwright.capture.scaling import SCALING, ScalerMet, check_updated, wrap_scalers
from syncwright.capture.sparse import SparseLookups
from syncwright.capture.state import Binding
from syncwright.capture.stepping import BranchOnState, wrap_optimizers
from syncwright.capture.unbounded import Unbounded
from syncwright.deferred.tensor import Deferred
from syncwright.errors import CaptureError
from syncwright.program import Role, Variable

STALE = "gradient left over from before the step"


@dataclass(frozen=True, slots=True)
class Traced:
    """A graph without writes over flat arguments, and what each argument and result is.

    module     holds the constants that the graph names
    arguments  one variable per placeholder, in order
    replaced   names of the variables whose new value is a result, in order (others are written by `copy_` nodes)
    means      what is said of means over something else than all examples (see `means`)
    returned   the structure of what the user's step returns; its leaves are the first results
    symbols    what the guards' symbols stand for: a variable, and of an INPUT the axis
    draws      of every random call, in order: which number of draw it is; a number seen before is the same draw again
    modes      of every module, whether it trains when the step ends
    """

    module: GraphModule
    graph: Graph
    arguments: tuple[Variable, ...]
    replaced: tuple[str, ...]
    returned: pytree.TreeSpec
    leaves: int
    guards: tuple[tuple[str, tuple[str, ...]], ...]
    symbols: Mapping[str, tuple[str, int | None]]
    draws: tuple[int, ...]
    modes: tuple[bool, ...]
    means: tuple[str, ...] = ()


def trace(
    step: Callable,
    binding: Binding,
    optimizer: object,
    batch: tuple,
    inputs: tuple[Variable, ...],
    remote: Collection[str] | None = None,
) -> Traced:
    """Traces `step(model, optimizer, *batch)`. `remote`: see `Unbounded`.

    Optimizer arithmetic stays in host doubles (bit-equal to eager) where the optimizer never branches on a step count;
    where it does (RAdam, ASGD), it is traced again as for `capturable=True`, its step counts in float64 tensors. It is also
    where it scales the loss by a scaler that the binding has not met before: its scale is a variable then.
    """
    on_tensors = False
    while True:
        try:
            return _Trace(step, binding, optimizer, batch, inputs, on_tensors=on_tensors, remote=remote).run()
        except BranchOnState:
            on_tensors = True
        except ScalerMet as met:
            binding.add_scaler(met.scaler)


def returned_shapes(
    step: Callable, binding: Binding, optimizer: object, batch: tuple, inputs, remote: Collection[str] | None = None
) -> list[tuple[int, ...]]:
    """The shapes of what `step(model, optimizer, *batch)` returns, leaf by leaf; no graph is made."""
    try:
        return _Trace(step, binding, optimizer, batch, inputs, on_tensors=False, remote=remote).shapes()
    except BranchOnState:
        return _Trace(step, binding, optimizer, batch, inputs, on_tensors=True, remote=remote).shapes()


class _Trace:
    """One attempt. Lives as long as the two traces of it."""

    def __init__(self, step, binding: Binding, optimizer, batch, inputs, *, on_tensors: bool, remote=None):
        self.unbounded = Unbounded(binding, remote)
        self.step, self.binding, self.optimizer, self.batch = step, binding, optimizer, batch
        self.on_tensors = on_tensors
        self.mode = private.fake_mode(current_line)
        self.symbols: dict[str, tuple[str, int | None]] = {}
        self.arguments: list[Variable] = []
        self.flat: list[object] = []
        self.replaced: tuple[str, ...] = ()
        self.returned: pytree.TreeSpec | None = None
        self.leaves = 0
        self.draws = Draws()
        self.modes: tuple[bool, ...] = ()
        self._fill(inputs)

    def run(self) -> Traced:
        with self.mode, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lazy_property|.*non-leaf Tensor")
            first = self._first()
            module, graph = self._without_writes(first)
        means = self._means(first.graph)
        assert self.returned is not None, "the first trace has run"
        self._refuse_fixed()
        guards = (*private.guards_of(self.mode), *self._least_sizes())
        return Traced(
            module,
            graph,
            tuple(map(self.unbounded.marked, self.arguments)),
            self.replaced,
            self.returned,
            self.leaves,
            guards,
            dict(self.symbols),
            tuple(self.draws.numbers),
            self.modes,
            means,
        )

    def _refuse_fixed(self) -> None:
        for symbol, size, where in private.specialised(self.mode, self.symbols):
            name, axis = self.symbols[symbol]
            if axis is not None:
                raise CaptureError(
                    f"{where}: axis {axis} of '{name}' is marked dynamic, but here the step takes it to be {size}. Expected a "
                    "step that does the same for any size. Leave the axis unmarked, or take the number out of the step "
                    "(x.shape[0] instead of len(x), -1 instead of a constant in a view)."
                )

    def _least_sizes(self) -> list[tuple[str, tuple[str, ...]]]:
        """A trace takes sizes of 0 and 1 to be others."""
        return [(f"{symbol} >= 2", (symbol,)) for symbol, (_, axis) in self.symbols.items() if axis is not None]

    def _means(self, graph: Graph) -> tuple[str, ...]:
        names = [v.name for v in self.arguments if v.role is Role.INPUT]
        leaves = [leaf for leaf in pytree.tree_leaves(self.batch) if isinstance(leaf, torch.Tensor)]
        return partial_means(graph, self.arguments, dict(zip(names, leaves, strict=True)))

    def shapes(self) -> list[tuple[int, ...]]:
        with self.mode, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lazy_property|.*non-leaf Tensor")
            results = self._call(*self.flat)[: self.leaves]
        return [tuple(x.shape) if isinstance(x, torch.Tensor) else () for x in results]

    def _fill(self, inputs: tuple[Variable, ...]) -> None:
        values, variables = self.binding.values(), self.binding.variables
        for name, value in values.items():
            self._argument(variables[name], value)
        for name, slots in self.binding.modules.items():
            tensor = slots[0].get()
            if tensor.requires_grad:
                stale = Variable(f"{name}.grad", Role.GRAD, tuple(tensor.shape), tensor.dtype, of=name)
                self._argument(stale, tensor.detach())
        for name, value in self.binding.hyper_values().items():
            self._argument(variables[name], value)
        leaves = [leaf for leaf in pytree.tree_leaves(self.batch) if isinstance(leaf, torch.Tensor)]
        for variable, leaf in zip(inputs, leaves, strict=True):
            self._argument(variable, leaf)

    def _argument(self, variable: Variable, value: object) -> None:
        self.arguments.append(variable)
        if isinstance(value, torch.Tensor) and variable.dynamic:
            self.flat.append(self._dynamic(variable, value))
        elif isinstance(value, torch.Tensor):
            fake = self._fake(value)
            slot = self.binding.modules.get(variable.name)
            if variable.role in (Role.PARAM, Role.BUFFER) and slot and slot[0].get().requires_grad:
                fake.requires_grad_()
            if variable.role is Role.PARAM:
                fake._is_param = True  # type: ignore[attr-defined]
            self.flat.append(fake)
        else:
            number = private.host_number(self.mode, float(value), variable.name)  # type: ignore[arg-type]
            self.symbols[private.symbol_of(number)] = (variable.name, None)
            self.flat.append(number)

    def _fake(self, value: torch.Tensor) -> torch.Tensor:
        """State that is one number, expanded, is to be as any other; what is deferred is not made for this."""
        if not isinstance(value, Deferred) and (value.is_contiguous() or 0 not in value.stride()):
            return self.mode.from_tensor(value, static_shapes=True)
        with self.mode:
            return torch.empty(value.shape, dtype=value.dtype, device=value.device)

    def _dynamic(self, variable: Variable, value: torch.Tensor) -> torch.Tensor:
        fake = private.dynamic_tensor(self.mode, value, variable.dynamic, variable.name)
        for axis in variable.dynamic:
            self.symbols[private.size_symbol(fake, axis)] = (variable.name, axis)
        return fake

    def _first(self) -> GraphModule:
        return private.make_fx(self._call, decomposition_table=_PURE, _allow_non_fake_inputs=False)(*self.flat)

    def _without_writes(self, first: GraphModule) -> tuple[GraphModule, Graph]:
        try:
            return first, without_writes(first.graph)
        except NotCovered:
            second = self._second(first)
            return second, second.graph

    def _second(self, first: GraphModule) -> GraphModule:
        def replay(*flat: object) -> object:
            return Interpreter(first).run(*flat)

        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in self.flat]
        with torch.no_grad():
            return private.make_fx(functionalize(replay, remove="mutations"), decomposition_table=_PURE)(*detached)

    def _call(self, *flat: object) -> list[object]:
        given = {variable.name: value for variable, value in zip(self.arguments, flat, strict=True)}
        hypers = {name: given[name] for name in self.binding.hypers}
        with self.binding.swapped(given, hypers) as swap, ExitStack() as undo:
            lookups = self._place_gradients(given, undo)
            undo.enter_context(refusals())
            undo.enter_context(self.unbounded.traced())
            self.draws = undo.enter_context(Draws())
            undo.enter_context(Lines(current_line))
            wrap_optimizers(self.binding, lookups, given, self.on_tensors, undo)
            wrap_scalers(self.binding.scalers, undo)
            result = self._run_step(given)
            check_after(swap, hypers)
            check_updated(self.binding.scalers)
            self.draws.check_end()
            self.modes = self.binding.modes()
            return self._results(result, swap)

    def _run_step(self, given: Mapping[str, object]) -> object:
        leaves, spec = pytree.tree_flatten(self.batch)
        inputs = iter(given[v.name] for v in self.arguments if v.role is Role.INPUT)
        batch = spec.unflatten([next(inputs) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves])
        try:
            with torch.enable_grad():
                return self.step(self.binding.model, self.optimizer, *batch)
        except (CaptureError, BranchOnState, ScalerMet):
            raise
        except Exception as error:
            raise explain(error, self.step) from error

    def _place_gradients(self, given: Mapping[str, object], undo: ExitStack) -> SparseLookups:
        tensors = {n: t for n in self.binding.modules if isinstance(t := given[n], torch.Tensor) and t.requires_grad}
        for name, tensor in tensors.items():
            tensor.grad = given[f"{name}.grad"]  # type: ignore[assignment]
        lookups = SparseLookups(tensors, self.binding.lazy, current_line)
        lookups.install(undo)
        return lookups

    def _results(self, result: object, swap) -> list[object]:
        leaves, self.returned = pytree.tree_flatten(result)
        self.leaves = len(leaves)
        replaced = swap.replaced()
        self.replaced = tuple(replaced)
        return [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in [*leaves, *replaced.values()]]


def _batch_norm(x, weight, bias, mean, variance, training, momentum, eps):
    """`native_batch_norm` writes its statistics without saying so; this form says so, and is bit-equal."""
    legit = torch.ops.aten._native_batch_norm_legit
    if mean is None:
        return legit.no_stats(x, weight, bias, training, momentum, eps)
    return legit.default(x, weight, bias, mean, variance, training, momentum, eps)


_PURE = {torch.ops.aten.native_batch_norm.default: _batch_norm, **each_by_itself(), **SCALING}
