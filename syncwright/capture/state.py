"""Binding: the user's model and optimizers as named variables, in both directions."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from syncwright.capture.initial import BEGUN, ignores_dampening, initial_state
from syncwright.capture.scaling import NUMBERS, ScalerSlot, factors
from syncwright.capture.sparse_adam import is_sparse_adam
from syncwright.deferred.tensor import Deferred, become
from syncwright.errors import CaptureError
from syncwright.nn.hash_embedding import HashTable
from syncwright.program import Role, Variable

Value = torch.Tensor | float | int


@dataclass(frozen=True, slots=True)
class ModuleSlot:
    """Where a module keeps a tensor: `module._parameters[key]` or `module._buffers[key]`."""

    module: nn.Module
    table: str
    key: str

    def get(self) -> torch.Tensor:
        return getattr(self.module, self.table)[self.key]

    def set(self, value: object) -> None:
        getattr(self.module, self.table)[self.key] = value


@dataclass(frozen=True, slots=True)
class StateSlot:
    """Where an optimizer keeps state: `optimizer.state[parameter][key]`."""

    optimizer: Optimizer
    parameter: torch.Tensor
    key: str


@dataclass(frozen=True, slots=True)
class HyperSlot:
    """Where an optimizer keeps a number: `optimizer.param_groups[group][key]`, or item `item` of a tuple there."""

    optimizer: Optimizer
    group: int
    key: str
    item: int | None = None

    def get(self) -> float:
        return self.of(self.optimizer.param_groups)

    def of(self, groups: Sequence[Mapping[str, Any]]) -> float:
        """The number in groups like the optimizer's."""
        value = groups[self.group][self.key]
        return float(value if self.item is None else value[self.item])


