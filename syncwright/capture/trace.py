"""The user's step as it runs (autograd and in-place updates included), then as pure functions: rewritten, or traced again."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.func import functionalize
from torch.fx import Graph, GraphModule, Interpreter
from torch.optim.lr_scheduler import LRScheduler
from torch.utils import _pytree as pytree

from syncwright.capture import private
from syncwright.capture.draws import Draws
from syncwright.capture.functional import NotCovered, without_writes
from syncwright.capture.initial import BEGUN
from syncwright.capture.lines import current_line, definition, user_line
from syncwright.capture.means import Lines, partial_means
from syncwright.capture.sparse import SparseLookups
from syncwright.capture.sparse_adam import is_sparse_adam
from syncwright.capture.sparse_adam import update as sparse_adam_update
from syncwright.capture.state import Binding
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


def trace(step: Callable, binding: Binding, optimizer: object, batch: tuple, inputs: tuple[Variable, ...]) -> Traced:
    """Traces `step(model, optimizer, *batch)`.

    Optimizer arithmetic stays in host doubles (bit-equal to eager) where the optimizer never branches on a step count;
    where it does (RAdam, ASGD), it is traced again as for `capturable=True`, its step counts in float64 tensors.
    """
    try:
        return _Trace(step, binding, optimizer, batch, inputs, on_tensors=False).run()
    except _BranchOnState:
        return _Trace(step, binding, optimizer, batch, inputs, on_tensors=True).run()


def returned_shapes(step: Callable, binding: Binding, optimizer: object, batch: tuple, inputs) -> list[tuple[int, ...]]:
    """The shapes of what `step(model, optimizer, *batch)` returns, leaf by leaf; no graph is made."""
    try:
        return _Trace(step, binding, optimizer, batch, inputs, on_tensors=False).shapes()
    except _BranchOnState:
        return _Trace(step, binding, optimizer, batch, inputs, on_tensors=True).shapes()


class _BranchOnState(Exception):
    """The optimizer branched on a number that it keeps in its state."""


class _Trace:
    """One attempt. Lives as long as the two traces of it."""

    def __init__(self, step, binding: Binding, optimizer, batch, inputs, *, on_tensors: bool):
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
            tuple(self.arguments),
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
        """State that is one number, expanded, is to be as any other."""
        if value.is_contiguous() or 0 not in value.stride():
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
            undo.enter_context(_refusals())
            self.draws = undo.enter_context(Draws())
            undo.enter_context(Lines(current_line))
            self._wrap_optimizers(lookups, given, undo)
            result = self._run_step(given)
            _check_after(swap, hypers)
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
        except (CaptureError, _BranchOnState):
            raise
        except Exception as error:
            raise _explain(error, self.step) from error

    def _place_gradients(self, given: Mapping[str, object], undo: ExitStack) -> SparseLookups:
        tensors = {n: t for n in self.binding.modules if isinstance(t := given[n], torch.Tensor) and t.requires_grad}
        for name, tensor in tensors.items():
            tensor.grad = given[f"{name}.grad"]  # type: ignore[assignment]
        lookups = SparseLookups(tensors, self.binding.lazy, current_line)
        lookups.install(undo)
        return lookups

    def _wrap_optimizers(self, lookups: SparseLookups, given: Mapping[str, object], undo: ExitStack) -> None:
        scopes = [inspect.unwrap(type(o).step).__globals__ for o in self.binding.optimizers.values()]
        undo.enter_context(private.symbolic_extremes(scopes))
        for each in self.binding.optimizers.values():
            undo.callback(_restore, each, "step", each.__dict__.get("step"))
            original = each.step
            if is_sparse_adam(each):
                names = {id(given[name]): name for name in self.binding.modules}
                original = partial(sparse_adam_update, each, names, lookups.touched)
            each.step = self._stepper(each, original, lookups)  # type: ignore[method-assign]

    def _stepper(self, each: torch.optim.Optimizer, original: Callable, lookups: SparseLookups) -> Callable:
        def step(closure=None):
            if closure is not None:
                raise CaptureError(
                    f"{current_line()}: {type(each).__name__}.step(closure) evaluates the loss as often as it likes; expected "
                    "optimizer.step() without a closure. Use an optimizer that needs none."
                )
            lookups.check(each)
            with _first_updates(each):
                if not self.on_tensors:
                    try:
                        return original()
                    except private.DATA_DEPENDENT as error:
                        raise _BranchOnState from error
                with private.compiling(), _steps_as_float64(each):
                    return original()

        return step

    def _results(self, result: object, swap) -> list[object]:
        leaves, self.returned = pytree.tree_flatten(result)
        self.leaves = len(leaves)
        replaced = swap.replaced()
        self.replaced = tuple(replaced)
        return [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in [*leaves, *replaced.values()]]


def _restore(owner: object, key: str, before: object) -> None:
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


@contextmanager
def _refusals() -> Iterator[None]:
    """What would happen once, at capture, and never again, is refused with the line that does it."""

    def refuse_schedule(self, *args, **kwargs):
        raise CaptureError(
            f"{current_line()}: {type(self).__name__}.step() inside the training step; it would run once, at capture. "
            "Expected the schedule to advance outside. Call it after trainer.step(...)."
        )

    def refuse_scaling(self, outputs):
        if not self.is_enabled():
            return outputs
        raise CaptureError(
            f"{current_line()}: GradScaler.scale() inside the training step; whether a scaled step counts is decided by its "
            "gradients, which have no value while the step is captured. Expected a step without loss scaling: train in "
            "bfloat16 or float32, or build GradScaler(enabled=False)."
        )

    def refuse_print() -> str:
        raise _printed(current_line())

    kinds = [c for c in [LRScheduler, *_subclasses(LRScheduler)] if "step" in vars(c)]
    with ExitStack() as undo:
        for kind in kinds:
            undo.callback(setattr, kind, "step", vars(kind)["step"])
            kind.step = refuse_schedule  # type: ignore[method-assign]
        undo.callback(setattr, GradScaler, "scale", GradScaler.scale)
        GradScaler.scale = refuse_scaling  # type: ignore[method-assign]
        undo.enter_context(private.no_printing(refuse_print))
        yield


def _printed(where: str) -> CaptureError:
    return CaptureError(
        f"{where}: a tensor is printed (or formatted) inside the training step; it has no value while the step is "
        "captured. Expected a step that only computes. Return it from the step and print what trainer.step(...) gives "
        "back."
    )


def _subclasses(kind: type) -> list[type]:
    return [s for c in kind.__subclasses__() for s in [c, *_subclasses(c)]]


def _check_after(swap, hypers: Mapping[str, object]) -> None:
    if names := swap.changed_hypers(hypers):
        raise CaptureError(
            f"the step changes {', '.join(names)}; expected a step to read hyper-parameters only. "
            "Change them between steps: they are read at every trainer.step(...)."
        )
    if names := swap.unknown_state():
        raise CaptureError(
            f"the step makes optimizer state that the optimizer's first update did not make: {', '.join(names)}. "
            "Expected the same state after every update. Take one step before capture so that the state exists."
        )


def _explain(error: Exception, step: Callable) -> CaptureError:
    """The user's own line, what stood there, and what to do."""
    where = user_line(error.__traceback__) or definition(step)
    text = str(error).strip().split("\n")[0].rstrip(".")
    if isinstance(error, private.DATA_DEPENDENT) or any(sign in text for sign in _NEEDS_A_VALUE):
        return CaptureError(
            f"{where}: the step needs a tensor's value, which is not known while it is captured. Expected the same "
            "operations for every batch. To decide by a tensor, use torch.where(condition, a, b); to look at one, "
            "return it from the step; or decide outside the step."
        )
    if "unsupported format string" in text:
        return _printed(where)
    if "convert all Tensors to FakeTensors" in str(error):
        return CaptureError(
            f"{where}: the step uses a tensor that is neither an argument nor part of the model. Expected every tensor "
            "to come in by the batch, or as a parameter or buffer of the model. Pass it in the batch, or register it "
            "with module.register_buffer(name, tensor)."
        )
    return CaptureError(
        f"{where}: found {type(error).__name__}{': ' if text else ''}{text} while the step was captured. Expected a "
        "step that runs as it is on one device. Run step(model, optimizer, *batch) once without Syncwright to see "
        "whether it does."
    )


_NEEDS_A_VALUE = ("data-dependent", ".numpy() is not supported")


def _batch_norm(x, weight, bias, mean, variance, training, momentum, eps):
    """`native_batch_norm` writes its statistics without saying so; this form says so, and is bit-equal."""
    legit = torch.ops.aten._native_batch_norm_legit
    if mean is None:
        return legit.no_stats(x, weight, bias, training, momentum, eps)
    return legit.default(x, weight, bias, mean, variance, training, momentum, eps)


_PURE = {torch.ops.aten.native_batch_norm.default: _batch_norm}
