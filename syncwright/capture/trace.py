"""The user's step as it runs (autograd and in-place updates included), then as pure functions: rewritten, or traced again."""

from __future__ import annotations

import inspect
import linecache
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch
from torch.amp.grad_scaler import GradScaler
from torch.func import functionalize
from torch.fx import Graph, GraphModule, Interpreter
from torch.optim.lr_scheduler import LRScheduler
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from syncwright.capture import private
from syncwright.capture.functional import NotCovered, without_writes
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
    """

    module: GraphModule
    graph: Graph
    arguments: tuple[Variable, ...]
    replaced: tuple[str, ...]
    returned: pytree.TreeSpec
    leaves: int
    guards: tuple[tuple[str, tuple[str, ...]], ...]
    symbols: Mapping[str, str]
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
        self.mode = private.fake_mode()
        self.symbols: dict[str, str] = {}
        self.arguments: list[Variable] = []
        self.flat: list[object] = []
        self.replaced: tuple[str, ...] = ()
        self.returned: pytree.TreeSpec | None = None
        self.leaves = 0
        self._fill(inputs)

    def run(self) -> Traced:
        with self.mode, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lazy_property|.*non-leaf Tensor")
            first = self._first()
            module, graph = self._without_writes(first)
        means = self._means(first.graph)
        assert self.returned is not None, "the first trace has run"
        guards = tuple(private.guards_of(self.mode))
        return Traced(
            module,
            graph,
            tuple(self.arguments),
            self.replaced,
            self.returned,
            self.leaves,
            guards,
            dict(self.symbols),
            means,
        )

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
        if isinstance(value, torch.Tensor):
            fake = self.mode.from_tensor(value, static_shapes=True)
            slot = self.binding.modules.get(variable.name)
            if variable.role in (Role.PARAM, Role.BUFFER) and slot and slot[0].get().requires_grad:
                fake.requires_grad_()
            if variable.role is Role.PARAM:
                fake._is_param = True  # type: ignore[attr-defined]
            self.flat.append(fake)
        else:
            number = private.host_number(self.mode, float(value), variable.name)  # type: ignore[arg-type]
            self.symbols[private.symbol_of(number)] = variable.name
            self.flat.append(number)

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
            undo.enter_context(Lines(_line))
            self._wrap_optimizers(lookups, given, undo)
            result = self._run_step(given)
            _check_after(swap, hypers)
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
        lookups = SparseLookups(tensors, self.binding.lazy, _line)
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
                    f"{_line()}: {type(each).__name__}.step(closure) evaluates the loss as often as it likes; expected "
                    "optimizer.step() without a closure. Use an optimizer that needs none."
                )
            lookups.check(each)
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
def _refusals() -> Iterator[None]:
    """What would happen once, at capture, and never again, is refused with the line that does it."""

    def refuse_schedule(self, *args, **kwargs):
        raise CaptureError(
            f"{_line()}: {type(self).__name__}.step() inside the training step; it would run once, at capture. "
            "Expected the schedule to advance outside. Call it after trainer.step(...)."
        )

    def refuse_scaling(self, outputs):
        if not self.is_enabled():
            return outputs
        raise CaptureError(
            f"{_line()}: GradScaler.scale() inside the training step; whether a scaled step counts is decided by its "
            "gradients, which have no value while the step is captured. Expected a step without loss scaling: train in "
            "bfloat16 or float32, or build GradScaler(enabled=False)."
        )

    def refuse_print() -> str:
        raise _printed(_line())

    kinds = [c for c in [LRScheduler, *_subclasses(LRScheduler)] if "step" in vars(c)]
    with ExitStack() as undo:
        for kind in kinds:
            undo.callback(setattr, kind, "step", vars(kind)["step"])
            kind.step = refuse_schedule  # type: ignore[method-assign]
        undo.callback(setattr, GradScaler, "scale", GradScaler.scale)
        GradScaler.scale = refuse_scaling  # type: ignore[method-assign]
        undo.enter_context(private.no_printing(refuse_print))
        undo.enter_context(_Replays())
        yield


class _Replays(TorchDispatchMode):
    """Refuses random numbers drawn again from a state that the step has set: a graph draws new ones.

    `checkpoint` does so where it computes a forward with dropout once more. Setting the state back is no draw.
    """

    def __enter__(self):
        self._set, self._replaying = torch.set_rng_state, False
        torch.set_rng_state = torch.random.set_rng_state = self._note
        return super().__enter__()

    def __exit__(self, *raised):
        torch.set_rng_state = torch.random.set_rng_state = self._set
        return super().__exit__(*raised)

    def _note(self, state: torch.Tensor) -> None:
        self._set(state)
        self._replaying = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._replaying and torch.Tag.nondeterministic_seeded in func.tags:
            raise CaptureError(
                f"{_line()}: {func} draws random numbers after the step has set the random state, as torch.utils."
                "checkpoint does to draw a dropout's mask again. Expected every number to be drawn once. Leave dropout out "
                "of what is checkpointed, or checkpoint nothing that draws."
            )
        return func(*args, **(kwargs or {}))


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
    where = _user_line(error.__traceback__) or _definition(step)
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


def _definition(step: Callable) -> str:
    """Where the step itself is written: for a call that did not come into it."""
    code = inspect.unwrap(step).__code__ if inspect.isfunction(inspect.unwrap(step)) else None
    return "the step" if code is None else _quoted(code.co_filename, code.co_firstlineno)


def _user_line(tb: TracebackType | None) -> str:
    frames = [f for f in traceback.extract_tb(tb) if not _ours(f.filename)]
    return _quoted(frames[-1].filename, frames[-1].lineno or 0) if frames else ""


def _line() -> str:
    frame = sys._getframe(1)
    while frame is not None and _ours(frame.f_code.co_filename):
        frame = frame.f_back
    return "the step" if frame is None else _quoted(frame.f_code.co_filename, frame.f_lineno)


def _quoted(file: str, number: int) -> str:
    """`train.py:12 "loss.backward()"`."""
    return f'{file.rsplit("/", 1)[-1]}:{number} "{linecache.getline(file, number).strip()}"'


_TORCH = torch.__file__.rsplit("/", 1)[0] + "/"
_SYNCWRIGHT = __file__.rsplit("/", 2)[0] + "/"


def _ours(filename: str) -> bool:
    library = filename.startswith((_TORCH, _SYNCWRIGHT, "<")) or "/contextlib.py" in filename
    return library or "/site-packages/" in filename or "/logging/__init__.py" in filename


def _batch_norm(x, weight, bias, mean, variance, training, momentum, eps):
    """`native_batch_norm` writes its statistics without saying so; this form says so, and is bit-equal."""
    legit = torch.ops.aten._native_batch_norm_legit
    if mean is None:
        return legit.no_stats(x, weight, bias, training, momentum, eps)
    return legit.default(x, weight, bias, mean, variance, training, momentum, eps)


_PURE = {torch.ops.aten.native_batch_norm.default: _batch_norm}