class Binding:
    """The user's objects as variables. Holds no values of its own but state that no update has made yet.

    Changes when the user's objects change: it reads and writes them. `optimizers` is one optimizer, a tuple or a dict.
    `tables` are the modules whose rows are ids' as they come, by the names of their weights.
    `lazy` are the parameters of which an update leaves rows that no lookup touches as they are (SparseAdam's).
    `scalers` are those that captured steps scale their loss by, in the order in which they were met.
    """

    def __init__(self, model: nn.Module, optimizer: object, state: Mapping[str, nn.Module] | None = None):
        if not isinstance(model, nn.Module):
            raise CaptureError(
                f"the model is a {type(model).__name__}; expected an nn.Module, whose parameters and buffers become "
                "variables. Put what the step trains into a module (an nn.ModuleDict joins several)."
            )
        self.model = model
        self.optimizers = named_optimizers(optimizer)
        self.extra = dict(state or {})
        self.variables: dict[str, Variable] = {}
        self.modules: dict[str, list[ModuleSlot]] = {}
        self.states: dict[str, StateSlot] = {}
        self.hypers: dict[str, HyperSlot] = {}
        self.scalers: list[GradScaler] = []
        self.scaled: dict[str, ScalerSlot] = {}
        self.scaler_states: list[dict] = []
        self._unborn: dict[str, Value] = {}
        self.tables: dict[str, HashTable] = {}
        self._add_module(model, "", Role.PARAM)
        for label, module in self.extra.items():
            if not isinstance(module, nn.Module):
                raise CaptureError(
                    f"state[{label!r}] is a {type(module).__name__}; expected an nn.Module, whose parameters and "
                    "buffers become variables. Keep other values in a buffer of a module."
                )
            self._add_module(module, f"{label}.", Role.BUFFER)
        self._every_module = [each for root in (model, *self.extra.values()) for each in root.modules()]
        self.parameters = {id(slots[0].get()): name for name, slots in self.modules.items()}
        for label, each in self.optimizers.items():
            self._add_optimizer(label, each)
        lazily = [group for each in self.optimizers.values() if is_sparse_adam(each) for group in each.param_groups]
        self.lazy = frozenset(self.parameters[id(p)] for group in lazily for p in group["params"])

    def values(self) -> dict[str, torch.Tensor]:
        """The user's own tensors (not copies), by name: PARAM, BUFFER and STATE. A number is a tensor of float64.

        State that no update has made yet may be one number, expanded: it takes no memory until its owner clones it. What is
        deferred is in it as it is: its owner makes it (`deferred.tensor.real`).
        """
        found: dict[str, torch.Tensor] = {name: slots[0].get().detach() for name, slots in self.modules.items()}
        for name, slot in self.states.items():
            held = _held(slot)
            if slot.key == BEGUN:
                found[name] = torch.tensor(1.0 if held else 0.0)
            else:
                found[name] = _as_tensor(held[slot.key] if slot.key in held else self._unborn[name])
        return {**found, **{name: slot.get() for name, slot in self.scaled.items()}}

    def add_scaler(self, scaler: GradScaler) -> None:
        """From now on the scaler's scale and count are variables: `scaler.scale`, `scaler.growth_tracker`; of a second one
        `scaler.1.scale`."""
        number = len(self.scalers)
        label = f"scaler.{number}" if number else "scaler"
        self.scalers.append(scaler)
        if number < len(self.scaler_states):
            scaler.load_state_dict(self.scaler_states[number])
        for key in NUMBERS:
            slot = ScalerSlot(scaler, key)
            self.scaled[f"{label}.{key}"] = slot
            self._add_variable(Variable(f"{label}.{key}", Role.STATE, (), slot.get().dtype))

    def held(self, name: str) -> torch.Tensor | None:
        """The user's own object behind a variable, where it is a tensor: a module's, or an optimizer's state; None: there is
        none yet."""
        if name in self.modules:
            return self.modules[name][0].get()
        slot = self.states.get(name)
        value = None if slot is None else _held(slot).get(slot.key)
        return value if isinstance(value, torch.Tensor) else None

    def is_whole(self, name: str) -> bool:
        """Whether the optimizer keeps this state as one of Python's whole numbers."""
        slot = self.states[name]
        return isinstance(_held(slot).get(slot.key, self._unborn.get(name)), int)

    def table_buffers(self, names: Collection[str]) -> set[str]:
        """The buffers of the tables of these names: which id is where, and clocks."""
        tables = [self.tables[name] for name in names]
        return {
            name for name, slots in self.modules.items() if slots[0].module in tables and slots[0].table == "_buffers"
        }

    def hyper_values(self) -> dict[str, float]:
        """What the user's scheduler last set, by name."""
        return {name: slot.get() for name, slot in self.hypers.items()}

    def modes(self) -> tuple[bool, ...]:
        """Of every module, whether it trains."""
        return tuple(module.training for module in self._every_module)

    def set_modes(self, modes: Sequence[bool]) -> None:
        """The inverse of `modes`: what a step leaves behind that calls `model.eval()`, or `train()`, for the rest."""
        for module, training in zip(self._every_module, modes, strict=True):
            if module.training != training:
                module.training = training

    def settings(self) -> tuple:
        """What the trace has frozen and must be captured again when it changes: train or eval, flags, frozen layers."""
        modes = self.modes()
        trained = tuple(slots[0].get().requires_grad for slots in self.modules.values())
        read = self._hyper_keys
        flags = tuple(
            tuple(
                (k, v)
                for k, v in group.items()
                if (isinstance(v, bool | int | float | str) or v is None) and (id(each), index, k) not in read
            )
            for each in self.optimizers.values()
            for index, group in enumerate(each.param_groups)
        )
        return modes, trained, flags, tuple(map(factors, self.scalers))

    @functools.cached_property
    def _hyper_keys(self) -> set[tuple[int, int, str]]:
        return {(id(slot.optimizer), slot.group, slot.key) for slot in self.hypers.values()}

    @torch.no_grad()
    def write(self, values: Mapping[str, Value]) -> None:
        """Copies `values` into the user's own objects; state that no update had made is born here."""
        for name, value in values.items():
            if name in self.modules:
                assert isinstance(value, torch.Tensor), f"{name} is a tensor of a module"
                _write_tensor(self.modules[name][0].get(), value)
            elif name in self.scaled:
                assert isinstance(value, torch.Tensor), f"{name} is a tensor of a scaler"
                self.scaled[name].write(value)
            elif name in self.states and values.get(f"{self.variables[name].of}.{BEGUN}", 1) != 0:
                self._write_state(self.states[name], name, value)

    def state_dict(self, optimizer: object) -> dict[str, object]:
        """`{"model": ..., "optimizer": ...}` as the user's objects hold them now, copied; of a step that scales its loss also
        `"scaler"`, of several scalers a list."""
        match optimizer:
            case dict():
                states: object = {key: each.state_dict() for key, each in optimizer.items()}
            case tuple() | list():
                states = [each.state_dict() for each in optimizer]
            case _:
                states = optimizer.state_dict()  # type: ignore[attr-defined]
        found = {"model": self.model.state_dict(), "optimizer": states}
        scalers = [each.state_dict() for each in self.scalers] or self.scaler_states
        if scalers:
            found["scaler"] = scalers if len(scalers) > 1 else scalers[0]
        return copy.deepcopy(found)

    def load_state_dict(self, optimizer: object, state: Mapping[str, object]) -> None:
        """The inverse of `state_dict`; also takes what a plain PyTorch run saved of the same objects.

        A scaler that no captured step has used yet takes its part when one does.
        """
        self.model.load_state_dict(state["model"])  # type: ignore[arg-type]
        states: Any = state["optimizer"]
        match optimizer:
            case dict():
                saved = [states[key] for key in optimizer]
            case tuple() | list():
                saved = list(states)
            case _:
                saved = [states]
        for each, its in zip(self.optimizers.values(), saved, strict=True):
            each.load_state_dict(copy.deepcopy(its))
        scaled: Any = state.get("scaler", [])
        self.scaler_states = scaled if isinstance(scaled, list) else [scaled]
        for scaler, its in zip(self.scalers, self.scaler_states, strict=False):
            scaler.load_state_dict(its)

    def _write_state(self, slot: StateSlot, name: str, value: Value) -> None:
        if slot.key == BEGUN:
            return
        held = slot.optimizer.state[slot.parameter]
        own = held.get(slot.key)
        if isinstance(value, torch.Tensor) and isinstance(own, torch.Tensor):
            _write_tensor(own, value)
        elif isinstance(before := held.get(slot.key, self._unborn.get(name)), int | float):
            held[slot.key] = type(before)(value)
        else:
            held[slot.key] = value.clone() if isinstance(value, torch.Tensor) else value

    @contextmanager
    def swapped(self, values: Mapping[str, object], hypers: Mapping[str, object]) -> Iterator[Swap]:
        """While open, modules hold `values`, optimizers their state and `hypers`; then all is as it was."""
        with ExitStack() as undo:
            for module in self._every_module:
                undo.callback(setattr, module, "training", module.training)
            for name, slots in self.modules.items():
                for slot in slots:
                    undo.callback(slot.set, slot.get())
                    slot.set(values[name])
            for each in self.optimizers.values():
                self._swap_optimizer(each, values, hypers, undo)
            for name, slot in self.scaled.items():
                slot.swap(values[name], undo)
            yield Swap(self, values)

    def _swap_optimizer(self, each: Optimizer, values, hypers, undo: ExitStack) -> None:
        groups, state = each.param_groups, each.state
        undo.callback(setattr, each, "state", state)
        undo.callback(setattr, each, "param_groups", groups)
        each.param_groups = [
            {**group, "params": [values[self.parameters[id(p)]] for p in group["params"]]} for group in groups
        ]
        for group in each.param_groups:
            group.update({flag: False for flag in ("foreach", "fused") if flag in group})
        each.state = defaultdict(dict)
        for name, slot in self.states.items():
            if slot.optimizer is each:
                each.state[values[self.parameters[id(slot.parameter)]]][slot.key] = values[name]
        for name, slot in self.hypers.items():
            if slot.optimizer is each:
                _set_hyper(each.param_groups[slot.group], slot, hypers[name])

    def _add_module(self, module: nn.Module, prefix: str, role: Role) -> None:
        seen: dict[int, str] = {}
        for kind, table in ((role, "_parameters"), (Role.BUFFER, "_buffers")):
            for path, owner in module.named_modules(remove_duplicate=False):
                for key, tensor in getattr(owner, table).items():
                    if tensor is None:
                        continue
                    name = f"{prefix}{path}.{key}" if path else f"{prefix}{key}"
                    if isinstance(owner, HashTable) and table == "_parameters" and id(tensor) not in seen:
                        self.tables[name] = owner
                    first = seen.setdefault(id(tensor), name)
                    self.modules.setdefault(first, []).append(ModuleSlot(owner, table, key))
                    self._declare(first, name, kind, tensor)

    def _declare(self, first: str, name: str, kind: Role, tensor: torch.Tensor) -> None:
        if first == name:
            self.variables[name] = Variable(name, kind, tuple(tensor.shape), tensor.dtype)
        else:
            known = self.variables[first]
            aliases = (*known.aliases, name)
            self.variables[first] = Variable(first, known.role, known.shape, known.dtype, aliases=aliases)

    def _add_optimizer(self, label: str, optimizer: Optimizer) -> None:
        floats = _declared_floats(type(optimizer))
        for index, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if isinstance(value, int) and not isinstance(value, bool) and key in floats:
                    value = float(value)
                self._add_hypers(f"{label}.{index}.{key}", optimizer, index, key, value)
            for parameter in group["params"]:
                self._add_state(label, optimizer, group, parameter)

    def _add_hypers(self, name: str, optimizer: Optimizer, index: int, key: str, value: object) -> None:
        if isinstance(value, float) or (isinstance(value, torch.Tensor) and value.dim() == 0):
            self._add_hyper(name, HyperSlot(optimizer, index, key))
        elif isinstance(value, tuple | list) and key != "params":
            for item, part in enumerate(value):
                if isinstance(part, float):
                    self._add_hyper(f"{name}.{item}", HyperSlot(optimizer, index, key, item))

    def _add_hyper(self, name: str, slot: HyperSlot) -> None:
        self.hypers[name] = slot
        self._add_variable(Variable(name, Role.HYPER, (), torch.float64))

    def _add_state(self, label: str, optimizer: Optimizer, group: dict, parameter: torch.Tensor) -> None:
        name = self.parameters.get(id(parameter))
        if name is None:
            raise CaptureError(
                f"{label} holds a parameter of shape {tuple(parameter.shape)} that the model does not have. "
                "Expected every parameter of the optimizer to be one of model.parameters(). Pass the module that "
                "holds it as the model (an nn.ModuleDict joins several), or build the optimizer after the model is "
                "final."
            )
        held = {key: value for key, value in optimizer.state.get(parameter, {}).items() if value is not None}
        fresh = initial_state(optimizer, group, parameter, name) if not held else {}
        if held and ignores_dampening(optimizer, group, parameter, name):
            held[BEGUN] = torch.tensor(1.0)
        for key, value in {**fresh, **held}.items():
            state = f"{name}.{key}"
            self.states[state] = StateSlot(optimizer, parameter, key)
            tensor = _as_tensor(value)
            self._add_variable(Variable(state, Role.STATE, tuple(tensor.shape), tensor.dtype, of=name))
            if key in fresh:
                self._unborn[state] = fresh[key]

    def _add_variable(self, variable: Variable) -> None:
        if variable.name in self.variables:
            raise CaptureError(
                f"the name '{variable.name}' stands for two variables ({self.variables[variable.name].role.value} and "
                f"{variable.role.value}). Expected names to be unique. Rename the module, or give each parameter to "
                "one optimizer only."
            )
        self.variables[variable.name] = variable


@dataclass(frozen=True, slots=True)
class Swap:
    """What the modules and optimizers hold after the step has run on swapped values."""

    binding: Binding
    given: Mapping[str, object]

    def replaced(self) -> dict[str, object]:
        """Variables whose slot now holds another object than the one given (assigned, not written in place)."""
        found = {}
        for name, slots in self.binding.modules.items():
            if slots[0].get() is not self.given[name]:
                found[name] = slots[0].get()
        for name, slot in self.binding.states.items():
            parameter: Any = self.given[self.binding.parameters[id(slot.parameter)]]
            now = slot.optimizer.state[parameter].get(slot.key)
            if now is not self.given[name]:
                found[name] = now
        return found

    def unknown_state(self) -> list[str]:
        """State that the step made beyond the initial state."""
        owners = {id(self.given[name]): name for name in self.binding.modules}
        known = set(self.binding.states)
        return [
            f"{owners[id(parameter)]}.{key}"
            for each in self.binding.optimizers.values()
            for parameter, held in each.state.items()
            for key, value in held.items()
            if value is not None and f"{owners[id(parameter)]}.{key}" not in known
        ]

    def changed_hypers(self, hypers: Mapping[str, object]) -> list[str]:
        """Hyper-parameters that the step itself changed."""
        return [
            name
            for name, slot in self.binding.hypers.items()
            if _get_hyper(slot.optimizer.param_groups[slot.group], slot) is not hypers[name]
        ]


def _write_tensor(own: torch.Tensor, value: torch.Tensor) -> None:
    """Copies a value into a tensor of the user's; one that is deferred is made by this."""
    if isinstance(own, Deferred):
        become(own, value.detach().clone())
    else:
        own.copy_(value)


def _held(slot: StateSlot) -> dict[str, Value]:
    """The state that updates have made; PyTorch writes None for what none has made."""
    return {k: v for k, v in slot.optimizer.state.get(slot.parameter, {}).items() if v is not None}


def _declared_floats(kind: type[Optimizer]) -> set[str]:
    """Hyper-parameters that the optimizer's class declares as floats: `SGD(lr=1)` is a rate, `Muon(ns_steps=5)` a count."""
    declared = inspect.signature(kind.__init__).parameters.values()
    return {p.name for p in declared if "float" in str(p.annotation) or isinstance(p.default, float)}


def named_optimizers(optimizer: object) -> dict[str, Optimizer]:
    """One optimizer, a tuple or a dict of them, by label: `optimizer`, `optimizer.0`, `optimizer.<key>`."""
    if isinstance(optimizer, Optimizer):
        return {"optimizer": optimizer}
    named: dict[str, Any]
    if isinstance(optimizer, dict):
        named = {f"optimizer.{key}": each for key, each in optimizer.items()}
    elif isinstance(optimizer, tuple | list):
        named = {f"optimizer.{index}": each for index, each in enumerate(optimizer)}
    else:
        named = {"optimizer": optimizer}
    for label, each in named.items():
        if not isinstance(each, Optimizer):
            raise CaptureError(
                f"{label} is a {type(each).__name__}; expected a torch.optim.Optimizer, or a tuple or dict of them. "
                "Build it over model.parameters() and pass it as `optimizer`."
            )
    return named


def _set_hyper(group: dict, slot: HyperSlot, value: object) -> None:
    if slot.item is None:
        group[slot.key] = value
    else:
        whole = list(group[slot.key])
        whole[slot.item] = value
        group[slot.key] = tuple(whole)


def _get_hyper(group: dict, slot: HyperSlot) -> object:
    return group[slot.key] if slot.item is None else group[slot.key][slot.item]


def _as_tensor(value: Value) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
